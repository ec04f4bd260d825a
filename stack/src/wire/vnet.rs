//! The virtio-net header (virtio 1.2, §5.1.6) that TUN devices put in front of packets, in the host's byte order.
//!
//! ```text
//! flags (1) | segments' kind (1) | headers' length (2) | segment size (2) | checksum from (2) | checksum at (2)
//! ```

use super::checksum::Sum;
use super::gue::UDP_LEN;
use super::ip::{Layout, Protocol};
use super::packet::{Gso, GsoKind, Offload, Packet};

/// Bytes of the header; the two more of its longer form count buffers, of which a TUN device has one.
pub const VNET_LEN: usize = 10;

/// The checksum is partial: `VIRTIO_NET_HDR_F_NEEDS_CSUM`.
const NEEDS_CHECKSUM: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_ECN`, in the byte of the kind.
const ECN: u8 = 0x80;
const KINDS: [(u8, GsoKind); 3] = [(1, GsoKind::TcpV4), (4, GsoKind::TcpV6), (5, GsoKind::Udp)];
pub(super) const TCP_CHECKSUM: usize = 16;
pub(super) const UDP_CHECKSUM: usize = 6;

/// Why a virtio-net header cannot be true of its packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum VnetError {
    /// It ends before its time.
    #[error("a virtio-net header of {0} bytes")]
    Truncated(usize),
    /// Segments of a kind that nobody asked for.
    #[error("segments of kind {0:#04x}")]
    Kind(u8),
    /// The checksum is not where the packet has one.
    #[error("a checksum from byte {start} on, {offset} bytes behind that")]
    Checksum {
        /// Where the bytes that it covers begin.
        start: u16,
        /// How far behind that its field is.
        offset: u16,
    },
}

/// Reads the header of `packet`. A partial checksum of anything but a whole TCP or UDP packet is completed here, so that
/// no more than [`Offload`] can say is left undone. Of segments only the kind is looked at: [`Packet::parse`] checks that
/// they fit the packet.
///
/// # Errors
/// What the header says cannot be; the packet is unchanged.
pub fn read_vnet(header: &[u8], packet: &mut [u8]) -> Result<Offload, VnetError> {
    let header: &[u8; VNET_LEN] = header.first_chunk().ok_or(VnetError::Truncated(header.len()))?;
    let word = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
    let gso = match header[1] & !ECN {
        0 => None,
        number => {
            let kind = KINDS.iter().find(|(of, _)| *of == number).ok_or(VnetError::Kind(header[1]))?.1;
            Some(Gso { kind, size: word(4), ecn: header[1] & ECN != 0 })
        }
    };
    if header[0] & NEEDS_CHECKSUM == 0 {
        return Ok(Offload { partial_checksum: false, gso });
    }
    let (start, offset) = (word(6), word(8));
    if is_transport(packet, usize::from(start), usize::from(offset)) {
        return Ok(Offload { partial_checksum: true, gso });
    }
    let wrong = VnetError::Checksum { start, offset };
    let covered = packet.get_mut(usize::from(start)..).filter(|_| gso.is_none()).ok_or(wrong)?;
    complete(covered, usize::from(offset)).ok_or(wrong)?;
    Ok(Offload::default())
}

/// Whether these are the transport header and checksum field of a whole TCP or UDP packet.
fn is_transport(packet: &[u8], start: usize, offset: usize) -> bool {
    Layout::parse(packet).is_ok_and(|layout| {
        let field = match layout.protocol {
            Protocol::Tcp => TCP_CHECKSUM,
            Protocol::Udp => UDP_CHECKSUM,
            _ => return false,
        };
        layout.fragment.is_none() && (layout.transport, field) == (start, offset)
    })
}

/// Sums up all of `covered`, in which the field holds what is not there to be summed. 0 means "none" to UDP and is the
/// same as its complement to all others.
pub(super) fn complete(covered: &mut [u8], field: usize) -> Option<()> {
    let checksum = match Sum::new().add(covered).checksum() {
        0 => 0xffff,
        checksum => checksum,
    };
    covered.get_mut(field..field + 2)?.copy_from_slice(&checksum.to_be_bytes());
    Some(())
}

/// The header that says what is left undone of a packet.
pub fn write_vnet(packet: &Packet) -> [u8; VNET_LEN] {
    let mut header = [0; VNET_LEN];
    let Offload { partial_checksum, gso } = packet.offload();
    let mut put = |at: usize, value: usize| {
        header[at..at + 2].copy_from_slice(&(value as u16).to_ne_bytes());
    };
    if partial_checksum {
        let tcp = packet.protocol() == Protocol::Tcp;
        put(2, packet.headers_len());
        put(6, packet.transport_offset());
        put(8, if tcp { TCP_CHECKSUM } else { UDP_CHECKSUM });
    }
    if let Some(gso) = gso {
        put(4, usize::from(gso.size));
        let kind = KINDS.iter().find(|(_, kind)| *kind == gso.kind).map_or(0, |(number, _)| *number);
        header[1] = kind | if gso.ecn { ECN } else { 0 };
    }
    header[0] = if partial_checksum { NEEDS_CHECKSUM } else { 0 };
    header
}

impl Packet {
    /// Length of all headers up to the payload of TCP or UDP; of all else, and of later fragments, up to the transport
    /// header.
    pub fn headers_len(&self) -> usize {
        let transport = self.transport_offset();
        match self.protocol() {
            Protocol::Tcp => transport + self.tcp().map_or(0, |tcp| tcp.header_len()),
            Protocol::Udp if self.ports().is_some() => transport + UDP_LEN,
            _ => transport,
        }
    }
}
