use super::cluster::{Cluster, Reuse};
use super::contestant::{Contestant, Flow, Home};
use super::engine;
use super::redirect::Redirect;
use super::*;

fn options() -> Options {
    Options {
        connections: 100_000,
        seed: 1,
        servers: 50,
        balancers: 3,
        plain: 20,
        table_size: None,
        reuse: Reuse::WhenGone,
    }
}

fn report(scenario: Scenario, options: &Options) -> Report {
    run(scenario, options, &mut |_| {})
}

#[test]
fn redirected_connections_break_only_with_their_server() {
    for scenario in Scenario::ALL {
        let report = report(scenario, &options());
        println!("{} {:?}, lost {:?}", report.name, report.broken, report.lost);
        assert_eq!(report.connections, 100_000);
        assert!(report.redirected.abs_diff(80_000) < 1_000, "{}", report.redirected);
        assert_eq!(report.broken.redirect, report.lost.redirect, "{}: none was misrouted", report.name);
        assert_eq!(report.broken.redirect > 0, scenario.loses_servers(), "{}", report.name);
        assert!(report.broken.plain > 0, "{}: plain clients go by a hash", report.name);
        assert!(report.broken.modulo > report.broken.maglev, "{}", report.name);
    }
}

#[test]
fn who_dies_takes_as_many_along_whoever_balances() {
    let report = report(Scenario::ServerDeath, &options());
    let ours = report.lost.redirect + report.lost.plain;
    for contender in [Contender::Maglev, Contender::MaglevLru, Contender::TwoSlot, Contender::Jet] {
        let lost = report.lost.get(contender);
        assert!(lost > 100 && lost.abs_diff(ours) * 5 < ours, "{contender:?}: {lost}, ours {ours}");
    }
}

#[test]
fn a_port_given_away_too_early_would_be_seen() {
    let planted = Options { reuse: Reuse::AtOnce, ..options() };
    let (right, wrong) = (report(Scenario::Replace, &options()), report(Scenario::Replace, &planted));
    println!("{} broken, {} with the mistake", right.broken.redirect, wrong.broken.redirect);
    assert_eq!(right.broken.redirect, 0);
    assert!(wrong.broken.redirect > 100, "what is open on a drained server goes to the new one");
    assert_eq!(wrong.lost.redirect, 0, "its server is still there");
}

/// Balancers that never hear of a change.
struct Stale {
    redirect: Redirect,
    told: bool,
}

impl Contestant for Stale {
    fn update(&mut self, cluster: &Cluster) {
        if !std::mem::replace(&mut self.told, true) {
            self.redirect.update(cluster);
        }
    }

    fn open(&mut self, flow: &Flow) -> Home {
        self.redirect.open(flow)
    }

    fn reaches(&mut self, flow: &Flow, home: u16) -> bool {
        self.redirect.reaches(flow, home)
    }
}

#[test]
fn the_ports_decide_and_not_the_name_of_the_contestant() {
    // The servers that came are chosen by balancers that know them and reached through one that does not.
    struct Mixed(Redirect, Stale);
    impl Contestant for Mixed {
        fn update(&mut self, cluster: &Cluster) {
            self.0.update(cluster);
            self.1.update(cluster);
        }
        fn open(&mut self, flow: &Flow) -> Home {
            self.0.open(flow)
        }
        fn reaches(&mut self, flow: &Flow, home: u16) -> bool {
            if flow.balancer == 0 { self.1.reaches(flow, home) } else { self.0.reaches(flow, home) }
        }
    }
    let plan = Scenario::ScaleOut.plan(&Options { plain: 0, ..options() });
    let stale = Stale { redirect: Redirect::new(0, 1), told: false };
    let mixed: Vec<Box<dyn Contestant>> = vec![Box::new(Mixed(Redirect::new(0, 1), stale))];
    let broken = engine::run(&plan, mixed, &mut |_| {}).lanes[0].with_port.misrouted;
    println!("{broken} connections broken by a balancer with an old table");
    assert!(broken > 100);
}

#[test]
fn tables_keep_what_they_hold_and_a_flood_empties_them() {
    let with = |table_size| Options { table_size, ..options() };
    let broken = |scenario, options: &Options| report(scenario, options).broken.maglev_lru;
    assert_eq!(broken(Scenario::Replace, &options()), 0, "all of them fit");
    let small = broken(Scenario::Replace, &with(Some(330)));
    let smaller = broken(Scenario::Replace, &with(Some(30)));
    assert!(0 < small && small < smaller, "{small} {smaller}");
    assert!(broken(Scenario::SynFlood, &options()) > 50);
    assert!(broken(Scenario::BalancerChange, &options()) > 50, "a table stays with its balancer");
}

#[test]
fn jet_remembers_too_little_when_a_server_leaves_or_weights_change() {
    let broken = |scenario| report(scenario, &options()).broken.jet;
    assert_eq!(broken(Scenario::ScaleOut), 0, "what it promises");
    assert!(broken(Scenario::ScaleIn) > 50 && broken(Scenario::Reweight) > 50);
}

#[test]
fn a_seed_gives_the_same_again() {
    for scenario in [Scenario::SynFlood, Scenario::Churn] {
        let first = report(scenario, &options());
        assert_eq!(first, report(scenario, &options()));
        assert_ne!(first.broken, report(scenario, &Options { seed: 2, ..options() }).broken);
    }
}

#[test]
fn an_open_connection_takes_24_bytes() {
    assert_eq!(RECORD_BYTES, 24);
    // 100 million in all: what is open at once is a few per cent of them.
    let report = report(Scenario::ScaleOut, &options());
    assert!(report.peak_open * 20 < report.connections, "{}", report.peak_open);
}

#[test]
fn scenarios_fit_small_and_large_clusters() {
    for servers in [10, 11, 24, 999, 4096] {
        for scenario in Scenario::ALL {
            let plan = scenario.plan(&Options { servers, ..options() });
            assert_eq!(plan.arrivals.iter().sum::<u64>(), 100_000, "{scenario:?}");
            assert!(plan.servers < MAX_SERVERS && plan.changes.is_sorted_by_key(|(second, _)| *second));
            let mut cluster = Cluster::new(plan.servers, plan.up, plan.balancers, plan.horizon, plan.reuse);
            for (_, change) in &plan.changes {
                cluster.apply(change);
                assert!(cluster.up().count() * 2 >= servers, "{scenario:?} with {servers}");
            }
        }
    }
}

#[test]
fn the_picture_and_the_file_tell_all_figures() {
    let scenarios = vec![report(Scenario::ForcedRemoval, &options()), report(Scenario::ScaleOut, &options())];
    let summary = Summary { seed: 1, servers: 50, balancers: 3, plain_percent: 20, scenarios };
    let mut file = Vec::new();
    summary.write_csv(&mut file).unwrap();
    let file = String::from_utf8(file).unwrap();
    assert_eq!(file.lines().count(), 1 + 2 * Contender::ALL.len());
    let picture = summary.svg();
    for report in &summary.scenarios {
        assert!(picture.contains(report.name) && picture.contains(report.about));
        for contender in Contender::ALL {
            let broken = report.broken.get(contender);
            assert!(file.contains(&format!("{},{},", report.name, contender.key())));
            assert!(file.contains(&format!(",{broken},")), "{file}");
            assert!(broken == 0 || picture.contains(&format!("{broken} (")), "{contender:?}");
        }
    }
}
