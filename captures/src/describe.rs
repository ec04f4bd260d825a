//! Packets in a few words, and the messages of PROTOCOL.md §2 by their names.

use std::net::IpAddr;

use serde::Serialize;
use shunt_stack::wire::{OptionError, Packet, Protocol, RedirectOption, TcpFlags, TcpView};

/// A packet in a few words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Source address.
    pub source: IpAddr,
    /// Source port, if there are ports.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_port: Option<u16>,
    /// Destination address.
    pub destination: IpAddr,
    /// Destination port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destination_port: Option<u16>,
    /// What it is: `SYN-ACK`, `5 bytes`, `ICMP 3/4`.
    pub what: String,
    /// The redirect option: `R C P=443`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub option: Option<String>,
    /// The message that it makes of the segment (PROTOCOL.md §2).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<&'static str>,
}

impl Summary {
    /// Describes a packet; the option is looked for under `exid`.
    pub fn of(packet: &Packet, exid: u16) -> Summary {
        let ports = packet.ports();
        let read = packet.tcp().map(|tcp| tcp.redirect(exid));
        let (option, message) = match (read, packet.tcp()) {
            (Some(Ok(Some(option))), Some(tcp)) => {
                (Some(label(&option)), Some(message(tcp.flags(), &option)))
            }
            (Some(Err(error)), _) if error != OptionError::Malformed => (Some(error.to_string()), None),
            _ => (None, None),
        };
        Summary {
            source: packet.source(),
            source_port: ports.map(|(source, _)| source),
            destination: packet.destination(),
            destination_port: ports.map(|(_, destination)| destination),
            what: what(packet),
            option,
            message,
        }
    }

    /// Source and destination, what it is and its option: `10.1.0.2:50000 > 203.0.113.10:443 SYN [R C]`.
    pub fn line(&self) -> String {
        let source = socket(self.source, self.source_port);
        let destination = socket(self.destination, self.destination_port);
        format!("{source} > {destination} {}", self.label())
    }

    /// What it is and its option.
    pub fn label(&self) -> String {
        match &self.option {
            Some(option) => format!("{} [{option}]", self.what),
            None => self.what.clone(),
        }
    }
}

fn socket(address: IpAddr, port: Option<u16>) -> String {
    match port {
        Some(port) => std::net::SocketAddr::new(address, port).to_string(),
        None => address.to_string(),
    }
}

fn what(packet: &Packet) -> String {
    let fragment = packet.fragment();
    let suffix = match fragment {
        Some(fragment) => format!(" (fragment {} at {})", fragment.identification, fragment.offset),
        None => String::new(),
    };
    let payload = packet.len() - packet.transport_offset();
    let what = match (packet.tcp(), packet.icmp(), packet.protocol()) {
        (Some(tcp), ..) => segment(&tcp),
        (None, Some(icmp), _) => {
            let name = if packet.source().is_ipv4() { "ICMP" } else { "ICMPv6" };
            match icmp.quoted() {
                Some(quoted) => format!(
                    "{name} {}/{} about {}",
                    icmp.message_type(),
                    icmp.code(),
                    socket(quoted.destination, Some(quoted.destination_port))
                ),
                None => format!("{name} {}/{}", icmp.message_type(), icmp.code()),
            }
        }
        (None, None, Protocol::Udp) if packet.ports().is_some() => {
            format!("UDP {} bytes", payload.saturating_sub(8))
        }
        (None, None, protocol) => format!("protocol {} {payload} bytes", protocol.number()),
    };
    what + &suffix
}

/// Flags that matter, and the payload: `SYN`, `FIN 5 bytes`.
fn segment(tcp: &TcpView<'_>) -> String {
    let has = |flag| tcp.flags().contains(flag);
    let mut names = Vec::new();
    for (flag, name) in [(TcpFlags::SYN, "SYN"), (TcpFlags::FIN, "FIN"), (TcpFlags::RST, "RST")] {
        names.extend(has(flag).then_some(name));
    }
    // Every segment but the first SYN has an ACK: it says something in a SYN-ACK, and where there is nothing else.
    if has(TcpFlags::ACK) && (has(TcpFlags::SYN) || names.is_empty() && tcp.payload().is_empty()) {
        names.push("ACK");
    }
    let flags = names.join("-");
    match (flags.is_empty(), tcp.payload().len()) {
        (true, 0) => "no flags".to_owned(),
        (false, 0) => flags,
        (true, length) => format!("{length} bytes"),
        (false, length) => format!("{flags} {length} bytes"),
    }
}

/// The parts of an option: `C P=41001 O T`.
pub fn label(option: &RedirectOption) -> String {
    let mut parts = Vec::new();
    parts.extend(option.redirect.then(|| "R".to_owned()));
    parts.extend(option.confirm.then(|| "C".to_owned()));
    parts.extend(option.port.map(|port| format!("P={port}")));
    parts.extend(option.observed.map(|_| "O".to_owned()));
    parts.extend(option.address.map(|address| format!("A={address}")));
    parts.extend(option.token.map(|_| "T".to_owned()));
    parts.extend((option.hops > 0).then(|| format!("hops={}", option.hops)));
    if parts.is_empty() { "empty".to_owned() } else { parts.join(" ") }
}

/// What a segment with the option is, in the words of PROTOCOL.md §2; the dissector uses the same.
pub fn message(flags: TcpFlags, option: &RedirectOption) -> &'static str {
    let has = |flag| flags.contains(flag);
    let port = option.port.is_some();
    match (has(TcpFlags::SYN), has(TcpFlags::ACK)) {
        (true, false) => match (option.redirect, port, option.confirm) {
            (false, ..) => "confirmation of nothing",
            (true, false, true) => "opening SYN, will reconnect",
            (true, false, false) => "opening SYN, will hand over",
            (true, true, true) => "opening SYN of a moved connection",
            (true, true, false) => "reconnecting SYN",
        },
        (true, true) => match (option.redirect, option.confirm, port) {
            (true, ..) => "echo",
            (false, false, _) => "nothing said",
            (false, true, true) => "redirecting SYN-ACK",
            (false, true, false) => "confirming SYN-ACK",
        },
        (false, _) => {
            let closes = flags.intersects(TcpFlags::FIN | TcpFlags::RST);
            match (option.redirect, option.confirm, port) {
                (false, true, true) if closes => "close of the old connection",
                (true, true, true) => "handover",
                (true, false, true) => "redirection of an established connection",
                (false, true, true) => "confirmation of a client's new port",
                _ => "nothing known",
            }
        }
    }
}
