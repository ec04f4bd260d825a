//! C11: when a connection may be left to a fast path, and when it comes back.

use super::moves::{RCV_NXT, SND_NXT, SND_UNA};
use super::*;

const AFTER: u32 = 4;
const Z: u16 = 41_002;

fn settling(continuation: Continuation) -> World {
    let mut world = world(continuation);
    world.client.config.resettle_after = Some(AFTER);
    world
}

impl World {
    fn swaps(&mut self) -> Vec<SwapChange> {
        std::iter::from_fn(|| self.client.poll_swap()).collect()
    }

    fn swap(&self, service_port: u16) -> Swap {
        Swap { local: self.local, vip: self.vip, service_port }
    }

    fn says(&mut self, flags: TcpFlags) {
        let ack = self.own(flags, SND_NXT, RCV_NXT, &[]);
        assert!(self.local(ack).is_some());
    }

    /// An established connection, settled since its first segment.
    fn settled(&mut self) {
        self.established();
        assert_eq!(self.swaps(), [SwapChange::Settled(self.swap(Y))]);
    }

    /// A settled connection that a request has brought back.
    fn returned(&mut self) {
        self.settled();
        assert_eq!(self.ask(asking()), []);
        assert_eq!(self.swaps(), [SwapChange::Unsettled(self.swap(Y))]);
    }
}

fn asking() -> RedirectOption {
    RedirectOption { redirect: true, port: Some(Z), ..Default::default() }
}

#[test]
fn c11_a_connection_settles_when_its_handshake_is_over_and_is_told_once() {
    let mut world = settling(Continuation::Reconnect);
    world.settled();
    world.says(TcpFlags::ACK);
    let answer = world.segment_of_server(Y, TcpFlags::ACK, RCV_NXT, SND_UNA, None, &[]);
    assert_eq!(world.remote(answer).and_then(|packet| packet.source_socket()), Some(world.vip));
    assert_eq!(world.swaps(), []);
}

#[test]
fn without_a_fast_path_nothing_settles() {
    let mut world = world(Continuation::Reconnect);
    world.established();
    for _ in 0..100 {
        world.says(TcpFlags::ACK);
    }
    assert_eq!(world.swaps(), []);
}

#[test]
fn c11_a_connection_that_came_back_and_whose_local_tcp_closes_settles_no_more() {
    for flags in [TcpFlags::ACK | TcpFlags::FIN, TcpFlags::RST] {
        let mut world = settling(Continuation::Reconnect);
        world.returned();
        world.says(flags);
        for _ in 0..10 {
            world.says(TcpFlags::ACK);
        }
        assert_eq!(world.swaps(), []);
    }
}

#[test]
fn c11_a_handover_settles_only_after_its_end() {
    let mut world = settling(Continuation::Handover);
    world.hand_over();
    for _ in 0..10 {
        let data = world.own(TcpFlags::ACK, ISS + 1, IRS + 1, &[7; 10]);
        world.local(data);
    }
    world.sent();
    assert_eq!(world.swaps(), [], "the service port has not shown that it took it (C10)");
    let data = world.segment_of_server(Y, TcpFlags::ACK, IRS + 1, ISS + 11, None, &[2; 20]);
    assert!(world.remote(data).is_some());
    assert_eq!(world.swaps(), [SwapChange::Settled(world.swap(Y))]);
}

#[test]
fn c12_what_ends_is_taken_back_before_anything_leaves() {
    let mut world = settling(Continuation::Reconnect);
    world.settled();
    world.client.retain(|_, _| false);
    assert_eq!(world.swaps(), [SwapChange::Unsettled(world.swap(Y))]);
    let mut world = settling(Continuation::Reconnect);
    world.settled();
    // The same ports, another connection.
    let syn = world.syn(ISS + 77, TSVAL + 9);
    assert!(world.local(syn).is_some());
    assert_eq!(world.swaps(), [SwapChange::Unsettled(world.swap(Y))]);
}

#[test]
fn c11_a_connection_on_the_port_asked_settles_with_one_port() {
    let mut world = settling(Continuation::Reconnect);
    world.open();
    let stays = world.syn_ack(X, IRS, Some(confirm()));
    assert!(world.remote(stays).is_some());
    assert_eq!(world.swaps(), []);
    world.says(TcpFlags::ACK);
    assert_eq!(world.swaps(), [SwapChange::Settled(world.swap(X))]);
}

#[test]
fn c12_a_connection_in_time_wait_leaves_the_fast_path_for_good_and_stays() {
    let mut world = settling(Continuation::Reconnect);
    let before = world.client.mark();
    world.settled();
    let (local, vip) = (world.local, world.vip);
    let now = world.client.mark();
    world.client.rest(before, local, vip);
    assert!(world.client.is_settled(local, vip), "another connection with the same ends");
    world.client.rest(now, local, vip);
    assert_eq!(world.swaps(), [SwapChange::Unsettled(world.swap(Y))]);
    assert!(!world.client.is_settled(local, vip));
    world.client.rest(now, local, vip);
    // The peer repeats its FIN, and is answered.
    let last = world.segment_of_server(Y, TcpFlags::ACK | TcpFlags::FIN, RCV_NXT, SND_UNA, None, &[]);
    assert_eq!(world.remote(last).and_then(|packet| packet.source_socket()), Some(vip));
    for _ in 0..10 * AFTER {
        world.says(TcpFlags::ACK);
    }
    assert_eq!(world.swaps(), []);
    assert_eq!(world.client.flow_count(), 1);
}

#[test]
fn c12_a_flow_is_freed_alone_unless_it_began_since() {
    let mut world = settling(Continuation::Reconnect);
    let before = world.client.mark();
    world.settled();
    let (local, vip) = (world.local, world.vip);
    assert!(!world.client.free(before, local, vip));
    assert_eq!(world.client.begun_before(before).count(), 0);
    let now = world.client.mark();
    assert_eq!(world.client.begun_before(now).collect::<Vec<_>>(), [(local, vip)]);
    assert!(world.client.free(now, local, vip));
    assert_eq!(world.swaps(), [SwapChange::Unsettled(world.swap(Y))]);
    assert!(!world.client.free(now, local, vip));
}

#[test]
fn c12_a_connection_of_an_earlier_run_settles_at_once() {
    let mut world = settling(Continuation::Auto);
    let record = FlowRecord { local: world.local, vip: world.vip, service_port: Y, irs: IRS.0 };
    assert!(world.client.restore(record));
    assert_eq!(world.swaps(), [SwapChange::Settled(world.swap(Y))]);
}

#[test]
fn m3_a_settled_connection_that_is_asked_to_move_comes_back_and_is_judged_when_asked_again() {
    let mut world = settling(Continuation::Reconnect);
    world.settled();
    // Who knows what has passed since.
    assert_eq!(world.ask(asking()), []);
    assert_eq!(world.swaps(), [SwapChange::Unsettled(world.swap(Y))]);
    assert_eq!(world.client.counters().moves_inexact, 1);
    assert_eq!(world.ask(asking()), [], "the local TCP has not spoken yet");
    world.says(TcpFlags::ACK);
    let moves = world.ask(asking());
    assert!(matches!(moves[..], [ClientEvent::MoveAsked { .. }]), "{moves:?}");
    assert_eq!(world.client.counters().moves_inexact, 2);
    // Some segments later it settles again; what it was asked already does not bring it back.
    while world.swaps().is_empty() {
        world.says(TcpFlags::ACK);
    }
    assert_eq!(world.ask(asking()), []);
    assert_eq!(world.swaps(), []);
}

#[test]
fn a_stranger_who_brings_connections_back_does_so_less_and_less_often() {
    let mut world = settling(Continuation::Reconnect);
    world.settled();
    let mut before = AFTER / 2;
    for _ in 0..5 {
        assert_eq!(world.ask(asking()), []);
        assert_eq!(world.swaps().len(), 1);
        let mut segments = 0;
        while world.swaps().is_empty() {
            world.says(TcpFlags::ACK);
            segments += 1;
        }
        assert!(segments >= before * 2 - 2, "{segments} {before}");
        before = segments;
    }
}

#[test]
fn p1_a_change_of_the_own_port_needs_the_machine() {
    let mut world = settling(Continuation::Reconnect);
    world.settled();
    let (local, vip, now) = (world.local, world.vip, world.now);
    world.client.rebind(now, local, vip, 50_777, None).unwrap();
    assert_eq!(world.swaps(), [SwapChange::Unsettled(world.swap(Y))]);
    for _ in 0..100 {
        world.says(TcpFlags::ACK);
    }
    assert_eq!(world.swaps(), []);
}

#[test]
fn a_connection_that_the_fast_path_has_no_room_for_settles_again_later() {
    let mut world = settling(Continuation::Reconnect);
    world.settled();
    let swap = world.swap(Y);
    world.client.refuse_swap(&swap);
    assert_eq!(world.swaps(), [], "the fast path has nothing to take back");
    for _ in 0..AFTER - 1 {
        world.says(TcpFlags::ACK);
        assert_eq!(world.swaps(), []);
    }
    world.says(TcpFlags::ACK);
    assert_eq!(world.swaps(), [SwapChange::Settled(swap)]);
}
