//! §5: a client that goes on from another own port. The local TCP keeps knowing it under the first.

use std::net::SocketAddr;

use super::config::ServerEvent;
use super::half_open::Key;
use super::{Port, Server, Towards};
use crate::redirect::announce::Announcement;
use crate::redirect::numbers::NumbersOf;
use crate::time::Instant;
use crate::wire::{Packet, RedirectOption};

/// Own ports that one client may go through while its connection lasts (`P4`).
const MAX_REBINDS: usize = 4;

/// A connection whose client has changed its port.
#[derive(Debug, Clone)]
pub(super) struct Rebind {
    /// The present port on the wire.
    port: u16,
    /// All that it had, but the one the local TCP knows.
    ports: Vec<u16>,
    /// C P=p', until a segment comes from there, and until when at the most.
    announcement: Option<Announcement>,
    give_up: Instant,
}

impl Rebind {
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.announcement.as_ref().map(|said| said.deadline().min(self.give_up))
    }
}

impl Server {
    /// Shows a segment of the client to the local TCP with the port that it knows; says which connection it is of.
    pub(super) fn on_rebound_remote(&mut self, now: Instant, packet: &mut Packet) -> Option<Key> {
        let (source, service) = packet.source_socket().zip(packet.destination_socket())?;
        let wire = Key { client: source, service };
        let Some(client) = self.rebound.get(&wire).copied() else { return Some(wire) };
        packet.set_source_port(client.port());
        let key = Key { client, service };
        if let Some(rebind) = self.rebinds.get_mut(&key)
            && rebind.port == source.port()
            && rebind.announcement.take().is_some()
        {
            self.schedule(now, key);
        }
        Some(key)
    }

    /// `P2`: R P=p' on a segment of the client.
    pub(super) fn on_rebind_asked(
        &mut self,
        now: Instant,
        key: Key,
        packet: &Packet,
        port: u16,
        numbers: NumbersOf<'_>,
    ) {
        let Some(tcp) = packet.tcp() else { return };
        let known = numbers(key.service, key.client);
        if !known.is_some_and(|known| known.exact(&tcp)) {
            self.counters.rebinds_inexact += 1;
            return;
        }
        let wire = Key { client: SocketAddr::new(key.client.ip(), port), service: key.service };
        let option = RedirectOption { confirm: true, port: Some(port), ..RedirectOption::default() };
        let give_up = now + self.redirect_timeout;
        if let Some(rebind) = self.rebinds.get_mut(&key).filter(|rebind| rebind.port == port) {
            // It has not heard the confirmation.
            let again = || Announcement::new(now, option, known);
            rebind.announcement.get_or_insert_with(again).hasten(now);
            rebind.give_up = give_up;
            self.schedule(now, key);
            return;
        }
        let ours = matches!(self.ports.get(&key.service), Some(Port::Service(_)));
        let taken = port == key.client.port()
            || self.rebound.contains_key(&wire)
            || numbers(key.service, wire.client).is_some();
        let many = self.rebinds.get(&key).is_some_and(|rebind| rebind.ports.len() >= MAX_REBINDS);
        if !ours || taken || many || self.rebound.len() >= self.redirect_limit {
            self.counters.rebinds_refused += 1;
            return;
        }
        let announcement = Announcement::new(now, option, known);
        let new = Rebind { port, ports: Vec::new(), announcement: None, give_up };
        let rebind = self.rebinds.entry(key).or_insert(new);
        (rebind.port, rebind.give_up) = (port, give_up);
        rebind.ports.push(port);
        rebind.announcement = Some(announcement);
        self.rebound.insert(wire, key.client);
        self.counters.rebinds += 1;
        self.schedule(now, key);
        self.report(ServerEvent::Rebound { client: key.client, service: key.service, port });
    }

    /// A segment of the local TCP goes to the client's present port.
    pub(super) fn on_rebound_local(&mut self, now: Instant, key: Key, packet: &mut Packet) {
        let (exid, mtu) = (self.exid, self.mtu);
        let Some(rebind) = self.rebinds.get_mut(&key) else { return };
        packet.set_destination_port(rebind.port);
        let said = rebind
            .announcement
            .as_mut()
            .is_some_and(|announcement| announcement.on_local(now, packet, exid, mtu));
        if said {
            self.schedule(now, key);
        }
    }

    /// The ends of a connection as segments to the client carry them.
    pub(super) fn wire_ends(&self, key: Key) -> (SocketAddr, SocketAddr) {
        let port = self.rebinds.get(&key).map_or(key.client.port(), |rebind| rebind.port);
        (key.service, SocketAddr::new(key.client.ip(), port))
    }

    pub(super) fn on_rebind_timer(&mut self, now: Instant, key: Key) {
        let (exid, mtu, ends) = (self.exid, self.mtu, self.wire_ends(key));
        let Some(rebind) = self.rebinds.get_mut(&key) else { return };
        if now >= rebind.give_up {
            // A client that is still there asks again.
            rebind.announcement = None;
        }
        let said = rebind.announcement.as_mut().and_then(|said| said.poll(now, ends, exid, mtu));
        if let Some(packet) = said {
            self.transmit(Towards::Network, packet);
        }
        self.schedule(now, key);
    }

    pub(super) fn forget_rebind(&mut self, key: Key) {
        let Some(rebind) = self.rebinds.remove(&key) else { return };
        for port in rebind.ports {
            self.rebound.remove(&Key { client: SocketAddr::new(key.client.ip(), port), ..key });
        }
    }
}
