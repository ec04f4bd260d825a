//! Bodies that the receiver can make again from their seed, and so check byte for byte.

/// The body of a seed, as an endless stream of bytes.
#[derive(Debug, Clone)]
pub(crate) struct Pattern {
    seed: u64,
    position: u64,
}

impl Pattern {
    /// The stream of `seed`, from its beginning.
    pub(crate) fn new(seed: u64) -> Self {
        Self { seed, position: 0 }
    }

    /// Writes the next bytes to `out`.
    pub(crate) fn fill(&mut self, out: &mut [u8]) {
        for byte in out {
            *byte = self.next_byte();
        }
    }

    /// Whether `piece` is what comes next; goes on behind it.
    pub(crate) fn continues_with(&mut self, piece: &[u8]) -> bool {
        piece.iter().all(|byte| self.next_byte() == *byte)
    }

    fn next_byte(&mut self) -> u8 {
        let word = mix(self.seed ^ mix(self.position / 8));
        let byte = word.to_le_bytes()[(self.position % 8) as usize];
        self.position += 1;
        byte
    }
}

/// The finalizer of `splitmix64`.
pub(crate) fn mix(seed: u64) -> u64 {
    let mut word = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_recognised_in_pieces_of_any_size() {
        let mut body = vec![0; 1000];
        Pattern::new(7).fill(&mut body);
        let mut check = Pattern::new(7);
        for piece in body.chunks(33) {
            assert!(check.continues_with(piece));
        }
    }

    #[test]
    fn another_byte_seed_or_place_is_noticed() {
        let mut body = vec![0; 100];
        Pattern::new(7).fill(&mut body);
        assert!(!Pattern::new(8).continues_with(&body));
        assert!(!Pattern::new(7).continues_with(&body[1..]));
        body[99] ^= 1;
        assert!(!Pattern::new(7).continues_with(&body));
    }
}
