//! What is remembered of paths and flows, and its bounds.

use super::*;

fn fail_by_silence(w: &mut World, port: u16) {
    w.local.set_port(port);
    for _ in 0..3 {
        let syn = w.syn(ISS, TSVAL);
        w.local(syn);
    }
    let answer = w.syn_ack(X, IRS, None);
    assert!(w.remote(answer).is_some());
}

#[test]
fn c6_two_connects_without_an_answer_make_the_vip_plain_and_later_one_trial_is_made() {
    let mut w = world(Continuation::Auto);
    fail_by_silence(&mut w, 50_001);
    assert_eq!(w.client.path(w.vip.ip()), PathState::Unknown);
    w.pass(Duration::from_secs(1));
    fail_by_silence(&mut w, 50_002);
    assert_eq!(w.client.path(w.vip.ip()), PathState::Plain);
    w.local.set_port(50_003);
    let syn = w.syn(ISS, TSVAL);
    assert_eq!(option_of(&w.local(syn).unwrap()), None);

    w.pass(Duration::from_secs(600));
    w.local.set_port(50_004);
    w.open();
    w.local.set_port(50_005);
    let other = w.syn(ISS, TSVAL);
    assert_eq!(option_of(&w.local(other).unwrap()), None, "one trial at a time");
    w.local.set_port(50_004);
    let redirect = w.redirect(Y, Some(w.local));
    w.remote(redirect);
    assert_eq!(w.client.path(w.vip.ip()), PathState::Unknown);
}

#[test]
fn paths_are_learnt_apart() {
    let mut w = world(Continuation::Auto);
    w.client.set_path(w.vip.ip(), 1);
    w.learn_direct();
    w.client.set_path(w.vip.ip(), 2);
    assert!(w.open().confirm);
    w.client.retain(|_, _| false);
    w.client.set_path(w.vip.ip(), 1);
    assert!(!w.open().confirm);
}

#[test]
fn a_full_table_lets_further_connects_go_plain() {
    let mut w = world(Continuation::Auto);
    w.client.config.max_flows = 1;
    w.open();
    w.local.set_port(50_001);
    let syn = w.syn(ISS, TSVAL);
    assert_eq!(w.local(syn.clone()), Some(syn));
    assert_eq!(w.client.counters().table_full, 1);
}

#[test]
fn c12_flows_are_freed_with_their_sockets_and_survive_a_restart() {
    let mut w = world(Continuation::Auto);
    w.reconnect(Some(w.local));
    w.client.retain(|local, vip| {
        (local, vip) == ("10.1.0.2:50000".parse().unwrap(), "203.0.113.10:443".parse().unwrap())
    });
    let records: Vec<FlowRecord> = w.client.flows().collect();
    assert_eq!(records.len(), 1);

    let mut restarted = world(Continuation::Auto);
    assert!(restarted.client.restore(records[0]));
    assert!(!restarted.client.restore(records[0]));
    let data = restarted.local_segment(TcpFlags::ACK, ISS + 1, b"on");
    assert_eq!(ports(&restarted.local(data).unwrap()).1, Y);
    let answer = restarted.segment(Y, TcpFlags::ACK, IRS + 1, ISS + 3, b"and on");
    assert_eq!(ports(&restarted.remote(answer).unwrap()).0, X);
    restarted.client.retain(|_, _| false);
    assert_eq!(restarted.client.flow_count(), 0);
    assert!(restarted.client.services.is_empty() && restarted.client.timers.is_empty());
}

#[test]
fn c12_an_answer_about_an_old_socket_frees_no_later_flow_with_its_ports() {
    let mut w = world(Continuation::Auto);
    w.reconnect(Some(w.local));
    let asked = w.client.mark();
    // The program has closed, and another connect has got the same port.
    let syn = w.syn(ISS + 70_000, TSVAL);
    w.local(syn);
    w.client.retain_since(asked, |_, _| false);
    assert_eq!(w.client.flow_count(), 1);
    w.client.retain_since(w.client.mark(), |_, _| false);
    assert_eq!(w.client.flow_count(), 0);
}

#[test]
fn c12_a_redirect_that_an_earlier_run_asked_for_is_not_passed_up() {
    let mut w = world(Continuation::Auto);
    let redirect = w.redirect(Y, Some(w.local));
    assert!(w.remote(redirect).is_none());
    assert_eq!(w.client.counters().stray_syn_acks, 1);
    // The local TCP asks again; what says nothing of a redirect is not ours to judge.
    w.open();
    let mut other = world(Continuation::Auto);
    for option in [None, Some(confirm())] {
        let answer = other.syn_ack(X, IRS, option);
        assert_eq!(other.remote(answer.clone()), Some(answer));
    }
}

#[test]
fn c3_a_damaged_syn_ack_moves_no_flow_on() {
    let damaged = |packet: Packet| {
        let mut bytes = packet.into_buffer();
        let last = bytes.len() - 1;
        bytes[last] ^= 0x38;
        Packet::from_slice(&bytes).unwrap()
    };
    let mut w = world(Continuation::Auto);
    w.open();
    let mut redirect = damaged(w.redirect(Y, Some(w.local)));
    assert_eq!(w.client.handle_remote(w.now, &mut redirect), Action::Drop);
    assert!(w.sent().is_empty());
    let redirect = w.redirect(Y, Some(w.local));
    assert!(w.remote(redirect).is_none());
    w.sent_one(Towards::Network);
    let mut confirmed = damaged(w.syn_ack(Y, IRS + 1000, Some(confirm())));
    assert_eq!(w.client.handle_remote(w.now, &mut confirmed), Action::Drop);
    assert!(w.events().is_empty());
    assert_eq!(w.client.counters().bad_checksums, 2);
    let confirmed = w.syn_ack(Y, IRS + 1000, Some(confirm()));
    assert!(w.remote(confirmed).is_some());
}

#[test]
fn a_new_iss_on_the_same_ports_begins_anew() {
    let mut w = world(Continuation::Auto);
    w.reconnect(Some(w.local));
    let syn = w.syn(ISS + 100_000, TSVAL);
    assert!(option_of(&w.local(syn).unwrap()).is_some());
    assert_eq!(w.client.flow_count(), 1);
    assert!(w.client.services.is_empty());
}

#[test]
fn c6_connects_that_fail_together_in_an_outage_are_one_failure() {
    let mut w = world(Continuation::Auto);
    for port in 50_001..50_020 {
        w.local.set_port(port);
        w.open();
    }
    w.pass(Duration::from_secs(3));
    for port in 50_001..50_020 {
        w.local.set_port(port);
        for _ in 0..2 {
            let syn = w.syn(ISS, TSVAL);
            w.local(syn);
        }
        let answer = w.syn_ack(X, IRS, None);
        assert!(w.remote(answer).is_some());
    }
    assert_eq!(w.client.counters().plain_silence, 19);
    assert_eq!(w.client.path(w.vip.ip()), PathState::Unknown);
}

#[test]
fn c2_where_redirection_has_worked_one_unconfirmed_answer_is_not_the_vips_fault() {
    let mut w = world(Continuation::Auto);
    w.learn_direct();
    for expected in [PathState::Direct, PathState::Plain] {
        w.pass(Duration::from_secs(1));
        w.open();
        let plain = w.syn_ack(X, IRS, None);
        assert!(w.remote(plain).is_none());
        w.sent();
        assert_eq!(w.client.path(w.vip.ip()), expected);
        w.client.retain(|_, _| false);
    }
}
