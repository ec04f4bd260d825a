//! A server behind the VIPs that redirects, written out of `stack::wire` alone: a TUN device on the server's host and
//! just enough TCP to echo what arrives. It repeats nothing.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};

use shunt_lab::{Host, Via};
use shunt_stack::wire::{
    DEFAULT_EXID, Packet, RedirectOption, Segment, SeqNumber, TcpFlags, observed_digest,
};

use super::{VIP4, VIP6, X};

/// The service port.
pub const Y: u16 = 41_001;

/// What the server has seen, by name: `ask-reconnect`, `ask-handover`, `plain`, `syn-y`, `ack-y`, `rst-y`, ...
pub type Seen = Arc<Mutex<Vec<String>>>;

pub struct Scripted {
    pub seen: Seen,
    /// Segments to Y of more bytes than this are answered by "packet too big".
    pub mtu: Arc<AtomicUsize>,
    /// The longest segment to Y that was accepted, IP header included.
    pub longest: Arc<AtomicUsize>,
}

struct Connection {
    iss: SeqNumber,
    snd_nxt: SeqNumber,
    rcv_nxt: SeqNumber,
    finished: bool,
    /// The client's latest `TSval`, if it offered timestamps.
    ts_recent: Option<u32>,
    /// Segments that came early: sequence number, payload, FIN.
    early: Vec<(SeqNumber, Vec<u8>, bool)>,
    /// What the client's window has had no room for, and whether FIN follows it.
    waiting: Vec<u8>,
    fin_waits: bool,
}

impl Connection {
    fn emit(&mut self, local: SocketAddr, client: SocketAddr, payload: &[u8], fin: bool) -> Packet {
        let mut options = [0; 12];
        let options = timestamps(self.ts_recent, &mut options);
        let fin_flag = if fin { TcpFlags::FIN } else { TcpFlags(0) };
        let segment = Segment {
            seq: self.snd_nxt,
            ack: self.rcv_nxt,
            window: u16::MAX,
            options,
            payload,
            ..Segment::bare(local, client, TcpFlags::ACK | fin_flag)
        };
        self.snd_nxt = self.snd_nxt + payload.len() as u32 + u32::from(fin);
        segment.emit()
    }
}

impl Connection {
    fn new(iss: SeqNumber, rcv_nxt: SeqNumber, ts_recent: Option<u32>) -> Connection {
        let (early, waiting) = (Vec::new(), Vec::new());
        let snd_nxt = iss + 1;
        Connection { iss, snd_nxt, rcv_nxt, finished: false, ts_recent, early, waiting, fin_waits: false }
    }

    /// What the client's window has room for: what exceeds it would be dropped, and nothing is repeated.
    fn flush(&mut self, local: SocketAddr, client: SocketAddr, ack: SeqNumber, window: u16) -> Vec<Packet> {
        let mut room = usize::from(window).saturating_sub(self.snd_nxt.0.wrapping_sub(ack.0) as usize);
        let mut packets = Vec::new();
        while !self.waiting.is_empty() || self.fin_waits {
            let length = room.min(self.waiting.len()).min(1400);
            if length == 0 && !self.waiting.is_empty() {
                break;
            }
            room -= length;
            let payload: Vec<u8> = self.waiting.drain(..length).collect();
            let fin = self.fin_waits && self.waiting.is_empty();
            self.fin_waits &= !fin;
            packets.push(self.emit(local, client, &payload, fin));
        }
        packets
    }
}

fn timestamps(echo: Option<u32>, options: &mut [u8; 12]) -> &[u8] {
    let Some(echo) = echo else { return &[] };
    options[..8].copy_from_slice(&[1, 1, 8, 10, 0, 0, 0, 1]);
    options[8..].copy_from_slice(&echo.to_be_bytes());
    options
}

struct Server {
    connections: HashMap<(SocketAddr, SocketAddr), Connection>,
    /// SYNs seen, by ends and ISN: on a busy machine some are repeated, and are told once all the same.
    syns: HashSet<(SocketAddr, SocketAddr, u32)>,
    seen: Seen,
    mtu: Arc<AtomicUsize>,
    longest: Arc<AtomicUsize>,
    echo: bool,
}

impl Scripted {
    /// Starts it on `host`, which forwards the VIPs to it. With `echo`, it sends back what it gets; otherwise it only
    /// takes it.
    pub fn start(host: &Host, echo: bool) -> Self {
        let (ready, is_ready): (_, Receiver<()>) = std::sync::mpsc::channel();
        let scripted = Scripted {
            seen: Seen::default(),
            mtu: Arc::new(AtomicUsize::new(usize::MAX)),
            longest: Arc::default(),
        };
        let mut server = Server {
            connections: HashMap::new(),
            syns: HashSet::new(),
            seen: scripted.seen.clone(),
            mtu: scripted.mtu.clone(),
            longest: scripted.longest.clone(),
            echo,
        };
        let inside = host.clone();
        // Ends with the process: nothing closes the device before.
        std::thread::spawn(move || {
            inside.enter(|| {
                let tun = tun_rs::DeviceBuilder::new().name("vip0").build_sync().expect("a TUN device");
                // What is dropped is lost: this server repeats nothing, and may be kept from reading for a while.
                tun.set_tx_queue_len(10_000).expect("a TUN device takes a queue's length");
                ready.send(()).unwrap();
                let mut buffer = vec![0; 65_536];
                while let Ok(n) = tun.recv(&mut buffer) {
                    let Ok(packet) = Packet::from_slice(&buffer[..n]) else { continue };
                    for answer in server.answer(&packet) {
                        let _ = tun.send(answer.bytes());
                    }
                }
            })
        });
        is_ready.recv().unwrap();
        host.set_up("vip0", true).unwrap();
        host.route(&format!("{VIP4}/32"), Via::device("vip0")).unwrap();
        host.route(&format!("{VIP6}/128"), Via::device("vip0")).unwrap();
        host.sysctl("net.ipv4.ip_forward", "1").unwrap();
        host.sysctl("net.ipv6.conf.all.forwarding", "1").unwrap();
        scripted
    }

    pub fn count(&self, what: &str) -> usize {
        self.seen.lock().unwrap().iter().filter(|seen| *seen == what).count()
    }
}

impl Server {
    fn see(&self, what: &str) {
        self.seen.lock().unwrap().push(what.to_owned());
    }

    fn answer(&mut self, packet: &Packet) -> Vec<Packet> {
        let (Some(tcp), Some(client), Some(local)) =
            (packet.tcp(), packet.source_socket(), packet.destination_socket())
        else {
            return Vec::new();
        };
        assert!(packet.checksum_ok(), "wrong checksum: {packet:?}");
        if tcp.is_syn() {
            return self.on_syn(packet, client, local).into_iter().collect();
        }
        if tcp.flags().contains(TcpFlags::RST) {
            self.see(if local.port() == Y { "rst-y" } else { "rst-x" });
            self.connections.remove(&(client, local));
            return Vec::new();
        }
        if local.port() == Y && packet.len() > self.mtu.load(Ordering::Relaxed) {
            return vec![too_big(packet, self.mtu.load(Ordering::Relaxed))];
        }
        self.on_segment(packet, client, local)
    }

    fn on_syn(&mut self, packet: &Packet, client: SocketAddr, local: SocketAddr) -> Option<Packet> {
        let tcp = packet.tcp()?;
        let option = tcp.redirect(DEFAULT_EXID).unwrap().unwrap_or_default();
        let confirm = RedirectOption { confirm: true, ..RedirectOption::default() };
        let redirect = RedirectOption { port: Some(Y), observed: Some(observed_digest(client)), ..confirm };
        let rcv_nxt = tcp.seq() + 1;
        let ts = tcp.timestamps().map(|(value, _)| value);
        let service = SocketAddr::new(local.ip(), Y);
        let iss = SeqNumber(u32::from(client.port()) << 16 | 0xff00);
        let what = match (local.port(), option.redirect, option.confirm) {
            (X, true, true) => "ask-reconnect",
            (X, true, false) => "ask-handover",
            (Y, ..) => "syn-y",
            _ => "plain",
        };
        if self.syns.insert((client, local, tcp.seq().0)) {
            self.see(what);
        }
        if what == "ask-reconnect" {
            return Some(syn_ack(local, client, iss, rcv_nxt, ts, Some(redirect)));
        }
        if what == "ask-handover" {
            self.open(client, service, iss, rcv_nxt, ts);
            return Some(syn_ack(local, client, iss, rcv_nxt, ts, Some(redirect)));
        }
        if let Some(live) = self.connections.get_mut(&(client, local))
            && live.snd_nxt != live.iss + 1
        {
            return Some(live.emit(local, client, &[], false));
        }
        self.open(client, local, iss, rcv_nxt, ts);
        Some(syn_ack(local, client, iss, rcv_nxt, ts, option.redirect.then_some(confirm)))
    }

    fn open(
        &mut self,
        client: SocketAddr,
        local: SocketAddr,
        iss: SeqNumber,
        rcv_nxt: SeqNumber,
        ts: Option<u32>,
    ) {
        self.connections.insert((client, local), Connection::new(iss, rcv_nxt, ts));
    }

    fn on_segment(&mut self, packet: &Packet, client: SocketAddr, local: SocketAddr) -> Vec<Packet> {
        let Some(tcp) = packet.tcp() else { return Vec::new() };
        let Some(connection) = self.connections.get_mut(&(client, local)) else {
            self.see(if local.port() == Y { "stray-y" } else { "stray-x" });
            let reset = Segment { seq: tcp.ack(), ..Segment::bare(local, client, TcpFlags::RST) };
            return vec![reset.emit()];
        };
        if tcp.sequence_len() == 0 {
            if local.port() == Y {
                self.seen.lock().unwrap().push("ack-y".to_owned());
            }
            return connection.flush(local, client, tcp.ack(), tcp.window());
        }
        if tcp.seq().before(connection.rcv_nxt) {
            return vec![connection.emit(local, client, &[], false)];
        }
        self.longest.fetch_max(packet.len(), Ordering::Relaxed);
        if let Some((value, _)) = tcp.timestamps()
            && connection.ts_recent.is_some()
            && tcp.seq() == connection.rcv_nxt
        {
            connection.ts_recent = Some(value);
        }
        connection.early.push((tcp.seq(), tcp.payload().to_vec(), tcp.flags().contains(TcpFlags::FIN)));
        while let Some(at) = connection.early.iter().position(|(seq, ..)| *seq == connection.rcv_nxt) {
            let (_, payload, fin) = connection.early.swap_remove(at);
            connection.rcv_nxt = connection.rcv_nxt + payload.len() as u32 + u32::from(fin);
            let closing = fin && !connection.finished;
            connection.finished |= closing;
            connection.fin_waits |= closing;
            if self.echo {
                connection.waiting.extend(payload);
            }
        }
        connection.early.retain(|(seq, ..)| connection.rcv_nxt.before(*seq));
        let mut answers = connection.flush(local, client, tcp.ack(), tcp.window());
        if answers.is_empty() {
            answers.push(connection.emit(local, client, &[], false));
        }
        answers
    }
}

fn syn_ack(
    from: SocketAddr,
    to: SocketAddr,
    seq: SeqNumber,
    ack: SeqNumber,
    ts: Option<u32>,
    option: Option<RedirectOption>,
) -> Packet {
    let mut stamps = [0; 12];
    let mut options = vec![2, 4, 0x05, 0x78];
    options.extend(timestamps(ts, &mut stamps));
    let segment = Segment {
        seq,
        ack,
        window: u16::MAX,
        options: &options,
        ..Segment::bare(from, to, TcpFlags::SYN | TcpFlags::ACK)
    };
    let mut packet = segment.emit();
    if let Some(option) = option {
        packet.insert_redirect(DEFAULT_EXID, &option, 1500).unwrap();
    }
    packet
}

/// Fragmentation needed, or packet too big, as a router that is not the VIP would say it.
fn too_big(packet: &Packet, mtu: usize) -> Packet {
    use shunt_stack::wire::checksum::Sum;
    let mtu = u16::try_from(mtu).unwrap().to_be_bytes();
    let (mut bytes, header, quote, pseudo) = match packet.source() {
        std::net::IpAddr::V4(source) => {
            let mut header = vec![0x45, 0, 0, 56, 0, 0, 0, 0, 64, 1, 0, 0, 192, 0, 2, 1];
            header.extend(source.octets());
            let checksum = Sum::new().add(&header).checksum().to_be_bytes();
            header[10..12].copy_from_slice(&checksum);
            // RFC 792: no more than 8 bytes behind the quoted header.
            (header, vec![3, 4, 0, 0, 0, 0, mtu[0], mtu[1]], 28, Sum::new())
        }
        std::net::IpAddr::V6(source) => {
            let router: std::net::Ipv6Addr = "fd00::2".parse().unwrap();
            let quote = packet.len().min(200);
            let length = 8 + quote;
            let mut header = vec![0x60, 0, 0, 0, (length >> 8) as u8, length as u8, 58, 64];
            header.extend(router.octets());
            header.extend(source.octets());
            let pseudo = Sum::new().add_pseudo_header(router.into(), source.into(), 58, length);
            (header, vec![2, 0, 0, 0, 0, 0, mtu[0], mtu[1]], quote, pseudo)
        }
    };
    let mut message = header;
    message.extend(&packet.bytes()[..quote]);
    let checksum = pseudo.add(&message).checksum().to_be_bytes();
    message[2..4].copy_from_slice(&checksum);
    bytes.extend(message);
    Packet::from_slice(&bytes).unwrap()
}
