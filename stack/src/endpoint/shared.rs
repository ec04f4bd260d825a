//! What the driver's task and the handles of programs share.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::connections::Connections;
use crate::device::Clock;
use crate::time::{Instant, WallClock};

/// How an endpoint is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Closing {
    No,
    /// When what programs wrote has been delivered.
    Settled,
    Now,
}

pub(super) struct Shared {
    state: Mutex<State>,
    /// Wakes the driver.
    pub(super) work: Notify,
    /// The driver has ended.
    pub(super) over: Notify,
    clock: Clock,
}

pub(super) struct State {
    pub(super) connections: Connections,
    pub(super) accepts: HashMap<SocketAddr, Arc<Notify>>,
    pub(super) closing: Closing,
    /// Why there is no driver any more.
    pub(super) ended: Option<(io::ErrorKind, String)>,
}

impl State {
    /// An error once the endpoint is over or about to be.
    pub(super) fn check_open(&self) -> io::Result<()> {
        match &self.ended {
            Some((kind, message)) => Err(io::Error::new(*kind, message.clone())),
            None if self.closing != Closing::No => Err(closed()),
            None => Ok(()),
        }
    }

    /// Wakes who waits to accept.
    pub(super) fn notify_accepts(&mut self) {
        for socket in self.connections.take_acceptable() {
            if let Some(notify) = self.accepts.get(&socket) {
                notify.notify_one();
            }
        }
    }
}

fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "the endpoint is closed")
}

impl Shared {
    pub(super) fn new(connections: Connections) -> Shared {
        let state = State { connections, accepts: HashMap::new(), closing: Closing::No, ended: None };
        Shared { state: Mutex::new(state), work: Notify::new(), over: Notify::new(), clock: Clock::start() }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn now(&self) -> Instant {
        self.clock.now()
    }

    /// Unix time.
    pub(super) fn wall(&self) -> WallClock {
        self.clock.wall()
    }

    /// The clock's reading of a deadline.
    pub(super) fn timer(&self, at: Instant) -> tokio::time::Instant {
        self.clock.timer(at)
    }

    pub(super) fn close(&self, how: Closing) {
        let mut state = self.lock();
        state.closing = state.closing.max(how);
        self.work.notify_one();
    }

    /// Resets everything and tells everybody; the first reason stays.
    pub(super) fn end(&self, reason: &io::Error) {
        let now = self.now();
        let mut state = self.lock();
        state.ended.get_or_insert_with(|| (reason.kind(), reason.to_string()));
        state.connections.abort_all(now);
        for notify in state.accepts.values() {
            notify.notify_waiters();
            notify.notify_one();
        }
        drop(state);
        self.over.notify_waiters();
    }

    /// Resets everything because the endpoint was closed.
    pub(super) fn end_closed(&self) {
        self.end(&closed());
    }
}
