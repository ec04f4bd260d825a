//! Choosing a server by hash: modulo, Maglev (the balancer's own table), rendezvous.

use std::hash::Hasher as _;

use shunt_balancer::ServerId;
use shunt_balancer::maglev::{self, Member};
use siphasher::sip::SipHasher13;

use super::cluster::{Cluster, Server};

/// The number of slots of all tables: as many as Maglev's.
pub const SLOTS: usize = maglev::SLOTS;

/// A hash's slot.
pub fn slot(hash: u64) -> usize {
    (hash % SLOTS as u64) as usize
}

/// A choice by hash alone. All balancers have the same.
pub trait Hashing {
    /// The cluster is another than before.
    fn update(&mut self, cluster: &Cluster);

    /// The server of a hash; 0 while none is up.
    fn lookup(&self, hash: u64) -> Server;

    /// Whether a table of connections has to remember a connection with this hash.
    fn is_unsafe(&self, _hash: u64) -> bool {
        true
    }
}

/// The hash modulo the number of servers; a server of weight two counts twice.
#[derive(Debug, Default)]
pub struct Modulo {
    servers: Vec<Server>,
}

impl Hashing for Modulo {
    fn update(&mut self, cluster: &Cluster) {
        let often = |(server, weight)| std::iter::repeat_n(server, weight as usize);
        self.servers = cluster.up().flat_map(often).collect();
    }

    fn lookup(&self, hash: u64) -> Server {
        let count = self.servers.len().max(1) as u64;
        self.servers.get((hash % count) as usize).copied().unwrap_or_default()
    }
}

/// Maglev's table as the balancer has it for plain clients (Eisenbud et al., NSDI 2016, §3.4).
#[derive(Debug, Default)]
pub struct Maglev {
    table: Option<maglev::Maglev>,
}

impl Hashing for Maglev {
    fn update(&mut self, cluster: &Cluster) {
        let member = |(server, weight)| Member {
            name: format!("server-{server}"),
            weight,
            server: ServerId::new(usize::from(server)),
        };
        self.table = maglev::Maglev::new(&cluster.up().map(member).collect::<Vec<_>>());
    }

    fn lookup(&self, hash: u64) -> Server {
        self.table.as_ref().map_or(0, |table| table.lookup(hash).index() as Server)
    }
}

#[derive(Debug, Clone, Copy)]
struct Best {
    server: Server,
    score: f64,
}

const NOBODY: Best = Best { server: 0, score: f64::NEG_INFINITY };

/// Who scores highest in each slot (rendezvous hashing with weights); a change only touches the slots that it is about.
#[derive(Debug)]
struct Rendezvous {
    members: Vec<(Server, u32)>,
    best: Box<[Best]>,
}

impl Rendezvous {
    fn new() -> Rendezvous {
        Rendezvous { members: Vec::new(), best: vec![NOBODY; SLOTS].into() }
    }

    fn update(&mut self, members: Vec<(Server, u32)>) {
        let (left, came) = (difference(&self.members, &members), difference(&members, &self.members));
        self.members = members;
        let losers: Vec<Server> = left.iter().map(|(server, _)| *server).collect();
        for (slot, best) in self.best.iter_mut().enumerate() {
            let candidates = if losers.binary_search(&best.server).is_ok() && best.score > NOBODY.score {
                *best = NOBODY;
                &self.members
            } else {
                &came
            };
            for &(server, weight) in candidates {
                let score = score(slot, server, weight);
                if score > best.score {
                    *best = Best { server, score };
                }
            }
        }
    }
}

/// What is in `a` and not in `b`; both are sorted.
fn difference(a: &[(Server, u32)], b: &[(Server, u32)]) -> Vec<(Server, u32)> {
    a.iter().filter(|member| b.binary_search(member).is_err()).copied().collect()
}

/// A server's score in a slot: its chance to be the highest is its weight's share.
fn score(slot: usize, server: Server, weight: u32) -> f64 {
    let mut hasher = SipHasher13::new_with_keys(0x6a65_7400, 0);
    hasher.write_u64((slot as u64) << 16 | u64::from(server));
    // The upper 53 bits are exact; the half keeps the logarithm away from zero.
    let uniform = ((hasher.finish() >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    -f64::from(weight) / uniform.ln()
}

/// The table of JET (Mendelson et al., `CoNEXT` 2021) over rendezvous hashing: beside the server of each slot it knows
/// whether a server of the horizon would take the slot over if it were added. Only then is a connection unsafe.
#[derive(Debug)]
pub struct Horizon {
    working: Rendezvous,
    horizon: Rendezvous,
}

impl Default for Horizon {
    fn default() -> Horizon {
        Horizon { working: Rendezvous::new(), horizon: Rendezvous::new() }
    }
}

impl Hashing for Horizon {
    fn update(&mut self, cluster: &Cluster) {
        self.working.update(cluster.up().collect());
        self.horizon.update(cluster.horizon().collect());
    }

    fn lookup(&self, hash: u64) -> Server {
        self.working.best[slot(hash)].server
    }

    fn is_unsafe(&self, hash: u64) -> bool {
        let slot = slot(hash);
        self.horizon.best[slot].score > self.working.best[slot].score
    }
}

#[cfg(test)]
mod tests {
    use super::super::cluster::{Change, Reuse};
    use super::*;

    fn servers(hashing: &impl Hashing) -> Vec<Server> {
        (0..SLOTS as u64).map(|hash| hashing.lookup(hash)).collect()
    }

    fn changed<H: Hashing + Default>(changes: &[Change]) -> (Vec<Server>, Vec<Server>, H) {
        let mut cluster = Cluster::new(14, 10, 1, 2, Reuse::WhenGone);
        let mut hashing = H::default();
        hashing.update(&cluster);
        let before = servers(&hashing);
        for change in changes {
            cluster.apply(change);
            hashing.update(&cluster);
        }
        (before, servers(&hashing), hashing)
    }

    #[test]
    fn rendezvous_moves_only_what_it_must() {
        let (before, after, _) = changed::<Horizon>(&[Change::Drain(vec![3])]);
        for (before, after) in before.iter().zip(&after) {
            assert_eq!(*before != 3, before == after);
        }
        let (before, after, _) = changed::<Horizon>(&[Change::Add(1)]);
        let moved: Vec<_> = before.iter().zip(&after).filter(|(before, after)| before != after).collect();
        assert!(moved.iter().all(|(_, after)| **after == 10), "only to the server that came");
        assert!(moved.len().abs_diff(SLOTS / 11) < SLOTS / 200, "{}", moved.len());
    }

    #[test]
    fn rendezvous_after_many_changes_is_that_of_the_set() {
        let changes = [
            Change::Drain(vec![3, 4]),
            Change::Add(2),
            Change::Weigh(vec![1, 10], 3),
            Change::Stop(vec![3, 7]),
            Change::Return(vec![3]),
            Change::Weigh(vec![1], 1),
        ];
        let (_, after, hashing) = changed::<Horizon>(&changes);
        let mut fresh = Rendezvous::new();
        fresh.update(hashing.working.members.clone());
        let wanted: Vec<Server> = fresh.best.iter().map(|best| best.server).collect();
        assert_eq!(after, wanted);
        let mut fresh = Rendezvous::new();
        fresh.update(hashing.horizon.members.clone());
        for (is, wanted) in hashing.horizon.best.iter().zip(&fresh.best) {
            assert_eq!((is.server, is.score.to_bits()), (wanted.server, wanted.score.to_bits()));
        }
    }

    #[test]
    fn rendezvous_shares_by_weight() {
        let (_, after, _) = changed::<Horizon>(&[Change::Weigh(vec![0], 3)]);
        let share = after.iter().filter(|server| **server == 0).count();
        assert!(share.abs_diff(SLOTS * 3 / 12) < SLOTS / 100, "{share}");
    }

    #[test]
    fn jet_calls_exactly_those_unsafe_that_the_horizon_would_move() {
        let mut cluster = Cluster::new(12, 10, 1, 2, Reuse::WhenGone);
        let mut hashing = Horizon::default();
        hashing.update(&cluster);
        let before = servers(&hashing);
        let marked: Vec<bool> = (0..SLOTS as u64).map(|hash| hashing.is_unsafe(hash)).collect();
        cluster.apply(&Change::Add(2));
        hashing.update(&cluster);
        let after = servers(&hashing);
        for slot in 0..SLOTS {
            assert_eq!(marked[slot], before[slot] != after[slot], "{slot}");
        }
        let share = marked.iter().filter(|marked| **marked).count();
        assert!(share.abs_diff(SLOTS / 6) < SLOTS / 100, "2 of 12: {share}");
    }

    #[test]
    fn modulo_counts_weights_and_moves_nearly_all() {
        let (before, after, _) = changed::<Modulo>(&[Change::Add(1)]);
        let moved = before.iter().zip(&after).filter(|(before, after)| before != after).count();
        assert!(moved.abs_diff(SLOTS * 10 / 11) < SLOTS / 100, "{moved}");
        let (_, after, _) = changed::<Modulo>(&[Change::Weigh(vec![0], 3)]);
        let share = after.iter().filter(|server| **server == 0).count();
        assert!(share.abs_diff(SLOTS * 3 / 12) < SLOTS / 100, "{share}");
    }
}
