//! The file as written, and its check.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::time::Duration;

use serde::Deserialize;
use shunt_host::control::ControlSettings;
use shunt_host::{ConfigError, HostSettings, PortRange, Prefix, Role, Source};
use shunt_stack::redirect::{self, ClientConfig, Continuation, OnRedirect, VipConfig};
use toml::Spanned;

use super::{Boundary, BoundaryError, Config, Extra, Forward, ForwardError, Hold, Mode, ProxyConfig, socket};

/// Ports of the proxy's own connections unless configured: ephemeral ones, where nobody listens.
const DEFAULT_PROXY_PORTS: PortRange = PortRange::new(50_000, 50_999);
const MAX_FLOWS: u64 = 1 << 24;
/// Each is a policy rule.
const MAX_PREFIXES: usize = 64;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    #[serde(rename = "role")]
    _role: Role,
    #[serde(default)]
    mode: Mode,
    interface: Option<Spanned<String>>,
    #[serde(rename = "vip", default)]
    vips: Vec<Vip>,
    allowed_ports: Option<Spanned<String>>,
    #[serde(default)]
    denied_ports: Vec<Spanned<u16>>,
    #[serde(default)]
    hold: Hold,
    #[serde(default = "yes")]
    notrack: bool,
    #[serde(default)]
    limits: Limits,
    #[serde(default)]
    timers: Timers,
    proxy: Option<Spanned<Proxy>>,
    #[serde(default)]
    control: ControlSettings,
    #[serde(default)]
    host: HostSettings,
}

fn yes() -> bool {
    true
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Vip {
    address: Spanned<IpAddr>,
    #[serde(default)]
    continuation: Continuation,
}

/// Bounds. Left out, they are those of [`ClientConfig::default`].
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Limits {
    /// Redirected and pending connections; 65,536.
    flows: Option<Spanned<u64>>,
    /// Redirects followed in one connect; 3.
    hops: Option<Spanned<u64>>,
    /// Repeats of the SYN to a service port; 2.
    reconnect_repeats: Option<Spanned<u64>>,
    /// The proxy's connections at once; as many as it has ports.
    connections: Option<Spanned<u64>>,
}

/// Times in milliseconds (`_ms`) or seconds (`_s`). Left out, they are those of [`ClientConfig::default`].
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Timers {
    /// Least time before the SYN to a service port is repeated (`C5`); 250.
    reconnect_ms: Option<Spanned<u64>>,
    /// Least time before a handover is probed (`C10`); 50.
    probe_ms: Option<Spanned<u64>>,
    /// Silence after which a handover has failed (`C10`); 20.
    handover_s: Option<Spanned<u64>>,
    /// How long a VIP that did not redirect is not asked (`C2`, `C6`); 600.
    plain_memory_s: Option<Spanned<u64>>,
    /// How long a path that translates is not handed over on; 600.
    translated_memory_s: Option<Spanned<u64>>,
    /// Between looks at the routes to VIPs; 2.
    paths_s: Option<Spanned<u64>>,
    /// Between looks at the kernel's sockets (`C12`); 5.
    sockets_s: Option<Spanned<u64>>,
    /// The proxy's connects; 30.
    connect_s: Option<Spanned<u64>>,
    /// A SOCKS client's request; 10.
    request_s: Option<Spanned<u64>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Proxy {
    socks5: Option<Spanned<String>>,
    #[serde(default)]
    forward: Vec<Spanned<String>>,
    ports: Option<Spanned<String>>,
    boundary: Option<Spanned<String>>,
    #[serde(default)]
    accept_prefixes: Vec<Spanned<Prefix>>,
}

impl File {
    /// Parses the file, unless it is another role's.
    pub(super) fn read(source: &Source) -> Result<File, ConfigError> {
        shunt_host::expect_role(source, Role::Client)?;
        source.parse()
    }

    pub(super) fn check(self, source: &Source, extra: &Extra) -> Result<Config, ConfigError> {
        let interface = self.interface.as_ref().map(|name| check_interface(source, name)).transpose()?;
        let ports = match &self.allowed_ports {
            Some(text) => parse_ports(source, text)?,
            None => PortRange::new(1024, 65_535),
        };
        let host = self.host.resolve(Role::Client, source)?;
        let mut client = ClientConfig {
            exid: host.exid,
            vips: check_vips(source, &self.vips)?,
            ports: ports.first()..=ports.last(),
            denied_ports: self.denied_ports.iter().map(|port| *port.get_ref()).collect(),
            ..self.machine(source)?
        };
        let proxy = self.check_proxy(source, &client, extra)?;
        if let Some(proxy) = proxy.as_ref().filter(|proxy| proxy.boundary != Boundary::None) {
            client.vips.iter_mut().for_each(|vip| vip.on_redirect = OnRedirect::Follow);
            let machines =
                |prefix: &Prefix| redirect::Prefix { address: prefix.address(), length: prefix.len() };
            client.accept_prefixes = proxy.accept_prefixes.iter().map(machines).collect();
        }
        let timers = &self.timers;
        Ok(Config {
            mode: self.mode,
            interface,
            hold: self.hold,
            notrack: self.notrack,
            path_interval: seconds(source, timers.paths_s.as_ref(), 2)?,
            socket_interval: seconds(source, timers.sockets_s.as_ref(), 5)?,
            client,
            proxy,
            control: self.control.resolve(Role::Client, source)?,
            host,
            path: source.path.clone(),
        })
    }

    /// The machine's limits and timers.
    fn machine(&self, source: &Source) -> Result<ClientConfig, ConfigError> {
        let default = ClientConfig::default();
        let (limits, timers) = (&self.limits, &self.timers);
        let number = |value: &Option<Spanned<u64>>, default: u64, range| {
            in_range(source, value.as_ref(), default, range)
        };
        let millis = |value: &Option<Spanned<u64>>, default: Duration| {
            let default = u64::try_from(default.as_millis()).unwrap_or(u64::MAX);
            in_range(source, value.as_ref(), default, 1..60_001).map(Duration::from_millis)
        };
        let secs = |value: &Option<Spanned<u64>>, default: Duration| {
            seconds(source, value.as_ref(), default.as_secs())
        };
        Ok(ClientConfig {
            max_flows: number(&limits.flows, default.max_flows as u64, 1..MAX_FLOWS + 1)? as usize,
            max_hops: number(&limits.hops, default.max_hops.into(), 1..8)? as u8,
            reconnect_repeats: number(&limits.reconnect_repeats, default.reconnect_repeats.into(), 0..11)?
                as u8,
            reconnect_timeout: millis(&timers.reconnect_ms, default.reconnect_timeout)?,
            probe_timeout: millis(&timers.probe_ms, default.probe_timeout)?,
            handover_timeout: secs(&timers.handover_s, default.handover_timeout)?,
            plain_memory: secs(&timers.plain_memory_s, default.plain_memory)?,
            translated_memory: secs(&timers.translated_memory_s, default.translated_memory)?,
            ..default
        })
    }

    fn check_proxy(
        &self,
        source: &Source,
        client: &ClientConfig,
        extra: &Extra,
    ) -> Result<Option<ProxyConfig>, ConfigError> {
        let added = extra.socks5.is_some() || !extra.forward.is_empty();
        let none = Spanned::new(0..0, Proxy::default());
        let proxy = match (self.mode, &self.proxy) {
            (Mode::Transparent, _) if *extra != Extra::default() => {
                return Err(source.error("--forward, --socks5 and --boundary need mode = \"proxy\""));
            }
            (Mode::Transparent, None) => return Ok(None),
            (Mode::Transparent, Some(proxy)) => {
                return Err(source.error_at(proxy.span(), "[proxy] needs mode = \"proxy\""));
            }
            (Mode::Proxy, None) if added => &none,
            (Mode::Proxy, None) => {
                return Err(source.error("mode = \"proxy\" needs a [proxy] table with `socks5` or `forward`"));
            }
            (Mode::Proxy, Some(proxy)) => proxy,
        };
        let (span, proxy) = (proxy.span(), proxy.get_ref());
        if proxy.socks5.is_none() && proxy.forward.is_empty() && !added {
            return Err(source.error_at(span, "nothing to do: give `socks5`, `forward` or both"));
        }
        let ports = match &proxy.ports {
            Some(text) => parse_ports(source, text)?,
            None => DEFAULT_PROXY_PORTS,
        };
        let room = u64::from(ports.last() - ports.first()) + 1;
        let socks5 = proxy.socks5.as_ref().map(|text| parse_listen(source, text)).transpose()?;
        let socks5 = extra.socks5.or(socks5);
        let mut taken: HashSet<SocketAddr> = socks5.into_iter().collect();
        let mut forward = Vec::with_capacity(proxy.forward.len());
        for text in &proxy.forward {
            let one = parse_forward(source, text, client)?;
            if !taken.insert(one.listen) {
                return Err(source.error_at(text.span(), format!("{} is listened on already", one.listen)));
            }
            forward.push(one);
        }
        for one in &extra.forward {
            let vip = client.vips.iter().any(|vip| vip.address == one.target.ip());
            if !vip || !taken.insert(one.listen) {
                let Forward { listen, target } = one;
                let message =
                    format!("--forward {listen}={target}: no VIP of this file, or listened on already");
                return Err(source.error(message));
            }
            forward.push(*one);
        }
        let boundary = proxy.boundary.as_ref().map(|text| parse_boundary(source, text)).transpose()?;
        Ok(Some(ProxyConfig {
            socks5,
            forward,
            ports,
            boundary: extra.boundary.or(boundary).unwrap_or_default(),
            accept_prefixes: check_prefixes(source, &proxy.accept_prefixes)?,
            max_connections: in_range(source, self.limits.connections.as_ref(), room, 1..room + 1)? as usize,
            connect_timeout: seconds(source, self.timers.connect_s.as_ref(), 30)?,
            request_timeout: seconds(source, self.timers.request_s.as_ref(), 10)?,
        }))
    }
}

fn check_interface(source: &Source, name: &Spanned<String>) -> Result<String, ConfigError> {
    let text = name.get_ref();
    if text.is_empty() || text.len() > 15 || text.contains(|c: char| c == '/' || c.is_whitespace()) {
        return Err(source.error_at(name.span(), format!("{text:?} cannot be an interface's name")));
    }
    Ok(text.clone())
}

fn check_vips(source: &Source, vips: &[Vip]) -> Result<Vec<VipConfig>, ConfigError> {
    if vips.is_empty() {
        return Err(source.error("no VIP: add at least one [[vip]] with its address"));
    }
    let mut seen = HashSet::new();
    let mut checked = Vec::with_capacity(vips.len());
    for vip in vips {
        let address = *vip.address.get_ref();
        let fail = |why: &str| Err(source.error_at(vip.address.span(), format!("{address} {why}")));
        if address.is_unspecified() || address.is_multicast() || address.is_loopback() {
            return fail("cannot be a VIP: it must be a unicast address of the network");
        }
        if address.to_canonical() != address {
            return fail("is an IPv4 address in IPv6 clothing: write it as IPv4");
        }
        if !seen.insert(address) {
            return fail("is configured twice");
        }
        checked.push(VipConfig { address, continuation: vip.continuation, on_redirect: OnRedirect::Hint });
    }
    Ok(checked)
}

fn in_range(
    source: &Source,
    value: Option<&Spanned<u64>>,
    default: u64,
    range: Range<u64>,
) -> Result<u64, ConfigError> {
    match value {
        None => Ok(default),
        Some(value) if range.contains(value.get_ref()) => Ok(*value.get_ref()),
        Some(value) => {
            let message = format!("must be between {} and {}", range.start, range.end - 1);
            Err(source.error_at(value.span(), message))
        }
    }
}

fn seconds(source: &Source, value: Option<&Spanned<u64>>, default: u64) -> Result<Duration, ConfigError> {
    in_range(source, value, default, 1..86_401).map(Duration::from_secs)
}

/// `first-last`, or one port.
fn parse_ports(source: &Source, text: &Spanned<String>) -> Result<PortRange, ConfigError> {
    let (first, last) = text.get_ref().split_once('-').unwrap_or((text.get_ref(), text.get_ref()));
    match (first.trim().parse::<u16>(), last.trim().parse::<u16>()) {
        (Ok(first), Ok(last)) if 0 < first && first <= last => Ok(PortRange::new(first, last)),
        _ => {
            let message = "write ports as \"first-last\", lower port first, from 1 to 65535";
            Err(source.error_at(text.span(), message))
        }
    }
}

fn parse_listen(source: &Source, text: &Spanned<String>) -> Result<SocketAddr, ConfigError> {
    socket(text.get_ref()).ok_or_else(|| {
        let message = "write the address to listen on as \"127.0.0.1:1080\" or \"[::1]:1080\"";
        source.error_at(text.span(), message)
    })
}

fn parse_boundary(source: &Source, text: &Spanned<String>) -> Result<Boundary, ConfigError> {
    text.get_ref().parse().map_err(|error: BoundaryError| source.error_at(text.span(), error.to_string()))
}

fn check_prefixes(source: &Source, prefixes: &[Spanned<Prefix>]) -> Result<Vec<Prefix>, ConfigError> {
    if let Some(beyond) = prefixes.get(MAX_PREFIXES) {
        return Err(
            source.error_at(beyond.span(), format!("at most {MAX_PREFIXES} prefixes can be accepted"))
        );
    }
    Ok(prefixes.iter().map(|prefix| *prefix.get_ref()).collect())
}

/// `LISTEN=VIP:PORT`.
fn parse_forward(
    source: &Source,
    text: &Spanned<String>,
    client: &ClientConfig,
) -> Result<Forward, ConfigError> {
    let Forward { listen, target } = text
        .get_ref()
        .parse()
        .map_err(|error: ForwardError| source.error_at(text.span(), error.to_string()))?;
    if !client.vips.iter().any(|vip| vip.address == target.ip()) {
        return Err(source.error_at(text.span(), format!("{} is none of the VIPs above", target.ip())));
    }
    Ok(Forward { listen, target })
}

#[cfg(test)]
mod tests {
    use super::*;

    const VIP: &str = "[[vip]]\naddress = \"203.0.113.10\"\n";

    fn config(text: &str) -> Result<Config, ConfigError> {
        Config::from_source(&Source::new("client.toml", text))
    }

    #[test]
    fn a_vip_is_all_that_must_be_written() {
        let config = config(&format!("role = \"client\"\n{VIP}")).unwrap();
        assert_eq!(config.mode, Mode::Transparent);
        assert_eq!(config.hold, Hold::Crash);
        assert_eq!(config.interface, None);
        assert_eq!(config.vips().collect::<Vec<_>>(), ["203.0.113.10".parse::<IpAddr>().unwrap()]);
        assert_eq!(ClientConfig { vips: Vec::new(), ..config.client }, ClientConfig::default());
        assert_eq!(config.socket_interval, Duration::from_secs(5));
    }

    #[test]
    fn every_constant_of_the_machine_has_a_key() {
        let text = format!(
            "role = \"client\"\ninterface = \"eth1\"\nallowed_ports = \"41000-41999\"\ndenied_ports = [41500]\n\
             hold = \"always\"\nnotrack = false\n{VIP}continuation = \"handover\"\n\
             [limits]\nflows = 10\nhops = 2\nreconnect_repeats = 1\n\
             [timers]\nreconnect_ms = 100\nprobe_ms = 20\nhandover_s = 5\nplain_memory_s = 60\n\
             translated_memory_s = 61\npaths_s = 1\nsockets_s = 3\n[host]\nexid = 0x1234\n"
        );
        let config = config(&text).unwrap();
        let expected = ClientConfig {
            exid: 0x1234,
            vips: vec![VipConfig {
                address: "203.0.113.10".parse().unwrap(),
                continuation: Continuation::Handover,
                on_redirect: OnRedirect::Hint,
            }],
            ports: 41_000..=41_999,
            denied_ports: vec![41_500],
            max_flows: 10,
            mtu: ClientConfig::default().mtu,
            max_hops: 2,
            reconnect_timeout: Duration::from_millis(100),
            reconnect_repeats: 1,
            probe_timeout: Duration::from_millis(20),
            handover_timeout: Duration::from_secs(5),
            plain_memory: Duration::from_mins(1),
            translated_memory: Duration::from_secs(61),
            // §4 and §5 are for who has the byte stream.
            accept_prefixes: Vec::new(),
            rebind_timeout: ClientConfig::default().rebind_timeout,
            resettle_after: None,
        };
        assert_eq!(config.client, expected);
        assert_eq!((config.hold, config.notrack), (Hold::Always, false));
        assert_eq!(config.path_interval, Duration::from_secs(1));
    }

    #[test]
    fn the_reference_shows_the_defaults() {
        let shortest = config(&format!("role = \"client\"\n{VIP}")).unwrap();
        assert_eq!(config(include_str!("reference.toml")).unwrap(), shortest);
        let proxy = |text: &str| text.replace("\"transparent\"", "\"proxy\"");
        let whole = include_str!("reference.toml").replace("\n# [proxy]", "\n[proxy]");
        let whole = ["socks5", "forward", "ports", "boundary", "accept_prefixes"]
            .iter()
            .fold(whole, |text, key| text.replace(&format!("\n# {key} ="), &format!("\n{key} =")));
        let whole = config(&proxy(&whole)).unwrap().proxy.unwrap();
        assert_eq!((whole.ports, whole.boundary), (DEFAULT_PROXY_PORTS, Boundary::None));
        assert_eq!(whole.accept_prefixes, []);
    }

    #[test]
    fn a_proxy_is_read() {
        let text = format!(
            "role = \"client\"\nmode = \"proxy\"\n{VIP}[[vip]]\naddress = \"2001:db8::10\"\n[proxy]\nsocks5 = \
             \"127.0.0.1:1080\"\nforward = [\"[::1]:8080=[2001:db8::10]:443\"]\nports = \"50000-50009\"\n"
        );
        let proxy = config(&text).unwrap().proxy.unwrap();
        assert_eq!(proxy.socks5, Some("127.0.0.1:1080".parse().unwrap()));
        assert_eq!(proxy.forward[0].target, "[2001:db8::10]:443".parse().unwrap());
        assert_eq!((proxy.max_connections, proxy.boundary), (10, Boundary::None));
    }

    #[test]
    fn m8_streams_of_a_proxy_are_followed_where_they_may_be_cut() {
        let with = |boundary: &str, extra: &Extra| {
            let text = format!(
                "role = \"client\"\nmode = \"proxy\"\n{VIP}[proxy]\nsocks5 = \"127.0.0.1:1080\"\nboundary = \"{boundary}\"\n"
            );
            let source = Source::new("client.toml", text);
            let config = File::read(&source).unwrap().check(&source, extra).unwrap();
            (config.proxy.unwrap().boundary, config.client.vips[0].on_redirect)
        };
        let none = Extra::default();
        assert_eq!(with("none", &none), (Boundary::None, OnRedirect::Hint));
        assert_eq!(with("line", &none), (Boundary::Line, OnRedirect::Follow));
        let idle = Boundary::Idle(Duration::from_millis(50));
        assert_eq!(with("idle:50ms", &none), (idle, OnRedirect::Follow));
        let prefixes = |boundary: &str| {
            let text = format!(
                "role = \"client\"\nmode = \"proxy\"\n{VIP}[proxy]\nsocks5 = \"127.0.0.1:1080\"\n\
                 accept_prefixes = [\"10.3.0.0/24\", \"fd00:3::/64\"]\nboundary = \"{boundary}\"\n"
            );
            let config = config(&text).unwrap();
            assert_eq!(config.proxy.unwrap().accept_prefixes[0].to_string(), "10.3.0.0/24");
            config.client.accept_prefixes
        };
        assert_eq!(prefixes("none"), []);
        let fd00 = redirect::Prefix { address: "fd00:3::".parse().unwrap(), length: 64 };
        assert_eq!(prefixes("line")[1], fd00);
        let extra = Extra { boundary: Some(Boundary::Line), ..Extra::default() };
        assert_eq!(with("idle:2s", &extra), (Boundary::Line, OnRedirect::Follow));
    }

    #[test]
    fn mistakes_are_refused_with_their_line() {
        let proxy = "mode = \"proxy\"\n[[vip]]\naddress = \"203.0.113.10\"\n[proxy]\n";
        for (line, text, message) in [
            (1, "role = \"server\"\n[[vip]]\naddress = \"1.2.3.4\"\n".to_owned(), "not of a client"),
            (3, "[[vip]]\naddress = \"0.0.0.0\"\n".to_owned(), "unicast"),
            (3, "[[vip]]\naddress = \"::ffff:1.2.3.4\"\n".to_owned(), "IPv4"),
            (3, "[[vip]]\naddress = \"vip.example\"\n".to_owned(), "invalid IP address"),
            (5, format!("{VIP}{VIP}"), "twice"),
            (4, format!("{VIP}continuation = \"magic\"\n"), "unknown variant"),
            (2, format!("interface = \"a/b\"\n{VIP}"), "interface's name"),
            (2, format!("allowed_ports = \"0-5\"\n{VIP}"), "first-last"),
            (2, format!("allowed_ports = \"9-5\"\n{VIP}"), "first-last"),
            (2, format!("allowed_prots = \"9-5\"\n{VIP}"), "unknown field"),
            (5, format!("{VIP}[limits]\nflows = 0\n"), "between 1 and"),
            (5, format!("{VIP}[timers]\nprobe_ms = 0\n"), "between 1 and"),
            (4, format!("{VIP}[proxy]\nsocks5 = \"127.0.0.1:1080\"\n"), "mode = \"proxy\""),
            (5, proxy.to_owned(), "nothing to do"),
            (6, format!("{proxy}socks5 = \"localhost\"\n"), "127.0.0.1:1080"),
            (6, format!("{proxy}forward = [\"127.0.0.1:8080\"]\n"), "VIP:443"),
            (6, format!("{proxy}forward = [\"127.0.0.1:8080=10.0.0.1:443\"]\n"), "none of the VIPs"),
            (
                7,
                format!("{proxy}socks5 = \"127.0.0.1:1\"\nforward = [\"127.0.0.1:1=203.0.113.10:443\"]\n"),
                "already",
            ),
            (7, format!("{proxy}socks5 = \"127.0.0.1:1\"\nboundary = \"idle:0ms\"\n"), "idle:50ms"),
            (7, format!("{proxy}socks5 = \"127.0.0.1:1\"\nboundary = \"idle\"\n"), "idle:50ms"),
            (7, format!("{proxy}socks5 = \"127.0.0.1:1\"\naccept_prefixes = [\"10.0.0.0/33\"]\n"), "prefix"),
            (8, format!("{VIP}[host]\n\n\n\nmark = 0\n"), "mark 0"),
        ] {
            let text = if text.starts_with("role") { text } else { format!("role = \"client\"\n{text}") };
            let error = config(&text).unwrap_err();
            assert_eq!(error.line(), Some(line), "{error}\n---\n{text}");
            assert!(error.to_string().contains(message), "{error}\n---\n{text}");
        }
        assert_eq!(config("role = \"client\"\n").unwrap_err().line(), None);
        assert_eq!(
            config("role = \"client\"\nmode = \"proxy\"\n[[vip]]\naddress = \"1.2.3.4\"\n")
                .unwrap_err()
                .line(),
            None
        );
    }
}
