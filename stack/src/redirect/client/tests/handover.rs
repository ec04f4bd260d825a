//! C10: handovers, complete and not.

use super::*;

fn direct_world() -> World {
    let mut w = world(Continuation::Auto);
    w.learn_direct();
    w
}

#[test]
fn c10_a_direct_path_hands_over_and_the_ack_goes_to_the_service_port() {
    for mut w in [world(Continuation::Auto), world_v6(Continuation::Auto)] {
        w.learn_direct();
        let option = w.open();
        assert!(option.redirect && !option.confirm);
        let redirect = w.redirect(Y, Some(w.local));
        assert_eq!(w.remote(redirect).unwrap(), w.syn_ack(X, IRS, None));
        let ack = w.local_segment(TcpFlags::ACK, ISS + 1, &[]);
        let sent = w.local(ack).unwrap();
        let option = option_of(&sent).unwrap();
        assert_eq!((ports(&sent).1, option.port), (Y, Some(X)));
        assert!(option.redirect && option.confirm);

        let data = w.local_segment(TcpFlags::ACK, ISS + 1, b"hello");
        assert!(option_of(&w.local(data).unwrap()).is_some());
        let answer = w.segment(Y, TcpFlags::ACK, IRS + 1, ISS + 6, &[]);
        assert_eq!(ports(&w.remote(answer).unwrap()).0, X);
        let more = w.local_segment(TcpFlags::ACK, ISS + 6, b"more");
        assert_eq!(option_of(&w.local(more).unwrap()), None);
        assert_eq!(w.client.poll_timeout(), None);
        assert_eq!(w.client.counters().handovers_completed, 1);
    }
}

#[test]
fn without_the_observed_digest_or_with_another_one_it_reconnects() {
    for seen in [None, Some("192.0.2.9:1234".parse().unwrap())] {
        let mut w = direct_world();
        w.open();
        let redirect = w.redirect(Y, seen);
        assert!(w.remote(redirect).is_none());
        assert!(w.sent_one(Towards::Network).tcp().unwrap().is_syn());
        let confirmed = w.syn_ack(Y, IRS, Some(confirm()));
        assert!(w.remote(confirmed).is_some());
        let translated = w.client.path(w.vip.ip()) == PathState::Translated;
        assert_eq!(translated, seen.is_some());
    }
}

#[test]
fn forced_handover_does_not_ask_what_the_server_saw() {
    let mut w = world(Continuation::Handover);
    w.open();
    let redirect = w.redirect(Y, Some("192.0.2.9:1234".parse().unwrap()));
    assert!(w.remote(redirect).is_some());
}

#[test]
fn c10_silence_is_probed_with_the_syn_and_a_repeated_syn_ack_met_by_the_kept_ack() {
    let mut w = direct_world();
    let kept = w.hand_over();
    let request = w.local_segment(TcpFlags::ACK | TcpFlags::PSH, ISS + 1, b"GET");
    assert!(w.local(request).is_some());
    w.pass(Duration::from_millis(50));
    let probe = w.sent_one(Towards::Network);
    assert!(probe.tcp().unwrap().is_syn());
    assert_eq!((ports(&probe).1, option_of(&probe).unwrap().port), (Y, Some(X)));

    let answer = w.syn_ack(Y, IRS, Some(confirm()));
    assert!(w.remote(answer).is_none());
    assert_eq!(w.sent_one(Towards::Network), kept);
    let data = w.segment(Y, TcpFlags::ACK, IRS + 1, ISS + 4, b"OK");
    assert!(w.remote(data).is_some());
    // One lost ACK may be chance, two in a row are the path.
    assert_eq!(w.client.path(w.vip.ip()), PathState::Direct);
}

#[test]
fn c10_probes_repeat_at_doubled_intervals() {
    let mut w = direct_world();
    w.hand_over();
    let mut times = Vec::new();
    while let Some(at) = w.client.poll_timeout() {
        w.now = at;
        let sent = w.sent();
        if sent.len() != 1 {
            break;
        }
        times.push(at.micros() / 1000);
    }
    let gaps: Vec<u64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert_eq!(&gaps[..4], [50, 100, 200, 400]);
}

#[test]
fn a_repeated_syn_ack_from_x_brings_the_kept_ack_and_a_probe_at_once() {
    let mut w = direct_world();
    let kept = w.hand_over();
    let repeated = w.redirect(Y, Some(w.local));
    assert!(w.remote(repeated).is_none());
    let sent = w.sent();
    assert_eq!(sent[0].packet, kept);
    assert!(sent[1].packet.tcp().unwrap().is_syn());
}

#[test]
fn c10_an_ack_that_answers_a_probe_completes_but_is_not_passed_up() {
    let mut w = direct_world();
    let kept = w.hand_over();
    w.pass(Duration::from_millis(50));
    w.sent();
    let challenge = w.segment(Y, TcpFlags::ACK, IRS + 1, ISS + 1, &[]);
    assert!(w.remote(challenge).is_none());
    assert_eq!(w.sent_one(Towards::Network), kept);
    assert_eq!(w.client.counters().handovers_completed, 1);
}

#[test]
fn data_first_still_leaves_a_handover_ack_for_syn_cookies() {
    let mut w = direct_world();
    w.open();
    let redirect = w.redirect(Y, Some(w.local));
    assert!(w.remote(redirect).is_some());
    let data = w.local_segment(TcpFlags::ACK, ISS + 1, b"first");
    assert!(w.local(data).is_some());
    let repeated = w.syn_ack(Y, IRS, Some(confirm()));
    assert!(w.remote(repeated).is_none());
    let kept = w.sent_one(Towards::Network);
    let tcp = kept.tcp().unwrap();
    assert_eq!((tcp.seq(), tcp.ack(), tcp.payload().len()), (ISS + 1, IRS + 1, 0));
    assert_eq!(tcp.timestamps(), Some((TSVAL + 1, 5)));
}

fn expect_failure(w: &mut World) {
    let sent = w.sent();
    let local = sent.iter().find(|transmit| transmit.towards == Towards::Local).unwrap();
    let tcp = local.packet.tcp().unwrap();
    assert_eq!((ports(&local.packet).0, tcp.flags(), tcp.seq()), (X, TcpFlags::RST, IRS + 1));
    let network = sent.iter().find(|transmit| transmit.towards == Towards::Network).unwrap();
    assert_eq!((ports(&network.packet).1, network.packet.tcp().unwrap().flags()), (Y, TcpFlags::RST));
    assert_eq!(w.client.path(w.vip.ip()), PathState::Translated);
    assert_eq!(w.client.flow_count(), 0);
    assert!(matches!(w.events()[..], [ClientEvent::HandoverFailed { .. }]));
    // The next connect reconnects.
    assert!(w.open().confirm);
}

#[test]
fn c10_a_syn_ack_that_answers_no_syn_of_ours_ends_nothing() {
    let mut w = direct_world();
    w.hand_over();
    for port in [X, Y] {
        let flags = TcpFlags::SYN | TcpFlags::ACK;
        let forged = w.segment(port, flags, IRS + 5000, ISS + 70_000, &[]);
        assert!(w.remote(forged).is_none());
        assert!(w.sent().is_empty());
    }
    assert_eq!((w.client.flow_count(), w.client.counters().stray_syn_acks), (1, 2));
}

#[test]
fn c10_a_syn_ack_with_another_isn_ends_it_with_resets() {
    let mut w = direct_world();
    w.hand_over();
    w.pass(Duration::from_millis(50));
    w.sent();
    let other = w.syn_ack(Y, IRS + 77, Some(confirm()));
    assert!(w.remote(other).is_none());
    expect_failure(&mut w);
}

#[test]
fn c10_an_unacceptable_ack_ends_it_with_resets() {
    let mut w = direct_world();
    w.hand_over();
    let strange = w.segment(Y, TcpFlags::ACK, SeqNumber(1), ISS + 5000, &[]);
    assert!(w.remote(strange).is_none());
    expect_failure(&mut w);
}

#[test]
fn a_reset_to_the_ack_brings_a_probe_and_a_reset_to_the_probe_ends_it() {
    let mut w = direct_world();
    w.hand_over();
    let to_ack = w.reset_from(Y, TcpFlags::default(), IRS + 1, SeqNumber(0));
    assert!(w.remote(to_ack).is_none());
    assert!(w.sent_one(Towards::Network).tcp().unwrap().is_syn());
    let to_probe = w.reset_from(Y, TcpFlags::ACK, SeqNumber(0), ISS + 1);
    assert!(w.remote(to_probe).is_none());
    expect_failure(&mut w);
}

#[test]
fn c10_silence_ends_it_after_twenty_seconds_and_three_silences_make_the_vip_plain() {
    let mut w = direct_world();
    w.client.config.translated_memory = Duration::ZERO;
    for round in 0..3 {
        if round > 0 {
            w.learn_direct();
        }
        w.hand_over();
        let begun = w.now;
        while let Some(at) = w.client.poll_timeout() {
            w.now = w.now.max(at);
            w.sent();
        }
        assert_eq!(w.now.since(begun), Duration::from_secs(20));
        w.events();
    }
    assert_eq!(w.client.path(w.vip.ip()), PathState::Plain);
}

#[test]
fn c10_a_reset_of_the_local_tcp_ends_it_without_blaming_the_path() {
    let mut w = direct_world();
    w.hand_over();
    let reset = w.local_segment(TcpFlags::RST, ISS + 1, &[]);
    assert_eq!(ports(&w.local(reset).unwrap()).1, Y);
    assert_eq!(w.client.flow_count(), 0);
    assert_eq!(w.client.poll_timeout(), None);
    assert_eq!(w.client.path(w.vip.ip()), PathState::Direct);
}

#[test]
fn two_lost_handover_acks_in_a_row_make_the_path_translated() {
    let mut w = direct_world();
    for _ in 0..2 {
        w.hand_over();
        w.pass(Duration::from_millis(50));
        w.sent();
        let half_open = w.syn_ack(Y, IRS, Some(confirm()));
        w.remote(half_open);
        let data = w.segment(Y, TcpFlags::ACK, IRS + 1, ISS + 1, b"hi");
        assert!(w.remote(data).is_some());
        w.client.retain(|_, _| false);
        w.sent();
    }
    assert_eq!(w.client.path(w.vip.ip()), PathState::Translated);
}

#[test]
fn c10_a_server_that_waits_for_data_proves_nothing_against_the_path() {
    // TCP_DEFER_ACCEPT: half-open, and answering probes so, until the client has spoken.
    let mut w = direct_world();
    for _ in 0..3 {
        w.hand_over();
        w.pass(Duration::from_millis(50));
        w.sent();
        let half_open = w.syn_ack(Y, IRS, Some(confirm()));
        w.remote(half_open);
        let data = w.local_segment(TcpFlags::ACK, ISS + 1, b"hello");
        assert!(w.local(data).is_some());
        let answer = w.segment(Y, TcpFlags::ACK, IRS + 1, ISS + 6, b"hi");
        assert!(w.remote(answer).is_some());
        w.client.retain(|_, _| false);
        w.sent();
    }
    assert_eq!(w.client.path(w.vip.ip()), PathState::Direct);
}

#[test]
fn c10_a_server_still_half_open_after_data_has_lost_the_handover_ack() {
    let mut w = direct_world();
    for _ in 0..2 {
        w.hand_over();
        let data = w.local_segment(TcpFlags::ACK, ISS + 1, b"hello");
        assert!(w.local(data).is_some());
        w.pass(Duration::from_millis(50));
        w.sent();
        let half_open = w.syn_ack(Y, IRS, Some(confirm()));
        w.remote(half_open);
        let answer = w.segment(Y, TcpFlags::ACK, IRS + 1, ISS + 6, b"hi");
        assert!(w.remote(answer).is_some());
        w.client.retain(|_, _| false);
        w.sent();
    }
    assert_eq!(w.client.path(w.vip.ip()), PathState::Translated);
}

#[test]
fn c4_the_half_open_connection_of_a_server_that_was_second_is_reset_at_its_own_port() {
    let mut w = direct_world();
    w.hand_over();
    let option = RedirectOption {
        confirm: true,
        port: Some(Y + 1),
        observed: Some(observed_digest(w.local)),
        ..Default::default()
    };
    let second = w.syn_ack(X, IRS + 5, Some(option));
    assert!(w.remote(second).is_none());
    let reset = w.sent_one(Towards::Network);
    assert_eq!((ports(&reset).1, reset.tcp().unwrap().seq()), (Y + 1, ISS + 1));
}

#[test]
fn trouble_probes_at_once_only_the_first_time() {
    let mut w = direct_world();
    let kept = w.hand_over();
    for expected in [1, 0, 0] {
        let error = w.icmp_about(&kept, None);
        assert!(w.remote(error).is_none());
        assert_eq!(w.sent().len(), expected);
        w.pass(Duration::from_millis(10));
    }
}

#[test]
fn a_server_that_answers_probes_is_not_silent() {
    let mut w = direct_world();
    w.hand_over();
    let begun = w.now;
    while w.now.since(begun) < Duration::from_secs(60) {
        w.now = w.client.poll_timeout().expect("probes go on").max(w.now);
        if w.sent().iter().any(|transmit| transmit.packet.tcp().unwrap().is_syn()) {
            let half_open = w.syn_ack(Y, IRS, Some(confirm()));
            assert!(w.remote(half_open).is_none());
        }
    }
    assert_eq!(w.client.counters().handovers_failed, 0);
}
