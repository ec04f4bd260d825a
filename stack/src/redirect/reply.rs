//! Replies that a TCP of ours owes and a small TCP does not give: challenge ACKs (`S7`) and resets (`S8`), limited in
//! their rate.

use std::net::{IpAddr, SocketAddr};

use crate::time::Instant;
use crate::wire::{Packet, Segment, SeqNumber, TcpFlags};

const SECOND: u64 = 1_000_000;

/// At most so many in a second; all of a second's at once at most.
#[derive(Debug, Clone, Copy)]
pub struct Limiter {
    /// Microseconds of credit a reply costs.
    cost: u64,
    credit: u64,
    last: Instant,
}

impl Limiter {
    /// At most `per_second` in a second; 0 means none at all.
    pub fn new(per_second: u32) -> Self {
        let cost = SECOND.checked_div(u64::from(per_second)).unwrap_or(u64::MAX).max(1);
        Limiter { cost, credit: SECOND, last: Instant::ZERO }
    }

    /// Takes one reply's worth; says whether there was any.
    pub fn take(&mut self, now: Instant) -> bool {
        let earned = u64::try_from(now.since(self.last).as_micros()).unwrap_or(SECOND);
        self.credit = self.credit.saturating_add(earned).min(SECOND);
        self.last = now;
        let enough = self.credit >= self.cost;
        if enough {
            self.credit -= self.cost;
        }
        enough
    }
}

/// Whether a packet's source can be a client: answers to others are not sent.
pub fn can_answer(source: IpAddr) -> bool {
    let broadcast = matches!(source, IpAddr::V4(v4) if v4.is_broadcast());
    !(source.is_unspecified() || source.is_multicast() || broadcast)
}

/// Where an answer to `segment` goes from and to; `None` if it must not be answered.
fn ends(segment: &Packet) -> Option<(SocketAddr, SocketAddr)> {
    let fit = segment.fragment().is_none() && segment.checksum_ok() && can_answer(segment.source());
    if fit { segment.destination_socket().zip(segment.source_socket()) } else { None }
}

/// An ACK that tells the peer where the connection stands (RFC 5961 §4).
pub(crate) fn challenge_ack(
    segment: &Packet,
    snd_nxt: SeqNumber,
    rcv_nxt: SeqNumber,
    window: u16,
    timestamps: Option<(u32, u32)>,
) -> Option<Packet> {
    let tcp = segment.tcp()?;
    let (source, destination) = ends(segment)?;
    if tcp.flags().contains(TcpFlags::RST) {
        return None;
    }
    let mut options = [1, 1, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0];
    if let Some((value, echo)) = timestamps {
        options[4..8].copy_from_slice(&value.to_be_bytes());
        options[8..].copy_from_slice(&echo.to_be_bytes());
    }
    let options: &[u8] = if timestamps.is_some() { &options } else { &[] };
    let flags = TcpFlags::ACK;
    Some(
        Segment { source, destination, seq: snd_nxt, ack: rcv_nxt, flags, window, options, payload: &[] }
            .emit(),
    )
}

/// The reset of RFC 9293 §3.10.7.1 to a segment that belongs to no connection.
pub(crate) fn reset(segment: &Packet) -> Option<Packet> {
    let tcp = segment.tcp()?;
    let (source, destination) = ends(segment)?;
    if tcp.flags().contains(TcpFlags::RST) {
        return None;
    }
    let reset = Segment::bare(source, destination, TcpFlags::RST);
    let reset = if tcp.flags().contains(TcpFlags::ACK) {
        Segment { seq: tcp.ack(), ..reset }
    } else {
        Segment { ack: tcp.seq() + tcp.sequence_len(), flags: TcpFlags::RST | TcpFlags::ACK, ..reset }
    };
    Some(reset.emit())
}
