//! Live connections of kernels are asked to go on at another server (PROTOCOL.md §4): agents beside kernel TCP, programs
//! behind a proxy on Shunt's own TCP, the balancer between.

mod common;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::ctl::{Said, ctl};
use common::service::{self, Service};
use common::{Family, Net, OTHER, OTHER_SERVICE, Options, VIP4, VIP6};
use serde_json::json;
use shunt_lab::Via;

/// How long anything may take that has to happen.
const PATIENCE: Duration = Duration::from_secs(40);
/// How long clients are asked where some will not follow, and where all have to, however busy the machine is.
const ASKED: Duration = Duration::from_secs(3);
const PATIENTLY: Duration = Duration::from_secs(30);

/// Bytes of a large answer.
const LARGE: usize = 64 << 20;

/// Bytes that show when any is lost, repeated or moved.
fn pattern(length: usize) -> Vec<u8> {
    (0..length as u64).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

/// Two servers and the service; `timers` are further keys of the agents.
fn served(forward: &'static str, timers: &str) -> (Net, Service) {
    served_with(forward, "[limits]\nmoves = 5", ASKED, timers)
}

/// The same with `keys` in front of the agents' `[timers]`.
fn served_with(forward: &'static str, keys: &str, asked: Duration, timers: &str) -> (Net, Service) {
    let mut net = Net::new(Options { servers: 2, forward, start: false, ..Options::default() });
    let mut text = net.balancer_config(|_| Some("up"));
    for server in &net.servers {
        let name = format!("name = \"{}\"\n", server.name());
        text = text.replace(&name, &format!("{name}agent = \"{}:9000\"\n", server.addresses()[0]));
    }
    net.start_balancer_with(&text);
    for number in 1..=2u16 {
        let [v4, v6] = net.servers[usize::from(number) - 1].addresses();
        let extra = format!(
            "{keys}\n[timers]\nmove_s = {}\n{timers}\n[status]\nlisten = \"{v4}:9000\"",
            asked.as_secs()
        );
        let mut text = net.agent_config(number, &extra);
        if forward == "direct" {
            // Its own addresses serve, too.
            text = text.replacen("addresses = [", &format!("addresses = [\"{v4}\", \"{v6}\", "), 1);
        }
        let path = net.file(&format!("agent{number}.toml"));
        std::fs::write(&path, text).expect("a file can be written");
        let agent = net.daemon(&net.servers[usize::from(number) - 1].host, "server", &path, &[]);
        net.servers[usize::from(number) - 1].agent = Some(agent);
    }
    let service = Service::start(&net, lines);
    (net, service)
}

/// Programs connect through a proxy whose streams may be cut at `boundary`; `keys` are further ones of its file.
fn start_proxy(net: &mut Net, boundary: &str, keys: &str) {
    let config = net.file("client.toml");
    let text = net.client_config("auto").replacen("\n\n", "\nmode = \"proxy\"\n\n", 1);
    std::fs::write(&config, format!("{text}\n[proxy]\n{keys}\n")).expect("a file can be written");
    let forwards = [format!("127.0.0.1:{OTHER}={VIP4}:{OTHER}"), format!("[::1]:{OTHER}=[{VIP6}]:{OTHER}")];
    let extra = ["--forward", &forwards[0], "--forward", &forwards[1], "--boundary", boundary];
    net.shim = Some(net.daemon(&net.client, "client", &config, &extra));
}

fn proxied(boundary: &str, asked: Duration) -> (Net, Service) {
    let (mut net, service) = served_with("network", "[limits]\nmoves = 5", asked, "");
    start_proxy(&mut net, boundary, "");
    (net, service)
}

/// Sends each line back with the server's number in front, and to a line `LARGE` as many bytes.
fn lines(stream: TcpStream, number: u16) -> std::io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut writer = stream.try_clone()?;
    for line in BufReader::new(stream).lines() {
        let line = line?;
        if line == LARGE.to_string() {
            writer.write_all(&pattern(LARGE))?;
        } else {
            writer.write_all(format!("{number} {line}\n").as_bytes())?;
        }
    }
    Ok(())
}

/// A program's connection that counts its lines.
struct Talk {
    writer: TcpStream,
    reader: BufReader<TcpStream>,
    said: usize,
}

impl Talk {
    /// Through the proxy; call it inside the client's host.
    fn new(family: Family) -> Talk {
        let host = if family == Family::V4 { "127.0.0.1" } else { "::1" };
        let writer = TcpStream::connect((host, OTHER)).expect("the proxy listens");
        service::prepare(&writer).expect("it can be told");
        Self::over(writer)
    }

    fn over(writer: TcpStream) -> Talk {
        writer.set_read_timeout(Some(PATIENCE)).expect("it can be told");
        Talk { reader: BufReader::new(writer.try_clone().expect("a handle")), writer, said: 0 }
    }

    /// Says `count` lines at once; each has to come back once, in order. Who answered them, from the first to the last.
    fn say(&mut self, count: usize) -> Vec<u16> {
        let line = |number: usize| format!("line {number} {}", "x".repeat(number % 150));
        let text: String = (self.said..self.said + count).map(|number| line(number) + "\n").collect();
        self.writer.write_all(text.as_bytes()).expect("it is taken");
        let mut servers = Vec::new();
        for number in self.said..self.said + count {
            let mut answer = String::new();
            self.reader.read_line(&mut answer).expect("an answer");
            let (server, rest) =
                answer.trim_end_matches('\n').split_once(' ').unwrap_or_else(|| panic!("{answer:?}"));
            assert_eq!(rest, line(number), "lines are lost, repeated or exchanged");
            servers.push(server.parse().expect("a number"));
        }
        self.said += count;
        servers
    }

    fn server(&mut self) -> u16 {
        self.say(1)[0]
    }
}

/// `count` connections through the proxy that server `number` has, of each family; others are closed.
fn at_server(net: &Net, number: u16, count: usize) -> Vec<Talk> {
    opened(net, number, count, Talk::new)
}

fn opened(net: &Net, number: u16, count: usize, new: impl Fn(Family) -> Talk + Sync) -> Vec<Talk> {
    let open = || {
        let mut found = Vec::new();
        for family in Family::BOTH {
            while found.len() < count * (1 + usize::from(family == Family::V6)) {
                let mut talk = new(family);
                if talk.server() == number {
                    found.push(talk);
                }
            }
        }
        found
    };
    net.client.enter(open).expect("the namespace is there")
}

/// Connections of the service on a server's service port, as its agent counts them.
fn count(net: &Net, number: u16) -> u64 {
    let counted = ctl(&net.servers[usize::from(number) - 1].host, &["connections", "--json"]).json();
    let services = counted["services"].as_array().expect("a list");
    let other = services.iter().find(|service| service["name"] == "other").expect("the service");
    other["connections"].as_u64().expect("a number")
}

fn wait_for(what: &str, net: &Net, mut there: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !there() {
        assert!(Instant::now() < end, "{what} does not come\n{}", net.logs());
        thread::sleep(Duration::from_millis(50));
    }
}

/// Asks server 1's connections to go on at server 2.
fn move_all(net: &Net, more: &[&str]) -> Said {
    let to = (OTHER_SERVICE + 2).to_string();
    let command = [&["move", "--service", "other", "--to", &to, "--json"], more].concat();
    ctl(&net.servers[0].host, &command)
}

/// A counter of server 1's agent.
fn counted(net: &Net, counter: &str) -> u64 {
    let counters = ctl(&net.servers[0].host, &["counters", "--json"]).json();
    counters[counter].as_u64().expect("a number")
}

/// Elements of the set of diverted connections, of all agents.
fn diverted(net: &Net) -> usize {
    let sets = net.servers.iter().map(|server| {
        let output =
            server.host.enter(|| std::process::Command::new("nft").args(["-j", "list", "ruleset"]).output());
        let output = output.expect("the namespace is there").expect("nft is installed");
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        text.matches("\"concat\"").count()
    });
    sets.sum()
}

#[test]
fn o7_o11_busy_and_idle_connections_of_a_kernel_move_to_another_without_loss() {
    let (net, _service) = proxied("line", PATIENTLY);
    let (mut idle, busy) = (at_server(&net, 1, 4), at_server(&net, 1, 4));
    // Connections that nobody moves do not pass the agents.
    let before = counted(&net, "packets");
    for talk in &mut idle {
        for _ in 0..50 {
            assert_eq!(talk.server(), 1);
        }
    }
    assert!(counted(&net, "packets") < before + 10, "established connections pass the agent");

    let drained = ctl(&net.balancer, &["drain", "s1"]);
    assert_eq!(drained.code, 0, "{drained:?}");
    let stop = AtomicBool::new(false);
    let (said, busy) = thread::scope(|scope| {
        let talking: Vec<_> = busy
            .into_iter()
            .map(|mut talk| {
                let stop = &stop;
                scope.spawn(move || {
                    let mut servers = Vec::new();
                    let mut burst = 1;
                    while !stop.load(Ordering::SeqCst) {
                        servers.extend(talk.say(burst));
                        burst = burst % 40 + 1;
                    }
                    (talk, servers)
                })
            })
            .collect();
        thread::sleep(Duration::from_millis(300));
        let said = move_all(&net, &[]);
        thread::sleep(Duration::from_millis(300));
        stop.store(true, Ordering::SeqCst);
        let busy: Vec<(Talk, Vec<u16>)> = talking
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect();
        (said, busy)
    });
    assert_eq!(said.code, 0, "{said:?}\n{}", net.logs());
    let done = &said.outcome()["done"];
    assert_eq!((&done["moved"], &done["closed"]), (&json!(16), &json!(0)), "{said:?}");
    for (_, servers) in &busy {
        assert!(servers.is_sorted() && servers[0] == 1 && servers.last() == Some(&2), "{servers:?}");
    }
    for talk in &mut idle {
        assert_eq!(talk.server(), 2);
    }
    assert!((8..16).contains(&counted(&net, "probes")), "idle ones are made to speak, others need not be");
    let waited = ctl(&net.balancer, &["drain", "s1", "--wait", "--timeout", "20"]);
    assert!(waited.code == 0 && waited.out.contains("safe to remove"), "{waited:?}\n{}", net.logs());
    assert_eq!((count(&net, 1), count(&net, 2), diverted(&net)), (0, 16, 0));
    // There is nothing left to move.
    let said = move_all(&net, &[]);
    assert_eq!((said.code, &said.outcome()["done"]["moved"]), (0, &json!(0)), "{said:?}");
}

#[test]
fn hundreds_of_idle_connections_move_in_seconds() {
    let (mut net, _service) = served_with("network", "", PATIENTLY, "");
    start_proxy(&mut net, "line", "");
    let mut talks = at_server(&net, 1, 150);
    let start = Instant::now();
    let said = move_all(&net, &[]);
    let took = start.elapsed();
    assert_eq!((said.code, &said.outcome()["done"]["moved"]), (0, &json!(300)), "{said:?}\n{}", net.logs());
    println!("300 idle connections, 256 at a time: {took:?}");
    assert!(took < PATIENTLY, "{took:?}");
    assert!(talks.iter_mut().all(|talk| talk.server() == 2));
    assert_eq!((count(&net, 1), diverted(&net)), (0, 0));
}

#[test]
fn o7_at_the_redirect_port_the_balancer_chooses_another() {
    let (net, _service) = proxied("line", PATIENTLY);
    let mut talks = at_server(&net, 1, 3);
    let drained = ctl(&net.balancer, &["drain", "s1"]);
    assert_eq!(drained.code, 0, "{drained:?}");
    let said = ctl(&net.servers[0].host, &["move", "--service", "other"]);
    assert!(said.code == 0 && said.out.contains("other: 6 moved"), "{said:?}\n{}", net.logs());
    assert!(talks.iter_mut().all(|talk| talk.server() == 2));
    assert_eq!((count(&net, 1), count(&net, 2)), (0, 6));
}

#[test]
fn connections_move_where_the_agent_sees_all_of_them_anyway() {
    let (mut net, _service) = served_with("network", "divert = \"all\"", PATIENTLY, "");
    start_proxy(&mut net, "line", "");
    let mut talks = at_server(&net, 1, 3);
    let said = move_all(&net, &[]);
    assert_eq!((said.code, &said.outcome()["done"]["moved"]), (0, &json!(6)), "{said:?}\n{}", net.logs());
    assert!(talks.iter_mut().all(|talk| talk.server() == 2));
}

/// The old server's segments are as large as the path allows, and leave as super-packets: R goes on others.
#[test]
fn w3_a_large_answer_arrives_whole_before_what_the_new_server_says() {
    let (net, _service) = proxied("line", PATIENTLY);
    for family in 0..2 {
        let mut talk = at_server(&net, 1, 1).swap_remove(family);
        talk.writer.write_all(format!("{LARGE}\n").as_bytes()).expect("it is taken");
        let mut received = vec![0; LARGE];
        let (begin, end) = received.split_at_mut(LARGE / 8);
        talk.reader.read_exact(begin).expect("the answer");
        thread::scope(|scope| {
            let moving = scope.spawn(|| move_all(&net, &[]));
            talk.reader.read_exact(end).expect("the answer");
            let said = moving.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            assert_eq!(
                (said.code, &said.outcome()["done"]["moved"]),
                (0, &json!(1)),
                "{said:?}\n{}",
                net.logs()
            );
        });
        assert!(received == pattern(LARGE), "the answer differs");
        assert_eq!(talk.server(), 2);
    }
}

/// Moves by an idle boundary, and what a command can choose.
#[test]
fn m8_a_proxy_follows_when_nothing_was_said_for_a_while() {
    let (net, _service) = proxied("idle:50ms", ASKED);
    let mut talks = at_server(&net, 1, 3);
    // One client's connections only; and no more than the limit.
    let said = move_all(&net, &["--client", "10.1.0.99"]);
    assert_eq!((said.code, &said.outcome()["done"]["moved"]), (0, &json!(0)), "{said:?}");
    let said = move_all(&net, &["--client", "fd00:1::2", "--limit", "2"]);
    let done = &said.outcome()["done"];
    assert_eq!(
        (said.code, &done["moved"], &done["left"]),
        (0, &json!(2), &json!(1)),
        "{said:?}\n{}",
        net.logs()
    );
    assert_eq!((count(&net, 1), count(&net, 2)), (4, 2));
    assert!(talks[..3].iter_mut().all(|talk| talk.server() == 1), "IPv4 has not moved");
    assert_eq!(talks[3..].iter_mut().filter_map(|talk| (talk.server() == 2).then_some(())).count(), 2);

    // A connection that is never silent stays; the others go.
    let stop = AtomicBool::new(false);
    let said = thread::scope(|scope| {
        let (chatty, quiet) = talks.split_at_mut(1);
        let talking = scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                assert_eq!(chatty[0].server(), 1);
                thread::sleep(Duration::from_millis(5));
            }
        });
        let said = move_all(&net, &[]);
        stop.store(true, Ordering::SeqCst);
        talking.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        for talk in quiet {
            assert_eq!(talk.server(), 2);
        }
        said
    });
    let done = &said.outcome()["done"];
    assert_eq!(
        (said.code, &done["moved"], &done["timed_out"]),
        (1, &json!(3), &json!(1)),
        "{said:?}\n{}",
        net.logs()
    );
    assert_eq!((count(&net, 1), diverted(&net)), (1, 0));
}

#[test]
fn m8_without_a_boundary_connections_stay_and_the_command_says_so() {
    let (net, _service) = proxied("none", ASKED);
    let mut talks = at_server(&net, 1, 1);
    let start = Instant::now();
    let to = (OTHER_SERVICE + 2).to_string();
    let said = ctl(&net.servers[0].host, &["move", "--service", "other", "--to", &to]);
    assert!(start.elapsed() >= ASKED, "{said:?}");
    assert!(said.code == 1 && said.out.contains("0 moved, 2 not followed by their clients"), "{said:?}");
    assert!(said.error.contains("2 being asked"), "{said:?}");
    for talk in &mut talks {
        assert_eq!(talk.server(), 1);
    }
    assert_eq!((count(&net, 1), diverted(&net)), (2, 0));
}

#[test]
fn o8_a_client_that_does_not_follow_is_served_on_or_reset_as_configured() {
    let (mut net, _service) = served("network", &format!("move_reset_s = {}", ASKED.as_secs() + 1));
    start_proxy(&mut net, "none", "");
    let mut talks = at_server(&net, 1, 1);
    let start = Instant::now();
    let said = move_all(&net, &["--client", "10.1.0.2"]);
    assert!(start.elapsed() > ASKED, "{said:?}");
    let done = &said.outcome()["done"];
    assert_eq!(
        (said.code, &done["reset"], &done["timed_out"]),
        (0, &json!(1), &json!(0)),
        "{said:?}\n{}",
        net.logs()
    );
    let broken = talks[0].reader.read_line(&mut String::new());
    assert!(broken.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset));
    assert_eq!(talks[1].server(), 1);
    assert_eq!((count(&net, 1), diverted(&net)), (1, 0));
}

#[test]
fn a_drained_service_sends_new_clients_elsewhere_and_asks_those_it_has_to_follow() {
    let (net, _service) = proxied("line", PATIENTLY);
    let mut talks = at_server(&net, 1, 2);
    let to = (OTHER_SERVICE + 2).to_string();
    let said = ctl(&net.servers[0].host, &["drain", "--service", "other", "--to", &to]);
    assert!(said.code == 0 && said.out.contains("other: 4 moved"), "{said:?}\n{}", net.logs());
    assert!(talks.iter_mut().all(|talk| talk.server() == 2));
    // The balancer still selects both.
    let newcomers = |net: &Net| -> Vec<u16> {
        let all = || (0..20).map(|n| Talk::new(Family::BOTH[n % 2]).server()).collect();
        net.client.enter(all).expect("the namespace is there")
    };
    assert!(newcomers(&net).iter().all(|server| *server == 2), "{}", net.logs());
    let shown = ctl(&net.servers[0].host, &["show", "--json"]).json();
    assert_eq!(shown["services"][2]["drained_to"], OTHER_SERVICE + 2, "{shown}");
    // A reload keeps it so.
    net.servers[0].agent.as_ref().expect("it runs").signal(shunt_lab::Signal::SIGHUP).expect("a signal");
    wait_for("the reload", &net, || net.logs().contains("the configuration was read again"));
    assert!(newcomers(&net).iter().all(|server| *server == 2), "{}", net.logs());
    assert_eq!(ctl(&net.servers[0].host, &["enable", "--service", "other"]).code, 0);
    assert!(newcomers(&net).contains(&1), "{}", net.logs());
}

#[test]
fn j6_o24_connections_move_to_a_servers_own_address_past_the_balancer() {
    let (mut net, _service) = served("direct", "");
    net.middle.route("10.3.0.0/24", Via::gateway("10.2.0.2")).expect("a route");
    net.middle.route("fd00:3::/64", Via::gateway("fd00:2::2")).expect("a route");
    start_proxy(&mut net, "line", "accept_prefixes = [\"10.3.0.12\", \"fd00:3::/64\"]");
    let mut talks = at_server(&net, 1, 2);
    let ask_for = |address: &str, number: u16| {
        let to = format!("{address}:{}", OTHER_SERVICE + number);
        let said = ctl(&net.servers[0].host, &["move", "--service", "other", "--to", &to, "--json"]);
        (said.code, said.outcome()["done"].clone())
    };
    let ask = |address: &str| ask_for(address, 2);
    // Not accepted.
    let (code, done) = ask("10.3.0.99");
    assert_eq!((code, &done["moved"], &done["timed_out"]), (1, &json!(0), &json!(2)), "{done}");
    let counters = || ctl(&net.balancer, &["counters", "--json"]).json()["decisions"].clone();
    let before = counters();
    assert!(talks.iter_mut().all(|talk| talk.server() == 1));
    assert_ne!(counters(), before);

    // The address of the server that was selected.
    let (code, done) = ask_for("[fd00:3::11]", 1);
    assert_eq!((code, &done["moved"]), (0, &json!(2)), "{done}\n{}", net.logs());
    wait_for("the end of the old connections", &net, || count(&net, 1) == 4);
    let before = counters();
    assert!(talks[2..].iter_mut().all(|talk| talk.say(50).iter().all(|server| *server == 1)));
    assert_eq!(counters(), before, "the balancer sees more of them");

    for address in ["10.3.0.12", "[fd00:3::12]"] {
        let (code, done) = ask(address);
        assert_eq!((code, &done["moved"]), (0, &json!(2)), "{done}\n{}", net.logs());
    }
    assert!(talks.iter_mut().all(|talk| talk.server() == 2));
    wait_for("the end of the old connections", &net, || count(&net, 1) == 0);
    let before = counters();
    for talk in &mut talks {
        assert!(talk.say(200).iter().all(|server| *server == 2));
    }
    assert_eq!(counters(), before, "the balancer sees more of them");
    let locals: Vec<_> =
        net.server_sockets().into_iter().map(|(_, socket)| socket.local.ip().to_canonical()).collect();
    let own = |address: &str| locals.iter().filter(|local| local.to_string() == address).count();
    assert_eq!((own("10.3.0.12"), own("fd00:3::12")), (2, 2), "{locals:?}");
}

/// A shim beside the kernel has no byte stream: what it has stays, and what comes later is answered elsewhere.
#[test]
fn m5_beside_a_clients_kernel_only_later_connects_go_elsewhere() {
    let (mut net, _service) = served("network", "");
    net.start_shim("auto");
    let direct = |family| Talk::over(service::connect(family).expect("it connects"));
    let mut talks = opened(&net, 1, 1, direct);
    let said = thread::scope(|scope| {
        let to = (OTHER_SERVICE + 2).to_string();
        let host = &net.servers[0].host;
        let draining =
            scope.spawn(move || ctl(host, &["drain", "--service", "other", "--to", &to, "--json"]));
        while !draining.is_finished() {
            for talk in &mut talks {
                assert!(talk.say(7).iter().all(|server| *server == 1));
            }
        }
        draining.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    let done = &said.outcome()["done"];
    assert_eq!(
        (said.code, &done["moved"], &done["timed_out"]),
        (1, &json!(0), &json!(2)),
        "{said:?}\n{}",
        net.logs()
    );
    for talk in &mut talks {
        assert_eq!(talk.server(), 1);
    }
    let later = || (0..20).map(|n| direct(Family::BOTH[n % 2]).server()).collect();
    let later: Vec<u16> = net.client.enter(later).expect("the namespace is there");
    assert!(later.iter().all(|server| *server == 2), "{later:?}");
    drop(talks);
    assert_eq!(net.stop_shim_and_count().of("moves_asked"), 2, "each was told once");
}

#[test]
fn a_move_is_stopped_and_an_agent_that_ends_leaves_nothing_diverted() {
    let (mut net, _service) = proxied("none", PATIENTLY);
    let mut talks = at_server(&net, 1, 1);
    let to = (OTHER_SERVICE + 2).to_string();
    let begin = |net: &Net| {
        let mut command = common::shunt();
        command.args(["ctl", "move", "--service", "other", "--to", &to]);
        net.servers[0].host.spawn_logged(&mut command, net.file("move.log")).expect("it starts")
    };
    let end = |mut running: shunt_lab::Child| {
        let status = running.wait_timeout(PATIENCE).expect("it can be waited for").expect("it ends");
        (status.code(), running.log().expect("a log"))
    };
    let running = begin(&net);
    wait_for("the diversion", &net, || diverted(&net) > 0);
    let second = move_all(&net, &[]);
    assert!(second.code == 1 && second.error.contains("are being moved already"), "{second:?}");
    assert_eq!(ctl(&net.servers[0].host, &["move", "--service", "other", "--stop"]).code, 0);
    let (code, log) = end(running);
    assert!(code == Some(1) && log.contains("stopped: 0 connections have moved, 2"), "{log}");
    wait_for("the end of the diversion", &net, || diverted(&net) == 0);
    let nothing = ctl(&net.servers[0].host, &["move", "--service", "other", "--stop"]);
    assert!(nothing.code == 1 && nothing.error.contains("no connections of"), "{nothing:?}");

    // Nobody waits for the answer any more.
    let mut running = begin(&net);
    wait_for("the diversion", &net, || diverted(&net) > 0);
    running.kill().expect("it can be killed");
    wait_for("the end of the diversion", &net, || diverted(&net) == 0);

    // The agent ends in order, and is killed and started again.
    for kill in [false, true] {
        let running = begin(&net);
        wait_for("the diversion", &net, || diverted(&net) > 0);
        let agent = net.servers[0].agent.as_mut().expect("it runs");
        if kill {
            agent.kill().expect("it can be killed");
        } else {
            agent.terminate(PATIENCE).expect("it ends");
            assert_eq!(diverted(&net), 0);
        }
        assert_eq!(end(running).0, Some(1));
        let path = net.file("agent1.toml");
        net.servers[0].agent = None;
        net.servers[0].agent = Some(net.daemon(&net.servers[0].host, "server", &path, &[]));
        assert_eq!(diverted(&net), 0);
        for talk in &mut talks {
            assert_eq!(talk.server(), 1);
        }
    }
    for (arguments, told) in [
        (&["move", "--service", "mail", "--to", "43002"][..], "no service named \"mail\""),
        (&["move", "--service", "other", "--to", "43001"], "is where the connections"),
        (&["drain", "--service", "other", "--to", "43001"], "is where the connections"),
        (&["drain", "--service", "other", "--to", "7000"], "is the redirect port"),
        (&["enable", "--service", "mail"], "no service named"),
    ] {
        let said = ctl(&net.servers[0].host, arguments);
        assert!(said.code == 1 && said.error.contains(told), "{arguments:?}: {said:?}");
    }
    for usage in
        [&["move"][..], &["move", "--service", "other", "--to", "0"], &["drain", "--service", "other"]]
    {
        assert_eq!(ctl(&net.servers[0].host, usage).code, 2, "{usage:?}");
    }
}
