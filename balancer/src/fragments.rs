//! Later fragments follow the first (§9): a bounded cache of what was decided about datagrams whose first fragment passed.
//!
//! Sans-IO, and beside [`Balancer::route`], which stays a function of packet and table: a driver holds a [`Memory`]
//! and asks [`Balancer::handle`]. Losing it costs the datagrams under way and nothing else.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use shunt_stack::redirect::{Gauge, Limiter};
use shunt_stack::time::Instant;
use shunt_stack::wire::{Fragment, Packet, Protocol};

use crate::Balancer;
use crate::config::Limits;
use crate::forward::Output;
use crate::route::{Decision, DropReason, Route};
use crate::table::ServerId;
use crate::tunnel::PathMtus;

/// What fragments of one datagram have in common (RFC 791, RFC 8200 §4.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    identification: u32,
}

impl Key {
    fn of(packet: &Packet, fragment: Fragment) -> Key {
        Key {
            source: packet.source(),
            destination: packet.destination(),
            protocol: packet.protocol().number(),
            identification: fragment.identification,
        }
    }
}

/// What was decided about a first fragment.
pub(crate) type Verdict = Result<Route, DropReason>;

#[derive(Debug, Clone, Copy)]
struct Entry {
    verdict: Verdict,
    /// Where the first fragment's data ends, in bytes from the datagram's beginning.
    end: usize,
    since: Instant,
    /// Its place in `order`.
    number: u64,
}

/// Datagrams by their identification, oldest out.
#[derive(Debug)]
pub struct FragmentCache {
    limit: usize,
    lifetime: Duration,
    entries: HashMap<Key, Entry>,
    /// In the order of their first fragments; an entry that was renewed stands here more than once.
    order: VecDeque<(u64, Key)>,
    next: u64,
}

impl FragmentCache {
    /// An empty one of at most `limit` datagrams (at least one), each for `lifetime`.
    pub fn new(limit: usize, lifetime: Duration) -> FragmentCache {
        let (entries, order) = (HashMap::new(), VecDeque::new());
        FragmentCache { limit: limit.max(1), lifetime, entries, order, next: 0 }
    }

    /// Datagrams remembered.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Remembers what was decided about a first fragment; says how many younger than the lifetime had to go for it.
    fn remember(&mut self, now: Instant, key: Key, verdict: Verdict, end: usize) -> u64 {
        self.expire(now);
        let number = self.next;
        self.next += 1;
        self.entries.insert(key, Entry { verdict, end, since: now, number });
        self.order.push_back((number, key));
        let mut evicted = 0;
        while self.order.len() > self.limit {
            evicted += u64::from(self.forget_oldest());
        }
        evicted
    }

    /// What was decided about the first fragment of a later one's datagram.
    fn find(&self, now: Instant, key: &Key) -> Option<Entry> {
        self.entries.get(key).copied().filter(|entry| now.since(entry.since) < self.lifetime)
    }

    /// Forgets what is too old.
    pub fn expire(&mut self, now: Instant) {
        while let Some((number, key)) = self.order.front() {
            let entry = self.entries.get(key).filter(|entry| entry.number == *number);
            if entry.is_some_and(|entry| now.since(entry.since) < self.lifetime) {
                break;
            }
            self.forget_oldest();
        }
    }

    /// Takes the front of `order`; says whether a datagram was forgotten, not just an old place of a renewed one.
    fn forget_oldest(&mut self) -> bool {
        let Some((number, key)) = self.order.pop_front() else { return false };
        let current = self.entries.get(&key).is_some_and(|entry| entry.number == number);
        if current {
            self.entries.remove(&key);
        }
        current
    }

    /// Takes over other bounds, and what has become of servers after a reload; datagrams of those that left are
    /// forgotten.
    fn follow(&mut self, limits: Limits, server: impl Fn(ServerId) -> Option<ServerId>) {
        self.limit = limits.fragments.max(1);
        self.lifetime = limits.fragment_lifetime;
        self.entries.retain(|_, entry| {
            let renamed = match &mut entry.verdict {
                Ok(route) => route.server_mut().map(|id| server(*id).map(|new| *id = new)),
                Err(DropReason::Family(id)) => Some(server(*id).map(|new| *id = new)),
                Err(_) => None,
            };
            renamed != Some(None)
        });
        while self.order.len() > self.limit {
            self.forget_oldest();
        }
    }
}

/// All that a balancer remembers beside its configuration and counters: fragmented datagrams, how many packets it
/// has answered lately, how many SYNs have come to service ports, and the MTUs of paths to servers that routers have
/// announced.
#[derive(Debug)]
pub struct Memory {
    fragments: FragmentCache,
    answers: Limiter,
    gauge: Gauge,
    paths: PathMtus,
}

impl Memory {
    /// An empty memory, within the bounds of the balancer's configuration.
    pub fn new(balancer: &Balancer) -> Memory {
        let limits = balancer.table.limits;
        Memory {
            fragments: FragmentCache::new(limits.fragments, limits.fragment_lifetime),
            answers: Limiter::new(limits.answers_per_second),
            gauge: Gauge::default(),
            paths: PathMtus::default(),
        }
    }

    /// Goes on under the balancer that follows after a reload.
    pub fn follow(&mut self, before: &Balancer, after: &Balancer) {
        let (old, new) = (before.table.limits, after.table.limits);
        if old.answers_per_second != new.answers_per_second {
            self.answers = Limiter::new(new.answers_per_second);
        }
        self.fragments.follow(new, |id| {
            let name = &before.table.targets.get(id.index())?.name;
            after.table.targets.iter().position(|target| target.name == *name).map(ServerId::new)
        });
    }

    /// Fragmented datagrams remembered.
    pub fn fragments(&self) -> usize {
        self.fragments.len()
    }
}

impl Balancer {
    /// Routes, counts and rewrites one packet, with later fragments where their first went (§9); says where it leaves.
    ///
    /// # Errors
    /// Why it is dropped; it has been counted.
    pub fn handle(
        &self,
        memory: &mut Memory,
        now: Instant,
        packet: &mut Packet,
    ) -> Result<Output, DropReason> {
        let route = self.decide(memory, now, packet);
        self.carry_out(route, packet)
    }

    /// What [`handle`](Self::handle) does with a packet, before it does it; [`carry_out`](Self::carry_out) is the rest.
    ///
    /// # Errors
    /// Why the packet is dropped; it has not been counted.
    pub fn decide(&self, memory: &mut Memory, now: Instant, packet: &Packet) -> Result<Route, DropReason> {
        // Before limits: what is not let in shall take nothing from those that are.
        self.guard(&mut memory.gauge, now, packet).map_err(DropReason::Token)?;
        let verdict = self.verdict(&mut memory.fragments, now, packet);
        let mut verdict = self.fit(&mut memory.paths, now, packet, verdict);
        if matches!(verdict, Ok(Route::Answer | Route::TooBig { .. })) && !memory.answers.take(now) {
            verdict = Err(DropReason::AnswerLimit);
        }
        verdict
    }

    /// As [`admit`](Self::admit), and what a later fragment's first was told.
    fn verdict(&self, cache: &mut FragmentCache, now: Instant, packet: &Packet) -> Verdict {
        // Without ports all fragments tell as much as the first.
        let ported = !matches!(packet.protocol(), Protocol::Other(_));
        let Some(fragment) = packet.fragment().filter(|_| ported) else { return self.admit(packet) };
        let key = Key::of(packet, fragment);
        if fragment.offset != 0 {
            return match cache.find(now, &key) {
                Some(entry) if usize::from(fragment.offset) < entry.end => {
                    Err(DropReason::OverlappingFragment(fragment.identification))
                }
                Some(entry) => entry.verdict.map(Route::of_later_fragment),
                None => self.admit(packet),
            };
        }
        let verdict = self.admit(packet);
        // Passing unchanged needs no memory, and an atomic fragment (RFC 6946) has no others.
        if fragment.more && verdict != Ok(Route::Unchanged) {
            let evicted = cache.remember(now, key, verdict, packet.len() - packet.transport_offset());
            self.stats.fragments(cache.len(), evicted);
        }
        verdict
    }
}

impl Route {
    fn server_mut(&mut self) -> Option<&mut ServerId> {
        match self {
            Route::ToServer { server, .. }
            | Route::ToClient { server, .. }
            | Route::ErrorToClient { server, .. }
            | Route::Redirect { server, .. } => Some(server),
            Route::Answer | Route::TooBig { .. } | Route::Unchanged => None,
        }
    }

    /// The route of a later fragment whose first took this one.
    fn of_later_fragment(self) -> Route {
        match self {
            Route::ToServer { server, .. } => Route::ToServer { server, decision: Decision::Fragment },
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIFETIME: Duration = Duration::from_secs(30);

    fn key(identification: u32) -> Key {
        let address = |text: &str| text.parse().unwrap();
        Key {
            source: address("192.0.2.1"),
            destination: address("203.0.113.10"),
            protocol: 17,
            identification,
        }
    }

    fn to(server: usize) -> Route {
        Route::ToServer { server: ServerId::new(server), decision: Decision::Owner }
    }

    fn at(seconds: u64) -> Instant {
        Instant::from_millis(seconds * 1000)
    }

    #[test]
    fn o15_the_oldest_goes_when_it_is_full_and_a_renewed_one_is_young_again() {
        let mut cache = FragmentCache::new(3, LIFETIME);
        for number in 0..3 {
            assert_eq!(cache.remember(at(0), key(number), Ok(to(0)), 8), 0);
        }
        // A new datagram under an old identification replaces the old one, and stands where a new one would.
        assert_eq!(cache.remember(at(1), key(0), Ok(to(1)), 8), 0);
        assert_eq!(cache.find(at(1), &key(0)).unwrap().verdict, Ok(to(1)));
        assert_eq!(cache.remember(at(1), key(3), Ok(to(0)), 8), 1);
        assert!(cache.find(at(1), &key(1)).is_none());
        assert!(cache.find(at(1), &key(0)).is_some() && cache.find(at(1), &key(2)).is_some());
        assert_eq!(cache.len(), 3);
    }

    #[test]
    fn o15_nothing_is_followed_after_its_time() {
        let mut cache = FragmentCache::new(3, LIFETIME);
        cache.remember(at(0), key(1), Ok(to(0)), 8);
        cache.remember(at(20), key(2), Ok(to(0)), 8);
        assert!(cache.find(at(29), &key(1)).is_some());
        assert!(cache.find(at(30), &key(1)).is_none());
        cache.expire(at(31));
        assert_eq!(cache.len(), 1);
        cache.expire(at(50));
        assert_eq!((cache.len(), cache.order.len()), (0, 0));
    }

    #[test]
    fn o15_a_reload_renames_servers_and_forgets_those_that_left() {
        let mut cache = FragmentCache::new(8, LIFETIME);
        cache.remember(at(0), key(0), Ok(to(0)), 8);
        cache.remember(at(0), key(1), Ok(to(1)), 8);
        cache.remember(at(0), key(2), Err(DropReason::Legacy(53)), 8);
        let limits = Limits { fragments: 2, ..Limits::default() };
        cache.follow(limits, |id| (id.index() == 1).then(|| ServerId::new(0)));
        assert!(cache.find(at(1), &key(0)).is_none());
        assert_eq!(cache.find(at(1), &key(1)).unwrap().verdict, Ok(to(0)));
        assert_eq!(cache.find(at(1), &key(2)).unwrap().verdict, Err(DropReason::Legacy(53)));
        assert_eq!(cache.order.len(), 2);
    }

    proptest! {
        #[test]
        fn o15_the_cache_stays_within_its_bound_and_never_tells_another_datagrams_server(
            steps in proptest::collection::vec((0u32..40, 0u64..8), 1..400), limit in 1usize..20,
        ) {
            let mut cache = FragmentCache::new(limit, LIFETIME);
            let mut latest = std::collections::HashMap::new();
            let mut now = 0;
            for (identification, wait) in steps {
                now += wait;
                let server = now as usize % 7;
                cache.remember(at(now), key(identification), Ok(to(server)), 8);
                latest.insert(identification, (server, now));
                prop_assert!(cache.len() <= limit && cache.order.len() <= limit);
                prop_assert_eq!(cache.find(at(now), &key(identification)).map(|entry| entry.verdict), Some(Ok(to(server))));
                for (identification, (server, since)) in &latest {
                    if let Some(entry) = cache.find(at(now), &key(*identification)) {
                        prop_assert_eq!(entry.verdict, Ok(to(*server)));
                        prop_assert!(now - since < 30);
                    }
                }
            }
        }
    }
}
