//! Captures of any size in bounded memory; hostile ones too.

use std::io::Read;

use shunt_captures::{Ladder, Reader, Replay, Role, What};
use shunt_stack::redirect::{ClientConfig, Continuation, OnRedirect, VipConfig};
use shunt_stack::wire::{DEFAULT_EXID, RedirectOption, Segment, TcpFlags};

/// Bytes made as they are read: a head, then `block(0)`, `block(1)`, ...
struct Made<F> {
    waiting: Vec<u8>,
    at: usize,
    next: u64,
    end: u64,
    block: F,
}

impl<F: FnMut(u64) -> Vec<u8>> Made<F> {
    fn new(head: &[u8], end: u64, block: F) -> Self {
        Made { waiting: head.to_vec(), at: 0, next: 0, end, block }
    }
}

impl<F: FnMut(u64) -> Vec<u8>> Read for Made<F> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.at == self.waiting.len() && self.next < self.end {
            self.waiting = (self.block)(self.next);
            (self.at, self.next) = (0, self.next + 1);
        }
        let length = buffer.len().min(self.waiting.len() - self.at);
        buffer[..length].copy_from_slice(&self.waiting[self.at..self.at + length]);
        self.at += length;
        Ok(length)
    }
}

/// The most memory that this process has ever used, in KiB.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn pcap_head() -> Vec<u8> {
    let words: [u32; 6] = [0xa1b2_c3d4, 0x0004_0002, 0, 0, 262_144, 101];
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A record of a pcap file, so many milliseconds after its begin.
fn record(millis: u64, packet: &[u8]) -> Vec<u8> {
    let words =
        [(millis / 1000) as u32, (millis % 1000) as u32 * 1000, packet.len() as u32, packet.len() as u32];
    words.iter().flat_map(|word| word.to_le_bytes()).chain(packet.iter().copied()).collect()
}

#[test]
fn n6_connections_without_end_are_replayed_and_drawn_in_bounded_memory() {
    const CONNECTIONS: u64 = 200_000;
    let vip = "203.0.113.10:443".parse().unwrap();
    let made = Made::new(&pcap_head(), CONNECTIONS, |number| {
        // Clients of a whole /8, each with one SYN: none ever ends.
        let client = std::net::Ipv4Addr::from(0x0a00_0000 + (number as u32));
        let from = std::net::SocketAddr::from((client, 40_000));
        let mut packet = Segment::bare(from, vip, TcpFlags::SYN).emit();
        if number % 2 == 0 {
            let option = RedirectOption { redirect: true, ..RedirectOption::default() };
            packet.insert_redirect(DEFAULT_EXID, &option, 1500).unwrap();
        }
        record(number / 100, packet.bytes())
    });
    let vips = vec![VipConfig {
        address: vip.ip(),
        continuation: Continuation::Auto,
        on_redirect: OnRedirect::Hint,
    }];
    let mut replay = Replay::new(Role::client(ClientConfig { vips, ..ClientConfig::default() }));
    let (mut reader, mut ladder, mut rows) = (Reader::new(made).unwrap(), Ladder::new(), 0u64);
    let before = peak();
    while let Some(next) = reader.next_record() {
        replay.record(&next.unwrap(), |row| {
            rows += 1;
            ladder.row(&row);
        });
    }
    let grown = peak() - before;
    assert!(replay.tally().packets == CONNECTIONS && rows >= CONNECTIONS);
    // What the machine refuses is counted under its own name.
    assert!(replay.tally().decisions["table_full"] > 0, "{:?}", replay.tally());
    assert!(ladder.text().contains("further connections are not drawn"));
    assert!(grown < 256 << 10, "{grown} KiB");
}

#[test]
fn n6_interfaces_without_end_end_the_reading() {
    let section: Vec<u8> = [0x0a0d_0d0a_u32, 28, 0x1a2b_3c4d, 1, 0xffff_ffff, 0xffff_ffff, 28]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    let interface: Vec<u8> = [1_u32, 20, 101, 0, 20].iter().flat_map(|word| word.to_le_bytes()).collect();
    let made = Made::new(&section, u64::MAX, |_| interface.clone());
    let mut reader = Reader::new(made).unwrap();
    let trouble = reader.next_record().unwrap().unwrap_err();
    assert!(trouble.fatal && trouble.what == What::Interfaces, "{trouble}");
    assert!(reader.next_record().is_none());
}

#[test]
fn n6_a_length_beyond_all_packets_is_corrupt_and_not_believed() {
    let packet = vec![0x45; 300_000];
    let mut file = pcap_head();
    file.extend(record(0, &packet[..100]));
    file.extend(record(1, &packet));
    let mut reader = Reader::new(file.as_slice()).unwrap();
    assert!(reader.next_record().unwrap().is_ok());
    let trouble = reader.next_record().unwrap().unwrap_err();
    assert_eq!((trouble.number, trouble.offset, trouble.fatal), (2, 24 + 116, true));
    assert_eq!(trouble.what, What::Oversized(300_000));
    // One that is longer than anything in memory.
    let mut file = pcap_head();
    let mut head = record(0, &[]);
    head[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    file.extend(head);
    let made = Made::new(&file, 4096, |_| vec![0; 65_536]);
    let trouble = Reader::new(made).unwrap().next_record().unwrap().unwrap_err();
    assert_eq!((trouble.number, trouble.what), (1, What::Cut));
}
