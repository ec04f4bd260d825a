//! The daemon: packets from the host's routes through a [`Balancer`] and back, reload on SIGHUP.
//!
//! Nothing is decided here. One task carries packets, the other adapts the host; they share an `Active`, swapped as
//! a whole. The other does one thing at a time: a signal, a request, changes of health.

mod carry;
mod queues;

use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use shunt_host::control::{ControlError, Server};
use shunt_host::sandbox::{self, SandboxError};
use shunt_host::{Change, DEFAULT_STATE_DIR, Host, HostError, Role, nft_available};
use shunt_stack::device::{Capture, Captured, Clock, Device, TunDevice, TunOptions};
use thiserror::Error;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use self::carry::Active;
use self::queues::Queues;
pub use self::queues::unpin;
use crate::config::{Config, ForwardMode};
use crate::connections::Connections;
use crate::connectors::{Connectors, without_the_missing};
use crate::health::{Monitor, Transition};
use crate::host::{Devices, ServerDevice, changes, confinement, device_name, main_mtu};
use crate::offload::Standing;
use crate::tunnel::{Hops, Tunnels, look};
use crate::{Balancer, LoadError, SelectKey, Snapshot, Unfit};

/// How often counters are logged, at level debug.
const LOG_INTERVAL: Duration = Duration::from_secs(10);
/// How often the routes to servers are looked up, in `gue` mode.
const ROUTES_INTERVAL: Duration = Duration::from_secs(5);
/// How often the counters of what the kernel forwards by itself are read.
const COUNTS_INTERVAL: Duration = Duration::from_secs(1);
/// The host session's name.
const SESSION: &str = "balancer";

/// What a run needs beside its configuration.
#[derive(Debug, Default)]
pub struct RunOptions {
    /// Record what comes in and goes out to this pcapng file.
    pub capture: Option<PathBuf>,
    /// Told once packets are forwarded.
    pub ready: Option<oneshot::Sender<()>>,
    /// The file read again on SIGHUP; by default the one the configuration came from.
    pub config_path: Option<PathBuf>,
    /// Where the changes made to the host are kept, for the next start; [`DEFAULT_STATE_DIR`] unless given.
    pub state_dir: Option<PathBuf>,
    /// Given a [`Handle`] on the running balancer once packets are forwarded.
    pub handle: Option<oneshot::Sender<Handle>>,
    /// The control socket, whatever the configuration says of it.
    pub control_socket: Option<PathBuf>,
    /// Give up, before the first packet, what the balancer does not need any more ([`shunt_host::sandbox`]). It is the
    /// calling thread that does, for good: for programs that are nothing else.
    pub sandbox: bool,
}

/// A running balancer, from outside of its loop: from any thread, also after it has ended.
#[derive(Clone)]
pub struct Handle(Arc<dyn Running>);

trait Running: Send + Sync {
    fn set_load(&self, server: &str, load: f32) -> Result<(), LoadError>;
    fn snapshot(&self) -> Snapshot;
}

struct Live<D> {
    active: watch::Receiver<Arc<Active<D>>>,
    clock: Clock,
}

impl<D: Device> Running for Live<D> {
    fn set_load(&self, server: &str, load: f32) -> Result<(), LoadError> {
        let active = Arc::clone(&self.active.borrow());
        active.set_load(self.clock, server, load)
    }

    fn snapshot(&self) -> Snapshot {
        let active = Arc::clone(&self.active.borrow());
        active.snapshot(self.clock)
    }
}

impl Handle {
    /// Takes a server's load now; see [`Balancer::set_load`].
    ///
    /// # Errors
    /// There is no such server, or the number is out of range.
    pub fn set_load(&self, server: &str, load: f32) -> Result<(), LoadError> {
        self.0.set_load(server, load)
    }

    /// All counters now, those of connections included.
    pub fn snapshot(&self) -> Snapshot {
        self.0.snapshot()
    }
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Handle(..)")
    }
}

/// Why the daemon ended.
#[derive(Debug, Error)]
pub enum Error {
    /// The host could not be set up or restored.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A device could not be made; the message says which and what to do.
    #[error(transparent)]
    Device(io::Error),
    /// The device that packets come from is gone.
    #[error("reading from the device {name} failed: {error}")]
    Read {
        /// Its name.
        name: String,
        /// Why.
        error: io::Error,
    },
    /// The capture file could not be made.
    #[error("cannot write the capture {path}: {error}")]
    Capture {
        /// The file.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// The control socket cannot be served.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// It could not be contained.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// Signals cannot be waited for.
    #[error("cannot wait for signals: {0}")]
    Signal(io::Error),
}

/// Forwards packets until `shutdown` ends, then undoes its changes to the host. SIGHUP reads the file again.
///
/// # Errors
/// The host cannot be set up, or a device breaks; what was changed is undone.
pub async fn run(
    config: Config,
    options: RunOptions,
    shutdown: impl Future<Output = ()>,
) -> Result<(), Error> {
    let RunOptions { capture, ready, config_path, state_dir, handle, control_socket, sandbox } = options;
    let told = Told { sandbox, ready, handle };
    let recorded = capture.is_some();
    let state_dir = state_dir.unwrap_or_else(|| PathBuf::from(DEFAULT_STATE_DIR));
    let path = config_path.unwrap_or_else(|| config.path.clone());
    let places = Places { path, state_dir, control_socket, recorded };
    // What goes into a tunnel goes there one by one.
    let super_packets = config.host.super_packets && config.forward != ForwardMode::Gue;
    let (device, queues) = (config.host.device.clone(), config.host.queues);
    let tun = move |name: &str| {
        let mut options = TunOptions::new(name);
        options.super_packets = super_packets;
        options.multi_queue = queues > 1 && name == device;
        TunDevice::create(options)
    };
    match capture {
        None => serve(config, places, told, shutdown, tun).await,
        Some(file) => {
            let capture = Capture::create(&file).map_err(|error| Error::Capture { path: file, error })?;
            let open = |name: &str| tun(name).map(|tun| Captured::new(tun, &capture));
            serve(config, places, told, shutdown, open).await
        }
    }
}

/// What happens before packets are forwarded, and who is told.
struct Told {
    sandbox: bool,
    ready: Option<oneshot::Sender<()>>,
    handle: Option<oneshot::Sender<Handle>>,
}

/// Files.
struct Places {
    /// The configuration.
    path: PathBuf,
    state_dir: PathBuf,
    control_socket: Option<PathBuf>,
    /// Whether there is a capture, which has to see every packet.
    recorded: bool,
}

async fn serve<D: Device + 'static>(
    config: Config,
    places: Places,
    told: Told,
    shutdown: impl Future<Output = ()>,
    open: impl Fn(&str) -> io::Result<D>,
) -> Result<(), Error> {
    let hangups = signal(SignalKind::hangup()).map_err(Error::Signal)?;
    let confined = told.sandbox.then(|| {
        let socket = config.control.at(places.control_socket.clone()).socket;
        confinement(&config, &places.path, &places.state_dir, socket)
    });
    let mut daemon = Daemon::start(config, places, open).await?;
    if let Some(Err(error)) = confined.map(|policy| sandbox::enter(&policy)) {
        daemon.stop().await?;
        return Err(error.into());
    }
    let receiver = daemon.active.subscribe();
    // Whoever asked may have gone; that changes nothing here.
    if let Some(handle) = told.handle {
        let live = Live { active: daemon.active.subscribe(), clock: daemon.clock };
        let _ = handle.send(Handle(Arc::new(live)));
    }
    if let Some(ready) = told.ready {
        let _ = ready.send(());
    }
    let device = daemon.devices.main.clone();
    tracing::info!(device, mode = %daemon.config.forward, queues = daemon.queues.count(), "forwarding");
    let carrying = daemon.queues.start(&receiver, daemon.clock, daemon.config.host.pin);
    let result = tokio::select! {
        error = carrying => Err(Error::Read { name: device, error }),
        () = daemon.follow(hangups) => Ok(()),
        () = shutdown => Ok(()),
    };
    let closed = daemon.stop().await;
    result.and(closed)
}

/// What stands on the host and how it follows the file.
pub(crate) struct Daemon<D, F> {
    pub(crate) config: Config,
    pub(crate) path: PathBuf,
    pub(crate) monitor: Monitor,
    /// The configuration in force, for who waits for a change of it.
    pub(crate) published: watch::Sender<Arc<Config>>,
    /// Requests that take long.
    pub(crate) waits: JoinSet<()>,
    pub(crate) connectors: Connectors,
    /// The ways to servers, `gue` mode.
    pub(crate) hops: Hops,
    pub(crate) host: Host,
    pub(crate) nft: bool,
    pub(crate) offload: Standing,
    pub(crate) devices: Devices,
    server: Server,
    queues: Queues<D>,
    clock: Clock,
    active: watch::Sender<Arc<Active<D>>>,
    open: F,
}

impl<D: Device + 'static, F: Fn(&str) -> io::Result<D>> Daemon<D, F> {
    async fn start(config: Config, places: Places, open: F) -> Result<Self, Error> {
        let Places { path, state_dir, control_socket, recorded } = places;
        // The rule to a VIP and the blackhole behind it stay, so that connects meet silence, not "unreachable", meanwhile;
        // what the kernel forwards by itself goes on, but for what a server's number decides: numbers begin anew.
        let (mark_mask, by_number) = (config.host.server_mark_mask, config.forward.uses_devices());
        let numbered = |change: &Change| match change {
            Change::Offload(_) => by_number,
            Change::Rule(rule) => rule.mark.is_some_and(|mark| mark.mask == mark_mask),
            _ => false,
        };
        let mut host =
            Host::open_keeping(&state_dir, SESSION, &config.host, |change| !numbered(change)).await?;
        let nft = nft_available().await;
        if !nft && config.forward == ForwardMode::Gue {
            tracing::warn!(
                "this kernel has no nftables: of path MTUs to servers only the first link's is known"
            );
        }
        if !nft && config.forward == ForwardMode::Network {
            tracing::warn!(
                "this kernel has no nftables: ICMP errors about packets to servers, echo replies and fragments of TCP \
                 answers are not translated"
            );
        }
        let device = |name: &str| open(name).map_err(Error::Device);
        let queues = Queues::open(device(&config.host.device)?, config.host.queues).map_err(Error::Device)?;
        let mut devices =
            Devices { main: queues.name().to_owned(), mtu: main_mtu(&config).await?, servers: Vec::new() };
        let mut outputs = Vec::new();
        devices.servers = server_devices(&config, None, &devices.main);
        let connectors = Connectors::start(&config).await?;
        connectors.mark(&config, &mut devices);
        for server in &devices.servers {
            outputs.push(Arc::new(device(&server.name)?));
        }
        // While the name is ours: nobody else's socket is there.
        let server = Server::open(&config.control.at(control_socket), &state_dir, Role::Balancer)?;
        let hops = look(&config).await?;
        let tunnels = Tunnels::new(&config, &hops);
        let unfit = without_the_missing(Unfit::default(), &devices, tunnels.as_ref());
        let balancer = Balancer::new_without(&config, &unfit, SelectKey::from_system()).through(tunnels);
        let balancer = Arc::new(balancer);
        let connections = Connections::new(&config);
        let mut offload = Standing::new(recorded, nft);
        let base = changes(&config, &devices, nft);
        if let Err(error) = offload.install(&mut host, base, &config, &balancer, &devices).await {
            if let Err(undo) = host.close().await {
                tracing::warn!(%undo, "undoing the changes to the host after a failure failed as well");
            }
            return Err(error.into());
        }
        let mut monitor = Monitor::new();
        monitor.follow(&config, balancer.server_stats());
        let active = Active { queues: queues.devices(), balancer, connections, outputs };
        let (active, _) = watch::channel(Arc::new(active));
        let (published, _) = watch::channel(Arc::new(config.clone()));
        let (waits, clock) = (JoinSet::new(), Clock::start());
        Ok(Daemon {
            config,
            path,
            monitor,
            published,
            waits,
            connectors,
            hops,
            host,
            nft,
            offload,
            devices,
            server,
            queues,
            clock,
            active,
            open,
        })
    }

    /// Reloads on SIGHUP, answers requests, follows the servers' health, logs counters; never ends.
    async fn follow(&mut self, mut hangups: Signal) {
        let mut interval = tokio::time::interval(LOG_INTERVAL);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        interval.tick().await;
        let mut routes = tokio::time::interval(ROUTES_INTERVAL);
        routes.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut counts = tokio::time::interval(COUNTS_INTERVAL);
        counts.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                // Signals that come meanwhile are one more reload, of the file as it is then.
                Some(()) = hangups.recv() => drop(self.reload().await),
                call = self.server.next() => self.call(call).await,
                changed = self.monitor.changed() => self.health_changed(&changed).await,
                news = self.connectors.news() => self.links_changed(news).await,
                () = self.offload.routes_changed() => self.follow_routes().await,
                _ = interval.tick() => self.log_counters(),
                _ = counts.tick() => self.look_at_offload().await,
                _ = routes.tick() => self.look_for_routes().await,
            }
        }
    }

    fn log_counters(&self) {
        if tracing::enabled!(tracing::Level::DEBUG) {
            tracing::debug!(counters = %self.snapshot(), "counters");
        }
    }

    /// All counters now.
    pub(crate) fn snapshot(&self) -> Snapshot {
        let active = Arc::clone(&self.active.borrow());
        active.snapshot(self.clock)
    }

    /// Takes a server's load now; see [`Balancer::set_load`].
    pub(crate) fn set_load(&self, server: &str, load: f32) -> Result<(), LoadError> {
        let active = Arc::clone(&self.active.borrow());
        active.set_load(self.clock, server, load)
    }

    /// What decides now.
    pub(crate) fn balancer(&self) -> Arc<Balancer> {
        Arc::clone(&self.active.borrow().balancer)
    }

    /// Takes over the file as it is now, or refuses it as a whole.
    pub(crate) async fn reload(&mut self) -> Result<(), String> {
        let result = self.try_reload().await;
        self.balancer().stats.reload(result.is_ok());
        match &result {
            Ok(()) => tracing::info!(file = %self.path.display(), "configuration reloaded"),
            Err(reason) => tracing::error!("the new configuration is refused, the old one stands: {reason}"),
        }
        result
    }

    /// Lets selections follow what is known of the servers (`B7`).
    async fn health_changed(&mut self, changed: &[Transition]) {
        for Transition { server, service, address, healthy, why } in changed {
            if *healthy {
                tracing::info!(server, service, %address, "healthy again");
            } else {
                tracing::warn!(server, service, %address, why, "unhealthy: no new connections");
            }
        }
        self.renew().await;
    }

    /// Adds what the kernel has forwarded by itself to the counters.
    pub(crate) async fn count_offloaded(&mut self) {
        self.offload.count(&self.host).await;
    }

    /// Counts, and looks whether a firewall has come or gone.
    async fn look_at_offload(&mut self) {
        self.count_offloaded().await;
        if self.offload.is_hindered_otherwise(&self.host).await {
            self.follow_table(changes(&self.config, &self.devices, self.nft)).await;
        }
    }

    /// Lets what the kernel forwards by itself follow its routes.
    async fn follow_routes(&mut self) {
        if self.offload.is_outdated(&self.host, &self.config).await {
            self.follow_table(changes(&self.config, &self.devices, self.nft)).await;
        }
    }

    /// Makes the host as `base` says, and lets what the kernel forwards by itself follow the table.
    async fn follow_table(&mut self, base: Vec<Change>) {
        let balancer = self.balancer();
        let result = self.offload.install(&mut self.host, base, &self.config, &balancer, &self.devices).await;
        if let Err(error) = result {
            tracing::warn!(%error, "what the old configuration needed on the host could not all be removed");
        }
    }

    /// Decides by the same configuration and by what is known of the servers now.
    pub(crate) async fn renew(&mut self) {
        let balancer = self.successor(&self.config, &self.devices, &self.hops).await;
        let before = Arc::clone(&self.active.borrow());
        let connections = Connections::successor(before.connections.as_ref(), &self.config);
        let outputs = before.outputs.clone();
        let queues = self.queues.devices();
        self.active.send_replace(Arc::new(Active { queues, balancer, connections, outputs }));
        if self.offload.in_force() {
            self.follow_table(changes(&self.config, &self.devices, self.nft)).await;
        }
    }

    /// What will decide by a configuration, the servers' health and their links. Made beside, because packets go on.
    async fn successor(&self, config: &Config, devices: &Devices, hops: &Hops) -> Arc<Balancer> {
        let tunnels = Tunnels::new(config, hops);
        let unfit = without_the_missing(self.monitor.unfit(config), devices, tunnels.as_ref());
        let (balancer, config) = (self.balancer(), config.clone());
        balancer.advance(self.clock.now());
        let made = tokio::task::spawn_blocking(move || balancer.successor_without(&config, &unfit)).await;
        let made = made.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()));
        Arc::new(made.through(tunnels))
    }

    async fn try_reload(&mut self) -> Result<(), String> {
        let config = Config::load(&self.path).map_err(|error| error.to_string())?;
        self.take_over(config).await
    }

    /// Takes over a configuration, or refuses it and leaves everything as it is.
    pub(crate) async fn take_over(&mut self, config: Config) -> Result<(), String> {
        if !config.control.same_socket(&self.config.control) {
            return Err("the control socket cannot change while the balancer runs: restart it".to_owned());
        }
        if config.host != self.config.host {
            return Err("[host] cannot change while the balancer runs: restart it".to_owned());
        }
        if config.forward != self.config.forward {
            return Err("`forward` cannot change while the balancer runs: restart it".to_owned());
        }
        let mut devices = self.devices.clone();
        devices.servers = server_devices(&config, Some((&self.config, &self.devices)), &devices.main);
        self.connectors.mark(&config, &mut devices);
        let outputs = self.outputs(&devices)?;
        let hops = look(&config).await.map_err(|error| error.to_string())?;
        let mut old = changes(&self.config, &self.devices, self.nft);
        old.extend(self.offload.changes());
        let new = changes(&config, &devices, self.nft);
        // New ones first, then the packets, then the old ones go: at no time does a rule miss that a packet needs.
        let both = union(&old, &new);
        if let Err(error) = self.host.replace(both).await {
            if let Err(undo) = self.host.replace(old).await {
                tracing::error!(%undo, "the host could not be put back to what the old configuration needs");
            }
            return Err(error.to_string());
        }
        let balancer = self.successor(&config, &devices, &hops).await;
        self.monitor.follow(&config, balancer.server_stats());
        let connections = Connections::successor(self.active.borrow().connections.as_ref(), &config);
        let queues = self.queues.devices();
        self.active.send_replace(Arc::new(Active { queues, balancer, connections, outputs }));
        self.published.send_replace(Arc::new(config.clone()));
        (self.config, self.devices, self.hops) = (config, devices, hops);
        self.follow_table(new).await;
        Ok(())
    }

    /// The devices of `devices.servers`: those that are open already, and new ones.
    fn outputs(&self, devices: &Devices) -> Result<Vec<Arc<D>>, String> {
        let active = self.active.borrow();
        let known = |name: &str| self.devices.servers.iter().position(|device| device.name == name);
        let output =
            |device: &ServerDevice| match known(&device.name).and_then(|index| active.outputs.get(index)) {
                Some(open) => Ok(Arc::clone(open)),
                None => (self.open)(&device.name).map(Arc::new).map_err(|error| error.to_string()),
            };
        devices.servers.iter().map(output).collect()
    }

    /// Restores the host.
    async fn stop(mut self) -> Result<(), Error> {
        self.count_offloaded().await;
        tracing::info!(counters = %self.snapshot(), "stopping");
        Ok(self.host.close().await?)
    }
}

/// In `direct` and `datalink` mode a device for each server: its old one if the server was there before, else a free one.
fn server_devices(config: &Config, before: Option<(&Config, &Devices)>, main: &str) -> Vec<ServerDevice> {
    if !config.forward.uses_devices() {
        return Vec::new();
    }
    let old = |name: &str| {
        let (config, devices) = before?;
        let index = config.servers.iter().position(|server| server.name == name)?;
        devices.servers.get(index).map(|device| device.slot)
    };
    let kept: Vec<Option<u32>> = config.servers.iter().map(|server| old(&server.name)).collect();
    // Slots of servers that leave are still in use until the new configuration stands.
    let in_use = |slot: &u32| {
        kept.contains(&Some(*slot))
            || before.is_some_and(|(_, devices)| devices.servers.iter().any(|device| device.slot == *slot))
    };
    let mut free = (0..).filter(|slot| !in_use(slot));
    let device = |slot: Option<u32>| {
        let slot = slot.or_else(|| free.next()).unwrap_or_default();
        ServerDevice { name: device_name(main, slot), slot, connected: true }
    };
    kept.iter().copied().map(device).collect()
}

/// All of `new`, and of `old` what does not contradict it: there is one nftables table.
fn union(old: &[Change], new: &[Change]) -> Vec<Change> {
    let replaced = |change: &Change| new.iter().any(|new| new.replaces(change));
    let kept = old.iter().filter(|change| !new.contains(change) && !replaced(change));
    kept.chain(new).cloned().collect()
}
