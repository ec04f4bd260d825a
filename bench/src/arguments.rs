//! What the user asks for.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

use crate::contestant::Contestant;
use crate::measure::Measure;
use crate::part::Part;

/// Compares Shunt's balancer with the kernel's forwarding, nftables, haproxy and nginx.
///
/// Each of them stands between a client and a server in network namespaces of this machine. They are measured in turn,
/// several times; medians are shown, and in brackets the least and the greatest. It needs root, or user namespaces.
#[derive(Debug, Clone, Parser)]
#[command(name = "shunt-bench", version, args_conflicts_with_subcommands = true)]
pub struct Arguments {
    /// Under four minutes: six contestants, what matters most, short runs
    #[arg(long)]
    pub quick: bool,
    /// Write the medians as one JSON object to the last line of standard output, all else to standard error
    #[arg(long)]
    pub json: bool,
    /// Write the document `RESULTS.md`, and the picture `results.svg`, to this folder
    #[arg(long, value_name = "FOLDER", num_args = 0..=1, default_missing_value = "bench")]
    pub write: Option<PathBuf>,
    /// Only these contestants, and `direct` to compare them with; may be repeated
    #[arg(long, value_name = "CONTESTANT")]
    pub only: Vec<Contestant>,
    /// Only these measurements; may be repeated
    #[arg(long, value_name = "MEASURE")]
    pub measure: Vec<Measure>,
    /// Seconds that one measurement lasts [default: 4, quick: 2]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=60))]
    pub seconds: Option<u64>,
    /// How often everything is measured [default: 5, quick: 3]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: Option<u32>,
    /// Open connections at which the memory of balancers is looked at; 0 alone opens none
    /// [default: 0,10000,100000, quick: 0,10000]
    #[arg(long, value_delimiter = ',', value_name = "N,N", value_parser = clap::value_parser!(u32).range(..=100_000))]
    pub connections: Option<Vec<u32>>,
    /// The program under test [default: the one beside this program]
    #[arg(long, value_name = "FILE")]
    pub shunt: Option<PathBuf>,
    /// Another bench, or what a bench starts inside its hosts.
    #[command(subcommand)]
    pub part: Option<Part>,
}

/// The same with every default filled in.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Who takes part, in order.
    pub contestants: Vec<Contestant>,
    /// What is measured, in order.
    pub measures: Vec<Measure>,
    /// How long one measurement lasts.
    pub time: Duration,
    /// How often everything is measured.
    pub rounds: u32,
    /// Open connections at which memory is looked at, rising.
    pub connections: Vec<usize>,
    /// Of whom.
    pub memory_of: Vec<Contestant>,
}

impl Arguments {
    /// Fills in the defaults.
    pub fn plan(&self) -> Plan {
        use clap::ValueEnum as _;
        let asked = |contestant: &Contestant| {
            *contestant == Contestant::Direct
                || if self.only.is_empty() {
                    !self.quick || Contestant::QUICK.contains(contestant)
                } else {
                    self.only.contains(contestant)
                }
        };
        let contestants: Vec<Contestant> = Contestant::all().iter().copied().filter(asked).collect();
        let measured = |measure: &Measure| {
            if self.measure.is_empty() {
                !self.quick || Measure::QUICK.contains(measure)
            } else {
                self.measure.contains(measure)
            }
        };
        let default: &[u32] = if self.quick { &[0, 10_000] } else { &[0, 10_000, 100_000] };
        let connections = self.connections.as_deref().unwrap_or(default);
        let mut connections: Vec<usize> = connections.iter().map(|count| *count as usize).collect();
        connections.sort_unstable();
        connections.dedup();
        let memory_of = contestants.iter().copied().filter(|one| one.is_process());
        let of_subject = |one: &Contestant| !self.quick || !self.only.is_empty() || *one == Contestant::Shunt;
        Plan {
            memory_of: memory_of.filter(of_subject).collect(),
            measures: Measure::value_variants().iter().copied().filter(measured).collect(),
            time: Duration::from_secs(self.seconds.unwrap_or(if self.quick { 2 } else { 4 })),
            rounds: self.rounds.unwrap_or(if self.quick { 3 } else { 5 }),
            connections,
            contestants,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(words: &[&str]) -> Plan {
        Arguments::try_parse_from(std::iter::once(&"shunt-bench").chain(words)).unwrap().plan()
    }

    #[test]
    fn all_take_part_unless_asked_otherwise() {
        let plan = plan(&[]);
        assert_eq!(plan.contestants, Contestant::all());
        assert_eq!(plan.connections, [0, 10_000, 100_000]);
        assert!(!plan.memory_of.contains(&Contestant::Kernel));
        assert!(plan.memory_of.contains(&Contestant::Haproxy));
    }

    #[test]
    fn there_is_always_something_to_compare_with() {
        let plan =
            plan(&["--only", "nft", "--only", "handover", "--measure", "latency", "--connections", "7,0,7"]);
        assert_eq!(plan.contestants, [Contestant::Direct, Contestant::Nft, Contestant::Handover]);
        assert_eq!(plan.measures, [Measure::Latency]);
        assert_eq!(plan.connections, [0, 7]);
        assert_eq!(plan.memory_of, [Contestant::Handover]);
    }

    #[test]
    fn a_quick_run_fits_into_four_minutes() {
        let plan = plan(&["--quick"]);
        assert_eq!(plan.contestants.len(), 1 + Contestant::QUICK.len());
        assert_eq!(plan.memory_of, [Contestant::Shunt]);
        let runs = plan.contestants.len() * plan.measures.len() * plan.rounds as usize;
        // Half a second to start and end a run.
        let time = (plan.time + Duration::from_millis(500)) * u32::try_from(runs).unwrap();
        assert!(time < Duration::from_secs(180), "{time:?}");
    }
}
