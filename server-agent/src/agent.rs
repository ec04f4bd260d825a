//! The driver: one device, one machine, one loop.

mod moving;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io::Read;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::pin::pin;

use bytes::BytesMut;
use serde::Serialize;
use shunt_host::sandbox::{self, Confined, Policy};
use shunt_host::{Host, query};
use shunt_stack::device::{Capture, Captured, Clock, Device, TunDevice, TunOptions, not_passed_on, recv_now};
use shunt_stack::redirect::{Action, Server, ServerConfig, ServerCounters, ServerEvent};
use shunt_stack::wire::{Offload, Packet};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{oneshot, watch};
use tokio::time::{Interval, MissedTickBehavior, interval, sleep_until};

use crate::config::{Config, DivertMode};
use crate::control::{Asked, Desk, ShowFacts};
use crate::decapsulate::{DecapsulateCounters, Decapsulator};
use crate::error::Error;
use crate::listeners::Watch;
use crate::moves::Moves;
use crate::setup::{self, Facts};

/// The name of the agent's session on its host: its state files and its nftables table are called after it.
const NAME: &str = "server";

/// The most packets handled before all else that may wait is looked at.
const BATCH: usize = 64;

/// What is not in the configuration file.
#[derive(Debug, Default)]
pub struct RunOptions {
    /// Write what came in and went out to this pcapng file.
    pub capture: Option<PathBuf>,
    /// Told once the agent works.
    pub ready: Option<oneshot::Sender<()>>,
    /// Told what was done: every [`Config::listener_interval`], if it has changed, and at the end.
    pub stats: Option<watch::Sender<AgentStats>>,
    /// Where the state that survives the process is kept; [`shunt_host::DEFAULT_STATE_DIR`] unless given.
    pub state_dir: Option<PathBuf>,
    /// The control socket, whatever the configuration says of it.
    pub control_socket: Option<PathBuf>,
    /// Give up, before the first packet, what the agent does not need any more ([`shunt_host::sandbox`]). It is the
    /// calling thread that does, for good: for programs that are nothing else.
    pub sandbox: bool,
}

/// Runs the agent until `shutdown`, in the network namespace of the calling thread, then undoes its changes to the
/// host. What a killed predecessor left behind is removed first. SIGHUP reads the file again.
///
/// # Errors
/// The host could not be set up or restored, or the device broke.
pub async fn run(
    config: Config,
    options: RunOptions,
    shutdown: impl Future<Output = ()>,
) -> Result<(), Error> {
    let state_dir = options.state_dir.as_deref().unwrap_or(Path::new(shunt_host::DEFAULT_STATE_DIR));
    let mut host = Host::open_in(state_dir, NAME, &config.host).await?;
    let result = match Desk::open(&config, state_dir, options.control_socket.clone()).await {
        Ok(desk) => serve(config, options, desk, &mut host, shutdown).await,
        Err(error) => Err(error.into()),
    };
    let closed = host.close().await;
    result?;
    Ok(closed?)
}

async fn serve(
    config: Config,
    options: RunOptions,
    desk: Desk,
    host: &mut Host,
    shutdown: impl Future<Output = ()>,
) -> Result<(), Error> {
    let facts = Facts::gather(&config).await?;
    // Set up as part of the host, so that it is quiet before it is up.
    let mut tun = TunOptions::new(&config.host.device);
    tun.up = false;
    tun.super_packets = config.host.super_packets;
    let device = TunDevice::create(tun).map_err(Error::Device)?;
    let tunnels = config.decapsulate.as_ref().map(|tunnels| {
        Decapsulator::open(tunnels).map_err(|error| Error::Tunnels { port: tunnels.port, error })
    });
    let tunnels = tunnels.transpose()?;
    let hangup = signal(SignalKind::hangup()).map_err(Error::Signal)?;
    // The machine is told who listens before the first packet comes.
    let clock = Clock::start();
    let mut server = Server::new(machine(&config, &facts, clock)?);
    let mut watch = Watch::default();
    watch.look(&config, &mut server).await;
    host.apply(setup::changes(&config, &facts, &[])).await?;
    warn_of_surprises(&config, &facts).await;
    let agent = Agent {
        addresses: config.addresses.iter().copied().collect(),
        ticks: ticks(&config),
        moves: Moves::new(config.moves),
        config,
        facts,
        host,
        server,
        tunnels,
        watch,
        clock,
        hangup,
        desk,
        asked: Vec::new(),
        drained: BTreeMap::new(),
        stats: AgentStats::default(),
        publish: options.stats,
    };
    let capture = |path: PathBuf| Capture::create(&path).map_err(|error| Error::Capture { path, error });
    let capture = options.capture.map(capture).transpose()?;
    if options.sandbox {
        sandbox::enter(&confinement(&agent.config, options.state_dir, options.control_socket))?;
    }
    if let Some(ready) = options.ready {
        // Whoever waits for it may have gone.
        let _ = ready.send(());
    }
    match capture {
        None => agent.drive(device, shutdown).await,
        Some(capture) => agent.drive(Captured::new(device, capture), shutdown).await,
    }
}

/// What is left to the agent once it runs.
fn confinement(config: &Config, state_dir: Option<PathBuf>, socket: Option<PathBuf>) -> Policy {
    let places = sandbox::Places {
        config: config.path.clone(),
        keys: config.token_file.clone(),
        state_dir: state_dir.unwrap_or_else(|| PathBuf::from(shunt_host::DEFAULT_STATE_DIR)),
        socket: config.control.at(socket).socket,
    };
    Policy::of(&Confined::Server, &places)
}

fn machine(config: &Config, facts: &Facts, clock: Clock) -> Result<ServerConfig, Error> {
    let mut isn_key = [0; 16];
    let random = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut isn_key));
    random.map_err(Error::Random)?;
    Ok(config.machine(facts.mtu as usize, isn_key, clock.wall()))
}

fn ticks(config: &Config) -> Interval {
    let mut ticks = interval(config.listener_interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

async fn warn_of_surprises(config: &Config, facts: &Facts) {
    if config.divert == DivertMode::Nft && !facts.nft {
        tracing::warn!(
            "this kernel has no nftables: all TCP of the services passes through the agent, at a fraction of the \
             kernel's speed, and ICMP errors about redirecting SYN-ACKs are not translated; load nf_tables, or write \
             `divert = \"all\"` to do without this warning"
        );
    }
    for address in &config.addresses {
        let local = query::next_hop(*address).await.is_ok_and(|hop| hop.local);
        if !local {
            tracing::warn!(%address, "this is no address of this host: its TCP will not take packets to it");
        }
    }
}

/// What the agent has done since its start, in packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct AgentStats {
    /// Seen by the protocol machine: to or from one of our addresses.
    pub packets: u64,
    /// Neither to nor from one of our addresses: dropped.
    pub foreign: u64,
    /// Not readable as packets: dropped.
    pub malformed: u64,
    /// Not taken by the device when they were written back.
    pub unsent: u64,
    /// Segments that made idle connections say where they stand, before they were asked to move.
    pub probes: u64,
    /// Datagrams of balancers' tunnels.
    pub tunnels: DecapsulateCounters,
    /// What the protocol machine made of those it saw.
    pub server: ServerCounters,
}

struct Agent<'a> {
    config: Config,
    facts: Facts,
    host: &'a mut Host,
    server: Server,
    tunnels: Option<Decapsulator>,
    watch: Watch,
    addresses: BTreeSet<IpAddr>,
    clock: Clock,
    ticks: Interval,
    hangup: Signal,
    desk: Desk,
    moves: Moves,
    /// Who waits for the kernel to say which connections there are.
    asked: Vec<moving::Waiting>,
    /// Where new clients of drained services are sent.
    drained: BTreeMap<String, u16>,
    stats: AgentStats,
    publish: Option<watch::Sender<AgentStats>>,
}

impl Agent<'_> {
    async fn drive<D: Device>(mut self, device: D, shutdown: impl Future<Output = ()>) -> Result<(), Error> {
        let mut shutdown = pin!(shutdown);
        let mut buffer = BytesMut::with_capacity(usize::from(u16::MAX) + 1);
        loop {
            let deadlines = [self.server.poll_timeout(), self.moves.poll_timeout()];
            let deadline = deadlines.into_iter().flatten().min().map(|at| self.clock.timer(at));
            let due = async {
                match deadline {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let tunnelled = async {
                match &mut self.tunnels {
                    Some(tunnels) => tunnels.recv().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = &mut shutdown => break,
                _ = self.hangup.recv() => self.reload().await,
                _ = self.ticks.tick() => {
                    self.server.set_clock(self.clock.wall());
                    self.watch.look(&self.config, &mut self.server).await;
                    self.publish();
                }
                asked = self.desk.next() => self.answer(asked),
                () = due => {
                    self.advance_moves(&device).await;
                    self.flush(&device, None).await;
                }
                received = device.recv(&mut buffer) => {
                    let offload = received
                        .map_err(|error| Error::Read { name: device.name().to_owned(), error })?;
                    buffer = self.handle_received(&device, buffer, offload).await;
                }
                // Last: bulk comes here, and handshakes above must not wait for it.
                packet = tunnelled => self.handle_tunnelled(&device, packet).await,
            }
        }
        self.publish();
        tracing::info!(stats = ?self.stats, "the agent ends");
        Ok(())
    }

    /// Handles what the device gave, and more if it is there already; gives the buffer back.
    async fn handle_received<D: Device>(&mut self, device: &D, buffer: BytesMut, first: Offload) -> BytesMut {
        let mut buffer = self.handle_bytes(device, buffer, first).await;
        for _ in 1..BATCH {
            // An error is told again.
            let Some(Ok(offload)) = recv_now(device, &mut buffer).await else { break };
            buffer = self.handle_bytes(device, buffer, offload).await;
        }
        buffer
    }

    async fn handle_bytes<D: Device>(&mut self, device: &D, bytes: BytesMut, offload: Offload) -> BytesMut {
        match Packet::parse(bytes, offload) {
            Ok(packet) => self.handle(device, packet).await,
            Err(rejected) => {
                self.stats.malformed += 1;
                tracing::trace!(error = %rejected.error, "a packet that cannot be read");
                device.dropped(|| not_passed_on(&rejected.error.to_string()));
                rejected.buffer
            }
        }
    }

    /// Takes a packet through the machine; gives its buffer back.
    async fn handle<D: Device>(&mut self, device: &D, mut packet: Packet) -> BytesMut {
        let now = self.clock.now();
        let action = if self.addresses.contains(&packet.destination()) {
            self.stats.packets += 1;
            self.server.handle_remote(now, &mut packet)
        } else if self.addresses.contains(&packet.source()) {
            self.stats.packets += 1;
            self.on_local(now, &mut packet)
        } else {
            self.stats.foreign += 1;
            Action::Drop
        };
        let why = self.tell();
        if action == Action::Pass {
            self.send(device, &packet, why).await;
        } else {
            device.dropped(|| not_passed_on(&in_words(why)));
        }
        self.flush(device, why).await;
        packet.into_buffer()
    }

    /// Takes a packet out of a tunnel through the machine, as if it had come by the interface.
    async fn handle_tunnelled<D: Device>(&mut self, device: &D, packet: Packet) {
        if self.addresses.contains(&packet.destination()) {
            self.handle(device, packet).await;
        } else if let Some(tunnels) = &mut self.tunnels {
            tunnels.counters.foreign += 1;
        }
    }

    /// Sends what the machine has to send: the routes know where to, whichever direction it is.
    async fn flush<D: Device>(&mut self, device: &D, why: Option<ServerEvent>) {
        while let Some(transmit) = self.server.poll_transmit(self.clock.now()) {
            let told = self.tell();
            self.send(device, &transmit.packet, told.or(why)).await;
        }
        self.tell();
    }

    /// Takes notice of what has happened; gives the last of it.
    fn tell(&mut self) -> Option<ServerEvent> {
        let mut told = None;
        while let Some(event) = self.server.poll_event() {
            told = Some(event);
            self.on_event(event);
            narrate(event);
        }
        told
    }

    async fn send<D: Device>(&mut self, device: &D, packet: &Packet, why: Option<ServerEvent>) {
        if let Err(error) = device.send_because(packet, || in_words(why)).await {
            // One packet's fault, or the device is gone, which reading will tell.
            self.stats.unsent += 1;
            tracing::debug!(%error, length = packet.len(), "the device did not take a packet");
        }
    }

    fn answer(&mut self, asked: Asked) {
        self.count();
        let facts = ShowFacts { config: &self.config, watch: &self.watch, drained: &self.drained };
        if let Some(order) = self.desk.answer(asked, &facts, &self.stats) {
            self.obey(order);
        }
    }

    fn count(&mut self) {
        self.stats.server = *self.server.counters();
        if let Some(tunnels) = &self.tunnels {
            self.stats.tunnels = tunnels.counters;
        }
    }

    fn publish(&mut self) {
        self.count();
        if let Some(publish) = &self.publish {
            publish.send_if_modified(|known| std::mem::replace(known, self.stats) != self.stats);
        }
    }

    /// Takes on the file as it is now; as a whole or not at all.
    async fn reload(&mut self) {
        let path = self.config.path.clone();
        let new = match Config::load(&path) {
            Ok(new) => new,
            Err(error) => return tracing::error!("the configuration stays as it was: {error}"),
        };
        if let Some(key) = self.config.needs_restart(&new) {
            return tracing::error!("the configuration stays as it was: `{key}` only changes with a restart");
        }
        // The rest describes the host as it was before we changed it.
        let facts = Facts { nft: shunt_host::nft_available().await, ..self.facts.clone() };
        if let Err(error) = self.host.replace(setup::changes(&new, &facts, &self.moves.diverted())).await {
            tracing::error!(%error, "the configuration stays as it was");
            if let Err(error) =
                self.host.replace(setup::changes(&self.config, &self.facts, &self.moves.diverted())).await
            {
                tracing::error!(%error, "the host could not be set back to it: restart the agent");
            }
            return;
        }
        self.server.set_services(&new.service_ports());
        self.server.set_tokens(new.tokens.clone(), new.shared.clone());
        self.addresses = new.addresses.iter().copied().collect();
        self.ticks = ticks(&new);
        self.config = new;
        self.facts = facts;
        self.apply_drains();
        self.watch.look(&self.config, &mut self.server).await;
        warn_of_surprises(&self.config, &self.facts).await;
        tracing::info!(path = %path.display(), "the configuration was read again");
    }
}

/// What was decided about a packet; empty for most.
fn in_words(why: Option<ServerEvent>) -> String {
    why.map(|event| event.to_string()).unwrap_or_default()
}

fn narrate(event: ServerEvent) {
    match event {
        ServerEvent::Answered { client, asked, port } => {
            tracing::debug!(%client, %asked, port, "sent to its service port: reconnect");
        }
        ServerEvent::HandedOver { client, asked, port } => {
            tracing::debug!(%client, %asked, port, "sent to its service port: handover");
        }
        ServerEvent::Confirmed { client, service, moved_from } => {
            tracing::debug!(%client, %service, moved_from, "confirmed");
        }
        ServerEvent::Redirection { client, service, to, outcome } => {
            tracing::debug!(%client, %service, to, ?outcome, "asked to move");
        }
        ServerEvent::Rebound { client, service, port } => {
            tracing::debug!(%client, %service, port, "the client has another port");
        }
        ServerEvent::Load { demanded: true } => {
            tracing::warn!("many SYNs come to service ports: tokens are demanded from now on");
        }
        ServerEvent::Load { demanded: false } => tracing::info!("tokens are no longer demanded"),
        ServerEvent::Declined { client, asked, reason } => {
            tracing::debug!(%client, %asked, ?reason, "not redirected");
        }
    }
}
