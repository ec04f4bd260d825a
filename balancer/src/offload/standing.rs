//! What of the offload stands on the host, and how it follows.

use std::collections::BTreeSet;
use std::fmt;

use shunt_host::change::Sysctl;
use shunt_host::shortcuts::{Detour, RouteWatch};
use shunt_host::{Change, Family, Host, HostError, Shortcuts, query};

use super::{Obstacle, Plan};
use crate::Balancer;
use crate::config::{Config, ForwardMode};
use crate::host::Devices;

/// Why what the kernel forwards by itself is routed, not handed on where it arrives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Routed {
    /// `[host] offload = "routed"`.
    Wanted,
    /// The mode sends packets by routes of its own.
    Mode(ForwardMode),
    /// Others have a say in it.
    Detour(Detour),
    /// The kernel refuses, or does not tell its routes.
    Kernel(String),
}

impl fmt::Display for Routed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Routed::Wanted => f.write_str("`[host] offload = \"routed\"`"),
            Routed::Mode(mode) => write!(f, "the mode {mode} has routes of its own"),
            Routed::Detour(detour) => detour.fmt(f),
            Routed::Kernel(why) => write!(f, "the kernel refuses: {why}"),
        }
    }
}

/// What stands of it on the host.
#[derive(Default)]
pub(crate) struct Standing {
    plan: Option<Plan>,
    /// Why not, or not all.
    pub(crate) obstacle: Option<Obstacle>,
    /// Nothing is ever left to the kernel while this balancer runs.
    never: Option<Obstacle>,
    /// Interfaces towards servers: what comes from there has the VIP as its source before it is routed.
    links: BTreeSet<String>,
    /// Why nothing is handed on where it arrives.
    routed: Option<Routed>,
    /// What the kernel has refused, and its words: it is not asked again for the same.
    refused: Option<(Shortcuts, String)>,
    /// `None` while nothing depends on routes.
    routes: Option<RouteWatch>,
}

impl Standing {
    /// `recorded`: whether a capture has to see every packet; `nft`: whether the kernel has nftables.
    pub(crate) fn new(recorded: bool, nft: bool) -> Standing {
        let never = match (recorded, nft) {
            (true, _) => Some(Obstacle::Capture),
            (_, false) => Some(Obstacle::Kernel("it has no nftables".to_owned())),
            _ => None,
        };
        Standing { never, ..Standing::default() }
    }

    /// Whether anything is left to the kernel.
    pub(crate) fn in_force(&self) -> bool {
        self.plan.is_some()
    }

    /// Why plain clients' segments to redirect ports are not.
    pub(crate) fn plain(&self) -> Option<&Obstacle> {
        self.plan.as_ref()?.plain.as_ref()
    }

    /// Why all that the kernel forwards is routed.
    pub(crate) fn routed(&self) -> Option<&Routed> {
        self.routed.as_ref().filter(|_| self.in_force())
    }

    /// Waits until the ways out of this host may have changed; for ever if nothing depends on them. Cancel-safe.
    pub(crate) async fn routes_changed(&mut self) {
        let Some(routes) = &mut self.routes else { return std::future::pending().await };
        if let Err(error) = routes.changed().await {
            tracing::warn!(%error, "what the kernel forwards is routed from now on");
            (self.routes, self.routed) = (None, Some(Routed::Kernel(error.to_string())));
        }
    }

    /// Whether what stands fits the host no more.
    pub(crate) async fn is_outdated(&self, host: &Host, config: &Config) -> bool {
        let Some(plan) = &self.plan else { return false };
        let now = match &self.routes {
            Some(_) => self.shortcuts(host, config).await,
            None => return plan.offload.shortcuts.is_some(),
        };
        match now {
            // Nobody can tell, or it has been refused.
            Err(Routed::Kernel(_)) => false,
            now => plan.offload.shortcuts != now.ok(),
        }
    }

    /// Whether somebody else has begun or ceased to have a say in what is forwarded.
    pub(crate) async fn is_hindered_otherwise(&self, host: &Host) -> bool {
        let Some(plan) = &self.plan else { return false };
        let before = match &self.routed {
            _ if plan.offload.shortcuts.is_some() => None,
            Some(Routed::Detour(
                detour @ (Detour::Chain { .. } | Detour::Iptables | Detour::Rule(_) | Detour::Ipsec),
            )) => Some(detour),
            _ => return false,
        };
        host.detour().await.is_ok_and(|now| now.as_ref() != before)
    }

    /// The ways out, as far as packets can be handed on there.
    async fn shortcuts(&self, host: &Host, config: &Config) -> Result<Shortcuts, Routed> {
        if !config.host.shortcuts {
            return Err(Routed::Wanted);
        }
        if config.forward != ForwardMode::Network {
            return Err(Routed::Mode(config.forward));
        }
        let vips = config.vips.iter().copied().collect();
        match host.shortcuts(&vips).await {
            Ok(found) => match (found.map_err(Routed::Detour)?, &self.refused) {
                (found, Some((refused, why))) if found == *refused => Err(Routed::Kernel(why.clone())),
                (found, _) => Ok(found),
            },
            Err(error) => Err(Routed::Kernel(error.to_string())),
        }
    }

    /// Begins to follow the routes before they are looked at.
    async fn follow_routes(&mut self, config: &Config) -> Result<(), Routed> {
        let useful = config.host.shortcuts && config.forward == ForwardMode::Network;
        if !useful || self.routes.is_some() {
            return Ok(());
        }
        if let Some(Routed::Kernel(why)) = &self.routed {
            return Err(Routed::Kernel(why.clone()));
        }
        let watch = RouteWatch::start().await.map_err(|error| Routed::Kernel(error.to_string()))?;
        self.routes = Some(watch);
        Ok(())
    }

    /// What stands on the host because of it.
    pub(crate) fn changes(&self) -> Vec<Change> {
        let Some(plan) = &self.plan else { return Vec::new() };
        with(plan, &self.links)
    }

    /// Makes the host as `base` says, with what the kernel can take beside it. What it refuses stays in userspace.
    pub(crate) async fn install(
        &mut self,
        host: &mut Host,
        base: Vec<Change>,
        config: &Config,
        balancer: &Balancer,
        devices: &Devices,
    ) -> Result<(), HostError> {
        self.count(host).await;
        let generation = host.offload_generation();
        let plan = match &self.never {
            Some(obstacle) => Err(obstacle.clone()),
            None => Plan::new(config, balancer, devices),
        };
        let mut plan = match plan {
            Ok(plan) => plan,
            Err(obstacle) => return self.give_up(host, base, obstacle).await,
        };
        // What it has refused before.
        if let Some(Obstacle::Kernel(why)) = self.plain() {
            plan.without_spreads(why.clone());
        }
        self.links = match links(config).await {
            Ok(links) => links,
            Err(error) => return self.give_up(host, base, Obstacle::Kernel(error.to_string())).await,
        };
        // Which links may hand on is seen only once the settings are made that go with it.
        let mut result = Ok(());
        if self.plan.is_none() {
            result = self.make(host, &base, &mut plan).await;
        }
        let mut routed = None;
        if result.is_ok() {
            let shortcuts = match self.follow_routes(config).await {
                Ok(()) => self.shortcuts(host, config).await,
                Err(routed) => Err(routed),
            };
            match shortcuts {
                Ok(shortcuts) => plan.offload.shortcuts = Some(shortcuts),
                Err(why) => routed = Some(why),
            }
            if self.plan.is_some() || plan.offload.shortcuts.is_some() {
                result = self.make(host, &base, &mut plan).await;
            }
        }
        if let Err(error) = result {
            tracing::warn!(%error, "the kernel forwards nothing by itself: all packets go through userspace");
            return self.give_up(host, base, Obstacle::Kernel(error.to_string())).await;
        }
        if plan.offload.shortcuts.is_none() && routed.is_none() {
            routed = self.refused.as_ref().map(|(_, why)| Routed::Kernel(why.clone()));
        }
        self.tell_routed(routed);
        if let Some(before) = self.plan.as_ref().filter(|_| host.offload_generation() == generation) {
            plan.follow(before);
        }
        (self.plan, self.obstacle) = (Some(plan), None);
        Ok(())
    }

    /// Leaves everything to userspace.
    async fn give_up(
        &mut self,
        host: &mut Host,
        base: Vec<Change>,
        obstacle: Obstacle,
    ) -> Result<(), HostError> {
        (self.plan, self.obstacle) = (None, Some(obstacle));
        host.replace(base).await
    }

    /// Has a plan stand, without what the kernel refuses of it.
    async fn make(&mut self, host: &mut Host, base: &[Change], plan: &mut Plan) -> Result<(), HostError> {
        let links = self.links.clone();
        let all = |plan: &Plan| base.iter().cloned().chain(with(plan, &links)).collect();
        let mut result = host.replace(all(plan)).await;
        let mut refused = None;
        if let Err(error) = &result
            && let Some(shortcuts) = plan.offload.shortcuts.take()
        {
            refused = Some((shortcuts, error.to_string()));
            result = host.replace(all(plan)).await;
        }
        if let Err(error) = &result
            && !plan.offload.spreads.is_empty()
        {
            tracing::warn!(%error, "the kernel does not take the hash table: plain clients' packets go through userspace");
            plan.without_spreads(error.to_string());
            result = host.replace(all(plan)).await;
        }
        if result.is_ok() && refused.is_some() {
            self.refused = refused;
        }
        result
    }

    /// Keeps why everything is routed, and says so when it is new.
    fn tell_routed(&mut self, routed: Option<Routed>) {
        if let Some(why) = routed.as_ref().filter(|why| self.routed.as_ref() != Some(why)) {
            match why {
                Routed::Wanted | Routed::Mode(_) => {
                    tracing::debug!(%why, "what the kernel forwards is routed");
                }
                Routed::Detour(_) => tracing::info!(%why, "what the kernel forwards is routed"),
                Routed::Kernel(_) => tracing::warn!(%why, "what the kernel forwards is routed"),
            }
        }
        if routed.is_none() && self.routed.is_some() {
            tracing::info!("what the kernel forwards is handed on where it arrives");
        }
        self.routed = routed;
    }

    /// Reads the kernel's counters.
    pub(crate) async fn count(&mut self, host: &Host) {
        let Some(plan) = &mut self.plan else { return };
        match host.offload_counts().await {
            Ok(counts) => plan.count(&counts),
            Err(error) => tracing::debug!(%error, "the kernel's counters cannot be read"),
        }
    }
}

fn with(plan: &Plan, links: &BTreeSet<String>) -> Vec<Change> {
    let conf = |link: &String, name, value| {
        Change::from(Sysctl::interface(Family::V4, link, name, value).optional())
    };
    // Sources are checked after the maps: the VIP's route leads into our device, and it may be this host's own address.
    let checks = links.iter().flat_map(|link| [conf(link, "rp_filter", 0), conf(link, "accept_local", 1)]);
    checks.chain([plan.offload.clone().into()]).collect()
}

/// The interfaces from which answers come, `network` mode.
async fn links(config: &Config) -> Result<BTreeSet<String>, HostError> {
    let mut links = BTreeSet::new();
    if config.forward != ForwardMode::Network {
        return Ok(links);
    }
    for &address in config.servers.iter().flat_map(|server| &server.addresses) {
        match query::next_hop(address).await {
            Ok(hop) => drop(links.insert(hop.interface)),
            // Its packets go nowhere in userspace, either.
            Err(HostError::NoRoute(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(links)
}
