//! `auto` through Linux routers: every transfer completes, and what redirection costs is measured against the same
//! connect without a shim.

mod common;

use std::io::{ErrorKind, Read, Write};
use std::thread;
use std::time::{Duration, Instant};

use common::service::{
    Counts, Exchanged, PATIENCE, Service, TRANSFER, connect, echo, exchange, extra, prepare, quickest, target,
};
use common::{Family, Net, Options};
use shunt_lab::{Direction, Host, Impairment, TcpState};

/// Time under way on the access link, in each direction: it is what a round trip takes, nearly.
const DELAY: Duration = Duration::from_millis(20);
const ROUND_TRIP: Duration = Duration::from_millis(40);
/// What a busy machine may add to the quickest of several connects; less than a round trip, or nothing would be shown.
const NOISE: Duration = Duration::from_millis(25);
/// What it may add to a single connect.
const BUSY: Duration = Duration::from_millis(300);
/// Connects whose cost is told one by one.
const FIRST: usize = 4;
/// Connects after those.
const LATER: usize = 20;

/// Drops what belongs to no connection and does not open one.
const STRICT: &str = "chain strict { type filter hook forward priority 0; ct state invalid drop\n\
                      tcp flags & (fin|syn|rst|ack) != syn ct state new drop }";
const MASQUERADE: &str =
    "chain nat { type nat hook postrouting priority srcnat; oifname \"eth1\" masquerade }";
const MASQUERADE_RANDOM: &str = "chain nat { type nat hook postrouting priority srcnat; oifname \"eth1\" \
                                 masquerade fully-random }";
/// Lets nothing but the redirect ports of the tests through.
const ONLY_X: &str = "chain only { type filter hook forward priority 0; iifname \"eth0\" tcp dport != { 80, 5201, \
                      7000 } drop }";
/// As `ONLY_X`, for connections that were learnt before: says so by a reset.
const ONLY_X_RESET: &str = "chain only { type filter hook forward priority 0; iifname \"eth0\" tcp dport != { 80, \
                            5201, 7000 } reject with tcp reset }";
const ONLY_X_ICMP: &str = "chain only { type filter hook forward priority 0; iifname \"eth0\" tcp dport != { 80, \
                           5201, 7000 } reject with icmpx admin-prohibited }";

/// Gives the router these chains and no others.
fn firewall(router: &Host, chains: &[&str]) {
    // nft wants the closing brace on a line of its own.
    let mut rules = String::from("table inet test\ndelete table inet test\ntable inet test {\n");
    for chain in chains {
        rules.push_str(chain.strip_suffix('}').unwrap_or(chain));
        rules.push_str("\n}\n");
    }
    rules.push('}');
    router.nft(&rules).expect("the kernel takes the rules");
}

/// A network with a delayed access link.
fn delayed() -> Net {
    let delay = Impairment { delay: DELAY, ..Impairment::default() };
    Net::new(Options { access: Some(delay), ..Options::default() })
}

/// What connects cost, in one family.
struct Costs {
    family: Family,
    /// Without a shim, on the same path.
    direct: Exchanged,
    first: Vec<Exchanged>,
    later: Vec<Exchanged>,
}

impl Costs {
    fn connect(&self, exchanged: &Exchanged) -> f64 {
        extra(exchanged.connect, self.direct.connect)
    }

    fn answer(&self, exchanged: &Exchanged) -> f64 {
        extra(exchanged.answer, self.direct.answer)
    }

    /// What the quickest of the later connects cost more until the first answer, in milliseconds.
    fn later_answer(&self) -> f64 {
        extra(quickest(self.later.iter().map(|one| one.answer)), self.direct.answer)
    }

    fn later_connect(&self) -> f64 {
        extra(quickest(self.later.iter().map(|one| one.connect)), self.direct.connect)
    }

    fn print(&self, path: &str) {
        let first: Vec<String> = self
            .first
            .iter()
            .map(|one| format!("{:+.1}/{:+.1}", self.connect(one), self.answer(one)))
            .collect();
        println!(
            "{path}, {:?}: direct {:.1}/{:.1} ms (connect/answer); extra of the first connects {}; of later ones \
             {:+.1}/{:+.1} ms",
            self.family,
            self.direct.connect.as_secs_f64() * 1e3,
            self.direct.answer.as_secs_f64() * 1e3,
            first.join(", "),
            self.later_connect(),
            self.later_answer(),
        );
    }
}

/// Connects again and again, first without and then with the shim; each of the first transfers carries data.
fn measure(net: &mut Net, path: &str) -> ([Costs; 2], Counts) {
    let service = Service::start(net, echo);
    let direct = net.in_both(|family| {
        let runs: Vec<Exchanged> =
            (0..15).map(|_| exchange(family, 0).expect("the path works without the shim")).collect();
        assert!(runs.iter().all(|one| !one.redirected()));
        Exchanged {
            connect: quickest(runs.iter().map(|one| one.connect)),
            answer: quickest(runs.iter().map(|one| one.answer)),
            ..runs[0]
        }
    });
    net.start_shim("auto");
    let costs = {
        let net = &*net;
        net.in_both(|family| {
            let run = |bytes| {
                exchange(family, bytes)
                    .unwrap_or_else(|error| panic!("{path}, {family:?}: {error}\n{}", net.logs()))
            };
            let first = (0..FIRST).map(|_| run(TRANSFER)).collect();
            let later = (0..LATER).map(|_| run(1000)).collect();
            let direct = direct[usize::from(family == Family::V6)];
            Costs { family, direct, first, later }
        })
    };
    for one in &costs {
        one.print(path);
    }
    net.wait_no_server_sockets(path, Duration::from_secs(5));
    drop(service);
    let counts = net.stop_shim_and_count();
    (costs, counts)
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// `value` is `expected` round trips, give or take noise.
fn assert_round_trips(value: f64, expected: u32, what: &str) {
    let wanted = ms(ROUND_TRIP) * f64::from(expected);
    assert!((value - wanted).abs() < ms(NOISE), "{what}: {value:.1} ms extra instead of {wanted:.1}");
}

/// As [`assert_round_trips`], for a single connect, which may have been unlucky.
fn assert_single(value: f64, expected: u32, what: &str) {
    let wanted = ms(ROUND_TRIP) * f64::from(expected);
    let allowed = wanted - ms(NOISE)..wanted + ms(BUSY);
    assert!(allowed.contains(&value), "{what}: {value:.1} ms extra instead of {wanted:.1}");
}

#[test]
fn a_clean_path_is_handed_over_on_from_the_second_connect_without_another_round_trip() {
    let mut net = delayed();
    let (costs, counts) = measure(&mut net, "clean");
    for one in &costs {
        assert!(one.first.iter().chain(&one.later).all(Exchanged::redirected));
        assert_single(one.connect(&one.first[0]), 1, "the first connect");
        assert_round_trips(one.later_connect(), 0, "later connects");
        assert_round_trips(one.later_answer(), 0, "later answers");
    }
    let all = 2 * (FIRST + LATER) as u64;
    assert_eq!((counts.of("reconnected"), counts.of("handovers_completed")), (2, all - 2), "{counts:?}");
    assert_eq!(counts.of("handovers_failed"), 0);
}

/// Behind a router that drops the handover ACK.
fn strict(path: &str, cookies: bool) {
    let mut net = delayed();
    firewall(&net.middle, &[STRICT]);
    if cookies {
        for server in &net.servers {
            server.host.sysctl("net.ipv4.tcp_syncookies", "2").expect("a sysctl");
        }
    }
    let (costs, counts) = measure(&mut net, path);
    for one in &costs {
        assert!(one.first.iter().chain(&one.later).all(Exchanged::redirected));
        assert_single(one.connect(&one.first[0]), 1, "the first connect");
        // Two lost handover ACKs are no chance any more: from then on it reconnects.
        for probed in &one.first[1..3] {
            let cost = one.answer(probed);
            assert!(cost > ms(ROUND_TRIP) && cost < 5.0 * ms(BUSY), "probed: {cost:.1} ms extra");
        }
        assert_round_trips(one.later_answer(), 1, "later answers");
    }
    assert_eq!((counts.of("handovers_completed"), counts.of("handovers_failed")), (4, 0), "{counts:?}");
    assert!(counts.of("probes") >= 4, "{counts:?}");
}

#[test]
fn behind_a_firewall_that_drops_new_non_syn_segments_probes_save_the_handover() {
    strict("drop new non-SYN and invalid", false);
}

#[test]
fn probes_save_the_handover_with_syn_cookies_too() {
    strict("the same with SYN cookies", true);
}

/// Behind a translator: always one round trip more.
fn translated(path: &str, chains: &[&str]) {
    let mut net = delayed();
    firewall(&net.middle, chains);
    let (costs, counts) = measure(&mut net, path);
    for one in &costs {
        assert!(one.first.iter().chain(&one.later).all(Exchanged::redirected));
        assert_single(one.connect(&one.first[0]), 1, "the first connect");
        assert_round_trips(one.later_connect(), 1, "later connects");
    }
    let all = 2 * (FIRST + LATER) as u64;
    assert_eq!((counts.of("reconnected"), counts.of("handed_over")), (all, 0), "{counts:?}");
}

#[test]
fn behind_masquerade_connects_cost_one_round_trip_more() {
    translated("masquerade", &[MASQUERADE]);
}

#[test]
fn behind_fully_random_masquerade_with_both_drops_connects_cost_one_round_trip_more() {
    translated("masquerade fully-random with both drops", &[MASQUERADE_RANDOM, STRICT]);
}

/// Behind a router that lets redirect ports through only: the first two find out, later ones are plain at once.
fn only_x(path: &str, chain: &str, finding_out: Duration) {
    let mut net = delayed();
    firewall(&net.middle, &[chain]);
    let (costs, counts) = measure(&mut net, path);
    for one in &costs {
        assert!(one.first.iter().chain(&one.later).all(|exchanged| !exchanged.redirected()));
        for first in &one.first[..2] {
            let cost = one.connect(first);
            assert!(cost < ms(finding_out), "finding out took {cost:.1} ms");
        }
        assert_single(one.connect(&one.first[2]), 0, "the third connect");
        assert_round_trips(one.later_connect(), 0, "later connects");
    }
    assert_eq!((counts.of("plain_service_port"), counts.of("reconnected")), (4, 0), "{counts:?}");
}

#[test]
fn a_filter_that_lets_only_x_through_makes_connections_plain() {
    // The SYN to Y is sent three times, 250 ms apart.
    only_x("only X, others dropped", ONLY_X, Duration::from_millis(1500));
}

#[test]
fn a_filter_that_says_so_makes_connections_plain_sooner() {
    only_x("only X, others reset", ONLY_X_RESET, Duration::from_millis(600));
}

#[test]
fn a_filter_that_says_so_by_icmp_makes_connections_plain_sooner() {
    only_x("only X, others prohibited", ONLY_X_ICMP, Duration::from_millis(600));
}

/// How a connect ends on a path that has turned bad: an answer, or the error of reading it.
fn outcome(family: Family) -> Result<Exchanged, (ErrorKind, Duration)> {
    let start = Instant::now();
    exchange(family, 1000).map_err(|error| (error.kind(), start.elapsed()))
}

/// Learns the path, turns it bad by `chains`, and connects four times.
fn turn_bad(net: &mut Net, chains: &[&str]) -> [Vec<Result<Exchanged, (ErrorKind, Duration)>>; 2] {
    net.start_shim_with("auto", "handover_s = 2");
    net.in_both(|family| {
        for _ in 0..3 {
            assert!(exchange(family, 1000).expect("a clean path").redirected());
        }
    });
    firewall(&net.middle, chains);
    net.in_both(|family| (0..4).map(|_| outcome(family)).collect())
}

#[test]
fn a_learnt_path_whose_service_ports_are_dropped_ends_in_a_reset_once_and_is_remembered() {
    let mut net = delayed();
    let _service = Service::start(&net, echo);
    let results = turn_bad(&mut net, &[ONLY_X]);
    for result in &results {
        println!("service ports dropped later: {result:?}");
        let (kind, after) = result[0].expect_err("the handover cannot complete");
        assert_eq!(kind, ErrorKind::ConnectionReset);
        assert!(after > Duration::from_secs(2) && after < Duration::from_secs(4), "{after:?}");
        for later in &result[1..] {
            let later = later.expect("another way");
            assert!(!later.redirected() && later.connect < Duration::from_millis(1500), "{later:?}");
        }
        assert!(result[3].expect("another way").connect < ROUND_TRIP + BUSY, "remembered as plain");
    }
    let counts = net.stop_shim_and_count();
    assert_eq!(counts.of("handovers_failed"), 2, "{counts:?}");
    // Half-open connections of the handovers that failed end by themselves.
    assert!(net.half_open() <= 2);
}

#[test]
fn a_learnt_path_whose_service_ports_are_refused_ends_in_a_reset_at_once_and_is_remembered() {
    for chain in [ONLY_X_RESET, ONLY_X_ICMP] {
        let mut net = delayed();
        let _service = Service::start(&net, echo);
        let results = turn_bad(&mut net, &[chain]);
        for result in &results {
            println!("service ports refused later: {result:?}");
            let (kind, after) = result[0].expect_err("the handover cannot complete");
            assert_eq!(kind, ErrorKind::ConnectionReset);
            assert!(after < Duration::from_secs(4), "{after:?}");
            for later in &result[1..] {
                let later = later.expect("another way");
                // Routers limit their errors: it may have said nothing of a SYN, which is silence then.
                assert!(!later.redirected() && later.connect < Duration::from_millis(1500), "{later:?}");
            }
        }
        let counts = net.stop_shim_and_count();
        assert_eq!(counts.of("handovers_failed"), 2, "{counts:?}");
    }
}

#[test]
fn a_learnt_path_that_begins_to_translate_reconnects_and_is_remembered() {
    for chains in [&[MASQUERADE][..], &[MASQUERADE_RANDOM], &[MASQUERADE_RANDOM, STRICT]] {
        let mut net = delayed();
        let _service = Service::start(&net, echo);
        let results = turn_bad(&mut net, chains);
        for result in &results {
            for one in result {
                let one = one.unwrap_or_else(|error| panic!("{error:?}\n{}", net.logs()));
                assert!(one.redirected() && one.connect < 2 * ROUND_TRIP + BUSY, "{one:?}");
            }
        }
        let counts = net.stop_shim_and_count();
        assert_eq!(counts.of("handovers_failed"), 0, "{counts:?}");
        assert_eq!(counts.of("reconnected"), 2 + 8, "{counts:?}");
    }
}

#[test]
fn a_path_that_drops_everything_during_a_handover_ends_in_a_reset() {
    let mut net = delayed();
    let _service = Service::start(&net, echo);
    net.start_shim_with("auto", "handover_s = 2");
    net.in_both(|family| {
        for _ in 0..2 {
            assert!(exchange(family, 1000).expect("a clean path").redirected());
        }
    });
    let access = net.access.clone().expect("an impaired link");
    let results = net.in_both(|family| {
        let start = Instant::now();
        let mut stream = connect(family).expect("the SYN-ACK comes");
        // Both families connect before either loses its way.
        thread::sleep(Duration::from_millis(500).saturating_sub(start.elapsed()));
        (stream.write_all(b"?"), stream.read(&mut [0; 4]).map_err(|error| error.kind()))
    });
    // Connections that had completed their handover are the kernel's: lost segments are repeated.
    for (written, read) in results {
        assert!(written.is_ok() && read == Ok(4), "{read:?}");
    }
    let lossy = |forward: f64| Impairment { loss: forward, delay: DELAY, ..Impairment::default() };
    let results = net.in_both(|family| {
        let mut stream = connect(family).expect("the SYN-ACK comes");
        access.set_direction(Direction::Forward, lossy(1.0)).expect("a probability");
        let start = Instant::now();
        let _ = stream.write_all(b"?");
        let read = stream.read(&mut [0; 4]).map_err(|error| error.kind());
        (read, start.elapsed())
    });
    println!("everything dropped right after the SYN-ACK: {results:?}");
    access.set_direction(Direction::Forward, lossy(0.0)).expect("a probability");
    for (read, after) in results {
        // Its handover ACK may have slipped through, and the path come back: then it is served.
        assert!(matches!(read, Err(ErrorKind::ConnectionReset) | Ok(4)), "{read:?}");
        assert!(after < PATIENCE, "{after:?}");
    }
    let again = net.in_both(|family| exchange(family, 1000));
    for one in again {
        assert!(one.expect("the path is back").redirected());
    }
}

#[test]
fn a_thousand_connects_through_fully_random_leave_no_half_open_connections() {
    let mut net = Net::new(Options::default());
    firewall(&net.middle, &[MASQUERADE_RANDOM, STRICT]);
    let _service = Service::start(&net, echo);
    net.start_shim("auto");
    let start = Instant::now();
    let redirected = net.in_both(|family| {
        thread::scope(|scope| {
            let threads = [(); 2].map(|()| {
                scope.spawn(move || {
                    let results = (0..250).map(|_| exchange(family, 10));
                    results.filter(|result| result.as_ref().is_ok_and(Exchanged::redirected)).count()
                })
            });
            threads.map(|thread| thread.join().expect("no panic")).iter().sum::<usize>()
        })
    });
    let took = start.elapsed();
    let half_open = net.half_open();
    net.wait_no_server_sockets("after 1000 connects", Duration::from_secs(3));
    println!(
        "1000 connects through fully-random in {took:?}: {half_open} half-open at the end, 0 soon after"
    );
    assert_eq!(redirected, [500, 500], "{}", net.logs());
    assert_eq!(net.half_open(), 0);
    for server in &net.servers {
        assert_eq!(server.host.tcp_count(TcpState::SynReceived).expect("sockets are listed"), 0);
    }
    let counts = net.stop_shim_and_count();
    assert_eq!((counts.of("reconnected"), counts.of("handed_over")), (1000, 0), "{counts:?}");
}

#[test]
fn a_program_that_gives_up_connecting_leaves_nothing() {
    let mut net = Net::new(Options::default());
    let _service = Service::start(&net, echo);
    net.start_shim("auto");
    firewall(&net.middle, &["chain none { type filter hook forward priority 0; iifname \"eth0\" drop }"]);
    let results = net.in_both(|family| {
        let result = std::net::TcpStream::connect_timeout(&target(family), Duration::from_secs(2));
        result.and_then(|stream| prepare(&stream)).map_err(|error| error.kind())
    });
    assert_eq!(results, [Err(ErrorKind::TimedOut); 2]);
    thread::sleep(Duration::from_millis(2500));
    net.wait_no_server_sockets("after giving up", Duration::from_secs(1));
    let counts = net.stop_shim_and_count();
    assert_eq!(counts.flows(), 0, "{counts:?}");
}
