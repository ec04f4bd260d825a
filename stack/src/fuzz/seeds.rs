//! Where fuzzing starts from: the packets of real connections, and scripts of whole handshakes.

use std::net::{IpAddr, SocketAddr};

use crate::wire::{
    DEFAULT_EXID, Gso, GsoKind, Offload, Packet, RedirectOption, Segment, SeqNumber, TcpFlags, icmp_message,
    write_vnet,
};

/// One file of `fuzz/corpus`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seed {
    /// The target whose body reads it.
    pub target: &'static str,
    /// The file's name.
    pub name: String,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// All seeds; `cargo run --example seeds` in `fuzz/` writes them.
pub fn seeds() -> Vec<Seed> {
    let packets = packets().into_iter().map(|(name, bytes)| Seed { target: "packet", name, bytes });
    let options = options().into_iter().map(|(name, bytes)| Seed { target: "option", name, bytes });
    let mut all: Vec<Seed> = packets.chain(options).collect();
    // Target `route` reads them behind one byte: lengths and checksums made right.
    let routed = all.iter().filter(|seed| seed.target == "packet").map(|seed| Seed {
        target: "route",
        name: seed.name.clone(),
        bytes: [&[7], &seed.bytes[HEADER.len()..]].concat(),
    });
    let routed: Vec<Seed> = routed.collect();
    all.extend(routed);
    let data = all.iter().filter(|seed| seed.target == "packet" && seed.name.starts_with("data"));
    let given = data.flat_map(|seed| {
        [("super", true), ("partial", false)].map(|(kind, cut)| Seed {
            target: "packet",
            name: seed.name.replace("data", kind),
            bytes: behind_header(&seed.bytes[HEADER.len()..], cut),
        })
    });
    let given: Vec<Seed> = given.collect();
    all.extend(given);
    for v6 in [false, true] {
        let script = |target, (name, steps): (&str, Vec<u8>)| Seed {
            target,
            name: format!("{name}-{}", if v6 { "v6" } else { "v4" }),
            bytes: steps,
        };
        let s = Script { v6 };
        for (name, kind, port, flags, redirect) in [
            ("asks", 0, X, SYN, [R, 0]),
            ("probe", 0, Y, SYN, [R | P, X]),
            ("segment", 0, Y, DATA, [0, 0]),
            ("from-service", 1, Y, DATA, [0, 0]),
            ("error", 2, Y, DATA, [0, 0]),
            ("error-of-client", 6, Y, DATA, [0, 0]),
        ] {
            let segment = s.segment(port, flags, ISS, IRS, redirect);
            all.push(script("route", (name, [&[kind], &segment[..], &[12]].concat())));
        }
        all.extend(client_scripts(Script { v6 }).into_iter().map(|steps| script("client", steps)));
        all.extend(move_scripts(Script { v6 }).into_iter().map(|steps| script("client", steps)));
        all.extend(server_scripts(Script { v6 }).into_iter().map(|steps| script("server", steps)));
    }
    all
}

const LINUX_SYN: [u8; 20] = [2, 4, 5, 180, 4, 2, 8, 10, 0, 0, 0, 77, 0, 0, 0, 0, 1, 3, 3, 7];
const TIMESTAMPS: [u8; 12] = [1, 1, 8, 10, 0, 0, 0, 78, 0, 0, 0, 77];
/// The header of target `packet`: no mode, a port, an address.
const HEADER: [u8; 9] = [0, 0x29, 0xa0, 0, 0, 9, 0, 2, 10];

fn redirects() -> [(&'static str, RedirectOption); 5] {
    let none = RedirectOption::default();
    [
        ("r", RedirectOption { redirect: true, ..none }),
        ("rc", RedirectOption { redirect: true, confirm: true, ..none }),
        ("cpo", RedirectOption { confirm: true, port: Some(41_001), observed: Some(0xbeef), ..none }),
        ("rp", RedirectOption { redirect: true, port: Some(443), hops: 1, ..none }),
        (
            "cpot",
            RedirectOption {
                confirm: true,
                port: Some(41_001),
                observed: Some(1),
                token: Some([7; 8]),
                ..none
            },
        ),
    ]
}

fn options() -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    for (name, option) in redirects() {
        let mut out = [0; 36];
        let used = option.emit(DEFAULT_EXID, &mut out);
        all.push((format!("bare-{name}"), out[used - option.len()..used].to_vec()));
    }
    // Flags, hops and O, value, control, MTU, other options, payload.
    for (name, others) in [
        ("none", &[][..]),
        ("syn", &LINUX_SYN),
        ("data", &TIMESTAMPS),
        ("nop", &[1; 40]),
        ("bad", &[5, 0, 0, 0]),
    ] {
        let length = others.len() as u8;
        let head = [0x0f, 0x0a, 0x29, 0xa0, 0xbe, 0xef, 0x02, 188, length];
        all.push((format!("with-{name}"), [&head[..], others, &[3, 1, 2, 3]].concat()));
    }
    let mut twice = vec![0x05, 0, 1, 1, 0, 0, 0x82, 255, 16];
    for _ in 0..2 {
        twice.extend([253, 8, 0x52, 0x44, 1, 0, 0, 0]);
    }
    all.push(("with-copies".into(), twice));
    all
}

/// A segment as a TUN device gives it: the checksum left to others, and perhaps to be cut into pieces of 8 bytes.
fn behind_header(bytes: &[u8], cut: bool) -> Vec<u8> {
    let kind = if bytes[0] >> 4 == 4 { GsoKind::TcpV4 } else { GsoKind::TcpV6 };
    let gso = cut.then_some(Gso { kind, size: 8, ecn: false });
    let packet = super::draw::finish(bytes.to_vec(), Offload { partial_checksum: true, gso });
    let packet = packet.expect("a seed parses");
    [&[64], &HEADER[1..], &write_vnet(&packet), packet.bytes()].concat()
}

fn packets() -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<(String, Vec<u8>)> = Vec::new();
    for (family, client, vip, router) in [
        ("v4", "10.1.0.2:50000", "203.0.113.10:443", "192.0.2.1"),
        ("v6", "[2001:db8:1::2]:50000", "[2001:db8::10]:443", "2001:db8:ff::1"),
    ] {
        let (Ok(client), Ok(vip), Ok(router)) = (client.parse(), vip.parse(), router.parse()) else {
            continue;
        };
        let mut put = |name: &str, bytes: &[u8]| {
            all.push((format!("{name}-{family}"), [&HEADER[..], bytes].concat()));
        };
        connection(&mut put, client, vip, router);
        fragments(&mut put, &udp(client, vip));
    }
    all
}

/// One of each message of a connection, and the errors about it.
fn connection(put: &mut impl FnMut(&str, &[u8]), client: SocketAddr, vip: SocketAddr, router: IpAddr) {
    let syn = Segment {
        seq: SeqNumber(1000),
        window: 64_240,
        options: &LINUX_SYN,
        ..Segment::bare(client, vip, TcpFlags::SYN)
    }
    .emit();
    put("syn", syn.bytes());
    for (name, option) in redirects() {
        let mut marked = syn.clone();
        if marked.insert_redirect(DEFAULT_EXID, &option, 1500).is_ok() {
            put(&format!("syn-{name}"), marked.bytes());
        }
    }
    let bare = Segment::bare(vip, client, TcpFlags::SYN | TcpFlags::ACK);
    let mut syn_ack =
        Segment { seq: SeqNumber(9000), ack: SeqNumber(1001), options: &LINUX_SYN, ..bare }.emit();
    put("syn-ack", syn_ack.bytes());
    let _ = syn_ack.insert_redirect(DEFAULT_EXID, &redirects()[2].1, 1500);
    put("syn-ack-cpo", syn_ack.bytes());
    let bare = Segment::bare(client, vip, TcpFlags::ACK | TcpFlags::PSH);
    let data = Segment { seq: SeqNumber(1001), ack: SeqNumber(9001), options: &TIMESTAMPS, ..bare };
    put("data", Segment { payload: b"GET / HTTP/1.1\r\n\r\n", ..data }.emit().bytes());
    put("rst", Segment::bare(client, vip, TcpFlags::RST).emit().bytes());
    let v4 = client.is_ipv4();
    let too_big: [u8; 8] = if v4 { [3, 4, 0, 0, 0, 0, 5, 0] } else { [2, 0, 0, 0, 0, 0, 5, 0] };
    let header = syn.transport_offset();
    for (name, length) in [("short", header + 8), ("long", syn.len())] {
        let message = [&too_big[..], &syn.bytes()[..length]].concat();
        put(&format!("too-big-{name}"), icmp_message(router, client.ip(), &message).bytes());
    }
    let about_udp = [&too_big[..], &udp(client, vip)].concat();
    put("too-big-udp", icmp_message(router, client.ip(), &about_udp).bytes());
    let echo: [u8; 8] = if v4 { [8, 0, 0, 0, 0, 1, 0, 1] } else { [128, 0, 0, 0, 0, 1, 0, 1] };
    put("echo", icmp_message(client.ip(), vip.ip(), &echo).bytes());
    put("udp", &udp(client, vip));
}

/// A datagram with a right checksum.
fn udp(client: SocketAddr, vip: SocketAddr) -> Vec<u8> {
    let message = [0xc3, 0x50, 0x01, 0xbb, 0, 16, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
    let template = icmp_message(client.ip(), vip.ip(), &message);
    let mut bytes = template.bytes().to_vec();
    bytes[if client.is_ipv4() { 9 } else { 6 }] = 17;
    super::draw::finish(bytes, Offload::default()).map(Packet::into_buffer).unwrap_or_default().to_vec()
}

/// The first and the last piece of a datagram, and one behind extension headers.
fn fragments(put: &mut impl FnMut(&str, &[u8]), datagram: &[u8]) {
    if datagram[0] >> 4 == 4 {
        for (name, field) in [("first-fragment", [0x20, 0]), ("last-fragment", [0, 2])] {
            let mut bytes = datagram.to_vec();
            bytes[6..8].copy_from_slice(&field);
            put(
                name,
                &super::draw::finish(bytes, Offload::default()).map_or_else(Vec::new, |p| p.bytes().to_vec()),
            );
        }
        return;
    }
    for (name, field) in [("first-fragment", [0, 1]), ("last-fragment", [0, 0x10])] {
        let header = [17, 0, field[0], field[1], 0, 0, 0, 9];
        let mut bytes = [&datagram[..40], &header, &datagram[40..]].concat();
        bytes[5] += 8;
        bytes[6] = 44;
        put(name, &bytes);
    }
    let mut bytes =
        [&datagram[..40], &[60, 0, 1, 4, 0, 0, 0, 0, 17, 0, 1, 4, 0, 0, 0, 0], &datagram[40..]].concat();
    bytes[5] += 16;
    bytes[6] = 0;
    put("extension-headers", &bytes);
}

/// Writes steps as `draw` and the two machines' targets read them.
#[derive(Clone, Copy)]
struct Script {
    v6: bool,
}

// Indices into the tables of `draw`.
const X: u8 = 0;
const Y: u8 = 2;
const Y2: u8 = 3;
const DENIED: u8 = 5;
const SYN: u8 = 0;
const SYN_ACK: u8 = 1;
const ACK: u8 = 2;
const DATA: u8 = 3;
const FIN: u8 = 4;
const RST: u8 = 5;
const RST_ACK: u8 = 6;
const ISS: u8 = 0;
const ISS2: u8 = 1;
const IRS: u8 = 2;
const IRS2: u8 = 3;
/// One further.
const NEXT: u8 = 1 << 2;
/// Ten bytes of payload further.
const LATER: u8 = 3 << 2;
// Flags of the option's first byte.
const R: u8 = 0x81;
const C: u8 = 0x82;
const P: u8 = 0x84;
const O: u8 = 0x88;

impl Script {
    fn segment(self, port: u8, flags: u8, seq: u8, ack: u8, redirect: [u8; 2]) -> [u8; 9] {
        let ends = port << 2 | if self.v6 { 0x80 } else { 0 };
        let options = if flags < 2 { 1 } else { 2 };
        let times = if flags == SYN { 8 } else { 1 };
        let payload = if flags == DATA { 4 } else { 0 };
        [ends, flags, seq, ack, options, times, redirect[0], redirect[1], payload]
    }

    fn local(self, flags: u8, seq: u8, ack: u8) -> Vec<u8> {
        [&[0][..], &self.segment(X, flags, seq, ack, [0, 0])].concat()
    }

    fn remote(self, port: u8, flags: u8, seq: u8, ack: u8, redirect: [u8; 2]) -> Vec<u8> {
        [&[4][..], &self.segment(port, flags, seq, ack, redirect)].concat()
    }

    fn syn(self) -> Vec<u8> {
        self.local(SYN, ISS, 0)
    }

    /// From X: C P=Y O, O right.
    fn redirect(self) -> Vec<u8> {
        self.remote(X, SYN_ACK, IRS, ISS | NEXT, [C | P | O, Y])
    }

    fn confirm(self) -> Vec<u8> {
        self.remote(Y, SYN_ACK, IRS2, ISS | NEXT, [C, 0])
    }

    fn ack(self) -> Vec<u8> {
        self.local(ACK, ISS | NEXT, IRS | NEXT)
    }

    fn data(self) -> Vec<u8> {
        self.local(DATA, ISS | NEXT, IRS | NEXT)
    }

    fn service_data(self) -> Vec<u8> {
        self.remote(Y, DATA, IRS | NEXT, ISS | LATER, [0, 0])
    }
}

/// Configuration: the continuations of the two VIPs, then flows and MTU.
const AUTO: [u8; 2] = [0, 7];
const HANDOVER: [u8; 2] = [1, 7];
const WAIT_1_MS: [u8; 2] = [8, 2];
const WAIT_50_MS: [u8; 2] = [8, 3];
const WAIT_1_S: [u8; 2] = [8, 5];
const WAIT_20_S: [u8; 2] = [8, 6];
const WAIT_700_S: [u8; 2] = [8, 7];
const RESTART: [u8; 1] = [14];
const RETAIN_NONE: [u8; 2] = [12, 0];
/// An error about the latest packet sent: unreachable, 8 bytes quoted; too big.
const UNREACHABLE: [u8; 3] = [9, 7, 1];
const TOO_BIG: [u8; 3] = [9, 0, 8];

/// Redirects are followed.
const FOLLOW: [u8; 2] = [0, 7 | 1 << 5];

/// §4 and §5: a connection that moves to another server, and one that changes its own port.
fn move_scripts(s: Script) -> Vec<(&'static str, Vec<u8>)> {
    let script = |config: [u8; 2], steps: &[&[u8]]| [&config[..], &steps.concat()].concat();
    let ends = |port: u8, own: u8| port << 2 | own | if s.v6 { 0x80 } else { 0 };
    let established = [
        s.syn(),
        WAIT_1_MS.to_vec(),
        s.redirect(),
        s.confirm(),
        s.local(ACK, ISS | NEXT, IRS2 | NEXT),
        s.local(DATA, ISS | NEXT, IRS2 | NEXT),
    ]
    .concat();
    let asked = s.remote(Y, ACK, IRS2 | NEXT, ISS | LATER, [R | P, Y2]);
    let expected = [0x10, ends(X, 0), 1];
    let of_next = |mut step: Vec<u8>, port: u8| {
        step[1] = ends(port, 1);
        step
    };
    let opened = of_next(s.syn(), Y2);
    let answered = |redirect| of_next(s.remote(Y2, SYN_ACK, IRS, ISS | NEXT, redirect), Y2);
    let (closes, fin) = ([0x11, ends(X, 0), 0], s.local(FIN, ISS | LATER, IRS2 | NEXT));
    // Own port 41,001, which the tables of ports hold, too.
    let rebinds = [0x13, ends(X, 0), 3];
    let confirmed = s.remote(Y, ACK, IRS2 | NEXT, ISS | LATER, [C | P, Y]);
    vec![
        (
            "move",
            script(
                FOLLOW,
                &[&established, &asked, &expected, &opened, &answered([C, 0]), &closes, &fin, &RETAIN_NONE],
            ),
        ),
        ("move-refused", script(FOLLOW, &[&established, &asked, &expected, &opened, &answered([0, 0])])),
        ("hint", script(AUTO, &[&established, &asked, &asked, &fin])),
        ("rebind", script(AUTO, &[&established, &rebinds, &WAIT_1_S, &confirmed, &s.data(), &fin])),
        ("rebind-silence", script(AUTO, &[&established, &rebinds, &WAIT_20_S, &s.data()])),
    ]
}

fn client_scripts(s: Script) -> Vec<(&'static str, Vec<u8>)> {
    let script = |config: [u8; 2], steps: &[&[u8]]| [&config[..], &steps.concat()].concat();
    let refused = s.remote(X, SYN_ACK, IRS, ISS | NEXT, [C | P | O, DENIED]);
    let unmarked = s.remote(X, SYN_ACK, IRS, ISS | NEXT, [0, 0]);
    let other = s.remote(X, SYN_ACK, IRS2, ISS | NEXT, [0, 0]);
    let wrong_digest = s.remote(X, SYN_ACK, IRS, ISS | NEXT, [C | P | O | 16, Y]);
    let again_elsewhere = s.remote(Y, SYN_ACK, IRS2, ISS | NEXT, [C | P, Y2]);
    let bare_ack = s.remote(Y, ACK, IRS, ISS2, [0, 0]);
    let reset = s.remote(Y, RST_ACK, IRS, ISS | NEXT, [0, 0]);
    let handed = [s.syn(), WAIT_1_MS.to_vec(), s.redirect(), s.ack()].concat();
    let moved = [s.syn(), WAIT_1_MS.to_vec(), s.redirect(), s.confirm()].concat();
    let next_flow = s.local(SYN, ISS2, 0);
    let next_redirect = s.remote(X, SYN_ACK, IRS, ISS2 | NEXT, [C | P | O, Y]);
    vec![
        (
            "reconnect",
            script(AUTO, &[&moved, &s.ack(), &s.data(), &s.local(FIN, ISS | LATER, IRS), &RETAIN_NONE]),
        ),
        ("reconnect-restart", script(AUTO, &[&moved, &RESTART, &s.data(), &s.redirect(), &TOO_BIG])),
        (
            "reconnect-silence",
            script(AUTO, &[&s.syn(), &s.redirect(), &WAIT_1_S, &WAIT_1_S, &WAIT_1_S, &other]),
        ),
        ("reconnect-refused", script(AUTO, &[&s.syn(), &s.redirect(), &reset, &other, &s.ack()])),
        ("reconnect-unreachable", script(AUTO, &[&s.syn(), &s.redirect(), &UNREACHABLE, &other])),
        ("reconnect-old-connection", script(AUTO, &[&s.syn(), &s.redirect(), &bare_ack, &s.confirm()])),
        ("reconnect-twice", script(AUTO, &[&s.syn(), &s.redirect(), &again_elsewhere, &s.syn()])),
        ("translated", script(AUTO, &[&s.syn(), &wrong_digest, &s.confirm(), &WAIT_700_S, &next_flow])),
        ("handover", script(HANDOVER, &[&handed, &s.data(), &s.service_data(), &s.data()])),
        ("handover-restart", script(HANDOVER, &[&handed, &RESTART, &s.service_data(), &s.data()])),
        ("handover-data-first", script(HANDOVER, &[&s.syn(), &s.redirect(), &s.data(), &s.redirect()])),
        ("handover-probe", script(HANDOVER, &[&handed, &WAIT_50_MS, &bare_ack, &WAIT_1_S])),
        (
            "handover-probe-answered",
            script(HANDOVER, &[&handed, &s.redirect(), &s.remote(Y, ACK, IRS | NEXT, ISS | NEXT, [0, 0])]),
        ),
        (
            "handover-ack-lost",
            script(
                HANDOVER,
                &[
                    &handed,
                    &s.data(),
                    &WAIT_50_MS,
                    &s.remote(Y, SYN_ACK, IRS, ISS | NEXT, [C, 0]),
                    &s.service_data(),
                ],
            ),
        ),
        ("handover-silence", script(HANDOVER, &[&handed, &WAIT_1_S, &WAIT_20_S, &WAIT_20_S])),
        ("handover-reset", script(HANDOVER, &[&handed, &s.local(RST, ISS | NEXT, IRS), &RETAIN_NONE])),
        (
            "handover-loser",
            script(HANDOVER, &[&handed, &s.remote(X, SYN_ACK, IRS2, ISS | NEXT, [C | P | O, Y2])]),
        ),
        ("learnt-handover", script(AUTO, &[&moved, &RETAIN_NONE, &next_flow, &next_redirect, &WAIT_50_MS])),
        ("unconfirmed", script(AUTO, &[&s.syn(), &unmarked, &other, &s.ack(), &WAIT_700_S, &next_flow])),
        ("echoed", script(AUTO, &[&s.syn(), &s.remote(X, SYN_ACK, IRS, ISS | NEXT, [R | C, 0]), &other])),
        ("refused", script(AUTO, &[&s.syn(), &refused, &other])),
        (
            "confirmed",
            script(
                AUTO,
                &[&s.syn(), &s.remote(X, SYN_ACK, IRS, ISS | NEXT, [C, 0]), &s.ack(), &s.redirect()],
            ),
        ),
        ("silence", script(AUTO, &[&s.syn(), &WAIT_1_S, &s.syn(), &WAIT_1_S, &s.syn(), &unmarked])),
        ("stray", script(AUTO, &[&s.service_data(), &s.redirect(), &s.data(), &s.local(RST, ISS, IRS)])),
    ]
}

fn server_scripts(s: Script) -> Vec<(&'static str, Vec<u8>)> {
    let script = |steps: &[&[u8]]| [&[0xff, 0][..], &steps.concat()].concat();
    let from_client = |port, flags, redirect| [&[0][..], &s.segment(port, flags, ISS, 0, redirect)].concat();
    let syn_ack = |port| s.remote(port, SYN_ACK, IRS, ISS | NEXT, [0, 0]);
    let ends = |port: u8| port << 2 | if s.v6 { 0x80 } else { 0 };
    let asks = from_client(X, SYN, [R, 0]);
    let wait_64_s: [u8; 4] = [7, 6, 7, 7];
    let established = |flags, redirect| {
        let segment = s.segment(Y, flags, ISS | NEXT, IRS | NEXT, redirect);
        [&[0][..], &segment].concat()
    };
    let own_ack = s.remote(Y, ACK, IRS | NEXT, ISS | NEXT, [0, 0]);
    let redirect = [0x11, ends(Y), Y2];
    let knowing = |steps: &[&[u8]]| [&[0xff, 4][..], &steps.concat()].concat();
    vec![
        (
            "redirect",
            script(&[
                &redirect,
                &own_ack,
                &established(FIN, [C | P, Y2]),
                &s.remote(Y, ACK, IRS | NEXT, ISS | 2 << 2, [0, 0]),
            ]),
        ),
        ("redirect-reset", script(&[&redirect, &established(RST, [C | P, Y2])])),
        ("redirect-given-up", script(&[&redirect, &own_ack, &[7, 6, 7, 6], &own_ack])),
        ("rebound", knowing(&[&established(ACK, [R | P, Y]), &own_ack, &established(DATA, [R | P, Y])])),
        ("turned", script(&[&asks, &syn_ack(Y), &from_client(Y, DATA, [R | C | P, X]), &syn_ack(Y)])),
        (
            "answered",
            script(&[&from_client(X, SYN, [R | C, 0]), &from_client(Y, SYN, [R | P, X]), &syn_ack(Y)]),
        ),
        ("repeated", script(&[&asks, &asks, &from_client(Y, SYN, [R | P, X]), &asks, &syn_ack(Y)])),
        ("plain", script(&[&asks, &from_client(Y, SYN, [0, 0]), &syn_ack(Y)])),
        ("elsewhere", script(&[&[12, ends(X), Y2], &asks, &from_client(X, SYN, [R | C, 2 << 3])])),
        ("deaf", script(&[&[11, ends(Y), 0], &asks, &from_client(X, SYN, [R | C, 0]), &syn_ack(Y)])),
        ("hops", script(&[&from_client(X, SYN, [R | C, 7 << 3]), &from_client(X, SYN, [R, 3 << 3])])),
        ("no-room", script(&[&asks, &[4, ends(Y), SYN_ACK, IRS, ISS | NEXT, 7, 0, 40], &[1; 40], &[0; 3]])),
        ("icmp", script(&[&asks, &syn_ack(Y), &[8, 0, 0], &[8, 0, 12]])),
        ("expired", script(&[&asks, &wait_64_s, &syn_ack(Y)])),
        ("reload", script(&[&asks, &[13, 0xff], &syn_ack(Y), &[13, 0], &syn_ack(Y)])),
        ("owed", script(&[&[14], &s.segment(Y, SYN, ISS2, 0, [0, 0]), &[1, 0, 0, 0, 0]])),
        (
            "bad-option",
            script(&[&from_client(X, SYN, [R | C, 0x80]), &from_client(X, SYN, [R | C | 0x40, 0])]),
        ),
    ]
}
