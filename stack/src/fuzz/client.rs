//! Target `client`: [`Client`] between a TCP and a network that send anything at any time.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::draw::{CLIENT_PORTS, Draw, Ends, MAX_STEPS, PORTS, vip};
use super::invariants::{Snapshot, parses, well_made};
use crate::redirect::{
    Action, Client, ClientConfig, ClientCounters, ClientEvent, Continuation, FlowRecord, OnRedirect, Towards,
    VipConfig,
};
use crate::time::Instant;
use crate::wire::{DEFAULT_EXID, Packet, Segment, TcpFlags, TcpOption, TcpView};

/// Packets that one step may make the machine send: each of the few flows may have a timer due.
const MAX_BURST: usize = 64;
const CONTINUATIONS: [Continuation; 4] =
    [Continuation::Auto, Continuation::Handover, Continuation::Reconnect, Continuation::Plain];
const ON_REDIRECT: [OnRedirect; 3] = [OnRedirect::Hint, OnRedirect::Follow, OnRedirect::Ignore];
const MTUS: [usize; 4] = [1500, 1280, 96, 65_535];

/// Two bytes of configuration, then steps of one byte each and what they need: segments of either side, ICMP errors
/// about what was sent, time, the end of sockets, changes of path, restarts; moves and changes of the own port.
///
/// # Panics
/// If the flow table outgrows its bound, a right checksum becomes wrong, a packet larger than the MTU, what is sent
/// does not parse, a deadline stays in the past, a flow leaks, a connection is asked to move twice, or `C1` or `C7` breaks.
pub fn client(data: &[u8]) {
    let _ = run(data);
}

/// As [`client`]; says what the machine counted, over all its restarts.
pub(super) fn run(data: &[u8]) -> Vec<ClientCounters> {
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
    world.counted.push(world.client.counters().clone());
    world.counted
}

struct World {
    config: ClientConfig,
    client: Client,
    now: Instant,
    /// Whether a packet with a wrong checksum was handed in: what is made of it may have one.
    tainted: bool,
    /// The largest packet handed in.
    largest: usize,
    /// The latest packets towards the network.
    sent: Vec<Packet>,
    counted: Vec<ClientCounters>,
    /// The VIPs and client ports that any segment named.
    named: BTreeSet<(IpAddr, u16)>,
}

impl World {
    fn new(draw: &mut Draw<'_>) -> World {
        let [first, second] = [draw.byte(), draw.byte()];
        let continuation = |index: u8| CONTINUATIONS[usize::from(first >> (2 * index) & 3)];
        let vips = [(true, 0), (true, 1), (false, 0), (false, 1)].map(|(v4, index)| VipConfig {
            address: vip(v4, index),
            continuation: continuation(index),
            on_redirect: ON_REDIRECT[usize::from(second >> 5) % ON_REDIRECT.len()],
        });
        let config = ClientConfig {
            vips: vips.to_vec(),
            denied_ports: vec![PORTS[5]],
            max_flows: 1 + usize::from(second & 7),
            mtu: MTUS[usize::from(second >> 3 & 3)],
            ..Default::default()
        };
        World {
            client: Client::new(config.clone()),
            config,
            now: Instant::from_millis(1000),
            tainted: false,
            largest: 0,
            sent: Vec::new(),
            counted: Vec::new(),
            named: BTreeSet::new(),
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
                if let Some((ends, packet)) = draw.segment(true) {
                    self.local(Some(ends), packet);
                }
            }
            4..=7 => {
                if let Some((ends, packet)) = draw.segment(false) {
                    self.remote(Some(ends), packet);
                }
            }
            8 => self.now += draw.wait(),
            9 => self.icmp(draw),
            10 => {
                if let Some(packet) = draw.raw() {
                    self.local(None, packet);
                }
            }
            11 => {
                if let Some(packet) = draw.raw() {
                    self.remote(None, packet);
                }
            }
            12 => self.retain(draw.byte()),
            13 => {
                let byte = draw.byte();
                self.client.set_path(vip(byte & 8 == 0, byte >> 2 & 1), u64::from(byte & 3));
            }
            14 => self.restart(),
            // Clocks jump back as well.
            _ => {
                let back = Duration::from_millis(u64::from(draw.byte()) * 16);
                let micros = u64::try_from(back.as_micros()).unwrap_or(u64::MAX);
                self.now = Instant::from_micros(self.now.micros().saturating_sub(micros));
            }
        }
    }

    /// What a driver that follows redirects, or wants another own port, asks of the machine (§4, §5).
    fn move_step(&mut self, step: u8, draw: &mut Draw<'_>) {
        let Ends { client: local, vip } = draw.ends();
        let port = CLIENT_PORTS[usize::from(draw.byte() & 3)];
        match step & 3 {
            0 => {
                let known = self.client.flow_count();
                let expected = self.client.expect_move(local, vip, SocketAddr::new(local.ip(), port));
                assert!(!expected || known > 0, "a move of nothing");
            }
            1 => self.client.close_moved(local, vip),
            2 => self.client.move_failed(local, vip, step & 4 != 0),
            _ => {
                if self.client.rebind(self.now, local, vip, port, None).is_ok() {
                    assert_ne!(port, local.port());
                }
            }
        }
    }

    fn record(&self, ends: Option<Ends>) -> Option<FlowRecord> {
        let ends = ends?;
        self.client.flows().find(|flow| (flow.local, flow.vip) == (ends.client, ends.vip))
    }

    fn local(&mut self, ends: Option<Ends>, mut packet: Packet) {
        let snapshot = self.admit(&packet);
        let record = self.record(ends);
        let action = self.client.handle_local(self.now, &mut packet);
        if snapshot.before().tcp().is_some_and(|tcp| tcp.is_syn() && !bare(&tcp)) {
            // C1: such a repeat may be replaced by an earlier SYN of the attempt.
            self.made(&packet);
        } else {
            snapshot.check(&packet, self.config.mtu);
        }
        if action == Action::Drop {
            return;
        }
        let opens = packet.tcp().is_some_and(|tcp| tcp.is_syn());
        if let Some(record) = record.filter(|_| !opens && packet.tcp().is_some()) {
            // C7: once redirected, nothing goes to X.
            assert_eq!(packet.ports().map(|(_, port)| port), Some(record.service_port), "{packet:?}");
        }
        self.on_wire(&packet, snapshot.before());
    }

    fn remote(&mut self, ends: Option<Ends>, mut packet: Packet) {
        let snapshot = self.admit(&packet);
        let moved = self.record(ends);
        let service =
            packet.source_socket().zip(packet.destination_socket()).filter(|_| packet.tcp().is_some());
        let flow = service.and_then(|(from, local)| {
            let of = |flow: &FlowRecord| {
                (flow.local, flow.vip.ip(), flow.service_port) == (local, from.ip(), from.port())
            };
            self.client.flows().find(of)
        });
        let action = self.client.handle_remote(self.now, &mut packet);
        snapshot.check(&packet, self.config.mtu);
        if action == Action::Drop {
            return;
        }
        // C4, C9: what comes from X is not of a connection that has moved; what comes from Y is shown as from X.
        if let Some(flow) = flow {
            assert_eq!(packet.source_socket(), Some(flow.vip));
        } else {
            assert!(moved.is_none() || packet.tcp().is_none(), "{packet:?} of a flow that has moved");
        }
    }

    fn icmp(&mut self, draw: &mut Draw<'_>) {
        let which = usize::from(draw.byte());
        let quoted = match self.sent.len() {
            0 => draw.segment(true).map(|(_, packet)| packet),
            length => self.sent.get(which % length).cloned(),
        };
        if let Some(error) = quoted.and_then(|quoted| draw.icmp(&quoted)) {
            self.remote(None, error);
        }
    }

    /// Notes a packet that is about to be handed in.
    fn admit(&mut self, packet: &Packet) -> Snapshot {
        let snapshot = Snapshot::of(packet);
        if let Some((one, other)) = packet.source_socket().zip(packet.destination_socket()) {
            self.named.extend([(one.ip(), other.port()), (other.ip(), one.port())]);
        }
        self.tainted |= !snapshot.checksum_ok();
        self.largest = self.largest.max(packet.len());
        snapshot
    }

    /// Keeps what left for the network; `C1` for what became of `before`.
    fn on_wire(&mut self, packet: &Packet, before: &Packet) {
        let asks = |packet: &Packet| {
            let option = packet.tcp().and_then(|tcp| tcp.redirect(DEFAULT_EXID).ok().flatten());
            option.is_some_and(|option| option.redirect) && packet.tcp().is_some_and(|tcp| tcp.is_syn())
        };
        if asks(packet) && !asks(before) {
            assert!(packet.tcp().is_some_and(|tcp| bare(&tcp)), "C1: R on {packet:?}");
        }
        self.keep(packet.clone());
    }

    fn keep(&mut self, packet: Packet) {
        if self.sent.len() >= 8 {
            self.sent.remove(0);
        }
        self.sent.push(packet);
    }

    /// Drains the machine, as a driver does after every step.
    fn settle(&mut self) {
        let mut burst = 0;
        while let Some(transmit) = self.client.poll_transmit(self.now) {
            burst += 1;
            assert!(burst <= MAX_BURST, "more than {MAX_BURST} packets of one step");
            let packet = transmit.packet;
            self.made(&packet);
            let vip = match transmit.towards {
                Towards::Network => packet.destination(),
                Towards::Local => packet.source(),
            };
            assert!(self.config.vips.iter().any(|config| config.address == vip), "{packet:?} of no VIP");
            if transmit.towards == Towards::Network {
                self.keep(packet);
            }
        }
        let mut asked = BTreeSet::new();
        while let Some(event) = self.client.poll_event() {
            if let ClientEvent::MoveAsked { local, vip, from, to }
            | ClientEvent::Hint { local, vip, from, to } = event
            {
                assert!(asked.insert((local, vip)), "asked twice in one step");
                assert_ne!(SocketAddr::new(vip.ip(), from), to, "a move to where it is");
                assert!(!self.config.denied_ports.contains(&to.port()), "C3: {to}");
                assert_eq!(to.ip(), vip.ip(), "§7 is off");
            }
        }
        assert!(self.client.flow_count() <= self.config.max_flows);
        assert!(self.client.flows().count() <= self.client.flow_count());
        assert!(self.client.poll_timeout().is_none_or(|at| at > self.now), "a deadline stays in the past");
    }

    /// A packet of the machine's own making, out of what it was handed.
    fn made(&self, packet: &Packet) {
        if self.tainted {
            parses(packet);
        } else {
            well_made(packet);
        }
        let most = self.config.mtu.max(self.largest);
        assert!(packet.len() <= most, "{} bytes sent, MTU {}", packet.len(), self.config.mtu);
    }

    /// Frees the flows of some client ports.
    fn retain(&mut self, keep: u8) {
        let alive = |local: SocketAddr| {
            CLIENT_PORTS.iter().position(|port| *port == local.port()).is_some_and(|at| keep >> at & 1 != 0)
        };
        self.client.retain(|local, _| alive(local));
        assert!(self.client.flows().all(|flow| alive(flow.local)));
    }

    /// `C12`: another run takes over what this one kept, all of it.
    fn restart(&mut self) {
        self.counted.push(self.client.counters().clone());
        let records: Vec<FlowRecord> = self.client.flows().collect();
        let mut client = Client::new(self.config.clone());
        for record in &records {
            assert!(client.restore(*record), "{record:?} is not taken back among {records:?}");
        }
        let of = |records: &mut dyn Iterator<Item = FlowRecord>| -> BTreeSet<(SocketAddr, SocketAddr, u16)> {
            records.map(|flow| (flow.local, flow.vip, flow.service_port)).collect()
        };
        assert_eq!(of(&mut client.flows()), of(&mut records.iter().copied()));
        self.client = client;
    }

    /// Without sockets nothing is left: no flow, no timer, no port that counts as taken.
    fn end(&mut self) {
        self.client.retain(|_, _| false);
        self.settle();
        assert_eq!((self.client.flow_count(), self.client.poll_timeout()), (0, None));
        let collisions = self.client.counters().port_collisions;
        for (address, local) in std::mem::take(&mut self.named) {
            if !self.config.vips.iter().any(|config| config.address == address) {
                continue;
            }
            for port in PORTS {
                let mut syn = syn(address, local, port);
                let _ = self.client.handle_local(self.now, &mut syn);
                self.client.retain(|_, _| false);
            }
        }
        assert_eq!(self.client.counters().port_collisions, collisions, "a service port is still taken");
    }
}

fn syn(vip: IpAddr, local: u16, port: u16) -> Packet {
    let v4 = vip.is_ipv4();
    let client =
        if v4 { IpAddr::from([10, 1, 0, 2]) } else { IpAddr::from([0x2001, 0xdb8, 1, 0, 0, 0, 0, 2]) };
    Segment::bare(SocketAddr::new(client, local), SocketAddr::new(vip, port), TcpFlags::SYN).emit()
}

/// `C1`: no data, no malformed options, no MD5, AO or MPTCP, no fast-open request.
fn bare(tcp: &TcpView<'_>) -> bool {
    let bound = |option: TcpOption<'_>| {
        matches!(
            option,
            TcpOption::Md5Signature
                | TcpOption::Authentication
                | TcpOption::Multipath
                | TcpOption::FastOpen(_)
        )
    };
    tcp.payload().is_empty() && !tcp.options().any(|option| option.map_or(true, bound))
}
