//! One direction of a link: what may happen to packets on their way.

use std::time::Duration;

use bytes::BytesMut;
use fastrand::Rng;
use serde::Serialize;
use shunt_stack::time::Instant;

/// What a direction of a link does to packets. Chances are of 10,000.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Quality {
    /// Packets lost.
    pub loss: u16,
    /// Packets that come twice.
    pub twice: u16,
    /// Packets that others overtake, by up to `late_by`.
    pub late: u16,
    /// How late those may be.
    pub late_by: Duration,
    /// Packets of which one byte changes: never so that a checksum could miss it.
    pub damage: u16,
    /// How long every packet takes.
    pub delay: Duration,
    /// How much longer it may take; the order stays.
    pub jitter: Duration,
    /// Bytes a second; 0: no limit.
    pub rate: u64,
    /// Bytes that may wait for the link; what finds more waiting is dropped.
    pub queue: u64,
}

impl Quality {
    /// A link that loses nothing and takes `delay`.
    pub const fn clean(delay: Duration) -> Quality {
        Quality {
            loss: 0,
            twice: 0,
            late: 0,
            late_by: Duration::ZERO,
            damage: 0,
            delay,
            jitter: Duration::ZERO,
            rate: 0,
            queue: u64::MAX,
        }
    }
}

/// One direction of a link and what is under way on it.
#[derive(Debug)]
pub(super) struct Link {
    quality: Quality,
    rng: Rng,
    /// When what was sent so far has left the sender.
    busy_until: Instant,
    /// When the latest packet in order arrives.
    latest: Instant,
}

/// A packet that arrives, and when.
pub(super) type Arrival = (Instant, BytesMut);

impl Link {
    pub(super) fn new(quality: Quality, rng: Rng) -> Link {
        Link { quality, rng, busy_until: Instant::ZERO, latest: Instant::ZERO }
    }

    fn chance(&mut self, of_ten_thousand: u16) -> bool {
        of_ten_thousand > 0 && self.rng.u16(0..10_000) < of_ten_thousand
    }

    fn up_to(&mut self, most: Duration) -> Duration {
        let most = u64::try_from(most.as_micros()).unwrap_or(u64::MAX - 1);
        Duration::from_micros(self.rng.u64(0..=most))
    }

    /// Sends a packet: it arrives never, once or twice.
    pub(super) fn send(&mut self, now: Instant, mut packet: BytesMut) -> [Option<Arrival>; 2] {
        let Some(left) = self.leaves(now, packet.len()) else { return [None, None] };
        if self.chance(self.quality.loss) {
            return [None, None];
        }
        let copy = self.chance(self.quality.twice).then(|| packet.clone());
        if self.chance(self.quality.damage) {
            let at = self.rng.usize(0..packet.len());
            packet[at] ^= self.rng.u8(1..);
        }
        let first = (self.arrives(left), packet);
        let second = copy.map(|copy| (self.arrives(left), copy));
        [Some(first), second]
    }

    /// When a packet has left the sender; `None` if there is no room for it.
    fn leaves(&mut self, now: Instant, length: usize) -> Option<Instant> {
        if self.quality.rate == 0 {
            return Some(now);
        }
        let waiting = self.busy_until.since(now).as_micros() * u128::from(self.quality.rate) / 1_000_000;
        if waiting > u128::from(self.quality.queue) {
            return None;
        }
        let takes = Duration::from_micros(length as u64 * 1_000_000 / self.quality.rate);
        self.busy_until = self.busy_until.max(now) + takes;
        Some(self.busy_until)
    }

    fn arrives(&mut self, left: Instant) -> Instant {
        let in_time = left + self.quality.delay;
        if self.chance(self.quality.late) {
            return in_time + self.up_to(self.quality.late_by);
        }
        let at = (in_time + self.up_to(self.quality.jitter)).max(self.latest);
        self.latest = at;
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrivals(quality: Quality, packets: u64) -> Vec<Arrival> {
        let mut link = Link::new(quality, Rng::with_seed(1));
        let packet = |n: u64| BytesMut::from(&n.to_be_bytes()[..]);
        (0..packets).flat_map(|n| link.send(Instant::from_millis(n), packet(n))).flatten().collect()
    }

    fn number(packet: &BytesMut) -> u64 {
        u64::from_be_bytes(packet[..].try_into().unwrap())
    }

    #[test]
    fn a_clean_link_only_takes_its_time() {
        let came = arrivals(Quality::clean(Duration::from_millis(7)), 100);
        assert_eq!(came.len(), 100);
        for (n, (at, packet)) in came.iter().enumerate() {
            assert_eq!((*at, number(packet)), (Instant::from_millis(n as u64 + 7), n as u64));
        }
    }

    #[test]
    fn jitter_keeps_the_order_and_lateness_does_not() {
        let clean = Quality::clean(Duration::from_millis(7));
        let jitter = arrivals(Quality { jitter: Duration::from_millis(50), ..clean }, 500);
        assert!(jitter.is_sorted_by_key(|(at, _)| *at));
        assert!(jitter.iter().enumerate().any(|(n, (at, _))| *at > Instant::from_millis(n as u64 + 30)));
        let late = arrivals(Quality { late: 1000, late_by: Duration::from_millis(50), ..clean }, 500);
        assert!(late.len() == 500 && !late.is_sorted_by_key(|(at, _)| *at));
    }

    #[test]
    fn loss_duplicates_and_damage_come_as_often_as_they_shall() {
        let clean = Quality::clean(Duration::ZERO);
        let count = |quality| arrivals(quality, 10_000).len();
        assert!((6_700..=7_300).contains(&count(Quality { loss: 3_000, ..clean })));
        assert!((11_800..=12_200).contains(&count(Quality { twice: 2_000, ..clean })));
        let damaged = arrivals(Quality { damage: 2_000, ..clean }, 10_000);
        let wrong = damaged.iter().enumerate().filter(|(n, (_, packet))| number(packet) != *n as u64).count();
        assert!(damaged.len() == 10_000 && (1_800..=2_200).contains(&wrong), "{wrong}");
    }

    #[test]
    fn a_full_queue_drops() {
        let slow = Quality { rate: 8_000, queue: 80, ..Quality::clean(Duration::ZERO) };
        let mut link = Link::new(slow, Rng::with_seed(1));
        let packets = (0..100).filter(|_| link.send(Instant::ZERO, BytesMut::zeroed(8))[0].is_some());
        assert_eq!(packets.count(), 11);
        // A byte takes an eighth of a millisecond.
        let [Some((at, _)), None] = link.send(Instant::from_millis(20), BytesMut::zeroed(8)) else {
            panic!()
        };
        assert_eq!(at, Instant::from_millis(21));
    }
}
