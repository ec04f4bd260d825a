//! A link without a kernel: two ends, a bounded queue each way.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use tokio::sync::Notify;

use super::Device;
use crate::wire::{Offload, Packet};

/// One end of a link in memory.
///
/// Like a network interface it does not wait for the other end: what finds the queue full is dropped and counted.
pub struct MemoryDevice {
    name: &'static str,
    mtu: usize,
    /// What the other end sent.
    inbound: Arc<Lane>,
    /// What this end sends.
    outbound: Arc<Lane>,
}

/// One direction.
struct Lane {
    capacity: usize,
    queue: Mutex<VecDeque<(Bytes, Offload)>>,
    arrived: Notify,
    /// One of the ends is gone.
    closed: AtomicBool,
    dropped: AtomicU64,
}

impl Lane {
    fn new(capacity: usize) -> Arc<Lane> {
        Arc::new(Lane {
            capacity,
            queue: Mutex::default(),
            arrived: Notify::new(),
            closed: AtomicBool::new(false),
            dropped: AtomicU64::new(0),
        })
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<(Bytes, Offload)>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.arrived.notify_waiters();
        // For who has looked at `closed` and is about to wait.
        self.arrived.notify_one();
    }
}

impl MemoryDevice {
    /// The two ends of a link that takes packets of up to `mtu` bytes and holds `capacity` packets each way.
    pub fn pair(mtu: usize, capacity: usize) -> (MemoryDevice, MemoryDevice) {
        let (there, back) = (Lane::new(capacity), Lane::new(capacity));
        let left = MemoryDevice { name: "memory0", mtu, inbound: back.clone(), outbound: there.clone() };
        let right = MemoryDevice { name: "memory1", mtu, inbound: there, outbound: back };
        (left, right)
    }

    /// Packets of this end that found the queue full.
    pub fn dropped(&self) -> u64 {
        self.outbound.dropped.load(Ordering::Relaxed)
    }
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the other end of the link is gone")
}

impl Device for MemoryDevice {
    async fn recv(&self, buffer: &mut BytesMut) -> io::Result<Offload> {
        buffer.clear();
        loop {
            let arrived = self.inbound.arrived.notified();
            let (first, more) = {
                let mut queue = self.inbound.queue();
                (queue.pop_front(), !queue.is_empty())
            };
            if more {
                // Notifications do not add up: each receiver wakes the next.
                self.inbound.arrived.notify_one();
            }
            if let Some((packet, offload)) = first {
                buffer.extend_from_slice(&packet);
                return Ok(offload);
            }
            if self.inbound.closed.load(Ordering::Acquire) {
                self.inbound.arrived.notify_one();
                return Err(gone());
            }
            arrived.await;
        }
    }

    /// # Errors
    /// `InvalidInput` for a packet above the MTU, `BrokenPipe` if the other end is gone.
    async fn send(&self, packet: &Packet) -> io::Result<()> {
        if packet.len() > self.mtu && packet.offload().gso.is_none() {
            let message = format!("a packet of {} bytes on a link of {}", packet.len(), self.mtu);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        if self.outbound.closed.load(Ordering::Acquire) {
            return Err(gone());
        }
        let mut queue = self.outbound.queue();
        if queue.len() >= self.outbound.capacity {
            self.outbound.dropped.fetch_add(1, Ordering::Relaxed);
        } else {
            queue.push_back((Bytes::copy_from_slice(packet.bytes()), packet.offload()));
            self.outbound.arrived.notify_one();
        }
        Ok(())
    }

    fn mtu(&self) -> usize {
        self.mtu
    }

    fn name(&self) -> &str {
        self.name
    }
}

impl Drop for MemoryDevice {
    fn drop(&mut self) {
        self.inbound.close();
        self.outbound.close();
    }
}
