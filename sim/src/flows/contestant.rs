//! What a way of balancing is asked.

use super::cluster::{Cluster, Server};

/// A connection as a balancer sees one of its packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    /// The hash of the client's address and port.
    pub hash: u64,
    /// The port that it goes to; 0 is the service's.
    pub port: u16,
    /// The balancer that the routers send it to.
    pub balancer: usize,
}

/// Where a connection was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Home {
    /// The server that has it.
    pub server: Server,
    /// The port that this server named for the rest of the connection; 0 if it stays with the service's.
    pub port: u16,
}

/// A way of balancing: its tables on all balancers.
pub trait Contestant {
    /// The cluster is another than before; every balancer hears of it at once.
    fn update(&mut self, cluster: &Cluster);

    /// The first packet of a connection.
    fn open(&mut self, flow: &Flow) -> Home;

    /// A later packet: whether it reaches `home`, the server that has the connection.
    fn reaches(&mut self, flow: &Flow, home: Server) -> bool;

    /// The connection has ended, and a balancer that remembers it may forget it.
    fn close(&mut self, _flow: &Flow) {}

    /// A SYN that nothing follows.
    fn syn(&mut self, _flow: &Flow) {}

    /// Whether a table may push something out while so many new connections come.
    fn may_evict(&self, _coming: usize) -> bool {
        false
    }
}
