//! Packets out of a fuzzer's bytes: every choice is one byte and the interesting values are among few.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use arbitrary::Unstructured;
use bytes::BytesMut;

use crate::wire::{
    DEFAULT_EXID, Gso, GsoKind, Offload, Packet, RedirectOption, Segment, SeqNumber, TcpFlags, Version,
    checksum::Sum, icmp_message, observed_digest,
};

/// Ports of the VIP's side: two redirect ports, four service ports, one below the range obeyed, one that clients use.
pub(super) const PORTS: [u16; 8] = [443, 80, 41_001, 41_002, 41_003, 41_004, 999, 50_000];
/// Ports of the client's side, two of them such that flows collide.
pub(super) const CLIENT_PORTS: [u16; 4] = [50_000, 50_001, 443, 41_001];
/// The control bits of a step: the eighth choice is a byte of its own.
pub(super) const FLAGS: [u8; 7] = [0x02, 0x12, 0x10, 0x18, 0x11, 0x04, 0x14];
/// Initial sequence numbers: the client's two, the server's two; the second ones wrap around.
pub(super) const ISNS: [u32; 4] = [1000, u32::MAX, 9000, u32::MAX - 1];
/// Values of timestamps.
pub(super) const TIMES: [u32; 4] = [77, 78, 0, u32::MAX];
/// Steps decoded from one input at the most.
pub(super) const MAX_STEPS: usize = 64;

const DELTAS: [u32; 7] = [0, 1, 2, 11, 101, u32::MAX, 0x8000_0000];
const PAYLOADS: [usize; 8] = [0, 0, 0, 1, 10, 100, 1460, 9000];
const STEPS: [u64; 8] = [0, 1, 1_000, 50_000, 250_000, 1_000_000, 20_000_000, 700_000_000];

/// The bytes still unread; reading behind their end gives zeros.
pub(super) struct Draw<'a>(pub(super) Unstructured<'a>);

/// The two ends of a connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ends {
    pub(super) client: SocketAddr,
    pub(super) vip: SocketAddr,
}

/// The VIP number `index` of a family; only 0 and 1 are ever configured.
pub(super) fn vip(v4: bool, index: u8) -> IpAddr {
    if v4 {
        Ipv4Addr::new(203, 0, 113, 10 + index).into()
    } else {
        Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 10 + u16::from(index)).into()
    }
}

fn host(v4: bool, last: u8) -> IpAddr {
    if v4 {
        Ipv4Addr::new(10, 1, 0, last).into()
    } else {
        Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, u16::from(last)).into()
    }
}

impl<'a> Draw<'a> {
    pub(super) fn new(data: &'a [u8]) -> Self {
        Draw(Unstructured::new(data))
    }

    pub(super) fn done(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn byte(&mut self) -> u8 {
        self.0.arbitrary().unwrap_or_default()
    }

    pub(super) fn double(&mut self) -> u32 {
        self.0.arbitrary().unwrap_or_default()
    }

    /// At most `most` bytes, a byte saying how many.
    pub(super) fn bytes(&mut self, most: usize) -> &'a [u8] {
        let length = usize::from(self.byte()).min(most).min(self.0.len());
        self.0.bytes(length).unwrap_or_default()
    }

    /// One byte: the client's port (2 bits), the VIP's port (3), the VIP (2: two of ours, one of none), the family.
    pub(super) fn ends(&mut self) -> Ends {
        let byte = self.byte();
        let v4 = byte & 0x80 == 0;
        let vip = vip(v4, byte >> 5 & 3);
        Ends {
            client: SocketAddr::new(host(v4, 2), CLIENT_PORTS[usize::from(byte & 3)]),
            vip: SocketAddr::new(vip, PORTS[usize::from(byte >> 2 & 7)]),
        }
    }

    /// One byte: which ISN (2 bits) and how far from it (3).
    fn seq(&mut self) -> SeqNumber {
        let byte = self.byte();
        let delta = match DELTAS.get(usize::from(byte >> 2 & 7)) {
            Some(delta) => *delta,
            None => self.double(),
        };
        SeqNumber(ISNS[usize::from(byte & 3)]) + delta
    }

    fn flags(&mut self) -> TcpFlags {
        let index = usize::from(self.byte() & 7);
        TcpFlags(FLAGS.get(index).copied().unwrap_or_else(|| self.byte()))
    }

    /// Two bytes: the kind of options, and `TSval` and `TSecr`.
    fn options(&mut self) -> Vec<u8> {
        let kind = self.byte();
        let times = usize::from(self.byte());
        let [value, echo] = [TIMES[times & 3], TIMES[times >> 2 & 3]].map(u32::to_be_bytes);
        let timestamps = [&[8, 10], &value[..], &echo[..]].concat();
        let mut options = match kind & 7 {
            0 => Vec::new(),
            1 => [&[2, 4, 5, 180, 4, 2], &timestamps[..], &[1, 3, 3, 7]].concat(),
            2 => [&[1, 1], &timestamps[..]].concat(),
            3 => vec![2, 4, 5, 180],
            4 => [&[1, 1, 19, 18][..], &[0xab; 16]].concat(),
            5 => [&[30, 12, 0, 0x81][..], &[0xcd; 8]].concat(),
            6 => vec![2, 4, 5, 180, 34, 2, 1, 1],
            _ => self.bytes(40).to_vec(),
        };
        options.resize(options.len().next_multiple_of(4).min(40), 0);
        options
    }

    /// Two bytes: 0x80 whether there is one, the flags, whether O is right, 0x40 whether twice; port, hops, A, a flip.
    fn redirect(&mut self, packet: Packet, ends: Ends) -> Packet {
        let [flags, more] = [self.byte(), self.byte()];
        if flags & 0x80 == 0 {
            return packet;
        }
        let right = observed_digest(ends.client);
        let option = RedirectOption {
            redirect: flags & 1 != 0,
            confirm: flags & 2 != 0,
            port: (flags & 4 != 0).then_some(PORTS[usize::from(more & 7)]),
            hops: more >> 3 & 7,
            observed: (flags & 8 != 0).then_some(if flags & 16 == 0 { right } else { !right }),
            address: (more & 0x40 != 0).then_some(ends.vip.ip()),
            token: (flags & 32 != 0).then_some([7; 8]),
        };
        let mut packet = packet;
        for _ in 0..=flags >> 6 & 1 {
            let _ = packet.insert_redirect_fitting(DEFAULT_EXID, &option, false, 65_535);
        }
        if more & 0x80 == 0 {
            return packet;
        }
        // A reserved bit in the last copy: behind its padding, kind, length and identifier.
        let at = packet.transport_offset() + 20 + option.padded_len() - option.len() + 5;
        let mut bytes = packet.bytes().to_vec();
        if let Some(byte) = bytes.get_mut(at) {
            *byte ^= 0x80;
        }
        finish(bytes, Offload::default()).unwrap_or(packet)
    }

    /// A segment from the client towards the VIP, or the other way: about ten bytes.
    pub(super) fn segment(&mut self, from_client: bool) -> Option<(Ends, Packet)> {
        let ends = self.ends();
        let (source, destination) =
            if from_client { (ends.client, ends.vip) } else { (ends.vip, ends.client) };
        let bare = Segment::bare(source, destination, self.flags());
        let (seq, ack) = (self.seq(), self.seq());
        let options = self.options();
        let segment = Segment { seq, ack, window: 64_240, options: &options, ..bare }.emit();
        let packet = self.redirect(segment, ends);
        let packet = self.tail(&packet)?;
        Some((ends, packet))
    }

    /// One byte: length of the payload (3 bits), 0x08 wrong checksum, 0x10 first fragment, 0x20 checksum left to the
    /// device, 0x40 super-packet, 0x80 IPv4 options or an IPv6 extension header.
    fn tail(&mut self, packet: &Packet) -> Option<Packet> {
        let byte = self.byte();
        let mut bytes = packet.bytes().to_vec();
        bytes.resize(bytes.len() + PAYLOADS[usize::from(byte & 7)], 0x61);
        let v4 = packet.version() == Version::V4;
        if byte & 0x80 != 0 && v4 {
            bytes[0] = 0x46;
            bytes.splice(20..20, [1, 1, 1, 1]);
        } else if byte & 0x80 != 0 {
            bytes.splice(40..40, [6, 0, 1, 4, 0, 0, 0, 0]);
            bytes[6] = 60;
        }
        let gso = (byte & 0x60 == 0x60).then_some(Gso {
            kind: if v4 { GsoKind::TcpV4 } else { GsoKind::TcpV6 },
            size: 1000,
            ecn: false,
        });
        let packet = finish(bytes, Offload { partial_checksum: byte & 0x20 != 0, gso })?;
        if byte & 0x18 == 0 {
            return Some(packet);
        }
        let mut bytes = packet.bytes().to_vec();
        if byte & 0x08 != 0 {
            let at = packet.transport_offset() + 16;
            bytes[at] ^= 0x55;
        }
        if byte & 0x10 != 0 && v4 {
            bytes[6] = 0x20;
            sum_header(&mut bytes);
        }
        Packet::parse(BytesMut::from(&bytes[..]), packet.offload()).ok()
    }

    /// An ICMP error about `quoted`: one byte, the kind (2 bits), how much is quoted (2), from whom (1).
    pub(super) fn icmp(&mut self, quoted: &Packet) -> Option<Packet> {
        let byte = self.byte();
        let v4 = quoted.version() == Version::V4;
        let kind = usize::from(byte & 3);
        let (kind, code) =
            if v4 { [(3, 4), (3, 1), (3, 3), (11, 0)][kind] } else { [(2, 0), (1, 0), (1, 4), (3, 0)][kind] };
        let header = quoted.transport_offset();
        let length =
            [header + 8, header + 7, header + 18, quoted.len().min(1232)][usize::from(byte >> 2 & 3)];
        let mut message = vec![kind, code, 0, 0, 0, 0, 5, 0];
        message.extend_from_slice(quoted.bytes().get(..length).unwrap_or(quoted.bytes()));
        let source = if byte & 0x10 == 0 { host(v4, 254) } else { quoted.destination() };
        (message.len() < 60_000).then(|| icmp_message(source, quoted.source(), &message))
    }

    /// Any bytes that happen to be a packet; lengths and checksums are made right if the first one is odd.
    pub(super) fn raw(&mut self) -> Option<Packet> {
        let repair = self.byte() & 1 != 0;
        let bytes = self.bytes(255).to_vec();
        if repair { finish(bytes, Offload::default()) } else { Packet::from_slice(&bytes).ok() }
    }

    /// One byte: how much later it is; four more where none of the usual steps is meant.
    pub(super) fn wait(&mut self) -> Duration {
        let byte = self.byte();
        let micros = match STEPS.get(usize::from(byte & 15)) {
            Some(micros) => *micros,
            None => u64::from(self.double()),
        };
        Duration::from_micros(micros)
    }
}

/// A packet for targets of other crates: one byte of kind (a segment from a client, one from a VIP, an ICMP error about
/// either, any bytes), then what it takes; see `fuzz/README.md`.
pub fn any_packet(data: &[u8]) -> Option<Packet> {
    let mut draw = Draw::new(data);
    let kind = draw.byte();
    match kind & 3 {
        0 => draw.segment(true).map(|(_, packet)| packet),
        1 => draw.segment(false).map(|(_, packet)| packet),
        2 => {
            let (_, quoted) = draw.segment(kind & 4 != 0)?;
            draw.icmp(&quoted)
        }
        _ if kind & 4 == 0 => draw.raw(),
        _ => finish(data.get(1..)?.to_vec(), Offload::default()),
    }
}

/// Makes the lengths and checksums of a packet right, or the checksum partial; `None` if it is none even so.
pub(super) fn finish(mut bytes: Vec<u8>, offload: Offload) -> Option<Packet> {
    let length = bytes.len();
    match bytes.first()? >> 4 {
        4 if length >= 20 => {
            bytes[2..4].copy_from_slice(&u16::try_from(length).ok()?.to_be_bytes());
            sum_header(&mut bytes);
        }
        6 if length >= 40 => {
            bytes[4..6].copy_from_slice(&u16::try_from(length - 40).ok()?.to_be_bytes());
        }
        _ => return None,
    }
    let packet = Packet::from_slice(&bytes).ok()?;
    let at = packet.transport_offset();
    let Some(field) = checksum_field(&packet) else {
        return Packet::parse(BytesMut::from(&bytes[..]), offload).ok();
    };
    let pseudo = match packet.icmp() {
        Some(_) if packet.version() == Version::V4 => Sum::new(),
        _ => {
            let number = packet.protocol().number();
            Sum::new().add_pseudo_header(packet.source(), packet.destination(), number, length - at)
        }
    };
    bytes[field..field + 2].fill(0);
    let sum = if offload.partial_checksum { pseudo.fold() } else { pseudo.add(&bytes[at..]).checksum() };
    let sum = if sum == 0 && packet.tcp().is_none() { 0xffff } else { sum };
    bytes[field..field + 2].copy_from_slice(&sum.to_be_bytes());
    Packet::parse(BytesMut::from(&bytes[..]), offload).ok()
}

fn checksum_field(packet: &Packet) -> Option<usize> {
    let at = packet.transport_offset();
    if packet.tcp().is_some() {
        Some(at + 16)
    } else if packet.icmp().is_some() {
        Some(at + 2)
    } else {
        packet.ports().map(|_| at + 6)
    }
}

/// Makes an IPv4 header checksum right, as far as the header is there.
fn sum_header(bytes: &mut [u8]) {
    let header = (usize::from(bytes[0] & 15) * 4).min(bytes.len());
    bytes[10..12].fill(0);
    let sum = Sum::new().add(&bytes[..header]).checksum();
    bytes[10..12].copy_from_slice(&sum.to_be_bytes());
}
