//! Where the IP packet begins in what a link layer carries.

use pcap_file::DataLink;
use thiserror::Error;

const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
/// The tags of 802.1Q, 802.1ad, and what was used before that.
const VLAN: [u16; 3] = [0x8100, 0x88a8, 0x9100];
/// VLAN tags in front of a packet, at most.
const MAX_TAGS: usize = 4;
/// Below, the field is the length of an 802.3 frame.
const LEAST_ETHER_TYPE: u16 = 0x0600;

/// Why there is no IP packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Error)]
pub enum LinkError {
    /// A link layer that is not read.
    #[error(
        "link type {0} is not read: capture on an Ethernet or IP interface, or convert it with editcap -T"
    )]
    Link(u32),
    /// It ends before its header does.
    #[error("{have} bytes were captured, and the link's header has {need}")]
    Short {
        /// Bytes of the header.
        need: usize,
        /// Bytes that are there.
        have: usize,
    },
    /// Something else than IP.
    #[error("no IP: protocol {0:#06x}")]
    Protocol(u16),
    /// A frame of 802.3 without a protocol number, as of spanning trees.
    #[error("no IP: an 802.3 frame")]
    Ieee8023,
}

/// Offset of the IP header.
///
/// # Errors
/// It is no IP, or there is too little of it.
pub fn ip_offset(link: DataLink, data: &[u8]) -> Result<usize, LinkError> {
    match link {
        DataLink::RAW | DataLink::IPV4 | DataLink::IPV6 => Ok(0),
        DataLink::ETHERNET => ether_type(data, 12),
        DataLink::LINUX_SLL => ether_type(data, 14),
        DataLink::LINUX_SLL2 => match protocol(data, 0, 20)? {
            IPV4 | IPV6 => Ok(20),
            tag if VLAN.contains(&tag) => ether_type(data, 22),
            other => Err(LinkError::Protocol(other)),
        },
        DataLink::NULL | DataLink::LOOP => family(data),
        other => Err(LinkError::Link(other.into())),
    }
}

fn protocol(data: &[u8], at: usize, need: usize) -> Result<u16, LinkError> {
    match data.get(at..at + 2) {
        Some([high, low]) if data.len() >= need => Ok(u16::from_be_bytes([*high, *low])),
        _ => Err(LinkError::Short { need, have: data.len() }),
    }
}

/// The protocol stands at `at`, behind it what it says.
fn ether_type(data: &[u8], at: usize) -> Result<usize, LinkError> {
    let mut at = at;
    for _ in 0..=MAX_TAGS {
        match protocol(data, at, at + 2)? {
            IPV4 | IPV6 => return Ok(at + 2),
            tag if VLAN.contains(&tag) => at += 4,
            short if short < LEAST_ETHER_TYPE => return Err(LinkError::Ieee8023),
            other => return Err(LinkError::Protocol(other)),
        }
    }
    Err(LinkError::Protocol(VLAN[0]))
}

/// BSD: an address family, in the byte order of whoever captured (NULL) or of the network (LOOP). The numbers for IPv6
/// are those of NetBSD, FreeBSD, macOS and Linux.
fn family(data: &[u8]) -> Result<usize, LinkError> {
    const FAMILIES: [u32; 5] = [2, 10, 24, 28, 30];
    let Some(bytes) = data.first_chunk::<4>() else {
        return Err(LinkError::Short { need: 4, have: data.len() });
    };
    let known = [u32::from_be_bytes(*bytes), u32::from_le_bytes(*bytes)];
    if known.iter().any(|family| FAMILIES.contains(family)) {
        return Ok(4);
    }
    Err(LinkError::Protocol(known[0].min(known[1]) as u16))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ethernet(after_addresses: &[u8]) -> Vec<u8> {
        [&[2; 12], after_addresses].concat()
    }

    #[test]
    fn every_link_layer_leads_to_ip() {
        let sll = [&[0, 0, 0, 1, 0, 6, 2, 2, 2, 2, 2, 2, 0, 0, 0x86, 0xdd][..], &[0x60]].concat();
        let mut sll2 = [0; 21];
        sll2[0..2].copy_from_slice(&[8, 0]);
        let cases: [(DataLink, Vec<u8>, usize); 10] = [
            (DataLink::RAW, vec![0x45], 0),
            (DataLink::IPV4, vec![0x45], 0),
            (DataLink::IPV6, vec![0x60], 0),
            (DataLink::ETHERNET, ethernet(&[8, 0, 0x45]), 14),
            (DataLink::ETHERNET, ethernet(&[0x81, 0, 0, 7, 0x86, 0xdd]), 18),
            (DataLink::ETHERNET, ethernet(&[0x88, 0xa8, 0, 7, 0x81, 0, 0, 8, 8, 0]), 22),
            (DataLink::LINUX_SLL, sll, 16),
            (DataLink::LINUX_SLL2, sll2.to_vec(), 20),
            (DataLink::NULL, vec![2, 0, 0, 0, 0x45], 4),
            (DataLink::LOOP, vec![0, 0, 0, 30, 0x60], 4),
        ];
        for (link, data, offset) in cases {
            assert_eq!(ip_offset(link, &data), Ok(offset), "{link:?}");
        }
    }

    #[test]
    fn what_is_no_ip_says_what_it_is() {
        let arp = ethernet(&[8, 6, 0]);
        assert_eq!(ip_offset(DataLink::ETHERNET, &arp), Err(LinkError::Protocol(0x0806)));
        assert_eq!(ip_offset(DataLink::ETHERNET, &ethernet(&[0, 0x26])), Err(LinkError::Ieee8023));
        assert_eq!(ip_offset(DataLink::ETHERNET, &[0; 13]), Err(LinkError::Short { need: 14, have: 13 }));
        let tags = ethernet(&[0x81, 0, 0, 1].repeat(5));
        assert_eq!(ip_offset(DataLink::ETHERNET, &tags), Err(LinkError::Protocol(0x8100)));
        assert_eq!(ip_offset(DataLink::NULL, &[7, 0, 0, 0]), Err(LinkError::Protocol(7)));
        assert_eq!(ip_offset(DataLink::IEEE802_11, &[]), Err(LinkError::Link(105)));
    }
}
