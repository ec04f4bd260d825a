//! One change to rules, routes, addresses or links over netlink, and its reverse. Remembers nothing.

use std::net::IpAddr;

use nlink::netlink::devconf::AddrGenMode;
use nlink::netlink::messages::{RouteMessage, RuleMessage};
use nlink::netlink::types::route::{RouteProtocol, RouteType};
use nlink::{Connection, Ipv4Address, Ipv4Route, Ipv6Address, Ipv6Route, RuleBuilder};
use serde::{Deserialize, Serialize};

use crate::change::{Address, Change, LOCAL, Link, Mark, Route, Rule, Target};
use crate::error::{HostError, absent};
use crate::options::HostOptions;
use crate::prefix::{Family, PortRange, Prefix};
use crate::sysctl;

/// Where the rules `lookup local` are moved to.
pub(crate) const LOCAL_PREFERENCE: u32 = 100;
/// The origin (`proto`) of the moved rules; the roles have 83 to 85.
const LOCAL_PROTOCOL: u8 = 86;
/// The origins of the roles' rules.
const ROLE_PROTOCOLS: std::ops::RangeInclusive<u8> = 83..=85;
/// The origin the kernel's own rules have.
const KERNEL_PROTOCOL: u8 = 2;

pub(crate) type Netlink = Connection<nlink::Route>;

/// Opens a route netlink socket in the calling thread's namespace.
pub(crate) fn connect() -> Result<Netlink, HostError> {
    Netlink::new().map_err(|error| HostError::netlink("open a netlink socket", error))
}

/// Whether this kernel, in this namespace, has IPv6 at all.
pub(crate) fn has(family: Family) -> bool {
    family == Family::V4 || std::path::Path::new("/proc/sys/net/ipv6").exists()
}

fn empty_rule(family: Family) -> RuleBuilder {
    match family {
        Family::V4 => RuleBuilder::v4(),
        Family::V6 => RuleBuilder::v6(),
    }
}

fn rule_builder(rule: &Rule, protocol: u8) -> RuleBuilder {
    let mut builder = empty_rule(rule.family).priority(rule.preference).table(rule.table).protocol(protocol);
    if let Some(interface) = &rule.interface {
        builder = builder.iif(interface);
    }
    if let Some(from) = rule.from {
        builder = builder.from_addr(from.address(), from.len());
    }
    if let Some(to) = rule.to {
        builder = builder.to_addr(to.address(), to.len());
    }
    if let Some(protocol) = rule.protocol {
        builder = builder.ipproto(protocol);
    }
    if let Some(ports) = rule.source_port {
        builder = builder.sport(ports.first(), ports.last());
    }
    if let Some(ports) = rule.destination_port {
        builder = builder.dport(ports.first(), ports.last());
    }
    if let Some(mark) = rule.mark {
        builder = builder.fwmark_mask(mark.value, mark.mask);
    }
    builder
}

/// Whether a change mixes families, which the kernel would refuse now and again when it is undone.
pub(crate) fn check(change: &Change) -> Result<(), HostError> {
    match change {
        Change::Rule(rule) => check_rule(rule),
        Change::Route(route) => kernel_route(route, 0).map(drop),
        _ => Ok(()),
    }
}

fn check_rule(rule: &Rule) -> Result<(), HostError> {
    let wrong = [rule.from, rule.to].into_iter().flatten().find(|prefix| prefix.family() != rule.family);
    if let Some(prefix) = wrong {
        return Err(HostError::Invalid(format!("a rule for {} cannot select {prefix}", rule.family)));
    }
    Ok(())
}

/// Adds a policy rule.
pub(crate) async fn add_rule(netlink: &Netlink, rule: &Rule, protocol: u8) -> Result<(), HostError> {
    netlink.add_rule(rule_builder(rule, protocol)).await.map_err(|error| {
        HostError::netlink(format!("add the {} rule with preference {}", rule.family, rule.preference), error)
    })
}

/// Removes a policy rule, if it is there.
pub(crate) async fn remove_rule(netlink: &Netlink, rule: &Rule, protocol: u8) -> Result<(), HostError> {
    gone(
        netlink.del_rule(rule_builder(rule, protocol)).await,
        format_args!("remove the {} rule with preference {}", rule.family, rule.preference),
    )
}

fn gone(result: nlink::Result<()>, action: impl std::fmt::Display) -> Result<(), HostError> {
    match result {
        Err(error) if !absent(&error) => Err(HostError::netlink(action, error)),
        _ => Ok(()),
    }
}

pub(crate) async fn rules(netlink: &Netlink) -> Result<Vec<RuleMessage>, HostError> {
    netlink.get_rules().await.map_err(|error| HostError::netlink("list the policy rules", error))
}

fn family_of(rule: &RuleMessage) -> Option<Family> {
    if rule.is_ipv4() {
        Some(Family::V4)
    } else if rule.is_ipv6() {
        Some(Family::V6)
    } else {
        None
    }
}

/// Whether a rule's origin is one of ours.
pub(crate) fn is_own_origin(protocol: Option<u8>) -> bool {
    protocol.is_some_and(|protocol| ROLE_PROTOCOLS.contains(&protocol) || protocol == LOCAL_PROTOCOL)
}

/// `lookup local` without any selector.
pub(crate) fn is_plain_local(rule: &RuleMessage) -> bool {
    rule.table_id() == LOCAL && is_plain_lookup(rule)
}

/// A lookup in some table without any selector.
pub(crate) fn is_plain_lookup(rule: &RuleMessage) -> bool {
    rule.is_lookup()
        && !rule.is_invert()
        && rule.src_len() == 0
        && rule.dst_len() == 0
        && rule.iifname().is_none()
        && rule.oifname().is_none()
        && rule.fwmark().is_none()
        && rule.ip_proto().is_none()
        && rule.sport_range().is_none()
        && rule.dport_range().is_none()
        && rule.uid_range().is_none()
}

fn local_rule(family: Family, preference: u32, protocol: u8) -> RuleBuilder {
    empty_rule(family).priority(preference).table(LOCAL).protocol(protocol)
}

/// Moves `lookup local` behind our rules.
pub(crate) async fn move_local_last(netlink: &Netlink) -> Result<(), HostError> {
    let all = rules(netlink).await?;
    for family in Family::BOTH.into_iter().filter(|&family| has(family)) {
        let plain = all.iter().filter(|rule| family_of(rule) == Some(family) && is_plain_local(rule));
        let first = plain.clone().map(RuleMessage::priority).min();
        match first {
            Some(0) => {}
            Some(preference) if preference < LOCAL_PREFERENCE => {
                return Err(HostError::LocalRule { family, preference });
            }
            // Moved already, or removed by somebody who knows why.
            _ => continue,
        }
        // The new one first: without any, the host would not even take packets for itself.
        let moved = netlink.add_rule(local_rule(family, LOCAL_PREFERENCE, LOCAL_PROTOCOL)).await;
        if let Err(error) = moved
            && !error.is_already_exists()
        {
            return Err(HostError::netlink(format!("move the {family} rule `lookup local`"), error));
        }
        let old = empty_rule(family).priority(0).table(LOCAL);
        gone(
            netlink.del_rule(old).await,
            format_args!("remove the {family} rule `lookup local` from preference 0"),
        )?;
    }
    Ok(())
}

/// Puts `lookup local` back to preference 0 where we moved it, unless a rule of any Shunt daemon remains.
pub(crate) async fn move_local_first(netlink: &Netlink) -> Result<(), HostError> {
    let all = rules(netlink).await?;
    for family in Family::BOTH {
        let of_family = || all.iter().filter(|rule| family_of(rule) == Some(family));
        let ours = of_family().any(|rule| {
            rule.priority() == LOCAL_PREFERENCE
                && rule.protocol() == Some(LOCAL_PROTOCOL)
                && is_plain_local(rule)
        });
        let needed = of_family().any(|rule| rule.protocol().is_some_and(|p| ROLE_PROTOCOLS.contains(&p)));
        if !ours || needed {
            continue;
        }
        let added = netlink.add_rule(local_rule(family, 0, KERNEL_PROTOCOL)).await;
        if let Err(error) = added
            && !error.is_already_exists()
        {
            return Err(HostError::netlink(format!("restore the {family} rule `lookup local`"), error));
        }
        gone(
            netlink.del_rule(local_rule(family, LOCAL_PREFERENCE, LOCAL_PROTOCOL)).await,
            format_args!("remove the moved {family} rule `lookup local`"),
        )?;
    }
    Ok(())
}

enum KernelRoute {
    V4(Ipv4Route),
    V6(Ipv6Route),
}

fn v4(address: IpAddr, route: &Route) -> Result<std::net::Ipv4Addr, HostError> {
    match address {
        IpAddr::V4(address) => Ok(address),
        IpAddr::V6(_) => Err(mixed(address, route)),
    }
}

fn v6(address: IpAddr, route: &Route) -> Result<std::net::Ipv6Addr, HostError> {
    match address {
        IpAddr::V6(address) => Ok(address),
        IpAddr::V4(_) => Err(mixed(address, route)),
    }
}

fn mixed(address: IpAddr, route: &Route) -> HostError {
    HostError::Invalid(format!("the route to {} cannot use {address}", route.destination))
}

macro_rules! fill_route {
    ($kernel:expr, $route:expr, $protocol:expr, $address:ident) => {{
        let mut kernel = $kernel.table($route.table).protocol(RouteProtocol::from($protocol));
        if let Some(metric) = $route.metric {
            kernel = kernel.metric(metric);
        }
        match &$route.target {
            Target::Blackhole => kernel.route_type(RouteType::Blackhole),
            Target::Local { interface } => kernel.route_type(RouteType::Local).dev(interface.as_str()),
            Target::Device { interface, gateway, source, on_link } => {
                kernel = kernel.dev(interface.as_str());
                if let Some(gateway) = gateway {
                    kernel = kernel.gateway($address(*gateway, $route)?);
                }
                if let Some(source) = source {
                    kernel = kernel.prefsrc($address(*source, $route)?);
                }
                if *on_link {
                    kernel = kernel.onlink();
                }
                kernel
            }
        }
    }};
}

fn kernel_route(route: &Route, protocol: u8) -> Result<KernelRoute, HostError> {
    let len = route.destination.len();
    Ok(match route.destination.address() {
        IpAddr::V4(address) => {
            KernelRoute::V4(fill_route!(Ipv4Route::from_addr(address, len), route, protocol, v4))
        }
        IpAddr::V6(address) => {
            KernelRoute::V6(fill_route!(Ipv6Route::from_addr(address, len), route, protocol, v6))
        }
    })
}

/// Adds a route.
pub(crate) async fn add_route(netlink: &Netlink, route: &Route, protocol: u8) -> Result<(), HostError> {
    let result = match kernel_route(route, protocol)? {
        KernelRoute::V4(kernel) => netlink.add_route(kernel).await,
        KernelRoute::V6(kernel) => netlink.add_route(kernel).await,
    };
    result.map_err(|error| {
        HostError::netlink(format!("add the route to {} in table {}", route.destination, route.table), error)
    })
}

/// Removes a route, if it is there.
pub(crate) async fn remove_route(netlink: &Netlink, route: &Route, protocol: u8) -> Result<(), HostError> {
    let result = match kernel_route(route, protocol)? {
        KernelRoute::V4(kernel) => netlink.del_route(kernel).await,
        KernelRoute::V6(kernel) => netlink.del_route(kernel).await,
    };
    gone(result, format_args!("remove the route to {} from table {}", route.destination, route.table))
}

/// Adds an address to an interface; IPv6 addresses without duplicate address detection.
pub(crate) async fn add_address(netlink: &Netlink, address: &Address) -> Result<(), HostError> {
    let Address { interface, address: ip, prefix_len } = address;
    let result = match ip {
        IpAddr::V4(v4) => netlink.add_address(Ipv4Address::new(interface, *v4, *prefix_len)).await,
        IpAddr::V6(v6) => netlink.add_address(Ipv6Address::new(interface, *v6, *prefix_len).nodad()).await,
    };
    result.map_err(|error| HostError::netlink(format!("add {ip}/{prefix_len} to {interface}"), error))
}

/// Removes an address from an interface, if it is there.
pub(crate) async fn remove_address(netlink: &Netlink, address: &Address) -> Result<(), HostError> {
    let Address { interface, address: ip, prefix_len } = address;
    gone(
        netlink.del_address(interface.as_str(), *ip, *prefix_len).await,
        format_args!("remove {ip}/{prefix_len} from {interface}"),
    )
}

/// What [`set_link`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LinkState {
    index: u32,
    mtu: Option<u32>,
    up: bool,
}

impl LinkState {
    /// In bytes.
    pub(crate) fn mtu(self) -> Option<u32> {
        self.mtu
    }
}

/// The state of an interface.
pub(crate) async fn link_state(netlink: &Netlink, interface: &str) -> Result<LinkState, HostError> {
    let link = netlink
        .get_link_by_name(interface)
        .await
        .map_err(|error| HostError::netlink(format!("look up {interface}"), error))?
        .ok_or_else(|| HostError::NoInterface(interface.to_owned()))?;
    Ok(LinkState { index: link.ifindex(), mtu: link.mtu(), up: link.is_up() })
}

/// Sets up a device of our own.
pub(crate) async fn set_link(netlink: &Netlink, link: &Link, found: LinkState) -> Result<(), HostError> {
    let name = &link.interface;
    let failed = |action: &str| {
        let action = format!("{action} {name}");
        move |error| HostError::netlink(action, error)
    };
    if link.quiet && has(Family::V6) {
        netlink
            .set_addr_gen_mode_by_index(found.index, AddrGenMode::None)
            .await
            .map_err(failed("switch off the link-local address of"))?;
        for key in ["router_solicitations", "accept_ra"] {
            let key = format!("net/ipv6/conf/{name}/{key}");
            if sysctl::read(&key)?.is_some() {
                sysctl::write(&key, "0")?;
            }
        }
    }
    if let Some(mtu) = link.mtu {
        netlink.set_link_mtu_by_index(found.index, mtu).await.map_err(failed("set the MTU of"))?;
    }
    if link.up {
        netlink.set_link_up_by_index(found.index).await.map_err(failed("set up"))?;
    }
    Ok(())
}

/// Restores MTU and state of the same device, if it still exists.
pub(crate) async fn restore_link(netlink: &Netlink, link: &Link, before: LinkState) -> Result<(), HostError> {
    match link_state(netlink, &link.interface).await {
        Ok(now) if now.index == before.index => {}
        Ok(_) | Err(HostError::NoInterface(_)) => return Ok(()),
        Err(error) => return Err(error),
    }
    let action = format!("restore {}", link.interface);
    if link.up && !before.up {
        gone(netlink.set_link_down_by_index(before.index).await, &action)?;
    }
    if let (Some(_), Some(mtu)) = (link.mtu, before.mtu) {
        gone(netlink.set_link_mtu_by_index(before.index, mtu).await, &action)?;
    }
    Ok(())
}

/// Removes the rules and routes that carry our origin within our numbers, but for those in `kept`; says how many
/// there were.
pub(crate) async fn sweep(
    netlink: &Netlink,
    options: &HostOptions,
    kept: &[&Change],
) -> Result<usize, HostError> {
    let protocol = options.protocol();
    let mut removed = 0;
    for rule in rules(netlink).await? {
        let Some(family) = family_of(&rule) else { continue };
        if rule.protocol() != Some(protocol) || !options.preferences().contains(&rule.priority()) {
            continue;
        }
        let described = described_rule(&rule, family);
        if kept.iter().any(|change| matches!(change, Change::Rule(kept) if *kept == described)) {
            continue;
        }
        gone(netlink.del_rule(rule_builder(&described, protocol)).await, "remove a leftover policy rule")?;
        removed += 1;
    }
    let routes = netlink.get_routes().await.map_err(|error| HostError::netlink("list the routes", error))?;
    for route in routes {
        if route.protocol() == RouteProtocol::from(protocol)
            && options.tables().contains(&route.table_id())
            && let Some(route) = described(netlink, &route).await?
            && !kept.iter().any(|change| matches!(change, Change::Route(kept) if is_same(kept, &route)))
        {
            remove_route(netlink, &route, protocol).await?;
            removed += 1;
        }
    }
    Ok(removed)
}

/// A rule of ours as the kernel lists it.
fn described_rule(rule: &RuleMessage, family: Family) -> Rule {
    let prefix = |address: Option<IpAddr>, len| address.map(|address| Prefix::new(address, len));
    Rule {
        family,
        preference: rule.priority(),
        table: rule.table_id(),
        interface: rule.iifname().map(ToOwned::to_owned),
        from: prefix(rule.source(), rule.src_len()),
        to: prefix(rule.destination(), rule.dst_len()),
        protocol: rule.ip_proto(),
        source_port: rule.sport_range().map(|range| PortRange::new(range.start, range.end)),
        destination_port: rule.dport_range().map(|range| PortRange::new(range.start, range.end)),
        mark: rule
            .fwmark()
            .filter(|mark| *mark != 0)
            .map(|value| Mark { value, mask: rule.fwmask().unwrap_or(u32::MAX) }),
    }
}

/// Whether the kernel lists `wanted` as `listed`: it fills in the metric.
fn is_same(wanted: &Route, listed: &Route) -> bool {
    let metric = |route: &Route| {
        route.metric.unwrap_or(if route.destination.family() == Family::V4 { 0 } else { 1024 })
    };
    wanted.table == listed.table
        && wanted.destination == listed.destination
        && wanted.target == listed.target
        && metric(wanted) == metric(listed)
}

/// Adds what may be there already.
pub(crate) fn or_exists(result: Result<(), HostError>) -> Result<(), HostError> {
    match result {
        Err(HostError::Netlink { error, .. }) if error.is_already_exists() => Ok(()),
        other => other,
    }
}

/// A route of ours as the kernel lists it; `None` if it is none that we could have made.
async fn described(netlink: &Netlink, route: &RouteMessage) -> Result<Option<Route>, HostError> {
    let family = if route.is_ipv4() { Family::V4 } else { Family::V6 };
    let destination =
        route.destination().map_or(Prefix::all(family), |address| Prefix::new(*address, route.dst_len()));
    let interface = match route.oif() {
        Some(index) => netlink
            .interface_name(index)
            .await
            .map_err(|error| HostError::netlink("look up an interface", error))?,
        None => None,
    };
    let target = match (route.route_type(), interface) {
        (RouteType::Blackhole, _) => Target::Blackhole,
        (RouteType::Local, Some(interface)) => Target::Local { interface },
        (RouteType::Unicast, Some(interface)) => Target::Device {
            interface,
            gateway: route.gateway().copied(),
            source: route.prefsrc().copied(),
            on_link: route.is_onlink(),
        },
        _ => return Ok(None),
    };
    Ok(Some(Route { table: route.table_id(), destination, target, metric: route.priority() }))
}
