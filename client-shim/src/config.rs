//! The client's TOML file: what may be written, what is left out, and what is refused with file and line.
//!
//! ```toml
#![doc = include_str!("config/reference.toml")]
//! ```

mod file;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;
use shunt_host::control::ControlOptions;
use shunt_host::{ConfigError, HostOptions, PortRange, Prefix, Source};
use shunt_stack::redirect::ClientConfig;

/// How the shim gets at connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Beside the kernel's TCP: programs connect to VIPs as ever.
    #[default]
    Transparent,
    /// As a proxy: programs connect to it, and it to VIPs, on a TCP of its own.
    Proxy,
}

/// When TCP to and from the VIPs is held back, in the absence of the shim, so that its redirected connections survive
/// until it is back (`C12`). Without it, the host's TCP and a wrong server reset them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Hold {
    /// Never: new connections go plain at once, redirected ones end.
    Never,
    /// After the shim was killed or crashed, but not after it was stopped in order.
    #[default]
    Crash,
    /// Also after it was stopped in order: for restarts. VIPs cannot be reached until it is started again.
    Always,
}

/// Where the proxy's byte streams may be cut when their server asks for another (PROTOCOL.md §4, `M8`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Boundary {
    /// Nowhere: connections stay where they are.
    #[default]
    None,
    /// Behind data of the program that ends with a newline: for protocols whose requests are lines.
    Line,
    /// Once nothing was sent either way for so long: for protocols in which silence means that no request is under way.
    Idle(Duration),
}

impl FromStr for Boundary {
    type Err = BoundaryError;

    /// Reads `none`, `line`, or `idle:` and a time in `ms` or `s`.
    fn from_str(text: &str) -> Result<Self, BoundaryError> {
        match text.split_once(':') {
            None if text == "none" => Ok(Self::None),
            None if text == "line" => Ok(Self::Line),
            Some(("idle", time)) => idle_time(time).map(Self::Idle).ok_or(BoundaryError),
            _ => Err(BoundaryError),
        }
    }
}

/// From 1 ms to 1 h.
fn idle_time(text: &str) -> Option<Duration> {
    let (number, unit) = match text.strip_suffix("ms") {
        Some(number) => (number, Duration::from_millis(1)),
        None => (text.strip_suffix('s')?, Duration::from_secs(1)),
    };
    let time = unit.checked_mul(number.parse().ok()?)?;
    (Duration::from_millis(1)..=Duration::from_hours(1)).contains(&time).then_some(time)
}

/// A boundary that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("write a boundary as \"none\", \"line\", or \"idle:50ms\" (from 1ms to 3600s)")]
pub struct BoundaryError;

/// A port forward: a local address, and where its connections go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forward {
    /// Listened on.
    pub listen: SocketAddr,
    /// A VIP and a redirect port.
    pub target: SocketAddr,
}

impl FromStr for Forward {
    type Err = ForwardError;

    /// Reads `LISTEN=TARGET`, as in `127.0.0.1:8080=203.0.113.10:443`, with brackets around IPv6 addresses.
    fn from_str(text: &str) -> Result<Self, ForwardError> {
        let (listen, target) = text.split_once('=').ok_or(ForwardError)?;
        Ok(Self { listen: socket(listen).ok_or(ForwardError)?, target: socket(target).ok_or(ForwardError)? })
    }
}

/// An address and a port other than 0.
fn socket(text: &str) -> Option<SocketAddr> {
    text.trim().parse().ok().filter(|address: &SocketAddr| address.port() != 0)
}

/// A forward that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("write a forward as \"127.0.0.1:8080=VIP:443\" ([...] around IPv6 addresses)")]
pub struct ForwardError;

/// What the command line adds to the file's `[proxy]`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Extra {
    /// SOCKS5 is offered here instead.
    pub socks5: Option<SocketAddr>,
    /// Further forwards.
    pub forward: Vec<Forward>,
    /// Where streams may be cut instead.
    pub boundary: Option<Boundary>,
}

/// What only the proxy needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyConfig {
    /// Where SOCKS5 clients connect, if it is offered.
    pub socks5: Option<SocketAddr>,
    /// Port forwards.
    pub forward: Vec<Forward>,
    /// Own source ports, kept from the host's other programs. A connection of the kernel to a VIP that uses one when
    /// the proxy starts is reset.
    pub ports: PortRange,
    /// Where streams may be cut.
    pub boundary: Boundary,
    /// Addresses to which a server may move a stream (PROTOCOL.md §7); none unless configured.
    pub accept_prefixes: Vec<Prefix>,
    /// Connections at once.
    pub max_connections: usize,
    /// How long a connect may take.
    pub connect_timeout: Duration,
    /// How long a SOCKS client may take to say where it wants to go.
    pub request_timeout: Duration,
}

/// The client's configuration, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Transparent or proxy.
    pub mode: Mode,
    /// The interface VIPs must be reached by; `None` takes what the route says, for each VIP.
    pub interface: Option<String>,
    /// The protocol machine's part: VIPs, ports, limits, timers. Its `mtu` is found when the shim starts.
    pub client: ClientConfig,
    /// When connections are held in the shim's absence.
    pub hold: Hold,
    /// Whether the shim's packets bypass connection tracking, which takes the handover for an invalid packet.
    pub notrack: bool,
    /// How often routes to VIPs are looked at.
    pub path_interval: Duration,
    /// How often the kernel's sockets are looked at for connections that have ended (`C12`).
    pub socket_interval: Duration,
    /// The proxy's part; there in proxy mode only.
    pub proxy: Option<ProxyConfig>,
    /// The control socket.
    pub control: ControlOptions,
    /// Numbers and names used on the host.
    pub host: HostOptions,
    /// The file it came from, which SIGHUP reads again.
    pub path: PathBuf,
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// The first mistake, with its line.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        Self::from_source(&Source::read(path.as_ref())?)
    }

    /// Reads and checks a file together with what the command line adds.
    ///
    /// # Errors
    /// The first mistake, with its line if it is the file's.
    pub fn load_with(path: impl AsRef<Path>, extra: &Extra) -> Result<Self, ConfigError> {
        let source = Source::read(path.as_ref())?;
        file::File::read(&source)?.check(&source, extra)
    }

    /// The same as [`load`](Self::load) from text in memory.
    ///
    /// # Errors
    /// The first mistake, with its line.
    pub fn from_source(source: &Source) -> Result<Self, ConfigError> {
        file::File::read(source)?.check(source, &Extra::default())
    }

    /// The VIPs.
    pub fn vips(&self) -> impl Iterator<Item = IpAddr> {
        self.client.vips.iter().map(|vip| vip.address)
    }

    /// Why `new` cannot take this one's place while the shim runs; `None` if it can.
    pub(crate) fn needs_restart(&self, new: &Config) -> Option<&'static str> {
        let same = [
            (self.mode == new.mode, "mode"),
            (self.host == new.host, "[host]"),
            (self.hold == new.hold, "hold"),
            (self.notrack == new.notrack, "notrack"),
            (self.proxy == new.proxy, "[proxy]"),
            (self.control.same_socket(&new.control), "[control]"),
        ];
        same.into_iter().find(|(same, _)| !same).map(|(_, key)| key)
    }
}
