//! What runs on the machines: clients that ask, servers that answer, each checking every byte.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Wake, Waker};
use std::time::Duration;

use shunt_stack::endpoint::{CloseBy, ConnectionError, ConnectionId, Connections};
use shunt_stack::time::Instant;

use super::check::{Ledger, Violation};
use super::plan::{End, FlowPlan};
use super::record::{Foreign, Kind, Reader, Record};

/// Bytes read at a time.
const CHUNK: usize = 4096;
/// Answers that a server keeps before it reads on.
const MAX_PENDING: usize = 1 << 17;
/// How long a stream may be silent before its program gives it up: more than any timer of a connection.
pub(super) const PATIENCE: Duration = Duration::from_secs(4 * 3600);

/// Programs that something has happened for.
#[derive(Debug, Clone, Default)]
pub(super) struct Ready(Arc<Mutex<Vec<u64>>>);

struct Waiter {
    ready: Ready,
    program: u64,
}

impl Wake for Waiter {
    fn wake(self: Arc<Self>) {
        self.ready.push(self.program);
    }
}

impl Ready {
    fn push(&self, program: u64) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(program);
    }

    pub(super) fn waker(&self, program: u64) -> Waker {
        Waker::from(Arc::new(Waiter { ready: self.clone(), program }))
    }

    /// Those woken since the last call, each once and in an order that no hash decides.
    pub(super) fn take(&self) -> Vec<u64> {
        let mut taken = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        taken.sort_unstable();
        taken.dedup();
        taken
    }
}

/// What a program can reach: its own machine's TCP and clock, and the ledger.
pub(super) struct Surroundings<'w> {
    pub(super) now: Instant,
    pub(super) tcp: &'w mut Connections,
    pub(super) ledger: &'w mut Ledger,
    /// The service ports of connections that a shim has redirected beside the TCP, by its sockets.
    pub(super) redirects: &'w BTreeMap<(SocketAddr, SocketAddr), u16>,
}

impl Surroundings<'_> {
    /// The service port that a connection is on.
    fn redirected_to(&self, id: ConnectionId) -> Option<u16> {
        let beside = || self.redirects.get(&self.tcp.ends(id)?).copied();
        self.tcp.redirected_to(id).or_else(beside)
    }
}

/// Bytes on their way into a stream.
#[derive(Debug, Default)]
struct Outgoing {
    bytes: Vec<u8>,
    at: usize,
}

impl Outgoing {
    fn is_empty(&self) -> bool {
        self.at == self.bytes.len()
    }

    fn pending(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// Writes as much as there is room for; true if anything was written.
    fn flush(
        &mut self,
        tcp: &mut Connections,
        id: ConnectionId,
        waker: &Waker,
    ) -> Result<bool, ConnectionError> {
        let mut wrote = false;
        while !self.is_empty() {
            match tcp.poll_write(id, &self.bytes[self.at..], waker) {
                Poll::Ready(written) => (self.at, wrote) = (self.at + written?, true),
                Poll::Pending => return Ok(wrote),
            }
        }
        self.bytes.clear();
        self.at = 0;
        Ok(wrote)
    }
}

/// Where a client's program stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Connecting,
    Talking,
    /// It has ended its half.
    Ending,
}

/// What becomes of a program.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// It waits: to be woken, or until then.
    Wait(Option<Instant>),
    Over,
}

/// A client's program: connects, asks, reads the answers.
#[derive(Debug)]
pub(super) struct ClientProgram {
    pub(super) flow: u32,
    pub(super) id: ConnectionId,
    waker: Waker,
    plan: FlowPlan,
    /// How the machine's moves close the old part: what decides where the stream may be cut.
    close_by: CloseBy,
    step: Step,
    out: Outgoing,
    reader: Reader,
    sent: u32,
    answered: u32,
    /// When the next request may be sent, and the next bytes read.
    ask_at: Instant,
    read_at: Instant,
    heard_at: Instant,
}

impl ClientProgram {
    pub(super) fn new(
        now: Instant,
        flow: u32,
        id: ConnectionId,
        waker: Waker,
        plan: FlowPlan,
        close_by: CloseBy,
    ) -> Self {
        ClientProgram {
            flow,
            id,
            waker,
            plan,
            close_by,
            step: Step::Connecting,
            out: Outgoing::default(),
            reader: Reader::default(),
            sent: 0,
            answered: 0,
            ask_at: now,
            read_at: now,
            heard_at: now,
        }
    }

    /// Goes as far as it can.
    pub(super) fn poll(&mut self, world: &mut Surroundings<'_>) -> Result<Next, Violation> {
        match self.advance(world) {
            Ok(next) => Ok(next),
            Err(Stop::Violation(violation)) => Err(violation),
            Err(Stop::Error(error)) => {
                self.end(world, Some(error), false);
                Ok(Next::Over)
            }
        }
    }

    /// Whether nothing has come for so long that nothing can any more.
    pub(super) fn is_stuck(&self, now: Instant) -> bool {
        now.since(self.heard_at) > PATIENCE
    }

    pub(super) fn end(&self, world: &mut Surroundings<'_>, error: Option<ConnectionError>, abandoned: bool) {
        let redirected = world.redirected_to(self.id);
        world.ledger.ended(self.flow, error, redirected, abandoned);
        world.tcp.release(world.now, self.id);
    }

    fn advance(&mut self, world: &mut Surroundings<'_>) -> Result<Next, Stop> {
        if self.step == Step::Connecting {
            match world.tcp.poll_connected(self.id, &self.waker) {
                Poll::Pending => return Ok(Next::Wait(None)),
                Poll::Ready(connected) => connected?,
            }
            self.step = Step::Talking;
            self.heard_at = world.now;
        }
        loop {
            let wrote = self.write(world)?;
            let (read, ended) = self.read(world)?;
            if let End::Abandon { after } = self.plan.end
                && self.answered >= after
            {
                self.end(world, None, true);
                return Ok(Next::Over);
            }
            if ended {
                if self.answered < self.sent || self.step != Step::Ending || !self.reader.is_between() {
                    // The server closes only behind its answers.
                    return Err(Stop::Error(ConnectionError::Reset));
                }
                self.end(world, None, false);
                return Ok(Next::Over);
            }
            if !wrote && !read {
                let due = [self.ask_at, self.read_at];
                return Ok(Next::Wait(due.into_iter().filter(|at| *at > world.now).min()));
            }
        }
    }

    fn write(&mut self, world: &mut Surroundings<'_>) -> Result<bool, Stop> {
        if self.step == Step::Ending {
            return Ok(false);
        }
        let mut wrote = self.out.flush(world.tcp, self.id, &self.waker)?;
        // A reset loses answers under way.
        let may_cut = self.close_by == CloseBy::Fin || self.answered == self.sent;
        if self.out.is_empty() && may_cut {
            world.tcp.mark_boundary(world.now, self.id);
        }
        let more = self.sent < self.plan.exchanges.len() as u32;
        let room = self.sent - self.answered < self.plan.window && self.ask_at <= world.now;
        if more && room && self.out.is_empty() {
            let exchange = self.plan.exchanges[self.sent as usize];
            let kind = Kind::Request { answer: exchange.answer };
            let record = Record { kind, flow: self.flow, number: self.sent, length: exchange.request };
            record.write(&mut self.out.bytes);
            self.sent += 1;
            self.ask_at = world.now + self.plan.pause;
            wrote = true;
        } else if !more && self.out.is_empty() && (self.answered == self.sent || !self.plan.late_end) {
            world.tcp.shut_down(world.now, self.id);
            self.step = Step::Ending;
            wrote = true;
        }
        Ok(wrote)
    }

    /// Whether anything was read, and whether the stream has ended.
    fn read(&mut self, world: &mut Surroundings<'_>) -> Result<(bool, bool), Stop> {
        if self.read_at > world.now {
            return Ok((false, false));
        }
        let mut chunk = [0; CHUNK];
        let length = match world.tcp.poll_read(self.id, &mut chunk, &self.waker) {
            Poll::Pending => return Ok((false, false)),
            Poll::Ready(read) => read?,
        };
        if length == 0 {
            return Ok((false, true));
        }
        (self.heard_at, self.read_at) = (world.now, world.now + self.plan.rest);
        self.reader.push(&chunk[..length]);
        while let Some(record) = self.reader.next().map_err(|Foreign| self.foreign("no record"))? {
            let Kind::Response { server, connection } = record.kind else {
                return Err(self.foreign("a request").into());
            };
            if record.flow != self.flow {
                return Err(self.foreign(&format!("an answer to flow {}", record.flow)).into());
            }
            let by = (server, connection);
            let known = world.ledger.answered(self.flow, record.number, by, record.length);
            known.map_err(|what| self.foreign(&what))?;
            self.answered += 1;
        }
        Ok((true, false))
    }

    fn foreign(&self, what: &str) -> Violation {
        let who = format!("client {}", self.plan.client);
        Violation::Foreign { who, flow: Some(self.flow), what: what.to_owned() }
    }
}

/// Why a program stops.
#[derive(Debug)]
enum Stop {
    Error(ConnectionError),
    Violation(Violation),
}

impl From<ConnectionError> for Stop {
    fn from(error: ConnectionError) -> Stop {
        Stop::Error(error)
    }
}

impl From<Violation> for Stop {
    fn from(violation: Violation) -> Stop {
        Stop::Violation(violation)
    }
}

/// A server's program for one connection.
#[derive(Debug)]
pub(super) struct ServerProgram {
    /// Which server, and its connection's number.
    name: (u16, u16),
    pub(super) id: ConnectionId,
    pub(super) socket: SocketAddr,
    waker: Waker,
    flow: Option<u32>,
    next: Option<u32>,
    out: Outgoing,
    reader: Reader,
    ended: bool,
    heard_at: Instant,
}

impl ServerProgram {
    pub(super) fn new(
        now: Instant,
        name: (u16, u16),
        id: ConnectionId,
        socket: SocketAddr,
        waker: Waker,
    ) -> Self {
        ServerProgram {
            name,
            id,
            socket,
            waker,
            flow: None,
            next: None,
            out: Outgoing::default(),
            reader: Reader::default(),
            ended: false,
            heard_at: now,
        }
    }

    /// Goes as far as it can. An error ends it: whether it may be is the client's to say.
    pub(super) fn poll(&mut self, world: &mut Surroundings<'_>) -> Result<Next, Violation> {
        match self.advance(world) {
            Ok(next) => Ok(next),
            Err(Stop::Violation(violation)) => Err(violation),
            Err(Stop::Error(_)) => {
                world.tcp.release(world.now, self.id);
                Ok(Next::Over)
            }
        }
    }

    /// Whether its client has been silent for too long.
    pub(super) fn is_stuck(&self, now: Instant) -> bool {
        now.since(self.heard_at) > PATIENCE
    }

    fn advance(&mut self, world: &mut Surroundings<'_>) -> Result<Next, Stop> {
        loop {
            let wrote = self.out.flush(world.tcp, self.id, &self.waker)?;
            let read = !self.ended && self.out.pending() < MAX_PENDING && self.read(world)?;
            if self.ended && self.out.is_empty() {
                world.tcp.shut_down(world.now, self.id);
                world.tcp.release(world.now, self.id);
                return Ok(Next::Over);
            }
            if !wrote && !read {
                return Ok(Next::Wait(None));
            }
        }
    }

    fn read(&mut self, world: &mut Surroundings<'_>) -> Result<bool, Stop> {
        let mut chunk = [0; CHUNK];
        let length = match world.tcp.poll_read(self.id, &mut chunk, &self.waker) {
            Poll::Pending => return Ok(false),
            Poll::Ready(read) => read?,
        };
        self.heard_at = world.now;
        if length == 0 {
            self.ended = true;
            if !self.reader.is_between() && !world.ledger.may_end_early(self.flow) {
                return Err(self.foreign("the end within a record").into());
            }
            return Ok(true);
        }
        self.reader.push(&chunk[..length]);
        while let Some(record) = self.reader.next().map_err(|Foreign| self.foreign("no record"))? {
            self.on_record(world, record)?;
        }
        Ok(true)
    }

    fn on_record(&mut self, world: &mut Surroundings<'_>, record: Record) -> Result<(), Stop> {
        let Kind::Request { answer } = record.kind else { return Err(self.foreign("an answer").into()) };
        if self.flow.is_some_and(|flow| flow != record.flow) {
            return Err(self.foreign(&format!("a request of flow {}", record.flow)).into());
        }
        if self.next.is_some_and(|next| next != record.number) {
            return Err(self.foreign(&format!("request {}, not the next one", record.number)).into());
        }
        self.flow = Some(record.flow);
        self.next = Some(record.number + 1);
        let planned = world.ledger.heard(self.name, record.flow, record.number, record.length);
        let planned = planned.map_err(|what| self.foreign(&what))?;
        if planned != answer {
            return Err(self.foreign("a request for another answer").into());
        }
        let kind = Kind::Response { server: self.name.0, connection: self.name.1 };
        Record { kind, length: answer, ..record }.write(&mut self.out.bytes);
        Ok(())
    }

    fn foreign(&self, what: &str) -> Violation {
        let who = format!("server {}, connection {}", self.name.0, self.name.1);
        Violation::Foreign { who, flow: self.flow, what: what.to_owned() }
    }
}
