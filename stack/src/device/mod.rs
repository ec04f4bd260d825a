//! Packet devices behind one small trait. What a packet means is nobody's business here.
//!
//! [`TunDevice`] is the default, `PlainTun` (feature `plain-tun`) the same by another crate, [`MemoryDevice`] a link
//! without a kernel; [`Captured`] records what passes through any of them. Addresses, routes and the like are set
//! elsewhere.

mod any;
mod capture;
mod capture_writer;
mod clock;
mod memory;
#[cfg(feature = "plain-tun")]
mod plain;
#[cfg(test)]
mod tests;
mod tun;

use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use bytes::BytesMut;

pub use self::any::{AnyDevice, DeviceKind};
pub use self::capture::{Capture, Captured, Direction, not_passed_on};
pub use self::memory::MemoryDevice;
#[cfg(feature = "plain-tun")]
pub use self::plain::PlainTun;
pub use self::tun::{TunDevice, TunOptions};
pub use clock::Clock;

use crate::wire::{Offload, Packet};

/// A source and sink of IP packets, used from any number of tasks.
pub trait Device: Send + Sync {
    /// Waits for a packet and reads it to the front of `buffer` (whose old content is forgotten); says what the device
    /// left undone. Never cuts a packet short. Cancel-safe: dropping the future loses no packet.
    ///
    /// # Errors
    /// The device is gone or broken; a packet that is merely malformed is returned as it is.
    fn recv(&self, buffer: &mut BytesMut) -> impl Future<Output = io::Result<Offload>> + Send;

    /// Writes a packet, waiting for room where the device says that it has none.
    ///
    /// # Errors
    /// The device refused the packet, or is gone or down.
    fn send(&self, packet: &Packet) -> impl Future<Output = io::Result<()>> + Send;

    /// As [`send`](Self::send), for who can say what was decided about the packet. A device that records packets
    /// records that as well, unless it is empty; no other asks for it.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    fn send_because(
        &self,
        packet: &Packet,
        why: impl FnOnce() -> String + Send,
    ) -> impl Future<Output = io::Result<()>> + Send {
        drop(why);
        self.send(packet)
    }

    /// Takes notice that the packet received last is not passed on. A device that records packets records why.
    fn dropped(&self, why: impl FnOnce() -> String + Send) {
        drop(why);
    }

    /// The largest packet, in bytes, that the device takes whole. It may change while the device is open, and asking
    /// may be a system call.
    fn mtu(&self) -> usize;

    /// The interface's name.
    fn name(&self) -> &str;

    /// Whether super-packets and partial checksums cost less here than what they stand for: who makes packets may then
    /// make such.
    fn takes_super_packets(&self) -> bool {
        false
    }

    /// Super-packets cut before they were written, because the kernel did not take them.
    fn segmented(&self) -> u64 {
        0
    }

    /// Another queue of the same interface, registered with the present tokio runtime. Each packet comes by one of the
    /// queues, those of a connection mostly by the same one: the kernel goes by hashes of addresses and ports, and by what
    /// was last written where.
    ///
    /// # Errors
    /// The device has one queue only, or the kernel gives no other.
    fn queue(&self) -> io::Result<Self>
    where
        Self: Sized,
    {
        Err(io::Error::new(io::ErrorKind::Unsupported, format!("the device {} has one queue", self.name())))
    }
}

impl<D: Device> Device for Arc<D> {
    fn recv(&self, buffer: &mut BytesMut) -> impl Future<Output = io::Result<Offload>> + Send {
        (**self).recv(buffer)
    }

    fn send(&self, packet: &Packet) -> impl Future<Output = io::Result<()>> + Send {
        (**self).send(packet)
    }

    fn send_because(
        &self,
        packet: &Packet,
        why: impl FnOnce() -> String + Send,
    ) -> impl Future<Output = io::Result<()>> + Send {
        (**self).send_because(packet, why)
    }

    fn dropped(&self, why: impl FnOnce() -> String + Send) {
        (**self).dropped(why);
    }

    fn mtu(&self) -> usize {
        (**self).mtu()
    }

    fn name(&self) -> &str {
        (**self).name()
    }

    fn takes_super_packets(&self) -> bool {
        (**self).takes_super_packets()
    }

    fn segmented(&self) -> u64 {
        (**self).segmented()
    }

    fn queue(&self) -> io::Result<Self> {
        (**self).queue().map(Arc::new)
    }
}

/// What the device has to give without waiting; none if that is nothing. Takes no account of other tasks: for a bounded
/// number of packets in a row.
pub async fn recv_now(device: &impl Device, buffer: &mut BytesMut) -> Option<io::Result<Offload>> {
    let mut receiving = pin!(tokio::task::unconstrained(device.recv(buffer)));
    match poll_fn(|cx| Poll::Ready(receiving.as_mut().poll(cx))).await {
        Poll::Ready(received) => Some(received),
        Poll::Pending => None,
    }
}

/// Length of the largest packet without a jumbo payload (RFC 2675), which nothing here uses.
const MAX_PACKET: usize = 65_535;

/// Says what to do about an error of creating a TUN device; keeps its kind.
fn explain(name: &str, error: &io::Error) -> io::Error {
    use nix::libc::{EBUSY, EINVAL, ENODEV, ENXIO};
    let advice = match (error.kind(), error.raw_os_error()) {
        (io::ErrorKind::NotFound, _) | (_, Some(ENODEV | ENXIO)) => {
            "there is no /dev/net/tun: load the kernel module `tun`, or give the container the device (--device /dev/net/tun)"
        }
        (io::ErrorKind::PermissionDenied, _) => {
            "CAP_NET_ADMIN and access to /dev/net/tun are needed: run as root, or in a user and network namespace of your own (unshare -Urn)"
        }
        (_, Some(EBUSY)) => "another process has a device of this name open: stop it, or choose another name",
        (_, Some(EINVAL)) => {
            "an interface of this name exists and is no TUN device of this kind: choose another name"
        }
        (io::ErrorKind::InvalidInput, _) => {
            "an interface name has 1 to 15 bytes, none of them `/` or white space"
        }
        _ => "the kernel refuses it",
    };
    io::Error::new(error.kind(), format!("cannot create the TUN device {name}: {advice} ({error})"))
}
