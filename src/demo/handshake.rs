//! Handshakes as the shim's capture shows them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use pcap_file::pcapng::blocks::enhanced_packet::EnhancedPacketOption;
use pcap_file::pcapng::{Block, PcapNgReader};
use shunt_captures::describe::label;
use shunt_stack::wire::{DEFAULT_EXID, Packet, TcpFlags, TcpView};

use super::error::{Error, Result};
use super::ladder::{Lane, Step};

/// The bits of a packet's flags (pcapng, `epb_flags`) that say its direction.
const DIRECTION: u32 = 3;
const READ_FROM_DEVICE: u32 = 1;
/// More are not drawn.
const LONGEST: usize = 16;

/// A packet of a capture.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    /// Since 1970.
    pub(crate) at: Duration,
    /// Whether the shim has read it from its device, and not written it.
    pub(crate) read: bool,
    pub(crate) packet: Packet,
}

/// How a connect went, from the SYN to the first data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Handshake {
    /// The client's address and port.
    pub(crate) client: SocketAddr,
    /// The port that the connection ended up on: the last that the shim sent something to.
    pub(crate) port: u16,
    /// Whether the shim sent a SYN there.
    pub(crate) reconnected: bool,
    pub(crate) steps: Vec<Step>,
}

/// Reads a capture. What is not a packet, or none that can be understood, is passed over.
///
/// # Errors
/// There is no such file, or it is no pcapng.
pub(crate) fn read(path: &Path) -> Result<Vec<Seen>> {
    let wrong = |source| Error::Capture { path: path.to_owned(), source };
    let file = File::open(path).map_err(Error::file("opening", path))?;
    let mut reader = PcapNgReader::new(BufReader::new(file)).map_err(wrong)?;
    let mut packets = Vec::new();
    while let Some(block) = reader.next_block() {
        let Block::EnhancedPacket(block) = block.map_err(wrong)?.0 else { continue };
        let read = block.options.iter().any(|option| {
            matches!(option, EnhancedPacketOption::Flags(flags) if flags & DIRECTION == READ_FROM_DEVICE)
        });
        if let Ok(packet) = Packet::from_slice(&block.data) {
            packets.push(Seen { at: block.timestamp, read, packet });
        }
    }
    Ok(packets)
}

/// The handshakes with `vip` among the packets, in order.
pub(crate) fn find(packets: &[Seen], vip: IpAddr) -> Vec<Handshake> {
    let mut clients: BTreeMap<SocketAddr, Vec<&Seen>> = BTreeMap::new();
    for seen in packets {
        if let Some(client) = client_of(&seen.packet, vip) {
            clients.entry(client).or_default().push(seen);
        }
    }
    let mut found: Vec<(Duration, Handshake)> = Vec::new();
    for (client, seen) in clients {
        found.extend(seen.first().map(|first| (first.at, handshake(client, &seen, first.at))));
    }
    found.sort_by_key(|(begin, _)| *begin);
    found.into_iter().map(|(_, handshake)| handshake).collect()
}

fn client_of(packet: &Packet, vip: IpAddr) -> Option<SocketAddr> {
    let tcp = packet.tcp()?;
    if packet.destination() == vip {
        Some(SocketAddr::new(packet.source(), tcp.source_port()))
    } else if packet.source() == vip {
        Some(SocketAddr::new(packet.destination(), tcp.destination_port()))
    } else {
        None
    }
}

fn handshake(client: SocketAddr, packets: &[&Seen], begin: Duration) -> Handshake {
    let mut handshake = Handshake { client, port: 0, reconnected: false, steps: Vec::new() };
    let mut first_syn = None;
    for seen in packets {
        let Some(tcp) = seen.packet.tcp() else { continue };
        let from_client = seen.packet.source() == client.ip() && tcp.source_port() == client.port();
        let (from, to) = match (from_client, seen.read) {
            (true, true) => (Lane::Client, Lane::Shim),
            (true, false) => (Lane::Shim, Lane::Network),
            (false, true) => (Lane::Network, Lane::Shim),
            (false, false) => (Lane::Shim, Lane::Client),
        };
        let at = seen.at.saturating_sub(begin);
        handshake.steps.push(Step { at, from, to, text: describe(&tcp) });
        if to == Lane::Network {
            handshake.port = tcp.destination_port();
            if tcp.is_syn() {
                let first = *first_syn.get_or_insert(tcp.destination_port());
                handshake.reconnected |= first != tcp.destination_port();
            }
        }
        let data = !tcp.payload().is_empty();
        if (data && to == Lane::Network) || handshake.steps.len() == LONGEST {
            break;
        }
    }
    handshake
}

/// A segment in a few words: `SYN-ACK 80→40000 [C P=41001 O]`.
fn describe(tcp: &TcpView<'_>) -> String {
    let ports = format!("{}→{}", tcp.source_port(), tcp.destination_port());
    let what = match tcp.payload().len() {
        0 => name(tcp.flags()).to_owned(),
        length => format!("{length} bytes"),
    };
    match tcp.redirect(DEFAULT_EXID) {
        Ok(Some(option)) => format!("{what} {ports} [{}]", label(&option)),
        Ok(None) => format!("{what} {ports}"),
        Err(error) => format!("{what} {ports} [{error}]"),
    }
}

fn name(flags: TcpFlags) -> &'static str {
    let has = |flag| flags.contains(flag);
    if has(TcpFlags::RST) {
        "RST"
    } else if has(TcpFlags::SYN | TcpFlags::ACK) {
        "SYN-ACK"
    } else if has(TcpFlags::SYN) {
        "SYN"
    } else if has(TcpFlags::FIN) {
        "FIN"
    } else {
        "ACK"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shunt_stack::device::{Capture, Direction};
    use shunt_stack::wire::{RedirectOption, Segment, SeqNumber};
    use std::time::{SystemTime, UNIX_EPOCH};

    fn segment(from: &str, to: &str, flags: TcpFlags, option: Option<RedirectOption>, data: &[u8]) -> Packet {
        let mut bytes = [0; 36];
        let used = option.map_or(0, |option| option.emit(DEFAULT_EXID, &mut bytes));
        let (source, destination) = (from.parse().unwrap(), to.parse().unwrap());
        let mut segment =
            Segment { options: &bytes[..used], payload: data, ..Segment::bare(source, destination, flags) };
        segment.seq = SeqNumber(1);
        segment.emit()
    }

    fn reconnect() -> Vec<(Direction, Packet)> {
        let (client, x, y) = ("10.77.1.2:40000", "203.0.113.10:80", "203.0.113.10:41001");
        let asks = RedirectOption { redirect: true, confirm: true, ..Default::default() };
        let names =
            RedirectOption { confirm: true, port: Some(41_001), observed: Some(1), ..Default::default() };
        let goes = RedirectOption { redirect: true, port: Some(80), ..Default::default() };
        let confirms = RedirectOption { confirm: true, ..Default::default() };
        let (syn, ack) = (TcpFlags::SYN, TcpFlags::ACK);
        vec![
            (Direction::In, segment(client, x, syn, None, b"")),
            (Direction::Out, segment(client, x, syn, Some(asks), b"")),
            (Direction::In, segment(x, client, syn | ack, Some(names), b"")),
            (Direction::Out, segment(client, y, syn, Some(goes), b"")),
            (Direction::In, segment(y, client, syn | ack, Some(confirms), b"")),
            (Direction::Out, segment(x, client, syn | ack, None, b"")),
            (Direction::In, segment(client, x, ack, None, b"")),
            (Direction::Out, segment(client, y, ack, None, b"")),
            (Direction::In, segment(client, x, ack, None, b"GET")),
            (Direction::Out, segment(client, y, ack, None, b"GET")),
            (Direction::In, segment(y, client, ack, None, b"later")),
        ]
    }

    #[test]
    fn a_capture_is_read_back_as_the_handshake_it_shows() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("client.pcapng");
        let capture = Capture::create(&path).unwrap();
        for (number, (direction, packet)) in reconnect().into_iter().enumerate() {
            let now: SystemTime = UNIX_EPOCH + Duration::from_millis(1000 + number as u64);
            capture.record(direction, "shunt0", packet.bytes(), now);
        }
        drop(capture);
        let found = find(&read(&path).unwrap(), "203.0.113.10".parse().unwrap());
        assert_eq!(found.len(), 1);
        let handshake = &found[0];
        assert_eq!(handshake.client, "10.77.1.2:40000".parse().unwrap());
        assert_eq!((handshake.port, handshake.reconnected), (41_001, true));
        let lines: Vec<_> =
            handshake.steps.iter().map(|step| (step.from, step.to, step.text.as_str())).collect();
        let expected = [
            (Lane::Client, Lane::Shim, "SYN 40000→80"),
            (Lane::Shim, Lane::Network, "SYN 40000→80 [R C]"),
            (Lane::Network, Lane::Shim, "SYN-ACK 80→40000 [C P=41001 O]"),
            (Lane::Shim, Lane::Network, "SYN 40000→41001 [R P=80]"),
            (Lane::Network, Lane::Shim, "SYN-ACK 41001→40000 [C]"),
            (Lane::Shim, Lane::Client, "SYN-ACK 80→40000"),
            (Lane::Client, Lane::Shim, "ACK 40000→80"),
            (Lane::Shim, Lane::Network, "ACK 40000→41001"),
            (Lane::Client, Lane::Shim, "3 bytes 40000→80"),
            (Lane::Shim, Lane::Network, "3 bytes 40000→41001"),
        ];
        assert_eq!(lines, expected);
        assert_eq!(handshake.steps[1].at, Duration::from_millis(1));
    }

    #[test]
    fn other_traffic_is_not_a_handshake() {
        let packet = segment("10.77.1.2:40000", "10.77.1.1:80", TcpFlags::SYN, None, b"");
        let seen = [Seen { at: Duration::ZERO, read: true, packet }];
        assert_eq!(find(&seen, "203.0.113.10".parse().unwrap()), []);
    }

    #[test]
    fn what_is_no_capture_is_an_error() {
        assert!(matches!(read(Path::new("/nonexistent")), Err(Error::File { .. })));
        assert!(matches!(read(Path::new("/dev/null")), Err(Error::Capture { .. })));
    }
}
