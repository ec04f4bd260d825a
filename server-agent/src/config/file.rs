//! The file as written, and its check.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use serde::Deserialize;
use shunt_host::control::ControlSettings;
use shunt_host::{ConfigError, HostSettings, Role, Source, TokenSettings};
use shunt_stack::redirect::{Prefix, Require, ServerConfig, Silence, TokenKeys, TokenPolicy};
use toml::Spanned;

use super::decapsulate::DecapsulateTable;
use super::{Config, DivertMode, Service, shared};

const MAX_ADDRESSES: usize = 256;
const MAX_SERVICES: usize = 1024;
const MAX_HALF_OPEN: u64 = 1 << 24;
/// Each is an element of a set that is replaced as a whole.
const MAX_MOVES: u64 = 4096;
const DEFAULT_MOVES: u64 = 256;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    /// Read by [`RoleOnly`], before the rest is looked at.
    #[serde(rename = "role")]
    _role: Role,
    interface: Spanned<String>,
    addresses: Spanned<Vec<Spanned<IpAddr>>>,
    /// What clients know the addresses as, where that is something else: for tokens.
    vips: Option<Spanned<Vec<IpAddr>>>,
    #[serde(default)]
    divert: DivertMode,
    #[serde(default = "yes")]
    notrack: bool,
    #[serde(default)]
    service: Vec<ServiceTable>,
    #[serde(default)]
    limits: Limits,
    #[serde(default)]
    timers: Timers,
    #[serde(default)]
    token: TokenSettings<Require>,
    #[serde(default)]
    control: ControlSettings,
    #[serde(default)]
    status: Status,
    #[serde(default)]
    decapsulate: Option<DecapsulateTable>,
    #[serde(default)]
    host: HostSettings,
}

/// What others may ask, over TCP and without a password.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Status {
    /// Where the count of connections is told; nowhere if left out.
    listen: Option<Spanned<SocketAddr>>,
}

#[derive(Debug, Deserialize)]
struct RoleOnly {
    role: Spanned<Role>,
}

fn yes() -> bool {
    true
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ServiceTable {
    name: Spanned<String>,
    redirect_port: Spanned<u16>,
    service_port: Spanned<u16>,
    /// Instead of the file's.
    vips: Option<Spanned<Vec<IpAddr>>>,
}

/// Bounds. Left out, they are those of [`ServerConfig::default`].
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Limits {
    /// Half-open connections remembered (`S5`); 65,536.
    half_open: Option<Spanned<u64>>,
    /// Redirects followed in one connect (`C3`); 3.
    hops: Option<Spanned<u64>>,
    /// Connections asked to move at a time; 256.
    moves: Option<Spanned<u64>>,
}

/// Times in seconds.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Timers {
    /// How long a half-open connection is remembered (`S5`); 64.
    half_open_s: Option<Spanned<u64>>,
    /// Between looks at who listens (`S6`); 1.
    listeners_s: Option<Spanned<u64>>,
    /// How long the client of a connection is asked to move (`M2`); 30.
    move_s: Option<Spanned<u64>>,
    /// After how long a client that was asked and never moved is reset (`M2`, O8); never if left out.
    move_reset_s: Option<Spanned<u64>>,
}

/// Reads and checks the whole file.
pub(super) fn read(source: &Source) -> Result<Config, ConfigError> {
    // Explains a missing or unknown role better than the parser can.
    let role = shunt_host::role_of(source)?;
    if role != Role::Server {
        // Before its other keys are complained about.
        let written = source.parse::<RoleOnly>()?.role;
        let message = format!("this is the file of a {role}, not of a server");
        return Err(source.error_at(written.span(), message));
    }
    source.parse::<File>()?.check(source)
}

impl File {
    fn check(self, source: &Source) -> Result<Config, ConfigError> {
        let defaults = ServerConfig::default();
        let hops = source.within(self.limits.hops.as_ref(), u64::from(defaults.max_hops), 1..=7)?;
        let half_open = source.within(
            self.limits.half_open.as_ref(),
            defaults.half_open_limit as u64,
            1..=MAX_HALF_OPEN,
        )?;
        let lifetime = defaults.half_open_lifetime.as_secs();
        let lifetime = source.within(self.timers.half_open_s.as_ref(), lifetime, 1..=3600)?;
        let listeners = source.within(self.timers.listeners_s.as_ref(), 1, 1..=3600)?;
        let moves = source.within(self.limits.moves.as_ref(), DEFAULT_MOVES, 1..=MAX_MOVES)?;
        let move_timeout = defaults.redirect_timeout.as_secs();
        let move_timeout = source.within(self.timers.move_s.as_ref(), move_timeout, 1..=3600)?;
        let move_silence = match &self.timers.move_reset_s {
            None => Silence::GiveUp,
            written => {
                let seconds = source.within(written.as_ref(), move_timeout, move_timeout..=86_400)?;
                Silence::ResetAfter(Duration::from_secs(seconds))
            }
        };
        let addresses = addresses(source, &self.addresses)?;
        let services = services(source, &self.service)?;
        let mut shared = BTreeMap::new();
        for (table, service) in self.service.iter().zip(&services) {
            let vips = table.vips.as_ref().or(self.vips.as_ref());
            shared::resolve(source, vips, &addresses, service.service_port, &mut shared)?;
        }
        Ok(Config {
            moves: usize::try_from(moves).unwrap_or(usize::MAX),
            move_timeout: Duration::from_secs(move_timeout),
            move_silence,
            interface: interface(source, &self.interface)?,
            addresses,
            services,
            divert: self.divert,
            notrack: self.notrack,
            half_open_limit: usize::try_from(half_open).unwrap_or(usize::MAX),
            half_open_lifetime: Duration::from_secs(lifetime),
            max_hops: hops as u8,
            listener_interval: Duration::from_secs(listeners),
            tokens: tokens(source, &self.token)?,
            token_file: self.token.file().map(Into::into),
            shared,
            control: self.control.resolve(Role::Server, source)?,
            status: status(source, self.status.listen.as_ref())?,
            decapsulate: self.decapsulate.as_ref().map(|table| table.check(source)).transpose()?,
            host: self.host.resolve(Role::Server, source)?,
            path: source.path.clone(),
        })
    }
}

fn tokens(source: &Source, written: &TokenSettings<Require>) -> Result<TokenPolicy, ConfigError> {
    let parse = |text: &str| TokenKeys::parse(text).map_err(|error| (error.line, error.problem));
    let options = written.resolve(source, parse)?;
    let prefix = |prefix: &shunt_host::Prefix| Prefix { address: prefix.address(), length: prefix.len() };
    Ok(TokenPolicy {
        keys: options.keys,
        require: options.require,
        under_load: options.under_load,
        trusted: options.trusted.iter().map(prefix).collect(),
    })
}

fn status(source: &Source, written: Option<&Spanned<SocketAddr>>) -> Result<Option<SocketAddr>, ConfigError> {
    match written {
        Some(address) if address.get_ref().port() == 0 => {
            Err(source.error_at(address.span(), "port 0 cannot be used"))
        }
        _ => Ok(written.map(|address| *address.get_ref())),
    }
}

fn interface(source: &Source, name: &Spanned<String>) -> Result<String, ConfigError> {
    let text = name.get_ref();
    // What the kernel's dev_valid_name() refuses.
    let bad = |c: char| c == '/' || c == ':' || c.is_whitespace();
    if text.is_empty() || text.len() > 15 || text == "." || text == ".." || text.contains(bad) {
        let message = format!("{text:?} cannot be an interface's name");
        return Err(source.error_at(name.span(), message));
    }
    if text == "lo" {
        return Err(source.error_at(name.span(), "clients' packets do not arrive by the loopback interface"));
    }
    Ok(text.clone())
}

fn addresses(source: &Source, written: &Spanned<Vec<Spanned<IpAddr>>>) -> Result<Vec<IpAddr>, ConfigError> {
    let list = written.get_ref();
    if list.is_empty() || list.len() > MAX_ADDRESSES {
        let message = format!("between 1 and {MAX_ADDRESSES} addresses are needed");
        return Err(source.error_at(written.span(), message));
    }
    let mut addresses = Vec::with_capacity(list.len());
    for address in list {
        let (ip, span) = (*address.get_ref(), address.span());
        let mapped = matches!(ip, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some());
        let broadcast = ip == IpAddr::V4(Ipv4Addr::BROADCAST);
        if ip.is_unspecified() || ip.is_multicast() || ip.is_loopback() || mapped || broadcast {
            return Err(source.error_at(span, format!("{ip} cannot be reached from other hosts")));
        }
        if addresses.contains(&ip) {
            return Err(source.error_at(span, format!("the address {ip} is listed twice")));
        }
        addresses.push(ip);
    }
    Ok(addresses)
}

fn services(source: &Source, tables: &[ServiceTable]) -> Result<Vec<Service>, ConfigError> {
    if tables.is_empty() || tables.len() > MAX_SERVICES {
        return Err(source.error(format!("between 1 and {MAX_SERVICES} [[service]] tables are needed")));
    }
    let (mut names, mut ports) = (HashSet::new(), HashMap::new());
    let mut services = Vec::with_capacity(tables.len());
    for table in tables {
        let name = table.name.get_ref();
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if name.is_empty() || name.len() > 64 || !name.chars().all(good) {
            let message = format!(
                "{name:?} cannot name a service: 1 to 64 letters, digits, hyphens, underscores and dots"
            );
            return Err(source.error_at(table.name.span(), message));
        }
        if !names.insert(name) {
            return Err(source.error_at(table.name.span(), format!("another service is named {name:?}")));
        }
        for (port, kind) in [(&table.redirect_port, "redirect"), (&table.service_port, "service")] {
            let number = *port.get_ref();
            if number == 0 {
                return Err(source.error_at(port.span(), "port 0 cannot be used"));
            }
            // A service port stands for exactly one redirect port (PROTOCOL.md §1), and is no redirect port itself.
            if let Some((other, its)) = ports.insert(number, (name, kind)) {
                let message = if other == name {
                    format!(
                        "port {number} cannot be both: the service port is what tells this server from the others"
                    )
                } else {
                    format!("port {number} is the {its} port of {other:?} already")
                };
                return Err(source.error_at(port.span(), message));
            }
        }
        services.push(Service {
            name: name.clone(),
            redirect_port: *table.redirect_port.get_ref(),
            service_port: *table.service_port.get_ref(),
        });
    }
    Ok(services)
}
