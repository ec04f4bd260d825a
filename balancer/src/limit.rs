//! Limits by token buckets, without a clock: the time comes with each packet.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use shunt_stack::time::Instant;

use crate::config::RateLimits;

/// Which limit of a service was exceeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Limit {
    /// `packets_per_s`; a super-packet counts as its segments.
    Packets,
    /// `bytes_per_s`, IP headers included.
    Bytes,
    /// `new_per_s`: SYNs that open a connection.
    New,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Limit::Packets => "packets_per_s",
            Limit::Bytes => "bytes_per_s",
            Limit::New => "new_per_s",
        })
    }
}

/// Parts of a nanosecond that buckets count in, so that fast rates are kept closely; they suffice for 36 years.
const PARTS: u64 = 16;
const SECOND: u64 = 1_000_000_000 * PARTS;

/// A token bucket in one word: the time at which it will be full again, if nothing more is taken.
///
/// What is taken may overdraw it, once: so anything passes now and then whatever its size, and the rate is kept over
/// time.
#[derive(Debug)]
struct Bucket {
    full_at: AtomicU64,
    rate: u64,
    depth: u64,
}

impl Bucket {
    fn new(rate: u64, burst: Duration) -> Bucket {
        let depth = u64::try_from(burst.as_nanos()).unwrap_or(u64::MAX / PARTS).saturating_mul(PARTS);
        Bucket { full_at: AtomicU64::new(0), rate, depth }
    }

    /// The time in which so many tokens come.
    fn cost(&self, tokens: u64) -> u64 {
        let cost = u128::from(tokens) * u128::from(SECOND) / u128::from(self.rate);
        u64::try_from(cost).unwrap_or(u64::MAX)
    }

    /// Takes tokens if any are left.
    fn take(&self, now: Instant, tokens: u64) -> bool {
        let now = now.micros().saturating_mul(1000 * PARTS);
        let cost = self.cost(tokens);
        let taken = |full_at: u64| {
            let full_at = full_at.max(now);
            (full_at - now < self.depth).then(|| full_at.saturating_add(cost))
        };
        self.full_at.fetch_update(Relaxed, Relaxed, taken).is_ok()
    }

    /// Puts back what was taken.
    fn put_back(&self, tokens: u64) {
        let cost = self.cost(tokens);
        let _ = self.full_at.fetch_update(Relaxed, Relaxed, |full_at| Some(full_at.saturating_sub(cost)));
    }
}

/// A service's buckets.
#[derive(Debug)]
pub(crate) struct Limiter {
    limits: RateLimits,
    new: Option<Bucket>,
    packets: Option<Bucket>,
    bytes: Option<Bucket>,
}

/// What a packet takes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    pub(crate) opens: bool,
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
}

impl Limiter {
    pub(crate) fn new(limits: RateLimits) -> Limiter {
        let bucket = |rate: Option<u64>| rate.map(|rate| Bucket::new(rate, limits.burst));
        Limiter {
            limits,
            new: bucket(limits.new_per_s),
            packets: bucket(limits.packets_per_s),
            bytes: bucket(limits.bytes_per_s),
        }
    }

    /// What it was made for.
    pub(crate) fn limits(&self) -> RateLimits {
        self.limits
    }

    /// Whether a packet passes; one that does not takes nothing.
    pub(crate) fn admit(&self, now: Instant, load: Load) -> Result<(), Limit> {
        let wanted = [
            (self.new.as_ref().filter(|_| load.opens), 1, Limit::New),
            (self.packets.as_ref(), load.packets, Limit::Packets),
            (self.bytes.as_ref(), load.bytes, Limit::Bytes),
        ];
        for (index, (bucket, tokens, limit)) in wanted.iter().enumerate() {
            if bucket.is_some_and(|bucket| !bucket.take(now, *tokens)) {
                for (bucket, tokens, _) in &wanted[..index] {
                    if let Some(bucket) = bucket {
                        bucket.put_back(*tokens);
                    }
                }
                return Err(*limit);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::cast_precision_loss, reason = "bounds with a margin")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limits(packets: Option<u64>, bytes: Option<u64>, new: Option<u64>) -> RateLimits {
        let burst = Duration::from_millis(100);
        RateLimits { packets_per_s: packets, bytes_per_s: bytes, new_per_s: new, burst }
    }

    const SEGMENT: Load = Load { opens: false, packets: 1, bytes: 1000 };
    const SYN: Load = Load { opens: true, packets: 1, bytes: 60 };

    #[test]
    fn a_full_bucket_gives_its_burst_at_once_and_then_the_rate() {
        let limiter = Limiter::new(limits(Some(1000), None, None));
        let at_once =
            (0..1000).filter(|_| limiter.admit(Instant::from_millis(5000), SEGMENT).is_ok()).count();
        assert_eq!(at_once, 100);
        let second = (5001..=6000)
            .flat_map(|milli| (0..10).map(move |_| milli))
            .filter(|milli| limiter.admit(Instant::from_millis(*milli), SEGMENT).is_ok());
        assert_eq!(second.count(), 1000);
        // However long nothing came.
        let at_once =
            (0..1000).filter(|_| limiter.admit(Instant::from_millis(90_000), SEGMENT).is_ok()).count();
        assert_eq!(at_once, 100);
    }

    #[test]
    fn what_is_larger_than_the_burst_passes_and_is_paid_for_afterwards() {
        let limiter = Limiter::new(limits(None, Some(1000), None));
        let packet = Load { bytes: 2000, ..SEGMENT };
        let passes = |millis| limiter.admit(Instant::from_millis(millis), packet);
        assert_eq!(passes(0), Ok(()));
        assert_eq!(passes(1800), Err(Limit::Bytes));
        assert_eq!(passes(1901), Ok(()));
        assert_eq!(passes(3800), Err(Limit::Bytes));
        assert_eq!(passes(3901), Ok(()));
    }

    #[test]
    fn only_what_opens_a_connection_counts_as_new() {
        let limiter = Limiter::new(limits(None, None, Some(1)));
        assert_eq!(limiter.admit(Instant::ZERO, SYN), Ok(()));
        assert_eq!(limiter.admit(Instant::ZERO, SYN), Err(Limit::New));
        for _ in 0..1000 {
            assert_eq!(limiter.admit(Instant::ZERO, SEGMENT), Ok(()));
        }
        assert_eq!(limiter.admit(Instant::from_millis(901), SYN), Ok(()));
        assert_eq!(limiter.admit(Instant::from_millis(1850), SYN), Err(Limit::New));
    }

    #[test]
    fn what_is_refused_takes_nothing() {
        let limiter = Limiter::new(limits(Some(100), Some(1000), Some(100)));
        assert_eq!(limiter.admit(Instant::ZERO, Load { bytes: 10_000, ..SYN }), Ok(()));
        for _ in 0..1000 {
            assert_eq!(limiter.admit(Instant::ZERO, SYN), Err(Limit::Bytes));
        }
        let later = Instant::from_millis(10_000);
        let passed = (0..100).filter(|_| limiter.admit(later, Load { bytes: 1, ..SYN }).is_ok()).count();
        assert_eq!(passed, 10);
    }

    proptest! {
        #[test]
        fn over_any_time_no_more_passes_than_rate_and_burst_allow(
            rate in 1u64..1_000_000_000,
            steps in proptest::collection::vec((0u64..100_000, 1u64..70_000), 1..200),
        ) {
            let limiter = Limiter::new(limits(None, Some(rate), None));
            let (mut now, mut passed, mut largest) = (0, 0, 0);
            for (micros, bytes) in steps {
                now += micros;
                largest = largest.max(bytes);
                if limiter.admit(Instant::from_micros(now), Load { bytes, ..SEGMENT }).is_ok() {
                    passed += bytes;
                }
                let most = rate as f64 * (now as f64 / 1e6 + 0.1) * 1.01 + 1.0;
                prop_assert!(passed as f64 <= most + largest as f64, "{passed} of {most}");
            }
        }
    }
}
