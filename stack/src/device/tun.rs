//! TUN through tun-rs: whole packets, among them super-packets with the checksum left to whom it may concern.

use std::cell::RefCell;
use std::io::{self, IoSlice, IoSliceMut};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use bytes::BytesMut;
use tun_rs::{AsyncDevice, DeviceBuilder, DeviceBuilderGuard};

use super::{Device, MAX_PACKET, explain};
use crate::wire::{Offload, Packet, VNET_LEN, read_vnet, write_vnet};

/// Room behind the MTU in a buffer offered to the device: an option inserted later finds it free.
const SLACK: usize = 128;

/// Packets that wait for us in the kernel. Its default, 500, is less than thousands of connections closing at once make,
/// and what does not fit is dropped without a word to the sender.
const QUEUE_LEN: u32 = 4096;

/// Packets in a row within the MTU after which no more is expected.
const PATIENCE: u32 = 256;

thread_local! {
    /// Takes what is longer than expected, so that no packet is ever cut.
    static OVERFLOW: RefCell<Box<[u8]>> = RefCell::new(vec![0; MAX_PACKET + 1].into());
}

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
    /// Whether packets of up to 64 KiB pass in one piece, and checksums are left to who sends them on.
    pub super_packets: bool,
    /// Whether there may be more [queues](Device::queue) than the first.
    pub multi_queue: bool,
}

impl TunOptions {
    /// A device of this name, up, with the kernel's default MTU, super-packets and one queue.
    pub fn new(name: impl Into<String>) -> Self {
        TunOptions { name: name.into(), mtu: None, up: true, super_packets: true, multi_queue: false }
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
    /// How much the caller's buffer offers: the longest packet of late, at least an MTU.
    expected: AtomicUsize,
    /// Packets in a row that did not need it.
    short: AtomicU32,
    truncated: AtomicU64,
    malformed: AtomicU64,
    segmented: AtomicU64,
    told: Once,
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
    /// runtime. A kernel without super-packets gives a device without.
    ///
    /// # Errors
    /// /dev/net/tun is missing, privileges are, the name is taken or none; the message says what to do.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn create(options: impl Into<TunOptions>) -> io::Result<TunDevice> {
        let options = options.into();
        let failed = |error: io::Error| explain(&options.name, &error);
        let inner = match build(&options, options.super_packets) {
            Err(error) if options.super_packets => build(&options, false).map_err(|_| error).inspect(|_| {
                tracing::warn!(
                    device = options.name,
                    "this kernel has no super-packets: packets pass one by one"
                );
            }),
            built => built,
        };
        let inner = inner.map_err(failed)?;
        inner.set_tx_queue_len(QUEUE_LEN).map_err(failed)?;
        let actual = inner.name().map_err(failed)?;
        let mtu = usize::from(inner.mtu().map_err(failed)?);
        Ok(TunDevice::over(inner, actual, mtu))
    }

    fn over(inner: AsyncDevice, name: String, mtu: usize) -> TunDevice {
        TunDevice {
            inner,
            name,
            mtu: AtomicUsize::new(mtu),
            expected: AtomicUsize::new(mtu),
            short: AtomicU32::new(0),
            truncated: AtomicU64::new(0),
            malformed: AtomicU64::new(0),
            segmented: AtomicU64::new(0),
            told: Once::new(),
        }
    }

    /// Packets thrown away because they did not fit the largest buffer: none but through a fault of the kernel.
    pub fn truncated(&self) -> u64 {
        self.truncated.load(Ordering::Relaxed)
    }

    /// Packets thrown away because the kernel said of them what cannot be.
    pub fn malformed(&self) -> u64 {
        self.malformed.load(Ordering::Relaxed)
    }

    /// Bytes that the kernel puts in front of a packet, and expects there.
    fn header_len(&self) -> usize {
        if self.inner.tcp_gso() { VNET_LEN } else { 0 }
    }

    /// One attempt to read. `Ok(None)`: a packet was counted and thrown away.
    fn try_recv(&self, buffer: &mut BytesMut) -> io::Result<Option<Offload>> {
        let expected = self.expected.load(Ordering::Relaxed);
        buffer.reserve((expected + SLACK).saturating_sub(buffer.len()));
        buffer.resize(expected, 0);
        let mut header = [0; VNET_LEN];
        let header = &mut header[..self.header_len()];
        let read = OVERFLOW.with_borrow_mut(|overflow| {
            let room = header.len() + expected + overflow.len();
            let mut slices =
                [IoSliceMut::new(header), IoSliceMut::new(&mut buffer[..]), IoSliceMut::new(overflow)];
            let read = self.inner.try_recv_vectored(&mut slices)?;
            let length = read.saturating_sub(header.len());
            if let Some(more) = length.checked_sub(expected).filter(|_| read < room) {
                buffer.extend_from_slice(&overflow[..more]);
            }
            buffer.truncate(length);
            Ok((length, read >= room))
        });
        let (length, cut) = match read {
            Ok(read) => read,
            Err(error) => {
                buffer.clear();
                return Err(error);
            }
        };
        self.expect(length, expected);
        if cut {
            self.truncated.fetch_add(1, Ordering::Relaxed);
            return Ok(None);
        }
        if header.is_empty() {
            return Ok(Some(Offload::default()));
        }
        let offload = read_vnet(header, buffer);
        if let Err(error) = offload {
            self.malformed.fetch_add(1, Ordering::Relaxed);
            tracing::debug!(device = self.name, %error, "dropped what the kernel describes wrongly");
        }
        Ok(offload.ok())
    }

    /// Follows what packets are like: filling a large buffer with zeros for each small one costs more than the rest.
    fn expect(&self, length: usize, expected: usize) {
        let mtu = self.mtu.load(Ordering::Relaxed);
        if length > expected {
            self.expected.store(if length > mtu { MAX_PACKET } else { length }, Ordering::Relaxed);
        }
        if length > mtu {
            self.short.store(0, Ordering::Relaxed);
        } else if expected > mtu && self.short.fetch_add(1, Ordering::Relaxed) >= PATIENCE {
            self.short.store(0, Ordering::Relaxed);
            self.expected.store(mtu, Ordering::Relaxed);
        }
    }

    /// Writes a packet and says nothing about it.
    async fn send_bare(&self, packet: &[u8]) -> io::Result<()> {
        // All zeros: a whole packet with a complete checksum.
        let header = [0; VNET_LEN];
        let slices = [IoSlice::new(&header[..self.header_len()]), IoSlice::new(packet)];
        self.inner.send_vectored(&slices).await.map(drop)
    }

    /// Does here what was left to the device.
    pub(super) async fn send_segments(&self, packet: &Packet) -> io::Result<()> {
        for segment in packet.segments() {
            self.send_bare(segment.bytes()).await?;
        }
        Ok(())
    }

    /// A super-packet that the kernel refused.
    pub(super) async fn send_refused(&self, packet: &Packet, refusal: &io::Error) -> io::Result<()> {
        self.send_segments(packet).await?;
        self.segmented.fetch_add(1, Ordering::Relaxed);
        self.told.call_once(|| {
            tracing::warn!(device = self.name, %refusal, "the kernel takes no super-packets: they are cut here, which is slow");
        });
        Ok(())
    }
}

/// Whether the kernel may mean that it does not know such segments.
fn is_refusal(error: &io::Error) -> bool {
    use nix::libc::{EINVAL, EIO, EOPNOTSUPP};
    matches!(error.raw_os_error(), Some(EINVAL | EIO | EOPNOTSUPP))
}

fn build(options: &TunOptions, super_packets: bool) -> io::Result<AsyncDevice> {
    let mut builder = DeviceBuilder::new().name(options.name.as_str()).enable(options.up);
    if let Some(mtu) = options.mtu {
        builder = builder.mtu(mtu);
    }
    let offload = |builder: &mut DeviceBuilderGuard<'_>| {
        builder.offload(super_packets).multi_queue(options.multi_queue);
    };
    builder.with(offload).build_async()
}

impl Device for TunDevice {
    async fn recv(&self, buffer: &mut BytesMut) -> io::Result<Offload> {
        loop {
            // Packets that never end must not keep other tasks out.
            tokio::task::consume_budget().await;
            match self.try_recv(buffer) {
                Ok(Some(offload)) => return Ok(offload),
                Ok(None) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.inner.readable().await?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    async fn send(&self, packet: &Packet) -> io::Result<()> {
        let offload = packet.offload();
        if offload == Offload::default() {
            return self.send_bare(packet.bytes()).await;
        }
        if self.header_len() == 0 {
            return self.send_segments(packet).await;
        }
        let header = write_vnet(packet);
        let slices = [IoSlice::new(&header), IoSlice::new(packet.bytes())];
        match self.inner.send_vectored(&slices).await {
            Ok(_) => Ok(()),
            Err(error) if offload.gso.is_some() && is_refusal(&error) => {
                self.send_refused(packet, &error).await
            }
            Err(error) => Err(error),
        }
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

    fn takes_super_packets(&self) -> bool {
        self.header_len() > 0
    }

    fn segmented(&self) -> u64 {
        self.segmented.load(Ordering::Relaxed)
    }

    fn queue(&self) -> io::Result<Self> {
        let failed = |error: io::Error| {
            io::Error::new(error.kind(), format!("the TUN device {} gets no other queue: {error}", self.name))
        };
        let inner = self.inner.try_clone().map_err(failed)?;
        Ok(TunDevice::over(inner, self.name.clone(), self.mtu.load(Ordering::Relaxed)))
    }
}
