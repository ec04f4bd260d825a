//! From the first SYN to a redirect that is followed, confirmed or given up: C1 to C6.

use std::net::SocketAddr;
use std::time::Duration;

use super::config::{ClientEvent, Continuation, PlainReason};
use super::flow::{Attempt, Coming, Flow, FlowKey, Handover, MAX_TSVALS, Phase, State};
use super::path::PathState;
use super::{Action, Client, Towards};
use crate::redirect::numbers::Track;
use crate::time::Instant;
use crate::wire::{Packet, RedirectOption, SeqNumber, TcpFlags, TcpOption, TcpView, observed_digest};

/// Round trips that the shim waits for an answer of the service port (`C5`, `C10`).
pub(super) const ROUND_TRIPS: u32 = 3;
/// A SYN-ACK with a refused ISN counts as the answer to a plain SYN only for so long: then the first server's own
/// retransmission, due a second after its first SYN-ACK (RFC 6298), could be taken for it.
const SAME_SERVER_WINDOW: Duration = Duration::from_millis(900);
/// Plain SYNs repeated in vain after which it counts nevertheless: another server would have answered one of them.
const SAME_SERVER_REPEATS: u8 = 2;

/// What a SYN-ACK from X or Y asks for.
enum Answer {
    /// Go on at this port; the digest of our address as the server saw it, and the token for the port.
    Redirect { port: u16, observed: Option<u16>, token: Option<[u8; 8]> },
    /// Stay on the port asked.
    Stay,
    /// No redirection.
    Plain(PlainReason),
}

/// C1: what R may be put on.
fn eligible(tcp: &TcpView<'_>) -> bool {
    tcp.payload().is_empty()
        && tcp.options().all(|option| {
            !matches!(
                option,
                Err(_) | Ok(TcpOption::Md5Signature | TcpOption::Authentication | TcpOption::Multipath)
            )
        })
}

impl Client {
    pub(super) fn on_local_syn(&mut self, now: Instant, key: FlowKey, packet: &mut Packet) -> Action {
        let Some(tcp) = packet.tcp() else { return Action::Pass };
        let iss = tcp.seq();
        match self.flows.get(&key).map(|flow| &flow.state) {
            Some(State::Attempt(attempt)) if attempt.iss == iss => {
                return self.with_attempt(key, |client, flow, attempt| {
                    client.on_repeated_syn(now, flow, attempt, packet)
                });
            }
            // Another ISS: the local TCP has given the old connection up.
            Some(_) => self.remove(key),
            None => {}
        }
        if self.services.contains_key(&(key.local, key.vip)) {
            // C8: on the wire it could not be told from the redirected connection with these ports.
            self.counters.port_collisions += 1;
            let refusal = refuse(&key, iss);
            self.transmit(Towards::Local, refusal);
            return Action::Drop;
        }
        if let Some(coming) = self.moves.get(&key).copied() {
            return self.open_moved(now, key, coming, packet);
        }
        if !eligible(&tcp) {
            self.counters.ineligible += 1;
            return Action::Pass;
        }
        if self.flows.len() >= self.config.max_flows {
            self.counters.table_full += 1;
            return Action::Pass;
        }
        self.open(now, key, packet)
    }

    /// Opens a flow for a SYN and puts R on it.
    fn open(&mut self, now: Instant, key: FlowKey, packet: &mut Packet) -> Action {
        let continuation = self.vips.get(&key.vip.ip()).map(|vip| vip.continuation).unwrap_or_default();
        let path = self.paths.key(key.vip.ip());
        let state = match continuation {
            Continuation::Plain => PathState::Plain,
            _ => self.paths.state_for_connect(path, now),
        };
        let handover = match (continuation, state) {
            (_, PathState::Plain) | (Continuation::Plain, _) => {
                self.counters.remembered_plain += 1;
                return Action::Pass;
            }
            (Continuation::Handover, _) | (Continuation::Auto, PathState::Direct) => true,
            (Continuation::Auto | Continuation::Reconnect, _) => false,
        };
        packet.blank_fast_open();
        let syn = packet.clone();
        if !self.mark_syn(packet, handover, None, None) {
            self.counters.ineligible += 1;
            return Action::Pass;
        }
        let Some(mut attempt) = Attempt::new(now, syn, path) else { return Action::Pass };
        attempt.handover = handover;
        attempt.forced = continuation == Continuation::Handover;
        let state = State::Attempt(Box::new(attempt));
        self.flows.insert(key, Flow::new(key, self.next.take(), state));
        Action::Pass
    }

    /// `M6`: opens the next part of a connection that comes from port Y: R C P=Y, confirmed or refused.
    fn open_moved(&mut self, now: Instant, key: FlowKey, coming: Coming, packet: &mut Packet) -> Action {
        packet.blank_fast_open();
        let syn = packet.clone();
        let path = self.paths.key(key.vip.ip());
        let room = self.flows.len() < self.config.max_flows;
        let fit = room
            && syn.tcp().is_some_and(|tcp| eligible(&tcp))
            && self.mark_syn(packet, false, Some(coming.from), coming.token);
        let (true, Some(mut attempt)) = (fit, Attempt::new(now, syn, path)) else {
            let iss = packet.tcp().map(|tcp| tcp.seq()).unwrap_or_default();
            return self.refuse_move(&key, iss);
        };
        attempt.moved_from = Some(coming.from);
        attempt.origin = coming.origin;
        attempt.token = coming.token;
        attempt.visited.push(coming.from);
        self.counters.moves_opened += 1;
        self.flows.insert(key, Flow::new(key, self.next.take(), State::Attempt(Box::new(attempt))));
        Action::Pass
    }

    /// A move without confirmation: "connection refused" to the local TCP, and the old connection goes on.
    fn refuse_move(&mut self, key: &FlowKey, iss: SeqNumber) -> Action {
        self.counters.moves_failed += 1;
        self.moves.remove(key);
        let refusal = refuse(key, iss);
        self.transmit(Towards::Local, refusal);
        Action::Drop
    }

    /// The opening SYN's option: R to hand over, R C to reconnect, R C P=Y to move. False if it does not fit.
    fn mark_syn(
        &mut self,
        packet: &mut Packet,
        handover: bool,
        moved_from: Option<u16>,
        token: Option<[u8; 8]>,
    ) -> bool {
        let option = RedirectOption {
            redirect: true,
            confirm: !handover,
            port: moved_from,
            token,
            ..Default::default()
        };
        let fits = packet.insert_redirect_fitting(self.config.exid, &option, true, self.config.mtu).is_ok();
        self.counters.asked += u64::from(fits);
        fits
    }

    /// The latest SYN as it goes to the service port: R P=X, or R C P=Y where it moves from Y, with the token given.
    pub(super) fn service_syn(&self, key: &FlowKey, attempt: &Attempt, port: u16) -> Packet {
        let mut packet = attempt.syn.clone();
        packet.set_destination_port(port);
        let option = RedirectOption {
            redirect: true,
            confirm: attempt.moved_from.is_some(),
            port: Some(attempt.moved_from.unwrap_or(key.vip.port())),
            hops: attempt.hops(),
            token: attempt.token,
            ..Default::default()
        };
        // The same SYN had room for the option without a token on its way to X.
        let _ = packet.insert_redirect_fitting(self.config.exid, &option, true, self.config.mtu);
        packet
    }

    fn on_repeated_syn(
        &mut self,
        now: Instant,
        flow: &mut Flow,
        mut attempt: Box<Attempt>,
        packet: &mut Packet,
    ) -> Action {
        // C1: one that has become ineligible, as by data, is not what goes anywhere with R.
        let fit = packet.tcp().is_some_and(|tcp| eligible(&tcp));
        if fit {
            packet.blank_fast_open();
            attempt.syn = packet.clone();
        }
        attempt.repeats = attempt.repeats.saturating_add(1);
        if let Some((value, _)) = packet.tcp().and_then(|tcp| tcp.timestamps())
            && attempt.tsvals.len() < MAX_TSVALS
        {
            attempt.tsvals.push(value);
        }
        let mut action = Action::Pass;
        match attempt.phase {
            Phase::Asking => {
                attempt.sent = now;
                let moved_from = attempt.moved_from;
                // C6: the first repeat keeps R, the second goes without; a move keeps it.
                let asks = moved_from.is_some() || attempt.repeats <= 1;
                if !asks || !fit || !self.mark_syn(packet, attempt.handover, moved_from, attempt.token) {
                    if moved_from.is_some() {
                        // What cannot carry the option does not go at all.
                        flow.state = State::Attempt(attempt);
                        return Action::Drop;
                    }
                    let reason = PlainReason::Silence;
                    attempt.phase = Phase::Plain { reason, since: now, repeats: 0, rejected: None };
                }
            }
            Phase::Plain { ref mut repeats, .. } => *repeats = repeats.saturating_add(1),
            // C5: later SYNs of the local TCP go to Y as well.
            Phase::Reconnecting { service_port, .. } => {
                *packet = self.service_syn(&flow.key, &attempt, service_port);
            }
            // It crossed the SYN-ACK; the probe is what repeats the SYN now.
            Phase::HandingOver(_) => action = Action::Drop,
        }
        flow.state = State::Attempt(attempt);
        action
    }

    /// Segments of the local TCP, other than SYNs, while the handshake is not over.
    pub(super) fn on_attempt_local(
        &mut self,
        now: Instant,
        flow: &mut Flow,
        mut attempt: Box<Attempt>,
        packet: &mut Packet,
    ) -> Action {
        let action = match &mut attempt.phase {
            Phase::Asking | Phase::Plain { .. } => Action::Pass,
            // It has seen no SYN-ACK: whatever it answers, it is not this connection.
            Phase::Reconnecting { .. } => {
                self.counters.unexpected += 1;
                Action::Drop
            }
            Phase::HandingOver(_) => return self.on_handover_local(now, flow, attempt, packet),
        };
        flow.state = State::Attempt(attempt);
        action
    }

    /// Segments from X during the handshake.
    pub(super) fn on_attempt_remote(
        &mut self,
        now: Instant,
        flow: &mut Flow,
        attempt: Box<Attempt>,
        packet: &mut Packet,
    ) -> Action {
        let Some(tcp) = packet.tcp() else { return Action::Pass };
        if !tcp.is_syn_ack() {
            let reset = tcp.flags().contains(TcpFlags::RST);
            let ours = matches!(attempt.phase, Phase::Asking | Phase::Plain { .. });
            flow.state = State::Attempt(attempt);
            if ours {
                // The local TCP judges: a reset in answer to the SYN is "connection refused".
                return Action::Pass;
            }
            let counter =
                if reset { &mut self.counters.dropped_resets } else { &mut self.counters.unexpected };
            *counter += 1;
            return Action::Drop;
        }
        if tcp.ack() != attempt.iss + 1 || !echo_ok(&attempt, &tcp) {
            self.counters.stray_syn_acks += 1;
            flow.state = State::Attempt(attempt);
            return Action::Drop;
        }
        match attempt.phase {
            Phase::Asking => self.on_answer(now, flow, attempt, packet),
            Phase::Plain { .. } => self.on_plain_answer(now, flow, attempt, packet),
            Phase::HandingOver(_) => self.on_handover_syn_ack(now, flow, attempt, packet, true),
            // C4: the first valid one has won.
            Phase::Reconnecting { .. } => {
                self.counters.stray_syn_acks += 1;
                flow.state = State::Attempt(attempt);
                Action::Drop
            }
        }
    }

    /// C2 and C3: reads what a SYN-ACK says; `asked` is the port it came from.
    fn judge(&mut self, key: &FlowKey, attempt: &Attempt, tcp: &TcpView<'_>, asked: u16) -> Answer {
        let Some(option) = self.option(tcp) else { return Answer::Plain(PlainReason::Unconfirmed) };
        if option.redirect {
            return Answer::Plain(PlainReason::Echoed);
        }
        if !option.confirm {
            return Answer::Plain(PlainReason::Unconfirmed);
        }
        let Some(port) = option.port else { return Answer::Stay };
        let service = key.service(port);
        let obeyed = option.address.is_none()
            && port != asked
            && port != key.vip.port()
            && self.config.ports.contains(&port)
            && !self.config.denied_ports.contains(&port)
            && attempt.hops() < self.config.max_hops
            && !attempt.visited.contains(&port)
            && !self.services.contains_key(&(key.local, service))
            && !self.flows.contains_key(&FlowKey { local: key.local, vip: service });
        if obeyed {
            Answer::Redirect { port, observed: option.observed, token: option.token }
        } else {
            Answer::Plain(PlainReason::Refused)
        }
    }

    /// The first SYN-ACK to a SYN with R.
    fn on_answer(
        &mut self,
        now: Instant,
        flow: &mut Flow,
        mut attempt: Box<Attempt>,
        packet: &mut Packet,
    ) -> Action {
        let Some(tcp) = packet.tcp() else { return Action::Pass };
        let irs = tcp.seq();
        match self.judge(&flow.key, &attempt, &tcp, flow.key.vip.port()) {
            Answer::Stay => {
                self.paths.on_confirmed(attempt.path);
                self.counters.confirmed += 1;
                packet.strip_redirect(self.config.exid);
                self.go_live(flow, &attempt, packet);
                flow.state = State::Direct { irs };
                self.event(ClientEvent::Confirmed { local: flow.key.local, vip: flow.key.vip });
                Action::Pass
            }
            Answer::Redirect { port, observed, token } => {
                attempt.token = token;
                self.paths.on_confirmed(attempt.path);
                let direct = observed.map(|digest| digest == observed_digest(flow.key.local));
                let safe = attempt.forced || direct == Some(true);
                if attempt.handover && direct.is_some() && safe {
                    self.begin_handover(now, flow, attempt, packet, port, irs)
                } else {
                    self.reconnect(now, flow, attempt, port, direct);
                    Action::Drop
                }
            }
            Answer::Plain(reason) => {
                if reason != PlainReason::Refused && attempt.moved_from.is_none() {
                    let until = now + self.config.plain_memory;
                    self.paths.on_unconfirmed(attempt.path, attempt.started, now, until);
                }
                self.fall_back(now, flow, attempt, reason, Some(irs));
                Action::Drop
            }
        }
    }

    fn begin_handover(
        &mut self,
        now: Instant,
        flow: &mut Flow,
        mut attempt: Box<Attempt>,
        packet: &mut Packet,
        port: u16,
        irs: SeqNumber,
    ) -> Action {
        packet.strip_redirect(self.config.exid);
        let track = attempt.syn.tcp().zip(packet.tcp()).map(|(syn, answer)| Track::new(&syn, &answer));
        let interval = (now.since(attempt.sent) * ROUND_TRIPS).max(self.config.probe_timeout);
        attempt.visited.push(port);
        attempt.phase = Phase::HandingOver(Handover {
            service_port: port,
            irs,
            kept: None,
            snd_nxt: attempt.iss + 1,
            track,
            interval,
            give_up: now + self.config.handover_timeout,
            last_probe: None,
            ack_lost: false,
            half_open: false,
        });
        flow.timer = Some(now + interval);
        flow.state = State::Attempt(attempt);
        self.set_service(flow, Some(port));
        self.counters.handed_over += 1;
        Action::Pass
    }

    /// C5: the latest SYN goes to the service port.
    fn reconnect(
        &mut self,
        now: Instant,
        flow: &mut Flow,
        mut attempt: Box<Attempt>,
        port: u16,
        direct: Option<bool>,
    ) {
        let interval = (now.since(attempt.sent) * ROUND_TRIPS).max(self.config.reconnect_timeout);
        attempt.visited.push(port);
        let syn = self.service_syn(&flow.key, &attempt, port);
        self.transmit(Towards::Network, syn);
        attempt.phase = Phase::Reconnecting { service_port: port, interval, repeats: 0, direct };
        flow.timer = Some(now + interval);
        flow.state = State::Attempt(attempt);
        self.set_service(flow, Some(port));
    }

    /// C2, C6: the SYN again, to X and without the option.
    fn fall_back(
        &mut self,
        now: Instant,
        flow: &mut Flow,
        mut attempt: Box<Attempt>,
        reason: PlainReason,
        rejected: Option<SeqNumber>,
    ) {
        if attempt.moved_from.is_some() {
            let _ = self.refuse_move(&flow.key, attempt.iss);
            flow.state = State::Gone;
            return;
        }
        self.transmit(Towards::Network, attempt.syn.clone());
        attempt.phase = Phase::Plain { reason, since: now, repeats: 0, rejected };
        flow.timer = None;
        flow.state = State::Attempt(attempt);
        self.set_service(flow, None);
    }

    /// The SYN-ACK to a SYN without the option.
    fn on_plain_answer(
        &mut self,
        now: Instant,
        flow: &mut Flow,
        attempt: Box<Attempt>,
        packet: &mut Packet,
    ) -> Action {
        let Phase::Plain { reason, since, repeats, rejected } = attempt.phase else { return Action::Drop };
        let Some(tcp) = packet.tcp() else { return Action::Drop };
        let irs = tcp.seq();
        let late =
            rejected == Some(irs) && now.since(since) > SAME_SERVER_WINDOW && repeats < SAME_SERVER_REPEATS;
        let marked = self.option(&tcp).is_some_and(|option| option.confirm);
        if late || marked {
            // An answer to a SYN that had R, from a server that our ACK to X would not reach.
            self.counters.stray_syn_acks += 1;
            flow.state = State::Attempt(attempt);
            return Action::Drop;
        }
        if matches!(reason, PlainReason::Silence | PlainReason::ServicePort) {
            let until = now + self.config.plain_memory;
            self.paths.on_failure(attempt.path, attempt.started, now, until);
        }
        *match reason {
            PlainReason::Unconfirmed => &mut self.counters.plain_unconfirmed,
            PlainReason::Echoed => &mut self.counters.plain_echoed,
            PlainReason::Refused => &mut self.counters.plain_refused,
            PlainReason::Silence => &mut self.counters.plain_silence,
            PlainReason::ServicePort => &mut self.counters.plain_service_port,
        } += 1;
        flow.state = State::Direct { irs };
        self.event(ClientEvent::Plain { local: flow.key.local, vip: flow.key.vip, reason });
        Action::Pass
    }

    /// Segments from the service port during the handshake.
    pub(super) fn on_attempt_service(
        &mut self,
        now: Instant,
        flow: &mut Flow,
        attempt: Box<Attempt>,
        packet: &mut Packet,
    ) -> Action {
        match attempt.phase {
            Phase::HandingOver(_) => self.on_handover_service(now, flow, attempt, packet),
            Phase::Reconnecting { service_port, direct, .. } => {
                self.on_reconnecting(now, flow, attempt, packet, service_port, direct)
            }
            Phase::Asking | Phase::Plain { .. } => {
                flow.state = State::Attempt(attempt);
                Action::Pass
            }
        }
    }

    /// C5 and C6: an answer of Y to the SYN sent there.
    fn on_reconnecting(
        &mut self,
        now: Instant,
        flow: &mut Flow,
        attempt: Box<Attempt>,
        packet: &mut Packet,
        port: u16,
        direct: Option<bool>,
    ) -> Action {
        let Some(tcp) = packet.tcp() else { return Action::Drop };
        let (flags, ack) = (tcp.flags(), tcp.ack());
        let answers = flags.contains(TcpFlags::ACK) && ack == attempt.iss + 1;
        if flags.contains(TcpFlags::RST) {
            self.counters.dropped_resets += 1;
            if answers {
                self.fall_back(now, flow, attempt, PlainReason::ServicePort, None);
            } else {
                flow.state = State::Attempt(attempt);
            }
            return Action::Drop;
        }
        if tcp.is_syn_ack() && answers && echo_ok(&attempt, &tcp) {
            return self.on_service_syn_ack(now, flow, attempt, packet, port, direct);
        }
        // An old connection with these ports: reset it, and ask again.
        self.counters.unexpected += 1;
        if flags.contains(TcpFlags::ACK) {
            self.reset(Towards::Network, &flow.key, port, ack);
            if !flags.contains(TcpFlags::SYN) {
                let syn = self.service_syn(&flow.key, &attempt, port);
                self.transmit(Towards::Network, syn);
            }
        }
        flow.state = State::Attempt(attempt);
        Action::Drop
    }

    fn on_service_syn_ack(
        &mut self,
        now: Instant,
        flow: &mut Flow,
        mut attempt: Box<Attempt>,
        packet: &mut Packet,
        port: u16,
        direct: Option<bool>,
    ) -> Action {
        let Some(tcp) = packet.tcp() else { return Action::Drop };
        let (irs, ack) = (tcp.seq(), tcp.ack());
        match self.judge(&flow.key, &attempt, &tcp, port) {
            Answer::Stay => {
                self.paths.on_reconnected(attempt.path, direct, now + self.config.translated_memory);
                self.counters.reconnected += 1;
                packet.strip_redirect(self.config.exid);
                packet.set_source_port(flow.key.vip.port());
                self.go_live(flow, &attempt, packet);
                self.redirected(flow, port, irs, false);
                Action::Pass
            }
            Answer::Redirect { port: next, token, .. } => {
                attempt.token = token;
                self.reset(Towards::Network, &flow.key, port, ack);
                self.reconnect(now, flow, attempt, next, direct);
                Action::Drop
            }
            Answer::Plain(_) => {
                self.reset(Towards::Network, &flow.key, port, ack);
                self.fall_back(now, flow, attempt, PlainReason::ServicePort, None);
                Action::Drop
            }
        }
    }

    /// The connection is on its service port.
    pub(super) fn redirected(&mut self, flow: &mut Flow, service_port: u16, irs: SeqNumber, handover: bool) {
        flow.state = State::Redirected { service_port, irs };
        let FlowKey { local, vip } = flow.key;
        self.event(ClientEvent::Redirected { local, vip, service_port, handover });
    }

    /// An ICMP error about a SYN or a segment of the handshake sent to Y, quoted sequence number `seq` (C6, I2).
    pub(super) fn on_attempt_icmp(
        &mut self,
        now: Instant,
        flow: &mut Flow,
        attempt: Box<Attempt>,
        seq: SeqNumber,
    ) -> Action {
        match attempt.phase {
            Phase::Reconnecting { .. } if seq == attempt.iss => {
                self.fall_back(now, flow, attempt, PlainReason::ServicePort, None);
            }
            Phase::HandingOver(_) => self.on_handover_trouble(now, flow, attempt),
            _ => flow.state = State::Attempt(attempt),
        }
        Action::Drop
    }

    /// A deadline of the handshake.
    pub(super) fn on_timer(&mut self, now: Instant, flow: &mut Flow, mut attempt: Box<Attempt>) {
        match attempt.phase {
            Phase::Reconnecting { service_port, interval, ref mut repeats, .. } => {
                if *repeats >= self.config.reconnect_repeats {
                    self.fall_back(now, flow, attempt, PlainReason::ServicePort, None);
                    return;
                }
                *repeats += 1;
                flow.timer = Some(now + interval);
                let syn = self.service_syn(&flow.key, &attempt, service_port);
                self.transmit(Towards::Network, syn);
                flow.state = State::Attempt(attempt);
            }
            Phase::HandingOver(_) => self.on_handover_timer(now, flow, attempt),
            Phase::Asking | Phase::Plain { .. } => flow.state = State::Attempt(attempt),
        }
    }
}

/// C3: the timestamp echoed is one that this attempt sent.
fn echo_ok(attempt: &Attempt, tcp: &TcpView<'_>) -> bool {
    match tcp.timestamps() {
        Some((_, echo)) if !attempt.tsvals.is_empty() => attempt.tsvals.contains(&echo),
        _ => true,
    }
}

/// "Connection refused", as a TCP says it to a SYN (RFC 9293 §3.10.7.1).
fn refuse(key: &FlowKey, iss: SeqNumber) -> Packet {
    let source: SocketAddr = key.vip;
    let bare = crate::wire::Segment::bare(source, key.local, TcpFlags::RST | TcpFlags::ACK);
    crate::wire::Segment { ack: iss + 1, ..bare }.emit()
}
