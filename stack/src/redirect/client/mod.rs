//! The client's end of port redirection: rules C1 to C12 of PROTOCOL.md §3, and its part of §4 and §5.
//!
//! Beside a TCP that connects to VIP:X, [`Client`] asks for a redirect, follows it, and from then on swaps X and Y in
//! both directions. It holds no byte of the stream and never answers for the local TCP except to end a handover that
//! cannot complete.

mod config;
mod flow;
mod follow;
mod handover;
mod handshake;
mod path;
mod rebind;
mod settle;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};

use self::flow::{Attempt, Coming, Flow, FlowKey, Phase, State};
use self::path::Paths;
use super::numbers::{NumbersOf, unknown};
use super::{Action, Towards, Transmit};
use crate::time::Instant;
use crate::wire::{OptionError, Packet, RedirectOption, Segment, SeqNumber, TcpFlags, TcpView};

pub use self::config::{
    ClientConfig, ClientCounters, ClientEvent, Continuation, FlowRecord, OnRedirect, PlainReason, Prefix,
    RebindError, VipConfig,
};
pub use self::flow::Mark;
pub use self::path::{PathId, PathState};
pub use self::settle::{Swap, SwapChange};

/// Events kept for a driver that does not fetch them.
const MAX_EVENTS: usize = 1024;

/// The client's machine, for all connections to all VIPs of one host.
#[derive(Debug)]
pub struct Client {
    config: ClientConfig,
    vips: HashMap<IpAddr, VipConfig>,
    paths: Paths,
    flows: HashMap<FlowKey, Flow>,
    /// Of the flow that begins next.
    next: Mark,
    /// (local, VIP:Y) -> flow: what the network calls the connection.
    services: HashMap<(SocketAddr, SocketAddr), FlowKey>,
    /// Connects that open the next part of a connection that moves (§4).
    moves: HashMap<FlowKey, Coming>,
    timers: BTreeSet<(Instant, FlowKey)>,
    out: VecDeque<Transmit>,
    events: VecDeque<ClientEvent>,
    swaps: VecDeque<SwapChange>,
    counters: ClientCounters,
}

impl Client {
    /// A client without flows.
    pub fn new(config: ClientConfig) -> Client {
        let vips = config.vips.iter().map(|vip| (vip.address, *vip)).collect();
        Client {
            config,
            vips,
            paths: Paths::default(),
            flows: HashMap::new(),
            next: Mark::FIRST,
            services: HashMap::new(),
            moves: HashMap::new(),
            timers: BTreeSet::new(),
            out: VecDeque::new(),
            events: VecDeque::new(),
            swaps: VecDeque::new(),
            counters: ClientCounters::default(),
        }
    }

    /// Says by which way a VIP is reached now; what was learnt of other ways is kept.
    pub fn set_path(&mut self, vip: IpAddr, path: PathId) {
        self.paths.set_current(vip, path);
    }

    /// What is known of the present way to a VIP.
    pub fn path(&self, vip: IpAddr) -> PathState {
        self.paths.state(self.paths.key(vip))
    }

    /// A packet of the local TCP, addressed to VIP:X; rewritten in place where it goes to a service port.
    pub fn handle_local(&mut self, now: Instant, packet: &mut Packet) -> Action {
        let (Some(local), Some(vip)) = (packet.source_socket(), packet.destination_socket()) else {
            return Action::Pass;
        };
        let Some(tcp) = packet.tcp() else { return Action::Pass };
        let key = FlowKey { local, vip };
        if !self.vips.contains_key(&vip.ip()) && !self.moves.contains_key(&key) {
            return Action::Pass;
        }
        if tcp.is_syn() {
            return self.on_local_syn(now, key, packet);
        }
        match self.flows.get(&key).map(|flow| &flow.state) {
            None | Some(State::Gone) => Action::Pass,
            Some(State::Redirected { .. } | State::Direct { .. }) => self.on_live_local(now, key, packet),
            Some(State::Attempt(_)) => self.with_attempt(key, |client, flow, attempt| {
                client.on_attempt_local(now, flow, attempt, packet)
            }),
        }
    }

    /// A packet of the network: from a VIP, or an ICMP error about a packet to one; rewritten so that the local TCP
    /// sees port X.
    pub fn handle_remote(&mut self, now: Instant, packet: &mut Packet) -> Action {
        self.handle_remote_knowing(now, packet, &unknown)
    }

    /// As [`handle_remote`](Self::handle_remote), for a driver that owns the local TCP: `numbers` gives those of the
    /// connection (local, VIP:X) right now. It is asked only about segments that carry a request (§4, §5).
    pub fn handle_remote_knowing(
        &mut self,
        now: Instant,
        packet: &mut Packet,
        numbers: NumbersOf<'_>,
    ) -> Action {
        if packet.icmp().is_some() {
            return self.on_icmp(now, packet);
        }
        let (Some(from), Some(local)) = (packet.source_socket(), packet.destination_socket()) else {
            return Action::Pass;
        };
        let Some(tcp) = packet.tcp() else { return Action::Pass };
        if let Some(key) = self.services.get(&(local, from)).copied() {
            return self.on_service_segment(now, key, packet, numbers);
        }
        let key = FlowKey { local, vip: from };
        match self.flows.get(&key).map(|flow| &flow.state) {
            None | Some(State::Gone) => self.on_stranger(packet),
            Some(State::Direct { irs }) => {
                if tcp.is_syn_ack() && tcp.seq() != *irs {
                    self.counters.stray_syn_acks += 1;
                    return Action::Drop;
                }
                self.on_live_remote(key, packet, numbers);
                Action::Pass
            }
            // C4, C9: nothing of X concerns a connection that has moved.
            Some(State::Redirected { .. }) => {
                if tcp.flags().contains(TcpFlags::RST) {
                    self.counters.dropped_resets += 1;
                } else {
                    self.counters.stray_syn_acks += 1;
                }
                Action::Drop
            }
            Some(State::Attempt(_)) if !packet.checksum_ok() => self.drop_damaged(),
            Some(State::Attempt(_)) => self.with_attempt(key, |client, flow, attempt| {
                client.on_attempt_remote(now, flow, attempt, packet)
            }),
        }
    }

    /// C12: what belongs to no flow passes unchanged, but for the redirect that an earlier run asked for: the local TCP
    /// would answer it at X, where the balancer leads to another server. It will ask again.
    fn on_stranger(&mut self, packet: &Packet) -> Action {
        let Some(tcp) = packet.tcp().filter(TcpView::is_syn_ack) else { return Action::Pass };
        if !self.vips.contains_key(&packet.source()) {
            return Action::Pass;
        }
        let redirects = self.option(&tcp).is_some_and(|option| option.confirm && option.port.is_some());
        if redirects {
            self.counters.stray_syn_acks += 1;
            return Action::Drop;
        }
        Action::Pass
    }

    /// A damaged segment of a handshake. Beside another TCP nobody has looked at its checksum yet, and what that TCP does
    /// not take must not move the flow on.
    fn drop_damaged(&mut self) -> Action {
        self.counters.bad_checksums += 1;
        Action::Drop
    }

    fn on_service_segment(
        &mut self,
        now: Instant,
        key: FlowKey,
        packet: &mut Packet,
        numbers: NumbersOf<'_>,
    ) -> Action {
        match self.flows.get(&key).map(|flow| &flow.state) {
            Some(State::Redirected { irs, .. } | State::Direct { irs }) => {
                let strange = packet.tcp().is_some_and(|tcp| tcp.is_syn_ack() && tcp.seq() != *irs);
                if strange {
                    self.counters.stray_syn_acks += 1;
                    return Action::Drop;
                }
                self.on_live_remote(key, packet, numbers);
                packet.set_source_port(key.vip.port());
                Action::Pass
            }
            Some(State::Attempt(_)) if !packet.checksum_ok() => self.drop_damaged(),
            Some(State::Attempt(_)) => self.with_attempt(key, |client, flow, attempt| {
                client.on_attempt_service(now, flow, attempt, packet)
            }),
            None | Some(State::Gone) => Action::Pass,
        }
    }

    /// I2: errors quote the packet as the network saw it, to Y; the local TCP knows it as one to X.
    fn on_icmp(&mut self, now: Instant, packet: &mut Packet) -> Action {
        let Some(icmp) = packet.icmp() else { return Action::Pass };
        let Some(quoted) = icmp.quoted() else { return Action::Pass };
        let too_big = icmp.mtu().is_some();
        let local = SocketAddr::new(quoted.source, quoted.source_port);
        let service = SocketAddr::new(quoted.destination, quoted.destination_port);
        let Some(key) = self.services.get(&(local, service)).copied() else { return Action::Pass };
        let attempt = matches!(self.flows.get(&key).map(|flow| &flow.state), Some(State::Attempt(_)));
        if attempt && !too_big {
            let seq = quoted.seq.unwrap_or_default();
            return self
                .with_attempt(key, |client, flow, attempt| client.on_attempt_icmp(now, flow, attempt, seq));
        }
        packet.set_quoted_destination(key.vip);
        if local != key.local {
            packet.set_quoted_source(key.local);
        }
        Action::Pass
    }

    /// Runs `f` on a flow taken out of the table, so that it may use all of `self`; puts the flow back unless it is gone.
    fn with_attempt(
        &mut self,
        key: FlowKey,
        f: impl FnOnce(&mut Self, &mut Flow, Box<Attempt>) -> Action,
    ) -> Action {
        let Some(mut flow) = self.flows.remove(&key) else { return Action::Pass };
        let before = flow.timer;
        let action = match std::mem::replace(&mut flow.state, State::Gone) {
            State::Attempt(attempt) => f(self, &mut flow, attempt),
            other => {
                flow.state = other;
                Action::Pass
            }
        };
        self.put_back(flow, before);
        action
    }

    fn put_back(&mut self, mut flow: Flow, timer_before: Option<Instant>) {
        if !matches!(flow.state, State::Attempt(_)) {
            flow.timer = None;
        }
        if timer_before != flow.timer {
            if let Some(at) = timer_before {
                self.timers.remove(&(at, flow.key));
            }
            if let Some(at) = flow.timer {
                self.timers.insert((at, flow.key));
            }
        }
        if matches!(flow.state, State::Gone) {
            self.unlink(&mut flow);
        } else {
            self.flows.insert(flow.key, flow);
        }
    }

    /// What the machine sends of its own; timers that are due fire first.
    pub fn poll_transmit(&mut self, now: Instant) -> Option<Transmit> {
        while let Some((at, key)) = self.timers.first().copied() {
            if at > now {
                break;
            }
            self.timers.pop_first();
            let Some(flow) = self.flows.get_mut(&key) else { continue };
            flow.timer = None;
            if !matches!(flow.state, State::Attempt(_)) {
                self.on_live_timer(now, key);
                continue;
            }
            let _ = self.with_attempt(key, |client, flow, attempt| {
                client.on_timer(now, flow, attempt);
                Action::Drop
            });
        }
        self.out.pop_front()
    }

    /// When [`poll_transmit`](Self::poll_transmit) wants to be called next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        if self.out.is_empty() { self.timers.first().map(|(at, _)| *at) } else { Some(Instant::ZERO) }
    }

    /// What happened.
    pub fn poll_event(&mut self) -> Option<ClientEvent> {
        self.events.pop_front()
    }

    /// Frees the flows whose socket (local, VIP:X) is gone, TIME-WAIT included (`C12`).
    pub fn retain(&mut self, alive: impl FnMut(SocketAddr, SocketAddr) -> bool) {
        self.retain_since(Mark::LAST, alive);
    }

    /// Where the next flow begins, for [`retain_since`](Self::retain_since).
    pub fn mark(&self) -> Mark {
        self.next
    }

    /// As [`retain`](Self::retain) with an answer to a question asked at `mark`: it may not know the sockets of flows
    /// that began later, even where an older flow had the same ends.
    pub fn retain_since(&mut self, mark: Mark, mut alive: impl FnMut(SocketAddr, SocketAddr) -> bool) {
        let gone: Vec<_> = self.begun_before(mark).filter(|(local, vip)| !alive(*local, *vip)).collect();
        for (local, vip) in gone {
            self.free(mark, local, vip);
        }
        self.moves.retain(|key, _| alive(key.local, key.vip));
    }

    /// The ends (local, VIP:X) of the flows that began before `mark`.
    pub fn begun_before(&self, mark: Mark) -> impl Iterator<Item = (SocketAddr, SocketAddr)> {
        self.flows.values().filter(move |flow| flow.born < mark).map(|flow| (flow.key.local, flow.key.vip))
    }

    /// Frees one flow whose socket is gone, for drivers that free many bit by bit; false if there is none that began
    /// before `mark`.
    pub fn free(&mut self, mark: Mark, local: SocketAddr, vip: SocketAddr) -> bool {
        let key = FlowKey { local, vip };
        if self.flows.get(&key).is_none_or(|flow| flow.born >= mark) {
            return false;
        }
        self.remove(key);
        true
    }

    fn remove(&mut self, key: FlowKey) {
        if let Some(mut flow) = self.flows.remove(&key) {
            if let Some(at) = flow.timer {
                self.timers.remove(&(at, key));
            }
            self.unlink(&mut flow);
        }
    }

    /// Frees all names under which the network knows the flow.
    fn unlink(&mut self, flow: &mut Flow) {
        self.swaps.extend(flow.unsettle());
        let service = flow.key.service(flow.present_port());
        for port in flow.live.iter().flat_map(|live| &live.own_ports) {
            self.services.remove(&(SocketAddr::new(flow.key.local.ip(), *port), service));
        }
        self.set_service(flow, None);
    }

    /// Names the service port under which the network knows the flow.
    fn set_service(&mut self, flow: &mut Flow, port: Option<u16>) {
        if let Some(old) = flow.service {
            self.services.remove(&(flow.key.local, flow.key.service(old)));
        }
        if let Some(new) = port {
            self.services.insert((flow.key.local, flow.key.service(new)), flow.key);
        }
        flow.service = port;
    }

    /// Flows in the table.
    pub fn flow_count(&self) -> usize {
        self.flows.len()
    }

    /// The redirected connections, to be kept over a restart.
    pub fn flows(&self) -> impl Iterator<Item = FlowRecord> {
        self.flows.values().filter_map(|flow| {
            let (service_port, irs) = match &flow.state {
                State::Redirected { service_port, irs } => (*service_port, *irs),
                State::Attempt(attempt) => match &attempt.phase {
                    Phase::HandingOver(handover) => (handover.service_port, handover.irs),
                    _ => return None,
                },
                _ => return None,
            };
            Some(FlowRecord { local: flow.key.local, vip: flow.key.vip, service_port, irs: irs.0 })
        })
    }

    /// Takes a connection over from an earlier run; false if it is there already, the table is full or its VIP is none
    /// of ours.
    pub fn restore(&mut self, record: FlowRecord) -> bool {
        let key = FlowKey { local: record.local, vip: record.vip };
        let service = (record.local, key.service(record.service_port));
        if !self.vips.contains_key(&record.vip.ip())
            || self.flows.len() >= self.config.max_flows
            || self.flows.contains_key(&key)
            || self.services.contains_key(&service)
        {
            return false;
        }
        let state = State::Redirected { service_port: record.service_port, irs: SeqNumber(record.irs) };
        let mut flow = Flow { service: Some(record.service_port), ..Flow::new(key, self.next.take(), state) };
        self.settle(&mut flow);
        self.flows.insert(key, flow);
        self.services.insert(service, key);
        true
    }

    /// What was counted.
    pub fn counters(&self) -> &ClientCounters {
        &self.counters
    }

    fn event(&mut self, event: ClientEvent) {
        if self.events.len() >= MAX_EVENTS {
            self.events.pop_front();
            self.counters.events_dropped += 1;
        }
        self.events.push_back(event);
    }

    fn transmit(&mut self, towards: Towards, packet: Packet) {
        self.out.push_back(Transmit { towards, packet });
    }

    /// A reset to (VIP, `port`), or from it to the local TCP.
    fn reset(&mut self, towards: Towards, key: &FlowKey, port: u16, seq: SeqNumber) {
        let (source, destination) = match towards {
            Towards::Network => (key.local, key.service(port)),
            Towards::Local => (key.service(port), key.local),
        };
        let packet = Segment { seq, ..Segment::bare(source, destination, TcpFlags::RST) }.emit();
        self.transmit(towards, packet);
    }

    /// The option of a segment; a malformed one counts as none (`W1`).
    fn option(&mut self, tcp: &TcpView<'_>) -> Option<RedirectOption> {
        match tcp.redirect(self.config.exid) {
            Ok(option) => option,
            Err(OptionError::Malformed) => None,
            Err(_) => {
                self.counters.malformed_options += 1;
                None
            }
        }
    }
}
