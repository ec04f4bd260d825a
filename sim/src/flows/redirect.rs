//! This balancer: a server names a port of its own, and from then on packets go where the table says that the port is.
//! Nothing is remembered; the table is the configuration, the same on all balancers.
//!
//! Plain clients stay with the service's port and go by Maglev's table, as the balancer does it.

use fastrand::Rng;

use super::cluster::{Cluster, Server};
use super::contestant::{Contestant, Flow, Home};
use super::hashing::{Hashing as _, Maglev};

/// The table of ports, and of plain clients.
#[derive(Debug)]
pub struct Redirect {
    /// By port: whose it is.
    ports: Box<[Option<Server>]>,
    plain: Maglev,
    /// Servers and ports that new connections get, with the sum of weights up to each: the policy `random`.
    choice: Vec<(u64, Home)>,
    rng: Rng,
    percent_plain: u8,
}

impl Redirect {
    /// With so many plain clients in a hundred; choices are drawn from `seed`.
    pub fn new(percent_plain: u8, seed: u64) -> Redirect {
        Redirect {
            ports: vec![None; 1 << 16].into(),
            plain: Maglev::default(),
            choice: Vec::new(),
            rng: Rng::with_seed(seed),
            percent_plain,
        }
    }
}

impl Contestant for Redirect {
    fn update(&mut self, cluster: &Cluster) {
        self.ports.fill(None);
        for (port, server) in cluster.ports() {
            self.ports[usize::from(port)] = Some(server);
        }
        let mut sum = 0;
        let home = |server| Home { server, port: cluster.port(server) };
        let up = cluster.up().map(|(server, weight)| {
            sum += u64::from(weight);
            (sum, home(server))
        });
        self.choice = up.collect();
        self.plain.update(cluster);
    }

    fn open(&mut self, flow: &Flow) -> Home {
        let plain = Home { server: self.plain.lookup(flow.hash), port: 0 };
        if self.rng.u8(..100) < self.percent_plain {
            return plain;
        }
        let Some((total, _)) = self.choice.last() else { return plain };
        let drawn = self.rng.u64(..*total);
        self.choice[self.choice.partition_point(|(sum, _)| *sum <= drawn)].1
    }

    fn reaches(&mut self, flow: &Flow, home: Server) -> bool {
        match flow.port {
            0 => self.plain.lookup(flow.hash) == home,
            port => self.ports[usize::from(port)] == Some(home),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::cluster::{Change, Reuse};
    use super::*;

    #[test]
    fn packets_go_where_the_port_is() {
        let mut cluster = Cluster::new(12, 10, 1, 1, Reuse::WhenGone);
        let mut redirect = Redirect::new(0, 1);
        redirect.update(&cluster);
        let homes: Vec<Home> =
            (0..1000).map(|hash| redirect.open(&Flow { hash, port: 0, balancer: 0 })).collect();
        assert!((0..10).all(|server| homes.iter().any(|home| home.server == server)), "all get some");
        cluster.apply(&Change::Drain(vec![0, 1]));
        cluster.apply(&Change::Add(2));
        redirect.update(&cluster);
        let mut reaches =
            |home: &Home| redirect.reaches(&Flow { hash: 0, port: home.port, balancer: 7 }, home.server);
        assert!(homes.iter().all(&mut reaches), "whatever the balancer");
        cluster.apply(&Change::Stop(vec![0]));
        redirect.update(&cluster);
        for home in homes {
            let flow = Flow { hash: 0, port: home.port, balancer: 0 };
            assert_eq!(redirect.reaches(&flow, home.server), home.server != 0, "its port leads nowhere");
        }
    }

    #[test]
    fn new_connections_follow_weights_and_plain_ones_have_no_port() {
        let mut cluster = Cluster::new(4, 4, 1, 0, Reuse::WhenGone);
        cluster.apply(&Change::Weigh(vec![2], 7));
        let mut redirect = Redirect::new(20, 1);
        redirect.update(&cluster);
        let homes: Vec<Home> =
            (0..10_000).map(|hash| redirect.open(&Flow { hash, port: 0, balancer: 0 })).collect();
        let plain = homes.iter().filter(|home| home.port == 0).count();
        let heavy = homes.iter().filter(|home| home.server == 2).count();
        assert!(plain.abs_diff(2_000) < 200 && heavy.abs_diff(7_000) < 200, "{plain} {heavy}");
    }
}
