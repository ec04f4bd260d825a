//! The time that processors have worked.

use anyhow::{Context as _, Result};
use procfs::{CurrentSI as _, KernelStats};

/// A moment, by the time that all processors of the machine have worked until then.
#[derive(Debug, Clone, Copy)]
pub struct Busy {
    ticks: u64,
}

impl Busy {
    /// Now. What other guests of the same host took (steal) is not ours.
    ///
    /// # Errors
    /// `/proc/stat` cannot be read.
    pub fn now() -> Result<Busy> {
        let total = KernelStats::current().context("reading /proc/stat")?.total;
        let interrupts = total.irq.unwrap_or(0) + total.softirq.unwrap_or(0);
        Ok(Busy { ticks: total.user + total.nice + total.system + interrupts })
    }

    /// Seconds of work since then, of all processors together.
    ///
    /// # Errors
    /// As [`now`](Self::now).
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52 ticks")]
    pub fn elapsed(self) -> Result<f64> {
        let ticks = Busy::now()?.ticks.saturating_sub(self.ticks);
        Ok(ticks as f64 / procfs::ticks_per_second() as f64)
    }
}

/// A moment, by the time that this process has worked until then.
#[derive(Debug, Clone, Copy)]
pub struct Own {
    ticks: u64,
}

impl Own {
    /// Now.
    ///
    /// # Errors
    /// `/proc/self/stat` cannot be read.
    pub fn now() -> Result<Own> {
        let stat = procfs::process::Process::myself().and_then(|process| process.stat());
        let stat = stat.context("reading /proc/self/stat")?;
        Ok(Own { ticks: stat.utime + stat.stime })
    }

    /// Seconds of work since then, of all its threads together.
    ///
    /// # Errors
    /// As [`now`](Self::now).
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52 ticks")]
    pub fn elapsed(self) -> Result<f64> {
        let ticks = Own::now()?.ticks.saturating_sub(self.ticks);
        Ok(ticks as f64 / procfs::ticks_per_second() as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn work_is_counted() {
        let before = Busy::now().unwrap();
        let end = Instant::now() + Duration::from_millis(300);
        while Instant::now() < end {
            std::hint::spin_loop();
        }
        // Others may have taken a part of the processor, but not most of it from all that run.
        assert!(before.elapsed().unwrap() > 0.1);
    }
}
