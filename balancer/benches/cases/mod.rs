//! What is measured, for `decision` (time) and `tests/instructions.rs` (instructions): one step of each kind, over packets
//! that are in the cache, as they are when a device has just been read.

use std::fmt::Write as _;
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use bytes::BytesMut;
use shunt_balancer::{Balancer, Config, Decision, Memory, Route, SelectKey};
use shunt_host::Source;
use shunt_stack::redirect::{
    Action, Client, ClientConfig, Continuation, FlowRecord, OnRedirect, Server, ServerConfig, ServicePorts,
    VipConfig,
};
use shunt_stack::time::Instant;
use shunt_stack::wire::{DEFAULT_EXID, Offload, Packet, RedirectOption, Segment, SeqNumber, TcpFlags};

/// Servers of the service, each with a service port of its own from [`SERVICE_PORT`] on.
const SERVERS: u16 = 64;
const REDIRECT_PORT: u16 = 443;
const SERVICE_PORT: u16 = 41_000;
/// When it all happens.
pub const NOW: Instant = Instant::from_millis(1000);
const ASKS: RedirectOption = RedirectOption {
    redirect: true,
    confirm: true,
    port: None,
    hops: 0,
    observed: None,
    address: None,
    token: None,
};

/// Told of every case.
pub trait Meter {
    /// Measures `step`, each time on what `prepare` makes anew for a number; `prepare` does not count.
    fn measure<I>(&mut self, name: &str, prepare: impl FnMut(u32) -> I, step: impl FnMut(&mut I));
}

/// An IP version, and the addresses of one world by it.
#[derive(Debug, Clone, Copy)]
pub enum Version {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// A segment with 100 bytes, as Linux sends it.
fn data(from: SocketAddr, to: SocketAddr, flow: u32) -> Packet {
    let bare = Segment::bare(from, to, TcpFlags::ACK);
    Segment {
        seq: SeqNumber(flow),
        ack: SeqNumber(9),
        window: 500,
        options: &TIMESTAMPS,
        payload: &[7; 100],
        ..bare
    }
    .emit()
}

impl Version {
    fn name(self) -> &'static str {
        match self {
            Version::V4 => "IPv4",
            Version::V6 => "IPv6",
        }
    }

    fn vip(self, port: u16) -> SocketAddr {
        let address = match self {
            Version::V4 => IpAddr::from([203, 0, 113, 10]),
            Version::V6 => IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x10]),
        };
        SocketAddr::new(address, port)
    }

    /// The client of a flow: all 2^32 are different.
    pub fn client(self, flow: u32) -> SocketAddr {
        // Neighbours differ in both; 2^14 ports.
        let port = 49_152 + (flow & 0x3fff) as u16;
        let address = match self {
            Version::V4 => IpAddr::from(Ipv4Addr::from_bits(0x0a80_0000 + (flow >> 14))),
            Version::V6 => {
                IpAddr::from(Ipv6Addr::from_bits((0x2001_0db8_0001 << 80) + u128::from(flow >> 14)))
            }
        };
        SocketAddr::new(address, port)
    }

    /// A segment of 100 bytes of an established connection at a service port.
    pub fn established(self, flow: u32) -> Packet {
        self.segment(flow, SERVICE_PORT + (flow % u32::from(SERVERS)) as u16)
    }

    fn segment(self, flow: u32, port: u16) -> Packet {
        data(self.client(flow), self.vip(port), flow)
    }

    /// What the server sends back.
    fn answer(self, flow: u32) -> Packet {
        let server = (flow % u32::from(SERVERS)) as u16;
        let address = match self {
            Version::V4 => IpAddr::from([10, 0, 0, server as u8]),
            Version::V6 => IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, server]),
        };
        let from = SocketAddr::new(address, SERVICE_PORT + server);
        data(from, self.client(flow), flow)
    }

    /// A SYN as Linux sends it.
    fn plain_syn(self, flow: u32) -> Packet {
        let bare = Segment::bare(self.client(flow), self.vip(REDIRECT_PORT), TcpFlags::SYN);
        Segment { seq: SeqNumber(flow), window: 64_240, options: &SYN_OPTIONS, ..bare }.emit()
    }

    /// The same with R.
    pub fn asking_syn(self, flow: u32) -> Packet {
        let mut packet = self.plain_syn(flow);
        packet.insert_redirect(DEFAULT_EXID, &ASKS, 1500).expect("a SYN has room for R");
        packet
    }
}

const TIMESTAMPS: [u8; 12] = [1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2];
const SYN_OPTIONS: [u8; 20] = [2, 4, 5, 180, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 3, 7];

/// A balancer in `network` mode with VIPs of both families.
pub fn balancer() -> Balancer {
    let mut text = String::from(
        "role = \"balancer\"\nvips = [\"203.0.113.10\", \"2001:db8::10\"]\n\
         [[service]]\nname = \"web\"\nredirect_port = 443\n",
    );
    for n in 0..SERVERS {
        let port = SERVICE_PORT + n;
        let (low, high) = (n % 256, n / 256);
        let _ = write!(
            text,
            "[[server]]\nname = \"web-{n}\"\naddress = [\"10.0.{high}.{low}\", \"fd00::{n:x}\"]\nports = {{ web = {port} }}\n"
        );
    }
    let config =
        Config::parse(&Source::new("bench.toml", text)).expect("the benchmark's configuration is right");
    Balancer::new(&config, SelectKey([1; 16]))
}

/// Decides and rewrites.
#[inline]
pub fn route_and_forward(balancer: &Balancer, packet: &mut Packet) -> bool {
    balancer.route(packet).and_then(|route| balancer.forward(route, packet)).is_ok()
}

/// All cases.
pub fn all(meter: &mut impl Meter) {
    let balancer = balancer();
    for version in [Version::V4, Version::V6] {
        decision(meter, &balancer, version);
    }
    option(meter);
    client(meter);
    server(meter);
}

fn decision(meter: &mut impl Meter, balancer: &Balancer, version: Version) {
    let by = version.name();
    let buffer = |flow| Some(version.established(flow).into_buffer());
    meter.measure(&format!("{by}: parse"), buffer, |buffer| {
        *buffer = buffer.take().map(|buffer| parsed(buffer).into_buffer());
    });
    let established = |flow| version.established(flow);
    assert!(is_decided(balancer, &established(1), Decision::Owner));
    meter.measure(&format!("{by}: route"), established, |packet| {
        black_box(balancer.route(black_box(packet)).is_ok());
    });
    let routed = |flow| {
        let packet = established(flow);
        (balancer.route(&packet).expect("it is decided"), packet)
    };
    meter.measure(&format!("{by}: forward"), routed, |(route, packet)| {
        black_box(balancer.forward(*route, packet).is_ok());
    });
    meter.measure(&format!("{by}: route, forward"), established, |packet| {
        black_box(route_and_forward(balancer, black_box(packet)));
    });
    meter.measure(&format!("{by}: parse, route, forward"), buffer, |buffer| {
        *buffer = buffer.take().map(|buffer| {
            let mut packet = parsed(buffer);
            black_box(route_and_forward(balancer, &mut packet));
            packet.into_buffer()
        });
    });
    let mut memory = Memory::new(balancer);
    meter.measure(&format!("{by}: parse, handle (limits, fragments, counters)"), buffer, |buffer| {
        *buffer = buffer.take().map(|buffer| {
            let mut packet = parsed(buffer);
            black_box(balancer.handle(&mut memory, NOW, &mut packet).is_ok());
            packet.into_buffer()
        });
    });
    let asking = |flow| version.asking_syn(flow);
    assert!(is_decided(balancer, &asking(1), Decision::Selected));
    meter.measure(&format!("{by}: SYN with R: route, forward"), asking, |packet| {
        black_box(route_and_forward(balancer, black_box(packet)));
    });
    let plain = |flow| version.segment(flow, REDIRECT_PORT);
    assert!(is_decided(balancer, &plain(1), Decision::LegacyHash));
    let answer = |flow| version.answer(flow);
    assert!(matches!(balancer.route(&answer(1)), Ok(Route::ToClient { .. })));
    meter.measure(&format!("{by}: a server's answer: route, forward"), answer, |packet| {
        black_box(route_and_forward(balancer, black_box(packet)));
    });
    meter.measure(&format!("{by}: plain client (Maglev): route, forward"), plain, |packet| {
        black_box(route_and_forward(balancer, black_box(packet)));
    });
}

fn parsed(buffer: BytesMut) -> Packet {
    Packet::parse(black_box(buffer), Offload::default()).expect("the benchmark's packets are right")
}

fn is_decided(balancer: &Balancer, packet: &Packet, wanted: Decision) -> bool {
    let route = balancer.route(packet);
    matches!(route, Ok(Route::ToServer { decision, .. }) if decision == wanted)
        && route_and_forward(balancer, &mut packet.clone())
}

fn option(meter: &mut impl Meter) {
    let version = Version::V4;
    let plain = |flow| {
        let mut packet = version.plain_syn(flow);
        // Room for the option, as a buffer that packets are read into has.
        packet.insert_redirect(DEFAULT_EXID, &ASKS, 1500).expect("a SYN has room for R");
        assert!(packet.strip_redirect(DEFAULT_EXID));
        packet
    };
    meter.measure("option: insert R", plain, |packet| {
        black_box(packet.insert_redirect(DEFAULT_EXID, &ASKS, 1500).is_ok());
    });
    meter.measure(
        "option: strip R",
        |flow| version.asking_syn(flow),
        |packet| {
            black_box(packet.strip_redirect(DEFAULT_EXID));
        },
    );
}

/// One of a client with 10,000 redirected connections.
fn client(meter: &mut impl Meter) {
    const FLOWS: u32 = 10_000;
    let version = Version::V4;
    let vip = version.vip(REDIRECT_PORT);
    let own =
        VipConfig { address: vip.ip(), continuation: Continuation::Auto, on_redirect: OnRedirect::default() };
    let mut client = Client::new(ClientConfig { vips: vec![own], ..ClientConfig::default() });
    for flow in 0..FLOWS {
        let record = FlowRecord { local: version.client(flow), vip, service_port: SERVICE_PORT, irs: 8 };
        assert!(client.restore(record), "there is room for it");
    }
    let packet = |flow| version.segment(flow % FLOWS, REDIRECT_PORT);
    let mut one = packet(0);
    assert_eq!(client.handle_local(NOW, &mut one), Action::Pass);
    assert_eq!(one.destination_socket(), Some(version.vip(SERVICE_PORT)));
    meter.measure("client: a segment to the service port", packet, |packet| {
        let _ = black_box(client.handle_local(NOW, packet));
    });
}

/// A server's agent: the answer to a SYN with R, from the SYN alone.
fn server(meter: &mut impl Meter) {
    let version = Version::V4;
    let service = ServicePorts {
        address: version.vip(0).ip(),
        redirect_port: REDIRECT_PORT,
        service_port: SERVICE_PORT,
    };
    let mut server = Server::new(ServerConfig { services: vec![service], ..ServerConfig::default() });
    let mut answer = |syn: &mut Packet| {
        let action = server.handle_remote(NOW, syn);
        (action, server.poll_transmit(NOW))
    };
    let (action, sent) = answer(&mut version.asking_syn(1));
    let answered = sent.and_then(|sent| sent.packet.tcp()?.redirect(DEFAULT_EXID).ok().flatten()?.port);
    assert_eq!((action, answered), (Action::Drop, Some(SERVICE_PORT)));
    meter.measure(
        "server: the answer to a SYN with R",
        |flow| version.asking_syn(flow),
        |syn| {
            let _ = black_box(answer(syn));
        },
    );
}
