//! The options of a TCP header, one after the other.

use super::error::OptionError;
use super::option::KIND;

/// One TCP option; the kinds named are those some rule asks about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TcpOption<'a> {
    /// Kind 1.
    NoOperation,
    /// Kind 2 (RFC 9293).
    MaximumSegmentSize(u16),
    /// Kind 3 (RFC 7323).
    WindowScale(u8),
    /// Kind 4 (RFC 2018).
    SackPermitted,
    /// Kind 8 (RFC 7323).
    Timestamps {
        /// `TSval`.
        value: u32,
        /// `TSecr`.
        echo: u32,
    },
    /// Kind 19 (RFC 2385).
    Md5Signature,
    /// Kind 29 (RFC 5925).
    Authentication,
    /// Kind 30 (RFC 8684).
    Multipath,
    /// Kind 34 (RFC 7413): the cookie, empty for a request.
    FastOpen(&'a [u8]),
    /// Kind 253 with an experiment identifier (RFC 6994): the whole option, kind and length included.
    Experiment {
        /// The 16-bit experiment identifier.
        exid: u16,
        /// The option's bytes.
        bytes: &'a [u8],
    },
    /// Any other: the whole option.
    Other(&'a [u8]),
}

/// Iterates over the options; ends after the first malformed one.
#[derive(Debug, Clone)]
pub struct TcpOptions<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> TcpOptions<'a> {
    /// Over the bytes between the fixed header and the payload.
    pub fn new(bytes: &'a [u8]) -> Self {
        TcpOptions { bytes, at: 0 }
    }

    /// The offset of the next option within the option bytes.
    pub(super) fn offset(&self) -> usize {
        self.at
    }

    fn fail(&mut self) -> OptionError {
        self.at = self.bytes.len();
        OptionError::Malformed
    }
}

impl<'a> Iterator for TcpOptions<'a> {
    type Item = Result<TcpOption<'a>, OptionError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let rest = self.bytes.get(self.at..)?;
        let length = match rest {
            [] | [0, ..] => {
                self.at = self.bytes.len();
                return None;
            }
            [1, ..] => {
                self.at += 1;
                return Some(Ok(TcpOption::NoOperation));
            }
            [_, length, ..] if *length >= 2 && usize::from(*length) <= rest.len() => usize::from(*length),
            _ => return Some(Err(self.fail())),
        };
        self.at += length;
        Some(Ok(classify(&rest[..length])))
    }
}

#[inline]
fn classify(option: &[u8]) -> TcpOption<'_> {
    match *option {
        [2, 4, a, b] => TcpOption::MaximumSegmentSize(u16::from_be_bytes([a, b])),
        [3, 3, shift] => TcpOption::WindowScale(shift),
        [4, 2] => TcpOption::SackPermitted,
        [8, 10, a, b, c, d, e, f, g, h] => TcpOption::Timestamps {
            value: u32::from_be_bytes([a, b, c, d]),
            echo: u32::from_be_bytes([e, f, g, h]),
        },
        [19, ..] => TcpOption::Md5Signature,
        [29, ..] => TcpOption::Authentication,
        [30, ..] => TcpOption::Multipath,
        [34, _, ref cookie @ ..] => TcpOption::FastOpen(cookie),
        [KIND, _, a, b, ..] => TcpOption::Experiment { exid: u16::from_be_bytes([a, b]), bytes: option },
        _ => TcpOption::Other(option),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_options_of_a_linux_syn() {
        let bytes = [2, 4, 5, 0xb4, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 3, 7];
        let options: Result<Vec<_>, _> = TcpOptions::new(&bytes).collect();
        assert_eq!(
            options.unwrap(),
            [
                TcpOption::MaximumSegmentSize(1460),
                TcpOption::SackPermitted,
                TcpOption::Timestamps { value: 1, echo: 0 },
                TcpOption::NoOperation,
                TcpOption::WindowScale(7)
            ]
        );
    }

    #[test]
    fn stops_at_a_zero_length_a_truncation_and_the_end() {
        for bad in [&[5u8, 0, 1, 1][..], &[5, 9, 1, 1], &[5]] {
            let mut options = TcpOptions::new(bad);
            assert_eq!(options.next(), Some(Err(OptionError::Malformed)));
            assert_eq!(options.next(), None);
        }
        assert_eq!(TcpOptions::new(&[0, 5, 0]).next(), None);
    }
}
