//! Beside the kernel's TCP: one TUN device, policy routing, and the client's machine between.

use std::collections::{HashSet, VecDeque};
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::time::Duration;

use bytes::BytesMut;
use shunt_host::HostError;
use shunt_host::query::TcpSockets;
use shunt_stack::device::{Device, recv_now};
use shunt_stack::redirect::{FlowRecord, Mark};
use siphasher::sip::SipHasher13;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use crate::Outside;
use crate::config::Config;
use crate::control::{self, ShimFacts};
use crate::error::Error;
use crate::flows::FlowFile;
use crate::offload::Kernel;
use crate::session::Session;
use crate::shim::{Shim, is_passing};

/// Between two saves of the flows passes so many times as long as a save takes, within [`SAVE_LEAST`] and [`SAVE_MOST`]:
/// connections that are younger do not survive a kill.
const SAVE_SHARE: u32 = 20;
const SAVE_LEAST: Duration = Duration::from_millis(50);
const SAVE_MOST: Duration = Duration::from_secs(1);
/// The most packets handled before anything else is looked at.
const IN_A_ROW: usize = 64;
/// The most while something else waits: what a device's queue holds.
const MOST_AT_ONCE: usize = 4096;
/// Ended connections that are freed at once: others' packets wait so long for their ports to leave the kernel's maps.
const FREED_AT_ONCE: usize = 128;
/// A time that does not come.
const NEVER: Duration = Duration::from_hours(365 * 24);

type SocketQuery = Pin<Box<dyn Future<Output = Result<TcpSockets, HostError>>>>;

/// Runs the shim over `device` until `shutdown`.
///
/// # Errors
/// The device is gone, or the host's routing could not follow a change.
pub(crate) async fn drive<D: Device>(
    session: &mut Session,
    device: &D,
    mut outside: Outside,
    ready: Option<tokio::sync::oneshot::Sender<()>>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), Error> {
    let mut driver = Driver::start(session, device).await?;
    if let Some(ready) = ready {
        // Whoever asked may have gone.
        let _ = ready.send(());
    }
    let result = driver.serve(session, device, &mut outside, shutdown).await;
    driver.finish().await;
    result
}

/// The shim with what it does from time to time.
struct Driver {
    shim: Shim,
    saver: Saver,
    /// When the kernel was asked for its sockets, and the question.
    query: Option<(Mark, SocketQuery)>,
    /// What the kernel said of connections that have ended, or are in TIME-WAIT, and is yet to be done.
    ended: VecDeque<Ended>,
}

/// A connection whose socket is gone, or waits only.
struct Ended {
    /// When the kernel was asked.
    asked: Mark,
    local: SocketAddr,
    vip: SocketAddr,
    waits: bool,
}

impl Driver {
    async fn start(session: &mut Session, device: &impl Device) -> Result<Self, Error> {
        let kernel = match session.kernel() {
            Ok(kernel) => kernel,
            Err(error) => {
                session.without_offload(&error.to_string()).await?;
                session.kernel()?
            }
        };
        if let Some(why) = kernel.obstacle() {
            tracing::info!(%why, "the kernel exchanges no ports by itself");
        }
        let mut driver = Self {
            shim: new_shim(session, device, kernel),
            saver: Saver::new(session.flow_file().clone()),
            query: None,
            ended: VecDeque::new(),
        };
        let restored = driver.saver.restore(&mut driver.shim);
        if restored > 0 {
            driver.free_ended(session).await;
            tracing::info!(restored, alive = driver.shim.client().flow_count(), "took over connections");
        }
        driver.shim.take_over_kernel().await;
        Ok(driver)
    }

    async fn serve(
        &mut self,
        session: &mut Session,
        device: &impl Device,
        outside: &mut Outside,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), Error> {
        let mut buffer = BytesMut::new();
        let mut paths = ticks(session.config().path_interval);
        let mut sockets = ticks(session.config().socket_interval);
        tokio::pin!(shutdown);
        loop {
            let far = Instant::now() + NEVER;
            let timer = self.shim.deadline().unwrap_or(far);
            let save = self.saver.due(&mut self.shim).unwrap_or(far);
            tokio::select! {
                received = device.recv(&mut buffer) => match received {
                    Ok(offload) => self.shim.on_packets(device, &mut buffer, offload, IN_A_ROW - 1).await,
                    Err(error) => self.on_device_error(device, error).await?,
                },
                () = sleep_until(timer) => self.shim.on_timer(device).await,
                () = sleep_until(save) => self.saver.save(&self.shim).await,
                result = answer(&mut self.query) => {
                    self.catch_up(device, &mut buffer).await;
                    self.on_sockets(result);
                }
                () = std::future::ready(()), if !self.ended.is_empty() => {
                    self.free_some();
                    self.shim.tell_kernel().await;
                }
                _ = sockets.tick() => self.ask_for_sockets(),
                _ = paths.tick() => {
                    if session.follow_paths().await {
                        session.tell_paths(|vip, path| self.shim.client_mut().set_path(vip, path));
                    }
                }
                call = outside.asked.next() => {
                    let facts = ShimFacts::of(&mut self.shim).await;
                    control::answer(call, session, self.shim.client(), &facts);
                }
                config = outside.reload.wait(session.config()) => {
                    self.reload(session, device, config).await?;
                    paths = ticks(session.config().path_interval);
                    sockets = ticks(session.config().socket_interval);
                }
                () = &mut shutdown => return Ok(()),
            }
            if let Some(why) = self.shim.kernel().take_failure() {
                session.without_offload(&why).await?;
            }
        }
    }

    async fn on_device_error(&self, device: &impl Device, error: io::Error) -> Result<(), Error> {
        if is_passing(&error) {
            // Not in a tight loop.
            tokio::time::sleep(Duration::from_millis(100)).await;
            return Ok(());
        }
        Err(Error::Device { name: device.name().to_owned(), error })
    }

    /// Begins to look for connections whose socket is gone (`C12`).
    fn ask_for_sockets(&mut self) {
        if self.query.is_some() || self.shim.client().flow_count() == 0 {
            return;
        }
        self.query = Some((self.shim.client().mark(), ask(self.shim.vips().clone())));
    }

    /// Handles what is in the device already. A socket that is gone may have left its reset there, which without its flow
    /// would go to another server.
    async fn catch_up(&mut self, device: &impl Device, buffer: &mut BytesMut) {
        // What has come meanwhile is known after a turn of the event loop.
        tokio::task::yield_now().await;
        // An error is told again.
        if let Some(Ok(offload)) = recv_now(device, buffer).await {
            self.shim.on_packets(device, buffer, offload, MOST_AT_ONCE - 1).await;
        }
    }

    fn on_sockets(&mut self, answer: Answer) {
        match answer {
            Ok((asked, sockets)) => {
                let client = self.shim.client();
                let ended = client.begun_before(asked).filter_map(|(local, vip)| {
                    let waits = sockets.is_waiting(local, vip);
                    let goes =
                        if waits { client.is_settled(local, vip) } else { !sockets.contains(local, vip) };
                    goes.then_some(Ended { asked, local, vip, waits })
                });
                self.ended = ended.collect();
            }
            Err(error) => tracing::warn!(%error, "ended connections cannot be freed"),
        }
    }

    /// Frees some of those that have ended, so that packets need not wait for all. The kernel is yet to be told.
    fn free_some(&mut self) {
        let client = self.shim.client_mut();
        let mut freed = 0;
        for Ended { asked, local, vip, waits } in self.ended.drain(..FREED_AT_ONCE.min(self.ended.len())) {
            if waits {
                client.rest(asked, local, vip);
            } else {
                freed += usize::from(client.free(asked, local, vip));
            }
        }
        if freed > 0 {
            tracing::debug!(freed, left = self.shim.client().flow_count(), "connections have ended");
            self.shim.note_flows_changed();
        }
    }

    async fn free_ended(&mut self, session: &Session) {
        let asked = self.shim.client().mark();
        let sockets = ask(session.config().vips().collect()).await;
        self.on_sockets(sockets.map(|sockets| (asked, sockets)));
        while !self.ended.is_empty() {
            self.free_some();
        }
    }

    /// Starts over with another configuration; redirected connections go on.
    async fn reload(
        &mut self,
        session: &mut Session,
        device: &impl Device,
        config: Config,
    ) -> Result<(), Error> {
        let flows: Vec<FlowRecord> = self.shim.client().flows().collect();
        session.reconfigure(config).await?;
        let kernel = std::mem::replace(self.shim.kernel(), Kernel::new(None, None));
        self.shim = new_shim(session, device, kernel);
        (self.query, self.ended) = (None, VecDeque::new());
        let kept = flows.iter().filter(|flow| self.shim.client_mut().restore(**flow)).count();
        self.shim.take_over_kernel().await;
        self.shim.note_flows_changed();
        tracing::info!(kept, ended = flows.len() - kept, "reloaded; redirected connections go on");
        Ok(())
    }

    async fn finish(mut self) {
        self.saver.finish(&self.shim).await;
        let kernel = self.shim.kernel().counters().await.clone();
        tracing::info!(
            flows = self.shim.client().flow_count(),
            machine = ?self.shim.client().counters(),
            driver = ?self.shim.counters,
            ?kernel,
            "stopped"
        );
    }
}

fn new_shim(session: &Session, device: &impl Device, kernel: Kernel) -> Shim {
    let mut config = session.config().client.clone();
    config.mtu = device.mtu();
    let mut shim = Shim::new(config, kernel);
    session.tell_paths(|vip, path| shim.client_mut().set_path(vip, path));
    shim
}

fn ticks(period: Duration) -> tokio::time::Interval {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

fn ask(vips: HashSet<IpAddr>) -> SocketQuery {
    Box::pin(async move { TcpSockets::connected_to(&vips).await })
}

type Answer = Result<(Mark, TcpSockets), HostError>;

/// Waits for the kernel's answer, for ever if nothing was asked.
async fn answer(query: &mut Option<(Mark, SocketQuery)>) -> Answer {
    let Some((asked, question)) = query else { return std::future::pending().await };
    let (asked, result) = (*asked, question.await);
    *query = None;
    result.map(|sockets| (asked, sockets))
}

/// Saves flows when they have changed.
struct Saver {
    file: FlowFile,
    fingerprint: u64,
    last: Option<Instant>,
    wanted: bool,
    /// Least time between two saves.
    interval: Duration,
    /// The file being written; gives the time it took.
    writing: Option<JoinHandle<io::Result<Duration>>>,
}

impl Saver {
    fn new(file: FlowFile) -> Self {
        Self { file, fingerprint: 0, last: None, wanted: false, interval: SAVE_LEAST, writing: None }
    }

    /// Gives the machine what an earlier run saved; says how many flows it took.
    fn restore(&mut self, shim: &mut Shim) -> usize {
        let records = match self.file.load() {
            Ok(records) => records,
            Err(error) => {
                let path = self.file.path().display();
                tracing::warn!(%path, %error, "the saved connections cannot be read, and are forgotten");
                return 0;
            }
        };
        self.wanted = !records.is_empty();
        records.into_iter().filter(|record| shim.client_mut().restore(*record)).count()
    }

    /// When to save next.
    fn due(&mut self, shim: &mut Shim) -> Option<Instant> {
        self.wanted |= shim.take_flows_changed();
        self.wanted.then(|| self.last.map_or_else(Instant::now, |last| last + self.interval))
    }

    async fn save(&mut self, shim: &Shim) {
        (self.wanted, self.last) = (false, Some(Instant::now()));
        let flows: Vec<FlowRecord> = shim.client().flows().collect();
        let fingerprint = fingerprint(&flows);
        if fingerprint == self.fingerprint {
            return;
        }
        self.written().await;
        self.fingerprint = fingerprint;
        let file = self.file.clone();
        self.writing = Some(tokio::task::spawn_blocking(move || {
            let begun = Instant::now();
            file.save(flows).map(|()| begun.elapsed())
        }));
    }

    /// Waits for the file that is being written.
    async fn written(&mut self) {
        let Some(writing) = self.writing.take() else { return };
        let result = writing.await.unwrap_or_else(|panic| Err(io::Error::other(panic)));
        match result {
            Ok(took) => self.interval = (took * SAVE_SHARE).clamp(SAVE_LEAST, SAVE_MOST),
            Err(error) => {
                let path = self.file.path().display();
                tracing::warn!(%path, %error, "connections cannot be saved, and would not survive a restart");
                (self.fingerprint, self.interval) = (0, SAVE_MOST);
            }
        }
    }

    async fn finish(&mut self, shim: &Shim) {
        self.save(shim).await;
        self.written().await;
    }
}

/// The same for the same flows in whatever order; 0 for none.
fn fingerprint(flows: &[FlowRecord]) -> u64 {
    use std::hash::{Hash, Hasher};
    flows.iter().fold(0, |sum, flow| {
        let mut hasher = SipHasher13::new();
        flow.hash(&mut hasher);
        sum.wrapping_add(hasher.finish() | 1)
    })
}
