//! Checked views of packets and the redirect option: parse once at the border, accessors cannot fail afterwards.
//!
//! One file a header. Nothing here decides where a packet goes or remembers anything; what it changes keeps every
//! checksum as right, or as wrong, as it was.

pub mod checksum;
mod error;
mod gso;
#[cfg(test)]
mod gso_tests;
pub mod gue;
mod icmp;
mod ip;
mod option;
mod packet;
mod rewrite;
mod segment;
mod seq;
mod tcp;
mod tcp_option;
#[cfg(test)]
mod tests;
mod too_big;
mod vnet;

pub use error::{OptionError, ParseError, Rejected};
pub use icmp::{IcmpView, Quoted};
pub use ip::{Fragment, Protocol, Version};
pub use option::{DEFAULT_EXID, RedirectOption, observed_digest};
pub use packet::{Gso, GsoKind, Offload, Packet};
pub use rewrite::{HostAddresses, NoRoom};
pub use segment::{Segment, icmp_message};
pub use seq::SeqNumber;
pub use tcp::{TcpFlags, TcpView};
pub use tcp_option::{TcpOption, TcpOptions};
pub use too_big::too_big;
pub use vnet::{VNET_LEN, VnetError, read_vnet, write_vnet};
