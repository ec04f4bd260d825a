//! `round-robin`: in turn; a server of weight 2 has two turns a round, apart from each other.

use std::sync::atomic::{AtomicU64, Ordering};

use shunt_stack::time::Instant;

use super::shares::{Shares, golden_step};
use super::weights::{Drawn, Weights, pairs};
use super::{Candidate, Request, Select, Terms};
use crate::table::ServerId;

#[derive(Debug)]
pub(super) struct RoundRobin {
    round: Weights<Round>,
    turn: AtomicU64,
}

#[derive(Debug)]
struct Round {
    shares: Shares,
    step: u64,
}

impl Drawn for Round {
    fn build(candidates: &[Candidate], weights: &[u64]) -> Option<Round> {
        let shares = Shares::new(&pairs(candidates, weights))?;
        // Equal servers go in their order; otherwise a server's turns are spread over the round.
        let equal = shares.total() == candidates.len() as u64;
        let step = if equal { 1 } else { golden_step(shares.total()) };
        Some(Round { shares, step })
    }
}

impl RoundRobin {
    pub(super) fn new(candidates: &[Candidate], terms: Terms) -> Option<RoundRobin> {
        Some(RoundRobin { round: Weights::new(candidates, terms)?, turn: AtomicU64::new(0) })
    }
}

impl Select for RoundRobin {
    fn select(&self, _: &Request<'_>) -> ServerId {
        let round = self.round.current();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % round.shares.total();
        let at = u128::from(turn) * u128::from(round.step) % u128::from(round.shares.total());
        round.shares.at(at as u64)
    }

    fn refresh(&self, now: Instant) -> Option<Instant> {
        self.round.refresh(now)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Bench, keeps_to_the_weights};
    use crate::config::PolicyName;

    #[test]
    fn it_is_exact_and_takes_equal_servers_in_order() {
        keeps_to_the_weights(PolicyName::RoundRobin, 0.01);
        let bench = Bench::new(PolicyName::RoundRobin, &[1, 2, 5]);
        assert_eq!(bench.counts(800), [100.0, 200.0, 500.0]);
        assert_eq!(Bench::new(PolicyName::RoundRobin, &[7, 7, 7]).order(6), [0, 1, 2, 0, 1, 2]);
    }

    #[test]
    fn a_heavy_servers_turns_are_spread() {
        let order = Bench::new(PolicyName::RoundRobin, &[4, 4, 1, 1]).order(20);
        let longest = order.chunk_by(|a, b| a == b).map(<[usize]>::len).max();
        assert!(longest <= Some(2), "{order:?}");
    }
}
