//! Two balancers that know nothing of each other, among which the client-side router and the servers spread packets by
//! their ports (ECMP), and a second client that has no shim.
//!
//! ```text
//! client 10.1.0.2 ----+          +-- 10.2.0.2 balancer  10.3.0.1 --+
//!                   middle --ECMP                                ECMP-- bridge 10.3.0.11.. servers
//! plain 10.7.0.2 -----+          +-- 10.6.0.2 balancer2 10.3.0.2 --+
//! ```

use shunt_lab::{Child, Host, LinkOptions, Via};

use super::ctl::ctl;
use super::{Net, Options, VIP4, VIP6, route_both};

/// The balancers' addresses towards the clients' router.
const FRONT: [[&str; 2]; 2] = [["10.2.0.2", "fd00:2::2"], ["10.6.0.2", "fd00:6::2"]];
/// And towards the servers.
const BACK: [[&str; 2]; 2] = [["10.3.0.1", "fd00:3::1"], ["10.3.0.2", "fd00:3::2"]];

/// The network. Fields are dropped in order: processes before the namespaces they live in.
pub struct Pair {
    pub processes: [Option<Child>; 2],
    pub hosts: [Host; 2],
    /// A client without a shim.
    pub plain: Host,
    pub net: Net,
}

impl Pair {
    /// Builds it with `servers` hosts, of which the balancers know the first `known`; all daemons but the shim run.
    pub fn new(servers: u16, known: u16) -> Pair {
        let net = Net::new(Options { servers, start: false, ..Options::default() });
        let host = |name: &str| net.lab.host(name).expect("a namespace");
        let (second, plain) = (host("balancer2"), host("plain"));
        let link = |a: &Host, name_a: &str, b: &Host, name_b: &str| {
            net.lab.link(a, name_a, b, name_b, LinkOptions::default()).expect("a link");
        };
        link(&net.middle, "eth2", &second, "eth0");
        link(&net.middle, "eth3", &plain, "eth0");
        link(&net.balancer, "peer", &second, "eth1");
        net.balancer.bridge("br0", &["peer"]).expect("a bridge port");
        for (host, device, v4, v6) in [
            (&net.middle, "eth2", "10.6.0.254/24", "fd00:6::fe/64"),
            (&second, "eth0", "10.6.0.2/24", "fd00:6::2/64"),
            (&second, "eth1", "10.3.0.2/24", "fd00:3::2/64"),
            (&net.middle, "eth3", "10.7.0.1/24", "fd00:7::1/64"),
            (&plain, "eth0", "10.7.0.2/24", "fd00:7::2/64"),
        ] {
            host.address(device, v4).expect("an address");
            host.address(device, v6).expect("an address");
        }
        route_both(&second, "10.6.0.254", "fd00:6::fe");
        route_both(&plain, "10.7.0.1", "fd00:7::1");
        second.sysctl("net.ipv4.ip_forward", "1").expect("a sysctl");
        second.sysctl("net.ipv6.conf.all.forwarding", "1").expect("a sysctl");
        let spreading = net.servers.iter().map(|server| &server.host).chain([&net.middle]);
        for host in spreading {
            // By ports, not by addresses alone.
            host.sysctl("net.ipv4.fib_multipath_hash_policy", "1").expect("the kernel knows multipath");
            host.sysctl("net.ipv6.fib_multipath_hash_policy", "1").expect("the kernel knows multipath");
        }
        let config = net.balancer_config(|number| (number <= known).then_some("up"));
        let hosts = [net.balancer.clone(), second];
        let mut pair = Pair { processes: [None, None], hosts, plain, net };
        for number in 0..2 {
            pair.start(number, &config);
        }
        pair.spread_over(&[0, 1]);
        for number in 1..=servers {
            pair.net.start_agent(number);
        }
        pair
    }

    /// Starts a balancer with a file.
    pub fn start(&mut self, number: usize, config: &str) {
        let path = self.net.write(&format!("balancer{number}.toml"), config);
        let process = self.net.daemon(&self.hosts[number], "balancer", &path, &[]);
        self.processes[number] = Some(process);
    }

    /// Kills a balancer.
    pub fn kill(&mut self, number: usize) {
        self.processes[number].take().expect("it runs").kill().expect("it can be killed");
    }

    /// The routes in both directions lead over these balancers alone.
    pub fn spread_over(&self, numbers: &[usize]) {
        for (family, vip) in [(0, format!("{VIP4}/32")), (1, format!("{VIP6}/128"))] {
            let by =
                |table: &[[&str; 2]; 2]| Via::multipath(numbers.iter().map(|number| table[*number][family]));
            self.net.middle.route(&vip, by(&FRONT)).expect("a route over several routers");
            let default = ["0.0.0.0/0", "::/0"][family];
            for server in &self.net.servers {
                server.host.route(default, by(&BACK)).expect("a route over several routers");
            }
        }
    }

    /// Tells both balancers; they have to agree.
    pub fn tell(&self, arguments: &[&str]) {
        for host in &self.hosts {
            let said = ctl(host, arguments);
            assert_eq!(said.code, 0, "{}: {arguments:?}: {said:?}\n{}", host.name(), self.logs());
        }
    }

    /// What a balancer has in force, as a file.
    pub fn config(&self, number: usize) -> String {
        ctl(&self.hosts[number], &["config"]).out
    }

    /// How many connections a balancer has selected a server for.
    pub fn selected(&self, number: usize) -> u64 {
        let counters = ctl(&self.hosts[number], &["counters", "--json"]).json();
        counters["decisions"]["selected"].as_u64().unwrap_or_else(|| panic!("no such counter: {counters}"))
    }

    /// What every daemon has logged, for the message of a failing assertion.
    pub fn logs(&self) -> String {
        let logs = self.processes.iter().flatten().map(|process| process.log().unwrap_or_default());
        logs.map(|log| log + "---\n").collect::<String>() + &self.net.logs()
    }
}
