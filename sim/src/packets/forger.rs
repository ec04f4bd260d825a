//! Somebody off the path who knows every address and port, and guesses sequence numbers: never rightly, so that nothing
//! of it may ever be believed.

use fastrand::Rng;
use shunt_stack::wire::{DEFAULT_EXID, Packet, RedirectOption, Segment, SeqNumber, TcpFlags};

/// The port that forged redirects lead to: no server's.
pub(super) const NOBODYS_PORT: u16 = 41_999;
/// One packet in so many is answered by a forged one.
const ONE_IN: u32 = 4;
/// The least distance of a guess from what it should be: beyond every window.
const AWAY: u32 = 1 << 28;

/// The forger of one world.
#[derive(Debug)]
pub(super) struct Forger {
    rng: Rng,
}

impl Forger {
    pub(super) fn new(rng: Rng) -> Forger {
        Forger { rng }
    }

    /// A number that is not `right`, nor near it.
    fn wrong(&mut self, right: SeqNumber) -> SeqNumber {
        right + self.rng.u32(AWAY..u32::MAX - AWAY)
    }

    /// What is sent to a client that has sent `seen`, as if from its peer.
    pub(super) fn answer(&mut self, seen: &Packet) -> Option<Packet> {
        if self.rng.u32(0..ONE_IN) != 0 {
            return None;
        }
        let (tcp, from, to) = (seen.tcp()?, seen.destination_socket()?, seen.source_socket()?);
        let opens = tcp.is_syn();
        let flags = match (opens, self.rng.u8(0..4)) {
            (true, 0) => TcpFlags::RST | TcpFlags::ACK,
            (true, _) | (false, 0) => TcpFlags::SYN | TcpFlags::ACK,
            (false, 1) => TcpFlags::RST,
            (false, _) => TcpFlags::ACK,
        };
        let bare = Segment::bare(from, to, flags);
        let (seq, ack) = (self.wrong(tcp.ack()), self.wrong(tcp.seq()));
        let mut packet = Segment { seq, ack, window: 1000, ..bare }.emit();
        let said = RedirectOption {
            // C P=Y of a handshake, or R P=Z of a move (M3).
            redirect: !flags.contains(TcpFlags::SYN),
            confirm: flags.contains(TcpFlags::SYN),
            port: Some(NOBODYS_PORT),
            ..RedirectOption::default()
        };
        if self.rng.u8(0..4) > 0 {
            packet.insert_redirect(DEFAULT_EXID, &said, 1500).ok()?;
        }
        Some(packet)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_forged_looks_right_but_for_its_numbers() {
        let mut forger = Forger::new(Rng::with_seed(1));
        let (own, vip) = ("10.64.0.1:40000".parse().unwrap(), "203.0.113.10:443".parse().unwrap());
        let bare = Segment::bare(own, vip, TcpFlags::SYN);
        let seen = Segment { seq: SeqNumber(7), ..bare }.emit();
        let forged: Vec<Packet> = (0..400).filter_map(|_| forger.answer(&seen)).collect();
        assert!((50..150).contains(&forged.len()), "{}", forged.len());
        for packet in &forged {
            assert!(packet.checksum_ok());
            assert_eq!((packet.source_socket(), packet.destination_socket()), (Some(vip), Some(own)));
            assert!(packet.tcp().unwrap().ack() != SeqNumber(8));
        }
        let redirects = forged.iter().filter(|it| {
            let option = it.tcp().unwrap().redirect(DEFAULT_EXID).unwrap();
            option.is_some_and(|option| option.confirm && option.port == Some(NOBODYS_PORT))
        });
        assert!(redirects.count() > 20);
    }
}
