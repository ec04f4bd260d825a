//! An impaired link: a TAP device at each end and two threads that carry frames between them.
//!
//! The kernel segments packets and completes their checksums before they reach a TAP device without offloads, and
//! checks the checksums of what is written there: a corrupted packet is dropped by the receiving kernel, not by us.

use std::io::{ErrorKind, PipeReader, PipeWriter};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use tun_rs::{DeviceBuilder, Layer, SyncDevice};

use crate::impair::{ETHERNET_HEADER, Filter, Impairer, Impairment, LinkCounters};
use crate::{Error, Host, Result};

/// The device's own queue, so long that it hardly ever overflows before ours does.
const DEVICE_QUEUE: u32 = 4096;
/// Frames read or written before the other side gets its turn.
const BURST: usize = 64;
/// The largest frame: the largest IP packet, the Ethernet header, a VLAN tag.
const LARGEST_FRAME: usize = 65_535 + ETHERNET_HEADER + 4;

/// One of the two directions of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the host named first to the one named second.
    Forward,
    /// From the host named second to the one named first.
    Backward,
}

/// Watches and changes an impaired link; a clone is the same link. It ends with the lab, or by [`stop`](Self::stop).
#[derive(Clone)]
pub struct ImpairedLink(Arc<Inner>);

struct Inner {
    directions: [Arc<Mutex<Impairer>>; 2],
    ends: [(Host, String); 2],
    running: Mutex<Option<Running>>,
}

struct Running {
    /// Closing them tells the threads to stop.
    stop: Vec<PipeWriter>,
    threads: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for ImpairedLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("ImpairedLink").field(&self.0.ends).finish()
    }
}

impl ImpairedLink {
    pub(crate) fn start(ends: [(&Host, &str); 2], settings: Impairment) -> Result<Self> {
        settings.check()?;
        let [(host_a, name_a), (host_b, name_b)] = ends;
        let a = Arc::new(tap(host_a, name_a, settings.mtu)?);
        let b = Arc::new(tap(host_b, name_b, settings.mtu)?);
        let directions = [0, 1].map(|way| Arc::new(Mutex::new(Impairer::new(settings, way))));
        let mut running = Running { stop: Vec::new(), threads: Vec::new() };
        for (impairer, input, output) in [(&directions[0], &a, &b), (&directions[1], &b, &a)] {
            let (stopped, stop) = std::io::pipe().map_err(Error::io(host_a.name(), "making a pipe"))?;
            let (impairer, input, output) = (Arc::clone(impairer), Arc::clone(input), Arc::clone(output));
            let thread = thread::Builder::new()
                .name(format!("{name_a}-{name_b}"))
                .spawn(move || relay(&impairer, &input, &output, &stopped))
                .map_err(Error::io(host_a.name(), "starting a thread"))?;
            running.stop.push(stop);
            running.threads.push(thread);
        }
        let ends = [(host_a.clone(), name_a.to_owned()), (host_b.clone(), name_b.to_owned())];
        let link = Self(Arc::new(Inner { directions, ends, running: Mutex::new(Some(running)) }));
        crate::wait_until_up(host_a, name_a)?;
        crate::wait_until_up(host_b, name_b)?;
        Ok(link)
    }

    /// Impairs both directions as given from now on. `seed` and `mtu` stay as they were.
    ///
    /// # Errors
    /// A probability is not one; nothing is changed then.
    pub fn set(&self, settings: Impairment) -> Result<()> {
        self.set_direction(Direction::Forward, settings)?;
        self.set_direction(Direction::Backward, settings)
    }

    /// Impairs one direction as given from now on. `seed` and `mtu` stay as they were.
    ///
    /// # Errors
    /// A probability is not one; nothing is changed then.
    pub fn set_direction(&self, direction: Direction, settings: Impairment) -> Result<()> {
        settings.check()?;
        let mut impairer = self.lock(direction);
        let (seed, mtu) = (impairer.settings.seed, impairer.settings.mtu);
        impairer.settings = Impairment { seed, mtu, ..settings };
        Ok(())
    }

    /// Puts a middlebox into one direction, or takes it away. It sees IP packets before they are impaired.
    pub fn set_filter(&self, direction: Direction, filter: Option<Filter>) {
        self.lock(direction).filter = filter;
    }

    /// What became of the frames of one direction so far.
    pub fn counters(&self, direction: Direction) -> LinkCounters {
        self.lock(direction).counters
    }

    /// Frames the sending device of a direction dropped because the relay did not keep up.
    ///
    /// # Errors
    /// The link or the lab is gone.
    pub fn device_dropped(&self, direction: Direction) -> Result<u64> {
        let (host, device) = &self.0.ends[direction as usize];
        Ok(host.counters(device)?.tx_dropped)
    }

    /// Takes the link away, and the devices at both its ends.
    pub fn stop(&self) {
        let running = self.0.running.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Running { stop, threads }) = running {
            drop(stop);
            for thread in threads {
                let _ = thread.join();
            }
        }
    }

    fn lock(&self, direction: Direction) -> MutexGuard<'_, Impairer> {
        lock(&self.0.directions[direction as usize])
    }
}

fn lock(impairer: &Mutex<Impairer>) -> MutexGuard<'_, Impairer> {
    impairer.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes a TAP device inside `host` and takes it up.
fn tap(host: &Host, name: &str, mtu: u32) -> Result<SyncDevice> {
    let (device, owner) = (name.to_owned(), host.name().to_owned());
    let tap = host.call(move |_| {
        let build = || {
            // `enable` belongs to netlink below, once the size is set.
            let tap =
                DeviceBuilder::new().name(device.as_str()).layer(Layer::L2).enable(false).build_sync()?;
            tap.set_nonblocking(true)?;
            Ok(tap)
        };
        build().map_err(Error::io(&owner, format!("making the TAP device {device}")))
    })?;
    let device = name.to_owned();
    host.request(format!("TAP device {name} with MTU {mtu} up"), move |worker| {
        worker.runtime.block_on(async {
            worker.route.set_link_mtu(device.as_str(), mtu).await?;
            worker.route.set_link_txqlen(device.as_str(), DEVICE_QUEUE).await?;
            worker.route.set_link_up(device.as_str()).await
        })
    })?;
    Ok(tap)
}

/// Carries the frames of one direction until `stopped` closes.
fn relay(impairer: &Mutex<Impairer>, input: &SyncDevice, output: &SyncDevice, stopped: &PipeReader) {
    let mut scratch = vec![0; LARGEST_FRAME];
    let mut spare = Vec::new();
    let mut batch = Vec::new();
    loop {
        let next_due = read_burst(impairer, input, &mut scratch, &mut spare);
        let more = write_burst(impairer, output, &mut batch, &mut spare);
        if next_due == Progress::Busy || more == Progress::Busy {
            // Still look whether to stop, without waiting.
            if !wait(input, stopped, Some(TimeSpec::new(0, 0))) {
                return;
            }
            continue;
        }
        let due = lock(impairer).next_due();
        let timeout = due.map(|due| TimeSpec::from(due.saturating_duration_since(Instant::now())));
        if !wait(input, stopped, timeout) {
            return;
        }
    }
}

#[derive(PartialEq)]
enum Progress {
    Busy,
    Idle,
}

fn read_burst(
    impairer: &Mutex<Impairer>,
    input: &SyncDevice,
    scratch: &mut [u8],
    spare: &mut Vec<Vec<u8>>,
) -> Progress {
    for _ in 0..BURST {
        let Ok(length) = input.recv(scratch) else { return Progress::Idle };
        let mut frame = spare.pop().unwrap_or_default();
        frame.clear();
        frame.extend_from_slice(&scratch[..length]);
        if let Some(unused) = lock(impairer).push(Instant::now(), frame) {
            keep(spare, unused);
        }
    }
    Progress::Busy
}

fn write_burst(
    impairer: &Mutex<Impairer>,
    output: &SyncDevice,
    batch: &mut Vec<Vec<u8>>,
    spare: &mut Vec<Vec<u8>>,
) -> Progress {
    {
        let (mut impairer, now) = (lock(impairer), Instant::now());
        batch.extend(std::iter::from_fn(|| impairer.pop(now)).take(2 * BURST));
    }
    let (taken, mut delivered) = (batch.len(), 0);
    for frame in batch.drain(..) {
        delivered += u64::from(output.send(&frame).is_ok());
        keep(spare, frame);
    }
    let mut impairer = lock(impairer);
    impairer.counters.delivered += delivered;
    impairer.counters.refused += taken as u64 - delivered;
    if taken == 2 * BURST { Progress::Busy } else { Progress::Idle }
}

fn keep(spare: &mut Vec<Vec<u8>>, frame: Vec<u8>) {
    if spare.len() < 4 * BURST {
        spare.push(frame);
    }
}

/// Waits for a frame, the time-out or the end; false at the end.
fn wait(input: &SyncDevice, stopped: &PipeReader, timeout: Option<TimeSpec>) -> bool {
    let mut fds =
        [PollFd::new(input.as_fd(), PollFlags::POLLIN), PollFd::new(stopped.as_fd(), PollFlags::POLLIN)];
    match ppoll(&mut fds, timeout, None) {
        Ok(_) => {
            // A device that is down reports an error at once and again: do not spin on it.
            let [device, stop] = fds.map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
            if device.contains(PollFlags::POLLERR) && stop.is_empty() {
                thread::sleep(std::time::Duration::from_millis(1));
            }
            stop.is_empty()
        }
        Err(error) => std::io::Error::from(error).kind() == ErrorKind::Interrupted,
    }
}
