//! `shunt-bench endpoint`: the userspace TCP endpoint against the kernel's TCP, over a TUN device in a network namespace.

mod inside;
mod kernel;
mod report;
mod world;

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::Args;

pub use inside::Inside;
pub use kernel::serve;

use crate::statistics::Summary;
use world::World;

/// Ports of the kernel's side.
mod ports {
    /// Reads all that comes.
    pub const SINK: u16 = 1;
    /// Writes as long as it can.
    pub const SOURCE: u16 = 2;
    /// Sends back what comes, and keeps connections open.
    pub const HOLD: u16 = 3;
    /// Answers a byte and closes.
    pub const BRIEF: u16 = 4;
}

/// Measures the endpoint: one stream each way, connections, memory; with and without super-packets, and beside open
/// connections.
#[derive(Debug, Clone, Args)]
pub struct Arguments {
    /// Seconds that one measurement lasts
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=60))]
    seconds: u64,
    /// How often everything is measured
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Connections that are open beside the measured one
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=50_000))]
    idle: u32,
    /// Only these measurements; may be repeated
    #[arg(long, value_name = "MEASURE")]
    measure: Vec<Measure>,
    /// Bytes of each connection's buffers [default: the endpoint's]
    #[arg(long, value_parser = clap::value_parser!(u32).range(4096..=1 << 24))]
    buffer: Option<u32>,
    /// Write the medians as one JSON object to the last line of standard output, all else to standard error
    #[arg(long)]
    json: bool,
}

/// What is measured side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Setting {
    /// Super-packets both ways.
    Offload,
    /// The same beside open connections.
    Beside,
    /// Every segment a packet of its own.
    Segments,
}

impl Setting {
    const ALL: [Setting; 3] = [Setting::Offload, Setting::Beside, Setting::Segments];

    /// The key in JSON.
    fn key(self) -> &'static str {
        match self {
            Setting::Offload => "offload",
            Setting::Beside => "offload_beside_open",
            Setting::Segments => "no_offload",
        }
    }
}

/// What is done in each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Measure {
    /// One stream from the endpoint to the kernel
    Send,
    /// One stream from the kernel to the endpoint
    Receive,
    /// Connections opened, asked one byte and closed, 64 at a time
    Connections,
}

impl Measure {
    const ALL: [Measure; 3] = [Measure::Send, Measure::Receive, Measure::Connections];

    /// The rate and the cost that it gives.
    fn figures(self) -> [Figure; 2] {
        match self {
            Measure::Send => [
                Figure { key: "send_gbps", title: "sends, Gbit/s", digits: 2, scale: 1.0 },
                Figure { key: "send_cpu_s_per_gb", title: "CPU s/GB", digits: 3, scale: 1.0 },
            ],
            Measure::Receive => [
                Figure { key: "receive_gbps", title: "receives, Gbit/s", digits: 2, scale: 1.0 },
                Figure { key: "receive_cpu_s_per_gb", title: "CPU s/GB", digits: 3, scale: 1.0 },
            ],
            Measure::Connections => [
                Figure { key: "connections_per_s", title: "connections/s", digits: 0, scale: 1.0 },
                Figure { key: "cpu_us_per_connection", title: "CPU µs each", digits: 1, scale: 1e6 },
            ],
        }
    }
}

/// How a figure is told.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Figure {
    /// The key in JSON.
    key: &'static str,
    /// Above its column.
    title: &'static str,
    /// Digits behind the point.
    digits: usize,
    /// What it is multiplied by.
    scale: f64,
}

impl Figure {
    fn all() -> impl Iterator<Item = Figure> {
        Measure::ALL.into_iter().flat_map(Measure::figures)
    }
}

/// Everything that was measured.
#[derive(Debug, Default)]
pub struct Results {
    values: Vec<(Setting, Figure, f64)>,
    idle: u32,
    /// Resident memory of the endpoint's process without and with the open connections, bytes.
    memory: Option<(u64, u64)>,
}

impl Results {
    fn summary(&self, setting: Setting, figure: Figure) -> Option<Summary> {
        let of = |value: &&(Setting, Figure, f64)| (value.0, value.1.key) == (setting, figure.key);
        Summary::of(self.values.iter().filter(of).map(|value| value.2))
    }

    /// What each open connection costs, bytes.
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52 bytes")]
    fn memory_per_connection(&self) -> Option<f64> {
        let (without, with) = self.memory?;
        Some((with as f64 - without as f64) / f64::from(self.idle))
    }
}

/// Measures and prints.
///
/// # Errors
/// A namespace or device cannot be made, a connection fails, or a measurement gives nothing.
pub fn run(arguments: &Arguments) -> Result<()> {
    shunt_lab::rootless::enter()?;
    let folder = tempfile::Builder::new().prefix("shunt-bench-").tempdir().context("making a folder")?;
    let mut results = Results { idle: arguments.idle, ..Results::default() };
    let mut worlds = Vec::new();
    for setting in Setting::ALL {
        worlds.push((setting, World::build(setting, arguments.buffer, folder.path())?));
    }
    for (setting, world) in &mut worlds {
        if *setting == Setting::Beside {
            let without = world.memory()?;
            world.hold(arguments.idle)?;
            results.memory = Some((without, world.memory()?));
        }
    }
    let time = Duration::from_secs(arguments.seconds);
    for round in 0..arguments.rounds as usize {
        let asked = |measure: &Measure| arguments.measure.is_empty() || arguments.measure.contains(measure);
        for measure in Measure::ALL.into_iter().filter(asked) {
            // Whoever comes first each time might find the machine cooler, or the others quieter.
            let first = round % worlds.len();
            worlds.rotate_left(first);
            for (setting, world) in &mut worlds {
                let (rate, cost) = world.measure(measure, time)?;
                let [rated, costed] = measure.figures();
                if rate <= 0.0 {
                    bail!("{}, {}: nothing went through", setting.key(), rated.key);
                }
                results.values.push((*setting, rated, rate * rated.scale));
                results.values.push((*setting, costed, cost * costed.scale));
            }
            worlds.rotate_right(first);
        }
    }
    let text = report::markdown(&results);
    if arguments.json {
        eprintln!("{text}");
        println!("{}", report::json(&results));
    } else {
        println!("{text}");
    }
    Ok(())
}
