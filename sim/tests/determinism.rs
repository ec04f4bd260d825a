//! A seed is a world: every packet at every place at its time, and nothing else decides.

use shunt_sim::packets::{Options, Scenario, Summary, capture_folder, run};

fn world(options: Options) -> Summary {
    run(&options, &capture_folder()).unwrap_or_else(|failure| panic!("{failure}"))
}

/// Hash tables have other keys in each run and in each thread, and clocks have gone on.
#[test]
fn the_same_seed_gives_the_same_packets_at_the_same_times() {
    for scenario in Scenario::ALL {
        for seed in 0..20 {
            let options = Options::small(seed, Some(scenario));
            let elsewhere = std::thread::spawn(move || world(options)).join().expect("no panic");
            assert_eq!(world(options), elsewhere);
        }
    }
}

#[test]
fn other_seeds_give_other_worlds() {
    let traces: std::collections::BTreeSet<u64> =
        (0..50).map(|seed| world(Options::small(seed, Some(Scenario::Loss))).trace).collect();
    assert_eq!(traces.len(), 50);
}

/// Thousands of streams at once; `SHUNT_TEST_FULL=1`: ten thousand.
#[test]
fn large_worlds_come_to_their_end() {
    let full = std::env::var_os("SHUNT_TEST_FULL").is_some_and(|value| value != "0");
    let flows = if full { 10_000 } else { 1_000 };
    for scenario in [Scenario::Restarts, Scenario::Ecmp] {
        let options = Options { seed: 1, scenario: Some(scenario), flows: Some(flows), seconds: Some(20) };
        let summary = world(options);
        assert_eq!((summary.flows, summary.broken), (flows as u64, 0), "{summary:?}");
    }
}
