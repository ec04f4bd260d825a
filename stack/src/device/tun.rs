//! TUN through tun-rs, one queue, whole packets with complete checksums.

use std::io::{self, IoSliceMut};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use bytes::BytesMut;
use tun_rs::{AsyncDevice, DeviceBuilder};

use super::{Device, MAX_PACKET, explain};
use crate::wire::{Offload, Packet};

/// Room behind the MTU in a buffer offered to the device: an option inserted later finds it free.
const SLACK: usize = 128;

/// Packets that wait for us in the kernel. Its default, 500, is less than thousands of connections closing at once make,
/// and what does not fit is dropped without a word to the sender.
const QUEUE_LEN: u32 = 4096;

/// How a [`TunDevice`] is made.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TunOptions {
    /// The interface's name, 1 to 15 bytes; a `%d` in it becomes the first free number.
    pub name: String,
    /// The MTU to set, in bytes; the kernel's default (1500) if `None`.
    pub mtu: Option<u16>,
    /// Whether the interface is up from the start.
    pub up: bool,
}

impl TunOptions {
    /// A device of this name, up, with the kernel's default MTU.
    pub fn new(name: impl Into<String>) -> Self {
        TunOptions { name: name.into(), mtu: None, up: true }
    }
}

impl From<&str> for TunOptions {
    fn from(name: &str) -> Self {
        TunOptions::new(name)
    }
}

impl From<&String> for TunOptions {
    fn from(name: &String) -> Self {
        TunOptions::new(name)
    }
}

/// A TUN device of the kernel. It vanishes, with its routes, when dropped.
pub struct TunDevice {
    inner: AsyncDevice,
    name: String,
    /// As last read.
    mtu: AtomicUsize,
    /// How much the caller's buffer offers: the longest packet so far, at least an MTU.
    expected: AtomicUsize,
    /// Takes what is longer than expected, so that no packet is ever cut.
    overflow: Mutex<Box<[u8]>>,
    truncated: AtomicU64,
}

impl TunDevice {
    /// A device of this name with the default options; see [`create`](Self::create).
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn open(name: &str) -> io::Result<TunDevice> {
        TunDevice::create(name)
    }

    /// Creates the interface, in the network namespace of the calling thread, and registers it with the present tokio
    /// runtime.
    ///
    /// # Errors
    /// /dev/net/tun is missing, privileges are, the name is taken or none; the message says what to do.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn create(options: impl Into<TunOptions>) -> io::Result<TunDevice> {
        let TunOptions { name, mtu, up } = options.into();
        let failed = |error: io::Error| explain(&name, &error);
        let mut builder = DeviceBuilder::new().name(name.as_str()).enable(up);
        if let Some(mtu) = mtu {
            builder = builder.mtu(mtu);
        }
        let inner = builder.build_async().map_err(failed)?;
        inner.set_tx_queue_len(QUEUE_LEN).map_err(failed)?;
        let actual = inner.name().map_err(failed)?;
        let mtu = usize::from(inner.mtu().map_err(failed)?);
        Ok(TunDevice {
            inner,
            name: actual,
            mtu: AtomicUsize::new(mtu),
            expected: AtomicUsize::new(mtu),
            overflow: Mutex::new(vec![0; MAX_PACKET + 1].into()),
            truncated: AtomicU64::new(0),
        })
    }

    /// Packets thrown away because they did not fit the largest buffer: none but through a fault of the kernel.
    pub fn truncated(&self) -> u64 {
        self.truncated.load(Ordering::Relaxed)
    }

    /// One attempt to read. `Ok(false)`: a packet was cut, counted and thrown away.
    fn try_recv(&self, buffer: &mut BytesMut) -> io::Result<bool> {
        let expected = self.expected.load(Ordering::Relaxed);
        buffer.reserve((expected + SLACK).saturating_sub(buffer.len()));
        buffer.resize(expected, 0);
        let mut overflow = self.overflow.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let room = expected + overflow.len();
        let mut slices = [IoSliceMut::new(&mut buffer[..]), IoSliceMut::new(&mut overflow[..])];
        let length = match self.inner.try_recv_vectored(&mut slices) {
            Ok(length) => length,
            Err(error) => {
                buffer.clear();
                return Err(error);
            }
        };
        if length >= room {
            self.truncated.fetch_add(1, Ordering::Relaxed);
            buffer.clear();
            return Ok(false);
        }
        if length > expected {
            buffer.extend_from_slice(&overflow[..length - expected]);
            self.expected.store(length, Ordering::Relaxed);
        }
        buffer.truncate(length);
        Ok(true)
    }
}

impl Device for TunDevice {
    async fn recv(&self, buffer: &mut BytesMut) -> io::Result<Offload> {
        loop {
            self.inner.readable().await?;
            match self.try_recv(buffer) {
                Ok(true) => return Ok(Offload::default()),
                Ok(false) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    async fn send(&self, packet: &Packet) -> io::Result<()> {
        self.inner.send(packet.bytes()).await.map(drop)
    }

    fn mtu(&self) -> usize {
        // In another namespace than the device's the question fails; the last answer then stands.
        if let Ok(mtu) = self.inner.mtu() {
            self.mtu.store(usize::from(mtu), Ordering::Relaxed);
        }
        self.mtu.load(Ordering::Relaxed)
    }

    fn name(&self) -> &str {
        &self.name
    }
}
