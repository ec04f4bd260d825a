//! C1 to C9: asking, following, falling back.

use super::*;

#[test]
fn c1_the_first_syn_asks_to_reconnect_and_keeps_its_options() {
    let mut w = world(Continuation::Auto);
    let syn = w.syn(ISS, TSVAL);
    let sent = w.local(syn.clone()).unwrap();
    let option = option_of(&sent).unwrap();
    assert!(option.redirect && option.confirm && option.port.is_none());
    let mut stripped = sent;
    stripped.strip_redirect(crate::wire::DEFAULT_EXID);
    assert_eq!(stripped, syn);
}

#[test]
fn c1_syns_with_data_or_authentication_or_mptcp_go_plain() {
    let mut w = world(Continuation::Auto);
    let with = |options: &[u8], payload: &[u8]| {
        let bare = Segment::bare(w.local, w.vip, TcpFlags::SYN);
        Segment { seq: ISS, options, payload, ..bare }.emit()
    };
    let mut md5 = [1u8; 20];
    md5[..2].copy_from_slice(&[19, 18]);
    let mut ao = [1u8; 16];
    ao[..2].copy_from_slice(&[29, 16]);
    let cases = [
        with(&[], b"early"),
        with(&md5, &[]),
        with(&ao, &[]),
        with(&[30, 4, 0, 1], &[]),
        with(&[5, 0, 1, 1], &[]),
    ];
    for packet in cases {
        assert_eq!(w.local(packet.clone()), Some(packet));
    }
    assert_eq!(w.client.counters().ineligible, 5);
    assert_eq!(w.client.flow_count(), 0);
}

#[test]
fn c1_a_fast_open_request_is_taken_off() {
    let mut w = world(Continuation::Auto);
    let bare = Segment::bare(w.local, w.vip, TcpFlags::SYN);
    for options in [&[34, 2, 1, 1][..], &[34, 2, 34, 4, 9, 9, 34, 2]] {
        let packet = Segment { seq: ISS, options, ..bare }.emit();
        let sent = w.local(packet).unwrap();
        let left: Vec<_> = sent.tcp().unwrap().options().flatten().collect();
        assert!(!left.iter().any(|option| matches!(option, crate::wire::TcpOption::FastOpen(_))));
        assert!(option_of(&sent).is_some());
    }
}

#[test]
fn w5_the_option_says_nothing_of_sequence_numbers() {
    let options = [ISS, ISS + 0x7fff_ffff].map(|iss| {
        let mut w = world(Continuation::Auto);
        let syn = w.syn(iss, TSVAL);
        option_of(&w.local(syn).unwrap())
    });
    assert_eq!(options[0], options[1]);
}

#[test]
fn c2_an_unconfirmed_syn_ack_is_not_passed_and_the_syn_goes_again_without_the_option() {
    for mut w in [world(Continuation::Auto), world_v6(Continuation::Auto)] {
        w.open();
        let plain = w.syn_ack(X, IRS, None);
        assert!(w.remote(plain).is_none());
        let again = w.sent_one(Towards::Network);
        assert_eq!(again, w.syn(ISS, TSVAL));
        assert_eq!(w.client.path(w.vip.ip()), PathState::Plain);

        let answer = w.syn_ack(X, IRS + 5, None);
        assert!(w.remote(answer.clone()).is_some());
        let ack = w.local_segment(TcpFlags::ACK, ISS + 1, &[]);
        assert_eq!(w.local(ack.clone()), Some(ack));
        // The server of the first answer repeats itself.
        let late = w.syn_ack(X, IRS, None);
        assert!(w.remote(late).is_none());
    }
}

#[test]
fn c2_the_same_server_may_answer_both_syns() {
    let mut w = world(Continuation::Auto);
    w.open();
    let plain = w.syn_ack(X, IRS, None);
    assert!(w.remote(plain.clone()).is_none());
    w.pass(Duration::from_millis(50));
    assert!(w.remote(plain).is_some());
}

#[test]
fn c2_a_server_that_repeats_itself_is_no_answer_to_a_repeated_syn_until_that_has_been_in_vain_twice() {
    let mut w = world(Continuation::Auto);
    w.open();
    let plain = w.syn_ack(X, IRS, None);
    assert!(w.remote(plain.clone()).is_none());
    w.sent_one(Towards::Network);
    // That SYN, or its answer, is lost; the local TCP repeats it just before the refused server repeats itself.
    for passed_up in [false, true] {
        w.pass(Duration::from_secs(1));
        let again = w.syn(ISS, TSVAL);
        assert_eq!(w.local(again.clone()), Some(again));
        w.pass(Duration::from_millis(80));
        assert_eq!(w.remote(plain.clone()).is_some(), passed_up);
    }
    assert_eq!(w.client.counters().stray_syn_acks, 1);
}

#[test]
fn c2_an_echoed_option_is_no_redirect() {
    let mut w = world(Continuation::Auto);
    let mut option = w.open();
    option.port = Some(Y);
    let echoed = w.syn_ack(X, IRS, Some(option));
    assert!(w.remote(echoed).is_none());
    assert_eq!(w.sent_one(Towards::Network), w.syn(ISS, TSVAL));
    let answer = w.syn_ack(X, IRS + 5, None);
    assert!(w.remote(answer).is_some());
    assert_eq!(w.client.counters().plain_echoed, 1);
}

#[test]
fn c3_redirects_that_must_not_be_obeyed_fall_back_without_blaming_the_vip() {
    for port in [X, 80, 41_002] {
        let mut w = world(Continuation::Auto);
        w.client.config.denied_ports = vec![41_002];
        w.open();
        let redirect = w.redirect(port, Some(w.local));
        assert!(w.remote(redirect).is_none());
        assert_eq!(ports(&w.sent_one(Towards::Network)).1, X);
        assert_ne!(w.client.path(w.vip.ip()), PathState::Plain);
    }
}

#[test]
fn c3_a_redirect_to_an_address_is_refused() {
    let mut w = world(Continuation::Auto);
    w.open();
    let option = RedirectOption {
        confirm: true,
        port: Some(Y),
        address: Some("198.51.100.9".parse().unwrap()),
        ..Default::default()
    };
    let packet = w.syn_ack(X, IRS, Some(option));
    assert!(w.remote(packet).is_none());
    assert_eq!(ports(&w.sent_one(Towards::Network)).1, X);
}

#[test]
fn c3_a_wrong_acknowledgement_or_timestamp_echo_is_dropped() {
    let mut w = world(Continuation::Auto);
    w.open();
    let options = timestamps(5, TSVAL + 1);
    let bare = Segment::bare(w.vip, w.local, TcpFlags::SYN | TcpFlags::ACK);
    let wrong_echo = Segment { seq: IRS, ack: ISS + 1, options: &options, ..bare }.emit();
    let wrong_ack = Segment { seq: IRS, ack: ISS + 2, ..bare }.emit();
    for packet in [wrong_echo, wrong_ack] {
        assert!(w.remote(packet).is_none());
        assert!(w.sent().is_empty());
    }
    assert_eq!(w.client.counters().stray_syn_acks, 2);
}

#[test]
fn c3_the_local_four_tuple_of_the_service_port_must_be_free() {
    let mut w = world(Continuation::Auto);
    w.reconnect(Some(w.local));
    // The same source port to another redirect port, whose server names the same service port.
    let other = SocketAddr::new(w.vip.ip(), 80);
    let bare = Segment::bare(w.local, other, TcpFlags::SYN);
    assert!(w.local(Segment { seq: ISS, ..bare }.emit()).is_some());
    let mut answer =
        Segment { seq: IRS, ack: ISS + 1, ..Segment::bare(other, w.local, TcpFlags::SYN | TcpFlags::ACK) }
            .emit();
    let option = RedirectOption { confirm: true, port: Some(Y), ..Default::default() };
    answer.insert_redirect(crate::wire::DEFAULT_EXID, &option, 1500).unwrap();
    assert!(w.remote(answer).is_none());
    let again = w.sent_one(Towards::Network);
    assert_eq!((ports(&again).1, option_of(&again)), (80, None));
}

#[test]
fn a_confirmed_port_is_kept() {
    let mut w = world(Continuation::Auto);
    w.open();
    let answer = w.syn_ack(X, IRS, Some(confirm()));
    let up = w.remote(answer).unwrap();
    assert_eq!(up, w.syn_ack(X, IRS, None));
    assert!(matches!(w.events()[..], [ClientEvent::Confirmed { .. }]));
}

#[test]
fn c5_reconnect_sends_the_latest_syn_to_the_service_port_and_swaps_ports_from_then_on() {
    for mut w in [world(Continuation::Auto), world_v6(Continuation::Auto)] {
        w.open();
        let redirect = w.redirect(Y, Some(w.local));
        assert!(w.remote(redirect).is_none());
        let syn = w.sent_one(Towards::Network);
        let option = option_of(&syn).unwrap();
        assert_eq!((ports(&syn).1, syn.tcp().unwrap().seq()), (Y, ISS));
        assert_eq!((option.redirect, option.confirm, option.port, option.hops), (true, false, Some(X), 1));

        let up = w.syn_ack(Y, IRS, Some(confirm()));
        let up = w.remote(up).unwrap();
        assert_eq!(up, w.syn_ack(X, IRS, None));
        let ack = w.local_segment(TcpFlags::ACK, ISS + 1, b"hello");
        let sent = w.local(ack).unwrap();
        assert_eq!((ports(&sent).1, option_of(&sent)), (Y, None));
        let data = w.segment(Y, TcpFlags::ACK, IRS + 1, ISS + 6, b"world");
        assert_eq!(ports(&w.remote(data).unwrap()).0, X);
        let expected =
            ClientEvent::Redirected { local: w.local, vip: w.vip, service_port: Y, handover: false };
        assert_eq!(w.events(), [expected]);
        assert_eq!(w.client.path(w.vip.ip()), PathState::Direct);
    }
}

#[test]
fn c5_the_syn_to_the_service_port_is_repeated_twice_then_c6_goes_plain() {
    let mut w = world(Continuation::Auto);
    w.open();
    w.pass(Duration::from_millis(200));
    let redirect = w.redirect(Y, Some(w.local));
    w.remote(redirect);
    w.sent_one(Towards::Network);
    for _ in 0..2 {
        w.pass(Duration::from_millis(599));
        assert!(w.sent().is_empty());
        w.pass(Duration::from_millis(1));
        assert_eq!(ports(&w.sent_one(Towards::Network)).1, Y);
    }
    w.pass(Duration::from_millis(600));
    assert_eq!(w.sent_one(Towards::Network), w.syn(ISS, TSVAL));
    let answer = w.syn_ack(X, IRS + 7, None);
    assert!(w.remote(answer).is_some());
    assert_eq!(w.client.counters().plain_service_port, 1);
    assert_eq!(w.client.poll_timeout(), None);
}

#[test]
fn c5_later_syns_of_the_local_tcp_go_to_the_service_port() {
    let mut w = world(Continuation::Auto);
    w.open();
    let redirect = w.redirect(Y, Some(w.local));
    w.remote(redirect);
    w.sent();
    let again = w.syn(ISS, TSVAL + 9);
    let sent = w.local(again).unwrap();
    assert_eq!((ports(&sent).1, option_of(&sent).unwrap().port), (Y, Some(X)));
}

#[test]
fn c5_a_service_port_that_does_not_confirm_is_reset_before_any_data() {
    let mut w = world(Continuation::Auto);
    w.open();
    let redirect = w.redirect(Y, Some(w.local));
    w.remote(redirect);
    w.sent();
    let bare = w.syn_ack(Y, IRS, None);
    assert!(w.remote(bare).is_none());
    let sent = w.sent();
    let reset = sent[0].packet.tcp().unwrap();
    assert_eq!((ports(&sent[0].packet).1, reset.flags(), reset.seq()), (Y, TcpFlags::RST, ISS + 1));
    assert_eq!(sent[1].packet, w.syn(ISS, TSVAL));
}

#[test]
fn c5_a_bare_ack_of_the_service_port_is_reset_and_the_syn_goes_again() {
    let mut w = world(Continuation::Auto);
    w.open();
    let redirect = w.redirect(Y, Some(w.local));
    w.remote(redirect);
    w.sent();
    let old = w.segment(Y, TcpFlags::ACK, SeqNumber(5), SeqNumber(4242), &[]);
    assert!(w.remote(old).is_none());
    let sent = w.sent();
    assert_eq!(sent[0].packet.tcp().unwrap().seq(), SeqNumber(4242));
    assert!(sent[0].packet.tcp().unwrap().flags().contains(TcpFlags::RST));
    assert!(sent[1].packet.tcp().unwrap().is_syn());
}

#[test]
fn c5_redirects_may_be_chained_up_to_three_hops_without_a_loop() {
    let mut w = world(Continuation::Auto);
    w.open();
    let redirect = w.redirect(Y, Some(w.local));
    w.remote(redirect);
    w.sent();
    for (from, to) in [(Y, Y + 1), (Y + 1, Y + 2)] {
        let option = RedirectOption { confirm: true, port: Some(to), ..Default::default() };
        let again = w.syn_ack(from, IRS, Some(option));
        assert!(w.remote(again).is_none());
        assert_eq!(ports(&w.sent().pop().unwrap().packet).1, to);
    }
    let option = RedirectOption { confirm: true, port: Some(Y + 3), ..Default::default() };
    let fourth = w.syn_ack(Y + 2, IRS, Some(option));
    assert!(w.remote(fourth).is_none());
    assert_eq!(ports(&w.sent().pop().unwrap().packet).1, X);
}

#[test]
fn c6_a_reset_or_an_icmp_error_of_the_service_port_goes_plain() {
    for icmp in [false, true] {
        for mut w in [world(Continuation::Auto), world_v6(Continuation::Auto)] {
            w.open();
            let redirect = w.redirect(Y, Some(w.local));
            w.remote(redirect);
            let syn = w.sent_one(Towards::Network);
            let trouble = if icmp {
                w.icmp_about(&syn, None)
            } else {
                w.reset_from(Y, TcpFlags::ACK, SeqNumber(0), ISS + 1)
            };
            assert!(w.remote(trouble).is_none());
            assert_eq!(w.sent_one(Towards::Network), w.syn(ISS, TSVAL));
        }
    }
}

#[test]
fn c6_a_blind_reset_of_the_service_port_changes_nothing() {
    let mut w = world(Continuation::Auto);
    w.open();
    let redirect = w.redirect(Y, Some(w.local));
    w.remote(redirect);
    w.sent();
    let blind = w.reset_from(Y, TcpFlags::ACK, SeqNumber(0), ISS + 2);
    assert!(w.remote(blind).is_none());
    assert!(w.sent().is_empty());
}

#[test]
fn c6_the_first_repeat_keeps_r_the_second_goes_without() {
    let mut w = world(Continuation::Auto);
    w.open();
    let syn = w.syn(ISS, TSVAL + 1000);
    assert!(option_of(&w.local(syn.clone()).unwrap()).is_some());
    assert_eq!(option_of(&w.local(syn).unwrap()), None);
    // Any timestamp sent in this attempt may be echoed.
    let answer = w.syn_ack(X, IRS, None);
    assert!(w.remote(answer).is_some());
    assert_eq!(w.client.counters().plain_silence, 1);
}

#[test]
fn c7_c9_nothing_of_x_reaches_a_redirected_connection_and_resets_of_y_do() {
    let mut w = world(Continuation::Auto);
    w.reconnect(Some(w.local));
    let late = w.redirect(Y + 1, Some(w.local));
    let reset = w.reset_from(X, TcpFlags::ACK, IRS + 1, ISS + 1);
    assert!(w.remote(late).is_none());
    assert!(w.remote(reset).is_none());
    let reset = w.reset_from(Y, TcpFlags::ACK, IRS + 1001, ISS + 1);
    assert_eq!(ports(&w.remote(reset).unwrap()).0, X);
    assert_eq!(w.client.flow_count(), 1);
}

#[test]
fn c8_a_connect_with_the_ports_of_a_redirected_connection_is_refused() {
    let mut w = world(Continuation::Auto);
    w.reconnect(Some(w.local));
    let bare = Segment::bare(w.local, w.at(Y), TcpFlags::SYN);
    let direct = Segment { seq: ISS, ..bare }.emit();
    assert!(w.local(direct).is_none());
    let refusal = w.sent_one(Towards::Local);
    assert_eq!(refusal.tcp().unwrap().ack(), ISS + 1);
    assert!(refusal.tcp().unwrap().flags().contains(TcpFlags::RST));
}

#[test]
fn i2_packet_too_big_is_translated_for_the_local_tcp() {
    for mut w in [world(Continuation::Auto), world_v6(Continuation::Auto)] {
        w.reconnect(Some(w.local));
        let data = w.local_segment(TcpFlags::ACK, ISS + 1, &[7; 600]);
        let sent = w.local(data).unwrap();
        let error = w.icmp_about(&sent, Some(1280));
        let up = w.remote(error).unwrap();
        let quoted = up.icmp().unwrap().quoted().unwrap();
        assert_eq!((quoted.destination_port, quoted.source_port), (X, w.local.port()));
        assert_eq!(up.icmp().unwrap().mtu(), Some(1280));
        // Old routers quote no more than eight bytes of the segment.
        let error = w.icmp_quoting(&sent.bytes()[..sent.transport_offset() + 8], Some(1280));
        let up = w.remote(error).unwrap();
        let quoted = up.icmp().unwrap().quoted().unwrap();
        assert_eq!((quoted.destination_port, quoted.source_port), (X, w.local.port()));
        assert!(up.checksum_ok());
    }
}

#[test]
fn packets_of_others_and_of_no_flow_pass_unchanged() {
    let mut w = world(Continuation::Auto);
    let other: SocketAddr = "198.51.100.1:443".parse().unwrap();
    let syn = Segment { seq: ISS, ..Segment::bare(w.local, other, TcpFlags::SYN) }.emit();
    assert_eq!(w.local(syn.clone()), Some(syn));
    let stale = w.segment(Y, TcpFlags::ACK, IRS, ISS, b"late");
    assert_eq!(w.remote(stale.clone()), Some(stale));
}

#[test]
fn continuation_plain_asks_nothing() {
    let mut w = world(Continuation::Plain);
    let syn = w.syn(ISS, TSVAL);
    assert_eq!(w.local(syn.clone()), Some(syn));
    assert_eq!(w.client.flow_count(), 0);
}

#[test]
fn w1_options_of_length_zero_count_as_none() {
    let confirmed = [253, 8, 0x52, 0x44, 2, 0, 0, 0];
    let zero = [8, 0, 1, 1];
    for options in [&[253, 0, 0x52, 0x44][..], &zero, &[&confirmed[..], &zero].concat()] {
        let mut w = world(Continuation::Auto);
        w.open();
        let bare = Segment::bare(w.vip, w.local, TcpFlags::SYN | TcpFlags::ACK);
        let packet = Segment { seq: IRS, ack: ISS + 1, options, ..bare }.emit();
        assert!(w.remote(packet).is_none());
        assert_eq!(w.client.counters().confirmed, 0);
        assert_eq!(ports(&w.sent_one(Towards::Network)).1, X);
    }
}

#[test]
fn w1_a_malformed_option_counts_as_none() {
    let mut w = world(Continuation::Auto);
    w.open();
    let bare = Segment::bare(w.vip, w.local, TcpFlags::SYN | TcpFlags::ACK);
    let options = [253, 8, 0x52, 0x44, 0x46, 0, 0xa0, 0x29];
    let packet = Segment { seq: IRS, ack: ISS + 1, options: &options, ..bare }.emit();
    assert!(w.remote(packet).is_none());
    assert_eq!(w.client.counters().malformed_options, 1);
    assert_eq!(ports(&w.sent_one(Towards::Network)).1, X);
}
