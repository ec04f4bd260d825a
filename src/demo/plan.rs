//! Who is where in the demo's network, and when what happens.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The redirect port X that all servers share.
pub(crate) const SHARED_PORT: u16 = 80;
/// How many servers there are.
pub(crate) const SERVERS: usize = 4;
/// The server that is added on the way.
pub(crate) const ADDED: usize = 3;
/// The server that is drained and removed.
pub(crate) const DRAINED: usize = 1;

/// When the server is added: the part of the connections begun by then.
pub(crate) const ADD_AT: f64 = 0.2;
/// When the other is drained.
pub(crate) const DRAIN_AT: f64 = 0.38;
/// When the balancer is killed.
pub(crate) const KILL_AT: f64 = 0.55;
/// When the drained server's last connection ends at the latest, by the client's own doing.
#[cfg(test)]
pub(crate) const REMOVED_BY: f64 = 0.8;

/// The networks of the demo, by the two hosts they connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Net {
    /// Client with shim and router.
    Client,
    /// Client without shim and router.
    PlainClient,
    /// Router and balancer.
    Middle,
    /// Balancer and a server.
    Server(usize),
}

/// Addresses of one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    /// 10.77.0.0/16 and a VIP of RFC 5737.
    V4,
    /// `fd77::/16` and a VIP of RFC 3849.
    V6,
}

impl Family {
    /// The shared address.
    pub(crate) fn vip(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::new(203, 0, 113, 10).into(),
            Self::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x10).into(),
        }
    }

    /// The shared address and port.
    pub(crate) fn target(self) -> SocketAddr {
        SocketAddr::new(self.vip(), SHARED_PORT)
    }

    /// The VIP as a prefix of one address.
    pub(crate) fn vip_prefix(self) -> String {
        format!("{}/{}", self.vip(), if self == Self::V4 { 32 } else { 128 })
    }

    /// Everything.
    pub(crate) fn default_route(self) -> &'static str {
        if self == Self::V4 { "0.0.0.0/0" } else { "::/0" }
    }

    /// The address of a network's first (1, nearer to the balancer, but for servers) or second end (2).
    pub(crate) fn address(self, net: Net, end: u8) -> IpAddr {
        let number = match net {
            Net::Middle => 0,
            Net::Client => 1,
            Net::PlainClient => 2,
            Net::Server(server) => 11 + server as u8,
        };
        match self {
            Self::V4 => Ipv4Addr::new(10, 77, number, end).into(),
            Self::V6 => Ipv6Addr::new(0xfd77, 0, 0, u16::from(number), 0, 0, 0, u16::from(end)).into(),
        }
    }

    /// The same with the network's prefix length.
    pub(crate) fn interface(self, net: Net, end: u8) -> String {
        format!("{}/{}", self.address(net, end), if self == Self::V4 { 24 } else { 64 })
    }
}

/// How much of `whole` a `part` is, from 0 to 1.
#[expect(clippy::cast_precision_loss, reason = "nobody makes 2^52 connections")]
pub(crate) fn share(part: u64, whole: u64) -> f64 {
    part as f64 / whole.max(1) as f64
}

/// A server's name.
pub(crate) fn server_name(server: usize) -> String {
    format!("web-{}", server + 1)
}

/// A server's service port Y.
pub(crate) fn service_port(server: usize) -> u16 {
    41_001 + server as u16
}

/// The server that owns a service port.
pub(crate) fn owner(port: u16) -> Option<String> {
    (0..SERVERS).find(|server| service_port(*server) == port).map(server_name)
}

/// A server's address.
pub(crate) fn server_address(family: Family, server: usize) -> IpAddr {
    family.address(Net::Server(server), 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_ports_are_unique_and_owned() {
        let nets = [Net::Middle, Net::Client, Net::PlainClient];
        let nets = nets.into_iter().chain((0..SERVERS).map(Net::Server));
        for family in [Family::V4, Family::V6] {
            let mut all: Vec<_> =
                nets.clone().flat_map(|net| [1, 2].map(|end| family.address(net, end))).collect();
            all.sort_unstable();
            all.dedup();
            assert_eq!(all.len(), 2 * (3 + SERVERS));
        }
        assert_eq!(owner(service_port(2)).as_deref(), Some("web-3"));
        assert_eq!(owner(SHARED_PORT), None);
        assert_eq!(Family::V6.interface(Net::Client, 2), "fd77:0:0:1::2/64");
    }
}
