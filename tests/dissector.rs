//! The Wireshark dissector (`captures/redirect.lua`) against the packets of this project: what tshark reads is what was
//! written.

mod common;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Family, Net, Options, WEB};
use pcap_file::DataLink;
use pcap_file::pcap::{PcapHeader, PcapPacket, PcapWriter};
use shunt_captures::describe::message;
use shunt_captures::{Frame, Reader, golden};
use shunt_stack::wire::{DEFAULT_EXID, Packet, RedirectOption, Segment, TcpFlags};

const SYN: TcpFlags = TcpFlags::SYN;
const ACK: TcpFlags = TcpFlags::ACK;

/// What tshark, with our dissector, says of the frames that a filter lets through; all values of a field.
fn tshark(file: &Path, filter: &str, fields: &[&str]) -> Vec<Vec<String>> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("captures/redirect.lua");
    let script = format!("lua_script:{}", script.display());
    common::tshark::tshark(
        file,
        &["-X", &script, "-Y", filter, "-E", "occurrence=a", "-E", "aggregator=;"],
        fields,
    )
}

fn write(file: &Path, packets: &[Packet]) {
    let header = PcapHeader { datalink: DataLink::RAW, ..PcapHeader::default() };
    let out = std::fs::File::create(file).expect("a file can be made");
    let mut writer = PcapWriter::with_header(out, header).expect("a header can be written");
    for (number, packet) in (0u64..).zip(packets) {
        let time = std::time::Duration::from_millis(number);
        let length = u32::try_from(packet.len()).expect("it is short");
        let packet =
            PcapPacket::new(time, length, packet.bytes()).expect("its time and length can be written");
        writer.write_packet(&packet).expect("a packet can be written");
    }
}

/// A client's address and port, and the VIP's.
fn ends(family: Family, client: u16, vip: u16) -> (SocketAddr, SocketAddr) {
    let (from, to) = match family {
        Family::V4 => ("10.1.0.2", "203.0.113.10"),
        Family::V6 => ("2001:db8:1::2", "2001:db8::10"),
    };
    (
        SocketAddr::new(from.parse().expect("an address"), client),
        SocketAddr::new(to.parse().expect("an address"), vip),
    )
}

fn option(text: &str) -> RedirectOption {
    let mut option = RedirectOption::default();
    for word in text.split_whitespace() {
        match word {
            "R" => option.redirect = true,
            "C" => option.confirm = true,
            "O" => option.observed = Some(0xb7f6),
            "T" => option.token = Some([0x41, 2, 3, 4, 5, 6, 7, 8]),
            "A4" => option.address = Some([192, 0, 2, 7].into()),
            "A6" => option.address = Some("2001:db8::7".parse().expect("an address")),
            port => option.port = port.strip_prefix("P=").and_then(|port| port.parse().ok()),
        }
    }
    option
}

/// Whether from the client, flags, what the option says, and what tshark is to call it (PROTOCOL.md §2).
const MESSAGES: [(bool, TcpFlags, &str, &str); 14] = [
    (true, SYN, "R", "opening SYN, will hand over"),
    (true, SYN, "R C", "opening SYN, will reconnect"),
    (false, TcpFlags(0x12), "C P=41001 O", "redirecting SYN-ACK"),
    (false, TcpFlags(0x12), "C P=41001 O T", "redirecting SYN-ACK"),
    (false, TcpFlags(0x12), "C", "confirming SYN-ACK"),
    (true, ACK, "R C P=80", "handover"),
    (true, SYN, "R P=80 T", "reconnecting SYN"),
    (false, ACK, "R P=41002", "redirection of an established connection"),
    (false, ACK, "R P=41002 A4", "redirection of an established connection"),
    (false, ACK, "R P=41002 A6", "redirection of an established connection"),
    (true, TcpFlags(0x11), "C P=41002", "close of the old connection"),
    (true, TcpFlags(0x04), "C P=41002", "close of the old connection"),
    (true, SYN, "R C P=41001", "opening SYN of a moved connection"),
    (false, ACK, "C P=50001", "confirmation of a client's new port"),
];

#[test]
fn n6_every_message_is_named_and_read_as_it_was_written() {
    let dir = tempfile::tempdir().expect("a folder");
    for family in Family::BOTH {
        let file = dir.path().join("messages.pcap");
        let packets: Vec<Packet> = MESSAGES
            .iter()
            .map(|(up, flags, text, _)| {
                let (client, vip) = ends(family, 50_000, 80);
                let (from, to) = if *up { (client, vip) } else { (vip, client) };
                let mut packet = Segment::bare(from, to, *flags).emit();
                packet.insert_redirect(DEFAULT_EXID, &option(text), 1500).expect("it fits");
                packet
            })
            .collect();
        write(&file, &packets);
        let bits = [
            "redirect.redirect",
            "redirect.confirm",
            "redirect.has_port",
            "redirect.port",
            "redirect.observed",
        ];
        let more = [
            "redirect.token",
            "redirect.address",
            "redirect.address6",
            "redirect.message",
            "_ws.expert.message",
        ];
        let seen = tshark(&file, "redirect", &[&bits[..], &more].concat());
        assert_eq!(seen.len(), MESSAGES.len(), "{family:?}");
        for ((_, _, text, message), seen) in MESSAGES.iter().zip(seen) {
            let option = option(text);
            let bit = |bit: bool| u8::from(bit).to_string();
            let or_empty = |text: Option<String>| text.unwrap_or_default();
            let address = |v6| {
                or_empty(option.address.filter(|address| address.is_ipv6() == v6).map(|a| a.to_string()))
            };
            let expected = [
                bit(option.redirect),
                bit(option.confirm),
                bit(option.port.is_some()),
                option.port.unwrap_or(0).to_string(),
                or_empty(option.observed.map(|digest| format!("{digest:#06x}"))),
                or_empty(option.token.map(|token| format!("{:016x}", u64::from_be_bytes(token)))),
                address(false),
                address(true),
                (*message).to_owned(),
            ];
            assert_eq!(seen[..9], expected, "{family:?} {text}");
            assert!(!seen[9].contains("W1"), "{family:?} {text}: {}", seen[9]);
        }
    }
}

#[test]
fn n6_what_receivers_ignore_is_pointed_at() {
    let dir = tempfile::tempdir().expect("a folder");
    let (client, vip) = ends(Family::V4, 50_000, 80);
    let syn = |bytes: &[u8]| {
        let mut options = bytes.to_vec();
        options.resize(options.len().next_multiple_of(4), 1);
        Segment { options: &options, ..Segment::bare(client, vip, SYN) }.emit()
    };
    let cases: [(Packet, &str); 8] = [
        (syn(&[253, 7, 0x52, 0x44, 1, 0, 0]), "redirect.length_wrong"),
        (syn(&[253, 10, 0x52, 0x44, 1, 0, 0, 0, 0, 0]), "redirect.length_wrong"),
        (syn(&[253, 8, 0x52, 0x44, 0x09, 0, 0, 0]), "redirect.length_wrong"),
        (syn(&[253, 8, 0x52, 0x44, 0x41, 0, 0, 0]), "redirect.version_unknown"),
        (syn(&[253, 8, 0x52, 0x44, 0x21, 0, 0, 0]), "redirect.bits_unknown"),
        (syn(&[253, 8, 0x52, 0x44, 0x01, 0x80, 0, 0]), "redirect.bits_unknown"),
        (syn(&[253, 8, 0x52, 0x44, 0x05, 0, 0, 0]), "redirect.port_missing"),
        (syn(&[[253, 8, 0x52, 0x44, 1, 0, 0, 0]; 2].concat()), "redirect.copy"),
    ];
    let file = dir.path().join("wrong.pcap");
    let packets: Vec<Packet> = cases.iter().map(|(packet, _)| packet.clone()).collect();
    write(&file, &packets);
    for (number, (packet, problem)) in cases.iter().enumerate() {
        // What our own parser refuses the dissector refuses, for a reason of its own name.
        let read = packet.tcp().expect("TCP").redirect(DEFAULT_EXID);
        assert!(!matches!(read, Ok(Some(_))), "{problem}: {read:?}");
        let seen = tshark(&file, problem, &["frame.number"]);
        let frame = (number + 1).to_string();
        assert!(seen.iter().any(|line| line[0] == frame), "{problem}: {seen:?}");
    }
    // Other experiments stay what they are.
    let other = dir.path().join("other.pcap");
    write(&other, &[syn(&[253, 4, 0xf9, 0x89])]);
    assert!(tshark(&other, "redirect", &["frame.number"]).is_empty());
    assert_eq!(tshark(&other, "tcp.options.tfo.request", &["frame.number"]).len(), 1);
}

/// A moved connection: opened on 80, on 41001, then on 41002 from another port.
#[test]
fn n6_the_parts_of_a_moved_connection_have_one_name() {
    let dir = tempfile::tempdir().expect("a folder");
    for family in Family::BOTH {
        let packet = |up: bool, client: u16, port: u16, flags: TcpFlags, text: &str| {
            let (client, vip) = ends(family, client, port);
            let (from, to) = if up { (client, vip) } else { (vip, client) };
            let mut packet = Segment::bare(from, to, flags).emit();
            if !text.is_empty() {
                packet.insert_redirect(DEFAULT_EXID, &option(text), 1500).expect("it fits");
            }
            packet
        };
        let file = dir.path().join("moved.pcap");
        write(
            &file,
            &[
                packet(true, 50_000, 80, SYN, "R C"),
                packet(false, 50_000, 80, TcpFlags(0x12), "C P=41001 O"),
                packet(true, 50_000, 41_001, SYN, "R P=80"),
                packet(false, 50_000, 41_001, TcpFlags(0x12), "C"),
                packet(true, 50_000, 41_001, ACK, ""),
                packet(false, 50_000, 41_001, ACK, "R P=41002"),
                packet(true, 50_001, 41_002, SYN, "R C P=41001"),
                packet(false, 50_001, 41_002, ACK, ""),
                // Somebody else.
                packet(true, 50_002, 41_002, SYN, "R P=80"),
                packet(true, 50_003, 41_002, ACK, ""),
            ],
        );
        let seen = tshark(&file, "tcp", &["redirect.conversation", "redirect.asked"]);
        let (client, vip) = ends(family, 50_000, 80);
        let name = format!("{client}>{vip}");
        for (number, line) in seen[..8].iter().enumerate() {
            assert_eq!(
                (line[0].as_str(), line[1].as_str()),
                (name.as_str(), "80"),
                "{family:?} {}",
                number + 1
            );
        }
        assert_ne!(seen[8][0], name);
        assert_eq!(seen[9][0], "", "a connection that nobody has redirected has no name");
    }
}

/// All golden captures, one behind the other.
#[test]
fn n6_every_golden_capture_is_read_alike_field_by_field() {
    let dir = tempfile::tempdir().expect("a folder");
    let all = golden::make();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("captures/golden");
    let merged = dir.path().join("all.pcapng");
    let mut merge = Command::new("mergecap");
    merge.args(["-a", "-w"]).arg(&merged).args(all.iter().map(|golden| folder.join(&golden.name)));
    let output = merge.output().expect("this test needs mergecap (Debian: apt install tshark)");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let fields = [
        "frame.number",
        "redirect.length",
        "redirect.redirect",
        "redirect.confirm",
        "redirect.has_port",
        "redirect.port",
        "redirect.hops",
        "redirect.observed",
        "redirect.token",
        "redirect.message",
        "_ws.expert.message",
    ];
    let mut seen = tshark(&merged, "redirect", &fields);
    for line in &mut seen {
        let experts = line.pop().expect("eleven fields");
        assert!(!experts.contains("W1") && !experts.contains("C1") && !experts.contains("echo"), "{experts}");
    }
    let (mut frame, mut expected) = (0, Vec::new());
    for golden in &all {
        let mut reader = Reader::new(golden.bytes.as_slice()).expect("a capture");
        while let Some(record) = reader.next_record() {
            frame += 1;
            let packet = Frame::read(&record.expect("a record")).expect("a packet").packet;
            let Some(tcp) = packet.tcp() else { continue };
            let Some(option) = tcp.redirect(DEFAULT_EXID).expect("no bad option") else { continue };
            let bit = |bit: bool| u8::from(bit).to_string();
            let or_empty = |text: Option<String>| text.unwrap_or_default();
            expected.push(vec![
                frame.to_string(),
                option.len().to_string(),
                bit(option.redirect),
                bit(option.confirm),
                bit(option.port.is_some()),
                option.port.unwrap_or(0).to_string(),
                option.hops.to_string(),
                or_empty(option.observed.map(|digest| format!("{digest:#06x}"))),
                or_empty(option.token.map(|token| format!("{:016x}", u64::from_be_bytes(token)))),
                message(tcp.flags(), &option).to_owned(),
            ]);
        }
    }
    assert!(expected.len() > 500, "{}", expected.len());
    for (seen, expected) in seen.iter().zip(&expected) {
        assert_eq!(seen, expected);
    }
    assert_eq!(seen.len(), expected.len());
}

/// Frames of the client's capture by what our parser reads in them, and by what tshark does.
#[test]
fn n6_a_capture_of_real_connections_is_read_alike() {
    let mut net = Net::new(Options { servers: 2, ..Options::default() });
    net.start_nginx();
    let file: PathBuf = net.file("client.pcapng");
    let config = net.file("client.toml");
    std::fs::write(&config, net.client_config("auto")).expect("a file");
    net.shim =
        Some(net.daemon(&net.client, "client", &config, &["--capture", file.to_str().expect("UTF-8")]));
    let mut ports = std::collections::BTreeSet::new();
    for family in Family::BOTH {
        for _ in 0..10 {
            let fetched = net.curl(family, "/", &[]);
            assert!(fetched.redirected(), "{fetched:?}\n{}", net.logs());
            ports.insert(fetched.port.to_string());
        }
    }
    net.stop_shim();
    let mine = read_capture(&file);
    assert!(mine.len() >= 20 * 3, "{}", mine.len());
    let seen: Vec<(u64, String, String)> =
        tshark(&file, "redirect", &["frame.number", "redirect.port", "redirect.more"])
            .into_iter()
            .map(|line| (line[0].parse().expect("a number"), line[1].clone(), line[2].clone()))
            .collect();
    let expected: Vec<(u64, String, String)> = mine
        .into_iter()
        .map(|(frame, option)| {
            let more = u8::from(option.observed.is_some()) << 3 | option.hops;
            (frame, option.port.unwrap_or(0).to_string(), format!("0x{more:02x}"))
        })
        .collect();
    assert_eq!(seen, expected);
    // Beside packets with which something was decided stands what.
    let comments = tshark(&file, "frame.comment", &["frame.comment"]);
    let redirected = comments.iter().filter(|line| line[0].contains("goes on at 4100")).count();
    assert_eq!(redirected, 20, "{comments:?}");
    // Replay makes of what came in what went out.
    let mut replay = Command::new(env!("CARGO_BIN_EXE_shunt"));
    let output =
        replay.arg("replay").arg(&file).args(["--as", "client"]).output().expect("the program starts");
    let lines = String::from_utf8(output.stdout).expect("UTF-8");
    let count = |word: &str| lines.lines().filter(|line| line.contains(word)).count();
    let reported = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && count("| as replayed") > 100, "{reported}\n{lines}");
    assert_eq!(count("| not replayed"), 0, "{reported}\n{lines}");
    // Every segment on a service port belongs to the connection to the port that the program asked for.
    let asked = tshark(&file, "tcp.port in {41001, 41002}", &["redirect.asked", "tcp.port"]);
    assert!(!asked.is_empty() && asked.iter().all(|line| line[0] == WEB.to_string()), "{asked:?}");
    assert!(ports.iter().all(|port| asked.iter().any(|line| line[1].contains(port.as_str()))));
}

/// The frames with our option, by number.
fn read_capture(file: &Path) -> Vec<(u64, RedirectOption)> {
    use pcap_file::pcapng::{Block, PcapNgReader};
    let mut reader = PcapNgReader::new(std::fs::File::open(file).expect("the capture")).expect("a capture");
    let (mut frame, mut found) = (0, Vec::new());
    while let Some(block) = reader.next_block() {
        let Block::EnhancedPacket(packet) = block.expect("a block").0 else { continue };
        frame += 1;
        let Ok(packet) = Packet::from_slice(&packet.data) else { continue };
        let option = packet.tcp().and_then(|tcp| tcp.redirect(DEFAULT_EXID).ok().flatten());
        found.extend(option.map(|option| (frame, option)));
    }
    found
}
