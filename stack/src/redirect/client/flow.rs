//! One connection to a VIP and where it stands.

use std::net::SocketAddr;
use std::time::Duration;

use super::config::PlainReason;
use super::path::PathKey;
use crate::time::Instant;
use crate::wire::{Packet, SeqNumber};

/// A connection as the program knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct FlowKey {
    pub(super) local: SocketAddr,
    /// The VIP and the port asked, X.
    pub(super) vip: SocketAddr,
}

impl FlowKey {
    pub(super) fn service(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.vip.ip(), port)
    }
}

#[derive(Debug)]
pub(super) struct Flow {
    pub(super) key: FlowKey,
    pub(super) state: State,
    pub(super) timer: Option<Instant>,
    /// The service port under which the network knows this flow.
    pub(super) service: Option<u16>,
}

#[derive(Debug)]
pub(super) enum State {
    /// The handshake is not over, as far as redirection goes.
    Attempt(Box<Attempt>),
    /// On a service port: ports are swapped, nothing else (`C7`).
    Redirected { service_port: u16, irs: SeqNumber },
    /// On the port asked, confirmed or plain: passes unchanged.
    Direct { irs: SeqNumber },
    /// To be removed.
    Gone,
}

/// A connect under way.
#[derive(Debug)]
pub(super) struct Attempt {
    pub(super) iss: SeqNumber,
    /// The latest SYN of the local TCP, to X and without the option.
    pub(super) syn: Packet,
    /// When the first SYN was sent.
    pub(super) started: Instant,
    /// When the latest SYN was sent to X.
    pub(super) sent: Instant,
    /// Repeats of the SYN by the local TCP.
    pub(super) repeats: u8,
    /// `TSval` of each SYN of this attempt (`C3`); bounded by [`MAX_TSVALS`].
    pub(super) tsvals: Vec<u32>,
    /// Whether the SYN asked for handover (R) or reconnect (R C).
    pub(super) handover: bool,
    /// Whether handover was forced: the observed digest decides nothing then.
    pub(super) forced: bool,
    /// Service ports visited in this connect (`C3`).
    pub(super) visited: Vec<u16>,
    pub(super) path: PathKey,
    pub(super) phase: Phase,
}

/// SYNs of one attempt whose timestamps are remembered; Linux sends 7.
pub(super) const MAX_TSVALS: usize = 16;

#[derive(Debug)]
pub(super) enum Phase {
    /// SYN with R sent to X.
    Asking,
    /// SYN sent to the service port (`C5`).
    Reconnecting { service_port: u16, interval: Duration, repeats: u8, direct: Option<bool> },
    /// SYN without the option sent to X at `since` (`C2`, `C6`); `rejected` is the ISN of the SYN-ACK that was refused.
    Plain { reason: PlainReason, since: Instant, rejected: Option<SeqNumber> },
    /// SYN-ACK passed up; waiting for a sign of the service port (`C10`).
    HandingOver(Handover),
}

/// An unfinished handover (`C10`).
#[derive(Debug)]
pub(super) struct Handover {
    pub(super) service_port: u16,
    pub(super) irs: SeqNumber,
    /// The handover ACK as sent to Y, option included.
    pub(super) kept: Option<Packet>,
    pub(super) snd_nxt: SeqNumber,
    pub(super) interval: Duration,
    /// When the silence that ends in a reset is over.
    pub(super) give_up: Instant,
    pub(super) last_probe: Option<Instant>,
    /// The service port answered a probe with a SYN-ACK although data had followed the handover ACK: both were lost.
    pub(super) ack_lost: bool,
    /// It did so before anything followed the handover ACK: lost, or the server waits for data.
    pub(super) half_open: bool,
}
