//! `least-load`: by what servers, or somebody for them, say of their load.
//!
//! A server's part of the new connections is its weight times what is left of it (1 - load), drawn as `random` draws.
//! So parts change smoothly with loads: a small difference makes a small one, and while a load is not told anew, nobody
//! meets all the clients: at most twice the part that the weight alone gives. Loads that are not known, or too old,
//! count as the mean of those known. The draw repeats for a repeated SYN (`B1`), nearly always with the same result when
//! loads have changed in between.

use std::time::Duration;

use shunt_stack::time::Instant;

use super::shares::Shares;
use super::weights::Weights;
use super::{Candidate, Request, Select, SelectKey, Terms};
use crate::table::ServerId;

/// What a server counts as having left when it is full: if all are, weights decide.
const LEAST_LEFT: f64 = 0.01;
/// The most times its weight's part that a server gets.
const MOST: f64 = 2.0;
/// Parts are whole numbers out of this.
const WHOLE: f64 = 1e9;

#[derive(Debug)]
pub(super) struct LeastLoad {
    shares: Weights<Shares>,
    key: SelectKey,
    max_age: Duration,
}

impl LeastLoad {
    pub(super) fn new(candidates: &[Candidate], terms: Terms) -> Option<LeastLoad> {
        let shares = Weights::new(candidates, terms)?;
        Some(LeastLoad { shares, key: terms.key, max_age: terms.load_max_age })
    }

    /// What each server has left where that is known, and when the first of it will be too old.
    fn left(&self, now: Instant) -> (Vec<Option<f64>>, Option<Instant>) {
        let mut until = None;
        let left = |candidate: &Candidate| {
            let (load, told) = candidate.live.load().filter(|(_, told)| now.since(*told) <= self.max_age)?;
            let end = told + self.max_age + Duration::from_millis(1);
            until = Some(until.map_or(end, |until: Instant| until.min(end)));
            Some((1.0 - f64::from(load)).max(LEAST_LEFT))
        };
        (self.shares.candidates().iter().map(left).collect(), until)
    }
}

impl Select for LeastLoad {
    fn select(&self, request: &Request<'_>) -> ServerId {
        let shares = self.shares.current();
        shares.server(shares.drawn(self.key.draw(request, || 0).h1))
    }

    fn refresh(&self, now: Instant) -> Option<Instant> {
        let (weights, grows) = self.shares.grown(now);
        let (left, ends) = self.left(now);
        self.shares.rebuild(parts(weights, &left));
        grows.into_iter().chain(ends).min()
    }
}

/// The weights by what is left; as they are if nothing is known.
fn parts(weights: Vec<u64>, left: &[Option<f64>]) -> Vec<u64> {
    let known = || weights.iter().zip(left).filter_map(|(weight, left)| Some((*weight as f64, (*left)?)));
    let known_weight: f64 = known().map(|(weight, _)| weight).sum();
    if known_weight <= 0.0 {
        return weights;
    }
    let mean = known().map(|(weight, left)| weight * left).sum::<f64>() / known_weight;
    let total: f64 = weights.iter().map(|weight| *weight as f64).sum();
    let wanted: Vec<f64> =
        weights.iter().zip(left).map(|(weight, left)| *weight as f64 * left.unwrap_or(mean)).collect();
    let mut capped = vec![false; weights.len()];
    let (mut open_wanted, mut open_part) = (wanted.iter().sum::<f64>(), 1.0);
    // What a server may not have goes to the others, which may then have too much themselves.
    loop {
        let (scale, before) = (open_part / open_wanted, open_part);
        for index in 0..weights.len() {
            let most = MOST * weights[index] as f64 / total;
            if !capped[index] && wanted[index] * scale > most {
                capped[index] = true;
                open_wanted -= wanted[index];
                open_part -= most;
            }
        }
        if open_part >= before || open_wanted <= 0.0 || open_part <= 0.0 {
            break;
        }
    }
    let scale = if open_wanted > 0.0 { open_part.max(0.0) / open_wanted } else { 0.0 };
    let part = |index: usize| {
        let part = if capped[index] { MOST * weights[index] as f64 / total } else { wanted[index] * scale };
        ((part * WHOLE) as u64).max(1)
    };
    (0..weights.len()).map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Bench, keeps_to_the_weights};
    use crate::config::PolicyName;

    fn bench(weights: &[u32], loads: &[Option<f32>]) -> Bench {
        let mut bench = Bench::new(PolicyName::LeastLoad, weights);
        bench.advance(1_000_000);
        for (server, load) in loads.iter().enumerate() {
            if let Some(load) = load {
                bench.lives.set_load(&format!("s{server}"), *load).unwrap();
            }
        }
        bench.advance(1_000_000);
        bench
    }

    fn near(counts: &[f64], wanted: &[f64]) {
        let sum: f64 = counts.iter().sum();
        let whole: f64 = wanted.iter().sum();
        for (count, part) in counts.iter().zip(wanted) {
            assert!((count / sum - part / whole).abs() < 0.015, "{counts:?}, wanted {wanted:?}");
        }
    }

    #[test]
    fn without_loads_and_with_equal_ones_connections_follow_the_weights() {
        keeps_to_the_weights(PolicyName::LeastLoad, 0.05);
        for load in [0.0, 0.3, 1.0] {
            near(&bench(&[1, 2, 5], &[Some(load); 3]).counts(20_000), &[1.0, 2.0, 5.0]);
        }
    }

    #[test]
    fn what_is_left_decides_and_weights_count() {
        near(&bench(&[1, 1], &[Some(0.9), Some(0.1)]).counts(20_000), &[0.1, 0.9]);
        near(&bench(&[1, 1], &[Some(1.0), Some(0.0)]).counts(20_000), &[0.01, 1.0]);
        near(&bench(&[1, 3, 1], &[Some(0.5), Some(0.5), Some(0.75)]).counts(20_000), &[2.0, 6.0, 1.0]);
        // A small difference makes a small one.
        near(&bench(&[1, 1], &[Some(0.50), Some(0.52)]).counts(20_000), &[0.50, 0.48]);
    }

    #[test]
    fn an_unknown_load_counts_as_the_mean() {
        near(&bench(&[1, 1, 1], &[Some(0.2), None, Some(0.6)]).counts(20_000), &[0.8, 0.6, 0.4]);
    }

    #[test]
    fn an_idle_server_among_busy_ones_meets_no_more_than_twice_its_part() {
        let mut loads = [Some(0.99); 10];
        loads[3] = Some(0.0);
        let counts = bench(&[1; 10], &loads).counts(40_000);
        assert!((counts[3] / 40_000.0 - 0.2).abs() < 0.015, "{counts:?}");
        // Two of them leave the rest to the others, too.
        loads[4] = Some(0.5);
        let counts = bench(&[1; 10], &loads).counts(40_000);
        assert!(counts[3] < 8800.0 && counts[4] < 8800.0, "{counts:?}");
    }

    #[test]
    fn an_old_load_no_longer_counts() {
        let mut bench = bench(&[1, 1], &[Some(0.9), Some(0.1)]);
        bench.advance(1_029_000);
        near(&bench.counts(20_000), &[0.1, 0.9]);
        bench.lives.set_load("s0", 0.9).unwrap();
        bench.advance(1_031_000);
        near(&bench.counts(20_000), &[1.0, 1.0]);
        bench.lives.set_load("s1", 0.4).unwrap();
        bench.advance(1_031_001);
        near(&bench.counts(20_000), &[0.1, 0.6]);
        bench.advance(1_100_000);
        near(&bench.counts(20_000), &[1.0, 1.0]);
    }
}
