//! `shunt replay` as it is called (N6).

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use pcap_file::pcapng::blocks::enhanced_packet::EnhancedPacketOption;
use pcap_file::pcapng::blocks::opt_common::CommonOption;
use pcap_file::pcapng::{Block, PcapNgReader};
use shunt_captures::golden;

/// Exit code of a mistake of the user's.
const USAGE: i32 = 2;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("captures/golden")
}

fn path(name: &str) -> String {
    folder().join(name).to_str().expect("UTF-8").to_owned()
}

fn replay(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shunt"));
    command.arg("replay").args(arguments).stdin(Stdio::null()).output().expect("the program starts")
}

fn stdout(output: &Output) -> &str {
    assert!(output.status.success(), "{}", stderr(output));
    std::str::from_utf8(&output.stdout).expect("UTF-8")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

const HANDOVER: &str = "handover-client-v4.pcapng";

#[test]
fn n6_the_command_says_of_every_golden_capture_what_is_expected() {
    for golden in golden::make() {
        let file = path(&golden.name);
        let config = golden.config.map(path);
        let mut arguments = vec![file.as_str(), "--diff"];
        arguments.extend(config.iter().flat_map(|config| ["-c", config]));
        let output = replay(&arguments);
        let said = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(0), "{}: {said}{}", golden.name, stderr(&output));
        assert_eq!(said, "", "{}", golden.name);
    }
}

#[test]
fn n6_a_difference_is_exit_code_1_and_its_first_lines() {
    let dir = tempfile::tempdir().expect("a folder");
    let expect = fs::read_to_string(path(&format!("{HANDOVER}.expect"))).expect("it is there");
    let wrong = dir.path().join("wrong");
    fs::write(&wrong, expect.replacen("handed_over (C10)", "reconnected (C5)", 1)).expect("a file");
    let output =
        replay(&[&path(HANDOVER), "-c", &path("client.toml"), "--diff", wrong.to_str().expect("UTF-8")]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let added = |line: &str| line.starts_with('+') && line.contains("handed_over (C10)");
    let removed = |line: &str| line.starts_with('-') && line.contains("reconnected (C5)");
    assert!(said.lines().any(added) && said.lines().any(removed), "{said}");
    let missing = dir.path().join("missing");
    let output = replay(&[&path(HANDOVER), "--diff", missing.to_str().expect("UTF-8")]);
    assert_eq!(output.status.code(), Some(USAGE));
    assert!(stderr(&output).contains("keep there what is expected"), "{}", stderr(&output));
}

#[test]
fn n6_what_a_capture_tells_stands_in_for_a_configuration() {
    for name in [HANDOVER, "token-keys-differ-client-v6.pcapng", "two-answers-client-v4.pcapng"] {
        let configured = replay(&[&path(name), "-c", &path("client.toml")]);
        let learned = replay(&[&path(name), "--as", "client"]);
        assert_eq!(stdout(&learned), stdout(&configured), "{name}");
    }
    let server = "reconnect-server-v6.pcapng";
    let configured = replay(&[&path(server), "-c", &path("server.toml")]);
    assert_eq!(stdout(&replay(&[&path(server), "--as", "server"])), stdout(&configured));
    let plain = replay(&[&path("plain-wire-v4.pcap"), "--as", "client"]);
    assert_eq!(plain.status.code(), Some(USAGE));
    assert!(stderr(&plain).contains("add -c FILE"), "{}", stderr(&plain));
    let balancer = replay(&[&path(HANDOVER), "--as", "balancer"]);
    assert!(stderr(&balancer).contains("add -c FILE"), "{}", stderr(&balancer));
    let other = replay(&[&path(HANDOVER), "--as", "server", "-c", &path("client.toml")]);
    assert_eq!(other.status.code(), Some(USAGE));
}

#[test]
fn n6_the_identifier_of_the_option_may_be_another() {
    let name = "reconnect-wire-v6.pcap";
    let other = replay(&[&path(name), "--exid", "0x1234"]);
    assert!(!stdout(&other).contains("[R C]") && stdout(&other).contains(" SYN\n"), "{}", stdout(&other));
    assert_eq!(stdout(&replay(&[&path(name), "--exid", "21060"])), stdout(&replay(&[&path(name)])));
}

#[test]
fn n6_json_is_an_object_a_packet() {
    let output = replay(&[&path("reconnect-balancer-v6.pcapng"), "-c", &path("balancer.toml"), "--json"]);
    let rows: Vec<serde_json::Value> =
        stdout(&output).lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    for (number, row) in (1..).zip(&rows) {
        assert_eq!(row["number"], number, "{row}");
    }
    let first = &rows[0];
    assert_eq!((&first["decision"]["name"], &first["decision"]["rule"]), (&"selected".into(), &"B1".into()));
    assert_eq!(first["message"], "opening SYN, will reconnect");
    assert_eq!(first["sent"][0]["destination"], "fd00::11");
}

#[test]
fn n6_connections_are_drawn_as_ladders_and_as_a_picture() {
    let dir = tempfile::tempdir().expect("a folder");
    let picture = dir.path().join("picture.svg");
    let output = replay(&[&path("move-wire-v6.pcap"), "--ladder", "--svg", picture.to_str().expect("UTF-8")]);
    let drawn = stdout(&output);
    let header = drawn.lines().nth(1).expect("a header");
    let at = |text: &str| header.find(text).unwrap_or_else(|| panic!("{drawn}"));
    let columns = [at("client :"), at("X :443"), at("Y :41001"), at("Z :41002")];
    // Every line has its lanes in the columns of the names.
    for line in drawn.lines().skip(2).filter(|line| line.contains('▶') || line.contains('◀')) {
        let characters: Vec<char> = line.chars().collect();
        assert_eq!(characters[columns[0]], '│', "{line}");
        assert!(matches!(characters[columns[3]], '│' | '─'), "{line}");
    }
    let line_of =
        |text: &str| drawn.lines().position(|line| line.contains(text)).unwrap_or_else(|| panic!("{drawn}"));
    let order = ["SYN [R C] ", "[R P=443 hops=1]", "[R P=41002]", "SYN [R C P=41001]", "FIN [C P=41002]"]
        .map(line_of);
    assert!(order.is_sorted(), "{drawn}");
    let svg = fs::read_to_string(picture).expect("it was written");
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
    assert!(svg.contains("FIN [C P=41002]") && svg.contains("Z :41002"), "{svg}");
}

/// One connection, seen on the link, in the shim, in the balancer and at the server: the same arrows.
#[test]
fn n6_a_connection_is_drawn_alike_wherever_it_was_captured() {
    let arrows = |name: &str, config: Option<&str>| -> Vec<String> {
        let config = config.map(path);
        let file = path(name);
        let mut arguments = vec![file.as_str(), "--ladder"];
        arguments.extend(config.iter().flat_map(|config| ["-c", config]));
        let output = replay(&arguments);
        let arrow = |line: &str| Some(line[line.find('│')?..=line.rfind('│')? + 2].to_owned());
        stdout(&output).lines().skip(2).filter_map(arrow).collect()
    };
    for family in ["v4", "v6"] {
        let link = arrows(&format!("reconnect-wire-{family}.pcap"), None);
        assert_eq!(link.len(), 12, "{link:?}");
        for place in ["client", "balancer", "server"] {
            let config = format!("{place}.toml");
            let seen = arrows(&format!("reconnect-{place}-{family}.pcapng"), Some(&config));
            assert_eq!(seen, link, "{place} {family}");
        }
    }
}

#[test]
fn n6_what_would_have_been_sent_is_written_with_its_decision() {
    let dir = tempfile::tempdir().expect("a folder");
    let written = dir.path().join("sent.pcapng");
    let name = "handover-balancer-v4.pcapng";
    let output =
        replay(&[&path(name), "-c", &path("balancer.toml"), "--write", written.to_str().expect("UTF-8")]);
    assert!(output.status.success(), "{}", stderr(&output));
    let read = |file: &Path| {
        let mut reader = PcapNgReader::new(fs::File::open(file).expect("a file")).expect("a capture");
        let mut packets = Vec::new();
        while let Some(block) = reader.next_block() {
            let Block::EnhancedPacket(packet) = block.expect("a block").0 else { continue };
            let (mut out, mut comment) = (false, String::new());
            for option in &packet.options {
                match option {
                    EnhancedPacketOption::Flags(flags) => out = flags & 3 == 2,
                    EnhancedPacketOption::Common(CommonOption::Comment(text)) => comment = text.to_string(),
                    _ => {}
                }
            }
            packets.push((packet.timestamp, packet.data.to_vec(), out, comment));
        }
        packets
    };
    let sent = read(&written);
    let recorded: Vec<_> = read(&folder().join(name)).into_iter().filter(|packet| packet.2).collect();
    assert_eq!(sent.len(), recorded.len());
    for (sent, recorded) in sent.iter().zip(&recorded) {
        assert_eq!((sent.0, &sent.1), (recorded.0, &recorded.1));
        assert!(sent.3.starts_with("packet ") && sent.3.contains(" (B"), "{}", sent.3);
    }
    assert_eq!(sent[0].3, "packet 1: selected (B1): server web-1");
}

#[test]
fn n6_what_is_no_capture_says_what_to_do() {
    let dir = tempfile::tempdir().expect("a folder");
    let cases: [(&[u8], &str); 5] = [
        (&[0x1f, 0x8b, 8, 0, 0, 0], "gunzip"),
        (b"", "is empty"),
        (b"hello world", "neither pcap nor pcapng"),
        (&[0xd4, 0xc3, 0xb2, 0xa1, 2, 0], "ends within its header"),
        (b"snoop\0\0\0", "editcap"),
    ];
    for (bytes, word) in cases {
        let file = dir.path().join("file");
        fs::write(&file, bytes).expect("a file");
        let output = replay(&[file.to_str().expect("UTF-8")]);
        assert_eq!(output.status.code(), Some(USAGE));
        assert!(stderr(&output).contains(word), "{word}: {}", stderr(&output));
    }
    let output = replay(&["/nonexistent/capture"]);
    assert_eq!(output.status.code(), Some(USAGE));
    assert!(stderr(&output).contains("/nonexistent/capture"), "{}", stderr(&output));
}

#[test]
fn n6_a_cut_capture_is_used_as_far_as_it_goes() {
    let dir = tempfile::tempdir().expect("a folder");
    let whole = fs::read(path(HANDOVER)).expect("it is there");
    let cut = dir.path().join("cut.pcapng");
    fs::write(&cut, &whole[..whole.len() - 10]).expect("a file");
    let output = replay(&[cut.to_str().expect("UTF-8"), "-c", &path("client.toml")]);
    let expect = fs::read_to_string(path(&format!("{HANDOVER}.expect"))).expect("it is there");
    let (all, read): (Vec<&str>, Vec<&str>) = (expect.lines().collect(), stdout(&output).lines().collect());
    assert_eq!(read[..read.len() - 1], all[..all.len() - 1]);
    assert!(read[read.len() - 1].contains("the file is cut off here"), "{read:?}");
    assert!(stderr(&output).contains("byte "), "{}", stderr(&output));
}

#[test]
fn n6_a_capture_may_come_by_standard_input() {
    let name = "reconnect-wire-v4.pcap";
    let mut command = Command::new(env!("CARGO_BIN_EXE_shunt"));
    command.args(["replay", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().expect("the program starts");
    let bytes = fs::read(path(name)).expect("it is there");
    child.stdin.take().expect("a pipe").write_all(&bytes).expect("it reads");
    let output = child.wait_with_output().expect("it ends");
    let expect = fs::read_to_string(path(&format!("{name}.expect"))).expect("it is there");
    assert_eq!(String::from_utf8_lossy(&output.stdout), expect);
}
