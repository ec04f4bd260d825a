//! What is known of the way to a VIP: whether it translates, and whether anybody there speaks redirection.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use crate::time::Instant;

/// The driver's name for a way to a VIP: a digest of interface and next hop.
pub type PathId = u64;

/// What is known of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum PathState {
    /// Nothing: reconnect.
    #[default]
    Unknown,
    /// A server saw our own address and port: hand over.
    Direct,
    /// Something in the path translates, or drops what belongs to no connection: reconnect.
    Translated,
    /// Redirection does not work here: not asked for.
    Plain,
}

/// Paths remembered at the most; more VIPs and next hops than that are forgotten at random.
const MAX_PATHS: usize = 4096;
/// While one connect tries again whether a plain VIP still is, others stay plain for this long.
const TRIAL: Duration = Duration::from_secs(10);
/// Connects whose SYNs with R were not answered, or whose service port failed, before a VIP is plain (`C6`).
const FAILURES_TO_PLAIN: u8 = 2;
/// Handovers ending in silence before a VIP is plain (`C10`).
const SILENT_HANDOVERS_TO_PLAIN: u8 = 3;
/// Handovers in a row whose ACK was lost before the path counts as translated: one may be chance.
const LOST_ACKS_TO_TRANSLATED: u8 = 2;

#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    state: PathState,
    until: Option<Instant>,
    failures: u8,
    /// When the last failure was seen.
    failed_at: Instant,
    silent_handovers: u8,
    lost_acks: u8,
}

/// The memory of paths, per (VIP, path).
#[derive(Debug, Default)]
pub(super) struct Paths {
    current: HashMap<IpAddr, PathId>,
    entries: HashMap<(IpAddr, PathId), Entry>,
}

/// A VIP over one of its paths.
pub(super) type PathKey = (IpAddr, PathId);

impl Paths {
    pub(super) fn set_current(&mut self, vip: IpAddr, path: PathId) {
        self.current.insert(vip, path);
    }

    pub(super) fn key(&self, vip: IpAddr) -> PathKey {
        (vip, self.current.get(&vip).copied().unwrap_or_default())
    }

    pub(super) fn state(&self, key: PathKey) -> PathState {
        self.entries.get(&key).map_or(PathState::Unknown, |entry| entry.state)
    }

    /// The state a connect that begins now goes by; a plain path that was plain for long enough is tried once.
    pub(super) fn state_for_connect(&mut self, key: PathKey, now: Instant) -> PathState {
        let Some(entry) = self.entries.get_mut(&key) else { return PathState::Unknown };
        match (entry.state, entry.until) {
            (PathState::Plain, Some(until)) if until <= now => {
                entry.until = Some(now + TRIAL);
                PathState::Unknown
            }
            (PathState::Translated, Some(until)) if until <= now => {
                entry.state = PathState::Unknown;
                entry.until = None;
                PathState::Unknown
            }
            (state, _) => state,
        }
    }

    fn entry(&mut self, key: PathKey) -> &mut Entry {
        if self.entries.len() >= MAX_PATHS && !self.entries.contains_key(&key) {
            let victim = self.entries.keys().next().copied();
            victim.map(|victim| self.entries.remove(&victim));
        }
        self.entries.entry(key).or_default()
    }

    /// Somebody at the VIP confirmed: it is not plain.
    pub(super) fn on_confirmed(&mut self, key: PathKey) {
        let entry = self.entry(key);
        if entry.state == PathState::Plain {
            *entry = Entry::default();
        }
    }

    /// A reconnect succeeded; `direct` says whether the server saw our own address and port, if it told.
    pub(super) fn on_reconnected(&mut self, key: PathKey, direct: Option<bool>, until: Instant) {
        let entry = self.entry(key);
        entry.failures = 0;
        match (direct, entry.state) {
            // A path that lost handovers stays translated until that memory ends, whatever the digest says.
            (None, _) | (Some(true), PathState::Translated) => {}
            (Some(true), _) => (entry.state, entry.until) = (PathState::Direct, None),
            (Some(false), _) => (entry.state, entry.until) = (PathState::Translated, Some(until)),
        }
    }

    pub(super) fn on_plain(&mut self, key: PathKey, until: Instant) {
        let entry = self.entry(key);
        (entry.state, entry.until, entry.failures) = (PathState::Plain, Some(until), 0);
    }

    /// A connect, begun at `started`, that worked only without redirection. Connects that were under way together
    /// are one piece of evidence: a balancer that was away for a while made them fail, not the path.
    pub(super) fn on_failure(&mut self, key: PathKey, started: Instant, now: Instant, until: Instant) {
        let entry = self.entry(key);
        if entry.failures > 0 && started < entry.failed_at {
            return;
        }
        entry.failed_at = now;
        entry.failures = entry.failures.saturating_add(1);
        if entry.failures >= FAILURES_TO_PLAIN || entry.state == PathState::Plain {
            self.on_plain(key, until);
        }
    }

    /// A SYN-ACK without confirmation (`C2`). Where redirection has worked before it may be one server's agent that is
    /// away: it counts as a failure; elsewhere nobody speaks it.
    pub(super) fn on_unconfirmed(&mut self, key: PathKey, started: Instant, now: Instant, until: Instant) {
        match self.state(key) {
            PathState::Direct | PathState::Translated => self.on_failure(key, started, now, until),
            PathState::Unknown | PathState::Plain => self.on_plain(key, until),
        }
    }

    pub(super) fn on_translated(&mut self, key: PathKey, until: Instant) {
        let entry = self.entry(key);
        (entry.state, entry.until) = (PathState::Translated, Some(until));
    }

    /// A handover completed, its ACK `lost` at first or not.
    pub(super) fn on_handover_completed(&mut self, key: PathKey, lost: bool, until: Instant) {
        let entry = self.entry(key);
        entry.silent_handovers = 0;
        entry.failures = 0;
        entry.lost_acks = if lost { entry.lost_acks.saturating_add(1) } else { 0 };
        if entry.lost_acks >= LOST_ACKS_TO_TRANSLATED {
            entry.lost_acks = 0;
            self.on_translated(key, until);
        }
    }

    /// A handover ended in silence.
    pub(super) fn on_silent_handover(
        &mut self,
        key: PathKey,
        translated_until: Instant,
        plain_until: Instant,
    ) {
        let entry = self.entry(key);
        entry.silent_handovers = entry.silent_handovers.saturating_add(1);
        if entry.silent_handovers >= SILENT_HANDOVERS_TO_PLAIN {
            entry.silent_handovers = 0;
            self.on_plain(key, plain_until);
        } else {
            self.on_translated(key, translated_until);
        }
    }
}
