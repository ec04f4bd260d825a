//! Published figures, with the tolerance to which our model gives them.

use fastrand::Rng;

use super::cluster::{Change, Cluster, Reuse, Server};
use super::contestant::Contestant;
use super::engine::{self, Outcome, Packets, Plan, Tally};
use super::hashed::{Remember, Stateless, Tracked};
use super::hashing::{Hashing as _, Horizon, Maglev, Modulo, SLOTS};
use super::redirect::Redirect;
use super::scenario::{CHEETAH, CHEETAH_SERVERS};
use super::two_slot::TwoSlot;
use super::workload::Workload;

/// How long a server is away for an update, in seconds, by share: published with the code of JET and Cheetah.
const DOWNTIME: [(f64, f64); 11] = [
    (0.0068, 60.0),
    (0.0433, 120.8),
    (0.2150, 130.7),
    (0.3868, 141.5),
    (0.5585, 153.1),
    (0.7303, 165.7),
    (0.9021, 179.3),
    (0.9658, 304.8),
    (0.9818, 671.7),
    (0.9977, 20_533.6),
    (1.0, 567_076.2),
];

/// Seconds of JET's simulation.
const JET_SECONDS: u32 = 1000;
/// Its updates a minute.
const JET_UPDATES: f64 = 10.0;
/// Connections that the full table broke in it, and of how many.
const JET_BROKEN: (f64, f64) = (7_417.0, 4_687_530.0);

/// Servers that go and come: a random one goes some times a minute, and one comes when an update is over, first the
/// one that went last (as with `AnchorHash`, which JET's simulation uses: its buckets are a stack).
fn jet_changes(rng: &mut Rng) -> Vec<(u32, Change)> {
    let end = f64::from(JET_SECONDS);
    let downtime = Workload::steps(DOWNTIME.to_vec());
    let mut events: Vec<(f64, bool)> = Vec::new();
    let mut at = 0.0;
    while at < end {
        events.push((at, false));
        events.push((at + downtime.draw(rng), true));
        at -= (1.0 - rng.f64()).ln() * 60.0 / JET_UPDATES;
    }
    events.retain(|(at, _)| *at < end);
    events.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut up, mut gone): (Vec<Server>, Vec<Server>) = ((0..468).collect(), Vec::new());
    let mut change = |(at, comes): (f64, bool)| {
        let (from, to) = if comes { (&mut gone, &mut up) } else { (&mut up, &mut gone) };
        let server = if comes { from.pop() } else { Some(from.swap_remove(rng.usize(..from.len()))) };
        let servers: Vec<Server> = server.into_iter().collect();
        to.extend(&servers);
        (at as u32, if comes { Change::Return(servers) } else { Change::Stop(servers) })
    };
    events.into_iter().map(&mut change).collect()
}

/// JET's event-driven simulation, with so many connections open on average.
fn jet_plan(open: f64, seed: u64) -> Plan {
    let workload = Workload::hadoop();
    let rate = open / workload.mean();
    let until = |second: u32| (rate * f64::from(second)) as u64;
    Plan {
        servers: 468 + 47,
        up: 468,
        balancers: 1,
        horizon: 47,
        arrivals: (0..JET_SECONDS).map(|second| until(second + 1) - until(second)).collect(),
        workload,
        packets: Packets::AtChanges,
        changes: jet_changes(&mut Rng::with_seed(seed)),
        flood: None,
        reuse: Reuse::WhenGone,
        seed,
    }
}

/// A tenth of the published scale, or with `SHUNT_TEST_FULL` all of it: 468 servers, 100,000 connections open, tables
/// of 25,000. Tolerance: 20 % of the published share; the schedule of updates is drawn, and one of ours gives 2 % less,
/// another 7 % more. JET's 0 is exact.
#[test]
fn jet_breaks_none_where_a_full_table_breaks_what_was_published() {
    let open = if std::env::var_os("SHUNT_TEST_FULL").is_some() { 100_000.0 } else { 10_000.0 };
    let plan = jet_plan(open, 5);
    let table = (open / 4.0) as u32;
    let contestants: Vec<Box<dyn Contestant>> = vec![
        Box::new(Tracked::<Horizon>::new(Remember::All, table)),
        Box::new(Tracked::<Horizon>::new(Remember::Unsafe, table)),
    ];
    let outcome = engine::run(&plan, contestants, &mut |_| {});
    let misrouted = |lane: usize| outcome.lanes[lane].count(&|tally| tally.misrouted);
    let wanted = JET_BROKEN.0 / JET_BROKEN.1 * outcome.opened as f64;
    println!(
        "of {} connections a full table broke {} (published: {wanted:.0}), JET {}",
        outcome.opened,
        misrouted(0),
        misrouted(1)
    );
    assert!((misrouted(0) as f64 - wanted).abs() < 0.2 * wanted);
    assert_eq!(misrouted(1), 0);
}

/// Durations in Cheetah's experiment: what the responses of its published list of requests take.
const RESPONSES: [(f64, f64); 10] = [
    (0.338, 0.01),
    (0.441, 0.1),
    (0.459, 0.2),
    (0.522, 0.5),
    (0.621, 1.0),
    (0.662, 2.5),
    (0.726, 19.0),
    (0.839, 49.0),
    (0.904, 80.0),
    (1.0, 142.0),
];

/// Seconds between two packets of a long response there.
const RESPONSE_PERIOD: u32 = 5;

/// Broken in the worst second, of a hundred requests: hash, consistent hash, Beamer, Cheetah.
const CHEETAH_WORST: [f64; 4] = [11.47, 3.12, 0.46, 0.0];

fn cheetah_plan(seed: u64) -> Plan {
    const START: u32 = 40;
    let mut drained: Server = 0;
    let mut change = |(second, count): (u32, isize)| {
        let servers = count.unsigned_abs();
        if count > 0 {
            return (START + second, Change::Add(servers));
        }
        let first = drained;
        drained += servers as Server;
        (START + second, Change::Drain((first..drained).collect()))
    };
    Plan {
        servers: CHEETAH_SERVERS + 6,
        up: CHEETAH_SERVERS,
        balancers: 1,
        horizon: 2,
        arrivals: vec![1540; 90],
        workload: Workload::steps(RESPONSES.to_vec()),
        packets: Packets::Every(RESPONSE_PERIOD),
        changes: CHEETAH.into_iter().map(&mut change).collect(),
        flood: None,
        reuse: Reuse::WhenGone,
        seed,
    }
}

fn worst(outcome: &Outcome) -> Vec<f64> {
    let worst = |lane: &engine::Lane| f64::from(lane.by_second.iter().copied().max().unwrap_or_default());
    outcome.lanes.iter().map(worst).collect()
}

/// What is compared is how many break in the worst second *in proportion to the hash*: 27 % with consistent hashing,
/// 4 % with two slots, none with a server named by the connection. Tolerance: a factor of 1.5. The published
/// percentages themselves cannot be had from flows: they depend on which requests a client of the testbed had under
/// way, and when these sent.
#[test]
fn cheetahs_churn_breaks_in_the_published_proportions() {
    let contestants: Vec<Box<dyn Contestant>> = vec![
        Box::new(Stateless::<Modulo>::default()),
        Box::new(Stateless::<Maglev>::default()),
        Box::new(TwoSlot::default()),
        Box::new(Redirect::new(0, 7)),
        Box::new(Stateless::<Horizon>::default()),
    ];
    let outcome = engine::run(&cheetah_plan(7), contestants, &mut |_| {});
    let worst = worst(&outcome);
    println!("worst second: hash, Maglev, two slots, redirect, rendezvous: {worst:?}");
    let near = |ours: f64, published: f64| {
        let factor = (ours / worst[0]) / (published / CHEETAH_WORST[0]);
        println!("{:.3} of the hash's, published {:.3}", ours / worst[0], published / CHEETAH_WORST[0]);
        (1.0 / 1.5..1.5).contains(&factor)
    };
    assert!(
        near(worst[1], CHEETAH_WORST[1])
            && near(worst[4], CHEETAH_WORST[1])
            && near(worst[2], CHEETAH_WORST[2])
    );
    assert_eq!(outcome.lanes[3].count(&Tally::broken), CHEETAH_WORST[3] as u64);
}

fn maglev(up: usize, drained: &[Server]) -> Vec<Server> {
    let mut cluster = Cluster::new(up, up, 1, 0, Reuse::WhenGone);
    cluster.apply(&Change::Drain(drained.to_vec()));
    let mut maglev = Maglev::default();
    maglev.update(&cluster);
    (0..SLOTS as u64).map(|hash| maglev.lookup(hash)).collect()
}

/// A table of more than a hundred slots a server gives shares that differ by one per cent at the most (§3.4 of the
/// paper). Tolerance: none.
#[test]
fn maglevs_shares_differ_by_a_per_cent_at_the_most() {
    for servers in [10, 100, 655] {
        let mut shares = vec![0usize; servers];
        for server in maglev(servers, &[]) {
            shares[usize::from(server)] += 1;
        }
        let (least, most) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
        assert!((most - least) * 100 <= *most, "{servers} servers: {least} to {most}");
    }
}

/// No number for it was found published: ours. A removal moves all slots of the server, and of the others fewer than
/// one in a hundred.
#[test]
fn removing_a_server_moves_few_slots_of_the_others() {
    for servers in [20, 100, 468] {
        let (before, after) = (maglev(servers, &[]), maglev(servers, &[3]));
        let moved = before.iter().zip(&after).filter(|(before, after)| before != after).count();
        let own = before.iter().filter(|server| **server == 3).count();
        println!("{servers} servers: {moved} slots moved, {own} were the server's own");
        assert!(moved >= own && moved - own < SLOTS / 100);
    }
}
