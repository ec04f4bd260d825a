//! The balancer's file as it is written, before it is checked.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use shunt_host::control::ControlSettings;
use shunt_host::{HostSettings, Role, TokenSettings};
use shunt_stack::redirect::Require;
use toml::Spanned;

use super::answer::AnswerBy;
use super::health::CheckTable;
use super::portless::{IcmpTable, ProtocolTable};
use super::ports::Ports;
use super::traffic::{ClassTable, LimitTable, PatternTable, StatisticsTable};
use super::{ForwardMode, Legacy, PolicyName, State, Transport, UdpPolicy};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    #[serde(rename = "role")]
    _role: Role,
    pub(super) vips: Spanned<Vec<Spanned<IpAddr>>>,
    #[serde(default)]
    pub(super) legacy: Option<Spanned<Legacy>>,
    #[serde(default)]
    pub(super) forward: ForwardMode,
    #[serde(default)]
    pub(super) link: Option<Spanned<String>>,
    #[serde(default)]
    pub(super) gue: Option<Spanned<GueTable>>,
    #[serde(default)]
    pub(super) level: Option<Spanned<u8>>,
    #[serde(default)]
    pub(super) answer: Option<Spanned<AnswerBy>>,
    #[serde(default)]
    pub(super) default_server: Option<Spanned<String>>,
    #[serde(default)]
    pub(super) legacy_server: Option<Spanned<String>>,
    #[serde(default)]
    pub(super) service: Vec<ServiceTable>,
    #[serde(default)]
    pub(super) server: Vec<ServerTable>,
    #[serde(default)]
    pub(super) protocol: Vec<ProtocolTable>,
    #[serde(default)]
    pub(super) icmp: IcmpTable,
    #[serde(default)]
    pub(super) limits: LimitsTable,
    #[serde(default)]
    pub(super) timers: TimersTable,
    #[serde(default)]
    pub(super) class: Vec<ClassTable>,
    #[serde(default)]
    pub(super) load_max_age_s: Option<Spanned<u32>>,
    #[serde(default)]
    pub(super) packets_half_life_s: Option<Spanned<u32>>,
    #[serde(default)]
    pub(super) admin_ports: Vec<Spanned<u16>>,
    #[serde(default)]
    pub(super) statistics: StatisticsTable,
    #[serde(default)]
    pub(super) health: CheckTable,
    #[serde(default)]
    pub(super) token: TokenSettings<Require>,
    #[serde(default)]
    pub(super) control: ControlSettings,
    #[serde(default)]
    pub(super) host: HostSettings,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct GueTable {
    pub(super) port: Option<Spanned<u16>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LimitsTable {
    pub(super) fragments: Option<Spanned<usize>>,
    pub(super) answers_per_second: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TimersTable {
    pub(super) fragments_s: Option<Spanned<u64>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ServiceTable {
    pub(super) name: Spanned<String>,
    pub(super) redirect_port: Spanned<u16>,
    #[serde(default)]
    pub(super) protocols: Option<Spanned<Vec<Transport>>>,
    #[serde(default)]
    pub(super) policy: Option<Spanned<PolicyName>>,
    #[serde(default)]
    pub(super) udp_policy: Option<Spanned<UdpPolicy>>,
    #[serde(default)]
    pub(super) vips: Option<Spanned<Vec<Spanned<IpAddr>>>>,
    #[serde(default)]
    pub(super) otherwise: Option<Spanned<PolicyName>>,
    #[serde(default)]
    pub(super) pattern: Vec<PatternTable>,
    #[serde(default)]
    pub(super) slow_start_s: Option<Spanned<u32>>,
    #[serde(default)]
    pub(super) mark_dscp: Option<Spanned<u8>>,
    #[serde(default)]
    pub(super) limit: Option<LimitTable>,
    #[serde(default)]
    pub(super) check: Option<Spanned<CheckTable>>,
    #[serde(default)]
    pub(super) answer: Option<Spanned<AnswerBy>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ServerTable {
    pub(super) name: Spanned<String>,
    #[serde(default)]
    pub(super) address: Option<Spanned<Addresses>>,
    #[serde(default)]
    pub(super) weight: Option<Spanned<u32>>,
    #[serde(default)]
    pub(super) state: State,
    #[serde(default)]
    pub(super) ports: BTreeMap<Spanned<String>, Spanned<Ports>>,
    #[serde(default)]
    pub(super) device: Option<Spanned<String>>,
    #[serde(default)]
    pub(super) gateway: Option<Spanned<Addresses>>,
    #[serde(default)]
    pub(super) classes: Vec<Spanned<String>>,
    #[serde(default)]
    pub(super) agent: Option<Spanned<SocketAddr>>,
}

/// One address, or a list of them.
#[derive(Debug, Default)]
pub(super) struct Addresses(pub(super) Vec<IpAddr>);

impl<'de> Deserialize<'de> for Addresses {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AddressesVisitor)
    }
}

struct AddressesVisitor;

impl<'de> Visitor<'de> for AddressesVisitor {
    type Value = Addresses;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an IP address, or a list of one per family")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Addresses, E> {
        let address = text.parse().map_err(|_| E::custom(format_args!("{text:?} is no IP address")))?;
        Ok(Addresses(vec![address]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Addresses, A::Error> {
        let mut addresses = Vec::new();
        while let Some(address) = seq.next_element()? {
            addresses.push(address);
        }
        Ok(Addresses(addresses))
    }
}
