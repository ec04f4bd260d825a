//! How long connections last.

use fastrand::Rng;

/// A distribution of durations in steps.
#[derive(Debug, Clone, PartialEq)]
pub struct Workload {
    /// The share of connections up to here, and the seconds that those of this step last.
    steps: Vec<(f64, f64)>,
}

/// Durations in a Hadoop cluster, in seconds, by the share of connections that last no longer: the distribution that
/// the simulations of Cheetah (NSDI 2020) and JET (`CoNEXT` 2021) publish with their code.
const HADOOP: [(f64, f64); 14] = [
    (0.2934, 0.001),
    (0.3782, 0.002),
    (0.4059, 0.003),
    (0.4521, 0.009),
    (0.4760, 0.026),
    (0.5018, 0.31),
    (0.5480, 10.28),
    (0.7601, 10.44),
    (0.8985, 22.91),
    (0.9280, 36.40),
    (0.9483, 100.7),
    (0.9576, 214.4),
    (0.9982, 228.1),
    (1.0, 602.6),
];

impl Workload {
    /// That of a Hadoop cluster: half of the connections end at once, some last for ten minutes; 21.3 s on average.
    pub fn hadoop() -> Workload {
        Workload { steps: HADOOP.to_vec() }
    }

    /// Steps of (share of connections up to here, seconds), in order; the last share is 1.
    pub fn steps(steps: Vec<(f64, f64)>) -> Workload {
        Workload { steps }
    }

    /// One connection's duration in seconds.
    pub fn draw(&self, rng: &mut Rng) -> f64 {
        let drawn = rng.f64();
        let step = self.steps.partition_point(|(until, _)| *until <= drawn);
        self.steps.get(step).or(self.steps.last()).map_or(0.0, |(_, seconds)| *seconds)
    }

    /// The mean, in seconds.
    pub fn mean(&self) -> f64 {
        let mut from = 0.0;
        let part = |&(until, seconds): &(f64, f64)| {
            let share = until - from;
            from = until;
            share * seconds
        };
        self.steps.iter().map(part).sum()
    }

    /// The longest, in seconds.
    pub fn longest(&self) -> f64 {
        self.steps.iter().map(|(_, seconds)| *seconds).fold(0.0, f64::max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_the_mean_that_they_should() {
        let workload = Workload::hadoop();
        // 100,000 open connections and 4,687,530 in 1000 s are JET's figures: 21.33 s each.
        assert!((workload.mean() - 21.33).abs() < 0.05, "{}", workload.mean());
        let mut rng = Rng::with_seed(1);
        let sum: f64 = (0..200_000).map(|_| workload.draw(&mut rng)).sum();
        assert!((sum / 200_000.0 - workload.mean()).abs() < 0.5, "{sum}");
    }
}
