//! Packets that arrive for the local TCP: to their connection, to a listener, or to nobody.

use std::net::SocketAddr;

use smoltcp::socket::tcp::State;

use super::connection::{Connection, ConnectionId, Key, Phase};
use super::connections::Connections;
use super::error::{ConnectionError, EndpointError};
use super::machine::Machine;
use crate::redirect::{ServicePorts, can_answer};
use crate::time::Instant;
use crate::wire::{IcmpView, Packet, SeqNumber, TcpFlags, Version};

impl Connections {
    /// A packet that the machine let through to the local TCP.
    pub(super) fn deliver(&mut self, now: Instant, packet: &Packet) {
        if let Some(icmp) = packet.icmp() {
            self.on_icmp(now, packet.version(), &icmp);
            return;
        }
        let (Some(peer), Some(local), Some(_)) =
            (packet.source_socket(), packet.destination_socket(), packet.tcp())
        else {
            self.counters.other_packets += 1;
            return;
        };
        let key = Key { local, peer };
        match self.keys.get(&key).copied() {
            Some(id) => self.on_segment(now, id, packet),
            None => self.on_stray(now, key, packet),
        }
    }

    fn on_segment(&mut self, now: Instant, id: ConnectionId, packet: &Packet) {
        let Some(tcp) = packet.tcp() else { return };
        let came_in = self.connections.get(&id).is_some_and(|connection| connection.listener.is_some());
        if tcp.is_syn() && came_in {
            self.on_syn_again(now, id, packet);
            return;
        }
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if connection.phase == Phase::HalfOpen
            && !tcp.flags().contains(TcpFlags::RST)
            && let Some(listener) = connection.listener
            && self.listeners.is_full(listener)
        {
            // The handshake stays open until there is room; meanwhile the peer repeats its data.
            self.counters.handshakes_delayed += 1;
            if connection.held.is_none() {
                connection.held = Some(packet.clone());
                self.listeners.hold(id, listener);
            }
            return;
        }
        self.receive(now, id, packet);
    }

    fn receive(&mut self, now: Instant, id: ConnectionId, packet: &Packet) {
        if let Some(connection) = self.connections.get_mut(&id) {
            self.counters.polls += 1;
            connection.receive(now, packet, &mut self.scratch, &mut self.pool);
        }
        self.emit(now, id);
        // Packets that arrive together are acknowledged together.
        if self.connections.get(&id).is_some_and(Connection::may_wait) {
            self.wake(id);
        } else {
            self.serve(now, id);
        }
    }

    /// A SYN on a connection that exists, which smoltcp would drop (S7).
    fn on_syn_again(&mut self, now: Instant, id: ConnectionId, packet: &Packet) {
        let (Some(connection), Some(tcp)) = (self.connections.get(&id), packet.tcp()) else { return };
        let (Some(sent), key) = (connection.sent, connection.key) else { return };
        if connection.state() == State::TimeWait && tcp.seq().after(sent.rcv_nxt) {
            // RFC 9293 §3.6.1: a new incarnation; its sequence numbers cannot be taken for the old one's.
            self.remove_after_time_wait(now, id);
            self.on_stray(now, key, packet);
            return;
        }
        if let Some(syn_ack) = &connection.syn_ack
            && sent.rcv_nxt == tcp.seq() + 1
        {
            let syn_ack = syn_ack.clone();
            self.counters.syns_answered += 1;
            self.send(now, syn_ack);
            return;
        }
        if let Machine::Server(server) = &mut self.machine {
            let answer = server.challenge_ack(now, packet, sent.snd_nxt, sent.rcv_nxt, sent.window, None);
            if let Some(answer) = answer {
                self.counters.syns_answered += 1;
                self.push(answer);
            }
        }
    }

    /// The program may still read what the old connection brought.
    fn remove_after_time_wait(&mut self, now: Instant, id: ConnectionId) {
        let released = self.connections.get(&id).is_some_and(|connection| connection.released);
        if released {
            self.remove(now, id);
        } else if let Some(connection) = self.connections.get(&id) {
            self.keys.remove(&connection.key);
        }
    }

    /// A segment that belongs to no connection: a new one, or S8.
    fn on_stray(&mut self, now: Instant, key: Key, packet: &Packet) {
        let syn = packet.tcp().is_some_and(|tcp| tcp.is_syn());
        let listener = if syn { self.listeners.find(key.local) } else { None };
        if let Some(listener) = listener {
            self.open_half(now, key, listener, packet);
            return;
        }
        self.counters.strays += 1;
        if let Some(reset) = self.machine.reset(now, packet) {
            self.counters.resets += 1;
            self.send(now, reset);
        }
    }

    fn open_half(&mut self, now: Instant, key: Key, listener: SocketAddr, packet: &Packet) {
        let usable = key.peer.port() != 0 && can_answer(key.peer.ip());
        if self.listeners.is_full(listener) || self.check_room().is_err() || !usable {
            self.counters.syns_dropped += 1;
            return;
        }
        let id = self.create(now, key);
        let listening = self.connections.get_mut(&id).is_some_and(|connection| connection.listen(listener));
        if !listening {
            self.remove(now, id);
            return;
        }
        if let Some(oldest) = self.listeners.insert_half_open(id) {
            self.counters.half_open_dropped += 1;
            self.remove(now, oldest);
        }
        self.receive(now, id, packet);
    }

    /// An error that quotes a segment of ours.
    fn on_icmp(&mut self, now: Instant, version: Version, icmp: &IcmpView<'_>) {
        let connection = icmp.quoted().and_then(|quoted| {
            let local = SocketAddr::new(quoted.source, quoted.source_port);
            let peer = SocketAddr::new(quoted.destination, quoted.destination_port);
            let id = *self.keys.get(&Key { local, peer })?;
            Some((id, quoted.seq))
        });
        let Some((id, seq)) = connection else {
            self.counters.other_packets += 1;
            return;
        };
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if !seq.is_some_and(|seq: SeqNumber| connection.may_have_sent(seq)) {
            self.counters.other_packets += 1;
            return;
        }
        if let Some(mtu) = icmp.mtu() {
            if connection.lower_mtu(now, mtu as usize) {
                self.counters.mtu_lowered += 1;
            }
        } else if connection.state() == State::SynSent && icmp.message_type() == unreachable(version).0 {
            // Established connections outlive such errors (RFC 1122 §4.2.3.9).
            let refused = icmp.code() == unreachable(version).1;
            connection.abort(if refused { ConnectionError::Refused } else { ConnectionError::Unreachable });
            self.serve(now, id);
        }
    }

    /// Listens on an address and port; the unspecified address means all of its family. The ports of the
    /// configuration are redirected to from now on (`S6`).
    ///
    /// # Errors
    /// Somebody listens there, the port is 0, or this end connects.
    pub fn listen(&mut self, socket: SocketAddr) -> Result<(), EndpointError> {
        if matches!(self.machine, Machine::Client { .. }) {
            return Err(EndpointError::Role);
        }
        if socket.port() == 0 || socket.ip().is_multicast() {
            return Err(EndpointError::Unusable(socket));
        }
        if !self.listeners.insert(socket) {
            return Err(EndpointError::InUse(socket));
        }
        self.tell_listening(socket);
        Ok(())
    }

    /// Ends a listener; what it has not accepted is reset.
    pub fn stop_listening(&mut self, now: Instant, socket: SocketAddr) {
        let mut ids: Vec<ConnectionId> = self.listeners.remove(socket).into();
        let of_listener = |id: &ConnectionId| {
            self.connections.get(id).is_some_and(|connection| connection.listener == Some(socket))
        };
        ids.extend(self.listeners.half_open_ids().filter(of_listener));
        for id in ids {
            if let Some(connection) = self.connections.get_mut(&id) {
                connection.abort(ConnectionError::Aborted);
                connection.released = true;
            }
            self.serve(now, id);
        }
        self.tell_listening(socket);
    }

    /// S6: tells the machine which of its service ports somebody listens on.
    fn tell_listening(&mut self, changed: SocketAddr) {
        let Machine::Server(server) = &mut self.machine else { return };
        let listening: Vec<(SocketAddr, bool)> = self
            .services
            .iter()
            .map(ServicePorts::service_socket)
            .filter(|service| service.port() == changed.port())
            .map(|service| (service, self.listeners.find(service).is_some()))
            .collect();
        for (service, listening) in listening {
            server.set_listening(service, listening);
        }
    }

    /// Takes an established connection from a listener's queue.
    pub fn accept(&mut self, now: Instant, socket: SocketAddr) -> Option<ConnectionId> {
        let id = self.listeners.accept(socket)?;
        while let Some(held) = self.listeners.take_held(socket) {
            let packet = self.connections.get_mut(&held).and_then(|connection| connection.held.take());
            if let Some(packet) = packet {
                self.receive(now, held, &packet);
            }
        }
        Some(id)
    }

    /// Whether a listener has more to accept.
    pub fn has_more(&self, socket: SocketAddr) -> bool {
        self.listeners.has_more(socket)
    }

    /// Whether anybody listens on exactly this socket.
    pub fn is_listening(&self, socket: SocketAddr) -> bool {
        self.listeners.contains(socket)
    }

    /// Listeners that have something to accept, or are gone, since the last call.
    pub fn take_acceptable(&mut self) -> Vec<SocketAddr> {
        self.listeners.take_acceptable()
    }
}

/// Type of "destination unreachable", and its code for a port.
fn unreachable(version: Version) -> (u8, u8) {
    match version {
        Version::V4 => (3, 3),
        Version::V6 => (1, 4),
    }
}
