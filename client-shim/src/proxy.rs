//! As a proxy: SOCKS5 and port forwards in front, connections to VIPs on the userspace stack behind, from the host's
//! own address and ports that the kernel leaves alone.

mod device;
mod relay;
mod socks;

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use shunt_stack::device::Device;
use shunt_stack::endpoint::{ClientOptions, Endpoint, MoveAt, TcpOptions, TcpStream};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::Outside;
use crate::config::{Boundary, Config, ProxyConfig};
use crate::control::{self, ProxyFacts};
use crate::error::Error;
use crate::session::Session;
use device::Filtered;

/// How long connections may take to end when the proxy is stopped.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two attempts to accept, after one that failed (no more file descriptors, mostly).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Runs the proxy over `device` until `shutdown`.
///
/// # Errors
/// An address cannot be listened on; the device is gone; the host's routing could not follow a change.
pub(crate) async fn drive<D: Device + 'static>(
    session: &mut Session,
    proxy: ProxyConfig,
    device: D,
    mut outside: Outside,
    ready: Option<oneshot::Sender<()>>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), Error> {
    let (failure, mut failed) = mpsc::channel(1);
    let device = Arc::new(Filtered::new(device, session.config(), &proxy, failure));
    let upstream = Arc::new(Upstream::new(session.config(), &proxy));
    upstream.follow(session, &device)?;
    let mut listening = listen(&proxy, &upstream).await?;
    if let Some(ready) = ready {
        // Whoever asked may have gone.
        let _ = ready.send(());
    }
    let mut paths = interval(session.config().path_interval);
    paths.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tokio::pin!(shutdown);
    let result = loop {
        tokio::select! {
            Some(error) = failed.recv() => {
                break Err(Error::Device { name: device.name().to_owned(), error });
            }
            _ = paths.tick() => {
                // Connections from addresses that are no more cannot go on.
                if !session.follow_paths().await {
                    continue;
                }
                if upstream.addresses() != own_addresses(session) {
                    listening.shutdown().await;
                    upstream.follow(session, &device)?;
                    listening = listen(&proxy, &upstream).await?;
                } else if let Some((_, endpoint)) = upstream.endpoint().as_ref() {
                    session.tell_paths(|vip, path| endpoint.set_path(vip, path));
                }
            }
            // Never a configuration: a proxy's is refused.
            _ = outside.reload.wait(session.config()) => {}
            call = outside.asked.next() => control::answer_proxy(call, session, &upstream.facts()),
            () = &mut shutdown => break Ok(()),
        }
    };
    listening.shutdown().await;
    upstream.close().await;
    result
}

/// The host's addresses towards the VIPs.
fn own_addresses(session: &Session) -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> = session.paths().iter().filter_map(|(_, path)| path.hop.source).collect();
    addresses.sort();
    addresses.dedup();
    addresses
}

/// Binds all addresses, then accepts on them.
async fn listen(proxy: &ProxyConfig, upstream: &Arc<Upstream>) -> Result<JoinSet<()>, Error> {
    let bind = async |address: SocketAddr| {
        TcpListener::bind(address).await.map_err(|error| Error::Listen { address, error })
    };
    let mut services = Vec::new();
    if let Some(address) = proxy.socks5 {
        if !address.ip().is_loopback() {
            tracing::warn!(%address, "SOCKS5 without authentication is offered beyond this host");
        }
        services.push((bind(address).await?, Service::Socks5));
    }
    for forward in &proxy.forward {
        services.push((bind(forward.listen).await?, Service::Forward(forward.target)));
    }
    let mut listening = JoinSet::new();
    for (listener, service) in services {
        listening.spawn(accept(listener, service, Arc::clone(upstream)));
    }
    Ok(listening)
}

/// What a listening address offers.
#[derive(Debug, Clone, Copy)]
enum Service {
    Socks5,
    Forward(SocketAddr),
}

/// Serves one listening address; its connections end with it.
async fn accept(listener: TcpListener, service: Service, upstream: Arc<Upstream>) {
    let mut connections = JoinSet::new();
    loop {
        let (program, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // Beyond the limit this one waits here, and more in the kernel's backlog.
        let Ok(permit) = Arc::clone(&upstream.permits).acquire_owned().await else { return };
        let upstream = Arc::clone(&upstream);
        connections.spawn(async move {
            let result = match service {
                Service::Socks5 => socks::serve(program, &upstream).await,
                Service::Forward(target) => relay::forward(program, target, &upstream).await,
            };
            if let Err(error) = result {
                tracing::debug!(%peer, %error, "a connection failed");
            }
            drop(permit);
        });
        while connections.try_join_next().is_some() {}
    }
}

/// The way to the VIPs.
pub(crate) struct Upstream {
    vips: Vec<IpAddr>,
    options: ClientOptions,
    request_timeout: Duration,
    boundary: Boundary,
    /// Connections at once.
    most: usize,
    permits: Arc<Semaphore>,
    /// With the own addresses it was made for; none while no VIP has a route.
    endpoint: Mutex<Option<(Vec<IpAddr>, Endpoint)>>,
}

impl Upstream {
    fn new(config: &Config, proxy: &ProxyConfig) -> Self {
        let options = ClientOptions {
            redirect: config.client.clone(),
            ports: proxy.ports.first()..=proxy.ports.last(),
            connect_timeout: proxy.connect_timeout,
            tcp: TcpOptions::default(),
            move_at: match proxy.boundary {
                Boundary::None | Boundary::Line => MoveAt::Boundary,
                Boundary::Idle(time) => MoveAt::Idle(time),
            },
            ..ClientOptions::default()
        };
        Self {
            vips: config.vips().collect(),
            options,
            request_timeout: proxy.request_timeout,
            boundary: proxy.boundary,
            most: proxy.max_connections,
            permits: Arc::new(Semaphore::new(proxy.max_connections)),
            endpoint: Mutex::new(None),
        }
    }

    fn endpoint(&self) -> MutexGuard<'_, Option<(Vec<IpAddr>, Endpoint)>> {
        self.endpoint.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The addresses connected from.
    fn addresses(&self) -> Vec<IpAddr> {
        self.endpoint().as_ref().map(|(addresses, _)| addresses.clone()).unwrap_or_default()
    }

    /// Makes an endpoint for the addresses that the host has towards the VIPs now.
    fn follow<D: Device + 'static>(&self, session: &Session, device: &Arc<Filtered<D>>) -> Result<(), Error> {
        let addresses = own_addresses(session);
        *self.endpoint() = None;
        if !addresses.is_empty() {
            tracing::info!(?addresses, "connecting from");
            let options = ClientOptions { addresses: addresses.clone(), ..self.options.clone() };
            let made = Endpoint::client(Arc::clone(device), options)
                .map_err(|error| Error::Device { name: device.name().to_owned(), error })?;
            session.tell_paths(|vip, path| made.set_path(vip, path));
            *self.endpoint() = Some((addresses, made));
        }
        Ok(())
    }

    /// What there is to tell.
    fn facts(&self) -> ProxyFacts {
        let endpoint = self.endpoint();
        let endpoint = endpoint.as_ref().map(|(_, endpoint)| endpoint);
        ProxyFacts {
            most: self.most,
            connections: self.most - self.permits.available_permits(),
            machine: endpoint.and_then(Endpoint::client_counters).unwrap_or_default(),
            endpoint: endpoint.map(Endpoint::counters).unwrap_or_default(),
        }
    }

    /// Whether a proxy's client may go there.
    pub(crate) fn is_vip(&self, address: IpAddr) -> bool {
        self.vips.contains(&address)
    }

    /// How long a SOCKS client may take to say where it wants to go.
    pub(crate) fn request_timeout(&self) -> Duration {
        self.request_timeout
    }

    /// Whether streams are cut behind lines, which the relay marks.
    pub(crate) fn marks_lines(&self) -> bool {
        self.boundary == Boundary::Line
    }

    /// Connects to a VIP.
    ///
    /// # Errors
    /// As [`Endpoint::connect`]; `HostUnreachable` while no route leads to any VIP.
    pub(crate) async fn connect(&self, target: SocketAddr) -> io::Result<TcpStream> {
        let endpoint = self.endpoint().as_ref().map(|(_, endpoint)| endpoint.clone());
        match endpoint {
            Some(endpoint) => endpoint.connect(target).await,
            None => Err(io::Error::new(io::ErrorKind::HostUnreachable, "no route leads to the VIPs")),
        }
    }

    /// Lets what was written arrive, for a while.
    async fn close(&self) {
        let endpoint = self.endpoint().take();
        let Some((_, endpoint)) = endpoint else { return };
        tracing::info!(machine = ?endpoint.client_counters(), endpoint = ?endpoint.counters(), "stopping");
        if timeout(PATIENCE, endpoint.close()).await.is_err() {
            tracing::debug!("connections were still closing");
        }
    }
}
