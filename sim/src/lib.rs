//! Simulations of Shunt.
//!
//! [`packets`] runs the real core, packet by packet, in virtual time: what it finds happens in deployments, and can be
//! run again by its seed.

pub mod packets;
