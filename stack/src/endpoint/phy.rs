//! One connection's view of the network, as smoltcp wants it: at most one packet in, packets out while there is room.

use std::num::NonZeroUsize;

use bytes::BytesMut;
use smoltcp::phy::{Checksum, ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;

/// Free bytes behind an emitted packet: the redirect option is inserted there without another allocation.
const HEADROOM: usize = 48;
/// Buffers of each kind kept for reuse.
const POOL: usize = 128;
/// What is longer was a super-packet.
const LARGE: usize = 16 << 10;

/// Buffers to be filled anew. They keep their length, and what they are given to hold later overwrites the old: filling
/// them with zeros first would cost as much as the rest. So those of super-packets stand apart.
#[derive(Debug, Default)]
pub(super) struct Pool {
    small: Vec<BytesMut>,
    large: Vec<BytesMut>,
}

impl Pool {
    /// A buffer of any length, if possible such as held a packet of about `length` bytes.
    pub(super) fn take(&mut self, length: usize) -> BytesMut {
        let kind = if length > LARGE { &mut self.large } else { &mut self.small };
        kind.pop().unwrap_or_default()
    }

    pub(super) fn give(&mut self, buffer: BytesMut) {
        let kind = if buffer.len() > LARGE { &mut self.large } else { &mut self.small };
        if kind.len() < POOL {
            kind.push(buffer);
        }
    }
}

/// How large packets may be, as smoltcp is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) mtu: usize,
    /// The longest super-packet, if there may be any.
    pub(super) super_packet: Option<NonZeroUsize>,
}

pub(super) struct Phy<'p> {
    /// The packet that arrived.
    pub(super) rx: Option<&'p [u8]>,
    /// What is to be sent.
    pub(super) tx: &'p mut Vec<BytesMut>,
    /// How many packets `tx` may hold; the answer to a received one always finds room.
    pub(super) room: usize,
    pub(super) shape: Shape,
    pub(super) pool: &'p mut Pool,
}

impl Device for Phy<'_> {
    type RxToken<'a>
        = Rx<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = Tx<'a>
    where
        Self: 'a;

    fn receive(&mut self, _: Instant) -> Option<(Rx<'_>, Tx<'_>)> {
        let packet = self.rx.take()?;
        Some((Rx(packet), Tx { tx: self.tx, pool: self.pool }))
    }

    fn transmit(&mut self, _: Instant) -> Option<Tx<'_>> {
        (self.tx.len() < self.room).then_some(Tx { tx: self.tx, pool: self.pool })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        capabilities(self.shape)
    }
}

/// Transport checksums of arriving packets are checked before, where it is known whether they are complete; those of
/// packets that leave are computed behind, or by the device.
fn capabilities(shape: Shape) -> DeviceCapabilities {
    let mut capabilities = DeviceCapabilities::default();
    capabilities.medium = Medium::Ip;
    // It drops IPv6 packets above the MTU even where they are super-packets.
    capabilities.max_transmission_unit = shape.super_packet.map_or(shape.mtu, NonZeroUsize::get);
    capabilities.segmentation.tcpv4 = shape.super_packet;
    capabilities.segmentation.tcpv6 = shape.super_packet;
    let mut checksum = ChecksumCapabilities::default();
    checksum.tcp = Checksum::None;
    capabilities.checksum = checksum;
    capabilities
}

pub(super) struct Rx<'p>(&'p [u8]);

impl RxToken for Rx<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

pub(super) struct Tx<'p> {
    tx: &'p mut Vec<BytesMut>,
    pool: &'p mut Pool,
}

impl TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut buffer = self.pool.take(length);
        buffer.truncate(length);
        buffer.reserve(length + HEADROOM - buffer.len());
        buffer.resize(length, 0);
        let result = f(&mut buffer);
        self.tx.push(buffer);
        result
    }
}
