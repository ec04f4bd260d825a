//! From a record of a capture to a packet, also where the capture has less of it than there was.

use bytes::BytesMut;
use shunt_stack::wire::{Fragment, Offload, Packet, ParseError, Protocol};
use thiserror::Error;

use crate::link::{LinkError, ip_offset};
use crate::read::Record;

/// Why nothing can be decided about a record.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FrameError {
    /// It carries no IP packet.
    #[error("{0}")]
    Link(#[from] LinkError),
    /// The capture has too little of it.
    #[error("only {have} of its {of} bytes were captured: capture with a longer snap length")]
    Snapped {
        /// Bytes that are there, from the IP header on.
        have: usize,
        /// Bytes that there were.
        of: usize,
    },
    /// The packet is wrong; its bytes are for rules that apply to such packets too (`B4`).
    #[error("unreadable: {error}")]
    Packet {
        /// Why.
        error: ParseError,
        /// From the IP header on.
        bytes: BytesMut,
    },
}

/// A packet of a capture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The packet. Bytes of payload that were not captured are zero.
    pub packet: Packet,
    /// How many bytes of its end were not captured.
    pub snapped: usize,
}

impl Frame {
    /// Reads a record.
    ///
    /// # Errors
    /// Why it is no packet that can be judged.
    pub fn read(record: &Record) -> Result<Frame, FrameError> {
        let at = ip_offset(record.link, &record.data)?;
        let mut bytes = BytesMut::from(&record.data[at..]);
        let have = bytes.len();
        let of = (record.original_len as usize).saturating_sub(at).max(have);
        if of == have {
            return Ok(Frame { packet: parse(bytes)?, snapped: 0 });
        }
        // No IP packet is longer, whatever the capture says.
        bytes.resize(of.min(usize::from(u16::MAX) + 40), 0);
        let packet = parse(bytes).map_err(|_| FrameError::Snapped { have, of })?;
        if have < packet.len() && have < headers_end(&packet) {
            return Err(FrameError::Snapped { have, of });
        }
        let snapped = packet.len().saturating_sub(have);
        Ok(Frame { packet, snapped })
    }
}

/// Where the headers end that decisions depend on. Of ICMP errors also what they quote.
fn headers_end(packet: &Packet) -> usize {
    let at = packet.transport_offset();
    match (packet.tcp(), packet.protocol()) {
        (Some(tcp), _) => at + tcp.header_len(),
        (None, Protocol::Icmp | Protocol::Icmpv6) => packet.len(),
        (None, Protocol::Udp) if is_first(packet.fragment()) => at + 8,
        _ => at,
    }
}

fn is_first(fragment: Option<Fragment>) -> bool {
    fragment.is_none_or(|fragment| fragment.offset == 0)
}

/// A packet whose checksum was left to the network card, as those that a host sends are captured there, counts as
/// such, and not as broken.
fn parse(bytes: BytesMut) -> Result<Packet, FrameError> {
    let packet = |bytes, offload| {
        Packet::parse(bytes, offload)
            .map_err(|rejected| FrameError::Packet { error: rejected.error, bytes: rejected.buffer })
    };
    let whole = packet(bytes, Offload::default())?;
    if whole.checksum_ok() || !matches!(whole.protocol(), Protocol::Tcp | Protocol::Udp) {
        return Ok(whole);
    }
    let partial = packet(whole.into_buffer(), Offload { partial_checksum: true, gso: None })?;
    if partial.checksum_ok() { Ok(partial) } else { packet(partial.into_buffer(), Offload::default()) }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use pcap_file::DataLink;
    use shunt_stack::wire::{Segment, TcpFlags, checksum::Sum};

    use super::*;

    fn record(data: &[u8], original_len: usize) -> Record {
        Record {
            number: 1,
            offset: 24,
            time: Duration::ZERO,
            link: DataLink::RAW,
            direction: None,
            original_len: original_len as u32,
            data: BytesMut::from(data),
        }
    }

    fn segment() -> Packet {
        let (from, to) = ("10.1.0.2:50000".parse().unwrap(), "203.0.113.10:443".parse().unwrap());
        Segment { payload: &[7; 100], ..Segment::bare(from, to, TcpFlags::ACK) }.emit()
    }

    #[test]
    fn a_snapped_segment_is_judged_by_its_headers() {
        let whole = segment();
        let frame = Frame::read(&record(&whole.bytes()[..60], whole.len())).unwrap();
        assert_eq!((frame.snapped, frame.packet.len()), (80, 140));
        assert_eq!(frame.packet.tcp().unwrap().destination_port(), 443);
        let short = Frame::read(&record(&whole.bytes()[..39], whole.len()));
        assert_eq!(short, Err(FrameError::Snapped { have: 39, of: 140 }));
    }

    #[test]
    fn a_checksum_left_to_the_network_card_is_not_wrong() {
        let packet = segment();
        let mut bytes = packet.bytes().to_vec();
        let sum = Sum::new().add_pseudo_header(packet.source(), packet.destination(), 6, 120).fold();
        bytes[36..38].copy_from_slice(&sum.to_be_bytes());
        let frame = Frame::read(&record(&bytes, bytes.len())).unwrap();
        assert!(frame.packet.offload().partial_checksum && frame.packet.checksum_ok());
        bytes[36] ^= 1;
        let frame = Frame::read(&record(&bytes, bytes.len())).unwrap();
        assert!(!frame.packet.offload().partial_checksum && !frame.packet.checksum_ok());
    }

    #[test]
    fn what_is_cut_short_on_the_wire_is_unreadable_and_not_snapped() {
        let whole = segment();
        let error = Frame::read(&record(&whole.bytes()[..60], 60)).unwrap_err();
        assert!(matches!(
            error,
            FrameError::Packet { error: ParseError::Truncated { need: 140, have: 60 }, .. }
        ));
    }
}
