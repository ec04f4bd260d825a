//! Why bytes were not accepted. Small, `Copy`, and carrying the offending values.

use bytes::BytesMut;
use thiserror::Error;

/// Why a packet is not one we can read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Error)]
pub enum ParseError {
    /// The buffer ends before the header or the length it announces.
    #[error("truncated: needs {need} bytes, has {have}")]
    Truncated {
        /// Bytes that the header asks for.
        need: usize,
        /// Bytes that are there.
        have: usize,
    },
    /// The first nibble is neither 4 nor 6.
    #[error("IP version {0}")]
    Version(u8),
    /// A header length field below its minimum or beyond the packet.
    #[error("header length {0}")]
    HeaderLength(usize),
    /// More IPv6 extension headers than are walked.
    #[error("more than {0} extension headers")]
    ExtensionHeaders(usize),
    /// A source route that still has addresses to visit (RFC 5095 deprecates it; the pseudo-header would be another).
    #[error("source route with {0} segments left")]
    SourceRoute(u8),
    /// A first fragment too short for the ports it must carry (RFC 1858).
    #[error("first fragment with {0} bytes of transport header")]
    TinyFragment(usize),
    /// A fragment that reaches beyond 65,535 bytes.
    #[error("fragment ends at byte {0}")]
    FragmentRange(usize),
    /// The device's checksum or segmentation request does not fit the packet.
    #[error("offload request does not fit the packet")]
    Offload,
}

/// A buffer that is not a packet, given back so that it can be used again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejected {
    /// Why.
    pub error: ParseError,
    /// The buffer as it came.
    pub buffer: BytesMut,
}

/// Why a redirect option is ignored; the segment that carries it is not dropped (`W1`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Error)]
pub enum OptionError {
    /// The length does not follow from the flags.
    #[error("option length {0} does not fit its flags")]
    Length(u8),
    /// A version other than 0.
    #[error("option version {0}")]
    Version(u8),
    /// Reserved bits are set.
    #[error("reserved bits {0:#04x}")]
    Reserved(u8),
    /// P without a port, or a port without P.
    #[error("port flag and port field disagree")]
    Port,
    /// The option stands more than once in the segment.
    #[error("option repeated")]
    Duplicate,
    /// The list of options ends inside one.
    #[error("malformed option list")]
    Malformed,
}
