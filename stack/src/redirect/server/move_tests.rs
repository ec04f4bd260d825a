//! §4 and §5 at the server: what is said, when it ends, and what strangers can do to it.

use std::net::SocketAddr;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::redirect::ConnectionNumbers;
use crate::wire::{DEFAULT_EXID, Gso, GsoKind, Offload, TcpOption};

const Y: u16 = 41_001;
const Z: u16 = 41_002;
const OWN: u16 = 50_007;
const START: Instant = Instant::from_millis(1000);

/// Where the local TCP stands.
const NUMBERS: ConnectionNumbers = ConnectionNumbers {
    snd_una: SeqNumber(9000),
    snd_nxt: SeqNumber(9100),
    max_window: 1000,
    rcv_nxt: SeqNumber(500),
    window: 77,
    timestamps: None,
};

fn ends(v4: bool) -> (SocketAddr, SocketAddr) {
    if v4 {
        ("198.51.100.7:50001".parse().unwrap(), "203.0.113.10:41001".parse().unwrap())
    } else {
        ("[2001:db8:1::7]:50001".parse().unwrap(), "[2001:db8::10]:41001".parse().unwrap())
    }
}

struct World {
    server: Server,
    now: Instant,
    client: SocketAddr,
    service: SocketAddr,
}

fn world_with(v4: bool, change: impl FnOnce(&mut ServerConfig)) -> World {
    let (client, service) = ends(v4);
    let services = vec![ServicePorts { address: service.ip(), redirect_port: 443, service_port: Y }];
    let mut config = ServerConfig { services, ..ServerConfig::default() };
    change(&mut config);
    World { server: Server::new(config), now: START, client, service }
}

fn world(v4: bool) -> World {
    world_with(v4, |_| {})
}

impl World {
    fn redirect(&mut self, numbers: Option<ConnectionNumbers>) -> Result<(), RedirectError> {
        let to = SocketAddr::new(self.service.ip(), Z);
        self.server.redirect_connection(self.now, self.client, self.service, to, numbers)
    }

    fn segment(&self, flags: TcpFlags, seq: u32, ack: u32, payload: &[u8]) -> Packet {
        let bare = Segment::bare(self.service, self.client, flags | TcpFlags::ACK);
        Segment { seq: SeqNumber(seq), ack: SeqNumber(ack), window: 77, payload, ..bare }.emit()
    }

    /// The local TCP sends: what reaches the network.
    fn local(&mut self, mut packet: Packet) -> Packet {
        assert_eq!(self.server.handle_local(self.now, &mut packet), Action::Pass);
        assert!(packet.checksum_ok());
        packet
    }

    fn client_sends(
        &mut self,
        port: u16,
        flags: TcpFlags,
        (seq, ack): (u32, u32),
        option: Option<RedirectOption>,
    ) -> Packet {
        let client = SocketAddr::new(self.client.ip(), port);
        let bare = Segment::bare(client, self.service, flags | TcpFlags::ACK);
        let mut packet = Segment { seq: SeqNumber(seq), ack: SeqNumber(ack), window: 9, ..bare }.emit();
        if let Some(option) = option {
            packet.insert_redirect(DEFAULT_EXID, &option, 1500).unwrap();
        }
        let (local, peer) = (self.service, self.client);
        let numbers = move |one, other| ((one, other) == (local, peer)).then_some(NUMBERS);
        assert_eq!(self.server.handle_remote_knowing(self.now, &mut packet, &numbers), Action::Pass);
        assert!(packet.checksum_ok());
        packet
    }

    fn sent(&mut self) -> Vec<Transmit> {
        std::iter::from_fn(|| self.server.poll_transmit(self.now)).collect()
    }

    fn outcome(&mut self) -> Option<RedirectOutcome> {
        let event = self.server.poll_event()?;
        let ServerEvent::Redirection { client, service, to, outcome } = event else {
            panic!("{event:?}");
        };
        assert_eq!((client, service, to), (self.client, self.service, Z));
        assert_eq!(self.server.poll_event(), None);
        Some(outcome)
    }

    /// Lets time pass, asking whenever the machine wants; all that it sent.
    fn run(&mut self, time: Duration) -> Vec<(Duration, Transmit)> {
        let end = self.now + time;
        let mut sent = Vec::new();
        loop {
            sent.extend(self.sent().into_iter().map(|transmit| (self.now.since(START), transmit)));
            match self.server.poll_timeout().filter(|at| *at <= end) {
                Some(at) => self.now = self.now.max(at),
                None => break,
            }
        }
        self.now = end;
        sent
    }
}

fn asking() -> RedirectOption {
    RedirectOption { redirect: true, port: Some(Z), ..RedirectOption::default() }
}

fn confirming() -> RedirectOption {
    RedirectOption { confirm: true, port: Some(Z), ..RedirectOption::default() }
}

fn option_of(packet: &Packet) -> Option<RedirectOption> {
    packet.tcp().unwrap().redirect(DEFAULT_EXID).unwrap()
}

#[test]
fn o7_every_segment_that_has_room_says_it_and_no_other() {
    for v4 in [true, false] {
        let mut world = world(v4);
        let before = world.segment(TcpFlags::PSH, 9100, 500, &[1; 100]);
        assert_eq!(world.local(before.clone()), before);
        world.redirect(None).unwrap();
        let header = if v4 { 40 } else { 60 };
        for (length, said) in [(0, true), (100, true), (1500 - header - 8, true), (1500 - header - 7, false)]
        {
            let segment = world.segment(TcpFlags::PSH, 9100, 500, &vec![1; length]);
            let sent = world.local(segment.clone());
            assert_eq!(option_of(&sent), said.then_some(asking()), "{length}");
            assert!(sent.len() <= 1500);
            if !said {
                assert_eq!(sent, segment);
            }
        }
        // W3: not in a super-packet.
        let kind = if v4 { GsoKind::TcpV4 } else { GsoKind::TcpV6 };
        let gso = Offload { partial_checksum: true, gso: Some(Gso { kind, size: 1000, ecn: false }) };
        let bytes = world.segment(TcpFlags::PSH, 9100, 500, &[1; 3000]).into_buffer();
        let mut packet = Packet::parse(bytes, gso).unwrap();
        let before = packet.clone();
        assert_eq!(world.server.handle_local(world.now, &mut packet), Action::Pass);
        assert_eq!(packet, before);
        // Other connections are not asked.
        let mut other = world.segment(TcpFlags::PSH, 9100, 500, &[]);
        other.set_destination_port(50_002);
        assert_eq!(world.local(other.clone()), other);
    }
}

#[test]
fn o7_a_silent_connection_is_asked_by_duplicate_acks_two_in_a_row_at_most() {
    let mut world = world(true);
    world.redirect(Some(NUMBERS)).unwrap();
    let sent = world.run(Duration::from_secs(29));
    for (_, transmit) in &sent {
        let tcp = transmit.packet.tcp().unwrap();
        assert_eq!((tcp.flags(), tcp.seq(), tcp.ack()), (TcpFlags::ACK, NUMBERS.snd_nxt, NUMBERS.rcv_nxt));
        assert_eq!((tcp.window(), tcp.payload().len()), (NUMBERS.window, 0));
        assert_eq!(option_of(&transmit.packet), Some(asking()));
        assert_eq!(transmit.packet.destination_socket(), Some(world.client));
    }
    let times: Vec<Duration> = sent.iter().map(|(at, _)| *at).collect();
    assert_eq!(times[0], Duration::ZERO);
    assert!((30..=60).contains(&times.len()), "{times:?}");
    let row = times.windows(3).all(|three| three[2] >= three[0] + Duration::from_secs(1));
    assert!(row, "three in a row: {times:?}");
}

#[test]
fn o7_a_duplicate_ack_of_the_local_tcp_is_one_of_the_two() {
    let mut world = world(true);
    world.redirect(None).unwrap();
    // As Linux answers a segment out of its window: for all that is known here, the client has seen it before.
    for _ in 0..2 {
        let ack = world.segment(TcpFlags::default(), 9100, 500, &[]);
        assert_eq!(option_of(&world.local(ack)), Some(asking()));
    }
    assert!(world.run(Duration::from_millis(990)).is_empty(), "three in a row");
    assert_eq!(world.run(Duration::from_millis(500)).len(), 2);
}

#[test]
fn o7_connections_that_are_due_at_once_are_all_asked_by_and_by() {
    let mut world = world(true);
    for port in 0..500 {
        let client = SocketAddr::new(world.client.ip(), 50_001 + port);
        let to = SocketAddr::new(world.service.ip(), Z);
        world.server.redirect_connection(world.now, client, world.service, to, Some(NUMBERS)).unwrap();
    }
    let mut asked = BTreeMap::new();
    while world.server.poll_timeout().is_some_and(|at| at <= world.now) {
        while let Some(transmit) = world.server.poll_transmit(world.now) {
            *asked.entry(transmit.packet.destination_socket()).or_insert(0) += 1;
        }
    }
    assert_eq!((asked.len(), asked.values().max(), world.server.counters().overflowed), (500, Some(&1), 0));
}

#[test]
fn without_numbers_nothing_is_made_up_until_a_segment_has_passed() {
    let mut world = world(true);
    world.redirect(None).unwrap();
    assert!(world.run(Duration::from_secs(5)).is_empty());
    let data = world.segment(TcpFlags::PSH, 9100, 500, &[1; 10]);
    world.local(data);
    let sent = world.run(Duration::from_secs(5));
    let tcp = sent[0].1.packet.tcp().unwrap();
    assert_eq!((tcp.seq(), tcp.ack()), (SeqNumber(9110), SeqNumber(500)));
}

#[test]
fn o8_the_clients_close_ends_it_once_the_local_tcp_has_taken_it() {
    for (option, outcome) in
        [(Some(confirming()), RedirectOutcome::Confirmed), (None, RedirectOutcome::Closed)]
    {
        let mut world = world(true);
        world.redirect(Some(NUMBERS)).unwrap();
        // It lies behind data that has not come.
        world.client_sends(50_001, TcpFlags::FIN, (600, 9100), option);
        let ack = world.segment(TcpFlags::default(), 9100, 500, &[]);
        assert_eq!(option_of(&world.local(ack)), Some(asking()));
        assert_eq!(world.outcome(), None);
        // Repeated without the option, as behind data that leaves no room.
        world.client_sends(50_001, TcpFlags::FIN, (600, 9100), None);
        let ack = world.segment(TcpFlags::default(), 9100, 601, &[]);
        assert_eq!(option_of(&world.local(ack)), None);
        assert_eq!(world.outcome(), Some(outcome));
        assert_eq!((world.server.redirection_count(), world.server.poll_timeout()), (0, None));
    }
}

#[test]
fn o8_a_reset_ends_it_only_where_the_local_tcp_takes_it() {
    let mut world = world(true);
    world.redirect(Some(NUMBERS)).unwrap();
    for seq in [499, 501, 7] {
        world.client_sends(50_001, TcpFlags::RST, (seq, 9100), Some(confirming()));
        assert_eq!(world.outcome(), None);
    }
    world.client_sends(50_001, TcpFlags::RST, (500, 9100), Some(confirming()));
    assert_eq!(world.outcome(), Some(RedirectOutcome::Confirmed));
    world.redirect(Some(NUMBERS)).unwrap();
    let reset = world.segment(TcpFlags::RST, 9100, 500, &[]);
    assert_eq!(option_of(&world.local(reset)), None);
    assert_eq!(world.outcome(), Some(RedirectOutcome::Closed));
    world.redirect(Some(NUMBERS)).unwrap();
    world.server.forget_connection(world.client, world.service);
    assert_eq!(world.outcome(), Some(RedirectOutcome::Closed));
}

#[test]
fn o8_a_client_that_never_closes_is_given_up_or_reset() {
    let mut first = world(true);
    first.redirect(Some(NUMBERS)).unwrap();
    first.run(Duration::from_secs(31));
    assert_eq!(first.outcome(), Some(RedirectOutcome::GivenUp));
    assert_eq!(first.server.poll_timeout(), None);
    let ack = first.segment(TcpFlags::default(), 9100, 500, &[]);
    assert_eq!(option_of(&first.local(ack)), None);
    assert_eq!(first.redirect(Some(NUMBERS)), Ok(()), "it may be asked again");

    let mut second =
        world_with(true, |config| config.on_silence = Silence::ResetAfter(Duration::from_secs(60)));
    second.redirect(Some(NUMBERS)).unwrap();
    second.run(Duration::from_secs(31));
    assert!(second.run(Duration::from_secs(28)).is_empty(), "not asked any more");
    let data = second.segment(TcpFlags::default(), 9100, 510, &[1; 50]);
    assert_eq!(option_of(&second.local(data)), None);
    let resets = second.run(Duration::from_secs(2));
    assert_eq!(second.outcome(), Some(RedirectOutcome::Reset));
    let found: Vec<_> =
        resets.iter().map(|(_, transmit)| (transmit.towards, transmit.packet.tcp().unwrap().seq())).collect();
    assert_eq!(found, [(Towards::Network, SeqNumber(9150)), (Towards::Local, SeqNumber(510))]);
    assert!(resets.iter().all(|(_, sent)| sent.packet.tcp().unwrap().flags() == TcpFlags::RST));
}

#[test]
fn what_cannot_be_redirected_is_refused_and_the_table_is_bounded() {
    let mut world = world_with(true, |config| config.redirect_limit = 1);
    let at = |port| SocketAddr::new(world.service.ip(), port);
    let (redirect_port, zero) = (at(443), at(0));
    let server = &mut world.server;
    let (now, client, service) = (world.now, world.client, world.service);
    let to = at(Z);
    let refused = server.redirect_connection(now, client, redirect_port, to, None);
    assert_eq!(refused, Err(RedirectError::NoServicePort(redirect_port)));
    for target in [service, zero, "[2001:db8::1]:41002".parse().unwrap()] {
        let refused = server.redirect_connection(now, client, service, target, None);
        assert_eq!(refused, Err(RedirectError::Target(target)));
    }
    assert_eq!(server.redirect_connection(now, client, service, to, None), Ok(()));
    let again = server.redirect_connection(now, client, service, to, None);
    assert_eq!(again, Err(RedirectError::UnderWay));
    let other = SocketAddr::new(client.ip(), 9);
    let many = server.redirect_connection(now, other, service, to, None);
    assert_eq!(many, Err(RedirectError::TooMany(1)));
    assert!(server.cancel_redirect(client, service) && !server.cancel_redirect(client, service));
    assert_eq!((server.poll_event(), server.poll_timeout()), (None, None));
    assert_eq!(server.redirect_connection(now, other, service, to, None), Ok(()));
}

fn rebinding(port: u16) -> RedirectOption {
    RedirectOption { redirect: true, port: Some(port), ..RedirectOption::default() }
}

fn rebound(port: u16) -> RedirectOption {
    RedirectOption { confirm: true, port: Some(port), ..RedirectOption::default() }
}

/// SEG.SEQ and SEG.ACK that are exact.
const EXACT: (u32, u32) = (500, 9100);

#[test]
fn o9_none_of_a_million_forged_requests_is_obeyed_and_an_exact_one_is() {
    let mut world = world(true);
    let mut state = 11u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 32) as u32
    };
    for round in 0..1_000_000 {
        let (seq, ack) = (next(), next());
        let near = SeqNumber(ack).distance(NUMBERS.snd_nxt) <= 0
            && SeqNumber(ack).distance(NUMBERS.snd_una - NUMBERS.max_window) >= 0;
        let guess = match round % 3 {
            0 if !near => (EXACT.0, ack),
            _ if seq != EXACT.0 => (seq, if round % 3 == 1 { EXACT.1 } else { ack }),
            _ => continue,
        };
        world.client_sends(50_001, TcpFlags::default(), guess, Some(rebinding(OWN)));
    }
    assert_eq!((world.server.counters().rebinds, world.server.poll_event()), (0, None));
    assert!(world.server.counters().rebinds_inexact > 990_000);
    assert!(world.sent().is_empty());
    world.client_sends(50_001, TcpFlags::default(), EXACT, Some(rebinding(OWN)));
    assert_eq!(world.server.counters().rebinds, 1);
}

#[test]
fn o9_the_confirmation_is_repeated_until_the_client_is_heard_from_there() {
    for v4 in [true, false] {
        let mut world = world(v4);
        world.client_sends(50_001, TcpFlags::default(), EXACT, Some(rebinding(OWN)));
        let (client, service) = (world.client, world.service);
        assert_eq!(world.server.poll_event(), Some(ServerEvent::Rebound { client, service, port: OWN }));
        for _ in 0..3 {
            let sent = world.sent();
            assert_eq!(sent.len(), 1, "an answer to each request");
            assert_eq!(option_of(&sent[0].packet), Some(rebound(OWN)));
            assert_eq!(sent[0].packet.ports(), Some((Y, OWN)));
            world.client_sends(50_001, TcpFlags::default(), EXACT, Some(rebinding(OWN)));
        }
        assert_eq!(world.server.poll_event(), None);
        let data = world.segment(TcpFlags::PSH, 9100, 500, &[1; 10]);
        let data = world.local(data);
        assert_eq!((option_of(&data), data.ports()), (Some(rebound(OWN)), Some((Y, OWN))));
        // From either port; the local TCP knows the first.
        let seen = world.client_sends(50_001, TcpFlags::default(), EXACT, None);
        assert_eq!(seen.ports(), Some((50_001, Y)));
        let seen = world.client_sends(OWN, TcpFlags::default(), EXACT, None);
        assert_eq!(seen.ports(), Some((50_001, Y)));
        let data = world.segment(TcpFlags::PSH, 9100, 500, &[1; 10]);
        let data = world.local(data);
        assert_eq!((option_of(&data), data.ports()), (None, Some((Y, OWN))));
        assert!(world.run(Duration::from_secs(60)).is_empty());
        world.server.forget_connection(client, service);
        let data = world.segment(TcpFlags::PSH, 9100, 500, &[1; 10]);
        assert_eq!(world.local(data).ports(), Some((Y, 50_001)));
        assert!(world.server.rebound.is_empty() && world.server.rebinds.is_empty());
    }
}

#[test]
fn o9_the_confirmation_ends_with_a_client_that_is_never_heard() {
    let mut world = world(true);
    world.client_sends(50_001, TcpFlags::default(), EXACT, Some(rebinding(OWN)));
    assert!(!world.run(Duration::from_secs(31)).is_empty());
    assert!(world.run(Duration::from_secs(600)).is_empty());
    assert_eq!(world.server.poll_timeout(), None);
    world.client_sends(50_001, TcpFlags::default(), EXACT, Some(rebinding(OWN)));
    assert_eq!(world.sent().len(), 1);
}

#[test]
fn o9_a_redirect_reaches_a_client_where_it_is_now() {
    let mut world = world(true);
    world.client_sends(50_001, TcpFlags::default(), EXACT, Some(rebinding(OWN)));
    world.client_sends(OWN, TcpFlags::default(), EXACT, None);
    world.sent();
    world.server.poll_event();
    world.redirect(Some(NUMBERS)).unwrap();
    let sent = world.sent();
    assert_eq!((sent[0].packet.ports(), option_of(&sent[0].packet)), (Some((Y, OWN)), Some(asking())));
    world.client_sends(OWN, TcpFlags::RST, EXACT, Some(confirming()));
    assert_eq!(world.outcome(), Some(RedirectOutcome::Confirmed));
}

#[test]
fn o9_ports_that_others_have_and_too_many_changes_are_refused() {
    let mut world = world(true);
    let taken = SocketAddr::new(world.client.ip(), OWN);
    let (client, service) = (world.client, world.service);
    let bare = Segment::bare(client, service, TcpFlags::ACK);
    let mut packet = Segment { seq: SeqNumber(500), ack: SeqNumber(9100), ..bare }.emit();
    packet.insert_redirect(DEFAULT_EXID, &rebinding(OWN), 1500).unwrap();
    let numbers = |_, other| [client, taken].contains(&other).then_some(NUMBERS);
    let _ = world.server.handle_remote_knowing(world.now, &mut packet, &numbers);
    world.client_sends(50_001, TcpFlags::default(), EXACT, Some(rebinding(50_001)));
    assert_eq!((world.server.counters().rebinds, world.server.counters().rebinds_refused), (0, 2));
    // A driver that knows nobody's numbers takes none.
    let _ = world.server.handle_remote(world.now, &mut packet);
    assert_eq!(world.server.counters().rebinds_inexact, 1);
    for port in OWN..OWN + 6 {
        world.client_sends(50_001, TcpFlags::default(), EXACT, Some(rebinding(port)));
    }
    assert_eq!(world.server.counters().rebinds, 4);
    assert_eq!(world.server.rebound.len(), 4);
}

proptest! {
    /// W2, W3: the option is added to what is there, or nothing is.
    #[test]
    fn w2_timestamps_and_sack_are_never_displaced(
        v4 in any::<bool>(),
        timestamps in proptest::option::of(any::<(u32, u32)>()),
        blocks in proptest::collection::vec(any::<(u32, u32)>(), 0..5),
        window_update in any::<bool>(),
        length in 0usize..1500,
        mtu in 576usize..1500,
    ) {
        let mut options = Vec::new();
        if let Some((value, echo)) = timestamps {
            options.extend([1, 1, 8, 10]);
            options.extend(value.to_be_bytes());
            options.extend(echo.to_be_bytes());
        }
        for (count, (left, right)) in blocks.iter().enumerate() {
            if options.len() + 12 > 40 {
                break;
            }
            if count == 0 {
                options.extend([1, 1, 5, 2]);
            }
            let at = options.len() - 8 * count - 1;
            options[at] += 8;
            options.extend(left.to_be_bytes());
            options.extend(right.to_be_bytes());
        }
        let mut world = world_with(v4, |config| config.mtu = mtu);
        world.redirect(window_update.then_some(NUMBERS)).unwrap();
        let header = if v4 { 40 } else { 60 } + options.len();
        let payload = vec![7; length.min(mtu.saturating_sub(header))];
        let bare = Segment::bare(world.service, world.client, TcpFlags::ACK);
        let before = Segment { options: &options, payload: &payload, ..bare }.emit();
        let after = world.local(before.clone());
        prop_assert!(after.len() <= mtu);
        prop_assert!(after.tcp().unwrap().header_len() <= 60);
        let others = |packet: &Packet| -> Vec<String> {
            let kept = |option: &TcpOption<'_>| {
                !matches!(option, TcpOption::Experiment { .. } | TcpOption::NoOperation)
            };
            let tcp = packet.tcp().unwrap();
            tcp.options().flatten().filter(kept).map(|option| format!("{option:?}")).collect()
        };
        prop_assert_eq!(others(&before), others(&after));
        prop_assert_eq!(before.tcp().unwrap().payload(), after.tcp().unwrap().payload());
        let room = options.len() <= 32 && before.len() + 8 <= mtu;
        prop_assert_eq!(option_of(&after), room.then_some(asking()));
    }
}
