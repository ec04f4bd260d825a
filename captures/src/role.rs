//! The project's own code under replay: what stands where the capture was taken.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde::Serialize;
use shunt_balancer::tunnel::Tunnels;
use shunt_balancer::{Balancer, Memory, Output, SelectKey};
use shunt_stack::redirect::{
    Action, Client, ClientConfig, ClientCounters, Server, ServerConfig, ServerCounters, Towards, Transmit,
};
use shunt_stack::time::{Instant, WallClock};
use shunt_stack::wire::{Packet, ParseError};

use crate::explain::counter_rule;
use crate::row::{Decision, NETWORK};

/// Packets that one packet or one moment may make a machine send; more would be a loop.
const MAX_BURST: usize = 4096;
/// Connections of a client whose last packet is remembered, so that ended ones can be freed.
const MAX_SEEN: usize = 65_536;
/// A client's connection without packets for so long has ended: a replay cannot ask a kernel (`C12`).
const ENDED_AFTER: Duration = Duration::from_secs(600);
/// Packets between two looks for ended connections.
const BETWEEN_LOOKS: u32 = 16_384;
/// How drivers count what they do not hand to their machine.
const FOREIGN: &str = "foreign";
/// The MTU of links, which a capture does not tell.
const MTU: u32 = 1500;

/// What packets are replayed through.
pub enum Role {
    /// Nothing: packets are described, and held against the rules.
    Wire {
        /// The experiment identifier.
        exid: u16,
    },
    /// A balancer.
    Balancer(Box<BalancerRole>),
    /// A client's shim.
    Client(Box<ClientRole>),
    /// A server's agent.
    Server(Box<ServerRole>),
}

/// What became of a packet or of a moment.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) decision: Option<Decision>,
    /// Where to, and what.
    pub(crate) sent: Vec<(String, Packet)>,
}

impl Role {
    /// A balancer by a configuration. The key of its policies is fixed: what `random` selects here another one with the
    /// same configuration need not select. All servers count as healthy.
    pub fn balancer(config: &shunt_balancer::Config) -> Role {
        Role::balancer_like(Balancer::new(config, SelectKey([0; 16])), config)
    }

    /// A balancer that has been made, of this configuration.
    pub(crate) fn balancer_like(balancer: Balancer, config: &shunt_balancer::Config) -> Role {
        let balancer = balancer.through(Tunnels::assumed(config, MTU));
        let memory = Memory::new(&balancer);
        let exid = config.host().exid;
        Role::Balancer(Box::new(BalancerRole { balancer, memory, exid }))
    }

    /// A client.
    pub fn client(config: ClientConfig) -> Role {
        let vips = config.vips.iter().map(|vip| vip.address).collect();
        let exid = config.exid;
        let (client, before) = (Client::new(config), ClientCounters::default());
        let (seen, packets) = (HashMap::new(), 0);
        Role::Client(Box::new(ClientRole { client, before, vips, exid, seen, packets }))
    }

    /// A server. Every service counts as listened on.
    pub fn server(config: ServerConfig) -> Role {
        let addresses = config.services.iter().map(|service| service.address).collect();
        let exid = config.exid;
        let (server, before) = (Server::new(config), ServerCounters::default());
        Role::Server(Box::new(ServerRole { server, before, addresses, exid }))
    }

    /// The experiment identifier.
    pub fn exid(&self) -> u16 {
        match self {
            Role::Wire { exid } => *exid,
            Role::Balancer(role) => role.exid,
            Role::Client(role) => role.exid,
            Role::Server(role) => role.exid,
        }
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        match self {
            Role::Wire { .. } => "wire",
            Role::Balancer(_) => "balancer",
            Role::Client(_) => "client",
            Role::Server(_) => "server",
        }
    }

    /// Whether it decides anything.
    pub(crate) fn decides(&self) -> bool {
        !matches!(self, Role::Wire { .. })
    }

    /// When something is due without a packet.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        match self {
            Role::Wire { .. } | Role::Balancer(_) => None,
            Role::Client(role) => role.client.poll_timeout(),
            Role::Server(role) => role.server.poll_timeout(),
        }
    }

    /// Lets time pass, without a packet.
    pub(crate) fn advance(&mut self, now: Instant) -> Outcome {
        match self {
            Role::Wire { .. } | Role::Balancer(_) => Outcome::default(),
            Role::Client(role) => role.finish(now, None),
            Role::Server(role) => role.finish(now, None),
        }
    }

    /// Takes a packet.
    pub(crate) fn packet(&mut self, now: Instant, packet: Packet) -> Outcome {
        match self {
            Role::Wire { .. } => Outcome::default(),
            Role::Balancer(role) => role.packet(now, packet),
            Role::Client(role) => role.packet(now, packet),
            Role::Server(role) => role.packet(now, packet),
        }
    }

    /// Takes a packet whose headers above IP cannot be read.
    pub(crate) fn unreadable(&mut self, packet: Packet, error: ParseError) -> Outcome {
        match self {
            Role::Balancer(role) => role.unreadable(packet, error),
            // Their drivers drop it.
            Role::Wire { .. } | Role::Client(_) | Role::Server(_) => Outcome::default(),
        }
    }
}

/// A balancer and its memory.
pub struct BalancerRole {
    balancer: Balancer,
    memory: Memory,
    exid: u16,
}

impl BalancerRole {
    fn packet(&mut self, now: Instant, mut packet: Packet) -> Outcome {
        self.balancer.advance(now);
        // Instants of a replay are Unix time.
        self.balancer.set_clock(WallClock::from_micros(0));
        let route = self.balancer.decide(&mut self.memory, now, &packet);
        let done = self.balancer.carry_out(route, &mut packet);
        let decision = Some(self.balancer.explain(route, done).into());
        Outcome { decision, sent: self.sent(done.ok(), packet) }
    }

    fn unreadable(&mut self, mut packet: Packet, error: ParseError) -> Outcome {
        let route = self.balancer.route_unreadable(&packet, error);
        let done = self.balancer.carry_out(route, &mut packet);
        let decision = Some(self.balancer.explain(route, done).into());
        Outcome { decision, sent: self.sent(done.ok(), packet) }
    }

    fn sent(&self, output: Option<Output>, packet: Packet) -> Vec<(String, Packet)> {
        let towards = match output {
            None => return Vec::new(),
            Some(Output::Main) => NETWORK.to_owned(),
            Some(Output::Server(server)) => {
                format!("link of {}", self.balancer.server_name(server).unwrap_or("?"))
            }
        };
        vec![(towards, packet)]
    }
}

/// A client's machine, and what a kernel would tell it.
pub struct ClientRole {
    client: Client,
    before: ClientCounters,
    vips: BTreeSet<IpAddr>,
    exid: u16,
    /// When each connection (local, VIP:X) last had a packet.
    seen: HashMap<(SocketAddr, SocketAddr), Instant>,
    packets: u32,
}

impl ClientRole {
    fn packet(&mut self, now: Instant, mut packet: Packet) -> Outcome {
        let about_vip = packet.icmp().and_then(|icmp| icmp.quoted());
        let local = self.vips.contains(&packet.destination());
        let remote = self.vips.contains(&packet.source())
            || about_vip.is_some_and(|quoted| self.vips.contains(&quoted.destination));
        if !local && !remote {
            let why = "it concerns no VIP".to_owned();
            let decision = Some(Decision { name: FOREIGN.to_owned(), rule: Some("C12"), why });
            return Outcome { decision, sent: vec![(NETWORK.to_owned(), packet)] };
        }
        self.free_ended(now);
        if let (true, Some(from), Some(to)) = (local, packet.source_socket(), packet.destination_socket())
            && (self.seen.len() < MAX_SEEN || self.seen.contains_key(&(from, to)))
        {
            self.seen.insert((from, to), now);
        }
        let (action, towards) = if local {
            (self.client.handle_local(now, &mut packet), Towards::Network)
        } else {
            (self.client.handle_remote(now, &mut packet), Towards::Local)
        };
        self.finish(now, Some((action, towards, packet)))
    }

    fn free_ended(&mut self, now: Instant) {
        self.packets += 1;
        if self.packets < BETWEEN_LOOKS {
            return;
        }
        self.packets = 0;
        self.seen.retain(|_, last| now.since(*last) < ENDED_AFTER);
        let (seen, full) = (&self.seen, self.seen.len() >= MAX_SEEN);
        self.client.retain(|local, vip| full || seen.contains_key(&(local, vip)));
    }

    fn finish(&mut self, now: Instant, taken: Option<(Action, Towards, Packet)>) -> Outcome {
        let action = taken.as_ref().map(|(action, ..)| *action);
        let client = &mut self.client;
        let sent = drain(taken, || client.poll_transmit(now));
        let events: Vec<String> =
            std::iter::from_fn(|| self.client.poll_event()).map(|event| event.to_string()).collect();
        let risen = risen(&mut self.before, self.client.counters());
        Outcome { decision: decision(action, &risen, &events, !sent.is_empty()), sent }
    }
}

/// A server's machine.
pub struct ServerRole {
    server: Server,
    before: ServerCounters,
    addresses: BTreeSet<IpAddr>,
    exid: u16,
}

impl ServerRole {
    fn packet(&mut self, now: Instant, mut packet: Packet) -> Outcome {
        self.server.set_clock(WallClock::from_micros(0));
        let (action, towards) = if self.addresses.contains(&packet.destination()) {
            (self.server.handle_remote(now, &mut packet), Towards::Local)
        } else if self.addresses.contains(&packet.source()) {
            (self.server.handle_local(now, &mut packet), Towards::Network)
        } else {
            let why = "dropped: neither to nor from an address of the configuration".to_owned();
            let decision = Some(Decision { name: FOREIGN.to_owned(), rule: None, why });
            return Outcome { decision, sent: Vec::new() };
        };
        self.finish(now, Some((action, towards, packet)))
    }

    fn finish(&mut self, now: Instant, taken: Option<(Action, Towards, Packet)>) -> Outcome {
        let action = taken.as_ref().map(|(action, ..)| *action);
        let server = &mut self.server;
        let sent = drain(taken, || server.poll_transmit(now));
        let events: Vec<String> =
            std::iter::from_fn(|| self.server.poll_event()).map(|event| event.to_string()).collect();
        let risen = risen(&mut self.before, self.server.counters());
        Outcome { decision: decision(action, &risen, &events, !sent.is_empty()), sent }
    }
}

fn name_of(towards: Towards) -> String {
    match towards {
        Towards::Local => "local TCP".to_owned(),
        Towards::Network => NETWORK.to_owned(),
    }
}

/// The packet itself, if it passes, and what the machine sends of its own.
fn drain(
    taken: Option<(Action, Towards, Packet)>,
    mut next: impl FnMut() -> Option<Transmit>,
) -> Vec<(String, Packet)> {
    let mut sent = Vec::new();
    if let Some((Action::Pass, towards, packet)) = taken {
        sent.push((name_of(towards), packet));
    }
    while sent.len() < MAX_BURST
        && let Some(transmit) = next()
    {
        sent.push((name_of(transmit.towards), transmit.packet));
    }
    sent
}

/// The names of the counters that have risen since the last call, in the order of their rules' names.
fn risen<C: Serialize + Clone + PartialEq>(before: &mut C, now: &C) -> Vec<String> {
    if before == now {
        return Vec::new();
    }
    let value = |counters: &C| serde_json::to_value(counters).unwrap_or_default();
    let (old, new) = (value(before), value(now));
    *before = now.clone();
    let Some(new) = new.as_object() else { return Vec::new() };
    new.iter().filter(|(name, count)| old.get(name) != Some(count)).map(|(name, _)| name.clone()).collect()
}

/// What an end has decided, by what it counts and tells. `None` where it did nothing at all.
fn decision(action: Option<Action>, risen: &[String], events: &[String], sends: bool) -> Option<Decision> {
    let fallback = match action {
        Some(Action::Pass) => "passed",
        Some(Action::Drop) if sends => "taken",
        Some(Action::Drop) => "dropped",
        None if sends => "repeated",
        None if risen.is_empty() && events.is_empty() => return None,
        None => "timer",
    };
    let name = if risen.is_empty() { fallback.to_owned() } else { risen.join("+") };
    let rule = risen.iter().find_map(|name| counter_rule(name));
    Some(Decision { name, rule, why: events.join("; ") })
}
