//! Questions to the kernel of the calling thread's network namespace. Changes nothing.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use nlink::Connection;
use nlink::netlink::SockDiag;
use nlink::netlink::types::route::RouteType;
use nlink::sockdiag::{InetSocket, SocketFilter, SocketState, TcpState};

use crate::error::HostError;
use crate::kernel;
use crate::prefix::{Family, Prefix};

/// How this host reaches an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NextHop {
    /// The index of the interface packets leave by.
    pub index: u32,
    /// Its name.
    pub interface: String,
    /// The router; `None` where the address is on the link.
    pub gateway: Option<IpAddr>,
    /// The source address a socket gets that has none.
    pub source: Option<IpAddr>,
    /// Whether the address is this host's own.
    pub local: bool,
}

/// How the kernel would send a local socket's packets to `destination`. Policy rules count, so ask before rules of
/// one's own divert that destination (rules for TCP alone do not matter: the question names no protocol).
///
/// # Errors
/// [`HostError::NoRoute`], also for blackholes and prohibitions; or netlink fails.
pub async fn next_hop(destination: IpAddr) -> Result<NextHop, HostError> {
    let netlink = kernel::connect()?;
    let failed = |error| HostError::netlink(format!("look up the route to {destination}"), error);
    let route = match netlink.lookup_route(destination).await {
        Ok(route) => route,
        Err(error) if error.is_network_unreachable() || error.is_host_unreachable() => {
            return Err(HostError::NoRoute(destination));
        }
        // EINVAL: a blackhole. EACCES: prohibit.
        Err(error) if matches!(error.errno(), Some(nix::libc::EINVAL | nix::libc::EACCES)) => {
            return Err(HostError::NoRoute(destination));
        }
        Err(error) => return Err(failed(error)),
    };
    let local = route.route_type() == RouteType::Local;
    if !local && route.route_type() != RouteType::Unicast {
        return Err(HostError::NoRoute(destination));
    }
    let index = route.oif().ok_or(HostError::NoRoute(destination))?;
    let interface = netlink
        .interface_name(index)
        .await
        .map_err(failed)?
        .ok_or_else(|| HostError::NoInterface(format!("number {index}")))?;
    let gateway = route.gateway().or(route.via()).copied();
    Ok(NextHop { index, interface, gateway, source: route.prefsrc().copied(), local })
}

/// An address of an interface with its on-link prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InterfaceAddress {
    /// The address.
    pub address: IpAddr,
    /// The prefix it is in.
    pub network: Prefix,
}

/// The addresses of an interface, link-local ones too.
///
/// # Errors
/// No such interface; or netlink fails.
pub async fn interface_addresses(interface: &str) -> Result<Vec<InterfaceAddress>, HostError> {
    let netlink = kernel::connect()?;
    kernel::link_state(&netlink, interface).await?;
    let addresses = netlink
        .get_addresses_by_name(interface)
        .await
        .map_err(|error| HostError::netlink(format!("list the addresses of {interface}"), error))?;
    Ok(addresses
        .iter()
        .filter_map(|message| {
            let address = *message.primary_address()?;
            Some(InterfaceAddress { address, network: Prefix::new(address, message.prefix_len()) })
        })
        .collect())
}

/// The MTU of an interface in bytes.
///
/// # Errors
/// No such interface; or netlink fails.
pub async fn link_mtu(interface: &str) -> Result<u32, HostError> {
    let state = kernel::link_state(&kernel::connect()?, interface).await?;
    state.mtu().ok_or_else(|| HostError::Invalid(format!("{interface} has no MTU")))
}

/// Whether this kernel, in this namespace, has IPv6 at all.
pub fn has_ipv6() -> bool {
    kernel::has(Family::V6)
}

async fn tcp_sockets(states: &[TcpState]) -> Result<Vec<InetSocket>, HostError> {
    let diag = Connection::<SockDiag>::new()
        .map_err(|error| HostError::netlink("open a sock_diag socket", error))?;
    let filter = SocketFilter::tcp().states(states).build();
    let sockets = diag.query(&filter).await.map_err(|error| HostError::netlink("list TCP sockets", error))?;
    Ok(sockets.iter().filter_map(|socket| socket.as_inet().cloned()).collect())
}

/// IPv4-mapped IPv6 addresses are what they map.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// The TCP connections of this namespace, from SYN-SENT to TIME-WAIT.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TcpSockets {
    pairs: HashSet<(SocketAddr, SocketAddr)>,
    /// Those of them that are in TIME-WAIT.
    waiting: HashSet<(SocketAddr, SocketAddr)>,
}

impl TcpSockets {
    /// Those whose remote address is in `remotes`; IPv4-mapped addresses count as IPv4.
    ///
    /// # Errors
    /// The kernel does not answer (`sock_diag` missing).
    pub async fn connected_to(remotes: &HashSet<IpAddr>) -> Result<Self, HostError> {
        use TcpState::{
            CloseWait, Closing, Established, FinWait1, FinWait2, LastAck, NewSynRecv, SynRecv, SynSent,
            TimeWait,
        };
        let states = [
            SynSent,
            SynRecv,
            NewSynRecv,
            Established,
            FinWait1,
            FinWait2,
            CloseWait,
            Closing,
            LastAck,
            TimeWait,
        ];
        let mut found = Self::default();
        for socket in tcp_sockets(&states).await? {
            let pair = (canonical(socket.local), canonical(socket.remote));
            if !remotes.contains(&pair.1.ip()) {
                continue;
            }
            if socket.state == SocketState::Tcp(TimeWait) {
                found.waiting.insert(pair);
            }
            found.pairs.insert(pair);
        }
        Ok(found)
    }

    /// Those of the local sockets in `locals` that can still carry something: all but TIME-WAIT; IPv4-mapped addresses
    /// count as IPv4.
    ///
    /// # Errors
    /// The kernel does not answer (`sock_diag` missing).
    pub async fn served_at(locals: &HashSet<SocketAddr>) -> Result<Self, HostError> {
        use TcpState::{CloseWait, Closing, Established, FinWait1, FinWait2, LastAck, NewSynRecv, SynRecv};
        let states = [SynRecv, NewSynRecv, Established, FinWait1, FinWait2, CloseWait, Closing, LastAck];
        Self::at(locals, &states).await
    }

    /// Those of the local sockets in `locals` that neither end has closed; IPv4-mapped addresses count as IPv4.
    ///
    /// # Errors
    /// The kernel does not answer (`sock_diag` missing).
    pub async fn established_at(locals: &HashSet<SocketAddr>) -> Result<Self, HostError> {
        Self::at(locals, &[TcpState::Established]).await
    }

    async fn at(locals: &HashSet<SocketAddr>, states: &[TcpState]) -> Result<Self, HostError> {
        let pairs = tcp_sockets(states)
            .await?
            .iter()
            .map(|socket| (canonical(socket.local), canonical(socket.remote)))
            .filter(|(local, _)| locals.contains(local))
            .collect();
        Ok(Self { pairs, ..Self::default() })
    }

    /// The connections as (local, remote).
    pub fn pairs(&self) -> &HashSet<(SocketAddr, SocketAddr)> {
        &self.pairs
    }

    /// Whether a socket has this connection.
    pub fn contains(&self, local: SocketAddr, remote: SocketAddr) -> bool {
        self.pairs.contains(&(canonical(local), canonical(remote)))
    }

    /// Whether that socket is in TIME-WAIT.
    pub fn is_waiting(&self, local: SocketAddr, remote: SocketAddr) -> bool {
        self.waiting.contains(&(canonical(local), canonical(remote)))
    }
}

/// The listening TCP sockets of this namespace (S6).
#[derive(Debug, Clone, Default)]
pub struct Listeners {
    sockets: Vec<(SocketAddr, bool)>,
}

impl Listeners {
    /// Those there are now.
    ///
    /// # Errors
    /// The kernel does not answer (`sock_diag` missing).
    pub async fn now() -> Result<Self, HostError> {
        let sockets = tcp_sockets(&[TcpState::Listen])
            .await?
            .iter()
            .map(|socket| (socket.local, socket.v6only.unwrap_or(false)))
            .collect();
        Ok(Self { sockets })
    }

    /// Whether somebody accepts connections to `address`: on the address itself or on all addresses. A socket on
    /// `[::]` that is not IPv6-only accepts IPv4 too.
    pub fn accepts(&self, address: SocketAddr) -> bool {
        let wanted = canonical(address);
        self.sockets.iter().any(|(listener, v6_only)| {
            let ip = listener.ip();
            let any = match (ip, wanted.ip()) {
                (IpAddr::V4(v4), IpAddr::V4(_)) => v4.is_unspecified(),
                (IpAddr::V6(v6), IpAddr::V6(_)) => v6.is_unspecified(),
                (IpAddr::V6(v6), IpAddr::V4(_)) => v6.is_unspecified() && !v6_only,
                (IpAddr::V4(_), IpAddr::V6(_)) => false,
            };
            listener.port() == wanted.port() && (any || ip.to_canonical() == wanted.ip())
        })
    }
}

/// Whether somebody listens on `address` now (S6): [`Listeners::accepts`] for one question.
///
/// # Errors
/// As [`Listeners::now`].
pub async fn is_listening(address: SocketAddr) -> Result<bool, HostError> {
    Ok(Listeners::now().await?.accepts(address))
}

/// The interfaces that take router advertisements only while IPv6 is not forwarded (`accept_ra` = 1), sorted: whoever
/// switches forwarding on sets them to 2 first.
pub fn accepting_advertisements() -> Vec<String> {
    let folder = Path::new("/proc/sys/net/ipv6/conf");
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let accepts = |name: &String| {
        std::fs::read_to_string(folder.join(name).join("accept_ra")).is_ok_and(|value| value.trim() == "1")
    };
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| !matches!(name.as_str(), "all" | "default" | "lo"))
        .filter(accepts)
        .collect();
    names.sort();
    names
}
