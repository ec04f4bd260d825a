//! The bodies of the fuzz targets in `fuzz/`, here so that `cargo test` replays every corpus file and every crash.
//!
//! Each body takes any bytes and panics if an invariant breaks: [`option`] and [`packet`] for the wire, [`client`] and
//! [`server`] for the two machines under sequences of packets and times. Sequences are decoded from few bytes a step,
//! out of small sets of addresses, ports and sequence numbers, so that chance completes handshakes.

mod client;
mod draw;
mod invariants;
mod option;
mod packet;
mod seeds;
mod server;
#[cfg(test)]
mod tests;

pub use self::client::client;
pub use self::draw::any_packet;
pub use self::invariants::Snapshot;
pub use self::option::option;
pub use self::packet::packet;
pub use self::seeds::{Seed, seeds};
pub use self::server::server;

/// A target's body.
pub type Body = fn(&[u8]);

/// Every target of this crate by its name, which is that of its folders in `fuzz/corpus` and `fuzz/crashes`.
pub const TARGETS: [(&str, Body); 4] =
    [("option", option), ("packet", packet), ("client", client), ("server", server)];
