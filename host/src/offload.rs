//! Forwarding that the kernel does by itself: a description, from which nftables maps are made.
//!
//! An [`Offload`] rewrites addresses of packets as they arrive, or marks them, before they are routed and without
//! connection tracking, by maps alone: it remembers nothing. What no map knows goes on untouched. The maps work without the
//! daemon, too: what a killed one leaves goes on forwarding until its successor replaces it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::prefix::{PortRange, Transport};
use crate::shortcuts::Shortcuts;

/// The most entries of all port maps together; each is dumped whenever counters are read.
pub const MAX_ENTRIES: usize = 65_536;
/// The most slots of all [`Spread`]s together.
pub const MAX_SLOTS: usize = 1 << 20;

/// Which end of a packet is looked up and rewritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum End {
    /// Where it comes from.
    Source,
    /// Where it goes.
    Destination,
}

/// What becomes of a packet that is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Goal {
    /// The end that was looked up gets this address.
    Address(IpAddr),
    /// The packet stays as it is and gets this mark, by which a rule may route it.
    Mark(u32),
}

/// Packets whose address and port of one end are a key have a goal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortMap {
    /// Which end.
    pub end: End,
    /// Of which protocol.
    pub transport: Transport,
    /// TCP segments with any of these flags are left alone.
    pub except_flags: u8,
    /// The goals; an address of another family than the key's leaves the entry out.
    pub entries: BTreeMap<SocketAddr, Goal>,
}

/// TCP segments to one of several addresses and ports have the goal that a hash of their source says: the kernel's
/// `jhash` with `seed` over the source address and the source port, in network order, the port followed by two zero bytes;
/// scaled to the number of slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spread {
    /// What is spread, one at least; all of one family, that of the goals.
    pub targets: Vec<SocketAddr>,
    /// Segments with any of these flags are left alone.
    pub except_flags: u8,
    /// The hash's seed.
    pub seed: u32,
    /// For each scaled hash the index of the goal.
    pub slots: Arc<[u16]>,
    /// Where they go.
    pub goals: Vec<Goal>,
}

/// What the kernel shall forward, in nftables tables of its own. Port maps come before spreads; the first that
/// knows a packet ends it.
///
/// Fragments are left alone, and IPv6 packets with extension headers. A journal does not hold the maps: only that they
/// stand.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offload {
    /// What arrives on this interface is left alone: the daemon's own TUN.
    #[serde(skip)]
    pub except_interface: Option<String>,
    /// What arrives on interfaces whose names begin so is left alone, too.
    #[serde(skip)]
    pub except_prefix: Option<String>,
    /// What goes to these ports of this host itself is left alone: answers to its own programs.
    #[serde(skip)]
    pub except_local_ports: Vec<PortRange>,
    /// Maps of sources leave what goes to these addresses alone.
    #[serde(skip)]
    pub except_destinations: BTreeSet<IpAddr>,
    /// The bits of marks that are ours, where all goals are marks: packets with any other bit set are left alone. Without
    /// it all goals are addresses.
    #[serde(skip)]
    pub mark_mask: Option<u32>,
    /// Maps from address and port.
    #[serde(skip)]
    pub maps: Vec<PortMap>,
    /// Maps from hashes.
    #[serde(skip)]
    pub spreads: Vec<Spread>,
    /// The ways out by which packets with new addresses are handed on where they arrive, in a second table; what has none
    /// is routed. What is to be left alone must have no way out: to own addresses there is none, and none must lead to
    /// those of `except_destinations`.
    #[serde(skip)]
    pub shortcuts: Option<Shortcuts>,
}

impl Offload {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.maps.iter().all(|map| map.entries.is_empty()) && self.spreads.is_empty()
    }
}

/// Packets (a super-packet is one) and their bytes, IP headers included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// How many.
    pub packets: u64,
    /// How long they were.
    pub bytes: u64,
}

/// What an entry of an [`Offload`] has done since it was installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Counted {
    /// An entry of a port map, by the map's index and the key.
    Map(usize, SocketAddr),
    /// A goal of a spread, by the spread's index.
    Spread(usize, Goal),
}
