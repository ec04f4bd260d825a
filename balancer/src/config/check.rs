//! What a file may not say.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::time::Duration;

use shunt_host::{ConfigError, Family, Role, Source};
use shunt_stack::redirect::{Prefix, TokenKeys, TokenPolicy};
use toml::Spanned;

use super::answer::AnswerBy;
use super::file::{Addresses, File, LimitsTable, ServerTable, ServiceTable, TimersTable};
use super::health::CheckTable;
use super::{
    Class, Config, ForwardMode, Legacy, Limits, MAX_DIRECT_SERVERS, MAX_FRAGMENT_LIFETIME, MAX_FRAGMENTS,
    MAX_LEVEL, MAX_SERVERS, MAX_SERVICES, MAX_TUNNELS, MAX_VIPS, MAX_WEIGHT, PolicyName, Server, Service,
    Transport, UdpPolicy, portless, ports,
};

pub(super) type Result<T> = std::result::Result<T, ConfigError>;

/// Reads and checks the whole file.
pub(super) fn check(source: &Source) -> Result<Config> {
    shunt_host::expect_role(source, Role::Balancer)?;
    let file: File = source.parse()?;
    let checker =
        Checker { source, forward: file.forward, health: &file.health, answer: file.answer.as_ref() };
    let link = checker.link(file.link.as_ref())?;
    let vips = checker.vips(&file.vips)?;
    let classes = checker.classes(&file.class)?;
    let services = checker.services(&file.service, &vips, &classes)?;
    let servers = checker.servers(&file.server, link, &services, &vips, &classes)?;
    checker.service_ports_are_unique(&file, &services, &servers)?;
    let admin_ports = checker.admin_ports(&file.admin_ports, &services, &servers)?;
    let default_server = checker.named_server(file.default_server.as_ref(), &servers)?;
    let legacy = file.legacy.as_ref().map_or_else(Legacy::default, |legacy| *legacy.get_ref());
    let legacy_server = checker.named_server(file.legacy_server.as_ref(), &servers)?;
    if let (Some(written), Legacy::Hash | Legacy::Drop) = (&file.legacy_server, legacy) {
        let message = "a legacy_server only serves with `legacy = \"default-server\"`";
        return Err(source.error_at(written.span(), message));
    }
    if let (Some(written), Legacy::DefaultServer, None) =
        (&file.legacy, legacy, legacy_server.or(default_server))
    {
        let message =
            "there is no default server: add `default_server = \"NAME\"` or `legacy_server = \"NAME\"`";
        return Err(source.error_at(written.span(), message));
    }
    let host = file.host.resolve(Role::Balancer, source)?;
    let protocols = portless::protocols(&file.protocol, &servers, source)?;
    let icmp = portless::icmp(&file.icmp, &servers, source)?;
    let limits = checker.limits(&file.limits, &file.timers)?;
    let config = Config {
        path: source.path.clone(),
        vips,
        legacy,
        forward: file.forward,
        default_server,
        legacy_server: legacy_server.or(default_server).filter(|_| legacy == Legacy::DefaultServer),
        services,
        servers,
        protocols,
        icmp,
        limits,
        gue_port: checker.gue(file.gue.as_ref())?,
        level: checker.level(file.level.as_ref())?,
        classes,
        load_max_age: checker.seconds(file.load_max_age_s.as_ref(), 30)?,
        packets_half_life: checker.seconds(file.packets_half_life_s.as_ref(), 10)?,
        admin_ports,
        statistics: checker.statistics(&file.statistics)?,
        tokens: tokens(&file, source)?,
        token_file: file.token.file().map(Into::into),
        control: file.control.resolve(Role::Balancer, source)?,
        check_ports: file.health.source_ports(source)?,
        host,
        text: source.text.as_str().into(),
    };
    checker.way_back_is_unambiguous(&file, &config)?;
    Ok(config)
}

fn tokens(file: &File, source: &Source) -> Result<TokenPolicy> {
    let parse = |text: &str| TokenKeys::parse(text).map_err(|error| (error.line, error.problem));
    let options = file.token.resolve(source, parse)?;
    let prefix = |prefix: &shunt_host::Prefix| Prefix { address: prefix.address(), length: prefix.len() };
    Ok(TokenPolicy {
        keys: options.keys,
        require: options.require,
        under_load: options.under_load,
        trusted: options.trusted.iter().map(prefix).collect(),
    })
}

pub(super) struct Checker<'a> {
    source: &'a Source,
    pub(super) forward: ForwardMode,
    health: &'a CheckTable,
    answer: Option<&'a Spanned<AnswerBy>>,
}

impl Checker<'_> {
    pub(super) fn fail<T>(&self, span: Range<usize>, message: impl Into<String>) -> Result<T> {
        Err(self.source.error_at(span, message))
    }

    pub(super) fn name(
        &self,
        name: &Spanned<String>,
        seen: &mut HashSet<String>,
        what: &str,
    ) -> Result<String> {
        let text = name.get_ref();
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if text.is_empty() || text.len() > 64 || !text.chars().all(good) {
            let message = format!(
                "{text:?} cannot name a {what}: 1 to 64 letters, digits, hyphens, underscores and dots"
            );
            return self.fail(name.span(), message);
        }
        if !seen.insert(text.clone()) {
            return self.fail(name.span(), format!("another {what} is named {text:?}"));
        }
        Ok(text.clone())
    }

    fn unicast(&self, address: IpAddr, span: Range<usize>) -> Result<()> {
        let mapped = matches!(address, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some());
        let broadcast = address == IpAddr::V4(std::net::Ipv4Addr::BROADCAST);
        if address.is_unspecified() || address.is_multicast() || address.is_loopback() || mapped || broadcast
        {
            return self.fail(span, format!("{address} cannot be reached from other hosts"));
        }
        Ok(())
    }

    fn vips(&self, written: &Spanned<Vec<Spanned<IpAddr>>>) -> Result<Vec<IpAddr>> {
        let list = written.get_ref();
        if list.is_empty() || list.len() > MAX_VIPS {
            return self.fail(written.span(), format!("between 1 and {MAX_VIPS} VIPs are needed"));
        }
        let mut vips = Vec::with_capacity(list.len());
        for vip in list {
            self.unicast(*vip.get_ref(), vip.span())?;
            if vips.contains(vip.get_ref()) {
                return self.fail(vip.span(), format!("the VIP {} is listed twice", vip.get_ref()));
            }
            vips.push(*vip.get_ref());
        }
        Ok(vips)
    }

    fn services(&self, tables: &[ServiceTable], vips: &[IpAddr], classes: &[Class]) -> Result<Vec<Service>> {
        let (mut services, mut names) = (Vec::with_capacity(tables.len()), HashSet::new());
        let mut taken: HashMap<(IpAddr, Transport, u16), &str> = HashMap::new();
        for table in tables {
            let name = self.name(&table.name, &mut names, "service")?;
            if services.len() == MAX_SERVICES {
                return self.fail(table.name.span(), format!("more than {MAX_SERVICES} services"));
            }
            let port = *table.redirect_port.get_ref();
            self.port(&table.redirect_port)?;
            let vips = self.vips_of(table, vips)?;
            let (protocols, udp_policy) = self.protocols_of(table)?;
            for (vip, protocol) in vips.iter().flat_map(|vip| protocols.iter().map(move |of| (vip, *of))) {
                if let Some(other) = taken.insert((*vip, protocol, port), table.name.get_ref()) {
                    let message = format!("redirect port {port} of {vip} is the service {other:?}'s already");
                    return self.fail(table.redirect_port.span(), message);
                }
            }
            let policy = table.policy.as_ref().map_or_else(PolicyName::default, |policy| *policy.get_ref());
            let traffic = self.traffic(table, classes)?;
            let check = CheckTable::resolve(table.check.as_ref(), self.health, self.forward, self.source)?;
            let own = table.answer.as_ref();
            let answer = AnswerBy::resolve(own, self.answer, self.forward, &protocols, self.source)?;
            services.push(Service {
                name,
                redirect_port: port,
                policy,
                udp_policy,
                vips,
                traffic,
                // Only TCP says whether somebody is there.
                check: check.filter(|_| protocols.contains(&Transport::Tcp)),
                protocols,
                answer,
            });
        }
        Ok(services)
    }

    fn protocols_of(&self, table: &ServiceTable) -> Result<(Vec<Transport>, UdpPolicy)> {
        let protocols = match &table.protocols {
            None => vec![Transport::Tcp],
            Some(written) => {
                let mut protocols = written.get_ref().clone();
                protocols.sort_unstable();
                protocols.dedup();
                if protocols.is_empty() || protocols.len() != written.get_ref().len() {
                    let message = "a service is reached by [\"tcp\"], [\"udp\"] or [\"tcp\", \"udp\"]";
                    return self.fail(written.span(), message);
                }
                protocols
            }
        };
        if let Some(policy) = &table.udp_policy {
            if !protocols.contains(&Transport::Udp) {
                return self
                    .fail(policy.span(), "the service is not reached by UDP: add `protocols = [\"udp\"]`");
            }
            return Ok((protocols, *policy.get_ref()));
        }
        Ok((protocols, UdpPolicy::default()))
    }

    fn limits(&self, limits: &LimitsTable, timers: &TimersTable) -> Result<Limits> {
        let mut checked = Limits::default();
        if let Some(fragments) = &limits.fragments {
            checked.fragments = *fragments.get_ref();
            if !(1..=MAX_FRAGMENTS).contains(&checked.fragments) {
                return self.fail(fragments.span(), format!("between 1 and {MAX_FRAGMENTS}"));
            }
        }
        if let Some(seconds) = &timers.fragments_s {
            checked.fragment_lifetime = Duration::from_secs(*seconds.get_ref());
            if !(Duration::from_secs(1)..=MAX_FRAGMENT_LIFETIME).contains(&checked.fragment_lifetime) {
                let message = format!("between 1 and {} seconds", MAX_FRAGMENT_LIFETIME.as_secs());
                return self.fail(seconds.span(), message);
            }
        }
        if let Some(answers) = limits.answers_per_second {
            checked.answers_per_second = answers;
        }
        Ok(checked)
    }

    fn vips_of(&self, table: &ServiceTable, vips: &[IpAddr]) -> Result<Vec<IpAddr>> {
        let Some(written) = &table.vips else { return Ok(vips.to_vec()) };
        if written.get_ref().is_empty() {
            return self.fail(written.span(), "a service needs a VIP; leave `vips` out to mean all");
        }
        let mut own = Vec::new();
        for vip in written.get_ref() {
            if !vips.contains(vip.get_ref()) {
                return self.fail(vip.span(), format!("{} is none of the file's `vips`", vip.get_ref()));
            }
            if own.contains(vip.get_ref()) {
                return self.fail(vip.span(), format!("the VIP {} is listed twice", vip.get_ref()));
            }
            own.push(*vip.get_ref());
        }
        Ok(own)
    }

    fn level(&self, written: Option<&Spanned<u8>>) -> Result<u8> {
        let Some(level) = written else { return Ok(0) };
        if *level.get_ref() > MAX_LEVEL {
            return self.fail(level.span(), format!("a tree of balancers has levels 0 to {MAX_LEVEL}"));
        }
        Ok(*level.get_ref())
    }

    fn port(&self, port: &Spanned<u16>) -> Result<()> {
        if *port.get_ref() == 0 { self.fail(port.span(), "port 0 cannot be used") } else { Ok(()) }
    }

    fn servers(
        &self,
        tables: &[ServerTable],
        link: Option<&str>,
        services: &[Service],
        vips: &[IpAddr],
        classes: &[Class],
    ) -> Result<Vec<Server>> {
        let most = match self.forward {
            ForwardMode::Network => MAX_SERVERS,
            ForwardMode::Direct | ForwardMode::Datalink => MAX_DIRECT_SERVERS,
            ForwardMode::Gue => MAX_TUNNELS,
        };
        let (mut servers, mut names) = (Vec::with_capacity(tables.len()), HashSet::new());
        for table in tables {
            let name = self.name(&table.name, &mut names, "server")?;
            if servers.len() == most {
                let message = format!("more than {most} servers with `forward = \"{}\"`", self.forward);
                return self.fail(table.name.span(), message);
            }
            let mut server = Server {
                name,
                addresses: self.addresses(table.address.as_ref(), vips)?,
                weight: self.weight(table)?,
                state: table.state,
                ports: self.ports(table, services)?,
                device: None,
                ends: Vec::new(),
                gateways: Vec::new(),
                classes: self.classes_of(&table.classes, classes)?,
                agent: self.agent(table)?,
            };
            self.connection(table, link, &mut server, vips)?;
            servers.push(server);
        }
        Ok(servers)
    }

    fn weight(&self, table: &ServerTable) -> Result<u32> {
        let Some(weight) = &table.weight else { return Ok(1) };
        if !(1..=MAX_WEIGHT).contains(weight.get_ref()) {
            let message =
                format!("a weight is between 1 and {MAX_WEIGHT}; `state = \"drain\"` stops new connections");
            return self.fail(weight.span(), message);
        }
        Ok(*weight.get_ref())
    }

    fn agent(&self, table: &ServerTable) -> Result<Option<SocketAddr>> {
        let Some(agent) = &table.agent else { return Ok(None) };
        let address = *agent.get_ref();
        if address.port() == 0 {
            return self.fail(agent.span(), "port 0 cannot be used");
        }
        self.unicast(address.ip(), agent.span())?;
        Ok(Some(address))
    }

    pub(super) fn addresses(
        &self,
        written: Option<&Spanned<Addresses>>,
        vips: &[IpAddr],
    ) -> Result<Vec<IpAddr>> {
        let Some(written) = written else { return Ok(Vec::new()) };
        let list = &written.get_ref().0;
        if list.is_empty() {
            return self.fail(written.span(), "an address is missing");
        }
        for (index, address) in list.iter().enumerate() {
            self.unicast(*address, written.span())?;
            let family = Family::of(*address);
            if vips.contains(address) {
                return self.fail(written.span(), format!("{address} is a VIP"));
            }
            if list[..index].iter().any(|other| Family::of(*other) == family) {
                return self.fail(written.span(), format!("more than one {family} address"));
            }
            // A tunnel carries either family over either.
            let tunnel = self.forward == ForwardMode::Gue;
            if !tunnel && !vips.iter().any(|vip| Family::of(*vip) == family) {
                return self.fail(written.span(), format!("{address} is {family}, but no VIP is"));
            }
        }
        Ok(list.clone())
    }

    fn named_server(&self, name: Option<&Spanned<String>>, servers: &[Server]) -> Result<Option<usize>> {
        let Some(name) = name else { return Ok(None) };
        match servers.iter().position(|server| server.name == *name.get_ref()) {
            Some(index) => Ok(Some(index)),
            None => self.fail(name.span(), format!("there is no server named {:?}", name.get_ref())),
        }
    }

    /// In `network` mode the VIP of an answer follows from the server's address and port.
    fn way_back_is_unambiguous(&self, file: &File, config: &Config) -> Result<()> {
        let mut known: HashMap<(IpAddr, u8, u16), IpAddr> = HashMap::new();
        for way in config.ways_back() {
            let other = *known.entry((way.address, way.protocol, way.port)).or_insert(way.vip);
            if other == way.vip {
                continue;
            }
            let table = &file.server[way.server];
            let shared =
                |service: &Service| service.redirect_port == way.port && service.vips.contains(&way.vip);
            let shared = config.services.iter().find(|service| shared(service)).map(|service| &service.name);
            let span = ports::span_of(table, way.port)
                .or_else(|| {
                    let of = |(name, _): &(&Spanned<String>, _)| Some(name.get_ref()) == shared;
                    table.ports.iter().find(of).map(|(_, written)| written.span())
                })
                .unwrap_or_else(|| table.name.span());
            let from = match way.port {
                0 => format!("by protocol {}", way.protocol),
                port => format!("from port {port}"),
            };
            let message = format!(
                "answers of {} {from} could be {other}'s or {}'s: give services their own `vips`, \
                 servers an address for each, or use `forward = \"direct\"`",
                way.address, way.vip
            );
            return self.fail(span, message);
        }
        Ok(())
    }
}
