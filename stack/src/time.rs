//! The clock of the sans-IO core: drivers supply it, nothing here reads one.

use std::ops::{Add, AddAssign, Sub};
use std::time::Duration;

/// A point in time, in microseconds since an origin that the driver chooses (boot, the first packet of a capture, 0).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Instant(u64);

impl Instant {
    /// The origin.
    pub const ZERO: Instant = Instant(0);

    /// The instant `micros` microseconds after the origin.
    pub const fn from_micros(micros: u64) -> Self {
        Instant(micros)
    }

    /// The instant `millis` milliseconds after the origin.
    pub const fn from_millis(millis: u64) -> Self {
        Instant(millis.saturating_mul(1000))
    }

    /// Microseconds since the origin.
    pub const fn micros(self) -> u64 {
        self.0
    }

    /// The time from `earlier` to here, zero if `earlier` is later (clocks may jump).
    pub fn since(self, earlier: Instant) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

/// Wall-clock time by the core's own: what the driver last found when it compared the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WallClock(u64);

impl WallClock {
    /// The clock by which Unix time is `unix` now.
    pub fn new(now: Instant, unix: Duration) -> Self {
        WallClock(u64::try_from(unix.as_micros()).unwrap_or(u64::MAX).saturating_sub(now.0))
    }

    /// The clock by which the origin is so many microseconds of Unix time.
    pub const fn from_micros(origin: u64) -> Self {
        WallClock(origin)
    }

    /// The Unix time of the origin, in microseconds.
    pub const fn micros(self) -> u64 {
        self.0
    }

    /// Unix time in seconds.
    pub fn seconds(self, now: Instant) -> u64 {
        self.0.saturating_add(now.0) / 1_000_000
    }
}

impl Add<Duration> for Instant {
    type Output = Instant;

    fn add(self, rhs: Duration) -> Instant {
        Instant(self.0.saturating_add(u64::try_from(rhs.as_micros()).unwrap_or(u64::MAX)))
    }
}

impl AddAssign<Duration> for Instant {
    fn add_assign(&mut self, rhs: Duration) {
        *self = *self + rhs;
    }
}

impl Sub<Instant> for Instant {
    type Output = Duration;

    fn sub(self, rhs: Instant) -> Duration {
        self.since(rhs)
    }
}
