//! Contestants that go by a hash: with nothing else, or with a bounded table of connections on every balancer.

use schnellru::{ByLength, LruMap};

use super::cluster::{Cluster, Server};
use super::contestant::{Contestant, Flow, Home};
use super::hashing::Hashing;

/// A hash and nothing else.
#[derive(Debug, Default)]
pub struct Stateless<H>(H);

impl<H: Hashing> Contestant for Stateless<H> {
    fn update(&mut self, cluster: &Cluster) {
        self.0.update(cluster);
    }

    fn open(&mut self, flow: &Flow) -> Home {
        Home { server: self.0.lookup(flow.hash), port: 0 }
    }

    fn reaches(&mut self, flow: &Flow, home: Server) -> bool {
        self.0.lookup(flow.hash) == home
    }
}

/// The least recently used connection goes first.
type Table = LruMap<u64, Server, ByLength>;

/// Which connections are remembered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remember {
    /// All, as Maglev does.
    All,
    /// Those that the hashing calls unsafe, as JET does.
    Unsafe,
}

/// A hash, and on every balancer a table of connections that comes first.
pub struct Tracked<H> {
    hashing: H,
    remember: Remember,
    capacity: u32,
    tables: Vec<Table>,
}

impl<H: Hashing + Default> Tracked<H> {
    /// With tables of `capacity` connections, at least one.
    pub fn new(remember: Remember, capacity: u32) -> Tracked<H> {
        Tracked { hashing: H::default(), remember, capacity: capacity.max(1), tables: Vec::new() }
    }
}

impl<H: Hashing> Tracked<H> {
    fn choose(&mut self, flow: &Flow) -> Server {
        let server = self.hashing.lookup(flow.hash);
        if self.remember == Remember::All || self.hashing.is_unsafe(flow.hash) {
            self.tables[flow.balancer].insert(flow.hash, server);
        }
        server
    }
}

impl<H: Hashing> Contestant for Tracked<H> {
    fn update(&mut self, cluster: &Cluster) {
        self.hashing.update(cluster);
        // A balancer that goes takes its table along; one that comes has an empty one.
        let empty = || Table::with_seed(ByLength::new(self.capacity), [0, 1, 2, 3]);
        self.tables.resize_with(cluster.balancers(), empty);
    }

    fn open(&mut self, flow: &Flow) -> Home {
        Home { server: self.choose(flow), port: 0 }
    }

    fn reaches(&mut self, flow: &Flow, home: Server) -> bool {
        let remembered = self.tables[flow.balancer].get(&flow.hash).copied();
        remembered.unwrap_or_else(|| self.choose(flow)) == home
    }

    fn close(&mut self, flow: &Flow) {
        self.tables[flow.balancer].remove(&flow.hash);
    }

    fn syn(&mut self, flow: &Flow) {
        self.choose(flow);
    }

    fn may_evict(&self, coming: usize) -> bool {
        self.tables.iter().any(|table| table.len() + coming > self.capacity as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::super::cluster::{Change, Reuse};
    use super::super::hashing::{Horizon, Maglev};
    use super::*;

    fn flow(number: u64, balancer: usize) -> Flow {
        Flow { hash: number.wrapping_mul(0x9e37_79b9_7f4a_7c15), port: 0, balancer }
    }

    fn broken(contestant: &mut impl Contestant, homes: &[Home], balancer: usize) -> usize {
        let reaches =
            |(number, home): (usize, &Home)| contestant.reaches(&flow(number as u64, balancer), home.server);
        homes.iter().enumerate().map(reaches).filter(|reaches| !reaches).count()
    }

    #[test]
    fn a_table_keeps_what_fits_on_the_balancer_that_saw_it() {
        let mut cluster = Cluster::new(12, 10, 2, 1, Reuse::WhenGone);
        let mut small = Tracked::<Maglev>::new(Remember::All, 100);
        let mut large = Tracked::<Maglev>::new(Remember::All, 1000);
        small.update(&cluster);
        large.update(&cluster);
        let homes: Vec<Home> = (0..1000).map(|number| large.open(&flow(number, 0))).collect();
        assert!(!large.may_evict(0) && large.may_evict(1));
        (0..1000).for_each(|number| assert_eq!(small.open(&flow(number, 0)), homes[number as usize]));
        cluster.apply(&Change::Add(2));
        small.update(&cluster);
        large.update(&cluster);
        assert_eq!(broken(&mut large, &homes, 0), 0);
        assert!(broken(&mut small, &homes[900..], 0) > 0, "these hashes are of other connections");
        assert!(broken(&mut large, &homes, 1) > 100, "the other balancer has not seen them");
        let evicted = broken(&mut Stateless::<Maglev>::default().updated(&cluster), &homes[..900], 0);
        assert_eq!(broken(&mut small, &homes[..900], 0), evicted, "as if there were no table");
    }

    impl<H: Hashing> Stateless<H> {
        fn updated(mut self, cluster: &Cluster) -> Self {
            self.update(cluster);
            self
        }
    }

    #[test]
    fn jet_loses_none_to_servers_of_the_horizon_with_a_tenth_of_the_entries() {
        let mut cluster = Cluster::new(110, 100, 1, 10, Reuse::WhenGone);
        let mut jet = Tracked::<Horizon>::new(Remember::Unsafe, 10_000);
        jet.update(&cluster);
        let homes: Vec<Home> = (0..10_000).map(|number| jet.open(&flow(number, 0))).collect();
        let remembered = jet.tables[0].len();
        println!("JET remembers {remembered} of 10,000 connections");
        assert!((600..1200).contains(&remembered), "{remembered}");
        cluster.apply(&Change::Add(10));
        jet.update(&cluster);
        assert_eq!(broken(&mut jet, &homes, 0), 0);
    }
}
