//! What a running balancer is, for people and scripts.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde::Serialize;

use crate::config::ports::Ports;
use crate::config::{AnswerBy, Check, Config, ForwardMode, Legacy, PolicyName, Server, State};
use crate::health::{self, CheckReport, Monitor};
use crate::offload::{Offloadable, Standing};
use crate::stats::{ServerSnapshot, Snapshot};

/// The answer to `show`.
#[derive(Debug, Serialize)]
pub(super) struct Show<'a> {
    role: &'static str,
    vips: &'a [IpAddr],
    forward: ForwardMode,
    legacy: Legacy,
    default_server: Option<&'a str>,
    offload: OffloadShow<'a>,
    services: Vec<ServiceShow<'a>>,
    servers: Vec<ServerShow<'a>>,
}

/// What the kernel forwards by itself.
#[derive(Debug, Serialize)]
struct OffloadShow<'a> {
    /// Whether it forwards anything.
    in_force: bool,
    /// Why nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    why_not: Option<String>,
    /// Why not plain clients' segments.
    #[serde(skip_serializing_if = "Option::is_none")]
    plain: Option<String>,
    /// Why what it forwards is routed, not handed on where it arrives.
    #[serde(skip_serializing_if = "Option::is_none")]
    routed: Option<String>,
    /// By service that stays in userspace: why.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    services: BTreeMap<&'a str, String>,
    /// Packets that it has forwarded.
    packets: u64,
}

fn offload<'a>(config: &'a Config, standing: &Standing, counters: &Snapshot) -> OffloadShow<'a> {
    let told = Offloadable::new(config).ok().filter(|_| standing.in_force());
    let services = told.map_or_else(Vec::new, |told| told.services);
    let services = config.services.iter().zip(services);
    OffloadShow {
        in_force: standing.in_force(),
        why_not: standing.obstacle.as_ref().map(ToString::to_string),
        plain: standing.plain().map(ToString::to_string),
        routed: standing.routed().map(ToString::to_string),
        services: services
            .filter_map(|(service, obstacle)| Some((service.name.as_str(), obstacle?.to_string())))
            .collect(),
        packets: counters.offloaded,
    }
}

#[derive(Debug, Serialize)]
struct ServiceShow<'a> {
    name: &'a str,
    redirect_port: u16,
    vips: &'a [IpAddr],
    policy: PolicyName,
    answer: AnswerBy,
    check: Option<&'a Check>,
    /// Servers, and those of them that take new connections.
    servers: usize,
    taking: usize,
}

#[derive(Debug, Serialize)]
struct ServerShow<'a> {
    name: &'a str,
    addresses: &'a [IpAddr],
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<&'a str>,
    /// The link or route to it: `there`, `missing`, or `unresolved` where nobody answers for the next hop.
    #[serde(skip_serializing_if = "Option::is_none")]
    link: Option<&'static str>,
    state: State,
    /// `unhealthy` if any of its ports is, `unknown` if none is and one is not known yet; none if none is looked at.
    health: Option<health::State>,
    weight: u32,
    /// Service ports by service.
    ports: BTreeMap<&'a str, Ports>,
    #[serde(skip_serializing_if = "Option::is_none")]
    agent: Option<SocketAddr>,
    checks: Vec<CheckReport>,
    counters: ServerSnapshot,
}

/// Describes a configuration with what is known of its servers.
pub(super) fn show<'a>(
    config: &'a Config,
    monitor: &Monitor,
    standing: &Standing,
    way: impl Fn(&Server) -> Option<&'static str>,
    counters: &Snapshot,
) -> Show<'a> {
    let servers: Vec<ServerShow<'a>> = config
        .servers
        .iter()
        .map(|server| {
            let checks = monitor.report(&server.name);
            let any = |state| checks.iter().any(|check| check.state == state).then_some(state);
            let health = any(health::State::Unhealthy)
                .or_else(|| any(health::State::Unknown))
                .or_else(|| any(health::State::Healthy));
            let mut ports: BTreeMap<&str, Ports> = BTreeMap::new();
            for (service, range) in &server.ports {
                ports.entry(config.services[*service].name.as_str()).or_default().0.push(*range);
            }
            ServerShow {
                name: &server.name,
                addresses: if server.ends.is_empty() { &server.addresses } else { &server.ends },
                device: server.device.as_deref(),
                link: way(server),
                state: server.state,
                health,
                weight: server.weight,
                ports,
                agent: server.agent,
                counters: counters.servers.get(&server.name).copied().unwrap_or_default(),
                checks,
            }
        })
        .collect();
    let service = |service: &'a crate::config::Service| {
        let name = service.name.as_str();
        let bad = |check: &CheckReport| check.service == name && check.state == health::State::Unhealthy;
        let own = || servers.iter().filter(|server| server.ports.contains_key(name));
        let reached = |server: &ServerShow<'_>| server.link != Some("missing");
        let fit = |server: &&ServerShow<'_>| {
            server.state == State::Up && reached(server) && !server.checks.iter().any(bad)
        };
        let taking = own().filter(fit).count();
        ServiceShow {
            name,
            redirect_port: service.redirect_port,
            vips: &service.vips,
            policy: service.policy,
            answer: service.answer,
            check: service.check.as_ref(),
            servers: own().count(),
            taking,
        }
    };
    Show {
        role: "balancer",
        vips: &config.vips,
        forward: config.forward,
        legacy: config.legacy,
        default_server: config.default_server.map(|index| config.servers[index].name.as_str()),
        offload: offload(config, standing, counters),
        services: config.services.iter().map(service).collect(),
        servers,
    }
}
