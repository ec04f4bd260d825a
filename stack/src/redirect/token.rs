//! Tokens (PROTOCOL.md §10, `T1`): proof to a server that a client was sent to its service port, and not long ago.
//!
//! A token is eight bytes: the number of the key and of the 32-second slot it was made in, and 56 bits of a keyed hash
//! over what it is good for. It is bound to the client's address, not to its port or any sequence number: a client that
//! connects again within the minute may use it again.

use std::collections::BTreeMap;
use std::fmt;
use std::hash::Hasher;
use std::net::IpAddr;

use siphasher::sip::SipHasher24;
use thiserror::Error;

/// Seconds of a slot. A token is good in the slot before, its own and the one after: for 32 to 64 seconds, and for
/// hosts whose clocks differ by as much.
pub const SLOT_SECONDS: u64 = 32;
/// Keys that can be in use at once; their numbers are below this.
pub const MAX_KEYS: u8 = 4;

const SLOT_MASK: u8 = 0x3f;
const KEY_SHIFT: u8 = 6;
const DOMAIN: &[u8] = b"PR1";

/// What a token is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Purpose {
    /// The shared address.
    pub vip: IpAddr,
    /// The client's address, as the server sees it.
    pub client: IpAddr,
    /// The redirect port it asked (X).
    pub redirect_port: u16,
    /// The service port it was sent to (Y).
    pub service_port: u16,
}

/// Why a token is not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Error)]
pub enum TokenError {
    /// No key of that number is known.
    #[error("no key {0}")]
    UnknownKey(u8),
    /// Made in none of the three slots that count now.
    #[error("expired")]
    Expired,
    /// The hash differs: forged, damaged, or made for another client, address or port.
    #[error("made for something else, or forged")]
    Mismatch,
}

/// Why a file of keys is refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("line {line}: {problem}")]
pub struct KeysError {
    /// The line, from 1.
    pub line: usize,
    /// A sentence.
    pub problem: String,
}

/// The secret keys of a deployment: the same at everybody who makes or checks tokens.
///
/// Rotation without a gap (`T6`): add the new key below the old one everywhere, then move it to the first line
/// everywhere, then, a minute later, remove the old one.
#[derive(Clone, PartialEq, Eq)]
pub struct TokenKeys {
    /// The one that makes tokens.
    current: u8,
    keys: BTreeMap<u8, [u8; 16]>,
}

impl TokenKeys {
    /// Reads a file of keys: a line each, a number from 0 to 3 and 32 hexadecimal digits; the first makes tokens, all
    /// are accepted. `#` begins a comment.
    ///
    /// # Errors
    /// The line and what is wrong with it; no text of a key is repeated.
    pub fn parse(text: &str) -> Result<TokenKeys, KeysError> {
        let mut keys = BTreeMap::new();
        let mut current = None;
        for (index, line) in text.lines().enumerate() {
            let wrong = |problem: &str| KeysError { line: index + 1, problem: problem.to_owned() };
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.is_empty() {
                continue;
            }
            let words: Vec<&str> = line.split_whitespace().collect();
            let [number, digits] = words[..] else {
                return Err(wrong("write the key's number (0 to 3), a space and 32 hexadecimal digits"));
            };
            let number: u8 = number
                .parse()
                .ok()
                .filter(|number| *number < MAX_KEYS)
                .ok_or_else(|| wrong("the key's number is from 0 to 3"))?;
            let key = hexadecimal(digits)
                .ok_or_else(|| wrong("a key is 32 hexadecimal digits; `openssl rand -hex 16` makes one"))?;
            if keys.insert(number, key).is_some() {
                return Err(wrong("this number has a key already"));
            }
            current.get_or_insert(number);
        }
        let current = current.ok_or_else(|| KeysError { line: 1, problem: "there is no key".to_owned() })?;
        Ok(TokenKeys { current, keys })
    }

    /// The number of the key that a token says it was made under.
    pub fn number(token: [u8; 8]) -> u8 {
        token[0] >> KEY_SHIFT
    }

    /// A token made now; `seconds` is Unix time.
    pub fn make(&self, seconds: u64, purpose: &Purpose) -> [u8; 8] {
        let slot = seconds / SLOT_SECONDS;
        let head = (self.current << KEY_SHIFT) | (slot as u8 & SLOT_MASK);
        // `parse` took the current number from the keys.
        let key = self.keys.get(&self.current).copied().unwrap_or_default();
        digest(&key, head, slot, purpose)
    }

    /// Whether a token is good now; `seconds` is Unix time.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self, seconds: u64, purpose: &Purpose, token: [u8; 8]) -> Result<(), TokenError> {
        let head = token[0];
        let number = TokenKeys::number(token);
        let key = self.keys.get(&number).ok_or(TokenError::UnknownKey(number))?;
        let now = seconds / SLOT_SECONDS;
        let slot = [now.checked_sub(1), Some(now), now.checked_add(1)]
            .into_iter()
            .flatten()
            .find(|slot| *slot as u8 & SLOT_MASK == head & SLOT_MASK)
            .ok_or(TokenError::Expired)?;
        let expected = digest(key, head, slot, purpose);
        // Every byte is looked at, so that the time taken tells nothing about where they differ.
        let difference = expected.iter().zip(token).fold(0, |sum, (a, b)| sum | (a ^ b));
        if difference == 0 { Ok(()) } else { Err(TokenError::Mismatch) }
    }
}

impl fmt::Debug for TokenKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenKeys").field("numbers", &self.keys.keys()).finish_non_exhaustive()
    }
}

fn hexadecimal(digits: &str) -> Option<[u8; 16]> {
    // `from_str_radix` would take a sign.
    let good = digits.len() == 32 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    good.then(|| u128::from_str_radix(digits, 16).ok().map(u128::to_be_bytes)).flatten()
}

fn digest(key: &[u8; 16], head: u8, slot: u64, purpose: &Purpose) -> [u8; 8] {
    let mut hasher = SipHasher24::new_with_key(key);
    hasher.write(DOMAIN);
    hasher.write(&[head]);
    hasher.write(&slot.to_be_bytes());
    for address in [purpose.vip, purpose.client] {
        match address {
            IpAddr::V4(address) => hasher.write(&address.octets()),
            IpAddr::V6(address) => hasher.write(&address.octets()),
        }
    }
    hasher.write(&purpose.redirect_port.to_be_bytes());
    hasher.write(&purpose.service_port.to_be_bytes());
    let mut token = [head; 8];
    token[1..].copy_from_slice(&hasher.finish().to_be_bytes()[..7]);
    token
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000;
    const KEYS: &str =
        "# ours\n1 000102030405060708090a0b0c0d0e0f  # makes tokens\n3 ffffffffffffffffffffffffffffffff\n";

    fn purpose() -> Purpose {
        Purpose {
            vip: "203.0.113.10".parse().unwrap(),
            client: "198.51.100.7".parse().unwrap(),
            redirect_port: 443,
            service_port: 41_001,
        }
    }

    fn keys() -> TokenKeys {
        TokenKeys::parse(KEYS).unwrap()
    }

    #[test]
    fn a_token_is_good_where_and_when_it_was_made() {
        let token = keys().make(NOW, &purpose());
        assert_eq!(token[0] >> 6, 1);
        assert_eq!(keys().check(NOW, &purpose(), token), Ok(()));
        for later in [0, 31, 32, 63] {
            let start = NOW / SLOT_SECONDS * SLOT_SECONDS;
            let token = keys().make(start, &purpose());
            assert_eq!(keys().check(start + later, &purpose(), token), Ok(()), "{later}");
        }
        // The checker's clock may be behind.
        assert_eq!(keys().check(NOW - SLOT_SECONDS, &purpose(), token), Ok(()));
    }

    #[test]
    fn it_expires_and_does_not_come_back_when_the_slots_low_bits_do() {
        let token = keys().make(NOW, &purpose());
        assert_eq!(keys().check(NOW + 2 * SLOT_SECONDS, &purpose(), token), Err(TokenError::Expired));
        assert_eq!(keys().check(NOW - 2 * SLOT_SECONDS, &purpose(), token), Err(TokenError::Expired));
        let again = NOW + 64 * SLOT_SECONDS;
        assert_eq!(keys().check(again, &purpose(), token), Err(TokenError::Mismatch));
    }

    #[test]
    fn it_is_good_for_nothing_else() {
        let token = keys().make(NOW, &purpose());
        let others = [
            Purpose { vip: "203.0.113.11".parse().unwrap(), ..purpose() },
            Purpose { client: "198.51.100.8".parse().unwrap(), ..purpose() },
            Purpose { redirect_port: 80, ..purpose() },
            Purpose { service_port: 41_002, ..purpose() },
        ];
        for other in others {
            assert_eq!(keys().check(NOW, &other, token), Err(TokenError::Mismatch), "{other:?}");
        }
    }

    #[test]
    fn every_changed_bit_is_noticed() {
        let token = u64::from_be_bytes(keys().make(NOW, &purpose()));
        for bit in 0..64 {
            let changed = (token ^ (1 << bit)).to_be_bytes();
            assert!(keys().check(NOW, &purpose(), changed).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_key_is_replaced_without_a_gap() {
        let (old, new) = ("0 00000000000000000000000000000001", "1 00000000000000000000000000000002");
        let steps = [old.to_owned(), format!("{old}\n{new}"), format!("{new}\n{old}"), new.to_owned()];
        let steps: Vec<TokenKeys> = steps.iter().map(|text| TokenKeys::parse(text).unwrap()).collect();
        // Somebody may be a step behind the others.
        for pair in steps.windows(2) {
            for (maker, checker) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                let token = pair[maker].make(NOW, &purpose());
                assert_eq!(pair[checker].check(NOW, &purpose(), token), Ok(()), "{maker} {checker}");
            }
        }
        let token = steps[0].make(NOW, &purpose());
        assert_eq!(steps[3].check(NOW, &purpose(), token), Err(TokenError::UnknownKey(0)));
    }

    #[test]
    fn wrong_files_are_refused_with_their_line_and_without_the_key() {
        let good = "0 00000000000000000000000000000001\n";
        for (line, text) in [
            (1, String::new()),
            (1, "# nothing\n".to_owned()),
            (2, format!("{good}4 00000000000000000000000000000001")),
            (2, format!("{good}0 00000000000000000000000000000002")),
            (2, format!("{good}1 0000000000000000000000000000000")),
            (2, format!("{good}1 +000000000000000000000000000000f")),
            (3, format!("{good}\n1")),
            (2, format!("{good}1 2 3")),
        ] {
            let error = TokenKeys::parse(&text).unwrap_err();
            assert_eq!(error.line, line, "{text:?}");
            assert!(!error.to_string().contains("00000"), "{error}");
        }
        assert!(!format!("{:?}", keys()).contains("102"), "keys do not show");
    }
}
