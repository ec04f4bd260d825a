//! The proxy in front of real programs, in network namespaces. Needs root.

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use support::scripted::Scripted;
use support::{Net, VIP4, VIP6, VIPS, X, config, exchange, net, pattern};

#[test]
fn shim_process() {
    support::shim_process();
}

const SOCKS: &str = "127.0.0.1:1080";

/// Both VIPs by SOCKS5, and the first by a forward.
fn proxy(continuation: &str, extra: &str) -> String {
    let text = config(continuation, &format!("mode = \"proxy\"\n{extra}"));
    format!(
        "{text}[proxy]\nsocks5 = \"{SOCKS}\"\nforward = [\"127.0.0.1:8080={VIP4}:{X}\"]\nports = \"50000-50099\"\n"
    )
}

fn connect(net: &Net, address: &str) -> TcpStream {
    let stream = net.client.enter(|| TcpStream::connect(address)).unwrap().unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

/// Asks the SOCKS server for a connection; the reply code is 0 if there is one.
fn socks(net: &Net, command: u8, target: SocketAddr) -> (TcpStream, u8) {
    let mut request = vec![5, 1, 0, 5, command, 0];
    match target.ip() {
        std::net::IpAddr::V4(address) => {
            request.push(1);
            request.extend(address.octets());
        }
        std::net::IpAddr::V6(address) => {
            request.push(4);
            request.extend(address.octets());
        }
    }
    request.extend(target.port().to_be_bytes());
    ask(net, &request)
}

fn ask(net: &Net, request: &[u8]) -> (TcpStream, u8) {
    let mut stream = connect(net, SOCKS);
    stream.write_all(request).unwrap();
    let mut reply = [0; 2 + 4];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(reply[..3], [5, 0, 5]);
    let rest = if reply[5] == 4 { 18 } else { 6 };
    stream.read_exact(&mut vec![0; rest]).unwrap();
    (stream, reply[3])
}

fn target(vip: &str) -> SocketAddr {
    SocketAddr::new(vip.parse().unwrap(), X)
}

#[test]
fn setting_up_and_stopping_leaves_nothing() {
    let net = net();
    let before = net.snapshot();
    let shim = net.start(&proxy("auto", ""));
    assert!(net.snapshot().contains("ip_local_reserved_ports = 50000-50099"));
    shim.stop().unwrap();
    assert_eq!(net.snapshot(), before);
}

#[test]
fn socks_and_forward_go_on_at_the_service_port() {
    for continuation in ["reconnect", "handover"] {
        let net = net();
        let server = Scripted::start(&net.server, true);
        let _shim = net.start(&proxy(continuation, ""));
        for vip in VIPS {
            let (stream, reply) = socks(&net, 1, target(vip));
            assert_eq!(reply, 0, "{vip}");
            assert_eq!(exchange(stream, 200_000), pattern(200_000));
        }
        assert_eq!(exchange(connect(&net, "127.0.0.1:8080"), 200_000), pattern(200_000));
        assert_eq!(server.count(&format!("ask-{continuation}")), 3);
        assert_eq!((server.count("plain"), server.count("stray-y")), (0, 0), "{:?}", server.seen);
    }
}

#[test]
fn c2_a_server_without_the_extension_works_plainly() {
    let net = net();
    net.plain_server();
    let _shim = net.start(&proxy("auto", ""));
    for vip in VIPS {
        let (stream, reply) = socks(&net, 1, target(vip));
        assert_eq!(reply, 0, "{vip}");
        assert_eq!(exchange(stream, 200_000), pattern(200_000));
    }
}

#[test]
fn other_destinations_and_commands_are_refused_with_their_reasons() {
    let net = net();
    net.plain_server();
    let _shim = net.start(&proxy("auto", ""));
    assert_eq!(socks(&net, 1, "10.0.0.2:443".parse().unwrap()).1, 2);
    assert_eq!(socks(&net, 2, target(VIP4)).1, 7);
    assert_eq!(socks(&net, 3, target(VIP4)).1, 7);
    // Nobody listens there.
    assert_eq!(socks(&net, 1, SocketAddr::new(VIP6.parse().unwrap(), 99)).1, 5);
    // A name: resolved here, and its address checked.
    let mut request = vec![5, 1, 0, 5, 1, 0, 3, VIP4.len() as u8];
    request.extend(VIP4.as_bytes());
    request.extend(X.to_be_bytes());
    let (stream, reply) = ask(&net, &request);
    assert_eq!(reply, 0);
    assert_eq!(exchange(stream, 1000), pattern(1000));
    let name = "name.invalid";
    let mut request = vec![5, 1, 0, 5, 1, 0, 3, name.len() as u8];
    request.extend(name.as_bytes());
    request.extend(X.to_be_bytes());
    assert_eq!(ask(&net, &request).1, 4);
}

#[test]
fn the_kernels_own_connections_to_a_vip_are_left_alone() {
    let net = net();
    net.plain_server();
    let _shim = net.start(&proxy("auto", ""));
    for vip in VIPS {
        assert_eq!(exchange(net.connect(vip, X), 100_000), pattern(100_000));
    }
}

#[test]
fn programs_beyond_the_limit_wait_for_their_turn() {
    let net = net();
    let _server = Scripted::start(&net.server, true);
    let _shim = net.start(&proxy("reconnect", "").replace("[proxy]", "[limits]\nconnections = 2\n[proxy]"));
    let mut held: Vec<TcpStream> = (0..3).map(|_| connect(&net, "127.0.0.1:8080")).collect();
    for stream in &mut held {
        stream.write_all(b"x").unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    }
    let answered = held.iter_mut().map(|stream| stream.read(&mut [0]).is_ok()).filter(|ok| *ok).count();
    assert_eq!(answered, 2);
    let mut last = held.pop().unwrap();
    drop(held);
    last.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    assert_eq!(last.read(&mut [0]).unwrap(), 1);
}
