//! A line of numbers of which each server has a part, as long as its weight.

use crate::table::ServerId;

/// Servers with the sums of the weights up to and including each.
#[derive(Debug)]
pub(super) struct Shares {
    sums: Box<[(u64, ServerId)]>,
    total: u64,
}

impl Shares {
    /// `None` if there is no weight.
    pub(super) fn new(weights: &[(ServerId, u64)]) -> Option<Shares> {
        let divisor = weights.iter().fold(0, |divisor, (_, weight)| gcd(divisor, *weight));
        let mut total = 0;
        let sum = |&(server, weight): &(ServerId, u64)| {
            total += weight.checked_div(divisor).unwrap_or(0);
            (total, server)
        };
        let sums: Box<[_]> = weights.iter().map(sum).collect();
        (total > 0).then_some(Shares { sums, total })
    }

    /// The line's length.
    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// How many servers have a part.
    pub(super) fn servers(&self) -> usize {
        self.sums.len()
    }

    /// The place, in the order of the weights, of the server whose part of `0..total` holds `at`.
    pub(super) fn place(&self, at: u64) -> usize {
        self.sums.partition_point(|(sum, _)| *sum <= at).min(self.sums.len() - 1)
    }

    /// The server whose part of `0..total` holds `at`.
    pub(super) fn at(&self, at: u64) -> ServerId {
        self.sums[self.place(at)].1
    }

    /// The place of a number drawn from all 64-bit numbers.
    pub(super) fn drawn(&self, number: u64) -> usize {
        self.place(((u128::from(number) * u128::from(self.total)) >> 64) as u64)
    }

    /// The server at a place.
    pub(super) fn server(&self, place: usize) -> ServerId {
        self.sums[place].1
    }
}

/// The greatest common divisor; of 0 and a number, the number.
pub(super) fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// A step over `0..total` that comes by every number once before it repeats, and at any time has come by numbers far
/// apart from each other (the golden ratio's).
pub(super) fn golden_step(total: u64) -> u64 {
    let golden = ((u128::from(total) * 618 / 1000) as u64).max(1);
    (golden..total).find(|step| gcd(*step, total) == 1).unwrap_or(1)
}
