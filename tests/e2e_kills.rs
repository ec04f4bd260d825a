//! Daemons that are killed again and again, at whatever moment: the host never has more of theirs than it should, and
//! nothing after the last one has ended.

mod common;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use common::{Net, Options, difference, host_state, shunt};
use shunt_lab::{Child, Host};

const PATIENCE: Duration = Duration::from_secs(15);
/// How long a daemon takes to be ready, about: kills are spread over that time.
const START: Duration = Duration::from_millis(40);

/// Kills of each daemon.
const KILLS: u32 = 100;

/// What daemons leave on a host if they do, told quickly; numbers of devices count on, and the kernel draws link-local
/// addresses.
fn traces(host: &Host) -> String {
    let script = "ip -o link | sed 's/^[0-9]*: //'; ip rule; ip -6 rule; ip route show table all; \
                  ip -6 route show table all; nft --terse list ruleset";
    let output = host.run_within(Command::new("sh").args(["-c", script]), PATIENCE).expect("ip and nft");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // Lines that count twice are to be seen in a difference.
    let mut lines: Vec<&str> = text.lines().filter(|line| !line.contains("fe80::")).collect();
    lines.sort_unstable();
    let mut numbered = String::new();
    for (at, line) in lines.iter().enumerate() {
        let same = lines[..at].iter().rev().take_while(|before| *before == line).count();
        let _ = writeln!(numbered, "{line} #{same}");
    }
    numbered
}

/// One daemon on its host.
struct Victim {
    role: &'static str,
    host: Host,
    config: PathBuf,
    state: PathBuf,
    log: PathBuf,
}

impl Victim {
    fn start(&self) -> Child {
        let mut command = shunt();
        command.args(["-v", self.role, "-c"]).arg(&self.config).arg("--state-dir").arg(&self.state);
        self.host.spawn_logged(&mut command, &self.log).expect("it starts")
    }

    fn ready(&self, daemon: &mut Child) {
        if let Err(error) = daemon.wait_for_log("ready", PATIENCE) {
            panic!("{}: {error}\n{}", self.role, daemon.log().unwrap_or_default());
        }
    }

    /// Starts and kills it; every other time while it is starting.
    fn kill_again_and_again(&self) {
        let before = host_state(&self.host);
        let mut first = self.start();
        self.ready(&mut first);
        let running = traces(&self.host);
        first.kill().expect("it can be killed");
        for repeat in 1..KILLS {
            let mut daemon = self.start();
            if repeat % 2 == 0 {
                thread::sleep(START * repeat / KILLS);
            } else {
                self.ready(&mut daemon);
                let now = traces(&self.host);
                assert_eq!(difference(&running, &now), "", "{} after {repeat} kills", self.role);
            }
            daemon.kill().expect("it can be killed");
        }
        let mut last = self.start();
        self.ready(&mut last);
        assert_eq!(difference(&running, &traces(&self.host)), "", "{}: the last one", self.role);
        let status = last.terminate(PATIENCE).expect("it ends");
        let log = last.log().expect("a log");
        assert!(status.success(), "{}: {status}\n{log}", self.role);
        assert_eq!(difference(&before, &host_state(&self.host)), "", "{}: left behind", self.role);
        let left = files_below(&self.state);
        let expected = |path: &PathBuf| path.extension().is_some_and(|end| end == "lock");
        assert!(left.iter().all(expected), "{}: files left behind: {left:?}", self.role);
    }
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
        if entry.path().is_dir() {
            files.extend(files_below(&entry.path()));
        } else {
            files.push(entry.path());
        }
    }
    files
}

fn kill_all(net: &Net, daemons: &[(&'static str, &Host, String)]) {
    let victim = |(role, host, text): &(&'static str, &Host, String)| {
        let config = net.file(&format!("{role}.toml"));
        std::fs::write(&config, text).expect("a file can be written");
        let (state, log) = (net.file(&format!("{role}-state")), net.file(&format!("{role}.log")));
        Victim { role, host: (*host).clone(), config, state, log }
    };
    let begun = Instant::now();
    thread::scope(|scope| {
        for daemon in daemons {
            scope.spawn(|| victim(daemon).kill_again_and_again());
        }
    });
    println!("{KILLS} kills of each daemon in {:?}", begun.elapsed());
}

#[test]
fn after_any_number_of_kills_nothing_is_doubled_and_nothing_is_left() {
    let net = Net::new(Options { servers: 1, start: false, ..Options::default() });
    let balancer = ("balancer", &net.balancer, net.balancer_config(|_| Some("up")));
    let agent = ("server", &net.servers[0].host, net.agent_config(1, ""));
    kill_all(&net, &[balancer, agent, ("client", &net.client, net.client_config("auto"))]);
}

#[test]
fn after_any_number_of_kills_a_balancers_devices_tables_and_links_are_as_before() {
    let net = Net::new(Options { servers: 3, forward: "direct", start: false, ..Options::default() });
    kill_all(&net, &[("balancer", &net.balancer, net.balancer_config(|_| Some("up")))]);
}
