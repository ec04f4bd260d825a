//! Simulations of Shunt.
//!
//! [`packets`] runs the real core, packet by packet, in virtual time: what it finds happens in deployments, and can be
//! run again by its seed. [`flows`] compares this balancer with others by what becomes of connections when servers and
//! balancers change, without packets.

pub mod flows;
pub mod packets;
