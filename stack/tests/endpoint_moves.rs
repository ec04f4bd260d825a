//! Streams that go on at another server in the middle (O7, O8, O9, O11), over links in memory and in virtual time.

mod common;

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Family, Filtered, Impaired, MTU, X, Y, client_options, option_of, pattern, server_options};
use shunt_stack::device::{Device, MemoryDevice};
use shunt_stack::endpoint::{
    ClientOptions, CloseBy, Endpoint, MoveAt, MoveError, MoveEvent, ServerOptions, StreamControl,
    TcpListener, TcpStream,
};
use shunt_stack::redirect::{
    Continuation, OnRedirect, PathState, Prefix, RedirectOutcome, ServicePorts, Silence,
};
use shunt_stack::wire::{Packet, TcpFlags};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Four servers' service ports, and a redirect port that leads to the second.
const PORTS: [u16; 4] = [Y, 41002, 41003, 41004];
const Z: u16 = PORTS[1];
const AGAIN: u16 = 4430;
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

fn following(family: Family, move_at: MoveAt) -> ClientOptions {
    let mut options = client_options(family, Continuation::Reconnect);
    options.redirect.vips[0].on_redirect = OnRedirect::Follow;
    ClientOptions { move_at, ..options }
}

fn four_servers(family: Family) -> ServerOptions {
    let mut options = server_options(family);
    let own =
        |redirect_port, service_port| ServicePorts { address: family.vip(), redirect_port, service_port };
    options.redirect.services.extend(PORTS[1..].iter().map(|port| own(*port, *port)));
    options.redirect.services.push(own(AGAIN, Z));
    options
}

/// Client, servers, a listener of each of the first `listening` ports, and a stream with its other end.
struct World {
    client: Endpoint,
    server: Endpoint,
    listeners: Vec<TcpListener>,
    near: TcpStream,
    far: TcpStream,
}

async fn world(client: ClientOptions, server: ServerOptions, listening: usize) -> World {
    let (left, right) = MemoryDevice::pair(MTU, 65_536);
    world_over(left, right, client, server, listening).await
}

async fn world_over(
    left: impl Device + 'static,
    right: impl Device + 'static,
    client: ClientOptions,
    server: ServerOptions,
    listening: usize,
) -> World {
    let vip = client.redirect.vips[0].address;
    let client = Endpoint::client(left, client).unwrap();
    let server = Endpoint::server(right, server).unwrap();
    let at = |port| SocketAddr::new(vip, port);
    let listeners: Vec<_> = PORTS[..listening].iter().map(|port| server.listen(at(*port)).unwrap()).collect();
    let near = client.connect(at(X)).await.unwrap();
    let (far, _) = listeners[0].accept().await.unwrap();
    World { client, server, listeners, near, far }
}

/// Redirects in the background; what came of it.
fn redirect(stream: &TcpStream, port: u16) -> tokio::task::JoinHandle<io::Result<RedirectOutcome>> {
    let control = stream.control();
    tokio::spawn(async move { control.redirect(port).await })
}

async fn event(control: &StreamControl) -> MoveEvent {
    soon(control.next_event()).await.expect("a stream")
}

/// `future`, but no longer than an hour of virtual time.
async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(3600), future).await.expect("within an hour")
}

async fn moves_once(family: Family, move_at: MoveAt, close_by: CloseBy) {
    let options = ClientOptions { close_by, ..following(family, move_at) };
    let World { client, server, listeners, mut near, mut far } =
        world(options, four_servers(family), 2).await;
    let control = near.control();
    near.write_all(b"for the first").await.unwrap();
    near.mark_boundary();
    far.read_exact(&mut [0; 13]).await.unwrap();
    far.write_all(b"from the first;").await.unwrap();
    let outcome = redirect(&far, Z);
    let (mut next, _) = soon(listeners[1].accept()).await.unwrap();
    assert_eq!((next.moved_from(), far.moved_from()), (Some(Y), None));
    let to = family.at(Z);
    assert_eq!(event(&control).await, MoveEvent::Asked { from: Y, to });
    assert_eq!(event(&control).await, MoveEvent::Moved { from: Y, to, offset: 13 });
    assert_eq!((near.redirected_to(), near.peer_addr()), (Some(Z), family.at(X)));
    near.write_all(b"for the second").await.unwrap();
    next.write_all(b"from the second").await.unwrap();
    let mut rest = Vec::new();
    match close_by {
        CloseBy::Fin => {
            assert_eq!(soon(far.read_to_end(&mut rest)).await.unwrap(), 0);
            far.write_all(b"and more;").await.unwrap();
            far.shutdown().await.unwrap();
        }
        CloseBy::Reset => {
            let error = soon(far.read_to_end(&mut rest)).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        }
    }
    assert_eq!(soon(outcome).await.unwrap().unwrap(), RedirectOutcome::Confirmed);
    near.shutdown().await.unwrap();
    soon(next.read_to_end(&mut rest)).await.unwrap();
    assert_eq!(rest, b"for the second");
    next.shutdown().await.unwrap();
    let mut all = String::new();
    soon(near.read_to_string(&mut all)).await.unwrap();
    let (expected, offset) = match close_by {
        CloseBy::Fin => ("from the first;and more;from the second", 24),
        CloseBy::Reset => ("from the first;from the second", 15),
    };
    assert_eq!(all, expected);
    assert_eq!(event(&control).await, MoveEvent::Reading { from: Z, offset });
    drop((near, far, next));
    assert_eq!(soon(control.next_event()).await, None);
    assert_eq!((client.counters().moves, client.counters().unsent, server.counters().unsent), (1, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn o7_a_stream_goes_on_at_another_server_wherever_it_may_be_cut() {
    for family in FAMILIES {
        for move_at in [MoveAt::Boundary, MoveAt::Immediately, MoveAt::Idle(Duration::from_millis(300))] {
            moves_once(family, move_at, CloseBy::Fin).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn o8_the_old_part_may_be_closed_by_a_reset_without_loss_of_what_was_written() {
    for family in FAMILIES {
        for move_at in [MoveAt::Boundary, MoveAt::Immediately] {
            moves_once(family, move_at, CloseBy::Reset).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn o8_a_reset_that_is_lost_is_repeated_when_the_server_asks_again() {
    let family = Family::V4;
    let (left, right) = MemoryDevice::pair(MTU, 65_536);
    let lost = AtomicUsize::new(0);
    let left = Filtered::new(left, move |packet: &Packet| {
        !packet.tcp().unwrap().flags().contains(TcpFlags::RST) || lost.fetch_add(1, Ordering::Relaxed) >= 3
    });
    let options = ClientOptions { close_by: CloseBy::Reset, ..following(family, MoveAt::Immediately) };
    let World { listeners, near: _near, mut far, client: _client, server: _server } =
        world_over(left, right, options, four_servers(family), 2).await;
    let outcome = redirect(&far, Z);
    let (_next, _) = soon(listeners[1].accept()).await.unwrap();
    let error = soon(far.read_u8()).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    let outcome = soon(outcome).await.unwrap().unwrap();
    assert!(matches!(outcome, RedirectOutcome::Confirmed | RedirectOutcome::Closed), "{outcome:?}");
}

#[tokio::test(start_paused = true)]
async fn a_stream_is_not_cut_before_its_boundary_or_while_it_is_busy() {
    let family = Family::V4;
    for move_at in [MoveAt::Boundary, MoveAt::Idle(Duration::from_millis(300))] {
        let World { client, mut near, mut far, listeners, server: _server } =
            world(following(family, move_at), four_servers(family), 2).await;
        let _outcome = redirect(&far, Z);
        let mut written = 0;
        for _ in 0..50 {
            near.write_all(b"request").await.unwrap();
            written += 7;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert_eq!(client.counters().moves, 0);
        near.mark_boundary();
        let (mut next, _) = soon(listeners[1].accept()).await.unwrap();
        near.write_all(b"next").await.unwrap();
        near.shutdown().await.unwrap();
        let (mut first, mut second) = (Vec::new(), Vec::new());
        soon(far.read_to_end(&mut first)).await.unwrap();
        soon(next.read_to_end(&mut second)).await.unwrap();
        // What idleness may cut depends on when the listener gets its turn; nothing is lost either way.
        assert_eq!([first, second].concat().len(), written + 4);
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_not_there_leaves_the_stream_where_it_is() {
    for family in FAMILIES {
        let World { client, mut near, mut far, server: _server, listeners: _listeners } =
            world(following(family, MoveAt::Boundary), four_servers(family), 1).await;
        let outcome = redirect(&far, Z);
        let control = near.control();
        assert!(matches!(event(&control).await, MoveEvent::Asked { .. }));
        let failed = event(&control).await;
        assert!(matches!(failed, MoveEvent::Failed { reason: MoveError::Connection(_), .. }), "{failed:?}");
        near.write_all(b"still here").await.unwrap();
        let mut read = [0; 10];
        soon(far.read_exact(&mut read)).await.unwrap();
        assert_eq!(&read, b"still here");
        assert_eq!(soon(outcome).await.unwrap().unwrap(), RedirectOutcome::GivenUp);
        far.write_all(b"so am I").await.unwrap();
        far.shutdown().await.unwrap();
        let mut all = String::new();
        soon(near.read_to_string(&mut all)).await.unwrap();
        assert_eq!((all.as_str(), client.counters().moves), ("so am I", 0));
        assert_eq!(near.redirected_to(), Some(Y));
    }
}

#[tokio::test(start_paused = true)]
async fn a_new_server_that_stays_silent_is_given_up_and_writes_go_on() {
    let family = Family::V4;
    let (left, right) = MemoryDevice::pair(MTU, 65_536);
    let left = Filtered::new(left, |packet: &Packet| packet.ports().is_none_or(|ports| ports.1 != Z));
    let World { mut near, mut far, client: _client, server: _server, listeners: _listeners } =
        world_over(left, right, following(family, MoveAt::Boundary), four_servers(family), 2).await;
    let _outcome = redirect(&far, Z);
    let control = near.control();
    assert!(matches!(event(&control).await, MoveEvent::Asked { .. }));
    // Waits for the new server, then goes to the old one.
    soon(near.write_all(b"request")).await.unwrap();
    soon(far.read_exact(&mut [0; 7])).await.unwrap();
    assert!(matches!(event(&control).await, MoveEvent::Failed { .. }));
}

#[tokio::test(start_paused = true)]
async fn o7_the_new_port_may_be_a_redirect_port_that_redirects_again() {
    for family in FAMILIES {
        let World { listeners, mut near, mut far, client: _client, server: _server } =
            world(following(family, MoveAt::Immediately), four_servers(family), 2).await;
        let outcome = redirect(&far, AGAIN);
        let (mut next, _) = soon(listeners[1].accept()).await.unwrap();
        assert_eq!(next.moved_from(), Some(Y));
        soon(far.read_to_end(&mut Vec::new())).await.unwrap();
        assert_eq!(soon(outcome).await.unwrap().unwrap(), RedirectOutcome::Confirmed);
        assert_eq!(near.redirected_to(), Some(Z));
        near.write_all(b"x").await.unwrap();
        soon(next.read_u8()).await.unwrap();
        // Back by the redirect port that was asked for in the first place, which leads to the first server.
        let _outcome = redirect(&next, X);
        let (back, _) = soon(listeners[0].accept()).await.unwrap();
        assert_eq!(back.moved_from(), Some(Z));
        soon(next.read_to_end(&mut Vec::new())).await.unwrap();
        assert_eq!(near.redirected_to(), Some(Y));
    }
}

#[tokio::test(start_paused = true)]
async fn o8_a_client_that_never_closes_is_served_on_or_reset() {
    for family in FAMILIES {
        for on_silence in [Silence::GiveUp, Silence::ResetAfter(Duration::from_secs(40))] {
            let mut options = four_servers(family);
            options.redirect.on_silence = on_silence;
            let client = client_options(family, Continuation::Reconnect);
            let World { server, mut near, mut far, client: _client, listeners: _listeners } =
                world(client, options, 2).await;
            let before = tokio::time::Instant::now();
            let outcome = soon(far.redirect(Z)).await.unwrap();
            let waited = before.elapsed().as_secs();
            if on_silence == Silence::GiveUp {
                near.write_all(b"x").await.unwrap();
                assert_eq!((outcome, waited), (RedirectOutcome::GivenUp, 30));
                soon(far.read_u8()).await.unwrap();
                far.write_u8(7).await.unwrap();
                assert_eq!(soon(near.read_u8()).await.unwrap(), 7);
                let said = server.server_counters().unwrap().redirects_said;
                assert!((20..=80).contains(&said), "{said} duplicate ACKs in 30 s");
            } else {
                assert_eq!((outcome, waited), (RedirectOutcome::Reset, 40));
                let error = soon(near.read_u8()).await.unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
                assert!(soon(far.read_u8()).await.is_err());
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_redirect_that_is_lost_many_times_is_heard_at_last() {
    let family = Family::V4;
    let (left, right) = MemoryDevice::pair(MTU, 65_536);
    let lost = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&lost);
    let right = Filtered::new(right, move |packet: &Packet| {
        let asks = option_of(packet).is_some_and(|option| option.redirect);
        !asks || count.fetch_add(1, Ordering::Relaxed) >= 30
    });
    let World { listeners, far, client: _client, server: _server, near: _near } =
        world_over(left, right, following(family, MoveAt::Immediately), four_servers(family), 2).await;
    let outcome = redirect(&far, Z);
    soon(listeners[1].accept()).await.unwrap();
    assert_eq!(soon(outcome).await.unwrap().unwrap(), RedirectOutcome::Confirmed);
    assert!(lost.load(Ordering::Relaxed) > 30);
}

#[tokio::test(start_paused = true)]
async fn a_connection_is_redirected_once_at_a_time_and_not_by_a_client() {
    let family = Family::V4;
    let client = client_options(family, Continuation::Reconnect);
    let World { near, far, client: _client, server: _server, listeners: _listeners } =
        world(client, four_servers(family), 2).await;
    let outcome = redirect(&far, Z);
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(far.redirect(PORTS[2]).await.unwrap_err().kind(), io::ErrorKind::ResourceBusy);
    assert_eq!(near.redirect(Z).await.unwrap_err().kind(), io::ErrorKind::Unsupported);
    assert_eq!(soon(outcome).await.unwrap().unwrap(), RedirectOutcome::GivenUp);
    assert_eq!(far.redirect(Y).await.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    assert_eq!(far.redirect(0).await.unwrap_err().kind(), io::ErrorKind::InvalidInput);
}

#[tokio::test(start_paused = true)]
async fn what_the_old_server_still_sends_comes_before_what_the_new_one_sends() {
    for family in FAMILIES {
        let World { listeners, mut near, mut far, client: _client, server: _server } =
            world(following(family, MoveAt::Immediately), four_servers(family), 2).await;
        let _outcome = redirect(&far, Z);
        let (mut next, _) = soon(listeners[1].accept()).await.unwrap();
        let new = tokio::spawn(async move {
            next.write_all(&pattern(300_000)).await.unwrap();
            next.shutdown().await.unwrap();
            next
        });
        let old = tokio::spawn(async move {
            far.write_all(&vec![7; 2_000_000]).await.unwrap();
            far.shutdown().await.unwrap();
            far
        });
        let mut all = Vec::new();
        soon(near.read_to_end(&mut all)).await.unwrap();
        assert!(all[..2_000_000].iter().all(|byte| *byte == 7));
        assert!(all[2_000_000..] == pattern(300_000));
        drop((new.await.unwrap(), old.await.unwrap()));
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_may_be_shut_down_or_dropped_at_any_moment_of_a_move() {
    let family = Family::V4;
    for drops in [false, true] {
        for after in (0..60).map(|step| step * 500) {
            let (left, right) = MemoryDevice::pair(MTU, 65_536);
            let (left, right) = (Impaired::new(left, [0, 0, 1000], after), Impaired::new(right, [0; 3], 1));
            let World { client, listeners, mut near, mut far, server } =
                world_over(left, right, following(family, MoveAt::Immediately), four_servers(family), 2)
                    .await;
            near.write_all(b"request").await.unwrap();
            let outcome = redirect(&far, Z);
            let newer = tokio::spawn(async move {
                let (mut next, _) = listeners[1].accept().await.unwrap();
                let _ = next.read_to_end(&mut Vec::new()).await;
            });
            tokio::time::sleep(Duration::from_micros(after)).await;
            if drops {
                drop(near);
            } else {
                near.shutdown().await.unwrap();
            }
            let mut read = Vec::new();
            soon(far.read_to_end(&mut read)).await.unwrap();
            assert_eq!(read, b"request");
            drop(far);
            let outcome = soon(outcome).await.unwrap().unwrap();
            let moved = client.counters().moves == 1;
            let confirmed = outcome == RedirectOutcome::Confirmed;
            assert_eq!(moved, confirmed, "{after} {drops} {outcome:?}");
            if moved {
                soon(newer).await.unwrap();
            }
            tokio::time::sleep(Duration::from_secs(200)).await;
            assert!(client.connection_count() <= usize::from(!drops && !moved), "{after} {drops}");
            assert_eq!(server.connection_count(), 0, "{after} {drops} {moved}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_part_that_fails_takes_the_stream_behind_it_along() {
    let family = Family::V4;
    let cut = Arc::new(AtomicUsize::new(0));
    let (left, right) = MemoryDevice::pair(MTU, 65_536);
    let gone = Arc::clone(&cut);
    let left = Filtered::new(left, move |packet: &Packet| {
        gone.load(Ordering::Relaxed) == 0 || packet.ports().is_none_or(|ports| ports.1 != Y)
    });
    let World { listeners, mut near, far, client: _client, server: _server } =
        world_over(left, right, following(family, MoveAt::Boundary), four_servers(family), 2).await;
    let control = near.control();
    // The old server is not reached any more: what was written to it is lost, and the stream must not go on.
    cut.store(1, Ordering::Relaxed);
    near.write_all(b"lost").await.unwrap();
    near.mark_boundary();
    let _outcome = redirect(&far, Z);
    let (_next, _) = soon(listeners[1].accept()).await.unwrap();
    while !matches!(event(&control).await, MoveEvent::Moved { .. }) {}
    let error = soon(async {
        loop {
            if let Err(error) = near.write_all(&pattern(10_000)).await {
                break error;
            }
        }
    })
    .await;
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    assert_eq!(soon(near.read_u8()).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
}

#[tokio::test(start_paused = true)]
async fn o24_another_address_is_gone_to_only_where_it_is_accepted() {
    for family in FAMILIES {
        for accepted in [true, false] {
            let other: SocketAddr = match family {
                Family::V4 => "198.51.100.20:41009",
                Family::V6 => "[2001:db8:9::20]:41009",
            }
            .parse()
            .unwrap();
            let mut client = following(family, MoveAt::Immediately);
            let length = if family == Family::V4 { 24 } else { 64 };
            client.redirect.accept_prefixes =
                accepted.then_some(Prefix { address: other.ip(), length }).into_iter().collect();
            let mut servers = four_servers(family);
            servers.redirect.services.push(ServicePorts {
                address: other.ip(),
                redirect_port: other.port(),
                service_port: other.port(),
            });
            let World { client, server, mut near, mut far, listeners: _listeners } =
                world(client, servers, 1).await;
            let listener = server.listen(other).unwrap();
            let outcome = soon(far.control().redirect_to(other)).await.unwrap();
            if accepted {
                assert_eq!(outcome, RedirectOutcome::Confirmed);
                let (mut next, _) = soon(listener.accept()).await.unwrap();
                assert_eq!((next.moved_from(), next.local_addr()), (Some(Y), other));
                near.write_all(b"x").await.unwrap();
                soon(next.read_u8()).await.unwrap();
                soon(far.read_to_end(&mut Vec::new())).await.unwrap();
            } else {
                assert_eq!(outcome, RedirectOutcome::GivenUp);
                assert!(client.client_counters().unwrap().moves_refused > 0);
            }
        }
    }
}

/// What one server has seen of the stream.
#[derive(Default)]
struct Part {
    received: Vec<u8>,
    sent: Vec<u8>,
}

/// Serves one part: reads all, says where it is all the time, and asks for the next port after 100 ms.
async fn serve_part(stream: TcpStream, port: u16, part: Arc<Mutex<Part>>) {
    let own = PORTS.iter().position(|own| *own == port).unwrap();
    let control = stream.control();
    let redirecting = tokio::spawn(async move {
        // Under such loss no place to cut may come for 30 s, or the next server not be reached: another one, then.
        for next in (1..PORTS.len()).cycle() {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let outcome = control.redirect(PORTS[(own + next) % PORTS.len()]).await;
            if !matches!(outcome, Ok(RedirectOutcome::GivenUp)) {
                break;
            }
        }
    });
    let (mut reader, mut writer) = tokio::io::split(stream);
    let ended = Arc::new(AtomicUsize::new(0));
    let (read, over) = (Arc::clone(&part), Arc::clone(&ended));
    let reading = async move {
        let mut buffer = [0; 4096];
        loop {
            let length = reader.read(&mut buffer).await.unwrap();
            if length == 0 {
                break;
            }
            read.lock().unwrap().received.extend_from_slice(&buffer[..length]);
        }
        over.store(1, Ordering::Relaxed);
    };
    let writing = async move {
        for number in 0.. {
            if ended.load(Ordering::Relaxed) > 0 {
                break;
            }
            let tag = format!("{port}#{number};");
            writer.write_all(tag.as_bytes()).await.unwrap();
            part.lock().unwrap().sent.extend_from_slice(tag.as_bytes());
            tokio::time::sleep(Duration::from_millis(7)).await;
        }
        writer.shutdown().await.unwrap();
    };
    tokio::join!(reading, writing);
    redirecting.abort();
}

/// How many seeds the thousand redirects are tried with; more with `SHUNT_TEST_FULL`.
fn seeds() -> std::ops::RangeInclusive<u64> {
    if std::env::var_os("SHUNT_TEST_FULL").is_some() { 1..=20 } else { 1..=1 }
}

/// A transfer both ways that is redirected each 100 ms among four servers, `moves` times.
async fn chain(family: Family, move_at: MoveAt, moves: u64, seed: u64) {
    let start = tokio::time::Instant::now();
    let (left, right) = MemoryDevice::pair(MTU, 65_536);
    let impairment = [50, 30, 50];
    let options = following(family, move_at);
    let client = Endpoint::client(Impaired::new(left, impairment, seed), options).unwrap();
    let server =
        Endpoint::server(Impaired::new(right, impairment, seed + 1000), four_servers(family)).unwrap();
    let parts: Arc<Mutex<Vec<Arc<Mutex<Part>>>>> = Arc::default();
    for port in PORTS {
        let (listener, parts) = (server.listen(family.at(port)).unwrap(), Arc::clone(&parts));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let part = Arc::<Mutex<Part>>::default();
                parts.lock().unwrap().push(Arc::clone(&part));
                tokio::spawn(serve_part(stream, port, part));
            }
        });
    }
    let stream = client.connect(family.at(X)).await.unwrap();
    let control = stream.control();
    let (mut reader, mut writer) = tokio::io::split(stream);
    let (mut wrote, mut read) = (Vec::new(), Vec::new());
    let state = || {
        let (client, server) = ((client.counters(), client.client_counters()), server.server_counters());
        format!("{family:?} seed {seed}: {client:?} {server:?}")
    };
    let writing = async {
        for number in 0u64.. {
            if client.counters().moves >= moves {
                break;
            }
            // Else all that is written meanwhile would be kept.
            assert!(start.elapsed() < Duration::from_secs(10_000), "no more moves: {}", state());
            let request = number.to_be_bytes().repeat(1 + (number % 97) as usize);
            writer.write_all(&request).await.unwrap();
            control.mark_boundary();
            wrote.extend_from_slice(&request);
            tokio::time::sleep(Duration::from_millis(number % 11)).await;
        }
        writer.shutdown().await.unwrap();
    };
    let reading = async { reader.read_to_end(&mut read).await.unwrap() };
    let done = tokio::time::timeout(Duration::from_secs(100_000), async { tokio::join!(writing, reading) });
    let done = done.await;
    assert!(done.is_ok(), "{}", state());
    let parts = parts.lock().unwrap();
    let joined = |of: fn(&Part) -> &Vec<u8>| {
        parts.iter().flat_map(|part| of(&part.lock().unwrap()).clone()).collect::<Vec<u8>>()
    };
    assert!(joined(|part| &part.received) == wrote, "what the servers got: {}", state());
    assert!(joined(|part| &part.sent) == read, "what the client got: {}", state());
    assert!(client.counters().moves >= moves && parts.len() as u64 > moves);
    assert_eq!((client.counters().unsent, server.counters().unsent), (0, 0), "W3");
}

#[tokio::test(start_paused = true)]
async fn o7_a_thousand_redirects_under_loss_lose_repeat_and_move_no_byte_over_ipv4() {
    for seed in seeds() {
        chain(Family::V4, MoveAt::Immediately, 500, seed).await;
    }
}

#[tokio::test(start_paused = true)]
async fn o7_a_thousand_redirects_under_loss_lose_repeat_and_move_no_byte_over_ipv6() {
    for seed in seeds() {
        chain(Family::V6, MoveAt::Boundary, 500, seed).await;
    }
}

/// A stream on a service port over a path that is known to translate nothing, and its other end.
async fn direct(left: impl Device + 'static, right: impl Device + 'static, family: Family) -> World {
    let world = world_over(left, right, following(family, MoveAt::default()), four_servers(family), 2).await;
    assert_eq!(world.client.path(family.vip()), PathState::Direct);
    world
}

/// Own ports seen on the wire, in order.
fn own_ports(seen: &Mutex<Vec<u16>>) -> Vec<u16> {
    let mut ports = seen.lock().unwrap().clone();
    ports.dedup();
    ports
}

async fn rebinds(family: Family, lost_requests: usize, lost_confirmations: usize) {
    let (left, right) = MemoryDevice::pair(MTU, 65_536);
    let (asked, confirmed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let sent: Arc<Mutex<Vec<u16>>> = Arc::default();
    let seen = Arc::clone(&sent);
    let left = Filtered::new(left, move |packet: &Packet| {
        let syn = packet.tcp().unwrap().is_syn();
        let asks = !syn && option_of(packet).is_some_and(|option| option.redirect);
        let passes = !asks || asked.fetch_add(1, Ordering::Relaxed) >= lost_requests;
        if passes && !syn {
            seen.lock().unwrap().push(packet.ports().unwrap().0);
        }
        passes
    });
    let right = Filtered::new(right, move |packet: &Packet| {
        let confirms = !packet.tcp().unwrap().flags().contains(TcpFlags::SYN)
            && option_of(packet).is_some_and(|option| option.confirm);
        !confirms || confirmed.fetch_add(1, Ordering::Relaxed) >= lost_confirmations
    });
    let World { client, server, mut near, mut far, listeners: _listeners } =
        direct(left, right, family).await;
    let own = near.local_addr().port();
    let new = if own == 60_999 { 32_768 } else { own + 1 };
    let control = near.control();
    near.write_all(b"one").await.unwrap();
    far.read_exact(&mut [0; 3]).await.unwrap();
    soon(control.rebind(new)).await.unwrap();
    assert_eq!(control.rebind(new).await.unwrap_err().kind(), io::ErrorKind::AddrInUse);
    for _ in 0..3 {
        near.write_all(&pattern(100_000)).await.unwrap();
        let mut there = vec![0; 100_000];
        soon(far.read_exact(&mut there)).await.unwrap();
        far.write_all(&there).await.unwrap();
        soon(near.read_exact(&mut there)).await.unwrap();
        assert!(there == pattern(100_000));
    }
    assert_eq!(own_ports(&sent), [own, new]);
    near.shutdown().await.unwrap();
    soon(far.read_to_end(&mut Vec::new())).await.unwrap();
    drop((near, far));
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!((client.connection_count(), server.connection_count()), (0, 0));
    let counters = server.server_counters().unwrap();
    assert_eq!((counters.rebinds, counters.rebinds_refused), (1, 0));
    assert_eq!(server.counters().resets + client.counters().resets, 0);
}

#[tokio::test(start_paused = true)]
async fn o9_a_client_goes_on_from_another_own_port_however_much_is_lost() {
    for family in FAMILIES {
        for (requests, confirmations) in [(0, 0), (3, 0), (0, 3), (2, 2)] {
            rebinds(family, requests, confirmations).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn o9_a_port_that_is_not_confirmed_is_given_up_and_the_connection_goes_on() {
    let family = Family::V4;
    let (left, right) = MemoryDevice::pair(MTU, 65_536);
    let left = Filtered::new(left, |packet: &Packet| {
        packet.tcp().unwrap().flags().contains(TcpFlags::SYN) || option_of(packet).is_none()
    });
    let World { mut near, mut far, client: _client, server: _server, listeners: _listeners } =
        direct(left, right, family).await;
    let own = near.local_addr().port();
    let error = soon(near.control().rebind(if own == 60_999 { 32_768 } else { own + 1 })).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    near.write_all(b"still").await.unwrap();
    soon(far.read_exact(&mut [0; 5])).await.unwrap();
    far.write_all(&pattern(50_000)).await.unwrap();
    let mut all = vec![0; 50_000];
    soon(near.read_exact(&mut all)).await.unwrap();
    assert!(all == pattern(50_000));
}

#[tokio::test(start_paused = true)]
async fn o9_a_plain_connection_cannot_change_its_port() {
    let family = Family::V4;
    let mut options = following(family, MoveAt::default());
    options.redirect.vips[0].continuation = Continuation::Plain;
    let (left, right) = MemoryDevice::pair(MTU, 65_536);
    let client = Endpoint::client(left, options).unwrap();
    let server = Endpoint::server(right, four_servers(family)).unwrap();
    let listener = server.listen(family.at(X)).unwrap();
    let near = client.connect(family.at(X)).await.unwrap();
    let (far, _) = listener.accept().await.unwrap();
    assert_eq!(near.control().rebind(40_000).await.unwrap_err().kind(), io::ErrorKind::Unsupported);
    assert_eq!(far.redirect(Z).await.unwrap_err().kind(), io::ErrorKind::Unsupported);
}

#[tokio::test(start_paused = true)]
async fn o9_a_stream_that_has_changed_its_port_still_moves() {
    let family = Family::V4;
    let (left, right) = MemoryDevice::pair(MTU, 65_536);
    let World { listeners, mut near, mut far, client: _client, server: _server } =
        direct(left, right, family).await;
    let own = near.local_addr().port();
    soon(near.control().rebind(if own == 60_999 { 32_768 } else { own + 1 })).await.unwrap();
    near.mark_boundary();
    let outcome = redirect(&far, Z);
    let (mut next, _) = soon(listeners[1].accept()).await.unwrap();
    near.write_all(b"x").await.unwrap();
    soon(next.read_u8()).await.unwrap();
    soon(far.read_to_end(&mut Vec::new())).await.unwrap();
    assert_eq!(soon(outcome).await.unwrap().unwrap(), RedirectOutcome::Confirmed);
}
