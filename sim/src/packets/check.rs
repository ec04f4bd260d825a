//! What must hold, and what was seen of every stream.

use std::collections::BTreeMap;

use serde::Serialize;
use shunt_stack::endpoint::ConnectionError;
use shunt_stack::time::Instant;
use shunt_stack::wire::checksum::Sum;
use shunt_stack::wire::{Packet, Version};
use thiserror::Error;

use super::plan::FlowPlan;

/// Something that must never happen.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Violation {
    /// Bytes that nobody wrote there.
    #[error("{who} reads bytes of flow {flow:?} that are no record of it: {what}")]
    Foreign {
        /// Who reads.
        who: String,
        /// Whose stream it is, if that is known.
        flow: Option<u32>,
        /// What is wrong with them.
        what: String,
    },
    /// A stream broke although nothing had happened that may break one.
    #[error("flow {flow} broke: {error} (redirected to {redirected:?}, {answered} of {requests} answers)")]
    Broken {
        /// The stream.
        flow: u32,
        /// What its program was told.
        error: String,
        /// Its service port.
        redirected: Option<u16>,
        /// Whole answers that came.
        answered: u32,
        /// Requests in all.
        requests: u32,
    },
    /// Neither an end nor an error.
    #[error("flow {flow} is stuck after {answered} of {requests} answers")]
    Stuck {
        /// The stream.
        flow: u32,
        /// Whole answers that came.
        answered: u32,
        /// Requests in all.
        requests: u32,
    },
    /// Something is left when all is over.
    #[error("{host} still holds {what} after the end of all streams")]
    Leak {
        /// The machine.
        host: String,
        /// What it holds.
        what: String,
    },
    /// A packet longer than the MTU (W3).
    #[error("{host} sends {length} bytes over an MTU of {mtu}")]
    TooLong {
        /// Who sends it.
        host: String,
        /// Its length.
        length: usize,
        /// The MTU.
        mtu: usize,
    },
    /// A wrong checksum that was right before, or the other way round.
    #[error("{host} sends a packet whose checksums are {now}, and were {before}")]
    Checksum {
        /// Who sends it.
        host: String,
        /// Whether they are right.
        now: bool,
        /// Whether those of the packet it was made of were; a packet of its own must be right.
        before: bool,
    },
    /// A packet that nobody could send.
    #[error("{host} sends what is no packet: {what}")]
    Malformed {
        /// Who sends it.
        host: String,
        /// What is wrong.
        what: String,
    },
    /// A client has obeyed what was forged.
    #[error("a client sends to port {port}, which only a forger has named")]
    Misled {
        /// The port.
        port: u16,
    },
    /// The world does not come to rest.
    #[error("{events} events, and no end")]
    Endless {
        /// Events so far.
        events: u64,
    },
    /// The core panicked.
    #[error("panic: {0}")]
    Panic(String),
}

/// Whether the IPv4 header checksum is right: routers and kernels drop packets in which it is not. IPv6 has none.
pub(super) fn header_ok(packet: &Packet) -> bool {
    match packet.version() {
        Version::V4 => Sum::new().add(&packet.bytes()[..packet.transport_offset()]).fold() == 0xffff,
        Version::V6 => true,
    }
}

/// Whether all checksums of a packet are right.
pub(super) fn checksums_ok(packet: &Packet) -> bool {
    header_ok(packet) && packet.checksum_ok()
}

/// How a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Everything came, in order, and then the end.
    Whole,
    /// An error, which something explains.
    Broken,
    /// Its program dropped it, as planned.
    Abandoned,
}

/// One of a server's connections.
pub(super) type ServerConnection = (u16, u16);

/// What is known of one stream.
#[derive(Debug, Default)]
pub(super) struct FlowState {
    pub(super) requests: u32,
    /// Which connection heard each request.
    heard: Vec<Option<ServerConnection>>,
    pub(super) answered: u32,
    pub(super) begun: bool,
    pub(super) outcome: Option<Outcome>,
    /// Something has happened that may break any stream.
    pub(super) excused: bool,
    /// Something has happened that may break a stream that is not redirected.
    pub(super) excused_if_plain: bool,
    /// The last connection that heard it.
    pub(super) last: Option<ServerConnection>,
    /// How many connections it has had.
    pub(super) connections: u32,
}

/// All streams, as seen from above.
#[derive(Debug)]
pub(super) struct Ledger {
    pub(super) flows: Vec<FlowState>,
    connections: BTreeMap<ServerConnection, u32>,
    plans: Vec<FlowPlan>,
    pub(super) unfinished: usize,
    /// Errors that only a failed handover explains (C10), by client.
    pub(super) unexplained: BTreeMap<usize, Vec<Violation>>,
    /// Streams that ended on a service port.
    pub(super) redirected: u64,
}

impl Ledger {
    pub(super) fn new(plans: Vec<FlowPlan>) -> Ledger {
        let flows = plans.iter().map(|plan| FlowState {
            requests: plan.exchanges.len() as u32,
            heard: vec![None; plan.exchanges.len()],
            ..FlowState::default()
        });
        Ledger {
            flows: flows.collect(),
            connections: BTreeMap::new(),
            unfinished: plans.len(),
            plans,
            unexplained: BTreeMap::new(),
            redirected: 0,
        }
    }

    pub(super) fn plan(&self, flow: u32) -> Option<&FlowPlan> {
        self.plans.get(flow as usize)
    }

    /// A request that a server's connection heard; gives back the length of the answer.
    pub(super) fn heard(
        &mut self,
        connection: ServerConnection,
        flow: u32,
        number: u32,
        length: u32,
    ) -> Result<u32, String> {
        let known = *self.connections.entry(connection).or_insert(flow);
        if known != flow {
            return Err(format!("the connection is flow {known}'s, a request is flow {flow}'s"));
        }
        let exchange = self.plans.get(flow as usize).and_then(|plan| plan.exchanges.get(number as usize));
        let exchange = *exchange.filter(|exchange| exchange.request == length).ok_or("no such request")?;
        let state = &mut self.flows[flow as usize];
        if state.heard[number as usize].replace(connection).is_some() {
            return Err(format!("request {number} has been heard before"));
        }
        if number > 0
            && state.last == Some(connection)
            && state.heard[number as usize - 1] != Some(connection)
        {
            return Err(format!("request {number} without the one before it"));
        }
        if state.last != Some(connection) {
            state.connections += 1;
        }
        state.last = Some(connection);
        Ok(exchange.answer)
    }

    /// An answer that a client has read.
    pub(super) fn answered(
        &mut self,
        flow: u32,
        number: u32,
        by: ServerConnection,
        length: u32,
    ) -> Result<(), String> {
        let state = &mut self.flows[flow as usize];
        if number != state.answered {
            return Err(format!("answer {number} where {} should come", state.answered));
        }
        let exchange = self.plans[flow as usize].exchanges.get(number as usize);
        if exchange.is_none_or(|exchange| exchange.answer != length) {
            return Err(format!("answer {number} of {length} bytes, which nobody asked for"));
        }
        if state.heard[number as usize] != Some(by) {
            return Err(format!("answer {number} by {by:?}, which did not hear the request"));
        }
        state.answered += 1;
        Ok(())
    }

    /// A stream has ended; `error` is what its program was told, `redirected` the service port it was on.
    pub(super) fn ended(
        &mut self,
        flow: u32,
        error: Option<ConnectionError>,
        redirected: Option<u16>,
        abandoned: bool,
    ) {
        let client = self.plans[flow as usize].client;
        let state = &mut self.flows[flow as usize];
        if state.outcome.is_some() {
            return;
        }
        self.unfinished -= 1;
        self.redirected += u64::from(redirected.is_some());
        state.outcome = Some(match error {
            None if abandoned => Outcome::Abandoned,
            None => Outcome::Whole,
            Some(_) => Outcome::Broken,
        });
        let Some(error) = error else { return };
        if !(state.excused || state.excused_if_plain && redirected.is_none()) {
            let violation = Violation::Broken {
                flow,
                error: error.to_string(),
                redirected,
                answered: state.answered,
                requests: state.requests,
            };
            self.unexplained.entry(client).or_default().push(violation);
        }
    }

    /// Whether a stream may end within a record: its program has dropped it, or given up. Of a stream that has said
    /// nothing yet nobody knows whose it is.
    pub(super) fn may_end_early(&self, flow: Option<u32>) -> bool {
        let given_up =
            |state: &FlowState| matches!(state.outcome, Some(Outcome::Abandoned | Outcome::Broken));
        match flow {
            Some(flow) => given_up(&self.flows[flow as usize]),
            None => self.flows.iter().any(given_up),
        }
    }

    /// Explains later errors of the streams under way for which `of` holds: of all, or of plain ones only.
    pub(super) fn excuse(&mut self, plain_only: bool, of: impl Fn(u32, &FlowPlan, &FlowState) -> bool) {
        for (flow, (plan, state)) in self.plans.iter().zip(&mut self.flows).enumerate() {
            if state.begun && state.outcome.is_none() && of(flow as u32, plan, state) {
                state.excused |= !plain_only;
                state.excused_if_plain |= plain_only;
            }
        }
    }

    /// The first error of a client's that neither a failed handover (C10) nor a connect that fell back to plain
    /// explains: its SYN with R may have left a server behind whose SYN-ACK, when it is repeated, looks like the answer
    /// to the plain one (C2), and whose client meets another server.
    pub(super) fn unexplained(
        &self,
        client: usize,
        handovers_failed: u64,
        fallbacks: u64,
    ) -> Option<&Violation> {
        let (mut handovers, mut fallbacks) = (handovers_failed, fallbacks);
        self.unexplained.get(&client)?.iter().find(|error| {
            let plain = matches!(error, Violation::Broken { redirected: None, answered: 0, .. });
            let left = if plain && fallbacks > 0 { &mut fallbacks } else { &mut handovers };
            let explained = *left > 0;
            *left = left.saturating_sub(1);
            !explained
        })
    }

    pub(super) fn count(&self, outcome: Outcome) -> u64 {
        self.flows.iter().filter(|state| state.outcome == Some(outcome)).count() as u64
    }

    /// Whether something explains that a stream never ends.
    pub(super) fn may_be_stuck(&self, flow: u32) -> bool {
        let state = &self.flows[flow as usize];
        state.excused || state.excused_if_plain
    }

    /// A stream that nothing was heard of for too long.
    pub(super) fn stuck(&self, flow: u32) -> Violation {
        let state = &self.flows[flow as usize];
        Violation::Stuck { flow, answered: state.answered, requests: state.requests }
    }

    /// When the last stream begins.
    pub(super) fn last_start(&self) -> Instant {
        self.plans.iter().map(|plan| plan.start).max().unwrap_or_default()
    }
}
