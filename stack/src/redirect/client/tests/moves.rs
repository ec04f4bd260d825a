//! §4 and §5: what a connection is asked for beyond its handshake, by its server and by strangers.

use super::*;

pub(super) const Z: u16 = 41_002;
/// Where the connection stands: our 10 bytes are under way, the server has sent 20.
pub(super) const SND_UNA: SeqNumber = SeqNumber(1001);
pub(super) const SND_NXT: SeqNumber = SeqNumber(1011);
pub(super) const RCV_NXT: SeqNumber = SeqNumber(10_021);

impl World {
    /// Redirected to Y, with data both ways.
    pub(super) fn established(&mut self) {
        self.reconnect(Some(self.local));
        let data = self.own(TcpFlags::ACK | TcpFlags::PSH, SND_UNA, RCV_NXT - 20, &[1; 10]);
        self.local(data);
        let answer = self.segment_of_server(Y, TcpFlags::ACK, RCV_NXT - 20, SND_UNA, None, &[2; 20]);
        assert!(self.remote(answer).is_some());
        let ack = self.own(TcpFlags::ACK, SND_NXT, RCV_NXT, &[]);
        self.local(ack);
        self.events();
    }

    pub(super) fn own(&self, flags: TcpFlags, seq: SeqNumber, ack: SeqNumber, payload: &[u8]) -> Packet {
        let options = timestamps(TSVAL + 1, 5);
        let bare = Segment::bare(self.local, self.vip, flags);
        Segment { seq, ack, window: 500, options: &options, payload, ..bare }.emit()
    }

    pub(super) fn segment_of_server(
        &self,
        port: u16,
        flags: TcpFlags,
        seq: SeqNumber,
        ack: SeqNumber,
        option: Option<RedirectOption>,
        payload: &[u8],
    ) -> Packet {
        let options = timestamps(6, TSVAL + 1);
        let bare = Segment::bare(self.at(port), self.local, flags);
        let mut packet = Segment { seq, ack, window: 500, options: &options, payload, ..bare }.emit();
        if let Some(option) = option {
            packet.insert_redirect(crate::wire::DEFAULT_EXID, &option, 1500).unwrap();
        }
        packet
    }

    /// R P=`port` as the server at Y says it.
    pub(super) fn ask(&mut self, option: RedirectOption) -> Vec<ClientEvent> {
        let packet = self.segment_of_server(Y, TcpFlags::ACK, RCV_NXT, SND_NXT, Some(option), &[]);
        assert!(self.remote(packet).is_some(), "the local TCP gets it in any case");
        self.events()
    }

    fn opening(&self) -> SocketAddr {
        SocketAddr::new(self.local.ip(), self.local.port() + 1)
    }

    /// The move to Z has been asked for and its SYN is on its way; the SYN's option.
    fn opens(&mut self, to: u16) -> RedirectOption {
        assert_eq!(self.ask(asking(to)).len(), 1);
        assert!(self.client.expect_move(self.local, self.vip, self.opening()));
        let syn = self.syn_of_move(to);
        option_of(&self.local(syn).expect("the SYN passes")).expect("with the option")
    }

    fn syn_of_move(&self, to: u16) -> Packet {
        let options = syn_options(TSVAL);
        let bare = Segment::bare(self.opening(), self.at(to), TcpFlags::SYN);
        Segment { seq: ISS, window: 64_240, options: &options, ..bare }.emit()
    }

    /// A SYN-ACK to the move's SYN.
    fn answers_move(&mut self, from: u16, option: Option<RedirectOption>) -> Option<Packet> {
        let mut packet = self.syn_ack(from, IRS, option);
        packet.set_destination_port(self.opening().port());
        self.remote(packet)
    }
}

fn asking(port: u16) -> RedirectOption {
    RedirectOption { redirect: true, port: Some(port), ..Default::default() }
}

fn follower(v4: bool) -> World {
    let mut world = if v4 { world(Continuation::Reconnect) } else { world_v6(Continuation::Reconnect) };
    world.established();
    world
}

/// A small generator: the tests are the same each time.
fn random(state: &mut u64) -> u32 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 32) as u32
}

#[test]
fn o7_an_exact_redirect_is_obeyed_once() {
    for v4 in [true, false] {
        let mut world = follower(v4);
        let (local, vip, to) = (world.local, world.vip, world.at(Z));
        assert_eq!(world.ask(asking(Z)), [ClientEvent::MoveAsked { local, vip, from: Y, to }]);
        assert_eq!(world.ask(asking(Z)), []);
        assert_eq!(world.ask(asking(Z + 1)), []);
        assert_eq!(world.client.counters().moves_asked, 1);
    }
}

#[test]
fn o7_none_of_a_million_forged_redirects_is_obeyed_and_an_exact_one_is() {
    let mut world = follower(true);
    let mut state = 7;
    for round in 0..1_000_000u32 {
        let (seq, ack) = (SeqNumber(random(&mut state)), SeqNumber(random(&mut state)));
        // Now and then the stranger knows one of them, but never both.
        let (seq, ack) = match round % 4 {
            0 if ack.before(SND_UNA - 65_160) || ack.after(SND_NXT) => (RCV_NXT, ack),
            1 if seq != RCV_NXT => (seq, SND_NXT),
            _ if seq != RCV_NXT => (seq, ack),
            _ => continue,
        };
        let packet = world.segment_of_server(Y, TcpFlags::ACK, seq, ack, Some(asking(Z)), &[]);
        let _ = world.remote(packet);
    }
    assert_eq!(world.events(), []);
    assert!(world.client.counters().moves_inexact > 990_000, "{:?}", world.client.counters());
    assert_eq!(world.ask(asking(Z)).len(), 1);
}

#[test]
fn a_redirect_needs_valid_timestamps() {
    for (value, echo) in [(4, TSVAL + 1), (6, TSVAL + 2), (6, TSVAL - 1)] {
        let mut world = follower(true);
        let options = timestamps(value, echo);
        let bare = Segment::bare(world.at(Y), world.local, TcpFlags::ACK);
        let mut packet =
            Segment { seq: RCV_NXT, ack: SND_NXT, options: &options, window: 500, ..bare }.emit();
        packet.insert_redirect(crate::wire::DEFAULT_EXID, &asking(Z), 1500).unwrap();
        let _ = world.remote(packet);
        assert_eq!(world.events(), [], "{value} {echo}");
    }
}

#[test]
fn c3_a_redirect_leads_only_where_it_may() {
    let mut world = follower(true);
    world.client.config.denied_ports = vec![41_007];
    let address = Some("198.51.100.1".parse().unwrap());
    let elsewhere = RedirectOption { address, ..asking(Z) };
    for option in [asking(Y), asking(80), asking(41_007), elsewhere] {
        assert_eq!(world.ask(option), [], "{option:?}");
    }
    assert_eq!(world.client.counters().moves_refused, 4);
    // An echo of what a handover says is no redirect.
    assert_eq!(world.ask(RedirectOption { confirm: true, ..asking(Z) }), []);
    let late = world.segment_of_server(X, TcpFlags::ACK, RCV_NXT, SND_NXT, Some(asking(Z)), &[]);
    assert!(world.remote(late).is_none());
    assert_eq!(world.events(), []);
    // The port that was asked for in the first place, though it is no service port.
    assert_eq!(world.ask(asking(X)).len(), 1);
}

#[test]
fn o24_another_address_is_gone_to_where_its_prefix_is_accepted() {
    let mut world = follower(true);
    let prefix = |length| Prefix { address: "198.51.100.0".parse().unwrap(), length };
    world.client.config.accept_prefixes = vec![prefix(30)];
    let at = |text: &str| RedirectOption { address: Some(text.parse().unwrap()), ..asking(Z) };
    assert_eq!(world.ask(at("198.51.100.4")), []);
    assert_eq!(world.ask(at("2001:db8::1")), []);
    let to = "198.51.100.3:41002".parse().unwrap();
    let (local, vip) = (world.local, world.vip);
    assert_eq!(world.ask(at("198.51.100.3")), [ClientEvent::MoveAsked { local, vip, from: Y, to }]);
}

#[test]
fn a_redirect_is_a_hint_or_nothing_where_it_is_not_followed() {
    for on_redirect in [OnRedirect::Hint, OnRedirect::Ignore] {
        let mut world = world(Continuation::Reconnect);
        world.client.vips.values_mut().for_each(|vip| vip.on_redirect = on_redirect);
        world.established();
        let (local, vip, to) = (world.local, world.vip, world.at(Z));
        let hint = ClientEvent::Hint { local, vip, from: Y, to };
        let expected = if on_redirect == OnRedirect::Hint { vec![hint] } else { vec![] };
        assert_eq!(world.ask(asking(Z)), expected);
        // It confirms nothing.
        let fin = world.own(TcpFlags::FIN | TcpFlags::ACK, SND_NXT, RCV_NXT, &[]);
        assert_eq!(option_of(&world.local(fin).unwrap()), None);
    }
}

#[test]
fn the_numbers_that_a_driver_knows_are_better_than_those_followed() {
    let mut world = follower(true);
    let known = ConnectionNumbers {
        snd_una: SND_UNA,
        snd_nxt: SND_NXT,
        max_window: 500,
        rcv_nxt: RCV_NXT + 100,
        window: 500,
        timestamps: None,
    };
    for (seq, obeyed) in [(RCV_NXT, false), (RCV_NXT + 100, true)] {
        let mut packet = world.segment_of_server(Y, TcpFlags::ACK, seq, SND_NXT, Some(asking(Z)), &[]);
        let _ = world.client.handle_remote_knowing(world.now, &mut packet, &|_, _| Some(known));
        assert_eq!(world.events().len(), usize::from(obeyed));
    }
}

#[test]
fn o7_the_next_part_is_opened_by_r_c_and_the_port_it_comes_from() {
    for v4 in [true, false] {
        let mut world = follower(v4);
        let option = world.opens(Z);
        assert_eq!(option, RedirectOption { confirm: true, ..asking(Y) });
        let up = world.answers_move(Z, Some(confirm())).expect("the SYN-ACK passes");
        assert_eq!(up.source_socket(), Some(world.at(Z)));
        assert_eq!(world.client.counters().moves_opened, 1);
        // It can be asked to move on.
        let ack = Segment::bare(world.opening(), world.at(Z), TcpFlags::ACK);
        let options = timestamps(TSVAL + 1, 5);
        let ack = Segment { seq: ISS + 1, ack: IRS + 1, window: 9, options: &options, ..ack }.emit();
        world.local(ack);
        let options = timestamps(6, TSVAL + 1);
        let bare = Segment::bare(world.at(Z), world.opening(), TcpFlags::ACK);
        let mut next = Segment { seq: IRS + 1, ack: ISS + 1, options: &options, ..bare }.emit();
        next.insert_redirect(crate::wire::DEFAULT_EXID, &asking(Z + 1), 1500).unwrap();
        world.events();
        assert!(world.remote(next).is_some());
        assert!(matches!(world.events()[..], [ClientEvent::MoveAsked { from: Z, .. }]));
    }
}

#[test]
fn o7_the_next_part_may_be_redirected_again_within_its_hops() {
    let mut world = follower(true);
    world.opens(Z);
    let mut port = Z;
    for hop in 1..=4u8 {
        let redirect = RedirectOption { confirm: true, port: Some(port + 10), ..Default::default() };
        assert!(world.answers_move(port, Some(redirect)).is_none());
        let sent: Vec<Packet> = world.sent().into_iter().map(|transmit| transmit.packet).collect();
        let syn = sent.iter().find(|packet| packet.tcp().unwrap().is_syn());
        if hop > 3 {
            assert!(syn.is_none());
            let refusal = sent.iter().find(|packet| packet.destination_socket() == Some(world.opening()));
            assert!(refusal.unwrap().tcp().unwrap().flags().contains(TcpFlags::RST));
            break;
        }
        let syn = syn.expect("a SYN to the next");
        assert_eq!(ports(syn), (world.opening().port(), port + 10));
        // The server at the end knows where it comes from, too.
        assert_eq!(option_of(syn), Some(RedirectOption { confirm: true, hops: hop, ..asking(Y) }));
        port += 10;
    }
    assert_eq!(world.client.counters().moves_failed, 1);
}

#[test]
fn a_move_is_confirmed_or_refused_but_never_plain() {
    let back = RedirectOption { confirm: true, port: Some(Y), ..Default::default() };
    let echo = RedirectOption { confirm: true, ..asking(Y) };
    for answer in [None, Some(back), Some(echo)] {
        let mut world = follower(true);
        world.opens(Z);
        assert!(world.answers_move(Z, answer).is_none());
        let refusal = world.sent_one(Towards::Local);
        let tcp = refusal.tcp().unwrap();
        assert!(tcp.flags().contains(TcpFlags::RST | TcpFlags::ACK));
        assert_eq!((tcp.ack(), refusal.destination_socket()), (ISS + 1, Some(world.opening())));
        assert_eq!(world.client.counters().moves_failed, 1);
        assert_eq!(world.client.path(world.vip.ip()), PathState::Direct);
        // It stays, and may be asked to go elsewhere but not there again.
        world.client.move_failed(world.local, world.vip, false);
        assert_eq!(world.ask(asking(Z)), []);
        assert_eq!(world.ask(asking(Z + 1)).len(), 1);
    }
}

#[test]
fn a_silent_new_server_is_asked_with_the_option_again_and_again() {
    let mut world = follower(true);
    world.opens(Z);
    for _ in 0..4 {
        world.pass(Duration::from_secs(1));
        let syn = world.syn_of_move(Z);
        let sent = world.local(syn).expect("the repeat passes");
        assert_eq!(option_of(&sent), Some(RedirectOption { confirm: true, ..asking(Y) }));
    }
}

#[test]
fn o8_the_close_of_the_old_part_confirms() {
    for flags in [TcpFlags::FIN | TcpFlags::ACK, TcpFlags::RST] {
        let mut world = follower(true);
        world.opens(Z);
        let early = world.own(flags, SND_NXT, RCV_NXT, &[]);
        assert_eq!(option_of(&world.local(early).unwrap()), None);
        world.client.close_moved(world.local, world.vip);
        let data = world.own(TcpFlags::ACK, SND_NXT, RCV_NXT, &[1; 10]);
        assert_eq!(option_of(&world.local(data).unwrap()), None);
        // With data and again, as long as it fits (W3).
        for (payload, said) in [(0, true), (100, true), (1440, true), (1441, false), (1448, false)] {
            let close = world.own(flags, SND_NXT, RCV_NXT, &vec![1; payload]);
            let close = world.local(close).unwrap();
            let expected = RedirectOption { port: Some(Z), ..confirm() };
            assert_eq!(option_of(&close), said.then_some(expected), "{payload}");
            assert_eq!(ports(&close).1, Y);
            assert!(close.len() <= 1500);
        }
    }
}

#[test]
fn what_is_expected_of_a_move_goes_with_its_socket() {
    let mut world = follower(true);
    assert!(!world.client.expect_move(world.local, world.vip, world.opening()), "nobody asked");
    assert_eq!(world.ask(asking(Z)).len(), 1);
    assert!(!world.client.expect_move(world.opening(), world.vip, world.opening()), "no such connection");
    assert!(world.client.expect_move(world.local, world.vip, world.opening()));
    world.client.retain(|_, _| false);
    assert!(world.client.moves.is_empty());
}

fn confirming(port: u16) -> RedirectOption {
    RedirectOption { port: Some(port), ..confirm() }
}

/// Own port of the tests of §5.
const OWN: u16 = 50_007;

fn ask_rebind(world: &mut World, port: u16) -> Result<(), RebindError> {
    world.client.rebind(world.now, world.local, world.vip, port, None)
}

#[test]
fn o9_the_client_asks_until_the_server_confirms_and_takes_segments_to_both_ports() {
    for v4 in [true, false] {
        let mut world = follower(v4);
        assert_eq!(ask_rebind(&mut world, OWN), Ok(()));
        assert_eq!(ask_rebind(&mut world, OWN + 1), Err(RebindError::Busy));
        let mut said = 0;
        for _ in 0..30 {
            for transmit in world.sent() {
                let tcp = transmit.packet.tcp().unwrap();
                assert_eq!((transmit.towards, tcp.seq(), tcp.ack()), (Towards::Network, SND_NXT, RCV_NXT));
                assert_eq!(ports(&transmit.packet), (world.local.port(), Y));
                assert_eq!(option_of(&transmit.packet), Some(asking(OWN)));
                said += 1;
            }
            world.pass(Duration::from_millis(100));
        }
        assert!((4..=8).contains(&said), "{said} duplicate ACKs in 3 s");
        let data = world.own(TcpFlags::ACK, SND_NXT, RCV_NXT, &[1; 10]);
        let data = world.local(data).unwrap();
        assert_eq!((option_of(&data), ports(&data)), (Some(asking(OWN)), (world.local.port(), Y)));
        // Already sent there, but not yet confirmed.
        let mut early = world.segment_of_server(Y, TcpFlags::ACK, RCV_NXT, SND_NXT, None, &[3; 4]);
        early.set_destination_port(OWN);
        let up = world.remote(early).unwrap();
        assert_eq!(ports(&up), (X, world.local.port()));
        // A stranger's confirmation is none.
        let mut forged =
            world.segment_of_server(Y, TcpFlags::ACK, RCV_NXT + 1, SND_NXT, Some(confirming(OWN)), &[]);
        forged.set_destination_port(OWN);
        let _ = world.remote(forged);
        assert_eq!(world.events(), []);
        for again in [false, true] {
            let mut confirmed =
                world.segment_of_server(Y, TcpFlags::ACK, RCV_NXT, SND_NXT, Some(confirming(OWN)), &[]);
            confirmed.set_destination_port(OWN);
            assert!(world.remote(confirmed).is_some());
            assert_eq!(world.events().len(), usize::from(!again));
        }
        let data = world.own(TcpFlags::ACK, SND_NXT, RCV_NXT, &[1; 10]);
        let data = world.local(data).unwrap();
        assert_eq!((option_of(&data), ports(&data)), (None, (OWN, Y)));
        assert!(world.sent().is_empty());
        assert_eq!(world.client.poll_timeout(), None);
        let late = world.segment_of_server(Y, TcpFlags::ACK, RCV_NXT, SND_NXT, None, &[3; 4]);
        assert_eq!(ports(&world.remote(late).unwrap()), (X, world.local.port()));
        // I2: an error quotes what the network saw.
        let error = world.icmp_about(&data, None);
        let error = world.remote(error).unwrap();
        let quoted = error.icmp().unwrap().quoted().unwrap();
        assert_eq!((quoted.source_port, quoted.destination_port), (world.local.port(), X));
        world.client.retain(|_, _| false);
        assert!(world.client.services.is_empty());
    }
}

#[test]
fn o9_none_of_many_forged_confirmations_is_believed() {
    let mut world = follower(true);
    ask_rebind(&mut world, OWN).unwrap();
    let mut state = 3;
    for _ in 0..100_000 {
        let seq = SeqNumber(random(&mut state));
        if seq != RCV_NXT {
            let packet = world.segment_of_server(Y, TcpFlags::ACK, seq, SND_NXT, Some(confirming(OWN)), &[]);
            let _ = world.remote(packet);
        }
    }
    let unasked = world.segment_of_server(Y, TcpFlags::ACK, RCV_NXT, SND_NXT, Some(confirming(OWN + 1)), &[]);
    let _ = world.remote(unasked);
    assert_eq!(world.events(), []);
    assert_eq!(world.client.counters().rebinds, 0);
}

#[test]
fn o9_a_port_that_is_not_confirmed_is_given_up_but_still_heard() {
    let mut world = follower(true);
    ask_rebind(&mut world, OWN).unwrap();
    world.pass(Duration::from_secs(11));
    world.sent();
    assert!(matches!(world.events()[..], [ClientEvent::RebindFailed { port: OWN, .. }]));
    assert_eq!(world.client.poll_timeout(), None);
    let mut late = world.segment_of_server(Y, TcpFlags::ACK, RCV_NXT, SND_NXT, None, &[3; 4]);
    late.set_destination_port(OWN);
    assert_eq!(ports(&world.remote(late).unwrap()), (X, world.local.port()));
    let data = world.own(TcpFlags::ACK, SND_NXT, RCV_NXT, &[1; 10]);
    assert_eq!(ports(&world.local(data).unwrap()), (world.local.port(), Y));
}

#[test]
fn o9_only_a_redirected_connection_on_an_untranslated_path_may_change_its_port() {
    let mut world = world(Continuation::Reconnect);
    assert_eq!(ask_rebind(&mut world, OWN), Err(RebindError::NotRedirected));
    let behind = SocketAddr::new("192.0.2.99".parse().unwrap(), 1);
    world.reconnect(Some(behind));
    assert_eq!(ask_rebind(&mut world, OWN), Err(RebindError::Translated));
    let mut world = follower(true);
    for port in [0, world.local.port()] {
        assert_eq!(ask_rebind(&mut world, port), Err(RebindError::Port(port)));
    }
    // C8: another connection has it.
    let other =
        FlowRecord { local: SocketAddr::new(world.local.ip(), OWN), vip: world.vip, service_port: Y, irs: 7 };
    assert!(world.client.restore(other));
    assert_eq!(ask_rebind(&mut world, OWN), Err(RebindError::Port(OWN)));
}
