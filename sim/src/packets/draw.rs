//! From a seed to a plan.

use std::time::Duration;

use fastrand::Rng;
use shunt_stack::endpoint::{CloseBy, MoveAt};
use shunt_stack::redirect::{Continuation, OnRedirect};
use shunt_stack::time::Instant;

use super::link::Quality;
use super::plan::{
    ClientPlan, Deed, End, Exchange, FlowPlan, Forward, Kind, Middlebox, NatPlan, Options, Plan, Scenario,
    ServerPlan,
};

/// Streams that share a client's machine in large worlds.
const FLOWS_A_CLIENT: usize = 50;
/// When the world begins: no clock starts at nothing.
pub(super) const BEGIN: Instant = Instant::from_millis(1_000_000);

const POLICIES: [&str; 5] = ["random", "round-robin", "source", "elevator", "least-packets"];

/// The scenario of a seed that asks for none.
fn scenario_of(seed: u64) -> Scenario {
    Scenario::ALL[(seed % Scenario::ALL.len() as u64) as usize]
}

/// Draws the world that `options` ask for.
pub(super) fn draw(options: &Options) -> Plan {
    let scenario = options.scenario.unwrap_or_else(|| scenario_of(options.seed));
    let mut rng = Rng::with_seed(options.seed ^ (scenario as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let flows = options.flows.unwrap_or_else(|| rng.usize(3..=12)).max(1);
    let seconds = options.seconds.unwrap_or_else(|| rng.u64(1..=20)).max(1);
    let mut artist = Artist { rng, scenario, span: Duration::from_secs(seconds) };
    let least_clients = flows.div_ceil(FLOWS_A_CLIENT);
    let count = artist.rng.usize(1..=4.min(flows)).max(least_clients);
    let clients: Vec<_> = (0..count).map(|_| artist.client()).collect();
    let forward = if artist.rng.bool() { Forward::Network } else { Forward::Direct };
    let servers = artist.servers();
    let flows = (0..flows).map(|_| artist.flow(count)).collect();
    let mut plan = Plan {
        seed: options.seed,
        scenario,
        forward,
        balancer_answers: forward == Forward::Network && artist.rng.u8(0..4) == 0,
        policy: POLICIES[artist.rng.usize(0..POLICIES.len())],
        balancers: if artist.any(&[Scenario::Ecmp]) {
            artist.rng.usize(2..=3)
        } else {
            artist.rng.usize(1..=2)
        },
        same_key: artist.rng.bool(),
        spray: artist.any(&[Scenario::Ecmp]) && artist.rng.bool(),
        servers,
        clients,
        flows,
        deeds: Vec::new(),
    };
    plan.deeds = artist.deeds(&plan);
    plan
}

struct Artist {
    rng: Rng,
    scenario: Scenario,
    /// Streams begin, and things are done, within this time.
    span: Duration,
}

impl Artist {
    /// Whether one of these goes wrong here.
    fn any(&self, scenarios: &[Scenario]) -> bool {
        self.scenario == Scenario::Chaos || scenarios.contains(&self.scenario)
    }

    fn one_in(&mut self, n: u32) -> bool {
        self.rng.u32(0..n) == 0
    }

    fn millis(&mut self, range: std::ops::RangeInclusive<u64>) -> Duration {
        Duration::from_millis(self.rng.u64(range))
    }

    /// A time within the world's busy part.
    fn moment(&mut self) -> Instant {
        BEGIN + Duration::from_micros(self.rng.u64(0..=self.span.as_micros() as u64))
    }

    fn quality(&mut self) -> Quality {
        let far = if self.one_in(4) { 80_000 } else { 5_000 };
        let delay = Duration::from_micros(self.rng.u64(50..=far));
        let mut quality = Quality::clean(delay);
        if self.one_in(3) {
            quality.jitter = delay;
        }
        if self.any(&[Scenario::Loss]) {
            quality.loss = [0, 100, 500, 1_000, 3_000][self.rng.usize(0..5)];
            quality.twice = [0, 0, 200, 1_000][self.rng.usize(0..4)];
            quality.late = [0, 0, 300, 2_000][self.rng.usize(0..4)];
            quality.late_by = self.millis(1..=300);
            quality.damage = [0, 0, 100, 1_000][self.rng.usize(0..4)];
            if self.one_in(4) {
                (quality.rate, quality.queue) =
                    (self.rng.u64(20_000..=2_000_000), self.rng.u64(3_000..=60_000));
            }
        } else if self.one_in(6) {
            quality.loss = 50;
        }
        quality
    }

    fn continuation(&mut self) -> Continuation {
        match self.rng.u8(0..8) {
            0..=3 => Continuation::Auto,
            4 | 5 => Continuation::Reconnect,
            6 => Continuation::Handover,
            _ => Continuation::Plain,
        }
    }

    fn buffer(&mut self) -> usize {
        [2_000, 4_096, 16_384, 65_535, 100_000][self.rng.usize(0..5)]
    }

    fn client(&mut self) -> ClientPlan {
        let v4 = self.rng.bool();
        let moves = self.any(&[Scenario::Moves, Scenario::Forgery]);
        let kind =
            if self.rng.bool() && self.scenario != Scenario::Moves { Kind::Beside } else { Kind::Endpoint };
        let nat = self
            .any(&[Scenario::Nat])
            .then(|| NatPlan { random_ports: self.rng.bool(), strict: self.rng.bool() });
        let boxes = [
            Middlebox::Strip,
            Middlebox::Echo,
            Middlebox::DropSyns,
            Middlebox::DropAll,
            Middlebox::Resequence,
        ];
        let boxed =
            self.scenario == Scenario::Middlebox || self.scenario == Scenario::Chaos && self.one_in(3);
        let close_by = if self.one_in(3) { CloseBy::Reset } else { CloseBy::Fin };
        let pause = self.millis(50..=500);
        // A reset takes answers under way along: only the program knows that there are none.
        let idle = close_by == CloseBy::Fin && self.rng.bool();
        ClientPlan {
            kind,
            v4,
            continuation: self.continuation(),
            on_redirect: if moves { OnRedirect::Follow } else { OnRedirect::Hint },
            move_at: if idle { MoveAt::Idle(pause) } else { MoveAt::Boundary },
            close_by,
            buffer: self.buffer(),
            mtu: [1500, 1500, 1280, 9000][self.rng.usize(0..4)],
            up: self.quality(),
            down: self.quality(),
            nat,
            middlebox: boxed.then(|| boxes[self.rng.usize(0..boxes.len())]),
        }
    }

    fn servers(&mut self) -> Vec<ServerPlan> {
        let present = self.rng.usize(2..=4);
        let later = if self.any(&[Scenario::Tables]) { self.rng.usize(1..=2) } else { 0 };
        let mut server = |n: usize| {
            let mut path = || Quality::clean(Duration::from_micros(self.rng.u64(20..=1_000)));
            let (up, down) = (path(), path());
            ServerPlan {
                kind: if self.rng.bool() && self.scenario != Scenario::Moves {
                    Kind::Beside
                } else {
                    Kind::Endpoint
                },
                weight: if self.one_in(3) { self.rng.u32(1..=5) } else { 1 },
                present: n < present,
                buffer: self.buffer(),
                up,
                down,
            }
        };
        (0..present + later).map(&mut server).collect()
    }

    fn body(&mut self) -> u32 {
        match self.rng.u8(0..8) {
            0 => 0,
            1..=4 => self.rng.u32(1..=400),
            5 | 6 => self.rng.u32(400..=6_000),
            _ => self.rng.u32(6_000..=40_000),
        }
    }

    fn flow(&mut self, clients: usize) -> FlowPlan {
        let exchanges = if self.one_in(8) { 0 } else { self.rng.usize(1..=8) };
        let exchanges: Vec<_> =
            (0..exchanges).map(|_| Exchange { request: self.body(), answer: self.body() }).collect();
        let after = self.rng.u32(0..=exchanges.len() as u32);
        let long = self.one_in(2);
        FlowPlan {
            client: self.rng.usize(0..clients),
            start: self.moment(),
            exchanges,
            window: if self.rng.bool() { 1 } else { self.rng.u32(2..=8) },
            pause: if long { self.millis(50..=4_000) } else { Duration::ZERO },
            rest: if self.one_in(6) { self.millis(1..=50) } else { Duration::ZERO },
            late_end: self.rng.bool(),
            end: if self.one_in(10) { End::Abandon { after } } else { End::Close },
        }
    }

    fn deeds(&mut self, plan: &Plan) -> Vec<(Instant, Deed)> {
        let mut deeds = Vec::new();
        let mut some = |artist: &mut Artist, most: usize, deed: &mut dyn FnMut(&mut Artist) -> Deed| {
            for _ in 0..artist.rng.usize(0..=most) {
                let at = artist.moment() + artist.span / 4;
                deeds.push((at, deed(artist)));
            }
        };
        let (servers, clients) = (plan.servers.len(), plan.clients.len());
        let present = plan.servers.iter().filter(|server| server.present).count();
        if self.any(&[Scenario::Tables]) {
            let mut added = present..servers;
            some(self, servers - present, &mut |_| Deed::Add(added.next().unwrap_or(0)));
            // One stays.
            let mut drained = 1..present;
            some(self, present - 1, &mut |_| Deed::Drain(drained.next().unwrap_or(1)));
            some(self, 2, &mut |artist| Deed::Weigh(artist.rng.usize(0..servers), artist.rng.u32(1..=9)));
        }
        if self.any(&[Scenario::Ecmp]) {
            some(self, 6, &mut |_| Deed::Reshuffle);
        }
        if self.any(&[Scenario::Ecmp, Scenario::Restarts]) {
            let balancers = plan.balancers;
            some(self, 3, &mut |artist| {
                Deed::RestartBalancer(artist.rng.usize(0..balancers), artist.rng.u64(1..=4_000))
            });
        }
        if self.any(&[Scenario::Restarts]) {
            some(self, 3, &mut |a| Deed::RestartShim(a.rng.usize(0..clients), a.rng.u64(1..=3_000)));
            some(self, 3, &mut |a| Deed::RestartAgent(a.rng.usize(0..servers), a.rng.u64(1..=3_000)));
        }
        if self.any(&[Scenario::Nat]) {
            some(self, 1, &mut |artist| Deed::Rebind(artist.rng.usize(0..clients)));
        }
        if self.any(&[Scenario::Moves]) {
            some(self, 4, &mut |artist| {
                let from = artist.rng.usize(0..present);
                Deed::Move(from, (from + artist.rng.usize(1..present)) % present)
            });
        }
        if self.any(&[Scenario::Clocks]) {
            let jump = |artist: &mut Artist| artist.rng.i64(-2_000..=20_000);
            some(self, 3, &mut |artist| Deed::JumpClient(artist.rng.usize(0..clients), jump(artist)));
            some(self, 3, &mut |artist| Deed::JumpServer(artist.rng.usize(0..servers), jump(artist)));
        }
        if self.any(&[Scenario::Deaths]) {
            // The last one present: others may be drained.
            some(self, 1, &mut |artist| Deed::Kill(present - 1, artist.rng.u64(1..=30)));
        }
        deeds
    }
}
