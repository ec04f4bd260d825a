//! Turns an [`Offload`] into nftables tables of stateless maps, created and replaced in one batch, and reads their
//! counters.

mod expressions;
mod ingress;
mod routed;
mod table;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::SndBufForce;
use nlink::Connection;
use nlink::netlink::Nftables;
use nlink::netlink::nftables::{Family as Nft, SetElement, Transaction};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::error::{HostError, absent};
use crate::nft::{connect, exists, remove};
use crate::offload::{Count, Counted, End, Goal, Offload, PortMap, Spread};
use crate::prefix::Family;
use table::Table;

pub(crate) use expressions::{address_type, element_of, payload, place, whole};

/// Both tables, which have the same name.
struct Tables<'a> {
    routed: Table<'a>,
    ingress: Option<Table<'a>>,
}

impl<'a> Tables<'a> {
    fn new(name: &'a str, offload: &Offload) -> Tables<'a> {
        Tables { routed: routed::table(name, offload), ingress: ingress::table(name, offload) }
    }

    /// Whether a [`difference`](Self::difference) makes the new ones of these, and all that was counted stands on.
    fn turns_into(&self, new: &Tables<'_>) -> bool {
        let ingress = match (&self.ingress, &new.ingress) {
            (None, _) => true,
            (Some(old), Some(new)) => old.is_like(new),
            (Some(_), None) => false,
        };
        ingress && self.routed.is_like(&new.routed)
    }

    /// What makes these out of the old ones.
    fn difference(&self, transaction: Transaction, old: &Tables<'_>) -> nlink::Result<Transaction> {
        let transaction = self.routed.difference(transaction, &old.routed);
        match (&self.ingress, &old.ingress) {
            (Some(new), Some(old)) => Ok(new.difference(transaction, old)),
            (Some(new), None) => new.whole(transaction, false),
            (None, _) => Ok(transaction),
        }
    }

    fn whole(&self, transaction: Transaction, standing: Standing, name: &str) -> nlink::Result<Transaction> {
        let transaction = self.routed.whole(transaction, standing.routed)?;
        match &self.ingress {
            Some(ingress) => ingress.whole(transaction, standing.ingress),
            None if standing.ingress => Ok(transaction.del_table(name, Nft::Netdev)),
            None => Ok(transaction),
        }
    }
}

/// Which of the tables are there.
#[derive(Debug, Clone, Copy)]
struct Standing {
    routed: bool,
    ingress: bool,
}

impl Standing {
    async fn look(nft: &Connection<Nftables>, table: &str) -> Result<Standing, HostError> {
        Ok(Standing {
            routed: exists(nft, table, Nft::Inet).await?,
            ingress: exists(nft, table, Nft::Netdev).await?,
        })
    }
}

/// Creates the tables, or turns them into what they have to be, atomically. `old` is what stands if the tables are ours:
/// where the rules stay the same, entries that do keep their counters. Says whether they did.
pub(crate) async fn install(
    table: &str,
    offload: &Offload,
    old: Option<&Offload>,
) -> Result<bool, HostError> {
    let nft = connect()?;
    let standing = Standing::look(&nft, table).await?;
    let old = old.filter(|_| standing.routed).cloned();
    let (table, offload, runtime) = (table.to_owned(), offload.clone(), Handle::current());
    make_room(&nft, &offload);
    // Tens of thousands of elements take the kernel a while: nothing else of the daemon waits for it. A thread of its own:
    // one of the event loop's would stay, with the rights that the daemon has until it is sandboxed.
    let (done, made) = oneshot::channel();
    let make = move || -> Result<bool, HostError> {
        let new = Tables::new(&table, &offload);
        let old = old.as_ref().map(|old| Tables::new(&table, old));
        let gone = |old: &Tables<'_>| old.ingress.is_some() != standing.ingress;
        let failed = |error| HostError::netlink(format!("create the nftables table {table}"), error);
        if let Some(old) = old.filter(|old| !gone(old) && old.turns_into(&new)) {
            let difference = new.difference(nft.transaction(), &old).map_err(failed)?;
            match runtime.block_on(difference.commit(&nft)) {
                Ok(()) => return Ok(true),
                // Somebody else has changed our table.
                Err(error) => {
                    tracing::debug!(%error, table, "the maps cannot be changed: they are made anew");
                }
            }
        }
        let transaction = new.whole(nft.transaction(), standing, &table).map_err(failed)?;
        runtime.block_on(transaction.commit(&nft)).map_err(failed)?;
        Ok(false)
    };
    let thread = std::thread::Builder::new().name("maps".to_owned());
    thread.spawn(move || drop(done.send(make()))).map_err(HostError::Thread)?;
    made.await.unwrap_or_else(|_| Err(HostError::Thread(io::Error::other("it panicked"))))
}

/// Removes the tables; says how many there were.
pub(crate) async fn uninstall(table: &str) -> Result<usize, HostError> {
    let ingress = remove(table, Nft::Netdev).await?;
    Ok(usize::from(remove(table, Nft::Inet).await?) + usize::from(ingress))
}

/// Lets one batch be as large as it has to be. What is forbidden here shows when the batch is sent.
fn make_room(nft: &Connection<Nftables>, offload: &Offload) {
    // Of a key and a value with their headers, rounded up.
    const ELEMENT: usize = 128;
    let slots: usize = offload.spreads.iter().map(|spread| spread.slots.len() + spread.targets.len()).sum();
    let entries: usize = offload.maps.iter().map(|map| map.entries.len()).sum();
    let hops = offload.shortcuts.iter().flat_map(|shortcuts| &shortcuts.hops);
    // Ranges have two ends; all else is in two tables.
    let ranges: usize = hops.map(|hop| hop.destinations.len()).sum();
    let wanted = 2 * (slots + entries + ranges) * ELEMENT + (1 << 20);
    if let Err(error) = setsockopt(nft.socket(), SndBufForce, &wanted) {
        tracing::debug!(%error, wanted, "the netlink socket's buffer stays as it is");
    }
}

/// What each entry has counted since it was added; empty if the tables are gone.
pub(crate) async fn counts(table: &str, offload: &Offload) -> Result<BTreeMap<Counted, Count>, HostError> {
    let mut counts = Counts { nft: connect()?, table, counts: BTreeMap::new() };
    for (index, map) in offload.maps.iter().enumerate() {
        for family in Family::BOTH.into_iter().filter(|family| holds(map, *family)) {
            counts.map(index, family, Nft::Inet, &map_name(index, family)).await?;
            for name in ingress::map_names(offload, index, map, family) {
                counts.map(index, family, Nft::Netdev, &name).await?;
            }
        }
    }
    for (index, spread) in offload.spreads.iter().enumerate() {
        let tables = [Some(Nft::Inet), ingress::has_spread(offload, spread).then_some(Nft::Netdev)];
        for table in tables.into_iter().flatten() {
            counts.spread(index, spread, table, offload.mark_mask.is_some()).await?;
        }
    }
    Ok(counts.counts)
}

/// Counters as they are read.
struct Counts<'a> {
    nft: Connection<Nftables>,
    table: &'a str,
    counts: BTreeMap<Counted, Count>,
}

impl Counts<'_> {
    fn add(&mut self, of: Counted, element: &SetElement) {
        if let Some((packets, bytes)) = element.counter() {
            let count = self.counts.entry(of).or_default();
            (count.packets, count.bytes) = (count.packets + packets, count.bytes + bytes);
        }
    }

    async fn map(&mut self, index: usize, family: Family, table: Nft, name: &str) -> Result<(), HostError> {
        for element in self.elements(table, name).await? {
            if let Some(key) = socket(element.key(), family) {
                self.add(Counted::Map(index, key), &element);
            }
        }
        Ok(())
    }

    async fn spread(
        &mut self,
        index: usize,
        spread: &Spread,
        table: Nft,
        marks: bool,
    ) -> Result<(), HostError> {
        for element in self.elements(table, &spread_names(index)[2]).await? {
            let goal = if marks {
                element.key().first_chunk().map(|mark| Goal::Mark(u32::from_ne_bytes(*mark)))
            } else {
                address(element.key(), family_of(spread)).map(Goal::Address)
            };
            if let Some(goal) = goal {
                self.add(Counted::Spread(index, goal), &element);
            }
        }
        Ok(())
    }

    async fn elements(&self, table: Nft, set: &str) -> Result<Vec<SetElement>, HostError> {
        match self.nft.list_set_elements(self.table, set, table).await {
            Ok(elements) => Ok(elements),
            Err(error) if absent(&error) => Ok(Vec::new()),
            Err(error) => {
                Err(HostError::netlink(format!("read counters of the nftables table {}", self.table), error))
            }
        }
    }
}

fn map_name(index: usize, family: Family) -> String {
    match family {
        Family::V4 => format!("ports{index}_4"),
        Family::V6 => format!("ports{index}_6"),
    }
}

/// Of the targets, the slots and the counters.
fn spread_names(index: usize) -> [String; 3] {
    ["targets", "slots", "counts"].map(|kind| format!("{kind}{index}"))
}

fn holds(map: &PortMap, family: Family) -> bool {
    map.entries.keys().any(|key| Family::of(key.ip()) == family)
}

fn family_of(spread: &Spread) -> Family {
    spread.targets.first().map_or(Family::V4, |target| Family::of(target.ip()))
}

/// The address that a key begins with.
fn address(key: &[u8], family: Family) -> Option<IpAddr> {
    match family {
        Family::V4 => key.first_chunk::<4>().map(|octets| (*octets).into()),
        Family::V6 => key.first_chunk::<16>().map(|octets| (*octets).into()),
    }
}

/// What a [`table::Key::Socket`] was.
fn socket(key: &[u8], family: Family) -> Option<SocketAddr> {
    let port = key.get(place(End::Source, family).1 as usize..)?.first_chunk::<2>()?;
    Some(SocketAddr::new(address(key, family)?, u16::from_be_bytes(*port)))
}
