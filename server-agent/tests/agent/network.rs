//! client - server, with an agent on the server: in the test's process, or in one of its own that can be killed.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::JoinHandle;
use std::time::Duration;

use shunt_lab::{Child, Host, Lab, LinkOptions, Via};
use shunt_server_agent::{AgentStats, Config, RunOptions, run};
use shunt_stack::redirect::ServerCounters;
use tokio::sync::{oneshot, watch};

use crate::raw::{PATIENCE, Wire};

pub(crate) const X: u16 = 443;
pub(crate) const Y: u16 = 41001;
/// In the environment of an agent's process: its configuration, and where it keeps its state.
const CONFIG_VARIABLE: &str = "SHUNT_TEST_AGENT_CONFIG";
const STATE_VARIABLE: &str = "SHUNT_TEST_AGENT_STATE";

pub(crate) fn vips() -> [IpAddr; 2] {
    ["203.0.113.10", "2001:db8::10"].map(|vip| vip.parse().unwrap())
}

pub(crate) struct Network {
    pub(crate) client: Host,
    pub(crate) server: Host,
    pub(crate) wire: Wire,
    pub(crate) folder: tempfile::TempDir,
    // Last: the hosts live as long as it.
    _lab: Lab,
}

impl Network {
    pub(crate) fn new() -> Network {
        let _ = tracing_subscriber::fmt().with_test_writer().with_env_filter("shunt=debug").try_init();
        let lab = Lab::new().unwrap();
        let (client, server) = (lab.host("client").unwrap(), lab.host("server").unwrap());
        lab.link(&client, "eth0", &server, "eth0", LinkOptions::default()).unwrap();
        for (host, device, address) in [
            (&client, "eth0", "10.0.1.2/24"),
            (&client, "eth0", "2001:db8:1::2/64"),
            (&server, "eth0", "10.0.1.1/24"),
            (&server, "eth0", "2001:db8:1::1/64"),
            (&server, "lo", "203.0.113.10/32"),
            (&server, "lo", "2001:db8::10/128"),
        ] {
            host.address(device, address).unwrap();
        }
        let wire = Wire::open(&client, ["10.9.0.1/24", "2001:db8:9::1/64"]);
        client.sysctl("net.ipv4.ip_forward", "1").unwrap();
        client.sysctl("net.ipv6.conf.all.forwarding", "1").unwrap();
        for (host, v4, v6) in [(&client, "10.0.1.1", "2001:db8:1::1"), (&server, "10.0.1.2", "2001:db8:1::2")]
        {
            host.route("0.0.0.0/0", Via::gateway(v4)).unwrap();
            host.route("::/0", Via::gateway(v6)).unwrap();
        }
        Network { client, server, wire, folder: tempfile::tempdir().unwrap(), _lab: lab }
    }

    /// A program that sends back what it gets on `port`, as long as the network lives.
    pub(crate) fn echo_server(&self, port: u16) {
        let address: SocketAddr = SocketAddr::new("::".parse().unwrap(), port);
        let listener = self.server.enter(|| TcpListener::bind(address)).unwrap().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || echo(stream));
            }
        });
    }

    /// Writes a configuration; `extra` goes before its tables, `services` are (X, Y).
    pub(crate) fn write_config(&self, extra: &str, services: &[(u16, u16)]) -> PathBuf {
        let path = self.folder.path().join("server.toml");
        let mut text = format!(
            "role = \"server\"\ninterface = \"eth0\"\naddresses = [\"203.0.113.10\", \"2001:db8::10\"]\n{extra}\n"
        );
        text.extend(services.iter().map(|(x, y)| {
            format!("[[service]]\nname = \"s{x}\"\nredirect_port = {x}\nservice_port = {y}\n")
        }));
        std::fs::write(&path, text).unwrap();
        path
    }

    /// An agent in this process.
    pub(crate) fn agent(&self, extra: &str) -> Agent {
        let config = Config::load(self.write_config(extra, &[(X, Y)])).unwrap();
        Agent::start(&self.server, config, self.folder.path())
    }

    /// An agent in a process of its own, ready.
    pub(crate) fn agent_process(&self, config: &Path) -> Child {
        let log = self.folder.path().join("agent.log");
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "the_process_of_an_agent", "--nocapture"])
            .env(CONFIG_VARIABLE, config)
            .env(STATE_VARIABLE, self.folder.path());
        let mut child = self.server.spawn_logged(&mut command, log).unwrap();
        child.wait_for_log("the agent is ready", PATIENCE).unwrap();
        child
    }

    /// All that the agent could have changed on the server's host.
    pub(crate) fn server_state(&self) -> String {
        let mut state = String::new();
        for (program, arguments) in [
            ("ip", "-4 rule show"),
            ("ip", "-6 rule show"),
            ("ip", "-4 route show table all"),
            ("ip", "-6 route show table all"),
            ("ip", "-brief link show"),
            ("nft", "list ruleset"),
            ("sysctl", "-a -r net.ipv4.(ip_forward|tcp_early_demux|ip_local_reserved_ports)"),
            ("sysctl", "-a -r net.ipv[46].conf.(all|eth0).(forwarding|rp_filter|accept_local|accept_ra)$"),
        ] {
            let output = self.server.run(Command::new(program).args(arguments.split(' '))).unwrap();
            state.push_str(&String::from_utf8(output.stdout).unwrap());
        }
        state
    }
}

fn echo(mut stream: TcpStream) {
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
}

/// An agent in this process; ends in order when dropped.
pub(crate) struct Agent {
    stop: Option<oneshot::Sender<()>>,
    stats: watch::Receiver<AgentStats>,
    thread: Option<JoinHandle<()>>,
}

impl Agent {
    fn start(host: &Host, config: Config, state: &Path) -> Agent {
        let (stop, stopped) = oneshot::channel();
        let (ready, wait) = oneshot::channel();
        let (publish, published) = watch::channel(AgentStats::default());
        let (host, state) = (host.clone(), state.to_owned());
        let thread = std::thread::spawn(move || {
            let agent = || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                let options = RunOptions {
                    ready: Some(ready),
                    stats: Some(publish),
                    capture: Some(state.join("agent.pcapng")),
                    state_dir: Some(state),
                    ..RunOptions::default()
                };
                runtime.block_on(run(config, options, async { stopped.await.unwrap_or(()) }))
            };
            host.enter(agent).unwrap().unwrap();
        });
        wait.blocking_recv().expect("the agent starts");
        Agent { stop: Some(stop), stats: published, thread: Some(thread) }
    }

    /// Packets of ours that the agent has seen; waits until it has said so.
    pub(crate) fn packets(&self) -> u64 {
        // It says so every second.
        std::thread::sleep(Duration::from_millis(1200));
        self.stats.borrow().packets
    }

    /// What the machine has counted; waits until it has said so.
    pub(crate) fn counters(&self) -> ServerCounters {
        std::thread::sleep(Duration::from_millis(1200));
        self.stats.borrow().server
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join)
            && !std::thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

/// What runs in the process of [`Network::agent_process`]; in any other there is nothing to do.
pub(crate) fn agent_process() {
    let (Some(config), Some(state)) = (std::env::var_os(CONFIG_VARIABLE), std::env::var_os(STATE_VARIABLE))
    else {
        return;
    };
    tracing_subscriber::fmt().with_ansi(false).with_env_filter("shunt=debug").init();
    let config = Config::load(config).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut terminate =
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).unwrap();
        let (ready, wait) = oneshot::channel();
        let options =
            RunOptions { ready: Some(ready), state_dir: Some(state.into()), ..RunOptions::default() };
        let agent = run(config, options, async { terminate.recv().await.unwrap_or(()) });
        let announce = async {
            if wait.await.is_ok() {
                println!("the agent is ready");
            }
        };
        tokio::join!(agent, announce).0.unwrap();
    });
}
