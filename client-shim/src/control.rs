//! What a running shim or proxy can be asked (see [`shunt_host::control`] for the socket).

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use shunt_host::control::{self, Call, Reply};
use shunt_stack::endpoint::EndpointCounters;
use shunt_stack::redirect::{Client, ClientCounters, FlowRecord, PathState};

use crate::offload::{KernelCounters, Obstacle};
use crate::session::Session;
use crate::shim::{Shim, ShimCounters};

/// Flows told at the most.
const MAX_FLOWS: usize = 10_000;

#[derive(Debug, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
enum Request {
    /// VIPs and flows.
    Show {},
    /// The counters.
    Counters {
        /// As Prometheus reads them.
        #[serde(default)]
        prometheus: bool,
    },
}

/// The answer to `show`.
#[derive(Debug, Serialize)]
struct Show<'a> {
    role: &'static str,
    mode: &'static str,
    vips: Vec<VipShow>,
    /// Connections that the machine knows, or that the proxy carries, and the most there can be.
    connections: usize,
    most: usize,
    offload: OffloadShow<'a>,
    /// The redirected ones, the first [`MAX_FLOWS`]; none of a proxy, whose programs connect to it.
    flows: Vec<FlowRecord>,
}

/// What the kernel does by itself.
#[derive(Debug, Serialize)]
struct OffloadShow<'a> {
    /// Whether it may do anything.
    in_force: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    why_not: Option<&'a str>,
    /// Connections whose ports it exchanges, and packets that it has passed on.
    connections: usize,
    packets: u64,
}

impl<'a> OffloadShow<'a> {
    fn new(why_not: Option<&'a str>, kernel: &KernelCounters) -> Self {
        let packets = kernel.packets_out + kernel.packets_back;
        Self { in_force: why_not.is_none(), why_not, connections: kernel.connections, packets }
    }
}

#[derive(Debug, Serialize)]
struct VipShow {
    address: IpAddr,
    /// The interface it is reached by; none without a route.
    interface: Option<String>,
    gateway: Option<IpAddr>,
    /// What is known of the way; none of a proxy's.
    path: Option<&'static str>,
}

fn vips(session: &Session, path: impl Fn(IpAddr) -> Option<&'static str>) -> Vec<VipShow> {
    let show = |address| {
        let hop = session.paths().get(address).map(|path| &path.hop);
        VipShow {
            address,
            interface: hop.map(|hop| hop.interface.clone()),
            gateway: hop.and_then(|hop| hop.gateway),
            path: path(address),
        }
    };
    session.config().vips().map(show).collect()
}

fn told(state: PathState) -> &'static str {
    match state {
        PathState::Unknown => "unknown",
        PathState::Direct => "direct",
        PathState::Translated => "translated",
        PathState::Plain => "plain",
    }
}

fn counters(reply: Reply, prometheus: bool, counters: &impl Serialize) {
    if prometheus {
        let value = serde_json::to_value(counters);
        reply.end(value.map(|value| control::prometheus("shunt_client", &value)));
    } else {
        reply.done(counters);
    }
}

/// What a transparent shim can tell beside its machine.
pub(crate) struct ShimFacts {
    driver: ShimCounters,
    kernel: KernelCounters,
    why_not: Option<String>,
}

impl ShimFacts {
    pub(crate) async fn of(shim: &mut Shim) -> Self {
        let driver = shim.counters.clone();
        let kernel = shim.kernel();
        let why_not = kernel.obstacle().map(ToString::to_string);
        Self { driver, kernel: kernel.counters().await.clone(), why_not }
    }
}

/// Answers for the transparent shim.
pub(crate) fn answer(call: Call, session: &Session, client: &Client, facts: &ShimFacts) {
    #[derive(Serialize)]
    struct Counters<'a> {
        driver: &'a ShimCounters,
        kernel: &'a KernelCounters,
        machine: &'a ClientCounters,
    }
    let ShimFacts { driver, kernel, why_not } = facts;
    let Call { line, reply } = call;
    match control::parse(&line) {
        Ok(Request::Show {}) => reply.done(Show {
            role: "client",
            mode: "transparent",
            vips: vips(session, |vip| Some(told(client.path(vip)))),
            connections: client.flow_count(),
            most: session.config().client.max_flows,
            offload: OffloadShow::new(why_not.as_deref(), kernel),
            flows: client.flows().take(MAX_FLOWS).collect(),
        }),
        Ok(Request::Counters { prometheus }) => {
            counters(reply, prometheus, &Counters { driver, kernel, machine: client.counters() });
        }
        Err(reason) => reply.refuse(reason),
    }
}

/// What a proxy can tell.
pub(crate) struct ProxyFacts {
    pub(crate) connections: usize,
    pub(crate) most: usize,
    pub(crate) machine: ClientCounters,
    pub(crate) endpoint: EndpointCounters,
}

/// Answers for the proxy.
pub(crate) fn answer_proxy(call: Call, session: &Session, facts: &ProxyFacts) {
    #[derive(Serialize)]
    struct Counters<'a> {
        endpoint: &'a EndpointCounters,
        machine: &'a ClientCounters,
    }
    let Call { line, reply } = call;
    match control::parse(&line) {
        Ok(Request::Show {}) => reply.done(Show {
            role: "client",
            mode: "proxy",
            vips: vips(session, |_| None),
            connections: facts.connections,
            most: facts.most,
            offload: OffloadShow::new(Some(&Obstacle::Proxy.to_string()), &KernelCounters::default()),
            flows: Vec::new(),
        }),
        Ok(Request::Counters { prometheus }) => {
            counters(reply, prometheus, &Counters { endpoint: &facts.endpoint, machine: &facts.machine });
        }
        Err(reason) => reply.refuse(reason),
    }
}
