//! The three daemons: configuration read, runtime started, signals turned into a shutdown.

use std::future::Future;
use std::process::ExitCode;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::cli::{ClientArgs, DaemonArgs};

/// `shunt balancer`.
pub(crate) fn balancer(arguments: DaemonArgs) -> anyhow::Result<ExitCode> {
    let config = shunt_balancer::Config::load(&arguments.config)?;
    block_on(|ready, shutdown| {
        let options = shunt_balancer::RunOptions {
            capture: arguments.capture,
            ready: Some(ready),
            config_path: None,
            state_dir: Some(arguments.state_dir),
            control_socket: arguments.socket,
            sandbox: !arguments.no_sandbox,
            ..shunt_balancer::RunOptions::default()
        };
        shunt_balancer::run(config, options, shutdown)
    })
}

/// `shunt client`.
pub(crate) fn client(arguments: ClientArgs) -> anyhow::Result<ExitCode> {
    let extra = shunt_client_shim::config::Extra {
        socks5: arguments.socks5,
        forward: arguments.forward,
        boundary: arguments.boundary,
    };
    let config = shunt_client_shim::Config::load_with(&arguments.daemon.config, &extra)?;
    block_on(|ready, shutdown| {
        let options = shunt_client_shim::RunOptions {
            capture: arguments.daemon.capture,
            ready: Some(ready),
            state_dir: arguments.daemon.state_dir,
            control_socket: arguments.daemon.socket,
            sandbox: !arguments.daemon.no_sandbox,
        };
        shunt_client_shim::run(config, options, shutdown)
    })
}

/// `shunt server`.
pub(crate) fn server(arguments: DaemonArgs) -> anyhow::Result<ExitCode> {
    let config = shunt_server_agent::Config::load(&arguments.config)?;
    block_on(|ready, shutdown| {
        let options = shunt_server_agent::RunOptions {
            capture: arguments.capture,
            ready: Some(ready),
            state_dir: Some(arguments.state_dir),
            control_socket: arguments.socket,
            sandbox: !arguments.no_sandbox,
            ..Default::default()
        };
        shunt_server_agent::run(config, options, shutdown)
    })
}

/// Runs a daemon on one thread until it ends or SIGTERM or SIGINT tell it to; says `ready` when it is.
fn block_on<F, E>(
    start: impl FnOnce(oneshot::Sender<()>, std::pin::Pin<Box<dyn Future<Output = ()> + Send>>) -> F,
) -> anyhow::Result<ExitCode>
where
    F: Future<Output = Result<(), E>>,
    E: std::error::Error + Send + Sync + 'static,
{
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .on_thread_start(shunt_balancer::driver::unpin)
        .build()
        .context("no event loop: raise the limit of open files (ulimit -n)")?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let shutdown = Box::pin(async move {
            tokio::select! {
                _ = terminate.recv() => tracing::info!("SIGTERM: ending"),
                _ = interrupt.recv() => tracing::info!("SIGINT: ending"),
            }
        });
        let (sender, receiver) = oneshot::channel();
        tokio::spawn(async move {
            if receiver.await.is_ok() {
                tracing::info!("ready");
            }
        });
        start(sender, shutdown).await?;
        Ok(ExitCode::SUCCESS)
    })
}
