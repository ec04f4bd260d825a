//! The endpoint's super-packets through kernels: to the kernel's TCP and to another endpoint, over links that lose
//! packets, are narrow, or lead to a peer that wants small segments. Every byte is compared.

use std::io;
use std::net::{IpAddr, Shutdown, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::BytesMut;
use shunt_lab::{Host, Lab, LinkOptions, Via};
use shunt_stack::device::{Device, TunDevice};
use shunt_stack::endpoint::{ClientOptions, Endpoint, ServerOptions, TcpStream};
use shunt_stack::redirect::{ClientConfig, Continuation, OnRedirect, ServerConfig, ServicePorts, VipConfig};
use shunt_stack::wire::{DEFAULT_EXID, Offload, Packet};
use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const PORT: u16 = 80;
const X: u16 = 443;
const Y: u16 = 41001;
const VIPS: [&str; 2] = ["203.0.113.10", "2001:db8::10"];
const OWN: [&str; 2] = ["10.9.0.2", "fd09::2"];
const FAR: [&str; 2] = ["10.2.0.2", "fd02::2"];
/// How long one transfer may take, with what is lost sent again.
const PATIENCE: Duration = Duration::from_secs(90);

/// What a device was given to send.
#[derive(Debug, Default)]
struct Seen {
    super_packets: AtomicU64,
    /// The longest packet on a link that any packet makes.
    longest_segment: AtomicU64,
    /// The same of the last super-packet.
    last_segment: AtomicU64,
    /// `W3`: must stay 0.
    options_in_super_packets: AtomicU64,
}

struct Watched {
    device: TunDevice,
    seen: Arc<Seen>,
}

impl Device for Watched {
    async fn recv(&self, buffer: &mut BytesMut) -> io::Result<Offload> {
        self.device.recv(buffer).await
    }

    async fn send(&self, packet: &Packet) -> io::Result<()> {
        let gso = packet.offload().gso;
        let length = gso.map_or(packet.len(), |gso| packet.headers_len() + usize::from(gso.size)) as u64;
        self.seen.longest_segment.fetch_max(length, Ordering::Relaxed);
        if gso.is_some() {
            self.seen.super_packets.fetch_add(1, Ordering::Relaxed);
            self.seen.last_segment.store(length, Ordering::Relaxed);
            let option = packet.tcp().and_then(|tcp| tcp.redirect(DEFAULT_EXID).ok().flatten());
            self.seen.options_in_super_packets.fetch_add(u64::from(option.is_some()), Ordering::Relaxed);
        }
        self.device.send(packet).await
    }

    fn mtu(&self) -> usize {
        self.device.mtu()
    }

    fn name(&self) -> &str {
        self.device.name()
    }

    fn takes_super_packets(&self) -> bool {
        self.device.takes_super_packets()
    }
}

/// near (the endpoint's device) - mid - far (the peer).
struct Net {
    near: Host,
    mid: Host,
    far: Host,
    _lab: Lab,
}

impl Net {
    /// The first link has this MTU.
    fn new(mtu: u32) -> Net {
        let lab = Lab::new().expect("a lab");
        let [near, mid, far] = ["near", "mid", "far"].map(|name| lab.host(name).expect("a host"));
        lab.link(&near, "eth0", &mid, "eth0", LinkOptions { mtu }).expect("a link");
        lab.link(&mid, "eth1", &far, "eth0", LinkOptions::default()).expect("a link");
        for (host, device, addresses) in [
            (&near, "eth0", ["10.1.0.1/24", "fd01::1/64"]),
            (&mid, "eth0", ["10.1.0.2/24", "fd01::2/64"]),
            (&mid, "eth1", ["10.2.0.1/24", "fd02::1/64"]),
            (&far, "eth0", ["10.2.0.2/24", "fd02::2/64"]),
        ] {
            for address in addresses {
                host.address(device, address).expect("an address");
            }
        }
        for host in [&near, &mid, &far] {
            host.sysctl("net.ipv4.ip_forward", "1").expect("a router");
            host.sysctl("net.ipv6.conf.all.forwarding", "1").expect("a router");
        }
        for (host, destination, gateway) in [
            (&near, "10.2.0.0/24", "10.1.0.2"),
            (&near, "fd02::/64", "fd01::2"),
            (&near, "203.0.113.10/32", "10.1.0.2"),
            (&near, "2001:db8::10/128", "fd01::2"),
            (&mid, "10.9.0.0/24", "10.1.0.1"),
            (&mid, "fd09::/64", "fd01::1"),
            (&mid, "203.0.113.10/32", "10.2.0.2"),
            (&mid, "2001:db8::10/128", "fd02::2"),
            (&far, "10.9.0.0/24", "10.2.0.1"),
            (&far, "fd09::/64", "fd02::1"),
        ] {
            host.route(destination, Via::gateway(gateway)).expect("a route");
        }
        Net { near, mid, far, _lab: lab }
    }

    /// A client endpoint's task beside `test`, on the near host.
    fn with_client<T: Send>(&self, test: impl AsyncFnOnce(Endpoint, &Seen) -> T + Send) -> T {
        let run = || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let (device, seen) = watched(&self.near, &["10.9.0.1/24", "fd09::1/64"]);
                let vip = |address: &str| VipConfig {
                    address: address.parse().expect("an address"),
                    continuation: Continuation::Auto,
                    on_redirect: OnRedirect::default(),
                };
                let options = ClientOptions {
                    redirect: ClientConfig { vips: VIPS.map(vip).into(), ..ClientConfig::default() },
                    addresses: OWN.map(|own| own.parse().expect("an address")).into(),
                    ..ClientOptions::default()
                };
                let endpoint = Endpoint::client(device, options).expect("an endpoint");
                let result = test(endpoint, &seen).await;
                assert_eq!(seen.options_in_super_packets.load(Ordering::Relaxed), 0, "W3");
                result
            })
        };
        self.near.enter(run).expect("a namespace")
    }
}

fn watched(host: &Host, addresses: &[&str]) -> (Watched, Arc<Seen>) {
    let device = TunDevice::create("tun0").expect("a TUN device");
    for address in addresses {
        host.address("tun0", address).expect("an address");
    }
    let seen = Arc::new(Seen::default());
    (Watched { device, seen: Arc::clone(&seen) }, seen)
}

/// Sends back what comes over one connection to the far kernel's TCP, which asks for segments of `mss` bytes.
fn kernel_echo(net: &Net, address: SocketAddr, mss: Option<u32>) -> JoinHandle<io::Result<u64>> {
    let bind = || {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        if let Some(mss) = mss {
            socket.set_tcp_mss(mss)?;
        }
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        socket.listen(1)?;
        io::Result::Ok(socket)
    };
    let socket = net.far.enter(bind).expect("a namespace").expect("a listener");
    std::thread::spawn(move || {
        let stream: std::net::TcpStream = socket.accept()?.0.into();
        let copied = io::copy(&mut &stream, &mut &stream)?;
        stream.shutdown(Shutdown::Write)?;
        Ok(copied)
    })
}

/// Bytes that show when any is lost, repeated or moved.
fn pattern(length: usize) -> Vec<u8> {
    (0..length as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

/// Sends `data` and closes; what comes back has to be the same.
async fn exchange(stream: TcpStream, data: &[u8], what: &str) {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let mut back = Vec::new();
    let send = async {
        writer.write_all(data).await?;
        writer.shutdown().await
    };
    let both = async { tokio::join!(send, reader.read_to_end(&mut back)) };
    let (sent, received) =
        tokio::time::timeout(PATIENCE, both).await.unwrap_or_else(|_| panic!("{what}: time"));
    sent.unwrap_or_else(|error| panic!("{what}, sending: {error}"));
    received.unwrap_or_else(|error| panic!("{what}, receiving: {error}"));
    assert!(back == data, "{what}: {} of {} bytes, or others", back.len(), data.len());
}

/// There and back to the far kernel in both families, at last by segments of at most `fits` bytes; gives back the
/// longest one.
fn to_the_kernel(net: &Net, length: usize, mss: Option<u32>, fits: u64) -> u64 {
    let data = pattern(length);
    net.with_client(async |client, seen| {
        for address in FAR {
            let peer = SocketAddr::new(address.parse::<IpAddr>().expect("an address"), PORT);
            let echo = kernel_echo(net, peer, mss);
            let before = seen.super_packets.load(Ordering::Relaxed);
            let stream = client.connect(peer).await.expect("a connection");
            exchange(stream, &data, address).await;
            assert_eq!(echo.join().expect("it ends").expect("it echoes"), length as u64);
            let made = seen.super_packets.load(Ordering::Relaxed) - before;
            assert!(made > 0, "{address}: no super-packets");
            let last = seen.last_segment.load(Ordering::Relaxed);
            assert!(last <= fits, "{address}: a segment of {last} bytes");
        }
        seen.longest_segment.load(Ordering::Relaxed)
    })
}

#[test]
fn super_packets_arrive_at_the_kernels_tcp() {
    let net = Net::new(1500);
    assert_eq!(to_the_kernel(&net, 16 << 20, None, 1500), 1500);
}

#[test]
fn lost_super_packets_and_segments_are_sent_again() {
    let net = Net::new(1500);
    // Half of the links cut super-packets before they lose parts of them.
    net.near.offloads_off("eth0").expect("a device");
    let lose = "table inet loss {
        chain c {
            type filter hook prerouting priority -300
            meta l4proto tcp numgen random mod 300 == 0 drop
        }
    }";
    for host in [&net.mid, &net.far] {
        host.nft(lose).expect("nft");
    }
    to_the_kernel(&net, 2 << 20, None, 1500);
}

#[test]
fn a_peer_that_wants_small_segments_gets_them() {
    let net = Net::new(1500);
    // IPv6's headers are the longer ones.
    assert_eq!(to_the_kernel(&net, 4 << 20, Some(600), 660), 660);
}

#[test]
fn i1_a_narrow_path_is_learnt_and_kept_to() {
    let net = Net::new(1280);
    assert_eq!(to_the_kernel(&net, 4 << 20, None, 1280), 1500);
}

#[test]
fn w3_redirected_streams_send_super_packets_without_options() {
    let net = Net::new(1500);
    let data = pattern(4 << 20);
    let services = VIPS.map(|vip| ServicePorts {
        address: vip.parse().expect("an address"),
        redirect_port: X,
        service_port: Y,
    });
    let options = ServerOptions {
        redirect: ServerConfig { services: services.into(), ..ServerConfig::default() },
        ..ServerOptions::default()
    };
    let runtime = net.far.enter(tokio::runtime::Runtime::new).expect("a namespace").expect("a runtime");
    let far = net.far.clone();
    let (server, seen) = net
        .far
        .enter(|| {
            let _inside = runtime.enter();
            let (device, seen) = watched(&far, &["10.8.0.1/24", "fd08::1/64"]);
            for vip in ["203.0.113.10/32", "2001:db8::10/128"] {
                far.route(vip, Via::device("tun0")).expect("a route");
            }
            (Endpoint::server(device, options).expect("an endpoint"), seen)
        })
        .expect("a namespace");
    for vip in VIPS {
        let listener =
            server.listen(SocketAddr::new(vip.parse().expect("an address"), Y)).expect("a listener");
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut reader, mut writer) = tokio::io::split(stream);
                    let _ = tokio::io::copy(&mut reader, &mut writer).await;
                    let _ = writer.shutdown().await;
                });
            }
        });
    }
    net.with_client(async |client, near| {
        for vip in VIPS {
            // The first reconnects, the second hands over.
            for _ in 0..2 {
                let vip = SocketAddr::new(vip.parse().expect("an address"), X);
                let stream = client.connect(vip).await.expect("a connection");
                exchange(stream, &data, &vip.to_string()).await;
            }
        }
        let counters = client.client_counters().expect("a client");
        assert_eq!((counters.reconnected, counters.handovers_completed), (2, 2), "{counters:?}");
        assert!(near.super_packets.load(Ordering::Relaxed) > 0);
    });
    assert!(seen.super_packets.load(Ordering::Relaxed) > 0);
    assert_eq!(seen.options_in_super_packets.load(Ordering::Relaxed), 0, "W3");
}
