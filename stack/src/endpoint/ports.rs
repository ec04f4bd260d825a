//! Which own port a connection uses.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;

/// Own ports in use. One is used by one connection to a VIP at a time, whichever ports there: neither (port, X) nor
/// (port, Y) can then be another connection's (`C8`).
#[derive(Debug)]
pub(super) struct Ports {
    range: RangeInclusive<u16>,
    /// Where the next search begins (RFC 6056 §3.3.1 with a secret start).
    next: u16,
    used: HashSet<(SocketAddr, IpAddr)>,
}

impl Ports {
    /// `random` decides where the first search begins.
    pub(super) fn new(range: RangeInclusive<u16>, random: u64) -> Self {
        let size = u64::from(range.end().saturating_sub(*range.start())) + 1;
        let next = range.start().saturating_add((random % size) as u16);
        Ports { range, next, used: HashSet::new() }
    }

    /// Takes a port of `address` for a connection to `vip`; `None` if all are in use.
    pub(super) fn take(&mut self, address: IpAddr, vip: IpAddr) -> Option<SocketAddr> {
        for _ in self.range.clone() {
            let local = SocketAddr::new(address, self.next);
            self.next = if self.next >= *self.range.end() { *self.range.start() } else { self.next + 1 };
            if self.used.insert((local, vip)) {
                return Some(local);
            }
        }
        None
    }

    /// Takes `local` itself; false if it is out of range or in use.
    pub(super) fn take_exact(&mut self, local: SocketAddr, vip: IpAddr) -> bool {
        self.range.contains(&local.port()) && self.used.insert((local, vip))
    }

    /// How many are in use.
    pub(super) fn in_use(&self) -> usize {
        self.used.len()
    }

    /// Gives a port back.
    pub(super) fn release(&mut self, local: SocketAddr, vip: IpAddr) {
        self.used.remove(&(local, vip));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn c8_a_port_is_used_once_a_vip_until_it_is_released() {
        let own: IpAddr = "192.0.2.1".parse().unwrap();
        let (one, other): (IpAddr, IpAddr) = ("192.0.2.10".parse().unwrap(), "192.0.2.11".parse().unwrap());
        let mut ports = Ports::new(40_000..=40_002, 7);
        let taken: HashSet<_> = (0..3).map(|_| ports.take(own, one).unwrap()).collect();
        assert_eq!(taken.len(), 3);
        assert_eq!(ports.take(own, one), None);
        assert!(ports.take(own, other).is_some());
        let back = *taken.iter().next().unwrap();
        ports.release(back, one);
        assert_eq!(ports.take(own, one), Some(back));
    }

    #[test]
    fn a_range_that_ends_at_the_last_port_wraps_to_its_beginning() {
        let own: IpAddr = "192.0.2.1".parse().unwrap();
        let mut ports = Ports::new(65_534..=65_535, u64::MAX);
        assert_eq!(ports.take(own, own).unwrap().port(), 65_535);
        assert_eq!(ports.take(own, own).unwrap().port(), 65_534);
        assert_eq!(ports.take(own, own), None);
    }
}
