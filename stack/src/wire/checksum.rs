//! The Internet checksum (RFC 1071), whole and incremental (RFC 1624).

use std::net::IpAddr;

/// A running one's complement sum of 16-bit big-endian words, not yet folded: there is room for 2^32 pairs of them.
///
/// It is kept in the order of the bytes in memory, whatever that is here (RFC 1071 §2(B)): words that are read, summed
/// and written again are never swapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sum(u64);

impl Sum {
    /// The empty sum.
    #[inline]
    pub const fn new() -> Self {
        Sum(0)
    }

    /// Adds bytes as big-endian words; an odd last byte counts as the high half of a word.
    #[must_use]
    // A sum is no operand: the name is RFC 1071's.
    #[allow(clippy::should_implement_trait)]
    #[inline]
    pub fn add(mut self, bytes: &[u8]) -> Self {
        // Two words at once: 2^16 counts 1, whichever half a carry comes from (RFC 1071 §2(C)).
        let (doubles, rest) = bytes.as_chunks::<4>();
        for double in doubles {
            self.0 += u64::from(u32::from_ne_bytes(*double));
        }
        let (words, rest) = rest.as_chunks::<2>();
        for word in words {
            self.0 += u64::from(u16::from_ne_bytes(*word));
        }
        if let [last] = rest {
            self.0 += u64::from(u16::from_ne_bytes([*last, 0]));
        }
        self
    }

    /// Adds one word.
    #[must_use]
    #[inline]
    pub fn add_word(mut self, word: u16) -> Self {
        self.0 += u64::from(word.to_be());
        self
    }

    /// Takes bytes out again that were added at an even offset: adds their complement.
    #[must_use]
    #[inline]
    pub fn remove(mut self, bytes: &[u8]) -> Self {
        let (doubles, rest) = bytes.as_chunks::<4>();
        for double in doubles {
            self.0 += u64::from(!u32::from_ne_bytes(*double));
        }
        let (words, rest) = rest.as_chunks::<2>();
        for word in words {
            self.0 += u64::from(!u16::from_ne_bytes(*word));
        }
        if let [last] = rest {
            self.0 += u64::from(!u16::from_ne_bytes([*last, 0]));
        }
        self
    }

    /// Adds what another sum holds.
    #[must_use]
    #[inline]
    pub fn merge(mut self, other: Sum) -> Self {
        self.0 += other.0;
        self
    }

    /// Adds the pseudo-header of RFC 9293 §3.1 / RFC 8200 §8.1.
    #[must_use]
    pub fn add_pseudo_header(self, source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> Self {
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        self.add_address(source)
            .add_address(destination)
            .add_word(u16::from(protocol))
            .add(&length.to_be_bytes())
    }

    /// Adds the words of an address.
    #[must_use]
    pub fn add_address(self, address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => self.add(&address.octets()),
            IpAddr::V6(address) => self.add(&address.octets()),
        }
    }

    /// The sum as 16 bits, not complemented.
    #[inline]
    pub fn fold(self) -> u16 {
        u16::from_be(self.folded_in_memory())
    }

    #[inline]
    fn folded_in_memory(self) -> u16 {
        // Without a branch: whether there is a carry, nobody can predict.
        let (sum, carry) = ((self.0 >> 32) as u32).overflowing_add(self.0 as u32);
        let sum = sum + u32::from(carry);
        add_with_carry((sum >> 16) as u16, sum as u16)
    }

    /// The same as 16 bits, for those that use it more than once.
    #[inline]
    #[must_use]
    pub fn folded(self) -> Self {
        Sum(u64::from(self.folded_in_memory()))
    }

    /// The checksum: the complement of the sum.
    #[inline]
    pub fn checksum(self) -> u16 {
        !self.fold()
    }

    /// A checksum field after this change of what it covers: RFC 1624, equation 3.
    #[inline]
    pub fn update(self, checksum: u16) -> u16 {
        u16::from_be(!add_with_carry(self.folded_in_memory(), !checksum.to_be()))
    }

    /// A partial (pseudo-header only, uncomplemented) checksum field after this change of the pseudo-header.
    #[inline]
    pub fn update_partial(self, partial: u16) -> u16 {
        u16::from_be(add_with_carry(self.folded_in_memory(), partial.to_be()))
    }
}

/// One's complement addition.
#[inline]
fn add_with_carry(a: u16, b: u16) -> u16 {
    let (sum, carry) = a.overflowing_add(b);
    sum + u16::from(carry)
}

#[cfg(test)]
mod tests {
    use super::Sum;
    use proptest::prelude::*;

    #[test]
    fn rfc1071_example() {
        let sum = Sum::new().add(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(sum.fold(), 0xddf2);
    }

    #[test]
    fn rfc1624_example() {
        assert_eq!(Sum::new().remove(&[0x55, 0x55]).add(&[0x32, 0x85]).update(0xdd2f), 0x0000);
    }

    /// What the words that do not change add up to: both zeros of one's complement, their neighbours, the middle. With
    /// `SHUNT_TEST_FULL` all; else the two at which a carry or a zero is most easily missed.
    fn sums() -> &'static [u16] {
        const ALL: [u16; 8] = [0xffff, 0x0000, 0x0001, 0x7fff, 0x8000, 0xfffe, 0x1234, 0xabcd];
        if std::env::var_os("SHUNT_TEST_FULL").is_some() { &ALL } else { &ALL[..2] }
    }

    /// All 2^32 pairs of an old and a new word beside words that add up to `rest`.
    fn every_pair(rest: u16) {
        for old in 0..=u16::MAX {
            let before = Sum::new().add_word(rest).add_word(old).checksum();
            let removed = Sum::new().remove(&old.to_be_bytes());
            for new in 0..=u16::MAX {
                let updated = removed.add_word(new).update(before);
                let verified = Sum::new().add_word(rest).add_word(new).add_word(updated).fold();
                // Nothing but zeros has two right checksums, and only then the sum can be the other zero.
                let right = verified == 0xffff || (verified == 0 && rest == 0 && new == 0);
                assert!(
                    right,
                    "beside {rest:#06x}: {old:#06x} became {new:#06x}, {before:#06x} {updated:#06x}"
                );
            }
        }
    }

    #[test]
    fn every_change_of_a_word_leaves_the_checksum_right() {
        std::thread::scope(|scope| {
            for rest in sums() {
                scope.spawn(|| every_pair(*rest));
            }
        });
    }

    proptest! {
        #[test]
        fn an_updated_checksum_still_verifies(mut data in proptest::collection::vec(any::<u8>(), 4..64), new in any::<[u8; 2]>(), at in 0usize..1000) {
            let at = (at % (data.len() / 2)) * 2;
            let before = Sum::new().add(&data).checksum();
            let change = Sum::new().remove(&data[at..at + 2]).add(&new);
            data[at..at + 2].copy_from_slice(&new);
            let sum = Sum::new().add(&data).add_word(change.update(before)).fold();
            // One's complement has two zeros; all-zero data is the only case in which the sum can be the other one.
            prop_assert!(sum == 0xffff || (sum == 0 && data.iter().all(|b| *b == 0)));
        }
    }
}
