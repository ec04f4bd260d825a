//! Port redirection beside the server's kernel.
//!
//! The agent sees SYNs that carry the option and SYN-ACKs of service ports, in a TUN device; [`shunt_stack::redirect`]
//! decides about them. Established connections stay in the kernel, but for those that are asked to move, and the
//! programs are unmodified: they listen on their service port beside their usual one. Nothing here decides what a packet
//! means.
//!
//! - [`Config`] is the TOML file, checked; `setup` says what it means for the host; [`run`] is the driver.

mod agent;
mod config;
mod control;
mod decapsulate;
pub mod doctor;
mod error;
mod listeners;
mod moves;
mod setup;

pub use agent::{AgentStats, RunOptions, run};
pub use config::{Config, Decapsulate, DivertMode, Service};
pub use decapsulate::DecapsulateCounters;
pub use error::Error;
