//! The table that rewrites packets where they arrive and hands them on at once: with the next hop known from
//! [`Shortcuts`], nothing has to be routed.
//!
//! What is not for this host on its link, is in a VLAN of it, would live for no hop more, or has no shortcut goes on as
//! without this table.

use nlink::netlink::nftables::{
    BaseChain, ChainName, CmpOp, Devices, Expr, Family as Nft, FilterHook, LookupExpr, MetaKey, PayloadBase,
    Priority, Verdict,
};

use super::expressions::{
    BEHIND, KEY, RESULT, compare, load, masked, meta, nfproto, payload, place, spread_to, unfragmented,
    without, write,
};
use super::table::Table;
use super::{family_of, holds, map_name, spread_names};
use crate::offload::{End, Goal, Offload, PortMap, Spread};
use crate::prefix::{Family, Transport};
use crate::shortcuts::{Hop, Shortcuts};

const CHAIN: &str = "arriving";
/// `PACKET_HOST`: the link-layer destination is this host.
const FOR_US: u8 = 0;

/// `None` if there is nothing to hand on.
pub(super) fn table<'a>(name: &'a str, offload: &Offload) -> Option<Table<'a>> {
    let shortcuts = shortcuts(offload)?;
    let mut table = Table::new(name, Nft::Netdev, false);
    table.bind(shortcuts.arrivals.keys().copied());
    let arrivals: Vec<String> = shortcuts.arrivals.values().cloned().collect();
    let hook = FilterHook::Ingress(Devices::try_from(arrivals).ok()?);
    table.chain(CHAIN, Some(BaseChain::filter(hook, Priority::Filter)));
    for (number, hop) in shortcuts.hops.iter().enumerate() {
        if let Some(family) = hop.family() {
            table.ranges(&hop_name(number), family, &hop.destinations);
        }
    }
    let mut ingress = Ingress { table, shortcuts };
    for family in Family::BOTH {
        for transport in [Transport::Tcp, Transport::Udp] {
            ingress.of(offload, family, transport);
        }
    }
    Some(ingress.table)
}

/// The names of the maps of a map's entries of a family, as far as they are handed on.
pub(super) fn map_names(offload: &Offload, index: usize, map: &PortMap, family: Family) -> Vec<String> {
    let Some(shortcuts) = shortcuts(offload) else { return Vec::new() };
    let hops = || hops_of(shortcuts, family);
    match map.end {
        End::Source => hops().next().map(|_| map_name(index, family)).into_iter().collect(),
        End::Destination => {
            let some = |hop: &Hop| map.entries.values().any(|goal| leads(hop, goal));
            hops().filter(|(_, hop)| some(hop)).map(|(number, _)| part_name(index, family, number)).collect()
        }
    }
}

/// Whether a spread is handed on.
pub(super) fn has_spread(offload: &Offload, spread: &Spread) -> bool {
    shortcuts(offload).is_some_and(|shortcuts| common_hop(shortcuts, spread).is_some())
}

fn shortcuts(offload: &Offload) -> Option<&Shortcuts> {
    let shortcuts = offload.shortcuts.as_ref().filter(|_| offload.mark_mask.is_none());
    shortcuts.filter(|shortcuts| !shortcuts.hops.is_empty())
}

fn hops_of(shortcuts: &Shortcuts, family: Family) -> impl Iterator<Item = (usize, &Hop)> {
    shortcuts.hops.iter().enumerate().filter(move |(_, hop)| hop.family() == Some(family))
}

/// Of a map's entries whose goals a hop leads to.
fn part_name(index: usize, family: Family, hop: usize) -> String {
    format!("{}_{hop}", map_name(index, family))
}

fn chain_of(family: Family, transport: Transport) -> &'static str {
    match (family, transport) {
        (Family::V4, Transport::Tcp) => "tcp_4",
        (Family::V4, Transport::Udp) => "udp_4",
        (Family::V6, Transport::Tcp) => "tcp_6",
        (Family::V6, Transport::Udp) => "udp_6",
    }
}

fn hop_name(hop: usize) -> String {
    format!("hop{hop}")
}

/// The way out that a spread's goals have in common.
fn common_hop<'h>(shortcuts: &'h Shortcuts, spread: &Spread) -> Option<&'h Hop> {
    shortcuts.hops.iter().find(|hop| spread.goals.iter().all(|goal| leads(hop, goal)))
}

fn leads(hop: &Hop, goal: &Goal) -> bool {
    matches!(goal, Goal::Address(address) if hop.leads_to(*address))
}

struct Ingress<'a, 'o> {
    table: Table<'a>,
    shortcuts: &'o Shortcuts,
}

impl<'o> Ingress<'_, 'o> {
    fn of(&mut self, offload: &'o Offload, family: Family, transport: Transport) {
        let maps = || {
            let of = move |map: &&PortMap| map.transport == transport && holds(map, family);
            offload.maps.iter().enumerate().filter(move |(_, map)| of(map))
        };
        let spreads = || {
            let spreads = offload.spreads.iter().enumerate();
            spreads.filter(move |(_, spread)| transport == Transport::Tcp && family_of(spread) == family)
        };
        let hops: Vec<(usize, &'o Hop)> = hops_of(self.shortcuts, family).collect();
        if hops.is_empty() || maps().next().is_none() && spreads().next().is_none() {
            return;
        }
        self.begin(family, transport);
        for (index, map) in maps().filter(|(_, map)| map.end == End::Destination) {
            for (number, hop) in hops.iter().copied() {
                self.towards(index, map, family, number, hop);
            }
        }
        for (index, map) in maps().filter(|(_, map)| map.end == End::Source) {
            self.table.ports(&map_name(index, family), map, family, |_| true);
            for (number, hop) in hops.iter().copied() {
                self.back(index, map, family, number, hop);
            }
        }
        for (index, spread) in spreads() {
            self.spread(index, spread);
        }
    }

    /// Who of a family and protocol goes on in its chain.
    fn begin(&mut self, family: Family, transport: Transport) {
        let chain = chain_of(family, transport);
        self.table.chain(chain, None);
        // Options of IPv4 are for routing to see.
        let (ethertype, first, mask, ttl) = match family {
            Family::V4 => ([0x08, 0x00], 0x45, 0xff, 8),
            Family::V6 => ([0x86, 0xdd], 0x60, 0xf0, 7),
        };
        let Ok(name) = ChainName::new(chain) else { return };
        let exprs = [
            // Of a frame with a VLAN's tag this is the tag's type, also where the hardware has taken it off.
            payload(PayloadBase::LinkLayer, 12, 2, KEY),
            compare(CmpOp::Eq, &ethertype),
            meta(MetaKey::PktType),
            compare(CmpOp::Eq, &[FOR_US]),
            payload(PayloadBase::Network, 0, 1, KEY),
            masked(&[mask]),
            compare(CmpOp::Eq, &[first]),
        ];
        let exprs =
            exprs.into_iter().chain(from_somebody(family)).chain(unfragmented(family, transport)).chain([
                payload(PayloadBase::Network, ttl, 1, KEY),
                compare(CmpOp::Gt, &[1]),
                Expr::Verdict(Verdict::GotoTo(name)),
            ]);
        self.table.push_all(CHAIN, exprs);
    }

    /// Towards the goals that a hop leads to.
    fn towards(&mut self, index: usize, map: &PortMap, family: Family, number: usize, hop: &Hop) {
        if !map.entries.values().any(|goal| leads(hop, goal)) {
            return;
        }
        let name = part_name(index, family, number);
        self.table.ports(&name, map, family, |goal| leads(hop, goal));
        let exprs = without(map.transport, map.except_flags)
            .into_iter()
            .chain(load(map.end, family))
            .chain([LookupExpr::new(&name, KEY).dreg(RESULT).into(), write(map.end, family, RESULT)])
            .chain(leave(hop, family));
        self.table.push_all(chain_of(family, map.transport), exprs);
    }

    /// From there, to whom a hop leads.
    fn back(&mut self, index: usize, map: &PortMap, family: Family, number: usize, hop: &Hop) {
        let (offset, len) = place(End::Destination, family);
        let exprs = without(map.transport, map.except_flags)
            .into_iter()
            .chain([
                payload(PayloadBase::Network, offset, len, KEY),
                LookupExpr::new(hop_name(number), KEY).into(),
            ])
            .chain(load(map.end, family))
            .chain([
                LookupExpr::new(map_name(index, family), KEY).dreg(RESULT).into(),
                write(map.end, family, RESULT),
            ])
            .chain(leave(hop, family));
        self.table.push_all(chain_of(family, map.transport), exprs);
    }

    fn spread(&mut self, index: usize, spread: &Spread) {
        let Some(hop) = common_hop(self.shortcuts, spread) else { return };
        let family = family_of(spread);
        let names = spread_names(index);
        self.table.slots(&names, spread);
        let [targets, slots, counts] = names;
        let (offset, len) = place(End::Destination, family);
        let exprs = without(Transport::Tcp, spread.except_flags)
            .into_iter()
            .chain(spread_to(family, spread, &targets, &slots))
            .chain([
                write(End::Destination, family, RESULT),
                payload(PayloadBase::Network, offset, len, KEY),
                LookupExpr::new(&counts, KEY).into(),
            ])
            .chain(leave(hop, family));
        self.table.push_all(chain_of(family, Transport::Tcp), exprs);
    }
}

/// Only from addresses that routers may forward from: not from 0.0.0.0/8, 127.0.0.0/8, multicast and beyond; not from
/// `::/8`, link-local addresses, multicast.
fn from_somebody(family: Family) -> Vec<Expr> {
    let (at, not, below) = match family {
        Family::V4 => (12, &[0, 127][..], 224),
        Family::V6 => (8, &[0][..], 0xfe),
    };
    let not = not.iter().map(|first| compare(CmpOp::Neq, &[*first]));
    let first = payload(PayloadBase::Network, at, 1, KEY);
    [first].into_iter().chain(not).chain([compare(CmpOp::Lt, &[below])]).collect()
}

/// Out of the hop's link, to its router or to the destination itself; the time to live is one less then.
fn leave(hop: &Hop, family: Family) -> [Expr; 3] {
    let (offset, len) = place(End::Destination, family);
    let neighbour = match hop.gateway {
        Some(gateway) => {
            Expr::Immediate { dreg: KEY, data: super::expressions::element_of(gateway).key().to_vec() }
        }
        None => payload(PayloadBase::Network, offset, len, KEY),
    };
    [
        neighbour,
        Expr::Immediate { dreg: BEHIND, data: hop.index.to_ne_bytes().to_vec() },
        Expr::Fwd { sreg_dev: BEHIND, sreg_addr: Some((KEY, nfproto(family))) },
    ]
}
