//! The redirect option: `REDIRECT` (R), `REDIRECT_CONFIRM` (C) and `REDIRECT_OPT` (P) in one TCP option (PROTOCOL.md §2).

use std::hash::Hasher;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use siphasher::sip::SipHasher24;

use super::error::OptionError;

/// The experiment identifier (RFC 6994) used unless a deployment configures another one.
pub const DEFAULT_EXID: u16 = 0x5244;
/// RFC 6994: the first shared experimental option kind.
pub(super) const KIND: u8 = 253;

const FIXED_LEN: usize = 8;
/// The longest option: fixed part, observed digest, IPv6 address, token.
pub(super) const MAX_LEN: usize = FIXED_LEN + 2 + 16 + 8;

const R: u8 = 0x01;
const C: u8 = 0x02;
const P: u8 = 0x04;
const T: u8 = 0x08;
const A: u8 = 0x10;
const M: u8 = 0x20;
const VERSION_SHIFT: u8 = 6;
const O: u8 = 0x08;
const HOPS: u8 = 0x07;

/// The values of one redirect option. No sequence number is among them (`W5`): middleboxes rewrite those.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct RedirectOption {
    /// R: REDIRECT.
    pub redirect: bool,
    /// C: `REDIRECT_CONFIRM`.
    pub confirm: bool,
    /// P: the port of `REDIRECT_OPT`, never 0.
    pub port: Option<u16>,
    /// Redirects followed so far in this connect, 0 to 7.
    pub hops: u8,
    /// O: the digest of the client's address and port as the server saw them, see [`observed_digest`].
    pub observed: Option<u16>,
    /// A: an address to go to (§7).
    pub address: Option<IpAddr>,
    /// T: a token (§10).
    pub token: Option<[u8; 8]>,
}

impl RedirectOption {
    /// Bytes of the option, without padding.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        let address = match self.address {
            None => 0,
            Some(IpAddr::V4(_)) => 4,
            Some(IpAddr::V6(_)) => 16,
        };
        FIXED_LEN + usize::from(self.observed.is_some()) * 2 + address + usize::from(self.token.is_some()) * 8
    }

    /// Bytes it takes in a segment: [`len`](Self::len) padded to a multiple of 4.
    pub fn padded_len(&self) -> usize {
        self.len().next_multiple_of(4)
    }

    /// Reads a whole option, kind and length bytes included.
    ///
    /// # Errors
    /// What rule `W1` lists: wrong length, version, reserved bits (M among them), P without a port.
    pub fn parse(option: &[u8]) -> Result<Self, OptionError> {
        let length = || OptionError::Length(u8::try_from(option.len()).unwrap_or(u8::MAX));
        let (fixed, mut rest) = option.split_first_chunk::<FIXED_LEN>().ok_or_else(length)?;
        let [_, announced, _, _, flags, more, port_high, port_low] = *fixed;
        if usize::from(announced) != option.len() {
            return Err(OptionError::Length(announced));
        }
        if flags >> VERSION_SHIFT != 0 {
            return Err(OptionError::Version(flags >> VERSION_SHIFT));
        }
        if flags & M != 0 {
            return Err(OptionError::Reserved(flags & M));
        }
        if more & !(O | HOPS) != 0 {
            return Err(OptionError::Reserved(more & !(O | HOPS)));
        }
        let port = u16::from_be_bytes([port_high, port_low]);
        if (flags & P != 0) != (port != 0) {
            return Err(OptionError::Port);
        }
        let mut observed = None;
        if more & O != 0 {
            let (digest, tail) = rest.split_first_chunk::<2>().ok_or_else(length)?;
            observed = Some(u16::from_be_bytes(*digest));
            rest = tail;
        }
        let mut token = None;
        if flags & T != 0 {
            let (head, bytes) = rest.split_last_chunk::<8>().ok_or_else(length)?;
            token = Some(*bytes);
            rest = head;
        }
        let address = match (flags & A != 0, rest.len()) {
            (false, 0) => None,
            (true, 4) => rest.first_chunk::<4>().map(|a| IpAddr::V4(Ipv4Addr::from(*a))),
            (true, 16) => rest.first_chunk::<16>().map(|a| IpAddr::V6(Ipv6Addr::from(*a))),
            _ => return Err(length()),
        };
        Ok(RedirectOption {
            redirect: flags & R != 0,
            confirm: flags & C != 0,
            port: (port != 0).then_some(port),
            hops: more & HOPS,
            observed,
            address,
            token,
        })
    }

    /// Writes the option behind no-operation padding into `out`; returns the bytes used, [`padded_len`](Self::padded_len).
    pub fn emit(&self, exid: u16, out: &mut [u8; MAX_LEN + 2]) -> usize {
        let padding = self.padded_len() - self.len();
        out[..padding].fill(1);
        let mut at = padding;
        let mut put = |bytes: &[u8]| {
            out[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        let bit = |on: bool, bit: u8| if on { bit } else { 0 };
        let port = self.port.unwrap_or(0);
        let flags = bit(self.redirect, R)
            | bit(self.confirm, C)
            | bit(port != 0, P)
            | bit(self.token.is_some(), T)
            | bit(self.address.is_some(), A);
        put(&[KIND, self.len() as u8]);
        put(&exid.to_be_bytes());
        put(&[flags, bit(self.observed.is_some(), O) | (self.hops & HOPS)]);
        put(&port.to_be_bytes());
        if let Some(digest) = self.observed {
            put(&digest.to_be_bytes());
        }
        match self.address {
            Some(IpAddr::V4(address)) => put(&address.octets()),
            Some(IpAddr::V6(address)) => put(&address.octets()),
            None => {}
        }
        if let Some(token) = self.token {
            put(&token);
        }
        at
    }
}

/// The digest O over a client's address and port, as whoever calls sees them: the low 16 bits of SipHash-2-4 under an
/// all-zero key. (A one's complement sum would be blind to translations that permute words, 10.1.0.2 to 10.2.0.1.)
pub fn observed_digest(client: SocketAddr) -> u16 {
    let mut hasher = SipHasher24::new();
    match client.ip() {
        IpAddr::V4(address) => hasher.write(&address.octets()),
        IpAddr::V6(address) => hasher.write(&address.octets()),
    }
    hasher.write(&client.port().to_be_bytes());
    hasher.finish() as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_option() -> impl Strategy<Value = RedirectOption> {
        (
            any::<(bool, bool)>(),
            proptest::option::of(1u16..),
            0u8..8,
            proptest::option::of(any::<u16>()),
            proptest::option::of(any::<IpAddr>()),
            proptest::option::of(any::<[u8; 8]>()),
        )
            .prop_map(|((redirect, confirm), port, hops, observed, address, token)| RedirectOption {
                redirect,
                confirm,
                port,
                hops,
                observed,
                address,
                token,
            })
    }

    fn emitted(option: &RedirectOption) -> Vec<u8> {
        let mut out = [0; MAX_LEN + 2];
        let used = option.emit(DEFAULT_EXID, &mut out);
        out[used - option.len()..used].to_vec()
    }

    proptest! {
        #[test]
        fn parse_reads_what_emit_wrote(option in any_option()) {
            prop_assert_eq!(RedirectOption::parse(&emitted(&option)), Ok(option));
        }

        #[test]
        fn emit_writes_what_parse_read(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let mut bytes = bytes;
            if bytes.len() >= 4 {
                bytes[0] = KIND;
                bytes[1] = bytes.len() as u8;
                bytes[2..4].copy_from_slice(&DEFAULT_EXID.to_be_bytes());
            }
            if let Ok(option) = RedirectOption::parse(&bytes) {
                prop_assert_eq!(emitted(&option), bytes);
            }
        }
    }

    #[test]
    fn the_digest_tells_addresses_with_the_same_sum_apart() {
        let digest = |socket: &str| observed_digest(socket.parse().unwrap());
        assert_ne!(digest("10.1.0.2:50000"), digest("10.2.0.1:50000"));
        assert_ne!(digest("10.1.0.2:50000"), digest("10.1.0.2:50001"));
        assert_eq!(digest("192.0.2.1:443"), 44_960);
    }

    #[test]
    fn w1_refuses_each_kind_of_bad_option() {
        let good = emitted(&RedirectOption { redirect: true, port: Some(41001), ..Default::default() });
        let with = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            RedirectOption::parse(&bytes)
        };
        assert_eq!(with(1, 9), Err(OptionError::Length(9)));
        assert_eq!(with(4, 0x45), Err(OptionError::Version(1)));
        assert_eq!(with(4, 0x25), Err(OptionError::Reserved(0x20)));
        assert_eq!(with(5, 0x80), Err(OptionError::Reserved(0x80)));
        assert_eq!(with(4, 0x01), Err(OptionError::Port));
        assert_eq!(with(4, 0x0d), Err(OptionError::Length(8)));
        assert_eq!(RedirectOption::parse(&good[..7]), Err(OptionError::Length(7)));
        assert_eq!(RedirectOption::parse(&[]), Err(OptionError::Length(0)));
    }
}
