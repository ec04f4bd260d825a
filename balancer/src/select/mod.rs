//! Which server of a set a redirected connection goes to (`B1`, `B7`): one file a policy, behind one trait.
//!
//! A policy is built over the servers that take new connections; health and drain have been seen to before. What may
//! change while it stands (slow start, loads, packets sent) reaches it by [`Select::refresh`]; no policy reads a clock.

#![allow(
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "weights, loads and counts are compared, not counted with"
)]

mod class;
mod elevator;
mod least_load;
mod least_packets;
mod live;
mod random;
mod round_robin;
mod shares;
mod source;
#[cfg(test)]
mod testing;
mod weights;

use std::fmt;
use std::hash::Hasher;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use shunt_stack::time::Instant;
use shunt_stack::wire::SeqNumber;
use siphasher::sip128::{Hash128, Hasher128, SipHasher24};

use crate::config::{PolicyName, UdpPolicy};
use crate::maglev::{Maglev, Member};
use crate::table::ServerId;

pub(crate) use class::{Choice, Classes};
pub use live::LoadError;
pub(crate) use live::{Live, Lives};
pub use weights::{RAMP_FLOOR, RAMP_STEPS};

/// What is known of a connection, or of a datagram, when its server is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request<'a> {
    /// The client's address and port.
    pub client: SocketAddr,
    /// The VIP and the redirect port.
    pub service: SocketAddr,
    /// The SYN's sequence number; a datagram has none (§6).
    pub isn: Option<SeqNumber>,
    /// The packet's differentiated services code point.
    pub dscp: u8,
    /// What the packet carries; a SYN seldom carries anything.
    pub payload: &'a [u8],
}

/// A way to choose. Choosing again for a repeated SYN should choose the same server; where it does not, the client
/// repairs it (`C4`).
pub trait Select: Send + Sync + fmt::Debug {
    /// The chosen server.
    fn select(&self, request: &Request<'_>) -> ServerId;

    /// Follows what has changed with time or by loads; says when to be called again at the latest, if ever.
    fn refresh(&self, now: Instant) -> Option<Instant>;
}

/// The key of keyed choices, secret to this process so that nobody can choose a server by choosing ports.
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

    /// A key of its own for another purpose: who knows that one knows nothing of this one.
    pub(crate) fn derived(self, purpose: &[u8]) -> [u8; 16] {
        let mut hasher = SipHasher24::new_with_key(&self.0);
        hasher.write(purpose);
        hasher.finish128().as_bytes()
    }

    /// Two numbers of a request by its addresses, ports and ISN: the same for a repeated SYN (`B1`). A datagram's are
    /// told apart by `number` instead.
    fn draw(self, request: &Request<'_>, number: impl FnOnce() -> u64) -> Hash128 {
        // At once: small parts one by one take the hasher three times as long.
        let (mut bytes, mut used) = ([0; 2 * 16 + 2 * 2 + 8], 0);
        let mut put = |part: &[u8]| {
            bytes[used..used + part.len()].copy_from_slice(part);
            used += part.len();
        };
        for socket in [request.client, request.service] {
            match socket.ip() {
                std::net::IpAddr::V4(address) => put(&address.octets()),
                std::net::IpAddr::V6(address) => put(&address.octets()),
            }
        }
        put(&request.client.port().to_be_bytes());
        put(&request.service.port().to_be_bytes());
        match request.isn {
            Some(isn) => put(&isn.0.to_be_bytes()),
            None => put(&number().to_be_bytes()),
        }
        let mut hasher = SipHasher24::new_with_key(&self.0);
        hasher.write(&bytes[..used]);
        hasher.finish128()
    }
}

impl fmt::Debug for SelectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SelectKey(..)")
    }
}

/// A server that takes new connections, and what is known of it at run time.
#[derive(Debug, Clone)]
pub(crate) struct Candidate {
    pub(crate) member: Member,
    pub(crate) live: Arc<Live>,
}

/// What a policy is built by, beside its name and candidates.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Terms {
    pub(crate) key: SelectKey,
    /// How long a new server's weight grows; zero: not at all.
    pub(crate) slow_start: Duration,
    /// How old a load may be to count.
    pub(crate) load_max_age: Duration,
    /// On which level of a tree hashes are read.
    pub(crate) level: u8,
}

/// The policy of a name over `candidates`; `maglev` gives their Maglev table. `None` if there is no candidate.
pub(crate) fn policy(
    name: PolicyName,
    candidates: &[Candidate],
    maglev: impl FnOnce() -> Option<Arc<Maglev>>,
    terms: Terms,
) -> Option<Box<dyn Select>> {
    Some(match name {
        PolicyName::Random | PolicyName::Payload => Box::new(random::Random::new(candidates, terms)?),
        PolicyName::RoundRobin => Box::new(round_robin::RoundRobin::new(candidates, terms)?),
        PolicyName::Source => Box::new(source::Hashed::by_client(candidates, maglev()?, terms)),
        PolicyName::Elevator => Box::new(elevator::Elevator::new(candidates, terms)?),
        PolicyName::LeastPackets => Box::new(least_packets::LeastPackets::new(candidates, terms)?),
        PolicyName::LeastLoad => Box::new(least_load::LeastLoad::new(candidates, terms)?),
    })
}

/// The policy of a name for datagrams (§6); otherwise as [`policy`].
pub(crate) fn datagram_policy(
    name: UdpPolicy,
    candidates: &[Candidate],
    maglev: impl FnOnce() -> Option<Arc<Maglev>>,
    terms: Terms,
) -> Option<Box<dyn Select>> {
    Some(match name {
        UdpPolicy::Hash => Box::new(source::Hashed::by_flow(candidates, maglev()?, terms)),
        UdpPolicy::Random => Box::new(random::Random::new(candidates, terms)?),
        UdpPolicy::RoundRobin => Box::new(round_robin::RoundRobin::new(candidates, terms)?),
    })
}
