//! The network that the end-to-end tests share: a client, a router in the middle, a balancer, and servers behind it.
//!
//! ```text
//! client 10.1.0.2 --(access)-- 10.1.0.1 middle 10.2.0.254 --(core)-- 10.2.0.2 balancer 10.3.0.1 --(bridge)-- 10.3.0.11.. servers
//! ```
//! The same in IPv6 with `fd00:1::2` and so on. Everything runs as it would in production: the `shunt` program with
//! TOML files, beside the kernel's TCP; nginx, curl and iperf3 are Debian's.

// Each test file is a crate of its own and uses another part of this.
#![allow(dead_code, unused_imports, unreachable_pub, clippy::unused_self)]

pub mod ctl;
pub mod datagrams;
pub mod ecmp;
mod links;
mod programs;
pub mod service;
pub mod tape;
mod traffic;
pub mod tshark;

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

/// Where two routers stand with a link of 1,280 bytes between them, which neither end sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Narrow {
    /// Between the client and the balancer.
    Client,
    /// Between the balancer and the servers (`forward = "network"`).
    Servers,
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
    /// A small MTU far from both ends.
    pub narrow: Option<Narrow>,
    /// The servers' links are ones whose frames can be looked at ([`Server::link`]).
    pub taps: bool,
    /// Each server has a link of its own to the balancer, `back1` and so on, that can be pulled out (`forward = "direct"`).
    pub connectors: bool,
    /// Below the balancer are two hosts, `lower1` and `lower2`, each with half of the servers (`forward = "direct"`).
    pub tree: bool,
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
            narrow: None,
            taps: false,
            connectors: false,
            tree: false,
            start: true,
        }
    }
}

/// A daemon's file as it is tried: with `SHUNT_TEST_OFFLOAD=off` nothing is left to the kernel, unless the file itself says
/// what is.
fn switched(text: &str) -> String {
    match std::env::var("SHUNT_TEST_OFFLOAD").as_deref() {
        Ok("off") => {}
        Ok(other) if other != "on" => panic!("SHUNT_TEST_OFFLOAD is on or off, not {other}"),
        _ => return text.to_owned(),
    }
    let mut file: toml_edit::DocumentMut = text.parse().expect("tests write TOML");
    if matches!(file["role"].as_str(), Some("balancer" | "client")) {
        let host = file.entry("host").or_insert_with(toml_edit::table);
        let host = host.as_table_like_mut().expect("[host] is a table");
        host.entry("offload").or_insert_with(|| toml_edit::value("off"));
    }
    file.to_string()
}

/// One server host and what runs on it.
pub struct Server {
    pub number: u16,
    pub host: Host,
    /// Forward is towards the server.
    pub link: Option<ImpairedLink>,
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
    /// What servers, balancer and their way back to clients are plugged into, with `forward = "datalink"`; with
    /// `connectors` what lies between the balancer and each server.
    pub switch: Option<Host>,
    /// The hosts below the balancer in a tree, and the links to them; Forward is down.
    pub lowers: Vec<(Host, ImpairedLink)>,
    /// The routers at both ends of the narrow link, seen from the client.
    pub narrow: Vec<Host>,
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
        let near = if options.narrow == Some(Narrow::Client) { host("near") } else { middle.clone() };
        let access = options.access.map(|impairment| {
            lab.impaired_link(&client, "eth0", &near, "eth0", impairment).expect("an impaired link")
        });
        if access.is_none() {
            lab.link(&client, "eth0", &near, "eth0", LinkOptions::default()).expect("access link");
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
            switch: None,
            lowers: Vec::new(),
            narrow: Vec::new(),
            access,
            options,
            dir,
            lab,
        };
        net.address(&near);
        match net.options.narrow {
            Some(Narrow::Client) => net.narrow_client(near),
            Some(Narrow::Servers) => net.narrow_servers(),
            None => {}
        }
        if net.options.forward == "datalink" {
            net.plug_switch();
        }
        if net.options.tree {
            net.grow();
        }
        if net.options.connectors {
            net.switch = Some(net.lab.host("patch").expect("a namespace"));
        }
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

    /// `near` is the client's router.
    fn address(&self, near: &Host) {
        let set = |host: &Host, device: &str, v4: &str, v6: &str| {
            host.address(device, v4).expect("an address");
            host.address(device, v6).expect("an address");
        };
        set(&self.client, "eth0", "10.1.0.2/24", "fd00:1::2/64");
        set(near, "eth0", "10.1.0.1/24", "fd00:1::1/64");
        // No permutation of the client's 16-bit words: the digest O could not tell the two apart.
        set(&self.middle, "eth1", "10.2.0.254/24", "fd00:2::fe/64");
        set(&self.balancer, "eth0", "10.2.0.2/24", "fd00:2::2/64");
        route_both(&self.client, "10.1.0.1", "fd00:1::1");
        route_both(&self.balancer, "10.2.0.254", "fd00:2::fe");
        self.middle.route(&format!("{VIP4}/32"), Via::gateway("10.2.0.2")).expect("a route");
        self.middle.route(&format!("{VIP6}/128"), Via::gateway("fd00:2::2")).expect("a route");
        for host in [&self.middle, &self.balancer, near] {
            host.sysctl("net.ipv4.ip_forward", "1").expect("a sysctl");
            host.sysctl("net.ipv6.conf.all.forwarding", "1").expect("a sysctl");
        }
    }

    /// `10.4.0.1 =1280= 10.4.0.2` between two routers.
    fn narrow_link(&mut self, one: Host, other: Host) {
        // A tunnel takes room of its own: IPv6 must find 1,280 bytes inside.
        let mtu = if self.options.forward == "gue" { 1400 } else { 1280 };
        self.lab.link(&one, "narrow", &other, "narrow", LinkOptions { mtu }).expect("a narrow link");
        for (host, last) in [(&one, 1), (&other, 2)] {
            host.address("narrow", &format!("10.4.0.{last}/24")).expect("an address");
            host.address("narrow", &format!("fd00:4::{last}/64")).expect("an address");
            host.sysctl("net.ipv4.ip_forward", "1").expect("a sysctl");
            host.sysctl("net.ipv6.conf.all.forwarding", "1").expect("a sysctl");
        }
        self.narrow = vec![one, other];
    }

    /// client - near =1280= middle
    fn narrow_client(&mut self, near: Host) {
        self.narrow_link(near, self.middle.clone());
        route_both(&self.narrow[0], "10.4.0.2", "fd00:4::2");
        self.middle.route("10.1.0.0/24", Via::gateway("10.4.0.1")).expect("a route");
        self.middle.route("fd00:1::/64", Via::gateway("fd00:4::1")).expect("a route");
    }

    /// balancer 10.5.0.1 - 10.5.0.2 outer =1280= inner 10.3.0.1 - servers
    fn narrow_servers(&mut self) {
        assert!(matches!(self.options.forward, "network" | "gue"));
        let outer = self.lab.host("outer").expect("a namespace");
        let inner = self.lab.host("inner").expect("a namespace");
        self.lab.link(&self.balancer, "eth1", &outer, "eth0", LinkOptions::default()).expect("a link");
        for (host, device, last) in [(&self.balancer, "eth1", 1), (&outer, "eth0", 2)] {
            host.address(device, &format!("10.5.0.{last}/24")).expect("an address");
            host.address(device, &format!("fd00:5::{last}/64")).expect("an address");
        }
        self.narrow_link(outer, inner);
        let to_servers = |host: &Host, v4: &str, v6: &str| {
            host.route("10.3.0.0/24", Via::gateway(v4)).expect("a route");
            host.route("fd00:3::/64", Via::gateway(v6)).expect("a route");
        };
        to_servers(&self.balancer, "10.5.0.2", "fd00:5::2");
        to_servers(&self.narrow[0], "10.4.0.2", "fd00:4::2");
        self.balancer.route("10.4.0.0/24", Via::gateway("10.5.0.2")).expect("a route");
        self.balancer.route("fd00:4::/64", Via::gateway("fd00:5::2")).expect("a route");
        route_both(&self.narrow[0], "10.5.0.1", "fd00:5::1");
        route_both(&self.narrow[1], "10.4.0.1", "fd00:4::1");
    }

    /// The host that a server is linked to.
    fn router_of(&self, number: u16) -> &Host {
        match self.options.narrow {
            Some(Narrow::Servers) => &self.narrow[1],
            _ if self.options.forward == "gue" => &self.middle,
            _ if self.options.tree => &self.lowers[self.lower_of(number)].0,
            _ => self.switch.as_ref().unwrap_or(&self.balancer),
        }
    }

    fn add_server(&mut self, number: u16) {
        let host = self.lab.host(&format!("s{number}")).expect("a namespace");
        let port = format!("back{number}");
        let router = self.router_of(number);
        let link = self.options.taps.then(|| {
            let clean = Impairment::default();
            self.lab.impaired_link(router, &port, &host, "eth0", clean).expect("an impaired link")
        });
        if link.is_none() {
            self.lab.link(router, &port, &host, "eth0", LinkOptions::default()).expect("a link");
        }
        let bridge = if self.options.connectors { format!("br{number}") } else { "br0".to_owned() };
        router.bridge(&bridge, &[&port]).expect("a bridge port");
        if self.options.connectors {
            self.plug(number);
        } else if self.switch.is_none() && self.is_first(number) {
            router.address("br0", "10.3.0.1/24").expect("an address");
            router.address("br0", "fd00:3::1/64").expect("an address");
        }
        let server = Server { number, host, link, agent: None, programs: Vec::new() };
        let [v4, v6] = server.addresses();
        server.host.address("eth0", &format!("{v4}/24")).expect("an address");
        server.host.address("eth0", &format!("{v6}/64")).expect("an address");
        if self.direct() {
            server.host.address("lo", &format!("{VIP4}/32")).expect("an address");
            server.host.address("lo", &format!("{VIP6}/128")).expect("an address");
        }
        let (v4, v6) = if self.options.forward == "datalink" {
            ("10.3.0.254", "fd00:3::fe")
        } else {
            ("10.3.0.1", "fd00:3::1")
        };
        route_both(&server.host, v4, v6);
        self.servers.push(server);
    }

    /// Whether the servers own the shared addresses themselves.
    fn direct(&self) -> bool {
        self.options.forward != "network"
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.file(name);
        std::fs::write(&path, switched(text)).expect("a file can be written");
        path
    }

    /// The balancer's file with each server in the state that `state` says.
    pub fn balancer_config(&self, state: impl Fn(u16) -> Option<&'static str>) -> String {
        let Options { policy, forward, .. } = &self.options;
        let mut text = format!(
            "role = \"balancer\"\nvips = [\"{VIP4}\", \"{VIP6}\"]\nlegacy = \"hash\"\nforward = \"{forward}\"\n"
        );
        if *forward == "datalink" {
            text.push_str("link = \"eth1\"\n");
        }
        for (name, port) in [("web", WEB), ("iperf", IPERF), ("other", OTHER)] {
            let _ = write!(
                text,
                "\n[[service]]\nname = \"{name}\"\nredirect_port = {port}\npolicy = \"{policy}\"\n"
            );
        }
        for server in &self.servers {
            let Some(state) = state(server.number) else { continue };
            let ([v4, v6], n) = (server.addresses(), server.number);
            let device = if self.options.connectors { format!("back{n}") } else { "br0".to_owned() };
            let reached = match *forward {
                "direct" => format!("device = \"{device}\"\ngateway"),
                _ => "address".to_owned(),
            };
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
        let text = self.balancer_config(|_| Some("up"));
        self.start_balancer_with(&text);
    }

    /// Starts the balancer with a file of the test's own.
    pub fn start_balancer_with(&mut self, text: &str) {
        let config = self.write("balancer.toml", text);
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
        // The balancer's addresses, wherever it stands.
        let tunnels = "[decapsulate]
from = [\"10.2.0.0/24\", \"10.5.0.0/24\", \"fd00:2::/64\", \"fd00:5::/64\"]";
        let extra = if self.options.forward == "gue" { tunnels } else { "" };
        self.start_agent_with(number, extra);
    }

    /// The same with further keys and tables in its file.
    pub fn start_agent_with(&mut self, number: u16, extra: &str) {
        let config = self.write(&format!("agent{number}.toml"), &self.agent_config(number, extra));
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

    /// Stops the balancer; what it logged last are its counters.
    pub fn stop_balancer_and_count(&mut self) -> BalancerCounts {
        let mut process = self.balancer_process.take().expect("the balancer runs");
        let status = process.terminate(Duration::from_secs(10)).expect("the balancer ends");
        let log = process.log().expect("a log");
        assert!(status.success(), "the balancer ended with {status}:\n{log}");
        BalancerCounts(log)
    }

    /// Lets the kernels at both ends forget path MTUs.
    pub fn forget_paths(&self) {
        for host in self.servers.iter().map(|server| &server.host).chain([&self.client]) {
            for family in ["-4", "-6"] {
                let mut command = Command::new("ip");
                command.args([family, "route", "flush", "cache"]);
                host.run_within(&mut command, Duration::from_secs(10)).expect("ip is installed");
            }
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

/// The counters of a balancer that has ended.
#[derive(Debug)]
pub struct BalancerCounts(String);

impl BalancerCounts {
    /// A counter, as `shunt_balancer_packets_total{decision="owner"}`.
    pub fn of(&self, name: &str) -> u64 {
        let mut lines = self.0.lines().rev();
        let value = lines.find_map(|line| line.trim().strip_prefix(name)?.trim().parse().ok());
        value.unwrap_or_else(|| panic!("no {name} in {}", self.0))
    }

    /// Packets by what was decided.
    pub fn decided(&self, decision: &str) -> u64 {
        self.of(&format!("shunt_balancer_packets_total{{decision=\"{decision}\"}}"))
    }

    /// Packets dropped for a reason.
    pub fn dropped(&self, reason: &str) -> u64 {
        self.of(&format!("shunt_balancer_dropped_packets_total{{reason=\"{reason}\"}}"))
    }
}

fn route_both(host: &Host, v4: &str, v6: &str) {
    host.route("0.0.0.0/0", Via::gateway(v4)).expect("a route");
    host.route("::/0", Via::gateway(v6)).expect("a route");
}
