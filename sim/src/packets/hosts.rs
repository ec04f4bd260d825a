//! The machines at the edges: what they run, and what stands before them.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use bytes::BytesMut;
use fastrand::Rng;
use shunt_stack::endpoint::{
    ClientOptions, CloseBy, ConnectionError, Connections, ServerOptions, TcpOptions,
};
use shunt_stack::redirect::{ClientConfig, ServerConfig, ServicePorts, VipConfig};
use shunt_stack::time::Instant;
use shunt_stack::wire::{Offload, Packet};

use super::check::{Ledger, Violation, header_ok};
use super::link::Link;
use super::machine::{Agent, Beside, Machine, Shim};
use super::path::{Boxed, Nat};
use super::plan::{ClientPlan, FlowPlan, Forward, Kind, Plan, REDIRECT_PORT, ServerPlan, vip};
use super::program::{ClientProgram, Next, ServerProgram, Surroundings};

/// How long TCPs wait for each other: nothing ends by a timer where something could still come.
const LONG: Duration = Duration::from_secs(3600);
/// The MTU of servers.
const SERVER_MTU: usize = 1500;

fn tcp_options(buffer: usize) -> TcpOptions {
    TcpOptions {
        receive_buffer: buffer,
        send_buffer: buffer,
        user_timeout: LONG,
        fin_timeout: LONG,
        ..TcpOptions::default()
    }
}

/// A clock that is not the world's.
fn ahead(rng: &mut Rng) -> i64 {
    rng.i64(-900_000_000..3_600_000_000)
}

fn key(rng: &mut Rng) -> [u8; 16] {
    rng.u128(1..).to_be_bytes()
}

/// A client's machine, and what stands between it and the network.
pub(super) struct ClientHost {
    pub(super) machine: Machine,
    pub(super) nat: Option<Nat>,
    boxed: Option<Boxed>,
    pub(super) up: Link,
    pub(super) down: Link,
    pub(super) programs: BTreeMap<u64, ClientProgram>,
    close_by: CloseBy,
}

impl ClientHost {
    pub(super) fn new(index: usize, plan: &ClientPlan, rng: &mut Rng) -> ClientHost {
        let own = plan.address(index);
        let vip = vip(plan.v4);
        let config = ClientConfig {
            vips: vec![VipConfig {
                address: vip,
                continuation: plan.continuation,
                on_redirect: plan.on_redirect,
            }],
            mtu: plan.mtu,
            ..ClientConfig::default()
        };
        let beside = match plan.kind {
            Kind::Endpoint => Beside::Nothing,
            Kind::Beside => Beside::Shim(Box::new(Shim::new(config.clone(), vip))),
        };
        let redirect = match plan.kind {
            Kind::Endpoint => config,
            Kind::Beside => ClientConfig::default(),
        };
        let options = ClientOptions {
            redirect,
            addresses: vec![own],
            connect_timeout: LONG,
            move_at: plan.move_at,
            close_by: plan.close_by,
            tcp: tcp_options(plan.buffer),
            ..ClientOptions::default()
        };
        let tcp = Connections::client(options, plan.mtu, key(rng));
        let public = plan.public(index);
        ClientHost {
            machine: Machine::new(format!("client{index}"), tcp, beside, plan.mtu, ahead(rng)),
            nat: plan.nat.map(|nat| Nat::new(nat, public, rng.fork())),
            boxed: plan.middlebox.map(|kind| Boxed::new(kind, rng.fork())),
            up: Link::new(plan.up, rng.fork()),
            down: Link::new(plan.down, rng.fork()),
            programs: BTreeMap::new(),
            close_by: plan.close_by,
        }
    }

    /// What leaves the client's site of a packet.
    pub(super) fn outward(&mut self, mut packet: Packet) -> Option<Packet> {
        let passes = self.boxed.as_mut().is_none_or(|boxed| boxed.up(&mut packet))
            && self.nat.as_mut().is_none_or(|nat| nat.up(&mut packet));
        passes.then_some(packet)
    }

    /// What reaches the client of a packet.
    pub(super) fn inward(&mut self, bytes: BytesMut) -> Option<BytesMut> {
        if self.nat.is_none() && self.boxed.is_none() {
            return Some(bytes);
        }
        let mut packet = Packet::parse(bytes, Offload::default()).ok().filter(header_ok)?;
        let mtu = self.machine.mtu;
        let passes = self.nat.as_mut().is_none_or(|nat| nat.down(&mut packet))
            && self.boxed.as_mut().is_none_or(|boxed| boxed.down(&mut packet, mtu));
        passes.then(|| packet.into_buffer())
    }

    /// Begins a stream; false if there is no room for it now.
    pub(super) fn connect(&mut self, world: Instant, flow: u32, plan: FlowPlan, to: SocketAddr) -> bool {
        let now = self.machine.clock(world);
        let Ok(id) = self.machine.tcp.connect(now, to) else { return false };
        let name = u64::from(flow);
        let waker = self.machine.ready.waker(name);
        waker.wake_by_ref();
        self.programs.insert(name, ClientProgram::new(now, flow, id, waker, plan, self.close_by));
        true
    }

    /// Runs the programs for which something has happened; true if there were any.
    pub(super) fn run_programs(&mut self, world: Instant, ledger: &mut Ledger) -> Result<bool, Violation> {
        let now = self.machine.clock(world);
        run_due(&mut self.machine, &mut self.programs, now, ledger, ClientProgram::poll)
    }

    /// Ends the streams that have been silent for longer than any timer, if something explains it.
    pub(super) fn give_up_stuck(&mut self, world: Instant, ledger: &mut Ledger) -> Result<(), Violation> {
        let now = self.machine.clock(world);
        let stuck: Vec<u64> = self
            .programs
            .iter()
            .filter(|(_, program)| program.is_stuck(now))
            .map(|(name, _)| *name)
            .collect();
        for name in stuck {
            let Some(program) = self.programs.remove(&name) else { continue };
            if !ledger.may_be_stuck(program.flow) {
                return Err(ledger.stuck(program.flow));
            }
            let Machine { tcp, redirects, .. } = &mut self.machine;
            program.end(
                &mut Surroundings { now, tcp, ledger, redirects },
                Some(ConnectionError::TimedOut),
                false,
            );
        }
        Ok(())
    }
}

/// The programs that want to go on now.
fn due(machine: &mut Machine, now: Instant) -> Vec<u64> {
    let mut ready = machine.ready.take();
    while let Some((at, name)) = machine.timers.first().copied().filter(|(at, _)| *at <= now) {
        machine.timers.remove(&(at, name));
        if let Err(place) = ready.binary_search(&name) {
            ready.insert(place, name);
        }
    }
    ready
}

/// Runs the programs for which something has happened; true if there were any.
fn run_due<P>(
    machine: &mut Machine,
    programs: &mut BTreeMap<u64, P>,
    now: Instant,
    ledger: &mut Ledger,
    poll: impl Fn(&mut P, &mut Surroundings<'_>) -> Result<Next, Violation>,
) -> Result<bool, Violation> {
    let ready = due(machine, now);
    let ran = !ready.is_empty();
    for name in ready {
        let Some(program) = programs.get_mut(&name) else { continue };
        let Machine { tcp, redirects, timers, .. } = &mut *machine;
        match poll(program, &mut Surroundings { now, tcp, ledger, redirects })? {
            Next::Wait(at) => timers.extend(at.map(|at| (at, name))),
            Next::Over => {
                programs.remove(&name);
            }
        }
    }
    Ok(ran)
}

/// A server's machine and its link.
pub(super) struct ServerHost {
    index: u16,
    pub(super) machine: Machine,
    pub(super) up: Link,
    pub(super) down: Link,
    pub(super) programs: BTreeMap<u64, ServerProgram>,
    listening: Vec<SocketAddr>,
    /// Connections so far.
    accepted: u16,
    pub(super) dead: bool,
}

impl ServerHost {
    pub(super) fn new(index: usize, plan: &Plan, rng: &mut Rng) -> ServerHost {
        let server = &plan.servers[index];
        let port = ServerPlan::service_port(index);
        let address = |v4| match plan.forward {
            Forward::Network => ServerPlan::address(index, v4),
            Forward::Direct => vip(v4),
        };
        let addresses: [IpAddr; 2] = [address(true), address(false)];
        let services = addresses
            .map(|address| ServicePorts { address, redirect_port: REDIRECT_PORT, service_port: port })
            .to_vec();
        // Where balancers answer, servers know nothing of it.
        let services = if plan.balancer_answers { Vec::new() } else { services };
        let config = ServerConfig {
            services,
            isn_key: key(rng),
            mtu: SERVER_MTU,
            half_open_lifetime: LONG,
            ..ServerConfig::default()
        };
        let (inside, beside) = match server.kind {
            Kind::Endpoint => (config, Beside::Nothing),
            Kind::Beside => (ServerConfig::default(), Beside::Agent(Box::new(Agent::new(config)))),
        };
        let options = ServerOptions {
            redirect: inside,
            half_open_lifetime: LONG,
            tcp: tcp_options(server.buffer),
            ..ServerOptions::default()
        };
        let mut tcp = Connections::server(options, SERVER_MTU, key(rng));
        let mut listening = Vec::new();
        for socket in
            addresses.iter().flat_map(|it| [(*it, port), (*it, REDIRECT_PORT)]).map(SocketAddr::from)
        {
            tcp.listen(socket).expect("a port of its own");
            listening.push(socket);
        }
        ServerHost {
            index: index as u16,
            machine: Machine::new(format!("server{index}"), tcp, beside, SERVER_MTU, ahead(rng)),
            up: Link::new(server.up, rng.fork()),
            down: Link::new(server.down, rng.fork()),
            programs: BTreeMap::new(),
            listening,
            accepted: 0,
            dead: false,
        }
    }

    fn accept(&mut self, now: Instant) {
        self.machine.tcp.take_acceptable();
        for socket in self.listening.clone() {
            while let Some(id) = self.machine.tcp.accept(now, socket) {
                let number = self.accepted;
                self.accepted = self.accepted.checked_add(1).expect("fewer than 65,536 connections a server");
                let waker = self.machine.ready.waker(u64::from(number));
                waker.wake_by_ref();
                let program = ServerProgram::new(now, (self.index, number), id, socket, waker);
                self.programs.insert(u64::from(number), program);
            }
        }
    }

    /// Accepts, and runs the programs for which something has happened; true if there were any.
    pub(super) fn run_programs(&mut self, world: Instant, ledger: &mut Ledger) -> Result<bool, Violation> {
        let now = self.machine.clock(world);
        self.accept(now);
        run_due(&mut self.machine, &mut self.programs, now, ledger, ServerProgram::poll)
    }

    /// Ends the connections whose clients have been silent for longer than any timer.
    pub(super) fn give_up_stuck(&mut self, world: Instant) {
        let now = self.machine.clock(world);
        let tcp = &mut self.machine.tcp;
        self.programs.retain(|_, program| {
            let stuck = program.is_stuck(now);
            if stuck {
                tcp.release(now, program.id);
            }
            !stuck
        });
    }

    /// Asks all clients on the service port to go on at `port`.
    pub(super) fn redirect_all(&mut self, world: Instant, port: u16) {
        let now = self.machine.clock(world);
        for program in self.programs.values() {
            let to = SocketAddr::new(program.socket.ip(), port);
            // Connections on the redirect port, and those that are asked already, stay.
            let _ = self.machine.tcp.redirect(now, program.id, to);
        }
    }
}
