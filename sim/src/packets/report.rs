//! Running a world, and what comes of it.

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use serde::Serialize;
use shunt_stack::device::Capture;

use super::check::Violation;
use super::draw::draw;
use super::plan::{Options, Plan, Scenario};
use super::world::World;

/// What happened in a world in which nothing went wrong that must not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// The seed.
    pub seed: u64,
    /// What went wrong there.
    pub scenario: Scenario,
    /// Streams.
    pub flows: u64,
    /// Of these, those that came whole.
    pub whole: u64,
    /// Those that ended in an error that something explains.
    pub broken: u64,
    /// Those that their programs dropped, as planned.
    pub abandoned: u64,
    /// Those that ended on a service port.
    pub redirected: u64,
    /// Moves from server to server.
    pub moves: u64,
    /// Packets that passed the core.
    pub packets: u64,
    /// How long it took by the world's clock, milliseconds.
    pub virtual_ms: u64,
    /// A digest of every packet at every place with its time: the same for the same seed.
    pub trace: u64,
}

/// What must not happen has happened.
#[derive(Debug)]
pub struct Failure {
    /// The world it happened in.
    pub options: Options,
    /// Its scenario.
    pub scenario: Scenario,
    /// What.
    pub violation: Violation,
    /// Every packet of the world, if it could be written.
    pub capture: Option<PathBuf>,
}

impl Failure {
    /// What to type to see it again.
    pub fn command(&self) -> String {
        let Options { seed, flows, seconds, .. } = self.options;
        let option =
            |name: &str, value: Option<u64>| value.map_or_else(String::new, |it| format!(" --{name} {it}"));
        format!(
            "cargo run --release -p shunt-sim --bin soak -- --seeds 1 --first {seed} --scenario {}{}{}",
            self.scenario,
            option("flows", flows.map(|flows| flows as u64)),
            option("seconds", seconds)
        )
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {}, scenario {}: {}", self.options.seed, self.scenario, self.violation)?;
        writeln!(f, "again: {}", self.command())?;
        match &self.capture {
            Some(path) => write!(f, "every packet: {}", path.display()),
            None => write!(f, "no capture was written"),
        }
    }
}

impl std::error::Error for Failure {}

/// Where captures of failures go unless told otherwise.
pub fn capture_folder() -> PathBuf {
    std::env::var_os("SHUNT_SIM_CAPTURES").map_or_else(std::env::temp_dir, PathBuf::from)
}

/// What the world of `options` is made of, and what will be done to it.
pub fn plan(options: &Options) -> Plan {
    draw(options)
}

/// Runs the world of `options`. If it fails it is run once more, to capture every packet into `captures`.
///
/// # Errors
/// What must not happen, and how to see it again.
pub fn run(options: &Options, captures: &Path) -> Result<Summary, Box<Failure>> {
    let first = attempt(options, None);
    let violation = match first {
        Ok(summary) => return Ok(summary),
        Err(violation) => violation,
    };
    let scenario = draw(options).scenario;
    let path = captures.join(format!("shunt-sim-{scenario}-{}.pcapng", options.seed));
    let capture = Capture::create(&path).ok();
    let written = capture.is_some();
    // The same again: it is what was captured that counts now.
    let _ = attempt(options, capture);
    Err(Box::new(Failure { options: *options, scenario, violation, capture: written.then_some(path) }))
}

/// Runs the world of `options` and captures every packet, at every place, into the pcapng file `capture`.
///
/// # Errors
/// What must not happen, with the capture of it.
pub fn record(options: &Options, capture: &Path) -> Result<Summary, Box<Failure>> {
    let file = Capture::create(capture).ok();
    let path = file.is_some().then(|| capture.to_owned());
    attempt(options, file).map_err(|violation| {
        let scenario = draw(options).scenario;
        Box::new(Failure { options: *options, scenario, violation, capture: path })
    })
}

fn attempt(options: &Options, capture: Option<Capture>) -> Result<Summary, Violation> {
    let world = AssertUnwindSafe(|| World::new(draw(options), capture).run());
    catch_unwind(world).unwrap_or_else(|panic| Err(Violation::Panic(words(&*panic))))
}

fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message").to_owned()
}
