//! The clock of drivers: microseconds since the driver started.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::time::{Instant, WallClock};

/// Reads the time for the sans-IO core.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    origin: tokio::time::Instant,
}

impl Clock {
    /// A clock that begins now.
    pub fn start() -> Self {
        Self { origin: tokio::time::Instant::now() }
    }

    /// Now.
    pub fn now(self) -> Instant {
        Instant::ZERO + self.origin.elapsed()
    }

    /// What the system's clock says: to be asked again from time to time, because it is set and slewed.
    pub fn wall(self) -> WallClock {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        WallClock::new(self.now(), unix)
    }

    /// The same time as tokio's timers count it.
    pub fn timer(self, at: Instant) -> tokio::time::Instant {
        self.origin + at.since(Instant::ZERO)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_wall_clock_goes_on_with_the_cores_time() {
        let clock = Clock::start();
        let (wall, now) = (clock.wall(), clock.now());
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        assert!(wall.seconds(now).abs_diff(unix) <= 1);
        assert_eq!(wall.seconds(now + Duration::from_secs(90)), wall.seconds(now) + 90);
    }

    #[test]
    fn timers_and_the_cores_time_agree() {
        let clock = Clock::start();
        let at = clock.now() + Duration::from_millis(250);
        let ahead = clock.timer(at) - tokio::time::Instant::now();
        assert!(ahead <= Duration::from_millis(250) && ahead > Duration::from_millis(200), "{ahead:?}");
    }
}
