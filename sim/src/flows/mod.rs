//! Flows.

mod chart;
mod cluster;
mod contestant;
mod engine;
mod hashed;
mod hashing;
mod redirect;
mod report;
mod scenario;
mod two_slot;
mod workload;

pub use cluster::{MAX_SERVERS, Reuse};
pub use engine::RECORD_BYTES;
pub use report::{Contender, Counts, Report, Summary, run};
pub use scenario::{Options, Scenario};
