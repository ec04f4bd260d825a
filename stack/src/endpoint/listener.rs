//! A listening socket as a program holds it.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::Notify;

use super::shared::Shared;
use super::stream::TcpStream;

/// A listening socket of an [`Endpoint`](super::Endpoint). Dropping it resets what it has not accepted.
pub struct TcpListener {
    shared: Arc<Shared>,
    socket: SocketAddr,
    arrived: Arc<Notify>,
}

impl TcpListener {
    pub(super) fn new(shared: Arc<Shared>, socket: SocketAddr, arrived: Arc<Notify>) -> TcpListener {
        TcpListener { shared, socket, arrived }
    }

    /// The address and port listened on.
    pub fn local_addr(&self) -> SocketAddr {
        self.socket
    }

    /// Waits for a connection; also: the client's address. Cancel-safe, and callable from several tasks.
    ///
    /// # Errors
    /// The endpoint is over.
    pub async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        loop {
            let arrived = self.arrived.notified();
            {
                let now = self.shared.now();
                let mut state = self.shared.lock();
                if let Some(id) = state.connections.accept(now, self.socket) {
                    if state.connections.has_more(self.socket) {
                        self.arrived.notify_one();
                    }
                    if let Some(ends) = state.connections.ends(id) {
                        drop(state);
                        // A handshake that had to wait for room may have gone on.
                        self.shared.work.notify_one();
                        return Ok((TcpStream::new(Arc::clone(&self.shared), id, ends), ends.1));
                    }
                    continue;
                }
                state.check_open()?;
            }
            arrived.await;
        }
    }
}

impl Drop for TcpListener {
    fn drop(&mut self) {
        let now = self.shared.now();
        let mut state = self.shared.lock();
        state.accepts.remove(&self.socket);
        state.connections.stop_listening(now, self.socket);
        drop(state);
        self.shared.work.notify_one();
    }
}
