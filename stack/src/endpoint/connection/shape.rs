//! How large a connection's packets are, and what is left to the device.

use std::net::IpAddr;
use std::num::NonZeroUsize;

use bytes::BytesMut;
use smoltcp::iface::{Config, Interface};
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr};

use super::{Connection, time};
use crate::endpoint::phy::{Phy, Pool, Shape};
use crate::time::Instant;
use crate::wire::{Packet, Rejected};

/// The link under all connections.
#[derive(Debug, Clone, Copy)]
pub(in crate::endpoint) struct LinkShape {
    pub(in crate::endpoint) mtu: usize,
    /// Whether the device takes super-packets.
    pub(in crate::endpoint) super_packets: bool,
}

/// What a peer takes that does not say (RFC 9293, MUST-15); smoltcp has the same for IPv6.
pub(super) const DEFAULT_MSS: usize = 536;
/// A peer that wants less gets this much, by smoltcp and by Linux.
pub(super) const LEAST_MSS: usize = 48;
/// The longest packet that its length fields can tell.
const MAX_PACKET: usize = 65_535;

/// An interface with one address. It holds no state of the connection but the shape of its packets.
pub(super) fn interface(now: Instant, address: IpAddr, shape: Shape, seed: u64) -> Interface {
    let mut config = Config::new(HardwareAddress::Ip);
    config.random_seed = seed;
    let mut phy = Phy { rx: None, tx: &mut Vec::new(), room: 0, shape, pool: &mut Pool::default() };
    let mut interface = Interface::new(config, &mut phy, time(now));
    let prefix = if address.is_ipv4() { 32 } else { 128 };
    interface.update_ip_addrs(|addresses| {
        // One of at least one place.
        let _ = addresses.push(IpCidr::new(IpAddress::from(address), prefix));
    });
    interface
}

impl Connection {
    /// Lowers the path MTU; says whether it did.
    pub(in crate::endpoint) fn lower_mtu(&mut self, now: Instant, mtu: usize) -> bool {
        let least = if self.key.peer.is_ipv4() { 576 } else { 1280 };
        let mtu = mtu.max(least);
        if mtu >= self.mtu {
            return false;
        }
        self.mtu = mtu;
        self.reshape(now);
        true
    }

    /// Makes its segments small enough for `bytes` of option each (W3).
    pub(in crate::endpoint) fn reserve(&mut self, now: Instant, bytes: usize) {
        self.reserved = bytes;
        self.reshape(now);
    }

    /// Payload of the largest segment that the path and the peer take.
    pub(in crate::endpoint) fn segment(&self) -> usize {
        (self.mtu - self.reserved - self.headers()).min(self.peer_mss)
    }

    /// Bytes in front of the payload: smoltcp writes neither IP options nor extension headers, nor TCP options behind
    /// the handshake.
    pub(super) fn headers(&self) -> usize {
        if self.key.local.is_ipv4() { 40 } else { 60 }
    }

    /// Follows what packets may be like. Super-packets have to wait until data was acknowledged: before, a handover may
    /// be open (C10), which says so on what has room (W3).
    pub(super) fn reshape(&mut self, now: Instant) {
        let acknowledged = self.windows.acknowledged().is_some_and(|(una, _)| una.after(self.first));
        let whole = (MAX_PACKET - self.headers()) / self.segment().max(1) * self.segment();
        let wanted =
            self.super_packets && self.reserved == 0 && (self.shape.super_packet.is_some() || acknowledged);
        let super_packet =
            NonZeroUsize::new(self.headers() + whole).filter(|_| wanted && whole > self.segment());
        let shape = Shape { mtu: self.mtu - self.reserved, super_packet };
        if shape != self.shape {
            self.shape = shape;
            self.interface = interface(now, self.key.local.ip(), shape, self.seed);
        }
    }

    /// Makes a packet of what smoltcp wrote, and remembers that it is sent.
    pub(in crate::endpoint) fn finish_packet(&mut self, mut buffer: BytesMut) -> Result<Packet, Rejected> {
        self.windows.put_right(&mut buffer, self.headers() - 20);
        let mut packet = Packet::parse_unsummed(buffer, self.segment())?;
        let bare = packet.tcp().is_none_or(|tcp| tcp.payload().is_empty());
        // What carries no data costs nothing, and may be kept, or get an option.
        if bare || !self.super_packets {
            packet.complete_checksum();
        }
        self.note_sent(&packet);
        Ok(packet)
    }
}
