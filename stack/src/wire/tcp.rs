//! The TCP header (RFC 9293 §3.1).

use std::fmt;
use std::ops::BitOr;

use super::error::OptionError;
use super::option::RedirectOption;
use super::seq::SeqNumber;
use super::tcp_option::{TcpOption, TcpOptions};

/// Length of the header without options.
pub(super) const FIXED_LEN: usize = 20;
/// Length of the longest header.
pub(super) const MAX_LEN: usize = 60;

/// The control bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct TcpFlags(pub u8);

impl TcpFlags {
    /// No more data from the sender.
    pub const FIN: TcpFlags = TcpFlags(0x01);
    /// Synchronise sequence numbers.
    pub const SYN: TcpFlags = TcpFlags(0x02);
    /// Reset the connection.
    pub const RST: TcpFlags = TcpFlags(0x04);
    /// Push.
    pub const PSH: TcpFlags = TcpFlags(0x08);
    /// The acknowledgement field is valid.
    pub const ACK: TcpFlags = TcpFlags(0x10);

    /// Whether all bits of `other` are set.
    #[inline]
    pub fn contains(self, other: TcpFlags) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether any bit of `other` is set.
    #[inline]
    pub fn intersects(self, other: TcpFlags) -> bool {
        self.0 & other.0 != 0
    }
}

impl BitOr for TcpFlags {
    type Output = TcpFlags;

    #[inline]
    fn bitor(self, rhs: TcpFlags) -> TcpFlags {
        TcpFlags(self.0 | rhs.0)
    }
}

impl fmt::Debug for TcpFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (bit, letter) in [
            (0x02, 'S'),
            (0x10, 'A'),
            (0x01, 'F'),
            (0x04, 'R'),
            (0x08, 'P'),
            (0x20, 'U'),
            (0x40, 'E'),
            (0x80, 'W'),
        ] {
            if self.0 & bit != 0 {
                write!(f, "{letter}")?;
            }
        }
        Ok(())
    }
}

/// A TCP segment within a packet that was checked.
#[derive(Debug, Clone, Copy)]
pub struct TcpView<'a>(&'a [u8]);

impl<'a> TcpView<'a> {
    /// `segment` is as long as its header says, and that is 20 bytes at least: the packet's check has seen to it.
    #[inline]
    pub(super) fn new(segment: &'a [u8]) -> Self {
        // Said once, so that accessors need not look.
        assert!(segment.len() >= FIXED_LEN, "the packet was checked");
        let view = TcpView(segment);
        debug_assert!((FIXED_LEN..=segment.len()).contains(&view.header_len()));
        view
    }

    #[inline]
    fn word(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.0[at], self.0[at + 1]])
    }

    #[inline]
    fn double(&self, at: usize) -> u32 {
        u32::from(self.word(at)) << 16 | u32::from(self.word(at + 2))
    }

    /// Source port.
    #[inline]
    pub fn source_port(&self) -> u16 {
        self.word(0)
    }

    /// Destination port.
    #[inline]
    pub fn destination_port(&self) -> u16 {
        self.word(2)
    }

    /// SEG.SEQ.
    #[inline]
    pub fn seq(&self) -> SeqNumber {
        SeqNumber(self.double(4))
    }

    /// SEG.ACK; means nothing without the ACK flag.
    #[inline]
    pub fn ack(&self) -> SeqNumber {
        SeqNumber(self.double(8))
    }

    /// The control bits.
    #[inline]
    pub fn flags(&self) -> TcpFlags {
        TcpFlags(self.0[13])
    }

    /// Whether it is a SYN without ACK: a connection request.
    #[inline]
    pub fn is_syn(&self) -> bool {
        self.flags().contains(TcpFlags::SYN)
            && !self.flags().intersects(TcpFlags::ACK | TcpFlags::RST | TcpFlags::FIN)
    }

    /// Whether it is a SYN with ACK and without RST.
    #[inline]
    pub fn is_syn_ack(&self) -> bool {
        self.flags().contains(TcpFlags::SYN | TcpFlags::ACK)
            && !self.flags().intersects(TcpFlags::RST | TcpFlags::FIN)
    }

    /// SEG.WND, not scaled.
    pub fn window(&self) -> u16 {
        self.word(14)
    }

    /// Bytes of header, options included.
    #[inline]
    pub fn header_len(&self) -> usize {
        usize::from(self.0[12] >> 4) * 4
    }

    /// The option bytes.
    #[inline]
    pub fn option_bytes(&self) -> &'a [u8] {
        &self.0[FIXED_LEN..self.header_len()]
    }

    /// The options in order.
    #[inline]
    pub fn options(&self) -> TcpOptions<'a> {
        TcpOptions::new(self.option_bytes())
    }

    /// The payload.
    #[inline]
    pub fn payload(&self) -> &'a [u8] {
        &self.0[self.header_len()..]
    }

    /// SEG.LEN: sequence numbers occupied, SYN and FIN included.
    pub fn sequence_len(&self) -> u32 {
        let control =
            u32::from(self.flags().contains(TcpFlags::SYN)) + u32::from(self.flags().contains(TcpFlags::FIN));
        u32::try_from(self.payload().len()).unwrap_or(u32::MAX).wrapping_add(control)
    }

    /// The maximum segment size option.
    pub fn max_segment_size(&self) -> Option<u16> {
        self.options().flatten().find_map(|option| match option {
            TcpOption::MaximumSegmentSize(size) => Some(size),
            _ => None,
        })
    }

    /// The timestamps option (RFC 7323) as (`TSval`, `TSecr`).
    pub fn timestamps(&self) -> Option<(u32, u32)> {
        self.options().flatten().find_map(|option| match option {
            TcpOption::Timestamps { value, echo } => Some((value, echo)),
            _ => None,
        })
    }

    /// The redirect option under experiment identifier `exid`.
    ///
    /// # Errors
    /// What `W1` says to ignore and count: malformed, or more than one.
    pub fn redirect(&self, exid: u16) -> Result<Option<RedirectOption>, OptionError> {
        let mut found = None;
        for option in self.options() {
            match option {
                Ok(TcpOption::Experiment { exid: id, bytes }) if id == exid => {
                    if found.is_some() {
                        return Err(OptionError::Duplicate);
                    }
                    found = Some(RedirectOption::parse(bytes)?);
                }
                Ok(_) => {}
                Err(error) => return if found.is_some() { Err(error) } else { Ok(None) },
            }
        }
        Ok(found)
    }
}
