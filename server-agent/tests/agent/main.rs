//! The agent beside a real kernel, in network namespaces: what a client's shim would say is said by a script, and the
//! programs are ordinary ones. Needs root.

mod network;
mod raw;
mod tokens;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use shunt_stack::wire::{RedirectOption, TcpFlags};

use network::{Network, X, Y, vips};
use raw::{Connection, client_of};

fn opening(network: &Network, vip: IpAddr, port: u16) -> Connection<'_> {
    Connection::new(&network.wire, client_of(vip, port), SocketAddr::new(vip, X))
}

/// Reconnect and handover, both families, then data.
fn handshakes(network: &Network, first_port: u16) {
    for (port, vip) in (first_port..).step_by(2).zip(vips()) {
        let mut connection = opening(network, vip, port);
        connection.reconnect();
        assert_eq!(connection.server.port(), Y);
        connection.echo(b"reconnected");
        connection.abort();

        let mut connection = opening(network, vip, port + 1);
        connection.handover();
        assert_eq!(connection.server.port(), Y);
        connection.echo(b"handed over");
        connection.abort();
    }
}

/// A connection of the client's kernel to X, which knows nothing of redirection.
fn plain(network: &Network) {
    for vip in vips() {
        let socket = SocketAddr::new(vip, X);
        let stream = network.client.enter(|| TcpStream::connect_timeout(&socket, raw::PATIENCE)).unwrap();
        let mut stream = stream.unwrap();
        stream.set_read_timeout(Some(raw::PATIENCE)).unwrap();
        stream.write_all(b"plain").unwrap();
        let mut back = [0; 5];
        stream.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"plain");
    }
}

#[test]
fn the_process_of_an_agent() {
    network::agent_process();
}

#[test]
fn s1_s2_s4_clients_are_redirected_beside_the_kernel_also_with_syn_cookies() {
    let network = Network::new();
    network.echo_server(X);
    network.echo_server(Y);
    let agent = network.agent("");
    for (cookies, port) in [("1", 50_000), ("2", 50_100)] {
        network.server.sysctl("net.ipv4.tcp_syncookies", cookies).unwrap();
        handshakes(&network, port);
    }
    plain(&network);
    drop(agent);
    let capture = std::fs::metadata(network.folder.path().join("agent.pcapng")).unwrap();
    assert!(capture.len() > 4000, "{} bytes captured", capture.len());
}

#[test]
fn established_traffic_never_passes_the_agent() {
    let network = Network::new();
    network.echo_server(Y);
    let agent = network.agent("");
    let mut connections = Vec::new();
    for vip in vips() {
        let mut connection = opening(&network, vip, 50_000);
        connection.handover();
        connection.echo(b"first");
        connections.push(connection);
    }
    let before = agent.packets();
    assert_eq!(before, 4, "a SYN and a SYN-ACK each");
    for connection in &mut connections {
        for _ in 0..50 {
            connection.echo(&[b'x'; 1000]);
        }
    }
    assert_eq!(agent.packets(), before);
}

#[test]
fn when_everything_is_diverted_the_same_holds() {
    let network = Network::new();
    network.echo_server(X);
    network.echo_server(Y);
    let agent = network.agent("divert = \"all\"");
    handshakes(&network, 50_000);
    let before = agent.packets();
    plain(&network);
    assert!(agent.packets() > before);
    let mut connection = opening(&network, vips()[0], 50_100);
    connection.handover();
    for length in [1, 1000, 1400] {
        connection.echo(&vec![b'x'; length]);
    }
}

#[test]
fn a_firewall_that_drops_invalid_packets_does_not_mind() {
    const RULES: &str = "table inet firewall {
        chain input { type filter hook input priority filter; ct state invalid drop; }
        chain forward { type filter hook forward priority filter; ct state invalid drop; }
        chain output { type filter hook output priority filter; ct state invalid drop; }
    }";
    for extra in ["", "notrack = false"] {
        let network = Network::new();
        network.echo_server(X);
        network.echo_server(Y);
        network.server.nft(RULES).unwrap();
        let _agent = network.agent(extra);
        handshakes(&network, 50_000);
        plain(&network);
    }
}

#[test]
fn s2_a_redirect_leaves_nothing_behind_on_the_server() {
    let network = Network::new();
    network.echo_server(X);
    network.echo_server(Y);
    let _agent = network.agent("");
    for vip in vips() {
        let mut connection = opening(&network, vip, 50_000);
        connection.send_syn(Some(RedirectOption {
            redirect: true,
            confirm: true,
            ..RedirectOption::default()
        }));
        let first = connection.receive_syn_ack(X);
        assert_eq!(first.and_then(|option| option.port), Some(Y));
        // It is not repeated, and no kernel's SYN-ACK comes beside it.
        connection.silence(Duration::from_millis(1500));
    }
    assert_eq!(network.server.tcp_count(shunt_lab::TcpState::SynReceived).unwrap(), 0);
}

#[test]
fn s3_a_reconnect_of_a_half_open_handover_is_answered_from_y_at_once() {
    let network = Network::new();
    network.echo_server(Y);
    let _agent = network.agent("");
    for vip in vips() {
        let mut connection = opening(&network, vip, 50_000);
        connection.send_syn(Some(RedirectOption { redirect: true, ..RedirectOption::default() }));
        assert_eq!(connection.receive_syn_ack(X).and_then(|option| option.port), Some(Y));
        connection.server.set_port(Y);
        let started = Instant::now();
        connection.send_syn(Some(RedirectOption {
            redirect: true,
            port: Some(X),
            hops: 1,
            ..Default::default()
        }));
        // The kernel repeats its SYN-ACK, with the timestamp of the first SYN to echo.
        let packet = connection.receive(Y);
        let option = packet.tcp().unwrap().redirect(shunt_stack::wire::DEFAULT_EXID).unwrap();
        assert_eq!(option.map(|option| (option.confirm, option.port)), Some((true, None)));
        assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
        connection.abort();
    }
}

#[test]
fn s7_a_probe_of_an_established_connection_gets_the_kernels_challenge_ack() {
    let network = Network::new();
    network.echo_server(Y);
    let _agent = network.agent("");
    for vip in vips() {
        let mut connection = opening(&network, vip, 50_000);
        connection.handover();
        connection.echo(b"before");
        let packet = connection.probe(X);
        assert_eq!(packet.tcp().unwrap().flags(), TcpFlags::ACK);
        connection.echo(b"after");
    }
}

#[test]
fn s6_nothing_is_redirected_until_somebody_listens() {
    let network = Network::new();
    network.echo_server(X);
    let _agent = network.agent("");
    let reconnecting = RedirectOption { redirect: true, confirm: true, ..RedirectOption::default() };
    for vip in vips() {
        let mut connection = opening(&network, vip, 50_000);
        connection.send_syn(Some(reconnecting));
        assert_eq!(connection.receive_syn_ack(X), None);
    }
    network.echo_server(Y);
    // The agent looks every second.
    std::thread::sleep(Duration::from_millis(1500));
    handshakes(&network, 50_100);
}

#[test]
fn nothing_is_left_after_sigterm_or_after_a_kill_and_a_start() {
    let network = Network::new();
    network.echo_server(X);
    network.echo_server(Y);
    let config = network.write_config("", &[(X, Y)]);
    let before = network.server_state();
    let mut agent = network.agent_process(&config);
    let reserved = network.server.read_sysctl("net.ipv4.ip_local_reserved_ports").unwrap();
    assert_eq!(reserved, Y.to_string());
    handshakes(&network, 50_000);
    assert!(agent.terminate(raw::PATIENCE).unwrap().success(), "{}", agent.log().unwrap());
    assert_eq!(network.server_state(), before);

    let mut agent = network.agent_process(&config);
    agent.kill().unwrap();
    assert_ne!(network.server_state(), before);
    let mut agent = network.agent_process(&config);
    handshakes(&network, 50_100);
    plain(&network);
    assert!(agent.terminate(raw::PATIENCE).unwrap().success(), "{}", agent.log().unwrap());
    assert_eq!(network.server_state(), before);
}

#[test]
fn a_reload_is_taken_whole_or_refused_whole() {
    const OTHER: (u16, u16) = (8443, 41_002);
    let network = Network::new();
    network.echo_server(Y);
    network.echo_server(OTHER.1);
    let config = network.write_config("", &[(X, Y)]);
    let mut agent = network.agent_process(&config);
    let mut kept = opening(&network, vips()[0], 50_000);
    kept.handover();
    kept.echo(b"before");

    network.write_config("", &[OTHER]);
    agent.signal(Signal::SIGHUP).unwrap();
    agent.wait_for_log("was read again", raw::PATIENCE).unwrap();
    for vip in vips() {
        let other = SocketAddr::new(vip, OTHER.0);
        let mut connection = Connection::new(&network.wire, client_of(vip, 50_001), other);
        connection.reconnect();
        connection.echo(b"the new service");
        assert_eq!(connection.server.port(), OTHER.1);
    }
    kept.echo(b"after");

    network.write_config("divert = \"some\"", &[(X, Y)]);
    agent.signal(Signal::SIGHUP).unwrap();
    agent.wait_for_log("the configuration stays as it was", raw::PATIENCE).unwrap();
    let mut connection =
        Connection::new(&network.wire, client_of(vips()[0], 50_002), SocketAddr::new(vips()[0], OTHER.0));
    connection.reconnect();
    connection.echo(b"still there");
    assert!(agent.terminate(raw::PATIENCE).unwrap().success());
}

#[test]
fn an_interface_that_is_missing_is_an_error_and_changes_nothing() {
    let network = Network::new();
    let before = network.server_state();
    let path = network.write_config("", &[(X, Y)]);
    let text = std::fs::read_to_string(&path).unwrap().replace("eth0", "eth9");
    let config = shunt_server_agent::Config::from_source(&shunt_host::Source::new(path, text)).unwrap();
    let result = network.server.enter(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let state_dir = Some(network.folder.path().to_owned());
        let options = shunt_server_agent::RunOptions { state_dir, ..Default::default() };
        runtime.block_on(shunt_server_agent::run(config, options, std::future::pending()))
    });
    let error = result.unwrap().unwrap_err();
    assert!(error.to_string().contains("eth9"), "{error}");
    assert_eq!(network.server_state(), before);
}
