//! `random`: by a keyed hash over addresses, ports and ISN, so that a repeated SYN meets the same server. Datagrams are
//! numbered instead.

use std::sync::atomic::{AtomicU64, Ordering};

use shunt_stack::time::Instant;

use super::shares::Shares;
use super::weights::Weights;
use super::{Candidate, Request, Select, SelectKey, Terms};
use crate::table::ServerId;

#[derive(Debug)]
pub(super) struct Random {
    shares: Weights<Shares>,
    key: SelectKey,
    datagrams: AtomicU64,
}

impl Random {
    pub(super) fn new(candidates: &[Candidate], terms: Terms) -> Option<Random> {
        Some(Random {
            shares: Weights::new(candidates, terms)?,
            key: terms.key,
            datagrams: AtomicU64::new(0),
        })
    }
}

impl Select for Random {
    fn select(&self, request: &Request<'_>) -> ServerId {
        let shares = self.shares.current();
        let drawn = self.key.draw(request, || self.datagrams.fetch_add(1, Ordering::Relaxed));
        shares.server(shares.drawn(drawn.h1))
    }

    fn refresh(&self, now: Instant) -> Option<Instant> {
        self.shares.refresh(now)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Bench, keeps_to_the_weights, request};
    use super::*;
    use crate::config::PolicyName;
    use shunt_stack::wire::SeqNumber;

    #[test]
    fn connections_follow_the_weights() {
        keeps_to_the_weights(PolicyName::Random, 0.05);
    }

    #[test]
    fn b1_it_repeats_its_choice_for_a_repeated_syn_and_not_for_another_isn() {
        let bench = Bench::new(PolicyName::Random, &[1; 8]);
        assert!((0..100).all(|n| bench.select(n) == bench.select(n)));
        let other = |n| Request { isn: Some(SeqNumber(n)), ..request(1) };
        let first = bench.policy.select(&other(0));
        assert!((1..100).any(|n| bench.policy.select(&other(n)) != first));
    }

    #[test]
    fn o12_it_chooses_for_each_datagram_anew_and_keeps_to_the_weights() {
        let bench = Bench::new(PolicyName::Random, &[1, 3]);
        let datagram = Request { isn: None, ..request(1) };
        let of_heavy = (0..4000).filter(|_| bench.policy.select(&datagram).index() == 1).count();
        assert!((2800..3200).contains(&of_heavy), "{of_heavy}");
    }
}
