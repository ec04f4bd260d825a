//! All connections of an endpoint as one sans-IO machine: packets, calls and a time in; packets and a deadline out.
//!
//! Between the network and the TCP of each connection stands [`Client`] or [`Server`]. No socket, clock or random
//! source inside; the tokio driver is one user of it.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::Hasher;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use bytes::BytesMut;
use siphasher::sip::SipHasher24;

use super::connection::{Connection, ConnectionId, Key, Limits, LinkShape, Phase};
use super::error::{ConnectionError, EndpointError};
use super::listeners::Listeners;
use super::machine::Machine;
use super::moves::{Moving, Stream};
use super::options::{ClientOptions, EndpointCounters, ServerOptions};
use super::phy::Pool;
use super::ports::Ports;
use super::sockets::Sockets;
use crate::redirect::{Action, Client, PathId, Server, ServicePorts, Towards, can_answer};
use crate::time::{Instant, WallClock};
use crate::wire::{Offload, Packet};

/// Packets that wait to be sent; connections write no further ones while there are so many.
const OUT_LIMIT: usize = 256;
/// A connection is not served again earlier than this, unless something happens to it.
const SERVE_INTERVAL: Duration = Duration::from_micros(500);
/// How long flows of ended connections may stay in the machine, and their ports in use (`C12`).
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// The connections and listeners of one endpoint.
pub struct Connections {
    pub(super) machine: Machine,
    pub(super) limits: Limits,
    link: LinkShape,
    addresses: Vec<IpAddr>,
    pub(super) ports: Option<Ports>,
    /// Secret of the ISNs.
    key: [u8; 16],
    next: u64,
    pub(super) connections: HashMap<ConnectionId, Connection>,
    /// Those of which packets may still come.
    pub(super) keys: HashMap<Key, ConnectionId>,
    pub(super) listeners: Listeners,
    timers: BTreeSet<(Instant, ConnectionId)>,
    ready: VecDeque<ConnectionId>,
    out: VecDeque<Packet>,
    /// Client connections that ended since the last sweep.
    ended: Vec<Key>,
    sweep_at: Option<Instant>,
    /// Streams that move, or whose programs ask about it, by their first connection (PROTOCOL.md §4).
    pub(super) streams: HashMap<ConnectionId, Stream>,
    /// Streams of which a part was served.
    pub(super) due: Vec<ConnectionId>,
    pub(super) move_timers: BTreeSet<(Instant, ConnectionId)>,
    pub(super) moving: Moving,
    pub(super) scratch: Vec<BytesMut>,
    /// What the server's machine redirects from and to.
    pub(super) services: Vec<ServicePorts>,
    pub(super) pool: Pool,
    sockets: Sockets,
    pub(super) counters: EndpointCounters,
}

impl Connections {
    /// The connecting end over a device of this MTU. `key` is secret and random: sequence numbers and ports follow
    /// from it.
    pub fn client(options: ClientOptions, mtu: usize, key: [u8; 16]) -> Connections {
        let moving = Moving::of(&options);
        let ClientOptions { mut redirect, addresses, ports, connect_timeout, tcp, .. } = options;
        redirect.mtu = mtu;
        let limits = Limits { tcp, connect_timeout, half_open_lifetime: Duration::ZERO };
        let mut connections =
            Connections::new(Machine::client(Client::new(redirect)), limits, mtu, key, Listeners::new(0, 0));
        connections.addresses = addresses;
        connections.moving = moving;
        connections.ports = Some(Ports::new(ports, connections.random(u64::MAX)));
        connections
    }

    /// The listening end over a device of this MTU. `key` is secret and random: sequence numbers follow from it.
    pub fn server(options: ServerOptions, mtu: usize, key: [u8; 16]) -> Connections {
        let ServerOptions { mut redirect, backlog, half_open_limit, half_open_lifetime, tcp } = options;
        redirect.mtu = mtu;
        if redirect.isn_key == [0; 16] {
            redirect.isn_key = key;
        }
        let services = redirect.services.clone();
        let mut server = Server::new(redirect);
        for service in &services {
            // S6: until somebody does.
            server.set_listening(service.service_socket(), false);
        }
        let limits = Limits { tcp, connect_timeout: Duration::ZERO, half_open_lifetime };
        let listeners = Listeners::new(backlog, half_open_limit);
        let machine = Machine::Server(Box::new(server));
        Connections { services, ..Connections::new(machine, limits, mtu, key, listeners) }
    }

    fn new(machine: Machine, limits: Limits, mtu: usize, key: [u8; 16], listeners: Listeners) -> Connections {
        Connections {
            machine,
            limits,
            link: LinkShape { mtu, super_packets: false },
            addresses: Vec::new(),
            ports: None,
            key,
            next: 0,
            connections: HashMap::new(),
            keys: HashMap::new(),
            listeners,
            timers: BTreeSet::new(),
            ready: VecDeque::new(),
            out: VecDeque::new(),
            ended: Vec::new(),
            sweep_at: None,
            streams: HashMap::new(),
            due: Vec::new(),
            move_timers: BTreeSet::new(),
            moving: Moving::default(),
            scratch: Vec::new(),
            services: Vec::new(),
            pool: Pool::default(),
            sockets: Sockets::default(),
            counters: EndpointCounters::default(),
        }
    }

    /// Says whether the device takes super-packets and partial checksums; until then it does not. Connections that come
    /// then make them.
    pub fn set_super_packets(&mut self, takes: bool) {
        self.link.super_packets = takes;
    }

    /// A number that only who knows the key can tell.
    fn random(&self, number: u64) -> u64 {
        let mut hasher = SipHasher24::new_with_key(&self.key);
        hasher.write_u64(number);
        hasher.finish()
    }

    /// What the redirect machine of a client says; `None` at the other end.
    pub fn redirect_client(&self) -> Option<&Client> {
        match &self.machine {
            Machine::Client { client, .. } => Some(client),
            Machine::Server(_) => None,
        }
    }

    /// Says by which way a client reaches a VIP now ([`Client::set_path`]).
    pub fn set_path(&mut self, vip: IpAddr, path: PathId) {
        if let Machine::Client { client, .. } = &mut self.machine {
            client.set_path(vip, path);
        }
    }

    /// What the redirect machine of a server says; `None` at the other end.
    pub fn redirect_server(&self) -> Option<&Server> {
        match &self.machine {
            Machine::Client { .. } => None,
            Machine::Server(server) => Some(server),
        }
    }

    /// What was counted.
    pub fn counters(&self) -> EndpointCounters {
        self.counters
    }

    /// Connections of which packets may still come, those in TIME-WAIT included.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether there is no such connection.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Whether packets of the connection between these sockets may still come, TIME-WAIT included: what a kernel tells of
    /// its sockets.
    pub fn contains(&self, local: SocketAddr, peer: SocketAddr) -> bool {
        self.keys.contains_key(&Key { local, peer })
    }

    /// Whether nothing is left of any connection: no packet is expected, no program holds one, no stream moves, and every
    /// own port is free.
    pub fn is_drained(&self) -> bool {
        let ports = self.ports.as_ref().map_or(0, Ports::in_use);
        let held = self.keys.len() + self.connections.len() + self.streams.len() + self.timers.len() + ports;
        held + self.listeners.half_open_ids().count() + self.move_timers.len() == 0
    }

    /// Whether all that programs wrote and closed has reached the peers: nothing is left but TIME-WAIT and connections
    /// that a program still holds.
    pub fn is_settled(&self) -> bool {
        !self.connections.values().any(|connection| {
            connection.released && connection.is_synchronised() && !connection.is_time_wait()
        })
    }

    /// A buffer that is not in use, if possible one that held a packet of about `length` bytes.
    pub fn take_buffer(&mut self, length: usize) -> BytesMut {
        self.pool.take(length)
    }

    /// Gives a buffer back for reuse.
    pub fn give_buffer(&mut self, buffer: BytesMut) {
        self.pool.give(buffer);
    }

    /// A packet of the network, as the device gave it.
    pub fn handle_input(&mut self, now: Instant, buffer: BytesMut, offload: Offload) {
        let mut packet = match Packet::parse(buffer, offload) {
            Ok(packet) => packet,
            Err(rejected) => {
                self.counters.malformed += 1;
                self.pool.give(rejected.buffer);
                return;
            }
        };
        // What is for a group of hosts is no TCP's (RFC 9293, MUST-57).
        if packet.fragment().is_some() || !can_answer(packet.destination()) {
            self.counters.other_packets += 1;
        } else if !packet.checksum_ok() {
            self.counters.bad_checksums += 1;
        } else if self.machine_takes(now, &mut packet) {
            self.deliver(now, &packet);
        }
        self.pool.give(packet.into_buffer());
        self.drain_machine(now);
        self.advance_due(now);
    }

    /// Whether the machine lets a packet of the network through; it may ask where a connection stands.
    fn machine_takes(&mut self, now: Instant, packet: &mut Packet) -> bool {
        let (keys, connections) = (&self.keys, &self.connections);
        let numbers = |local, peer| connections.get(keys.get(&Key { local, peer })?)?.numbers();
        self.machine.handle_remote(now, packet, &numbers) == Action::Pass
    }

    /// Lets pass what `now` makes due. Call it at the deadline and after calls of programs, before fetching packets.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.drain_machine(now);
        while let Some((at, id)) = self.timers.first().copied() {
            if at > now {
                break;
            }
            self.timers.pop_first();
            if let Some(connection) = self.connections.get_mut(&id) {
                connection.timer = None;
                self.serve(now, id);
            }
        }
        for _ in 0..self.ready.len() {
            if self.out.len() >= OUT_LIMIT {
                break;
            }
            let Some(id) = self.ready.pop_front() else { break };
            if let Some(connection) = self.connections.get_mut(&id) {
                connection.ready = false;
                self.serve(now, id);
            }
        }
        if self.sweep_at.is_some_and(|at| at <= now) {
            self.sweep();
        }
        self.drain_machine(now);
        while let Some((at, head)) = self.move_timers.first().copied().filter(|(at, _)| *at <= now) {
            self.move_timers.remove(&(at, head));
            self.advance(now, head);
        }
        self.advance_due(now);
    }

    /// The next packet for the network.
    pub fn poll_transmit(&mut self) -> Option<Packet> {
        self.out.pop_front()
    }

    /// Whether [`handle_timeout`](Self::handle_timeout) wants to be called at once, or packets wait to be fetched.
    pub fn has_work(&self) -> bool {
        !self.out.is_empty() || !self.ready.is_empty() || !self.due.is_empty()
    }

    /// When [`handle_timeout`](Self::handle_timeout) wants to be called; [`Instant::ZERO`]: at once.
    pub fn poll_timeout(&self) -> Option<Instant> {
        if self.has_work() {
            return Some(Instant::ZERO);
        }
        let connection = self.timers.first().map(|(at, _)| *at);
        let stream = self.move_timers.first().map(|(at, _)| *at);
        [self.machine.poll_timeout(), connection, stream, self.sweep_at].into_iter().flatten().min()
    }

    /// Begins to connect to a VIP and port, or to any other address.
    ///
    /// # Errors
    /// No own address or port for it, or too many connections.
    pub fn connect(&mut self, now: Instant, peer: SocketAddr) -> Result<ConnectionId, EndpointError> {
        if peer.port() == 0 || !can_answer(peer.ip()) {
            return Err(EndpointError::Unusable(peer));
        }
        if self.ports.is_none() {
            return Err(EndpointError::Role);
        }
        self.check_room()?;
        let local = match self.take_port(peer) {
            Err(EndpointError::NoPort(_)) if !self.ended.is_empty() => {
                self.sweep();
                self.take_port(peer)
            }
            taken => taken,
        }?;
        let key = Key { local, peer };
        let id = self.create(now, key);
        let connected = self.connections.get_mut(&id).is_some_and(Connection::connect);
        if !connected {
            self.remove(now, id);
            return Err(EndpointError::Unusable(peer));
        }
        self.counters.connects += 1;
        self.wake(id);
        Ok(id)
    }

    pub(super) fn take_port(&mut self, peer: SocketAddr) -> Result<SocketAddr, EndpointError> {
        let ports = self.ports.as_mut().ok_or(EndpointError::Role)?;
        let mut error = EndpointError::NoAddress(peer);
        for address in self.addresses.iter().filter(|address| address.is_ipv4() == peer.is_ipv4()) {
            match ports.take(*address, peer.ip()) {
                Some(local) => return Ok(local),
                None => error = EndpointError::NoPort(peer),
            }
        }
        Err(error)
    }

    pub(super) fn check_room(&self) -> Result<(), EndpointError> {
        let limit = self.limits.tcp.max_connections;
        if self.connections.len() >= limit { Err(EndpointError::TooMany(limit)) } else { Ok(()) }
    }

    pub(super) fn create(&mut self, now: Instant, key: Key) -> ConnectionId {
        let id = ConnectionId(self.next);
        self.next += 1;
        let seed = self.random(id.0);
        let connection = Connection::new(now, key, &self.limits.tcp, self.link, seed, self.sockets.take());
        self.connections.insert(id, connection);
        self.keys.insert(key, id);
        id
    }

    /// Has a connection served as soon as there is room for its packets.
    pub(super) fn wake(&mut self, id: ConnectionId) {
        if let Some(connection) = self.connections.get_mut(&id)
            && !connection.ready
        {
            connection.ready = true;
            self.ready.push_back(id);
        }
    }

    /// Sends what a connection has to send, and settles what became of it.
    pub(super) fn serve(&mut self, now: Instant, id: ConnectionId) {
        let room = OUT_LIMIT.saturating_sub(self.out.len());
        let Some(connection) = self.connections.get_mut(&id) else { return };
        self.counters.polls += 1;
        if connection.expire(now, &self.limits) {
            self.counters.timed_out += 1;
        }
        connection.end_orphan();
        connection.reset_when_sent();
        let done = connection.transmit(now, room, &mut self.scratch, &mut self.pool);
        self.emit(now, id);
        // Seen in the order of sending: a FIN may follow now.
        let finished = self.connections.get_mut(&id).is_some_and(Connection::finish);
        self.settle(now, id);
        if !done || finished {
            self.wake(id);
        }
        if let Some(head) = self.connections.get(&id).and_then(|connection| connection.stream) {
            self.due.push(head);
        }
    }

    /// What the TCP of a connection sent goes through the machine.
    pub(super) fn emit(&mut self, now: Instant, id: ConnectionId) {
        let mut buffers = std::mem::take(&mut self.scratch);
        for buffer in buffers.drain(..) {
            let Some(connection) = self.connections.get_mut(&id) else {
                self.pool.give(buffer);
                continue;
            };
            match connection.finish_packet(buffer) {
                Ok(packet) => self.send(now, packet),
                Err(rejected) => self.pool.give(rejected.buffer),
            }
        }
        self.scratch = buffers;
    }

    /// A packet of the local TCP on its way to the network.
    pub(super) fn send(&mut self, now: Instant, mut packet: Packet) {
        match self.machine.handle_local(now, &mut packet) {
            Action::Pass => self.out.push_back(packet),
            Action::Drop => self.pool.give(packet.into_buffer()),
        }
    }

    pub(super) fn push(&mut self, packet: Packet) {
        self.out.push_back(packet);
    }

    /// Follows a connection's state: established, over, or when to look again.
    pub(super) fn settle(&mut self, now: Instant, id: ConnectionId) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if connection.phase != Phase::Open && connection.is_synchronised() {
            let came_in = connection.phase == Phase::HalfOpen;
            connection.phase = Phase::Open;
            (connection.syn_ack, connection.held) = (None, None);
            self.counters.established += 1;
            if came_in {
                self.listeners.established(id, connection.listener);
            }
        }
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.wake_writer();
        let over = connection.is_over();
        let deadline = if over { None } else { connection.deadline(now, &self.limits) };
        let deadline = deadline.map(|at| at.max(now + SERVE_INTERVAL));
        if connection.timer != deadline {
            if let Some(at) = connection.timer {
                self.timers.remove(&(at, id));
            }
            connection.timer = deadline;
            self.timers.extend(deadline.map(|at| (at, id)));
        }
        if over {
            self.finish(now, id);
        }
    }

    /// No packet of this connection can come any more.
    fn finish(&mut self, now: Instant, id: ConnectionId) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let key = connection.key;
        if connection.phase == Phase::HalfOpen {
            connection.released = true;
            self.listeners.forget_half_open(id);
        }
        let released = connection.released;
        if self.keys.get(&key) == Some(&id) {
            self.forget_in_machine(now, key);
            self.keys.remove(&key);
            if self.ports.is_some() {
                let own = self.connections.get(&id).into_iter().flat_map(|connection| &connection.own_ports);
                let own = own.map(|port| Key { local: SocketAddr::new(key.local.ip(), *port), ..key });
                self.ended.extend(own.chain([key]));
                self.sweep_at.get_or_insert(now + SWEEP_INTERVAL);
            }
        }
        if released && let Some(connection) = self.connections.remove(&id) {
            self.sockets.give(connection.into_socket());
        }
    }

    /// Forgets a connection without a word to its peer.
    pub(super) fn remove(&mut self, now: Instant, id: ConnectionId) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.released = true;
            if let Some(at) = connection.timer.take() {
                self.timers.remove(&(at, id));
            }
            self.finish(now, id);
        }
    }

    /// C12: frees the flows of connections that have ended, and their ports.
    fn sweep(&mut self) {
        self.sweep_at = None;
        if let Machine::Client { client, .. } = &mut self.machine {
            client.retain(|local, peer| self.keys.contains_key(&Key { local, peer }));
        }
        if let Some(ports) = &mut self.ports {
            for key in self.ended.drain(..) {
                ports.release(key.local, key.peer.ip());
            }
        }
    }

    /// Tells the machine Unix time.
    pub(super) fn set_clock(&mut self, clock: WallClock) {
        if let Machine::Server(server) = &mut self.machine {
            server.set_clock(clock);
        }
    }

    /// What the machine sends of its own and tells.
    pub(super) fn drain_machine(&mut self, now: Instant) {
        while let Some(transmit) = self.machine.poll_transmit(now) {
            match transmit.towards {
                Towards::Network => self.out.push_back(transmit.packet),
                Towards::Local => self.deliver(now, &transmit.packet),
            }
        }
        self.drain_events(now);
    }

    /// Counts packets that the device did not take.
    pub fn count_unsent(&mut self, packets: u64) {
        self.counters.unsent += packets;
    }

    /// Resets all connections and ends all listeners: the endpoint is gone.
    pub fn abort_all(&mut self, now: Instant) {
        let ids: Vec<ConnectionId> = self.connections.keys().copied().collect();
        for id in ids {
            if let Some(connection) = self.connections.get_mut(&id)
                && connection.is_open()
            {
                connection.abort(ConnectionError::Aborted);
            }
            self.serve(now, id);
        }
        self.listeners.clear();
        for stream in self.streams.values_mut() {
            stream.wake_all();
        }
    }
}
