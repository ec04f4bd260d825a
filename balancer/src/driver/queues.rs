//! The device's queues, each carried by a thread: the first by the one that also follows the file, requests and health.

use std::future::Future;
use std::io;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use shunt_stack::device::{Clock, Device};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{mpsc, watch};

use super::carry::{Active, carry};

/// The queues of one device.
pub(super) struct Queues<D> {
    devices: Arc<[Arc<D>]>,
    /// Of all but the first, until they are carried.
    idle: Vec<Idle>,
}

/// The event loop of a queue. Made in advance: a sandboxed daemon gets no other.
struct Idle(Option<Runtime>);

impl Drop for Idle {
    fn drop(&mut self) {
        // Nothing runs in it; dropped within another event loop it would panic.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl<D: Device + 'static> Queues<D> {
    /// So many queues of a device, the first included.
    ///
    /// # Errors
    /// The kernel gives no more queues, or no event loop.
    pub(super) fn open(first: D, count: usize) -> io::Result<Self> {
        let mut devices = vec![Arc::new(first)];
        let mut idle = Vec::new();
        for _ in 1..count {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            let entered = runtime.enter();
            let queue = devices[0].queue()?;
            drop(entered);
            devices.push(queue);
            idle.push(Idle(Some(runtime)));
        }
        Ok(Queues { devices: devices.into(), idle })
    }

    pub(super) fn name(&self) -> &str {
        self.devices[0].name()
    }

    pub(super) fn count(&self) -> usize {
        self.devices.len()
    }

    pub(super) fn devices(&self) -> Arc<[Arc<D>]> {
        Arc::clone(&self.devices)
    }

    /// Starts the threads and carries the first queue; ends with the first error of any. Dropped, it ends the threads.
    pub(super) fn start(
        &mut self,
        receiver: &watch::Receiver<Arc<Active<D>>>,
        clock: Clock,
        pin: bool,
    ) -> impl Future<Output = io::Error> + use<D> {
        let processors = if pin { processors() } else { Vec::new() };
        let (failed, mut failure) = mpsc::channel(1);
        let mut threads = Threads { stop: watch::Sender::new(()), running: Vec::new() };
        let others = self.devices.iter().enumerate().skip(1).zip(self.idle.drain(..));
        for ((number, device), idle) in others {
            let carrying = Carrying {
                device: Arc::clone(device),
                idle,
                receiver: receiver.clone(),
                stop: threads.stop.subscribe(),
                failed: failed.clone(),
            };
            let processors = processors.clone();
            let started = std::thread::Builder::new().name(format!("queue-{number}")).spawn(move || {
                stay(number, &processors);
                carrying.run(clock);
            });
            match started {
                Ok(thread) => threads.running.push(thread),
                // Nobody would read what the kernel puts into this queue.
                Err(error) => drop(failed.try_send(error)),
            }
        }
        let (first, receiver) = (Arc::clone(&self.devices[0]), receiver.clone());
        stay(0, &processors);
        async move {
            let _ended_with_this = threads;
            let _kept_open = failed;
            tokio::select! {
                error = carry(&*first, receiver, clock) => error,
                Some(error) = failure.recv() => error,
            }
        }
    }
}

/// What a thread needs.
struct Carrying<D> {
    device: Arc<D>,
    idle: Idle,
    receiver: watch::Receiver<Arc<Active<D>>>,
    stop: watch::Receiver<()>,
    failed: mpsc::Sender<io::Error>,
}

/// Says so if the thread panics: nobody would read what the kernel puts into its queue.
struct Panicked(mpsc::Sender<io::Error>);

impl Drop for Panicked {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = self.0.try_send(io::Error::other("the thread of a queue panicked"));
        }
    }
}

impl<D: Device> Carrying<D> {
    fn run(mut self, clock: Clock) {
        let _told = Panicked(self.failed.clone());
        let Some(runtime) = self.idle.0.take() else { return };
        let error = runtime.block_on(async {
            tokio::select! {
                error = carry(&*self.device, self.receiver, clock) => Some(error),
                _ = self.stop.changed() => None,
            }
        });
        if let Some(error) = error {
            // One that is told already ends the daemon as well.
            let _ = self.failed.try_send(error);
        }
    }
}

/// Threads that end when this is dropped.
struct Threads {
    stop: watch::Sender<()>,
    running: Vec<JoinHandle<()>>,
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.stop.send_replace(());
        for thread in self.running.drain(..) {
            if thread.join().is_err() {
                tracing::error!("the thread of a queue panicked");
            }
        }
    }
}

/// The processors that the process could use before its first thread was pinned.
static EVERYWHERE: OnceLock<CpuSet> = OnceLock::new();

/// Lets the calling thread run where the process could before any thread was pinned: for threads that help an event loop,
/// which are where the one is that has started them.
pub fn unpin() {
    if let Some(set) = EVERYWHERE.get()
        && let Err(error) = sched_setaffinity(Pid::from_raw(0), set)
    {
        tracing::debug!(%error, "a thread stays pinned");
    }
}

/// The processors that this process may use.
fn processors() -> Vec<usize> {
    match sched_getaffinity(Pid::from_raw(0)).map(|set| *EVERYWHERE.get_or_init(|| set)) {
        Ok(set) => (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect(),
        Err(error) => {
            tracing::warn!(%error, "the kernel does not say which processors there are: threads go where it likes");
            Vec::new()
        }
    }
}

/// Has the calling thread stay on the processor that is a queue's; of none it may go anywhere.
fn stay(queue: usize, processors: &[usize]) {
    let Some(processor) = processors.get(queue % processors.len().max(1)) else { return };
    let mut set = CpuSet::new();
    let chosen = set.set(*processor).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
    match chosen {
        Ok(()) => tracing::info!(queue, processor, "pinned"),
        Err(error) => tracing::warn!(%error, queue, processor, "a thread cannot be pinned"),
    }
}
