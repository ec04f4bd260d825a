//! The server's end: rules `S1` to `S8`, and its part of PROTOCOL.md §4 and §5.
//!
//! A SYN(R C) to X is answered from the SYN alone. A SYN(R) to X is turned to Y and its SYN-ACK sent from X; a SYN(R) to
//! Y gets C on its SYN-ACK. Between SYN and SYN-ACK a bounded table remembers the port asked; after that nothing does,
//! and no other segment is changed but those of connections that are asked to move (§4) or whose client has changed its
//! port (§5). It does not speak TCP: that is the local TCP's business, in the kernel or not.
//!
//! A SYN-ACK in which the option does not fit (no Linux one: it has 20 bytes free) goes out from X without it. The
//! client does not pass that up but asks plainly at once (`C2`), and the half-open connection is reset: slower by a
//! round trip, but neither a wait nor a connection that the balancer would lead elsewhere.

mod answer;
mod config;
mod half_open;
#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod move_tests;
mod rebind;
mod redirection;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod token_tests;
mod tokens;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

pub use config::{
    DeclineReason, RedirectError, RedirectOutcome, ServerConfig, ServerCounters, ServerEvent, ServicePorts,
    Silence,
};

use super::guard::{Gauge, TokenPolicy};
use super::numbers::{NumbersOf, unknown};
use super::reply::{self, Limiter};
use super::{Action, Towards, Transmit};
use crate::time::{Instant, WallClock};
use crate::wire::{Packet, Protocol, RedirectOption, Segment, SeqNumber, TcpFlags, observed_digest};
pub use answer::{Answerer, can_redirect};
use half_open::{HalfOpen, HalfOpenTable, Key};
use rebind::Rebind;
use redirection::Redirection;

/// Packets of our own that wait for the driver, at most.
const TRANSMIT_QUEUE: usize = 64;
/// Packets that one deadline of a connection makes, at most.
const TRANSMITS_OF_A_TIMER: usize = 3;
/// Events that wait for the driver, at most.
const EVENT_QUEUE: usize = 1024;

/// What a port of ours is to its service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Port {
    Redirect(ServicePorts),
    Service(ServicePorts),
}

/// The server's machine: between the network and a local TCP that listens on the service ports (PROTOCOL.md §3,
/// "Server rules").
#[derive(Debug)]
pub struct Server {
    exid: u16,
    mtu: usize,
    max_hops: u8,
    answerer: Answerer,
    ports: BTreeMap<SocketAddr, Port>,
    /// Service sockets nobody listens on (`S6`).
    deaf: BTreeSet<SocketAddr>,
    /// Sockets whose SYNs are sent to another server's port (`S2`).
    elsewhere: BTreeMap<SocketAddr, u16>,
    half_open: HalfOpenTable,
    redirect_timeout: Duration,
    on_silence: Silence,
    redirect_limit: usize,
    /// Connections that are asked to move (§4).
    redirections: HashMap<Key, Redirection>,
    /// Connections whose client has changed its port (§5), and their keys on the wire.
    rebinds: HashMap<Key, Rebind>,
    rebound: HashMap<Key, SocketAddr>,
    /// When something of a connection is due, and the same by connection.
    timers: BTreeSet<(Instant, Key)>,
    deadlines: HashMap<Key, Instant>,
    challenges: Limiter,
    resets: Limiter,
    tokens: TokenPolicy,
    shared: BTreeMap<SocketAddr, IpAddr>,
    clock: WallClock,
    gauge: Gauge,
    transmits: VecDeque<Transmit>,
    events: VecDeque<ServerEvent>,
    counters: ServerCounters,
}

impl Server {
    /// A machine for these services; all of them count as listened on (`S6`) until told otherwise.
    pub fn new(config: ServerConfig) -> Server {
        let ServerConfig { exid, services, isn_key, mtu, .. } = config;
        let mut server = Server {
            exid,
            mtu,
            max_hops: config.max_hops,
            answerer: Answerer::new(exid, isn_key, mtu),
            ports: BTreeMap::new(),
            deaf: BTreeSet::new(),
            elsewhere: BTreeMap::new(),
            half_open: HalfOpenTable::new(config.half_open_limit, config.half_open_lifetime),
            redirect_timeout: config.redirect_timeout,
            on_silence: config.on_silence,
            redirect_limit: config.redirect_limit,
            redirections: HashMap::new(),
            rebinds: HashMap::new(),
            rebound: HashMap::new(),
            timers: BTreeSet::new(),
            deadlines: HashMap::new(),
            challenges: Limiter::new(config.replies_per_second),
            resets: Limiter::new(config.replies_per_second),
            tokens: config.tokens,
            shared: config.shared,
            clock: config.clock,
            gauge: Gauge::default(),
            transmits: VecDeque::new(),
            events: VecDeque::new(),
            counters: ServerCounters::default(),
        };
        server.set_services(&services);
        server
    }

    /// Serves these from now on (a reload). Half-open connections and counters stay; a service that was there keeps
    /// what [`set_listening`](Self::set_listening) and [`set_elsewhere`](Self::set_elsewhere) said of it.
    pub fn set_services(&mut self, services: &[ServicePorts]) {
        self.ports.clear();
        for service in services {
            self.ports.entry(service.service_socket()).or_insert(Port::Service(*service));
        }
        for service in services {
            self.ports.entry(service.redirect_socket()).or_insert(Port::Redirect(*service));
        }
        self.deaf.retain(|socket| matches!(self.ports.get(socket), Some(Port::Service(_))));
        self.elsewhere.retain(|socket, _| self.ports.contains_key(socket));
    }

    /// Says whether a program listens on `service`, which is `address:Y`; where none does nothing is redirected to it
    /// (`S6`). Unknown sockets are ignored.
    pub fn set_listening(&mut self, service: SocketAddr, listening: bool) {
        if listening {
            self.deaf.remove(&service);
        } else if matches!(self.ports.get(&service), Some(Port::Service(_))) {
            self.deaf.insert(service);
        }
    }

    /// Sends clients that ask for `asked` (a redirect or service socket of ours) to `port`, which is another server's
    /// service port, from now on; `None` serves them here again (`S2`). Unknown sockets are ignored.
    pub fn set_elsewhere(&mut self, asked: SocketAddr, port: Option<u16>) {
        match port {
            Some(port) if port != 0 && port != asked.port() && self.ports.contains_key(&asked) => {
                self.elsewhere.insert(asked, port);
            }
            _ => {
                self.elsewhere.remove(&asked);
            }
        }
    }

    /// A packet from the network towards our TCP.
    pub fn handle_remote(&mut self, now: Instant, packet: &mut Packet) -> Action {
        self.handle_remote_knowing(now, packet, &unknown)
    }

    /// As [`handle_remote`](Self::handle_remote), for a driver that owns the local TCP: `numbers` gives those of the
    /// connection (service, client) right now; it is asked only about segments that ask for something (§5).
    pub fn handle_remote_knowing(
        &mut self,
        now: Instant,
        packet: &mut Packet,
        numbers: NumbersOf<'_>,
    ) -> Action {
        if packet.fragment().is_some() {
            return self.on_fragment(now, packet);
        }
        match packet.tcp() {
            Some(tcp) if tcp.is_syn() => {
                let asked = SocketAddr::new(packet.destination(), tcp.destination_port());
                match self.ports.get(&asked) {
                    Some(port) => self.on_syn(now, packet, *port),
                    None => self.pass(),
                }
            }
            Some(_) => self.on_segment(now, packet, numbers),
            None => self.on_icmp(now, packet),
        }
    }

    /// A segment of the network that is no SYN.
    fn on_segment(&mut self, now: Instant, packet: &mut Packet, numbers: NumbersOf<'_>) -> Action {
        let Some(key) = self.on_rebound_remote(now, packet) else { return self.pass() };
        if self.redirections.contains_key(&key) {
            self.on_redirection_remote(key, packet);
        }
        let asks = packet.tcp().filter(|tcp| tcp.header_len() > 20 && self.ports.contains_key(&key.service));
        let option = asks.and_then(|tcp| tcp.redirect(self.exid).ok().flatten());
        // A handover says R C; a client that wants another own port R alone.
        if let Some(port) = option.filter(|option| option.redirect && !option.confirm).and_then(|it| it.port)
        {
            self.on_rebind_asked(now, key, packet, port, numbers);
        }
        self.pass()
    }

    /// A packet from our TCP towards the network.
    pub fn handle_local(&mut self, now: Instant, packet: &mut Packet) -> Action {
        let (Some(tcp), Some(client), Some(service)) =
            (packet.tcp(), packet.destination_socket(), packet.source_socket())
        else {
            return self.pass();
        };
        if packet.fragment().is_some() {
            return self.pass();
        }
        let key = Key { client, service };
        if !tcp.is_syn_ack() {
            if self.redirections.contains_key(&key) {
                self.on_redirection_local(now, key, packet);
            }
            if self.rebinds.contains_key(&key) {
                self.on_rebound_local(now, key, packet);
            }
            return self.pass();
        }
        if packet.offload().gso.is_some() {
            return self.pass();
        }
        let Some(Port::Service(service)) = self.ports.get(&key.service).copied() else { return self.pass() };
        // A SYN-ACK to another SYN than the latest is no answer to that one: the client would refuse it anyway.
        let acknowledged = tcp.ack();
        match self.half_open.get(now, key).filter(|half_open| acknowledged == half_open.isn + 1) {
            Some(half_open) => self.mark_syn_ack(now, packet, &service, key.client, half_open),
            None => self.counters.syn_acks_unknown += 1,
        }
        Action::Pass
    }

    /// What the machine sends of its own; drain after every `handle_*` and at every deadline.
    pub fn poll_transmit(&mut self, now: Instant) -> Option<Transmit> {
        self.counters.half_open_expired += self.half_open.expire(now);
        // What there is no room for now comes with the next call.
        while self.transmits.len() + TRANSMITS_OF_A_TIMER <= TRANSMIT_QUEUE
            && self.events.len() < EVENT_QUEUE
            && let Some((at, key)) = self.timers.first().copied()
            && at <= now
        {
            self.unschedule(key);
            if self.redirections.contains_key(&key) {
                self.on_redirection_timer(now, key, self.wire_ends(key));
            }
            self.on_rebind_timer(now, key);
        }
        self.transmits.pop_front()
    }

    /// When to call [`poll_transmit`](Self::poll_transmit) next if nothing else happens.
    pub fn poll_timeout(&self) -> Option<Instant> {
        if !self.transmits.is_empty() {
            return Some(Instant::ZERO);
        }
        let timer = self.timers.first().map(|(at, _)| *at);
        [self.half_open.deadline(), timer].into_iter().flatten().min()
    }

    /// The connection is over: what was asked of it (§4) and learnt of it (§5) is forgotten.
    pub fn forget_connection(&mut self, client: SocketAddr, service: SocketAddr) {
        let key = Key { client, service };
        self.end_redirection(key, RedirectOutcome::Closed);
        self.forget_rebind(key);
        self.unschedule(key);
    }

    /// What happened, oldest first.
    pub fn poll_event(&mut self) -> Option<ServerEvent> {
        self.events.pop_front()
    }

    /// What was done so far.
    pub fn counters(&self) -> &ServerCounters {
        &self.counters
    }

    /// Half-open connections remembered now (`S5`).
    pub fn half_open_count(&self) -> usize {
        self.half_open.len()
    }

    /// The challenge ACK that a TCP owes for a SYN on a synchronised connection (`S7`, RFC 5961 §4), to be sent to the
    /// network; for a local TCP that does not give it itself. `timestamps` are (`TSval`, `TSecr`) where the connection
    /// uses them. `None` where none is due: a RST, a wrong checksum, too many in this second.
    pub fn challenge_ack(
        &mut self,
        now: Instant,
        segment: &Packet,
        snd_nxt: SeqNumber,
        rcv_nxt: SeqNumber,
        window: u16,
        timestamps: Option<(u32, u32)>,
    ) -> Option<Packet> {
        let reply = reply::challenge_ack(segment, snd_nxt, rcv_nxt, window, timestamps)?;
        let due = self.challenges.take(now);
        self.counters.challenge_acks += u64::from(due);
        self.counters.replies_limited += u64::from(!due);
        due.then_some(reply)
    }

    /// The RST for a segment to a service port without a connection (`S8`): SEQ = SEG.ACK (RFC 9293 §3.10.7.1), to be
    /// sent to the network; for a local TCP that does not give it itself. `None` where none is due: a RST, a wrong
    /// checksum, too many in this second.
    pub fn reset(&mut self, now: Instant, segment: &Packet) -> Option<Packet> {
        let reply = reply::reset(segment)?;
        let due = self.resets.take(now);
        self.counters.resets += u64::from(due);
        self.counters.replies_limited += u64::from(!due);
        due.then_some(reply)
    }

    fn pass(&mut self) -> Action {
        self.counters.passed += 1;
        Action::Pass
    }

    /// A SYN to a port of ours.
    fn on_syn(&mut self, now: Instant, packet: &mut Packet, port: Port) -> Action {
        let Some(syn) = Syn::read(packet) else { return self.pass() };
        let option = packet.tcp().map_or(Ok(None), |tcp| tcp.redirect(self.exid));
        self.counters.bad_options += u64::from(option.is_err());
        let option = option.ok().flatten();
        if let Port::Service(service) = port
            && self.refuses(now, syn.client.ip(), &service, option.and_then(|option| option.token))
        {
            return Action::Drop;
        }
        let Some(option) = option.filter(|option| option.redirect) else {
            self.counters.plain_syns += 1;
            // Its SYN-ACK must not get what an earlier SYN of the same client asked for (S1).
            self.half_open.remove(Key { client: syn.client, service: syn.asked });
            return Action::Pass;
        };
        if !can_redirect(packet) {
            self.counters.unfit_syns += 1;
            return Action::Pass;
        }
        let (Port::Redirect(of) | Port::Service(of)) = port;
        if let Some(&port) = self.elsewhere.get(&syn.asked).filter(|_| option.hops < self.max_hops) {
            return self.answer(now, packet, &syn, option.hops, Target { of, port, own: false });
        }
        match port {
            Port::Service(service) => self.on_syn_to_service(now, packet, &syn, &option, service),
            Port::Redirect(service) => self.on_syn_to_redirect(now, packet, &syn, &option, service),
        }
    }

    /// SYN(R) to Y: the local TCP's, its SYN-ACK gets C (`S1`, `S3`).
    fn on_syn_to_service(
        &mut self,
        now: Instant,
        packet: &mut Packet,
        syn: &Syn,
        option: &RedirectOption,
        service: ServicePorts,
    ) -> Action {
        packet.strip_redirect(self.exid);
        if self.deaf.contains(&service.service_socket()) {
            return self.decline(syn, DeclineReason::NotListening);
        }
        let moved_from = option.port.filter(|_| option.confirm);
        self.remember(now, syn, service, service.service_port, option.hops, moved_from);
        self.counters.syns_to_service += 1;
        Action::Pass
    }

    /// SYN(R) or SYN(R C) to X (`S1`, `S2`).
    fn on_syn_to_redirect(
        &mut self,
        now: Instant,
        packet: &mut Packet,
        syn: &Syn,
        option: &RedirectOption,
        service: ServicePorts,
    ) -> Action {
        let declined = if self.deaf.contains(&service.service_socket()) {
            Some(DeclineReason::NotListening)
        } else if option.hops >= self.max_hops {
            Some(DeclineReason::TooManyHops)
        } else {
            None
        };
        if let Some(reason) = declined {
            packet.strip_redirect(self.exid);
            return self.decline(syn, reason);
        }
        if option.confirm {
            let target = Target { of: service, port: service.service_port, own: true };
            return self.answer(now, packet, syn, option.hops, target);
        }
        // After a SYN to Y SYN-ACKs come from Y only (S3): a late copy of the SYN to X changes nothing.
        let key = Key { client: syn.client, service: service.service_socket() };
        let at_service = self
            .half_open
            .get(now, key)
            .is_some_and(|known| known.asked == service.service_port && known.isn == syn.isn);
        let asked = if at_service { service.service_port } else { service.redirect_port };
        packet.strip_redirect(self.exid);
        packet.set_destination_port(service.service_port);
        self.remember(now, syn, service, asked, option.hops, None);
        self.counters.syns_turned += 1;
        Action::Pass
    }

    fn remember(
        &mut self,
        now: Instant,
        syn: &Syn,
        service: ServicePorts,
        asked: u16,
        hops: u8,
        moved_from: Option<u16>,
    ) {
        let key = Key { client: syn.client, service: service.service_socket() };
        let evicted = self.half_open.insert(now, key, HalfOpen { asked, isn: syn.isn, hops, moved_from });
        self.counters.half_open_evicted += u64::from(evicted);
    }

    fn decline(&mut self, syn: &Syn, reason: DeclineReason) -> Action {
        match reason {
            DeclineReason::NotListening => self.counters.not_listening += 1,
            DeclineReason::TooManyHops => self.counters.too_many_hops += 1,
            DeclineReason::NoRoom => self.counters.syn_acks_no_room += 1,
        }
        self.report(ServerEvent::Declined { client: syn.client, asked: syn.asked, reason });
        Action::Pass
    }

    /// Answers from the SYN alone (`S2`); O only for a port of our own (`S1`).
    fn answer(&mut self, now: Instant, packet: &Packet, syn: &Syn, hops: u8, target: Target) -> Action {
        let Target { of, port, own } = target;
        let option = RedirectOption {
            confirm: true,
            port: Some(port),
            hops,
            observed: own.then(|| observed_digest(syn.client)),
            token: self.token(now, syn.client.ip(), &of, port),
            ..RedirectOption::default()
        };
        match self.answerer.answer(now, packet, &option, self.tokens.may_demand()) {
            Some(answer) => {
                let counter =
                    if own { &mut self.counters.answered } else { &mut self.counters.answered_elsewhere };
                *counter += 1;
                self.transmit(Towards::Network, answer);
                self.report(ServerEvent::Answered { client: syn.client, asked: syn.asked, port });
            }
            None => self.counters.syn_acks_no_room += 1,
        }
        Action::Drop
    }

    /// The SYN-ACK from Y to a SYN with R (`S1`, `S3`).
    fn mark_syn_ack(
        &mut self,
        now: Instant,
        packet: &mut Packet,
        service: &ServicePorts,
        client: SocketAddr,
        half_open: HalfOpen,
    ) {
        let key = Key { client, service: service.service_socket() };
        let moved = half_open.asked != key.service.port();
        let option = RedirectOption {
            confirm: true,
            port: moved.then_some(key.service.port()),
            hops: half_open.hops,
            observed: moved.then(|| observed_digest(key.client)),
            // For a probe or a reconnect: the half-open connection itself needs none.
            token: if moved { self.token(now, client.ip(), service, service.service_port) } else { None },
            ..RedirectOption::default()
        };
        let asked = SocketAddr::new(key.service.ip(), half_open.asked);
        let fitted = packet.insert_redirect_fitting(self.exid, &option, self.tokens.may_demand(), self.mtu);
        packet.set_source_port(half_open.asked);
        match (fitted, moved) {
            (Ok(()), true) => {
                self.counters.syn_acks_moved += 1;
                self.report(ServerEvent::HandedOver { client: key.client, asked, port: key.service.port() });
            }
            (Ok(()), false) => {
                self.counters.syn_acks_confirmed += 1;
                let Key { client, service } = key;
                let moved_from = half_open.moved_from;
                self.report(ServerEvent::Confirmed { client, service, moved_from });
            }
            (Err(_), moved) => {
                let syn = Syn { client: key.client, asked, isn: half_open.isn };
                let _ = self.decline(&syn, DeclineReason::NoRoom);
                if moved {
                    self.half_open.remove(key);
                    let reset = Segment::bare(key.client, key.service, TcpFlags::RST);
                    self.transmit(Towards::Local, Segment { seq: half_open.isn + 1, ..reset }.emit());
                }
            }
        }
    }

    /// An ICMP error about a SYN-ACK that we moved is made to quote what the local TCP sent (`I2`).
    fn on_icmp(&mut self, now: Instant, packet: &mut Packet) -> Action {
        let quoted = packet.icmp().and_then(|icmp| icmp.quoted());
        let Some(quoted) = quoted.filter(|quoted| quoted.protocol == Protocol::Tcp) else {
            return self.pass();
        };
        let source = SocketAddr::new(quoted.source, quoted.source_port);
        let wire =
            Key { client: SocketAddr::new(quoted.destination, quoted.destination_port), service: source };
        if let Some(client) = self.rebound.get(&wire).copied() {
            packet.set_quoted_destination(client);
            self.counters.icmp_turned += 1;
            return Action::Pass;
        }
        let Some(Port::Redirect(service)) = self.ports.get(&source).copied() else { return self.pass() };
        let client = SocketAddr::new(quoted.destination, quoted.destination_port);
        let known = self.half_open.get(now, Key { client, service: service.service_socket() });
        if known.is_none_or(|known| known.asked != service.redirect_port) {
            return self.pass();
        }
        packet.set_quoted_source(service.service_socket());
        self.counters.icmp_turned += 1;
        Action::Pass
    }

    fn transmit(&mut self, towards: Towards, packet: Packet) {
        if self.transmits.len() < TRANSMIT_QUEUE {
            self.transmits.push_back(Transmit { towards, packet });
        } else {
            self.counters.overflowed += 1;
        }
    }

    fn report(&mut self, event: ServerEvent) {
        if self.events.len() < EVENT_QUEUE {
            self.events.push_back(event);
        } else {
            self.counters.overflowed += 1;
        }
    }
}

/// Where a client is sent (`S2`).
#[derive(Debug, Clone, Copy)]
struct Target {
    /// The service that it asked for.
    of: ServicePorts,
    /// The service port, ours or another server's.
    port: u16,
    /// Whether it is ours.
    own: bool,
}

/// What every decision about a SYN needs.
#[derive(Debug, Clone, Copy)]
struct Syn {
    client: SocketAddr,
    asked: SocketAddr,
    isn: SeqNumber,
}

impl Syn {
    fn read(packet: &Packet) -> Option<Syn> {
        let isn = packet.tcp()?.seq();
        Some(Syn { client: packet.source_socket()?, asked: packet.destination_socket()?, isn })
    }
}
