//! Addresses and ports of the world that every contestant gets.
//!
//! ```text
//! client 10.1.0.2-5 -- 10.1.0.1 middle 10.3.0.1 -- 10.3.0.11 server        (direct: client 10.3.0.2-5 -- server)
//! ```

use std::net::{Ipv4Addr, SocketAddr};

use crate::contestant::{Contestant, Entry};

/// The shared address.
pub const VIP: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// The server.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(10, 3, 0, 11);
/// The host in the middle, as the client and as the server see it.
pub const MIDDLE: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 1, 0, 1), Ipv4Addr::new(10, 3, 0, 1)];
/// How many addresses the client has: one has too few ports for a hundred thousand connections.
pub const CLIENT_ADDRESSES: u8 = 4;
/// How many ports echo, each with a process at both ends: one may not open files enough for all.
pub const ECHO_PORTS: u16 = 8;

/// A program on the server, and its two ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// nginx.
    Web,
    /// iperf3.
    Iperf,
    /// The bench's own echo; less than [`ECHO_PORTS`].
    Echo(u16),
}

impl Service {
    /// Every one.
    pub fn all() -> impl Iterator<Item = Service> {
        [Service::Web, Service::Iperf].into_iter().chain((0..ECHO_PORTS).map(Service::Echo))
    }

    /// A name for configurations.
    pub fn name(self) -> String {
        match self {
            Service::Web => "web".to_owned(),
            Service::Iperf => "iperf".to_owned(),
            Service::Echo(number) => format!("echo{number}"),
        }
    }

    /// The port that clients know.
    pub fn redirect_port(self) -> u16 {
        match self {
            Service::Web => 80,
            Service::Iperf => 5201,
            Service::Echo(number) => 7000 + number,
        }
    }

    /// The server's own.
    pub fn service_port(self) -> u16 {
        match self {
            Service::Web => 41_001,
            Service::Iperf => 42_001,
            Service::Echo(number) => 43_001 + number,
        }
    }

    /// Where a contestant's client connects to.
    pub fn target(self, contestant: Contestant) -> SocketAddr {
        match contestant.entry() {
            Entry::Server => (SERVER, self.redirect_port()).into(),
            Entry::RedirectPort => (VIP, self.redirect_port()).into(),
            Entry::ServicePort => (VIP, self.service_port()).into(),
        }
    }

    /// The server's port where its connections end.
    pub fn reached_port(self, contestant: Contestant) -> u16 {
        if contestant.entry() == Entry::ServicePort || contestant.continuation().is_some() {
            self.service_port()
        } else {
            self.redirect_port()
        }
    }
}

/// The client's addresses; with nothing in the middle it is on the server's link.
pub fn client_addresses(contestant: Contestant) -> impl Iterator<Item = Ipv4Addr> {
    let net = if contestant == Contestant::Direct { 3 } else { 1 };
    (0..CLIENT_ADDRESSES).map(move |number| Ipv4Addr::new(10, net, 0, 2 + number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_services_share_a_port() {
        let mut ports: Vec<u16> =
            Service::all().flat_map(|service| [service.redirect_port(), service.service_port()]).collect();
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), 2 * Service::all().count());
    }

    #[test]
    fn a_redirected_connection_ends_at_the_service_port() {
        assert_eq!(Service::Web.reached_port(Contestant::Reconnect), 41_001);
        assert_eq!(Service::Web.reached_port(Contestant::Shunt), 41_001);
        assert_eq!(Service::Web.reached_port(Contestant::Plain), 80);
        assert_eq!(Service::Web.target(Contestant::Kernel), "10.3.0.11:80".parse().unwrap());
        assert_eq!(Service::Echo(3).target(Contestant::Shunt), "203.0.113.10:43004".parse().unwrap());
    }
}
