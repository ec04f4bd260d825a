//! The bodies of the fuzz targets `route`, `config` and `control` in `fuzz/`, here so that `cargo test` replays every corpus file
//! and every crash.

use std::net::Ipv4Addr;
use std::sync::LazyLock;

use bytes::BytesMut;
use shunt_host::Source;
use shunt_stack::fuzz::{Snapshot, any_packet};
use shunt_stack::time::Instant;
use shunt_stack::wire::{Offload, Packet, gue};

use crate::control::{Request, changed};
use crate::tunnel::{Hop, Tunnels};
use crate::{Balancer, Config, DropReason, Memory, Route, SelectKey};

const NETWORK: &str = r#"role = "balancer"
vips = ["203.0.113.10", "203.0.113.11", "2001:db8::a", "2001:db8::b"]
default_server = "web-2"

[[service]]
name = "web"
redirect_port = 443
protocols = ["tcp", "udp"]
policy = "random"

[[server]]
name = "web-1"
address = ["10.0.0.11", "fd00::11"]
weight = 3
ports = { web = 41001 }

[[server]]
name = "web-2"
address = "10.0.0.12"
ports = { web = 41002 }

[[server]]
name = "web-3"
address = ["10.0.0.13", "fd00::13"]
state = "drain"
ports = { web = 41003 }

[[protocol]]
number = 47
to = "balance"

[icmp]
echo = "answer"
v4 = { 13 = "balance" }

[limits]
fragments = 3
"#;

/// In `network` mode the VIP of an answer has to follow from its ports.
static NETWORK_OF_ONE: LazyLock<String> = LazyLock::new(|| {
    let of_one_vip = r#"vips = ["203.0.113.10", "2001:db8::a"]"#;
    let four = r#"vips = ["203.0.113.10", "203.0.113.11", "2001:db8::a", "2001:db8::b"]"#;
    NETWORK.replace(four, of_one_vip)
});

static BALANCERS: LazyLock<Vec<Balancer>> = LazyLock::new(|| {
    let direct = NETWORK
        .replace("default_server", "legacy = \"drop\"\nforward = \"direct\"\ndefault_server")
        .replace("[[server]]", "[[server]]\ndevice = \"eth0\"");
    let of = |text: &str| {
        let config = Config::parse(&Source::new("fuzz.toml", text)).unwrap_or_else(|error| panic!("{error}"));
        Balancer::new(&config, SelectKey([1; 16]))
    };
    let answering = NETWORK_OF_ONE.replace("[[service]]", "answer = \"balancer\"\n[[service]]");
    vec![of(&NETWORK_OF_ONE), of(&direct), of(&answering)]
});

static TUNNELLING: LazyLock<Balancer> = LazyLock::new(|| {
    let text = NETWORK.replace("default_server", "forward = \"gue\"\ndefault_server");
    let config = Config::parse(&Source::new("fuzz.toml", text)).unwrap_or_else(|error| panic!("{error}"));
    let hop = Hop { source: Ipv4Addr::new(10, 0, 0, 254).into(), mtu: 1500 };
    let hops = (11..=13).map(|last| (Ipv4Addr::new(10, 0, 0, last).into(), hop)).collect();
    Balancer::new(&config, SelectKey([1; 16])).through(Tunnels::new(&config, &hops))
});

/// Into a tunnel as it is, or not at all.
fn tunnelled(original: &Packet) {
    let mut packet = original.clone();
    let route = TUNNELLING.route(original);
    match (TUNNELLING.process(&mut packet), route) {
        (Ok(_), Ok(Route::ToServer { .. })) => {
            let inside = gue::payload(&packet.bytes()[28..]);
            assert_eq!(inside, Ok(original.bytes()));
        }
        (Ok(_), Ok(Route::Answer)) => {}
        _ => assert_eq!(&packet, original),
    }
    // With a memory: what is too big is answered by something smaller, and nothing is forgotten to be checked.
    let mut packet = original.clone();
    let mut memory = Memory::new(&TUNNELLING);
    if TUNNELLING.handle(&mut memory, Instant::ZERO, &mut packet).is_err() {
        assert_eq!(&packet, original);
    }
}

/// One packet through route and forward, in `network` mode with agents and without, in `direct` and in `gue` mode, and
/// then whatever the bytes are as one that
/// cannot be read (`B4`).
///
/// # Panics
/// If the same packet is routed in two ways (`B6`), also after fragments (§9), a right checksum becomes wrong, the packet
/// grows, one that is dropped or carried in `direct` mode is changed, or more is remembered than allowed.
pub fn route(data: &[u8]) {
    let packet = any_packet(data);
    if let Some(packet) = &packet {
        tunnelled(packet);
    }
    for (index, balancer) in BALANCERS.iter().enumerate() {
        if let Some(packet) = &packet {
            routed(balancer, packet, index == 1);
            in_fragments(balancer, packet, data);
        }
        unreadable(balancer, data);
    }
}

fn routed(balancer: &Balancer, original: &Packet, direct: bool) {
    let route = balancer.route(original);
    assert_eq!(balancer.route(original), route, "B6: {original:?}");
    let snapshot = Snapshot::of(original);
    let mut packet = original.clone();
    let output = balancer.process(&mut packet);
    let answered = answers(route);
    check(&snapshot, &packet, answered);
    assert!(route.is_ok() || output.is_err());
    if output.is_err() || direct && !answered {
        assert_eq!(&packet, original);
    }
    let ports = original.ports().map(|(from, to)| if answered { (to, from) } else { (from, to) });
    assert_eq!(packet.ports(), ports, "ports are never translated");
}

/// Whether a packet is not passed on but answered.
fn answers(route: Result<Route, DropReason>) -> bool {
    matches!(route, Ok(Route::Answer | Route::Redirect { .. }))
}

/// What was passed on is as right as it was; an answer is right.
fn check(snapshot: &Snapshot, packet: &Packet, answer: bool) {
    if answer {
        // An answer to a SYN says what a SYN-ACK has to say, and no more.
        let most = snapshot.before().len().max(100);
        assert!(packet.checksum_ok() && packet.len() <= most);
        assert_eq!(packet.source(), snapshot.before().destination());
    } else {
        // Nothing grows but SYN-ACKs that get C.
        let syn_ack = snapshot.before().tcp().is_some_and(|tcp| tcp.is_syn_ack());
        snapshot.check(packet, if syn_ack { 1500 } else { 0 });
    }
}

/// The packet cut into fragments at places that the bytes choose, handled in an order that they choose, then the packet
/// itself again.
fn in_fragments(balancer: &Balancer, original: &Packet, data: &[u8]) {
    let mut memory = Memory::new(balancer);
    let alone = balancer.route(original);
    let Some((&first, rest)) = data.split_last() else { return };
    let size = usize::from(first % 16 + 1) * 8;
    let parts = fragments(original, size);
    for (step, choice) in rest.iter().rev().take(16).enumerate() {
        let now = Instant::from_millis(step as u64 * u64::from(choice % 4) * 1000);
        let Some(part) = parts.get(usize::from(choice >> 2) % parts.len().max(1)) else { return };
        let mut packet = part.clone();
        let snapshot = Snapshot::of(&packet);
        let result = balancer.handle(&mut memory, now, &mut packet);
        check(&snapshot, &packet, result.is_ok() && answers(balancer.route(part)));
        if result.is_err() {
            assert_eq!(&packet, part, "dropped and changed");
        }
        assert!(memory.fragments() <= 3, "{} datagrams remembered", memory.fragments());
    }
    assert_eq!(balancer.route(original), alone, "B6: fragments changed a decision");
}

/// The fragments of a packet without any of its own, as IPv4 and IPv6 routers and hosts make them.
fn fragments(packet: &Packet, size: usize) -> Vec<Packet> {
    let (header, data) = packet.bytes().split_at(packet.transport_offset());
    if packet.fragment().is_some() || packet.offload() != Offload::default() || header.len() > 60 {
        return Vec::new();
    }
    let count = data.len().div_ceil(size);
    let part = |(index, data): (usize, &[u8])| {
        let (offset, more) = (index * size, index + 1 < count);
        let mut bytes = header.to_vec();
        if packet.source().is_ipv4() {
            let total = (header.len() + data.len()) as u16;
            bytes[2..4].copy_from_slice(&total.to_be_bytes());
            bytes[6..8].copy_from_slice(&((offset / 8) as u16 | (u16::from(more) << 13)).to_be_bytes());
        } else {
            // In front of what followed the fixed header.
            let next = std::mem::replace(&mut bytes[6], 44);
            let length = (header.len() - 40 + 8 + data.len()) as u16;
            bytes[4..6].copy_from_slice(&length.to_be_bytes());
            let field = (offset as u16 | u16::from(more)).to_be_bytes();
            bytes.splice(40..40, [next, 0, field[0], field[1], 0, 0, 0, 7]);
        }
        bytes.extend_from_slice(data);
        Packet::from_slice(&bytes).ok()
    };
    data.chunks(size).enumerate().filter_map(part).collect()
}

fn unreadable(balancer: &Balancer, data: &[u8]) {
    let Err(rejected) = Packet::parse(BytesMut::from(data), Offload::default()) else { return };
    let Ok(mut packet) = Packet::parse_opaque(rejected.buffer) else { return };
    let length = packet.len();
    if let Ok(route) = balancer.route_unreadable(&packet, rejected.error) {
        let _ = balancer.forward(route, &mut packet);
    }
    assert_eq!(packet.len(), length);
}

/// A text as a configuration: refused with a sentence, or a balancer.
///
/// # Panics
/// If reading it does.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match Config::parse(&Source::new("fuzz.toml", text)) {
        Ok(config) if config.vips().len() <= 4 && config.services().len() <= 16 => {
            drop(Balancer::new(&config, SelectKey([1; 16])));
        }
        Ok(_) => {}
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// A line as a request of the control socket: refused with a sentence, or what it makes of a configuration is.
///
/// # Panics
/// If reading or making it does, or a change that is taken does not say in its text what it is.
pub fn control(data: &[u8]) {
    let Ok(line) = std::str::from_utf8(data) else { return };
    let edit = match Request::parse(line) {
        Ok(request) => request.edit(),
        Err(reason) => return assert!(!reason.is_empty()),
    };
    let Some(edit) = edit else { return };
    let before = Config::parse(&Source::new("fuzz.toml", NETWORK_OF_ONE.as_str()))
        .unwrap_or_else(|error| panic!("{error}"));
    match changed(&before, &edit) {
        Ok(after) => {
            let again = Config::parse(&Source::new("fuzz.toml", after.text()));
            assert_eq!(again.as_ref(), Ok(&after), "{edit:?}");
        }
        Err(reason) => assert!(!reason.is_empty()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    fn replay(kind: &str, target: &str, body: fn(&[u8])) -> usize {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz").join(kind).join(target);
        let entries = fs::read_dir(&folder).unwrap_or_else(|error| {
            panic!("{}: {error}; fuzz/ of the repository has to be there", folder.display())
        });
        let files = entries.map(|entry| entry.unwrap().path());
        let files: Vec<_> = files.filter(|path| path.extension().is_none_or(|ext| ext != "md")).collect();
        for file in &files {
            let bytes = fs::read(file).unwrap();
            assert!(
                std::panic::catch_unwind(|| body(&bytes)).is_ok(),
                "{target} breaks on {}",
                file.display()
            );
        }
        files.len()
    }

    #[test]
    fn every_corpus_file_and_crash_passes_its_target() {
        for (target, body) in
            [("route", super::route as fn(&[u8])), ("config", super::config), ("control", super::control)]
        {
            assert!(replay("corpus", target, body) > 0, "fuzz/corpus/{target} is empty");
            replay("crashes", target, body);
        }
    }
}
