//! What Shunt's daemons change on a Linux host, and how it is undone.
//!
//! - [`config`] reads the daemons' TOML and points at mistakes; [`options`] holds what all three roles share.
//! - [`change`] describes changes as values: sysctls, reserved ports, policy rules, routes, addresses, links and
//!   ([`divert`]) packet marks and ([`offload`]) what the kernel forwards by itself. A [`Host`] applies them through netlink and `/proc/sys` and undoes them in reverse
//!   order, also those that a killed predecessor left behind.
//! - [`query`] asks the kernel: next hops, addresses, MTU, TCP sockets.
//! - [`doctor`] looks for what stands in the way on a host.
//! - [`sandbox`] takes from a running daemon what it no longer needs.
//! - [`control`] is how a running daemon is asked and told: JSON lines over a Unix socket.
//!
//! ```no_run
//! # async fn example() -> Result<(), shunt_host::HostError> {
//! use shunt_host::change::{Link, Route, Rule, Sysctl};
//! use shunt_host::{Change, Family, Host, HostOptions, Prefix, Role, query};
//!
//! let options = HostOptions::defaults(Role::Client);
//! let vip = "203.0.113.10".parse().expect("an address");
//! // First sweeps what a killed predecessor left, so that the kernel's answers are not about our own rules.
//! let mut host = Host::open("client", &options).await?;
//! let hop = query::next_hop(vip).await?;
//! let (table, preference, tun) = (options.table, options.preference, options.device.as_str());
//! host.apply([
//!     Change::from(Link::tun(tun, 1500)),
//!     Sysctl::new("net/ipv4/ip_forward", 1).into(),
//!     Route::device(table, vip, &hop.interface).via(hop.gateway).source(hop.source).into(),
//!     Route::device(table + 1, Prefix::all(Family::V4), tun).into(),
//!     Rule::new(Family::V4, preference, table).interface(tun).to(vip).into(),
//!     Rule::new(Family::V4, preference + 2, table + 1).interface(&hop.interface).from(vip).tcp().into(),
//!     Change::LocalLast,
//! ])
//! .await?;
//! // ... until told to stop ...
//! host.close().await
//! # }
//! ```
//!
//! Everything acts on the network namespace of the calling thread. Nothing here decides what a role needs, and no
//! program (`ip`, `nft`, `sysctl`) is run, but `nft` by [`doctor`] to read other people's rules.

pub mod change;
pub mod config;
pub mod control;
pub mod divert;
pub mod doctor;
mod error;
mod host;
mod kernel;
mod ledger;
pub mod links;
mod maps;
mod namespace;
mod nft;
pub mod offload;
pub mod options;
pub mod prefix;
pub mod query;
pub mod sandbox;
pub mod shortcuts;
pub mod swaps;
mod sysctl;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
pub mod token;

pub use change::Change;
pub use config::{ConfigError, Role, Source, expect_role, load, role_of};
pub use divert::{Divert, FlagMatch, PacketKind, PacketMatch, QuotedMatch, SegmentMatch, TcpConnection};
pub use error::HostError;
pub use host::{DEFAULT_STATE_DIR, Host};
pub use namespace::namespace_id;
pub use nft::nft_available;
pub use offload::Offload;
pub use options::{HostOptions, HostSettings};
pub use prefix::{Family, PortRange, Prefix, Transport};
pub use shortcuts::Shortcuts;
pub use swaps::{PortSwap, PortSwaps, SwapTable};
pub use token::{TokenOptions, TokenSettings};
