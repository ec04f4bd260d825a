//! Changes to a host, as values: what a [`Host`](crate::Host) applies, writes to its journal and undoes.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::divert::Divert;
use crate::offload::Offload;
use crate::prefix::{Family, PortRange, Prefix, Transport};
use crate::swaps::SwapTable;

/// The main route table.
pub const MAIN: u32 = 254;
/// The table of local addresses.
pub const LOCAL: u32 = 255;

/// One change to the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// Sets a sysctl. The old value returns once no Shunt daemon of this namespace wants another, unless somebody
    /// else has changed it meanwhile.
    ///
    /// Order matters where one sysctl makes the kernel act on others: set `accept_ra` = 2 on an interface before
    /// `net/ipv6/conf/all/forwarding` = 1, or routes learnt from router advertisements are dropped.
    Sysctl(Sysctl),
    /// Adds to `net.ipv4.ip_local_reserved_ports`; what was there stays.
    ReservePorts(Vec<PortRange>),
    /// Moves the rules `lookup local` of both families from preference 0 to 100, so that other rules come first. They
    /// return when the last Shunt daemon leaves.
    LocalLast,
    /// Adds a policy rule.
    Rule(Rule),
    /// Adds a route.
    Route(Route),
    /// Adds an address to an interface.
    Address(Address),
    /// Sets up a device of our own. Undone by restoring MTU and state, if the device still exists.
    Link(Link),
    /// Creates, or replaces as a whole, our nftables table.
    Divert(Divert),
    /// Creates our nftables table of maps, or turns it into what it has to be in one step.
    Offload(Offload),
    /// Creates our nftables table of swaps, empty ([`Host::port_swaps`](crate::Host::port_swaps)).
    SwapTable(SwapTable),
}

impl Change {
    /// Whether it can outlive the daemon ([`Host::close_keeping`](crate::Host::close_keeping)): rules, blackholes,
    /// sysctls and maps, which need no device of ours.
    pub fn can_stay(&self) -> bool {
        matches!(
            self,
            Change::Rule(_)
                | Change::Route(Route { target: Target::Blackhole, .. })
                | Change::Sysctl(_)
                | Change::Offload(_)
        )
    }

    /// Whether there is one of its kind, and a new one takes the place of the old in one step.
    pub fn replaces(&self, old: &Change) -> bool {
        matches!(
            (self, old),
            (Change::Divert(_), Change::Divert(_)) | (Change::Offload(_), Change::Offload(_))
        )
    }
}

/// A sysctl and its value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sysctl {
    /// Its path below `/proc/sys`, such as `net/ipv4/ip_forward`.
    pub key: String,
    /// What to write.
    pub value: String,
    /// Whether it does not matter if this kernel has no such key.
    pub optional: bool,
}

impl Sysctl {
    /// A sysctl that must exist.
    #[expect(clippy::needless_pass_by_value, reason = "numbers and texts are written plainly")]
    pub fn new(key: impl Into<String>, value: impl ToString) -> Self {
        Self { key: key.into(), value: value.to_string(), optional: false }
    }

    /// `net/<ipv4|ipv6>/conf/<interface>/<name>`; `interface` may be `all` or `default`.
    pub fn interface(family: Family, interface: &str, name: &str, value: impl ToString) -> Self {
        let family = match family {
            Family::V4 => "ipv4",
            Family::V6 => "ipv6",
        };
        Self::new(format!("net/{family}/conf/{interface}/{name}"), value)
    }

    /// The same, ignored where the kernel has no such key.
    #[must_use]
    pub fn optional(mut self) -> Self {
        self.optional = true;
        self
    }
}

/// A mark to match: `packet mark & mask == value`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// The bits under `mask`.
    pub value: u32,
    /// The bits compared.
    pub mask: u32,
}

/// A policy rule: packets that meet all its selectors are looked up in `table`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// The family whose packets it sees.
    pub family: Family,
    /// Its place: lower comes first.
    pub preference: u32,
    /// The table looked up; if that has no route, the next rule decides.
    pub table: u32,
    /// The interface it arrives on; `lo` means packets of this host's own sockets.
    pub interface: Option<String>,
    /// The source.
    pub from: Option<Prefix>,
    /// The destination.
    pub to: Option<Prefix>,
    /// The IP protocol meant. Without it, ARP and neighbour discovery also meet the rule.
    pub protocol: Option<u8>,
    /// The source port (with a protocol that has ports).
    pub source_port: Option<PortRange>,
    /// The destination port (with a protocol that has ports).
    pub destination_port: Option<PortRange>,
    /// The packet's mark.
    pub mark: Option<Mark>,
}

impl Rule {
    /// A rule for every packet of a family.
    pub fn new(family: Family, preference: u32, table: u32) -> Self {
        Self {
            family,
            preference,
            table,
            interface: None,
            from: None,
            to: None,
            protocol: None,
            source_port: None,
            destination_port: None,
            mark: None,
        }
    }

    /// Only what arrives on `interface`; `lo` for this host's own sockets.
    #[must_use]
    pub fn interface(mut self, interface: impl Into<String>) -> Self {
        self.interface = Some(interface.into());
        self
    }

    /// Only what comes from `prefix`.
    #[must_use]
    pub fn from(mut self, prefix: impl Into<Prefix>) -> Self {
        self.from = Some(prefix.into());
        self
    }

    /// Only what goes to `prefix`.
    #[must_use]
    pub fn to(mut self, prefix: impl Into<Prefix>) -> Self {
        self.to = Some(prefix.into());
        self
    }

    /// Only TCP.
    #[must_use]
    pub fn tcp(self) -> Self {
        self.protocol(Transport::Tcp.number())
    }

    /// Only this IP protocol.
    #[must_use]
    pub fn protocol(mut self, number: u8) -> Self {
        self.protocol = Some(number);
        self
    }

    /// Only TCP from these ports, or what [`protocol`](Self::protocol) says afterwards. Fragments do not meet it.
    #[must_use]
    pub fn source_port(mut self, ports: impl Into<PortRange>) -> Self {
        self.source_port = Some(ports.into());
        self.tcp()
    }

    /// Only TCP to these ports.
    #[must_use]
    pub fn destination_port(mut self, ports: impl Into<PortRange>) -> Self {
        self.destination_port = Some(ports.into());
        self.tcp()
    }

    /// Only what carries this mark.
    #[must_use]
    pub fn mark(mut self, value: u32, mask: u32) -> Self {
        self.mark = Some(Mark { value, mask });
        self
    }
}

/// Where a route leads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// Out of a device.
    Device {
        /// The interface.
        interface: String,
        /// The router, if it is not on the link.
        gateway: Option<IpAddr>,
        /// The source address of this host's own packets.
        source: Option<IpAddr>,
        /// Take the gateway to be on the link though no route says so.
        on_link: bool,
    },
    /// To this host itself, as if the destination were its own address.
    Local {
        /// The interface that gets the address.
        interface: String,
    },
    /// Nowhere, silently: no ICMP error tells the sender.
    Blackhole,
}

/// A route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// The table it is in.
    pub table: u32,
    /// Which destinations.
    pub destination: Prefix,
    /// Where they go.
    pub target: Target,
    /// Lower is preferred among routes to the same destination; `None` is 0 (IPv4) or 1024 (IPv6).
    pub metric: Option<u32>,
}

impl Route {
    /// A route out of `interface`.
    pub fn device(table: u32, destination: impl Into<Prefix>, interface: impl Into<String>) -> Self {
        let target =
            Target::Device { interface: interface.into(), gateway: None, source: None, on_link: false };
        Self { table, destination: destination.into(), target, metric: None }
    }

    /// A route that drops silently.
    pub fn blackhole(table: u32, destination: impl Into<Prefix>) -> Self {
        Self { table, destination: destination.into(), target: Target::Blackhole, metric: None }
    }

    /// A route that makes the destination this host's own.
    pub fn local(table: u32, destination: impl Into<Prefix>, interface: impl Into<String>) -> Self {
        let target = Target::Local { interface: interface.into() };
        Self { table, destination: destination.into(), target, metric: None }
    }

    /// The same by a router, if there is one.
    #[must_use]
    pub fn via(mut self, router: Option<IpAddr>) -> Self {
        if let Target::Device { gateway, .. } = &mut self.target {
            *gateway = router;
        }
        self
    }

    /// The same with a source address for this host's own packets, if one is given.
    #[must_use]
    pub fn source(mut self, address: Option<IpAddr>) -> Self {
        if let Target::Device { source, .. } = &mut self.target {
            *source = address;
        }
        self
    }

    /// The same with the router taken to be on the link.
    #[must_use]
    pub fn on_link(mut self) -> Self {
        if let Target::Device { on_link, .. } = &mut self.target {
            *on_link = true;
        }
        self
    }

    /// The same with a metric.
    #[must_use]
    pub fn metric(mut self, metric: u32) -> Self {
        self.metric = Some(metric);
        self
    }
}

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// The interface.
    pub interface: String,
    /// The address.
    pub address: IpAddr,
    /// The length of the on-link prefix, in bits.
    pub prefix_len: u8,
}

/// How a device of our own is set up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// The interface.
    pub interface: String,
    /// Its MTU in bytes; `None` leaves it.
    pub mtu: Option<u32>,
    /// Whether to keep the kernel from sending of its own on it: no link-local address, no router solicitations, no
    /// router advertisements accepted. IPv6 routes still work.
    pub quiet: bool,
    /// Whether to set it up.
    pub up: bool,
}

impl Link {
    /// A TUN device: quiet, with this MTU, and up.
    pub fn tun(interface: impl Into<String>, mtu: u32) -> Self {
        Self { interface: interface.into(), mtu: Some(mtu), quiet: true, up: true }
    }
}

macro_rules! into_change {
    ($($variant:ident),*) => {
        $(impl From<$variant> for Change {
            fn from(value: $variant) -> Self {
                Change::$variant(value)
            }
        })*
    };
}
into_change!(Sysctl, Rule, Route, Address, Link, Divert, Offload, SwapTable);
