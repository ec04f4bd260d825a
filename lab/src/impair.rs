//! What an impaired link does to the frames of one direction: pure, frames and a time in, frames out.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use crate::{Error, Result};

/// Bytes of an Ethernet header, in front of the IP packet in every frame.
pub const ETHERNET_HEADER: usize = 14;

/// How a link treats the IP packets of one direction. Probabilities are 0 to 1, each packet on its own.
///
/// What happens to the n-th packet follows from the seed and n alone. ARP, IPv6 neighbour discovery and multicast
/// listener reports are delayed only, so that a run does not depend on whether a neighbour was known already.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Impairment {
    /// Time under way.
    pub delay: Duration,
    /// Up to so much is added to or taken from `delay`, evenly spread; it never reorders packets by itself.
    pub jitter: Duration,
    /// Probability that a packet is lost.
    pub loss: f64,
    /// Probability that a packet arrives twice.
    pub duplicate: f64,
    /// Probability that a packet is held back for `reorder_by`, so that later ones overtake it.
    pub reorder: f64,
    /// How long a packet to be reordered is held back.
    pub reorder_by: Duration,
    /// Probability that one bit of a packet, somewhere behind the Ethernet header, is inverted.
    pub corrupt: f64,
    /// Seed of the pseudo-random numbers; the two directions differ. Read when the link is made.
    pub seed: u64,
    /// MTU of both ends in bytes of an IP packet. Read when the link is made.
    pub mtu: u32,
    /// Frames under way at most, in each direction; more are dropped and counted.
    pub queue: usize,
}

impl Default for Impairment {
    /// A perfect link: nothing is impaired, MTU 1500, 8192 frames under way.
    fn default() -> Self {
        Self {
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            loss: 0.0,
            duplicate: 0.0,
            reorder: 0.0,
            reorder_by: Duration::from_millis(2),
            corrupt: 0.0,
            seed: 0,
            mtu: 1500,
            queue: 8192,
        }
    }
}

impl Impairment {
    pub(crate) fn check(self) -> Result<()> {
        for probability in [self.loss, self.duplicate, self.reorder, self.corrupt] {
            if !(0.0..=1.0).contains(&probability) {
                let expected = "a number from 0 to 1";
                return Err(Error::Invalid { what: "probability", given: probability.to_string(), expected });
            }
        }
        Ok(())
    }
}

/// What became of the frames of one direction of an impaired link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkCounters {
    /// IP packets that came in and could be impaired.
    pub packets: u64,
    /// Bytes of those, without Ethernet headers.
    pub bytes: u64,
    /// ARP, neighbour discovery and other frames that are only delayed.
    pub control: u64,
    /// Frames that went out, duplicates and `control` included.
    pub delivered: u64,
    /// Packets lost on purpose.
    pub lost: u64,
    /// Packets sent twice.
    pub duplicated: u64,
    /// Packets held back so that later ones overtake them.
    pub reordered: u64,
    /// Packets with a bit inverted.
    pub corrupted: u64,
    /// Packets a filter dropped.
    pub filtered: u64,
    /// Frames dropped because too many were under way.
    pub queue_dropped: u64,
    /// Frames the receiving device would not take (it was down, for example).
    pub refused: u64,
}

/// What a filter wants done with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Carry it on, as changed.
    Pass,
    /// Drop it and count it.
    Drop,
}

/// A middlebox: sees, and may change, the frames of one direction that carry IP (from [`ETHERNET_HEADER`] on).
pub type Filter = Box<dyn FnMut(&mut Vec<u8>) -> Verdict + Send>;

struct Pending {
    due: Instant,
    number: u64,
    frame: Vec<u8>,
}

impl Ord for Pending {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.due, self.number).cmp(&(other.due, other.number))
    }
}

impl PartialOrd for Pending {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Eq for Pending {}

impl PartialEq for Pending {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

/// One direction of a link.
pub(crate) struct Impairer {
    pub(crate) settings: Impairment,
    pub(crate) counters: LinkCounters,
    pub(crate) filter: Option<Filter>,
    random: Random,
    under_way: BinaryHeap<Reverse<Pending>>,
    /// When the last packet that was not held back is due: later ones are not due earlier.
    last_due: Option<Instant>,
    number: u64,
}

impl Impairer {
    pub(crate) fn new(settings: Impairment, direction: u64) -> Self {
        // Any two seeds and directions give streams that have nothing to do with each other.
        let random = Random(Random(settings.seed).next() ^ direction.wrapping_mul(0xD134_2543_DE82_EF95));
        let (counters, under_way) = (LinkCounters::default(), BinaryHeap::new());
        Self { settings, counters, filter: None, random, under_way, last_due: None, number: 0 }
    }

    /// Takes a frame that came in at `now`; returns the buffer if the frame is not carried on.
    pub(crate) fn push(&mut self, now: Instant, mut frame: Vec<u8>) -> Option<Vec<u8>> {
        if is_control(&frame) {
            self.counters.control += 1;
            return self.enqueue(now + self.settings.delay, frame, true);
        }
        self.counters.packets += 1;
        self.counters.bytes += (frame.len() - ETHERNET_HEADER) as u64;
        if let Some(filter) = &mut self.filter
            && filter(&mut frame) == Verdict::Drop
        {
            self.counters.filtered += 1;
            return Some(frame);
        }
        let fate = Fate::draw(&mut self.random, &self.settings);
        if fate.lose {
            self.counters.lost += 1;
            return Some(frame);
        }
        let due = now + self.settings.delay.saturating_sub(self.settings.jitter) + fate.jitter;
        if let Some(bit) = fate.corrupt {
            corrupt(&mut frame, bit);
            self.counters.corrupted += 1;
        }
        if fate.reorder {
            self.counters.reordered += 1;
            return self.enqueue(due + self.settings.reorder_by, frame, false);
        }
        if fate.duplicate {
            self.counters.duplicated += 1;
            let copy = frame.clone();
            self.enqueue(due, copy, true);
        }
        self.enqueue(due, frame, true)
    }

    fn enqueue(&mut self, due: Instant, frame: Vec<u8>, in_order: bool) -> Option<Vec<u8>> {
        if self.under_way.len() >= self.settings.queue {
            self.counters.queue_dropped += 1;
            return Some(frame);
        }
        let due = if in_order { self.last_due.map_or(due, |last| due.max(last)) } else { due };
        if in_order {
            self.last_due = Some(due);
        }
        self.number += 1;
        self.under_way.push(Reverse(Pending { due, number: self.number, frame }));
        None
    }

    /// The next frame that is due at `now`.
    pub(crate) fn pop(&mut self, now: Instant) -> Option<Vec<u8>> {
        if self.next_due()? > now {
            return None;
        }
        self.under_way.pop().map(|Reverse(pending)| pending.frame)
    }

    /// When the next frame is due.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.under_way.peek().map(|Reverse(pending)| pending.due)
    }
}

/// What chance has in store for one packet.
struct Fate {
    lose: bool,
    duplicate: bool,
    reorder: bool,
    corrupt: Option<u64>,
    jitter: Duration,
}

impl Fate {
    /// Always draws the same number of times: one packet's fate does not shift the next one's.
    fn draw(random: &mut Random, settings: &Impairment) -> Self {
        let mut happens = |probability: f64| random.fraction() < probability;
        let (lose, duplicate) = (happens(settings.loss), happens(settings.duplicate));
        let (reorder, damage) = (happens(settings.reorder), happens(settings.corrupt));
        let bit = random.next();
        let spread = settings.jitter.min(settings.delay) + settings.jitter;
        let jitter = spread.mul_f64(random.fraction());
        Self { lose, duplicate, reorder, corrupt: damage.then_some(bit), jitter }
    }
}

fn corrupt(frame: &mut [u8], bit: u64) {
    let packet = &mut frame[ETHERNET_HEADER..];
    let bits = packet.len() as u64 * 8;
    if let Some(bit) = bit.checked_rem(bits)
        && let Some(byte) = packet.get_mut((bit / 8) as usize)
    {
        *byte ^= 1 << (bit % 8);
    }
}

/// Whether the frame keeps the link itself going and is not a user's packet.
fn is_control(frame: &[u8]) -> bool {
    match frame.get(12..ETHERNET_HEADER) {
        Some([0x08, 0x00]) => false,
        // Hop-by-hop options first: multicast listener reports. ICMPv6 133 to 137: neighbour discovery.
        Some([0x86, 0xdd]) => match frame.get(ETHERNET_HEADER + 6) {
            Some(0) => true,
            Some(58) => matches!(frame.get(ETHERNET_HEADER + 40), Some(133..=137)),
            _ => false,
        },
        _ => true,
    }
}

/// `SplitMix64`: small, and good enough to draw lots.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        word ^ (word >> 31)
    }

    /// Evenly spread, at least 0 and below 1.
    #[expect(clippy::cast_precision_loss, reason = "53 bits fit exactly")]
    fn fraction(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(number: u32) -> Vec<u8> {
        let mut frame = vec![0; 54];
        frame[12] = 0x08;
        frame[50..].copy_from_slice(&number.to_be_bytes());
        frame
    }

    /// Sends `count` frames 0.1 ms apart and returns what comes out, with its time since the start.
    fn carry(settings: Impairment, count: u32) -> (Vec<(Duration, Vec<u8>)>, LinkCounters) {
        let start = Instant::now();
        let mut link = Impairer::new(settings, 0);
        let mut out = Vec::new();
        for number in 0..count {
            let now = start + Duration::from_micros(100) * number;
            while let Some(frame) = link.pop(now) {
                out.push((now - start, frame));
            }
            link.push(now, frame(number));
        }
        while let Some(due) = link.next_due() {
            let frame = link.pop(due).unwrap();
            out.push((due - start, frame));
        }
        (out, link.counters)
    }

    #[test]
    fn a_perfect_link_changes_nothing() {
        let (out, counters) = carry(Impairment::default(), 1000);
        assert!(out.iter().map(|(_, frame)| frame.clone()).eq((0..1000).map(frame)));
        assert_eq!((counters.packets, counters.bytes), (1000, 40_000));
    }

    #[test]
    fn counts_follow_the_probabilities_and_the_seed() {
        let settings = Impairment {
            loss: 0.1,
            duplicate: 0.05,
            reorder: 0.05,
            corrupt: 0.01,
            seed: 7,
            ..Default::default()
        };
        let (out, counters) = carry(settings, 20_000);
        let near = |count: u64, expected: u64| count.abs_diff(expected) < expected / 5;
        assert!(near(counters.lost, 2000), "{counters:?}");
        assert!(near(counters.duplicated, 855), "{counters:?}");
        assert!(near(counters.reordered, 900), "{counters:?}");
        assert!(near(counters.corrupted, 180), "{counters:?}");
        assert_eq!(out.len() as u64, 20_000 - counters.lost + counters.duplicated);
        assert_eq!(carry(settings, 20_000), (out, counters), "the same seed gives the same run");
        assert_ne!(carry(Impairment { seed: 8, ..settings }, 20_000).1, counters);
    }

    #[test]
    fn jitter_spreads_arrivals_but_keeps_the_order() {
        let ms = Duration::from_millis;
        let settings = Impairment { delay: ms(20), jitter: ms(5), ..Default::default() };
        let (out, _) = carry(settings, 1000);
        assert!(out.iter().map(|(_, frame)| frame.clone()).eq((0..1000).map(frame)));
        for (number, (at, _)) in (0..).zip(&out) {
            let took = at.saturating_sub(Duration::from_micros(100) * number);
            assert!(took >= ms(15) && took <= ms(26), "{took:?}");
        }
    }

    #[test]
    fn a_packet_held_back_is_overtaken() {
        let (out, counters) = carry(Impairment { reorder: 0.1, ..Default::default() }, 1000);
        let numbers: Vec<_> = out.iter().map(|(_, frame)| frame.clone()).collect();
        assert!(!numbers.is_sorted());
        assert_eq!((numbers.len(), counters.reordered > 50), (1000, true));
    }

    #[test]
    fn a_full_queue_drops_and_counts() {
        let settings = Impairment { delay: Duration::from_secs(1), queue: 10, ..Default::default() };
        let (out, counters) = carry(settings, 100);
        assert_eq!((out.len(), counters.queue_dropped), (10, 90));
    }

    #[test]
    fn arp_and_neighbour_discovery_are_spared() {
        let mut link = Impairer::new(Impairment { loss: 1.0, ..Default::default() }, 0);
        let mut arp = frame(0);
        arp[13] = 0x06;
        let mut solicitation = vec![0; 80];
        solicitation[12..14].copy_from_slice(&[0x86, 0xdd]);
        (solicitation[20], solicitation[54]) = (58, 135);
        let mut ping = solicitation.clone();
        ping[54] = 128;
        let now = Instant::now();
        for frame in [arp, solicitation, ping, vec![], vec![0; 13]] {
            link.push(now, frame);
        }
        assert_eq!((link.counters.control, link.counters.lost), (4, 1));
    }

    #[test]
    fn a_corrupted_packet_differs_in_one_bit_behind_the_ethernet_header() {
        let (out, _) = carry(Impairment { corrupt: 1.0, ..Default::default() }, 100);
        for (number, (_, changed)) in (0..).zip(&out) {
            let original = frame(number);
            let bits: u32 = changed.iter().zip(&original).map(|(a, b)| (a ^ b).count_ones()).sum();
            assert_eq!((bits, &changed[..14]), (1, &original[..14]));
        }
        corrupt(&mut [0; ETHERNET_HEADER], 5);
    }

    #[test]
    fn a_filter_may_change_and_drop() {
        let mut link = Impairer::new(Impairment::default(), 0);
        link.filter = Some(Box::new(|frame| {
            frame.push(9);
            if frame[53] == 1 { Verdict::Drop } else { Verdict::Pass }
        }));
        let now = Instant::now();
        assert_eq!(link.push(now, frame(0)), None);
        assert!(link.push(now, frame(1)).is_some());
        assert_eq!(link.pop(now).unwrap().len(), 55);
        assert_eq!((link.pop(now), link.counters.filtered), (None, 1));
    }

    #[test]
    fn impossible_probabilities_are_refused() {
        for loss in [-0.1, 1.1, f64::NAN] {
            assert!(Impairment { loss, ..Default::default() }.check().is_err());
        }
        assert!(Impairment { loss: 1.0, ..Default::default() }.check().is_ok());
    }
}
