//! TCP sequence numbers.

use std::cmp::Ordering;
use std::fmt;
use std::ops::{Add, Sub};

/// A sequence number; comparisons are modulo 2^32 (RFC 9293 §3.4) and hold within half the space.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct SeqNumber(pub u32);

impl SeqNumber {
    /// Signed distance `self - other`, modulo 2^32.
    pub fn distance(self, other: SeqNumber) -> i32 {
        self.0.wrapping_sub(other.0).cast_signed()
    }

    /// `self < other`.
    pub fn before(self, other: SeqNumber) -> bool {
        self.distance(other) < 0
    }

    /// `self > other`.
    pub fn after(self, other: SeqNumber) -> bool {
        self.distance(other) > 0
    }

    /// `self <= other`.
    pub fn at_or_before(self, other: SeqNumber) -> bool {
        self.distance(other) <= 0
    }

    /// The later of the two.
    #[must_use]
    pub fn max(self, other: SeqNumber) -> SeqNumber {
        match self.distance(other).cmp(&0) {
            Ordering::Less => other,
            _ => self,
        }
    }
}

impl Add<u32> for SeqNumber {
    type Output = SeqNumber;

    fn add(self, rhs: u32) -> SeqNumber {
        SeqNumber(self.0.wrapping_add(rhs))
    }
}

impl Sub<u32> for SeqNumber {
    type Output = SeqNumber;

    fn sub(self, rhs: u32) -> SeqNumber {
        SeqNumber(self.0.wrapping_sub(rhs))
    }
}

impl fmt::Debug for SeqNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for SeqNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::SeqNumber;

    #[test]
    fn comparisons_wrap_around() {
        let high = SeqNumber(u32::MAX - 1);
        assert!(high.before(high + 5));
        assert!((high + 5).after(high));
        assert!(high.at_or_before(high));
        assert_eq!(high.max(high + 5), SeqNumber(3));
    }
}
