//! The half-open connections that an agent must know at their SYN-ACK (`S5`): bounded in number and age.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use crate::time::Instant;
use crate::wire::SeqNumber;

/// Whose half-open connection it is: the local TCP knows it under the service port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Key {
    pub(super) client: SocketAddr,
    /// `address:Y`.
    pub(super) service: SocketAddr,
}

/// What its latest SYN said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HalfOpen {
    /// The port that SYN went to; SYN-ACKs come from there (`S3`).
    pub(super) asked: u16,
    /// The SYN's sequence number.
    pub(super) isn: SeqNumber,
    /// The hops it had.
    pub(super) hops: u8,
    /// The service port that the connection moves from (§4).
    pub(super) moved_from: Option<u16>,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    half_open: HalfOpen,
    since: Instant,
    /// Its place in `order`.
    number: u64,
}

/// (client, service) -> its latest SYN, oldest out.
#[derive(Debug)]
pub(super) struct HalfOpenTable {
    limit: usize,
    lifetime: Duration,
    entries: BTreeMap<Key, Entry>,
    order: BTreeMap<u64, Key>,
    next: u64,
}

impl HalfOpenTable {
    /// At most `limit` entries (at least one: without any no SYN-ACK could be moved).
    pub(super) fn new(limit: usize, lifetime: Duration) -> Self {
        let (entries, order) = (BTreeMap::new(), BTreeMap::new());
        HalfOpenTable { limit: limit.max(1), lifetime, entries, order, next: 0 }
    }

    /// Remembers a SYN; says whether the oldest entry had to go for it.
    pub(super) fn insert(&mut self, now: Instant, key: Key, half_open: HalfOpen) -> bool {
        let number = self.next;
        self.next += 1;
        if let Some(old) = self.entries.insert(key, Entry { half_open, since: now, number }) {
            self.order.remove(&old.number);
        }
        self.order.insert(number, key);
        let full = self.entries.len() > self.limit;
        if full && let Some((_, oldest)) = self.order.pop_first() {
            self.entries.remove(&oldest);
        }
        full
    }

    /// The latest SYN of a connection, unless it is too old.
    pub(super) fn get(&self, now: Instant, key: Key) -> Option<HalfOpen> {
        let entry = self.entries.get(&key)?;
        (now.since(entry.since) < self.lifetime).then_some(entry.half_open)
    }

    /// Forgets a connection.
    pub(super) fn remove(&mut self, key: Key) {
        if let Some(old) = self.entries.remove(&key) {
            self.order.remove(&old.number);
        }
    }

    /// Forgets what is too old; says how many.
    pub(super) fn expire(&mut self, now: Instant) -> u64 {
        let mut expired = 0;
        while self.deadline().is_some_and(|deadline| deadline <= now) {
            if let Some((_, key)) = self.order.pop_first() {
                self.entries.remove(&key);
                expired += 1;
            }
        }
        expired
    }

    /// When the oldest entry is too old.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let (_, key) = self.order.first_key_value()?;
        self.entries.get(key).map(|entry| entry.since + self.lifetime)
    }

    /// Entries held.
    pub(super) fn len(&self) -> usize {
        debug_assert_eq!(self.entries.len(), self.order.len());
        self.entries.len()
    }
}
