//! Connections come, live through what is done to the cluster, and end; who still reaches its server is counted.
//!
//! Time goes in seconds. Connections are kept by the second in which they end, [`RECORD_BYTES`] each, and only while
//! they are open: what ends in the second in which it began cannot break and is not kept.

use std::collections::VecDeque;

use fastrand::Rng;

use super::cluster::{Change, Cluster, Reuse, Server};
use super::contestant::{Contestant, Flow};
use super::workload::Workload;

/// How many contestants run side by side at the most.
pub const LANES: usize = 6;

/// Bytes that an open connection takes, all contestants together; their tables come on top.
pub const RECORD_BYTES: usize = size_of::<Record>();

/// Contestants, a bit for each.
type Lanes = u8;

/// All of them.
const ALL: Lanes = Lanes::MAX;

/// When open connections send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packets {
    /// Every so many seconds.
    Every(u32),
    /// Once after each change: what the simulation of JET does.
    AtChanges,
}

/// SYNs that nothing follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flood {
    /// The first second of it.
    pub from: u32,
    /// The second after it.
    pub until: u32,
    /// SYNs a second, over all balancers.
    pub per_second: u64,
}

/// What happens in a run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Servers that there are or will be.
    pub servers: usize,
    /// The first of them, up from the beginning.
    pub up: usize,
    /// Balancers at the beginning.
    pub balancers: usize,
    /// How many planned servers are announced at any time.
    pub horizon: usize,
    /// New connections in each second; its length is that of the run.
    pub arrivals: Vec<u64>,
    /// How long they last.
    pub workload: Workload,
    /// When they send.
    pub packets: Packets,
    /// What is done to the cluster, by second; sorted.
    pub changes: Vec<(u32, Change)>,
    /// A flood.
    pub flood: Option<Flood>,
    /// When ports go to another server.
    pub reuse: Reuse,
    /// What everything is drawn from.
    pub seed: u64,
}

/// Broken connections of one kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// A packet went to a server that does not have the connection.
    pub misrouted: u64,
    /// The server that had it ended.
    pub lost: u64,
}

impl Tally {
    /// Both.
    pub fn broken(self) -> u64 {
        self.misrouted + self.lost
    }
}

/// What came of one contestant.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lane {
    /// Connections whose server named a port.
    pub with_port: Tally,
    /// The others; all, where servers name no ports.
    pub without_port: Tally,
    /// Broken connections by second.
    pub by_second: Vec<u32>,
}

/// What came of a run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Connections opened.
    pub opened: u64,
    /// Those of them whose server named a port.
    pub with_port: u64,
    /// The most that were open at once, of those that outlive the second in which they began.
    pub peak_open: u64,
    /// By contestant.
    pub lanes: Vec<Lane>,
    /// Connections that ended, by second.
    pub ended: Vec<u64>,
}

/// An open connection.
#[derive(Debug, Clone, Copy)]
struct Record {
    hash: u64,
    /// By contestant: the server that has it.
    homes: [Server; LANES],
    /// What the server named, where servers do.
    port: u16,
    /// With whom it is broken.
    broken: Lanes,
}

/// A run in progress.
struct World<'a> {
    plan: &'a Plan,
    cluster: Cluster,
    contestants: Vec<Box<dyn Contestant>>,
    /// By the second in which they end; the first is this one.
    open: VecDeque<Vec<Record>>,
    count: u64,
    rng: Rng,
    outcome: Outcome,
    /// Until when connections may not have sent since the last change.
    unsettled: u32,
}

/// Carries a plan out, with the same connections for all contestants; `progress` hears how many were opened.
///
/// # Panics
/// There are more than [`LANES`] contestants.
pub fn run(plan: &Plan, contestants: Vec<Box<dyn Contestant>>, progress: &mut dyn FnMut(u64)) -> Outcome {
    assert!(contestants.len() <= LANES, "{} contestants", contestants.len());
    let cluster = Cluster::new(plan.servers, plan.up, plan.balancers, plan.horizon, plan.reuse);
    let lane = Lane { by_second: vec![0; plan.arrivals.len()], ..Lane::default() };
    let lanes = vec![lane; contestants.len()];
    let mut world = World {
        plan,
        cluster,
        contestants,
        open: VecDeque::new(),
        count: 0,
        rng: Rng::with_seed(plan.seed),
        outcome: Outcome { lanes, ..Outcome::default() },
        unsettled: 0,
    };
    world.update();
    let mut changes = plan.changes.as_slice();
    for (second, arrivals) in (0..).zip(&plan.arrivals) {
        let due = changes.partition_point(|(at, _)| *at <= second);
        let (now, later) = changes.split_at(due);
        changes = later;
        world.second(second, now, *arrivals);
        progress(world.outcome.opened);
    }
    world.outcome
}

impl World<'_> {
    fn second(&mut self, second: u32, changes: &[(u32, Change)], arrivals: u64) {
        let flood = self.plan.flood.filter(|flood| (flood.from..flood.until).contains(&second));
        let syns = flood.map_or(0, |flood| flood.per_second);
        let share = (arrivals + syns) / self.cluster.balancers().max(1) as u64;
        // A quarter more than a balancer's share, as shares are drawn.
        let contended = self.may_evict((share + share / 4 + 16) as usize);
        if !changes.is_empty() {
            self.change(changes, second);
        }
        match self.plan.packets {
            Packets::Every(period) if second < self.unsettled => self.packets(second, period, ALL, contended),
            // Nothing has changed, so only those notice whose tables forget.
            Packets::Every(period) if contended != 0 => self.packets(second, period, contended, contended),
            Packets::AtChanges if !changes.is_empty() => self.packets(second, 1, ALL, contended),
            _ => {}
        }
        self.arrive(arrivals, syns);
        self.end(second);
    }

    /// The contestants whose tables may push something out while so many new connections come to a balancer.
    fn may_evict(&self, coming: usize) -> Lanes {
        let full = self.contestants.iter().enumerate().filter(|(_, contestant)| contestant.may_evict(coming));
        full.fold(0, |lanes, (lane, _)| lanes | 1 << lane)
    }

    fn update(&mut self) {
        self.contestants.iter_mut().for_each(|contestant| contestant.update(&self.cluster));
    }

    fn change(&mut self, changes: &[(u32, Change)], second: u32) {
        let mut ended = vec![false; self.cluster.servers()];
        for (_, change) in changes {
            self.cluster.apply(change).into_iter().for_each(|server| ended[usize::from(server)] = true);
        }
        if ended.contains(&true) {
            self.lose(&ended, second);
        }
        self.update();
        if let Packets::Every(period) = self.plan.packets {
            self.unsettled = second + period;
        }
    }

    /// Connections end with their servers.
    fn lose(&mut self, ended: &[bool], second: u32) {
        for record in self.open.iter_mut().flatten() {
            for (lane, outcome) in self.outcome.lanes.iter_mut().enumerate() {
                if record.broken >> lane & 1 == 0 && ended[usize::from(record.homes[lane])] {
                    record.broken |= 1 << lane;
                    outcome.by_second[second as usize] += 1;
                    outcome.tally(record.port).lost += 1;
                }
            }
        }
    }

    /// Those whose turn it is send, with the contestants `lanes`.
    fn packets(&mut self, second: u32, period: u32, lanes: Lanes, contended: Lanes) {
        let mut open = std::mem::take(&mut self.open);
        let is_due =
            |record: &Record| period <= 1 || (record.hash as u32).wrapping_add(second).is_multiple_of(period);
        if contended != 0 {
            // Who sends last is what a table keeps longest: no order must be better than another.
            let numbered = open.iter().enumerate();
            let all =
                numbered.flat_map(|(end, records)| (0..records.len() as u32).map(move |n| (end as u32, n)));
            let mut order: Vec<(u32, u32)> = all.collect();
            self.rng.shuffle(&mut order);
            for (end, number) in order {
                let record = &mut open[end as usize][number as usize];
                if is_due(record) {
                    self.packet(record, second, lanes);
                }
            }
        } else {
            let due = open.iter_mut().flatten().filter(|record| is_due(record));
            due.for_each(|record| self.packet(record, second, lanes));
        }
        self.open = open;
    }

    fn packet(&mut self, record: &mut Record, second: u32, lanes: Lanes) {
        let flow = self.flow(record.hash, record.port);
        let whole = lanes & !record.broken;
        for (lane, contestant) in self.contestants.iter_mut().enumerate() {
            if whole >> lane & 1 == 1 && !contestant.reaches(&flow, record.homes[lane]) {
                record.broken |= 1 << lane;
                let outcome = &mut self.outcome.lanes[lane];
                outcome.by_second[second as usize] += 1;
                outcome.tally(record.port).misrouted += 1;
                contestant.close(&flow);
            }
        }
    }

    fn flow(&self, hash: u64, port: u16) -> Flow {
        // Other bits than those that most tables go by: routers have a hash of their own.
        let balancer = (hash >> 24) % self.cluster.balancers().max(1) as u64;
        Flow { hash, port, balancer: balancer as usize }
    }

    /// New connections, and between them the SYNs of a flood.
    fn arrive(&mut self, arrivals: u64, syns: u64) {
        for number in 0..arrivals {
            self.syns(syns * (number + 1) / arrivals - syns * number / arrivals);
            self.open();
        }
        if arrivals == 0 {
            self.syns(syns);
        }
        self.outcome.peak_open = self.outcome.peak_open.max(self.count);
    }

    fn syns(&mut self, count: u64) {
        for _ in 0..count {
            let hash = self.rng.u64(..);
            let flow = self.flow(hash, 0);
            self.contestants.iter_mut().for_each(|contestant| contestant.syn(&flow));
        }
    }

    fn open(&mut self) {
        let hash = self.rng.u64(..);
        let flow = self.flow(hash, 0);
        let mut record = Record { hash: flow.hash, homes: [0; LANES], port: 0, broken: 0 };
        for (contestant, home) in self.contestants.iter_mut().zip(&mut record.homes) {
            let opened = contestant.open(&flow);
            *home = opened.server;
            record.port = record.port.max(opened.port);
        }
        self.outcome.opened += 1;
        self.outcome.with_port += u64::from(record.port != 0);
        let end = (self.rng.f64() + self.plan.workload.draw(&mut self.rng)) as usize;
        if end == 0 {
            self.contestants.iter_mut().for_each(|contestant| contestant.close(&flow));
            return;
        }
        if self.open.len() <= end {
            self.open.resize_with(end + 1, Vec::new);
        }
        self.open[end].push(record);
        self.count += 1;
    }

    /// Connections that last no longer send their last packet.
    fn end(&mut self, second: u32) {
        let ending = self.open.pop_front().unwrap_or_default();
        self.count -= ending.len() as u64;
        self.outcome.ended.push(ending.len() as u64);
        for mut record in ending {
            self.packet(&mut record, second, ALL);
            let flow = self.flow(record.hash, record.port);
            for (lane, contestant) in self.contestants.iter_mut().enumerate() {
                if record.broken >> lane & 1 == 0 {
                    contestant.close(&flow);
                }
            }
        }
    }
}

impl Lane {
    fn tally(&mut self, port: u16) -> &mut Tally {
        if port == 0 { &mut self.without_port } else { &mut self.with_port }
    }

    /// Something of both tallies together.
    pub fn count(&self, of: &dyn Fn(Tally) -> u64) -> u64 {
        of(self.with_port) + of(self.without_port)
    }
}
