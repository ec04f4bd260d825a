//! What is done to a cluster: the scenarios.

use super::cluster::{Change, Reuse, Server};
use super::engine::{Flood, Packets, Plan};
use super::workload::Workload;

/// Seconds until the first change: connections of all durations but the longest are there by then.
const QUIET: u32 = 300;
/// Seconds between two changes.
const STEP: u32 = 60;
/// Seconds after the last change.
const REST: u32 = 300;
/// Seconds until the longest connection of a drained server has ended.
const DRAIN: u32 = 630;
/// Seconds that a restart takes.
const RESTART: u32 = 10;
/// The servers of Cheetah's experiment (NSDI 2020) and how many came or went after so many seconds, as the
/// published measurements count them: 24, 30, 22.
pub(super) const CHEETAH_SERVERS: usize = 24;
pub(super) const CHEETAH: [(u32, isize); 9] =
    [(0, 1), (1, 2), (2, 2), (8, 1), (11, -2), (15, -1), (16, -1), (17, -2), (18, -2)];

/// What is done to a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scenario {
    /// Tenths of the servers are drained, restarted and taken back, one after another.
    RollingRestart,
    /// A twentieth of the servers comes, five times, a minute apart.
    ScaleOut,
    /// A twentieth of the servers is drained and removed, five times, a minute apart.
    ScaleIn,
    /// A tenth of the servers comes and a tenth is drained in the same moment; three times, and once more with the
    /// ports of those that have gone.
    Replace,
    /// The numbers of servers in Cheetah's experiment, in proportion: 24, 30, 22 within 20 seconds.
    Churn,
    /// Balancers come and go, and routers spread all connections anew, while servers come and go.
    BalancerChange,
    /// SYNs that nothing follows fill the tables once a second while servers come and go.
    SynFlood,
    /// A third of the servers gets twice the weight, another three times; then all are equal again.
    Reweight,
    /// A twentieth of the servers dies, and two minutes later another.
    ServerDeath,
    /// A tenth of the servers is drained for ten seconds and then removed, whoever is still there.
    ForcedRemoval,
}

/// What a scenario is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Connections in all.
    pub connections: u64,
    /// What everything is drawn from.
    pub seed: u64,
    /// Servers at the beginning; at least 10.
    pub servers: usize,
    /// Balancers at the beginning; at least 1.
    pub balancers: usize,
    /// Clients of a hundred that do not speak the protocol.
    pub plain: u8,
    /// Connections that a table holds on each balancer; `None` for twice the mean of those open.
    pub table_size: Option<u32>,
    /// When ports go to another server.
    pub reuse: Reuse,
}

/// Changes in the order of time.
#[derive(Default)]
struct Script {
    changes: Vec<(u32, Change)>,
    up: usize,
    added: usize,
    /// The next to be drained.
    next: Server,
}

impl Script {
    fn at(&mut self, second: u32, change: Change) {
        self.changes.push((second, change));
    }

    fn add(&mut self, second: u32, count: usize) {
        self.added += count;
        self.at(second, Change::Add(count));
    }

    /// The next servers that were up from the beginning.
    fn take(&mut self, count: usize) -> Vec<Server> {
        let first = self.next;
        self.next = first.saturating_add(count as Server).min(self.up as Server);
        (first..self.next).collect()
    }

    /// Drains the next servers and removes them when all connections have ended.
    fn remove(&mut self, second: u32, count: usize) {
        let servers = self.take(count);
        self.at(second, Change::Drain(servers.clone()));
        self.at(second + DRAIN, Change::Stop(servers));
    }
}

impl Scenario {
    /// All, in the order in which they are told.
    pub const ALL: [Scenario; 10] = [
        Scenario::RollingRestart,
        Scenario::ScaleOut,
        Scenario::ScaleIn,
        Scenario::Replace,
        Scenario::Churn,
        Scenario::BalancerChange,
        Scenario::SynFlood,
        Scenario::Reweight,
        Scenario::ServerDeath,
        Scenario::ForcedRemoval,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Scenario::RollingRestart => "rolling-restart",
            Scenario::ScaleOut => "scale-out",
            Scenario::ScaleIn => "scale-in",
            Scenario::Replace => "replace",
            Scenario::Churn => "churn",
            Scenario::BalancerChange => "balancer-change",
            Scenario::SynFlood => "syn-flood",
            Scenario::Reweight => "reweight",
            Scenario::ServerDeath => "server-death",
            Scenario::ForcedRemoval => "forced-removal",
        }
    }

    /// What is done in it, in a line.
    pub fn about(self) -> &'static str {
        match self {
            Scenario::RollingRestart => {
                "a tenth of the servers after another is drained, restarted and taken back"
            }
            Scenario::ScaleOut => "five times, a minute apart, a twentieth of the servers is added",
            Scenario::ScaleIn => {
                "five times, a minute apart, a twentieth of the servers is drained, then removed"
            }
            Scenario::Replace => "a tenth is added and a tenth drained in the same moment, four times",
            Scenario::Churn => "24, 30 and 22 servers within 20 seconds, in proportion",
            Scenario::BalancerChange => {
                "balancers come and go, connections are spread anew; servers come and go too"
            }
            Scenario::SynFlood => {
                "SYNs fill the tables once a second while a tenth is added and a tenth drained"
            }
            Scenario::Reweight => {
                "a third of the servers gets twice the weight, a third three times, then all the same"
            }
            Scenario::ServerDeath => "a twentieth of the servers dies, two minutes later another",
            Scenario::ForcedRemoval => "a tenth is drained for ten seconds and then removed",
        }
    }

    /// Whether servers end in it while they have connections: then those of everybody break.
    pub fn loses_servers(self) -> bool {
        matches!(self, Scenario::ServerDeath | Scenario::ForcedRemoval)
    }

    fn script(self, options: &Options) -> Script {
        let mut script = Script { up: options.servers, ..Script::default() };
        let tenth = (options.servers / 10).max(1);
        let twentieth = (options.servers / 20).max(1);
        let steps = (0..5).map(|step| QUIET + step * STEP);
        match self {
            Scenario::RollingRestart => restart(&mut script, tenth),
            Scenario::ScaleOut => steps.for_each(|second| script.add(second, twentieth)),
            Scenario::ScaleIn => steps.for_each(|second| script.remove(second, twentieth)),
            Scenario::Replace => {
                let again = QUIET + 4 * STEP + DRAIN;
                for second in steps.take(3).chain([again]) {
                    script.remove(second, tenth);
                    script.add(second, tenth);
                }
            }
            Scenario::Churn => {
                for (second, count) in CHEETAH {
                    let scaled = (count.unsigned_abs() * options.servers / CHEETAH_SERVERS).max(1);
                    if count > 0 {
                        script.add(QUIET + second, scaled);
                    } else {
                        script.remove(QUIET + second, scaled);
                    }
                }
            }
            Scenario::BalancerChange => {
                script.add(QUIET, tenth);
                script.at(QUIET + STEP / 2, Change::Balancers(options.balancers + 1));
                script.remove(QUIET + STEP, tenth);
                script.at(QUIET + STEP * 3 / 2, Change::Balancers(options.balancers.div_ceil(2)));
            }
            Scenario::SynFlood => {
                script.add(QUIET + STEP / 3, tenth);
                script.remove(QUIET + STEP / 2, tenth);
            }
            Scenario::Reweight => {
                let (first, second) = (script.take(options.servers / 3), script.take(options.servers / 3));
                script.at(QUIET, Change::Weigh(first.clone(), 2));
                script.at(QUIET + STEP, Change::Weigh(second.clone(), 3));
                script.at(QUIET + 2 * STEP, Change::Weigh([first, second].concat(), 1));
            }
            Scenario::ServerDeath => {
                for second in [QUIET, QUIET + 2 * STEP] {
                    let dead = script.take(twentieth);
                    script.at(second, Change::Stop(dead));
                }
            }
            Scenario::ForcedRemoval => {
                let servers = script.take(tenth);
                script.at(QUIET, Change::Drain(servers.clone()));
                script.at(QUIET + RESTART, Change::Stop(servers));
            }
        }
        script.changes.sort_by_key(|(second, _)| *second);
        script
    }

    /// What happens, by the second.
    pub fn plan(self, options: &Options) -> Plan {
        let script = self.script(options);
        let seconds = script.changes.last().map_or(0, |(second, _)| *second) + REST;
        let (all, length) = (u128::from(options.connections), u128::from(seconds));
        let until = |second: u32| (all * u128::from(second) / length) as u64;
        let mut plan = Plan {
            servers: options.servers + script.added,
            up: options.servers,
            balancers: options.balancers,
            horizon: (options.servers / 10).max(1),
            arrivals: (0..seconds).map(|second| until(second + 1) - until(second)).collect(),
            workload: Workload::hadoop(),
            packets: Packets::Every(1),
            changes: script.changes,
            flood: None,
            reuse: options.reuse,
            seed: options.seed,
        };
        if self == Scenario::SynFlood {
            let per_second = u64::from(table_size(&plan, options)) * options.balancers as u64;
            plan.flood = Some(Flood { from: QUIET, until: QUIET + STEP * 2 / 3, per_second });
        }
        plan
    }
}

/// Connections that the table of each balancer holds.
pub(super) fn table_size(plan: &Plan, options: &Options) -> u32 {
    let open = options.connections as f64 / plan.arrivals.len().max(1) as f64 * plan.workload.mean();
    let fitting = || (2.0 * open / options.balancers.max(1) as f64).ceil().max(16.0) as u32;
    options.table_size.unwrap_or_else(fitting)
}

fn restart(script: &mut Script, tenth: usize) {
    let mut second = QUIET;
    loop {
        let servers = script.take(tenth);
        if servers.is_empty() {
            return;
        }
        script.at(second, Change::Drain(servers.clone()));
        script.at(second + DRAIN, Change::Stop(servers.clone()));
        script.at(second + DRAIN + RESTART, Change::Return(servers));
        second += DRAIN + RESTART;
    }
}
