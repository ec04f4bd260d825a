//! The world: machines, links, balancers and what happens to them, in virtual time on one thread.

use std::collections::BTreeMap;
use std::hash::Hasher;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use bytes::BytesMut;
use fastrand::Rng;
use shunt_stack::device::{Capture, Direction};
use shunt_stack::time::Instant;
use shunt_stack::wire::{Offload, Packet};
use siphasher::sip::SipHasher13;

use super::balancers::{Balancers, Onward, Standing, Tables};
use super::check::{Ledger, Outcome, Violation, checksums_ok, header_ok};
use super::forger::{Forger, NOBODYS_PORT};
use super::hosts::{ClientHost, ServerHost};
use super::plan::{Deed, FlowPlan, Forward, Plan, REDIRECT_PORT, Scenario, ServerPlan, vip};
use super::program::PATIENCE;
use super::report::Summary;
use super::schedule::Schedule;

/// Between two looks at who is stuck and what is left.
const LOOK: Duration = Duration::from_secs(60);
/// What is left so long after the last stream is left for ever.
const REST: Duration = Duration::from_secs(2 * PATIENCE.as_secs());
/// How far apart balancers take over new tables, at the most.
const STAGGER: Duration = Duration::from_millis(300);
/// How long a server is drained at least before it may leave the tables.
const DRAIN: Duration = Duration::from_secs(10);
/// Events of a world at the most, a stream.
const EVENTS_A_FLOW: u64 = 2_000_000;

/// Something to come.
pub(super) enum Event {
    /// A packet from a client is in the core.
    Up(BytesMut),
    /// A packet for a client is at its translator.
    ToClient(usize, BytesMut),
    /// A packet for a server is there.
    ToServer(usize, BytesMut),
    /// A packet of a server is in the core.
    Back(BytesMut),
    /// A machine has something to do.
    Client(usize),
    Server(usize),
    /// A stream begins.
    Start(u32),
    Deed(Deed),
    /// What a deed brought about comes to its end.
    BalancerUp(usize),
    ShimUp(usize),
    AgentUp(usize),
    Reload(usize, Rc<Tables>),
    /// A drained server may leave the tables, a dead one does.
    Leave(usize, bool),
    Look,
}

/// One end of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Client(usize),
    Server(usize),
}

/// A world.
pub(super) struct World {
    pub(super) plan: Plan,
    pub(super) now: Instant,
    pub(super) schedule: Schedule<Event>,
    pub(super) clients: Vec<ClientHost>,
    pub(super) servers: Vec<ServerHost>,
    pub(super) balancers: Balancers,
    pub(super) ledger: Ledger,
    pub(super) standing: Vec<(Standing, u32)>,
    pub(super) tables: Rc<Tables>,
    /// Until when balancers may have different tables.
    pub(super) mixed_until: Instant,
    pub(super) rng: Rng,
    owners: BTreeMap<IpAddr, Owner>,
    trace: SipHasher13,
    packets: u64,
    events: u64,
    capture: Option<Capture>,
    forger: Option<Forger>,
}

impl World {
    pub(super) fn new(plan: Plan, capture: Option<Capture>) -> World {
        let mut rng = Rng::with_seed(plan.seed.rotate_left(32) ^ 0x5eed);
        let clients: Vec<_> =
            plan.clients.iter().enumerate().map(|(index, it)| ClientHost::new(index, it, &mut rng)).collect();
        let servers: Vec<_> =
            (0..plan.servers.len()).map(|index| ServerHost::new(index, &plan, &mut rng)).collect();
        let standing: Vec<_> = plan
            .servers
            .iter()
            .map(|server| (if server.present { Standing::Up } else { Standing::Absent }, server.weight))
            .collect();
        let tables = Tables::new(0, &plan, &standing);
        let balancers = Balancers::new(&plan, &tables, rng.fork());
        let forges = matches!(plan.scenario, Scenario::Forgery | Scenario::Chaos);
        let forger = forges.then(|| Forger::new(rng.fork()));
        let mut owners = BTreeMap::new();
        for (index, client) in plan.clients.iter().enumerate() {
            owners.insert(client.public(index), Owner::Client(index));
        }
        for index in 0..plan.servers.len() {
            for v4 in [true, false] {
                owners.insert(ServerPlan::address(index, v4), Owner::Server(index));
            }
        }
        let mut schedule = Schedule::new();
        for (flow, it) in plan.flows.iter().enumerate() {
            schedule.at(it.start, Event::Start(flow as u32));
        }
        for (at, deed) in &plan.deeds {
            schedule.at(*at, Event::Deed(*deed));
        }
        schedule.at(super::draw::BEGIN + LOOK, Event::Look);
        World {
            now: super::draw::BEGIN,
            schedule,
            clients,
            servers,
            balancers,
            ledger: Ledger::new(plan.flows.clone()),
            standing,
            tables,
            mixed_until: Instant::ZERO,
            rng,
            owners,
            trace: SipHasher13::new(),
            packets: 0,
            events: 0,
            capture,
            forger,
            plan,
        }
    }

    /// Lets everything happen.
    ///
    /// # Errors
    /// What must not happen.
    pub(super) fn run(&mut self) -> Result<Summary, Violation> {
        let limit = EVENTS_A_FLOW * self.plan.flows.len() as u64;
        while let Some((at, event)) = self.schedule.next() {
            self.now = at;
            self.events += 1;
            if self.events > limit {
                return Err(Violation::Endless { events: self.events });
            }
            if matches!(event, Event::Look) {
                if self.look()? {
                    return self.verdict();
                }
                continue;
            }
            self.happen(event)?;
        }
        self.verdict()
    }

    fn happen(&mut self, event: Event) -> Result<(), Violation> {
        match event {
            Event::Up(bytes) => {
                self.forge(&bytes)?;
                self.core(bytes, true)
            }
            Event::Back(bytes) => self.core(bytes, self.plan.forward == Forward::Network),
            Event::ToClient(index, bytes) => self.at_client(index, bytes),
            Event::ToServer(index, bytes) => self.at_server(index, bytes),
            Event::Client(index) => {
                self.clients[index].machine.wake = None;
                self.serve_client(index)
            }
            Event::Server(index) => {
                self.servers[index].machine.wake = None;
                self.serve_server(index)
            }
            Event::Start(flow) => self.start(flow),
            Event::Deed(deed) => self.deed(deed),
            Event::BalancerUp(index) => {
                self.balancers.start(index, &self.tables.clone());
                Ok(())
            }
            Event::ShimUp(index) => {
                let key = self.rng.u128(..).to_be_bytes();
                self.clients[index].machine.start_beside(key);
                self.serve_client(index)
            }
            Event::AgentUp(index) => {
                let key = self.rng.u128(..).to_be_bytes();
                self.servers[index].machine.start_beside(key);
                self.serve_server(index)
            }
            Event::Reload(index, tables) => {
                self.ledger.excuse(true, |_, _, _| true);
                self.balancers.reload(index, &tables);
                Ok(())
            }
            Event::Leave(index, dead) => {
                self.leave(index, dead);
                Ok(())
            }
            Event::Look => Ok(()),
        }
    }

    /// What was seen where goes into the trace and the capture.
    fn note(&mut self, place: &str, direction: Direction, bytes: &[u8]) {
        self.trace.write_u64(self.now.micros());
        self.trace.write(place.as_bytes());
        self.trace.write(bytes);
        if let Some(capture) = &self.capture {
            let at = SystemTime::UNIX_EPOCH + self.now.since(Instant::ZERO);
            capture.record(direction, place, bytes, at);
        }
    }

    /// A packet in the core: to a balancer or, from servers that answer straight to clients, past it.
    fn core(&mut self, bytes: BytesMut, balanced: bool) -> Result<(), Violation> {
        self.packets += 1;
        self.note("core", Direction::In, &bytes);
        let Ok(packet) = Packet::parse(bytes, Offload::default()) else { return Ok(()) };
        if !header_ok(&packet) {
            return Ok(());
        }
        let onward =
            if balanced { self.balancers.handle(self.now, packet)? } else { Some(Onward::Routed(packet)) };
        match onward {
            None => {}
            Some(Onward::Server(index, packet)) => self.towards_server(index, packet),
            Some(Onward::Routed(packet)) => match self.owners.get(&packet.destination()).copied() {
                Some(Owner::Server(index)) => self.towards_server(index, packet),
                Some(Owner::Client(index)) => self.towards_client(index, packet),
                None => {}
            },
        }
        Ok(())
    }

    /// Lets the forger answer a client's packet, and sees that no client believes it.
    fn forge(&mut self, bytes: &[u8]) -> Result<(), Violation> {
        let (Some(forger), Ok(packet)) = (&mut self.forger, Packet::from_slice(bytes)) else { return Ok(()) };
        let over = self.now > self.ledger.last_start() + LOOK;
        if over || !checksums_ok(&packet) {
            return Ok(());
        }
        if packet.ports().is_some_and(|(_, port)| port == NOBODYS_PORT) {
            return Err(Violation::Misled { port: NOBODYS_PORT });
        }
        let client = self.owners.get(&packet.source()).copied();
        if let (Some(Owner::Client(index)), Some(forged)) = (client, forger.answer(&packet)) {
            self.towards_client(index, forged);
        }
        Ok(())
    }

    fn towards_server(&mut self, index: usize, packet: Packet) {
        self.note("core", Direction::Out, packet.bytes());
        for (at, bytes) in self.servers[index].up.send(self.now, packet.into_buffer()).into_iter().flatten() {
            self.schedule.at(at, Event::ToServer(index, bytes));
        }
    }

    fn towards_client(&mut self, index: usize, packet: Packet) {
        self.note("core", Direction::Out, packet.bytes());
        let link = &mut self.clients[index].down;
        for (at, bytes) in link.send(self.now, packet.into_buffer()).into_iter().flatten() {
            self.schedule.at(at, Event::ToClient(index, bytes));
        }
    }

    fn at_client(&mut self, index: usize, bytes: BytesMut) -> Result<(), Violation> {
        let Some(bytes) = self.clients[index].inward(bytes) else { return Ok(()) };
        let name = std::mem::take(&mut self.clients[index].machine.name);
        self.note(&name, Direction::In, &bytes);
        self.clients[index].machine.name = name;
        let mut out = Vec::new();
        self.clients[index].machine.receive(self.now, bytes, &mut out);
        self.send_client(index, out)?;
        self.serve_client(index)
    }

    fn at_server(&mut self, index: usize, bytes: BytesMut) -> Result<(), Violation> {
        if self.servers[index].dead {
            return Ok(());
        }
        let name = std::mem::take(&mut self.servers[index].machine.name);
        self.note(&name, Direction::In, &bytes);
        self.servers[index].machine.name = name;
        let mut out = Vec::new();
        self.servers[index].machine.receive(self.now, bytes, &mut out);
        self.send_server(index, out)?;
        self.serve_server(index)
    }

    /// What a machine sends must be right, whatever came.
    fn examine(name: &str, mtu: usize, packet: &Packet) -> Result<(), Violation> {
        if packet.len() > mtu {
            return Err(Violation::TooLong { host: name.to_owned(), length: packet.len(), mtu });
        }
        if !checksums_ok(packet) {
            return Err(Violation::Checksum { host: name.to_owned(), now: false, before: true });
        }
        match Packet::from_slice(packet.bytes()) {
            Ok(parsed) if parsed == *packet => Ok(()),
            Ok(_) => {
                Err(Violation::Malformed { host: name.to_owned(), what: "other than it says".to_owned() })
            }
            Err(error) => Err(Violation::Malformed { host: name.to_owned(), what: error.to_string() }),
        }
    }

    fn send_client(&mut self, index: usize, out: Vec<Packet>) -> Result<(), Violation> {
        for packet in out {
            let machine = &self.clients[index].machine;
            Self::examine(&machine.name, machine.mtu, &packet)?;
            let name = machine.name.clone();
            self.note(&name, Direction::Out, packet.bytes());
            let client = &mut self.clients[index];
            let Some(packet) = client.outward(packet) else { continue };
            for (at, bytes) in client.up.send(self.now, packet.into_buffer()).into_iter().flatten() {
                self.schedule.at(at, Event::Up(bytes));
            }
        }
        Ok(())
    }

    fn send_server(&mut self, index: usize, out: Vec<Packet>) -> Result<(), Violation> {
        for packet in out {
            let machine = &self.servers[index].machine;
            Self::examine(&machine.name, machine.mtu, &packet)?;
            let name = machine.name.clone();
            self.note(&name, Direction::Out, packet.bytes());
            let link = &mut self.servers[index].down;
            for (at, bytes) in link.send(self.now, packet.into_buffer()).into_iter().flatten() {
                self.schedule.at(at, Event::Back(bytes));
            }
        }
        Ok(())
    }

    /// A machine goes on until it waits for something.
    pub(super) fn serve_client(&mut self, index: usize) -> Result<(), Violation> {
        let mut again = true;
        while again {
            let mut out = Vec::new();
            let ran = self.clients[index].run_programs(self.now, &mut self.ledger)?;
            again = self.clients[index].machine.serve(self.now, &mut out) || ran || !out.is_empty();
            self.send_client(index, out)?;
        }
        let machine = &mut self.clients[index].machine;
        if let Some(at) = machine.deadline(self.now)
            && machine.wake.is_none_or(|wake| at < wake)
        {
            machine.wake = Some(at);
            self.schedule.at(at, Event::Client(index));
        }
        Ok(())
    }

    pub(super) fn serve_server(&mut self, index: usize) -> Result<(), Violation> {
        if self.servers[index].dead {
            return Ok(());
        }
        let mut again = true;
        while again {
            let mut out = Vec::new();
            let ran = self.servers[index].run_programs(self.now, &mut self.ledger)?;
            again = self.servers[index].machine.serve(self.now, &mut out) || ran || !out.is_empty();
            self.send_server(index, out)?;
        }
        let machine = &mut self.servers[index].machine;
        if let Some(at) = machine.deadline(self.now)
            && machine.wake.is_none_or(|wake| at < wake)
        {
            machine.wake = Some(at);
            self.schedule.at(at, Event::Server(index));
        }
        Ok(())
    }

    fn start(&mut self, flow: u32) -> Result<(), Violation> {
        let Some(plan) = self.ledger.plan(flow).cloned() else { return Ok(()) };
        let FlowPlan { client, .. } = plan;
        let to = SocketAddr::new(vip(self.plan.clients[client].v4), REDIRECT_PORT);
        if !self.clients[client].connect(self.now, flow, plan, to) {
            // No own port is free.
            self.schedule.at(self.now + Duration::from_secs(1), Event::Start(flow));
            return Ok(());
        }
        let mixed = self.now < self.mixed_until;
        let state = &mut self.ledger.flows[flow as usize];
        state.begun = true;
        state.excused_if_plain |= mixed;
        self.serve_client(client)
    }

    /// Tells all balancers, one after the other, what has become of the servers.
    pub(super) fn change_tables(&mut self) {
        self.tables = Tables::new(self.tables.version() + 1, &self.plan, &self.standing);
        self.ledger.excuse(true, |_, _, _| true);
        for index in 0..self.balancers.len() {
            let at = self.now + Duration::from_micros(self.rng.u64(0..=STAGGER.as_micros() as u64));
            self.mixed_until = self.mixed_until.max(at + Duration::from_micros(1));
            self.schedule.at(at, Event::Reload(index, Rc::clone(&self.tables)));
        }
    }

    /// A drained server leaves the tables if it has no connections, a dead one in any case.
    fn leave(&mut self, index: usize, dead: bool) {
        let server = &self.servers[index];
        let empty = server.machine.tcp.is_empty() && server.programs.is_empty();
        if !(dead || server.dead || empty) {
            self.schedule.at(self.now + Duration::from_secs(1), Event::Leave(index, false));
            return;
        }
        if self.standing[index].0 != Standing::Absent {
            self.standing[index].0 = Standing::Absent;
            self.change_tables();
        }
    }

    pub(super) fn drain(&mut self, index: usize) {
        if self.standing[index].0 == Standing::Up {
            self.standing[index].0 = Standing::Drained;
            self.change_tables();
            self.schedule.at(self.now + DRAIN, Event::Leave(index, false));
        }
    }

    /// Whether all is over; what has been silent for too long is given up, if it may be.
    fn look(&mut self) -> Result<bool, Violation> {
        for index in 0..self.clients.len() {
            self.clients[index].give_up_stuck(self.now, &mut self.ledger)?;
            self.serve_client(index)?;
        }
        for index in 0..self.servers.len() {
            self.servers[index].give_up_stuck(self.now);
            self.serve_server(index)?;
        }
        if self.ledger.unfinished == 0 {
            let held = self.held();
            match held {
                None => return Ok(true),
                Some(leak) if self.now > self.ledger.last_start() + REST => return Err(leak),
                Some(_) => {}
            }
        }
        self.schedule.at(self.now + LOOK, Event::Look);
        Ok(false)
    }

    /// The first machine that still holds something.
    fn held(&self) -> Option<Violation> {
        let clients = self.clients.iter().map(|host| (&host.machine, host.programs.len()));
        let alive = self.servers.iter().filter(|host| !host.dead);
        let servers = alive.map(|host| (&host.machine, host.programs.len()));
        clients.chain(servers).find_map(|(machine, programs)| {
            let mut what = machine.holdings();
            if programs > 0 {
                what = format!("{programs} programs, {what}");
            }
            (!what.is_empty()).then(|| Violation::Leak { host: machine.name.clone(), what })
        })
    }

    fn verdict(&self) -> Result<Summary, Violation> {
        for (index, host) in self.clients.iter().enumerate() {
            if let Some(violation) =
                self.ledger.unexplained(index, host.machine.handovers_failed(), host.machine.fallbacks())
            {
                return Err(violation.clone());
            }
        }
        Ok(Summary {
            seed: self.plan.seed,
            scenario: self.plan.scenario,
            flows: self.plan.flows.len() as u64,
            whole: self.ledger.count(Outcome::Whole),
            broken: self.ledger.count(Outcome::Broken),
            abandoned: self.ledger.count(Outcome::Abandoned),
            redirected: self.ledger.redirected,
            moves: self.clients.iter().map(|host| host.machine.tcp.counters().moves).sum(),
            packets: self.packets,
            virtual_ms: self.now.since(super::draw::BEGIN).as_millis() as u64,
            trace: self.trace.finish(),
        })
    }
}
