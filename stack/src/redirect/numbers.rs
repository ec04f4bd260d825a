//! Where a TCP stands in its sequence spaces, and which segments are too exact to be a stranger's (PROTOCOL.md §4).

use std::net::SocketAddr;

use crate::wire::{Packet, Segment, SeqNumber, TcpFlags, TcpOption, TcpView};

/// What one end's TCP has sent and received of a connection (RFC 9293 §3.3.1): told by the driver where it owns the
/// TCP, else followed from the segments that pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionNumbers {
    /// SND.UNA.
    pub snd_una: SeqNumber,
    /// SND.NXT.
    pub snd_nxt: SeqNumber,
    /// MAX.SND.WND (RFC 5961 §5.2): the largest window that the peer has offered, bytes.
    pub max_window: u32,
    /// RCV.NXT.
    pub rcv_nxt: SeqNumber,
    /// SEG.WND as sent last, not scaled.
    pub window: u16,
    /// Timestamps (RFC 7323), where the connection uses them.
    pub timestamps: Option<Timestamps>,
}

/// The timestamps of a connection, as one end knows them (RFC 7323).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timestamps {
    /// TS.Recent: what is echoed.
    pub recent: u32,
    /// The latest `TSecr` of the peer: it echoes nothing older.
    pub echoed: u32,
    /// The latest `TSval` of our own.
    pub sent: u32,
}

/// Gives the numbers of the connection (local, peer) as the local TCP knows it; `None` where the driver does not know
/// them.
pub type NumbersOf<'a> = &'a dyn Fn(SocketAddr, SocketAddr) -> Option<ConnectionNumbers>;

/// For drivers that know nobody's numbers.
pub(crate) fn unknown(_: SocketAddr, _: SocketAddr) -> Option<ConnectionNumbers> {
    None
}

/// `a <= b` modulo 2^32.
fn at_or_before(a: u32, b: u32) -> bool {
    b.wrapping_sub(a).cast_signed() >= 0
}

impl ConnectionNumbers {
    /// Whether a request on this segment is obeyed (`M3`): SEG.SEQ = RCV.NXT, SND.UNA - MAX.SND.WND <= SEG.ACK <= SND.NXT
    /// (RFC 5961 §5.2), and where the connection uses timestamps a `TSval` that PAWS takes and a `TSecr` that is
    /// neither older than the last nor from the future.
    pub fn exact(&self, tcp: &TcpView<'_>) -> bool {
        let oldest = self.snd_una - self.max_window;
        let timestamps = match (self.timestamps, tcp.timestamps()) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(known), Some((value, echo))) => {
                at_or_before(known.recent, value)
                    && at_or_before(known.echoed, echo)
                    && at_or_before(echo, known.sent)
            }
        };
        tcp.flags().contains(TcpFlags::ACK)
            && !tcp.flags().intersects(TcpFlags::SYN | TcpFlags::RST)
            && tcp.seq() == self.rcv_nxt
            && oldest.at_or_before(tcp.ack())
            && tcp.ack().at_or_before(self.snd_nxt)
            && timestamps
    }

    /// The pure ACK that repeats what was said last: a duplicate, from `source` to `destination`.
    pub(crate) fn duplicate_ack(&self, source: SocketAddr, destination: SocketAddr) -> Packet {
        let mut options = [1, 1, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0];
        let used = match self.timestamps {
            Some(times) => {
                options[4..8].copy_from_slice(&times.sent.to_be_bytes());
                options[8..].copy_from_slice(&times.recent.to_be_bytes());
                options.len()
            }
            None => 0,
        };
        let bare = Segment::bare(source, destination, TcpFlags::ACK);
        let (seq, ack, window) = (self.snd_nxt, self.rcv_nxt, self.window);
        Segment { seq, ack, window, options: &options[..used], ..bare }.emit()
    }
}

/// The window scale that a SYN offers (RFC 7323 §2.3: no more than 14).
pub(crate) fn window_scale(tcp: &TcpView<'_>) -> Option<u8> {
    tcp.options().flatten().find_map(|option| match option {
        TcpOption::WindowScale(scale) => Some(scale.min(14)),
        _ => None,
    })
}

/// The numbers of a TCP that belongs to somebody else, from what passes. An end that cannot be seen to send lags behind
/// and refuses more than it should, never less.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Track {
    numbers: ConnectionNumbers,
    /// The scales of our window and the peer's.
    scales: (u8, u8),
    /// Segments have passed elsewhere since these numbers were seen.
    lost: bool,
}

impl Track {
    /// From the SYN of ours and its SYN-ACK.
    pub(crate) fn new(syn: &TcpView<'_>, syn_ack: &TcpView<'_>) -> Track {
        let scales = window_scale(syn).zip(window_scale(syn_ack)).unwrap_or_default();
        let timestamps = syn.timestamps().zip(syn_ack.timestamps()).map(|((sent, _), (recent, _))| {
            // A repeated SYN may have had a later one than the SYN that was answered.
            Timestamps { recent, echoed: syn_ack.timestamps().map_or(sent, |(_, echo)| echo), sent }
        });
        let iss = syn.seq();
        let numbers = ConnectionNumbers {
            snd_una: iss + 1,
            snd_nxt: iss + 1,
            max_window: u32::from(syn_ack.window()),
            rcv_nxt: syn_ack.seq() + 1,
            window: syn.window(),
            timestamps,
        };
        Track { numbers, scales, lost: false }
    }

    #[cfg(test)]
    fn numbers(&self) -> ConnectionNumbers {
        self.numbers
    }

    /// The numbers, unless they are [lost](Self::lose).
    pub(crate) fn known(&self) -> Option<ConnectionNumbers> {
        (!self.lost).then_some(self.numbers)
    }

    /// Segments pass elsewhere from now on: nothing is known until the local TCP is seen to speak again.
    pub(crate) fn lose(&mut self) {
        self.lost = true;
    }

    /// Begins again with a segment of the local TCP. What it does not tell is taken so that too much is refused rather
    /// than too little: SND.UNA is its SEQ, and the peer must echo its `TSval` first.
    fn find(&mut self, tcp: &TcpView<'_>) {
        let numbers = &mut self.numbers;
        if !tcp.flags().contains(TcpFlags::ACK) || numbers.timestamps.is_some() && tcp.timestamps().is_none()
        {
            return;
        }
        (numbers.snd_una, numbers.snd_nxt) = (tcp.seq(), tcp.seq() + tcp.sequence_len());
        (numbers.rcv_nxt, numbers.window) = (tcp.ack(), tcp.window());
        if let (Some(known), Some((value, echo))) = (&mut numbers.timestamps, tcp.timestamps()) {
            *known = Timestamps { recent: echo, echoed: value, sent: value };
        }
        self.lost = false;
    }

    /// A segment of the local TCP: it is believed.
    pub(crate) fn on_local(&mut self, tcp: &TcpView<'_>) {
        let flags = tcp.flags();
        if flags.intersects(TcpFlags::RST | TcpFlags::SYN) {
            return;
        }
        if self.lost {
            self.find(tcp);
            return;
        }
        let numbers = &mut self.numbers;
        numbers.snd_nxt = numbers.snd_nxt.max(tcp.seq() + tcp.sequence_len());
        if flags.contains(TcpFlags::ACK) && !tcp.ack().before(numbers.rcv_nxt) {
            numbers.rcv_nxt = tcp.ack();
            numbers.window = tcp.window();
        }
        if let (Some(known), Some((value, _))) = (&mut numbers.timestamps, tcp.timestamps())
            && at_or_before(known.sent, value)
        {
            known.sent = value;
        }
    }

    /// A segment of the network: only one that lies in our window and acknowledges what was sent counts.
    pub(crate) fn on_remote(&mut self, tcp: &TcpView<'_>) {
        let (flags, numbers) = (tcp.flags(), &mut self.numbers);
        let window = u32::from(numbers.window) << self.scales.0;
        let near = tcp.seq().distance(numbers.rcv_nxt).unsigned_abs() <= window;
        let acceptable = flags.contains(TcpFlags::ACK)
            && !flags.intersects(TcpFlags::RST | TcpFlags::SYN)
            && !tcp.ack().before(numbers.snd_una)
            && tcp.ack().at_or_before(numbers.snd_nxt);
        if self.lost || !near || !acceptable {
            return;
        }
        numbers.snd_una = tcp.ack();
        numbers.max_window = numbers.max_window.max(u32::from(tcp.window()) << self.scales.1);
        if let (Some(known), Some((value, echo))) = (&mut numbers.timestamps, tcp.timestamps()) {
            // RFC 7323 §4.3: TS.Recent is of a segment that reaches RCV.NXT or lies before it.
            if at_or_before(known.recent, value) && tcp.seq().at_or_before(numbers.rcv_nxt) {
                known.recent = value;
            }
            if at_or_before(known.echoed, echo) && at_or_before(echo, known.sent) {
                known.echoed = echo;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(seq: u32, ack: u32, flags: TcpFlags, options: &[u8]) -> Packet {
        let (a, b) = ("192.0.2.1:1".parse().unwrap(), "192.0.2.2:2".parse().unwrap());
        let bare = Segment::bare(a, b, flags);
        Segment { seq: SeqNumber(seq), ack: SeqNumber(ack), options, window: 100, ..bare }.emit()
    }

    fn times(value: u32, echo: u32) -> Vec<u8> {
        [&[1, 1, 8, 10][..], &value.to_be_bytes(), &echo.to_be_bytes()].concat()
    }

    const NUMBERS: ConnectionNumbers = ConnectionNumbers {
        snd_una: SeqNumber(100),
        snd_nxt: SeqNumber(150),
        max_window: 200,
        rcv_nxt: SeqNumber(7),
        window: 100,
        timestamps: Some(Timestamps { recent: 40, echoed: 20, sent: 30 }),
    };

    #[test]
    fn only_an_exact_sequence_number_an_acceptable_ack_and_valid_timestamps_are_obeyed() {
        let ack = TcpFlags::ACK;
        let exact = |numbers: &ConnectionNumbers, packet: Packet| numbers.exact(&packet.tcp().unwrap());
        assert!(exact(&NUMBERS, segment(7, 150, ack, &times(40, 30))));
        assert!(exact(&NUMBERS, segment(7, 100u32.wrapping_sub(200), ack, &times(41, 20))));
        for (seq, acked, flags, value, echo) in [
            (6, 150, ack, 40, 30),
            (8, 150, ack, 40, 30),
            (7, 151, ack, 40, 30),
            (7, 100u32.wrapping_sub(201), ack, 40, 30),
            (7, 150, TcpFlags::default(), 40, 30),
            (7, 150, ack | TcpFlags::SYN, 40, 30),
            (7, 150, ack | TcpFlags::RST, 40, 30),
            (7, 150, ack, 39, 30),
            (7, 150, ack, 40, 31),
            (7, 150, ack, 40, 19),
        ] {
            assert!(!exact(&NUMBERS, segment(seq, acked, flags, &times(value, echo))), "{seq} {acked}");
        }
        assert!(!exact(&NUMBERS, segment(7, 150, ack, &[])));
        let without = ConnectionNumbers { timestamps: None, ..NUMBERS };
        assert!(exact(&without, segment(7, 150, ack, &[])));
    }

    #[test]
    fn what_passes_is_followed_and_what_a_stranger_sends_is_not() {
        let syn = segment(99, 0, TcpFlags::SYN, &[&times(10, 0)[..], &[1, 3, 3, 2]].concat());
        let syn_ack =
            segment(6, 100, TcpFlags::SYN | TcpFlags::ACK, &[&times(50, 10)[..], &[1, 3, 3, 4]].concat());
        let mut track = Track::new(&syn.tcp().unwrap(), &syn_ack.tcp().unwrap());
        let local = |track: &mut Track, packet: Packet| track.on_local(&packet.tcp().unwrap());
        let remote = |track: &mut Track, packet: Packet| track.on_remote(&packet.tcp().unwrap());
        local(&mut track, segment(100, 7, TcpFlags::ACK | TcpFlags::FIN, &times(12, 50)));
        let sent = track.numbers();
        assert_eq!((sent.snd_nxt, sent.rcv_nxt, sent.max_window), (SeqNumber(101), SeqNumber(7), 100));
        for (seq, ack) in [(7 + 401, 101), (7, 102), (7, 99)] {
            remote(&mut track, segment(seq, ack, TcpFlags::ACK, &times(60, 12)));
            assert_eq!(track.numbers(), sent);
        }
        remote(&mut track, segment(7, 101, TcpFlags::ACK, &times(60, 12)));
        let seen = track.numbers();
        assert_eq!((seen.snd_una, seen.max_window), (SeqNumber(101), 1600));
        assert_eq!(seen.timestamps, Some(Timestamps { recent: 60, echoed: 12, sent: 12 }));
    }
    #[test]
    fn numbers_that_were_lost_are_found_where_the_local_tcp_speaks_again() {
        let syn = segment(99, 0, TcpFlags::SYN, &times(10, 0));
        let syn_ack = segment(6, 100, TcpFlags::SYN | TcpFlags::ACK, &times(50, 10));
        let mut track = Track::new(&syn.tcp().unwrap(), &syn_ack.tcp().unwrap());
        track.lose();
        assert_eq!(track.known(), None);
        // More than half of the sequence space has passed elsewhere.
        let far = 100 + (3 << 30);
        track.on_remote(&segment(9_000, far, TcpFlags::ACK, &times(60, 12)).tcp().unwrap());
        track.on_local(&segment(far, 9_000, TcpFlags::ACK, &[]).tcp().unwrap());
        assert_eq!(track.known(), None, "a segment without timestamps is none of this connection's");
        track.on_local(&segment(far, 9_000, TcpFlags::ACK | TcpFlags::FIN, &times(70, 60)).tcp().unwrap());
        let known = track.known().unwrap();
        assert_eq!((known.snd_una, known.snd_nxt), (SeqNumber(far), SeqNumber(far + 1)));
        let exact = |seq, ack, value, echo| {
            known.exact(&segment(seq, ack, TcpFlags::ACK, &times(value, echo)).tcp().unwrap())
        };
        assert!(exact(9_000, far + 1, 60, 70));
        assert!(!exact(9_000, far + 1, 60, 69), "it may be older than what was said last");
        assert!(
            !exact(9_001, far + 1, 60, 70) && !exact(9_000, far + 2, 60, 70) && !exact(9_000, far, 59, 70)
        );
    }
}
