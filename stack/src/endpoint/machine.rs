//! The redirect machine under an endpoint, whichever end it is.

use crate::redirect::reply::{self, Limiter};
use crate::redirect::{Action, Client, NumbersOf, Server, Transmit};
use crate::time::Instant;
use crate::wire::Packet;

/// RSTs in answer to strays that a client sends, at most in a second (`S8` for the other end).
const RESETS_PER_SECOND: u32 = 100;

pub(super) enum Machine {
    Client { client: Box<Client>, resets: Limiter },
    Server(Box<Server>),
}

impl Machine {
    pub(super) fn client(client: Client) -> Machine {
        Machine::Client { client: Box::new(client), resets: Limiter::new(RESETS_PER_SECOND) }
    }

    pub(super) fn handle_local(&mut self, now: Instant, packet: &mut Packet) -> Action {
        match self {
            Machine::Client { client, .. } => client.handle_local(now, packet),
            Machine::Server(server) => server.handle_local(now, packet),
        }
    }

    pub(super) fn handle_remote(
        &mut self,
        now: Instant,
        packet: &mut Packet,
        numbers: NumbersOf<'_>,
    ) -> Action {
        match self {
            Machine::Client { client, .. } => client.handle_remote_knowing(now, packet, numbers),
            Machine::Server(server) => server.handle_remote_knowing(now, packet, numbers),
        }
    }

    pub(super) fn poll_transmit(&mut self, now: Instant) -> Option<Transmit> {
        match self {
            Machine::Client { client, .. } => client.poll_transmit(now),
            Machine::Server(server) => server.poll_transmit(now),
        }
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        match self {
            Machine::Client { client, .. } => client.poll_timeout(),
            Machine::Server(server) => server.poll_timeout(),
        }
    }

    /// The RST to a segment without a connection, unless there were too many (`S8`).
    pub(super) fn reset(&mut self, now: Instant, segment: &Packet) -> Option<Packet> {
        match self {
            Machine::Server(server) => server.reset(now, segment),
            Machine::Client { resets, .. } => reply::reset(segment).filter(|_| resets.take(now)),
        }
    }
}
