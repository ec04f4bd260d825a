//! Recording what passes a link, and comparing it with what passes another.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use shunt_lab::{Direction, ETHERNET_HEADER, ImpairedLink, Verdict};
use shunt_stack::wire::Packet;

/// Frames that passed a link in one direction.
#[derive(Clone, Default)]
pub struct Tape(Arc<Mutex<Vec<Vec<u8>>>>);

/// TCP packets without what routers change, and how often each.
pub type Packets = BTreeMap<Vec<u8>, usize>;

impl Tape {
    /// Records every IP packet that passes from now on.
    pub fn record(link: &ImpairedLink, direction: Direction) -> Tape {
        let tape = Tape::default();
        let frames = Arc::clone(&tape.0);
        link.set_filter(
            direction,
            Some(Box::new(move |frame| {
                frames.lock().expect("no panic").push(frame.clone());
                Verdict::Pass
            })),
        );
        tape
    }

    /// What has been recorded, and will not be told again.
    pub fn take(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.0.lock().expect("no panic"))
    }
}

/// An IP packet without what routers change: TTL and, with it, the header's checksum.
fn unrouted(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if packet[0] >> 4 == 4 {
        packet[8] = 0;
        packet[10..12].fill(0);
    } else {
        packet[7] = 0;
    }
    packet
}

/// The TCP packets of some frames to or from an address.
pub fn packets_of(frames: &[Vec<u8>], address: IpAddr) -> Packets {
    let mut packets = BTreeMap::new();
    for frame in frames {
        let bytes = &frame[ETHERNET_HEADER..];
        let Ok(packet) = Packet::from_slice(bytes) else { continue };
        if (packet.destination() == address || packet.source() == address) && packet.tcp().is_some() {
            *packets.entry(unrouted(bytes)).or_default() += 1;
        }
    }
    packets
}

/// All of several.
pub fn together(all: impl IntoIterator<Item = Packets>) -> Packets {
    let mut sum = BTreeMap::new();
    for (packet, count) in all.into_iter().flatten() {
        *sum.entry(packet).or_default() += count;
    }
    sum
}
