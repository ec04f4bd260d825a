//! Selection beside the policy's name, traffic classes, marks, limits, the administrator's ports and statistics.

use std::collections::HashSet;
use std::time::Duration;

use serde::Deserialize;
use toml::Spanned;

use super::check::{Checker, Result};
use super::file::ServiceTable;
use super::{PolicyName, Server, Service};

/// The most classes.
pub const MAX_CLASSES: usize = 64;
/// The most patterns of a service.
pub const MAX_PATTERNS: usize = 256;
/// The longest pattern, and the largest offset of one, in bytes.
pub const MAX_PATTERN: usize = 1024;
/// The largest DSCP (RFC 2474).
pub const MAX_DSCP: u8 = 63;
/// The longest time that can be configured here, in seconds.
pub const MAX_SECONDS: u32 = 86_400;
/// The largest limit: 10 GB/s.
pub const MAX_RATE: u64 = 10_000_000_000;
/// How much of a limit may come at once, as a time of it.
pub const DEFAULT_BURST: Duration = Duration::from_millis(100);
/// Flows whose duration is measured.
pub const DEFAULT_FLOWS: usize = 65_536;
/// The most flows whose duration is measured; each costs 32 bytes.
pub const MAX_FLOWS: usize = 1 << 24;
/// After which time a flow whose end has not been seen is forgotten.
pub const DEFAULT_FLOW_TIMEOUT: Duration = Duration::from_secs(3600);

/// What happens to a new connection whose class has no server that is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fallback {
    /// All servers of the service are chosen among.
    #[default]
    All,
    /// It is dropped and counted.
    Drop,
}

/// A traffic class: DSCPs, and the servers for them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Class {
    pub(crate) name: String,
    /// The DSCPs that stand for it.
    pub(crate) dscp: Vec<u8>,
    pub(crate) fallback: Fallback,
    /// The DSCP that its packets get on their way to servers.
    pub(crate) mark_dscp: Option<u8>,
}

/// Bytes at a place of the payload that lead to a class.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    pub(crate) at: usize,
    pub(crate) bytes: Vec<u8>,
    /// Index of the class.
    pub(crate) class: usize,
}

impl Pattern {
    /// Whether a payload has these bytes there.
    pub fn matches(&self, payload: &[u8]) -> bool {
        payload.get(self.at..).is_some_and(|rest| rest.starts_with(&self.bytes))
    }
}

/// Limits of a service; `None` is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RateLimits {
    pub(crate) packets_per_s: Option<u64>,
    pub(crate) bytes_per_s: Option<u64>,
    pub(crate) new_per_s: Option<u64>,
    /// How much may come at once, as a time of the rate.
    pub(crate) burst: Duration,
}

/// A service's selection, marking and limits beside its policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Traffic {
    /// With `payload`: the policy in a class, and where no pattern matches.
    pub(crate) otherwise: PolicyName,
    pub(crate) patterns: Vec<Pattern>,
    /// How long a new server's weight grows; zero: not at all.
    pub(crate) slow_start: Duration,
    /// The DSCP that packets get on their way to servers.
    pub(crate) mark_dscp: Option<u8>,
    pub(crate) limit: Option<RateLimits>,
}

/// How connections are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Statistics {
    /// Flows whose duration is measured.
    pub(crate) flows: usize,
    /// After which time a flow whose end has not been seen is forgotten.
    pub(crate) timeout: Duration,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ClassTable {
    name: Spanned<String>,
    #[serde(default)]
    dscp: Vec<Spanned<u8>>,
    #[serde(default)]
    fallback: Fallback,
    #[serde(default)]
    mark_dscp: Option<Spanned<u8>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PatternTable {
    class: Spanned<String>,
    #[serde(default)]
    at: Option<Spanned<usize>>,
    #[serde(default)]
    text: Option<Spanned<String>>,
    #[serde(default)]
    hex: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LimitTable {
    #[serde(default)]
    packets_per_s: Option<Spanned<u64>>,
    #[serde(default)]
    bytes_per_s: Option<Spanned<u64>>,
    #[serde(default)]
    new_per_s: Option<Spanned<u64>>,
    #[serde(default)]
    burst_ms: Option<Spanned<u64>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct StatisticsTable {
    connections: bool,
    flows: Option<Spanned<usize>>,
    timeout_s: Option<Spanned<u32>>,
}

impl Checker<'_> {
    pub(super) fn classes(&self, tables: &[ClassTable]) -> Result<Vec<Class>> {
        let (mut classes, mut names) = (Vec::with_capacity(tables.len()), HashSet::new());
        let mut taken: [Option<&str>; MAX_DSCP as usize + 1] = [None; _];
        for table in tables {
            let name = self.name(&table.name, &mut names, "class")?;
            if classes.len() == MAX_CLASSES {
                return self.fail(table.name.span(), format!("more than {MAX_CLASSES} classes"));
            }
            let mut dscp = Vec::with_capacity(table.dscp.len());
            for written in &table.dscp {
                let value = self.dscp(written)?;
                if let Some(other) = taken[usize::from(value)].replace(table.name.get_ref()) {
                    let message = format!("DSCP {value} is the class {other:?}'s already");
                    return self.fail(written.span(), message);
                }
                dscp.push(value);
            }
            let mark_dscp = table.mark_dscp.as_ref().map(|mark| self.dscp(mark)).transpose()?;
            classes.push(Class { name, dscp, fallback: table.fallback, mark_dscp });
        }
        Ok(classes)
    }

    fn dscp(&self, written: &Spanned<u8>) -> Result<u8> {
        let value = *written.get_ref();
        if value > MAX_DSCP {
            return self.fail(written.span(), format!("a DSCP is between 0 and {MAX_DSCP}"));
        }
        Ok(value)
    }

    fn class(&self, name: &Spanned<String>, classes: &[Class]) -> Result<usize> {
        let index = classes.iter().position(|class| class.name == *name.get_ref());
        index.map_or_else(
            || {
                let message =
                    format!("there is no class named {:?}: add `[[class]]` with that name", name.get_ref());
                self.fail(name.span(), message)
            },
            Ok,
        )
    }

    pub(super) fn classes_of(&self, names: &[Spanned<String>], classes: &[Class]) -> Result<Vec<usize>> {
        let mut own = Vec::with_capacity(names.len());
        for name in names {
            let class = self.class(name, classes)?;
            if own.contains(&class) {
                return self.fail(name.span(), format!("the class {:?} is listed twice", name.get_ref()));
            }
            own.push(class);
        }
        Ok(own)
    }

    pub(super) fn traffic(&self, table: &ServiceTable, classes: &[Class]) -> Result<Traffic> {
        let by_payload = table.policy.as_ref().filter(|policy| *policy.get_ref() == PolicyName::Payload);
        if let (Some(policy), []) = (by_payload, &table.pattern[..]) {
            let message =
                "this policy needs patterns: add `[[service.pattern]]` with `class` and `text` or `hex`";
            return self.fail(policy.span(), message);
        }
        if by_payload.is_none() {
            let pattern = table.pattern.first().map(|pattern| pattern.class.span());
            if let Some(span) = pattern.or(table.otherwise.as_ref().map(Spanned::span)) {
                return self.fail(span, "only `policy = \"payload\"` uses it");
            }
        }
        if let Some(otherwise) = table.otherwise.as_ref().filter(|o| *o.get_ref() == PolicyName::Payload) {
            return self.fail(otherwise.span(), "another policy is needed where no pattern matches");
        }
        if let Some(pattern) = table.pattern.get(MAX_PATTERNS) {
            return self.fail(pattern.class.span(), format!("more than {MAX_PATTERNS} patterns"));
        }
        let patterns = table.pattern.iter().map(|pattern| self.pattern(pattern, classes));
        Ok(Traffic {
            otherwise: table.otherwise.as_ref().map_or_else(PolicyName::default, |o| *o.get_ref()),
            patterns: patterns.collect::<Result<_>>()?,
            slow_start: match &table.slow_start_s {
                Some(written) if *written.get_ref() == 0 => Duration::ZERO,
                written => self.seconds(written.as_ref(), 0)?,
            },
            mark_dscp: table.mark_dscp.as_ref().map(|mark| self.dscp(mark)).transpose()?,
            limit: table.limit.as_ref().map(|limit| self.limit(limit)).transpose()?,
        })
    }

    fn pattern(&self, table: &PatternTable, classes: &[Class]) -> Result<Pattern> {
        let (bytes, span) = match (&table.text, &table.hex) {
            (Some(text), None) => (text.get_ref().as_bytes().to_vec(), text.span()),
            (None, Some(hex)) => match from_hex(hex.get_ref()) {
                Some(bytes) => (bytes, hex.span()),
                None => return self.fail(hex.span(), "these are no bytes: two hexadecimal digits each"),
            },
            (None, None) => return self.fail(table.class.span(), "a pattern needs `text` or `hex`"),
            (Some(_), Some(hex)) => return self.fail(hex.span(), "a pattern is `text` or `hex`, not both"),
        };
        if bytes.is_empty() || bytes.len() > MAX_PATTERN {
            return self.fail(span, format!("a pattern has between 1 and {MAX_PATTERN} bytes"));
        }
        let at = table.at.as_ref().map_or(0, |at| *at.get_ref());
        if let Some(written) = table.at.as_ref().filter(|_| at > MAX_PATTERN) {
            return self.fail(written.span(), format!("patterns begin at {MAX_PATTERN} at the latest"));
        }
        Ok(Pattern { at, bytes, class: self.class(&table.class, classes)? })
    }

    fn limit(&self, table: &LimitTable) -> Result<RateLimits> {
        let rate = |written: &Option<Spanned<u64>>| match written {
            Some(rate) if !(1..=MAX_RATE).contains(rate.get_ref()) => {
                self.fail(rate.span(), format!("a limit is between 1 and {MAX_RATE}; leave it out for none"))
            }
            written => Ok(written.as_ref().map(|rate| *rate.get_ref())),
        };
        let burst = match &table.burst_ms {
            None => DEFAULT_BURST,
            Some(burst) if (1..=3_600_000).contains(burst.get_ref()) => {
                Duration::from_millis(*burst.get_ref())
            }
            Some(burst) => return self.fail(burst.span(), "a burst is between 1 and 3600000 milliseconds"),
        };
        Ok(RateLimits {
            packets_per_s: rate(&table.packets_per_s)?,
            bytes_per_s: rate(&table.bytes_per_s)?,
            new_per_s: rate(&table.new_per_s)?,
            burst,
        })
    }

    /// A time of at least one second.
    pub(super) fn seconds(&self, written: Option<&Spanned<u32>>, default: u32) -> Result<Duration> {
        let Some(written) = written else { return Ok(Duration::from_secs(default.into())) };
        if !(1..=MAX_SECONDS).contains(written.get_ref()) {
            return self.fail(written.span(), format!("it is between 1 and {MAX_SECONDS} seconds"));
        }
        Ok(Duration::from_secs((*written.get_ref()).into()))
    }

    pub(super) fn admin_ports(
        &self,
        written: &[Spanned<u16>],
        services: &[Service],
        servers: &[Server],
    ) -> Result<Vec<u16>> {
        let mut ports = Vec::with_capacity(written.len());
        for port in written {
            let number = *port.get_ref();
            if number == 0 {
                return self.fail(port.span(), "port 0 cannot be used");
            }
            if let Some(service) = services.iter().find(|service| service.redirect_port == number) {
                let message = format!("{number} is the redirect port of the service {:?}", service.name);
                return self.fail(port.span(), message);
            }
            let owns = |server: &&Server| server.ports.iter().any(|(_, owned)| owned.contains(number));
            if let Some(server) = servers.iter().find(owns) {
                let message = format!("{number} is a service port of the server {:?}", server.name);
                return self.fail(port.span(), message);
            }
            if ports.contains(&number) {
                return self.fail(port.span(), format!("the port {number} is listed twice"));
            }
            ports.push(number);
        }
        ports.sort_unstable();
        Ok(ports)
    }

    pub(super) fn statistics(&self, table: &StatisticsTable) -> Result<Option<Statistics>> {
        let flows = table.flows.as_ref().map_or(DEFAULT_FLOWS, |flows| *flows.get_ref());
        if let Some(written) = table.flows.as_ref().filter(|_| !(1..=MAX_FLOWS).contains(&flows)) {
            return self.fail(written.span(), format!("between 1 and {MAX_FLOWS} flows can be measured"));
        }
        let timeout = self.seconds(table.timeout_s.as_ref(), DEFAULT_FLOW_TIMEOUT.as_secs() as u32)?;
        Ok(table.connections.then_some(Statistics { flows, timeout }))
    }
}

/// Bytes of hexadecimal digits; blanks and colons between them are allowed.
fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> = text
        .chars()
        .filter(|c| !matches!(c, ' ' | ':'))
        .map(|c| c.to_digit(16).map(|digit| digit as u8))
        .collect::<Option<_>>()?;
    digits.len().is_multiple_of(2).then(|| digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}
