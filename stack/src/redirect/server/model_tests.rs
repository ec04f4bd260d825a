//! The rules of handshakes at the server (`S1` to `S6`) once more, as plainly as they can be said, beside the machine:
//! whatever comes in whatever order, both do the same.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::wire::DEFAULT_EXID;

const X: u16 = 443;
const Y: u16 = 41001;
/// Another server's service port.
const ELSEWHERE: u16 = 41002;
const ROOM: usize = 3;
const LIFETIME: Duration = Duration::from_secs(64);

/// What an option says, as far as handshakes go; O without its digest, which the machine's own tests look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Said {
    redirect: bool,
    confirm: bool,
    port: Option<u16>,
    hops: u8,
    observed: bool,
}

impl Said {
    fn option(self) -> RedirectOption {
        let Said { redirect, confirm, port, hops, .. } = self;
        RedirectOption { redirect, confirm, port, hops, ..RedirectOption::default() }
    }

    fn of(packet: &Packet) -> Option<Said> {
        let option = packet.tcp()?.redirect(DEFAULT_EXID).expect("a valid option")?;
        let RedirectOption { redirect, confirm, port, hops, observed, .. } = option;
        Some(Said { redirect, confirm, port, hops, observed: observed.is_some() })
    }
}

#[derive(Debug, Clone, Copy)]
enum Input {
    /// From a client to a port.
    Syn {
        client: u16,
        port: u16,
        isn: u32,
        said: Option<Said>,
    },
    /// Of the local TCP.
    SynAck {
        client: u16,
        port: u16,
        ack: u32,
    },
    /// Neither.
    Data {
        client: u16,
        port: u16,
        local: bool,
    },
    Wait(Duration),
    Listening(bool),
    Drained(bool),
}

/// What becomes of a packet: ports as they leave, and what the option says.
#[derive(Debug, PartialEq, Eq)]
enum Output {
    Passed {
        client: u16,
        port: u16,
        said: Option<Said>,
    },
    /// A SYN was answered without the local TCP.
    Answered {
        client: u16,
        port: u16,
        ack: u32,
        said: Option<Said>,
    },
    Nothing,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    client: u16,
    asked: u16,
    isn: u32,
    hops: u8,
    since: Instant,
}

/// The rules.
#[derive(Debug)]
struct Model {
    /// Oldest first.
    half_open: VecDeque<Entry>,
    listening: bool,
    drained: bool,
    now: Instant,
}

impl Model {
    fn known(&self, client: u16) -> Option<Entry> {
        let entry = self.half_open.iter().find(|entry| entry.client == client)?;
        (self.now < entry.since + LIFETIME).then_some(*entry)
    }

    /// `S5`.
    fn remember(&mut self, entry: Entry) {
        self.half_open.retain(|old| old.client != entry.client);
        self.half_open.push_back(entry);
        if self.half_open.len() > ROOM {
            self.half_open.pop_front();
        }
    }

    fn step(&mut self, input: Input) -> Output {
        match input {
            Input::Wait(time) => self.now += time,
            Input::Listening(listening) => self.listening = listening,
            Input::Drained(drained) => self.drained = drained,
            Input::Data { client, port, .. } => return Output::Passed { client, port, said: None },
            Input::Syn { client, port, isn, said } => return self.syn(client, port, isn, said),
            Input::SynAck { client, port, ack } => return self.syn_ack(client, port, ack),
        }
        Output::Nothing
    }

    fn syn(&mut self, client: u16, port: u16, isn: u32, said: Option<Said>) -> Output {
        let untouched = Output::Passed { client, port, said };
        if port != X && port != Y {
            return untouched;
        }
        let Some(Said { confirm, hops, .. }) = said.filter(|said| said.redirect) else {
            // S1: plain TCP; nothing that an earlier SYN asked for holds any more.
            if port == Y {
                self.half_open.retain(|old| old.client != client);
            }
            return untouched;
        };
        let answered = |to, observed| {
            let said = Said { redirect: false, confirm: true, port: Some(to), hops, observed };
            Output::Answered { client, port, ack: isn.wrapping_add(1), said: Some(said) }
        };
        let enough = hops >= 3;
        if self.drained && !enough {
            return answered(ELSEWHERE, false);
        }
        if !self.listening || (port == X && enough) {
            return Output::Passed { client, port, said: None };
        }
        if port == X && confirm {
            return answered(Y, true);
        }
        // S3: after a SYN to Y only from Y.
        let already = self.known(client).is_some_and(|known| known.asked == Y && known.isn == isn);
        let asked = if already { Y } else { port };
        self.remember(Entry { client, asked, isn, hops, since: self.now });
        Output::Passed { client, port: Y, said: None }
    }

    fn syn_ack(&mut self, client: u16, port: u16, ack: u32) -> Output {
        let known = self.known(client).filter(|known| port == Y && ack == known.isn.wrapping_add(1));
        match known {
            None => Output::Passed { client, port, said: None },
            Some(Entry { asked, hops, .. }) => {
                let moved = asked == X;
                let said =
                    Said { redirect: false, confirm: true, port: moved.then_some(Y), hops, observed: moved };
                Output::Passed { client, port: asked, said: Some(said) }
            }
        }
    }
}

/// The machine, told the same.
struct Machine {
    server: Server,
    now: Instant,
    vip: IpAddr,
    host: IpAddr,
}

impl Machine {
    fn new(vip: &str, host: &str) -> Machine {
        let (vip, host) = (vip.parse().expect("an address"), host.parse().expect("an address"));
        let services = vec![ServicePorts { address: vip, redirect_port: X, service_port: Y }];
        let config = ServerConfig {
            services,
            half_open_limit: ROOM,
            half_open_lifetime: LIFETIME,
            ..ServerConfig::default()
        };
        Machine { server: Server::new(config), now: Instant::ZERO, vip, host }
    }

    fn step(&mut self, input: Input) -> Output {
        let (vip, host) = (self.vip, self.host);
        let ends = |client, port| (SocketAddr::new(host, client), SocketAddr::new(vip, port));
        match input {
            Input::Wait(time) => self.now += time,
            Input::Listening(listening) => self.server.set_listening(ends(0, Y).1, listening),
            Input::Drained(drained) => {
                for port in [X, Y] {
                    self.server.set_elsewhere(ends(0, port).1, drained.then_some(ELSEWHERE));
                }
            }
            Input::Syn { client, port, isn, said } => {
                let (client, to) = ends(client, port);
                let mut syn =
                    Segment { seq: SeqNumber(isn), ..Segment::bare(client, to, TcpFlags::SYN) }.emit();
                if let Some(said) = said {
                    syn.insert_redirect(DEFAULT_EXID, &said.option(), 1500).expect("room in a bare SYN");
                }
                return self.remote(syn);
            }
            Input::SynAck { client, port, ack } => {
                let (client, from) = ends(client, port);
                let bare = Segment::bare(from, client, TcpFlags::SYN | TcpFlags::ACK);
                return self.local(Segment { ack: SeqNumber(ack), ..bare }.emit());
            }
            Input::Data { client, port, local } => {
                let (client, own) = ends(client, port);
                let (from, to) = if local { (own, client) } else { (client, own) };
                let packet = Segment { payload: b"data", ..Segment::bare(from, to, TcpFlags::ACK) }.emit();
                return if local { self.local(packet) } else { self.remote(packet) };
            }
        }
        Output::Nothing
    }

    fn remote(&mut self, mut packet: Packet) -> Output {
        if self.server.handle_remote(self.now, &mut packet) == Action::Pass {
            assert_eq!(self.server.poll_transmit(self.now), None);
            let tcp = packet.tcp().expect("TCP");
            let (client, port) = (tcp.source_port(), tcp.destination_port());
            return Output::Passed { client, port, said: Said::of(&packet) };
        }
        let answer = self.server.poll_transmit(self.now).expect("an answer");
        assert_eq!(answer.towards, Towards::Network);
        let tcp = answer.packet.tcp().expect("TCP");
        assert!(tcp.is_syn_ack());
        let (client, port, ack) = (tcp.destination_port(), tcp.source_port(), tcp.ack().0);
        Output::Answered { client, port, ack, said: Said::of(&answer.packet) }
    }

    fn local(&mut self, mut packet: Packet) -> Output {
        assert_eq!(self.server.handle_local(self.now, &mut packet), Action::Pass);
        let tcp = packet.tcp().expect("TCP");
        let (client, port) = (tcp.destination_port(), tcp.source_port());
        Output::Passed { client, port, said: Said::of(&packet) }
    }
}

fn any_input() -> impl Strategy<Value = Input> {
    let client = || 50_000u16..50_005;
    let port = || prop_oneof![4 => Just(X), 4 => Just(Y), 1 => Just(80u16)];
    let said = (any::<bool>(), any::<bool>(), proptest::option::of(Just(X)), 0u8..5);
    let said = said.prop_map(|(redirect, confirm, port, hops)| Said {
        redirect,
        confirm,
        port,
        hops,
        observed: false,
    });
    let syn = (client(), port(), 0u32..3, proptest::option::weighted(0.8, said));
    prop_oneof![
        8 => syn.prop_map(|(client, port, isn, said)| Input::Syn { client, port, isn, said }),
        6 => (client(), port(), 0u32..4).prop_map(|(client, port, ack)| Input::SynAck { client, port, ack }),
        2 => (client(), port(), any::<bool>())
            .prop_map(|(client, port, local)| Input::Data { client, port, local }),
        2 => (0u64..40_000).prop_map(|millis| Input::Wait(Duration::from_millis(millis))),
        1 => prop::bool::weighted(0.8).prop_map(Input::Listening),
        1 => prop::bool::weighted(0.2).prop_map(Input::Drained),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn the_machine_does_what_the_rules_say(v4: bool, inputs in proptest::collection::vec(any_input(), 1..120)) {
        let (vip, host) = if v4 { ("203.0.113.10", "198.51.100.7") } else { ("2001:db8::10", "2001:db8:1::7") };
        let mut machine = Machine::new(vip, host);
        let mut model =
            Model { half_open: VecDeque::new(), listening: true, drained: false, now: Instant::ZERO };
        for (step, input) in inputs.into_iter().enumerate() {
            let (expected, found) = (model.step(input), machine.step(input));
            prop_assert_eq!(found, expected, "step {}: {:?}", step, input);
        }
    }
}
