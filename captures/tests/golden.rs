//! The captures of `captures/golden`: what is there is what the code makes and says now.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use shunt_captures::golden::{self, Golden};
use shunt_captures::{Frame, Reader, Summary};
use shunt_stack::wire::DEFAULT_EXID;

const AGAIN: &str = "write it with `cargo run --release -p shunt-captures --example golden`";

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden")
}

#[test]
fn n6_the_captures_are_those_that_the_code_makes_byte_for_byte() {
    let all = golden::make();
    for golden in &all {
        let committed = fs::read(folder().join(&golden.name)).unwrap_or_default();
        assert!(committed == golden.bytes, "{}: {AGAIN}", golden.name);
        assert!(golden.bytes.len() < 16_384, "{}: {} bytes", golden.name, golden.bytes.len());
    }
    let text = |name: &str| fs::read_to_string(folder().join(name)).unwrap_or_default();
    assert_eq!(text("README.md"), golden::readme(&all), "README.md: {AGAIN}");
    for (name, config) in golden::CONFIGS {
        assert_eq!(text(name), config, "{name}: {AGAIN}");
    }
    // Nothing else is there.
    let expected: BTreeSet<String> = all
        .iter()
        .flat_map(|golden| [golden.name.clone(), format!("{}.expect", golden.name)])
        .chain(golden::CONFIGS.iter().map(|(name, _)| (*name).to_owned()))
        .chain(["README.md".to_owned()])
        .collect();
    let there = fs::read_dir(folder()).unwrap();
    let there: BTreeSet<String> =
        there.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(there, expected);
}

#[test]
fn n6_replay_says_what_is_expected_and_sends_what_was_sent() {
    for golden in golden::make() {
        let (text, replay) = golden.replayed();
        let expect = fs::read_to_string(folder().join(format!("{}.expect", golden.name))).unwrap();
        assert!(text == expect, "{}: {AGAIN}\n{text}", golden.name);
        let tally = replay.tally();
        assert!(tally.packets > 0, "{}", golden.name);
        let wrong = (tally.differ, tally.violations, tally.no_ip, tally.unreadable, tally.troubles);
        assert_eq!(wrong, (0, 0, 0, 0, 0), "{}: {tally:?}", golden.name);
        // Half of a daemon's capture is what it has sent.
        assert_eq!(tally.agree > 0, golden.config.is_some(), "{}: {tally:?}", golden.name);
    }
}

fn summaries(golden: &Golden) -> Vec<Summary> {
    let mut reader = Reader::new(golden.bytes.as_slice()).unwrap();
    std::iter::from_fn(|| reader.next_record())
        .map(|record| Summary::of(&Frame::read(&record.unwrap()).unwrap().packet, DEFAULT_EXID))
        .collect()
}

#[test]
fn n6_every_message_of_the_protocol_is_captured_over_both_families() {
    let mut seen: BTreeMap<(bool, String), BTreeSet<&str>> = BTreeMap::new();
    for golden in golden::make() {
        for summary in summaries(&golden) {
            let Some(message) = summary.message else { continue };
            let v6 = summary.source.is_ipv6();
            let closes = if summary.what.starts_with("RST") { " by RST" } else { "" };
            let options = seen.entry((v6, format!("{message}{closes}"))).or_default();
            let option = summary.option.unwrap_or_default();
            options.extend(["T", "O"].into_iter().filter(|part| option.split(' ').any(|has| has == *part)));
        }
    }
    let messages = [
        "opening SYN, will hand over",
        "opening SYN, will reconnect",
        "redirecting SYN-ACK",
        "confirming SYN-ACK",
        "handover",
        "reconnecting SYN",
        "redirection of an established connection",
        "close of the old connection",
        "close of the old connection by RST",
        "opening SYN of a moved connection",
        "confirmation of a client's new port",
    ];
    for v6 in [false, true] {
        for message in messages {
            assert!(seen.contains_key(&(v6, message.to_owned())), "{message} {v6}: {seen:?}");
        }
        assert!(seen[&(v6, "redirecting SYN-ACK".to_owned())].contains("T"));
        assert!(seen[&(v6, "reconnecting SYN".to_owned())].contains("T"));
    }
    let known: BTreeSet<&str> = seen.keys().map(|(_, message)| message.as_str()).collect();
    assert_eq!(known, messages.into_iter().collect());
}

/// What §11 says happens in each case, as the `.expect` files have it: a word that must stand there.
#[test]
fn n6_each_case_of_loss_ends_as_the_protocol_says() {
    let cases = [
        ("two-answers-client", "stray_syn_acks (C4)"),
        ("syn-lost-client", "reconnected (C5)"),
        ("syn-ack-lost-client", "reconnected (C5)"),
        ("handover-ack-lost-client", "probes (C10)"),
        ("handover-ack-lost-client", "handovers_completed (C10)"),
        ("probe-client", "handovers_completed (C10)"),
        ("syn-ack-late-client", "stray_syn_acks (C4)"),
        ("port-reused-client", "port_collisions (C8)"),
        ("bare-syn-client", "reconnected (C5)"),
        ("token-keys-differ-client", "plain_service_port (C6)"),
        ("move-r-lost-wire", "close of the old connection"),
        ("move-syn-lost-wire", "opening SYN of a moved connection"),
        ("move-fin-lost-wire", "FIN [C P=41002]"),
        ("move-rst-lost-wire", "RST [C P=41002]"),
        ("move-server-fails-wire", "opening SYN of a moved connection"),
        ("rebind-r-lost-wire", "confirmation of a client's new port"),
        ("rebind-c-lost-wire", "confirmation of a client's new port"),
    ];
    let files: Vec<String> = fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".expect"))
        .collect();
    for (name, word) in cases {
        for family in ["-v4.", "-v6."] {
            let file = files.iter().find(|file| file.starts_with(&format!("{name}{family}")));
            let file = file.unwrap_or_else(|| panic!("{name}{family}"));
            let text = fs::read_to_string(folder().join(file)).unwrap();
            assert!(text.contains(word), "{file}: {word}\n{text}");
        }
    }
}
