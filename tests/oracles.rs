//! What others read in our packets and in packets of others' making: tshark beside our own parser, scapy's packets through
//! our machines.

mod common;

use std::fs::File;
use std::net::IpAddr;
use std::path::Path;
use std::process::Command;

use serde::Deserialize;
use shunt_captures::{Frame, FrameError, Reader, Record, Replay, Role, SentWriter, golden};
use shunt_sim::packets::{Options, Scenario, record};
use shunt_stack::wire::{Packet, Protocol, Version};

/// What tshark is asked for, in the order of [`Seen`].
const FIELDS: [&str; 25] = [
    "ip.src",
    "ip.dst",
    "ip.len",
    "ip.ttl",
    "ip.checksum.status",
    "ipv6.src",
    "ipv6.dst",
    "ipv6.plen",
    "ipv6.hlim",
    "tcp.srcport",
    "tcp.dstport",
    "tcp.seq_raw",
    "tcp.ack_raw",
    "tcp.hdr_len",
    "tcp.flags",
    "tcp.window_size_value",
    "tcp.len",
    "tcp.checksum.status",
    "tcp.options",
    "icmp.type",
    "icmp.checksum.status",
    "icmpv6.type",
    "icmpv6.checksum.status",
    "udp.length",
    "udp.checksum.status",
];

/// A frame as tshark reads it: the outermost value of each field.
struct Seen(Vec<String>);

impl Seen {
    fn text(&self, field: &str) -> &str {
        let index = FIELDS.iter().position(|name| *name == field).expect("a field that is asked for");
        &self.0[index]
    }

    fn number(&self, field: &str) -> Option<u64> {
        let text = self.text(field);
        match text.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).ok(),
            None => text.parse().ok(),
        }
    }

    /// What is written in hexadecimal digits.
    fn bytes(&self, field: &str) -> Vec<u8> {
        let digits = self.text(field).as_bytes().chunks(2);
        let byte = |two: &[u8]| u8::from_str_radix(std::str::from_utf8(two).ok()?, 16).ok();
        digits.map(|two| byte(two).expect("hexadecimal digits")).collect()
    }

    fn address(&self, field: &str) -> Option<IpAddr> {
        self.text(field).parse().ok()
    }

    /// Whether a checksum is right; none if tshark has not looked.
    fn right(&self, field: &str) -> Option<bool> {
        match self.number(field)? {
            1 => Some(true),
            0 => Some(false),
            _ => None,
        }
    }
}

/// A line a frame.
fn tshark(file: &Path) -> Vec<Seen> {
    let settings = [
        "ip.check_checksum:TRUE",
        "tcp.check_checksum:TRUE",
        "udp.check_checksum:TRUE",
        "ip.defragment:FALSE",
        "ipv6.defragment:FALSE",
        "tcp.analyze_sequence_numbers:FALSE",
        "tcp.desegment_tcp_streams:FALSE",
    ];
    let mut arguments = vec!["-n", "-E", "occurrence=f"];
    arguments.extend(settings.iter().flat_map(|setting| ["-o", setting]));
    common::tshark::tshark(file, &arguments, &FIELDS).into_iter().map(Seen).collect()
}

fn records(file: &Path) -> Vec<Record> {
    let mut reader = Reader::open(file).expect("a capture");
    std::iter::from_fn(|| reader.next_record()).map(|record| record.expect("a record")).collect()
}

/// What was compared.
#[derive(Debug, Default)]
struct Compared {
    tcp: u64,
    options: u64,
    icmp: u64,
    /// Checksums that both call wrong.
    wrong: u64,
    /// Packets that our parser refuses.
    refused: u64,
    /// Packets in which tshark does not get as far as we do: it looks into the options of extension headers.
    unseen: u64,
}

impl Compared {
    fn file(&mut self, file: &Path) {
        let (records, seen) = (records(file), tshark(file));
        assert_eq!(records.len(), seen.len(), "{}", file.display());
        for (record, seen) in records.iter().zip(&seen) {
            match Frame::read(record) {
                Ok(frame) => self.packet(&frame.packet, seen, record.number),
                Err(FrameError::Packet { .. }) => self.refused += 1,
                Err(error) => panic!("{}: packet {}: {error}", file.display(), record.number),
            }
        }
    }

    fn packet(&mut self, packet: &Packet, seen: &Seen, number: u64) {
        let context = || format!("packet {number}: {packet:?}, tshark: {:?}", seen.0);
        let [source, destination, hops] = match packet.version() {
            Version::V4 => ["ip.src", "ip.dst", "ip.ttl"],
            Version::V6 => ["ipv6.src", "ipv6.dst", "ipv6.hlim"],
        };
        let length = seen.number("ip.len").or_else(|| seen.number("ipv6.plen").map(|length| length + 40));
        let ours = (Some(packet.source()), Some(packet.destination()), Some(u64::from(packet.hop_limit())));
        let theirs = (seen.address(source), seen.address(destination), seen.number(hops));
        assert_eq!(ours, theirs, "{}", context());
        assert_eq!(length, Some(packet.len() as u64), "{}", context());
        if packet.fragment().is_some() {
            return;
        }
        let stopped = |field| seen.text(field).is_empty();
        match packet.protocol() {
            Protocol::Tcp if stopped("tcp.srcport") => self.unseen += 1,
            Protocol::Icmp if stopped("icmp.type") => self.unseen += 1,
            Protocol::Icmpv6 if stopped("icmpv6.type") => self.unseen += 1,
            Protocol::Tcp => self.tcp(packet, seen, &context),
            Protocol::Icmp => self.icmp(packet, seen, ["icmp.type", "icmp.checksum.status"], &context),
            Protocol::Icmpv6 => self.icmp(packet, seen, ["icmpv6.type", "icmpv6.checksum.status"], &context),
            _ => {}
        }
    }

    fn checksum(&mut self, packet: &Packet, right: Option<bool>, context: &dyn Fn() -> String) {
        assert_eq!(Some(packet.checksum_ok()), right, "{}", context());
        self.wrong += u64::from(!packet.checksum_ok());
    }

    fn tcp(&mut self, packet: &Packet, seen: &Seen, context: &dyn Fn() -> String) {
        let tcp = packet.tcp().expect("not a fragment");
        let ours = [
            u64::from(tcp.source_port()),
            u64::from(tcp.destination_port()),
            u64::from(tcp.seq().0),
            u64::from(tcp.ack().0),
            tcp.header_len() as u64,
            u64::from(tcp.window()),
            tcp.payload().len() as u64,
        ];
        let fields = [
            "tcp.srcport",
            "tcp.dstport",
            "tcp.seq_raw",
            "tcp.ack_raw",
            "tcp.hdr_len",
            "tcp.window_size_value",
            "tcp.len",
        ];
        assert_eq!(ours.map(Some), fields.map(|field| seen.number(field)), "{}", context());
        // tshark's field holds the reserved bits as well.
        assert_eq!(
            seen.number("tcp.flags").map(|flags| flags & 0xff),
            Some(u64::from(tcp.flags().0)),
            "{}",
            context()
        );
        assert_eq!(seen.bytes("tcp.options"), tcp.option_bytes(), "{}", context());
        self.checksum(packet, seen.right("tcp.checksum.status"), context);
        self.tcp += 1;
        self.options += u64::from(!tcp.option_bytes().is_empty());
    }

    fn icmp(
        &mut self,
        packet: &Packet,
        seen: &Seen,
        [kind, status]: [&str; 2],
        context: &dyn Fn() -> String,
    ) {
        let icmp = packet.icmp().expect("not a fragment");
        assert_eq!(seen.number(kind), Some(u64::from(icmp.message_type())), "{}", context());
        self.checksum(packet, seen.right(status), context);
        self.icmp += 1;
    }
}

#[test]
fn tshark_reads_every_packet_of_simulated_worlds_as_we_do() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut compared = Compared::default();
    for scenario in Scenario::ALL {
        for seed in 1..=2 {
            let file = dir.path().join(format!("{scenario}-{seed}.pcapng"));
            let summary = record(&Options::small(seed, Some(scenario)), &file);
            let summary = summary.unwrap_or_else(|failure| panic!("{failure}"));
            let before = compared.tcp;
            compared.file(&file);
            assert!(compared.tcp - before > summary.packets / 2, "{scenario} {seed}: not all was captured");
        }
    }
    println!("{compared:?}");
    assert_eq!(compared.unseen, 0);
    assert!(compared.tcp > 20_000 && compared.options > 2_000 && compared.wrong > 10, "{compared:?}");
}

/// What scapy says of a packet.
#[derive(Deserialize)]
struct Said {
    kind: String,
    source: Option<IpAddr>,
    destination: Option<IpAddr>,
    length: Option<usize>,
    tcp: Option<SaidTcp>,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
struct SaidTcp {
    source_port: u16,
    destination_port: u16,
    seq: u32,
    ack: u32,
    flags: u8,
    window: u16,
    header: usize,
    payload: usize,
}

/// Packets that scapy makes, the second half of them broken somehow.
fn scapy(seed: u64, count: usize, file: &Path) -> Vec<Said> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracles/packets.py");
    let arguments = [seed.to_string(), count.to_string()];
    let output = Command::new("/usr/bin/python3").arg(script).args(arguments).arg(file).output();
    let output = output.expect("this test needs Python");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "this test needs scapy (Debian: apt install python3-scapy): {errors}");
    let text = String::from_utf8(output.stdout).expect("JSON is UTF-8");
    text.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
}

fn is_as_said(packet: &Packet, said: &Said) {
    assert_eq!(Some(packet.source()), said.source);
    assert_eq!(Some(packet.destination()), said.destination);
    assert_eq!(Some(packet.len()), said.length);
    assert!(packet.checksum_ok(), "{packet:?}");
    let tcp = packet.tcp().map(|tcp| SaidTcp {
        source_port: tcp.source_port(),
        destination_port: tcp.destination_port(),
        seq: tcp.seq().0,
        ack: tcp.ack().0,
        flags: tcp.flags().0,
        window: tcp.window(),
        header: tcp.header_len(),
        payload: tcp.payload().len(),
    });
    assert_eq!(tcp, said.tcp, "{packet:?}");
}

fn is_right(packet: &Packet) -> bool {
    packet.fragment().is_some() || packet.checksum_ok()
}

#[test]
fn packets_that_scapy_makes_and_breaks_pass_every_machine_unharmed() {
    let count = if std::env::var_os("SHUNT_TEST_FULL").is_some() { 100_000 } else { 6000 };
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("scapy.pcap");
    let said = scapy(1, count, &file);
    let records = records(&file);
    assert_eq!((records.len(), said.len()), (count, count));
    for (record, said) in records.iter().zip(&said).filter(|(_, said)| said.kind != "mutated") {
        let frame = Frame::read(record).unwrap_or_else(|error| panic!("packet {}: {error}", record.number));
        is_as_said(&frame.packet, said);
    }
    let mut compared = Compared::default();
    compared.file(&file);
    println!("made: {compared:?}");
    assert!(compared.unseen < count as u64 / 50, "{compared:?}");
    let examples = golden::make();
    for config in ["balancer.toml", "client.toml", "server.toml"] {
        let role = examples.iter().find(|golden| golden.config == Some(config)).expect("one of each").role();
        let sent = dir.path().join("sent.pcapng");
        let passed = replayed(role, &records, &sent);
        let mut compared = Compared::default();
        compared.file(&sent);
        println!("{config}: {passed} passed, {compared:?}");
        assert!(passed > count / 20, "{config}: {passed} of {count}");
    }
}

/// Sends all through a machine; says how many packets came out, which `out` has then.
fn replayed(role: Role, records: &[Record], out: &Path) -> usize {
    let mut replay = Replay::new(role);
    let mut writer = SentWriter::new(File::create(out).expect("a file")).expect("a file");
    let mut passed = 0;
    for record in records {
        let right = Frame::read(record).is_ok_and(|frame| is_right(&frame.packet));
        replay.record(record, |row| {
            for sent in &row.sent {
                // What a timer sends is of an earlier packet.
                assert!(!right || is_right(&sent.packet), "{row}: {:?}", sent.packet);
                passed += 1;
            }
            writer.row(&row).expect("it can be written");
        });
    }
    writer.finish().expect("it can be written");
    passed
}
