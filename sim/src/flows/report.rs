//! Scenarios run with all contestants, and what is told of them.

use serde::Serialize;

use super::contestant::Contestant;
use super::engine;
use super::hashed::{Remember, Stateless, Tracked};
use super::hashing::{Horizon, Maglev, Modulo};
use super::redirect::Redirect;
use super::scenario::{self, Options, Scenario};
use super::two_slot::TwoSlot;

/// A way of balancing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contender {
    /// This balancer, connections that servers redirected.
    Redirect,
    /// This balancer, plain clients.
    Plain,
    /// Maglev's hash.
    Maglev,
    /// Maglev's hash and a table of connections on every balancer.
    MaglevLru,
    /// A server and the one before it.
    TwoSlot,
    /// A table of those connections that a server of the horizon would take.
    Jet,
    /// The hash modulo the number of servers.
    Modulo,
}

impl Contender {
    /// All, ours first.
    pub const ALL: [Contender; 7] = [
        Contender::Redirect,
        Contender::Plain,
        Contender::Maglev,
        Contender::MaglevLru,
        Contender::TwoSlot,
        Contender::Jet,
        Contender::Modulo,
    ];

    /// What it is called in JSON and CSV.
    pub fn key(self) -> &'static str {
        match self {
            Contender::Redirect => "redirect",
            Contender::Plain => "plain",
            Contender::Maglev => "maglev",
            Contender::MaglevLru => "maglev_lru",
            Contender::TwoSlot => "two_slot",
            Contender::Jet => "jet",
            Contender::Modulo => "modulo",
        }
    }

    /// What it is called for people.
    pub fn title(self) -> &'static str {
        match self {
            Contender::Redirect => "redirect",
            Contender::Plain => "plain clients",
            Contender::Maglev => "Maglev hash",
            Contender::MaglevLru => "Maglev + table",
            Contender::TwoSlot => "two-slot",
            Contender::Jet => "JET",
            Contender::Modulo => "modulo",
        }
    }

    /// The contestant that shows it.
    fn lane(self) -> usize {
        match self {
            Contender::Redirect | Contender::Plain => 0,
            Contender::Maglev => 1,
            Contender::MaglevLru => 2,
            Contender::TwoSlot => 3,
            Contender::Jet => 4,
            Contender::Modulo => 5,
        }
    }
}

/// A number for each way of balancing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// This balancer, connections that servers redirected.
    pub redirect: u64,
    /// This balancer, plain clients.
    pub plain: u64,
    /// Maglev's hash.
    pub maglev: u64,
    /// Maglev's hash with tables.
    pub maglev_lru: u64,
    /// Two slots.
    pub two_slot: u64,
    /// JET.
    pub jet: u64,
    /// Modulo.
    pub modulo: u64,
}

impl Counts {
    fn of(count: impl Fn(Contender) -> u64) -> Counts {
        Counts {
            redirect: count(Contender::Redirect),
            plain: count(Contender::Plain),
            maglev: count(Contender::Maglev),
            maglev_lru: count(Contender::MaglevLru),
            two_slot: count(Contender::TwoSlot),
            jet: count(Contender::Jet),
            modulo: count(Contender::Modulo),
        }
    }

    /// The number of one of them.
    pub fn get(&self, contender: Contender) -> u64 {
        match contender {
            Contender::Redirect => self.redirect,
            Contender::Plain => self.plain,
            Contender::Maglev => self.maglev,
            Contender::MaglevLru => self.maglev_lru,
            Contender::TwoSlot => self.two_slot,
            Contender::Jet => self.jet,
            Contender::Modulo => self.modulo,
        }
    }
}

/// What came of a scenario.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Its name.
    pub name: &'static str,
    /// What is done in it.
    pub about: &'static str,
    /// Connections opened; the same for all contestants.
    pub connections: u64,
    /// Those of them that are redirected by this balancer's servers; the rest is plain to it.
    pub redirected: u64,
    /// The most that were open at once.
    pub peak_open: u64,
    /// Connections that a table holds on each balancer.
    pub table_size: u32,
    /// Seconds that the scenario takes.
    pub seconds: usize,
    /// Broken connections.
    pub broken: Counts,
    /// Those of them that ended with their server; the others were sent to a server that did not have them.
    pub lost: Counts,
}

impl Report {
    /// How many connections a number of broken ones is out of.
    pub fn connections_of(&self, contender: Contender) -> u64 {
        match contender {
            Contender::Redirect => self.redirected,
            Contender::Plain => self.connections - self.redirected,
            _ => self.connections,
        }
    }

    /// The share of a contender's connections that broke, 0 to 1.
    pub fn share(&self, contender: Contender) -> f64 {
        self.broken.get(contender) as f64 / self.connections_of(contender).max(1) as f64
    }
}

/// A share in per cent, with two significant digits.
pub fn percent(share: f64) -> String {
    let percent = share * 100.0;
    match percent {
        10.0.. => format!("{percent:.0} %"),
        1.0.. => format!("{percent:.1} %"),
        0.1.. => format!("{percent:.2} %"),
        0.01.. => format!("{percent:.3} %"),
        0.001.. => format!("{percent:.4} %"),
        _ => format!("{percent:.5} %"),
    }
}

/// All reports: what is printed as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// What everything was drawn from.
    pub seed: u64,
    /// Servers at the beginning.
    pub servers: usize,
    /// Balancers at the beginning.
    pub balancers: usize,
    /// Clients of a hundred that do not speak the protocol.
    pub plain_percent: u8,
    /// By scenario.
    pub scenarios: Vec<Report>,
}

impl Summary {
    /// One line for each scenario and contender, after one of names.
    ///
    /// # Errors
    /// The writer's.
    pub fn write_csv(&self, out: impl std::io::Write) -> csv::Result<()> {
        let mut csv = csv::Writer::from_writer(out);
        csv.write_record(["scenario", "contender", "connections", "broken", "lost_with_server", "share"])?;
        for report in &self.scenarios {
            for contender in Contender::ALL {
                csv.serialize((
                    report.name,
                    contender.key(),
                    report.connections_of(contender),
                    report.broken.get(contender),
                    report.lost.get(contender),
                    report.share(contender),
                ))?;
            }
        }
        Ok(csv.flush()?)
    }
}

/// Runs a scenario with all contestants; `progress` hears how many connections were opened.
pub fn run(scenario: Scenario, options: &Options, progress: &mut dyn FnMut(u64)) -> Report {
    let plan = scenario.plan(options);
    let table_size = scenario::table_size(&plan, options);
    // In the order of `Contender::lane`.
    let contestants: Vec<Box<dyn Contestant>> = vec![
        Box::new(Redirect::new(options.plain, options.seed)),
        Box::new(Stateless::<Maglev>::default()),
        Box::new(Tracked::<Maglev>::new(Remember::All, table_size)),
        Box::new(TwoSlot::default()),
        Box::new(Tracked::<Horizon>::new(Remember::Unsafe, table_size)),
        Box::new(Stateless::<Modulo>::default()),
    ];
    let outcome = engine::run(&plan, contestants, progress);
    let tally = |contender: Contender| {
        let lane = &outcome.lanes[contender.lane()];
        if contender == Contender::Redirect { lane.with_port } else { lane.without_port }
    };
    // What others lose may have a port too: it is the same connection.
    let count = |contender: Contender, of: &dyn Fn(engine::Tally) -> u64| match contender {
        Contender::Redirect | Contender::Plain => of(tally(contender)),
        _ => outcome.lanes[contender.lane()].count(of),
    };
    Report {
        name: scenario.name(),
        about: scenario.about(),
        connections: outcome.opened,
        redirected: outcome.with_port,
        peak_open: outcome.peak_open,
        table_size,
        seconds: plan.arrivals.len(),
        broken: Counts::of(|contender| count(contender, &engine::Tally::broken)),
        lost: Counts::of(|contender| count(contender, &|tally| tally.lost)),
    }
}
