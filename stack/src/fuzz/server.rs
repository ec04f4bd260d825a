//! Target `server`: [`Server`] between a network and a TCP that send anything at any time.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::draw::{CLIENT_PORTS, Draw, Ends, MAX_STEPS, PORTS, vip};
use super::invariants::{Snapshot, parses, same, well_made};
use crate::redirect::{
    Action, ConnectionNumbers, Require, Server, ServerConfig, ServerCounters, ServicePorts, TokenKeys,
    TokenPolicy, Towards,
};
use crate::time::Instant;
use crate::wire::{DEFAULT_EXID, Packet, SeqNumber};

const MTUS: [usize; 4] = [1500, 1280, 96, 65_535];

/// Two bytes of configuration, then steps of one byte each and what they need: segments of either side, ICMP errors
/// about what was sent, time, what listens, what goes elsewhere, reloads, replies that a TCP owes; redirects of
/// connections (§4), and clients that change their port (§5).
///
/// # Panics
/// If the half-open table outgrows its bound, a right checksum becomes wrong, a packet larger than the MTU, what is
/// sent does not parse, a deadline stays in the past, a packet gets more than one answer, or a segment that is neither
/// SYN nor SYN-ACK is changed otherwise than by the option and the client's port, and those only once somebody asked.
pub fn server(data: &[u8]) {
    let _ = run(data);
}

/// As [`server`]; says what the machine counted.
pub(super) fn run(data: &[u8]) -> ServerCounters {
    let mut draw = Draw::new(data);
    let mut world = World::new(&mut draw);
    for _ in 0..MAX_STEPS {
        if draw.done() {
            break;
        }
        world.step(&mut draw);
        world.settle();
    }
    world.end();
    *world.server.counters()
}

/// Two redirect ports with service ports of their own, and a port served under its own number.
fn services() -> Vec<ServicePorts> {
    let pairs = [(PORTS[0], PORTS[2]), (PORTS[1], PORTS[3]), (PORTS[4], PORTS[4])];
    [(true, 0), (true, 1), (false, 0)]
        .iter()
        .flat_map(|(v4, index)| {
            pairs.map(|(redirect_port, service_port)| ServicePorts {
                address: vip(*v4, *index),
                redirect_port,
                service_port,
            })
        })
        .collect()
}

struct World {
    server: Server,
    services: Vec<ServicePorts>,
    half_open_limit: usize,
    mtu: usize,
    now: Instant,
    /// The latest packets towards the network.
    sent: Vec<Packet>,
    /// Whether any connection was to move, or any client could change its port.
    moving: bool,
    /// Whether the driver knows the local TCP's numbers.
    knowing: bool,
}

/// Where every connection stands, for a driver that knows.
const NUMBERS: ConnectionNumbers = ConnectionNumbers {
    snd_una: SeqNumber(9001),
    snd_nxt: SeqNumber(9001),
    max_window: 65_535,
    rcv_nxt: SeqNumber(1001),
    window: 100,
    timestamps: None,
};
/// The most packets that a step may make the machine send: of timers of all connections that there can be.
const MAX_BURST: usize = 4096;

/// No tokens; made only; demanded under load; always.
fn tokens(choice: u8) -> TokenPolicy {
    let keys = TokenKeys::parse("0 000102030405060708090a0b0c0d0e0f").ok().map(Arc::new);
    let require = [Require::Never, Require::Never, Require::UnderLoad, Require::Always][usize::from(choice)];
    TokenPolicy { keys: keys.filter(|_| choice > 0), require, under_load: 2, trusted: Vec::new() }
}

impl World {
    fn new(draw: &mut Draw<'_>) -> World {
        let [first, second] = [draw.byte(), draw.byte()];
        let half_open_limit = 1 + usize::from(first & 7);
        let mtu = MTUS[usize::from(second & 3)];
        let services = services();
        let config = ServerConfig {
            services: services.clone(),
            half_open_limit,
            mtu,
            replies_per_second: u32::from(first >> 3),
            tokens: tokens(second >> 3 & 3),
            ..Default::default()
        };
        let now = Instant::from_millis(1000);
        World {
            server: Server::new(config),
            services,
            half_open_limit,
            mtu,
            now,
            sent: Vec::new(),
            moving: false,
            knowing: second & 4 != 0,
        }
    }

    fn step(&mut self, draw: &mut Draw<'_>) {
        let step = draw.byte();
        if step & 0xf0 == 0x10 {
            self.move_step(step, draw);
            return;
        }
        match step & 15 {
            0..=3 => {
                if let Some((_, packet)) = draw.segment(true) {
                    self.remote(packet);
                }
            }
            4..=6 => {
                if let Some((_, packet)) = draw.segment(false) {
                    self.local(packet);
                }
            }
            7 => self.now += draw.wait(),
            8 => self.icmp(draw),
            9 => {
                if let Some(packet) = draw.raw() {
                    self.remote(packet);
                }
            }
            10 => {
                if let Some(packet) = draw.raw() {
                    self.local(packet);
                }
            }
            11 => {
                let Ends { vip, .. } = draw.ends();
                let listening = draw.byte() & 1 != 0;
                self.server.set_listening(vip, listening);
            }
            12 => {
                let Ends { vip, .. } = draw.ends();
                let port = PORTS.get(usize::from(draw.byte() & 15)).copied();
                self.server.set_elsewhere(vip, port);
            }
            13 => self.reload(draw.byte()),
            14 => self.owed(draw),
            // Clocks jump back as well.
            _ => {
                let back = u64::from(draw.byte()) * 16_000;
                self.now = Instant::from_micros(self.now.micros().saturating_sub(back));
            }
        }
    }

    /// What a driver asks of the machine beyond handshakes.
    fn move_step(&mut self, step: u8, draw: &mut Draw<'_>) {
        let Ends { client, vip } = draw.ends();
        match step & 3 {
            0 | 1 => {
                let to = SocketAddr::new(vip.ip(), PORTS[usize::from(draw.byte() & 7)]);
                let numbers = (step & 1 != 0).then_some(NUMBERS);
                let begun = self.server.redirect_connection(self.now, client, vip, to, numbers).is_ok();
                assert!(!begun || to != vip, "a redirect to where it is");
                self.moving |= begun;
            }
            2 => {
                self.server.cancel_redirect(client, vip);
            }
            _ => self.server.forget_connection(client, vip),
        }
    }

    fn remote(&mut self, mut packet: Packet) {
        let snapshot = Snapshot::of(&packet);
        let knowing = self.knowing;
        let numbers =
            |_: SocketAddr, peer: SocketAddr| (knowing && peer.port() != CLIENT_PORTS[3]).then_some(NUMBERS);
        let refused = self.refused();
        let action = self.server.handle_remote_knowing(self.now, &mut packet, &numbers);
        if self.refused() > refused {
            let before = snapshot.before();
            assert!(before.tcp().is_some_and(|tcp| tcp.is_syn()), "{before:?} needs no token");
            assert_eq!((action, &packet), (Action::Drop, before));
            return;
        }
        self.moving |= self.server.counters().rebinds > 0;
        self.handled(&snapshot, &packet);
        if action == Action::Drop {
            let before = snapshot.before();
            let first = self.answer().expect("a SYN that is dropped was answered");
            assert_eq!(first.destination_socket(), before.source_socket());
            assert_eq!(first.source_socket(), before.destination_socket());
            assert!(snapshot.checksum_ok(), "an answer to a wrong checksum");
            // S2: from the SYN alone, so the same again.
            let mut again = before.clone();
            let _ = self.server.handle_remote(self.now, &mut again);
            // Another SYN may be one too many, though.
            let loaded = self.refused() > refused;
            assert_eq!(self.answer(), Some(first).filter(|_| !loaded));
        }
    }

    /// SYNs dropped for want of a good token.
    fn refused(&self) -> u64 {
        let counters = self.server.counters();
        counters.tokens_missing
            + counters.tokens_unknown_key
            + counters.tokens_expired
            + counters.tokens_mismatch
    }

    fn local(&mut self, mut packet: Packet) {
        let snapshot = Snapshot::of(&packet);
        let action = self.server.handle_local(self.now, &mut packet);
        assert_eq!(action, Action::Pass, "the local TCP's packets all pass");
        self.handled(&snapshot, &packet);
        self.keep(packet);
    }

    fn handled(&self, snapshot: &Snapshot, packet: &Packet) {
        snapshot.check(packet, self.mtu);
        let before = snapshot.before();
        let may_change =
            before.icmp().is_some() || before.tcp().is_some_and(|tcp| tcp.is_syn() || tcp.is_syn_ack());
        assert!(may_change || self.moving || packet == before, "{before:?} was changed to {packet:?}");
        let unmarked = before.tcp().is_some_and(|tcp| tcp.redirect(DEFAULT_EXID) == Ok(None));
        if let Some((source, destination)) = before.ports().filter(|_| !may_change && unmarked) {
            // The option and the client's port apart it is what it was.
            let mut restored = packet.clone();
            restored.strip_redirect(DEFAULT_EXID);
            restored.set_source_port(source);
            restored.set_destination_port(destination);
            assert!(same(&restored, before), "{before:?} was changed to {packet:?}");
        }
        assert_eq!((packet.source(), packet.destination()), (before.source(), before.destination()));
    }

    /// What the machine sends of its own, one packet at the most.
    fn answer(&mut self) -> Option<Packet> {
        let transmit = self.server.poll_transmit(self.now)?;
        assert_eq!(self.server.poll_transmit(self.now), None, "a second answer");
        well_made(&transmit.packet);
        if transmit.towards == Towards::Network {
            assert!(transmit.packet.len() <= self.mtu);
            self.keep(transmit.packet.clone());
        }
        Some(transmit.packet)
    }

    fn icmp(&mut self, draw: &mut Draw<'_>) {
        let which = usize::from(draw.byte());
        let quoted = match self.sent.len() {
            0 => draw.segment(false).map(|(_, packet)| packet),
            length => self.sent.get(which % length).cloned(),
        };
        if let Some(error) = quoted.and_then(|quoted| draw.icmp(&quoted)) {
            self.remote(error);
        }
    }

    fn keep(&mut self, packet: Packet) {
        if self.sent.len() >= 8 {
            self.sent.remove(0);
        }
        self.sent.push(packet);
    }

    /// Another set of services: some of them, or all again.
    fn reload(&mut self, choice: u8) {
        let kept = |(at, service): (usize, &ServicePorts)| (choice >> (at % 8) & 1 == 0).then_some(*service);
        let services: Vec<ServicePorts> = self.services.iter().enumerate().filter_map(kept).collect();
        self.server.set_services(&services);
    }

    /// `S7`, `S8`: replies on behalf of a TCP.
    fn owed(&mut self, draw: &mut Draw<'_>) {
        let Some((_, segment)) = draw.segment(true) else { return };
        let timestamps = (draw.byte() & 1 != 0).then_some((1, 2));
        let (snd_nxt, rcv_nxt) = (SeqNumber(draw.double()), SeqNumber(1));
        let challenge = self.server.challenge_ack(self.now, &segment, snd_nxt, rcv_nxt, 100, timestamps);
        let reset = self.server.reset(self.now, &segment);
        for reply in challenge.iter().chain(&reset) {
            well_made(reply);
            parses(reply);
            assert_eq!(reply.destination_socket(), segment.source_socket());
            assert_eq!(reply.source_socket(), segment.destination_socket());
            assert!(segment.checksum_ok());
        }
    }

    /// Drains the machine, as a driver does after every step.
    fn settle(&mut self) {
        let mut burst = 0;
        while let Some(transmit) = self.server.poll_transmit(self.now) {
            burst += 1;
            assert!(burst <= MAX_BURST, "more than {MAX_BURST} packets of one step");
            well_made(&transmit.packet);
            assert!(transmit.packet.len() <= self.mtu.max(96) || transmit.towards == Towards::Local);
            if transmit.towards == Towards::Network {
                self.keep(transmit.packet);
            }
        }
        while self.server.poll_event().is_some() {}
        assert!(self.server.half_open_count() <= self.half_open_limit);
        assert!(self.server.poll_timeout().is_none_or(|at| at > self.now), "a deadline stays in the past");
    }

    /// A day later nothing is remembered of anybody.
    fn end(&mut self) {
        self.now += Duration::from_hours(24);
        self.settle();
        assert_eq!(self.server.redirection_count(), 0);
        assert_eq!((self.server.half_open_count(), self.server.poll_timeout()), (0, None));
    }
}
