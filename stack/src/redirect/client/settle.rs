//! C11: which connections a driver may hand to a fast path, such as the kernel's, and when it must take them back.
//!
//! A connection is *settled* with the first segment that follows its handshake (for a handover: that ends C10), and while
//! nothing under way needs the machine (§4, §5). Then the machine only exchanges ports, and has to see SYNs, segments with
//! the option and ICMP errors, nothing else: of its end the machine hears from its driver (C12).
//!
//! Not before: the ACK of a SYN-ACK should not race with the data that the local TCP sends behind it.

use std::net::SocketAddr;

use super::flow::{Flow, FlowKey, State};
use super::{Client, Mark};
use crate::wire::{Packet, TcpFlags};

/// The most a connection's return from the fast path doubles the segments that must pass before it may go there again:
/// whoever guesses its ports can make it come back.
const MOST_DOUBLINGS: u32 = 10;

/// The ports of a settled connection: segments from `local` to `vip` go to `service_port`, segments from there come from
/// `vip`. Where the server stayed on the port asked, the two ports are one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Swap {
    /// The local socket.
    pub local: SocketAddr,
    /// The shared address and redirect port, as the program sees its peer.
    pub vip: SocketAddr,
    /// The service port, as the network sees it.
    pub service_port: u16,
}

/// What a driver's fast path is told ([`Client::poll_swap`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SwapChange {
    /// The fast path may carry the connection's segments, but for SYNs and those with the option; best from when the
    /// packet has left that was handled last, so that as few as can be overtake it.
    Settled(Swap),
    /// It may not any more. To be obeyed before anything that the machine passes or sends from now on leaves the driver:
    /// the same ports may be another connection's next.
    Unsettled(Swap),
}

/// How far a connection is from being settled.
#[derive(Debug, Default)]
pub(super) struct Settling {
    /// Segments since it came back last.
    seen: u32,
    /// How often it came back.
    returns: u32,
    settled: bool,
    /// It closes, or has closed: not worth it any more.
    closing: bool,
}

impl Client {
    /// The next change to what a fast path may carry, in their order: to be asked after every input. There are some only
    /// with [`ClientConfig::resettle_after`](super::ClientConfig::resettle_after).
    pub fn poll_swap(&mut self) -> Option<SwapChange> {
        self.swaps.pop_front()
    }

    /// The fast path has no room for a connection that was called settled, and never had it: its segments go on passing
    /// here, and it settles again later.
    pub fn refuse_swap(&mut self, swap: &Swap) {
        let key = FlowKey { local: swap.local, vip: swap.vip };
        if let Some(flow) = self.flows.get_mut(&key) {
            flow.comes_back();
        }
    }

    /// The local TCP keeps the connection in TIME-WAIT only: it has nothing more for a fast path to carry, whose place
    /// others may need. The flow stays (`C12`). As for [`free`](Self::free), it has begun before `mark`.
    pub fn rest(&mut self, mark: Mark, local: SocketAddr, vip: SocketAddr) {
        let flow = self.flows.get_mut(&FlowKey { local, vip });
        if let Some(flow) = flow.filter(|flow| flow.born < mark) {
            flow.settling.closing = true;
            self.swaps.extend(flow.unsettle());
        }
    }

    /// A connection that needs no further segment to be settled, where there is a fast path.
    pub(super) fn settle(&mut self, flow: &mut Flow) {
        if self.config.resettle_after.is_some() {
            self.swaps.push_back(flow.settle());
        }
    }

    /// Whether a fast path has the connection.
    pub fn is_settled(&self, local: SocketAddr, vip: SocketAddr) -> bool {
        self.flows.get(&FlowKey { local, vip }).is_some_and(Flow::is_settled)
    }
}

impl Flow {
    pub(super) fn is_settled(&self) -> bool {
        self.settling.settled
    }

    /// Counts a segment of a connection beyond its handshake.
    pub(super) fn on_segment(&mut self, after: u32, packet: &Packet, local: bool) -> Option<SwapChange> {
        let settling = &mut self.settling;
        if settling.settled || settling.closing {
            return None;
        }
        let closes = packet.tcp().is_some_and(|tcp| tcp.flags().intersects(TcpFlags::FIN | TcpFlags::RST));
        settling.closing |= local && closes;
        settling.seen = settling.seen.saturating_add(1);
        let enough = match settling.returns.checked_sub(1) {
            None => true,
            Some(again) => settling.seen >= after.saturating_mul(1 << again),
        };
        (enough && !closes && self.only_swaps()).then(|| self.settle())
    }

    /// Whether nothing but the exchange of ports is left to do.
    fn only_swaps(&self) -> bool {
        let idle = self.live.as_ref().is_none_or(|live| {
            live.rebind.is_none()
                && live.wire_port.is_none()
                && live.own_ports.is_empty()
                && live.close.is_none()
        });
        idle && matches!(self.state, State::Redirected { .. } | State::Direct { .. })
    }

    fn settle(&mut self) -> SwapChange {
        self.settling.settled = true;
        SwapChange::Settled(self.swap())
    }

    /// Takes a settled connection back; its numbers are those of long ago.
    pub(super) fn unsettle(&mut self) -> Option<SwapChange> {
        if !self.comes_back() {
            return None;
        }
        if let Some(track) = self.live.as_mut().and_then(|live| live.track.as_mut()) {
            track.lose();
        }
        Some(SwapChange::Unsettled(self.swap()))
    }

    /// Whether it was settled, which it is no more.
    fn comes_back(&mut self) -> bool {
        let settled = std::mem::take(&mut self.settling.settled);
        if settled {
            self.settling.seen = 0;
            self.settling.returns = (self.settling.returns + 1).min(MOST_DOUBLINGS);
        }
        settled
    }

    fn swap(&self) -> Swap {
        Swap { local: self.key.local, vip: self.key.vip, service_port: self.present_port() }
    }
}
