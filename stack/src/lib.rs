//! TCP port redirection: the wire format, the two protocol machines, packet devices and a userspace endpoint.
//!
//! Layers, each using only those to its right: `device`, `endpoint` -> `redirect` -> `wire`. Everything in
//! `wire` and `redirect` is sans-IO: bytes and a time in; bytes, events and a deadline out.

pub mod device;
pub mod endpoint;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
pub mod redirect;
pub mod time;
pub mod wire;
