//! The host as the shim has changed it, and the ways to the VIPs.

use std::net::IpAddr;
use std::path::Path;

use shunt_host::{Host, HostError};
use shunt_stack::redirect::PathId;

use crate::config::{Config, Hold};
use crate::error::Error;
use crate::flows::FlowFile;
use crate::offload::{Kernel, Obstacle};
use crate::paths::Paths;
use crate::setup::{self, Facts};

/// The name under which the shim changes its host.
const NAME: &str = "client";
/// The name under which it leaves behind what holds connections in its absence.
const GUARD: &str = "client-hold";

/// The shim's hold of its host. [`close`](Self::close) gives everything back.
pub(crate) struct Session {
    config: Config,
    host: Host,
    guard: Option<Host>,
    paths: Paths,
    facts: Facts,
    file: FlowFile,
    /// Why the kernel exchanges no ports by itself, if it does not.
    obstacle: Option<Obstacle>,
    /// Why routes could not be followed the last time.
    trouble: Option<String>,
}

impl Session {
    /// Removes what an earlier run has left and finds the ways to the VIPs. What holds the earlier run's connections
    /// stays until [`set_up`](Self::set_up).
    ///
    /// # Errors
    /// Another shim runs in this namespace; a VIP is this host's own; the kernel refuses.
    pub(crate) async fn open(config: Config, state_dir: &Path) -> Result<Self, Error> {
        let host = Host::open_in(state_dir, NAME, &config.host).await?;
        let guard = setup::guard_options(&config.host);
        match Self::look_around(config, host, state_dir).await {
            Ok(session) => Ok(session),
            Err(error) => {
                // Nobody is coming who would let connections go on.
                if let Err(sweep) = Host::sweep(state_dir, GUARD, &guard).await {
                    tracing::warn!(%sweep, "what held connections could not be removed");
                }
                Err(error)
            }
        }
    }

    async fn look_around(config: Config, host: Host, state_dir: &Path) -> Result<Self, Error> {
        let paths = Paths::look_up(config.vips(), config.interface.as_deref()).await?;
        for vip in config.vips().filter(|vip| paths.get(*vip).is_none()) {
            tracing::warn!(%vip, "no route leads to this VIP; it is left alone until there is one");
        }
        let file = FlowFile::new(state_dir).map_err(|error| shunt_host::HostError::File {
            action: "create",
            path: state_dir.to_owned(),
            error,
        })?;
        let facts = Facts::gather(&paths).await;
        if !facts.nft {
            tracing::warn!(
                "no nftables here: ICMP errors of routers about redirected connections cannot be diverted, so that \
                 uploads over a smaller MTU may hang"
            );
        }
        let obstacle = Some(Obstacle::Off);
        Ok(Self { config, host, guard: None, paths, facts, file, obstacle, trouble: None })
    }

    /// Changes the host; the device exists. `recorded`: a capture has to see every packet.
    ///
    /// # Errors
    /// The kernel refuses; nothing is left then.
    pub(crate) async fn set_up(&mut self, state_dir: &Path, recorded: bool) -> Result<(), Error> {
        self.host.apply(setup::changes(&self.config, &self.paths, &self.facts)).await?;
        self.obstacle = Obstacle::of(&self.config, recorded, self.facts.nft);
        if self.obstacle.is_none() {
            self.offload().await?;
        }
        let options = setup::guard_options(&self.config.host);
        // Only now, when segments reach the shim, may an earlier run's guard go.
        let mut guard = Host::open_in(state_dir, GUARD, &options).await?;
        if self.config.proxy.is_none() && self.config.hold != Hold::Never {
            guard.apply(setup::guard(&self.config, &self.paths)).await?;
        }
        self.guard = Some(guard);
        for (vip, path) in self.paths.iter() {
            let hop = &path.hop;
            tracing::info!(%vip, interface = hop.interface, gateway = ?hop.gateway, "VIP diverted");
        }
        Ok(())
    }

    /// Lets the kernel exchange ports by itself. What it refuses stays in userspace.
    async fn offload(&mut self) -> Result<(), Error> {
        self.facts.offload = true;
        if let Err(error) = self.replace().await {
            self.without_offload(&error.to_string()).await?;
        }
        Ok(())
    }

    /// Takes all connections back into userspace.
    ///
    /// # Errors
    /// The kernel keeps what it has: its maps would lead other connections astray.
    pub(crate) async fn without_offload(&mut self, why: &str) -> Result<(), Error> {
        tracing::warn!(why, "the kernel exchanges no ports by itself: all packets go through userspace");
        self.facts.offload = false;
        self.obstacle = Some(Obstacle::Kernel(why.to_owned()));
        self.replace().await
    }

    /// The way to what the kernel does by itself.
    ///
    /// # Errors
    /// The kernel gives no socket.
    pub(crate) fn kernel(&self) -> Result<Kernel, HostError> {
        Ok(Kernel::new(self.host.port_swaps()?, self.obstacle.clone()))
    }

    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    pub(crate) fn paths(&self) -> &Paths {
        &self.paths
    }

    pub(crate) fn flow_file(&self) -> &FlowFile {
        &self.file
    }

    /// The device's MTU in bytes, as set up.
    pub(crate) fn mtu(&self) -> u32 {
        self.facts.mtu
    }

    /// Tells the machine by which way each VIP is reached.
    pub(crate) fn tell_paths(&self, mut set_path: impl FnMut(IpAddr, PathId)) {
        for (vip, path) in self.paths.iter() {
            set_path(vip, path.id());
        }
    }

    /// Looks whether routes have changed, and follows them; says whether they had. What cannot be followed now is
    /// tried again the next time.
    pub(crate) async fn follow_paths(&mut self) -> bool {
        match self.try_to_follow().await {
            Ok(changed) => {
                self.trouble = None;
                changed
            }
            Err(error) => {
                let trouble = error.to_string();
                if self.trouble.as_ref() != Some(&trouble) {
                    tracing::warn!(%error, "cannot follow the routes to the VIPs");
                    self.trouble = Some(trouble);
                }
                false
            }
        }
    }

    async fn try_to_follow(&mut self) -> Result<bool, Error> {
        let interface = self.config.interface.as_deref();
        let paths = Paths::look_up(self.config.vips(), interface).await?.or(&self.paths);
        if paths == self.paths {
            return Ok(false);
        }
        // Interfaces come and go between the question and the change: until all is made, nothing counts as made.
        let old = std::mem::take(&mut self.paths);
        if paths.has_new_interface(&old) {
            // Routes and sysctls of one that was made anew under its old name are gone, though its name still fits.
            self.host.replace(setup::changes(&self.config, &self.paths, &self.facts)).await?;
        }
        self.paths = paths.clone();
        if let Err(error) = self.replace().await {
            self.paths = Paths::default();
            return Err(error);
        }
        tracing::info!(?paths, "routes to VIPs have changed");
        Ok(true)
    }

    async fn replace(&mut self) -> Result<(), Error> {
        if let Some(guard) = &mut self.guard
            && guard.changes().next().is_some()
        {
            guard.replace(setup::guard(&self.config, &self.paths)).await?;
        }
        Ok(self.host.replace(setup::changes(&self.config, &self.paths, &self.facts)).await?)
    }

    /// Takes another configuration.
    ///
    /// # Errors
    /// A new VIP is this host's own; or the kernel refuses.
    pub(crate) async fn reconfigure(&mut self, config: Config) -> Result<(), Error> {
        let paths = Paths::look_up(config.vips(), config.interface.as_deref()).await?;
        self.config = config;
        self.paths = paths;
        self.replace().await
    }

    /// Gives the host back.
    ///
    /// # Errors
    /// Something could not be undone; the next start tries again.
    pub(crate) async fn close(self, state_dir: &Path) -> Result<(), Error> {
        let main = self.host.close().await;
        if self.config.hold == Hold::Always && self.guard.is_some() && self.config.proxy.is_none() {
            tracing::info!(
                "TCP to and from the VIPs is held until the shim is started again (hold = \"always\")"
            );
            return Ok(main?);
        }
        let guard = if let Some(guard) = self.guard {
            guard.close().await
        } else {
            let options = setup::guard_options(&self.config.host);
            Host::sweep(state_dir, GUARD, &options).await.map(drop)
        };
        main?;
        Ok(guard?)
    }
}
