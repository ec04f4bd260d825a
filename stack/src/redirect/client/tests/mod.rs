//! The client's rules, one after the other, against a network played by hand.

mod handover;
mod handshake;
mod memory;
mod model;
mod moves;
mod settle;
mod tokens;

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::*;
use crate::redirect::ConnectionNumbers;
use crate::wire::observed_digest;

const X: u16 = 443;
const Y: u16 = 41_001;
const ISS: SeqNumber = SeqNumber(1000);
const IRS: SeqNumber = SeqNumber(9000);
const TSVAL: u32 = 77;

/// A client and the clock, between a TCP and a network that the test plays.
struct World {
    client: Client,
    now: Instant,
    local: SocketAddr,
    vip: SocketAddr,
}

fn world(continuation: Continuation) -> World {
    world_at("10.1.0.2:50000", "203.0.113.10:443", continuation)
}

fn world_v6(continuation: Continuation) -> World {
    world_at("[2001:db8:1::2]:50000", "[2001:db8::10]:443", continuation)
}

fn world_at(local: &str, vip: &str, continuation: Continuation) -> World {
    let (local, vip): (SocketAddr, SocketAddr) = (local.parse().unwrap(), vip.parse().unwrap());
    let config = ClientConfig {
        vips: vec![VipConfig { address: vip.ip(), continuation, on_redirect: OnRedirect::Follow }],
        ..Default::default()
    };
    World { client: Client::new(config), now: Instant::from_millis(1000), local, vip }
}

fn syn_options(tsval: u32) -> Vec<u8> {
    let mut options = vec![2, 4, 5, 180, 4, 2, 8, 10];
    options.extend(tsval.to_be_bytes());
    options.extend([0, 0, 0, 0, 1, 3, 3, 7]);
    options
}

fn timestamps(value: u32, echo: u32) -> Vec<u8> {
    let mut options = vec![1, 1, 8, 10];
    options.extend(value.to_be_bytes());
    options.extend(echo.to_be_bytes());
    options
}

impl World {
    fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.vip.ip(), port)
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
    }

    fn syn(&self, iss: SeqNumber, tsval: u32) -> Packet {
        let options = syn_options(tsval);
        let bare = Segment::bare(self.local, self.vip, TcpFlags::SYN);
        Segment { seq: iss, window: 64_240, options: &options, ..bare }.emit()
    }

    /// The local TCP sends `packet`: what goes to the network, if it passes.
    fn local(&mut self, mut packet: Packet) -> Option<Packet> {
        let action = self.client.handle_local(self.now, &mut packet);
        assert!(packet.checksum_ok());
        (action == Action::Pass).then_some(packet)
    }

    /// The network delivers `packet`: what reaches the local TCP, if it passes.
    fn remote(&mut self, mut packet: Packet) -> Option<Packet> {
        let action = self.client.handle_remote(self.now, &mut packet);
        assert!(packet.checksum_ok());
        (action == Action::Pass).then_some(packet)
    }

    fn sent(&mut self) -> Vec<Transmit> {
        let mut all = Vec::new();
        while let Some(transmit) = self.client.poll_transmit(self.now) {
            assert!(transmit.packet.checksum_ok());
            all.push(transmit);
        }
        all
    }

    /// The only packet that the machine has sent of its own, towards `towards`.
    fn sent_one(&mut self, towards: Towards) -> Packet {
        let mut all = self.sent();
        assert_eq!(all.len(), 1, "{all:?}");
        let one = all.remove(0);
        assert_eq!(one.towards, towards);
        one.packet
    }

    fn events(&mut self) -> Vec<ClientEvent> {
        std::iter::from_fn(|| self.client.poll_event()).collect()
    }

    /// Opens with the first SYN; the option that left.
    fn open(&mut self) -> RedirectOption {
        let syn = self.syn(ISS, TSVAL);
        let sent = self.local(syn).expect("the SYN passes");
        option_of(&sent).expect("the SYN carries the option")
    }

    fn syn_ack(&self, from: u16, irs: SeqNumber, option: Option<RedirectOption>) -> Packet {
        let options = timestamps(5, TSVAL);
        let bare = Segment::bare(self.at(from), self.local, TcpFlags::SYN | TcpFlags::ACK);
        let mut packet = Segment { seq: irs, ack: ISS + 1, window: 65_160, options: &options, ..bare }.emit();
        if let Some(option) = option {
            packet.insert_redirect(crate::wire::DEFAULT_EXID, &option, 1500).unwrap();
        }
        packet
    }

    /// The redirecting SYN-ACK from X: C P=Y, O of `seen`.
    fn redirect(&self, port: u16, seen: Option<SocketAddr>) -> Packet {
        let option = RedirectOption {
            confirm: true,
            port: Some(port),
            observed: seen.map(observed_digest),
            ..Default::default()
        };
        self.syn_ack(X, IRS, Some(option))
    }

    fn segment(&self, from: u16, flags: TcpFlags, seq: SeqNumber, ack: SeqNumber, payload: &[u8]) -> Packet {
        let bare = Segment::bare(self.at(from), self.local, flags);
        Segment { seq, ack, window: 500, payload, ..bare }.emit()
    }

    fn local_segment(&self, flags: TcpFlags, seq: SeqNumber, payload: &[u8]) -> Packet {
        let options = timestamps(TSVAL + 1, 5);
        let bare = Segment::bare(self.local, self.vip, flags);
        Segment { seq, ack: IRS + 1, window: 500, options: &options, payload, ..bare }.emit()
    }

    fn reset_from(&self, port: u16, flags: TcpFlags, seq: SeqNumber, ack: SeqNumber) -> Packet {
        self.segment(port, flags | TcpFlags::RST, seq, ack, &[])
    }

    /// An ICMP error of a router about `packet`; `mtu` makes it packet-too-big.
    fn icmp_about(&self, packet: &Packet, mtu: Option<u16>) -> Packet {
        self.icmp_quoting(&packet.bytes()[..packet.len().min(120)], mtu)
    }

    /// The same with the quoted bytes.
    fn icmp_quoting(&self, quote: &[u8], mtu: Option<u16>) -> Packet {
        let (kind, code) = match (self.local.is_ipv4(), mtu.is_some()) {
            (true, true) => (3, 4),
            (true, false) => (3, 1),
            (false, true) => (2, 0),
            (false, false) => (1, 0),
        };
        let mut message = vec![kind, code, 0, 0, 0, 0];
        message.extend(mtu.unwrap_or(0).to_be_bytes());
        message.extend_from_slice(quote);
        let router: IpAddr =
            if self.local.is_ipv4() { "192.0.2.1" } else { "2001:db8:ffff::1" }.parse().unwrap();
        crate::wire::icmp_message(router, self.local.ip(), &message)
    }

    /// Brings the connection to the service port by reconnect; the server saw `seen`.
    fn reconnect(&mut self, seen: Option<SocketAddr>) {
        self.open();
        let redirect = self.redirect(Y, seen);
        assert!(self.remote(redirect).is_none());
        self.sent_one(Towards::Network);
        let confirmed = self.syn_ack(Y, IRS + 1000, Some(confirm()));
        assert!(self.remote(confirmed).is_some());
    }

    /// Brings the path to "direct", and the connection away.
    fn learn_direct(&mut self) {
        self.reconnect(Some(self.local));
        self.client.retain(|_, _| false);
        self.events();
        assert_eq!(self.client.path(self.vip.ip()), PathState::Direct);
    }

    /// Hands over and sends the handover ACK; what went to the network.
    fn hand_over(&mut self) -> Packet {
        self.open();
        let redirect = self.redirect(Y, Some(self.local));
        assert!(self.remote(redirect).is_some());
        let ack = self.local_segment(TcpFlags::ACK, ISS + 1, &[]);
        self.local(ack).expect("the handover ACK passes")
    }
}

fn confirm() -> RedirectOption {
    RedirectOption { confirm: true, ..Default::default() }
}

fn option_of(packet: &Packet) -> Option<RedirectOption> {
    packet.tcp().unwrap().redirect(crate::wire::DEFAULT_EXID).unwrap()
}

fn ports(packet: &Packet) -> (u16, u16) {
    packet.ports().unwrap()
}
