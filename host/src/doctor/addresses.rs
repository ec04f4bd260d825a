//! Interfaces, routes to others, own addresses, and who listens on them.

use std::net::{IpAddr, SocketAddr};

use super::{Finding, Needs, Severity};
use crate::error::HostError;
use crate::query::{self, Listeners};

/// Whether the interfaces are there.
pub(super) async fn interfaces(needs: &Needs) -> Vec<Finding> {
    let mut findings = Vec::new();
    for interface in &needs.interfaces {
        findings.push(match query::link_mtu(interface).await {
            Ok(mtu) => Finding::good("interface", format!("{interface} is there, MTU {mtu}")),
            Err(error) => Finding::new(
                Severity::Error,
                "interface",
                error.to_string(),
                "`ip link` lists those there are; correct the configuration, or bring it up first",
            ),
        });
    }
    findings
}

/// Whether routes lead to those who must be reached. Asked as a socket would: while our own rules stand, their own
/// answer counts.
pub(super) async fn reach(needs: &Needs) -> Vec<Finding> {
    let mut findings = Vec::new();
    for &address in &needs.reach {
        findings.push(match query::next_hop(address).await {
            Ok(hop) if hop.local => Finding::new(
                Severity::Error,
                "route",
                format!("{address} is an address of this host itself"),
                "it must be another host's: correct the configuration, or remove it here with `ip address del`",
            ),
            Ok(hop) => {
                let by = hop.gateway.map(|gateway| format!(" by {gateway}")).unwrap_or_default();
                Finding::good("route", format!("{address} is reached over {}{by}", hop.interface))
            }
            Err(HostError::NoRoute(_)) => Finding::new(
                Severity::Error,
                "route",
                format!("no route leads to {address}"),
                format!("`ip route add {address} ...`, or a default route"),
            ),
            Err(error) => unanswered("route", &error),
        });
    }
    findings
}

/// Whether addresses are this host's own.
pub(super) async fn own(needs: &Needs) -> Vec<Finding> {
    let mut findings = Vec::new();
    for &address in &needs.own {
        findings.push(match query::next_hop(address).await {
            Ok(hop) if hop.local => Finding::good("address", format!("{address} is this host's own")),
            Ok(_) | Err(HostError::NoRoute(_)) => Finding::new(
                Severity::Error,
                "address",
                format!("{address} is no address of this host: its TCP will not take packets to it"),
                format!("`ip address add {address}/{} dev lo`", bits(address)),
            ),
            Err(error) => unanswered("address", &error),
        });
    }
    findings
}

fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// Whether somebody listens where clients are sent.
pub(super) async fn listening(needs: &Needs) -> Vec<Finding> {
    if needs.listening.is_empty() {
        return Vec::new();
    }
    let listeners = match Listeners::now().await {
        Ok(listeners) => listeners,
        Err(error) => return vec![unanswered("listener", &error)],
    };
    let look = |address: &SocketAddr| {
        if listeners.accepts(*address) {
            return Finding::good("listener", format!("somebody listens on {address}"));
        }
        Finding::new(
            Severity::Error,
            "listener",
            format!("nobody listens on {address}: no client is sent there"),
            format!(
                "let the program listen on port {} beside its usual one (nginx: `listen {0};`)",
                address.port()
            ),
        )
    };
    needs.listening.iter().map(look).collect()
}

/// The kernel did not say.
pub(super) fn unanswered(subject: &'static str, error: &HostError) -> Finding {
    Finding::new(Severity::Warning, subject, error.to_string(), "run this as root")
}
