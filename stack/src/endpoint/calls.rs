//! What programs do with their streams.

use std::net::SocketAddr;
use std::task::{Poll, Waker};

use super::connection::{ConnectionId, Key};
use super::connections::Connections;
use super::control::{MoveAt, MoveEvent};
use super::error::{ConnectionError, EndpointError};
use super::machine::Machine;
use super::moves::{PartEnd, begin};
use crate::redirect::{RebindError, RedirectOutcome};
use crate::time::Instant;

impl Connections {
    /// The connection that a stream is read from, and the one that it is written to.
    fn parts(&self, id: ConnectionId) -> (ConnectionId, ConnectionId) {
        let parts = self.streams.get(&id).map(|stream| &stream.parts);
        let of = |part: Option<&ConnectionId>| part.copied().unwrap_or(id);
        (of(parts.and_then(|parts| parts.front())), of(parts.and_then(|parts| parts.back())))
    }

    /// The two ends of a stream's present connection, as its TCP knows them: local, peer.
    pub fn ends(&self, id: ConnectionId) -> Option<(SocketAddr, SocketAddr)> {
        self.connections.get(&self.parts(id).1).map(|connection| (connection.key.local, connection.key.peer))
    }

    /// The service port that a stream is on, as soon as that is certain.
    pub fn redirected_to(&self, id: ConnectionId) -> Option<u16> {
        let back = self.parts(id).1;
        let connection = self.connections.get(&back)?;
        // A part that was moved to is confirmed on the port asked, if nothing else.
        let moved = back != id;
        connection.redirected_to.or_else(|| moved.then(|| connection.present_port()))
    }

    /// The service port that a connection which came in has moved from (PROTOCOL.md §4).
    pub fn moved_from(&self, id: ConnectionId) -> Option<u16> {
        self.connections.get(&id)?.moved_from
    }

    /// Waits for the end of a connect.
    pub fn poll_connected(&mut self, id: ConnectionId, waker: &Waker) -> Poll<Result<(), ConnectionError>> {
        match self.connections.get_mut(&id) {
            Some(connection) => connection.poll_connected(waker),
            None => Poll::Ready(Err(ConnectionError::Aborted)),
        }
    }

    /// Reads; 0 at the end of the stream.
    pub fn poll_read(
        &mut self,
        id: ConnectionId,
        out: &mut [u8],
        waker: &Waker,
    ) -> Poll<Result<usize, ConnectionError>> {
        loop {
            let front = self.parts(id).0;
            let Some(connection) = self.connections.get_mut(&front) else {
                return Poll::Ready(Err(ConnectionError::Aborted));
            };
            let result = connection.poll_read(out, waker);
            match result {
                Poll::Ready(Ok(0)) if !out.is_empty() => match self.end_of_part(id, waker) {
                    PartEnd::Next => continue,
                    PartEnd::Wait => return Poll::Pending,
                    PartEnd::Stream => {}
                },
                // The window has opened.
                Poll::Ready(Ok(1..)) => self.wake_for_program(front, false),
                _ => {}
            }
            return result;
        }
    }

    /// Writes at least one byte, unless `data` is empty.
    pub fn poll_write(
        &mut self,
        id: ConnectionId,
        data: &[u8],
        waker: &Waker,
    ) -> Poll<Result<usize, ConnectionError>> {
        if self.streams.get_mut(&id).is_some_and(|stream| stream.holds_writes(waker)) {
            return Poll::Pending;
        }
        let back = self.parts(id).1;
        let Some(connection) = self.connections.get_mut(&back) else {
            return Poll::Ready(Err(ConnectionError::Aborted));
        };
        let result = connection.poll_write(data, waker);
        if let Poll::Ready(Ok(_)) = result {
            self.wake_for_program(back, true);
        }
        result
    }

    fn wake_for_program(&mut self, id: ConnectionId, wrote: bool) {
        if self.connections.get_mut(&id).is_some_and(|connection| connection.wants_service(wrote)) {
            self.wake(id);
        }
    }

    /// Ends the program's half of the stream behind what it wrote.
    pub fn shut_down(&mut self, now: Instant, id: ConnectionId) {
        self.shut_down_stream(now, id);
        let back = self.parts(id).1;
        if let Some(connection) = self.connections.get_mut(&back) {
            connection.shut_down();
            self.wake(back);
        }
    }

    /// The program is done with the stream: it closes in the background, or is reset if there is unread data.
    pub fn release(&mut self, now: Instant, id: ConnectionId) {
        match self.drop_stream(now, id) {
            Some(parts) => parts.into_iter().for_each(|part| self.release_connection(now, part)),
            None => self.release_connection(now, id),
        }
    }

    fn release_connection(&mut self, now: Instant, id: ConnectionId) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.release();
            if connection.is_over() {
                self.remove(now, id);
            } else {
                self.wake(id);
            }
        }
    }

    /// Says that a stream may be cut behind what was written so far ([`MoveAt::Boundary`]).
    pub fn mark_boundary(&mut self, now: Instant, id: ConnectionId) {
        let back = self.parts(id).1;
        if let Some(connection) = self.connections.get_mut(&back) {
            connection.boundary = connection.written;
            self.advance(now, id);
        }
    }

    /// Says where a stream may be cut.
    pub fn set_move_at(&mut self, now: Instant, id: ConnectionId, move_at: MoveAt) {
        self.set_stream_move_at(now, id, move_at);
    }

    /// Waits for what happens to a stream that moves; `None` when there is no such stream.
    pub fn poll_move_event(&mut self, id: ConnectionId, waker: &Waker) -> Poll<Option<MoveEvent>> {
        match self.stream(id) {
            Some(stream) => stream.poll_event(waker),
            None => Poll::Ready(None),
        }
    }

    /// Asks the client of a connection to go on at `to` (PROTOCOL.md §4).
    ///
    /// # Errors
    /// [`EndpointError`]: this end connects, the connection is over or on no service port, or is being redirected.
    pub fn redirect(&mut self, now: Instant, id: ConnectionId, to: SocketAddr) -> Result<(), EndpointError> {
        let connection = self.connections.get_mut(&id).ok_or(EndpointError::Over)?;
        let Machine::Server(server) = &mut self.machine else { return Err(EndpointError::Role) };
        if !connection.is_synchronised() || connection.is_time_wait() || connection.failure.is_some() {
            return Err(EndpointError::Over);
        }
        let Key { local, peer } = connection.key;
        server.redirect_connection(now, peer, local, to, connection.numbers())?;
        begin(&mut connection.redirect);
        self.drain_machine(now);
        Ok(())
    }

    /// Waits for what becomes of a redirect; `None` if there was none.
    pub fn poll_redirect(&mut self, id: ConnectionId, waker: &Waker) -> Poll<Option<RedirectOutcome>> {
        match self.connections.get_mut(&id) {
            Some(connection) => connection.redirect.poll(waker),
            None => Poll::Ready(None),
        }
    }

    /// Asks the server to send to own port `port` from now on (PROTOCOL.md §5); gives back the connection that this
    /// concerns.
    ///
    /// # Errors
    /// [`EndpointError`]: this end listens, the port cannot be used, or the connection cannot change its own.
    pub fn rebind(
        &mut self,
        now: Instant,
        id: ConnectionId,
        port: u16,
    ) -> Result<ConnectionId, EndpointError> {
        let back = self.parts(id).1;
        let connection = self.connections.get_mut(&back).ok_or(EndpointError::Over)?;
        let (Machine::Client { client, .. }, Some(ports)) = (&mut self.machine, &mut self.ports) else {
            return Err(EndpointError::Role);
        };
        let Key { local, peer } = connection.key;
        let own = SocketAddr::new(local.ip(), port);
        if !ports.take_exact(own, peer.ip()) {
            return Err(RebindError::Port(port).into());
        }
        if let Err(error) = client.rebind(now, local, peer, port, connection.numbers()) {
            ports.release(own, peer.ip());
            return Err(error.into());
        }
        connection.own_ports.push(port);
        begin(&mut connection.rebind);
        self.drain_machine(now);
        Ok(back)
    }

    /// Waits for the server's confirmation; `None` if nothing was asked.
    pub fn poll_rebind(&mut self, id: ConnectionId, waker: &Waker) -> Poll<Option<bool>> {
        match self.connections.get_mut(&id) {
            Some(connection) => connection.rebind.poll(waker),
            None => Poll::Ready(None),
        }
    }
}
