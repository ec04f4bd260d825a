//! Address families, prefixes and port ranges, as files and journals write them.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both families.
    pub const BOTH: [Family; 2] = [Family::V4, Family::V6];

    /// The family of an address.
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Family::V4,
            IpAddr::V6(_) => Family::V6,
        }
    }

    /// Bits in an address: 32 or 128.
    pub const fn bits(self) -> u8 {
        match self {
            Family::V4 => 32,
            Family::V6 => 128,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        })
    }
}

/// A transport protocol with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// TCP, 6.
    #[default]
    Tcp,
    /// UDP, 17.
    Udp,
}

impl Transport {
    /// Its IP protocol number.
    pub const fn number(self) -> u8 {
        match self {
            Transport::Tcp => 6,
            Transport::Udp => 17,
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Transport::Tcp => "TCP",
            Transport::Udp => "UDP",
        })
    }
}

/// Why a text is no [`Prefix`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PrefixError {
    /// The part before `/` is no address.
    #[error("{0:?} is no IP address")]
    Address(String),
    /// The part after `/` is no length of that family.
    #[error("{length:?} is no prefix length of an {family} address")]
    Length {
        /// What was written.
        length: String,
        /// The address's family.
        family: Family,
    },
}

/// An address prefix, such as `203.0.113.10/32`; bits behind the length are zero. Written without the length, a
/// text means the one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Prefix {
    address: IpAddr,
    len: u8,
}

impl Prefix {
    /// The prefix of `len` bits around `address`; a longer `len` than the family's means the family's.
    pub fn new(address: IpAddr, len: u8) -> Self {
        let len = len.min(Family::of(address).bits());
        let address = match address {
            IpAddr::V4(v4) => {
                IpAddr::V4((v4.to_bits() & u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0)).into())
            }
            IpAddr::V6(v6) => {
                IpAddr::V6((v6.to_bits() & u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0)).into())
            }
        };
        Self { address, len }
    }

    /// The one address.
    pub fn host(address: IpAddr) -> Self {
        Self { address, len: Family::of(address).bits() }
    }

    /// All addresses of a family: the default route's destination.
    pub fn all(family: Family) -> Self {
        let address = match family {
            Family::V4 => IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
            Family::V6 => IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
        };
        Self { address, len: 0 }
    }

    /// The first address.
    pub const fn address(self) -> IpAddr {
        self.address
    }

    /// The length in bits.
    #[allow(clippy::len_without_is_empty)]
    pub const fn len(self) -> u8 {
        self.len
    }

    /// The family.
    pub const fn family(self) -> Family {
        Family::of(self.address)
    }

    /// Whether it is one address.
    pub const fn is_host(self) -> bool {
        self.len == self.family().bits()
    }

    /// Whether it holds `address`.
    pub fn contains(self, address: IpAddr) -> bool {
        self.family() == Family::of(address) && Prefix::new(address, self.len).address == self.address
    }

    /// Whether it holds all of `other`.
    pub fn covers(self, other: Prefix) -> bool {
        self.len <= other.len && self.contains(other.address)
    }
}

impl From<IpAddr> for Prefix {
    fn from(address: IpAddr) -> Self {
        Prefix::host(address)
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.len)
    }
}

impl FromStr for Prefix {
    type Err = PrefixError;

    fn from_str(text: &str) -> Result<Self, PrefixError> {
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| PrefixError::Address(address.to_owned()))?;
        let family = Family::of(address);
        match length {
            None => Ok(Prefix::host(address)),
            Some(length) => match length.parse::<u8>() {
                Ok(len) if len <= family.bits() => Ok(Prefix::new(address, len)),
                _ => Err(PrefixError::Length { length: length.to_owned(), family }),
            },
        }
    }
}

impl Serialize for Prefix {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Prefix {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// A range of ports, both ends included; `first <= last`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PortRange {
    first: u16,
    last: u16,
}

impl PortRange {
    /// The ports from `first` to `last`, whichever is lower.
    pub const fn new(first: u16, last: u16) -> Self {
        if first <= last { Self { first, last } } else { Self { first: last, last: first } }
    }

    /// The lowest port.
    pub const fn first(self) -> u16 {
        self.first
    }

    /// The highest port.
    pub const fn last(self) -> u16 {
        self.last
    }

    /// Whether a port is one of them.
    pub const fn contains(self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }

    /// The ports, from the lowest on.
    pub fn ports(self) -> std::ops::RangeInclusive<u16> {
        self.first..=self.last
    }

    /// Sorted ranges that neither overlap nor touch, of the same ports.
    pub fn merged(ranges: impl IntoIterator<Item = PortRange>) -> Vec<PortRange> {
        let mut sorted: Vec<PortRange> = ranges.into_iter().collect();
        sorted.sort_unstable();
        let mut merged: Vec<PortRange> = Vec::with_capacity(sorted.len());
        for range in sorted {
            match merged.last_mut() {
                Some(last) if u32::from(range.first) <= u32::from(last.last) + 1 => {
                    last.last = last.last.max(range.last);
                }
                _ => merged.push(range),
            }
        }
        merged
    }

    /// The ports of `ranges` that are not in `removed`, as [`PortRange::merged`].
    pub fn without(ranges: &[PortRange], removed: &[PortRange]) -> Vec<PortRange> {
        let mut left = PortRange::merged(ranges.iter().copied());
        for cut in removed {
            left = left.into_iter().flat_map(|range| range.minus(*cut)).collect();
        }
        left
    }

    fn minus(self, cut: PortRange) -> impl Iterator<Item = PortRange> {
        let apart = cut.last < self.first || self.last < cut.first;
        let below = (!apart && self.first < cut.first).then(|| PortRange::new(self.first, cut.first - 1));
        let above = (!apart && cut.last < self.last).then(|| PortRange::new(cut.last + 1, self.last));
        [apart.then_some(self), below, above].into_iter().flatten()
    }
}

impl From<u16> for PortRange {
    fn from(port: u16) -> Self {
        PortRange::new(port, port)
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_parse_and_print() {
        for (text, shown) in [
            ("203.0.113.10", "203.0.113.10/32"),
            ("10.1.2.3/8", "10.0.0.0/8"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("2001:db8::7/32", "2001:db8::/32"),
            ("::/0", "::/0"),
        ] {
            assert_eq!(text.parse::<Prefix>().unwrap().to_string(), shown);
        }
        assert_eq!(
            "10.0.0.0/33".parse::<Prefix>().unwrap_err().to_string(),
            "\"33\" is no prefix length of an IPv4 address"
        );
        assert!("10.0.0/8".parse::<Prefix>().is_err());
    }

    #[test]
    fn prefixes_cover_what_they_hold() {
        let net: Prefix = "10.0.0.0/8".parse().unwrap();
        assert!(net.contains("10.9.8.7".parse().unwrap()));
        assert!(!net.contains("11.0.0.0".parse().unwrap()));
        assert!(!Prefix::all(Family::V4).contains("::".parse().unwrap()));
        assert!(net.covers("10.2.0.0/16".parse().unwrap()));
        assert!(!net.covers(Prefix::all(Family::V4)));
    }

    #[test]
    fn port_ranges_merge_and_subtract() {
        let ranges = [PortRange::new(20, 10), PortRange::from(21), PortRange::new(65535, 65000), 30.into()];
        let merged = PortRange::merged(ranges);
        assert_eq!(merged, [PortRange::new(10, 21), 30.into(), PortRange::new(65000, 65535)]);
        let left = PortRange::without(&merged, &[PortRange::new(12, 30), PortRange::new(65000, 65535)]);
        assert_eq!(left, [PortRange::new(10, 11)]);
        assert_eq!(
            PortRange::without(&[PortRange::new(0, 65535)], &[5.into()]),
            [PortRange::new(0, 4), PortRange::new(6, 65535)]
        );
    }
}
