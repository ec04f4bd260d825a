//! `[decapsulate]`: tunnels of balancers that end on this host.

use serde::Deserialize;
use shunt_host::{ConfigError, Prefix, Source};
use shunt_stack::wire::gue;
use toml::Spanned;

const MAX_PREFIXES: usize = 256;

/// Which tunnels end here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decapsulate {
    /// The UDP port they come to.
    pub port: u16,
    /// Whose they may be. Not empty.
    pub from: Vec<Prefix>,
}

/// As it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DecapsulateTable {
    port: Option<Spanned<u16>>,
    from: Spanned<Vec<Prefix>>,
}

impl DecapsulateTable {
    pub(super) fn check(&self, source: &Source) -> Result<Decapsulate, ConfigError> {
        let from = self.from.get_ref();
        if from.is_empty() || from.len() > MAX_PREFIXES {
            let message = format!("list between 1 and {MAX_PREFIXES} addresses or prefixes of balancers");
            return Err(source.error_at(self.from.span(), message));
        }
        let port = match &self.port {
            Some(port) if *port.get_ref() == 0 => {
                return Err(source.error_at(port.span(), "port 0 cannot be used"));
            }
            port => port.as_ref().map_or(gue::PORT, |port| *port.get_ref()),
        };
        Ok(Decapsulate { port, from: from.clone() })
    }
}
