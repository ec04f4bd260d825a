//! `least-packets`: the server to which this balancer has sent the fewest packets lately, in relation to its weight.
//!
//! Two servers are drawn as `random` draws one, and the better of them is taken: a server that has just come gets at
//! most twice its part of the new connections, never all of them (Mitzenmacher, "The Power of Two Choices"). Packets
//! count less as time passes, by a half-life, so that a long history is not held against a server. The draw repeats for
//! a repeated SYN; which of the two is better may have changed by then (`B1`, repaired by `C4`).

use shunt_stack::time::Instant;

use super::shares::Shares;
use super::weights::Weights;
use super::{Candidate, Request, Select, SelectKey, Terms};
use crate::table::ServerId;

#[derive(Debug)]
pub(super) struct LeastPackets {
    shares: Weights<Shares>,
    key: SelectKey,
}

impl LeastPackets {
    pub(super) fn new(candidates: &[Candidate], terms: Terms) -> Option<LeastPackets> {
        Some(LeastPackets { shares: Weights::new(candidates, terms)?, key: terms.key })
    }

    fn burden(&self, place: usize) -> f64 {
        let candidate = &self.shares.candidates()[place];
        candidate.live.recent_packets() / f64::from(candidate.member.weight)
    }
}

impl Select for LeastPackets {
    fn select(&self, request: &Request<'_>) -> ServerId {
        let shares = self.shares.current();
        let drawn = self.key.draw(request, || 0);
        let (one, other) = (shares.drawn(drawn.h1), shares.drawn(drawn.h2));
        let better = if self.burden(other) < self.burden(one) { other } else { one };
        shares.server(better)
    }

    fn refresh(&self, now: Instant) -> Option<Instant> {
        self.shares.refresh(now)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Bench, keeps_to_the_weights};
    use crate::config::PolicyName;

    /// Connections of very different lengths, most of them short.
    fn length(n: u32) -> u32 {
        if n.is_multiple_of(50) { 2000 } else { 1 + n % 20 }
    }

    /// How far the packets of a server are above its part, at worst.
    fn overload(name: PolicyName, weights: &[u32]) -> f64 {
        let bench = Bench::new(name, weights);
        let mut packets = vec![0.0; weights.len()];
        for n in 0..20_000 {
            let server = bench.select(n);
            packets[server] += f64::from(length(n));
            bench.send(server, length(n));
        }
        let (sum, total) = (packets.iter().sum::<f64>(), f64::from(weights.iter().sum::<u32>()));
        let over = packets.iter().zip(weights).map(|(p, w)| p / sum / (f64::from(*w) / total));
        over.fold(0.0, f64::max)
    }

    #[test]
    fn without_packets_connections_follow_the_weights() {
        keeps_to_the_weights(PolicyName::LeastPackets, 0.05);
    }

    #[test]
    fn packets_follow_the_weights_closer_than_by_chance() {
        for weights in [&[1; 20][..], &[1, 1, 1, 1, 4, 4, 8]] {
            let (least, random) =
                (overload(PolicyName::LeastPackets, weights), overload(PolicyName::Random, weights));
            println!("{weights:?}: {least:.3} of its part at worst, random {random:.3}");
            assert!(least - 1.0 < (random - 1.0) / 2.0, "{least} {random}");
        }
    }

    #[test]
    fn a_server_that_has_had_nothing_yet_gets_no_more_than_twice_its_part() {
        let bench = Bench::new(PolicyName::LeastPackets, &[1; 10]);
        (1..10).for_each(|server| bench.send(server, 1_000_000));
        let counts = bench.counts(10_000);
        assert!(counts[0] > 1700.0 && counts[0] < 2000.0, "{counts:?}");
    }

    #[test]
    fn what_is_long_past_no_longer_counts() {
        let mut bench = Bench::new(PolicyName::LeastPackets, &[1; 2]);
        bench.send(0, 1_000_000);
        assert!(bench.counts(2000)[0] < 600.0);
        // Thirty half-lives.
        for second in 0..300 {
            bench.advance(second * 1000);
            bench.send(1, 10);
        }
        assert!(bench.counts(2000)[0] > 1400.0, "{:?}", bench.counts(2000));
    }
}
