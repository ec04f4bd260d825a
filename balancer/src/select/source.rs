//! By a hash that everybody computes alike, also across restarts and balancers; a change of the set moves few clients.
//! `source` looks at the client's address alone, `hash` (datagrams) at both addresses and ports.

use std::sync::Arc;

use shunt_stack::time::Instant;

use super::weights::{Drawn, Weights};
use super::{Candidate, Request, Select, Terms};
use crate::maglev::{Maglev, Member, at_level, hash_address, hash_flow};
use crate::table::ServerId;

#[derive(Debug)]
pub(super) struct Hashed {
    table: Weights<Maglev>,
    hash: fn(&Request<'_>) -> u64,
    level: u8,
}

impl Drawn for Maglev {
    fn build(candidates: &[Candidate], weights: &[u64]) -> Option<Maglev> {
        let member = |(candidate, weight): (&Candidate, &u64)| Member {
            weight: u32::try_from(*weight).unwrap_or(u32::MAX),
            ..candidate.member.clone()
        };
        let members: Vec<Member> = candidates.iter().zip(weights).map(member).collect();
        Maglev::new(&members)
    }
}

impl Hashed {
    /// By the client's address; `table` is that of the whole weights.
    pub(super) fn by_client(candidates: &[Candidate], table: Arc<Maglev>, terms: Terms) -> Hashed {
        let hash = |request: &Request<'_>| hash_address(request.client.ip());
        Hashed { table: Weights::with(candidates, table, terms), hash, level: terms.level }
    }

    /// By both addresses and ports.
    pub(super) fn by_flow(candidates: &[Candidate], table: Arc<Maglev>, terms: Terms) -> Hashed {
        let hash = |request: &Request<'_>| hash_flow(request.client, request.service);
        Hashed { table: Weights::with(candidates, table, terms), hash, level: terms.level }
    }
}

impl Select for Hashed {
    fn select(&self, request: &Request<'_>) -> ServerId {
        self.table.current().lookup(at_level((self.hash)(request), self.level))
    }

    fn refresh(&self, now: Instant) -> Option<Instant> {
        self.table.refresh(now)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Bench, keeps_to_the_weights, request};
    use crate::config::PolicyName;

    #[test]
    fn clients_follow_the_weights() {
        keeps_to_the_weights(PolicyName::Source, 0.05);
    }

    #[test]
    fn it_looks_at_the_address_alone() {
        let bench = Bench::new(PolicyName::Source, &[1; 8]);
        for n in 0..100 {
            let mut other = request(n);
            other.client.set_port(1);
            other.isn = None;
            assert_eq!(bench.policy.select(&request(n)), bench.policy.select(&other));
        }
    }
}
