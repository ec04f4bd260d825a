//! A connection as a program holds it.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::connection::ConnectionId;
use super::control::StreamControl;
use super::shared::Shared;
use crate::redirect::RedirectOutcome;

/// A TCP connection of an [`Endpoint`](super::Endpoint).
///
/// Reading ends at the peer's FIN; `shutdown` sends ours and leaves the other direction open. Dropping closes in the
/// background what was written before; unread data then resets the connection, as in Linux. The buffers are those of
/// [`TcpOptions`](super::TcpOptions): a writer waits for the peer, a peer for the reader.
pub struct TcpStream {
    shared: Arc<Shared>,
    id: ConnectionId,
    local: SocketAddr,
    peer: SocketAddr,
}

impl TcpStream {
    pub(super) fn new(shared: Arc<Shared>, id: ConnectionId, ends: (SocketAddr, SocketAddr)) -> TcpStream {
        TcpStream { shared, id, local: ends.0, peer: ends.1 }
    }

    /// Waits for the handshake.
    pub(super) async fn connected(&self) -> io::Result<()> {
        poll_fn(|context| self.shared.lock().connections.poll_connected(self.id, context.waker())).await?;
        Ok(())
    }

    /// The own address and port with which the stream was opened; a moved stream uses others on the wire.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// The peer, as the program asked for it: VIP and redirect port, also after a redirect.
    pub fn peer_addr(&self) -> SocketAddr {
        self.peer
    }

    /// The service port on which the connection really is; `None` if it was not redirected, or a handover has not yet
    /// shown that it works (`C10`).
    pub fn redirected_to(&self) -> Option<u16> {
        self.shared.lock().connections.redirected_to(self.id)
    }

    /// At a server: the service port of the server that the client comes from, where this connection continues a
    /// stream that was redirected (PROTOCOL.md §4).
    pub fn moved_from(&self) -> Option<u16> {
        self.shared.lock().connections.moved_from(self.id)
    }

    /// Follows and steers the stream's moves, also while its halves are used elsewhere.
    pub fn control(&self) -> StreamControl {
        StreamControl { shared: Arc::clone(&self.shared), id: self.id }
    }

    /// At a client: the stream may be cut here ([`StreamControl::mark_boundary`]).
    pub fn mark_boundary(&self) {
        self.control().mark_boundary();
    }

    /// At a server: asks the client to go on at another port ([`StreamControl::redirect`]).
    ///
    /// # Errors
    /// As there.
    pub async fn redirect(&self, port: u16) -> io::Result<RedirectOutcome> {
        self.control().redirect(port).await
    }
}

impl AsyncRead for TcpStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if out.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let out_bytes = out.initialize_unfilled();
        let mut state = self.shared.lock();
        let read = ready!(state.connections.poll_read(self.id, out_bytes, context.waker()))?;
        let work = state.connections.has_work();
        drop(state);
        out.advance(read);
        if work {
            self.shared.work.notify_one();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TcpStream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let mut state = self.shared.lock();
        let written = ready!(state.connections.poll_write(self.id, data, context.waker()))?;
        let work = state.connections.has_work();
        drop(state);
        if work {
            self.shared.work.notify_one();
        }
        Poll::Ready(Ok(written))
    }

    /// Nothing is held back: what was written is on its way as the peer's window allows.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Does not wait for the peer.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let now = self.shared.now();
        self.shared.lock().connections.shut_down(now, self.id);
        self.shared.work.notify_one();
        Poll::Ready(Ok(()))
    }
}

impl Drop for TcpStream {
    fn drop(&mut self) {
        let now = self.shared.now();
        self.shared.lock().connections.release(now, self.id);
        self.shared.work.notify_one();
    }
}

impl std::fmt::Debug for TcpStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TcpStream")
            .field("local", &self.local)
            .field("peer", &self.peer)
            .finish_non_exhaustive()
    }
}
