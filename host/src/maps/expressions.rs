//! Parts of rules.

use std::net::IpAddr;

use nlink::netlink::nftables::{
    CmpOp, Expr, HashKind, LookupExpr, MetaKey, PacketField, PayloadBase, PayloadCsum, Register, SetElement,
    SetKeyType,
};

use crate::offload::{End, Spread};
use crate::prefix::{Family, Transport};

const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
/// Registers: what is looked up begins in the first; results go to one that no key reaches.
pub(super) const KEY: Register = Register::R0;
pub(super) const BEHIND: Register = Register::R1;
pub(super) const RESULT: Register = Register::R2;

/// Only whole packets of a protocol, of IPv6 those without extension headers; of TCP those without any flag of `except`.
pub(crate) fn whole(family: Family, transport: Transport, except: u8) -> Vec<Expr> {
    let version = [meta(MetaKey::NfProto), compare(CmpOp::Eq, &[nfproto(family)])];
    version.into_iter().chain(unfragmented(family, transport)).chain(without(transport, except)).collect()
}

/// Only whole packets of a protocol, of IPv6 those without extension headers, where the family is known.
pub(super) fn unfragmented(family: Family, transport: Transport) -> Vec<Expr> {
    match family {
        Family::V4 => vec![
            meta(MetaKey::L4Proto),
            compare(CmpOp::Eq, &[transport.number()]),
            payload(PayloadBase::Network, 6, 2, KEY),
            masked(&[0x3f, 0xff]),
            compare(CmpOp::Eq, &[0, 0]),
        ],
        Family::V6 => {
            vec![payload(PayloadBase::Network, 6, 1, KEY), compare(CmpOp::Eq, &[transport.number()])]
        }
    }
}

/// Of TCP only segments without any of these flags.
pub(super) fn without(transport: Transport, flags: u8) -> Vec<Expr> {
    if transport != Transport::Tcp || flags == 0 {
        return Vec::new();
    }
    vec![payload(PayloadBase::Transport, 13, 1, KEY), masked(&[flags]), compare(CmpOp::Eq, &[0])]
}

pub(super) fn nfproto(family: Family) -> u8 {
    match family {
        Family::V4 => NFPROTO_IPV4,
        Family::V6 => NFPROTO_IPV6,
    }
}

pub(super) fn meta(key: MetaKey) -> Expr {
    Expr::Meta { dreg: KEY, key }
}

pub(super) fn destination_port(transport: Transport) -> PacketField {
    match transport {
        Transport::Tcp => PacketField::TcpDport,
        Transport::Udp => PacketField::UdpDport,
    }
}

/// Address and port of one end, one behind the other, the port filled up with zeros.
pub(super) fn load(end: End, family: Family) -> [Expr; 2] {
    let (offset, len) = place(end, family);
    let (port, behind) = match (end, family) {
        (End::Source, Family::V4) => (0, Register::Reg32_01),
        (End::Destination, Family::V4) => (2, Register::Reg32_01),
        (End::Source, Family::V6) => (0, BEHIND),
        (End::Destination, Family::V6) => (2, BEHIND),
    };
    [payload(PayloadBase::Network, offset, len, KEY), payload(PayloadBase::Transport, port, 2, behind)]
}

/// Replaces an address; the checksums follow.
pub(super) fn write(end: End, family: Family, sreg: Register) -> Expr {
    let (offset, len) = place(end, family);
    let (csum, csum_offset) = match family {
        Family::V4 => (PayloadCsum::Inet, 10),
        Family::V6 => (PayloadCsum::None, 0),
    };
    Expr::PayloadSet {
        sreg,
        base: PayloadBase::Network,
        offset,
        len,
        csum,
        csum_offset,
        l4_pseudo_header: true,
    }
}

/// Offset and length of an address in its IP header.
pub(crate) fn place(end: End, family: Family) -> (u32, u32) {
    match (end, family) {
        (End::Source, Family::V4) => (12, 4),
        (End::Destination, Family::V4) => (16, 4),
        (End::Source, Family::V6) => (8, 16),
        (End::Destination, Family::V6) => (24, 16),
    }
}

/// Of address and port as [`load`] leaves them.
fn key_len(family: Family) -> u32 {
    place(End::Source, family).1 + 4
}

pub(crate) fn payload(base: PayloadBase, offset: u32, len: u32, dreg: Register) -> Expr {
    Expr::Payload { dreg, base, offset, len }
}

pub(super) fn masked(mask: &[u8]) -> Expr {
    let len = u32::try_from(mask.len()).unwrap_or(u32::MAX);
    Expr::Bitwise { sreg: KEY, dreg: KEY, len, mask: mask.to_vec(), xor: vec![0; mask.len()] }
}

pub(super) fn compare(op: CmpOp, data: &[u8]) -> Expr {
    Expr::Cmp { sreg: KEY, op, data: data.to_vec() }
}

pub(crate) fn address_type(family: Family) -> SetKeyType {
    match family {
        Family::V4 => SetKeyType::Ipv4Addr,
        Family::V6 => SetKeyType::Ipv6Addr,
    }
}

pub(crate) fn element_of(address: IpAddr) -> SetElement {
    match address {
        IpAddr::V4(v4) => SetElement::ipv4(v4),
        IpAddr::V6(v6) => SetElement::ipv6(v6),
    }
}

/// Of a packet to one of the `targets`, the goal in the slot that the hash of its source's address and port is scaled to.
pub(super) fn spread_to(
    family: Family,
    spread: &Spread,
    targets: &str,
    slots: &str,
) -> impl Iterator<Item = Expr> {
    let hash = Expr::Hash {
        dreg: RESULT,
        kind: HashKind::Jenkins,
        sreg: Some(KEY),
        len: key_len(family),
        modulus: u32::try_from(spread.slots.len()).unwrap_or(u32::MAX),
        seed: Some(spread.seed),
        offset: 0,
    };
    let goal = LookupExpr::new(slots, RESULT).dreg(RESULT).into();
    load(End::Destination, family)
        .into_iter()
        .chain([LookupExpr::new(targets, KEY).into()])
        .chain(load(End::Source, family))
        .chain([hash, goal])
}
