//! What was measured, and what follows from it.

use std::collections::BTreeMap;

use crate::contestant::Contestant;
use crate::figure::Figure;
use crate::statistics::Summary;

/// One round: everything measured once, of all contestants in turn.
type Round = BTreeMap<(Figure, Contestant), f64>;

/// All measurements.
#[derive(Debug, Default)]
pub struct Results {
    rounds: Vec<Round>,
    memory: BTreeMap<(Contestant, usize), u64>,
    /// Contestants that could not take part, and why.
    pub left_out: Vec<(Contestant, String)>,
    /// What else is to be known to read the figures.
    pub remarks: Vec<String>,
    /// Measurements that failed.
    pub failures: Vec<String>,
}

impl Results {
    /// None yet, with what is known before.
    pub fn new(remarks: Vec<String>) -> Results {
        Results { remarks, ..Results::default() }
    }

    /// Begins a round; what is added belongs to it.
    pub fn begin_round(&mut self) {
        self.rounds.push(Round::new());
    }

    /// Adds a figure as it was measured.
    pub fn add(&mut self, contestant: Contestant, figure: Figure, value: f64) {
        if self.rounds.is_empty() {
            self.begin_round();
        }
        if let Some(round) = self.rounds.last_mut() {
            round.insert((figure, contestant), value);
        }
    }

    /// Adds the memory of the process in the middle, in kilobytes of 1024 bytes, with so many open connections.
    pub fn add_memory(&mut self, contestant: Contestant, connections: usize, kilobytes: u64) {
        self.memory.insert((contestant, connections), kilobytes);
    }

    /// How often everything was measured.
    pub fn rounds(&self) -> usize {
        self.rounds.len()
    }

    /// Contestants of which there is anything, in order; [`Contestant::Direct`] first if it was measured.
    pub fn contestants(&self) -> Vec<Contestant> {
        let measured = |one: &Contestant| {
            self.rounds.iter().flat_map(BTreeMap::keys).any(|(_, contestant)| contestant == one)
                || self.memory.keys().any(|(contestant, _)| contestant == one)
        };
        Contestant::all().iter().copied().filter(measured).collect()
    }

    /// Figures of which there is any.
    pub fn figures(&self) -> Vec<Figure> {
        let measured =
            |one: &Figure| self.rounds.iter().flat_map(BTreeMap::keys).any(|(figure, _)| figure == one);
        Figure::ALL.into_iter().filter(measured).collect()
    }

    /// A figure of a contestant: a rate as measured, or what was added to [`Contestant::Direct`] in the same round.
    pub fn summary(&self, contestant: Contestant, figure: Figure) -> Option<Summary> {
        Summary::of(self.rounds.iter().filter_map(|round| {
            let value = round.get(&(figure, contestant))?;
            if !figure.is_added() {
                return Some(*value);
            }
            Some(value - round.get(&(figure, Contestant::Direct))?)
        }))
    }

    /// A figure as measured, nothing taken from it.
    pub fn absolute(&self, contestant: Contestant, figure: Figure) -> Option<Summary> {
        Summary::of(self.rounds.iter().filter_map(|round| round.get(&(figure, contestant)).copied()))
    }

    /// A rate as a part of another contestant's in the same round; `None` for what is no rate.
    pub fn ratio(&self, contestant: Contestant, to: Contestant, figure: Figure) -> Option<Summary> {
        if figure.is_added() {
            return None;
        }
        Summary::of(
            self.rounds
                .iter()
                .filter_map(|round| Some(round.get(&(figure, contestant))? / round.get(&(figure, to))?)),
        )
    }

    /// The counts of connections at which memory was looked at.
    pub fn memory_counts(&self) -> Vec<usize> {
        let mut counts: Vec<usize> = self.memory.keys().map(|(_, count)| *count).collect();
        counts.sort_unstable();
        counts.dedup();
        counts
    }

    /// Kilobytes of a contestant's process with so many open connections.
    pub fn memory(&self, contestant: Contestant, connections: usize) -> Option<u64> {
        self.memory.get(&(contestant, connections)).copied()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Two rounds of three contestants.
    pub(crate) fn example() -> Results {
        let mut results = Results::default();
        for (kernel, nft, direct, added) in [(10.0, 8.0, 20.0, 30.0), (20.0, 10.0, 22.0, 50.0)] {
            results.begin_round();
            results.add(Contestant::Kernel, Figure::Throughput, kernel);
            results.add(Contestant::Nft, Figure::Throughput, nft);
            results.add(Contestant::Direct, Figure::AddedP99, direct);
            results.add(Contestant::Kernel, Figure::AddedP99, direct + added);
        }
        results.add(Contestant::Nft, Figure::Connections, 1234.4);
        results.add_memory(Contestant::Shunt, 0, 7000);
        results.add_memory(Contestant::Shunt, 10_000, 7100);
        results.add_memory(Contestant::Haproxy, 10_000, 90_000);
        results.left_out.push((Contestant::Nginx, "nginx <has> no module stream".to_owned()));
        results
    }

    #[test]
    fn rates_are_as_measured_and_the_rest_is_what_was_added_in_the_same_round() {
        let results = example();
        let throughput = results.summary(Contestant::Nft, Figure::Throughput);
        assert_eq!(throughput, Some(Summary { median: 9.0, low: 8.0, high: 10.0 }));
        let added = results.summary(Contestant::Kernel, Figure::AddedP99);
        assert_eq!(added, Some(Summary { median: 40.0, low: 30.0, high: 50.0 }));
        let measured = results.absolute(Contestant::Kernel, Figure::AddedP99);
        assert_eq!(measured, Some(Summary { median: 61.0, low: 50.0, high: 72.0 }));
        assert_eq!(results.summary(Contestant::Nft, Figure::AddedP99), None);
    }

    #[test]
    fn without_the_direct_run_nothing_can_be_added() {
        let mut results = Results::default();
        results.add(Contestant::Kernel, Figure::CpuPerGigabyte, 1.0);
        assert_eq!(results.summary(Contestant::Kernel, Figure::CpuPerGigabyte), None);
    }

    #[test]
    fn ratios_are_of_the_same_round() {
        let ratio = example().ratio(Contestant::Nft, Contestant::Kernel, Figure::Throughput);
        assert_eq!(ratio, Some(Summary { median: 0.65, low: 0.5, high: 0.8 }));
        assert_eq!(example().ratio(Contestant::Kernel, Contestant::Direct, Figure::AddedP99), None);
    }

    #[test]
    fn what_was_measured_is_listed_in_order() {
        let results = example();
        let names: Vec<&str> = results.contestants().into_iter().map(Contestant::name).collect();
        assert_eq!(names, ["direct", "kernel", "nft", "haproxy", "shunt"]);
        assert_eq!(results.figures(), [Figure::Throughput, Figure::Connections, Figure::AddedP99]);
        assert_eq!(results.memory_counts(), [0, 10_000]);
        assert_eq!(results.memory(Contestant::Haproxy, 0), None);
    }
}
