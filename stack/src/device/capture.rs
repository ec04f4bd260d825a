//! Recording what passes a device.

use std::borrow::Borrow;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::BytesMut;

use super::Device;
use super::capture_writer::{Queue, Record, Writer};
use crate::wire::{Offload, Packet};

/// Which way a packet went, from this host's view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Read from the device.
    In,
    /// Written to the device.
    Out,
}

/// A pcapng file in the making; clones write to the same one.
///
/// A thread of its own writes to the disk, at the latest a second after the packet, and when the last clone is
/// dropped. A disk that fails or cannot follow costs packets of the capture (their number is in the file), never
/// traffic; a failure is logged once.
#[derive(Debug, Clone)]
pub struct Capture {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    queue: Arc<Queue>,
    writer: Option<std::thread::JoinHandle<()>>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.queue.close();
        if let Some(writer) = self.writer.take() {
            // It ends in any case, and there is nobody left to tell how.
            let _ = writer.join();
        }
    }
}

impl Capture {
    /// Creates the file, or empties it.
    ///
    /// # Errors
    /// It cannot be created or written to.
    pub fn create(path: impl AsRef<Path>) -> io::Result<Capture> {
        let path = path.as_ref();
        let writer = Writer::new(File::create(path)?, path.to_owned())?;
        let queue = Arc::new(Queue::default());
        let writer = {
            let queue = Arc::clone(&queue);
            std::thread::Builder::new().name("capture".to_owned()).spawn(move || writer.run(&queue))?
        };
        Ok(Capture { shared: Arc::new(Shared { queue, writer: Some(writer) }) })
    }

    /// Records a packet (IP header first) that passed `interface` at `now`. Does not block on the disk.
    pub fn record(&self, direction: Direction, interface: &str, packet: &[u8], now: SystemTime) {
        let time = now.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        self.shared.queue.push(interface, || Record {
            direction,
            interface: interface.into(),
            packet: packet.into(),
            time,
        });
    }

    /// Packets that were not recorded because the disk failed or could not follow.
    pub fn lost(&self) -> u64 {
        self.shared.queue.lost()
    }
}

/// A device whose traffic is recorded.
pub struct Captured<D> {
    device: D,
    capture: Capture,
}

impl<D> Captured<D> {
    /// Records into `capture` what `device` receives and sends.
    // By value or shared: the choice is the caller's, cloning is cheap.
    pub fn new(device: D, capture: impl Borrow<Capture>) -> Self {
        Captured { device, capture: capture.borrow().clone() }
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }
}

impl<D: Device> Device for Captured<D> {
    async fn recv(&self, buffer: &mut BytesMut) -> io::Result<Offload> {
        let offload = self.device.recv(buffer).await?;
        self.capture.record(Direction::In, self.device.name(), buffer, SystemTime::now());
        Ok(offload)
    }

    async fn send(&self, packet: &Packet) -> io::Result<()> {
        let now = SystemTime::now();
        self.device.send(packet).await?;
        self.capture.record(Direction::Out, self.device.name(), packet.bytes(), now);
        Ok(())
    }

    fn mtu(&self) -> usize {
        self.device.mtu()
    }

    fn name(&self) -> &str {
        self.device.name()
    }
}
