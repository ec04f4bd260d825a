//! The balancers of a world, what they are told of the servers, and who of them gets a packet.

use std::fmt::Write as _;
use std::hash::Hasher;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use fastrand::Rng;
use shunt_balancer::{Balancer, Config, Memory, Output, SelectKey};
use shunt_host::Source;
use shunt_stack::time::Instant;
use shunt_stack::wire::Packet;
use siphasher::sip::SipHasher13;

use super::check::{Violation, checksums_ok};
use super::plan::{Forward, Plan, REDIRECT_PORT, ServerPlan, vip};

/// How long routers go on sending to a balancer that is away.
const DETECTION: Duration = Duration::from_millis(300);

/// A server as the tables know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    Absent,
    Up,
    Drained,
}

/// One version of the tables.
#[derive(Debug)]
pub(super) struct Tables {
    /// Later versions have larger numbers.
    version: u64,
    config: Config,
    /// The server at each place of the configuration.
    order: Vec<usize>,
}

impl Tables {
    pub(super) fn version(&self) -> u64 {
        self.version
    }

    /// The tables in which these servers have these standings and weights.
    pub(super) fn new(version: u64, plan: &Plan, servers: &[(Standing, u32)]) -> Rc<Tables> {
        let forward = match plan.forward {
            Forward::Network => "network",
            Forward::Direct => "direct",
        };
        let answer = if plan.balancer_answers { "balancer" } else { "server" };
        let mut text = format!(
            "role = \"balancer\"\nvips = [\"{}\", \"{}\"]\nforward = \"{forward}\"\nanswer = \"{answer}\"\n\
             [[service]]\nname = \"web\"\nredirect_port = {REDIRECT_PORT}\npolicy = \"{}\"\n",
            vip(true),
            vip(false),
            plan.policy,
        );
        let mut order = Vec::new();
        for (index, (standing, weight)) in servers.iter().enumerate() {
            let state = match standing {
                Standing::Absent => continue,
                Standing::Up => "up",
                Standing::Drained => "drain",
            };
            order.push(index);
            let (v4, v6) = (ServerPlan::address(index, true), ServerPlan::address(index, false));
            let port = ServerPlan::service_port(index);
            // Text of known form into a string: neither can fail.
            let _ = write!(
                text,
                "[[server]]\nname = \"s{index}\"\naddress = [\"{v4}\", \"{v6}\"]\nweight = {weight}\n\
                 state = \"{state}\"\nports = {{ web = {port} }}\n"
            );
            if plan.forward == Forward::Direct {
                let _ = writeln!(text, "device = \"d{index}\"");
            }
        }
        let config = Config::parse(&Source::new("world.toml", text)).expect("a configuration of known form");
        Rc::new(Tables { version, config, order })
    }
}

struct Node {
    balancer: Balancer,
    memory: Memory,
    tables: Rc<Tables>,
    /// Since when it is away.
    down: Option<Instant>,
}

/// Where a packet goes on.
pub(super) enum Onward {
    /// To a server, by its index.
    Server(usize, Packet),
    /// By its destination address.
    Routed(Packet),
}

/// All balancers of a world.
pub(super) struct Balancers {
    nodes: Vec<Node>,
    spray: bool,
    /// Decides, with a flow's addresses and ports, which balancer gets its packets.
    salt: u64,
    rng: Rng,
    keys: Rng,
    same_key: bool,
    pub(super) dropped: u64,
}

impl Balancers {
    pub(super) fn new(plan: &Plan, tables: &Rc<Tables>, mut rng: Rng) -> Balancers {
        let keys = rng.fork();
        let mut balancers = Balancers {
            nodes: Vec::new(),
            spray: plan.spray,
            salt: rng.u64(..),
            rng,
            keys,
            same_key: plan.same_key,
            dropped: 0,
        };
        for _ in 0..plan.balancers {
            let node = balancers.node(tables);
            balancers.nodes.push(node);
        }
        balancers
    }

    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    fn node(&mut self, tables: &Rc<Tables>) -> Node {
        let key = if self.same_key { [7; 16] } else { self.keys.u128(..).to_be_bytes() };
        let balancer = Balancer::new(&tables.config, SelectKey(key));
        let memory = Memory::new(&balancer);
        Node { balancer, memory, tables: Rc::clone(tables), down: None }
    }

    /// Shares flows among the balancers in another way.
    pub(super) fn reshuffle(&mut self) {
        self.salt = self.rng.u64(..);
    }

    pub(super) fn stop(&mut self, index: usize, now: Instant) {
        self.nodes[index].down.get_or_insert(now);
    }

    /// Comes back without any memory.
    pub(super) fn start(&mut self, index: usize, tables: &Rc<Tables>) {
        self.nodes[index] = self.node(tables);
    }

    /// Takes other tables over, as after SIGHUP, unless it has later ones.
    pub(super) fn reload(&mut self, index: usize, tables: &Rc<Tables>) {
        let node = &mut self.nodes[index];
        if tables.version <= node.tables.version {
            return;
        }
        let next = node.balancer.successor(&tables.config);
        node.memory.follow(&node.balancer, &next);
        (node.balancer, node.tables) = (next, Rc::clone(tables));
    }

    /// Who gets a packet; `None`: somebody who is away, and of whom routers do not know that yet.
    fn pick(&mut self, now: Instant, packet: &Packet) -> Option<usize> {
        let choice = if self.spray {
            self.rng.u64(..)
        } else {
            let mut hasher = SipHasher13::new_with_keys(self.salt, 0);
            let ends: [Option<SocketAddr>; 2] = [packet.source_socket(), packet.destination_socket()];
            std::hash::Hash::hash(&ends, &mut hasher);
            hasher.finish()
        };
        let knows = |node: &Node| node.down.is_none_or(|since| now.since(since) < DETECTION);
        let known: Vec<usize> =
            self.nodes.iter().enumerate().filter(|(_, node)| knows(node)).map(|(index, _)| index).collect();
        let index = *known.get((choice % known.len().max(1) as u64) as usize)?;
        self.nodes[index].down.is_none().then_some(index)
    }

    /// Hands a packet to one of them.
    pub(super) fn handle(&mut self, now: Instant, mut packet: Packet) -> Result<Option<Onward>, Violation> {
        let Some(index) = self.pick(now, &packet) else {
            self.dropped += 1;
            return Ok(None);
        };
        let before = checksums_ok(&packet);
        let node = &mut self.nodes[index];
        node.balancer.advance(now);
        let Ok(output) = node.balancer.handle(&mut node.memory, now, &mut packet) else {
            self.dropped += 1;
            return Ok(None);
        };
        let after = checksums_ok(&packet);
        if before != after {
            return Err(Violation::Checksum { host: format!("balancer {index}"), now: after, before });
        }
        Ok(Some(match output {
            Output::Server(server) => Onward::Server(node.tables.order[server.index()], packet),
            Output::Main => Onward::Routed(packet),
        }))
    }
}
