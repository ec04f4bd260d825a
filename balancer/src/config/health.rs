//! How servers' health is looked at: `[health]` for all services, `check` for one.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use shunt_host::{ConfigError, PortRange, Source};
use toml::Spanned;

use super::ForwardMode;

/// Own source ports of checks unless configured: above what Linux gives to programs.
const DEFAULT_PORTS: PortRange = PortRange::new(61_000, 61_015);
const MAX_PORTS: u16 = 1024;

/// What a server has to do to be healthy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckKind {
    /// Nothing: it is not looked at.
    #[default]
    None,
    /// Accept a connection on its service port.
    Tcp,
    /// Answer an HTTP GET there with an expected status.
    Http,
}

/// How a service's servers are looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What they have to do; never [`CheckKind::None`].
    pub kind: CheckKind,
    /// `http`: the path asked for.
    pub path: String,
    /// `http`: the `Host` header; the server's address and port if there is none.
    pub host: Option<String>,
    /// `http`: the statuses of a healthy server.
    pub expect: Vec<u16>,
    /// From the start of one look to the start of the next.
    pub interval: Duration,
    /// After which a look has failed.
    pub timeout: Duration,
    /// Successes in a row after which an unhealthy server is healthy.
    pub rise: u32,
    /// Failures in a row after which a healthy server is unhealthy.
    pub fall: u32,
}

/// The keys as written, in `[health]` or a service's `check`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct CheckTable {
    kind: Option<Spanned<CheckKind>>,
    path: Option<Spanned<String>>,
    host: Option<Spanned<String>>,
    expect: Option<Spanned<Vec<u16>>>,
    interval_ms: Option<Spanned<u64>>,
    timeout_ms: Option<Spanned<u64>>,
    rise: Option<Spanned<u64>>,
    fall: Option<Spanned<u64>>,
    /// In `[health]` only.
    source_ports: Option<Spanned<String>>,
}

impl CheckTable {
    /// A service's check: its own keys, then those of `[health]`, then the defaults. `None` if it is not looked at.
    pub(super) fn resolve(
        own: Option<&Spanned<CheckTable>>,
        all: &CheckTable,
        forward: ForwardMode,
        source: &Source,
    ) -> Result<Option<Check>, ConfigError> {
        let none = CheckTable::default();
        let service = own.map_or(&none, Spanned::get_ref);
        if let Some(ports) = &service.source_ports {
            return Err(
                source.error_at(ports.span(), "this belongs into [health]: all checks share the ports")
            );
        }
        let kind = service.kind.as_ref().or(all.kind.as_ref());
        let span = kind.map(Spanned::span).or(own.map(Spanned::span)).unwrap_or_default();
        let kind = match (kind, own) {
            (Some(kind), _) => *kind.get_ref(),
            (None, Some(_)) => {
                return Err(source.error_at(span, "a check has a kind: write `kind = \"tcp\"` or `\"http\"`"));
            }
            (None, None) => CheckKind::None,
        };
        if kind == CheckKind::None {
            return Ok(None);
        }
        if forward != ForwardMode::Network {
            let message = "health is only looked at with `forward = \"network\"`: a server that is reached by the \
                           VIP alone cannot be asked from here; let what watches it write `state = \"down\"`, or run \
                           `shunt ctl drain NAME`";
            return Err(source.error_at(span, message));
        }
        let millis = |own: &Option<Spanned<u64>>, all: &Option<Spanned<u64>>, default| {
            source.within(own.as_ref().or(all.as_ref()), default, 10..=3_600_000).map(Duration::from_millis)
        };
        let count = |own: &Option<Spanned<u64>>, all: &Option<Spanned<u64>>, default| {
            source.within(own.as_ref().or(all.as_ref()), default, 1..=100).map(|count| count as u32)
        };
        let host = service.host.as_ref().or(all.host.as_ref());
        Ok(Some(Check {
            kind,
            path: path(source, service.path.as_ref().or(all.path.as_ref()))?,
            host: host.map(|host| header(source, host)).transpose()?,
            expect: expect(source, service.expect.as_ref().or(all.expect.as_ref()))?,
            interval: millis(&service.interval_ms, &all.interval_ms, 2000)?,
            timeout: millis(&service.timeout_ms, &all.timeout_ms, 1000)?,
            rise: count(&service.rise, &all.rise, 2)?,
            fall: count(&service.fall, &all.fall, 3)?,
        }))
    }

    /// The source ports of checks.
    pub(super) fn source_ports(&self, source: &Source) -> Result<PortRange, ConfigError> {
        let Some(written) = &self.source_ports else { return Ok(DEFAULT_PORTS) };
        let text = written.get_ref();
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let port = |text: &str| text.trim().parse::<u16>().ok().filter(|port| *port >= 1024);
        match (port(first), port(last)) {
            (Some(first), Some(last)) if first <= last && last - first < MAX_PORTS => {
                Ok(PortRange::new(first, last))
            }
            _ => {
                let message = format!("write up to {MAX_PORTS} ports from 1024 on, as \"61000-61015\"");
                Err(source.error_at(written.span(), message))
            }
        }
    }
}

fn path(source: &Source, written: Option<&Spanned<String>>) -> Result<String, ConfigError> {
    let Some(written) = written else { return Ok("/".to_owned()) };
    let text = written.get_ref();
    let good = text.starts_with('/') && text.parse::<hyper::Uri>().is_ok();
    if good {
        return Ok(text.clone());
    }
    Err(source.error_at(written.span(), format!("{text:?} is no path of a URL: write it as \"/health\"")))
}

fn header(source: &Source, written: &Spanned<String>) -> Result<String, ConfigError> {
    let text = written.get_ref();
    if !text.is_empty() && hyper::header::HeaderValue::from_str(text).is_ok() {
        return Ok(text.clone());
    }
    Err(source.error_at(written.span(), format!("{text:?} cannot be a Host header")))
}

fn expect(source: &Source, written: Option<&Spanned<Vec<u16>>>) -> Result<Vec<u16>, ConfigError> {
    let Some(written) = written else { return Ok(vec![200]) };
    let list = written.get_ref();
    if list.is_empty() || list.iter().any(|status| !(100..=599).contains(status)) {
        return Err(source.error_at(written.span(), "write HTTP statuses, as [200, 204]"));
    }
    Ok(list.clone())
}
