//! What the server's machine is told, what it counts and what it reports.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde::Serialize;

use crate::redirect::guard::TokenPolicy;
use crate::time::WallClock;
use crate::wire::DEFAULT_EXID;

/// One redirect port and the service port of ours that it stands for (PROTOCOL.md §1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ServicePorts {
    /// What clients' packets are addressed to when they reach this host: the VIP, or the server's own address behind a
    /// balancer that rewrites it.
    pub address: IpAddr,
    /// X: shared by a set of servers.
    pub redirect_port: u16,
    /// Y: owned by this server alone. Equal to X where the server is reached under that number only; nothing is
    /// redirected then, only confirmed (`S1`).
    pub service_port: u16,
}

impl ServicePorts {
    /// `address:X`.
    pub fn redirect_socket(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.redirect_port)
    }

    /// `address:Y`.
    pub fn service_socket(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.service_port)
    }
}

/// What a [`Server`](super::Server) is told at its start.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// The experiment identifier of the deployment (RFC 6994).
    pub exid: u16,
    /// The ports. A port that appears twice at one address means its first entry.
    pub services: Vec<ServicePorts>,
    /// The secret behind the sequence numbers of stateless answers (`S2`). Choose it at random: who knows it can
    /// predict them.
    pub isn_key: [u8; 16],
    /// Half-open connections remembered, at most (`S5`); the oldest makes room.
    pub half_open_limit: usize,
    /// How long one is remembered after its latest SYN (`S5`). Linux repeats a SYN-ACK for 63 s.
    pub half_open_lifetime: Duration,
    /// The largest packet, in bytes, towards clients (`W3`, and the MSS of stateless answers).
    pub mtu: usize,
    /// Redirects of one connect after which no further one is answered; such a SYN stays plain (`C3`).
    pub max_hops: u8,
    /// Challenge ACKs (`S7`), and RSTs to segments without a connection (`S8`), at most in a second, each.
    pub replies_per_second: u32,
    /// How long a client is asked to move (§4).
    pub redirect_timeout: Duration,
    /// What follows if it has not closed by then (O8).
    pub on_silence: Silence,
    /// Connections that may be redirected, and client ports that may have changed (§5), at a time, each.
    pub redirect_limit: usize,
    /// Tokens: made where there are keys, demanded as it says (§10).
    pub tokens: TokenPolicy,
    /// The VIP of each service socket (`address:Y`) whose address is not the one that clients know; tokens are bound to
    /// what clients know.
    pub shared: BTreeMap<SocketAddr, IpAddr>,
    /// The time that tokens go by; see [`Server::set_clock`](super::Server::set_clock).
    pub clock: WallClock,
}

/// What becomes of a connection whose client was asked to move and never closes (O8).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Silence {
    /// It is served on.
    #[default]
    GiveUp,
    /// It is reset so long after it was first asked, and not before `redirect_timeout`.
    ResetAfter(Duration),
}

/// What became of a mid-connection redirect (§4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RedirectOutcome {
    /// The client has closed with C P=Z: it goes on there.
    Confirmed,
    /// The connection was closed or reset without.
    Closed,
    /// The client did nothing; it is served on.
    GivenUp,
    /// The client did nothing, and both ends were reset.
    Reset,
}

/// Why a connection cannot be redirected (§4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum RedirectError {
    /// It is not on a service port of ours: nobody could tell whose it is.
    #[error("{0} is no service port of this server")]
    NoServicePort(SocketAddr),
    /// It is there already, or that is no place to go to.
    #[error("{0} is no port to redirect to")]
    Target(SocketAddr),
    /// It is being redirected.
    #[error("the connection is being redirected already")]
    UnderWay,
    /// As many as may be are being redirected.
    #[error("{0} connections are being redirected, as many as may be")]
    TooMany(usize),
}

impl ServerConfig {
    /// Redirects of one connect after which no further one is answered (`C3`), unless configured.
    pub const DEFAULT_MAX_HOPS: u8 = 3;
}

impl Default for ServerConfig {
    fn default() -> Self {
        ServerConfig {
            exid: DEFAULT_EXID,
            services: Vec::new(),
            isn_key: [0; 16],
            half_open_limit: 65_536,
            half_open_lifetime: Duration::from_secs(64),
            mtu: 1500,
            max_hops: ServerConfig::DEFAULT_MAX_HOPS,
            replies_per_second: 100,
            redirect_timeout: Duration::from_secs(30),
            on_silence: Silence::GiveUp,
            redirect_limit: 65_536,
            tokens: TokenPolicy::default(),
            shared: BTreeMap::new(),
            clock: WallClock::default(),
        }
    }
}

/// What a [`Server`](super::Server) has done since its start, in packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct ServerCounters {
    /// SYNs answered from the SYN alone with a redirect to our own port (`S2`).
    pub answered: u64,
    /// SYNs answered from the SYN alone with a redirect to another server's port (`S2`).
    pub answered_elsewhere: u64,
    /// SYNs turned from X to Y (`S1`).
    pub syns_turned: u64,
    /// SYNs with R that came to Y itself: reconnecting, probing, opening there (`S1`).
    pub syns_to_service: u64,
    /// SYN-ACKs from Y sent from X with C P=Y O (`S1`).
    pub syn_acks_moved: u64,
    /// SYN-ACKs from Y that got C (`S1`).
    pub syn_acks_confirmed: u64,
    /// SYN-ACKs from Y without an entry in the table: passed unmarked (`S5`).
    pub syn_acks_unknown: u64,
    /// SYN-ACKs without room for the option (`W2`, `W3`).
    pub syn_acks_no_room: u64,
    /// SYNs without R to a port of ours: plain clients.
    pub plain_syns: u64,
    /// SYNs with R passed as plain ones because nobody listens on Y (`S6`).
    pub not_listening: u64,
    /// SYNs with R passed as plain ones because of their hops.
    pub too_many_hops: u64,
    /// SYNs with R passed unchanged because a SYN like this must not be touched: MD5, AO, MPTCP (`C1`), a fragment, a
    /// wrong checksum, a source that cannot be a client.
    pub unfit_syns: u64,
    /// Malformed redirect options, ignored (`W1`).
    pub bad_options: u64,
    /// Entries that left the half-open table because it was full (`S5`).
    pub half_open_evicted: u64,
    /// Entries that left the half-open table because of their age (`S5`).
    pub half_open_expired: u64,
    /// ICMP errors whose quoted source was turned from X to Y (`I2`).
    pub icmp_turned: u64,
    /// Challenge ACKs made (`S7`).
    pub challenge_acks: u64,
    /// RSTs made for segments without a connection (`S8`).
    pub resets: u64,
    /// Challenge ACKs and RSTs not made because of their rate.
    pub replies_limited: u64,
    /// SYNs to service ports dropped because a token was demanded and they had none (§10).
    pub tokens_missing: u64,
    /// The same, with a token under a key that is not known.
    pub tokens_unknown_key: u64,
    /// The same, with one that is too old or of the future.
    pub tokens_expired: u64,
    /// The same, with one for something else, or a forged one.
    pub tokens_mismatch: u64,
    /// Everything else: passed unchanged.
    pub passed: u64,
    /// Packets and events given up because the driver did not take them.
    pub overflowed: u64,
    /// Mid-connection redirects begun (§4).
    pub redirects: u64,
    /// Segments that said R P=Z, duplicate ACKs among them.
    pub redirects_said: u64,
    /// By [`RedirectOutcome::Confirmed`].
    pub redirects_confirmed: u64,
    /// By [`RedirectOutcome::Closed`].
    pub redirects_closed: u64,
    /// By [`RedirectOutcome::GivenUp`].
    pub redirects_given_up: u64,
    /// By [`RedirectOutcome::Reset`].
    pub redirects_reset: u64,
    /// Changes of a client's port taken (§5).
    pub rebinds: u64,
    /// Not taken, because the port cannot be used or there were too many.
    pub rebinds_refused: u64,
    /// Not taken, because sequence number, acknowledgement or timestamps are not exact, or unknown.
    pub rebinds_inexact: u64,
}

/// What a [`Server`](super::Server) reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerEvent {
    /// A SYN(R C) was answered from the SYN alone: the client is to come again to `port` (`S2`).
    Answered {
        /// The client as seen here.
        client: SocketAddr,
        /// What it asked for.
        asked: SocketAddr,
        /// Where it was sent.
        port: u16,
    },
    /// A SYN-ACK from Y left from X: the client is to go on at `port` (`S1`).
    HandedOver {
        /// The client as seen here.
        client: SocketAddr,
        /// What it asked for.
        asked: SocketAddr,
        /// Where it was sent.
        port: u16,
    },
    /// A connection to a service port was confirmed (`S1`).
    Confirmed {
        /// The client as seen here.
        client: SocketAddr,
        /// The service port's socket.
        service: SocketAddr,
        /// The port that the connection moves from, where it opens the next part of one (§4).
        moved_from: Option<u16>,
    },
    /// A mid-connection redirect has ended (§4).
    Redirection {
        /// The client as the local TCP knows it.
        client: SocketAddr,
        /// The service port's socket, Y.
        service: SocketAddr,
        /// Where it was to go, Z.
        to: u16,
        /// What became of it.
        outcome: RedirectOutcome,
    },
    /// A client goes on from another port (§5).
    Rebound {
        /// The client as the local TCP knows it.
        client: SocketAddr,
        /// The service port's socket.
        service: SocketAddr,
        /// Its port on the wire.
        port: u16,
    },
    /// Tokens are demanded from now on because of load, or no longer (§10).
    Load {
        /// Which of the two.
        demanded: bool,
    },
    /// A SYN with R was left to plain TCP.
    Declined {
        /// The client as seen here.
        client: SocketAddr,
        /// What it asked for.
        asked: SocketAddr,
        /// Why.
        reason: DeclineReason,
    },
}

/// Why a SYN with R was left to plain TCP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeclineReason {
    /// Nobody listens on Y (`S6`).
    NotListening,
    /// The client has been redirected too often in this connect (`C3`).
    TooManyHops,
    /// The option did not fit into the SYN-ACK (`W2`).
    NoRoom,
}
