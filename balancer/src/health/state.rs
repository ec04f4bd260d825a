//! Rise and fall: healthy or not, from the results of looks.

use serde::Serialize;

use crate::config::Check;

/// What is thought of a server's port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Nothing is known yet: it counts as healthy, and the first result decides.
    #[default]
    Unknown,
    /// It does what it has to.
    Healthy,
    /// It does not.
    Unhealthy,
}

/// A state and how near it is to changing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Health {
    /// What is thought of it.
    pub state: State,
    /// Results in a row that contradict the state.
    pub against: u32,
}

impl Health {
    /// Takes a result; says whether what is thought of it has changed so that selections do (from unknown to healthy
    /// nothing does).
    pub fn result(&mut self, good: bool, check: &Check) -> bool {
        let before = self.fit();
        match (self.state, good) {
            (State::Unknown, true) => self.become_(State::Healthy),
            (State::Unknown, false) => self.become_(State::Unhealthy),
            (State::Healthy, true) | (State::Unhealthy, false) => self.against = 0,
            (State::Healthy, false) => self.count(check.fall, State::Unhealthy),
            (State::Unhealthy, true) => self.count(check.rise, State::Healthy),
        }
        self.fit() != before
    }

    /// Whether it gets new selections.
    pub fn fit(&self) -> bool {
        self.state != State::Unhealthy
    }

    fn count(&mut self, enough: u32, then: State) {
        self.against += 1;
        if self.against >= enough {
            self.become_(then);
        }
    }

    fn become_(&mut self, state: State) {
        *self = Health { state, against: 0 };
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::config::CheckKind;

    fn check(rise: u32, fall: u32) -> Check {
        Check {
            kind: CheckKind::Tcp,
            path: "/".to_owned(),
            host: None,
            expect: vec![200],
            interval: Duration::from_secs(2),
            timeout: Duration::from_secs(1),
            rise,
            fall,
        }
    }

    /// The states after each of `results`, `+` good and `-` bad: `u`nknown, `h`ealthy, u`n`healthy.
    fn run(rise: u32, fall: u32, results: &str) -> String {
        let (mut health, check) = (Health::default(), check(rise, fall));
        let letter = |result| {
            let before = health.fit();
            assert_eq!(health.result(result == '+', &check), before != health.fit());
            match health.state {
                State::Unknown => 'u',
                State::Healthy => 'h',
                State::Unhealthy => 'n',
            }
        };
        results.chars().map(letter).collect()
    }

    #[test]
    fn b7_nothing_known_counts_as_healthy_and_the_first_result_decides() {
        assert!(Health::default().fit());
        assert_eq!(run(2, 3, "+"), "h");
        assert_eq!(run(2, 3, "-"), "n");
    }

    #[test]
    fn b7_only_results_in_a_row_change_the_state() {
        assert_eq!(run(2, 3, "+--+---"), "hhhhhhn");
        assert_eq!(run(2, 3, "+--+--+--+"), "hhhhhhhhhh");
        assert_eq!(run(2, 3, "-+-++"), "nnnnh");
        assert_eq!(run(1, 1, "+-+-"), "hnhn");
        assert_eq!(run(3, 2, "+--++-+++"), "hhnnnnnnh");
    }

    proptest! {
        /// Against a model that looks at the whole history.
        #[test]
        fn b7_the_state_is_that_of_the_latest_long_enough_run(
            rise in 1u32..5, fall in 1u32..5, results in proptest::collection::vec(any::<bool>(), 1..60)
        ) {
            let (mut health, check) = (Health::default(), check(rise, fall));
            let mut model = results[0];
            for at in 0..results.len() {
                health.result(results[at], &check);
                let streak = results[..=at].iter().rev().take_while(|result| **result == results[at]).count();
                // The run may have begun before the state was decided otherwise: only what contradicts counts.
                if at > 0 && results[at] != model && streak as u32 >= if results[at] { rise } else { fall } {
                    model = results[at];
                }
                prop_assert_eq!(health.fit(), model);
                prop_assert!(health.against < rise.max(fall));
            }
        }
    }
}
