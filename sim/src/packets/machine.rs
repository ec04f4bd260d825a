//! A machine with a TCP: an endpoint, or a TCP with a shim or an agent beside it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use bytes::BytesMut;
use shunt_stack::endpoint::Connections;
use shunt_stack::redirect::{
    Action, Client, ClientConfig, ClientCounters, ClientEvent, FlowRecord, Server, ServerConfig, Towards,
};
use shunt_stack::time::Instant;
use shunt_stack::wire::{Offload, Packet};

use super::check::header_ok;
use super::program::Ready;

/// How often a shim asks which sockets its TCP still has (C12).
const LOOK: Duration = Duration::from_secs(1);

/// What stands between the TCP and the network.
pub(super) enum Beside {
    /// The endpoint has it inside.
    Nothing,
    Shim(Box<Shim>),
    Agent(Box<Agent>),
}

/// A client's machine beside a TCP.
pub(super) struct Shim {
    client: Client,
    config: ClientConfig,
    vip: IpAddr,
    look: Instant,
    saved: Vec<FlowRecord>,
    /// What earlier runs counted.
    earlier: Vec<ClientCounters>,
}

/// A server's machine beside a TCP.
pub(super) struct Agent {
    server: Server,
    config: ServerConfig,
}

impl Shim {
    pub(super) fn new(config: ClientConfig, vip: IpAddr) -> Shim {
        let client = Client::new(config.clone());
        Shim { client, config, vip, look: Instant::ZERO, saved: Vec::new(), earlier: Vec::new() }
    }
}

impl Agent {
    pub(super) fn new(config: ServerConfig) -> Agent {
        Agent { server: Server::new(config.clone()), config }
    }
}

/// A machine, its clock, and what its programs wait for.
pub(super) struct Machine {
    pub(super) name: String,
    pub(super) tcp: Connections,
    beside: Beside,
    pub(super) mtu: usize,
    /// How far its clock is ahead, microseconds.
    ahead: i64,
    pub(super) ready: Ready,
    /// When programs want to go on.
    pub(super) timers: BTreeSet<(Instant, u64)>,
    /// Connections that the shim has redirected.
    pub(super) redirects: BTreeMap<(SocketAddr, SocketAddr), u16>,
    /// Whether shim or agent is there.
    up: bool,
    /// When the world has it served next.
    pub(super) wake: Option<Instant>,
}

fn shifted(at: Instant, by: i64) -> Instant {
    Instant::from_micros(at.micros().saturating_add_signed(by))
}

impl Machine {
    pub(super) fn new(name: String, tcp: Connections, beside: Beside, mtu: usize, ahead: i64) -> Machine {
        Machine {
            name,
            tcp,
            beside,
            mtu,
            ahead,
            ready: Ready::default(),
            timers: BTreeSet::new(),
            redirects: BTreeMap::new(),
            up: true,
            wake: None,
        }
    }

    /// What its clock says.
    pub(super) fn clock(&self, world: Instant) -> Instant {
        shifted(world, self.ahead)
    }

    pub(super) fn jump(&mut self, millis: i64) {
        self.ahead += millis * 1000;
    }

    /// When, by the world's clock, it wants to be served.
    pub(super) fn deadline(&self, world: Instant) -> Option<Instant> {
        let machine = match &self.beside {
            Beside::Shim(shim) if self.up => {
                let look = (shim.client.flow_count() > 0).then_some(shim.look);
                [shim.client.poll_timeout(), look].into_iter().flatten().min()
            }
            Beside::Agent(agent) if self.up => agent.server.poll_timeout(),
            _ => None,
        };
        let program = self.timers.first().map(|(at, _)| *at);
        let next = [machine, program, self.tcp.poll_timeout()].into_iter().flatten().min()?;
        Some(shifted(next, -self.ahead).max(world))
    }

    /// A packet of the network, as it came.
    pub(super) fn receive(&mut self, world: Instant, bytes: BytesMut, out: &mut Vec<Packet>) {
        let now = self.clock(world);
        let Ok(mut packet) = Packet::parse(bytes, Offload::default()) else { return };
        if !header_ok(&packet) {
            return;
        }
        let action = match &mut self.beside {
            Beside::Shim(shim) if shim.is_about_vip(&packet) => {
                if !self.up {
                    return;
                }
                shim.client.handle_remote(now, &mut packet)
            }
            Beside::Agent(agent) if self.up && agent.sees(&packet) => {
                agent.server.handle_remote(now, &mut packet)
            }
            _ => Action::Pass,
        };
        if action == Action::Pass {
            self.tcp.handle_input(now, packet.into_buffer(), Offload::default());
        }
        self.drain(now, out);
    }

    /// Does what is due, and gives what it sends; true if it has to be called again at once.
    pub(super) fn serve(&mut self, world: Instant, out: &mut Vec<Packet>) -> bool {
        let now = self.clock(world);
        self.tcp.handle_timeout(now);
        self.drain(now, out);
        if let Beside::Shim(shim) = &mut self.beside
            && self.up
            && shim.look <= now
        {
            shim.look = now + LOOK;
            let tcp = &self.tcp;
            shim.client.retain(|local, vip| tcp.contains(local, vip));
            self.redirects.retain(|(local, vip), _| tcp.contains(*local, *vip));
        }
        self.tcp.poll_timeout().is_some_and(|at| at <= now)
    }

    fn drain(&mut self, now: Instant, out: &mut Vec<Packet>) {
        loop {
            let before = out.len();
            while let Some(packet) = self.tcp.poll_transmit() {
                self.send(now, packet, out);
            }
            let passed_up = self.drain_beside(now, out);
            if !passed_up && out.len() == before {
                return;
            }
        }
    }

    /// A packet of the TCP.
    fn send(&mut self, now: Instant, mut packet: Packet, out: &mut Vec<Packet>) {
        let action = match &mut self.beside {
            // What is for a VIP waits for the shim (`hold`).
            Beside::Shim(_) if !self.up => Action::Drop,
            Beside::Shim(shim) => shim.client.handle_local(now, &mut packet),
            Beside::Agent(agent) if self.up && agent.sees_own(&packet) => {
                agent.server.handle_local(now, &mut packet)
            }
            _ => Action::Pass,
        };
        if action == Action::Pass {
            out.push(packet);
        }
    }

    /// What shim or agent sends of its own; true if any of it went to the TCP.
    fn drain_beside(&mut self, now: Instant, out: &mut Vec<Packet>) -> bool {
        let mut passed_up = false;
        loop {
            let transmit = match &mut self.beside {
                Beside::Shim(shim) if self.up => shim.client.poll_transmit(now),
                Beside::Agent(agent) if self.up => agent.server.poll_transmit(now),
                _ => None,
            };
            let Some(transmit) = transmit else { break };
            match transmit.towards {
                Towards::Network => out.push(transmit.packet),
                Towards::Local => {
                    passed_up = true;
                    self.tcp.handle_input(now, transmit.packet.into_buffer(), Offload::default());
                }
            }
        }
        self.note_events();
        passed_up
    }

    fn note_events(&mut self) {
        match &mut self.beside {
            Beside::Shim(shim) => {
                while let Some(event) = shim.client.poll_event() {
                    if let ClientEvent::Redirected { local, vip, service_port, .. } = event {
                        self.redirects.insert((local, vip), service_port);
                    }
                }
            }
            Beside::Agent(agent) => while agent.server.poll_event().is_some() {},
            Beside::Nothing => {}
        }
    }

    /// Takes shim or agent away; a shim's redirected connections are saved.
    pub(super) fn stop_beside(&mut self) {
        if let Beside::Shim(shim) = &mut self.beside
            && self.up
        {
            shim.earlier.push(shim.client.counters().clone());
            shim.saved = shim.client.flows().collect();
            shim.saved.sort_by_key(|flow| (flow.local, flow.vip));
        }
        self.up = false;
    }

    /// Starts it anew: a shim takes its connections over, an agent knows nothing.
    pub(super) fn start_beside(&mut self, key: [u8; 16]) {
        if self.up {
            return;
        }
        match &mut self.beside {
            Beside::Shim(shim) => {
                shim.client = Client::new(shim.config.clone());
                let tcp = &self.tcp;
                for flow in shim.saved.drain(..).filter(|flow| tcp.contains(flow.local, flow.vip)) {
                    shim.client.restore(flow);
                }
            }
            Beside::Agent(agent) => {
                agent.config.isn_key = key;
                agent.server = Server::new(agent.config.clone());
            }
            Beside::Nothing => {}
        }
        self.up = true;
    }

    pub(super) fn has_beside(&self) -> bool {
        !matches!(self.beside, Beside::Nothing)
    }

    /// A number that its redirect machine has counted, in all of its runs.
    fn counted(&self, of: fn(&ClientCounters) -> u64) -> u64 {
        match &self.beside {
            Beside::Shim(shim) => shim.earlier.iter().chain([shim.client.counters()]).map(of).sum(),
            _ => self.tcp.redirect_client().map_or(0, |client| of(client.counters())),
        }
    }

    /// Handovers that ended in a reset of their connection (C10).
    pub(super) fn handovers_failed(&self) -> u64 {
        self.counted(|counters| counters.handovers_failed)
    }

    /// Connects that went on plainly after SYNs with R (C2, C6).
    pub(super) fn fallbacks(&self) -> u64 {
        self.counted(|counters| {
            let refused = counters.plain_unconfirmed + counters.plain_echoed + counters.plain_refused;
            refused + counters.plain_silence + counters.plain_service_port
        })
    }

    /// What it still holds of connections; empty if nothing.
    pub(super) fn holdings(&self) -> String {
        let mut held = Vec::new();
        if !self.tcp.is_drained() {
            held.push(format!("connections ({} on the wire)", self.tcp.len()));
        }
        let (client, server) = match &self.beside {
            Beside::Nothing => (self.tcp.redirect_client(), self.tcp.redirect_server()),
            Beside::Shim(shim) => (Some(&shim.client), None),
            Beside::Agent(agent) => (None, Some(&agent.server)),
        };
        let flows = client.map_or(0, Client::flow_count);
        let half_open = server.map_or(0, Server::half_open_count);
        let redirections = server.map_or(0, Server::redirection_count);
        for (count, what) in
            [(flows, "flows"), (half_open, "half-open connections"), (redirections, "redirections")]
        {
            if count > 0 {
                held.push(format!("{count} {what}"));
            }
        }
        held.join(", ")
    }
}

impl Shim {
    /// Whether the host's rules lead a packet of the network to the shim.
    fn is_about_vip(&self, packet: &Packet) -> bool {
        let quotes =
            || packet.icmp().and_then(|icmp| icmp.quoted()).is_some_and(|it| it.destination == self.vip);
        packet.source() == self.vip && packet.tcp().is_some() || quotes()
    }
}

impl Agent {
    /// Whether the host's marks lead a packet of the network to the agent: SYNs with an option of its kind.
    fn sees(&self, packet: &Packet) -> bool {
        packet.tcp().is_some_and(|tcp| tcp.is_syn() && tcp.redirect(self.config.exid) != Ok(None))
    }

    /// The same for packets of the TCP: SYN-ACKs of service ports.
    fn sees_own(&self, packet: &Packet) -> bool {
        let from_service = |socket: SocketAddr| {
            self.config.services.iter().any(|service| service.service_socket() == socket)
        };
        packet.tcp().is_some_and(|tcp| tcp.is_syn_ack()) && packet.source_socket().is_some_and(from_service)
    }
}
