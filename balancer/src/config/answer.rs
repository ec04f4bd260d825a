//! Who answers SYNs that ask for a redirect: the servers' agents, or the balancer itself (`B1`).

use serde::{Deserialize, Serialize};
use shunt_host::{ConfigError, Source};
use toml::Spanned;

use super::{ForwardMode, Server, Service, Transport};

/// Who answers a SYN with R.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AnswerBy {
    /// The agent of the chosen server.
    #[default]
    Server,
    /// The balancer, from the SYN alone (`S2`); servers need no agent.
    Balancer,
}

impl AnswerBy {
    /// As a service says it, or else the whole file.
    pub(super) fn resolve(
        own: Option<&Spanned<AnswerBy>>,
        all: Option<&Spanned<AnswerBy>>,
        forward: ForwardMode,
        protocols: &[Transport],
        source: &Source,
    ) -> Result<AnswerBy, ConfigError> {
        if let Some(own) = own.filter(|_| !protocols.contains(&Transport::Tcp)) {
            return Err(source.error_at(own.span(), "only TCP has redirects to be answered"));
        }
        let Some(written) = own.or(all) else { return Ok(AnswerBy::default()) };
        if *written.get_ref() == AnswerBy::Balancer && forward != ForwardMode::Network {
            let message = "the balancer only answers itself with `forward = \"network\"`: the servers' SYN-ACKs have to \
                           be confirmed on a way back that leads here";
            return Err(source.error_at(written.span(), message));
        }
        Ok(*written.get_ref())
    }
}

impl Service {
    /// Whether the balancer redirects clients itself.
    pub(crate) fn is_answered_here(&self) -> bool {
        self.answer == AnswerBy::Balancer && self.protocols.contains(&Transport::Tcp)
    }

    /// Whether SYN-ACKs by `protocol` from a service port (`owned`) get C here.
    pub(super) fn is_confirmed_here(&self, owned: bool, protocol: u8) -> bool {
        owned && protocol == Transport::Tcp.number() && self.is_answered_here()
    }
}

impl Server {
    /// Whether a port is its service port for a service.
    pub(super) fn owns(&self, service: usize, port: u16) -> bool {
        self.ports_of(service).any(|range| range.contains(port))
    }
}
