//! Who may open a connection at a service port (PROTOCOL.md §10, `T4`): whether a token is demanded, and whether one is
//! good. Servers' agents and balancers ask alike.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::client::Prefix;
use super::token::{Purpose, TokenError, TokenKeys};
use crate::time::Instant;

/// The time over which SYNs are counted.
const SECOND: Duration = Duration::from_secs(1);
/// How long there must be less than half the load before tokens are no longer demanded.
pub const LOAD_CALM: Duration = Duration::from_secs(10);

/// When SYNs to service ports need a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Require {
    /// Never; tokens are made, for others that demand them.
    #[default]
    Never,
    /// While more SYNs come than [`TokenPolicy::under_load`] says.
    UnderLoad,
    /// Always.
    Always,
}

/// Why a SYN to a service port is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Error)]
pub enum TokenRefusal {
    /// It has no token.
    #[error("no token")]
    Missing,
    /// The token is made under a key that is not known.
    #[error("a token of key {0}, which is not known")]
    UnknownKey(u8),
    /// The token is too old, or of the future.
    #[error("an expired token")]
    Expired,
    /// The token is forged, damaged, or made for another client, address or port.
    #[error("a token for something else, or a forged one")]
    Mismatch,
}

impl From<TokenError> for TokenRefusal {
    fn from(error: TokenError) -> Self {
        match error {
            TokenError::UnknownKey(key) => TokenRefusal::UnknownKey(key),
            TokenError::Expired => TokenRefusal::Expired,
            TokenError::Mismatch => TokenRefusal::Mismatch,
        }
    }
}

/// What makers and checkers of tokens go by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenPolicy {
    /// Without any no token is made, and each one met is of an unknown key.
    pub keys: Option<Arc<TokenKeys>>,
    /// When tokens are demanded.
    pub require: Require,
    /// SYNs to service ports in a second beyond which [`Require::UnderLoad`] demands tokens.
    pub under_load: u32,
    /// Sources that need none, such as those of health checks.
    pub trusted: Vec<Prefix>,
}

impl Default for TokenPolicy {
    fn default() -> Self {
        TokenPolicy { keys: None, require: Require::Never, under_load: 1000, trusted: Vec::new() }
    }
}

impl TokenPolicy {
    /// A token made now, if there are keys; `unix` is Unix time in seconds.
    pub fn token(&self, unix: u64, purpose: &Purpose) -> Option<[u8; 8]> {
        self.keys.as_ref().map(|keys| keys.make(unix, purpose))
    }

    /// Whether tokens are demanded at all, now or at other times: then T comes before O where room is short (`W2`).
    pub fn may_demand(&self) -> bool {
        self.require != Require::Never
    }

    /// Whether a source needs no token.
    pub fn trusts(&self, source: IpAddr) -> bool {
        self.trusted.iter().any(|prefix| prefix.contains(source))
    }

    /// Whether a SYN to a service port passes; `gauge` counts it, `unix` is Unix time in seconds. A token for
    /// `other_vip` is as good: a server is also reached by an address of its own (§7).
    ///
    /// # Errors
    /// Why not.
    pub fn admit(
        &self,
        gauge: &mut Gauge,
        now: Instant,
        unix: u64,
        purpose: &Purpose,
        other_vip: Option<IpAddr>,
        token: Option<[u8; 8]>,
    ) -> Result<(), TokenRefusal> {
        if !self.may_demand() || self.trusts(purpose.client) {
            return Ok(());
        }
        if self.require == Require::UnderLoad && !gauge.count(now, self.under_load) {
            return Ok(());
        }
        let token = token.ok_or(TokenRefusal::Missing)?;
        let Some(keys) = &self.keys else { return Err(TokenRefusal::UnknownKey(TokenKeys::number(token))) };
        let checked = keys.check(unix, purpose, token);
        Ok(match (checked, other_vip) {
            (Err(TokenError::Mismatch), Some(vip)) => keys.check(unix, &Purpose { vip, ..*purpose }, token),
            (checked, _) => checked,
        }?)
    }
}

/// How many SYNs come, with hysteresis (`T5`): loaded as soon as more than the limit have come in a second, and until no
/// more than half of it have come in every second for [`LOAD_CALM`].
#[derive(Debug, Clone, Copy, Default)]
pub struct Gauge {
    second: Instant,
    count: u32,
    loaded: bool,
    busy: Instant,
}

impl Gauge {
    /// Counts a SYN; whether there is load, of more than `limit` in a second.
    fn count(&mut self, now: Instant, limit: u32) -> bool {
        if now < self.second || now.since(self.second) >= SECOND {
            if self.count > limit / 2 {
                self.busy = self.second + SECOND;
            }
            (self.second, self.count) = (now, 0);
            self.loaded &= now.since(self.busy) < LOAD_CALM;
        }
        self.count = self.count.saturating_add(1);
        if self.count > limit {
            (self.loaded, self.busy) = (true, now);
        }
        self.loaded
    }

    /// Whether there was load when the last SYN came.
    pub fn is_loaded(&self) -> bool {
        self.loaded
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIX: u64 = 1_800_000_000;

    fn purpose() -> Purpose {
        Purpose {
            vip: "203.0.113.10".parse().unwrap(),
            client: "198.51.100.7".parse().unwrap(),
            redirect_port: 443,
            service_port: 41_001,
        }
    }

    fn policy(require: Require) -> TokenPolicy {
        let keys = TokenKeys::parse("1 000102030405060708090a0b0c0d0e0f").unwrap();
        let trusted = vec![Prefix { address: "192.0.2.0".parse().unwrap(), length: 24 }];
        TokenPolicy { keys: Some(Arc::new(keys)), require, under_load: 10, trusted }
    }

    #[test]
    fn always_means_that_only_good_tokens_and_trusted_sources_pass() {
        let policy = policy(Require::Always);
        let mut gauge = Gauge::default();
        // However many come, it is no load that tokens are demanded for.
        for _ in 0..100 {
            let refused = policy.admit(&mut gauge, Instant::ZERO, UNIX, &purpose(), None, None);
            assert_eq!(refused, Err(TokenRefusal::Missing));
        }
        assert!(!gauge.is_loaded());
        let mut admit =
            |purpose: &Purpose, token| policy.admit(&mut gauge, Instant::ZERO, UNIX, purpose, None, token);
        let token = policy.token(UNIX, &purpose()).unwrap();
        assert_eq!(admit(&purpose(), Some(token)), Ok(()));
        assert_eq!(admit(&purpose(), None), Err(TokenRefusal::Missing));
        let other = Purpose { client: "198.51.100.8".parse().unwrap(), ..purpose() };
        assert_eq!(admit(&other, Some(token)), Err(TokenRefusal::Mismatch));
        let old = policy.token(UNIX - 100, &purpose());
        assert_eq!(admit(&purpose(), old), Err(TokenRefusal::Expired));
        let foreign = [token[0] ^ 0x80, 1, 2, 3, 4, 5, 6, 7];
        assert_eq!(admit(&purpose(), Some(foreign)), Err(TokenRefusal::UnknownKey(3)));
        let trusted = Purpose { client: "192.0.2.200".parse().unwrap(), ..purpose() };
        assert_eq!(admit(&trusted, None), Ok(()));
        let keyless = TokenPolicy { keys: None, ..policy.clone() };
        assert_eq!(keyless.token(UNIX, &purpose()), None);
        let refused = keyless.admit(&mut gauge, Instant::ZERO, UNIX, &purpose(), None, Some(token));
        assert_eq!(refused, Err(TokenRefusal::UnknownKey(1)));
    }

    #[test]
    fn never_means_that_nothing_is_looked_at() {
        let mut gauge = Gauge::default();
        for token in [None, Some([0; 8])] {
            let admitted =
                policy(Require::Never).admit(&mut gauge, Instant::ZERO, UNIX, &purpose(), None, token);
            assert_eq!(admitted, Ok(()));
        }
    }

    #[test]
    fn under_load_switches_on_at_once_and_off_after_a_calm() {
        let policy = policy(Require::UnderLoad);
        let mut gauge = Gauge::default();
        let mut syns = |millis: u64, count: usize| {
            let now = Instant::from_millis(millis);
            let admit = |_| policy.admit(&mut gauge, now, UNIX, &purpose(), None, None).is_ok();
            (0..count).map(admit).filter(|passed| *passed).count()
        };
        assert_eq!(syns(0, 10), 10);
        assert_eq!(syns(1000, 10), 10, "as many as the limit says");
        assert_eq!(syns(2000, 30), 10);
        // More than half of the limit is no calm.
        for second in 3..30 {
            assert_eq!(syns(second * 1000, 6), 0, "{second}");
        }
        for second in 30..39 {
            assert_eq!(syns(second * 1000, 5), 0, "{second}");
        }
        assert_eq!(syns(40_000, 5), 5);
        // And a silence is one.
        assert_eq!(syns(50_000, 11), 10);
        assert_eq!(syns(61_000, 1), 1);
    }
}
