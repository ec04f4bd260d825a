//! Looks for what on a host stands in a daemon's way, and says how to mend it. Changes nothing.
//!
//! A role describes what it [`Needs`]; [`examine`] compares that with the host. What the daemon changes by itself is
//! no obstacle unless it cannot be changed. Firewalls are read through the program `nft`, the only one that is run.

mod addresses;
mod basics;
mod firewall;
mod routing;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use serde::Serialize;

use crate::change::Change;
use crate::offload::End;
use crate::options::HostOptions;

/// What a role needs of its host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Needs {
    /// Its numbers and names.
    pub options: HostOptions,
    /// Everything it would change.
    pub changes: Vec<Change>,
    /// Interfaces that must exist.
    pub interfaces: Vec<String>,
    /// Addresses of other hosts to which routes must lead.
    pub reach: Vec<IpAddr>,
    /// Addresses that must be this host's own.
    pub own: Vec<IpAddr>,
    /// Where somebody of this host must listen (`S6`).
    pub listening: Vec<SocketAddr>,
    /// TCP ports that this host's firewall must let in.
    pub ports: Vec<u16>,
    /// Whether its packets can be left to the kernel ([`Offload`](crate::Offload)), or why not; `None` if that was not
    /// asked for.
    pub offload: Option<Result<(), String>>,
    /// What the kernel forwards then without passing a device of ours: packets from, or to, these addresses.
    pub forwards: BTreeSet<(End, IpAddr)>,
}

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// As it should be.
    Good,
    /// Worth knowing.
    Note,
    /// May stand in the way, depending on what cannot be seen from here.
    Warning,
    /// Stands in the way.
    Error,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Severity::Good => "good",
            Severity::Note => "note",
            Severity::Warning => "warning",
            Severity::Error => "error",
        })
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How much it matters.
    pub severity: Severity,
    /// What was looked at, in one word that stays the same.
    pub subject: &'static str,
    /// What was found.
    pub found: String,
    /// What to do about it; empty if nothing.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub mend: String,
}

impl Finding {
    fn good(subject: &'static str, found: impl Into<String>) -> Self {
        Self { severity: Severity::Good, subject, found: found.into(), mend: String::new() }
    }

    fn new(
        severity: Severity,
        subject: &'static str,
        found: impl Into<String>,
        mend: impl Into<String>,
    ) -> Self {
        Self { severity, subject, found: found.into(), mend: mend.into() }
    }
}

/// What every role needs, without a configuration: privileges, TUN devices, nftables.
pub async fn examine_host() -> Vec<Finding> {
    let mut findings = basics::privileges();
    findings.extend(basics::devices());
    findings.push(basics::nftables().await);
    findings.extend(basics::managers());
    findings
}

fn offload(needs: &Needs) -> Option<Finding> {
    Some(match needs.offload.as_ref()? {
        Ok(()) => Finding::good("offload", "established traffic is left to the kernel"),
        Err(why) => Finding::new(
            Severity::Note,
            "offload",
            format!("not all packets are left to the kernel: {why}"),
            "nothing, unless userspace is too slow",
        ),
    })
}

/// What one role needs beside that. A question that the host does not answer is a finding of its own.
pub async fn examine(needs: &Needs) -> Vec<Finding> {
    let mut findings = basics::families(needs);
    findings.extend(basics::sysctls(needs));
    findings.extend(addresses::interfaces(needs).await);
    findings.extend(addresses::reach(needs).await);
    findings.extend(addresses::own(needs).await);
    findings.extend(addresses::listening(needs).await);
    findings.extend(routing::policy(needs).await);
    findings.extend(firewall::examine(needs));
    findings.extend(offload(needs));
    findings
}
