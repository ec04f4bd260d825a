//! TUN through tun-tap: the plainest there is.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use bytes::BytesMut;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tun_tap::{Iface, Mode};

use super::{Device, MAX_PACKET, explain};
use crate::wire::{Offload, Packet};

/// The kernel's default MTU of a TUN device, in bytes.
const DEFAULT_MTU: usize = 1500;

/// A TUN device of the kernel by the crate `tun-tap`, without packet information. It vanishes when dropped.
///
/// It is made down and with the kernel's MTU; whoever configures the interface changes that.
pub struct PlainTun {
    inner: AsyncFd<Iface>,
    name: String,
    mtu: AtomicUsize,
    /// What a packet is read into first, one byte longer than any.
    scratch: Mutex<Box<[u8]>>,
    truncated: AtomicU64,
}

impl PlainTun {
    /// Creates the interface, in the network namespace of the calling thread, and registers it with the present tokio
    /// runtime.
    ///
    /// # Errors
    /// /dev/net/tun is missing, privileges are, the name is taken or none; the message says what to do.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn open(name: &str) -> io::Result<PlainTun> {
        let failed = |error: io::Error| explain(name, &error);
        if name.is_empty() || name.len() > 15 || name.contains(['\0', '/']) {
            return Err(failed(io::ErrorKind::InvalidInput.into()));
        }
        let iface = Iface::without_packet_info(name, Mode::Tun).map_err(failed)?;
        iface.set_non_blocking().map_err(failed)?;
        let name = iface.name().to_owned();
        Ok(PlainTun {
            inner: register(iface)?,
            name,
            mtu: AtomicUsize::new(DEFAULT_MTU),
            scratch: Mutex::new(vec![0; MAX_PACKET + 1].into()),
            truncated: AtomicU64::new(0),
        })
    }

    /// Packets thrown away because they did not fit the largest buffer: none but through a fault of the kernel.
    pub fn truncated(&self) -> u64 {
        self.truncated.load(Ordering::Relaxed)
    }

    fn try_recv(&self, iface: &Iface, buffer: &mut BytesMut) -> io::Result<bool> {
        let mut scratch = self.scratch.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let length = iface.recv(&mut scratch)?;
        buffer.clear();
        if length == scratch.len() {
            self.truncated.fetch_add(1, Ordering::Relaxed);
            return Ok(false);
        }
        buffer.extend_from_slice(&scratch[..length]);
        Ok(true)
    }
}

#[allow(unsafe_code)]
fn register(iface: Iface) -> io::Result<AsyncFd<Iface>> {
    // SAFETY: an `Iface` owns its open file and names the same descriptor as long as it lives.
    unsafe { AsyncFd::register(iface) }.map_err(io::Error::from)
}

impl Device for PlainTun {
    async fn recv(&self, buffer: &mut BytesMut) -> io::Result<Offload> {
        // A deleted interface reports an error condition only, which the read then returns.
        let interest = Interest::READABLE | Interest::ERROR;
        while !self.inner.async_io(interest, |iface| self.try_recv(iface, buffer)).await? {}
        Ok(Offload::default())
    }

    async fn send(&self, packet: &Packet) -> io::Result<()> {
        let send = async |packet: &[u8]| {
            self.inner.async_io(Interest::WRITABLE, |iface| iface.send(packet)).await.map(drop)
        };
        if packet.offload() == Offload::default() {
            return send(packet.bytes()).await;
        }
        for segment in packet.segments() {
            send(segment.bytes()).await?;
        }
        Ok(())
    }

    fn mtu(&self) -> usize {
        // Where sysfs shows another namespace the last answer stands.
        let path = format!("/sys/class/net/{}/mtu", self.name);
        if let Some(mtu) = std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()) {
            self.mtu.store(mtu, Ordering::Relaxed);
        }
        self.mtu.load(Ordering::Relaxed)
    }

    fn name(&self) -> &str {
        &self.name
    }
}
