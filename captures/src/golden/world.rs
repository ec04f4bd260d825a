//! A client, a balancer and two servers in virtual time, and taps where captures are taken.
//!
//! All that decides is the project's own code; what stands here carries packets from one to the other, loses some where
//! a scenario says so, and records what passes. The same scenario gives the same bytes each time.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::task::{Poll, Waker};
use std::time::Duration;

use bytes::BytesMut;
use shunt_balancer::{Balancer, Config, Memory, SelectKey};
use shunt_host::Source;
use shunt_stack::device::Direction;
use shunt_stack::endpoint::{ClientOptions, ConnectionId, Connections, ServerOptions};
use shunt_stack::redirect::{Action, Client, ClientConfig, Server, ServerConfig, ServicePorts, Towards};
use shunt_stack::time::{Instant, WallClock};
use shunt_stack::wire::{Offload, Packet};

/// The redirect port of all scenarios.
pub(crate) const X: u16 = 443;
/// The service ports of the two servers.
pub(crate) const PORTS: [u16; 2] = [41_001, 41_002];
/// The links' MTU.
pub(crate) const MTU: usize = 1500;
/// When all scenarios begin, in seconds since 1970.
const BEGIN: u64 = 1_767_225_600;
/// From the client to the balancer and from there to a server.
const DELAYS: [Duration; 2] = [Duration::from_millis(5), Duration::from_millis(1)];
/// Rounds in which hosts exchange packets with themselves without time passing; more would be a loop.
const MAX_ROUNDS: usize = 1000;

/// The balancer's configuration.
pub const BALANCER: &str = r#"role = "balancer"
vips = ["203.0.113.10", "2001:db8::10"]

[[service]]
name = "web"
redirect_port = 443
policy = "round-robin"

[[server]]
name = "web-1"
address = ["10.0.0.11", "fd00::11"]
ports = { web = 41001 }

[[server]]
name = "web-2"
address = ["10.0.0.12", "fd00::12"]
ports = { web = 41002 }
"#;

/// IPv4 or IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    fn address(self, v4: &str, v6: &str) -> IpAddr {
        let text = if self == Family::V4 { v4 } else { v6 };
        text.parse().expect("the addresses of this file are some")
    }

    pub(crate) fn vip(self) -> IpAddr {
        self.address("203.0.113.10", "2001:db8::10")
    }

    pub(crate) fn client(self) -> IpAddr {
        self.address("198.51.100.7", "2001:db8:1::7")
    }

    pub(crate) fn server(self, index: usize) -> IpAddr {
        match index {
            0 => self.address("10.0.0.11", "fd00::11"),
            _ => self.address("10.0.0.12", "fd00::12"),
        }
    }
}

/// Where a capture is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tap {
    /// On the client's link: what a capture program sees there.
    Wire,
    /// In the client's shim, as `shunt client --capture` does.
    Client,
    /// In the balancer.
    Balancer,
    /// In the agent of the first server.
    Server,
}

/// A packet that passed a tap.
#[derive(Debug, Clone)]
pub(crate) struct Tapped {
    pub(crate) tap: Tap,
    pub(crate) direction: Direction,
    pub(crate) at: Duration,
    pub(crate) packet: Packet,
}

/// A way over the client's link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// From the client.
    Up,
    /// To the client.
    Down,
}

/// What the client's link does with a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It is lost.
    Lost,
    /// It comes, and once more so much later.
    Twice(Duration),
}

type Matches = Box<dyn Fn(&Packet) -> bool>;

struct Trick {
    way: Way,
    times: usize,
    fate: Fate,
    matches: Matches,
}

/// One end: a TCP, and where it stands beside a machine instead of over it, that machine.
pub(crate) struct Host {
    tcp: Connections,
    machine: Machine,
    tap: Option<Tap>,
}

enum Machine {
    Within,
    Client(Box<Client>),
    Server(Box<Server>),
}

impl Host {
    /// An endpoint of the project.
    pub(crate) fn endpoint(tcp: Connections) -> Host {
        Host { tcp, machine: Machine::Within, tap: None }
    }

    /// A TCP that knows of nothing, and a shim beside it.
    pub(crate) fn shimmed(family: Family, config: ClientConfig) -> Host {
        let options = ClientOptions { addresses: vec![family.client()], ..plain_ports() };
        let tcp = Connections::client(options, MTU, [1; 16]);
        Host { tcp, machine: Machine::Client(Box::new(Client::new(config))), tap: Some(Tap::Client) }
    }

    fn agent(family: Family, index: usize, config: ServerConfig) -> Host {
        let mut tcp = Connections::server(ServerOptions::default(), MTU, [2 + index as u8; 16]);
        for port in [X, PORTS[index]] {
            tcp.listen(SocketAddr::new(family.server(index), port)).expect("nobody listens there yet");
        }
        let machine = Machine::Server(Box::new(Server::new(config)));
        Host { tcp, machine, tap: (index == 0).then_some(Tap::Server) }
    }
}

/// Own ports that follow from nothing random.
pub(crate) fn plain_ports() -> ClientOptions {
    ClientOptions { ports: 50_000..=50_015, ..ClientOptions::default() }
}

/// What the first or second server is told.
pub(crate) fn server_config(family: Family, index: usize) -> ServerConfig {
    let address = family.server(index);
    let services = vec![ServicePorts { address, redirect_port: X, service_port: PORTS[index] }];
    let shared = services.iter().map(|service| (service.service_socket(), family.vip())).collect();
    ServerConfig { services, shared, mtu: MTU, ..ServerConfig::default() }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Client,
    Balancer,
    Server(usize),
}

/// A connection that a server has accepted.
struct Accepted {
    server: usize,
    id: ConnectionId,
    ended: bool,
}

/// All of it.
pub(crate) struct World {
    pub(crate) family: Family,
    now: Instant,
    client: Host,
    balancer: Balancer,
    memory: Memory,
    servers: Vec<Host>,
    queue: BTreeMap<(Instant, u64), (Place, Packet)>,
    next: u64,
    tricks: Vec<Trick>,
    accepted: Vec<Accepted>,
    pub(crate) tapped: Vec<Tapped>,
}

impl World {
    /// A client, and servers with agents beside their TCP that keep to `config`.
    pub(crate) fn with_agents(
        family: Family,
        client: Host,
        config: impl Fn(ServerConfig) -> ServerConfig,
    ) -> World {
        let server = |index| Host::agent(family, index, config(server_config(family, index)));
        World::new(family, client, vec![server(0), server(1)])
    }

    /// A client, and servers that are endpoints of the project.
    pub(crate) fn with_endpoints(family: Family, client: Host) -> World {
        let server = |index: usize| {
            let redirect = server_config(family, index);
            let mut tcp = Connections::server(
                ServerOptions { redirect, ..ServerOptions::default() },
                MTU,
                [2 + index as u8; 16],
            );
            let socket = SocketAddr::new(family.server(index), PORTS[index]);
            tcp.listen(socket).expect("nobody listens there yet");
            Host::endpoint(tcp)
        };
        World::new(family, client, vec![server(0), server(1)])
    }

    fn new(family: Family, client: Host, servers: Vec<Host>) -> World {
        let config =
            Config::parse(&Source::new("balancer.toml", BALANCER)).expect("the configuration is right");
        let balancer = Balancer::new(&config, SelectKey([0; 16]));
        let memory = Memory::new(&balancer);
        World {
            family,
            now: Instant::from_micros(BEGIN * 1_000_000),
            client,
            balancer,
            memory,
            servers,
            queue: BTreeMap::new(),
            next: 0,
            tricks: Vec::new(),
            accepted: Vec::new(),
            tapped: Vec::new(),
        }
    }

    /// The client's link does this to the next packets of a kind.
    pub(crate) fn trick(
        &mut self,
        way: Way,
        times: usize,
        fate: Fate,
        matches: impl Fn(&Packet) -> bool + 'static,
    ) {
        self.tricks.push(Trick { way, times, fate, matches: Box::new(matches) });
    }

    /// Begins to connect to a port of the VIP.
    pub(crate) fn connect(&mut self, port: u16) -> ConnectionId {
        let peer = SocketAddr::new(self.family.vip(), port);
        self.client.tcp.connect(self.now, peer).expect("there are ports and room")
    }

    /// Writes what the server sends back.
    pub(crate) fn write(&mut self, id: ConnectionId, data: &[u8]) {
        let written = self.client.tcp.poll_write(id, data, Waker::noop());
        assert!(matches!(written, Poll::Ready(Ok(length)) if length == data.len()), "{written:?}");
        self.client.tcp.mark_boundary(self.now, id);
    }

    /// Reads what has come.
    pub(crate) fn read(&mut self, id: ConnectionId) -> Vec<u8> {
        let mut buffer = [0; 4096];
        match self.client.tcp.poll_read(id, &mut buffer, Waker::noop()) {
            Poll::Ready(Ok(length)) => buffer[..length].to_vec(),
            Poll::Ready(Err(_)) | Poll::Pending => Vec::new(),
        }
    }

    /// Ends the client's half of a stream.
    pub(crate) fn close(&mut self, id: ConnectionId) {
        self.client.tcp.shut_down(self.now, id);
    }

    /// The program drops a stream.
    pub(crate) fn release(&mut self, id: ConnectionId) {
        self.client.tcp.release(self.now, id);
    }

    /// The client's own port of a stream.
    pub(crate) fn own_port(&self, id: ConnectionId) -> u16 {
        self.client.tcp.ends(id).map_or(0, |(local, _)| local.port())
    }

    /// The client's end.
    pub(crate) fn client_tcp(&mut self) -> &mut Connections {
        &mut self.client.tcp
    }

    pub(crate) fn now(&self) -> Instant {
        self.now
    }

    /// A server asks its oldest connection to move to a port of the VIP.
    pub(crate) fn redirect(&mut self, server: usize, port: u16) {
        let accepted = self.accepted.iter().find(|accepted| accepted.server == server);
        let id = accepted.expect("the server has a connection").id;
        let to = SocketAddr::new(self.family.server(server), port);
        self.servers[server].tcp.redirect(self.now, id, to).expect("it can be redirected");
    }

    /// The agents of all servers have these tokens from now on.
    pub(crate) fn each_agent(&mut self, change: impl Fn(&mut Server)) {
        for host in &mut self.servers {
            if let Machine::Server(server) = &mut host.machine {
                change(server);
            }
        }
    }

    /// A packet of another's making leaves the client's host.
    pub(crate) fn inject(&mut self, packet: Packet) {
        self.over_link(Way::Up, packet);
    }

    /// The client's TCP sends a packet of another's making.
    pub(crate) fn inject_local(&mut self, packet: Packet) {
        let mut out = Vec::new();
        self.client.on_local(self.now, packet, &mut out);
        self.dispatch(Place::Client, out);
    }

    /// A packet of another's making arrives at the client.
    pub(crate) fn inject_down(&mut self, packet: Packet) {
        self.queue_at(self.now, Place::Client, packet);
    }

    /// Lets time pass.
    pub(crate) fn run_for(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            self.settle();
            let hosts = std::iter::once(&self.client).chain(&self.servers);
            let timers = hosts.filter_map(Host::poll_timeout).min();
            let arrival = self.queue.first_key_value().map(|((at, _), _)| *at);
            // What is due at once was done by settling: time goes on.
            let timers = timers.map(|at| at.max(self.now + Duration::from_micros(1)));
            let Some(at) = [timers, arrival].into_iter().flatten().min().filter(|at| *at <= end) else {
                break;
            };
            self.now = self.now.max(at);
            while let Some(entry) = self.queue.first_entry().filter(|entry| entry.key().0 <= self.now) {
                let (place, packet) = entry.remove();
                self.arrive(place, packet);
            }
        }
        self.now = end;
    }

    fn queue_at(&mut self, at: Instant, place: Place, packet: Packet) {
        self.queue.insert((at, self.next), (place, packet));
        self.next += 1;
    }

    fn tap(&mut self, tap: Tap, direction: Direction, packet: &Packet) {
        let at = Duration::from_micros(self.now.micros());
        self.tapped.push(Tapped { tap, direction, at, packet: packet.clone() });
    }

    /// Over the client's link, with its tricks.
    fn over_link(&mut self, way: Way, packet: Packet) {
        if way == Way::Up {
            self.tap(Tap::Wire, Direction::Out, &packet);
        }
        let place = if way == Way::Up { Place::Balancer } else { Place::Client };
        let hits = |trick: &&mut Trick| trick.way == way && trick.times > 0 && (trick.matches)(&packet);
        let trick = self.tricks.iter_mut().find(hits);
        let fate = trick.map(|trick| {
            trick.times -= 1;
            trick.fate
        });
        let arrival = self.now + DELAYS[0];
        match fate {
            None => self.queue_at(arrival, place, packet),
            Some(Fate::Lost) => {}
            Some(Fate::Twice(time)) => {
                self.queue_at(arrival, place, packet.clone());
                self.queue_at(arrival + time, place, packet);
            }
        }
    }

    fn arrive(&mut self, place: Place, packet: Packet) {
        match place {
            Place::Balancer => self.at_balancer(packet),
            Place::Client => {
                self.tap(Tap::Wire, Direction::In, &packet);
                let mut out = Vec::new();
                self.client.on_network(self.now, packet, &mut out);
                self.dispatch(Place::Client, out);
            }
            Place::Server(index) => {
                let mut out = Vec::new();
                self.servers[index].on_network(self.now, packet, &mut out);
                self.dispatch(Place::Server(index), out);
            }
        }
    }

    fn at_balancer(&mut self, mut packet: Packet) {
        self.tap(Tap::Balancer, Direction::In, &packet);
        self.balancer.advance(self.now);
        self.balancer.set_clock(WallClock::from_micros(0));
        if self.balancer.handle(&mut self.memory, self.now, &mut packet).is_err() {
            return;
        }
        self.tap(Tap::Balancer, Direction::Out, &packet);
        let server = (0..PORTS.len()).find(|index| self.family.server(*index) == packet.destination());
        match server {
            Some(index) => self.queue_at(self.now + DELAYS[1], Place::Server(index), packet),
            None => self.over_link(Way::Down, packet),
        }
    }

    /// What a host's step came to: recorded, and sent on its way.
    fn dispatch(&mut self, place: Place, out: Vec<Step>) {
        for step in out {
            match step {
                Step::Tap(tap, direction, packet) => self.tap(tap, direction, &packet),
                Step::Send(packet) if place == Place::Client => self.over_link(Way::Up, packet),
                Step::Send(packet) => self.queue_at(self.now + DELAYS[1], Place::Balancer, packet),
            }
        }
    }

    /// Lets all hosts do what they can do now.
    fn settle(&mut self) {
        for _ in 0..MAX_ROUNDS {
            self.serve();
            let mut quiet = true;
            for place in [Place::Client, Place::Server(0), Place::Server(1)] {
                let host = match place {
                    Place::Server(index) => &mut self.servers[index],
                    _ => &mut self.client,
                };
                let mut out = Vec::new();
                host.flush(self.now, &mut out);
                quiet &= out.is_empty();
                self.dispatch(place, out);
            }
            if quiet {
                return;
            }
        }
    }

    /// The servers' program: sends back what comes, and closes when the client does.
    fn serve(&mut self) {
        for (index, host) in self.servers.iter_mut().enumerate() {
            for port in [X, PORTS[index]] {
                let socket = SocketAddr::new(self.family.server(index), port);
                while let Some(id) = host.tcp.accept(self.now, socket) {
                    self.accepted.push(Accepted { server: index, id, ended: false });
                }
            }
        }
        for accepted in self.accepted.iter_mut().filter(|accepted| !accepted.ended) {
            let tcp = &mut self.servers[accepted.server].tcp;
            let mut buffer = [0; 4096];
            match tcp.poll_read(accepted.id, &mut buffer, Waker::noop()) {
                Poll::Ready(Ok(length)) if length > 0 => {
                    let _ = tcp.poll_write(accepted.id, &buffer[..length], Waker::noop());
                }
                Poll::Ready(Ok(_)) => {
                    tcp.shut_down(self.now, accepted.id);
                    accepted.ended = true;
                }
                Poll::Ready(Err(_)) => accepted.ended = true,
                Poll::Pending => {}
            }
        }
    }
}

/// What a host did.
enum Step {
    Tap(Tap, Direction, Packet),
    Send(Packet),
}

impl Host {
    fn poll_timeout(&self) -> Option<Instant> {
        let machine = match &self.machine {
            Machine::Within => None,
            Machine::Client(client) => client.poll_timeout(),
            Machine::Server(server) => server.poll_timeout(),
        };
        [self.tcp.poll_timeout(), machine].into_iter().flatten().min()
    }

    fn record(&self, direction: Direction, packet: &Packet, out: &mut Vec<Step>) {
        out.extend(self.tap.map(|tap| Step::Tap(tap, direction, packet.clone())));
    }

    fn on_network(&mut self, now: Instant, mut packet: Packet, out: &mut Vec<Step>) {
        self.record(Direction::In, &packet, out);
        let action = match &mut self.machine {
            Machine::Within => Action::Pass,
            Machine::Client(client) => client.handle_remote(now, &mut packet),
            Machine::Server(server) => {
                server.set_clock(WallClock::from_micros(0));
                server.handle_remote(now, &mut packet)
            }
        };
        if action == Action::Pass {
            self.record(Direction::Out, &packet, out);
            self.tcp.handle_input(now, packet.into_buffer(), Offload::default());
        }
        self.transmit(now, out);
    }

    fn on_local(&mut self, now: Instant, mut packet: Packet, out: &mut Vec<Step>) {
        if matches!(self.machine, Machine::Within) {
            out.push(Step::Send(packet));
            return;
        }
        self.record(Direction::In, &packet, out);
        let action = match &mut self.machine {
            Machine::Within => Action::Pass,
            Machine::Client(client) => client.handle_local(now, &mut packet),
            Machine::Server(server) => server.handle_local(now, &mut packet),
        };
        if action == Action::Pass {
            self.record(Direction::Out, &packet, out);
            out.push(Step::Send(packet));
        }
        self.transmit(now, out);
    }

    /// What the machine sends of its own.
    fn transmit(&mut self, now: Instant, out: &mut Vec<Step>) {
        loop {
            let next = match &mut self.machine {
                Machine::Within => None,
                Machine::Client(client) => client.poll_transmit(now),
                Machine::Server(server) => server.poll_transmit(now),
            };
            let Some(transmit) = next else { return };
            self.record(Direction::Out, &transmit.packet, out);
            match transmit.towards {
                Towards::Network => out.push(Step::Send(transmit.packet)),
                Towards::Local => {
                    let buffer: BytesMut = transmit.packet.into_buffer();
                    self.tcp.handle_input(now, buffer, Offload::default());
                }
            }
        }
    }

    fn flush(&mut self, now: Instant, out: &mut Vec<Step>) {
        self.tcp.handle_timeout(now);
        while let Some(packet) = self.tcp.poll_transmit() {
            self.on_local(now, packet, out);
        }
        self.transmit(now, out);
    }
}
