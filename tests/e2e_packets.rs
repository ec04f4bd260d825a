//! What is not TCP, between real kernels and programs: DNS, datagrams of all sizes and their fragments, ICMP, protocols
//! without ports (O12, O14-O17).

mod common;

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use common::datagrams::{Answerer, ask, ask_by, socket, with_udp};
use common::{Family, Net, OTHER, OTHER_SERVICE, Options};
use socket2::{Domain, Protocol, Socket, Type};

const PATIENCE: Duration = Duration::from_secs(10);

/// A network whose service [`OTHER`] is reached by UDP; `more` goes to the end of the balancer's file.
fn network(forward: &'static str, change: impl Fn(String) -> String) -> Net {
    let mut net = Net::new(Options { servers: 3, forward, start: false, ..Options::default() });
    let text = change(with_udp(&net.balancer_config(|_| Some("up"))));
    net.start_balancer_with(&text);
    net
}

/// dnsmasq on a redirect and a service port of each server, each with its own answer.
fn start_dnsmasq(net: &mut Net) {
    let dir = net.dir.path().to_owned();
    for server in &mut net.servers {
        for port in [OTHER, OTHER_SERVICE + server.number] {
            let strings = format!("\"{}\"", "x".repeat(250)) + &format!(",\"{}\"", "y".repeat(250)).repeat(9);
            let mut command = Command::new("dnsmasq");
            command
                .args([
                    "--keep-in-foreground",
                    "--conf-file=/dev/null",
                    "--no-resolv",
                    "--no-hosts",
                    "--pid-file=",
                ])
                .args(["--user=root", "--log-facility=-", "--edns-packet-max=4096"])
                .arg(format!("--port={port}"))
                .arg(format!("--txt-record=who.test,{}", server.name()))
                .arg(format!("--txt-record=long.test,{strings}"));
            let log = dir.join(format!("dnsmasq-{}-{port}.log", server.number));
            let mut child = server.host.spawn_logged(&mut command, log).expect("dnsmasq starts");
            child.wait_for_log("started", PATIENCE).expect("dnsmasq is ready");
            server.programs.push(child);
        }
    }
}

/// The output of dig, which takes an answer only from where it asked.
fn dig(net: &Net, family: Family, port: u16, arguments: &[&str]) -> String {
    let mut command = Command::new("dig");
    command.args(["+time=2", "+tries=6", "+bufsize=4096"]).arg(format!("@{}", family.vip()));
    command.args(["-p", &port.to_string()]).args(arguments);
    let output = net.client.run_within(&mut command, Duration::from_secs(20)).expect("dig is installed");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && !text.contains("unexpected source"), "{text}\n{}", net.logs());
    text
}

#[test]
fn o12_dns_over_udp_and_tcp_is_answered_by_every_server_from_the_vip() {
    let mut net = network("network", |text| text);
    start_dnsmasq(&mut net);
    let mut long = 0;
    for family in Family::BOTH {
        let mut met = BTreeSet::new();
        // Each question is a flow of its own: all of 40 at two servers of three happens once in four million runs.
        for _ in 0..40 {
            met.insert(dig(&net, family, OTHER, &["+short", "who.test", "TXT"]));
        }
        assert_eq!(met.len(), 3, "{met:?}");
        for number in 1..=3 {
            for transport in ["+notcp", "+tcp"] {
                let port = OTHER_SERVICE + number;
                let answer = dig(&net, family, port, &["+short", transport, "who.test", "TXT"]);
                assert_eq!(answer.trim(), format!("\"s{number}\""));
            }
            // 2.5 kB in fragments, not by TCP.
            let answer = dig(&net, family, OTHER, &["+ignore", "long.test", "TXT"]);
            let size = answer.lines().find_map(|line| line.strip_prefix(";; MSG SIZE  rcvd: "));
            let size: usize = size.and_then(|size| size.trim().parse().ok()).unwrap_or_default();
            assert!(size > 2500 && answer.contains("(UDP)") && answer.contains(&"y".repeat(250)), "{answer}");
            long += 1;
        }
    }
    let counts = net.stop_balancer_and_count();
    assert!(counts.decided("datagram") >= 2 * 40 + long && counts.decided("to_client") >= 2 * 40 + 2 * long);
    assert_eq!(counts.dropped("later_fragment"), 0);
}

/// Sizes of datagrams: small, QUIC's (RFC 9000 §14), the last that fit a packet, and those that do not.
const SIZES: [usize; 10] = [8, 512, 1200, 1252, 1452, 1472, 1473, 3000, 9000, 60_000];

#[test]
fn o12_o15_datagrams_of_all_sizes_pass_both_ways_and_flows_stay_together() {
    let mut net = network("network", |text| text);
    let answerer = Answerer::start(&net);
    let mut repeated = 0;
    for family in Family::BOTH {
        let mut met = BTreeSet::new();
        // As above, two of three servers are not all that 40 flows meet.
        for _ in 0..40 {
            let flow = socket(&net, family, OTHER);
            let first = ask_by(&flow, &net, 8, 8).server;
            for size in [1200, 3000, 60_000] {
                assert_eq!(ask_by(&flow, &net, size, size).server, first, "a flow stays together");
            }
            met.insert(first);
        }
        assert_eq!(met.len(), 3, "{met:?}");
        for number in 1..=3 {
            let flow = socket(&net, family, OTHER_SERVICE + number);
            for (question, answer) in SIZES.into_iter().flat_map(|size| [(size, 8), (8, size), (size, size)])
            {
                let answered = ask_by(&flow, &net, question, answer);
                assert_eq!(answered.server, number);
                repeated += answered.attempts - 1;
            }
        }
    }
    drop(answerer);
    let counts = net.stop_balancer_and_count();
    println!(
        "{repeated} questions repeated; {} later fragments to servers, {} packets to clients",
        counts.decided("fragment"),
        counts.decided("to_client")
    );
    // 60,000 bytes are 41 fragments; 3 servers, 2 families, 2 such questions each and 80 flows with one.
    assert!(counts.decided("fragment") >= 40 * (3 * 2 * 2 + 80));
    assert_eq!(counts.of("shunt_balancer_fragments_evicted_total"), 0);
}

#[test]
fn o12_round_robin_spreads_the_datagrams_of_one_flow_and_a_drained_server_keeps_its_port() {
    let drained = "name = \"s2\"\naddress = [\"10.3.0.12\", \"fd00:3::12\"]\nstate = \"";
    let mut net = network("network", |text| {
        let service = "protocols = [\"tcp\", \"udp\"]\n";
        assert!(text.contains(drained));
        text.replace(service, &format!("{service}udp_policy = \"round-robin\"\n"))
            .replace(&format!("{drained}up"), &format!("{drained}drain"))
    });
    let _answerer = Answerer::start(&net);
    for family in Family::BOTH {
        let flow = socket(&net, family, OTHER);
        let met: BTreeSet<u16> = (0..20).map(|_| ask_by(&flow, &net, 3000, 3000).server).collect();
        assert_eq!(met, BTreeSet::from([1, 3]), "B7: the second is drained");
        assert_eq!(ask(&net, family, OTHER_SERVICE + 2, 3000, 3000).server, 2);
    }
    net.stop_balancer_and_count();
}

#[test]
fn o12_o15_a_balancer_that_rewrites_nothing_passes_datagrams_and_fragments() {
    let mut net = network("direct", |text| text);
    // Answers have to come from the VIP, so sockets of one address.
    let mut threads = Vec::new();
    for server in &net.servers {
        for family in Family::BOTH {
            let number = server.number;
            let at = SocketAddr::new(family.vip().parse().expect("an address"), OTHER_SERVICE + number);
            let socket = server.host.enter(|| UdpSocket::bind(at)).expect("a namespace").expect("the VIP");
            socket.set_read_timeout(Some(PATIENCE)).expect("a time-out");
            threads.push(std::thread::spawn(move || {
                let mut buffer = vec![0; 65_536];
                let (length, client) = socket.recv_from(&mut buffer).expect("a question");
                socket.send_to(&buffer[..length], client).expect("an answer");
            }));
        }
    }
    for family in Family::BOTH {
        for number in 1..=3 {
            let flow = socket(&net, family, OTHER_SERVICE + number);
            flow.set_read_timeout(Some(PATIENCE)).expect("a time-out");
            let question: Vec<u8> = (0..9000u32).map(|n| n as u8).collect();
            flow.send(&question).expect("a question");
            let mut answer = vec![0; 65_536];
            let length = flow.recv(&mut answer).unwrap_or_else(|error| panic!("{error}\n{}", net.logs()));
            assert_eq!(answer[..length], question);
        }
    }
    for thread in threads {
        thread.join().expect("no panic");
    }
    net.stop_balancer_and_count();
}

/// A client that is gone says so by ICMP, which has to reach the socket that answered it and no other.
#[test]
fn o17_an_icmp_error_about_an_answer_reaches_the_socket_of_the_server_that_sent_it() {
    let mut net = network("network", |text| text);
    for (index, family) in Family::BOTH.into_iter().enumerate() {
        let client: IpAddr = match family {
            Family::V4 => [10, 1, 0, 2].into(),
            Family::V6 => "fd00:1::2".parse().expect("an address"),
        };
        // Nobody listens there.
        let gone = SocketAddr::new(client, 40_000 + index as u16);
        for server in &net.servers {
            let address: IpAddr = server.addresses()[index].parse().expect("an address");
            let open = || -> std::io::Result<UdpSocket> {
                let socket = UdpSocket::bind(SocketAddr::new(address, OTHER_SERVICE + server.number))?;
                socket.connect(gone)?;
                socket.set_read_timeout(Some(Duration::from_secs(2)))?;
                Ok(socket)
            };
            let socket = server.host.enter(open).expect("a namespace").expect("a socket");
            refused(&socket, &net);
        }
    }
    let counts = net.stop_balancer_and_count();
    assert!(counts.decided("error_owner") >= 6, "{counts:?}");
}

fn refused(socket: &UdpSocket, net: &Net) {
    let end = Instant::now() + PATIENCE;
    // Kernels limit their errors.
    while Instant::now() < end {
        let sent = socket.send(b"anybody there?");
        let result = sent.and_then(|_| socket.recv(&mut [0; 16]));
        let kind = result.expect_err("nobody answers").kind();
        if kind == ErrorKind::ConnectionRefused {
            return;
        }
        assert!(matches!(kind, ErrorKind::WouldBlock | ErrorKind::TimedOut), "{kind}");
    }
    panic!("{socket:?} is not told\n{}", net.logs());
}

/// Pings the VIP: how many of `count` requests were answered.
fn ping(net: &Net, family: Family, size: usize, count: usize) -> usize {
    let mut command = Command::new("ping");
    command.args([
        "-n",
        "-i",
        "0.2",
        "-W",
        "3",
        "-c",
        &count.to_string(),
        "-s",
        &size.to_string(),
        family.vip(),
    ]);
    let output = net.client.run_within(&mut command, Duration::from_secs(30)).expect("ping is installed");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let answered = text.matches(&format!("bytes from {}", family.vip())).count();
    assert_eq!(text.matches("DUP!").count(), 0, "answered twice: {text}");
    answered
}

#[test]
fn i4_an_echo_request_is_answered_once_by_the_balancer_itself_and_answers_are_limited() {
    let mut net =
        network("network", |text| text + "\n[icmp]\necho = \"answer\"\n\n[limits]\nanswers_per_second = 3\n");
    for server in &net.servers {
        server.host.set_up("eth0", false).expect("a device");
    }
    let answered: usize = Family::BOTH.into_iter().map(|family| ping(&net, family, 56, 3)).sum();
    assert!(answered >= 4, "{answered} of 6");
    // As many as the limit is for in 20 s.
    let mut command = Command::new("ping");
    command.args(["-n", "-q", "-l", "3", "-i", "0.002", "-c", "60", "-W", "1", Family::V4.vip()]);
    net.client.run_within(&mut command, Duration::from_secs(30)).expect("ping is installed");
    let counts = net.stop_balancer_and_count();
    let (answers, limited) = (counts.decided("answer"), counts.dropped("answer_limit"));
    println!("{answers} answered, {limited} not");
    assert!(answers + limited <= 66);
    assert!(limited > 20, "{answers} answered, {limited} not");
}

#[test]
fn i4_balanced_echo_requests_are_answered_by_servers_from_the_vip_also_in_fragments() {
    let mut net = network("network", |text| text + "\n[icmp]\necho = \"balance\"\n");
    for family in Family::BOTH {
        for size in [56, 4000] {
            assert!(ping(&net, family, size, 4) >= 3, "{family:?} {size}\n{}", net.logs());
        }
        // The balancer's own host still reaches its neighbours.
        let server = &net.servers[0].addresses()[usize::from(family == Family::V6)];
        let mut neighbours = Command::new("ip");
        neighbours.args(["neigh", "show", "to", server]);
        let output = net.balancer.run_within(&mut neighbours, PATIENCE).expect("ip is installed");
        assert!(!String::from_utf8_lossy(&output.stdout).contains("FAILED"));
    }
    let counts = net.stop_balancer_and_count();
    // Four of one packet and four of three in each family.
    assert!(counts.decided("balanced") >= 2 * 6 && counts.decided("fragment") >= 2 * 3 * 2, "{counts:?}");
}

/// RFC 3692's number for experiments stands for GRE, ESP and their like.
const EXPERIMENT: u8 = 253;

#[test]
fn o12_a_protocol_without_ports_reaches_the_server_it_is_configured_for_and_is_answered_from_the_vip() {
    let mut net = network("network", |text| {
        format!("{text}\n[[protocol]]\nnumber = {EXPERIMENT}\nto = {{ server = \"s3\" }}\n")
    });
    for family in Family::BOTH {
        let domain = if family == Family::V4 { Domain::IPV4 } else { Domain::IPV6 };
        let raw = || -> std::io::Result<Socket> {
            let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(i32::from(EXPERIMENT))))?;
            socket.set_read_timeout(Some(Duration::from_secs(2)))?;
            Ok(socket)
        };
        let server = net.servers[2].host.enter(raw).expect("a namespace").expect("a raw socket");
        let client = net.client.enter(raw).expect("a namespace").expect("a raw socket");
        let vip = SocketAddr::new(family.vip().parse().expect("an address"), 0);
        client.connect(&vip.into()).expect("a route");
        // Also in fragments, which need no first one here.
        for size in [100, 4000] {
            exchange_raw(&client, &server, family, size);
        }
    }
    let counts = net.stop_balancer_and_count();
    assert!(counts.decided("named") >= 8, "{counts:?}");
}

/// A datagram there and the same back; the client's socket takes what comes from the VIP alone.
fn exchange_raw(client: &Socket, server: &Socket, family: Family, size: usize) {
    use std::io::Read;
    let header = if family == Family::V4 { 20 } else { 0 };
    let data: Vec<u8> = (0..size).map(|n| n as u8).collect();
    let mut buffer = vec![std::mem::MaybeUninit::new(0u8); 65_536];
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        client.send(&data).expect("a datagram");
        let Ok((length, from)) = server.recv_from(&mut buffer) else { continue };
        assert_eq!(length, header + size);
        server.send_to(&data, &from).expect("an answer");
        let mut answer = vec![0; 65_536];
        if let Ok(length) = (&*client).read(&mut answer) {
            assert_eq!(&answer[header..length], data);
            return;
        }
    }
    panic!("{family:?}: {size} bytes of protocol {EXPERIMENT} get no answer");
}
