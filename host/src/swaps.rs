//! Exchange of ports that the kernel does by itself, connection by connection: an nftables table of stateless maps.
//!
//! A connection of this host's TCP that the network knows by another port of its peer is a [`PortSwap`]. What the local
//! TCP sends to the peer gets the network's port and a mark; what the network sends gets the port that the local TCP knows,
//! and the same mark. Policy rules take marked packets past the daemon's device. Nothing is tracked or remembered: the
//! maps work without the daemon, too.

use std::collections::HashMap;
use std::net::SocketAddr;

use nlink::Connection;
use nlink::netlink::Nftables;
use nlink::netlink::nftables::{
    BaseChain, Chain, Expr, ExthdrOp, Family as Table, FilterHook, LookupExpr, Object, ObjectState,
    PayloadBase, PayloadCsum, Priority, Register, Rule, Set, SetDataType, SetElement, SetKeyType,
    Transaction, Verdict,
};
use serde::{Deserialize, Serialize};

use crate::divert::OPTION_KIND;
use crate::error::{HostError, absent};
use crate::maps::{address_type, element_of, payload, place, whole};
use crate::nft::{connect, exists, remove};
use crate::offload::{Count, End};
use crate::prefix::{Family, Transport};

/// The most swaps at a time; each is an element of two maps.
pub const MAX_SWAPS: usize = 65_536;
/// Swaps in one transaction: what a netlink socket's buffer takes in any case.
const SWAPS_PER_TRANSACTION: usize = 256;

const PREROUTING: &str = "prerouting";
const OUTPUT: &str = "output";
/// Of the segments swapped, by direction.
const OUT: &str = "out";
const IN: &str = "in";
/// SYN.
const DECIDED: u8 = 0x02;
const KEY: Register = Register::R0;
/// Behind the longest key.
const RESULT: Register = Register::R3;

/// The table of swaps, empty at first. Segments with SYN or a redirect option are left alone (`C11`), as are fragments
/// and IPv6 packets with extension headers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwapTable {
    /// What arrives on this interface is left alone: the daemon's own TUN.
    pub except_interface: String,
    /// The mark of what is swapped.
    pub mark: u32,
    /// The bits of the packet's mark that are replaced.
    pub mask: u32,
}

/// A connection whose peer has one port for the local TCP and another for the network, or twice the same: then its
/// segments are only marked. Both addresses are of one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PortSwap {
    /// This host's socket.
    pub local: SocketAddr,
    /// The peer, as the local TCP knows it.
    pub remote: SocketAddr,
    /// The peer's port, as the network knows it.
    pub port: u16,
}

impl PortSwap {
    fn outgoing(&self) -> SetElement {
        key(self.local, self.remote).value(SetElement::port(self.port))
    }

    fn incoming(&self) -> SetElement {
        let network = SocketAddr::new(self.remote.ip(), self.port);
        key(network, self.local).value(SetElement::port(self.remote.port()))
    }

    fn family(&self) -> Family {
        Family::of(self.local.ip())
    }
}

fn key(source: SocketAddr, destination: SocketAddr) -> SetElement {
    SetElement::concat([
        element_of(source.ip()),
        SetElement::port(source.port()),
        element_of(destination.ip()),
        SetElement::port(destination.port()),
    ])
}

/// What the swaps have done since the table was made, super-packets counting as one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SwapCounts {
    /// Of the local TCP.
    pub out: Count,
    /// Of the network.
    pub back: Count,
}

/// Creates the table, in place of an old one.
pub(crate) async fn install(table: &str, swaps: &SwapTable) -> Result<(), HostError> {
    let nft = connect()?;
    let failed = |error| HostError::netlink(format!("create the nftables table {table}"), error);
    let exists = exists(&nft, table, Table::Inet).await?;
    let transaction = whole_table(&nft, table, swaps, exists).map_err(failed)?;
    transaction.commit(&nft).await.map_err(failed)
}

fn whole_table(
    nft: &Connection<Nftables>,
    table: &str,
    swaps: &SwapTable,
    exists: bool,
) -> nlink::Result<Transaction> {
    let mut transaction = nft.transaction();
    if exists {
        transaction = transaction.del_table(table, Table::Inet);
    }
    transaction = transaction.add_table(table, Table::Inet);
    for counter in [OUT, IN] {
        transaction = transaction.add_object(&Object::counter(table, counter).family(Table::Inet));
    }
    for (family, end) in Family::BOTH.into_iter().flat_map(|family| [(family, OUT), (family, IN)]) {
        transaction = transaction.add_set(map(table, family, end));
    }
    let prerouting = BaseChain::filter(FilterHook::Prerouting, Priority::Raw);
    for (name, base) in [(PREROUTING, prerouting), (OUTPUT, BaseChain::route(Priority::Raw))] {
        transaction = transaction.add_chain(Chain::new(table, name)?.family(Table::Inet).base(base));
    }
    let rule = |chain| Rule::new(table, chain).family(Table::Inet);
    transaction = transaction.add_rule(rule(PREROUTING).match_iif(&swaps.except_interface).accept());
    for (chain, direction, end) in [(PREROUTING, IN, End::Source), (OUTPUT, OUT, End::Destination)] {
        transaction = transaction.add_rule(has_option(rule(chain)).accept());
        for family in Family::BOTH {
            transaction = transaction.add_rule(swap(rule(chain), swaps, family, direction, end));
        }
    }
    Ok(transaction)
}

fn map(table: &str, family: Family, direction: &str) -> Set {
    let address = address_type(family);
    let end = [address.clone(), SetKeyType::InetService];
    Set::new(table, &map_name(family, direction))
        .family(Table::Inet)
        .key_type(SetKeyType::Concat([end.clone(), end].concat()))
        .map(SetDataType::Value(SetKeyType::InetService))
}

fn map_name(family: Family, direction: &str) -> String {
    match family {
        Family::V4 => format!("{direction}_4"),
        Family::V6 => format!("{direction}_6"),
    }
}

/// Only segments with the option: loading a byte of one that is not there ends the rule.
fn has_option(rule: Rule) -> Rule {
    rule.match_l4proto(Transport::Tcp.number()).expr(Expr::Exthdr {
        dreg: KEY,
        op: ExthdrOp::TcpOpt,
        exthdr_type: OPTION_KIND,
        offset: 0,
        len: 1,
    })
}

/// Exchanges the port of one end for what the map says of addresses and ports.
fn swap(rule: Rule, swaps: &SwapTable, family: Family, direction: &str, end: End) -> Rule {
    let (destination, port_behind, source_port) = match family {
        Family::V4 => (Register::Reg32_02, Register::Reg32_03, Register::Reg32_01),
        Family::V6 => (Register::Reg32_05, Register::Reg32_09, Register::Reg32_04),
    };
    let address = |end, register| {
        let (offset, len) = place(end, family);
        payload(PayloadBase::Network, offset, len, register)
    };
    let write = Expr::PayloadSet {
        sreg: RESULT,
        base: PayloadBase::Transport,
        offset: if end == End::Source { 0 } else { 2 },
        len: 2,
        csum: PayloadCsum::Inet,
        csum_offset: 16,
        l4_pseudo_header: false,
    };
    let exprs = whole(family, Transport::Tcp, DECIDED).into_iter().chain([
        address(End::Source, KEY),
        payload(PayloadBase::Transport, 0, 2, source_port),
        address(End::Destination, destination),
        payload(PayloadBase::Transport, 2, 2, port_behind),
        LookupExpr::new(map_name(family, direction), KEY).dreg(RESULT).into(),
        write,
    ]);
    exprs
        .fold(rule, Rule::expr)
        .counter_named(direction)
        .set_mark_masked(swaps.mark, swaps.mask)
        .notrack()
        .expr(Expr::Verdict(Verdict::Accept))
}

/// The swaps that stand in a [`SwapTable`], and the way to change them: one netlink socket that stays open.
pub struct PortSwaps {
    nft: Connection<Nftables>,
    table: String,
    made: SwapTable,
    /// By local socket and peer, as the local TCP knows it.
    standing: HashMap<(SocketAddr, SocketAddr), u16>,
}

impl PortSwaps {
    pub(crate) fn open(table: String, made: SwapTable) -> Result<Self, HostError> {
        Ok(Self { nft: connect()?, table, made, standing: HashMap::new() })
    }

    fn failed(&self, what: &str, error: nlink::Error) -> HostError {
        HostError::netlink(format!("{what} the nftables table {}", self.table), error)
    }

    /// Swaps that stand.
    pub fn len(&self) -> usize {
        self.standing.len()
    }

    /// Whether none stands.
    pub fn is_empty(&self) -> bool {
        self.standing.is_empty()
    }

    /// Those that stand.
    pub fn iter(&self) -> impl Iterator<Item = PortSwap> {
        self.standing.iter().map(|((local, remote), port)| PortSwap {
            local: *local,
            remote: *remote,
            port: *port,
        })
    }

    /// Whether just this swap stands.
    pub fn contains(&self, swap: &PortSwap) -> bool {
        self.standing.get(&(swap.local, swap.remote)) == Some(&swap.port)
    }

    /// Takes away `gone`, then adds `new`; what stands already, or does not stand, is no error. If somebody has changed
    /// our table meanwhile, as a firewall's reload does, it is made anew.
    ///
    /// # Errors
    /// The kernel refuses; what stands then is unknown.
    pub async fn change(&mut self, gone: &[PortSwap], new: &[PortSwap]) -> Result<(), HostError> {
        let gone: Vec<PortSwap> = gone.iter().copied().filter(|swap| self.contains(swap)).collect();
        for swap in &gone {
            self.standing.remove(&(swap.local, swap.remote));
        }
        let new: Vec<PortSwap> = new.iter().copied().filter(|swap| !self.contains(swap)).collect();
        for swap in &new {
            self.standing.insert((swap.local, swap.remote), swap.port);
        }
        let Err(error) = self.send(&gone, &new).await else { return Ok(()) };
        tracing::info!(%error, table = self.table, "the swaps cannot be changed: they are made anew");
        install(&self.table, &self.made).await?;
        let all: Vec<PortSwap> = self.iter().collect();
        self.send(&[], &all).await
    }

    /// Removes the table with all that stands in it; for good, unless the session makes another.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn remove(&mut self) -> Result<(), HostError> {
        self.standing.clear();
        remove(&self.table, Table::Inet).await.map(drop)
    }

    async fn send(&self, gone: &[PortSwap], new: &[PortSwap]) -> Result<(), HostError> {
        let removed = gone.chunks(SWAPS_PER_TRANSACTION).map(|chunk| (chunk, false));
        let added = new.chunks(SWAPS_PER_TRANSACTION).map(|chunk| (chunk, true));
        let few = gone.len() + new.len() <= SWAPS_PER_TRANSACTION;
        let mut transaction = self.nft.transaction();
        for (chunk, add) in removed.chain(added) {
            transaction = self.changed(transaction, chunk, add);
            if !few {
                let full = std::mem::replace(&mut transaction, self.nft.transaction());
                full.commit(&self.nft).await.map_err(|error| self.failed("change", error))?;
            }
        }
        if few && !(gone.is_empty() && new.is_empty()) {
            transaction.commit(&self.nft).await.map_err(|error| self.failed("change", error))?;
        }
        Ok(())
    }

    fn changed(&self, mut transaction: Transaction, swaps: &[PortSwap], add: bool) -> Transaction {
        for family in Family::BOTH {
            for (direction, element) in
                [(OUT, PortSwap::outgoing as fn(&PortSwap) -> SetElement), (IN, PortSwap::incoming)]
            {
                let of_family = swaps.iter().filter(|swap| swap.family() == family);
                let elements: Vec<SetElement> = of_family.map(element).collect();
                if elements.is_empty() {
                    continue;
                }
                let map = map(&self.table, family, direction);
                transaction = if add {
                    transaction.add_set_elements(&map, &elements)
                } else {
                    transaction.del_set_elements(&map, &elements)
                };
            }
        }
        transaction
    }

    /// What the kernel has swapped since the table was made; nothing if it is gone.
    ///
    /// # Errors
    /// The kernel does not say.
    pub async fn counts(&self) -> Result<SwapCounts, HostError> {
        let objects = match self.nft.list_objects_in(&self.table, Table::Inet).await {
            Ok(objects) => objects,
            Err(error) if absent(&error) => return Ok(SwapCounts::default()),
            Err(error) => return Err(self.failed("read counters of", error)),
        };
        let mut counts = SwapCounts::default();
        for object in objects {
            let ObjectState::Counter { packets, bytes, .. } = object.state else { continue };
            match object.name.as_str() {
                OUT => counts.out = Count { packets, bytes },
                IN => counts.back = Count { packets, bytes },
                _ => {}
            }
        }
        Ok(counts)
    }
}
