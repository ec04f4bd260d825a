//! A client's byte stream over several connections, one after the other (PROTOCOL.md §4).
//!
//! The new connection is opened first, and only when it is confirmed is the stream cut: a server that is not there costs
//! nothing. What is read comes from the oldest part until its end, what is written goes to the newest. A part that fails
//! takes those behind it with it: the bytes between could not be told from none.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::task::{Poll, Waker};
use std::time::Duration;

use super::connection::{Connection, ConnectionId, Key, Pending, Phase};
use super::connections::Connections;
use super::control::{CloseBy, MoveAt, MoveError, MoveEvent};
use super::error::{ConnectionError, EndpointError};
use super::machine::Machine;
use super::options::ClientOptions;
use crate::redirect::{ClientEvent, RedirectOutcome, ServerEvent};
use crate::time::Instant;
use crate::wire::RedirectOption;

/// Parts of a stream that are not read to their end; further moves wait (`M9`).
const MAX_PARTS: usize = 8;
/// Events of a stream that wait for its program.
const MAX_EVENTS: usize = 64;

/// How an endpoint moves streams.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Moving {
    move_at: MoveAt,
    close_by: CloseBy,
    timeout: Duration,
    patience: Duration,
}

impl Moving {
    pub(super) fn of(options: &ClientOptions) -> Moving {
        Moving {
            move_at: options.move_at,
            close_by: options.close_by,
            timeout: options.move_timeout,
            patience: options.move_patience,
        }
    }
}

/// A stream that moves, has moved, or whose program asks about it.
#[derive(Debug)]
pub(super) struct Stream {
    /// Read from the first, written to the last; never empty.
    pub(super) parts: VecDeque<ConnectionId>,
    move_at: MoveAt,
    /// Bytes written to, and read from, parts before the last and before the first.
    written_before: u64,
    read_before: u64,
    asked: Option<Asked>,
    opening: Option<Opening>,
    /// The program has ended its half.
    shut: bool,
    /// The program has seen the end of what comes.
    at_end: bool,
    events: VecDeque<MoveEvent>,
    waiting: Waiting,
    timer: Option<Instant>,
}

/// Who waits for a stream rather than for one of its connections.
#[derive(Debug, Default)]
struct Waiting {
    reader: Option<Waker>,
    writer: Option<Waker>,
    events: Option<Waker>,
}

/// A move that the server has asked for.
#[derive(Debug, Clone, Copy)]
struct Asked {
    from: u16,
    to: SocketAddr,
    until: Instant,
    /// Bytes written and received so far.
    seen: (u64, u64),
    /// Since when there were no more, with all acknowledged.
    quiet_since: Option<Instant>,
}

/// The next part's connection, not yet confirmed.
#[derive(Debug, Clone, Copy)]
struct Opening {
    id: ConnectionId,
    asked: Asked,
    until: Instant,
    /// The place to cut is here: nothing is written meanwhile.
    holds: bool,
}

fn wake(waiting: &mut Option<Waker>) {
    if let Some(waker) = waiting.take() {
        waker.wake();
    }
}

impl Stream {
    fn back(&self) -> Option<ConnectionId> {
        self.parts.back().copied()
    }

    fn event(&mut self, event: MoveEvent) {
        if self.events.len() >= MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
        wake(&mut self.waiting.events);
    }

    fn wake(&mut self) {
        wake(&mut self.waiting.reader);
        wake(&mut self.waiting.writer);
    }

    pub(super) fn wake_all(&mut self) {
        self.wake();
        wake(&mut self.waiting.events);
    }

    pub(super) fn poll_event(&mut self, waker: &Waker) -> Poll<Option<MoveEvent>> {
        if let Some(event) = self.events.pop_front() {
            return Poll::Ready(Some(event));
        }
        self.waiting.events = Some(waker.clone());
        Poll::Pending
    }

    /// Whether writes wait for the next part; `waker` then hears of it.
    pub(super) fn holds_writes(&mut self, waker: &Waker) -> bool {
        let holds = !self.shut && self.opening.is_some_and(|opening| opening.holds);
        if holds {
            self.waiting.writer = Some(waker.clone());
        }
        holds
    }

    /// When something is due without anything happening.
    fn deadline(&self) -> Option<Instant> {
        if let Some(opening) = self.opening {
            return Some(opening.until);
        }
        let asked = self.asked?;
        match self.move_at {
            MoveAt::Idle(time) => {
                let idle = asked.quiet_since.map(|since| since + time);
                Some(idle.map_or(asked.until, |idle| idle.min(asked.until)))
            }
            _ => Some(asked.until),
        }
    }
}

impl Connections {
    /// What is known of the stream that began with this connection, from now on.
    pub(super) fn stream(&mut self, head: ConnectionId) -> Option<&mut Stream> {
        if !self.streams.contains_key(&head) {
            let connection = self.connections.get_mut(&head).filter(|connection| !connection.released)?;
            connection.stream = Some(head);
            let stream = Stream {
                parts: VecDeque::from([head]),
                move_at: self.moving.move_at,
                written_before: 0,
                read_before: 0,
                asked: None,
                opening: None,
                shut: connection.is_shut_down(),
                at_end: connection.at_end,
                events: VecDeque::new(),
                waiting: Waiting::default(),
                timer: None,
            };
            self.streams.insert(head, stream);
        }
        self.streams.get_mut(&head)
    }

    pub(super) fn set_stream_move_at(&mut self, now: Instant, head: ConnectionId, move_at: MoveAt) {
        if let Some(stream) = self.stream(head) {
            stream.move_at = move_at;
            self.advance(now, head);
        }
    }

    /// What the machine tells.
    pub(super) fn drain_events(&mut self, now: Instant) {
        loop {
            match &mut self.machine {
                Machine::Client { client, .. } => {
                    let Some(event) = client.poll_event() else { return };
                    tracing::debug!(?event, "connection");
                    self.on_client_event(now, event);
                }
                Machine::Server(server) => {
                    let Some(event) = server.poll_event() else { return };
                    tracing::debug!(?event, "redirect");
                    self.on_server_event(now, event);
                }
            }
        }
    }

    fn on_client_event(&mut self, now: Instant, event: ClientEvent) {
        let (ClientEvent::Redirected { local, vip, .. }
        | ClientEvent::MoveAsked { local, vip, .. }
        | ClientEvent::Rebound { local, vip, .. }
        | ClientEvent::RebindFailed { local, vip, .. }) = event
        else {
            return;
        };
        let Some(id) = self.keys.get(&Key { local, peer: vip }).copied() else { return };
        let Some(connection) = self.connections.get_mut(&id) else { return };
        match event {
            ClientEvent::Redirected { service_port, .. } => connection.redirected_to = Some(service_port),
            ClientEvent::Rebound { .. } => connection.rebind.finish(true),
            ClientEvent::RebindFailed { .. } => connection.rebind.finish(false),
            ClientEvent::MoveAsked { from, to, .. } => self.on_move_asked(now, id, from, to),
            _ => {}
        }
    }

    fn on_server_event(&mut self, now: Instant, event: ServerEvent) {
        let (ServerEvent::Confirmed { client, service, .. }
        | ServerEvent::Redirection { client, service, .. }) = event
        else {
            return;
        };
        let Some(id) = self.keys.get(&Key { local: service, peer: client }).copied() else { return };
        let Some(connection) = self.connections.get_mut(&id) else { return };
        match event {
            ServerEvent::Confirmed { moved_from, .. } => connection.moved_from = moved_from,
            ServerEvent::Redirection { outcome, .. } => {
                connection.redirect.finish(outcome);
                if outcome == RedirectOutcome::Reset {
                    connection.abort(ConnectionError::TimedOut);
                    self.serve(now, id);
                }
            }
            _ => {}
        }
    }

    /// The machine need not remember a connection of which nothing can come any more.
    pub(super) fn forget_in_machine(&mut self, now: Instant, key: Key) {
        let Machine::Server(server) = &mut self.machine else { return };
        server.forget_connection(key.peer, key.local);
        let under_way = self
            .keys
            .get(&key)
            .and_then(|id| self.connections.get(id))
            .is_some_and(|connection| connection.redirect.is_under_way());
        if under_way {
            // As long as the key leads to it.
            self.drain_events(now);
        }
    }

    fn on_move_asked(&mut self, now: Instant, id: ConnectionId, from: u16, to: SocketAddr) {
        let Some(connection) = self.connections.get(&id) else { return };
        let (key, head) = (connection.key, connection.stream.unwrap_or(id));
        let seen = (connection.written, connection.received());
        let until = now + self.moving.patience;
        let last = self.stream(head).is_some_and(|stream| stream.back() == Some(id));
        if !last {
            // It has moved from there, or its program is gone.
            self.tell_failed(key, true);
            return;
        }
        if let Some(stream) = self.streams.get_mut(&head) {
            stream.asked = Some(Asked { from, to, until, seen, quiet_since: None });
            stream.event(MoveEvent::Asked { from, to });
        }
        self.due.push(head);
    }

    fn tell_failed(&mut self, key: Key, retry: bool) {
        if let Machine::Client { client, .. } = &mut self.machine {
            client.move_failed(key.local, key.peer, retry);
        }
    }

    /// Goes on with the streams of which something has happened.
    pub(super) fn advance_due(&mut self, now: Instant) {
        while !self.due.is_empty() {
            let mut due = std::mem::take(&mut self.due);
            due.sort_unstable();
            due.dedup();
            for head in due {
                self.advance(now, head);
            }
        }
    }

    /// Takes a stream's move as far as it goes now.
    pub(super) fn advance(&mut self, now: Instant, head: ConnectionId) {
        self.spread_failure(head);
        let Some(stream) = self.streams.get(&head) else { return };
        match (stream.opening, stream.asked) {
            (Some(opening), _) => self.advance_opening(now, head, opening),
            (None, Some(asked)) => self.advance_asked(now, head, asked),
            (None, None) => {}
        }
        let Some(stream) = self.streams.get_mut(&head) else { return };
        let deadline = stream.deadline().map(|at| at.max(now + Duration::from_micros(1)));
        let before = std::mem::replace(&mut stream.timer, deadline);
        if let Some(at) = before {
            self.move_timers.remove(&(at, head));
        }
        self.move_timers.extend(deadline.map(|at| (at, head)));
    }

    /// `M7`: what a failed part did not deliver is missing for those behind it.
    fn spread_failure(&mut self, head: ConnectionId) {
        let Some(stream) = self.streams.get(&head) else { return };
        let failure = |id: &ConnectionId| self.connections.get(id).and_then(|connection| connection.failure);
        let Some(failed) = stream.parts.iter().position(|id| failure(id).is_some()) else { return };
        let error = failure(&stream.parts[failed]).unwrap_or(ConnectionError::Aborted);
        let behind: Vec<ConnectionId> = stream.parts.iter().skip(failed + 1).copied().collect();
        for id in behind {
            if let Some(connection) = self.connections.get_mut(&id)
                && connection.failure.is_none()
            {
                connection.abort(error);
                self.wake(id);
            }
        }
    }

    fn advance_asked(&mut self, now: Instant, head: ConnectionId, asked: Asked) {
        let Some(stream) = self.streams.get_mut(&head) else { return };
        let Some(connection) = stream.back().and_then(|id| self.connections.get(&id)) else { return };
        let seen = (connection.written, connection.received());
        // Who waits for acknowledgements in order to write on is not idle.
        let quiet = seen == asked.seen && connection.all_acknowledged();
        let quiet_since = quiet.then(|| asked.quiet_since.unwrap_or(now));
        stream.asked = Some(Asked { seen, quiet_since, ..asked });
        let over = stream.shut || stream.at_end || connection.failure.is_some() || !connection.is_open();
        if over {
            self.give_up(head, asked, MoveError::Ended, true);
        } else if now >= asked.until {
            self.give_up(head, asked, MoveError::NoBoundary, true);
        } else if stream.parts.len() < MAX_PARTS {
            // M8
            let here = match stream.move_at {
                MoveAt::Immediately => true,
                MoveAt::Boundary => connection.boundary == connection.written,
                MoveAt::Idle(time) => quiet_since.is_some_and(|since| since + time <= now),
            };
            if here {
                self.open_part(now, head, asked);
            }
        }
    }

    /// The stream stays; `retry`: it may be asked for the same again.
    fn give_up(&mut self, head: ConnectionId, asked: Asked, reason: MoveError, retry: bool) {
        let Some(stream) = self.streams.get_mut(&head) else { return };
        (stream.asked, stream.opening) = (None, None);
        stream.event(MoveEvent::Failed { to: asked.to, reason });
        stream.wake();
        let key = stream.back().and_then(|id| self.connections.get(&id)).map(|connection| connection.key);
        self.counters.moves_failed += 1;
        if let Some(key) = key {
            self.tell_failed(key, retry);
        }
    }

    /// `M6`: opens the next part.
    fn open_part(&mut self, now: Instant, head: ConnectionId, asked: Asked) {
        match self.connect_part(now, head, asked.to) {
            Ok(id) => {
                let until = now + self.moving.timeout;
                if let Some(stream) = self.streams.get_mut(&head) {
                    let holds = stream.move_at != MoveAt::Immediately;
                    (stream.asked, stream.opening) = (None, Some(Opening { id, asked, until, holds }));
                }
                self.wake(id);
            }
            Err(error) => self.give_up(head, asked, error.into(), true),
        }
    }

    fn connect_part(
        &mut self,
        now: Instant,
        head: ConnectionId,
        to: SocketAddr,
    ) -> Result<ConnectionId, EndpointError> {
        let back = self.streams.get(&head).and_then(Stream::back);
        let old = back.and_then(|id| self.connections.get(&id)).ok_or(EndpointError::Over)?.key;
        self.check_room()?;
        // C8: an own port that no connection to that address has, nor one in TIME-WAIT; on the old one, Z or where it
        // leads could be a part that the stream had before.
        let local = self.take_port(to)?;
        let key = Key { local, peer: to };
        let expected = match &mut self.machine {
            Machine::Client { client, .. } => client.expect_move(old.local, old.peer, local),
            Machine::Server(_) => false,
        };
        if !expected {
            if let Some(ports) = &mut self.ports {
                ports.release(local, to.ip());
            }
            return Err(EndpointError::Over);
        }
        let id = self.create(now, key);
        let connected = self.connections.get_mut(&id).is_some_and(Connection::connect);
        if !connected {
            self.remove(now, id);
            return Err(EndpointError::Unusable(to));
        }
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.stream = Some(head);
        }
        Ok(id)
    }

    fn advance_opening(&mut self, now: Instant, head: ConnectionId, opening: Opening) {
        let back = self.streams.get(&head).and_then(Stream::back).and_then(|id| self.connections.get(&id));
        let ended = back.is_none_or(|old| old.failure.is_some() || !old.is_open());
        let failure = match self.connections.get(&opening.id) {
            _ if ended => Some(MoveError::Ended),
            None => Some(ConnectionError::Aborted.into()),
            Some(new) if new.failure.is_some() => new.failure.map(Into::into),
            Some(new) if new.phase == Phase::Open && new.is_open() => None,
            Some(new) if new.is_over() => Some(ConnectionError::Refused.into()),
            Some(_) if now >= opening.until => Some(ConnectionError::TimedOut.into()),
            Some(_) => return,
        };
        match failure {
            Some(reason) => self.cancel_opening(now, head, reason),
            None => self.cut(now, head, opening),
        }
    }

    /// Gives a move up whose new connection has begun.
    pub(super) fn cancel_opening(&mut self, now: Instant, head: ConnectionId, reason: MoveError) {
        let Some(opening) = self.streams.get(&head).and_then(|stream| stream.opening) else { return };
        // A server that is not there now need not be asked again for the same redirect.
        self.give_up(head, opening.asked, reason, reason == MoveError::Ended);
        let Some(connection) = self.connections.get_mut(&opening.id) else { return };
        connection.stream = None;
        connection.abort(ConnectionError::Aborted);
        connection.release();
        self.serve(now, opening.id);
    }

    /// `M7`: the new part is confirmed: what is written from here on goes there.
    fn cut(&mut self, now: Instant, head: ConnectionId, opening: Opening) {
        let Some(stream) = self.streams.get_mut(&head) else { return };
        let Some(old_id) = stream.back() else { return };
        let to = self
            .connections
            .get(&opening.id)
            .map_or(opening.asked.to, |new| SocketAddr::new(new.key.peer.ip(), new.present_port()));
        let Some(old) = self.connections.get_mut(&old_id) else { return };
        if let Machine::Client { client, .. } = &mut self.machine {
            client.close_moved(old.key.local, old.key.peer);
        }
        stream.written_before += old.written;
        stream.opening = None;
        stream.parts.push_back(opening.id);
        stream.event(MoveEvent::Moved { from: opening.asked.from, to, offset: stream.written_before });
        let close = RedirectOption { confirm: true, port: Some(to.port()), ..RedirectOption::default() };
        // So that the FIN has room for it, also behind the last data (W3).
        old.reserve(now, close.padded_len());
        old.close_part(self.moving.close_by);
        stream.wake();
        self.counters.moves += 1;
        self.wake(old_id);
        self.wake(opening.id);
    }

    /// The first part of a stream has been read to its end: whether there is more, or may be.
    pub(super) fn end_of_part(&mut self, head: ConnectionId, waker: &Waker) -> PartEnd {
        let Some(stream) = self.streams.get_mut(&head) else {
            if let Some(connection) = self.connections.get_mut(&head) {
                connection.at_end = true;
            }
            return PartEnd::Stream;
        };
        if stream.parts.len() < 2 {
            if stream.opening.is_some() {
                stream.waiting.reader = Some(waker.clone());
                return PartEnd::Wait;
            }
            stream.at_end = true;
            return PartEnd::Stream;
        }
        let Some(done) = stream.parts.pop_front() else { return PartEnd::Stream };
        if let Some(connection) = self.connections.get_mut(&done) {
            stream.read_before += connection.read;
            connection.stream = None;
            connection.release();
        }
        let from = stream.parts.front().and_then(|id| self.connections.get(id));
        let from = from.map_or(0, Connection::present_port);
        stream.event(MoveEvent::Reading { from, offset: stream.read_before });
        self.wake(done);
        self.due.push(head);
        PartEnd::Next
    }

    /// `M8`: the program has ended its half: a move that is not done is off.
    pub(super) fn shut_down_stream(&mut self, now: Instant, head: ConnectionId) {
        let Some(stream) = self.streams.get_mut(&head) else { return };
        stream.shut = true;
        self.cancel_opening(now, head, MoveError::Ended);
        self.due.push(head);
    }

    /// The program has dropped the stream; gives back its parts.
    pub(super) fn drop_stream(&mut self, now: Instant, head: ConnectionId) -> Option<VecDeque<ConnectionId>> {
        self.streams.get_mut(&head)?.shut = true;
        self.cancel_opening(now, head, MoveError::Ended);
        let mut stream = self.streams.remove(&head)?;
        stream.wake_all();
        if let Some(at) = stream.timer {
            self.move_timers.remove(&(at, head));
        }
        for id in &stream.parts {
            if let Some(connection) = self.connections.get_mut(id) {
                connection.stream = None;
            }
        }
        Some(stream.parts)
    }
}

/// What follows the end of a part.
pub(super) enum PartEnd {
    /// The next part.
    Next,
    /// That is not decided yet.
    Wait,
    /// Nothing.
    Stream,
}

/// Begins something that a program may wait for.
pub(super) fn begin<T>(pending: &mut Pending<T>) {
    *pending = Pending::UnderWay(None);
}
