//! Where a byte stream may be cut when it moves to another server, and how its program follows that (PROTOCOL.md §4,
//! §5).

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use thiserror::Error;

use super::connection::ConnectionId;
use super::error::{ConnectionError, EndpointError};
use super::shared::Shared;
use crate::redirect::RedirectOutcome;

/// Where a client's byte stream may be cut when its server asks for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum MoveAt {
    /// Only where the program has said that what it wrote so far can be answered alone:
    /// [`StreamControl::mark_boundary`]. A program that never says so is never moved. The default, because a server that
    /// gets the second half of a request cannot do anything with it.
    #[default]
    Boundary,
    /// As soon as the new server has confirmed, wherever that is: for protocols whose servers can go on at any byte.
    Immediately,
    /// After this long without a byte either way, all that was written having been acknowledged: for protocols in
    /// which silence means that no request is under way.
    Idle(Duration),
}

/// How the part of a stream at its old server is closed (O8).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum CloseBy {
    /// FIN, behind all that was written: what the server still sends is delivered.
    #[default]
    Fin,
    /// RST, once all that was written has been acknowledged. What the server sends after that is lost: for protocols in
    /// which it has nothing to say any more at the cut. The server's end is free at once, without TIME-WAIT.
    Reset,
}

/// Why a stream did not move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Error)]
pub enum MoveError {
    /// The new connection could not begin.
    #[error(transparent)]
    Open(#[from] EndpointError),
    /// The new server refused, did not confirm, or failed.
    #[error("the new server: {0}")]
    Connection(#[from] ConnectionError),
    /// There was no place to cut for too long.
    #[error("there was no place to cut the stream in time")]
    NoBoundary,
    /// The stream, or one of its directions, ended first.
    #[error("the stream ended first")]
    Ended,
}

/// What happens to a stream that moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MoveEvent {
    /// The server asks for the stream to go on elsewhere; it is cut where [`MoveAt`] allows it.
    Asked {
        /// The port it is on.
        from: u16,
        /// Where to.
        to: SocketAddr,
    },
    /// The stream was cut: what the program writes from `offset` on goes to the new server.
    Moved {
        /// The port it was on.
        from: u16,
        /// The service port it is on.
        to: SocketAddr,
        /// Bytes that the program had written before, since the stream began.
        offset: u64,
    },
    /// All that the old server had to say was read: what follows from `offset` on comes from the next.
    Reading {
        /// The service port that it comes from.
        from: u16,
        /// Bytes that the program had read before, since the stream began.
        offset: u64,
    },
    /// The stream stays where it is.
    Failed {
        /// Where it was asked to go.
        to: SocketAddr,
        /// Why it did not.
        reason: MoveError,
    },
}

/// Follows and steers the moves of one stream, at either end; clones, and the stream itself, may be used by other tasks meanwhile.
#[derive(Clone)]
pub struct StreamControl {
    pub(super) shared: Arc<Shared>,
    pub(super) id: ConnectionId,
}

impl StreamControl {
    /// At a client: the stream may be cut here, what was written so far is complete in itself, as between two requests.
    /// If the server has asked for a move, writes wait from here on until the new server has confirmed, or has not.
    pub fn mark_boundary(&self) {
        let now = self.shared.now();
        self.shared.lock().connections.mark_boundary(now, self.id);
        self.shared.work.notify_one();
    }

    /// At a client: where this stream may be cut, instead of what the endpoint's options say.
    pub fn set_move_at(&self, move_at: MoveAt) {
        let now = self.shared.now();
        self.shared.lock().connections.set_move_at(now, self.id, move_at);
        self.shared.work.notify_one();
    }

    /// At a client: the next thing that happens; `None` when the stream was dropped. One task at a time may wait. Events that nobody
    /// fetches are forgotten, the oldest first. Cancel-safe.
    pub async fn next_event(&self) -> Option<MoveEvent> {
        poll_fn(|context| self.shared.lock().connections.poll_move_event(self.id, context.waker())).await
    }

    /// An event that has happened, without waiting.
    pub fn try_event(&self) -> Option<MoveEvent> {
        match self.shared.lock().connections.poll_move_event(self.id, std::task::Waker::noop()) {
            Poll::Ready(event) => event,
            Poll::Pending => None,
        }
    }

    /// At a server: asks the client to go on at another port of the same address (PROTOCOL.md §4), at any time after
    /// the handshake; the result says what became of it. Reading and writing go on meanwhile: a client that moves
    /// closes its half, as if it had nothing more to say. Dropping the future does not take the wish back.
    ///
    /// # Errors
    /// `NotConnected` if the connection is over, `Unsupported` if it is not on a service port or this end is the
    /// client's, `ResourceBusy` if it is being redirected, `InvalidInput` for a port it cannot go to.
    pub async fn redirect(&self, port: u16) -> io::Result<RedirectOutcome> {
        let local = self.shared.lock().connections.ends(self.id).ok_or(EndpointError::Over)?.0;
        self.redirect_to(SocketAddr::new(local.ip(), port)).await
    }

    /// As [`redirect`](Self::redirect), to another address as well (PROTOCOL.md §7): obeyed only by clients that accept
    /// it.
    ///
    /// # Errors
    /// As [`redirect`](Self::redirect).
    pub async fn redirect_to(&self, to: SocketAddr) -> io::Result<RedirectOutcome> {
        {
            let now = self.shared.now();
            self.shared.lock().connections.redirect(now, self.id, to)?;
        }
        self.shared.work.notify_one();
        let outcome =
            poll_fn(|context| self.shared.lock().connections.poll_redirect(self.id, context.waker())).await;
        outcome.ok_or_else(|| EndpointError::Over.into())
    }

    /// At a client: asks the server to send to own port `port` from now on (PROTOCOL.md §5), and waits for its confirmation. Only on
    /// a service port over a path that is known to translate nothing. Not undone when the future is dropped.
    ///
    /// # Errors
    /// `Unsupported` where it cannot be, `AddrInUse` for a port out of the endpoint's range or in use, `ResourceBusy`
    /// during another change, `TimedOut` if the server did not confirm: the connection then stays as it was.
    pub async fn rebind(&self, port: u16) -> io::Result<()> {
        let part = {
            let now = self.shared.now();
            let mut state = self.shared.lock();
            state.connections.rebind(now, self.id, port)?
        };
        self.shared.work.notify_one();
        let done = poll_fn(|context| self.shared.lock().connections.poll_rebind(part, context.waker())).await;
        match done {
            Some(true) => Ok(()),
            Some(false) => {
                Err(io::Error::new(io::ErrorKind::TimedOut, "the server did not confirm the new port"))
            }
            None => Err(EndpointError::Over.into()),
        }
    }
}

impl std::fmt::Debug for StreamControl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StreamControl").field("id", &self.id).finish_non_exhaustive()
    }
}
