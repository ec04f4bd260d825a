//! Connection statistics (optional): what SYN, FIN and RST segments tell, in bounded memory.
//!
//! They are the driver's, beside its [`Balancer`](crate::Balancer), which neither holds nor knows them: no decision can
//! depend on them (`B6`). Other segments are not looked at, so a connection's end is only known by its client's FIN or
//! a RST; one whose end never passes here counts as open until the time-out.

#![allow(clippy::cast_precision_loss, clippy::cast_sign_loss, reason = "an estimate")]

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use shunt_stack::time::Instant;
use shunt_stack::wire::{Packet, SeqNumber, TcpFlags};

use crate::config::{Config, Statistics};
use crate::qos::ServicePorts;
use crate::route::Route;

/// Slots that a flow may be in.
const WAYS: usize = 4;
/// Upper bounds of the histogram of durations, in seconds; the last is without bound.
const BOUNDS: [f64; 9] = [0.01, 0.1, 1.0, 5.0, 30.0, 120.0, 600.0, 3600.0, f64::INFINITY];

/// A flow: who, and since when.
#[derive(Debug, Clone, Copy)]
struct Slot {
    hash: u64,
    opened: Instant,
    /// Of its SYN: a repeated one, and the one to the service port after a redirect, has the same.
    isn: SeqNumber,
    pair: u32,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    Open,
    /// Kept until the slot is needed, so that a repeated FIN does not count again.
    Ended,
}

/// A server under a service.
#[derive(Debug, Clone, Copy, Default)]
struct Pair {
    opened: u64,
    /// Of these, flows that got a slot.
    measured: u64,
    closed: u64,
    reset: u64,
    expired: u64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Histogram {
    /// Not cumulative.
    counts: [u64; BOUNDS.len()],
    sum: Duration,
}

#[derive(Debug)]
struct Flows {
    slots: Box<[Slot]>,
    pairs: Box<[Pair]>,
    /// By service.
    durations: Box<[Histogram]>,
}

/// Counts and flows of all servers and services.
#[derive(Debug)]
pub(crate) struct Connections {
    ports: ServicePorts,
    /// (index of the server, of the service) to pair.
    index: HashMap<(usize, usize), usize>,
    /// By pair: names of server and service, index of the service.
    names: Box<[(String, String, usize)]>,
    services: Box<[String]>,
    timeout: Duration,
    /// Keyed, so that nobody can aim at slots.
    hasher: RandomState,
    flows: Mutex<Flows>,
}

/// What a segment tells.
enum Sign {
    Opens(SeqNumber),
    Closes,
    Resets,
}

impl Connections {
    /// `None` unless they are switched on.
    pub(crate) fn new(config: &Config) -> Option<Connections> {
        let Statistics { flows, timeout } = config.statistics?;
        let mut served: Vec<(usize, usize)> = Vec::new();
        for (index, server) in config.servers.iter().enumerate() {
            served.extend(server.ports.iter().map(|(service, _)| (index, *service)));
        }
        if let Some(server) = config.legacy_server {
            served.extend((0..config.services.len()).map(|service| (server, service)));
        }
        served.sort_unstable();
        served.dedup();
        let name = |&(server, service): &(usize, usize)| {
            (config.servers[server].name.clone(), config.services[service].name.clone(), service)
        };
        let free = Slot { hash: 0, opened: Instant::ZERO, isn: SeqNumber(0), pair: 0, state: State::Free };
        Some(Connections {
            ports: ServicePorts::new(config),
            names: served.iter().map(name).collect(),
            services: config.services.iter().map(|service| service.name.clone()).collect(),
            timeout,
            hasher: RandomState::new(),
            flows: Mutex::new(Flows {
                slots: vec![free; flows.next_multiple_of(WAYS)].into(),
                pairs: vec![Pair::default(); served.len()].into(),
                durations: vec![Histogram::default(); config.services.len()].into(),
            }),
            index: served.into_iter().zip(0..).collect(),
        })
    }

    /// Those of another configuration: servers and services that keep their names keep their counts and flows.
    pub(crate) fn successor(before: Option<&Connections>, config: &Config) -> Option<Connections> {
        let mut next = Connections::new(config)?;
        let Some(before) = before else { return Some(next) };
        next.hasher = before.hasher.clone();
        let place: HashMap<(&str, &str), usize> = before.names.iter().map(names).zip(0..).collect();
        let old = before.lock();
        let mut flows = next.flows.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut moved = vec![None; before.names.len()];
        for (new, name) in next.names.iter().enumerate() {
            if let Some(&pair) = place.get(&names(name)) {
                flows.pairs[new] = old.pairs[pair];
                moved[pair] = Some(new as u32);
            }
        }
        for (new, name) in next.services.iter().enumerate() {
            if let Some(service) = before.services.iter().position(|service| service == name) {
                flows.durations[new] = old.durations[service];
            }
        }
        let in_state = |state| old.slots.iter().filter(move |slot| slot.state == state);
        for slot in in_state(State::Open).chain(in_state(State::Ended)) {
            if let (Some(pair), Some(free)) = (moved[slot.pair as usize], flows.free(slot.hash)) {
                flows.slots[free] = Slot { pair, ..*slot };
            }
        }
        drop(old);
        next.flows = Mutex::new(flows);
        Some(next)
    }

    fn lock(&self) -> MutexGuard<'_, Flows> {
        self.flows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at a packet before it is rewritten.
    pub(crate) fn observe(&self, route: Route, packet: &Packet, now: Instant) {
        let Some(tcp) = packet.tcp() else { return };
        let flags = tcp.flags();
        if !flags.intersects(TcpFlags::SYN | TcpFlags::FIN | TcpFlags::RST) {
            return;
        }
        let (server, vip, client) = match route {
            Route::ToServer { server, .. } => (server, packet.destination(), packet.source_socket()),
            Route::ToClient { vip, server } => (server, vip, packet.destination_socket()),
            Route::ErrorToClient { .. }
            | Route::Redirect { .. }
            | Route::Answer
            | Route::TooBig { .. }
            | Route::Unchanged => return,
        };
        let inbound = matches!(route, Route::ToServer { .. });
        let sign = if flags.contains(TcpFlags::RST) {
            Sign::Resets
        } else if inbound && tcp.is_syn() {
            Sign::Opens(tcp.seq())
        } else if inbound && flags.contains(TcpFlags::FIN) {
            Sign::Closes
        } else {
            return;
        };
        let pair =
            self.ports.of(packet, vip, inbound).and_then(|port| self.pair(server.index(), port.service));
        if let (Some(pair), Some(client)) = (pair, client) {
            let hash = self.hash(client, vip, pair);
            let service = self.names[pair].2;
            self.lock().note(&sign, hash, pair, service, now, self.timeout);
        }
    }

    fn pair(&self, server: usize, service: usize) -> Option<usize> {
        self.index.get(&(server, service)).copied()
    }

    /// A flow moves from a redirect port to a service port: ports of the VIP are not part of it.
    fn hash(&self, client: SocketAddr, vip: IpAddr, pair: usize) -> u64 {
        self.hasher.hash_one((client, vip, names(&self.names[pair])))
    }

    /// The counts now.
    pub(crate) fn snapshot(&self, now: Instant) -> ConnectionsSnapshot {
        let mut flows = self.lock();
        let open = flows.expire(now, self.timeout);
        let mut servers: BTreeMap<String, BTreeMap<String, PairSnapshot>> = BTreeMap::new();
        for ((server, service, _), (pair, open)) in self.names.iter().zip(flows.pairs.iter().zip(&open)) {
            // Flows without a slot are taken to last as long as the others.
            let scale = if pair.measured == 0 { 1.0 } else { pair.opened as f64 / pair.measured as f64 };
            let snapshot = PairSnapshot {
                opened: pair.opened,
                unmeasured: pair.opened - pair.measured,
                closed: pair.closed,
                reset: pair.reset,
                expired: pair.expired,
                open_estimate: (*open as f64 * scale).round() as u64,
            };
            servers.entry(server.clone()).or_default().insert(service.clone(), snapshot);
        }
        let durations = self.services.iter().zip(&flows.durations);
        let durations = durations.map(|(name, histogram)| (name.clone(), histogram.snapshot())).collect();
        ConnectionsSnapshot { servers, durations }
    }
}

fn names((server, service, _): &(String, String, usize)) -> (&str, &str) {
    (server, service)
}

impl Flows {
    fn ways(&self, hash: u64) -> std::ops::Range<usize> {
        let first = (hash % (self.slots.len() / WAYS) as u64) as usize * WAYS;
        first..first + WAYS
    }

    /// The flow's slots: more than one if the client uses a port for two of the VIP's.
    fn find(&self, hash: u64, pair: usize, state: State) -> impl Iterator<Item = usize> {
        self.ways(hash).filter(move |&way| {
            let slot = &self.slots[way];
            slot.state == state && slot.hash == hash && slot.pair as usize == pair
        })
    }

    fn free(&self, hash: u64) -> Option<usize> {
        let ways = self.ways(hash);
        let is = |state| ways.clone().find(|&way| self.slots[way].state == state);
        is(State::Free).or_else(|| is(State::Ended))
    }

    fn note(&mut self, sign: &Sign, hash: u64, pair: usize, service: usize, now: Instant, timeout: Duration) {
        for way in self.ways(hash) {
            self.expire_slot(way, now, timeout);
        }
        match sign {
            Sign::Opens(isn) => {
                if self.find(hash, pair, State::Open).any(|way| self.slots[way].isn == *isn) {
                    return;
                }
                self.pairs[pair].opened += 1;
                let ended = self.find(hash, pair, State::Ended).next();
                if let Some(way) = ended.or_else(|| self.free(hash)) {
                    self.pairs[pair].measured += 1;
                    let pair = pair as u32;
                    self.slots[way] = Slot { hash, opened: now, isn: *isn, pair, state: State::Open };
                }
            }
            Sign::Closes | Sign::Resets => {
                let open = self.find(hash, pair, State::Open).next();
                if let Some(way) = open {
                    let slot = &mut self.slots[way];
                    slot.state = State::Ended;
                    self.durations[service].add(now.since(slot.opened));
                } else if self.find(hash, pair, State::Ended).next().is_some() {
                    return;
                }
                let pair = &mut self.pairs[pair];
                *if matches!(sign, Sign::Closes) { &mut pair.closed } else { &mut pair.reset } += 1;
            }
        }
    }

    fn expire_slot(&mut self, way: usize, now: Instant, timeout: Duration) {
        let slot = &mut self.slots[way];
        if slot.state == State::Open && now.since(slot.opened) > timeout {
            slot.state = State::Free;
            self.pairs[slot.pair as usize].expired += 1;
        }
    }

    /// Forgets old flows; says how many are open, by pair.
    fn expire(&mut self, now: Instant, timeout: Duration) -> Vec<u64> {
        let mut open = vec![0; self.pairs.len()];
        for way in 0..self.slots.len() {
            self.expire_slot(way, now, timeout);
            let slot = &self.slots[way];
            if slot.state == State::Open {
                open[slot.pair as usize] += 1;
            }
        }
        open
    }
}

impl Histogram {
    fn add(&mut self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let bucket = BOUNDS.iter().position(|bound| seconds <= *bound).unwrap_or(BOUNDS.len() - 1);
        self.counts[bucket] += 1;
        self.sum += duration;
    }

    fn snapshot(&self) -> DurationsSnapshot {
        let mut count = 0;
        let bucket = |(bound, counted): (&f64, &u64)| {
            count += counted;
            Bucket { le: if bound.is_finite() { bound.to_string() } else { "+Inf".to_owned() }, count }
        };
        let buckets = BOUNDS.iter().zip(&self.counts).map(bucket).collect();
        DurationsSnapshot { buckets, sum_s: self.sum.as_secs_f64(), count }
    }
}

/// Connections by server and service, and how long they lasted.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct ConnectionsSnapshot {
    /// By server, then by service.
    pub servers: BTreeMap<String, BTreeMap<String, PairSnapshot>>,
    /// How long measured connections lasted, by service.
    pub durations: BTreeMap<String, DurationsSnapshot>,
}

/// One server's connections of one service.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct PairSnapshot {
    /// Connections opened: SYNs, repetitions and the second one of a redirected connect left out.
    pub opened: u64,
    /// Of these, connections of which there was no room to remember the begin: their repeated SYNs count again.
    pub unmeasured: u64,
    /// Connections whose client's FIN has passed.
    pub closed: u64,
    /// Connections reset by either side before that.
    pub reset: u64,
    /// Connections whose end was not seen within the time-out.
    pub expired: u64,
    /// Connections that are probably open.
    pub open_estimate: u64,
}

/// A histogram of durations after the convention of Prometheus.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct DurationsSnapshot {
    /// Cumulative, by upper bound; the last holds all.
    pub buckets: Vec<Bucket>,
    /// Their sum, in seconds.
    pub sum_s: f64,
    /// How many were measured.
    pub count: u64,
}

/// Connections that lasted no longer than a bound.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Bucket {
    /// The bound in seconds, or `+Inf`.
    pub le: String,
    /// How many.
    pub count: u64,
}

/// Reads one count.
type Column = fn(&PairSnapshot) -> u64;

/// In the text format of Prometheus.
impl fmt::Display for ConnectionsSnapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns: [(&str, &str, Column); 6] = [
            ("opened_total", "counter", |pair| pair.opened),
            ("unmeasured_total", "counter", |pair| pair.unmeasured),
            ("closed_total", "counter", |pair| pair.closed),
            ("reset_total", "counter", |pair| pair.reset),
            ("expired_total", "counter", |pair| pair.expired),
            ("open", "gauge", |pair| pair.open_estimate),
        ];
        for (column, kind, value) in columns {
            let family = format!("shunt_balancer_connections_{column}");
            writeln!(f, "# TYPE {family} {kind}")?;
            for (server, services) in &self.servers {
                for (service, pair) in services {
                    writeln!(f, "{family}{{server=\"{server}\",service=\"{service}\"}} {}", value(pair))?;
                }
            }
        }
        let family = "shunt_balancer_connection_duration_seconds";
        writeln!(f, "# TYPE {family} histogram")?;
        for (service, durations) in &self.durations {
            for Bucket { le, count } in &durations.buckets {
                writeln!(f, "{family}_bucket{{service=\"{service}\",le=\"{le}\"}} {count}")?;
            }
            writeln!(f, "{family}_sum{{service=\"{service}\"}} {}", durations.sum_s)?;
            writeln!(f, "{family}_count{{service=\"{service}\"}} {}", durations.count)?;
        }
        Ok(())
    }
}
