//! What a segment says against what passed before it: for captures of a link, where no end's own view is known.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use shunt_stack::wire::{Packet, TcpFlags};

/// Connections remembered, the oldest out.
const MAX_TRACKED: usize = 65_536;

/// Something against a rule, or what a client makes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sequence {
    /// `C2`: R was not confirmed.
    Unconfirmed,
    /// `C5`: the service port's SYN-ACK does not carry C.
    UnconfirmedService,
    /// `C7`: the client goes on at X although it was redirected.
    BackToX {
        /// The redirect port.
        asked: u16,
        /// The service port.
        service: u16,
    },
}

impl fmt::Display for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Sequence::Unconfirmed => write!(f, "C2: R is not confirmed: the client asks plainly"),
            Sequence::UnconfirmedService => {
                write!(f, "C5: the service port does not say C: the client resets")
            }
            Sequence::BackToX { asked, service } => {
                write!(f, "C7: goes to {asked} although it was redirected to {service}")
            }
        }
    }
}

/// The client, and the address that it talks to.
type Key = (SocketAddr, IpAddr);

#[derive(Debug, Clone, Copy, Default)]
struct State {
    /// The port of the latest SYN, and whether it had R.
    latest: (u16, bool),
    /// X and Y, once the client has gone there.
    moved: Option<(u16, u16)>,
}

/// The connections of a capture.
#[derive(Debug, Default)]
pub(crate) struct Tracker {
    states: HashMap<Key, State>,
    order: VecDeque<Key>,
    /// Connections forgotten to make room.
    pub(crate) forgotten: u64,
}

impl Tracker {
    /// Takes the next packet of the link.
    pub(crate) fn packet(&mut self, packet: &Packet, exid: u16) -> Option<Sequence> {
        let (tcp, from, to) = (packet.tcp()?, packet.source_socket()?, packet.destination_socket()?);
        let option = tcp.redirect(exid).ok().flatten();
        if tcp.is_syn() {
            let asks = option.filter(|option| option.redirect);
            // R P=X without C goes on at Y; all other SYNs begin anew.
            let asked = asks.filter(|option| !option.confirm).and_then(|option| option.port);
            let moved = asked.map(|asked| (asked, to.port()));
            self.insert((from, to.ip()), State { latest: (to.port(), asks.is_some()), moved });
            return None;
        }
        if tcp.is_syn_ack() {
            let state = self.states.get(&(to, from.ip()))?;
            let confirmed = option.is_some_and(|option| option.confirm && !option.redirect);
            if state.latest != (from.port(), true) || confirmed {
                return None;
            }
            let service = state.moved.is_some();
            return Some(if service { Sequence::UnconfirmedService } else { Sequence::Unconfirmed });
        }
        let state = self.states.get_mut(&(from, to.ip()))?;
        if let Some(asked) = option.filter(|option| option.redirect && option.confirm).and_then(|it| it.port)
        {
            state.moved = Some((asked, to.port()));
        }
        let (asked, service) = state.moved?;
        let back = to.port() == asked && asked != service && !tcp.flags().contains(TcpFlags::RST);
        back.then_some(Sequence::BackToX { asked, service })
    }

    fn insert(&mut self, key: Key, state: State) {
        if self.states.insert(key, state).is_some() {
            return;
        }
        self.order.push_back(key);
        if self.order.len() > MAX_TRACKED
            && let Some(oldest) = self.order.pop_front()
        {
            self.states.remove(&oldest);
            self.forgotten += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use shunt_stack::wire::{DEFAULT_EXID, RedirectOption, Segment};

    use super::*;

    const X: u16 = 443;
    const Y: u16 = 41_001;
    const SYN_ACK: TcpFlags = TcpFlags(0x12);

    /// The option with R, C and P.
    type Says = (bool, bool, Option<u16>);

    fn says(
        tracker: &mut Tracker,
        up: bool,
        port: u16,
        flags: TcpFlags,
        option: Option<Says>,
    ) -> Option<Sequence> {
        let client: SocketAddr = "10.1.0.2:50000".parse().unwrap();
        let vip = SocketAddr::new("203.0.113.10".parse().unwrap(), port);
        let (from, to) = if up { (client, vip) } else { (vip, client) };
        let mut packet = Segment::bare(from, to, flags).emit();
        if let Some((redirect, confirm, port)) = option {
            let option = RedirectOption { redirect, confirm, port, ..RedirectOption::default() };
            packet.insert_redirect(DEFAULT_EXID, &option, 1500).unwrap();
        }
        tracker.packet(&packet, DEFAULT_EXID)
    }

    #[test]
    fn what_the_protocol_does_is_no_violation_and_going_back_is() {
        let mut tracker = Tracker::default();
        let mut on = |up, port, flags, option| says(&mut tracker, up, port, flags, option);
        assert_eq!(on(true, X, TcpFlags::SYN, Some((true, true, None))), None);
        assert_eq!(on(false, X, SYN_ACK, Some((false, true, Some(Y)))), None);
        assert_eq!(on(true, Y, TcpFlags::SYN, Some((true, false, Some(X)))), None);
        assert_eq!(on(false, Y, SYN_ACK, Some((false, true, None))), None);
        assert_eq!(on(true, Y, TcpFlags::ACK, None), None);
        assert_eq!(on(true, X, TcpFlags::RST, None), None);
        let back = Some(Sequence::BackToX { asked: X, service: Y });
        assert_eq!(on(true, X, TcpFlags::ACK, None), back);
        // C6: a plain SYN to X begins anew.
        assert_eq!(on(true, X, TcpFlags::SYN, None), None);
        assert_eq!(on(false, X, SYN_ACK, None), None);
        assert_eq!(on(true, X, TcpFlags::ACK, None), None);
        // A handover.
        assert_eq!(on(true, X, TcpFlags::SYN, Some((true, false, None))), None);
        assert_eq!(on(false, X, SYN_ACK, Some((false, true, Some(Y)))), None);
        assert_eq!(on(true, Y, TcpFlags::ACK, Some((true, true, Some(X)))), None);
        assert_eq!(on(true, X, TcpFlags::ACK, None), back);
    }

    #[test]
    fn a_syn_ack_without_c_is_pointed_at() {
        let mut tracker = Tracker::default();
        let mut on = |up, port, flags, option| says(&mut tracker, up, port, flags, option);
        on(true, X, TcpFlags::SYN, Some((true, true, None)));
        assert_eq!(on(false, X, SYN_ACK, None), Some(Sequence::Unconfirmed));
        assert_eq!(on(false, X, SYN_ACK, Some((true, true, None))), Some(Sequence::Unconfirmed));
        on(true, Y, TcpFlags::SYN, Some((true, false, Some(X))));
        assert_eq!(on(false, Y, SYN_ACK, None), Some(Sequence::UnconfirmedService));
        // Of another port than the latest SYN's: late, and no answer to it.
        assert_eq!(on(false, X, SYN_ACK, None), None);
    }

    #[test]
    fn the_oldest_connections_make_room() {
        let mut tracker = Tracker::default();
        for number in 0..MAX_TRACKED as u32 + 10 {
            let client = SocketAddr::new(std::net::Ipv4Addr::from(0x0a00_0000 + number).into(), 1000);
            tracker.insert((client, "203.0.113.10".parse().unwrap()), State::default());
        }
        assert_eq!(
            (tracker.states.len(), tracker.order.len(), tracker.forgotten),
            (MAX_TRACKED, MAX_TRACKED, 10)
        );
    }
}
