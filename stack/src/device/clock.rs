//! The clock of drivers: microseconds since the driver started.

use crate::time::Instant;

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
    fn timers_and_the_cores_time_agree() {
        let clock = Clock::start();
        let at = clock.now() + Duration::from_millis(250);
        let ahead = clock.timer(at) - tokio::time::Instant::now();
        assert!(ahead <= Duration::from_millis(250) && ahead > Duration::from_millis(200), "{ahead:?}");
    }
}
