//! One connection to a VIP and where it stands.

use std::net::SocketAddr;
use std::time::Duration;

use super::config::PlainReason;
use super::path::PathKey;
use super::settle::Settling;
use crate::redirect::announce::Announcement;
use crate::redirect::numbers::Track;
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

/// A point in the order in which flows begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark(u64);

impl Mark {
    pub(super) const FIRST: Mark = Mark(0);
    pub(super) const LAST: Mark = Mark(u64::MAX);

    /// This point, and the next one from now on.
    pub(super) fn take(&mut self) -> Mark {
        let taken = *self;
        self.0 += 1;
        taken
    }
}

#[derive(Debug)]
pub(super) struct Flow {
    pub(super) key: FlowKey,
    pub(super) born: Mark,
    pub(super) state: State,
    pub(super) timer: Option<Instant>,
    /// The service port under which the network knows this flow.
    pub(super) service: Option<u16>,
    /// What a confirmed connection may still be asked (§4, §5).
    pub(super) live: Option<Box<Live>>,
    pub(super) settling: Settling,
}

impl Flow {
    pub(super) fn new(key: FlowKey, born: Mark, state: State) -> Flow {
        Flow { key, born, state, timer: None, service: None, live: None, settling: Settling::default() }
    }
}

/// Where a connection comes from that opens the next part of one that moves (§4).
#[derive(Debug, Clone, Copy)]
pub(super) struct Coming {
    /// The port it was on, Y.
    pub(super) from: u16,
    /// The port that the program asked for when the stream began.
    pub(super) origin: u16,
    /// The token that the old server gave for where it goes (`T3`).
    pub(super) token: Option<[u8; 8]>,
}

/// A confirmed connection beyond its handshake.
#[derive(Debug)]
pub(super) struct Live {
    /// Where its TCP stands; `None` where redirects are ignored.
    pub(super) track: Option<Track>,
    /// The port that the program asked for when the stream began: it may always be gone back to.
    pub(super) origin: u16,
    /// A redirect that the driver was told of: it is obeyed once (§4).
    pub(super) asked: Option<SocketAddr>,
    /// The token given with it (`T3`).
    pub(super) token: Option<[u8; 8]>,
    /// That move has failed: another target may be asked for.
    pub(super) failed: bool,
    /// FIN and RST carry C P=Z.
    pub(super) close: Option<u16>,
    /// Own ports on which segments of the server are taken, besides the local TCP's.
    pub(super) own_ports: Vec<u16>,
    /// The own port that the server has confirmed.
    pub(super) wire_port: Option<u16>,
    pub(super) rebind: Option<Rebind>,
}

/// A change of the own port under way (§5).
#[derive(Debug)]
pub(super) struct Rebind {
    pub(super) port: u16,
    pub(super) announcement: Announcement,
    pub(super) give_up: Instant,
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
    /// The port that the connection comes from, where it moves (§4): it is confirmed or refused, never plain.
    pub(super) moved_from: Option<u16>,
    /// The port that the program asked for when the stream began.
    pub(super) origin: u16,
    /// The token given for the port that SYNs go to now; none is ever made up (`T3`).
    pub(super) token: Option<[u8; 8]>,
    pub(super) phase: Phase,
}

impl Attempt {
    /// A connect that begins with `syn`; `None` if it is no segment.
    pub(super) fn new(now: Instant, syn: Packet, path: PathKey) -> Option<Attempt> {
        let tcp = syn.tcp()?;
        let origin = tcp.destination_port();
        let (iss, tsval) = (tcp.seq(), tcp.timestamps().map(|(value, _)| value));
        Some(Attempt {
            iss,
            syn,
            started: now,
            sent: now,
            repeats: 0,
            tsvals: tsval.into_iter().collect(),
            handover: false,
            forced: false,
            visited: Vec::new(),
            path,
            moved_from: None,
            origin,
            token: None,
            phase: Phase::Asking,
        })
    }

    /// Redirects followed in this connect.
    pub(super) fn hops(&self) -> u8 {
        // The port that a move comes from is visited, too, but no hop of this connect.
        let followed = self.visited.len() - usize::from(self.moved_from.is_some()).min(self.visited.len());
        u8::try_from(followed).unwrap_or(u8::MAX).min(7)
    }
}

/// SYNs of one attempt whose timestamps are remembered; Linux sends 7.
pub(super) const MAX_TSVALS: usize = 16;

#[derive(Debug)]
pub(super) enum Phase {
    /// SYN with R sent to X.
    Asking,
    /// SYN sent to the service port (`C5`).
    Reconnecting { service_port: u16, interval: Duration, repeats: u8, direct: Option<bool> },
    /// SYN without the option sent to X at `since` (`C2`, `C6`), and repeated since; `rejected` is the ISN of the SYN-ACK
    /// that was refused.
    Plain { reason: PlainReason, since: Instant, repeats: u8, rejected: Option<SeqNumber> },
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
    /// Where the local TCP stands.
    pub(super) track: Option<Track>,
    pub(super) interval: Duration,
    /// When the silence that ends in a reset is over.
    pub(super) give_up: Instant,
    pub(super) last_probe: Option<Instant>,
    /// The service port answered a probe with a SYN-ACK although data had followed the handover ACK: both were lost.
    pub(super) ack_lost: bool,
    /// It did so before anything followed the handover ACK: lost, or the server waits for data.
    pub(super) half_open: bool,
}
