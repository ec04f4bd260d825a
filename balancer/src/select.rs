//! Which server of a set a redirected connection goes to (`B1`, `B7`).
//!
//! A policy is built over the servers that take new connections; health and drain have been seen to before.

use std::fmt;
use std::hash::Hasher;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use shunt_stack::wire::SeqNumber;
use siphasher::sip::SipHasher24;

use crate::config::PolicyName;
use crate::maglev::{Maglev, Member, hash_address, write_address};
use crate::table::ServerId;

/// What is known of a connection, or of a datagram, when its server is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// The client's address and port.
    pub client: SocketAddr,
    /// The VIP and the redirect port.
    pub service: SocketAddr,
    /// The SYN's sequence number; a datagram has none, and is chosen for on its own (§6).
    pub isn: Option<SeqNumber>,
}

/// A way to choose. Choosing again for a repeated SYN should choose the same server; where it does not, the client
/// repairs it (`C4`).
pub trait Select: Send + Sync + fmt::Debug {
    /// The chosen server.
    fn select(&self, request: &Request) -> ServerId;
}

/// The key of `random`, secret to this process so that nobody can choose a server by choosing ports.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct SelectKey(pub [u8; 16]);

impl SelectKey {
    /// A key that nobody knows.
    pub fn from_system() -> SelectKey {
        use std::hash::{BuildHasher, RandomState};
        // The standard library's keys come from the system's random source.
        let half = || RandomState::new().build_hasher().finish().to_ne_bytes();
        let mut key = [0; 16];
        key[..8].copy_from_slice(&half());
        key[8..].copy_from_slice(&half());
        SelectKey(key)
    }
}

impl fmt::Debug for SelectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SelectKey(..)")
    }
}

/// The policy of a name over `members`; `maglev` is their table.
pub(crate) fn policy(
    name: PolicyName,
    members: &[Member],
    maglev: &Arc<Maglev>,
    key: SelectKey,
) -> Option<Box<dyn Select>> {
    Some(match name {
        PolicyName::Random => {
            Box::new(Random { shares: Shares::new(members)?, key, datagrams: AtomicU64::default() })
        }
        PolicyName::RoundRobin => Box::new(RoundRobin::new(members)?),
        PolicyName::Source => Box::new(Source { table: Arc::clone(maglev) }),
    })
}

/// Servers with the sums of the weights up to and including each.
#[derive(Debug)]
struct Shares {
    sums: Box<[(u64, ServerId)]>,
    total: u64,
}

impl Shares {
    fn new(members: &[Member]) -> Option<Shares> {
        let divisor = members.iter().fold(0, |divisor, member| gcd(divisor, u64::from(member.weight)));
        let mut total = 0;
        let sum = |member: &Member| {
            total += u64::from(member.weight).checked_div(divisor).unwrap_or(0);
            (total, member.server)
        };
        let sums: Box<[_]> = members.iter().map(sum).collect();
        (total > 0).then_some(Shares { sums, total })
    }

    /// The server whose part of `0..total` holds `at`.
    fn at(&self, at: u64) -> ServerId {
        let index = self.sums.partition_point(|(sum, _)| *sum <= at);
        self.sums[index.min(self.sums.len() - 1)].1
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// By a keyed hash over addresses, ports and ISN, so that a repeated SYN meets the same server; datagrams are numbered
/// instead.
#[derive(Debug)]
struct Random {
    shares: Shares,
    key: SelectKey,
    datagrams: AtomicU64,
}

impl Select for Random {
    fn select(&self, request: &Request) -> ServerId {
        let mut hasher = SipHasher24::new_with_key(&self.key.0);
        write_address(&mut hasher, request.client.ip());
        write_address(&mut hasher, request.service.ip());
        hasher.write(&request.client.port().to_be_bytes());
        hasher.write(&request.service.port().to_be_bytes());
        match request.isn {
            Some(isn) => hasher.write(&isn.0.to_be_bytes()),
            None => hasher.write(&self.datagrams.fetch_add(1, Ordering::Relaxed).to_be_bytes()),
        }
        let scaled = (u128::from(hasher.finish()) * u128::from(self.shares.total)) >> 64;
        self.shares.at(scaled as u64)
    }
}

/// In turn; a server of weight 2 has two turns a round, apart from each other.
#[derive(Debug)]
struct RoundRobin {
    shares: Shares,
    step: u64,
    turn: AtomicU64,
}

impl RoundRobin {
    fn new(members: &[Member]) -> Option<RoundRobin> {
        let shares = Shares::new(members)?;
        let total = shares.total;
        // Equal servers go in their order; otherwise steps of the golden ratio spread a server's turns over the round.
        let step = if total == members.len() as u64 {
            1
        } else {
            let golden = (total * 618 / 1000).max(1);
            (golden..total).find(|step| gcd(*step, total) == 1).unwrap_or(1)
        };
        Some(RoundRobin { shares, step, turn: AtomicU64::new(0) })
    }
}

impl Select for RoundRobin {
    fn select(&self, _: &Request) -> ServerId {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % self.shares.total;
        self.shares.at(turn * self.step % self.shares.total)
    }
}

/// By the client's address alone, also across restarts and balancers; a change of the set moves few clients.
#[derive(Debug)]
struct Source {
    table: Arc<Maglev>,
}

impl Select for Source {
    fn select(&self, request: &Request) -> ServerId {
        self.table.lookup(hash_address(request.client.ip()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn build(name: PolicyName, weights: &[u32]) -> Box<dyn Select> {
        let member = |(index, &weight): (usize, &u32)| Member {
            name: format!("s{index}"),
            weight,
            server: ServerId::new(index),
        };
        let members: Vec<Member> = weights.iter().enumerate().map(member).collect();
        let maglev = Arc::new(Maglev::new(&members).unwrap());
        policy(name, &members, &maglev, SelectKey([7; 16])).unwrap()
    }

    fn request(n: u32) -> Request {
        let client = std::net::Ipv4Addr::from_bits(0x0a00_0000 + n);
        Request {
            client: (client, 40_000).into(),
            service: "203.0.113.10:443".parse().unwrap(),
            isn: Some(SeqNumber(n.wrapping_mul(2_654_435_761))),
        }
    }

    fn counts(name: PolicyName, weights: &[u32], requests: u32) -> Vec<f64> {
        let policy = build(name, weights);
        let mut counts = vec![0.0; weights.len()];
        for n in 0..requests {
            counts[policy.select(&request(n)).index()] += 1.0;
        }
        counts
    }

    #[test]
    fn every_policy_keeps_to_the_weights() {
        for name in [PolicyName::Random, PolicyName::RoundRobin, PolicyName::Source] {
            for weights in [&[1, 1, 1, 1][..], &[1, 2, 5], &[100, 300], &[3]] {
                let total: u32 = weights.iter().sum();
                let counts = counts(name, weights, 40_000);
                for (count, weight) in counts.iter().zip(weights) {
                    let wanted = 40_000.0 * f64::from(*weight) / f64::from(total);
                    assert!((count - wanted).abs() / wanted < 0.05, "{name:?} {weights:?}: {counts:?}");
                }
            }
        }
    }

    #[test]
    fn round_robin_is_exact_and_takes_equal_servers_in_order() {
        assert_eq!(counts(PolicyName::RoundRobin, &[1, 2, 5], 800), [100.0, 200.0, 500.0]);
        let policy = build(PolicyName::RoundRobin, &[7, 7, 7]);
        let order: Vec<usize> = (0..6).map(|n| policy.select(&request(n)).index()).collect();
        assert_eq!(order, [0, 1, 2, 0, 1, 2]);
    }

    #[test]
    fn round_robin_spreads_a_heavy_servers_turns() {
        let policy = build(PolicyName::RoundRobin, &[4, 4, 1, 1]);
        let order: Vec<usize> = (0..20).map(|n| policy.select(&request(n)).index()).collect();
        let longest = order.chunk_by(|a, b| a == b).map(<[usize]>::len).max();
        assert!(longest <= Some(2), "{order:?}");
    }

    #[test]
    fn b1_random_repeats_its_choice_for_a_repeated_syn_and_not_for_another_isn() {
        let policy = build(PolicyName::Random, &[1; 8]);
        let repeated = (0..100).all(|n| policy.select(&request(n)) == policy.select(&request(n)));
        assert!(repeated);
        let other = |n| Request { isn: Some(SeqNumber(n)), ..request(1) };
        let first = policy.select(&other(0));
        assert!((1..100).any(|n| policy.select(&other(n)) != first));
    }

    #[test]
    fn o12_random_chooses_for_each_datagram_anew_and_keeps_to_the_weights() {
        let policy = build(PolicyName::Random, &[1, 3]);
        let datagram = Request { isn: None, ..request(1) };
        let of_heavy = (0..4000).filter(|_| policy.select(&datagram).index() == 1).count();
        assert!((2800..3200).contains(&of_heavy), "{of_heavy}");
    }

    #[test]
    fn source_looks_at_the_address_alone() {
        let policy = build(PolicyName::Source, &[1; 8]);
        for n in 0..100 {
            let mut other = request(n);
            other.client.set_port(1);
            other.isn = None;
            assert_eq!(policy.select(&request(n)), policy.select(&other));
        }
    }
}
