//! SIGHUP: the configuration is read again.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::config::Config;
use crate::error::Error;

/// Waits for SIGHUP.
pub(crate) struct Reload(Signal);

impl Reload {
    /// From now on SIGHUP no longer ends the process.
    ///
    /// # Errors
    /// The system refuses the handler.
    pub(crate) fn listen() -> Result<Self, Error> {
        signal(SignalKind::hangup()).map(Self).map_err(Error::Signal)
    }

    /// A configuration that can take the place of `old`; others are refused whole, and the log says why.
    pub(crate) async fn wait(&mut self, old: &Config) -> Config {
        loop {
            if self.0.recv().await.is_none() {
                std::future::pending::<()>().await;
            }
            match read(old) {
                Ok(config) => return config,
                Err(why) => tracing::error!("SIGHUP: {why}; going on as before"),
            }
        }
    }
}

fn read(old: &Config) -> Result<Config, String> {
    if old.proxy.is_some() {
        return Err(
            "a proxy takes another configuration by a restart only, which ends its connections".to_owned()
        );
    }
    let new = Config::load(&old.path).map_err(|error| error.to_string())?;
    match old.needs_restart(&new) {
        Some(key) => Err(format!(
            "{key} has changed, which takes a restart (with hold = \"always\" connections survive it)"
        )),
        None => Ok(new),
    }
}
