//! Listening sockets, half-open connections, and established ones that wait to be accepted.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::connection::ConnectionId;

#[derive(Debug)]
pub(super) struct Listeners {
    backlog: usize,
    half_open_limit: usize,
    listeners: HashMap<SocketAddr, Listener>,
    half_open: HashSet<ConnectionId>,
    /// Half-open connections by age; some are no longer.
    order: VecDeque<ConnectionId>,
    /// Listeners with a new connection.
    acceptable: Vec<SocketAddr>,
}

#[derive(Debug, Default)]
struct Listener {
    /// To be accepted.
    queue: VecDeque<ConnectionId>,
    /// Half-open ones whose handshake was held back for want of room; some are gone.
    held: VecDeque<ConnectionId>,
}

impl Listeners {
    pub(super) fn new(backlog: usize, half_open_limit: usize) -> Self {
        Listeners {
            backlog: backlog.max(1),
            half_open_limit: half_open_limit.max(1),
            listeners: HashMap::new(),
            half_open: HashSet::new(),
            order: VecDeque::new(),
            acceptable: Vec::new(),
        }
    }

    /// False if somebody listens there already.
    pub(super) fn insert(&mut self, socket: SocketAddr) -> bool {
        if self.listeners.contains_key(&socket) {
            return false;
        }
        self.listeners.insert(socket, Listener::default());
        true
    }

    /// Ends a listener; gives back what nobody accepted.
    pub(super) fn remove(&mut self, socket: SocketAddr) -> VecDeque<ConnectionId> {
        self.listeners.remove(&socket).unwrap_or_default().queue
    }

    pub(super) fn clear(&mut self) {
        self.acceptable.extend(self.listeners.drain().map(|(socket, _)| socket));
        self.half_open.clear();
        self.order.clear();
    }

    /// Who listens on `local`: on this address, or on all of its family.
    pub(super) fn find(&self, local: SocketAddr) -> Option<SocketAddr> {
        let any = match local.ip() {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        [local, SocketAddr::new(any, local.port())]
            .into_iter()
            .find(|socket| self.listeners.contains_key(socket))
    }

    /// Whether somebody listens on `socket` itself.
    pub(super) fn contains(&self, socket: SocketAddr) -> bool {
        self.listeners.contains_key(&socket)
    }

    /// Whether a listener's queue holds as many as it may, or the listener is gone.
    pub(super) fn is_full(&self, socket: SocketAddr) -> bool {
        self.listeners.get(&socket).is_none_or(|listener| listener.queue.len() >= self.backlog)
    }

    /// Takes a half-open connection in; gives back the one that has to go for it.
    pub(super) fn insert_half_open(&mut self, id: ConnectionId) -> Option<ConnectionId> {
        // What has gone otherwise is cleared away before it outweighs the rest.
        if self.order.len() > self.half_open_limit.saturating_mul(2) {
            self.order.retain(|id| self.half_open.contains(id));
        }
        self.half_open.insert(id);
        self.order.push_back(id);
        if self.half_open.len() <= self.half_open_limit {
            return None;
        }
        loop {
            let oldest = self.order.pop_front()?;
            if self.half_open.remove(&oldest) {
                return Some(oldest);
            }
        }
    }

    pub(super) fn forget_half_open(&mut self, id: ConnectionId) {
        self.half_open.remove(&id);
    }

    /// A half-open connection is established.
    pub(super) fn established(&mut self, id: ConnectionId, listener: Option<SocketAddr>) {
        self.half_open.remove(&id);
        if let Some(socket) = listener
            && let Some(listener) = self.listeners.get_mut(&socket)
        {
            listener.queue.push_back(id);
            self.acceptable.push(socket);
        }
    }

    pub(super) fn accept(&mut self, socket: SocketAddr) -> Option<ConnectionId> {
        self.listeners.get_mut(&socket)?.queue.pop_front()
    }

    /// The handshake of a half-open connection waits for room.
    pub(super) fn hold(&mut self, id: ConnectionId, socket: SocketAddr) {
        if let Some(listener) = self.listeners.get_mut(&socket) {
            listener.held.push_back(id);
            if listener.held.len() > self.half_open_limit.saturating_mul(2) {
                listener.held.retain(|id| self.half_open.contains(id));
            }
        }
    }

    /// The next handshake to go on, if there is room for it.
    pub(super) fn take_held(&mut self, socket: SocketAddr) -> Option<ConnectionId> {
        if self.is_full(socket) {
            return None;
        }
        self.listeners.get_mut(&socket)?.held.pop_front()
    }

    /// Whether a listener has more to accept.
    pub(super) fn has_more(&self, socket: SocketAddr) -> bool {
        self.listeners.get(&socket).is_some_and(|listener| !listener.queue.is_empty())
    }

    /// Listeners that got a connection, or ended, since the last call.
    pub(super) fn take_acceptable(&mut self) -> Vec<SocketAddr> {
        std::mem::take(&mut self.acceptable)
    }

    pub(super) fn half_open_ids(&self) -> impl Iterator<Item = ConnectionId> {
        self.half_open.iter().copied()
    }
}
