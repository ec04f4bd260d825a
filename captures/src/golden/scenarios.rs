//! What happens in the golden captures: the messages of PROTOCOL.md §2, and the cases of §11.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use shunt_stack::endpoint::{ClientOptions, CloseBy, Connections, MoveAt};
use shunt_stack::redirect::{
    ClientConfig, Continuation, OnRedirect, Require, ServerConfig, TokenKeys, TokenPolicy, VipConfig,
};
use shunt_stack::wire::{DEFAULT_EXID, Packet, RedirectOption, Segment, SeqNumber, TcpFlags};

use super::world::{Family, Fate, Host, MTU, PORTS, Way, World, X, plain_ports};

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// What a shim's configuration says that names the VIPs and nothing else.
pub(crate) fn client_config() -> ClientConfig {
    let vip = |family: Family| VipConfig {
        address: family.vip(),
        continuation: Continuation::Auto,
        on_redirect: OnRedirect::Hint,
    };
    ClientConfig { vips: vec![vip(Family::V4), vip(Family::V6)], mtu: MTU, ..ClientConfig::default() }
}

fn option(packet: &Packet) -> Option<RedirectOption> {
    packet.tcp()?.redirect(DEFAULT_EXID).ok()?
}

fn is_syn(packet: &Packet) -> bool {
    packet.tcp().is_some_and(|tcp| tcp.is_syn())
}

fn has(packet: &Packet, flags: TcpFlags) -> bool {
    packet.tcp().is_some_and(|tcp| tcp.flags().intersects(flags))
}

/// A shim beside a TCP, agents beside the servers' TCPs.
fn beside(family: Family) -> World {
    World::with_agents(family, Host::shimmed(family, client_config()), |config| config)
}

/// Sends a line, waits for it to come back, and closes.
fn exchange(world: &mut World, port: u16) {
    let id = world.connect(port);
    world.run_for(ms(100));
    world.write(id, b"hello\n");
    world.run_for(ms(100));
    assert_eq!(world.read(id), b"hello\n");
    world.close(id);
    world.run_for(ms(100));
    world.release(id);
    world.run_for(ms(100));
}

/// The same where something goes wrong first, which takes its time.
fn exchange_slowly(world: &mut World) {
    let id = world.connect(X);
    world.run_for(ms(5000));
    world.write(id, b"hello\n");
    world.run_for(ms(5000));
    assert_eq!(world.read(id), b"hello\n");
    world.close(id);
    world.run_for(ms(1000));
}

pub(crate) fn reconnect(family: Family) -> World {
    let mut world = beside(family);
    exchange(&mut world, X);
    world
}

/// The first connect shows that the path translates nothing, the second hands over.
pub(crate) fn handover(family: Family) -> World {
    let mut world = beside(family);
    exchange(&mut world, X);
    exchange(&mut world, X);
    world
}

pub(crate) fn confirmed(family: Family) -> World {
    let mut world = beside(family);
    exchange(&mut world, PORTS[1]);
    world
}

pub(crate) fn plain(family: Family) -> World {
    let client = ClientConfig { vips: Vec::new(), ..client_config() };
    let mut world = World::with_agents(family, Host::shimmed(family, client), |config| config);
    exchange(&mut world, X);
    world
}

fn tokens(key: &str) -> TokenPolicy {
    let keys = TokenKeys::parse(&format!("0 {key}")).expect("the key is one");
    TokenPolicy { keys: Some(Arc::new(keys)), require: Require::Always, ..TokenPolicy::default() }
}

const KEY: &str = "000102030405060708090a0b0c0d0e0f";
const OTHER_KEY: &str = "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff";

fn demanding(family: Family) -> World {
    let config = |config| ServerConfig { tokens: tokens(KEY), ..config };
    World::with_agents(family, Host::shimmed(family, client_config()), config)
}

pub(crate) fn token(family: Family) -> World {
    let mut world = demanding(family);
    exchange(&mut world, X);
    world
}

pub(crate) fn token_of_another_key(family: Family) -> World {
    let mut world = demanding(family);
    let id = world.connect(X);
    // The token is on its way.
    world.run_for(ms(14));
    world.each_agent(|server| server.set_tokens(tokens(OTHER_KEY), std::collections::BTreeMap::new()));
    world.run_for(ms(6000));
    world.write(id, b"hello\n");
    world.run_for(ms(1000));
    assert_eq!(world.read(id), b"hello\n");
    world
}

pub(crate) fn two_answers(family: Family) -> World {
    let mut world = beside(family);
    world.trick(Way::Up, 1, Fate::Twice(ms(1)), is_syn);
    exchange(&mut world, X);
    world
}

pub(crate) fn syn_lost(family: Family) -> World {
    let mut world = beside(family);
    world.trick(Way::Up, 1, Fate::Lost, is_syn);
    exchange_slowly(&mut world);
    world
}

pub(crate) fn syn_ack_lost(family: Family) -> World {
    let mut world = beside(family);
    world.trick(Way::Down, 1, Fate::Lost, |packet| has(packet, TcpFlags::SYN));
    exchange_slowly(&mut world);
    world
}

/// Whether a segment hands over.
fn hands_over(packet: &Packet) -> bool {
    option(packet).is_some_and(|option| option.redirect && option.confirm) && !is_syn(packet)
}

pub(crate) fn handover_ack_lost(family: Family) -> World {
    let mut world = beside(family);
    exchange(&mut world, X);
    world.trick(Way::Up, 1, Fate::Lost, hands_over);
    exchange_slowly(&mut world);
    world
}

/// The handover arrives; what answers it is lost until a probe has met the established connection.
pub(crate) fn probe(family: Family) -> World {
    let mut world = beside(family);
    exchange(&mut world, X);
    let id = world.connect(X);
    world.run_for(ms(30));
    world.trick(Way::Down, 2, Fate::Lost, |packet| !has(packet, TcpFlags::SYN));
    world.write(id, b"hello\n");
    world.run_for(ms(5000));
    assert_eq!(world.read(id), b"hello\n");
    world
}

pub(crate) fn syn_ack_late(family: Family) -> World {
    let mut world = beside(family);
    let redirects = |packet: &Packet| option(packet).is_some_and(|option| option.port.is_some());
    world.trick(Way::Down, 1, Fate::Twice(ms(150)), redirects);
    exchange(&mut world, X);
    world
}

/// The address and port of the client's connection, and a port of the VIP.
fn ends(world: &World, own: u16, port: u16) -> (SocketAddr, SocketAddr) {
    (SocketAddr::new(world.family.client(), own), SocketAddr::new(world.family.vip(), port))
}

fn syn(from: SocketAddr, to: SocketAddr) -> Packet {
    let bare = Segment::bare(from, to, TcpFlags::SYN);
    Segment { seq: SeqNumber(7_000_000), window: 64_240, options: &[2, 4, 5, 180], ..bare }.emit()
}

pub(crate) fn new_syn(family: Family) -> World {
    let mut world = beside(family);
    let id = world.connect(X);
    world.run_for(ms(100));
    let (from, to) = ends(&world, world.own_port(id), PORTS[0]);
    world.inject(syn(from, to));
    world.run_for(ms(100));
    world.write(id, b"hello\n");
    world.run_for(ms(100));
    assert_eq!(world.read(id), b"hello\n");
    world
}

/// (own port, X) was redirected to Y: nothing else of the host may use (own port, Y) until it has ended (`C8`).
pub(crate) fn port_reused(family: Family) -> World {
    let mut world = beside(family);
    let id = world.connect(X);
    world.run_for(ms(100));
    world.close(id);
    world.run_for(ms(100));
    let (from, to) = ends(&world, world.own_port(id), PORTS[0]);
    world.inject_local(syn(from, to));
    world.run_for(ms(100));
    world
}

pub(crate) fn bare_syn(family: Family) -> World {
    let mut world = beside(family);
    let id = world.connect(X);
    world.run_for(ms(1));
    let (local, vip) = ends(&world, world.own_port(id), X);
    world.inject_down(syn(vip, local));
    world.run_for(ms(100));
    world
}

fn endpoint(family: Family, continuation: Continuation, close_by: CloseBy) -> Host {
    let vip = VipConfig { address: family.vip(), continuation, on_redirect: OnRedirect::Follow };
    let options = ClientOptions {
        redirect: ClientConfig { vips: vec![vip], ..ClientConfig::default() },
        addresses: vec![family.client()],
        move_at: MoveAt::Boundary,
        close_by,
        ..plain_ports()
    };
    Host::endpoint(Connections::client(options, MTU, [1; 16]))
}

/// A connection of an endpoint, established, with a line there and back.
fn established(family: Family, close_by: CloseBy) -> (World, shunt_stack::endpoint::ConnectionId) {
    let mut world = World::with_endpoints(family, endpoint(family, Continuation::Reconnect, close_by));
    let id = world.connect(X);
    world.run_for(ms(100));
    world.write(id, b"first\n");
    world.run_for(ms(100));
    assert_eq!(world.read(id), b"first\n");
    (world, id)
}

/// The server asks for a move; the stream goes on at the other one.
fn moves(mut world: World, id: shunt_stack::endpoint::ConnectionId, to: u16) -> World {
    world.redirect(0, to);
    world.run_for(ms(20_000));
    world.write(id, b"second\n");
    world.run_for(ms(2000));
    assert_eq!(world.read(id), b"second\n");
    assert_eq!(world.client_tcp().redirected_to(id), Some(PORTS[1]));
    world.close(id);
    world.run_for(ms(1000));
    world
}

pub(crate) fn moved(family: Family) -> World {
    let (world, id) = established(family, CloseBy::Fin);
    moves(world, id, PORTS[1])
}

pub(crate) fn moved_by_reset(family: Family) -> World {
    let (world, id) = established(family, CloseBy::Reset);
    moves(world, id, PORTS[1])
}

/// Z is the redirect port, which redirects again.
pub(crate) fn moved_on(family: Family) -> World {
    let (world, id) = established(family, CloseBy::Fin);
    moves(world, id, X)
}

fn says_r(packet: &Packet) -> bool {
    !has(packet, TcpFlags::SYN) && option(packet).is_some_and(|option| option.redirect && !option.confirm)
}

fn says_c(packet: &Packet) -> bool {
    !has(packet, TcpFlags::SYN) && option(packet).is_some_and(|option| option.confirm && !option.redirect)
}

pub(crate) fn move_r_lost(family: Family) -> World {
    let (mut world, id) = established(family, CloseBy::Fin);
    world.trick(Way::Down, 2, Fate::Lost, says_r);
    moves(world, id, PORTS[1])
}

pub(crate) fn move_syn_lost(family: Family) -> World {
    let (mut world, id) = established(family, CloseBy::Fin);
    world.trick(Way::Up, 1, Fate::Lost, is_syn);
    moves(world, id, PORTS[1])
}

pub(crate) fn move_fin_lost(family: Family) -> World {
    let (mut world, id) = established(family, CloseBy::Fin);
    world.trick(Way::Up, 1, Fate::Lost, says_c);
    moves(world, id, PORTS[1])
}

pub(crate) fn move_rst_lost(family: Family) -> World {
    let (mut world, id) = established(family, CloseBy::Reset);
    world.trick(Way::Up, 1, Fate::Lost, says_c);
    moves(world, id, PORTS[1])
}

/// Nothing of the old server arrives once the new connection is asked for: the stream breaks (`M7`).
pub(crate) fn move_server_fails(family: Family) -> World {
    let (mut world, id) = established(family, CloseBy::Fin);
    world.redirect(0, PORTS[1]);
    world.run_for(ms(8));
    let of_old = |packet: &Packet| packet.ports().is_some_and(|(from, _)| from == PORTS[0]);
    world.trick(Way::Down, usize::MAX, Fate::Lost, of_old);
    world.run_for(ms(300_000));
    assert_eq!(world.read(id), b"");
    world
}

/// A connection over a path known to translate nothing, whose client asks for another own port.
fn rebinds(family: Family, way: Way, lost: fn(&Packet) -> bool, times: usize) -> World {
    let client = endpoint(family, Continuation::Auto, CloseBy::Fin);
    let mut world = World::with_endpoints(family, client);
    let id = world.connect(X);
    world.run_for(ms(100));
    world.write(id, b"first\n");
    world.run_for(ms(100));
    assert_eq!(world.read(id), b"first\n");
    world.trick(way, times, Fate::Lost, lost);
    let now = world.now();
    let own = world.own_port(id);
    let other = if own < *plain_ports().ports.end() { own + 1 } else { *plain_ports().ports.start() };
    world.client_tcp().rebind(now, id, other).expect("the port is free");
    world.run_for(ms(5000));
    world.write(id, b"second\n");
    world.run_for(ms(1000));
    assert_eq!(world.read(id), b"second\n");
    world.close(id);
    world.run_for(ms(1000));
    world
}

pub(crate) fn rebound(family: Family) -> World {
    rebinds(family, Way::Up, says_r, 0)
}

pub(crate) fn rebind_r_lost(family: Family) -> World {
    rebinds(family, Way::Up, says_r, 2)
}

pub(crate) fn rebind_c_lost(family: Family) -> World {
    rebinds(family, Way::Down, says_c, 2)
}
