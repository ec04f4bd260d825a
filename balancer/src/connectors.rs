//! The links towards servers (`direct` and `datalink` mode): a server whose link is not there takes nothing, and is used
//! again when it appears.
//!
//! What is there is part of the configuration that `B6` speaks of: it changes by what the kernel tells, never by a packet.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use shunt_host::links::{LinkNews, LinkWatch, Neighbour};
use shunt_host::{Family, HostError};
use shunt_stack::device::Device;
use tokio::time::{Instant, sleep, sleep_until};

use crate::config::{Config, ForwardMode, Server};
use crate::driver::Daemon;
use crate::health::Unfit;
use crate::host::{Devices, changes};
use crate::tunnel::{Tunnels, look};

/// A link that appeared and could not be used is tried again after this.
const RETRY: Duration = Duration::from_secs(1);

/// What is known of the links.
pub(crate) struct Connectors {
    /// `None` where servers have none.
    watch: Option<LinkWatch>,
    /// When to try again what could not be used.
    retry: Option<Instant>,
    /// Next hops that nobody answers for.
    unresolved: BTreeSet<(String, IpAddr)>,
}

impl Connectors {
    /// Begins to follow the links, if the configuration's mode uses any.
    pub(crate) async fn start(config: &Config) -> Result<Self, HostError> {
        let watch = if config.forward.uses_devices() { Some(LinkWatch::start().await?) } else { None };
        Ok(Self { watch, retry: None, unresolved: BTreeSet::new() })
    }

    /// Whether a server's link is there.
    pub(crate) fn has(&self, server: &Server) -> bool {
        let usable = |device: &String| self.watch.as_ref().is_none_or(|watch| watch.is_usable(device));
        server.device.as_ref().is_none_or(usable)
    }

    /// Notes in `devices`, which are of the same servers, which links are there.
    pub(crate) fn mark(&self, config: &Config, devices: &mut Devices) {
        for (server, device) in config.servers.iter().zip(&mut devices.servers) {
            device.connected = self.has(server);
        }
    }

    /// What is to be said of a server's link; `None` if it has none.
    pub(crate) fn describe(&self, server: &Server) -> Option<&'static str> {
        let device = server.device.as_ref()?;
        let silent = |family| {
            server.next_hop(family).is_some_and(|hop| self.unresolved.contains(&(device.clone(), hop)))
        };
        Some(match (self.has(server), Family::BOTH.into_iter().any(silent)) {
            (false, _) => "missing",
            (true, true) => "unresolved",
            (true, false) => "there",
        })
    }

    /// Waits for news; none at all means that what could not be used is to be tried again. Cancel-safe.
    pub(crate) async fn news(&mut self) -> LinkNews {
        let Some(watch) = &mut self.watch else { return std::future::pending().await };
        loop {
            let retry = async {
                match self.retry {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let error = tokio::select! {
                news = watch.news() => match news {
                    Ok(news) => return news,
                    Err(error) => error,
                },
                () = retry => {
                    self.retry = None;
                    return LinkNews::default();
                }
            };
            tracing::error!(%error, "the links of servers are followed anew");
            sleep(RETRY).await;
            if let Err(error) = watch.restart().await {
                tracing::error!(%error, "the links of servers cannot be followed");
            }
        }
    }
}

/// Adds to those that are unfit who cannot be reached.
pub(crate) fn without_the_missing(mut unfit: Unfit, devices: &Devices, tunnels: Option<&Tunnels>) -> Unfit {
    if let Some(tunnels) = tunnels {
        for index in (0..tunnels.servers()).filter(|index| !tunnels.reach(*index)) {
            unfit.insert_unreachable(index);
        }
    }
    for (index, _) in devices.servers.iter().enumerate().filter(|(_, device)| !device.connected) {
        unfit.insert_unreachable(index);
    }
    unfit
}

impl<D: Device + 'static, F: Fn(&str) -> io::Result<D>> Daemon<D, F> {
    /// What is to be said of the link or route to a server, if it needs one of its own.
    pub(crate) fn way_to(&self, server: &Server) -> Option<&'static str> {
        let mut ends = server.ends.iter();
        match (server.ends.is_empty(), ends.any(|end| self.hops.contains_key(end))) {
            (true, _) => self.connectors.describe(server),
            (false, true) => Some("there"),
            (false, false) => Some("missing"),
        }
    }

    /// Lets tunnels follow the host's routes, `gue` mode.
    pub(crate) async fn look_for_routes(&mut self) {
        if self.config.forward != ForwardMode::Gue {
            return;
        }
        match look(&self.config).await {
            Ok(hops) if hops == self.hops => {}
            Ok(hops) => {
                for end in self.config.servers.iter().flat_map(|server| &server.ends) {
                    match (self.hops.get(end), hops.get(end)) {
                        (Some(_), None) => {
                            tracing::warn!(address = %end, "no route leads to this server any more");
                        }
                        (None, Some(_)) => tracing::info!(address = %end, "a route leads to this server"),
                        _ => {}
                    }
                }
                self.hops = hops;
                self.renew().await;
            }
            Err(error) => tracing::warn!(%error, "the routes to servers cannot be looked up"),
        }
    }

    /// Lets packets and the host follow the links.
    pub(crate) async fn links_changed(&mut self, news: LinkNews) {
        self.note_neighbours(&news.neighbours);
        let lost: BTreeSet<&str> =
            news.links.iter().filter(|link| link.lost).map(|link| link.interface.as_str()).collect();
        // What was away is set up anew even if it is back: the kernel has forgotten its routes.
        let mut without = self.devices.clone();
        for (server, device) in self.config.servers.iter().zip(&mut without.servers) {
            let gone = server.device.as_deref().is_some_and(|name| lost.contains(name));
            device.connected &= !gone && self.connectors.has(server);
        }
        if without != self.devices {
            self.disconnect(without).await;
        }
        let mut with = self.devices.clone();
        self.connectors.mark(&self.config, &mut with);
        if with != self.devices {
            self.connect(with).await;
        }
    }

    /// Packets first: none is to meet a route that is gone.
    async fn disconnect(&mut self, devices: Devices) {
        self.tell_difference(&devices);
        self.devices = devices;
        self.renew().await;
        if let Err(error) = self.host.replace(changes(&self.config, &self.devices, self.nft)).await {
            tracing::warn!(%error, "what a missing link needed on the host could not all be removed");
        }
    }

    /// Routes first.
    async fn connect(&mut self, devices: Devices) {
        if let Err(error) = self.host.replace(changes(&self.config, &devices, self.nft)).await {
            // It may have gone again, which will be told.
            tracing::warn!(%error, "a link cannot be used yet");
            if let Err(error) = self.host.replace(changes(&self.config, &self.devices, self.nft)).await {
                tracing::warn!(%error, "nor can the host be put back to what it was");
            }
            self.connectors.retry = Some(Instant::now() + RETRY);
            return;
        }
        self.tell_difference(&devices);
        self.devices = devices;
        self.renew().await;
    }

    fn tell_difference(&self, devices: &Devices) {
        let both = self.devices.servers.iter().zip(&devices.servers);
        for (server, (before, after)) in self.config.servers.iter().zip(both) {
            let (name, link) = (&server.name, server.device.as_deref().unwrap_or_default());
            match (before.connected, after.connected) {
                (true, false) => tracing::warn!(server = name, link, "its link is gone: it takes nothing"),
                (false, true) => tracing::info!(server = name, link, "its link is there"),
                _ => {}
            }
        }
    }

    fn note_neighbours(&mut self, neighbours: &[Neighbour]) {
        let balancer = self.balancer();
        for Neighbour { interface, address, resolved } in neighbours {
            let is_hop = |server: &&Server| {
                server.device.as_ref() == Some(interface)
                    && server.next_hop(Family::of(*address)) == Some(*address)
            };
            let key = (interface.clone(), *address);
            for server in self.config.servers.iter().filter(is_hop) {
                let known = self.connectors.unresolved.contains(&key);
                if *resolved {
                    if known {
                        tracing::info!(server = server.name, %address, "its next hop answers again");
                    }
                    continue;
                }
                if !known {
                    tracing::warn!(server = server.name, %address, link = interface, "nobody answers for its next hop");
                }
                if let Some((_, stats)) = balancer.server_stats().find(|(name, _)| *name == server.name) {
                    stats.unresolved();
                }
            }
            if *resolved {
                self.connectors.unresolved.remove(&key);
            } else if self.config.servers.iter().any(|server| is_hop(&server)) {
                self.connectors.unresolved.insert(key);
            }
        }
    }
}
