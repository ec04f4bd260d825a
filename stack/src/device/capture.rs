//! Recording what passes a device.

use std::borrow::Borrow;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::thread::JoinHandle;
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
/// A thread of its own, started with the first packet, writes to the disk, at the latest a second after the packet, and
/// when the last clone is dropped. A disk that fails or cannot follow costs packets of the capture (their number is in
/// the file), never traffic; a failure is logged once.
#[derive(Debug, Clone)]
pub struct Capture {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    queue: Arc<Queue>,
    started: Once,
    stage: Mutex<Stage>,
}

#[derive(Debug)]
enum Stage {
    Idle(Box<Writer>),
    Writing(JoinHandle<()>),
    Over,
}

impl Shared {
    fn stage(&self) -> std::sync::MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Not before the first packet: the thread then has no more rights than the one that carries packets.
    fn start(&self) {
        let mut stage = self.stage();
        let Stage::Idle(writer) = std::mem::replace(&mut *stage, Stage::Over) else { return };
        let queue = Arc::clone(&self.queue);
        match std::thread::Builder::new().name("capture".to_owned()).spawn(move || writer.run(&queue)) {
            Ok(thread) => *stage = Stage::Writing(thread),
            Err(error) => {
                tracing::error!(%error, "the capture stays empty: no thread can be started");
                self.queue.close();
            }
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.queue.close();
        if let Stage::Writing(thread) = std::mem::replace(&mut *self.stage(), Stage::Over) {
            // It ends in any case, and there is nobody left to tell how.
            let _ = thread.join();
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
        let stage = Mutex::new(Stage::Idle(Box::new(writer)));
        Ok(Capture { shared: Arc::new(Shared { queue: Arc::default(), started: Once::new(), stage }) })
    }

    /// Records a packet (IP header first) that passed `interface` at `now`. Does not block on the disk.
    pub fn record(&self, direction: Direction, interface: &str, packet: &[u8], now: SystemTime) {
        self.record_because(direction, interface, packet, now, String::new);
    }

    /// As [`record`](Self::record), with a comment of what was decided about the packet, unless it is empty.
    pub fn record_because(
        &self,
        direction: Direction,
        interface: &str,
        packet: &[u8],
        now: SystemTime,
        why: impl FnOnce() -> String,
    ) {
        self.shared.started.call_once(|| self.shared.start());
        let time = now.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        self.shared.queue.push(interface, || Record {
            direction,
            interface: interface.into(),
            packet: packet.into(),
            comment: why().into(),
            time,
        });
    }

    /// Packets that were not recorded because the disk failed or could not follow.
    pub fn lost(&self) -> u64 {
        self.shared.queue.lost()
    }
}

/// What a capture says of a packet that ends at a machine; `why` may be empty.
pub fn not_passed_on(why: &str) -> String {
    format!("not passed on{}{why}", if why.is_empty() { "" } else { ": " })
}

/// A packet received and not yet recorded: what is decided about it may still be told.
struct Held {
    packet: Box<[u8]>,
    time: SystemTime,
}

/// A device whose traffic is recorded.
///
/// A received packet is in the file once something is decided about it, or the next one comes.
pub struct Captured<D: Device> {
    device: D,
    capture: Capture,
    held: Mutex<Option<Held>>,
}

impl<D: Device> Captured<D> {
    /// Records into `capture` what `device` receives and sends.
    // By value or shared: the choice is the caller's, cloning is cheap.
    pub fn new(device: D, capture: impl Borrow<Capture>) -> Self {
        Captured { device, capture: capture.borrow().clone(), held: Mutex::default() }
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// Records what is held, and holds another packet instead.
    fn hold(&self, next: Option<Held>, why: impl FnOnce() -> String) {
        let held = {
            let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *held, next)
        };
        if let Some(Held { packet, time }) = held {
            self.capture.record_because(Direction::In, self.device.name(), &packet, time, why);
        }
    }
}

impl<D: Device> Drop for Captured<D> {
    fn drop(&mut self) {
        self.hold(None, String::new);
    }
}

impl<D: Device> Device for Captured<D> {
    async fn recv(&self, buffer: &mut BytesMut) -> io::Result<Offload> {
        let offload = self.device.recv(buffer).await?;
        let next = Held { packet: buffer[..].into(), time: SystemTime::now() };
        self.hold(Some(next), String::new);
        Ok(offload)
    }

    async fn send(&self, packet: &Packet) -> io::Result<()> {
        self.send_because(packet, String::new).await
    }

    async fn send_because(&self, packet: &Packet, why: impl FnOnce() -> String + Send) -> io::Result<()> {
        self.hold(None, String::new);
        let now = SystemTime::now();
        self.device.send(packet).await?;
        self.capture.record_because(Direction::Out, self.device.name(), packet.bytes(), now, why);
        Ok(())
    }

    fn dropped(&self, why: impl FnOnce() -> String + Send) {
        self.hold(None, why);
    }

    fn mtu(&self) -> usize {
        self.device.mtu()
    }

    fn name(&self) -> &str {
        self.device.name()
    }

    fn takes_super_packets(&self) -> bool {
        self.device.takes_super_packets()
    }

    fn segmented(&self) -> u64 {
        self.device.segmented()
    }

    fn queue(&self) -> io::Result<Self> {
        self.device.queue().map(|device| Captured::new(device, &self.capture))
    }
}
