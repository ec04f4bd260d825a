//! What is left to a device, done here: completing checksums, cutting super-packets into segments.

use bytes::BytesMut;

use super::checksum::Sum;
use super::error::Rejected;
use super::ip::{IPV6_LEN, Layout, Protocol, Version, be16};
use super::packet::{Gso, GsoKind, Offload, Packet};
use super::vnet::{TCP_CHECKSUM, UDP_CHECKSUM, complete};

/// TCP flags in the second byte of the word.
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

impl Packet {
    /// Takes a TCP packet that this host makes, whose checksum nobody has computed: it gets a partial one, and is a
    /// super-packet if its payload is longer than `segment` bytes.
    ///
    /// # Errors
    /// As [`parse`](Self::parse); also for anything but TCP.
    pub fn parse_unsummed(buffer: BytesMut, segment: usize) -> Result<Packet, Rejected> {
        let partial = Offload { partial_checksum: true, gso: None };
        let mut packet = Packet::parse(buffer, partial)?;
        let pseudo = Sum::new().add_pseudo_header(
            packet.source(),
            packet.destination(),
            packet.layout.protocol.number(),
            packet.layout.total - packet.layout.transport,
        );
        if let Some(field) = packet.checksum_offset() {
            packet.buffer[field..field + 2].copy_from_slice(&pseudo.fold().to_be_bytes());
        }
        if packet.tcp().is_some_and(|tcp| tcp.payload().len() > segment) && segment > 0 {
            let kind = match packet.layout.version {
                Version::V4 => GsoKind::TcpV4,
                Version::V6 => GsoKind::TcpV6,
            };
            let size = u16::try_from(segment).unwrap_or(u16::MAX);
            packet.offload.gso = Some(Gso { kind, size, ecn: false });
        }
        Ok(packet)
    }

    /// How many packets it is on a link: more than one if it is a super-packet.
    pub fn segment_count(&self) -> usize {
        let Some(gso) = self.offload.gso else { return 1 };
        (self.len() - self.headers_len()).div_ceil(usize::from(gso.size)).max(1)
    }

    /// How many bytes it is on a link, the headers of all segments included.
    pub fn segmented_len(&self) -> usize {
        self.len() + (self.segment_count() - 1) * self.headers_len()
    }

    /// Computes the transport checksum, if that was left to a device. Of a super-packet it is the checksum of the whole
    /// as one packet, which it then is.
    pub fn complete_checksum(&mut self) {
        if !self.offload.partial_checksum {
            return;
        }
        let field = if self.layout.protocol == Protocol::Tcp { TCP_CHECKSUM } else { UDP_CHECKSUM };
        let done = complete(&mut self.buffer[self.layout.transport..], field);
        debug_assert!(done.is_some(), "a checked packet has its checksum field");
        self.offload = Offload::default();
    }

    /// The packets that it is on a link, with complete checksums: itself, if it is no super-packet.
    pub fn segments(&self) -> impl Iterator<Item = Packet> + use<'_> {
        (0..self.segment_count()).map(|index| self.segment(index))
    }

    /// One of the [`segment_count`](Self::segment_count) segments: numbers count on, FIN and PSH stay with the last, CWR
    /// with the first (RFC 3168 §6.1.2), as the kernel has it.
    fn segment(&self, index: usize) -> Packet {
        let count = self.segment_count();
        let Some(gso) = self.offload.gso else {
            let mut whole = self.clone();
            whole.complete_checksum();
            return whole;
        };
        let (headers, transport) = (self.headers_len(), self.layout.transport);
        let start = headers + index * usize::from(gso.size);
        let end = (start + usize::from(gso.size)).min(self.len());
        let mut buffer = BytesMut::with_capacity(headers + end - start);
        buffer.extend_from_slice(&self.buffer[..headers]);
        buffer.extend_from_slice(&self.buffer[start..end]);
        let total = buffer.len();
        number_ip(&mut buffer, self.layout.version, index);
        let segment = &mut buffer[transport..];
        let length = total - transport;
        let field = if self.layout.protocol == Protocol::Tcp {
            let seq = u32::from_be_bytes([segment[4], segment[5], segment[6], segment[7]]);
            let seq = seq.wrapping_add((start - headers) as u32);
            segment[4..8].copy_from_slice(&seq.to_be_bytes());
            segment[13] &= !if index + 1 < count { FIN | PSH } else { 0 };
            segment[13] &= !if index > 0 { CWR } else { 0 };
            TCP_CHECKSUM
        } else {
            segment[4..6].copy_from_slice(&(length as u16).to_be_bytes());
            UDP_CHECKSUM
        };
        // The pseudo-header's sum stays as right or wrong as it was.
        let partial = Sum::new()
            .remove(&((self.len() - transport) as u32).to_be_bytes())
            .add(&(length as u32).to_be_bytes())
            .update_partial(be16(segment, field));
        segment[field..field + 2].copy_from_slice(&partial.to_be_bytes());
        let done = complete(segment, field);
        debug_assert!(done.is_some(), "a checked packet has its checksum field");
        let layout = Layout { total, ..self.layout };
        Packet { buffer, layout, offload: Offload::default() }
    }
}

/// Length and, in IPv4, identification of a segment's IP header.
fn number_ip(packet: &mut [u8], version: Version, index: usize) {
    let total = packet.len();
    if version == Version::V6 {
        packet[4..6].copy_from_slice(&((total - IPV6_LEN) as u16).to_be_bytes());
        return;
    }
    let before = Sum::new().remove(&packet[2..6]);
    let identification = be16(packet, 4).wrapping_add(index as u16);
    packet[2..4].copy_from_slice(&(total as u16).to_be_bytes());
    packet[4..6].copy_from_slice(&identification.to_be_bytes());
    let checksum = before.add(&packet[2..6]).update(be16(packet, 10));
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
}
