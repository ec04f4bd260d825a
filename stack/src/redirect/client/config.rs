//! What the client's end is told, what it tells, and what it counts.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::wire::DEFAULT_EXID;

/// How a redirected connection goes on at the service port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Continuation {
    /// Reconnect until the path is known to translate nothing, then hand over.
    #[default]
    Auto,
    /// A new SYN to the service port: one round trip more, passes translators and firewalls.
    Reconnect,
    /// The ACK goes to the service port: no round trip more, needs an untranslated path.
    Handover,
    /// Never ask for redirection.
    Plain,
}

/// What is done when a server asks a connection to move to another port (§4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnRedirect {
    /// The driver is told ([`ClientEvent::MoveAsked`]) and moves the byte stream: only one that has it can.
    Follow,
    /// The driver is told ([`ClientEvent::Hint`]) for later connects; the connection stays and confirms nothing.
    #[default]
    Hint,
    /// Nothing; segments are not followed for it either.
    Ignore,
}

/// A shared address and how its connections continue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VipConfig {
    /// The address.
    pub address: IpAddr,
    /// The continuation.
    pub continuation: Continuation,
    /// What a mid-connection redirect does.
    pub on_redirect: OnRedirect,
}

/// Addresses that agree in their first `length` bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Prefix {
    /// One of the addresses.
    pub address: IpAddr,
    /// Bits that count.
    pub length: u8,
}

impl Prefix {
    /// Whether it holds an address.
    pub fn contains(&self, address: IpAddr) -> bool {
        let bits = |address: IpAddr| match address {
            IpAddr::V4(address) => u128::from(u32::from(address)) << 96,
            IpAddr::V6(address) => u128::from(address),
        };
        let differ = bits(self.address) ^ bits(address);
        self.address.is_ipv4() == address.is_ipv4()
            && differ.leading_zeros() >= u32::from(self.length).min(128)
    }
}

/// Configuration of a [`Client`](super::Client); PROTOCOL.md §12 lists the constants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientConfig {
    /// Experiment identifier of the option.
    pub exid: u16,
    /// The shared addresses; packets of other addresses pass untouched.
    pub vips: Vec<VipConfig>,
    /// Service ports that may be obeyed (`C3`).
    pub ports: RangeInclusive<u16>,
    /// Service ports that are refused although within `ports` (`C3`).
    pub denied_ports: Vec<u16>,
    /// Flows at the most; further connects go plain.
    pub max_flows: usize,
    /// The largest packet the option may make, bytes (`W3`).
    pub mtu: usize,
    /// Redirects followed in one connect at the most (`C3`).
    pub max_hops: u8,
    /// Least time before the SYN to the service port is repeated (`C5`).
    pub reconnect_timeout: Duration,
    /// How often it is repeated (`C5`).
    pub reconnect_repeats: u8,
    /// Least time before a handover is probed (`C10`).
    pub probe_timeout: Duration,
    /// Silence after which a handover has failed (`C10`).
    pub handover_timeout: Duration,
    /// How long a VIP found to be plain is not asked (`C2`, `C6`).
    pub plain_memory: Duration,
    /// How long a path found to translate is not handed over on.
    pub translated_memory: Duration,
    /// Addresses that a mid-connection redirect may lead to (§7); none by default, so that only ports are obeyed.
    pub accept_prefixes: Vec<Prefix>,
    /// How long a change of the own port waits for the server's confirmation (§5).
    pub rebind_timeout: Duration,
    /// For drivers with a fast path: connections settle when their handshake is over (`C11`), and again when they have
    /// come back and so many segments have passed since, both ways together, twice as many each time. `None` for other
    /// drivers.
    pub resettle_after: Option<u32>,
}

impl Default for ClientConfig {
    fn default() -> Self {
        ClientConfig {
            exid: DEFAULT_EXID,
            vips: Vec::new(),
            ports: 1024..=65_535,
            denied_ports: Vec::new(),
            max_flows: 65_536,
            mtu: 1500,
            max_hops: 3,
            reconnect_timeout: Duration::from_millis(250),
            reconnect_repeats: 2,
            probe_timeout: Duration::from_millis(50),
            handover_timeout: Duration::from_secs(20),
            plain_memory: Duration::from_secs(600),
            translated_memory: Duration::from_secs(600),
            accept_prefixes: Vec::new(),
            rebind_timeout: Duration::from_secs(10),
            resettle_after: None,
        }
    }
}

/// Why a connection goes on without redirection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PlainReason {
    /// The SYN-ACK carried no confirmation: no server of ours, or a middlebox strips options (`C2`).
    Unconfirmed,
    /// The SYN-ACK carried our own option back (PROTOCOL.md §2).
    Echoed,
    /// The redirect was not to be obeyed (`C3`).
    Refused,
    /// Nothing answered SYNs with the option (`C6`).
    Silence,
    /// The service port refused, was unreachable or silent (`C6`).
    ServicePort,
}

/// What happened to a connection, for logs and applications.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientEvent {
    /// The connection goes on at a service port.
    Redirected {
        /// The local socket.
        local: SocketAddr,
        /// The shared address and redirect port, as the program sees its peer.
        vip: SocketAddr,
        /// The service port.
        service_port: u16,
        /// Whether by handover.
        handover: bool,
    },
    /// The server confirmed the port asked.
    Confirmed {
        /// The local socket.
        local: SocketAddr,
        /// The shared address and port.
        vip: SocketAddr,
    },
    /// The connection goes on without redirection.
    Plain {
        /// The local socket.
        local: SocketAddr,
        /// The shared address and port.
        vip: SocketAddr,
        /// Why.
        reason: PlainReason,
    },
    /// A handover did not complete; the program got a reset (`C10`).
    HandoverFailed {
        /// The local socket.
        local: SocketAddr,
        /// The shared address and redirect port.
        vip: SocketAddr,
        /// The service port.
        service_port: u16,
    },
    /// The server asks for the connection to move, and it may be obeyed (§4): open the new one with
    /// [`Client::expect_move`](super::Client::expect_move), then close the old one after
    /// [`Client::close_moved`](super::Client::close_moved); or say
    /// [`Client::move_failed`](super::Client::move_failed).
    MoveAsked {
        /// The local socket.
        local: SocketAddr,
        /// The shared address and the port first asked.
        vip: SocketAddr,
        /// The port it is on, Y.
        from: u16,
        /// Where to, Z: at the same address but for §7.
        to: SocketAddr,
    },
    /// The server would rather have the connection elsewhere; it stays, later connects may go there.
    Hint {
        /// The local socket.
        local: SocketAddr,
        /// The shared address and the port first asked.
        vip: SocketAddr,
        /// The port it is on, Y.
        from: u16,
        /// Where to.
        to: SocketAddr,
    },
    /// The server has confirmed another own port of the connection (§5).
    Rebound {
        /// The local socket, as the local TCP knows it.
        local: SocketAddr,
        /// The shared address and the port first asked.
        vip: SocketAddr,
        /// The own port on the wire from now on.
        port: u16,
    },
    /// It did not in time; the connection stays on the own port it had.
    RebindFailed {
        /// The local socket, as the local TCP knows it.
        local: SocketAddr,
        /// The shared address and the port first asked.
        vip: SocketAddr,
        /// The own port asked for.
        port: u16,
    },
}

/// Why the own port of a connection cannot be changed (§5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum RebindError {
    /// The connection is not on a service port, or unknown.
    #[error("the connection is not on a service port")]
    NotRedirected,
    /// The path translates, or is not known not to.
    #[error("the path is not known to be untranslated")]
    Translated,
    /// A change is under way, or there were too many.
    #[error("the connection changes its own port already, or has done so too often")]
    Busy,
    /// The port is 0, the present one, or taken.
    #[error("own port {0} cannot be used")]
    Port(u16),
}

/// A redirected connection, as kept over a restart (`C12`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FlowRecord {
    /// The local socket.
    pub local: SocketAddr,
    /// The shared address and redirect port.
    pub vip: SocketAddr,
    /// The service port.
    pub service_port: u16,
    /// The server's initial sequence number.
    pub irs: u32,
}

/// What a [`Client`](super::Client) has counted since it was made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ClientCounters {
    /// SYNs sent with R.
    pub asked: u64,
    /// Connections redirected by a new SYN.
    pub reconnected: u64,
    /// Handovers begun.
    pub handed_over: u64,
    /// Handovers confirmed by the service port.
    pub handovers_completed: u64,
    /// Handovers that ended in a reset.
    pub handovers_failed: u64,
    /// Probe SYNs of handovers.
    pub probes: u64,
    /// Connections that the server kept at the port asked.
    pub confirmed: u64,
    /// Connections that fell back to plain, by [`PlainReason::Unconfirmed`].
    pub plain_unconfirmed: u64,
    /// By [`PlainReason::Echoed`].
    pub plain_echoed: u64,
    /// By [`PlainReason::Refused`].
    pub plain_refused: u64,
    /// By [`PlainReason::Silence`].
    pub plain_silence: u64,
    /// By [`PlainReason::ServicePort`].
    pub plain_service_port: u64,
    /// SYNs passed without R because of their options or data (`C1`), or because the option did not fit (`W2`).
    pub ineligible: u64,
    /// SYNs passed without R because the VIP is remembered as plain.
    pub remembered_plain: u64,
    /// SYNs passed without R because the flow table was full.
    pub table_full: u64,
    /// SYNs refused because their ports are those of a redirected connection (`C8`).
    pub port_collisions: u64,
    /// Options ignored as malformed (`W1`).
    pub malformed_options: u64,
    /// SYN-ACKs dropped: late, of another attempt, or of a server that was not first (`C4`).
    pub stray_syn_acks: u64,
    /// Segments of handshakes dropped because of a wrong checksum.
    pub bad_checksums: u64,
    /// Resets dropped by `C9` and `C10`.
    pub dropped_resets: u64,
    /// Other segments dropped because no state of theirs expects them.
    pub unexpected: u64,
    /// Events dropped because nobody fetched them.
    pub events_dropped: u64,
    /// Mid-connection redirects handed to the driver, to follow or as hints (§4).
    pub moves_asked: u64,
    /// Mid-connection redirects not obeyed: their sequence numbers, acknowledgement or timestamps are not exact, or
    /// nothing is known of the connection's.
    pub moves_inexact: u64,
    /// Mid-connection redirects not obeyed because of where they lead.
    pub moves_refused: u64,
    /// SYNs that opened the next part of a connection that moves.
    pub moves_opened: u64,
    /// Such opens that ended without a confirmation: refused to the local TCP.
    pub moves_failed: u64,
    /// FINs and RSTs with C P=Z.
    pub moves_closed: u64,
    /// Changes of the own port confirmed (§5).
    pub rebinds: u64,
    /// Changes of the own port not confirmed in time.
    pub rebinds_failed: u64,
    /// Confirmations of a change that are not exact, or of none.
    pub rebinds_refused: u64,
}
