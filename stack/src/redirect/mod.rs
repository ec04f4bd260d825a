//! The two ends of port redirection as sans-IO machines: [`Client`] and [`Server`] (PROTOCOL.md §3 to §5).
//!
//! Both stand between a TCP that knows nothing of redirection (*local*) and the network. The driver hands every packet
//! of either direction in, sends on what it is told to, then drains `poll_transmit` and waits until `poll_timeout`.
//! No socket, clock or random source inside.

mod announce;
mod client;
mod guard;
mod numbers;
pub(crate) mod reply;
mod server;
mod token;
mod words;

pub use client::{
    Client, ClientConfig, ClientCounters, ClientEvent, Continuation, FlowRecord, Mark, OnRedirect, PathId,
    PathState, PlainReason, Prefix, RebindError, Swap, SwapChange, VipConfig,
};
pub use guard::{Gauge, LOAD_CALM, Require, TokenPolicy, TokenRefusal};
pub(crate) use numbers::window_scale;
pub use numbers::{ConnectionNumbers, NumbersOf, Timestamps};
pub use reply::{Limiter, can_answer};
pub use server::{
    Answerer, DeclineReason, RedirectError, RedirectOutcome, Server, ServerConfig, ServerCounters,
    ServerEvent, ServicePorts, Silence, can_redirect,
};

pub use token::{KeysError, MAX_KEYS, Purpose, SLOT_SECONDS, TokenError, TokenKeys};

use crate::wire::Packet;

/// What the driver does with the packet it handed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[must_use]
pub enum Action {
    /// Send it on in its direction; it may have been rewritten.
    Pass,
    /// It goes no further: answered, kept or refused; a counter says which.
    Drop,
}

/// Which way a packet of a machine's own goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Towards {
    /// To the local TCP.
    Local,
    /// To the network.
    Network,
}

/// A packet that a machine sends of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transmit {
    /// Its direction.
    pub towards: Towards,
    /// The packet.
    pub packet: Packet,
}
