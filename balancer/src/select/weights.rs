//! Weights that change while a policy stands (slow start, loads), and what is built of them.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use shunt_stack::time::Instant;

use super::shares::Shares;
use super::{Candidate, Terms};
use crate::table::ServerId;

/// The part of its weight that a new server begins with, in thousandths; it grows from there in a straight line.
pub const RAMP_FLOOR: u64 = 100;
/// How often a growing weight changes between its begin and its end.
pub const RAMP_STEPS: u32 = 20;
/// A whole weight, in thousandths.
const WHOLE: u64 = 1000;
/// No weight is followed more closely than this.
const SHORTEST_STEP: Duration = Duration::from_millis(100);

/// What a policy draws from.
pub(super) trait Drawn: Sized {
    /// Built of the candidates and their weights now; `None` if nobody has any.
    fn build(candidates: &[Candidate], weights: &[u64]) -> Option<Self>;
}

impl Drawn for Shares {
    fn build(candidates: &[Candidate], weights: &[u64]) -> Option<Shares> {
        Shares::new(&pairs(candidates, weights))
    }
}

pub(super) fn pairs(candidates: &[Candidate], weights: &[u64]) -> Vec<(ServerId, u64)> {
    candidates.iter().zip(weights).map(|(candidate, weight)| (candidate.member.server, *weight)).collect()
}

/// Something drawn from, rebuilt when the weights under it have changed. Reading it takes no lock.
#[derive(Debug)]
pub(super) struct Weights<T> {
    candidates: Box<[Candidate]>,
    slow_start: Duration,
    current: ArcSwap<T>,
    /// What `current` was built of.
    built: Mutex<Box<[u64]>>,
}

impl<T: Drawn> Weights<T> {
    pub(super) fn new(candidates: &[Candidate], terms: Terms) -> Option<Weights<T>> {
        let first = T::build(candidates, &whole(candidates))?;
        Some(Weights::with(candidates, Arc::new(first), terms))
    }

    /// The same with what the whole weights give.
    pub(super) fn with(candidates: &[Candidate], first: Arc<T>, terms: Terms) -> Weights<T> {
        Weights {
            candidates: candidates.into(),
            slow_start: terms.slow_start,
            current: ArcSwap::new(first),
            built: Mutex::new(whole(candidates)),
        }
    }

    pub(super) fn candidates(&self) -> &[Candidate] {
        &self.candidates
    }

    /// What is drawn from now.
    pub(super) fn current(&self) -> Guard<Arc<T>> {
        self.current.load()
    }

    /// The weights at a time, in thousandths, and when they next change by time alone.
    pub(super) fn grown(&self, now: Instant) -> (Vec<u64>, Option<Instant>) {
        let mut growing = false;
        let weight = |candidate: &Candidate| {
            let part = match candidate.live.age(now) {
                Some(age) if age < self.slow_start => {
                    growing = true;
                    ramp(age, self.slow_start)
                }
                _ => WHOLE,
            };
            u64::from(candidate.member.weight) * part
        };
        let weights = self.candidates.iter().map(weight).collect();
        let next = growing.then(|| now + (self.slow_start / RAMP_STEPS).max(SHORTEST_STEP));
        (weights, next)
    }

    /// Rebuilds it if other weights than these are under it.
    pub(super) fn rebuild(&self, weights: Vec<u64>) {
        let mut built = self.built.lock().unwrap_or_else(PoisonError::into_inner);
        if **built == *weights {
            return;
        }
        if let Some(new) = T::build(&self.candidates, &weights) {
            self.current.store(Arc::new(new));
            *built = weights.into();
        }
    }

    /// Follows slow start alone.
    pub(super) fn refresh(&self, now: Instant) -> Option<Instant> {
        let (weights, next) = self.grown(now);
        self.rebuild(weights);
        next
    }
}

fn whole(candidates: &[Candidate]) -> Box<[u64]> {
    candidates.iter().map(|candidate| u64::from(candidate.member.weight) * WHOLE).collect()
}

/// The part of its weight that a server has, in thousandths.
fn ramp(age: Duration, slow_start: Duration) -> u64 {
    let part = age.as_secs_f64() / slow_start.as_secs_f64();
    RAMP_FLOOR + (part * (WHOLE - RAMP_FLOOR) as f64) as u64
}
