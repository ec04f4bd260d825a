//! What comes and goes while connections last: ten thousand of them, daemons killed and restarted, servers added, drained
//! and removed, balancers side by side, a path that shrinks; and what is left on the hosts afterwards.

mod common;

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use common::ecmp::Pair;
use common::{
    Family, Net, Options, Tally, TestFile, Transfer, WEB, WEB_SERVICE, Way, difference, host_state,
    kernel_counter,
};
use shunt_lab::{Child, Host, TcpState};

/// What may pass between two looks at a balancer's memory without a reason.
const RSS_NOISE_KIB: u64 = 2048;

fn rss_kib(child: &Child) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line VmRSS");
    line.trim().trim_end_matches(" kB").parse().expect("a number of KiB")
}

/// One request of a connection that stays open; the server's port.
fn ask(stream: &mut TcpStream) -> std::io::Result<u16> {
    stream.write_all(b"GET / HTTP/1.1\r\nHost: shunt\r\n\r\n")?;
    let (mut answer, mut buffer) = (Vec::new(), [0; 2048]);
    while !answer.ends_with(b"\n") || !answer.windows(10).any(|part| part == b"hello from") {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        answer.extend_from_slice(&buffer[..length]);
    }
    let text = String::from_utf8_lossy(&answer);
    let port = text.lines().find_map(|line| line.strip_prefix("X-Port: "));
    port.and_then(|port| port.trim().parse().ok()).ok_or_else(|| std::io::ErrorKind::InvalidData.into())
}

fn open(address: SocketAddr) -> std::io::Result<(TcpStream, u16)> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(20))?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.set_write_timeout(Some(Duration::from_secs(20)))?;
    let port = ask(&mut stream)?;
    Ok((stream, port))
}

/// Opens `count` connections from a host, four at a time, that have had an answer each, from the port told with them.
fn open_from(host: &Host, family: Family, count: usize) -> std::io::Result<Vec<(TcpStream, u16)>> {
    const THREADS: usize = 4;
    let vip: IpAddr = family.vip().parse().expect("an address");
    let address = SocketAddr::new(vip, WEB);
    let opened = host.enter(|| {
        std::thread::scope(|scope| {
            let open_some =
                || (0..count / THREADS).map(|_| open(address)).collect::<std::io::Result<Vec<_>>>();
            let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(open_some)).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("no panic"))
                .collect::<std::io::Result<Vec<_>>>()
        })
    });
    let opened = opened.expect("the host is there")?;
    Ok(opened.into_iter().flatten().collect())
}

/// The same from the client with the shim: all are redirected.
fn open_many(net: &Net, family: Family, count: usize) -> Vec<TcpStream> {
    let opened = open_from(&net.client, family, count);
    let opened = opened.unwrap_or_else(|error| panic!("{family:?}: {error}\n{}", net.logs()));
    let plain = opened.iter().filter(|(_, port)| *port <= WEB_SERVICE).count();
    assert_eq!(plain, 0, "{family:?}: connections that were not redirected\n{}", net.logs());
    opened.into_iter().map(|(stream, _)| stream).collect()
}

/// Lets this process have 20,000 files open.
fn raise_open_files() {
    let pid = std::process::id().to_string();
    let raised = Command::new("prlimit").args(["--nofile=20000", "--pid", &pid]).status();
    assert!(raised.is_ok_and(|status| status.success()), "prlimit cannot raise the limit of open files");
}

#[test]
fn ten_thousand_open_connections_cost_the_balancer_no_memory() {
    raise_open_files();
    let mut net = Net::new(Options::default());
    net.start_nginx();
    net.start_shim("auto");
    // The buffers are there from the first packets on.
    for family in Family::BOTH {
        drop(open_many(&net, family, 200));
    }
    let before = rss_kib(net.balancer_process.as_ref().expect("it runs"));
    let began = Instant::now();
    let mut open: Vec<TcpStream> =
        Family::BOTH.into_iter().flat_map(|family| open_many(&net, family, 5000)).collect();
    let seconds = began.elapsed().as_secs_f64();
    let with = rss_kib(net.balancer_process.as_ref().expect("it runs"));
    let established = net.client.tcp_count(TcpState::Established).expect("sockets can be listed");
    println!(
        "balancer's VmRSS: {before} KiB before, {with} KiB with {established} connections, opened in {seconds:.1} s"
    );
    assert!(established >= 10_000, "{established} connections are open at once");
    for stream in open.iter_mut().step_by(20) {
        let port =
            ask(stream).unwrap_or_else(|error| panic!("an open connection broke: {error}\n{}", net.logs()));
        assert!(port > WEB_SERVICE);
    }
    assert!(with < before + RSS_NOISE_KIB, "it grew from {before} to {with} KiB");
    // Not all at once: the queue of a TUN device holds 500 packets.
    while !open.is_empty() {
        open.truncate(open.len().saturating_sub(200));
        sleep(20);
    }
    let end = Instant::now() + Duration::from_secs(20);
    for server in &net.servers {
        while server.host.tcp_count(TcpState::Established).expect("sockets can be listed") > 0 {
            assert!(Instant::now() < end, "{} keeps closed connections\n{}", server.name(), net.logs());
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    net.stop_shim();
}

/// Long connections through two balancers.
struct Long {
    pair: Pair,
    /// With the server's port each.
    redirected: Vec<(TcpStream, u16)>,
    plain: Vec<(TcpStream, u16)>,
}

impl Long {
    fn open(pair: Pair, redirected: usize, plain: usize) -> Long {
        let of = |host: &Host, count: usize| {
            let both = Family::BOTH.into_iter().map(|family| open_from(host, family, count / 2));
            let all = both.collect::<std::io::Result<Vec<_>>>();
            all.unwrap_or_else(|error| panic!("{}: {error}\n{}", host.name(), pair.logs()))
                .into_iter()
                .flatten()
                .collect::<Vec<_>>()
        };
        let (redirected, plain) = (of(&pair.net.client, redirected), of(&pair.plain, plain));
        let mut long = Long { pair, redirected, plain };
        assert!(long.plain.iter().all(|(_, port)| *port == WEB), "a client without a shim is not redirected");
        long.none_breaks("opened");
        long
    }

    /// Asks all of them, those that are redirected while `meanwhile` happens; the number of plain ones that broke.
    fn ask_while(&mut self, what: &str, meanwhile: impl FnOnce(&mut Pair)) -> usize {
        let began = Instant::now();
        let (redirected, pair) = (&mut self.redirected, &mut self.pair);
        let broken = std::thread::scope(|scope| {
            let asking = scope.spawn(|| ask_each(redirected));
            meanwhile(pair);
            asking.join().expect("no panic")
        });
        let lost = ask_each(&mut self.plain).len();
        println!(
            "{what}: {} redirected connections, broken {}; {} plain ones, broken {lost}; {:.1} s",
            self.redirected.len(),
            broken.len(),
            self.plain.len(),
            began.elapsed().as_secs_f64()
        );
        assert!(
            broken.is_empty(),
            "{what}: {} redirected ones broke: {:?}\n{}",
            broken.len(),
            broken[0],
            self.pair.logs()
        );
        assert!(self.redirected.iter().all(|(_, port)| *port > WEB_SERVICE), "{what}: all are redirected");
        lost
    }

    fn none_breaks(&mut self, what: &str) {
        assert_eq!(self.ask_while(what, |_| ()), 0, "{what}: plain connections broke\n{}", self.pair.logs());
    }

    /// How many connections, of those that are asked to be redirected, meet each server now.
    fn meet(&self, count: usize) -> std::collections::BTreeMap<u16, usize> {
        let mut met = std::collections::BTreeMap::new();
        for family in Family::BOTH {
            let opened = open_from(&self.pair.net.client, family, count / 2);
            let opened = opened.unwrap_or_else(|error| panic!("{family:?}: {error}\n{}", self.pair.logs()));
            for (_, port) in opened {
                *met.entry(port.saturating_sub(WEB_SERVICE)).or_default() += 1;
            }
        }
        met
    }
}

/// Some of the plain ones move when the set of servers changes: those of one server of five, and few more (B3).
fn few_broke(what: &str, lost: usize, before: usize) {
    assert!(lost * 10 <= before * 3, "{what}: {lost} plain connections of {before} broke");
    assert!(lost > 0, "{what}: no plain connection was on a server that changed");
}

/// What is said of those that broke, which are let go of.
fn ask_each(streams: &mut Vec<(TcpStream, u16)>) -> Vec<String> {
    const THREADS: usize = 4;
    let share = streams.len().div_ceil(THREADS).max(1);
    let broken: Vec<(usize, String)> = std::thread::scope(|scope| {
        let ask_some = |(part, some): (usize, &mut [(TcpStream, u16)])| {
            let mut broken = Vec::new();
            for (number, (stream, port)) in some.iter_mut().enumerate() {
                match ask(stream) {
                    Ok(now) if now == *port => {}
                    Ok(now) => broken.push((part * share + number, format!("port {port} became {now}"))),
                    Err(error) => broken.push((part * share + number, format!("port {port}: {error}"))),
                }
            }
            broken
        };
        let threads: Vec<_> =
            streams.chunks_mut(share).enumerate().map(|part| scope.spawn(move || ask_some(part))).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("no panic")).collect()
    });
    for (number, _) in broken.iter().rev() {
        streams.swap_remove(*number);
    }
    broken.into_iter().map(|(_, said)| said).collect()
}

#[test]
fn long_connections_outlive_every_change_of_servers_and_balancers_side_by_side() {
    raise_open_files();
    let (redirected, plain) = (10_000, 1000);
    let mut pair = Pair::new(5, 4);
    pair.net.start_nginx();
    pair.net.start_shim("auto");
    let mut long = Long::open(pair, redirected, plain);
    for number in 0..2 {
        let selected = long.pair.selected(number);
        assert!(selected > redirected as u64 / 4, "balancer {number} has chosen for {selected} alone");
    }

    let [v4, v6] = long.pair.net.servers[4].addresses();
    let address = format!("address=[\"{v4}\",\"{v6}\"]");
    let add = ["server", "add", "s5", &address, "ports.web=41005", "ports.iperf=42005", "ports.other=43005"];
    let lost = long.ask_while("server added", |pair| pair.tell(&add));
    few_broke("server added", lost, plain);
    assert!(long.meet(80).contains_key(&5), "the new server is used");

    // Nobody tells the router at first.
    let config = long.pair.config(0);
    let killed = |pair: &mut Pair| {
        pair.kill(0);
        sleep(300);
        pair.spread_over(&[1]);
    };
    assert_eq!(long.ask_while("a balancer killed", killed), 0, "both hash alike");
    let restarted = |pair: &mut Pair| {
        pair.start(0, &config);
        pair.spread_over(&[0, 1]);
    };
    assert_eq!(long.ask_while("it is back", restarted), 0, "both hash alike");

    let before = long.plain.len();
    let lost = long.ask_while("server drained", |pair| pair.tell(&["drain", "s1"]));
    few_broke("server drained", lost, before);
    assert!(!long.meet(80).contains_key(&1), "a drained server gets no new connections");
    long.redirected.retain(|(_, port)| *port != WEB_SERVICE + 1);
    assert_eq!(long.ask_while("it is removed", |pair| pair.tell(&["server", "remove", "s1"])), 0);

    let config = long.pair.config(1);
    let moved = |pair: &mut Pair| {
        pair.spread_over(&[0]);
        pair.kill(1);
        sleep(300);
        pair.start(1, &config);
        pair.spread_over(&[1]);
        sleep(300);
        pair.spread_over(&[1, 0]);
    };
    assert_eq!(long.ask_while("the paths changed, the other restarted", moved), 0, "both hash alike");
    assert!(long.redirected.len() > redirected / 2, "most of them are still there");
    let met = long.meet(80);
    assert!(!met.contains_key(&0) && !met.contains_key(&1) && met.len() == 4, "{met:?}");
    long.pair.net.stop_shim();
}

/// Both families and both ways, slow enough that something can happen meanwhile: about six seconds.
fn start_slow(net: &Net, file: &TestFile) -> Vec<Transfer> {
    start_at(net, file, "5M")
}

/// The same at so many bytes a second each.
fn start_at(net: &Net, file: &TestFile, rate: &str) -> Vec<Transfer> {
    let kinds = Family::BOTH.into_iter().flat_map(|family| Way::BOTH.map(|way| (family, way)));
    kinds.map(|(family, way)| net.start_transfer(family, way, file, &["--limit-rate", rate])).collect()
}

/// Waits for all of them; every one was redirected and is whole.
fn finish_all(net: &Net, running: Vec<Transfer>, what: &str) {
    for transfer in running {
        let (family, way) = (transfer.family, transfer.way);
        let done = net.finish(transfer);
        println!(
            "{what}: {family:?} {way:?} {} MiB in {:.1} s: {}",
            done.bytes >> 20,
            done.seconds,
            done.command
        );
        assert!(done.redirected, "{what}: {done:?}\n{}", net.logs());
    }
}

fn still_run(running: &mut [Transfer], what: &str) {
    for transfer in running {
        let ended = transfer.child.try_wait().expect("curl can be asked for");
        assert!(ended.is_none(), "{what}: a transfer ended too early: {:?}", transfer.child.log());
    }
}

fn all_redirected(net: &Net, count: usize, what: &str) -> Tally {
    let mut sum = Tally::default();
    for family in Family::BOTH {
        let tally = net.connections(family, count, 4);
        assert!(
            tally.broken.is_empty() && tally.redirected == count,
            "{what} {family:?}: {tally:?}\n{}",
            net.logs()
        );
        for (server, number) in tally.servers {
            *sum.servers.entry(server).or_default() += number;
        }
    }
    sum
}

fn sleep(milliseconds: u64) {
    std::thread::sleep(Duration::from_millis(milliseconds));
}

/// A network with nginx, a shim and a file of 32 MiB.
fn with_file(shim_keys: &str) -> (Net, TestFile) {
    let mut net = Net::new(Options::default());
    net.start_nginx();
    net.start_shim_keys("auto", shim_keys);
    let file = net.make_file("file", 32);
    (net, file)
}

#[test]
fn transfers_go_on_while_the_balancer_is_killed_and_restarted() {
    let (mut net, file) = with_file("");
    let mut running = start_slow(&net, &file);
    for _ in 0..2 {
        sleep(800);
        still_run(&mut running, "before the kill");
        net.balancer_process.take().expect("it runs").kill().expect("it can be killed");
        sleep(400);
        net.start_balancer();
    }
    still_run(&mut running, "after the restart");
    finish_all(&net, running, "balancer killed twice");
    all_redirected(&net, 40, "after the restart");
    net.stop_shim();
}

#[test]
fn transfers_go_on_while_the_shim_is_killed_or_restarted() {
    // Held also after an orderly end: that is what it is for.
    let (mut net, file) = with_file("hold = \"always\"");
    let mut running = start_slow(&net, &file);
    // It writes down its connections every second.
    sleep(1300);
    net.shim.take().expect("it runs").kill().expect("it can be killed");
    sleep(400);
    net.start_shim_keys("auto", "hold = \"always\"");
    sleep(300);
    still_run(&mut running, "after the kill");
    net.stop_shim();
    sleep(400);
    net.start_shim_keys("auto", "hold = \"always\"");
    still_run(&mut running, "after the restart");
    finish_all(&net, running, "shim killed, then restarted");
    all_redirected(&net, 40, "after the restarts");
    net.stop_shim();
}

#[test]
fn transfers_go_on_while_the_agents_are_killed_and_restarted() {
    let (mut net, file) = with_file("");
    let mut running = start_slow(&net, &file);
    sleep(800);
    for server in &mut net.servers {
        server.agent.take().expect("it runs").kill().expect("it can be killed");
    }
    sleep(400);
    for number in 1..=net.options.servers {
        net.start_agent(number);
    }
    still_run(&mut running, "after the kill");
    finish_all(&net, running, "agents killed");
    // They look every second who listens.
    sleep(1200);
    all_redirected(&net, 40, "after the restart");
    net.stop_shim();
}

#[test]
fn a_server_is_drained_removed_and_added_back_under_traffic() {
    let (mut net, file) = with_file("");
    let mut running = start_at(&net, &file, "4M");
    let on_first = |net: &Net| {
        let sockets = net.servers[0].host.tcp_sockets().expect("sockets can be listed");
        let port = WEB_SERVICE + 1;
        sockets
            .iter()
            .filter(|socket| socket.state == TcpState::Established && socket.local.port() == port)
            .count()
    };
    for _ in 0..10 {
        sleep(100);
        if on_first(&net) > 0 {
            break;
        }
        running.extend(start_at(&net, &file, "4M"));
    }
    assert!(on_first(&net) > 0, "the first server has a transfer");

    let drained = |number| Some(if number == 1 { "drain" } else { "up" });
    net.reload_balancer(&net.balancer_config(drained));
    net.wait_for_balancer("configuration reloaded", 1);
    let tally = all_redirected(&net, 60, "drained");
    assert!(!tally.servers.contains_key("s1"), "the drained server got new connections: {tally:?}");
    net.reload_balancer("role = \"balancer\"\nvips = [\"203.0.113.10\"]\nvipps = 1\n");
    net.wait_for_balancer("the old one stands", 1);
    assert!(on_first(&net) > 0, "the drained server keeps its transfers\n{}", net.logs());
    finish_all(&net, running, "drained");

    net.reload_balancer(&net.balancer_config(|number| (number != 1).then_some("up")));
    net.wait_for_balancer("configuration reloaded", 2);
    let tally = all_redirected(&net, 60, "removed");
    assert!(!tally.servers.contains_key("s1"), "the removed server got new connections: {tally:?}");
    let mut running = start_at(&net, &file, "4M");
    sleep(500);

    net.reload_balancer(&net.balancer_config(|_| Some("up")));
    net.wait_for_balancer("configuration reloaded", 3);
    still_run(&mut running, "added back");
    let tally = all_redirected(&net, 60, "added back");
    assert!(
        tally.servers.get("s1").is_some_and(|count| *count > 5),
        "the server added back is used: {tally:?}"
    );
    finish_all(&net, running, "removed and added back");
    net.stop_shim();
}

#[test]
fn a_small_mtu_in_the_middle_stops_nothing() {
    let mut net = Net::new(Options { servers: 2, core_mtu: 1280, ..Options::default() });
    net.start_nginx();
    let counters = |net: &Net, name: &str| {
        let servers = net.servers.iter().map(|server| kernel_counter(&server.host, name)).sum::<u64>();
        (kernel_counter(&net.client, name), servers)
    };
    for continuation in ["auto", "reconnect", "handover"] {
        net.start_shim(continuation);
        let file = net.make_file(continuation, 16);
        for family in Family::BOTH {
            let name = match family {
                Family::V4 => "IcmpInDestUnreachs",
                Family::V6 => "Icmp6InPktTooBigs",
            };
            for way in Way::BOTH {
                // What was learnt about the path before would hide that it is learnt.
                net.forget_paths();
                let before = counters(&net, name);
                let done = net.transfer(family, way, &file);
                let after = counters(&net, name);
                println!(
                    "MTU 1280, {continuation} {family:?} {way:?}: {:.0} Mbit/s, {name}: client +{}, servers +{}: {}",
                    done.megabits(),
                    after.0 - before.0,
                    after.1 - before.1,
                    done.command
                );
                let told = if way == Way::Up { after.0 > before.0 } else { after.1 > before.1 };
                assert!(told, "the sender's kernel learnt no path MTU\n{}", net.logs());
                assert!(done.redirected, "{done:?}\n{}", net.logs());
                assert!(done.seconds < 30.0, "{done:?}\n{}", net.logs());
            }
        }
        net.stop_shim();
    }
}

type State = Vec<(String, String)>;

fn states(net: &Net) -> State {
    let hosts = [&net.client, &net.balancer].into_iter().chain(net.servers.iter().map(|server| &server.host));
    hosts.map(|host| (host.name().to_owned(), host_state(host))).collect()
}

fn assert_same(before: &State, after: &State, what: &str) {
    let changed = before.iter().zip(after).filter(|(before, after)| before != after);
    let left: Vec<String> = changed
        .map(|((name, before), (_, after))| format!("{name}:\n{}", difference(before, after)))
        .collect();
    let text = left.concat();
    assert!(text.is_empty(), "{what}: something is left on\n{text}");
}

fn start_all(net: &mut Net) {
    net.start_balancer();
    for number in 1..=net.options.servers {
        net.start_agent(number);
    }
    net.start_shim("auto");
}

fn all_daemons(net: &mut Net) -> Vec<Child> {
    let agents = net.servers.iter_mut().filter_map(|server| server.agent.take());
    net.shim.take().into_iter().chain(net.balancer_process.take()).chain(agents).collect()
}

fn stop_all(net: &mut Net) {
    for mut daemon in all_daemons(net) {
        let status = daemon.terminate(Duration::from_secs(10)).expect("it ends");
        assert!(status.success(), "{status}: {}", daemon.log().unwrap_or_default());
    }
}

#[test]
fn nothing_is_left_on_any_host() {
    let mut net = Net::new(Options { servers: 2, start: false, ..Options::default() });
    net.start_nginx();
    let before = states(&net);
    start_all(&mut net);
    sleep(1200);
    all_redirected(&net, 20, "first start");
    let during = states(&net);
    assert!(
        before.iter().zip(&during).all(|(before, during)| before != during),
        "each daemon changed its host"
    );
    stop_all(&mut net);
    assert_same(&before, &states(&net), "after SIGTERM");

    start_all(&mut net);
    for mut daemon in all_daemons(&mut net) {
        daemon.kill().expect("it can be killed");
    }
    start_all(&mut net);
    sleep(1200);
    all_redirected(&net, 20, "after kill -9");
    stop_all(&mut net);
    assert_same(&before, &states(&net), "after kill -9, a start and SIGTERM");

    // Where the next start comes under another configuration, it cleans up all the same.
    start_all(&mut net);
    for mut daemon in all_daemons(&mut net) {
        daemon.kill().expect("it can be killed");
    }
    net.options.policy = "source";
    net.servers.truncate(1);
    net.options.servers = 1;
    start_all(&mut net);
    stop_all(&mut net);
    let mine: State = before.into_iter().filter(|(name, _)| name != "s2").collect();
    assert_same(&mine, &states(&net), "after kill -9, a start with less to do and SIGTERM");
}
