//! What an endpoint is told, and what it counts.

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use serde::Serialize;

use super::control::{CloseBy, MoveAt};
use crate::redirect::{ClientConfig, ServerConfig};

/// Bounds of the TCP under an endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcpOptions {
    /// Bytes of a connection's receive buffer: the largest window it offers. Above 65,535 windows are scaled.
    pub receive_buffer: usize,
    /// Bytes of a connection's send buffer: what a program can write ahead of the peer's acknowledgements.
    pub send_buffer: usize,
    /// Connections at the most, those in TIME-WAIT included. Each may use both buffers' bytes of memory; what it has not
    /// used yet of them is only reserved.
    pub max_connections: usize,
    /// How long a peer may leave data, a FIN or a probe unanswered before the connection is given up (RFC 9293 §3.8.3,
    /// RFC 5482).
    pub user_timeout: Duration,
    /// How long a connection that its program has dropped waits for the peer's FIN.
    pub fin_timeout: Duration,
    /// How often an idle connection is probed; `None`: never.
    pub keep_alive: Option<Duration>,
    /// Sends small segments at once instead of waiting for acknowledgements (no Nagle algorithm).
    pub nodelay: bool,
}

impl Default for TcpOptions {
    fn default() -> Self {
        TcpOptions {
            receive_buffer: 512 << 10,
            send_buffer: 512 << 10,
            max_connections: 16_384,
            user_timeout: Duration::from_secs(100),
            fin_timeout: Duration::from_secs(60),
            keep_alive: None,
            nodelay: true,
        }
    }
}

/// What a connecting endpoint is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientOptions {
    /// The machine's configuration; its `mtu` is taken from the device.
    pub redirect: ClientConfig,
    /// Own addresses, the first with a free port is used. What the network sends to them must reach the device, and
    /// no other TCP may use `ports` on them.
    pub addresses: Vec<IpAddr>,
    /// Own ports. Each is used once a VIP at a time, so that (port, X) and (port, Y) cannot collide (`C8`).
    pub ports: RangeInclusive<u16>,
    /// How long a connect may take.
    pub connect_timeout: Duration,
    /// Where a byte stream may be cut when its server asks for another (PROTOCOL.md §4); only of VIPs whose
    /// [`OnRedirect`](crate::redirect::OnRedirect) is `Follow`.
    pub move_at: MoveAt,
    /// How the part at the old server is closed.
    pub close_by: CloseBy,
    /// How long the new server may take to confirm before the stream stays where it is.
    pub move_timeout: Duration,
    /// How long a server's wish waits for a place to cut.
    pub move_patience: Duration,
    /// Bounds of the TCP.
    pub tcp: TcpOptions,
}

impl Default for ClientOptions {
    fn default() -> Self {
        ClientOptions {
            redirect: ClientConfig::default(),
            addresses: Vec::new(),
            ports: 32_768..=60_999,
            connect_timeout: Duration::from_secs(30),
            move_at: MoveAt::default(),
            close_by: CloseBy::default(),
            move_timeout: Duration::from_secs(5),
            move_patience: Duration::from_secs(30),
            tcp: TcpOptions::default(),
        }
    }
}

/// What a listening endpoint is told.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// The machine's configuration; its `mtu` is taken from the device, and an `isn_key` of zeros is replaced by a
    /// random one.
    pub redirect: ServerConfig,
    /// Established connections of a listener that wait to be accepted, at most; while they do, further handshakes stay
    /// open and new SYNs are dropped.
    pub backlog: usize,
    /// Half-open connections at the most, of all listeners together; the oldest makes room.
    pub half_open_limit: usize,
    /// How long a half-open connection waits for its handshake to end.
    pub half_open_lifetime: Duration,
    /// Bounds of the TCP.
    pub tcp: TcpOptions,
}

impl Default for ServerOptions {
    fn default() -> Self {
        ServerOptions {
            redirect: ServerConfig::default(),
            backlog: 128,
            half_open_limit: 1024,
            half_open_lifetime: Duration::from_secs(64),
            tcp: TcpOptions::default(),
        }
    }
}

/// What an endpoint has counted since its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct EndpointCounters {
    /// Connections opened by `connect`.
    pub connects: u64,
    /// Connections that completed their handshake, either way.
    pub established: u64,
    /// Packets that are no TCP segment or ICMP error about one, or are fragments: dropped.
    pub other_packets: u64,
    /// Packets that could not be read: dropped.
    pub malformed: u64,
    /// Packets with a wrong transport checksum: dropped.
    pub bad_checksums: u64,
    /// Segments that belong to no connection.
    pub strays: u64,
    /// RSTs sent in answer to strays (`S8`).
    pub resets: u64,
    /// SYN-ACKs repeated and challenge ACKs sent in answer to a SYN on a known connection (`S7`).
    pub syns_answered: u64,
    /// SYNs dropped because a listener's backlog or the table of connections was full.
    pub syns_dropped: u64,
    /// Segments of handshakes dropped because the listener's backlog was full: the handshake stays open.
    pub handshakes_delayed: u64,
    /// Half-open connections that made room for others, or became too old.
    pub half_open_dropped: u64,
    /// Connections given up after `user_timeout` or `fin_timeout`.
    pub timed_out: u64,
    /// How often the TCP of a connection was looked at: for what happens to it, however many others are open.
    pub polls: u64,
    /// Path MTUs lowered by ICMP (RFC 1191, RFC 8201).
    pub mtu_lowered: u64,
    /// Packets that the device did not take.
    pub unsent: u64,
    /// Streams that went on at another server (PROTOCOL.md §4).
    pub moves: u64,
    /// Moves that were given up: the stream stayed.
    pub moves_failed: u64,
}
