//! What happens when: a heap of things to come, those of one instant in the order in which they were decided.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use shunt_stack::time::Instant;

struct Entry<E> {
    at: Instant,
    number: u64,
    event: E,
}

impl<E> Entry<E> {
    fn key(&self) -> (Instant, u64) {
        (self.at, self.number)
    }
}

impl<E> PartialEq for Entry<E> {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl<E> Eq for Entry<E> {}

impl<E> PartialOrd for Entry<E> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<E> Ord for Entry<E> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key().cmp(&other.key())
    }
}

/// Events to come.
pub(super) struct Schedule<E> {
    heap: BinaryHeap<Reverse<Entry<E>>>,
    next: u64,
}

impl<E> Schedule<E> {
    pub(super) fn new() -> Self {
        Schedule { heap: BinaryHeap::new(), next: 0 }
    }

    pub(super) fn at(&mut self, at: Instant, event: E) {
        self.heap.push(Reverse(Entry { at, number: self.next, event }));
        self.next += 1;
    }

    pub(super) fn next(&mut self) -> Option<(Instant, E)> {
        self.heap.pop().map(|Reverse(entry)| (entry.at, entry.event))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_by_time_and_those_of_one_instant_in_order() {
        let mut schedule = Schedule::new();
        for (at, name) in [(5, 'c'), (1, 'a'), (5, 'd'), (2, 'b')] {
            schedule.at(Instant::from_millis(at), name);
        }
        let names: Vec<char> = std::iter::from_fn(|| schedule.next()).map(|(_, name)| name).collect();
        assert_eq!(names, ['a', 'b', 'c', 'd']);
    }
}
