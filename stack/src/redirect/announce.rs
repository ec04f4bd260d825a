//! Telling the other end something until it is known to have heard: on segments that pass and have room, else on
//! duplicate pure ACKs (rules `M1`, `P1`, `W2`, `W3`).

use std::net::SocketAddr;
use std::time::Duration;

use super::numbers::{ConnectionNumbers, Timestamps};
use crate::time::Instant;
use crate::wire::{Packet, RedirectOption, SeqNumber, TcpFlags};

/// Duplicate ACKs in a row at the most: the third would make the peer retransmit (RFC 5681 §3.2).
const DUPLICATE_ACKS: u8 = 2;
/// Between the duplicate ACKs of a row, and after a segment of the local TCP that said it.
const REPEAT: Duration = Duration::from_millis(100);
/// Between two rows.
const PAUSE: Duration = Duration::from_secs(1);

/// Something that is being said.
#[derive(Debug, Clone)]
pub(crate) struct Announcement {
    option: RedirectOption,
    /// Where the local TCP stands, as far as it is known: without, nothing is made up.
    known: Option<ConnectionNumbers>,
    /// Duplicate ACKs in a row, ours and the local TCP's own, since it last said anything new.
    row: u8,
    next: Instant,
}

impl Announcement {
    pub(crate) fn new(now: Instant, option: RedirectOption, known: Option<ConnectionNumbers>) -> Self {
        Announcement { option, known, row: 0, next: now }
    }

    /// Says this token from now on (`T2`).
    pub(crate) fn set_token(&mut self, token: Option<[u8; 8]>) {
        self.option.token = token;
    }

    /// SND.NXT and RCV.NXT of the local TCP.
    pub(crate) fn stands(&self) -> Option<(SeqNumber, SeqNumber)> {
        self.known.map(|known| (known.snd_nxt, known.rcv_nxt))
    }

    /// A segment of the local TCP: says it there if it can; whether it did.
    pub(crate) fn on_local(&mut self, now: Instant, packet: &mut Packet, exid: u16, mtu: usize) -> bool {
        let Some(tcp) = packet.tcp() else { return false };
        if tcp.flags().intersects(TcpFlags::SYN | TcpFlags::RST) || !tcp.flags().contains(TcpFlags::ACK) {
            return false;
        }
        let end = tcp.seq() + tcp.sequence_len();
        // What RFC 5681 §2 counts as one, and what may be one to a peer that has heard more than is known here.
        let duplicate = tcp.sequence_len() == 0
            && self.known.is_none_or(|known| known.rcv_nxt == tcp.ack() && known.window == tcp.window());
        let timestamps = tcp.timestamps().map(|(sent, recent)| Timestamps { recent, echoed: recent, sent });
        self.known = Some(ConnectionNumbers {
            snd_una: self.known.map_or(tcp.seq(), |known| known.snd_una),
            snd_nxt: self.known.map_or(end, |known| known.snd_nxt.max(end)),
            max_window: self.known.map_or(0, |known| known.max_window),
            rcv_nxt: tcp.ack(),
            window: tcp.window(),
            timestamps,
        });
        if duplicate {
            self.count(now);
        } else {
            self.row = 0;
        }
        // A second copy would make the receiver ignore both (W1).
        let fits = tcp.redirect(exid) == Ok(None);
        // The whole of it, token included, or it waits for a segment with more room.
        let said = fits && packet.insert_redirect(exid, &self.option, mtu).is_ok();
        if said && !duplicate {
            self.next = now + REPEAT;
        }
        said
    }

    /// One more duplicate ACK.
    fn count(&mut self, now: Instant) {
        self.row += 1;
        let ends = self.row >= DUPLICATE_ACKS;
        self.next = now + if ends { PAUSE } else { REPEAT };
        self.row %= DUPLICATE_ACKS;
    }

    /// The duplicate ACK that is due, if one is and something is known to duplicate.
    pub(crate) fn poll(
        &mut self,
        now: Instant,
        (source, destination): (SocketAddr, SocketAddr),
        exid: u16,
        mtu: usize,
    ) -> Option<Packet> {
        if now < self.next {
            return None;
        }
        self.count(now);
        let mut packet = self.known?.duplicate_ack(source, destination);
        packet.insert_redirect_fitting(exid, &self.option, true, mtu).is_ok().then_some(packet)
    }

    /// Has it said again at once: the peer has asked.
    pub(crate) fn hasten(&mut self, now: Instant) {
        self.next = now;
    }

    pub(crate) fn deadline(&self) -> Instant {
        self.next
    }
}
