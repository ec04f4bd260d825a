//! Hostile packets by the ten thousand, with forged addresses, from the router in the middle: what they must not do to
//! those who mean well, to memory, and to whom they seem to come from.

mod common;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::ctl::ctl;
use common::service::{self, Service};
use common::{Family, Net, OTHER, OTHER_SERVICE, Options, VIP4};
use nix::sys::socket::sockopt::SndBufForce;
use shunt_lab::{Child, Host};
use shunt_stack::wire::{DEFAULT_EXID, Packet, RedirectOption, Segment, SeqNumber, TcpFlags, icmp_message};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// Packets of one attack, and the longest it lasts.
const PACKETS: usize = 20_000;
const LONGEST: Duration = Duration::from_secs(20);
/// Connections of those who mean well during an attack, at least; of a hundred, one may fail.
const CONNECTIONS: usize = 100;
/// What a daemon's memory (`VmRSS`) may grow by in all attacks together. Tables are bounded by configuration (by default
/// 4,096 fragments, 65,536 half-open connections, as many flows) and are not full here.
const GROWTH_KIB: u64 = 16 << 10;
/// Whom packets seem to come from.
const STRANGERS4: [u8; 2] = [198, 18];
const STRANGERS: &str = "ip daddr 198.18.0.0/15";
const STRANGERS6: &str = "ip6 daddr fd00:bad::/32";

/// Numbers without a pattern (splitmix64), and the own ports of connections that last.
struct Dice {
    state: u64,
    open: [SocketAddr; 2],
}

impl Dice {
    fn roll(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = (self.state ^ (self.state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn port(&mut self) -> u16 {
        1024 + (self.roll() % 60_000) as u16
    }

    fn stranger(&mut self, family: Family) -> SocketAddr {
        let draw = self.roll().to_be_bytes();
        let address = match family {
            Family::V4 => Ipv4Addr::new(STRANGERS4[0], STRANGERS4[1], draw[0], draw[1]).into(),
            Family::V6 => {
                format!("fd00:bad::{:x}", u16::from_be_bytes([draw[0], draw[1]])).parse().expect("one")
            }
        };
        SocketAddr::new(address, self.port())
    }
}

fn vip(family: Family, port: u16) -> SocketAddr {
    SocketAddr::new(family.vip().parse().expect("an address"), port)
}

fn either(dice: &mut Dice) -> Family {
    Family::BOTH[(dice.roll() & 1) as usize]
}

/// Sends whole packets, whoever they seem to come from.
struct Attacker {
    sockets: [Socket; 2],
}

impl Attacker {
    fn new(host: &Host) -> Attacker {
        let open = |domain| {
            let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(255))).expect("root may");
            nix::sys::socket::setsockopt(&socket, SndBufForce, &(4 << 20)).expect("root may");
            socket
        };
        let sockets = host.enter(|| [open(Domain::IPV4), open(Domain::IPV6)]).expect("a namespace");
        Attacker { sockets }
    }

    /// What the kernel does not take was none for it, or has no room: not every packet need arrive.
    fn send(&self, packet: &[u8]) -> bool {
        let (domain, to): (usize, IpAddr) = if packet[0] >> 4 == 4 {
            (0, <[u8; 4]>::try_from(&packet[16..20]).expect("four").into())
        } else {
            (1, <[u8; 16]>::try_from(&packet[24..40]).expect("sixteen").into())
        };
        self.sockets[domain].send_to(packet, &SockAddr::from(SocketAddr::new(to, 0))).is_ok()
    }
}

/// What is sent, and by which counters it must be seen to have been noticed: of which daemon, and how often at least.
struct Attack {
    name: &'static str,
    make: fn(&mut Dice) -> Packets,
    noticed: &'static [(Daemon, &'static str, u64)],
}

/// One or more packets that belong together.
type Packets = Vec<Vec<u8>>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Daemon {
    Balancer,
    Agents,
    Shim,
}

fn segment(source: SocketAddr, destination: SocketAddr, flags: TcpFlags, options: &[u8]) -> Packet {
    let bare = Segment::bare(source, destination, flags);
    Segment { seq: SeqNumber(u32::from(source.port()) << 9), window: 1000, options, ..bare }.emit()
}

fn with_option(mut packet: Packet, option: RedirectOption) -> Packets {
    packet.insert_redirect(DEFAULT_EXID, &option, 1500).expect("room");
    vec![packet.bytes().to_vec()]
}

fn asking() -> RedirectOption {
    RedirectOption { redirect: true, confirm: true, ..RedirectOption::default() }
}

/// SYNs with R, plain ones, to redirect ports, service ports and ports that are none.
fn syns(dice: &mut Dice) -> Packets {
    let family = either(dice);
    let port = [OTHER, OTHER, OTHER_SERVICE + 1, dice.port()][(dice.roll() % 4) as usize];
    let syn = segment(dice.stranger(family), vip(family, port), TcpFlags::SYN, &[]);
    if dice.roll().is_multiple_of(2) { with_option(syn, asking()) } else { vec![syn.bytes().to_vec()] }
}

/// Options that lie about their length, come twice or ten times, or fill the header with nothing.
fn option_bombs(dice: &mut Dice) -> Packets {
    let exid = DEFAULT_EXID.to_be_bytes();
    let short = [253, 4, exid[0], exid[1]];
    let option = |length: u8| {
        let mut bytes = [1; 40];
        bytes[..4].copy_from_slice(&[253, length, exid[0], exid[1]]);
        bytes.to_vec()
    };
    let bombs: [Vec<u8>; 8] = [
        vec![1; 40],
        vec![253; 40],
        option(0),
        option(1),
        option(255),
        option(40),
        short.repeat(10),
        [8, 0].repeat(20),
    ];
    let family = either(dice);
    let bomb = &bombs[(dice.roll() % 8) as usize];
    let flags = if dice.roll().is_multiple_of(4) { TcpFlags::ACK } else { TcpFlags::SYN };
    vec![segment(dice.stranger(family), vip(family, OTHER), flags, bomb).bytes().to_vec()]
}

/// A fragment of a TCP segment, IPv4; `offset` in bytes.
fn fragment(source: SocketAddr, identification: u16, offset: u16, more: bool, payload: &[u8]) -> Vec<u8> {
    let IpAddr::V4(source) = source.ip() else { panic!("IPv4") };
    let mut packet = vec![0x45, 0];
    packet.extend((20 + payload.len() as u16).to_be_bytes());
    packet.extend(identification.to_be_bytes());
    packet.extend(((offset / 8) | (u16::from(more) << 13)).to_be_bytes());
    packet.extend([64, 6, 0, 0]);
    packet.extend(source.octets());
    packet.extend(VIP4.parse::<Ipv4Addr>().expect("an address").octets());
    packet.extend(payload);
    packet
}

/// First fragments that end within the TCP header; seconds that lie over their firsts; ends beyond 65,535; lone ones.
fn fragments(dice: &mut Dice) -> Packets {
    let source = dice.stranger(Family::V4);
    let id = dice.roll() as u16;
    let whole = segment(source, vip(Family::V4, OTHER), TcpFlags::SYN, &[]).bytes()[20..].to_vec();
    let first = [whole, vec![0; 20]].concat();
    match dice.roll() % 4 {
        0 => vec![fragment(source, id, 0, true, &first[..8])],
        1 => vec![fragment(source, id, 0, true, &first), fragment(source, id, 8, false, &first[8..32])],
        2 => vec![fragment(source, id, 65_528, false, &[0; 64])],
        _ => vec![fragment(source, id, 1480, false, &[0; 64])],
    }
}

/// IPv6 headers in rows: many of them, headers for routing by type 0, fragments in fragments, and none behind the last.
fn extension_headers(dice: &mut Dice) -> Packets {
    let source = dice.stranger(Family::V6);
    let plain = segment(source, vip(Family::V6, OTHER), TcpFlags::SYN, &[]).bytes().to_vec();
    let (kind, count): (u8, usize) = match dice.roll() % 5 {
        0 => (60, 9),
        1 => (60, 100),
        2 => (43, 1),
        3 => (44, 2),
        _ => (51, 12),
    };
    let mut chain = Vec::new();
    for place in 0..count {
        let next = if place + 1 == count { 6 } else { kind };
        chain.extend(match kind {
            // Pad for six bytes; authentication counts its length in other units.
            60 => [next, 0, 1, 4, 0, 0, 0, 0],
            51 => [next, 0, 0, 0, 0, 0, 0, 1],
            44 => [next, 0, 0, 1, 0, 0, 0, 7],
            _ => [next, 0, 0, 1, 0, 0, 0, 0],
        });
    }
    if dice.roll().is_multiple_of(8) {
        // The last says that another follows, and nothing does.
        let last = chain.len() - 8;
        chain[last] = kind;
        return vec![ipv6(&plain[..40], kind, &chain)];
    }
    vec![ipv6(&plain[..40], kind, &[&chain[..], &plain[40..]].concat())]
}

fn ipv6(header: &[u8], next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = header.to_vec();
    packet[4..6].copy_from_slice(&(payload.len() as u16).to_be_bytes());
    packet[6] = next;
    packet.extend(payload);
    packet
}

/// The client's end of a connection that is open, or another port of its own.
fn client(dice: &mut Dice, family: Family) -> SocketAddr {
    let mut to = dice.open[usize::from(family == Family::V6)];
    if dice.roll().is_multiple_of(2) {
        to.set_port(32_768 + (dice.roll() % 28_000) as u16);
    }
    to
}

/// Resets, SYN-ACKs and data with orders to go elsewhere, to the client from the VIP, by somebody who sees nothing:
/// sequence numbers are guessed, and every other
/// port.
fn blind(dice: &mut Dice) -> Packets {
    let family = either(dice);
    let from = vip(family, [OTHER, OTHER_SERVICE + 1][(dice.roll() & 1) as usize]);
    let to = client(dice, family);
    let numbers = |flags| Segment {
        seq: SeqNumber(0),
        ack: SeqNumber(0),
        window: 1000,
        ..Segment::bare(from, to, flags)
    };
    let (seq, ack) = (SeqNumber(dice.roll() as u32), SeqNumber(dice.roll() as u32));
    let order =
        RedirectOption { redirect: true, confirm: true, port: Some(6666), ..RedirectOption::default() };
    match dice.roll() % 3 {
        0 => vec![Segment { seq, ..numbers(TcpFlags::RST) }.emit().bytes().to_vec()],
        1 => with_option(Segment { seq, ack, ..numbers(TcpFlags::SYN | TcpFlags::ACK) }.emit(), order),
        _ => with_option(Segment { seq, ack, ..numbers(TcpFlags::ACK) }.emit(), order),
    }
}

/// From the VIP to itself: the same port (LAND), or another.
fn from_the_vip(dice: &mut Dice) -> Packets {
    let family = either(dice);
    let own = if dice.roll().is_multiple_of(2) { OTHER } else { dice.port() };
    let syn = segment(vip(family, own), vip(family, OTHER), TcpFlags::SYN, &[]);
    if dice.roll().is_multiple_of(2) { with_option(syn, asking()) } else { vec![syn.bytes().to_vec()] }
}

/// Echo requests, errors about packets that nobody has sent, MTUs of 68, redirects of routers.
fn icmp(dice: &mut Dice) -> Packets {
    let family = either(dice);
    let (source, to) = (dice.stranger(family), vip(family, OTHER));
    let quoted = segment(to, source, TcpFlags::ACK, &[]).bytes().to_vec();
    let short = &quoted[..quoted.len() - 12];
    let (echo, unreachable, too_big, redirect) = match family {
        Family::V4 => ([8, 0], [3, 1], [3, 4], [5, 1]),
        Family::V6 => ([128, 0], [1, 0], [2, 0], [137, 0]),
    };
    let message = |kind: [u8; 2], rest: [u8; 4], body: &[u8]| [&kind[..], &[0, 0], &rest, body].concat();
    let message = match dice.roll() % 5 {
        0 => message(echo, [0, 7, 0, 1], &[0; 56]),
        1 => message(unreachable, [0; 4], &quoted),
        2 => message(too_big, [0, 0, 0, 68], short),
        3 => message(too_big, [0, 0, 0, 68], &quoted[..8]),
        _ => message(redirect, [10, 2, 0, 254], short),
    };
    vec![icmp_message(source.ip(), to.ip(), &message).bytes().to_vec()]
}

fn dropped(reason: &str) -> String {
    format!("shunt_balancer_dropped_packets_total{{reason=\"{reason}\"}}")
}

/// Counters of a daemon by name, those of several daemons added up.
fn counters(hosts: &[&Host]) -> BTreeMap<String, u64> {
    let mut sum = BTreeMap::new();
    for host in hosts {
        let said = ctl(host, &["counters", "--prometheus"]);
        assert_eq!(said.code, 0, "{said:?}");
        for line in said.out.lines().filter(|line| !line.starts_with('#')) {
            let Some((name, value)) = line.rsplit_once(' ') else { continue };
            *sum.entry(name.to_owned()).or_default() += value.parse::<u64>().unwrap_or_default();
        }
    }
    sum
}

/// Resident memory, in KiB.
fn memory(daemon: &Child) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.id())).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

struct Siege {
    net: Net,
    attacker: Attacker,
    _service: Service,
}

impl Siege {
    fn begin() -> Siege {
        let mut net = Net::new(Options { servers: 2, ..Options::default() });
        let service = Service::start(&net, service::echo);
        net.start_shim("auto");
        for server in &net.servers {
            // What kernels repeat by themselves is not answered by us.
            server.host.sysctl("net.ipv4.tcp_synack_retries", "0").expect("a sysctl");
        }
        let rules = format!(
            "table inet siege {{\n counter replies {{ }}\n chain back {{\n \
             type filter hook prerouting priority raw; policy accept;\n \
             iifname \"eth1\" {STRANGERS} counter name replies drop\n \
             iifname \"eth1\" {STRANGERS6} counter name replies drop\n }}\n}}"
        );
        net.middle.nft(&rules).expect("nft is installed");
        let attacker = Attacker::new(&net.middle);
        Siege { net, attacker, _service: service }
    }

    fn replies(&self) -> u64 {
        let mut command = Command::new("nft");
        command.args(["list", "counter", "inet", "siege", "replies"]);
        let output = self.net.middle.run_within(&mut command, Duration::from_secs(10)).expect("nft");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let number = text.split_whitespace().skip_while(|word| *word != "packets").nth(1);
        number.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("no counter: {text}"))
    }

    /// Packets that the balancer was given.
    fn seen(&self) -> u64 {
        self.net.balancer.counters("shunt-lb0").expect("its device").tx_packets
    }

    fn daemons(&self) -> Vec<&Child> {
        let agents = self.net.servers.iter().filter_map(|server| server.agent.as_ref());
        self.net.balancer_process.iter().chain(&self.net.shim).chain(agents).collect()
    }

    fn counters(&self, daemon: Daemon) -> BTreeMap<String, u64> {
        let agents: Vec<&Host> = self.net.servers.iter().map(|server| &server.host).collect();
        match daemon {
            Daemon::Balancer => counters(&[&self.net.balancer]),
            Daemon::Agents => counters(&agents),
            Daemon::Shim => counters(&[&self.net.client]),
        }
    }

    /// Sends the attack's packets, evenly over some seconds; says how many.
    fn attack(&self, attack: &Attack, open: [SocketAddr; 2], over: &AtomicBool) -> usize {
        let mut dice = Dice { state: attack.name.len() as u64, open };
        let (mut sent, begun) = (0, Instant::now());
        while sent < PACKETS && begun.elapsed() < LONGEST {
            for packet in (attack.make)(&mut dice) {
                sent += usize::from(self.attacker.send(&packet));
            }
            if sent % 64 == 0 {
                thread::sleep(Duration::from_millis(5));
            }
        }
        over.store(true, Ordering::Relaxed);
        sent
    }

    /// Connects until the attack is over, and some more if that was quick; says how often, and what failed.
    fn connect(&self, over: &AtomicBool) -> (usize, Vec<String>) {
        let count = AtomicUsize::new(0);
        let failed = self.net.in_both(|family| {
            let mut failed = Vec::new();
            while !over.load(Ordering::Relaxed) || count.load(Ordering::Relaxed) < CONNECTIONS {
                count.fetch_add(1, Ordering::Relaxed);
                // Not a flood of their own.
                thread::sleep(Duration::from_millis(10));
                match service::exchange(family, 1000) {
                    Ok(done) if done.redirected() => {}
                    Ok(done) => failed.push(format!("{family:?}: not redirected: {done:?}")),
                    Err(error) => failed.push(format!("{family:?}: {error}")),
                }
            }
            failed
        });
        (count.into_inner(), failed.concat())
    }

    fn withstand(&self, attack: &Attack) {
        let name = attack.name;
        let watched = [Daemon::Balancer, Daemon::Agents, Daemon::Shim];
        let before = watched.map(|daemon| self.counters(daemon));
        let (replies, seen, over) = (self.replies(), self.seen(), AtomicBool::new(false));
        // Open since before the attack: bytes go there and back when it is over.
        let mut lasting = self.net.in_both(|family| {
            let mut stream = service::connect(family).expect("a connection");
            std::io::Write::write_all(&mut stream, b"?").expect("a byte");
            service::read_card(&mut stream).expect("an answer");
            stream
        });
        let open = [0, 1].map(|at: usize| lasting[at].local_addr().expect("an address"));
        let (sent, (connections, failed)) = thread::scope(|scope| {
            let attacking = scope.spawn(|| self.attack(attack, open, &over));
            let connected = self.connect(&over);
            (attacking.join().expect("no panic"), connected)
        });
        for stream in &mut lasting {
            service::transfer(stream, 10_000).unwrap_or_else(|error| panic!("{name}: broken: {error}"));
        }
        let (replies, seen) = (self.replies() - replies, self.seen() - seen);
        println!(
            "{name}: {sent} packets, {replies} replies, {seen} at the balancer, {} of {connections} failed",
            failed.len()
        );
        assert!(sent >= PACKETS / 4, "{name}: only {sent} packets were sent");
        assert!(failed.len() * 100 <= connections, "{name}: {failed:?}\n{}", self.net.logs());
        assert!(replies <= sent as u64, "{name}: {replies} replies to {sent} packets");
        assert!(
            seen <= 2 * sent as u64 + 60 * connections as u64,
            "{name}: packets go round: {seen} of {sent}"
        );
        for (daemon, counter, least) in attack.noticed {
            let at = watched.iter().position(|known| known == daemon).expect("one of them");
            let counter =
                if counter.starts_with("shunt_") { (*counter).to_owned() } else { dropped(counter) };
            let now = self.counters(*daemon);
            let of = |counters: &BTreeMap<String, u64>| counters.get(&counter).copied();
            let grown = of(&now).unwrap_or_else(|| panic!("{daemon:?} has no {counter}: {now:?}"))
                - of(&before[at]).unwrap_or_default();
            assert!(grown >= *least, "{name}: {daemon:?} {counter} has grown by {grown}, not {least}");
        }
    }
}

const ATTACKS: &[Attack] = &[
    Attack {
        name: "SYN flood",
        make: syns,
        noticed: &[
            (Daemon::Balancer, "unknown_port", 1000),
            (Daemon::Agents, "shunt_server_server_answered_total", 1000),
        ],
    },
    Attack {
        name: "option bombs",
        make: option_bombs,
        noticed: &[
            (Daemon::Balancer, "shunt_balancer_malformed_options_total", 1000),
            (Daemon::Agents, "shunt_server_server_bad_options_total", 1000),
        ],
    },
    Attack {
        name: "tiny and overlapping fragments",
        make: fragments,
        noticed: &[
            (Daemon::Balancer, "tiny_fragment", 1000),
            (Daemon::Balancer, "overlapping_fragment", 1000),
            (Daemon::Balancer, "later_fragment", 1000),
            (Daemon::Balancer, "fragment_range", 1000),
        ],
    },
    Attack {
        name: "extension headers",
        make: extension_headers,
        noticed: &[(Daemon::Balancer, "unreadable", 1000)],
    },
    Attack {
        name: "blind resets and redirects",
        make: blind,
        noticed: &[
            (Daemon::Shim, "shunt_client_machine_stray_syn_acks_total", 1000),
            (Daemon::Shim, "shunt_client_machine_dropped_resets_total", 500),
        ],
    },
    Attack {
        name: "from the VIP to itself",
        make: from_the_vip,
        noticed: &[
            (Daemon::Balancer, "unknown_port", 1000),
            (Daemon::Agents, "shunt_server_server_answered_total", 1000),
        ],
    },
    Attack {
        name: "ICMP flood",
        make: icmp,
        noticed: &[(Daemon::Balancer, "icmp", 1000), (Daemon::Balancer, "icmp_quote", 1000)],
    },
];

#[test]
fn hostile_packets_cost_others_nothing_and_no_memory_and_are_answered_once_at_most() {
    let siege = Siege::begin();
    // Tables, buffers and the allocator's heaps get their size by use.
    siege.connect(&AtomicBool::new(true));
    let before: Vec<u64> = siege.daemons().into_iter().map(memory).collect();
    for attack in ATTACKS {
        siege.withstand(attack);
        let now: Vec<u64> = siege.daemons().into_iter().map(memory).collect();
        println!("  memory of balancer, shim and agents in KiB: {before:?} -> {now:?}");
        for (before, now) in before.iter().zip(&now) {
            assert!(now.saturating_sub(*before) <= GROWTH_KIB, "{}: {before} KiB became {now}", attack.name);
        }
    }
}
