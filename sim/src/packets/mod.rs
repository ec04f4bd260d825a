//! Worlds of packets: clients, servers and balancers of the real core, in virtual time, on one thread.
//!
//! A seed is drawn into a [`Plan`] (machines, links, streams, and what is done to them when), which a world carries
//! out. Nothing in it depends on a clock, a thread or the order of a hash table: the same seed gives the same packets
//! at the same times, which [`Summary::trace`] shows.
//!
//! Streams carry records that say whose they are, so that every byte is checked where it is read. Whatever may break a
//! stream (the death of its server, a translator that forgets, other tables for a plain client) is noted when it is
//! done; an error that none of this explains is a [`Violation`], and so are wrong checksums, packets above the MTU, and
//! anything left in a table when all is over.

mod balancers;
mod check;
mod deeds;
mod draw;
mod forger;
mod hosts;
mod link;
mod machine;
mod path;
mod plan;
mod program;
mod record;
mod report;
mod schedule;
mod world;

pub use check::{Outcome, Violation};
pub use link::Quality;
pub use plan::{
    ClientPlan, Deed, End, Exchange, FlowPlan, Forward, Kind, Middlebox, NatPlan, Options, Plan, Scenario,
    ServerPlan,
};
pub use report::{Failure, Summary, capture_folder, plan, record, run};
