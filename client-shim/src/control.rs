//! What a running shim or proxy can be asked (see [`shunt_host::control`] for the socket).

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use shunt_host::control::{self, Call, Reply};
use shunt_stack::endpoint::EndpointCounters;
use shunt_stack::redirect::{Client, ClientCounters, FlowRecord, PathState};

use crate::session::Session;
use crate::shim::ShimCounters;

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
struct Show {
    role: &'static str,
    mode: &'static str,
    vips: Vec<VipShow>,
    /// Connections that the machine knows, or that the proxy carries, and the most there can be.
    connections: usize,
    most: usize,
    /// The redirected ones, the first [`MAX_FLOWS`]; none of a proxy, whose programs connect to it.
    flows: Vec<FlowRecord>,
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

/// Answers for the transparent shim.
pub(crate) fn answer(call: Call, session: &Session, client: &Client, driver: &ShimCounters) {
    #[derive(Serialize)]
    struct Counters<'a> {
        driver: &'a ShimCounters,
        machine: &'a ClientCounters,
    }
    let Call { line, reply } = call;
    match control::parse(&line) {
        Ok(Request::Show {}) => reply.done(Show {
            role: "client",
            mode: "transparent",
            vips: vips(session, |vip| Some(told(client.path(vip)))),
            connections: client.flow_count(),
            most: session.config().client.max_flows,
            flows: client.flows().take(MAX_FLOWS).collect(),
        }),
        Ok(Request::Counters { prometheus }) => {
            counters(reply, prometheus, &Counters { driver, machine: client.counters() });
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
            flows: Vec::new(),
        }),
        Ok(Request::Counters { prometheus }) => {
            counters(reply, prometheus, &Counters { endpoint: &facts.endpoint, machine: &facts.machine });
        }
        Err(reason) => reply.refuse(reason),
    }
}
