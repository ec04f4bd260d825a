//! Endpoints as programs use them, over a link in memory. Time is virtual where it would have to pass.

mod common;

use std::io;
use std::time::Duration;

use bytes::BytesMut;
use common::{
    Family, Lossy, MTU, X, Y, client_options, echo, endpoints, exchange, pattern, server_options,
    within_a_minute,
};
use shunt_stack::device::{Device, MemoryDevice};
use shunt_stack::endpoint::{Endpoint, TcpOptions};
use shunt_stack::redirect::{Continuation, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

async fn redirected_echo(family: Family, continuation: Continuation) {
    let (client, server) = endpoints(client_options(family, continuation), server_options(family));
    echo(server.listen(family.at(Y)).unwrap());
    let stream = client.connect(family.at(X)).await.unwrap();
    assert_eq!(stream.peer_addr(), family.at(X));
    assert_eq!(stream.local_addr().ip(), family.own());
    let mut stream = stream;
    stream.write_all(b"hello").await.unwrap();
    let mut answer = [0; 5];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"hello");
    assert_eq!(stream.redirected_to(), Some(Y));
    let data = pattern(1 << 20);
    assert_eq!(exchange(stream, &data).await.unwrap(), data);
    let counters = client.client_counters().unwrap();
    let handovers = u64::from(continuation == Continuation::Handover);
    assert_eq!((counters.handovers_completed, counters.reconnected), (handovers, 1 - handovers));
}

#[tokio::test]
async fn echo_is_redirected_by_reconnect_over_ipv4() {
    within_a_minute(redirected_echo(Family::V4, Continuation::Reconnect)).await;
}

#[tokio::test]
async fn echo_is_redirected_by_reconnect_over_ipv6() {
    within_a_minute(redirected_echo(Family::V6, Continuation::Reconnect)).await;
}

#[tokio::test]
async fn echo_is_redirected_by_handover_over_ipv4() {
    within_a_minute(redirected_echo(Family::V4, Continuation::Handover)).await;
}

#[tokio::test]
async fn echo_is_redirected_by_handover_over_ipv6() {
    within_a_minute(redirected_echo(Family::V6, Continuation::Handover)).await;
}

#[tokio::test]
async fn auto_reconnects_first_and_hands_over_later() {
    let family = Family::V4;
    let (client, server) = endpoints(client_options(family, Continuation::Auto), server_options(family));
    echo(server.listen(family.at(Y)).unwrap());
    for _ in 0..3 {
        let stream = client.connect(family.at(X)).await.unwrap();
        assert_eq!(exchange(stream, b"hello").await.unwrap(), b"hello");
    }
    let counters = client.client_counters().unwrap();
    assert_eq!((counters.reconnected, counters.handovers_completed), (1, 2));
}

#[tokio::test]
async fn a_plain_server_is_reached_at_the_port_asked() {
    let family = Family::V4;
    let mut options = server_options(family);
    options.redirect = ServerConfig::default();
    let (client, server) = endpoints(client_options(family, Continuation::Auto), options);
    echo(server.listen("0.0.0.0:443".parse().unwrap()).unwrap());
    let stream = within_a_minute(client.connect(family.at(X))).await.unwrap();
    assert_eq!(stream.redirected_to(), None);
    let data = pattern(100_000);
    assert_eq!(within_a_minute(exchange(stream, &data)).await.unwrap(), data);
}

#[tokio::test]
async fn a_service_that_nobody_listens_on_is_not_redirected_to() {
    let family = Family::V4;
    let (client, server) = endpoints(client_options(family, Continuation::Auto), server_options(family));
    echo(server.listen(family.at(X)).unwrap());
    let stream = within_a_minute(client.connect(family.at(X))).await.unwrap();
    assert_eq!(stream.redirected_to(), None);
    assert_eq!(exchange(stream, b"hello").await.unwrap(), b"hello");
}

async fn megabyte_under_loss(family: Family, continuation: Continuation, buffer: usize, seed: u64) {
    let (left, right) = MemoryDevice::pair(MTU, 65_536);
    let (mut near, mut far) = (client_options(family, continuation), server_options(family));
    for tcp in [&mut near.tcp, &mut far.tcp] {
        (tcp.receive_buffer, tcp.send_buffer) = (buffer, buffer);
    }
    let client = Endpoint::client(Lossy::new(left, 20, seed), near).unwrap();
    let server = Endpoint::server(Lossy::new(right, 20, seed + 1000), far).unwrap();
    echo(server.listen(family.at(Y)).unwrap());
    echo(server.listen(family.at(X)).unwrap());
    let data = pattern(1 << 20);
    let work = async {
        let mut stream = client.connect(family.at(X)).await.unwrap();
        // Odd lengths keep windows off the units of their scale.
        stream.write_all(b"hello").await.unwrap();
        stream.read_exact(&mut [0; 5]).await.unwrap();
        assert!(exchange(stream, &data).await.unwrap() == data);
    };
    let done = tokio::time::timeout(Duration::from_secs(600), work).await;
    assert!(
        done.is_ok(),
        "{family:?} {continuation:?} {buffer} seed {seed}: {:?} {:?}",
        client.counters(),
        server.counters()
    );
}

/// How many seeds a test under loss tries; many more with `SHUNT_TEST_FULL`.
fn seeds() -> std::ops::RangeInclusive<u64> {
    if std::env::var_os("SHUNT_TEST_FULL").is_some() { 1..=500 } else { 1..=20 }
}

#[tokio::test(start_paused = true)]
async fn a_megabyte_passes_both_ways_under_two_percent_loss() {
    for seed in seeds() {
        megabyte_under_loss(Family::V4, Continuation::Reconnect, 65_535, seed).await;
        megabyte_under_loss(Family::V6, Continuation::Handover, 65_535, seed).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_megabyte_passes_both_ways_under_loss_with_windows_of_any_size() {
    for seed in seeds() {
        for buffer in [3_000, 65_536, 100_001, 400_000] {
            megabyte_under_loss(Family::V4, Continuation::Handover, buffer, seed).await;
        }
    }
}

#[tokio::test]
async fn full_windows_both_ways_do_not_wait_for_each_other() {
    for buffer in [65_535, 65_536, 300_000] {
        let family = Family::V4;
        let (mut near, mut far) = (client_options(family, Continuation::Reconnect), server_options(family));
        for tcp in [&mut near.tcp, &mut far.tcp] {
            (tcp.receive_buffer, tcp.send_buffer) = (buffer, buffer);
        }
        let (client, server) = endpoints(near, far);
        echo(server.listen(family.at(Y)).unwrap());
        for first in 1..20 {
            let mut stream = client.connect(family.at(X)).await.unwrap();
            stream.write_all(&pattern(first)).await.unwrap();
            stream.read_exact(&mut vec![0; first]).await.unwrap();
            let data = pattern(1 << 20);
            let back = tokio::time::timeout(Duration::from_secs(20), exchange(stream, &data)).await;
            assert!(back.expect("no stall").unwrap() == data, "{buffer} {first}");
        }
    }
}

#[tokio::test]
async fn half_close_leaves_the_other_direction_open() {
    let family = Family::V4;
    let (client, server) = endpoints(client_options(family, Continuation::Reconnect), server_options(family));
    let listener = server.listen(family.at(Y)).unwrap();
    let serve = tokio::spawn(async move {
        let (mut stream, peer) = listener.accept().await.unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.unwrap();
        stream.write_all(&all).await.unwrap();
        stream.write_all(&pattern(300_000)).await.unwrap();
        stream.shutdown().await.unwrap();
        (peer, listener)
    });
    let mut stream = client.connect(family.at(X)).await.unwrap();
    stream.write_all(b"question").await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(stream.write(b"more").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    let mut answer = Vec::new();
    within_a_minute(stream.read_to_end(&mut answer)).await.unwrap();
    assert_eq!(&answer[..8], b"question");
    assert_eq!(answer[8..], pattern(300_000));
    assert_eq!(serve.await.unwrap().0, stream.local_addr());
}

#[tokio::test]
async fn a_port_without_listener_refuses() {
    let family = Family::V4;
    let (client, _server) = endpoints(client_options(family, Continuation::Auto), server_options(family));
    let error = within_a_minute(client.connect(family.at(X))).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    let error = within_a_minute(client.connect(family.at(9))).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
}

#[tokio::test(start_paused = true)]
async fn a_silent_peer_times_the_connect_out() {
    let family = Family::V4;
    let (left, _right) = MemoryDevice::pair(MTU, 1024);
    let mut options = client_options(family, Continuation::Auto);
    options.connect_timeout = Duration::from_secs(10);
    let client = Endpoint::client(left, options).unwrap();
    let before = tokio::time::Instant::now();
    let error = client.connect(family.at(X)).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    let waited = before.elapsed();
    assert!(waited >= Duration::from_secs(10) && waited < Duration::from_secs(11), "{waited:?}");
}

#[tokio::test]
async fn a_thousand_connections_at_once_are_all_redirected() {
    thousand_connections().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_thousand_connections_at_once_are_all_redirected_on_several_threads() {
    thousand_connections().await;
}

async fn thousand_connections() {
    for continuation in [Continuation::Reconnect, Continuation::Handover] {
        let family = Family::V4;
        let mut options = server_options(family);
        options.backlog = 2000;
        options.half_open_limit = 2000;
        let (client, server) = endpoints(client_options(family, continuation), options);
        echo(server.listen(family.at(Y)).unwrap());
        let mut tasks = JoinSet::new();
        for number in 0..1000u32 {
            let client = client.clone();
            tasks.spawn(async move {
                let stream = client.connect(family.at(X)).await.unwrap();
                let data = number.to_be_bytes().repeat(500);
                assert_eq!(exchange(stream, &data).await.unwrap(), data);
            });
        }
        within_a_minute(tasks.join_all()).await;
        let counters = client.client_counters().unwrap();
        assert_eq!(counters.reconnected + counters.handovers_completed, 1000, "{counters:?}");
        assert_eq!(server.counters().established, 1000);
    }
}

#[tokio::test(start_paused = true)]
async fn an_overflowing_backlog_delays_connections_but_loses_none() {
    for continuation in [Continuation::Reconnect, Continuation::Handover] {
        let family = Family::V4;
        let mut options = server_options(family);
        options.backlog = 4;
        let (client, server) = endpoints(client_options(family, continuation), options);
        let listener = server.listen(family.at(Y)).unwrap();
        let mut tasks = JoinSet::new();
        for _ in 0..40 {
            let client = client.clone();
            tasks.spawn(async move {
                let stream = client.connect(family.at(X)).await?;
                exchange(stream, b"hello").await
            });
        }
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert!(server.counters().established <= 4, "{:?}", server.counters());
        echo(listener);
        let results = tokio::time::timeout(Duration::from_secs(300), tasks.join_all()).await.unwrap();
        let served =
            results.iter().filter(|result| result.as_ref().is_ok_and(|back| back == b"hello")).count();
        assert_eq!(served, 40, "{continuation:?} {:?} {:?}", client.client_counters(), server.counters());
    }
}

#[tokio::test(start_paused = true)]
async fn half_open_connections_make_room_for_new_ones() {
    let family = Family::V4;
    let mut options = server_options(family);
    options.half_open_limit = 8;
    let (left, right) = MemoryDevice::pair(MTU, 1024);
    let server = Endpoint::server(right, options).unwrap();
    echo(server.listen(family.at(X)).unwrap());
    for port in 1..=100 {
        let own = std::net::SocketAddr::new(family.own(), port);
        let syn =
            shunt_stack::wire::Segment::bare(own, family.at(X), shunt_stack::wire::TcpFlags::SYN).emit();
        left.send(&syn).await.unwrap();
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!((server.connection_count(), server.counters().half_open_dropped), (8, 92));
    tokio::time::sleep(Duration::from_secs(70)).await;
    assert_eq!(server.connection_count(), 0);
}

#[tokio::test]
async fn the_task_ends_when_the_endpoint_is_dropped() {
    let family = Family::V4;
    let (left, right) = MemoryDevice::pair(MTU, 1024);
    let client = Endpoint::client(left, client_options(family, Continuation::Auto)).unwrap();
    drop(client);
    let ended = within_a_minute(right.recv(&mut BytesMut::new())).await;
    assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
}

#[tokio::test]
async fn dropping_an_endpoint_resets_its_connections_and_wakes_everybody() {
    let family = Family::V4;
    let (client, server) = endpoints(client_options(family, Continuation::Reconnect), server_options(family));
    let listener = server.listen(family.at(Y)).unwrap();
    let mut near = client.connect(family.at(X)).await.unwrap();
    let (mut far, _) = listener.accept().await.unwrap();
    let waiting = tokio::spawn(async move { listener.accept().await.map(drop) });
    let reading = tokio::spawn(async move { far.read_u8().await });
    tokio::task::yield_now().await;
    drop(server);
    let error = within_a_minute(waiting).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotConnected);
    let error = within_a_minute(reading).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
    let error = within_a_minute(near.read_u8()).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test(start_paused = true)]
async fn closing_an_endpoint_delivers_what_was_written() {
    let family = Family::V4;
    let (client, server) = endpoints(client_options(family, Continuation::Reconnect), server_options(family));
    let listener = server.listen(family.at(Y)).unwrap();
    let mut near = client.connect(family.at(X)).await.unwrap();
    let (mut far, _) = listener.accept().await.unwrap();
    near.write_all(&pattern(60_000)).await.unwrap();
    drop(near);
    let closing = tokio::spawn(client.close());
    let mut all = Vec::new();
    far.read_to_end(&mut all).await.unwrap();
    assert_eq!(all, pattern(60_000));
    drop(far);
    tokio::time::timeout(Duration::from_secs(30), closing).await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn flows_and_ports_are_free_again_after_time_wait() {
    let family = Family::V4;
    let mut options = client_options(family, Continuation::Reconnect);
    options.ports = 40_000..=40_001;
    let (client, server) = endpoints(options, server_options(family));
    echo(server.listen(family.at(Y)).unwrap());
    for _ in 0..2 {
        let stream = client.connect(family.at(X)).await.unwrap();
        assert_eq!(exchange(stream, b"hello").await.unwrap(), b"hello");
    }
    // C8: both ports are in TIME-WAIT.
    let error = client.connect(family.at(X)).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrNotAvailable);
    tokio::time::sleep(Duration::from_secs(15)).await;
    assert_eq!((client.connection_count(), server.connection_count()), (0, 0));
    let stream = client.connect(family.at(X)).await.unwrap();
    assert_eq!(exchange(stream, b"hello").await.unwrap(), b"hello");
    assert_eq!(client.client_counters().unwrap().port_collisions, 0);
}

#[tokio::test]
async fn a_writer_waits_for_a_reader() {
    let family = Family::V4;
    let (client, server) = endpoints(client_options(family, Continuation::Reconnect), server_options(family));
    let listener = server.listen(family.at(Y)).unwrap();
    let mut near = client.connect(family.at(X)).await.unwrap();
    let (mut far, _) = listener.accept().await.unwrap();
    let data = pattern(4 << 20);
    let mut written = 0;
    while let Ok(result) =
        tokio::time::timeout(Duration::from_millis(200), near.write(&data[written..])).await
    {
        written += result.unwrap();
    }
    let tcp = TcpOptions::default();
    let room = tcp.send_buffer + tcp.receive_buffer;
    assert!(written <= room, "{written} bytes were taken although nobody reads");
    let rest = data[written..].to_vec();
    let writing = tokio::spawn(async move {
        near.write_all(&rest).await.unwrap();
        near.shutdown().await.unwrap();
        near
    });
    let mut all = Vec::new();
    within_a_minute(far.read_to_end(&mut all)).await.unwrap();
    assert!(all == data);
    drop(writing.await.unwrap());
}

#[tokio::test]
async fn dropping_a_stream_with_unread_data_resets_the_peer() {
    let family = Family::V4;
    let (client, server) = endpoints(client_options(family, Continuation::Reconnect), server_options(family));
    let listener = server.listen(family.at(Y)).unwrap();
    let mut near = client.connect(family.at(X)).await.unwrap();
    let (mut far, _) = listener.accept().await.unwrap();
    near.write_all(b"nobody reads this").await.unwrap();
    far.read_u8().await.unwrap();
    drop(far);
    let error = within_a_minute(near.read_u8()).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test(start_paused = true)]
async fn unread_data_outlives_time_wait() {
    let family = Family::V4;
    let (client, server) = endpoints(client_options(family, Continuation::Reconnect), server_options(family));
    let listener = server.listen(family.at(Y)).unwrap();
    let mut near = client.connect(family.at(X)).await.unwrap();
    let (mut far, _) = listener.accept().await.unwrap();
    near.shutdown().await.unwrap();
    assert_eq!(far.read(&mut [0; 8]).await.unwrap(), 0);
    far.write_all(b"for later").await.unwrap();
    drop(far);
    tokio::time::sleep(Duration::from_secs(60)).await;
    let mut all = Vec::new();
    near.read_to_end(&mut all).await.unwrap();
    assert_eq!(all, b"for later");
}

#[tokio::test]
async fn the_roles_and_addresses_of_an_endpoint_are_checked() {
    let family = Family::V4;
    let (client, server) = endpoints(client_options(family, Continuation::Auto), server_options(family));
    assert_eq!(server.connect(family.at(X)).await.unwrap_err().kind(), io::ErrorKind::Unsupported);
    assert_eq!(client.listen(family.at(Y)).err().unwrap().kind(), io::ErrorKind::Unsupported);
    assert_eq!(client.connect(Family::V6.at(X)).await.unwrap_err().kind(), io::ErrorKind::AddrNotAvailable);
    assert_eq!(client.connect(family.at(0)).await.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    let first = server.listen(family.at(Y)).unwrap();
    assert_eq!(server.listen(family.at(Y)).err().unwrap().kind(), io::ErrorKind::AddrInUse);
    drop(first);
    assert!(server.listen(family.at(Y)).is_ok());
}
