//! Something by address, protocol and port: sorted, and searched as numbers are, without a hash.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Address, protocol and port; 0 for a protocol or port that does not matter.
pub(crate) type Key = (IpAddr, u8, u16);

/// Values by their keys.
#[derive(Debug)]
pub(crate) struct Places<T> {
    /// By address, protocol and port, from the highest bit on.
    v4: Box<[(u64, T)]>,
    v6: Box<[((u128, u32), T)]>,
}

impl<T> Places<T> {
    /// Of several values for one key, the first stays.
    pub(crate) fn new(values: impl IntoIterator<Item = (Key, T)>) -> Places<T> {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for ((address, protocol, port), value) in values {
            match address {
                IpAddr::V4(address) => v4.push((key_v4(address, protocol, port), value)),
                IpAddr::V6(address) => v6.push((key_v6(address, protocol, port), value)),
            }
        }
        v4.sort_by_key(|(key, _)| *key);
        v4.dedup_by_key(|(key, _)| *key);
        v6.sort_by_key(|(key, _)| *key);
        v6.dedup_by_key(|(key, _)| *key);
        Places { v4: v4.into(), v6: v6.into() }
    }

    /// The value of a key.
    #[inline]
    pub(crate) fn get(&self, address: IpAddr, protocol: u8, port: u16) -> Option<&T> {
        match address {
            IpAddr::V4(address) => {
                let key = key_v4(address, protocol, port);
                let place = self.v4.binary_search_by_key(&key, |(key, _)| *key).ok()?;
                Some(&self.v4[place].1)
            }
            IpAddr::V6(address) => self.get_v6(key_v6(address, protocol, port)),
        }
    }

    #[inline]
    fn get_v6(&self, key: (u128, u32)) -> Option<&T> {
        let place = self.v6.binary_search_by_key(&key, |(key, _)| *key).ok()?;
        Some(&self.v6[place].1)
    }

    /// All of them.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Key, &T)> {
        let v4 = self.v4.iter().map(|(key, value)| {
            let (protocol, port) = end((key & 0xff_ffff) as u32);
            ((Ipv4Addr::from_bits((key >> 24) as u32).into(), protocol, port), value)
        });
        let v6 = self.v6.iter().map(|((address, key), value)| {
            let (protocol, port) = end(*key);
            ((Ipv6Addr::from_bits(*address).into(), protocol, port), value)
        });
        v4.chain(v6)
    }
}

#[inline]
fn key_v4(address: Ipv4Addr, protocol: u8, port: u16) -> u64 {
    u64::from(address.to_bits()) << 24 | u64::from(protocol) << 16 | u64::from(port)
}

#[inline]
fn key_v6(address: Ipv6Addr, protocol: u8, port: u16) -> (u128, u32) {
    (address.to_bits(), u32::from(protocol) << 16 | u32::from(port))
}

/// Protocol and port of the low 24 bits of a key.
fn end(key: u32) -> (u8, u16) {
    ((key >> 16) as u8, key as u16)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// Few of each, so that many keys share a part; 0 and the highest among them.
    fn key() -> impl Strategy<Value = Key> {
        let octet = || prop_oneof![Just(0u8), Just(1), Just(255)];
        let address = prop_oneof![
            [octet(), octet(), octet(), octet()].prop_map(IpAddr::from),
            [octet(), octet()].prop_map(|[high, low]| {
                let mut octets = [0; 16];
                (octets[0], octets[15]) = (high, low);
                IpAddr::from(octets)
            }),
        ];
        (address, octet(), prop_oneof![Just(0u16), Just(443), Just(u16::MAX)])
    }

    proptest! {
        #[test]
        fn every_key_has_its_first_value_and_no_other_has_any(
            keys in proptest::collection::vec(key(), 0..60),
            others in proptest::collection::vec(key(), 60),
        ) {
            let places = Places::new(keys.iter().copied().zip(0..));
            let first = |key: &Key| keys.iter().position(|known| known == key);
            for key in keys.iter().chain(&others) {
                prop_assert_eq!(places.get(key.0, key.1, key.2).copied(), first(key));
            }
            let all: BTreeMap<Key, usize> = places.iter().map(|(key, value)| (key, *value)).collect();
            let wanted: BTreeMap<Key, usize> = keys.iter().map(|key| (*key, first(key).unwrap())).collect();
            prop_assert_eq!(places.iter().count(), all.len());
            prop_assert_eq!(all, wanted);
        }
    }
}
