//! Replays `fuzz/corpus` and `fuzz/crashes`: what was found once is not found again.

use std::fs;
use std::path::{Path, PathBuf};

use super::*;

/// A folder of `fuzz/`, which stands beside this crate.
fn folder(kind: &str, target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz").join(kind).join(target)
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| {
        panic!("{}: {error}; fuzz/ of the repository has to be there", folder.display())
    });
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.is_file() && path.extension().is_none_or(|extension| extension != "md"));
    files.sort();
    files
}

fn replay(kind: &str, target: &str, body: Body) -> usize {
    let files = files(&folder(kind, target));
    for file in &files {
        let bytes = fs::read(file).unwrap();
        let result = std::panic::catch_unwind(|| body(&bytes));
        assert!(result.is_ok(), "{target} breaks on {}", file.display());
    }
    files.len()
}

#[test]
fn every_corpus_file_passes_its_target() {
    for (target, body) in TARGETS {
        assert!(replay("corpus", target, body) > 0, "fuzz/corpus/{target} is empty");
    }
}

#[test]
fn no_crash_found_before_comes_back() {
    for (target, body) in TARGETS {
        replay("crashes", target, body);
    }
}

#[test]
fn the_seeds_committed_are_those_generated() {
    for Seed { target, name, bytes } in seeds() {
        let file = folder("corpus", target).join(&name);
        let committed = fs::read(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        assert_eq!(
            committed,
            bytes,
            "{}: write it with `cargo run --example seeds` in fuzz/",
            file.display()
        );
    }
}

#[test]
fn the_client_scripts_reach_every_end_of_a_handshake() {
    let ran = |name: &str| {
        let found = seeds().into_iter().filter(|seed| seed.target == "client" && seed.name.starts_with(name));
        found.flat_map(|seed| client::run(&seed.bytes)).collect::<Vec<_>>()
    };
    let all = ran("");
    let sum = |of: fn(&crate::redirect::ClientCounters) -> u64| all.iter().map(of).sum::<u64>();
    assert!(sum(|c| c.reconnected) >= 6, "reconnected");
    assert!(sum(|c| c.handed_over) >= 18, "handed over");
    assert!(sum(|c| c.handovers_completed) >= 6, "completed");
    assert!(sum(|c| c.handovers_failed) >= 2, "failed");
    assert!(sum(|c| c.probes) >= 6, "probes");
    assert!(sum(|c| c.confirmed) >= 2, "confirmed");
    assert!(sum(|c| c.plain_unconfirmed) >= 2, "unconfirmed");
    assert!(sum(|c| c.plain_echoed) >= 2, "echoed");
    assert!(sum(|c| c.plain_refused) >= 2, "refused");
    assert!(sum(|c| c.plain_silence) >= 2, "silence");
    assert!(sum(|c| c.plain_service_port) >= 6, "service port");
    assert!(sum(|c| c.stray_syn_acks) >= 2, "stray");
    assert!(sum(|c| c.moves_asked) >= 4, "asked to move");
    assert!(sum(|c| c.moves_opened) >= 4, "next part");
    assert!(sum(|c| c.moves_failed) >= 2, "refused move");
    assert!(sum(|c| c.moves_closed) >= 2, "confirming close");
    assert!(sum(|c| c.rebinds) >= 2, "rebind");
    assert!(sum(|c| c.rebinds_failed) >= 2, "rebind given up");
}

#[test]
fn the_server_scripts_reach_every_rule() {
    let all: Vec<_> = seeds()
        .into_iter()
        .filter(|seed| seed.target == "server")
        .map(|seed| server::run(&seed.bytes))
        .collect();
    let sum = |of: fn(&crate::redirect::ServerCounters) -> u64| all.iter().map(of).sum::<u64>();
    assert!(sum(|c| c.answered) >= 2, "S2");
    assert!(sum(|c| c.answered_elsewhere) >= 2, "S2 elsewhere");
    assert!(sum(|c| c.syns_turned) >= 2, "S1");
    assert!(sum(|c| c.syns_to_service) >= 2, "S3");
    assert!(sum(|c| c.syn_acks_moved) >= 2, "S1 moved");
    assert!(sum(|c| c.syn_acks_confirmed) >= 2, "S1 confirmed");
    assert!(sum(|c| c.syn_acks_unknown) >= 2, "S5");
    assert!(sum(|c| c.syn_acks_no_room) >= 2, "W2");
    assert!(sum(|c| c.not_listening) >= 2, "S6");
    assert!(sum(|c| c.too_many_hops) >= 2, "hops");
    assert!(sum(|c| c.half_open_expired) >= 2, "64 s");
    assert!(sum(|c| c.icmp_turned) >= 1, "I2");
    assert!(sum(|c| c.challenge_acks) >= 2, "S7");
    assert!(sum(|c| c.resets) >= 2, "S8");
    assert!(sum(|c| c.bad_options) >= 2, "W1");
    assert!(sum(|c| c.redirects_confirmed) >= 4, "confirmed");
    assert!(sum(|c| c.redirects_given_up) >= 2, "given up");
    assert!(sum(|c| c.redirects_said) >= 4, "said");
    assert!(sum(|c| c.rebinds) >= 2, "rebound");
}

/// Random bytes of every length: a short run without the fuzzer, which finds nothing new but needs no tools.
#[test]
fn bytes_at_random_pass_every_target() {
    use proptest::prelude::*;
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(500));
    for (_, body) in TARGETS {
        runner
            .run(&proptest::collection::vec(any::<u8>(), 0..400), |bytes| {
                body(&bytes);
                Ok(())
            })
            .unwrap();
    }
}
