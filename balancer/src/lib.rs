//! Stateless forwarding on destination ports (PROTOCOL.md §3, `B1` to `B7`).
//!
//! [`table`] is what a [`Config`] means for packets, [`route`] decides, [`forward`] rewrites, [`stats`] counts,
//! [`driver`] carries packets between the host and these. No connection is remembered anywhere; [`fragments`] is the only
//! memory.
//!
//! In `network` mode answers have to come back through this host, and only those from service ports and redirect
//! ports, and of protocols without ports that go to servers by configuration, get the VIP as source again: for all
//! else a default server is of use in `direct` mode only.

pub mod config;
mod datagram;
pub mod driver;
pub mod forward;
pub mod fragments;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
mod host;
mod icmp;
pub mod maglev;
pub mod route;
pub mod select;
pub mod stats;
pub mod table;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;

use shunt_stack::wire::Packet;

pub use config::Config;
pub use driver::{Error, RunOptions, run};
pub use forward::Output;
pub use fragments::Memory;
pub use route::{Decision, DropReason, Route};
pub use select::SelectKey;
pub use stats::{ServerSnapshot, Snapshot, Stats};
pub use table::{ServerId, Table};

use stats::ServerStats;

/// A table and the counters of what it decides. A reload makes another one with [`Balancer::successor`].
#[derive(Debug)]
pub struct Balancer {
    pub(crate) table: Table,
    pub(crate) stats: Arc<Stats>,
    pub(crate) servers: Box<[Arc<ServerStats>]>,
    key: SelectKey,
}

impl Balancer {
    /// A balancer for a configuration; `key` is the key of the policy `random`.
    pub fn new(config: &Config, key: SelectKey) -> Balancer {
        let servers = config.servers.iter().map(|_| Arc::default()).collect();
        Balancer { table: Table::new(config, key), stats: Arc::default(), servers, key }
    }

    /// A balancer for another configuration that counts on where this one stands, and whose `random` chooses the
    /// same for a repeated SYN where the set is the same.
    #[must_use]
    pub fn successor(&self, config: &Config) -> Balancer {
        let known: HashMap<&str, &Arc<ServerStats>> = self.server_stats().collect();
        let counters = |server: &config::Server| {
            known.get(server.name.as_str()).map(|s| Arc::clone(s)).unwrap_or_default()
        };
        Balancer {
            table: Table::new(config, self.key),
            stats: Arc::clone(&self.stats),
            servers: config.servers.iter().map(counters).collect(),
            key: self.key,
        }
    }

    /// Routes, counts and rewrites one packet without a memory: later fragments are unknown, answers are not limited
    /// (drivers use [`handle`](Self::handle)). Says where it leaves.
    ///
    /// # Errors
    /// Why it is dropped; it has been counted.
    pub fn process(&self, packet: &mut Packet) -> Result<Output, DropReason> {
        let route = self.route(packet);
        self.carry_out(route, packet)
    }

    /// Counts a route and does as it says.
    pub(crate) fn carry_out(
        &self,
        route: Result<Route, DropReason>,
        packet: &mut Packet,
    ) -> Result<Output, DropReason> {
        let result = route.and_then(|route| {
            self.count(route, packet);
            self.forward(route, packet)
        });
        if let Err(reason) = result {
            self.stats.dropped(reason);
        }
        result
    }
}
