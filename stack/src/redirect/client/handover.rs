//! C10: a handover until the service port has shown that it took it, and what is done when it does not.

use std::time::Duration;

use super::config::ClientEvent;
use super::flow::{Attempt, Flow, FlowKey, Handover, Phase, State};
use super::{Action, Client, Towards};
use crate::time::Instant;
use crate::wire::{Packet, RedirectOption, Segment, SeqNumber, TcpFlags, TcpView};

/// How a handover ended without success.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Failure {
    /// The service port answered as if to somebody else.
    Answer,
    /// Nothing came.
    Silence,
}

impl Client {
    /// Segments of the local TCP: they go to Y, and say so while they can.
    pub(super) fn on_handover_local(
        &mut self,
        now: Instant,
        flow: &mut Flow,
        mut attempt: Box<Attempt>,
        packet: &mut Packet,
    ) -> Action {
        let Phase::HandingOver(handover) = &mut attempt.phase else { return Action::Pass };
        let Some(tcp) = packet.tcp() else { return Action::Pass };
        let reset = tcp.flags().contains(TcpFlags::RST);
        let end = tcp.seq() + tcp.sequence_len();
        if let Some(track) = &mut handover.track {
            track.on_local(&tcp);
        }
        if !reset && end.after(handover.snd_nxt) {
            handover.snd_nxt = end;
        }
        let first = handover.kept.is_none() && !reset;
        if first && tcp.sequence_len() > 0 {
            let made = made_up_ack(&flow.key, handover, attempt.iss, &tcp);
            handover.kept = Some(self.confirming(&flow.key, made));
        }
        packet.set_destination_port(handover.service_port);
        if reset {
            // The local TCP has ended it; nothing that follows can prove the path bad.
            flow.state = State::Gone;
            return Action::Pass;
        }
        let option = handover_option(&flow.key);
        // Without room it goes without the option: a confirmation is no proof anyway (S4).
        let _ = packet.insert_redirect(self.config.exid, &option, self.config.mtu);
        if first && handover.kept.is_none() {
            handover.kept = Some(packet.clone());
            flow.timer = Some(now + handover.interval);
        }
        flow.state = State::Attempt(attempt);
        Action::Pass
    }

    fn confirming(&self, key: &FlowKey, mut packet: Packet) -> Packet {
        let _ = packet.insert_redirect(self.config.exid, &handover_option(key), self.config.mtu);
        packet
    }

    /// A SYN-ACK while the handover is open: from X (`from_redirect_port`), or from Y in answer to a probe.
    pub(super) fn on_handover_syn_ack(
        &mut self,
        now: Instant,
        flow: &mut Flow,
        mut attempt: Box<Attempt>,
        packet: &Packet,
        from_redirect_port: bool,
    ) -> Action {
        let Phase::HandingOver(handover) = &mut attempt.phase else { return Action::Drop };
        let Some(tcp) = packet.tcp() else { return Action::Drop };
        if tcp.ack() != attempt.iss + 1 {
            // No answer to a SYN of this attempt: late, or forged by somebody who does not see it.
            self.counters.stray_syn_acks += 1;
            flow.state = State::Attempt(attempt);
            return Action::Drop;
        }
        if tcp.seq() != handover.irs {
            if !from_redirect_port {
                self.fail(now, flow, &attempt, Failure::Answer);
                return Action::Drop;
            }
            // C4: another server answered a repeated SYN; its half-open connection need not wait for a time-out.
            self.counters.stray_syn_acks += 1;
            let loser = self.option(&tcp).and_then(|option| option.port);
            if let Some(port) = loser.filter(|port| *port != handover.service_port) {
                self.reset(Towards::Network, &flow.key, port, tcp.ack());
            }
            flow.state = State::Attempt(attempt);
            return Action::Drop;
        }
        if !from_redirect_port {
            // A server that waits for data before it accepts (TCP_DEFER_ACCEPT) is half-open, too, and has lost nothing.
            let spoken = handover.snd_nxt.after(attempt.iss + 1);
            handover.ack_lost |= spoken;
            handover.half_open |= !spoken;
            // It is there: no silence, however long it waits.
            handover.give_up = now + self.config.handover_timeout;
        }
        if let Some(kept) = handover.kept.clone() {
            self.transmit(Towards::Network, kept);
        }
        if from_redirect_port {
            self.on_handover_trouble(now, flow, attempt);
        } else {
            flow.state = State::Attempt(attempt);
        }
        Action::Drop
    }

    /// Segments from Y.
    pub(super) fn on_handover_service(
        &mut self,
        now: Instant,
        flow: &mut Flow,
        mut attempt: Box<Attempt>,
        packet: &mut Packet,
    ) -> Action {
        let Some(tcp) = packet.tcp() else { return Action::Drop };
        if tcp.is_syn_ack() {
            return self.on_handover_syn_ack(now, flow, attempt, packet, false);
        }
        let iss = attempt.iss;
        let Phase::HandingOver(handover) = &mut attempt.phase else { return Action::Drop };
        let acknowledges = tcp.flags().contains(TcpFlags::ACK);
        if tcp.flags().contains(TcpFlags::RST) {
            self.counters.dropped_resets += 1;
            // A reset with ACK = ISS+1 answers a SYN: the probe found nobody. Without, it answers our ACK.
            let to_probe = acknowledges && tcp.ack() == iss + 1 && handover.last_probe.is_some();
            if to_probe {
                self.fail(now, flow, &attempt, Failure::Answer);
            } else {
                self.on_handover_trouble(now, flow, attempt);
            }
            return Action::Drop;
        }
        let acceptable = acknowledges && tcp.ack().after(iss) && tcp.ack().at_or_before(handover.snd_nxt);
        if !acceptable {
            self.fail(now, flow, &attempt, Failure::Answer);
            return Action::Drop;
        }
        let Some(kept) = handover.kept.clone() else {
            // Nothing was handed over yet: it cannot follow the handover ACK.
            self.counters.unexpected += 1;
            flow.state = State::Attempt(attempt);
            return Action::Drop;
        };
        let answers_probe = handover.last_probe.is_some() && tcp.sequence_len() == 0 && tcp.ack() == iss + 1;
        let (service_port, irs) = (handover.service_port, handover.irs);
        // It was half-open until the kept ACK came, and did not wait for data: it speaks without any.
        let spoke_first = tcp.sequence_len() > 0 && handover.snd_nxt == iss + 1;
        let lost = handover.ack_lost || handover.half_open && spoke_first;
        self.paths.on_handover_completed(attempt.path, lost, now + self.config.translated_memory);
        self.counters.handovers_completed += 1;
        let mut track = handover.track;
        if let Some((track, tcp)) = track.as_mut().zip(packet.tcp()) {
            track.on_remote(&tcp);
        }
        self.set_live(flow, track, attempt.origin);
        self.redirected(flow, service_port, irs, true);
        self.settle(flow);
        if answers_probe {
            self.transmit(Towards::Network, kept);
            return Action::Drop;
        }
        packet.set_source_port(flow.key.vip.port());
        Action::Pass
    }

    /// A repeated SYN-ACK from X, a reset or an ICMP error from Y: the first probe goes at once, the others by the timer.
    pub(super) fn on_handover_trouble(&mut self, now: Instant, flow: &mut Flow, mut attempt: Box<Attempt>) {
        if let Phase::HandingOver(handover) = &mut attempt.phase
            && handover.kept.is_some()
            && handover.last_probe.is_none()
        {
            self.probe(now, flow, &mut attempt);
        }
        flow.state = State::Attempt(attempt);
    }

    pub(super) fn on_handover_timer(&mut self, now: Instant, flow: &mut Flow, mut attempt: Box<Attempt>) {
        let Phase::HandingOver(handover) = &attempt.phase else { return };
        if now >= handover.give_up {
            self.fail(now, flow, &attempt, Failure::Silence);
            return;
        }
        if handover.kept.is_some() {
            self.probe(now, flow, &mut attempt);
        } else {
            // The local TCP has not acknowledged yet; there is nothing to probe for.
            flow.timer = Some(handover.give_up.min(now + handover.interval));
        }
        flow.state = State::Attempt(attempt);
    }

    /// The latest SYN to Y, repeated at doubled intervals.
    fn probe(&mut self, now: Instant, flow: &mut Flow, attempt: &mut Attempt) {
        let Phase::HandingOver(handover) = &mut attempt.phase else { return };
        let (port, wait) = (handover.service_port, handover.interval);
        handover.last_probe = Some(now);
        handover.interval = wait.saturating_mul(2).min(Duration::from_secs(8));
        flow.timer = Some(handover.give_up.min(now + wait));
        self.counters.probes += 1;
        let syn = self.service_syn(&flow.key, attempt, port);
        self.transmit(Towards::Network, syn);
    }

    /// Resets both ends and remembers the path.
    fn fail(&mut self, now: Instant, flow: &mut Flow, attempt: &Attempt, failure: Failure) {
        let Phase::HandingOver(handover) = &attempt.phase else { return };
        let (port, key) = (handover.service_port, flow.key);
        self.reset(Towards::Local, &key, key.vip.port(), handover.irs + 1);
        self.reset(Towards::Network, &key, port, handover.snd_nxt);
        let translated_until = now + self.config.translated_memory;
        match failure {
            Failure::Answer => self.paths.on_translated(attempt.path, translated_until),
            Failure::Silence => {
                self.paths.on_silent_handover(attempt.path, translated_until, now + self.config.plain_memory);
            }
        }
        self.counters.handovers_failed += 1;
        self.event(ClientEvent::HandoverFailed { local: key.local, vip: key.vip, service_port: port });
        flow.state = State::Gone;
    }
}

/// What handover segments say: R C P=X.
fn handover_option(key: &FlowKey) -> RedirectOption {
    RedirectOption { redirect: true, confirm: true, port: Some(key.vip.port()), ..Default::default() }
}

/// The pure ACK of the SYN-ACK, where the local TCP sent data or FIN first: SYN cookies are checked against SEQ = ISS+1.
fn made_up_ack(key: &FlowKey, handover: &Handover, iss: SeqNumber, tcp: &TcpView<'_>) -> Packet {
    let mut options = [1u8; 12];
    let used = match tcp.timestamps() {
        Some((value, echo)) => {
            options[2..4].copy_from_slice(&[8, 10]);
            options[4..8].copy_from_slice(&value.to_be_bytes());
            options[8..12].copy_from_slice(&echo.to_be_bytes());
            options.len()
        }
        None => 0,
    };
    let bare = Segment::bare(key.local, key.service(handover.service_port), TcpFlags::ACK);
    Segment { seq: iss + 1, ack: handover.irs + 1, window: tcp.window(), options: &options[..used], ..bare }
        .emit()
}
