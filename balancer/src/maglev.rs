//! Maglev's lookup table (Eisenbud et al., NSDI 2016, §3.4): each server gets a share of the slots by its weight, and
//! a change of the set moves few other slots.
//!
//! No key and nothing of this process goes in: every balancer with the same set has the same table (`B3`).

use std::hash::Hasher;
use std::net::{IpAddr, SocketAddr};

use siphasher::sip::SipHasher24;

use crate::table::ServerId;

/// Slots of a table; a prime, as the permutations need.
pub const SLOTS: usize = 65_537;

/// A server as the table places it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Member {
    /// What its slots depend on; the same on every balancer.
    pub name: String,
    /// Its share, at least 1.
    pub weight: u32,
    /// What a lookup returns.
    pub server: ServerId,
}

/// A filled table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Maglev {
    slots: Box<[ServerId]>,
}

struct Turn {
    next: usize,
    skip: usize,
    credit: u64,
}

impl Maglev {
    /// Fills the table; `None` if there is no member. The order of the members does not matter.
    pub fn new(members: &[Member]) -> Option<Maglev> {
        let mut members: Vec<&Member> = members.iter().filter(|member| member.weight > 0).collect();
        members.sort_by(|a, b| a.name.cmp(&b.name));
        let heaviest = u64::from(members.iter().map(|member| member.weight).max()?);
        let mut turns: Vec<Turn> = members.iter().map(|member| turn(&member.name)).collect();
        let mut slots: Vec<Option<ServerId>> = vec![None; SLOTS];
        let mut left = SLOTS;
        'fill: loop {
            for (member, turn) in members.iter().zip(&mut turns) {
                // A server of half the heaviest's weight takes every other turn.
                turn.credit += u64::from(member.weight);
                if turn.credit < heaviest {
                    continue;
                }
                turn.credit -= heaviest;
                while slots[turn.next].is_some() {
                    turn.next = (turn.next + turn.skip) % SLOTS;
                }
                slots[turn.next] = Some(member.server);
                left -= 1;
                if left == 0 {
                    break 'fill;
                }
            }
        }
        Some(Maglev { slots: slots.into_iter().flatten().collect() })
    }

    /// The server of a hash.
    pub fn lookup(&self, hash: u64) -> ServerId {
        self.slots[(hash % SLOTS as u64) as usize]
    }

    /// The server of each slot.
    pub fn slots(&self) -> &[ServerId] {
        &self.slots
    }
}

/// The permutation of a name: an offset and a step other than 0.
fn turn(name: &str) -> Turn {
    let hash = |key: u64| {
        let mut hasher = SipHasher24::new_with_keys(0x6d61_676c_6576, key);
        hasher.write(name.as_bytes());
        hasher.finish()
    };
    Turn {
        next: (hash(1) % SLOTS as u64) as usize,
        skip: (hash(2) % (SLOTS as u64 - 1) + 1) as usize,
        credit: 0,
    }
}

/// The part of a hash by which a level of a tree chooses. Were it the same on two levels, the lower one would see but
/// some of its table's slots: with the same names on both, those of a single server.
///
/// It is the level's digit of the hash in base [`SLOTS`]; four of them are in 64 bits.
pub fn at_level(hash: u64, level: u8) -> u64 {
    hash / (SLOTS as u64).pow(u32::from(level))
}

/// The seed of [`hash_client`] on a level of a tree: each level has a hash of its own, for the reason of [`at_level`].
pub fn client_seed(level: u8) -> u32 {
    0x6c65_6761_u32.wrapping_add(u32::from(level).wrapping_mul(0x9e37_79b9))
}

/// The slot of a client by its address and port, on a level of a tree: the same on every balancer, and what nftables
/// finds by `jhash ip saddr . tcp sport mod 65537 seed S` ([`shunt_host::offload::Spread`]).
pub fn hash_client(client: SocketAddr, level: u8) -> u64 {
    let mut key = [0; 20];
    let len = match client.ip() {
        IpAddr::V4(address) => {
            key[..4].copy_from_slice(&address.octets());
            key[4..6].copy_from_slice(&client.port().to_be_bytes());
            8
        }
        IpAddr::V6(address) => {
            key[..16].copy_from_slice(&address.octets());
            key[16..18].copy_from_slice(&client.port().to_be_bytes());
            20
        }
    };
    // The kernel scales 32 bits to the number of slots.
    (u64::from(jhash::jhash(&key[..len], client_seed(level))) * SLOTS as u64) >> 32
}

/// The hash of a flow of datagrams, by both ends: the same on every balancer.
pub fn hash_flow(client: SocketAddr, service: SocketAddr) -> u64 {
    let mut hasher = SipHasher24::new_with_keys(0x0066_6c6f_7773, 0);
    for end in [client, service] {
        write_address(&mut hasher, end.ip());
        hasher.write(&end.port().to_be_bytes());
    }
    hasher.finish()
}

/// The hash of packets without ports, by both addresses, the protocol and, of an ICMP echo, its identifier: the same
/// on every balancer.
pub fn hash_portless(client: IpAddr, vip: IpAddr, protocol: u8, identifier: u16) -> u64 {
    let mut hasher = SipHasher24::new_with_keys(0x706f_7274_6c65, 0x7373);
    write_address(&mut hasher, client);
    write_address(&mut hasher, vip);
    hasher.write(&[protocol]);
    hasher.write(&identifier.to_be_bytes());
    hasher.finish()
}

/// The hash of a client's address: the same on every balancer.
pub fn hash_address(client: IpAddr) -> u64 {
    let mut hasher = SipHasher24::new_with_keys(0x736f_7572_6365, 0);
    write_address(&mut hasher, client);
    hasher.finish()
}

/// Feeds an address's octets.
pub(crate) fn write_address(hasher: &mut SipHasher24, address: IpAddr) {
    match address {
        IpAddr::V4(address) => hasher.write(&address.octets()),
        IpAddr::V6(address) => hasher.write(&address.octets()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(weights: &[u32]) -> Vec<Member> {
        let member = |(index, &weight): (usize, &u32)| Member {
            name: format!("server-{index}"),
            weight,
            server: ServerId::new(index),
        };
        weights.iter().enumerate().map(member).collect()
    }

    fn shares(table: &Maglev, count: usize) -> Vec<usize> {
        let mut shares = vec![0; count];
        for slot in table.slots() {
            shares[slot.index()] += 1;
        }
        shares
    }

    #[test]
    fn equal_servers_have_equal_shares() {
        for count in [1, 3, 10, 100] {
            let table = Maglev::new(&members(&vec![1; count])).unwrap();
            let shares = shares(&table, count);
            let (least, most) = (*shares.iter().min().unwrap(), *shares.iter().max().unwrap());
            println!("{count} servers: {least} to {most} slots of {SLOTS}");
            assert!(most - least <= 1, "{count}: {least}..{most}");
        }
    }

    #[test]
    fn shares_follow_the_weights() {
        let weights = [1, 2, 3, 10];
        let shares = shares(&Maglev::new(&members(&weights)).unwrap(), 4);
        for (share, weight) in shares.iter().zip(weights) {
            let wanted = SLOTS * weight as usize / 16;
            assert!(share.abs_diff(wanted) * 100 < wanted, "{shares:?}");
        }
    }

    #[test]
    fn removing_a_server_moves_few_slots_of_the_others() {
        let all = members(&[1; 20]);
        let before = Maglev::new(&all).unwrap();
        let after = Maglev::new(&all[1..]).unwrap();
        let removed = all[0].server;
        let moved =
            before.slots().iter().zip(after.slots()).filter(|(b, a)| **b != removed && b != a).count();
        println!("removing 1 of 20 servers moved {moved} of {SLOTS} slots that were not its own");
        assert!(moved * 20 < SLOTS, "{moved}");
    }

    #[test]
    fn b3_the_table_does_not_depend_on_order_or_process() {
        let mut reversed = members(&[1, 2, 3]);
        let table = Maglev::new(&reversed).unwrap();
        reversed.reverse();
        assert_eq!(Maglev::new(&reversed).unwrap(), table);
        // A fixed vector: another version of this program must choose the same.
        let first: Vec<usize> = table.slots()[..8].iter().map(|slot| slot.index()).collect();
        assert_eq!(first, [2, 1, 1, 0, 1, 0, 2, 1]);
        assert_eq!(hash_client("192.0.2.1:4711".parse().unwrap(), 0), 24_932);
        assert_eq!(hash_client("[2001:db8::1]:4711".parse().unwrap(), 1), 36_751);
    }

    #[test]
    fn o21_a_second_level_spreads_what_the_first_gives_it_whatever_the_names() {
        // The worst case: both levels have the same table.
        let table = Maglev::new(&members(&[1; 4])).unwrap();
        let clients =
            (0..40_000u32).map(|n| SocketAddr::new([10, 1, (n >> 8) as u8, n as u8].into(), 50_000));
        let of = |client: &SocketAddr, level| table.lookup(hash_client(*client, level)).index();
        let below: Vec<SocketAddr> = clients.filter(|client| of(client, 0) == 0).collect();
        let spread = |level| {
            let mut counts = [0; 4];
            for client in &below {
                counts[of(client, level)] += 1;
            }
            counts
        };
        assert_eq!(spread(0), [below.len(), 0, 0, 0], "the same part of the hash: one server gets all");
        for level in 1..=crate::config::MAX_LEVEL {
            let counts = spread(level);
            println!("level {level}: {counts:?}");
            assert!(counts.iter().all(|count| *count * 5 > below.len()), "{counts:?}");
        }
    }

    #[test]
    fn no_member_means_no_table() {
        assert_eq!(Maglev::new(&[]), None);
    }
}
