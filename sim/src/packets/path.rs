//! What stands between a client and everybody else: translators and boxes.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use bytes::BytesMut;
use fastrand::Rng;
use shunt_stack::wire::checksum::Sum;
use shunt_stack::wire::{DEFAULT_EXID, Offload, Packet, RedirectOption, TcpFlags};

use super::plan::{Middlebox, NatPlan};

/// Where the TCP checksum stands in its header.
const CHECKSUM: usize = 16;
/// Connections that a translator or a box remembers at the most.
const MAX_MAPPINGS: usize = 20_000;

type Ends = (SocketAddr, SocketAddr);

/// The redirect option of a segment.
fn option_of(packet: &Packet) -> Option<RedirectOption> {
    packet.tcp()?.redirect(DEFAULT_EXID).ok()?
}

fn ends(packet: &Packet) -> Option<Ends> {
    Some((packet.source_socket()?, packet.destination_socket()?))
}

/// A translator of addresses and ports, by connection as Linux does it.
#[derive(Debug)]
pub(super) struct Nat {
    plan: NatPlan,
    public: IpAddr,
    rng: Rng,
    /// (own socket, remote socket) -> public port.
    out: BTreeMap<Ends, u16>,
    /// (remote socket, public port) -> own socket.
    back: BTreeMap<(SocketAddr, u16), SocketAddr>,
    /// It has forgotten everything once: ports are not kept any more.
    rebound: bool,
}

impl Nat {
    pub(super) fn new(plan: NatPlan, public: IpAddr, rng: Rng) -> Nat {
        Nat { plan, public, rng, out: BTreeMap::new(), back: BTreeMap::new(), rebound: false }
    }

    pub(super) fn forget(&mut self) {
        self.out.clear();
        self.back.clear();
        self.rebound = true;
    }

    /// Towards the network; false: dropped.
    pub(super) fn up(&mut self, packet: &mut Packet) -> bool {
        let (Some((own, remote)), Some(tcp)) = (ends(packet), packet.tcp()) else { return false };
        let known = self.out.get(&(own, remote)).copied();
        let opens = tcp.is_syn() || !self.plan.strict;
        let Some(port) = known.or_else(|| if opens { self.map(own, remote) } else { None }) else {
            return false;
        };
        packet.set_source(self.public);
        packet.set_source_port(port);
        true
    }

    fn map(&mut self, own: SocketAddr, remote: SocketAddr) -> Option<u16> {
        if self.out.len() >= MAX_MAPPINGS {
            return None;
        }
        let keeps = !self.plan.random_ports && !self.rebound;
        let mut port = if keeps { own.port() } else { self.rng.u16(1024..) };
        while self.back.contains_key(&(remote, port)) {
            port = self.rng.u16(1024..);
        }
        self.out.insert((own, remote), port);
        self.back.insert((remote, port), own);
        Some(port)
    }

    /// From the network; false: dropped.
    pub(super) fn down(&mut self, packet: &mut Packet) -> bool {
        let Some((remote, public)) = ends(packet) else { return false };
        let Some(own) = self.back.get(&(remote, public.port())).copied() else { return false };
        packet.set_destination(own.ip());
        packet.set_destination_port(own.port());
        true
    }
}

/// A box and what it remembers.
#[derive(Debug)]
pub(super) struct Boxed {
    kind: Middlebox,
    options: BTreeMap<Ends, RedirectOption>,
    shifts: BTreeMap<Ends, u32>,
    rng: Rng,
}

impl Boxed {
    pub(super) fn new(kind: Middlebox, rng: Rng) -> Boxed {
        Boxed { kind, options: BTreeMap::new(), shifts: BTreeMap::new(), rng }
    }

    /// Towards the network; false: dropped.
    pub(super) fn up(&mut self, packet: &mut Packet) -> bool {
        let Some(ends) = ends(packet) else { return true };
        let option = option_of(packet);
        let syn = packet.tcp().is_some_and(|tcp| tcp.is_syn());
        match self.kind {
            Middlebox::Strip => {
                packet.strip_redirect(DEFAULT_EXID);
            }
            // That of the latest SYN.
            Middlebox::Echo if syn => {
                self.options.remove(&ends);
                if let Some(option) = option.filter(|_| self.options.len() < MAX_MAPPINGS) {
                    self.options.insert(ends, option);
                }
            }
            Middlebox::Echo => {}
            Middlebox::DropSyns => return !syn || option.is_none(),
            Middlebox::DropAll => return option.is_none(),
            Middlebox::Resequence => {
                if syn && self.shifts.len() < MAX_MAPPINGS {
                    let shift = self.rng.u32(..);
                    self.shifts.entry(ends).or_insert(shift);
                }
                if let Some(shift) = self.shifts.get(&ends) {
                    add_to_word(packet, 4, *shift);
                }
            }
        }
        true
    }

    /// From the network; false: dropped.
    pub(super) fn down(&mut self, packet: &mut Packet, mtu: usize) -> bool {
        let Some((remote, own)) = ends(packet) else { return true };
        let (option, ends) = (option_of(packet), (own, remote));
        match self.kind {
            Middlebox::Strip => {
                packet.strip_redirect(DEFAULT_EXID);
            }
            Middlebox::Echo => {
                let syn_ack = packet.tcp().is_some_and(|tcp| tcp.is_syn_ack());
                if let Some(option) = self.options.get(&ends).filter(|_| syn_ack) {
                    packet.strip_redirect(DEFAULT_EXID);
                    // If it does not fit, the answer says nothing.
                    let _ = packet.insert_redirect(DEFAULT_EXID, option, mtu);
                }
            }
            Middlebox::DropSyns => {}
            Middlebox::DropAll => return option.is_none(),
            Middlebox::Resequence => {
                let acknowledges = packet.tcp().is_some_and(|tcp| tcp.flags().contains(TcpFlags::ACK));
                if let Some(shift) = self.shifts.get(&ends).filter(|_| acknowledges) {
                    add_to_word(packet, 8, shift.wrapping_neg());
                }
            }
        }
        true
    }
}

/// Adds to a word of the TCP header; the checksum follows.
fn add_to_word(packet: &mut Packet, offset: usize, by: u32) {
    let transport = packet.transport_offset();
    let taken = std::mem::replace(packet, Packet::clone(packet));
    let mut bytes: BytesMut = taken.into_buffer();
    let word = transport + offset..transport + offset + 4;
    let Some(old) = bytes.get(word.clone()).and_then(|word| <[u8; 4]>::try_from(word).ok()) else { return };
    let new = u32::from_be_bytes(old).wrapping_add(by).to_be_bytes();
    bytes[word].copy_from_slice(&new);
    let at = transport + CHECKSUM;
    let checksum = u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    let checksum = Sum::new().remove(&old).add(&new).update(checksum);
    bytes[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
    if let Ok(parsed) = Packet::parse(bytes, Offload::default()) {
        *packet = parsed;
    }
}

#[cfg(test)]
mod tests {
    use shunt_stack::wire::{Segment, SeqNumber};

    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn segment(source: &str, destination: &str, flags: TcpFlags) -> Packet {
        Segment { seq: SeqNumber(5), ack: SeqNumber(9), ..Segment::bare(at(source), at(destination), flags) }
            .emit()
    }

    const OWN: &str = "10.64.0.1:40000";
    const VIP: &str = "203.0.113.10:443";

    #[test]
    fn a_translator_translates_both_ways_and_knows_only_what_went_out() {
        for random_ports in [false, true] {
            let plan = NatPlan { random_ports, strict: true };
            let mut nat = Nat::new(plan, "198.51.100.1".parse().unwrap(), Rng::with_seed(3));
            assert!(!nat.up(&mut segment(OWN, VIP, TcpFlags::ACK)), "strict");
            let mut syn = segment(OWN, VIP, TcpFlags::SYN);
            assert!(nat.up(&mut syn) && syn.checksum_ok());
            let public = syn.source_socket().unwrap();
            assert_eq!(public.port() == 40_000, !random_ports);
            let mut back = segment(VIP, &public.to_string(), TcpFlags::SYN | TcpFlags::ACK);
            assert!(nat.down(&mut back) && back.checksum_ok());
            assert_eq!(back.destination_socket(), Some(at(OWN)));
            let mut other = segment("203.0.113.10:41001", &public.to_string(), TcpFlags::ACK);
            assert!(!nat.down(&mut other));
            nat.forget();
            assert!(!nat.down(&mut segment(VIP, &public.to_string(), TcpFlags::ACK)));
        }
    }

    #[test]
    fn a_box_shifts_what_it_saw_the_beginning_of() {
        let mut boxed = Boxed::new(Middlebox::Resequence, Rng::with_seed(4));
        let mut stray = segment(OWN, VIP, TcpFlags::ACK);
        assert!(boxed.up(&mut stray));
        assert_eq!(stray.tcp().unwrap().seq(), SeqNumber(5));
        let mut syn = segment(OWN, VIP, TcpFlags::SYN);
        assert!(boxed.up(&mut syn) && syn.checksum_ok());
        let shifted = syn.tcp().unwrap().seq();
        assert_ne!(shifted, SeqNumber(5));
        let mut back = segment(VIP, OWN, TcpFlags::ACK);
        assert!(boxed.down(&mut back, 1500) && back.checksum_ok());
        assert_eq!(back.tcp().unwrap().ack().0, 9u32.wrapping_sub(shifted.0 - 5));
    }

    #[test]
    fn boxes_strip_echo_and_drop_the_option() {
        let option = RedirectOption { redirect: true, confirm: true, ..RedirectOption::default() };
        let marked = || {
            let mut syn = segment(OWN, VIP, TcpFlags::SYN);
            syn.insert_redirect(DEFAULT_EXID, &option, 1500).unwrap();
            syn
        };
        let boxed = |kind| Boxed::new(kind, Rng::with_seed(4));
        let mut syn = marked();
        assert!(boxed(Middlebox::Strip).up(&mut syn) && option_of(&syn).is_none());
        assert!(
            !boxed(Middlebox::DropSyns).up(&mut marked()) && !boxed(Middlebox::DropAll).up(&mut marked())
        );
        let mut echo = boxed(Middlebox::Echo);
        assert!(echo.up(&mut marked()));
        let mut answer = segment(VIP, OWN, TcpFlags::SYN | TcpFlags::ACK);
        assert!(echo.down(&mut answer, 1500));
        assert_eq!(option_of(&answer), Some(option));
    }
}
