//! Hosts and plain links: packets get where they should, and nothing is left. Needs root.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use shunt_lab::{Error, Host, Impairment, Lab, LinkOptions, TcpState, Via};

const SECOND: Duration = Duration::from_secs(1);

/// client eth0 - eth0 router eth1 - eth0 server, both families.
fn routed(lab: &Lab) -> [Host; 3] {
    let hosts = ["client", "router", "server"].map(|name| lab.host(name).unwrap());
    let [client, router, server] = &hosts;
    lab.link(client, "eth0", router, "eth0", LinkOptions::default()).unwrap();
    lab.link(router, "eth1", server, "eth0", LinkOptions::default()).unwrap();
    for (host, device, address) in [
        (client, "eth0", "10.0.1.2/24"),
        (client, "eth0", "fd00:1::2/64"),
        (router, "eth0", "10.0.1.1/24"),
        (router, "eth0", "fd00:1::1/64"),
        (router, "eth1", "10.0.2.1/24"),
        (router, "eth1", "fd00:2::1/64"),
        (server, "eth0", "10.0.2.2/24"),
        (server, "eth0", "fd00:2::2/64"),
    ] {
        host.address(device, address).unwrap();
    }
    router.sysctl("net.ipv4.ip_forward", "1").unwrap();
    router.sysctl("net.ipv6.conf.all.forwarding", "1").unwrap();
    client.route("0.0.0.0/0", Via::gateway("10.0.1.1")).unwrap();
    client.route("::/0", Via::gateway("fd00:1::1")).unwrap();
    server.route("10.0.1.0/24", Via::gateway_on("10.0.2.1", "eth0")).unwrap();
    server.route("fd00:1::/64", Via::gateway("fd00:2::1")).unwrap();
    hosts
}

fn echo_udp(client: &Host, server: &Host, address: &str) {
    let there = server.enter(|| UdpSocket::bind(address)).unwrap().unwrap();
    let any: SocketAddr = if address.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" }.parse().unwrap();
    let here = client.enter(|| UdpSocket::bind(any)).unwrap().unwrap();
    for socket in [&here, &there] {
        socket.set_read_timeout(Some(5 * SECOND)).unwrap();
    }
    let mut bytes = [0; 9];
    here.send_to(b"ping", address).unwrap();
    let (length, from) = there.recv_from(&mut bytes).unwrap();
    there.send_to(&bytes[..length], from).unwrap();
    let (length, from) = here.recv_from(&mut bytes).unwrap();
    assert_eq!((&bytes[..length], from), (&b"ping"[..], address.parse().unwrap()));
}

fn echo_tcp(client: &Host, server: &Host, address: &str) {
    let listener = server.enter(|| TcpListener::bind(address)).unwrap().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            stream.write_all(text.to_uppercase().as_bytes()).unwrap();
        });
        let mut stream = client.enter(|| TcpStream::connect(address)).unwrap().unwrap();
        stream.write_all(b"hello").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert_eq!(text, "HELLO");
    });
}

#[test]
fn udp_and_tcp_cross_a_router_in_both_families() {
    let lab = Lab::new().unwrap();
    let [client, router, server] = routed(&lab);
    for address in ["10.0.2.2:7", "[fd00:2::2]:7"] {
        echo_udp(&client, &server, address);
        echo_tcp(&client, &server, address);
    }
    let counters = router.counters("eth1").unwrap();
    assert!(counters.tx_packets > 4 && counters.rx_bytes > 200, "{counters:?}");
    assert!(
        server.tcp_count(TcpState::TimeWait).unwrap() + client.tcp_count(TcpState::TimeWait).unwrap() >= 2
    );
    assert!(
        client.tcp_sockets().unwrap().iter().any(|socket| socket.remote == "10.0.2.2:7".parse().unwrap())
    );
}

#[test]
fn devices_can_be_bridged_taken_down_and_resized() {
    let lab = Lab::new().unwrap();
    let [a, switch, b] = ["a", "switch", "b"].map(|name| lab.host(name).unwrap());
    lab.link(&a, "eth0", &switch, "port1", LinkOptions { mtu: 9000 }).unwrap();
    lab.impaired_link(&b, "eth0", &switch, "port2", Impairment { mtu: 9000, ..Default::default() }).unwrap();
    switch.bridge("br0", &["port1", "port2"]).unwrap();
    a.address("eth0", "10.0.0.1/24").unwrap();
    b.address("eth0", "10.0.0.2/24").unwrap();
    echo_tcp(&a, &b, "10.0.0.2:7");
    a.set_mtu("eth0", 1280).unwrap();
    a.set_up("eth0", false).unwrap();
    assert!(a.enter(|| TcpStream::connect("10.0.0.2:7")).unwrap().is_err());
    assert!(a.devices().unwrap().contains(&"eth0".to_owned()));
}

#[test]
fn routes_spread_over_several_gateways_by_port() {
    let lab = Lab::new().unwrap();
    let [client, left, right] = ["client", "left", "right"].map(|name| lab.host(name).unwrap());
    for (router, device, net) in [(&left, "eth0", 1), (&right, "eth1", 2)] {
        lab.link(&client, device, router, "eth0", LinkOptions::default()).unwrap();
        client.address(device, &format!("10.0.{net}.2/24")).unwrap();
        client.address(device, &format!("fd00:{net}::2/64")).unwrap();
        router.address("eth0", &format!("10.0.{net}.1/24")).unwrap();
        router.address("eth0", &format!("fd00:{net}::1/64")).unwrap();
    }
    client.sysctl("net.ipv4.fib_multipath_hash_policy", "1").unwrap();
    client.sysctl("net.ipv6.fib_multipath_hash_policy", "1").unwrap();
    client.route("10.9.0.0/16", Via::multipath(["10.0.1.1", "10.0.2.1"])).unwrap();
    client.route("fd09::/16", Via::multipath(["fd00:1::1", "fd00:2::1"])).unwrap();
    for (from, to) in [("0.0.0.0:0", "10.9.0.1"), ("[::]:0", "fd09::1")] {
        let before = [&left, &right].map(|router| router.counters("eth0").unwrap().rx_packets);
        client
            .enter(|| {
                let socket = UdpSocket::bind(from).unwrap();
                for port in 1..=100 {
                    socket.send_to(b"x", (to, port)).unwrap();
                }
            })
            .unwrap();
        let after = [&left, &right].map(|router| router.counters("eth0").unwrap().rx_packets);
        for side in 0..2 {
            assert!(after[side] - before[side] >= 20, "{to}: {before:?} {after:?}");
        }
    }
    client.remove_route("10.9.0.0/16").unwrap();
    client.remove_route("fd09::/16").unwrap();
    assert!(client.remove_route("10.9.0.0/16").is_err());
}

#[test]
fn a_plain_tun_gets_complete_checksums_and_no_super_packets_from_a_veth() {
    let lab = Lab::new().unwrap();
    let [client, router, _] = routed(&lab);
    let mut tun = router
        .enter(|| {
            let tun = tun_rs::DeviceBuilder::new().name("tun0").build_sync().unwrap();
            tun.set_nonblocking(true).unwrap();
            tun
        })
        .unwrap();
    router.route("10.5.0.0/16", Via::device("tun0")).unwrap();
    client.enter(|| UdpSocket::bind("10.0.1.2:5").unwrap().send_to(&[7; 33], "10.5.0.1:9").unwrap()).unwrap();
    let packet = receive_udp(&mut tun);
    let mut sum = 17 + 41;
    for pair in packet[12..].chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    }
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    assert_eq!(sum, 0xffff, "the UDP checksum is complete: {packet:02x?}");
}

#[test]
fn without_offloads_a_veth_sends_no_super_packets() {
    let lab = Lab::new().unwrap();
    let [client, router, server] = routed(&lab);
    let packets_of_a_megabyte = || {
        let before = router.counters("eth0").unwrap().rx_packets;
        let listener = server.enter(|| TcpListener::bind("10.0.2.2:9")).unwrap().unwrap();
        let mut stream = client.enter(|| TcpStream::connect("10.0.2.2:9")).unwrap().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| std::io::copy(&mut listener.accept().unwrap().0, &mut std::io::sink()).unwrap());
            stream.write_all(&vec![0; 1 << 20]).unwrap();
            drop(stream);
        });
        router.counters("eth0").unwrap().rx_packets - before
    };
    assert!(packets_of_a_megabyte() < 400);
    client.offloads_off("eth0").unwrap();
    assert!(packets_of_a_megabyte() >= (1 << 20) / 1448);
}

fn receive_udp(tun: &mut tun_rs::SyncDevice) -> Vec<u8> {
    let end = Instant::now() + 5 * SECOND;
    let mut bytes = [0; 2000];
    while Instant::now() < end {
        match tun.recv(&mut bytes) {
            Ok(length) if bytes[0] == 0x45 && bytes[9] == 17 => return bytes[..length].to_vec(),
            Ok(_) => {}
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    panic!("no UDP packet arrived at the TUN");
}

#[test]
fn settings_and_rules_belong_to_one_host() {
    let lab = Lab::new().unwrap();
    let [a, b] = ["a", "b"].map(|name| lab.host(name).unwrap());
    a.sysctl("net.ipv4.ip_forward", "1").unwrap();
    assert_eq!(a.read_sysctl("net.ipv4.ip_forward").unwrap(), "1");
    assert_eq!(b.read_sysctl("net.ipv4.ip_forward").unwrap(), "0");
    a.nft("table ip filter { chain input { type filter hook input priority 0; tcp dport 7 drop; }; }")
        .unwrap();
    let rules = a.run(Command::new("nft").args(["list", "ruleset"])).unwrap();
    assert!(String::from_utf8(rules.stdout).unwrap().contains("dport 7"));
    assert!(b.run(Command::new("nft").args(["list", "ruleset"])).unwrap().stdout.is_empty());
    let error = a.nft("nonsense").unwrap_err().to_string();
    assert!(error.contains("syntax error"), "{error}");
}

#[test]
fn mistakes_are_explained() {
    let lab = Lab::new().unwrap();
    let a = lab.host("a").unwrap();
    for error in [
        lab.host("a").unwrap_err(),
        a.address("lo", "10.0.0.1").unwrap_err(),
        a.address("eth7", "10.0.0.1/8").unwrap_err(),
        a.route("0.0.0.0/0", Via::gateway("10.3.3.3")).unwrap_err(),
        a.sysctl("net.ipv4.no_such", "1").unwrap_err(),
        a.counters("eth7").unwrap_err(),
        a.bridge("br0", &["eth7"]).unwrap_err(),
        a.run(&mut Command::new("/no/such/program")).unwrap_err(),
        a.run(Command::new("sh").args(["-c", "echo because >&2; exit 3"])).unwrap_err(),
        a.run_within(Command::new("sleep").arg("9"), SECOND / 10).unwrap_err(),
        Lab::new().unwrap().link(&a, "x", &a, "y", LinkOptions::default()).unwrap_err(),
    ] {
        println!("{error}");
        assert!(error.to_string().len() > 20, "{error}");
    }
    let failed = a.run(Command::new("sh").args(["-c", "echo because >&2; exit 3"])).unwrap_err();
    assert!(
        matches!(failed, Error::Failed { status, stderr, .. } if status.code() == Some(3) && stderr == "because")
    );
    drop(lab);
    assert!(matches!(a.devices(), Err(Error::Gone { .. })));
}

#[test]
fn a_child_is_logged_ended_and_waited_for() {
    let lab = Lab::new().unwrap();
    let host = lab.host("a").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let script = "trap 'echo ended; exit 5' TERM; echo ready; while :; do sleep 0.05; done";
    let mut child =
        host.spawn_logged(Command::new("sh").args(["-c", script]), folder.path().join("log")).unwrap();
    child.wait_for_log("ready", 5 * SECOND).unwrap();
    assert!(child.wait_timeout(SECOND / 50).unwrap().is_none());
    assert_eq!(child.terminate(5 * SECOND).unwrap().code(), Some(5));
    assert!(child.log().unwrap().ends_with("ended\n"));
    let stubborn = "trap '' TERM; sleep 1000 & echo $!; wait; sleep 1000";
    let mut child = host.spawn(Command::new("sh").args(["-c", stubborn]).stdout(Stdio::piped())).unwrap();
    let mut grandchild = String::new();
    std::io::BufRead::read_line(
        &mut std::io::BufReader::new(child.process().stdout.take().unwrap()),
        &mut grandchild,
    )
    .unwrap();
    assert!(child.terminate(SECOND / 10).unwrap().code().is_none());
    assert_gone(grandchild.trim());
}

fn assert_gone(pid: &str) {
    let end = Instant::now() + 5 * SECOND;
    // A zombie that nobody has waited for yet is dead all the same.
    let lives =
        || std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z"));
    while lives() {
        assert!(Instant::now() < end, "process {pid} still lives");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The network namespaces that processes of this user are in, by inode.
fn namespaces() -> std::collections::BTreeSet<String> {
    let threads =
        |pid: std::path::PathBuf| std::fs::read_dir(pid.join("task")).into_iter().flatten().flatten();
    let processes = std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let links =
        processes.flat_map(threads).filter_map(|task| std::fs::read_link(task.path().join("ns/net")).ok());
    links.map(|link| link.to_string_lossy().into_owned()).collect()
}

#[test]
fn nothing_is_left_when_the_lab_is_dropped() {
    let lab = Lab::new().unwrap();
    let [client, router, _] = routed(&lab);
    let link = lab.impaired_link(&client, "eth9", &router, "eth9", Impairment::default()).unwrap();
    let child = client.spawn(Command::new("sleep").arg("1000")).unwrap();
    let pid = child.id().to_string();
    let own = client.enter(|| std::fs::read_link("/proc/thread-self/ns/net").unwrap()).unwrap();
    let own = own.to_string_lossy().into_owned();
    assert!(namespaces().contains(&own));
    drop(lab);
    assert_gone(&pid);
    drop(child);
    assert!(!namespaces().contains(&own), "{own}");
    assert!(link.device_dropped(shunt_lab::Direction::Forward).is_err());
    let files = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let mut open = files.filter_map(|file| std::fs::read_link(file.path()).ok());
    assert!(!open.any(|link| link.to_string_lossy() == own), "the namespace is still held open");
    let devices = std::fs::read_to_string("/proc/net/dev").unwrap();
    assert!(!devices.contains("eth9"), "{devices}");
}

#[test]
fn children_and_namespaces_die_with_a_lab_that_is_killed() {
    let mut probe = Command::new(env!("CARGO_BIN_EXE_shunt-lab-probe"))
        .arg("hold")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(probe.stdout.take().unwrap()));
    let pids: Vec<String> = lines.by_ref().map(Result::unwrap).take_while(|line| line != "ready").collect();
    assert_eq!(pids.len(), 2);
    let inside: Vec<_> =
        pids.iter().map(|pid| std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap()).collect();
    let name = format!("/proc/{}/task/{}/children", pids[0], pids[0]);
    let grandchildren = std::fs::read_to_string(name).unwrap_or_default();
    probe.kill().unwrap();
    probe.wait().unwrap();
    for pid in pids.iter().map(String::as_str).chain(grandchildren.split_whitespace()) {
        assert_gone(pid);
    }
    for namespace in inside {
        assert!(!namespaces().contains(namespace.to_string_lossy().as_ref()));
    }
}
