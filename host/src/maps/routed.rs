//! The table that rewrites or marks packets before they are routed.

use std::collections::BTreeSet;
use std::net::IpAddr;

use nlink::netlink::nftables::{
    BaseChain, CmpOp, Expr, Family as Nft, FibFlags, FilterHook, LookupExpr, MetaKey, PayloadBase, Priority,
    Verdict,
};
use nlink::netlink::types::route::RouteType;

use super::expressions::{
    KEY, RESULT, compare, destination_port, load, masked, meta, payload, place, spread_to, whole, write,
};
use super::table::Table;
use super::{family_of, holds, map_name, spread_names};
use crate::offload::{End, Goal, Offload, PortMap, Spread};
use crate::prefix::{Family, Transport};

const CHAIN: &str = "forward";
const OUTPUT: &str = "output";
/// "Another router is nearer" (RFC 792; RFC 4861 §4.5).
const ICMP_REDIRECT: u8 = 5;
const ICMPV6_REDIRECT: u8 = 137;

/// The table in the making.
struct Routed<'a> {
    table: Table<'a>,
    mark_mask: Option<u32>,
}

pub(super) fn table<'a>(name: &'a str, offload: &Offload) -> Table<'a> {
    let Offload { mark_mask, .. } = *offload;
    let mut routed = Routed { table: Table::new(name, Nft::Inet, mark_mask.is_some()), mark_mask };
    for (name, hook) in [(CHAIN, FilterHook::Prerouting), (OUTPUT, FilterHook::Output)] {
        routed.table.chain(name, Some(BaseChain::filter(hook, Priority::Raw)));
    }
    routed.exceptions(offload);
    for family in Family::BOTH {
        let except = routed.excepted(family, &offload.except_destinations);
        for (index, map) in offload.maps.iter().enumerate().filter(|(_, map)| holds(map, family)) {
            let except = except.filter(|_| map.end == End::Source);
            routed.map(index, map, family, except);
        }
    }
    for (index, spread) in offload.spreads.iter().enumerate() {
        routed.spread(index, spread);
    }
    for family in Family::BOTH {
        routed.no_redirects(family, forwarded_to(offload, family));
    }
    routed.table
}

/// The destinations, of a family, of packets that have been through the maps.
fn forwarded_to(offload: &Offload, family: Family) -> BTreeSet<IpAddr> {
    let goals = offload.maps.iter().filter(|map| map.end == End::Destination);
    let goals = goals.flat_map(|map| map.entries.iter().map(|(key, goal)| (key.ip(), *goal)));
    let spread = offload.spreads.iter().flat_map(|spread| {
        let target = spread.targets.first();
        spread.goals.iter().filter_map(move |goal| Some((target?.ip(), *goal)))
    });
    let destination = |(asked, goal)| match goal {
        Goal::Address(address) => address,
        Goal::Mark(_) => asked,
    };
    goals.chain(spread).map(destination).filter(|address| Family::of(*address) == family).collect()
}

impl Routed<'_> {
    /// What is left alone whatever the maps say.
    fn exceptions(&mut self, offload: &Offload) {
        if let Some(interface) = &offload.except_interface {
            let rule = self.table.rule(CHAIN).match_iif(interface).accept();
            self.table.push(rule);
        }
        if let Some(prefix) = &offload.except_prefix {
            let rule = self.table.rule(CHAIN).match_iif_prefix(prefix).accept();
            self.table.push(rule);
        }
        for ports in &offload.except_local_ports {
            for transport in [Transport::Tcp, Transport::Udp] {
                let rule = self.table.rule(CHAIN).match_l4proto(transport.number());
                let rule = rule.match_range(destination_port(transport), ports.first(), ports.last());
                self.table.push(rule.match_fib_type(FibFlags::DADDR, RouteType::Local).accept());
            }
        }
    }

    /// Where the kernel forwards a packet back to the link that it came from, it would tell the sender of a nearer way,
    /// and past this host who believes it.
    fn no_redirects(&mut self, family: Family, destinations: BTreeSet<IpAddr>) {
        if destinations.is_empty() {
            return;
        }
        let (name, l4proto, kind) = match family {
            Family::V4 => ("no_redirects_4", 1, ICMP_REDIRECT),
            Family::V6 => ("no_redirects_6", 58, ICMPV6_REDIRECT),
        };
        let (_, len) = place(End::Destination, family);
        self.table.addresses(name, family, destinations);
        let mut rule = self.table.rule(OUTPUT).match_l4proto(l4proto);
        for expr in [
            payload(PayloadBase::Transport, 0, 1, KEY),
            compare(CmpOp::Eq, &[kind]),
            // The destination in the packet quoted by the one, and in the other's own fields.
            payload(PayloadBase::Transport, 24, len, KEY),
            LookupExpr::new(name, KEY).into(),
        ] {
            rule = rule.expr(expr);
        }
        self.table.push(rule.drop());
    }

    /// A set of a family's addresses, if there are any.
    fn excepted(&mut self, family: Family, addresses: &BTreeSet<IpAddr>) -> Option<&'static str> {
        let name = match family {
            Family::V4 => "except_4",
            Family::V6 => "except_6",
        };
        let of_family: Vec<_> =
            addresses.iter().copied().filter(|address| Family::of(*address) == family).collect();
        if of_family.is_empty() {
            return None;
        }
        self.table.addresses(name, family, of_family);
        Some(name)
    }

    /// Only whole packets of a protocol, without flags that are left alone and marks that are not ours.
    fn taken(&self, family: Family, transport: Transport, except_flags: u8) -> Vec<Expr> {
        let mut exprs = whole(family, transport, except_flags);
        if let Some(mask) = self.mark_mask {
            exprs.extend([meta(MetaKey::Mark), masked(&(!mask).to_ne_bytes()), compare(CmpOp::Eq, &[0; 4])]);
        }
        exprs
    }

    /// Does with a packet as the goal in the result's register says.
    fn reach(&self, end: End, family: Family) -> Expr {
        match self.mark_mask {
            None => write(end, family, RESULT),
            Some(_) => Expr::MetaSet { key: MetaKey::Mark, sreg: RESULT },
        }
    }

    fn push(&mut self, exprs: impl IntoIterator<Item = Expr>) {
        let rule = exprs.into_iter().fold(self.table.rule(CHAIN), nlink::netlink::nftables::Rule::expr);
        self.table.push(rule.notrack().expr(Expr::Verdict(Verdict::Accept)));
    }

    fn map(&mut self, index: usize, map: &PortMap, family: Family, except_to: Option<&str>) {
        let name = map_name(index, family);
        self.table.ports(&name, map, family, |_| true);
        let (offset, len) = place(End::Destination, family);
        let not_to = except_to.map(|set| {
            [payload(PayloadBase::Network, offset, len, KEY), LookupExpr::new(set, KEY).invert().into()]
        });
        let exprs: Vec<Expr> = self
            .taken(family, map.transport, map.except_flags)
            .into_iter()
            .chain(not_to.into_iter().flatten())
            .chain(load(map.end, family))
            .chain([LookupExpr::new(&name, KEY).dreg(RESULT).into(), self.reach(map.end, family)])
            .collect();
        self.push(exprs);
    }

    fn spread(&mut self, index: usize, spread: &Spread) {
        let family = family_of(spread);
        let names = spread_names(index);
        self.table.slots(&names, spread);
        let [targets, slots, counts] = names;
        let (offset, len) = place(End::Destination, family);
        // Read again: the program `nft` cannot show a set that a map's result is looked up in.
        let again = match self.mark_mask {
            None => payload(PayloadBase::Network, offset, len, KEY),
            Some(_) => meta(MetaKey::Mark),
        };
        let exprs: Vec<Expr> = self
            .taken(family, Transport::Tcp, spread.except_flags)
            .into_iter()
            .chain(spread_to(family, spread, &targets, &slots))
            .chain([self.reach(End::Destination, family), again, LookupExpr::new(&counts, KEY).into()])
            .collect();
        self.push(exprs);
    }
}
