//! Per-connection consistency: what breaks when servers and balancers change, here and elsewhere.
//!
//! Millions of connections go through all contestants side by side, without packets: a connection is a hash, the
//! server that each contestant opened it at, and the second in which it ends. A connection is *broken* when one of its
//! packets goes to a server that does not have it (*misrouted*), or when its server ends (*lost*). Everything is drawn
//! from a seed.
//!
//! # The contestants
//!
//! | contestant | as in | a packet goes to |
//! |---|---|---|
//! | redirect | this balancer | the server that has the destination port in the table; plain clients by Maglev's hash, by `shunt_balancer::maglev` itself |
//! | maglev | Maglev, NSDI 2016, §3.4 | the server of the hash's slot; the same table as our plain clients' |
//! | `maglev_lru` | the same, with its connection table | the server in the balancer's table if the connection is there |
//! | `two_slot` | Beamer, NSDI 2018; GitHub's GLB director | the bucket's server, which passes on to the one before what it does not know |
//! | jet | JET, `CoNEXT` 2021, over rendezvous hashing in a table | the server in the table if the connection is there; only those that a server of the horizon would take are put there |
//! | modulo | | the server at the hash modulo the number of servers |
//!
//! Cheetah (NSDI 2020) names the server in the connection, as redirection does by its port: it would have redirect's
//! column, with none plain.
//!
//! # What the model says and does not
//!
//! - Time goes in seconds. Every open connection sends once a second, so none slips through a change unseen; what ends
//!   in the second in which it began cannot break.
//! - Every balancer hears of a change at once. That is the best case of all who share tables, and makes no difference
//!   to redirection as long as a port does not change hands (see [`Reuse`]).
//! - Routers spread connections over balancers by hash modulo their number, so a change of it moves most of them; each
//!   table stays with its balancer. Routers that move fewer would spare `maglev_lru` and `jet` a part.
//! - Tables forget connections when they end, as if balancers saw it; the least recently used goes first. By default
//!   they hold twice what is open, so that they break nothing until a balancer changes or a flood comes.
//! - A drained server keeps working. That JET loses connections to it is no fault of the paper, which only promises
//!   that *added* servers break nothing: who removes a server there has lost its connections anyway.
//! - Two slots are given Beamer's controller, which moves as few buckets as it can; the rendezvous table of GLB is safe
//!   with one server in change at a time only.
//! - Durations are those of a published Hadoop cluster (`workload`), which Cheetah's and JET's simulations use.
//!
//! # Published figures
//!
//! The tests in `validation` hold the contestants against what was published:
//!
//! | figure | published | here | tolerance |
//! |---|---|---|---|
//! | JET's simulation, 468 servers, 10 updates a minute: broken by a full table of 25,000, with 100,000 open | 7,417 of 4,687,530 | 7,333 and 7,932 of 4,688,879 by two schedules; at a tenth of the scale, as the test has it, 714 of 468,887 | 20 % |
//! | the same with JET | 0 | 0 | none |
//! | Cheetah's churn, 24, 30, 22 servers: worst second of consistent hashing, of the hash's | 3.12 / 11.47 = 0.27 | 0.25 | a factor of 1.5 |
//! | the same, of Beamer | 0.46 / 11.47 = 0.040 | 0.040 | a factor of 1.5 |
//! | the same, of Cheetah; here redirect | 0 | 0 | none |
//! | shares in a Maglev table of 100 slots a server | within 1 % | within 1 % | none |
//! | Beamer: one change, however large, breaks nothing | 0 | 0 | none |
//!
//! Only approximated: JET's simulation uses `AnchorHash`, here it is rendezvous hashing with servers that come back in
//! the order of its stack; its schedule of updates is drawn, here from another generator. Cheetah's percentages are of
//! requests on a testbed and depend on what its clients had under way and when that sent, so only proportions are
//! compared, with the published schedule of servers and the durations of its list of requests. For how many slots of a
//! Maglev table move no published number was found; a test holds our own.
//!
//! # Memory
//!
//! An open connection takes [`RECORD_BYTES`], all contestants together, and is kept only while it is open; tables take
//! some 40 bytes an entry. A hundred million connections in a scenario of 15 minutes are two to four million open ones.

#![allow(
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "durations, shares and lengths of bars are not negative and far below the limits"
)]

mod chart;
mod cluster;
mod contestant;
mod engine;
mod hashed;
mod hashing;
mod redirect;
mod report;
mod scenario;
#[cfg(test)]
mod tests;
mod two_slot;
#[cfg(test)]
mod validation;
mod workload;

pub use cluster::{MAX_SERVERS, Reuse};
pub use engine::RECORD_BYTES;
pub use report::{Contender, Counts, Report, Summary, percent, run};
pub use scenario::{Options, Scenario};
