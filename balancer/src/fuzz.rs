//! The bodies of the fuzz targets `route` and `config` in `fuzz/`, here so that `cargo test` replays every corpus file
//! and every crash.

use std::sync::LazyLock;

use bytes::BytesMut;
use shunt_host::Source;
use shunt_stack::fuzz::{Snapshot, any_packet};
use shunt_stack::wire::{Offload, Packet};

use crate::{Balancer, Config, SelectKey};

const NETWORK: &str = r#"role = "balancer"
vips = ["203.0.113.10", "203.0.113.11", "2001:db8::a", "2001:db8::b"]
default_server = "web-2"

[[service]]
name = "web"
redirect_port = 443
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
"#;

static BALANCERS: LazyLock<Vec<Balancer>> = LazyLock::new(|| {
    let of_one_vip = r#"vips = ["203.0.113.10", "2001:db8::a"]"#;
    let four = r#"vips = ["203.0.113.10", "203.0.113.11", "2001:db8::a", "2001:db8::b"]"#;
    let network = NETWORK.replace(four, of_one_vip);
    let direct = NETWORK
        .replace("default_server", "legacy = \"drop\"\nforward = \"direct\"\ndefault_server")
        .replace("[[server]]", "[[server]]\ndevice = \"eth0\"");
    let of = |text: &str| {
        let config = Config::parse(&Source::new("fuzz.toml", text)).unwrap_or_else(|error| panic!("{error}"));
        Balancer::new(&config, SelectKey([1; 16]))
    };
    vec![of(&network), of(&direct)]
});

/// One packet through route and forward, in `network` and in `direct` mode, and then whatever the bytes are as one that
/// cannot be read (`B4`).
///
/// # Panics
/// If the same packet is routed in two ways (`B6`), a right checksum becomes wrong, the packet grows, or one that is
/// dropped or carried in `direct` mode is changed.
pub fn route(data: &[u8]) {
    let packet = any_packet(data);
    for (index, balancer) in BALANCERS.iter().enumerate() {
        if let Some(packet) = &packet {
            routed(balancer, packet, index == 1);
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
    snapshot.check(&packet, 0);
    assert!(route.is_ok() || output.is_err());
    if direct || output.is_err() {
        assert_eq!(&packet, original);
    }
    assert_eq!(packet.ports(), original.ports(), "ports are never translated");
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
        for (target, body) in [("route", super::route as fn(&[u8])), ("config", super::config)] {
            assert!(replay("corpus", target, body) > 0, "fuzz/corpus/{target} is empty");
            replay("crashes", target, body);
        }
    }
}
