//! Which servers are healthy (`B7`): each service port of each server is looked at from this host's own TCP.
//!
//! `state` decides from successes and failures in a row, `probe` is one look, `Monitor` runs them and tells what
//! has changed. What follows from that is the table's business: an unhealthy server gets no new selections on that
//! redirect port, its service ports keep working.

mod monitor;
mod probe;
mod state;

use std::collections::HashSet;

use shunt_host::Family;

pub(crate) use monitor::{CheckReport, Monitor, Transition};
pub use state::{Health, State};

/// Servers that get no new selections on a redirect port in a family, by their indices in one configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unfit {
    ports: HashSet<(usize, usize, Family)>,
    unreachable: HashSet<usize>,
}

impl Unfit {
    /// Notes a server and a service.
    pub fn insert(&mut self, server: usize, service: usize, family: Family) {
        self.ports.insert((server, service, family));
    }

    /// Notes a server that nothing can be sent to: unfit for everything.
    pub fn insert_unreachable(&mut self, server: usize) {
        self.unreachable.insert(server);
    }

    /// Whether it is among them.
    pub fn contains(&self, server: usize, service: usize, family: Family) -> bool {
        self.is_unreachable(server) || self.ports.contains(&(server, service, family))
    }

    /// Whether nothing can be sent to a server.
    pub fn is_unreachable(&self, server: usize) -> bool {
        self.unreachable.contains(&server)
    }
}
