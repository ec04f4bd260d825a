//! A policy over servers of given weights, and what it chooses.

use std::sync::Arc;
use std::time::Duration;

use shunt_stack::time::Instant;
use shunt_stack::wire::SeqNumber;

use super::{Candidate, Lives, Request, Select, SelectKey, Terms, policy};
use crate::config::PolicyName;
use crate::maglev::{Maglev, Member};
use crate::table::ServerId;

/// Servers named `s0`, `s1`, ... under one policy.
pub(super) struct Bench {
    pub(super) policy: Box<dyn Select>,
    pub(super) lives: Lives,
    pub(super) next: Option<Instant>,
}

impl Bench {
    pub(super) fn new(name: PolicyName, weights: &[u32]) -> Bench {
        Bench::with_slow_start(name, weights, Duration::ZERO, &[])
    }

    /// The servers in `new` begin at time 0.
    pub(super) fn with_slow_start(
        name: PolicyName,
        weights: &[u32],
        slow_start: Duration,
        new: &[usize],
    ) -> Bench {
        let names: Vec<String> = (0..weights.len()).map(|index| format!("s{index}")).collect();
        let lives = Lives::new(names.iter().map(|name| (name.as_str(), Arc::default())));
        let candidate = |(index, &weight): (usize, &u32)| Candidate {
            member: Member { name: names[index].clone(), weight, server: ServerId::new(index) },
            live: Arc::clone(lives.get(&names[index]).unwrap()),
        };
        let candidates: Vec<Candidate> = weights.iter().enumerate().map(candidate).collect();
        for index in new {
            candidates[*index].live.begin(Instant::ZERO);
        }
        let members: Vec<Member> = candidates.iter().map(|candidate| candidate.member.clone()).collect();
        let terms =
            Terms { key: SelectKey([7; 16]), slow_start, load_max_age: Duration::from_secs(30), level: 0 };
        let maglev = || Maglev::new(&members).map(Arc::new);
        let policy = policy(name, &candidates, maglev, terms).unwrap();
        let next = policy.refresh(Instant::ZERO);
        Bench { policy, lives, next }
    }

    /// Time passes, as [`Balancer::advance`](crate::Balancer::advance) lets it.
    pub(super) fn advance(&mut self, millis: u64) {
        let now = Instant::from_millis(millis);
        self.lives.set_now(now);
        self.lives.decay(now, Duration::from_secs(10));
        self.next = self.policy.refresh(now);
    }

    pub(super) fn select(&self, n: u32) -> usize {
        self.policy.select(&request(n)).index()
    }

    /// Packets were sent to a server.
    pub(super) fn send(&self, server: usize, packets: u32) {
        let live = self.lives.get(&format!("s{server}")).unwrap();
        (0..packets).for_each(|_| live.stats().sent(1, 100));
    }

    pub(super) fn order(&self, requests: u32) -> Vec<usize> {
        (0..requests).map(|n| self.select(n)).collect()
    }

    /// How often each server is chosen.
    pub(super) fn counts(&self, requests: u32) -> Vec<f64> {
        let mut counts = vec![0.0; self.lives.len()];
        for n in 0..requests {
            counts[self.select(n)] += 1.0;
        }
        counts
    }
}

pub(super) fn request(n: u32) -> Request<'static> {
    let client = std::net::Ipv4Addr::from_bits(0x0a00_0000 + n);
    Request {
        client: (client, 40_000).into(),
        service: "203.0.113.10:443".parse().unwrap(),
        isn: Some(SeqNumber(n.wrapping_mul(2_654_435_761))),
        dscp: 0,
        payload: &[],
    }
}

/// Servers are chosen as often as their weights say, up to `tolerance` of it.
pub(super) fn keeps_to_the_weights(name: PolicyName, tolerance: f64) {
    for weights in [&[1, 1, 1, 1][..], &[1, 2, 5], &[100, 300], &[3], &[65_535, 1, 65_535]] {
        let total: u32 = weights.iter().sum();
        let counts = Bench::new(name, weights).counts(40_000);
        for (count, weight) in counts.iter().zip(weights) {
            let wanted = 40_000.0 * f64::from(*weight) / f64::from(total);
            assert!((count - wanted).abs() <= wanted * tolerance + 3.0, "{name:?} {weights:?}: {counts:?}");
        }
    }
}

#[test]
fn a_new_servers_part_grows_in_a_straight_line_from_a_tenth_to_the_whole() {
    let names = [
        PolicyName::Random,
        PolicyName::RoundRobin,
        PolicyName::Source,
        PolicyName::Elevator,
        PolicyName::LeastPackets,
        PolicyName::LeastLoad,
    ];
    for name in names {
        let mut bench = Bench::with_slow_start(name, &[2, 2, 4], Duration::from_secs(100), &[2]);
        for (seconds, part) in [(0, 0.1), (25, 0.325), (50, 0.55), (75, 0.775), (99, 0.991)] {
            // Called as it asks, not more often than every step.
            while let Some(next) = bench.next.filter(|next| *next <= Instant::from_millis(seconds * 1000)) {
                bench.advance(next.micros() / 1000);
                assert!(bench.next.is_none_or(|after| after.since(next) >= Duration::from_secs(5)));
            }
            let wanted = 4.0 * part / (4.0 + 4.0 * part);
            let counts = bench.counts(40_000);
            let (got, step) = (counts[2] / 40_000.0, 0.03);
            assert!((got - wanted).abs() < step, "{name:?} after {seconds} s: {got}, wanted {wanted}");
            assert!((counts[0] - counts[1]).abs() < 1000.0, "{name:?}: {counts:?}");
        }
        bench.advance(100_000);
        assert_eq!(bench.next, None, "{name:?}");
        assert!((bench.counts(40_000)[2] / 40_000.0 - 0.5).abs() < 0.02, "{name:?}");
    }
}

#[test]
fn a_slow_start_repeats_its_choice_for_a_repeated_syn_nearly_always() {
    let mut bench = Bench::with_slow_start(PolicyName::Random, &[1; 5], Duration::from_secs(100), &[4]);
    bench.advance(50_000);
    let before = bench.order(10_000);
    bench.advance(55_000);
    let moved = bench.order(10_000).iter().zip(&before).filter(|(a, b)| a != b).count();
    println!("{moved} of 10,000 repeated SYNs met another server over one step of slow start");
    assert!(moved < 400, "{moved}");
}
