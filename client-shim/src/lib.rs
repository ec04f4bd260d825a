//! Port redirection beside the client's kernel, and as a proxy.
//!
//! In *transparent* mode programs and the kernel's TCP stay as they are: [`run`] routes their segments to VIPs through
//! a TUN device, where [`shunt_stack::redirect::Client`] asks for redirects and follows them. As a *proxy* it offers
//! SOCKS5 and port forwards, and connects on the userspace stack. Nothing of the protocol is decided here.

pub mod config;
pub mod doctor;

mod control;
mod device;
mod error;
mod flows;
mod offload;
mod paths;
mod proxy;
mod reload;
mod session;
mod setup;
mod shim;
mod transparent;

use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use shunt_host::Role;
use shunt_host::control::{ControlOptions, Server};
use shunt_host::sandbox::{self, Confined, Policy};
use shunt_stack::device::{Captured, Device};
use tokio::sync::oneshot;

pub use config::Config;
pub use error::Error;

use reload::Reload;
use session::Session;

/// What the command line says, beside the configuration.
#[derive(Debug)]
pub struct RunOptions {
    /// Where to write every packet read from and written to the device, as pcapng.
    pub capture: Option<PathBuf>,
    /// Told once the host is set up and packets are handled.
    pub ready: Option<oneshot::Sender<()>>,
    /// Where the changes made to the host and the redirected connections are kept, for the next start.
    pub state_dir: PathBuf,
    /// The control socket, whatever the configuration says of it.
    pub control_socket: Option<PathBuf>,
    /// Give up, before the first packet, what the client does not need any more ([`shunt_host::sandbox`]). It is the
    /// calling thread that does, for good: for programs that are nothing else.
    pub sandbox: bool,
}

impl Default for RunOptions {
    fn default() -> Self {
        let state_dir = PathBuf::from(shunt_host::DEFAULT_STATE_DIR);
        Self { capture: None, ready: None, state_dir, control_socket: None, sandbox: false }
    }
}

/// Runs the client until `shutdown` completes, then undoes what it has changed on the host. SIGHUP reads the
/// configuration again. Acts on the network namespace of the calling thread: use a single-threaded runtime where that
/// is not the process's own.
///
/// # Errors
/// The host cannot be set up (nothing is left of the attempt), the device breaks, or the host cannot be restored.
pub async fn run(
    config: Config,
    options: RunOptions,
    shutdown: impl Future<Output = ()>,
) -> Result<(), Error> {
    let reload = Reload::listen()?;
    let state_dir = options.state_dir.clone();
    let mut session = Session::open(config, &state_dir).await?;
    let result = serve(&mut session, reload, options, shutdown).await;
    let closed = session.close(&state_dir).await;
    result.and(closed)
}

async fn serve(
    session: &mut Session,
    reload: Reload,
    options: RunOptions,
    shutdown: impl Future<Output = ()>,
) -> Result<(), Error> {
    let capture = options.capture.as_deref().map(device::capture).transpose()?;
    let control = session.config().control.at(options.control_socket);
    let confined = options.sandbox.then(|| confinement(session.config(), &options.state_dir, &control));
    let asked = Server::open(&control, &options.state_dir, Role::Client)?;
    let tun = device::open(&session.config().host, session.mtu())?;
    session.set_up(&options.state_dir, capture.is_some()).await?;
    if let Some(policy) = confined {
        sandbox::enter(&policy)?;
    }
    let outside = Outside { reload, asked };
    match capture {
        None => drive(session, tun, outside, options.ready, shutdown).await,
        Some(capture) => drive(session, Captured::new(tun, capture), outside, options.ready, shutdown).await,
    }
}

/// What is left to the client once it runs.
fn confinement(config: &Config, state_dir: &Path, control: &ControlOptions) -> Policy {
    let daemon = match &config.proxy {
        None => Confined::Client,
        Some(proxy) => {
            let forwards = proxy.forward.iter().map(|forward| forward.listen.port());
            Confined::Proxy { listens: proxy.socks5.iter().map(SocketAddr::port).chain(forwards).collect() }
        }
    };
    let places = sandbox::Places {
        config: config.path.clone(),
        keys: None,
        state_dir: state_dir.to_owned(),
        socket: control.socket.clone(),
    };
    Policy::of(&daemon, &places)
}

/// What comes beside packets.
struct Outside {
    reload: Reload,
    asked: Server,
}

async fn drive<D: Device + 'static>(
    session: &mut Session,
    device: D,
    outside: Outside,
    ready: Option<oneshot::Sender<()>>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), Error> {
    match session.config().proxy.clone() {
        None => transparent::drive(session, &device, outside, ready, shutdown).await,
        Some(proxy) => proxy::drive(session, proxy, device, outside, ready, shutdown).await,
    }
}
