//! Sequence numbers and windows in which smoltcp 0.14 needs help, put right on the packets below it.
//!
//! It refuses whatever lies outside its receive window, the acknowledgements in it included, so two ends that talk at
//! the same time could wait for each other for ever:
//! - its acknowledgements carry the sequence number from which it retransmits, not SND.NXT (RFC 9293 §3.4): they lie
//!   before the other end's window. [`Windows::put_right`] writes SND.NXT.
//! - it rounds its window down to units of the scale, so that the right edge may move back, before what was sent
//!   already. [`Windows::put_right`] offers a unit less: what was once offered stays acceptable.
//!
//! And shown a window of nothing with data under way, it stops its retransmission timer and probes behind what may
//! have been lost. [`Windows::keep_open`] shows it a window that holds what is under way.

use bytes::BytesMut;

use crate::redirect::window_scale;
use crate::wire::{Packet, SeqNumber, TcpFlags, TcpView};

/// What both ends of a connection offer each other.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Windows {
    /// The window scale options of both SYNs (RFC 7323 §2.2).
    own_scale: Option<u8>,
    peer_scale: Option<u8>,
    /// What the peer has said, once it has acknowledged our SYN.
    peer: Option<Peer>,
    /// Behind the last byte sent, without what only probed a closed window.
    sent: Option<SeqNumber>,
    /// MAX.SND.WND.
    largest: u32,
}

#[derive(Debug, Clone, Copy)]
struct Peer {
    /// SND.UNA.
    una: SeqNumber,
    /// The furthest right edge of its window.
    offered: SeqNumber,
    /// The present right edge as smoltcp was shown it.
    shown: SeqNumber,
}

impl Windows {
    /// SND.NXT, once something was sent: not behind what the peer has ever offered. A fast retransmission of smoltcp
    /// may reach further.
    pub(super) fn snd_nxt(&self) -> Option<SeqNumber> {
        let sent = self.sent?;
        Some(match self.peer {
            Some(Peer { offered, una, .. }) if sent.after(offered) => offered.max(una),
            _ => sent,
        })
    }

    /// (SND.UNA, MAX.SND.WND), once the peer has acknowledged our SYN.
    pub(super) fn acknowledged(&self) -> Option<(SeqNumber, u32)> {
        self.peer.map(|peer| (peer.una, self.largest))
    }

    /// The scales of our window and the peer's, if both ends scale.
    fn scales(&self) -> Option<(u8, u8)> {
        self.own_scale.zip(self.peer_scale)
    }

    /// Follows a segment that smoltcp sent.
    pub(super) fn on_sent(&mut self, tcp: &TcpView<'_>) {
        let flags = tcp.flags();
        if flags.contains(TcpFlags::RST) {
            return;
        }
        if flags.contains(TcpFlags::SYN) {
            self.own_scale = window_scale(tcp);
        }
        let behind_edge = self.peer.is_some_and(|peer| !tcp.seq().before(peer.shown));
        if behind_edge && tcp.payload().len() == 1 {
            return;
        }
        let end = tcp.seq() + tcp.sequence_len();
        self.sent = Some(self.sent.map_or(end, |before| before.max(end)));
    }

    /// Follows a segment of the peer; gives back another one for smoltcp if it must not see the window in it.
    pub(super) fn keep_open(&mut self, packet: &Packet) -> Option<BytesMut> {
        let tcp = packet.tcp()?;
        let flags = tcp.flags();
        if flags.contains(TcpFlags::SYN) {
            self.peer_scale = window_scale(&tcp);
        }
        if !flags.contains(TcpFlags::ACK) || flags.contains(TcpFlags::RST) {
            return None;
        }
        let (ack, sent) = (tcp.ack(), self.sent?);
        // One byte more may be a probe that was taken.
        if self.peer.is_some_and(|peer| ack.before(peer.una)) || ack.after(sent + 1) {
            return None;
        }
        let scale = match self.scales() {
            Some((_, peer)) if !flags.contains(TcpFlags::SYN) => peer,
            _ => 0,
        };
        let under_way = u32::try_from(sent.distance(ack)).unwrap_or(0);
        let window = match tcp.window() {
            0 => u16::try_from(under_way.div_ceil(1 << scale)).unwrap_or(u16::MAX),
            window => window,
        };
        self.largest = self.largest.max(u32::from(tcp.window()) << scale);
        let edge = |window: u16| ack + (u32::from(window) << scale);
        let offered = self.peer.map_or(edge(tcp.window()), |peer| peer.offered.max(edge(tcp.window())));
        self.peer = Some(Peer { una: ack, offered, shown: edge(window) });
        self.sent = Some(sent.max(ack));
        if window == tcp.window() {
            return None;
        }
        // The checksum of the copy is wrong now; it was checked before.
        let mut copy = BytesMut::from(packet.bytes());
        let field = packet.transport_offset() + 14;
        copy[field..field + 2].copy_from_slice(&window.to_be_bytes());
        Some(copy)
    }

    /// Corrects a packet that smoltcp made, whose TCP header begins at `tcp` and whose checksum is not yet computed.
    pub(super) fn put_right(&self, packet: &mut [u8], tcp: usize) {
        let Some(header) = packet.get_mut(tcp..) else { return };
        if header.len() < 20 || TcpFlags(header[13]).intersects(TcpFlags::SYN | TcpFlags::RST) {
            return;
        }
        let bare =
            header.len() == usize::from(header[12] >> 4) * 4 && !TcpFlags(header[13]).contains(TcpFlags::FIN);
        let seq = SeqNumber(u32::from_be_bytes([header[4], header[5], header[6], header[7]]));
        if let Some(snd_nxt) = self.snd_nxt().filter(|snd_nxt| bare && seq != *snd_nxt) {
            header[4..8].copy_from_slice(&snd_nxt.0.to_be_bytes());
        }
        let offered = u16::from_be_bytes([header[14], header[15]]);
        if offered > 0 && self.scales().is_some_and(|(own, _)| own > 0) {
            header[14..16].copy_from_slice(&(offered - 1).to_be_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Segment;

    const OWN: &str = "192.0.2.1:1000";
    const PEER: &str = "192.0.2.2:80";

    fn segment(own: bool, seq: u32, ack: u32, window: u16, options: &[u8], payload: &[u8]) -> Packet {
        let (source, destination) = if own { (OWN, PEER) } else { (PEER, OWN) };
        let flags = if options.is_empty() { TcpFlags::ACK } else { TcpFlags::SYN | TcpFlags::ACK };
        Segment {
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
            seq: SeqNumber(seq),
            ack: SeqNumber(ack),
            flags,
            window,
            options,
            payload,
        }
        .emit()
    }

    /// Both ends scale by `scale`; our bytes 101..=110 are under way in a window of 20 units.
    fn open(scale: u8) -> Windows {
        let mut windows = Windows::default();
        let options = [1, 3, 3, scale];
        windows.on_sent(&segment(true, 100, 0, 1000, &options, &[]).tcp().unwrap());
        assert_eq!(windows.keep_open(&segment(false, 500, 101, 1000, &options, &[])), None);
        assert_eq!(windows.keep_open(&segment(false, 501, 101, 20, &[], &[])), None);
        windows.on_sent(&segment(true, 101, 501, 1000, &[], &[7; 10]).tcp().unwrap());
        windows
    }

    fn shown(windows: &mut Windows, ack: u32, window: u16) -> Option<u16> {
        let packet = windows.keep_open(&segment(false, 501, ack, window, &[], &[]))?;
        Some(u16::from_be_bytes([packet[34], packet[35]]))
    }

    #[test]
    fn a_window_taken_back_still_holds_what_is_under_way() {
        assert_eq!(shown(&mut open(0), 105, 0), Some(6));
        assert_eq!(shown(&mut open(3), 105, 0), Some(1));
        assert_eq!(shown(&mut open(3), 105, 4), None);
        assert_eq!(shown(&mut open(3), 111, 0), None);
    }

    #[test]
    fn a_probe_of_a_closed_window_does_not_count_as_under_way() {
        let mut windows = open(0);
        assert_eq!(shown(&mut windows, 111, 0), None);
        windows.on_sent(&segment(true, 111, 501, 1000, &[], &[7]).tcp().unwrap());
        assert_eq!(windows.snd_nxt(), Some(SeqNumber(111)));
        assert_eq!(shown(&mut windows, 111, 0), None);
    }

    #[test]
    fn a_scaled_window_is_offered_with_a_unit_in_reserve() {
        for (scale, offered, expected) in [(2, 50, 49), (2, 0, 0), (0, 50, 50)] {
            let windows = open(scale);
            let mut packet = BytesMut::from(segment(true, 111, 501, offered, &[], b"odd").bytes());
            windows.put_right(&mut packet, 20);
            let packet = Packet::from_slice(&packet).unwrap();
            assert_eq!(packet.tcp().unwrap().window(), expected);
        }
    }

    #[test]
    fn a_bare_acknowledgement_carries_snd_nxt() {
        for (seq, payload, expected) in [(101, &b""[..], 111), (101, b"again", 101), (111, b"", 111)] {
            let mut packet = BytesMut::from(segment(true, seq, 501, 50, &[], payload).bytes());
            open(0).put_right(&mut packet, 20);
            let packet = Packet::from_slice(&packet).unwrap();
            assert_eq!(packet.tcp().unwrap().seq(), SeqNumber(expected));
        }
    }
}
