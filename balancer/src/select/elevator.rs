//! `elevator`: servers in their order and back again, as a lift goes: 1 to n, n to 1.
//!
//! A ride has as many stops as there are servers. With equal weights each server has one of them, and on the return
//! the last of a ride is the first of the next. A server of twice the mean weight has two stops in a row, one of half
//! the mean is passed by on every other ride; over time each has exactly its part.

use std::sync::atomic::{AtomicU64, Ordering};

use shunt_stack::time::Instant;

use super::shares::{Shares, golden_step};
use super::weights::{Drawn, Weights, pairs};
use super::{Candidate, Request, Select, Terms};
use crate::table::ServerId;

#[derive(Debug)]
pub(super) struct Elevator {
    shaft: Weights<Shaft>,
    stop: AtomicU64,
}

#[derive(Debug)]
struct Shaft {
    shares: Shares,
    /// By how much each pair of rides is shifted against the one before.
    step: u64,
}

impl Drawn for Shaft {
    fn build(candidates: &[Candidate], weights: &[u64]) -> Option<Shaft> {
        let shares = Shares::new(&pairs(candidates, weights))?;
        let step = golden_step(shares.total());
        Some(Shaft { shares, step })
    }
}

impl Shaft {
    /// Stops are equally far apart on the line of weights, so that each ride goes through it in order.
    fn stop(&self, number: u64) -> ServerId {
        let (stops, total) = (self.shares.servers() as u64, self.shares.total());
        let (ride, along) = (number / stops, number % stops);
        let along = if ride.is_multiple_of(2) { along } else { stops - 1 - along };
        let shift = u128::from(ride / 2) * u128::from(self.step) % u128::from(total);
        let at = (u128::from(along) * u128::from(total) + shift) / u128::from(stops);
        self.shares.at(at as u64)
    }
}

impl Elevator {
    pub(super) fn new(candidates: &[Candidate], terms: Terms) -> Option<Elevator> {
        Some(Elevator { shaft: Weights::new(candidates, terms)?, stop: AtomicU64::new(0) })
    }
}

impl Select for Elevator {
    fn select(&self, _: &Request<'_>) -> ServerId {
        self.shaft.current().stop(self.stop.fetch_add(1, Ordering::Relaxed))
    }

    fn refresh(&self, now: Instant) -> Option<Instant> {
        self.shaft.refresh(now)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Bench, keeps_to_the_weights};
    use crate::config::PolicyName;

    #[test]
    fn it_goes_up_and_down() {
        let bench = Bench::new(PolicyName::Elevator, &[1; 4]);
        assert_eq!(bench.order(12), [0, 1, 2, 3, 3, 2, 1, 0, 0, 1, 2, 3]);
        assert_eq!(Bench::new(PolicyName::Elevator, &[5]).order(3), [0, 0, 0]);
    }

    #[test]
    fn a_heavy_server_has_more_stops_and_a_light_one_is_passed_by() {
        let bench = Bench::new(PolicyName::Elevator, &[2, 4, 2, 1, 1]);
        let order = bench.order(20);
        for (ride, stops) in order.chunks(5).enumerate() {
            let up: Vec<usize> =
                if ride % 2 == 0 { stops.to_vec() } else { stops.iter().rev().copied().collect() };
            assert!(up.is_sorted(), "{order:?}");
            let of = |server| stops.iter().filter(|stop| **stop == server).count();
            assert_eq!((of(0), of(1), of(2), of(3) + of(4)), (1, 2, 1, 1), "{order:?}");
        }
    }

    #[test]
    fn stops_follow_the_weights() {
        keeps_to_the_weights(PolicyName::Elevator, 0.01);
        // Whole cycles are exact: 8 shifts of 2 rides of 3 stops.
        let bench = Bench::new(PolicyName::Elevator, &[1, 2, 5]);
        assert_eq!(bench.counts(8 * 2 * 3 * 10), [60.0, 120.0, 300.0]);
    }
}
