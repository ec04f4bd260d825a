//! What is known of a server at run time, beside the configuration: its load, since when it grows into its weight, and
//! the packets sent to it lately. Kept across reloads by the server's name.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use shunt_stack::time::{Instant, WallClock};
use thiserror::Error;

use crate::stats::ServerStats;

/// How often the counts of packets sent are brought up to date; in between, new packets count whole.
const DECAY_INTERVAL: Duration = Duration::from_millis(100);
/// A load is kept as a whole number of these.
const LOAD_UNIT: f32 = 1_000_000.0;
const LOAD_BITS: u32 = 20;
/// No load is known.
const NO_LOAD: u64 = u64::MAX;
/// The server has had its whole weight from the beginning.
const NOT_NEW: u64 = u64::MAX;

/// Why a load is not taken.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum LoadError {
    /// No server has this name.
    #[error("there is no server named {0:?}")]
    UnknownServer(String),
    /// It is no part of a whole.
    #[error("{0} is no load: it is a number from 0.0 (idle) to 1.0 (full)")]
    OutOfRange(f32),
}

/// One server's.
#[derive(Debug)]
pub(crate) struct Live {
    stats: Arc<ServerStats>,
    /// The load in the low bits, above them the milliseconds when it was told.
    load: AtomicU64,
    /// When its slow start began, in microseconds.
    since: AtomicU64,
    /// Packets sent until `counted` was read, each worth half for every half-life since then; an `f64`'s bits.
    decayed: AtomicU64,
    /// The counter of packets sent when `decayed` was computed.
    counted: AtomicU64,
}

impl Live {
    pub(crate) fn new(stats: Arc<ServerStats>) -> Live {
        let counted = AtomicU64::new(stats.packets_sent());
        Live {
            stats,
            load: AtomicU64::new(NO_LOAD),
            since: AtomicU64::new(NOT_NEW),
            decayed: AtomicU64::new(0f64.to_bits()),
            counted,
        }
    }

    /// What has been counted for the server.
    pub(crate) fn stats(&self) -> &Arc<ServerStats> {
        &self.stats
    }

    fn set_load(&self, load: f32, now: Instant) {
        let units = (load * LOAD_UNIT).round() as u64;
        self.load.store((now.micros() / 1000) << LOAD_BITS | units, Relaxed);
    }

    /// Its load from 0.0 to 1.0 and when that was told, if it ever was.
    pub(crate) fn load(&self) -> Option<(f32, Instant)> {
        let packed = self.load.load(Relaxed);
        let load = (packed & ((1 << LOAD_BITS) - 1)) as f32 / LOAD_UNIT;
        (packed != NO_LOAD).then(|| (load, Instant::from_millis(packed >> LOAD_BITS)))
    }

    /// Begins its slow start.
    pub(crate) fn begin(&self, now: Instant) {
        self.since.store(now.micros(), Relaxed);
    }

    /// How long ago its slow start began, if it had one.
    pub(super) fn age(&self, now: Instant) -> Option<Duration> {
        let since = self.since.load(Relaxed);
        (since != NOT_NEW).then(|| now.since(Instant::from_micros(since)))
    }

    /// Packets sent to it lately.
    pub(super) fn recent_packets(&self) -> f64 {
        let new = self.stats.packets_sent().saturating_sub(self.counted.load(Relaxed));
        f64::from_bits(self.decayed.load(Relaxed)) + new as f64
    }

    fn decay(&self, factor: f64) {
        let sent = self.stats.packets_sent();
        let new = sent.saturating_sub(self.counted.swap(sent, Relaxed));
        let before = f64::from_bits(self.decayed.load(Relaxed));
        self.decayed.store(((before + new as f64) * factor).to_bits(), Relaxed);
    }
}

/// All servers', and the time as last told.
#[derive(Debug)]
pub(crate) struct Lives {
    servers: HashMap<String, Arc<Live>>,
    clock: Arc<Clock>,
}

/// What outlives reloads: the time, and what is done by it.
#[derive(Debug, Default)]
struct Clock {
    /// In microseconds.
    now: AtomicU64,
    /// Unix time when `now` was 0, in microseconds.
    wall: AtomicU64,
    /// Counts loads that were told.
    loads: AtomicU64,
    /// When packets were last decayed.
    decayed: Mutex<Instant>,
}

impl Lives {
    pub(crate) fn new<'a>(servers: impl Iterator<Item = (&'a str, Arc<ServerStats>)>) -> Lives {
        let servers = servers.map(|(name, stats)| (name.to_owned(), Arc::new(Live::new(stats)))).collect();
        Lives { servers, clock: Arc::default() }
    }

    /// Those of another list of servers: known names keep theirs.
    pub(crate) fn successor<'a>(&self, names: impl Iterator<Item = &'a str>) -> Lives {
        let live =
            |name: &str| self.get(name).cloned().unwrap_or_else(|| Arc::new(Live::new(Arc::default())));
        let servers = names.map(|name| (name.to_owned(), live(name))).collect();
        Lives { servers, clock: Arc::clone(&self.clock) }
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Arc<Live>> {
        self.servers.get(name)
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.servers.len()
    }

    /// The latest time that was told.
    pub(crate) fn now(&self) -> Instant {
        Instant::from_micros(self.clock.now.load(Relaxed))
    }

    pub(crate) fn set_now(&self, now: Instant) {
        self.clock.now.fetch_max(now.micros(), Relaxed);
    }

    /// Unix time by it, as last told.
    pub(crate) fn wall(&self) -> WallClock {
        WallClock::from_micros(self.clock.wall.load(Relaxed))
    }

    pub(crate) fn set_wall(&self, wall: WallClock) {
        self.clock.wall.store(wall.micros(), Relaxed);
    }

    /// Takes a load as told now.
    pub(crate) fn set_load(&self, server: &str, load: f32) -> Result<(), LoadError> {
        let live = self.get(server).ok_or_else(|| LoadError::UnknownServer(server.to_owned()))?;
        if !(0.0..=1.0).contains(&load) {
            return Err(LoadError::OutOfRange(load));
        }
        live.set_load(load, self.now());
        self.clock.loads.fetch_add(1, Relaxed);
        Ok(())
    }

    /// How many loads have been told.
    pub(crate) fn loads_told(&self) -> u64 {
        self.clock.loads.load(Relaxed)
    }

    /// Lets packets sent weigh less by the time that has passed, if enough has.
    pub(crate) fn decay(&self, now: Instant, half_life: Duration) {
        let Ok(mut last) = self.clock.decayed.try_lock() else { return };
        let passed = now.since(*last);
        if passed < DECAY_INTERVAL {
            return;
        }
        *last = now;
        let factor = 0.5f64.powf(passed.as_secs_f64() / half_life.as_secs_f64());
        for live in self.servers.values() {
            live.decay(factor);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_and_its_time_survive_the_packing() {
        let lives = Lives::new([("a", Arc::default())].into_iter());
        lives.set_now(Instant::from_millis(86_400_000 * 365 * 20));
        assert_eq!(lives.get("a").unwrap().load(), None);
        for load in [0.0, 0.25, 0.333_333, 1.0] {
            lives.set_load("a", load).unwrap();
            assert_eq!(lives.get("a").unwrap().load(), Some((load, lives.now())));
        }
        assert_eq!(lives.set_load("b", 0.5), Err(LoadError::UnknownServer("b".to_owned())));
        for load in [-0.1, 1.1, 80.0, f32::INFINITY] {
            assert_eq!(lives.set_load("a", load), Err(LoadError::OutOfRange(load)));
        }
        assert!(lives.set_load("a", f32::NAN).is_err());
        assert_eq!(lives.loads_told(), 4);
    }

    #[test]
    fn packets_sent_weigh_half_after_a_half_life() {
        let stats: Arc<ServerStats> = Arc::default();
        let lives = Lives::new([("a", Arc::clone(&stats))].into_iter());
        let (live, half_life) = (lives.get("a").unwrap(), Duration::from_secs(10));
        for _ in 0..1000 {
            stats.sent(1, 100);
        }
        assert!((live.recent_packets() - 1000.0).abs() < 1e-9);
        // In whatever steps time passes.
        for millis in (0..=10_000).step_by(50) {
            lives.decay(Instant::from_millis(millis), half_life);
        }
        assert!((live.recent_packets() - 500.0).abs() < 1.0, "{}", live.recent_packets());
        lives.decay(Instant::from_millis(60_000), half_life);
        stats.sent(1, 100);
        assert!((live.recent_packets() - (500.0 / 32.0 + 1.0)).abs() < 1.0);
    }
}
