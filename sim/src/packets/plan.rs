//! What a world is made of, and what happens to it: drawn from its seed before it begins.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use serde::Serialize;
use shunt_stack::endpoint::{CloseBy, MoveAt};
use shunt_stack::redirect::{Continuation, OnRedirect};
use shunt_stack::time::Instant;

use super::link::Quality;

/// What has no form of its own in JSON is told as the code has it.
fn words<T: std::fmt::Debug, S: serde::Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{value:?}"))
}

/// What goes wrong in a world.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Scenario {
    /// Nothing.
    Clean,
    /// Links lose, repeat, delay and damage packets.
    Loss,
    /// Clients behind translators and stateful firewalls, which forget.
    Nat,
    /// Boxes that strip, echo or drop the option, or rewrite sequence numbers.
    Middlebox,
    /// Balancers that share the traffic anew all the time, and restart.
    Ecmp,
    /// Servers that are added, drained, removed and weighted otherwise.
    Tables,
    /// Restarts of shims, agents and balancers.
    Restarts,
    /// Servers that ask their clients to go on elsewhere.
    Moves,
    /// Clocks that jump.
    Clocks,
    /// Servers that die.
    Deaths,
    /// Somebody off the path who forges redirects, confirmations and resets.
    Forgery,
    /// All of it.
    Chaos,
}

impl Scenario {
    /// All of them.
    pub const ALL: [Scenario; 12] = [
        Scenario::Clean,
        Scenario::Loss,
        Scenario::Nat,
        Scenario::Middlebox,
        Scenario::Ecmp,
        Scenario::Tables,
        Scenario::Restarts,
        Scenario::Moves,
        Scenario::Clocks,
        Scenario::Deaths,
        Scenario::Forgery,
        Scenario::Chaos,
    ];

    /// Its name in arguments and reports.
    pub fn name(self) -> &'static str {
        match self {
            Scenario::Clean => "clean",
            Scenario::Loss => "loss",
            Scenario::Nat => "nat",
            Scenario::Middlebox => "middlebox",
            Scenario::Ecmp => "ecmp",
            Scenario::Tables => "tables",
            Scenario::Restarts => "restarts",
            Scenario::Moves => "moves",
            Scenario::Clocks => "clocks",
            Scenario::Deaths => "deaths",
            Scenario::Forgery => "forgery",
            Scenario::Chaos => "chaos",
        }
    }
}

impl std::fmt::Display for Scenario {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The redirect port of the only service.
pub(super) const REDIRECT_PORT: u16 = 443;

/// What a world is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// All that is random follows from it.
    pub seed: u64,
    /// What goes wrong; by the seed if it is not given.
    pub scenario: Option<Scenario>,
    /// How many streams; by the seed, a few, if it is not given.
    pub flows: Option<usize>,
    /// Over how many seconds of virtual time the streams begin; by the seed if it is not given.
    pub seconds: Option<u64>,
}

impl Options {
    /// A small world.
    pub fn small(seed: u64, scenario: Option<Scenario>) -> Options {
        Options { seed, scenario, flows: None, seconds: None }
    }
}

/// Where the redirection of a machine happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The endpoint: smoltcp and the redirect machine in one.
    Endpoint,
    /// A TCP that knows nothing of redirection, and a shim or an agent beside it.
    Beside,
}

/// A translator between a client and everybody else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct NatPlan {
    /// Draws another port for every connection instead of keeping the client's.
    pub random_ports: bool,
    /// Lets nothing pass but SYNs and what belongs to a connection it knows.
    pub strict: bool,
}

/// A box between a client and everybody else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Middlebox {
    /// Takes the option away, both ways.
    Strip,
    /// Puts the option of a SYN on its SYN-ACK.
    Echo,
    /// Drops SYNs with the option.
    DropSyns,
    /// Drops every segment with the option.
    DropAll,
    /// Shifts the sequence numbers of connections whose SYN it has seen.
    Resequence,
}

/// One machine with clients.
#[derive(Debug, Clone, Serialize)]
pub struct ClientPlan {
    /// Endpoint, or a TCP with a shim.
    pub kind: Kind,
    /// Whether it speaks IPv4.
    pub v4: bool,
    /// How its connections continue.
    #[serde(serialize_with = "words")]
    pub continuation: Continuation,
    /// What it does when a server asks it to go elsewhere.
    #[serde(serialize_with = "words")]
    pub on_redirect: OnRedirect,
    /// Where its streams may be cut.
    #[serde(serialize_with = "words")]
    pub move_at: MoveAt,
    /// How its old parts are closed.
    #[serde(serialize_with = "words")]
    pub close_by: CloseBy,
    /// Bytes of each buffer.
    pub buffer: usize,
    /// The MTU of its link.
    pub mtu: usize,
    /// Towards the network.
    pub up: Quality,
    /// From the network.
    pub down: Quality,
    /// The translator before it.
    pub nat: Option<NatPlan>,
    /// The box before it.
    pub middlebox: Option<Middlebox>,
}

impl ClientPlan {
    /// Its own address.
    pub(super) fn address(&self, index: usize) -> IpAddr {
        let n = index as u16;
        if self.v4 {
            Ipv4Addr::new(10, 64, (n >> 8) as u8, n as u8).into()
        } else {
            Ipv6Addr::new(0xfd00, 0x64, 0, 0, 0, 0, 0, n).into()
        }
    }

    /// The address that everybody else knows.
    pub(super) fn public(&self, index: usize) -> IpAddr {
        let n = index as u16;
        match (self.nat, self.v4) {
            (None, _) => self.address(index),
            (Some(_), true) => Ipv4Addr::new(198, 51, 100 + (n >> 8) as u8, n as u8).into(),
            (Some(_), false) => Ipv6Addr::new(0x2001, 0xdb8, 0x64, 0, 0, 0, 0, n).into(),
        }
    }
}

/// The VIP of a family.
pub(super) fn vip(v4: bool) -> IpAddr {
    if v4 {
        Ipv4Addr::new(203, 0, 113, 10).into()
    } else {
        Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x10).into()
    }
}

/// One server.
#[derive(Debug, Clone, Serialize)]
pub struct ServerPlan {
    /// Endpoint, or a TCP with an agent.
    pub kind: Kind,
    /// Its share.
    pub weight: u32,
    /// Whether it is there from the beginning.
    pub present: bool,
    /// Bytes of each buffer.
    pub buffer: usize,
    /// From the balancers.
    pub up: Quality,
    /// To the clients.
    pub down: Quality,
}

impl ServerPlan {
    /// Its own address of a family.
    pub(super) fn address(index: usize, v4: bool) -> IpAddr {
        let n = index as u16 + 1;
        if v4 {
            Ipv4Addr::new(10, 0, (n >> 8) as u8, n as u8).into()
        } else {
            Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, n).into()
        }
    }

    /// Its service port.
    pub(super) fn service_port(index: usize) -> u16 {
        41_001 + index as u16
    }
}

/// A request and its answer, bytes each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Exchange {
    /// The request's body.
    pub request: u32,
    /// The answer's body.
    pub answer: u32,
}

/// How a client's program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum End {
    /// It closes, and reads to the end.
    Close,
    /// It drops the stream after so many answers, whatever is under way.
    Abandon {
        /// Answers read.
        after: u32,
    },
}

/// One stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FlowPlan {
    /// Whose.
    pub client: usize,
    /// When it connects.
    #[serde(serialize_with = "words")]
    pub start: Instant,
    /// What it asks.
    pub exchanges: Vec<Exchange>,
    /// How many requests may be unanswered at a time.
    pub window: u32,
    /// Between two requests, at least.
    pub pause: Duration,
    /// After 4 KiB read.
    pub rest: Duration,
    /// It ends its half only after the last answer.
    pub late_end: bool,
    /// How it ends.
    pub end: End,
}

/// Something that is done to the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Deed {
    /// A server appears in the tables.
    Add(usize),
    /// A server takes no new connections; as soon as it has none it leaves the tables.
    Drain(usize),
    /// A server's share changes.
    Weigh(usize, u32),
    /// A server is gone without a word; the tables hear of it so many seconds later.
    Kill(usize, u64),
    /// A balancer is away for so many milliseconds, and comes back without any memory.
    RestartBalancer(usize, u64),
    /// Flows are shared among the balancers in another way.
    Reshuffle,
    /// A client's shim is away for so many milliseconds.
    RestartShim(usize, u64),
    /// A server's agent is away for so many milliseconds.
    RestartAgent(usize, u64),
    /// A client's translator forgets everything.
    Rebind(usize),
    /// A server asks all its clients to go to another one.
    Move(usize, usize),
    /// A client's clock jumps by so many milliseconds.
    JumpClient(usize, i64),
    /// A server's clock.
    JumpServer(usize, i64),
}

/// How packets reach servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Forward {
    /// The balancer rewrites the destination, and what comes back.
    Network,
    /// Servers have the VIP and answer straight to clients.
    Direct,
}

/// A whole world and its future.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// What it was drawn from.
    pub seed: u64,
    /// What goes wrong.
    pub scenario: Scenario,
    /// How packets reach servers.
    pub forward: Forward,
    /// Whether balancers answer clients.
    pub balancer_answers: bool,
    /// The policy's name.
    pub policy: &'static str,
    /// How many balancers.
    pub balancers: usize,
    /// Whether all balancers choose alike.
    pub same_key: bool,
    /// Whether each packet goes to any balancer, instead of each flow.
    pub spray: bool,
    /// The servers, those that come later among them.
    pub servers: Vec<ServerPlan>,
    /// The clients' machines.
    pub clients: Vec<ClientPlan>,
    /// The streams.
    pub flows: Vec<FlowPlan>,
    /// What is done, and when.
    #[serde(serialize_with = "words")]
    pub deeds: Vec<(Instant, Deed)>,
}
