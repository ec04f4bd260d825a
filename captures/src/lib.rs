//! Captures: read, replayed through the project's own code, and drawn.
//!
//! [`Reader`] reads pcap and pcapng in bounded memory; [`Frame`] makes packets of records; [`Replay`] hands them to a
//! [`Role`] (the balancer's routing, the client's or the server's machine, or none) in the capture's own time; a [`Row`]
//! says what was decided and why. Nothing here decides about a packet itself, and no clock is read.

pub mod describe;
mod diff;
mod explain;
mod frame;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
pub mod golden;
mod ladder;
mod learn;
mod link;
mod read;
mod replay;
mod role;
mod row;
mod rules;
mod svg;
mod track;
mod write;

pub use describe::Summary;
pub use diff::Comparison;
pub use frame::{Frame, FrameError};
pub use ladder::Ladder;
pub use learn::Learned;
pub use link::{LinkError, ip_offset};
pub use read::{MAX_CAPTURED, OpenError, Reader, Record, Trouble, What};
pub use replay::{Replay, Tally};
pub use role::Role;
pub use row::{Decision, Row, Sent};
pub use rules::{Violation, violations};
pub use track::Sequence;
pub use write::SentWriter;
