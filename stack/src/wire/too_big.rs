//! The answer to a packet that does not fit (`I3`): fragmentation needed (RFC 792, RFC 1191), packet too big (RFC 4443
//! §3.2).

use super::ip::Version;
use super::packet::Packet;
use super::segment::icmp_message;

/// An error in IPv4 has 576 bytes at most (RFC 1812 §4.3.2.3); headers of IP and ICMP taken off.
const QUOTE_V4: usize = 576 - 28;
/// In IPv6 it has 1,280; headers taken off.
const QUOTE_V6: usize = 1280 - 48;

/// The error to the sender of a packet for which there is room for `mtu` bytes; it comes from where the packet was
/// going to. `None` where none must be sent: to an error, or a fragment that is not the first (RFC 1122 §3.2.2).
pub fn too_big(packet: &Packet, mtu: u16) -> Option<Packet> {
    let of_error = packet.icmp().is_some_and(|icmp| icmp.is_error());
    if of_error || packet.fragment().is_some_and(|fragment| fragment.offset != 0) {
        return None;
    }
    let [high, low] = mtu.to_be_bytes();
    let (kind, code, most) = match packet.version() {
        Version::V4 => (3, 4, QUOTE_V4),
        Version::V6 => (2, 0, QUOTE_V6),
    };
    let mut message = vec![kind, code, 0, 0, 0, 0, high, low];
    message.extend_from_slice(&packet.bytes()[..packet.len().min(most)]);
    Some(icmp_message(packet.destination(), packet.source(), &message))
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::wire::{Segment, TcpFlags};

    #[test]
    fn i3_the_error_quotes_what_the_sender_needs_and_says_what_fits() {
        for (client, vip) in
            [("10.1.0.2:50000", "203.0.113.10:443"), ("[2001:db8:1::7]:50000", "[2001:db8::10]:443")]
        {
            let [client, vip]: [SocketAddr; 2] = [client, vip].map(|text| text.parse().unwrap());
            for length in [0, 1400] {
                let payload = vec![7; length];
                let packet =
                    Segment { payload: &payload, ..Segment::bare(client, vip, TcpFlags::ACK) }.emit();
                let error = too_big(&packet, 1468).unwrap();
                assert!(error.checksum_ok() && error.len() <= if client.is_ipv4() { 576 } else { 1280 });
                assert_eq!((error.source(), error.destination()), (vip.ip(), client.ip()));
                let icmp = error.icmp().unwrap();
                assert_eq!(icmp.mtu(), Some(1468));
                let quoted = icmp.quoted().unwrap();
                assert_eq!((quoted.source, quoted.source_port), (client.ip(), client.port()));
                assert_eq!((quoted.destination, quoted.destination_port), (vip.ip(), vip.port()));
                assert_eq!(too_big(&error, 1280), None, "no error about an error");
            }
        }
    }
}
