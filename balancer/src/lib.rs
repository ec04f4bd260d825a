//! Stateless forwarding on destination ports (PROTOCOL.md §3, `B1` to `B7`).
//!
//! [`select`] holds the policies, [`limit`] token buckets.
//! [`table`] is what a [`Config`] means for packets, [`route`] decides, [`forward`] rewrites, [`stats`] counts,
//! [`driver`] carries packets between the host and these. No connection is remembered anywhere; [`fragments`] and what
//! fits into a [`tunnel`] are the only memory.
//!
//! [`control`] is what can be asked and changed while it runs, [`health`] which servers take new connections,
//! `connectors` follows the links to them.
//!
//! In `network` mode answers have to come back through this host, and only those from service ports and redirect
//! ports, and of protocols without ports that go to servers by configuration, get the VIP as source again: for all
//! else a default server is of use in the other modes only.

mod answer;
pub mod config;
mod connections;
mod connectors;
pub mod control;
mod datagram;
pub mod doctor;
pub mod driver;
mod explain;
pub mod forward;
pub mod fragments;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
pub mod health;
mod host;
mod icmp;
pub mod limit;
pub mod maglev;
pub mod offload;
mod places;
mod qos;
pub mod route;
pub mod select;
pub mod stats;
pub mod table;
#[cfg(test)]
mod tests;
mod tokens;
pub mod tunnel;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use shunt_stack::redirect::Answerer;
use shunt_stack::time::Instant;
use shunt_stack::wire::Packet;

pub use config::Config;
pub use connections::{Bucket, ConnectionsSnapshot, DurationsSnapshot, PairSnapshot};
pub use driver::{Error, Handle, RunOptions, run};
pub use explain::Explanation;
pub use forward::Output;
pub use fragments::Memory;
pub use health::Unfit;
pub use limit::Limit;
pub use route::{Decision, DropReason, Route};
pub use select::{LoadError, SelectKey};
pub use stats::{ServerSnapshot, Snapshot, Stats};
pub use table::{ServerId, Table};

use config::ForwardMode;
use qos::Qos;
use select::Lives;
use stats::ServerStats;
use tokens::Tokens;

/// A table and the counters of what it decides. A reload makes another one with [`Balancer::successor`].
#[derive(Debug)]
pub struct Balancer {
    pub(crate) table: Table,
    pub(crate) stats: Arc<Stats>,
    pub(crate) servers: Box<[Arc<ServerStats>]>,
    pub(crate) lives: Lives,
    /// `None` if nothing is limited or marked.
    qos: Option<Qos>,
    /// `None` if no policy asks for packets sent.
    half_life: Option<Duration>,
    due: Mutex<Due>,
    /// `None` if no service's clients are answered here (`B1`).
    answerer: Option<Answerer>,
    tokens: Tokens,
    key: SelectKey,
    /// `gue` mode's ways to the servers.
    tunnels: Option<tunnel::Tunnels>,
}

/// When policies have to follow time and loads again.
#[derive(Debug, Default)]
struct Due {
    at: Option<Instant>,
    loads: u64,
}

impl Balancer {
    /// A balancer for a configuration; `key` is the key of keyed policies.
    pub fn new(config: &Config, key: SelectKey) -> Balancer {
        Balancer::new_without(config, &Unfit::default(), key)
    }

    /// The same, with no new selections for those that are `unfit` (`B7`).
    pub fn new_without(config: &Config, unfit: &Unfit, key: SelectKey) -> Balancer {
        let lives = Lives::new(config.servers.iter().map(|server| (server.name.as_str(), Arc::default())));
        Balancer::with(config, unfit, lives, None, key)
    }

    fn with(config: &Config, unfit: &Unfit, lives: Lives, before: Option<&Balancer>, key: SelectKey) -> Self {
        let servers = config
            .servers
            .iter()
            .map(|server| lives.get(&server.name).map(|live| Arc::clone(live.stats())).unwrap_or_default());
        Balancer {
            table: Table::new(config, key, &lives, unfit, before.map(|balancer| &balancer.table)),
            stats: before.map(|balancer| Arc::clone(&balancer.stats)).unwrap_or_default(),
            servers: servers.collect(),
            lives,
            qos: Qos::new(config, before.and_then(|balancer| balancer.qos.as_ref())),
            half_life: config.counts_packets().then_some(config.packets_half_life),
            due: Mutex::default(),
            answerer: answer::answerer(config, key),
            tokens: Tokens::new(config),
            key,
            tunnels: None,
        }
    }

    /// A balancer for another configuration that counts on where this one stands, knows the same loads, and whose
    /// keyed policies choose the same for a repeated SYN where the set is the same. Servers that did not take new
    /// connections before and do now begin their slow start.
    #[must_use]
    pub fn successor(&self, config: &Config) -> Balancer {
        self.successor_without(config, &Unfit::default())
    }

    /// The same, with no new selections for those that are `unfit` (`B7`).
    #[must_use]
    pub fn successor_without(&self, config: &Config, unfit: &Unfit) -> Balancer {
        let lives = self.lives.successor(config.servers.iter().map(|server| server.name.as_str()));
        let next = Balancer::with(config, unfit, lives, Some(self), self.key);
        let names = self.table.names().enumerate();
        let took: std::collections::HashSet<&str> =
            names.filter(|(index, _)| self.table.takes_new(*index)).map(|(_, name)| name).collect();
        for (index, server) in config.servers.iter().enumerate() {
            if next.table.takes_new(index)
                && !took.contains(server.name.as_str())
                && let Some(live) = next.lives.get(&server.name)
            {
                live.begin(self.lives.now());
            }
        }
        next.refresh(self.lives.now());
        next
    }

    /// Tells the time, on which slow start, the age of loads, the decay of packet counts and limits depend. Says when
    /// to do so again at the latest, if nothing else is done meanwhile. Cheap: meant to be called before every batch
    /// of packets.
    pub fn advance(&self, now: Instant) -> Option<Instant> {
        self.lives.set_now(now);
        if let Some(half_life) = self.half_life {
            self.lives.decay(now, half_life);
        }
        // Where it is taken, another task is doing the same.
        let due = {
            let due = self.due.try_lock().ok()?;
            (due.at, due.loads)
        };
        if due.1 != self.lives.loads_told() || due.0.is_some_and(|at| at <= now) {
            return self.refresh(now);
        }
        due.0
    }

    fn refresh(&self, now: Instant) -> Option<Instant> {
        let mut due = self.due.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        due.loads = self.lives.loads_told();
        due.at = self.table.refresh(now);
        due.at
    }

    /// The time last given to [`advance`](Self::advance).
    pub fn now(&self) -> Instant {
        self.lives.now()
    }

    /// Takes a server's load, from 0.0 (idle) to 1.0 (full), as told at the time last given to
    /// [`advance`](Self::advance). The policy `least-load` follows from the next `advance` on, and forgets the load
    /// after `load_max_age_s`. It is kept across [`successor`](Self::successor)s, by the server's name.
    ///
    /// # Errors
    /// There is no such server, or the number is out of range.
    pub fn set_load(&self, server: &str, load: f32) -> Result<(), LoadError> {
        self.lives.set_load(server, load)
    }

    /// Decides whether a packet is within its service's limits, and where it goes. Takes from the limits, counts
    /// nothing.
    pub(crate) fn admit(&self, packet: &Packet) -> Result<Route, DropReason> {
        if let Some(qos) = &self.qos {
            qos.admit(packet, self.lives.now()).map_err(DropReason::Limited)?;
        }
        self.route(packet)
    }

    /// The DSCP that a packet leaves with, if another than its own.
    fn mark(&self, route: Route, packet: &Packet) -> Option<u8> {
        let qos = self.qos.as_ref().filter(|_| matches!(route, Route::ToServer { .. }))?;
        qos.mark(packet)
    }

    /// Limits, routes, counts, rewrites and marks one packet without a memory: later fragments are unknown, answers
    /// are not limited, no token is asked for (drivers use [`handle`](Self::handle)). Says where it leaves.
    ///
    /// # Errors
    /// Why it is dropped; it has been counted.
    pub fn process(&self, packet: &mut Packet) -> Result<Output, DropReason> {
        let route = self.admit(packet);
        self.carry_out(route, packet)
    }

    /// Counts a route and does as it says.
    ///
    /// # Errors
    /// Why the packet is dropped; it has been counted.
    pub fn carry_out(
        &self,
        route: Result<Route, DropReason>,
        packet: &mut Packet,
    ) -> Result<Output, DropReason> {
        let result = route.and_then(|route| {
            self.reaches(route)?;
            self.count(route, packet);
            let mark = self.mark(route, packet);
            // An outer header copies it.
            let early = mark.filter(|_| self.table.forward == ForwardMode::Gue);
            if let Some(dscp) = early {
                packet.set_dscp(dscp);
            }
            let output = self.forward(route, packet)?;
            if let Some(dscp) = mark.filter(|_| early.is_none()) {
                packet.set_dscp(dscp);
            }
            Ok(output)
        });
        if let Err(reason) = result {
            self.stats.dropped(reason);
        }
        result
    }
}
