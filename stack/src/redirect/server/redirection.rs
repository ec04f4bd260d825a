//! §4: asking the client of an established connection to go on at another port, until it closes or is given up (O7, O8,
//! O11).

use std::net::SocketAddr;

use super::config::{RedirectError, RedirectOutcome, ServerEvent, Silence};
use super::half_open::Key;
use super::{Port, Server, Towards};
use crate::redirect::announce::Announcement;
use crate::redirect::numbers::ConnectionNumbers;
use crate::redirect::token::Purpose;
use crate::time::Instant;
use crate::wire::{Packet, RedirectOption, Segment, SeqNumber, TcpFlags};

/// A redirect under way.
#[derive(Debug, Clone)]
pub(super) struct Redirection {
    to: u16,
    /// What the token that goes with it is for (§10).
    purpose: Option<Purpose>,
    announcement: Announcement,
    /// When R is said no more.
    give_up: Instant,
    /// When the client is reset, where it is to be.
    reset: Option<Instant>,
    /// The client's FIN: the sequence number behind it, and whether it carried C P=Z.
    fin: Option<(SeqNumber, bool)>,
}

impl Redirection {
    /// What is due next, `now` or later.
    fn deadline(&self, now: Instant) -> Instant {
        match self.reset {
            Some(reset) if now >= self.give_up => reset,
            _ => self.announcement.deadline().min(self.give_up),
        }
    }
}

impl Server {
    /// Asks the client of the established connection (`client`, `service`) to go on at port `to`, at any time after
    /// the handshake (`M1`, O11): R P=Z on every segment that passes and has room, else on duplicate ACKs, until
    /// [`ServerEvent::Redirection`] says what became of it. `numbers` are the local TCP's, where the driver knows them;
    /// else they are learnt from the segments that pass.
    ///
    /// # Errors
    /// [`RedirectError`]: nothing was begun.
    pub fn redirect_connection(
        &mut self,
        now: Instant,
        client: SocketAddr,
        service: SocketAddr,
        to: SocketAddr,
        numbers: Option<ConnectionNumbers>,
    ) -> Result<(), RedirectError> {
        let key = Key { client, service };
        if !matches!(self.ports.get(&service), Some(Port::Service(_))) {
            return Err(RedirectError::NoServicePort(service));
        }
        if to.port() == 0 || to == service || to.is_ipv4() != service.is_ipv4() {
            return Err(RedirectError::Target(to));
        }
        if self.redirections.contains_key(&key) {
            return Err(RedirectError::UnderWay);
        }
        if self.redirections.len() >= self.redirect_limit {
            return Err(RedirectError::TooMany(self.redirect_limit));
        }
        let option = RedirectOption {
            redirect: true,
            port: Some(to.port()),
            address: (to.ip() != service.ip()).then_some(to.ip()),
            ..RedirectOption::default()
        };
        let reset = match self.on_silence {
            Silence::GiveUp => None,
            Silence::ResetAfter(time) => Some(now + time.max(self.redirect_timeout)),
        };
        let redirection = Redirection {
            to: to.port(),
            purpose: self.purpose_of_move(key, to),
            announcement: Announcement::new(now, option, numbers),
            give_up: now + self.redirect_timeout,
            reset,
            fin: None,
        };
        self.redirections.insert(key, redirection);
        self.counters.redirects += 1;
        self.schedule(now, key);
        Ok(())
    }

    /// The token to be said now: said for long, one made at the beginning would expire.
    fn redirection_token(&self, now: Instant, key: Key) -> Option<[u8; 8]> {
        let purpose = self.redirections.get(&key)?.purpose?;
        self.tokens.token(self.clock.seconds(now), &purpose)
    }

    /// Stops asking; no event follows. False if the connection was not being redirected.
    pub fn cancel_redirect(&mut self, client: SocketAddr, service: SocketAddr) -> bool {
        self.drop_redirection(Key { client, service })
    }

    /// Connections that are being redirected now.
    pub fn redirection_count(&self) -> usize {
        self.redirections.len()
    }

    fn drop_redirection(&mut self, key: Key) -> bool {
        let found = self.redirections.remove(&key).is_some();
        self.unschedule(key);
        found
    }

    pub(super) fn end_redirection(&mut self, key: Key, outcome: RedirectOutcome) {
        let Some(redirection) = self.redirections.remove(&key) else { return };
        self.unschedule(key);
        *match outcome {
            RedirectOutcome::Confirmed => &mut self.counters.redirects_confirmed,
            RedirectOutcome::Closed => &mut self.counters.redirects_closed,
            RedirectOutcome::GivenUp => &mut self.counters.redirects_given_up,
            RedirectOutcome::Reset => &mut self.counters.redirects_reset,
        } += 1;
        let Key { client, service } = key;
        self.report(ServerEvent::Redirection { client, service, to: redirection.to, outcome });
    }

    /// `M2`: a segment of the client: its close, once the local TCP has taken it, ends the redirect.
    pub(super) fn on_redirection_remote(&mut self, key: Key, packet: &Packet) {
        let Some(tcp) = packet.tcp() else { return };
        let flags = tcp.flags();
        if !flags.intersects(TcpFlags::FIN | TcpFlags::RST) {
            return;
        }
        let option = tcp.redirect(self.exid).ok().flatten();
        let Some(redirection) = self.redirections.get_mut(&key) else { return };
        let confirms = option
            .is_some_and(|option| option.confirm && !option.redirect && option.port == Some(redirection.to));
        if flags.contains(TcpFlags::RST) {
            // RFC 5961 §3.2: the local TCP takes no other either.
            let exact = redirection.announcement.stands().is_some_and(|(_, rcv_nxt)| tcp.seq() == rcv_nxt);
            if exact {
                let outcome = if confirms { RedirectOutcome::Confirmed } else { RedirectOutcome::Closed };
                self.end_redirection(key, outcome);
            }
            return;
        }
        let end = tcp.seq() + tcp.sequence_len();
        let before = redirection.fin.is_some_and(|(known, confirmed)| known == end && confirmed);
        redirection.fin = Some((end, before || confirms));
    }

    /// A segment of the local TCP on its way to the client.
    pub(super) fn on_redirection_local(&mut self, now: Instant, key: Key, packet: &mut Packet) {
        let (exid, mtu) = (self.exid, self.mtu);
        let token = self.redirection_token(now, key);
        let Some(redirection) = self.redirections.get_mut(&key) else { return };
        let Some(tcp) = packet.tcp() else { return };
        if tcp.flags().contains(TcpFlags::RST) {
            self.end_redirection(key, RedirectOutcome::Closed);
            return;
        }
        let acknowledged = tcp.ack();
        let closed = redirection.fin.filter(|(end, _)| *end == acknowledged);
        if let Some((_, confirmed)) = closed {
            let outcome = if confirmed { RedirectOutcome::Confirmed } else { RedirectOutcome::Closed };
            self.end_redirection(key, outcome);
            return;
        }
        redirection.announcement.set_token(token);
        let mut unsaid = packet.clone();
        // Numbers are learnt from all, R is on those before the time-out.
        let target = if now < redirection.give_up { packet } else { &mut unsaid };
        if redirection.announcement.on_local(now, target, exid, mtu) {
            self.counters.redirects_said += 1;
            self.schedule(now, key);
        }
    }

    /// A deadline of a redirect.
    pub(super) fn on_redirection_timer(&mut self, now: Instant, key: Key, ends: (SocketAddr, SocketAddr)) {
        let token = self.redirection_token(now, key);
        let Some(redirection) = self.redirections.get_mut(&key) else { return };
        redirection.announcement.set_token(token);
        if redirection.reset.is_some_and(|reset| now >= reset) {
            self.reset_redirected(key, ends);
            return;
        }
        if now >= redirection.give_up {
            if redirection.reset.is_none() {
                self.end_redirection(key, RedirectOutcome::GivenUp);
            } else {
                self.schedule(now, key);
            }
            return;
        }
        let said = redirection.announcement.poll(now, ends, self.exid, self.mtu);
        if let Some(packet) = said {
            self.counters.redirects_said += 1;
            self.transmit(Towards::Network, packet);
        }
        self.schedule(now, key);
    }

    /// `M2`, O8: the client never closed.
    fn reset_redirected(&mut self, key: Key, (source, destination): (SocketAddr, SocketAddr)) {
        let stands = self.redirections.get(&key).and_then(|known| known.announcement.stands());
        if let Some((snd_nxt, rcv_nxt)) = stands {
            let to_client = Segment::bare(source, destination, TcpFlags::RST);
            self.transmit(Towards::Network, Segment { seq: snd_nxt, ..to_client }.emit());
            let to_local = Segment::bare(key.client, key.service, TcpFlags::RST);
            self.transmit(Towards::Local, Segment { seq: rcv_nxt, ..to_local }.emit());
        }
        self.end_redirection(key, RedirectOutcome::Reset);
    }

    /// When a redirect or a rebind of a connection is due.
    pub(super) fn schedule(&mut self, now: Instant, key: Key) {
        self.unschedule(key);
        let redirection = self.redirections.get(&key).map(|redirection| redirection.deadline(now));
        let rebind = self.rebinds.get(&key).and_then(super::rebind::Rebind::deadline);
        if let Some(at) = [redirection, rebind].into_iter().flatten().min() {
            self.timers.insert((at, key));
            self.deadlines.insert(key, at);
        }
    }

    pub(super) fn unschedule(&mut self, key: Key) {
        if let Some(at) = self.deadlines.remove(&key) {
            self.timers.remove(&(at, key));
        }
    }
}
