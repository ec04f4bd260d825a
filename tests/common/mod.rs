//! The network that the end-to-end tests share: a client, a router in the middle, a balancer, and servers behind it.
//!
//! ```text
//! client 10.1.0.2 --(access)-- 10.1.0.1 middle 10.2.0.254 --(core)-- 10.2.0.2 balancer 10.3.0.1 --(bridge)-- 10.3.0.11.. servers
//! ```
//! The same in IPv6 with `fd00:1::2` and so on. Everything runs as it would in production: the `shunt` program with
//! TOML files, beside the kernel's TCP; nginx, curl and iperf3 are Debian's.

// Each test file is a crate of its own and uses another part of this.
#![allow(dead_code, unused_imports, unreachable_pub, clippy::unused_self)]

mod programs;
pub mod service;
mod traffic;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use shunt_lab::{Child, Host, ImpairedLink, Impairment, Lab, LinkOptions, Via};

pub use programs::*;
pub use traffic::*;

/// The shared addresses.
pub const VIP4: &str = "203.0.113.10";
pub const VIP6: &str = "2001:db8::10";
/// Redirect ports: the web service (nginx), iperf3, and one for whatever a test listens with.
pub const WEB: u16 = 80;
pub const IPERF: u16 = 5201;
pub const OTHER: u16 = 7000;
/// What service ports begin at; server number `n` (from 1) owns `base + n`.
pub const WEB_SERVICE: u16 = 41_000;
pub const IPERF_SERVICE: u16 = 42_000;
pub const OTHER_SERVICE: u16 = 43_000;

/// How long a daemon may take to be ready.
const READY: Duration = Duration::from_secs(15);

/// The IP family a test runs over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const BOTH: [Family; 2] = [Family::V4, Family::V6];

    pub fn vip(self) -> &'static str {
        match self {
            Family::V4 => VIP4,
            Family::V6 => VIP6,
        }
    }

    /// `http://VIP:PORT` with brackets where they are needed.
    pub fn url(self, port: u16, path: &str) -> String {
        match self {
            Family::V4 => format!("http://{VIP4}:{port}{path}"),
            Family::V6 => format!("http://[{VIP6}]:{port}{path}"),
        }
    }
}

/// How the network is built.
#[derive(Clone)]
pub struct Options {
    pub servers: u16,
    pub policy: &'static str,
    pub forward: &'static str,
    /// Impairment of the link between client and router; `None` is a plain virtual link.
    pub access: Option<Impairment>,
    /// MTU between router and balancer.
    pub core_mtu: u32,
    /// Started at once: balancer and agents.
    pub start: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            servers: 4,
            policy: "random",
            forward: "network",
            access: None,
            core_mtu: 1500,
            start: true,
        }
    }
}

/// One server host and what runs on it.
pub struct Server {
    pub number: u16,
    pub host: Host,
    pub agent: Option<Child>,
    pub programs: Vec<Child>,
}

impl Server {
    pub fn name(&self) -> String {
        format!("s{}", self.number)
    }

    pub fn addresses(&self) -> [String; 2] {
        [format!("10.3.0.{}", 10 + self.number), format!("fd00:3::{}", 10 + self.number)]
    }
}

/// The network. Fields are dropped in order: processes before the namespaces they live in.
pub struct Net {
    pub shim: Option<Child>,
    pub balancer_process: Option<Child>,
    pub servers: Vec<Server>,
    pub client: Host,
    pub middle: Host,
    pub balancer: Host,
    pub access: Option<ImpairedLink>,
    pub options: Options,
    pub dir: tempfile::TempDir,
    pub lab: Lab,
}

/// Makes the program under test a command.
pub fn shunt() -> Command {
    Command::new(env!("CARGO_BIN_EXE_shunt"))
}

impl Net {
    /// Builds the network; balancer and agents run if `options.start`.
    ///
    /// # Panics
    /// With a sentence what is missing, if the machine lets us have no namespaces.
    pub fn new(options: Options) -> Net {
        let lab = Lab::new().unwrap_or_else(|error| panic!("these tests need namespaces: {error}"));
        let host = |name: &str| lab.host(name).expect("a namespace");
        let (client, middle, balancer) = (host("client"), host("middle"), host("balancer"));
        let access = options.access.map(|impairment| {
            lab.impaired_link(&client, "eth0", &middle, "eth0", impairment).expect("an impaired link")
        });
        if access.is_none() {
            lab.link(&client, "eth0", &middle, "eth0", LinkOptions::default()).expect("access link");
        }
        lab.link(&middle, "eth1", &balancer, "eth0", LinkOptions { mtu: options.core_mtu })
            .expect("core link");
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut net = Net {
            shim: None,
            balancer_process: None,
            servers: Vec::new(),
            client,
            middle,
            balancer,
            access,
            options,
            dir,
            lab,
        };
        net.address();
        for number in 1..=net.options.servers {
            net.add_server(number);
        }
        if net.options.start {
            net.start_balancer();
            for number in 1..=net.options.servers {
                net.start_agent(number);
            }
        }
        net
    }

    fn address(&self) {
        let set = |host: &Host, device: &str, v4: &str, v6: &str| {
            host.address(device, v4).expect("an address");
            host.address(device, v6).expect("an address");
        };
        set(&self.client, "eth0", "10.1.0.2/24", "fd00:1::2/64");
        set(&self.middle, "eth0", "10.1.0.1/24", "fd00:1::1/64");
        // No permutation of the client's 16-bit words: the digest O could not tell the two apart.
        set(&self.middle, "eth1", "10.2.0.254/24", "fd00:2::fe/64");
        set(&self.balancer, "eth0", "10.2.0.2/24", "fd00:2::2/64");
        route_both(&self.client, "10.1.0.1", "fd00:1::1");
        route_both(&self.balancer, "10.2.0.254", "fd00:2::fe");
        self.middle.route(&format!("{VIP4}/32"), Via::gateway("10.2.0.2")).expect("a route");
        self.middle.route(&format!("{VIP6}/128"), Via::gateway("fd00:2::2")).expect("a route");
        for host in [&self.middle, &self.balancer] {
            host.sysctl("net.ipv4.ip_forward", "1").expect("a sysctl");
            host.sysctl("net.ipv6.conf.all.forwarding", "1").expect("a sysctl");
        }
    }

    fn add_server(&mut self, number: u16) {
        let host = self.lab.host(&format!("s{number}")).expect("a namespace");
        let port = format!("back{number}");
        self.lab.link(&self.balancer, &port, &host, "eth0", LinkOptions::default()).expect("a link");
        self.balancer.bridge("br0", &[&port]).expect("a bridge port");
        if number == 1 {
            self.balancer.address("br0", "10.3.0.1/24").expect("an address");
            self.balancer.address("br0", "fd00:3::1/64").expect("an address");
        }
        let server = Server { number, host, agent: None, programs: Vec::new() };
        let [v4, v6] = server.addresses();
        server.host.address("eth0", &format!("{v4}/24")).expect("an address");
        server.host.address("eth0", &format!("{v6}/64")).expect("an address");
        if self.direct() {
            server.host.address("lo", &format!("{VIP4}/32")).expect("an address");
            server.host.address("lo", &format!("{VIP6}/128")).expect("an address");
        }
        route_both(&server.host, "10.3.0.1", "fd00:3::1");
        self.servers.push(server);
    }

    /// Whether the servers own the shared addresses themselves.
    fn direct(&self) -> bool {
        self.options.forward == "direct"
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.file(name);
        std::fs::write(&path, text).expect("a file can be written");
        path
    }

    /// The balancer's file with each server in the state that `state` says.
    pub fn balancer_config(&self, state: impl Fn(u16) -> Option<&'static str>) -> String {
        let Options { policy, forward, .. } = &self.options;
        let mut text = format!(
            "role = \"balancer\"\nvips = [\"{VIP4}\", \"{VIP6}\"]\nlegacy = \"hash\"\nforward = \"{forward}\"\n"
        );
        for (name, port) in [("web", WEB), ("iperf", IPERF), ("other", OTHER)] {
            let _ = write!(
                text,
                "\n[[service]]\nname = \"{name}\"\nredirect_port = {port}\npolicy = \"{policy}\"\n"
            );
        }
        for server in &self.servers {
            let Some(state) = state(server.number) else { continue };
            let ([v4, v6], n) = (server.addresses(), server.number);
            let reached = if self.direct() { "device = \"br0\"\ngateway" } else { "address" };
            let _ = write!(
                text,
                "\n[[server]]\nname = \"{}\"\n{reached} = [\"{v4}\", \"{v6}\"]\nstate = \"{state}\"\n\
                 ports = {{ web = {}, iperf = {}, other = {} }}\n",
                server.name(),
                WEB_SERVICE + n,
                IPERF_SERVICE + n,
                OTHER_SERVICE + n
            );
        }
        text
    }

    /// Starts a daemon on a host and waits until it is ready.
    pub fn daemon(&self, host: &Host, role: &str, config: &Path, extra: &[&str]) -> Child {
        let log = self.file(&format!("{}-{role}.log", host.name()));
        let mut command = shunt();
        command.arg("-v").arg(role).arg("-c").arg(config).args(extra);
        if let Some(dir) = std::env::var_os("SHUNT_TEST_CAPTURES") {
            let file = format!("{}-{role}.pcapng", host.name());
            command.arg("--capture").arg(Path::new(&dir).join(file));
        }
        let mut child = host.spawn_logged(&mut command, &log).expect("the daemon starts");
        if let Err(error) = child.wait_for_log("ready", READY) {
            panic!("{role} on {} is not ready: {error}\n{}", host.name(), child.log().unwrap_or_default());
        }
        child
    }

    pub fn start_balancer(&mut self) {
        let config = self.write("balancer.toml", &self.balancer_config(|_| Some("up")));
        self.balancer_process = Some(self.daemon(&self.balancer, "balancer", &config, &[]));
    }

    /// Gives the balancer another file and lets it reload.
    pub fn reload_balancer(&self, text: &str) {
        self.write("balancer.toml", text);
        let process = self.balancer_process.as_ref().expect("the balancer runs");
        process.signal(shunt_lab::Signal::SIGHUP).expect("a signal");
    }

    pub fn agent_config(&self, number: u16, extra: &str) -> String {
        let server = &self.servers[usize::from(number) - 1];
        let [v4, v6] = if self.direct() { [VIP4.into(), VIP6.into()] } else { server.addresses() };
        let mut text =
            format!("role = \"server\"\ninterface = \"eth0\"\naddresses = [\"{v4}\", \"{v6}\"]\n{extra}\n");
        for (name, x, base) in
            [("web", WEB, WEB_SERVICE), ("iperf", IPERF, IPERF_SERVICE), ("other", OTHER, OTHER_SERVICE)]
        {
            let y = base + number;
            let _ =
                write!(text, "\n[[service]]\nname = \"{name}\"\nredirect_port = {x}\nservice_port = {y}\n");
        }
        text
    }

    pub fn start_agent(&mut self, number: u16) {
        let config = self.write(&format!("agent{number}.toml"), &self.agent_config(number, ""));
        let server = &self.servers[usize::from(number) - 1];
        let agent = self.daemon(&server.host, "server", &config, &[]);
        self.servers[usize::from(number) - 1].agent = Some(agent);
    }

    pub fn client_config(&self, continuation: &str) -> String {
        format!(
            "role = \"client\"\n\n[timers]\nsockets_s = 1\n\n\
             [[vip]]\naddress = \"{VIP4}\"\ncontinuation = \"{continuation}\"\n\n\
             [[vip]]\naddress = \"{VIP6}\"\ncontinuation = \"{continuation}\"\n"
        )
    }

    pub fn start_shim(&mut self, continuation: &str) {
        self.start_shim_keys(continuation, "");
    }

    /// The same with further keys in front of the tables.
    pub fn start_shim_keys(&mut self, continuation: &str, keys: &str) {
        let text = self.client_config(continuation).replacen("\n\n", &format!("\n{keys}\n\n"), 1);
        let config = self.write("client.toml", &text);
        self.shim = Some(self.daemon(&self.client, "client", &config, &[]));
    }

    /// Stops the shim and everything it remembers.
    pub fn stop_shim(&mut self) {
        if let Some(mut shim) = self.shim.take() {
            let status = shim.terminate(Duration::from_secs(10)).expect("the shim ends");
            assert!(status.success(), "the shim ended with {status}:\n{}", shim.log().unwrap_or_default());
        }
    }

    /// What every daemon has logged, for the message of a failing assertion.
    pub fn logs(&self) -> String {
        let children = [("shim", &self.shim), ("balancer", &self.balancer_process)];
        let agents = self.servers.iter().map(|server| ("agent", &server.agent));
        let mut text = String::new();
        for (name, child) in children.into_iter().chain(agents) {
            let Some(log) = child.as_ref().and_then(|child| child.log().ok()) else { continue };
            let tail: Vec<&str> = log.lines().rev().take(40).collect();
            let _ = writeln!(text, "--- {name}");
            for line in tail.iter().rev() {
                let _ = writeln!(text, "{line}");
            }
        }
        text
    }
}

fn route_both(host: &Host, v4: &str, v6: &str) {
    host.route("0.0.0.0/0", Via::gateway(v4)).expect("a route");
    host.route("::/0", Via::gateway(v6)).expect("a route");
}
