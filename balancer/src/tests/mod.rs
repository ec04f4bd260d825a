//! Packets in, routes and bytes out.

mod answers;
mod connections;
mod datagrams;
mod fragments;
mod health;
mod icmp;
mod offload;
mod packets;
mod peers;
mod properties;
mod rules;
mod supers;
mod tokens;
mod traffic;
mod tunnels;

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use shunt_host::Source;
use shunt_stack::wire::{Packet, RedirectOption, SeqNumber, TcpFlags};

use crate::{Balancer, Config, Decision, DropReason, Output, Route, SelectKey};
use packets::{checksums_are_right, segment};

const EXID: u16 = 0x5244;

fn balancer(text: &str) -> Balancer {
    let config = Config::parse(&Source::new("test.toml", text)).unwrap_or_else(|error| panic!("{error}"));
    Balancer::new(&config, SelectKey([1; 16]))
}

/// Two VIPs, three servers of one service; `more` goes to the top.
fn three_servers(more: &str) -> String {
    let mut text = format!("role = \"balancer\"\nvips = [\"203.0.113.10\", \"2001:db8::10\"]\n{more}\n");
    text += "[[service]]\nname = \"web\"\nredirect_port = 443\n";
    for n in 1..=3 {
        let _ = write!(
            text,
            "[[server]]\nname = \"web-{n}\"\naddress = [\"10.0.0.{n}\", \"fd00::{n}\"]\nports = {{ web = 4100{n} }}\n"
        );
        if more.contains("direct") {
            let _ = writeln!(text, "device = \"eth{n}\"");
        }
    }
    text
}

/// The same, reached by UDP as well; `more` goes to the top, `service` to the service.
fn with_udp(more: &str, service: &str) -> String {
    let port = "redirect_port = 443\n";
    three_servers(more).replace(port, &format!("{port}protocols = [\"tcp\", \"udp\"]\n{service}\n"))
}

/// The addresses of one family's actors.
#[derive(Debug, Clone, Copy)]
struct Cast {
    client: IpAddr,
    vip: IpAddr,
    servers: [IpAddr; 3],
    router: IpAddr,
}

fn casts() -> [Cast; 2] {
    let ip = |text: &str| -> IpAddr { text.parse().unwrap() };
    [
        Cast {
            client: ip("192.0.2.7"),
            vip: ip("203.0.113.10"),
            servers: [ip("10.0.0.1"), ip("10.0.0.2"), ip("10.0.0.3")],
            router: ip("198.51.100.1"),
        },
        Cast {
            client: ip("2001:db8:1::7"),
            vip: ip("2001:db8::10"),
            servers: [ip("fd00::1"), ip("fd00::2"), ip("fd00::3")],
            router: ip("2001:db8:2::1"),
        },
    ]
}

impl Cast {
    fn client(&self) -> SocketAddr {
        SocketAddr::new(self.client, 50_000)
    }

    fn vip(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.vip, port)
    }

    /// A SYN to a port of the VIP, with the option if one is given.
    fn syn(&self, port: u16, option: Option<RedirectOption>) -> Packet {
        let mut packet = segment(self.client(), self.vip(port), TcpFlags::SYN, SeqNumber(7));
        if let Some(option) = option {
            packet.insert_redirect(EXID, &option, 1500).unwrap();
        }
        packet
    }

    fn ack(&self, port: u16) -> Packet {
        segment(self.client(), self.vip(port), TcpFlags::ACK, SeqNumber(8))
    }
}

const R: RedirectOption = RedirectOption {
    redirect: true,
    confirm: false,
    port: None,
    hops: 0,
    observed: None,
    address: None,
    token: None,
};

fn decision(balancer: &Balancer, packet: &Packet) -> Result<(usize, Decision), DropReason> {
    match balancer.route(packet)? {
        Route::ToServer { server, decision } => Ok((server.index(), decision)),
        other => panic!("{other:?}"),
    }
}

/// Processes a copy; what leaves has right checksums.
fn processed(balancer: &Balancer, packet: &Packet) -> Packet {
    let mut out = packet.clone();
    assert_eq!(balancer.process(&mut out), Ok(Output::Main));
    assert!(checksums_are_right(&out), "{out:?}");
    assert_eq!(out.len(), packet.len());
    out
}
