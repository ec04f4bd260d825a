//! Two slots (Olteanu et al., NSDI 2018; GitHub's GLB director): each bucket has a server and the one before it, which
//! gets the packets that the first knows no connection for.
//!
//! Buckets move as Beamer's controller moves them: as few as keep every server at its share. A balancer remembers no
//! connection, so all balancers do the same. A bucket that moves again forgets the server before the last.

use super::cluster::{Cluster, Server};
use super::contestant::{Contestant, Flow, Home};
use super::hashing::{SLOTS, slot};

/// The stride in which buckets are taken from servers; prime to their number, so that all are met.
const STRIDE: usize = 40_503;

#[derive(Debug, Clone, Copy)]
struct Bucket {
    current: Option<Server>,
    previous: Option<Server>,
}

/// The buckets, the same on all balancers.
#[derive(Debug)]
pub struct TwoSlot {
    buckets: Box<[Bucket]>,
}

impl Default for TwoSlot {
    fn default() -> TwoSlot {
        TwoSlot { buckets: vec![Bucket { current: None, previous: None }; SLOTS].into() }
    }
}

/// How many buckets each server is to have, by number; 0 for those not up.
fn targets(cluster: &Cluster) -> Vec<usize> {
    let mut targets = vec![0; cluster.servers()];
    let total: u64 = cluster.up().map(|(_, weight)| u64::from(weight)).sum();
    let mut given = 0;
    let mut heard = 0;
    for (server, weight) in cluster.up() {
        heard += u64::from(weight);
        let until = (SLOTS as u64 * heard / total.max(1)) as usize;
        targets[usize::from(server)] = until - given;
        given = until;
    }
    targets
}

impl Contestant for TwoSlot {
    fn update(&mut self, cluster: &Cluster) {
        // What each server still gets; a server that has none left gives away what it has beyond.
        let mut room = targets(cluster);
        let order = || (0..SLOTS).map(|turn| turn * STRIDE % SLOTS);
        let mut homeless = Vec::new();
        for index in order() {
            match self.buckets[index].current {
                Some(server) if room[usize::from(server)] > 0 => room[usize::from(server)] -= 1,
                _ => homeless.push(index),
            }
        }
        let mut takers: Vec<Server> = cluster.up().map(|(server, _)| server).collect();
        let mut turn = 0;
        for index in homeless {
            takers.retain(|server| room[usize::from(*server)] > 0);
            if takers.is_empty() {
                return;
            }
            turn = (turn + 1) % takers.len();
            let taker = takers[turn];
            room[usize::from(taker)] -= 1;
            let bucket = &mut self.buckets[index];
            *bucket = Bucket { current: Some(taker), previous: bucket.current };
        }
    }

    fn open(&mut self, flow: &Flow) -> Home {
        Home { server: self.buckets[slot(flow.hash)].current.unwrap_or_default(), port: 0 }
    }

    fn reaches(&mut self, flow: &Flow, home: Server) -> bool {
        let Bucket { current, previous } = self.buckets[slot(flow.hash)];
        current == Some(home) || previous == Some(home)
    }
}

#[cfg(test)]
mod tests {
    use super::super::cluster::{Change, Reuse};
    use super::*;

    fn counts(two_slot: &TwoSlot, servers: usize) -> Vec<usize> {
        let mut counts = vec![0; servers];
        two_slot.buckets.iter().filter_map(|bucket| bucket.current).for_each(|s| counts[usize::from(s)] += 1);
        counts
    }

    fn broken(two_slot: &mut TwoSlot, homes: &[Server]) -> usize {
        let flow = |index: usize| Flow { hash: index as u64, port: 0, balancer: 0 };
        (0..SLOTS).filter(|index| !two_slot.reaches(&flow(*index), homes[*index])).count()
    }

    #[test]
    fn shares_follow_weights_and_few_buckets_move() {
        let mut cluster = Cluster::new(12, 10, 1, 1, Reuse::WhenGone);
        let mut two_slot = TwoSlot::default();
        two_slot.update(&cluster);
        assert!(counts(&two_slot, 10).iter().all(|count| count.abs_diff(SLOTS / 10) <= 1));
        cluster.apply(&Change::Add(1));
        two_slot.update(&cluster);
        let moved = two_slot.buckets.iter().filter(|bucket| bucket.previous.is_some()).count();
        assert!(moved.abs_diff(SLOTS / 11) <= 12, "only those of the new server: {moved}");
        cluster.apply(&Change::Weigh(vec![4], 4));
        two_slot.update(&cluster);
        let shares = counts(&two_slot, 11);
        assert!(shares[4].abs_diff(SLOTS * 4 / 14) <= 1 && shares[5].abs_diff(SLOTS / 14) <= 1, "{shares:?}");
    }

    #[test]
    fn one_change_breaks_nothing_and_two_may() {
        let mut cluster = Cluster::new(14, 10, 1, 1, Reuse::WhenGone);
        let mut two_slot = TwoSlot::default();
        two_slot.update(&cluster);
        let homes: Vec<Server> = two_slot.buckets.iter().filter_map(|bucket| bucket.current).collect();
        cluster.apply(&Change::Drain(vec![1, 2]));
        cluster.apply(&Change::Add(2));
        two_slot.update(&cluster);
        assert_eq!(broken(&mut two_slot, &homes), 0, "however much changes at once");
        cluster.apply(&Change::Add(2));
        two_slot.update(&cluster);
        let broken = broken(&mut two_slot, &homes);
        assert!((1..SLOTS / 20).contains(&broken), "{broken}");
    }
}
