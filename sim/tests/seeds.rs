//! Small worlds, thousands of them: each scenario has its own test, so that they run side by side.
//!
//! `SHUNT_TEST_FULL=1` runs ten times as many.

use shunt_sim::packets::{Options, Scenario, Summary, capture_folder, run};

/// Seeds of each scenario; 10,080 in all.
const SEEDS: u64 = 840;

fn full() -> bool {
    std::env::var_os("SHUNT_TEST_FULL").is_some_and(|value| value != "0")
}

/// What the worlds of a scenario came to, together.
#[derive(Default)]
struct Total {
    flows: u64,
    whole: u64,
    broken: u64,
    redirected: u64,
    moves: u64,
}

impl Total {
    fn add(&mut self, world: &Summary) {
        self.flows += world.flows;
        self.whole += world.whole;
        self.broken += world.broken;
        self.redirected += world.redirected;
        self.moves += world.moves;
    }
}

fn worlds(scenario: Scenario) -> Total {
    let mut total = Total::default();
    for seed in 0..SEEDS * if full() { 10 } else { 1 } {
        match run(&Options::small(seed, Some(scenario)), &capture_folder()) {
            Ok(summary) => total.add(&summary),
            Err(failure) => panic!("{failure}"),
        }
    }
    assert!(total.flows > SEEDS * 5 && total.whole > total.flows / 2, "hardly anything happened");
    total
}

/// Worlds in which nothing explains an error.
fn worlds_without_errors(scenario: Scenario) -> Total {
    let total = worlds(scenario);
    assert_eq!(total.broken, 0);
    assert!(total.redirected > total.flows / 2, "{} of {}", total.redirected, total.flows);
    total
}

#[test]
fn clean_worlds_deliver_every_stream_whole() {
    worlds_without_errors(Scenario::Clean);
}

#[test]
fn lost_repeated_late_and_damaged_packets_cost_no_byte() {
    let total = worlds(Scenario::Loss);
    // Handovers that end in 20 s of silence (C10).
    assert!(total.broken * 200 < total.flows, "{} of {}", total.broken, total.flows);
}

#[test]
fn translators_and_firewalls_that_forget_break_only_what_they_forgot() {
    worlds(Scenario::Nat);
}

#[test]
fn boxes_that_strip_echo_or_drop_the_option_leave_connections_whole() {
    let total = worlds(Scenario::Middlebox);
    assert!(total.broken * 20 < total.flows, "{} of {}", total.broken, total.flows);
}

#[test]
fn balancers_may_share_the_traffic_anew_and_restart_at_any_time() {
    worlds_without_errors(Scenario::Ecmp);
}

#[test]
fn other_tables_break_no_redirected_connection() {
    worlds(Scenario::Tables);
}

#[test]
fn restarts_of_shims_agents_and_balancers_break_nothing() {
    worlds_without_errors(Scenario::Restarts);
}

#[test]
fn streams_that_move_from_server_to_server_lose_no_byte() {
    let total = worlds_without_errors(Scenario::Moves);
    assert!(total.moves > SEEDS / 2, "{} moves", total.moves);
}

#[test]
fn clocks_that_jump_break_nothing() {
    worlds_without_errors(Scenario::Clocks);
}

#[test]
fn a_server_that_dies_takes_only_its_own_connections_along() {
    worlds(Scenario::Deaths);
}

#[test]
fn nothing_that_is_forged_off_the_path_is_believed() {
    let total = worlds(Scenario::Forgery);
    // A handover that is not complete may be ended by an acknowledgement that cannot be (C10), forged or not.
    assert!(total.redirected > total.flows / 2, "{} of {}", total.redirected, total.flows);
}

#[test]
fn all_of_it_at_once() {
    worlds(Scenario::Chaos);
}
