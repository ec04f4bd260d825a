//! What the file says of packets without ports: ICMP messages that are no errors (`I4`), and other protocols (O12).

use std::collections::BTreeMap;

use serde::Deserialize;
use shunt_host::{ConfigError, Family, Source};
use toml::Spanned;

use super::Server;

type Result<T> = std::result::Result<T, ConfigError>;

/// Echo requests, by family.
pub(crate) const ECHO_REQUEST: [(Family, u8); 2] = [(Family::V4, 8), (Family::V6, 128)];

/// Where packets without ports go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Portless {
    /// As what is not understood: to the default server, or dropped if there is none (`B4`).
    #[default]
    DefaultServer,
    /// Dropped and counted.
    Drop,
    /// To one of the servers that take new connections, by a hash over addresses and, of an echo, its identifier.
    Balance,
    /// To the server of this index.
    Server(usize),
    /// Answered by the balancer itself; echo requests only.
    Answer,
}

/// What happens to ICMP messages that are no errors (`I4`), whatever the VIP.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct IcmpRules {
    default: Portless,
    types: BTreeMap<(Family, u8), Portless>,
}

impl IcmpRules {
    /// Where a message of this type goes.
    pub fn of(&self, family: Family, message_type: u8) -> Portless {
        self.types.get(&(family, message_type)).copied().unwrap_or(self.default)
    }

    /// Everything that occurs.
    pub(super) fn all(&self) -> impl Iterator<Item = Portless> {
        std::iter::once(self.default).chain(self.types.values().copied())
    }
}

/// As it is written: a word, or a server.
#[derive(Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "expected \"drop\", \"default-server\", \"balance\", \"answer\" or { server = \"NAME\" }"
)]
pub(super) enum Written {
    Word(Word),
    Named(Named),
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Word {
    Drop,
    DefaultServer,
    Balance,
    Answer,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Named {
    server: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ProtocolTable {
    number: Spanned<u8>,
    to: Spanned<Written>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct IcmpTable {
    default: Option<Spanned<Written>>,
    echo: Option<Spanned<Written>>,
    #[serde(default)]
    v4: BTreeMap<Spanned<String>, Spanned<Written>>,
    #[serde(default)]
    v6: BTreeMap<Spanned<String>, Spanned<Written>>,
}

fn resolve(written: &Spanned<Written>, servers: &[Server], source: &Source) -> Result<Portless> {
    match written.get_ref() {
        Written::Word(Word::Drop) => Ok(Portless::Drop),
        Written::Word(Word::DefaultServer) => Ok(Portless::DefaultServer),
        Written::Word(Word::Balance) => Ok(Portless::Balance),
        Written::Word(Word::Answer) => Ok(Portless::Answer),
        Written::Named(Named { server }) => match servers.iter().position(|known| known.name == *server) {
            Some(index) => Ok(Portless::Server(index)),
            None => Err(source.error_at(written.span(), format!("there is no server named {server:?}"))),
        },
    }
}

fn no_answer(portless: Portless, written: &Spanned<Written>, source: &Source) -> Result<Portless> {
    if portless == Portless::Answer {
        return Err(
            source.error_at(written.span(), "only echo requests can be answered: `echo = \"answer\"`")
        );
    }
    Ok(portless)
}

/// The `[icmp]` table.
pub(super) fn icmp(table: &IcmpTable, servers: &[Server], source: &Source) -> Result<IcmpRules> {
    let mut rules = IcmpRules::default();
    if let Some(written) = &table.default {
        rules.default = no_answer(resolve(written, servers, source)?, written, source)?;
    }
    if let Some(written) = &table.echo {
        let to = resolve(written, servers, source)?;
        rules.types.extend(ECHO_REQUEST.map(|echo| (echo, to)));
    }
    for (family, types) in [(Family::V4, &table.v4), (Family::V6, &table.v6)] {
        for (number, written) in types {
            let message_type = icmp_type(family, number, source)?;
            let mut to = resolve(written, servers, source)?;
            if !ECHO_REQUEST.contains(&(family, message_type)) {
                to = no_answer(to, written, source)?;
            }
            rules.types.insert((family, message_type), to);
        }
    }
    Ok(rules)
}

fn icmp_type(family: Family, number: &Spanned<String>, source: &Source) -> Result<u8> {
    let Ok(message_type) = number.get_ref().parse() else {
        let message = format!("{:?} is no ICMP type: a number from 0 to 255", number.get_ref());
        return Err(source.error_at(number.span(), message));
    };
    let error = match family {
        Family::V4 => matches!(message_type, 3 | 4 | 5 | 11 | 12),
        Family::V6 => message_type < 128,
    };
    if error {
        let message = format!("type {message_type} is an error: it follows the packet that it quotes");
        return Err(source.error_at(number.span(), message));
    }
    Ok(message_type)
}

/// The `[[protocol]]` tables.
pub(super) fn protocols(
    tables: &[ProtocolTable],
    servers: &[Server],
    source: &Source,
) -> Result<BTreeMap<u8, Portless>> {
    let mut protocols = BTreeMap::new();
    for ProtocolTable { number, to } in tables {
        let elsewhere = match number.get_ref() {
            6 | 17 => Some("TCP and UDP are services: `protocols` of a [[service]]"),
            1 | 58 => Some("ICMP has a table of its own: [icmp]"),
            0 | 43 | 44 | 51 | 60 => Some("an IPv6 extension header is no protocol of its own"),
            _ => None,
        };
        if let Some(message) = elsewhere {
            return Err(source.error_at(number.span(), message));
        }
        let portless = no_answer(resolve(to, servers, source)?, to, source)?;
        if protocols.insert(*number.get_ref(), portless).is_some() {
            let message = format!("protocol {} is listed twice", number.get_ref());
            return Err(source.error_at(number.span(), message));
        }
    }
    Ok(protocols)
}
