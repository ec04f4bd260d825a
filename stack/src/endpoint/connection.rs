//! One connection: a smoltcp interface with a single socket, and what smoltcp does not keep.

mod program;
mod shape;

use std::net::SocketAddr;
use std::task::{Poll, Waker};
use std::time::Duration;

use bytes::BytesMut;
use smoltcp::iface::{Interface, PollResult};
use smoltcp::socket::tcp::{Socket, State};
use smoltcp::wire::{IpAddress, IpEndpoint};

pub(super) use self::shape::LinkShape;
use self::shape::{DEFAULT_MSS, LEAST_MSS, interface};
use super::control::CloseBy;
use super::error::ConnectionError;
use super::options::TcpOptions;
use super::phy::{Phy, Pool, Shape};
use super::sockets::OwnSocket;
use super::windows::Windows;
use crate::redirect::{ConnectionNumbers, RedirectOutcome};
use crate::time::Instant;
use crate::wire::{Packet, SeqNumber, TcpFlags};

/// A connection's name within its [`Connections`](super::Connections); never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(pub(super) u64);

/// A connection as its TCP knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) local: SocketAddr,
    pub(super) peer: SocketAddr,
}

/// How long things may take.
#[derive(Debug, Clone)]
pub(super) struct Limits {
    pub(super) tcp: TcpOptions,
    pub(super) connect_timeout: Duration,
    pub(super) half_open_lifetime: Duration,
}

/// Where the handshake stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// SYN-SENT.
    Connecting,
    /// SYN-RECEIVED; in the table of half-open connections.
    HalfOpen,
    /// Synchronised, or over.
    Open,
}

/// What left last, as S7 needs it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sent {
    pub(super) snd_nxt: SeqNumber,
    pub(super) rcv_nxt: SeqNumber,
    pub(super) window: u16,
}

pub(super) struct Connection {
    pub(super) key: Key,
    pub(super) phase: Phase,
    /// The socket listened on, for connections that came in.
    pub(super) listener: Option<SocketAddr>,
    pub(super) redirected_to: Option<u16>,
    pub(super) failure: Option<ConnectionError>,
    /// No program holds it any more.
    pub(super) released: bool,
    /// In the queue of those that want to be served.
    pub(super) ready: bool,
    pub(super) timer: Option<Instant>,
    pub(super) sent: Option<Sent>,
    /// The SYN-ACK as the TCP sent it, while half-open.
    pub(super) syn_ack: Option<Packet>,
    /// The segment that would end the handshake, held back while its listener has no room.
    pub(super) held: Option<Packet>,
    pub(super) mtu: usize,
    seed: u64,
    interface: Interface,
    own: OwnSocket,
    created: Instant,
    /// When the peer was last heard.
    heard: Instant,
    /// Since when something waits for the peer's answer.
    waiting: Option<Instant>,
    /// When the program was found to be gone.
    orphaned: Option<Instant>,
    /// The program has ended its half.
    shut_down: bool,
    /// The sequence number of the first byte that the program writes.
    first: SeqNumber,
    /// The peer's initial sequence number.
    irs: Option<SeqNumber>,
    /// Bytes that the program wrote and read.
    pub(super) written: u64,
    pub(super) read: u64,
    /// How many of those written precede a place where the stream may be cut.
    pub(super) boundary: u64,
    /// The program has seen the end of what comes.
    pub(super) at_end: bool,
    /// The stream that this is a part of, or opens one for (PROTOCOL.md §4).
    pub(super) stream: Option<ConnectionId>,
    /// At a server: the port that the client moves from.
    pub(super) moved_from: Option<u16>,
    /// At a server: a redirect of it; at a client: a change of its own port.
    pub(super) redirect: Pending<RedirectOutcome>,
    pub(super) rebind: Pending<bool>,
    /// Own ports besides the key's (§5).
    pub(super) own_ports: Vec<u16>,
    /// Reset as soon as all that was written is acknowledged (O8).
    pub(super) reset_when_sent: bool,
    /// Bytes of each packet kept free for an option.
    reserved: usize,
    /// Who waits for room in the send buffer.
    writer: Option<Waker>,
    /// Whether the device takes super-packets.
    super_packets: bool,
    /// The peer's maximum segment size.
    peer_mss: usize,
    /// How the interface makes packets.
    shape: Shape,
    windows: Windows,
}

/// Something a program may wait for.
#[derive(Debug, Default)]
pub(super) enum Pending<T> {
    #[default]
    None,
    UnderWay(Option<Waker>),
    Done(T),
}

impl<T: Copy> Pending<T> {
    pub(super) fn is_under_way(&self) -> bool {
        matches!(self, Pending::UnderWay(_))
    }

    /// What has come of it; `None` if nothing was begun.
    pub(super) fn poll(&mut self, waker: &Waker) -> Poll<Option<T>> {
        match self {
            Pending::None => Poll::Ready(None),
            Pending::Done(result) => Poll::Ready(Some(*result)),
            Pending::UnderWay(waiting) => {
                *waiting = Some(waker.clone());
                Poll::Pending
            }
        }
    }

    pub(super) fn finish(&mut self, result: T) {
        if let Pending::UnderWay(Some(waker)) = std::mem::replace(self, Pending::Done(result)) {
            waker.wake();
        }
    }
}

fn time(now: Instant) -> smoltcp::time::Instant {
    smoltcp::time::Instant::from_micros(i64::try_from(now.micros()).unwrap_or(i64::MAX))
}

fn endpoint(socket: SocketAddr) -> IpEndpoint {
    IpEndpoint::new(IpAddress::from(socket.ip()), socket.port())
}

impl Connection {
    /// A closed connection; `seed` is secret and never used before: the ISN follows from it.
    pub(super) fn new(
        now: Instant,
        key: Key,
        options: &TcpOptions,
        link: LinkShape,
        seed: u64,
        used: Option<OwnSocket>,
    ) -> Connection {
        let LinkShape { mtu, super_packets } = link;
        let shape = Shape { mtu, super_packet: None };
        Connection {
            key,
            phase: Phase::Connecting,
            listener: None,
            redirected_to: None,
            failure: None,
            released: false,
            ready: false,
            timer: None,
            sent: None,
            syn_ack: None,
            held: None,
            mtu,
            seed,
            interface: interface(now, key.local.ip(), shape, seed),
            own: OwnSocket::closed(used, options),
            created: now,
            heard: now,
            waiting: None,
            orphaned: None,
            shut_down: false,
            first: SeqNumber::default(),
            irs: None,
            written: 0,
            read: 0,
            boundary: 0,
            at_end: false,
            stream: None,
            moved_from: None,
            redirect: Pending::None,
            rebind: Pending::None,
            own_ports: Vec::new(),
            reset_when_sent: false,
            reserved: 0,
            writer: None,
            super_packets,
            peer_mss: DEFAULT_MSS,
            shape,
            windows: Windows::default(),
        }
    }

    /// Its socket, for another connection.
    pub(super) fn into_socket(self) -> OwnSocket {
        self.own
    }

    fn socket(&self) -> &Socket<'static> {
        self.own.socket()
    }

    fn socket_mut(&mut self) -> &mut Socket<'static> {
        self.own.socket_mut()
    }

    pub(super) fn state(&self) -> State {
        self.socket().state()
    }

    /// Active open; false if smoltcp finds an address or port unusable.
    pub(super) fn connect(&mut self) -> bool {
        let (local, peer) = (endpoint(self.key.local), endpoint(self.key.peer));
        self.own.socket_mut().connect(self.interface.context(), peer, local).is_ok()
    }

    /// Passive open; the SYN has to follow.
    pub(super) fn listen(&mut self, listener: SocketAddr) -> bool {
        self.phase = Phase::HalfOpen;
        self.listener = Some(listener);
        let local = endpoint(self.key.local);
        self.socket_mut().listen(local).is_ok()
    }

    /// Whether no packet can come or go any more.
    pub(super) fn is_over(&self) -> bool {
        match self.state() {
            // An abort leaves the peer known until its RST has been sent.
            State::Closed => self.socket().remote_endpoint().is_none(),
            // Reset while half-open, or not opened by its SYN.
            State::Listen => true,
            _ => false,
        }
    }

    /// Whether something of it may still reach or leave the program.
    pub(super) fn is_open(&self) -> bool {
        !matches!(self.state(), State::Closed | State::TimeWait)
    }

    pub(super) fn is_time_wait(&self) -> bool {
        self.state() == State::TimeWait
    }

    pub(super) fn is_synchronised(&self) -> bool {
        !matches!(self.state(), State::Listen | State::SynSent | State::SynReceived | State::Closed)
    }

    /// A segment of the peer.
    pub(super) fn receive(&mut self, now: Instant, packet: &Packet, tx: &mut Vec<BytesMut>, pool: &mut Pool) {
        if self.would_forget_fin(packet) {
            self.heard = now;
            return;
        }
        let before = self.state();
        let opened = self.windows.keep_open(packet);
        let bytes = opened.as_deref().unwrap_or(packet.bytes());
        // A super-packet is more than the two segments that may wait for an acknowledgement (RFC 9293, SHLD-19).
        let at_once = packet.segment_count() > 1;
        let ack_delay = self.socket().ack_delay();
        if at_once {
            self.socket_mut().set_ack_delay(Some(smoltcp::time::Duration::ZERO));
        }
        let mut phy = Phy { rx: Some(bytes), tx, room: 0, shape: self.shape, pool };
        self.interface.poll_ingress_single(time(now), &mut phy, self.own.set());
        self.heard = now;
        if at_once {
            self.socket_mut().set_ack_delay(ack_delay);
        }
        if matches!(before, State::Listen | State::SynSent)
            && let Some(tcp) = packet.tcp().filter(|tcp| tcp.flags().contains(TcpFlags::SYN))
        {
            self.irs = Some(tcp.seq());
            let mss = tcp.max_segment_size().filter(|mss| *mss > 0).map_or(DEFAULT_MSS, usize::from);
            self.peer_mss = mss.max(LEAST_MSS);
        }
        self.reshape(now);
        let reset = packet.tcp().is_some_and(|tcp| tcp.flags().contains(TcpFlags::RST));
        let over = matches!(self.state(), State::Closed | State::Listen);
        // In TIME-WAIT both directions have ended as they should.
        if reset && over && !matches!(before, State::Closed | State::Listen | State::TimeWait) {
            let refused = before == State::SynSent;
            self.fail(if refused { ConnectionError::Refused } else { ConnectionError::Reset });
        }
    }

    /// Whether a segment only says again what the peer lacks, which is our FIN. Three of these make smoltcp retransmit,
    /// of which it does nothing where there is no data, and stop the timer that would have repeated the FIN.
    fn would_forget_fin(&self, packet: &Packet) -> bool {
        let waits = matches!(self.state(), State::FinWait1 | State::Closing | State::LastAck)
            && self.socket().send_queue() == 0;
        let (true, Some(tcp), Some(numbers)) = (waits, packet.tcp(), self.numbers()) else { return false };
        let bare = tcp.payload().is_empty()
            && tcp.flags().contains(TcpFlags::ACK)
            && !tcp.flags().intersects(TcpFlags::SYN | TcpFlags::FIN | TcpFlags::RST);
        // What lies before RCV.NXT wants an answer: a keep-alive.
        bare && tcp.ack() == numbers.snd_una && !tcp.seq().before(numbers.rcv_nxt)
    }

    /// Lets the FIN go that had to wait; says whether it did.
    pub(super) fn finish(&mut self) -> bool {
        let goes = self.shut_down && (self.state() != State::CloseWait || self.all_sent());
        let before = self.state();
        if goes {
            self.socket_mut().close();
        }
        self.state() != before
    }

    /// Whether all that the program wrote has been sent once.
    fn all_sent(&self) -> bool {
        self.sent.is_some_and(|sent| !(self.first + self.written as u32).after(sent.snd_nxt))
    }

    /// What the socket wants to send, as far as there is room in `tx`; false if it stopped for lack of room.
    pub(super) fn transmit(
        &mut self,
        now: Instant,
        room: usize,
        tx: &mut Vec<BytesMut>,
        pool: &mut Pool,
    ) -> bool {
        if self.holds_unread_time_wait() {
            return true;
        }
        loop {
            let mut phy = Phy { rx: None, tx, room, shape: self.shape, pool };
            let result = self.interface.poll_egress(time(now), &mut phy, self.own.set());
            if result == PollResult::None {
                return tx.len() < room || !self.wants_now(now);
            }
        }
    }

    /// smoltcp empties the receive buffer when TIME-WAIT ends; it has to wait for a program that has not read it.
    fn holds_unread_time_wait(&self) -> bool {
        self.state() == State::TimeWait && !self.released && self.socket().can_recv()
    }

    fn wants_now(&mut self, now: Instant) -> bool {
        self.interface.poll_at(time(now), self.own.set()).is_some_and(|at| at <= time(now))
    }

    /// Whether it may be served behind other packets that have arrived: nothing but data is under way.
    pub(super) fn may_wait(&self) -> bool {
        self.phase == Phase::Open && self.state() == State::Established && self.stream.is_none()
    }

    /// Whether what its program did calls for a look at it: in the midst of a transfer most reads and writes do not.
    pub(super) fn wants_service(&mut self, wrote: bool) -> bool {
        // What is written first begins to wait for the peer.
        let begins = wrote && self.waiting.is_none();
        begins || !self.may_wait() || self.wants_now(self.heard)
    }

    /// Remembers what was sent.
    fn note_sent(&mut self, packet: &Packet) {
        let Some(tcp) = packet.tcp() else { return };
        self.windows.on_sent(&tcp);
        let Some(snd_nxt) = self.windows.snd_nxt() else { return };
        if tcp.flags().contains(TcpFlags::SYN) {
            self.first = tcp.seq() + 1;
        }
        self.sent = Some(Sent { snd_nxt, rcv_nxt: tcp.ack(), window: tcp.window() });
        if self.phase == Phase::HalfOpen && tcp.is_syn_ack() {
            self.syn_ack = Some(packet.clone());
        }
    }

    /// Ends what has waited too long; says whether it did.
    pub(super) fn expire(&mut self, now: Instant, limits: &Limits) -> bool {
        if self.released && self.orphaned.is_none() {
            self.orphaned = Some(now);
        }
        let unanswered = match self.state() {
            State::SynSent | State::SynReceived | State::FinWait1 | State::Closing | State::LastAck => true,
            State::Established | State::CloseWait => self.socket().send_queue() > 0,
            _ => false,
        };
        self.waiting = if unanswered { self.waiting.or(Some(now)) } else { None };
        let due = self.own_deadline(limits).is_some_and(|at| at <= now);
        if due {
            self.abort(ConnectionError::TimedOut);
        }
        due
    }

    fn own_deadline(&self, limits: &Limits) -> Option<Instant> {
        if matches!(self.state(), State::Closed | State::TimeWait | State::Listen) {
            return None;
        }
        let handshake = match self.phase {
            Phase::Connecting => Some(self.created + limits.connect_timeout),
            Phase::HalfOpen => Some(self.created + limits.half_open_lifetime),
            Phase::Open => None,
        };
        let unanswered = self.waiting.map(|since| since.max(self.heard) + limits.tcp.user_timeout);
        let orphaned = self.orphaned.map(|since| since.max(self.heard) + limits.tcp.fin_timeout);
        [handshake, unanswered, orphaned].into_iter().flatten().min()
    }

    /// When it wants to be served again.
    pub(super) fn deadline(&mut self, now: Instant, limits: &Limits) -> Option<Instant> {
        if self.holds_unread_time_wait() {
            return None;
        }
        let socket = self.interface.poll_at(time(now), self.own.set());
        let socket = socket.map(|at| Instant::from_micros(u64::try_from(at.total_micros()).unwrap_or(0)));
        [socket, self.own_deadline(limits)].into_iter().flatten().min()
    }

    /// Bytes that have come in order.
    pub(super) fn received(&self) -> u64 {
        self.read + self.socket().recv_queue() as u64
    }

    /// Whether all that was written has been acknowledged.
    pub(super) fn all_acknowledged(&self) -> bool {
        self.socket().send_queue() == 0
    }

    /// Where the TCP stands, once it is synchronised (§4).
    pub(super) fn numbers(&self) -> Option<ConnectionNumbers> {
        if !self.is_synchronised() {
            return None;
        }
        let fin =
            matches!(self.state(), State::CloseWait | State::LastAck | State::Closing | State::TimeWait);
        let (snd_una, max_window) = self.windows.acknowledged()?;
        Some(ConnectionNumbers {
            snd_una,
            snd_nxt: self.windows.snd_nxt()?,
            max_window,
            rcv_nxt: self.irs? + 1 + self.received() as u32 + u32::from(fin),
            window: self.sent?.window,
            // smoltcp does not use them here.
            timestamps: None,
        })
    }

    /// Ends the part of a stream that has moved by RST, once nothing that was written can be lost (O8).
    pub(super) fn reset_when_sent(&mut self) -> bool {
        let due = self.reset_when_sent && self.is_open() && self.all_acknowledged();
        if due {
            self.socket_mut().abort();
        }
        due
    }

    /// Takes no more bytes of the program; the part ends as `close_by` says, behind what was written.
    pub(super) fn close_part(&mut self, close_by: CloseBy) {
        match close_by {
            CloseBy::Fin => self.shut_down(),
            CloseBy::Reset => self.reset_when_sent = true,
        }
    }

    /// The port of the peer on the wire.
    pub(super) fn present_port(&self) -> u16 {
        self.redirected_to.unwrap_or(self.key.peer.port())
    }

    /// Whether `seq` may be one of a segment in flight: what an ICMP error must quote (RFC 5927 §4.1).
    pub(super) fn may_have_sent(&self, seq: SeqNumber) -> bool {
        let Some(sent) = self.sent else { return false };
        let syn = SeqNumber(self.first.0.wrapping_sub(1));
        let una = self.windows.acknowledged().map_or(syn, |(una, _)| una);
        !seq.before(una) && seq.before(sent.snd_nxt)
    }

    /// The first reason stays.
    pub(super) fn fail(&mut self, error: ConnectionError) {
        self.failure.get_or_insert(error);
    }

    /// Resets it and tells the program why.
    pub(super) fn abort(&mut self, error: ConnectionError) {
        self.fail(error);
        self.socket_mut().abort();
    }

    /// Whether the program has ended its half.
    pub(super) fn is_shut_down(&self) -> bool {
        self.shut_down
    }

    /// FIN behind what was written. In LAST-ACK smoltcp overlooks window updates: there it must not go before all data
    /// has been sent.
    pub(super) fn shut_down(&mut self) {
        self.shut_down = true;
        self.finish();
    }

    /// The program is gone: what it has not read can only be refused (RFC 9293 §3.10.4: a reset says that data was
    /// lost).
    pub(super) fn release(&mut self) {
        self.released = true;
        self.end_orphan();
        self.shut_down();
    }

    /// Resets a connection without a program that has data to read; says whether it did.
    pub(super) fn end_orphan(&mut self) -> bool {
        let unread = self.released && self.state() != State::Closed && self.socket().can_recv();
        if unread {
            self.socket_mut().abort();
        }
        unread
    }
}
