//! The rules of a connect by reconnect (`C1` to `C7`, `C9`) once more, as plainly as they can be said, beside the
//! machine: whatever the network and the local TCP send, both do the same.

use proptest::prelude::*;

use super::*;

/// What redirects name: four service ports, one that nobody may be sent to, and the port asked.
const PORTS: [u16; 6] = [41_001, 41_002, 41_003, 41_004, 80, X];
/// As the source of a segment: wherever the latest SYN went.
const LATEST: u16 = 0;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Said {
    redirect: bool,
    confirm: bool,
    port: Option<u16>,
    hops: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Syn,
    SynAck,
    Reset,
    Ack,
}

#[derive(Debug, Clone, Copy)]
enum Input {
    /// The local TCP repeats its SYN.
    Repeat,
    /// The local TCP sends an ACK.
    Local,
    /// A segment of the VIP. `fits`: it acknowledges the SYN, and only that; `echoes`: what the SYN's timestamp said.
    Remote {
        kind: Kind,
        from: u16,
        irs: u32,
        fits: bool,
        echoes: bool,
        said: Option<Said>,
    },
    Wait(Duration),
}

/// A packet that left the machine, on either side; the port is the VIP's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Output {
    towards: Towards,
    kind: Kind,
    port: u16,
    said: Option<Said>,
}

fn to_network(kind: Kind, port: u16, said: Option<Said>) -> Output {
    Output { towards: Towards::Network, kind, port, said }
}

fn to_tcp(kind: Kind, port: u16, said: Option<Said>) -> Output {
    Output { towards: Towards::Local, kind, port, said }
}

#[derive(Debug, Clone, Copy)]
enum Stage {
    Asking {
        repeated: bool,
    },
    Reconnecting {
        port: u16,
        interval: Duration,
        repeats: u8,
        due: Instant,
    },
    /// Since when, how often repeated, and the ISN of the SYN-ACK that was refused.
    Plain {
        since: Instant,
        repeats: u8,
        refused: Option<u32>,
    },
    /// The connection is at this port.
    Settled {
        port: u16,
        irs: u32,
    },
}

/// The rules.
#[derive(Debug)]
struct Model {
    now: Instant,
    /// When the latest SYN went to X with R.
    asked: Instant,
    visited: Vec<u16>,
    stage: Stage,
}

impl Model {
    fn new(now: Instant) -> Model {
        Model { now, asked: now, visited: Vec::new(), stage: Stage::Asking { repeated: false } }
    }

    /// Where the latest SYN went.
    fn latest(&self) -> u16 {
        match self.stage {
            Stage::Asking { .. } | Stage::Plain { .. } => X,
            Stage::Reconnecting { port, .. } | Stage::Settled { port, .. } => port,
        }
    }

    /// `None` where the input would be no connect's any more.
    fn step(&mut self, input: Input) -> Option<Vec<Output>> {
        match input {
            Input::Repeat => self.repeat(),
            Input::Local => Some(match self.stage {
                Stage::Asking { .. } | Stage::Plain { .. } => vec![to_network(Kind::Ack, X, None)],
                Stage::Reconnecting { .. } => vec![],
                Stage::Settled { port, .. } => vec![to_network(Kind::Ack, port, None)],
            }),
            Input::Remote { .. } => Some(self.remote(input)),
            Input::Wait(time) => Some(self.wait(time)),
        }
    }

    fn service_syn(&self, port: u16) -> Output {
        let hops = self.visited.len() as u8;
        to_network(Kind::Syn, port, Some(Said { redirect: true, confirm: false, port: Some(X), hops }))
    }

    fn repeat(&mut self) -> Option<Vec<Output>> {
        let plain = to_network(Kind::Syn, X, None);
        Some(vec![match self.stage {
            // C6: the first repeat keeps R, the second goes without.
            Stage::Asking { repeated: false } => {
                self.asked = self.now;
                self.stage = Stage::Asking { repeated: true };
                let said = Said { redirect: true, confirm: true, port: None, hops: 0 };
                to_network(Kind::Syn, X, Some(said))
            }
            Stage::Asking { repeated: true } => {
                self.stage = Stage::Plain { since: self.now, repeats: 0, refused: None };
                plain
            }
            Stage::Plain { since, repeats, refused } => {
                self.stage = Stage::Plain { since, repeats: repeats + 1, refused };
                plain
            }
            Stage::Reconnecting { port, .. } => self.service_syn(port),
            Stage::Settled { .. } => return None,
        }])
    }

    /// C5: to the service port.
    fn reconnect(&mut self, port: u16) -> Output {
        let round_trip = self.now.since(self.asked);
        let interval = (round_trip * 3).max(Duration::from_millis(250));
        self.visited.push(port);
        self.stage = Stage::Reconnecting { port, interval, repeats: 0, due: self.now + interval };
        self.service_syn(port)
    }

    /// C2, C6.
    fn fall_back(&mut self, refused: Option<u32>) -> Output {
        self.stage = Stage::Plain { since: self.now, repeats: 0, refused };
        to_network(Kind::Syn, X, None)
    }

    /// C3: whether a redirect may be obeyed.
    fn may_go(&self, port: u16) -> bool {
        port >= 1024 && port != X && self.visited.len() < 3 && !self.visited.contains(&port)
    }

    fn remote(&mut self, input: Input) -> Vec<Output> {
        let Input::Remote { kind, from, said, .. } = input else { unreachable!() };
        match self.stage {
            Stage::Reconnecting { port, .. } if from == port => self.of_service(input, port),
            Stage::Settled { port, irs } if from == port => of_settled(input, irs),
            // C4, C7, C9.
            Stage::Reconnecting { .. } | Stage::Settled { .. } if from == X => vec![],
            Stage::Asking { .. } | Stage::Plain { .. } if from == X => match kind {
                Kind::SynAck => self.answer(input),
                _ => vec![to_tcp(kind, X, said)],
            },
            // C12: what belongs to no flow passes, but for the redirect of an earlier run.
            _ if kind == Kind::SynAck && said.is_some_and(|said| said.confirm && said.port.is_some()) => {
                vec![]
            }
            _ => vec![to_tcp(kind, from, said)],
        }
    }

    fn answer(&mut self, input: Input) -> Vec<Output> {
        let Input::Remote { irs, fits, echoes, said, .. } = input else { unreachable!() };
        if !fits || !echoes {
            return vec![];
        }
        if let Stage::Plain { since, repeats, refused } = self.stage {
            let waited = self.now.since(since) > Duration::from_millis(900);
            let late = refused == Some(irs) && waited && repeats < 2;
            if late || said.is_some_and(|said| said.confirm) {
                return vec![];
            }
            self.stage = Stage::Settled { port: X, irs };
            return vec![to_tcp(Kind::SynAck, X, said)];
        }
        match said {
            Some(Said { redirect: false, confirm: true, port: None, .. }) => {
                self.stage = Stage::Settled { port: X, irs };
                vec![to_tcp(Kind::SynAck, X, None)]
            }
            Some(Said { redirect: false, confirm: true, port: Some(port), .. }) if self.may_go(port) => {
                vec![self.reconnect(port)]
            }
            _ => vec![self.fall_back(Some(irs))],
        }
    }

    fn of_service(&mut self, input: Input, at: u16) -> Vec<Output> {
        let Input::Remote { kind, irs, fits, echoes, said, .. } = input else { unreachable!() };
        let reset = to_network(Kind::Reset, at, None);
        match (kind, fits) {
            (Kind::Reset, true) => vec![self.fall_back(None)],
            (Kind::Reset, false) | (Kind::Syn, _) => vec![],
            (Kind::Ack, _) => vec![reset, self.service_syn(at)],
            (Kind::SynAck, fits) if !fits || !echoes => vec![reset],
            (Kind::SynAck, _) => match said {
                Some(Said { redirect: false, confirm: true, port: None, .. }) => {
                    self.stage = Stage::Settled { port: at, irs };
                    vec![to_tcp(Kind::SynAck, X, None)]
                }
                Some(Said { redirect: false, confirm: true, port: Some(next), .. }) if self.may_go(next) => {
                    vec![reset, self.reconnect(next)]
                }
                _ => vec![reset, self.fall_back(None)],
            },
        }
    }

    fn wait(&mut self, time: Duration) -> Vec<Output> {
        let end = self.now + time;
        let mut sent = Vec::new();
        while let Stage::Reconnecting { port, interval, repeats, due } = self.stage
            && due <= end
        {
            self.now = due;
            if repeats == 2 {
                sent.push(self.fall_back(None));
            } else {
                self.stage =
                    Stage::Reconnecting { port, interval, repeats: repeats + 1, due: due + interval };
                sent.push(self.service_syn(port));
            }
        }
        self.now = end;
        sent
    }
}

/// A segment from where the connection is.
fn of_settled(input: Input, known: u32) -> Vec<Output> {
    let Input::Remote { kind, irs, said, .. } = input else { unreachable!() };
    // Of another connection: only its own SYN-ACK is ours.
    if kind == Kind::SynAck && irs != known { vec![] } else { vec![to_tcp(kind, X, said)] }
}

fn seen(towards: Towards, packet: &Packet) -> Output {
    let tcp = packet.tcp().expect("TCP");
    let flags = tcp.flags();
    let kind = match (flags.contains(TcpFlags::SYN), flags.contains(TcpFlags::ACK)) {
        _ if flags.contains(TcpFlags::RST) => Kind::Reset,
        (true, true) => Kind::SynAck,
        (true, false) => Kind::Syn,
        (false, _) => Kind::Ack,
    };
    let said = option_of(packet);
    let said = said.map(|RedirectOption { redirect, confirm, port, hops, .. }| Said {
        redirect,
        confirm,
        port,
        hops,
    });
    let (source, destination) = ports(packet);
    Output { towards, kind, port: if towards == Towards::Network { destination } else { source }, said }
}

impl World {
    fn step(&mut self, input: Input) -> Vec<Output> {
        let mut all = Vec::new();
        match input {
            Input::Repeat => {
                let syn = self.syn(ISS, TSVAL);
                all.extend(self.local(syn).map(|packet| seen(Towards::Network, &packet)));
            }
            Input::Local => {
                let ack = self.local_segment(TcpFlags::ACK, ISS + 1, b"data");
                all.extend(self.local(ack).map(|packet| seen(Towards::Network, &packet)));
            }
            Input::Remote { .. } => {
                let packet = self.packet(input);
                all.extend(self.remote(packet).map(|packet| seen(Towards::Local, &packet)));
            }
            Input::Wait(time) => {
                let end = self.now + time;
                while let Some(at) = self.client.poll_timeout().filter(|at| *at <= end) {
                    self.now = at;
                    all.extend(self.sent().iter().map(|sent| seen(sent.towards, &sent.packet)));
                }
                self.now = end;
            }
        }
        all.extend(self.sent().iter().map(|sent| seen(sent.towards, &sent.packet)));
        all
    }

    fn packet(&self, input: Input) -> Packet {
        let Input::Remote { kind, from, irs, fits, echoes, said } = input else { unreachable!() };
        let flags = match kind {
            Kind::Syn => TcpFlags::SYN,
            Kind::SynAck => TcpFlags::SYN | TcpFlags::ACK,
            Kind::Reset => TcpFlags::RST | TcpFlags::ACK,
            Kind::Ack => TcpFlags::ACK,
        };
        let options = timestamps(5, if echoes { TSVAL } else { TSVAL - 7 });
        let ack = if fits { ISS + 1 } else { ISS + 77 };
        let bare = Segment::bare(self.at(from), self.local, flags);
        let mut packet = Segment { seq: SeqNumber(irs), ack, options: &options, ..bare }.emit();
        if let Some(Said { redirect, confirm, port, hops }) = said {
            let option = RedirectOption { redirect, confirm, port, hops, ..Default::default() };
            packet.insert_redirect(crate::wire::DEFAULT_EXID, &option, 1500).unwrap();
        }
        packet
    }
}

fn any_input() -> impl Strategy<Value = Input> {
    // Most options are such as a server of ours would send.
    let named = proptest::option::weighted(0.7, proptest::sample::select(&PORTS[..]));
    let said = (prop::bool::weighted(0.1), prop::bool::weighted(0.9), named, 0u8..4);
    let said = said.prop_map(|(redirect, confirm, port, hops)| Said { redirect, confirm, port, hops });
    let kind = prop_oneof![
        6 => Just(Kind::SynAck),
        1 => Just(Kind::Reset),
        1 => Just(Kind::Ack),
    ];
    let from = prop_oneof![6 => Just(LATEST), 1 => Just(X), 1 => proptest::sample::select(&PORTS[..4])];
    let remote = (
        kind,
        from,
        0u32..3,
        prop::bool::weighted(0.9),
        prop::bool::weighted(0.9),
        proptest::option::weighted(0.7, said),
    );
    prop_oneof![
        2 => Just(Input::Repeat),
        1 => Just(Input::Local),
        10 => remote.prop_map(|(kind, from, irs, fits, echoes, said)| {
            // An option belongs to handshakes here: what asks later is another model's.
            let said = said.filter(|_| kind == Kind::SynAck);
            Input::Remote { kind, from, irs, fits, echoes, said }
        }),
        3 => (0u64..700).prop_map(|millis| Input::Wait(Duration::from_millis(millis))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn a_connect_goes_as_the_rules_say(v4: bool, inputs in proptest::collection::vec(any_input(), 1..40)) {
        let mut world = if v4 { world(Continuation::Reconnect) } else { world_v6(Continuation::Reconnect) };
        world.open();
        let mut model = Model::new(world.now);
        for (step, mut input) in inputs.into_iter().enumerate() {
            if let Input::Remote { from, .. } = &mut input && *from == LATEST {
                *from = model.latest();
            }
            let Some(expected) = model.step(input) else { continue };
            prop_assert_eq!(world.step(input), expected, "step {}: {:?}, then {:?}", step, input, model);
        }
    }
}
