//! What no rewrite may break, whatever the packet.

use bytes::BytesMut;

use crate::wire::{Packet, Version, checksum::Sum};

/// What a packet was before something handled it.
#[derive(Debug, Clone)]
pub struct Snapshot {
    before: Packet,
    checksum_ok: bool,
    header_ok: bool,
}

impl Snapshot {
    /// Of a packet that is about to be handled.
    pub fn of(packet: &Packet) -> Snapshot {
        Snapshot { before: packet.clone(), checksum_ok: packet.checksum_ok(), header_ok: header_ok(packet) }
    }

    /// Whether the transport checksum was right.
    pub fn checksum_ok(&self) -> bool {
        self.checksum_ok
    }

    /// The packet as it was.
    pub fn before(&self) -> &Packet {
        &self.before
    }

    /// Checks what has become of it: checksums as right or as wrong as they were, no longer than `mtu` bytes unless it
    /// was before (`W3`), the same family and protocol, and still the packet that its bytes say.
    ///
    /// # Panics
    /// If any of these does not hold.
    pub fn check(&self, after: &Packet, mtu: usize) {
        let before = &self.before;
        assert_eq!(self.checksum_ok, after.checksum_ok(), "transport checksum: {before:?} -> {after:?}");
        assert_eq!(self.header_ok, header_ok(after), "IPv4 header checksum: {before:?} -> {after:?}");
        assert!(
            after.len() <= mtu.max(before.len()),
            "{} bytes from {}, MTU {mtu}",
            after.len(),
            before.len()
        );
        assert_eq!((before.version(), before.protocol()), (after.version(), after.protocol()));
        assert_eq!((before.fragment(), before.offload()), (after.fragment(), after.offload()));
        assert_eq!((before.hop_limit(), before.dscp()), (after.hop_limit(), after.dscp()));
        parses(after);
    }
}

/// Checks that the bytes of a packet say what the packet says.
pub(super) fn parses(packet: &Packet) {
    let again = Packet::parse(BytesMut::from(packet.bytes()), packet.offload());
    assert_eq!(again.as_ref(), Ok(packet), "parsed again");
}

/// Checks a packet of a machine's own making.
pub(super) fn well_made(packet: &Packet) {
    assert!(packet.checksum_ok() && header_ok(packet), "checksum of {packet:?}");
    parses(packet);
}

/// Whether the IPv4 header checksum is right; IPv6 has none.
pub(super) fn header_ok(packet: &Packet) -> bool {
    match packet.version() {
        Version::V4 => Sum::new().add(&packet.bytes()[..packet.transport_offset()]).fold() == 0xffff,
        Version::V6 => true,
    }
}

/// Whether two packets are the same but for the two ways to write a checksum of zero.
pub(super) fn same(one: &Packet, other: &Packet) -> bool {
    canonical(one) == canonical(other)
}

fn canonical(packet: &Packet) -> Vec<u8> {
    let mut bytes = packet.bytes().to_vec();
    let mut word = |at: usize| {
        if bytes.get(at..at + 2) == Some(&[0xff, 0xff]) {
            bytes[at..at + 2].fill(0);
        }
    };
    if packet.version() == Version::V4 {
        word(10);
    }
    if packet.tcp().is_some() {
        word(packet.transport_offset() + 16);
    }
    bytes
}
