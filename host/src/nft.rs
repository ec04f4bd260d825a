//! Turns a [`Divert`] into one nftables table, created and replaced in one batch.

use std::net::IpAddr;

use nlink::Connection;
use nlink::netlink::Nftables;
use nlink::netlink::nftables::{
    BaseChain, Chain, CmpOp, Expr, ExthdrOp, Family as Table, FilterHook, LookupExpr, MetaKey, PacketField,
    PayloadBase, Priority, Register, Rule, Set, SetElement, SetKeyType, TcpFlags, Transaction,
};

pub(crate) use nlink::netlink::nftables::Family as Nft;

use crate::divert::{Divert, PacketKind, PacketMatch, QuotedMatch, SegmentMatch, TcpConnection};
use crate::error::{HostError, absent};
use crate::offload::End;
use crate::prefix::{Family, PortRange, Prefix, Transport};

const FRAGMENT_HEADER: u8 = 44;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
/// Elements in one message: a netlink attribute holds less than 64 KiB.
pub(crate) const ELEMENTS_PER_MESSAGE: usize = 512;

const PREROUTING: &str = "prerouting";
const OUTPUT: &str = "output";
const RAW_PREROUTING: &str = "raw_prerouting";
const RAW_OUTPUT: &str = "raw_output";
const HELD: &str = "held";

pub(crate) fn connect() -> Result<Connection<Nftables>, HostError> {
    Connection::<Nftables>::new().map_err(|error| HostError::netlink("open an nftables socket", error))
}

/// Whether this kernel has nftables with what a [`Divert`] needs: asked by a batch that creates a table with such
/// rules and deletes it again, and so changes nothing. If not, divert everything by policy rules.
pub async fn nft_available() -> bool {
    const PROBE: &str = "shunt_probe";
    let probe = Divert {
        mark: 1,
        mask: 1,
        incoming: vec![SegmentMatch {
            destination: vec![Prefix::all(Family::V4), Prefix::all(Family::V6)],
            destination_ports: vec![1.into(), 3.into()],
            option: Some(crate::divert::OPTION_KIND),
            ..SegmentMatch::default()
        }],
        outgoing: vec![SegmentMatch::default()],
        ..Divert::default()
    };
    let Ok(nft) = connect() else { return false };
    let result = match Build::new(&nft, PROBE, false).divert(&probe) {
        Ok(transaction) => {
            transaction.del_table(PROBE, Table::Inet).commit(&nft).await.map_err(|e| e.to_string())
        }
        Err(error) => Err(error.to_string()),
    };
    if let Err(why) = &result {
        tracing::debug!(why, "nftables cannot be used here");
    }
    result.is_ok()
}

/// Creates the table, or replaces it, atomically.
pub(crate) async fn install(table: &str, divert: &Divert) -> Result<(), HostError> {
    let nft = connect()?;
    let failed = |error| HostError::netlink(format!("create the nftables table {table}"), error);
    let transaction = Build::new(&nft, table, exists(&nft, table, Table::Inet).await?).divert(divert)?;
    transaction.commit(&nft).await.map_err(failed)
}

/// Whether there is a table of this name.
pub(crate) async fn exists(
    nft: &Connection<Nftables>,
    table: &str,
    family: Table,
) -> Result<bool, HostError> {
    let listed = nft.list_tables_in(family).await;
    let listed = listed.map_err(|error| HostError::netlink("list nftables tables", error))?;
    Ok(listed.iter().any(|listed| listed.name.as_str() == table))
}

/// Removes the table; says whether it was there. A kernel without nftables has none.
pub(crate) async fn remove(table: &str, family: Table) -> Result<bool, HostError> {
    let Ok(nft) = connect() else { return Ok(false) };
    match nft.del_table(table, family).await {
        Ok(()) => Ok(true),
        Err(error) if absent(&error) || unsupported(&error) => Ok(false),
        Err(error) => Err(HostError::netlink(format!("remove the nftables table {table}"), error)),
    }
}

fn unsupported(error: &nlink::Error) -> bool {
    use nix::libc::{EAFNOSUPPORT, EINVAL, EOPNOTSUPP, EPROTONOSUPPORT};
    error.is_not_supported()
        || matches!(error.errno(), Some(no) if [EAFNOSUPPORT, EINVAL, EOPNOTSUPP, EPROTONOSUPPORT].contains(&no))
}

/// A batch in the making.
struct Build<'a> {
    table: &'a str,
    transaction: Transaction,
    sets: Vec<(Set, Vec<SetElement>)>,
    rules: Vec<Rule>,
}

impl End {
    fn address(self, family: Family) -> PacketField {
        match (self, family) {
            (End::Source, Family::V4) => PacketField::Ip4Saddr,
            (End::Source, Family::V6) => PacketField::Ip6Saddr,
            (End::Destination, Family::V4) => PacketField::Ip4Daddr,
            (End::Destination, Family::V6) => PacketField::Ip6Daddr,
        }
    }

    fn port(self, transport: Transport) -> PacketField {
        match (self, transport) {
            (End::Source, Transport::Tcp) => PacketField::TcpSport,
            (End::Destination, Transport::Tcp) => PacketField::TcpDport,
            (End::Source, Transport::Udp) => PacketField::UdpSport,
            (End::Destination, Transport::Udp) => PacketField::UdpDport,
        }
    }

    /// Where the quoted address begins in an ICMP message: 8 bytes of ICMP, then the IP header.
    fn quoted(self, family: Family) -> (u32, u32) {
        match (self, family) {
            (End::Source, Family::V4) => (8 + 12, 4),
            (End::Destination, Family::V4) => (8 + 16, 4),
            (End::Source, Family::V6) => (8 + 8, 16),
            (End::Destination, Family::V6) => (8 + 24, 16),
        }
    }
}

impl<'a> Build<'a> {
    fn new(nft: &Connection<Nftables>, table: &'a str, exists: bool) -> Self {
        let mut transaction = nft.transaction();
        if exists {
            transaction = transaction.del_table(table, Table::Inet);
        }
        Self {
            table,
            transaction: transaction.add_table(table, Table::Inet),
            sets: Vec::new(),
            rules: Vec::new(),
        }
    }

    fn divert(mut self, divert: &Divert) -> Result<Transaction, HostError> {
        let mark = |rule: Rule| rule.set_mark_masked(divert.mark, divert.mask);
        if let Some(interface) = &divert.except_interface {
            self.rules.push(self.rule(PREROUTING).match_iif(interface).accept());
        }
        for (chain, segments) in [(PREROUTING, &divert.incoming), (OUTPUT, &divert.outgoing)] {
            for segment in segments {
                self.segment(chain, segment, mark)?;
            }
        }
        for family in Family::BOTH {
            self.connections(family, &divert.connections, mark);
        }
        for (chain, list) in [(PREROUTING, &divert.icmp), (OUTPUT, &divert.icmp_outgoing)] {
            for quoted in list {
                for family in Family::BOTH {
                    self.quoted(chain, family, quoted, mark)?;
                }
            }
        }
        for packets in &divert.packets {
            for family in Family::BOTH {
                self.packets(family, packets, mark)?;
            }
        }
        self.held(divert)?;
        for (chain, segments) in
            [(RAW_PREROUTING, &divert.untracked_incoming), (RAW_OUTPUT, &divert.untracked_outgoing)]
        {
            for segment in segments {
                self.segment(chain, segment, Rule::notrack)?;
            }
        }
        self.finish(divert)
    }

    /// Chains come after the sets and before the rules; only those that hold rules are made.
    fn finish(self, divert: &Divert) -> Result<Transaction, HostError> {
        let Self { table, mut transaction, sets, rules } = self;
        for (set, elements) in sets {
            transaction = transaction.add_set(set.clone());
            for chunk in elements.chunks(ELEMENTS_PER_MESSAGE) {
                transaction = transaction.add_set_elements(&set, chunk);
            }
        }
        let chains = [
            (
                !(divert.incoming.is_empty()
                    && divert.icmp.is_empty()
                    && divert.packets.is_empty()
                    && divert.connections.is_empty()
                    && divert.except_interface.is_none()),
                PREROUTING,
                BaseChain::filter(FilterHook::Prerouting, Priority::Mangle),
            ),
            (
                !(divert.outgoing.is_empty()
                    && divert.connections.is_empty()
                    && divert.icmp_outgoing.is_empty()),
                OUTPUT,
                BaseChain::route(Priority::Mangle),
            ),
            (
                !divert.untracked_incoming.is_empty(),
                RAW_PREROUTING,
                BaseChain::filter(FilterHook::Prerouting, Priority::Raw),
            ),
            (
                !divert.untracked_outgoing.is_empty(),
                RAW_OUTPUT,
                BaseChain::filter(FilterHook::Output, Priority::Raw),
            ),
            // After every chain that marks.
            (!divert.held.is_empty(), HELD, BaseChain::filter(FilterHook::Output, Priority::Filter)),
        ];
        for (needed, name, base) in chains {
            if needed {
                let chain = Chain::new(table, name)
                    .map_err(|error| HostError::netlink(format!("name the nftables table {table}"), error))?;
                transaction = transaction.add_chain(chain.family(Table::Inet).base(base));
            }
        }
        for rule in rules {
            transaction = transaction.add_rule(rule);
        }
        Ok(transaction)
    }

    fn held(&mut self, divert: &Divert) -> Result<(), HostError> {
        if divert.held.is_empty() {
            return Ok(());
        }
        if let Some(interface) = &divert.except_interface {
            self.rules.push(self.rule(HELD).match_oif(interface).accept());
        }
        self.rules.push(self.rule(HELD).match_mark_masked(divert.mark, divert.mask).accept());
        let held = SegmentMatch {
            destination: divert.held.iter().copied().map(Prefix::host).collect(),
            ..SegmentMatch::default()
        };
        self.segment(HELD, &held, Rule::drop)
    }

    fn rule(&self, chain: &str) -> Rule {
        Rule::new(self.table, chain).family(Table::Inet)
    }

    fn segment(
        &mut self,
        chain: &str,
        segment: &SegmentMatch,
        then: impl Fn(Rule) -> Rule,
    ) -> Result<(), HostError> {
        let families = match segment.families() {
            None => vec![None],
            Some(families) => families.into_iter().map(Some).collect(),
        };
        for family in families {
            let mut rule = self.rule(chain);
            if let Some(interface) = &segment.interface {
                rule = rule.match_iif(interface);
            }
            if let Some(family) = family {
                rule = self.addresses(rule, End::Source, family, &segment.source)?;
                rule = self.addresses(rule, End::Destination, family, &segment.destination)?;
            }
            rule = rule.match_l4proto(segment.transport.number());
            rule = self.ports(rule, End::Source.port(segment.transport), &segment.source_ports);
            rule = self.ports(rule, End::Destination.port(segment.transport), &segment.destination_ports);
            if let Some(flags) = segment.flags {
                rule = rule.match_tcp_flags(TcpFlags(flags.value), TcpFlags(flags.mask));
            }
            if let Some(kind) = segment.option {
                // Loading a byte of an option that is not there ends the rule, so this is "exists".
                rule = rule.expr(Expr::Exthdr {
                    dreg: Register::R0,
                    op: ExthdrOp::TcpOpt,
                    exthdr_type: kind,
                    offset: 0,
                    len: 1,
                });
            }
            self.rules.push(then(rule));
        }
        Ok(())
    }

    /// Both directions of the connections of one family, by one set of their four numbers.
    fn connections(&mut self, family: Family, list: &[TcpConnection], then: impl Fn(Rule) -> Rule) {
        let of_family = list.iter().filter(|connection| Family::of(connection.local.ip()) == family);
        let elements: Vec<SetElement> = of_family.map(|connection| four_numbers(*connection)).collect();
        if elements.is_empty() {
            return;
        }
        let address = match family {
            Family::V4 => SetKeyType::Ipv4Addr,
            Family::V6 => SetKeyType::Ipv6Addr,
        };
        let end = [address, SetKeyType::InetService];
        let set = self.set(SetKeyType::Concat([end.clone(), end].concat()), false, elements);
        for (chain, local, remote) in
            [(PREROUTING, End::Destination, End::Source), (OUTPUT, End::Source, End::Destination)]
        {
            let of = |end: End| [end.address(family), end.port(Transport::Tcp)];
            let rule = self.rule(chain).match_concat_in_set(&[of(local), of(remote)].concat(), &set);
            self.rules.push(then(rule));
        }
    }

    fn addresses(
        &mut self,
        rule: Rule,
        end: End,
        family: Family,
        list: &[Prefix],
    ) -> Result<Rule, HostError> {
        let of_family: Vec<Prefix> =
            list.iter().copied().filter(|prefix| prefix.family() == family).collect();
        Ok(match (of_family.as_slice(), end) {
            ([], _) => rule,
            ([one], End::Source) => rule.match_saddr(one.address(), one.len()),
            ([one], End::Destination) => rule.match_daddr(one.address(), one.len()),
            (several, _) => {
                let set = self.address_set(family, several)?;
                rule.match_in_set(end.address(family), &set)
            }
        })
    }

    fn ports(&mut self, rule: Rule, field: PacketField, list: &[PortRange]) -> Rule {
        match PortRange::merged(list.iter().copied()).as_slice() {
            [] => rule,
            [one] => rule.match_range(field, one.first(), one.last()),
            several => {
                let elements: Vec<SetElement> =
                    several.iter().map(|range| SetElement::port_range(range.first(), range.last())).collect();
                let set = self.set(SetKeyType::InetService, true, elements);
                rule.match_in_set(field, &set)
            }
        }
    }

    /// ICMP errors of one family. Only quotes of an IPv4 header without options are looked into further than the
    /// addresses; quotes must be of TCP, or of what `udp` adds.
    fn quoted(
        &mut self,
        chain: &str,
        family: Family,
        quoted: &QuotedMatch,
        then: impl Fn(Rule) -> Rule,
    ) -> Result<(), HostError> {
        let of_family = |list: &[IpAddr]| -> Vec<Prefix> {
            let mine = list.iter().filter(|address| Family::of(**address) == family);
            mine.map(|address| Prefix::host(*address)).collect()
        };
        let prefixes = quoted.destination_prefixes.iter().copied();
        let mut destination = of_family(&quoted.destination);
        destination.extend(prefixes.filter(|prefix| prefix.family() == family));
        let anywhere = quoted.destination.is_empty() && quoted.destination_prefixes.is_empty();
        let ends = [
            (End::Source, quoted.source.is_empty(), of_family(&quoted.source)),
            (End::Destination, anywhere, destination),
        ];
        let named = ends.iter().any(|(_, _, mine)| !mine.is_empty());
        let impossible = ends.iter().any(|(_, any, mine)| !any && mine.is_empty());
        if !named || impossible {
            return Ok(());
        }
        let (protocol, types, quoted_protocol): (u8, &[u8], u32) = match family {
            // Destination unreachable, time exceeded, parameter problem.
            Family::V4 => (ICMP, &[3, 11, 12], 8 + 9),
            // Destination unreachable, packet too big, time exceeded, parameter problem.
            Family::V6 => (ICMPV6, &[1, 2, 3, 4], 8 + 6),
        };
        let address_sets: Vec<(End, Expr)> = ends
            .into_iter()
            .filter(|(_, _, mine)| !mine.is_empty())
            .map(|(end, _, mine)| {
                Ok((end, LookupExpr::new(self.address_set(family, &mine)?, Register::R0).into()))
            })
            .collect::<Result<_, HostError>>()?;
        let protocols: &[u8] = match (quoted.udp, family) {
            (false, _) => &[Transport::Tcp.number()],
            (true, Family::V4) => &[Transport::Tcp.number(), Transport::Udp.number()],
            (true, Family::V6) => &[Transport::Tcp.number(), Transport::Udp.number(), FRAGMENT_HEADER],
        };
        for (kind, of) in types.iter().flat_map(|kind| protocols.iter().map(move |of| (kind, of))) {
            let mut rule = self.rule(chain);
            if let Some(interface) = &quoted.interface {
                rule = rule.match_iif(interface);
            }
            rule = rule
                .expr(Expr::Meta { dreg: Register::R0, key: MetaKey::L4Proto })
                .expr(equals(&[protocol]))
                .expr(transport(0, 1))
                .expr(equals(&[*kind]))
                .expr(transport(quoted_protocol, 1))
                .expr(equals(&[*of]));
            for (end, lookup) in &address_sets {
                let (offset, len) = end.quoted(family);
                rule = rule.expr(transport(offset, len)).expr(lookup.clone());
            }
            self.rules.push(then(rule));
        }
        Ok(())
    }

    /// Packets of one family that are known by their source and kind alone.
    fn packets(
        &mut self,
        family: Family,
        packets: &PacketMatch,
        then: impl Fn(Rule) -> Rule,
    ) -> Result<(), HostError> {
        let of_family = packets.source.iter().filter(|address| Family::of(**address) == family);
        let sources: Vec<Prefix> = of_family.map(|address| Prefix::host(*address)).collect();
        if sources.is_empty() {
            return Ok(());
        }
        let kinds: Vec<Vec<Expr>> = match (packets.kind, family) {
            // An offset, or more to follow.
            (PacketKind::Fragment, Family::V4) => {
                vec![vec![network(6, 2), masked(&[0x3f, 0xff]), differs(&[0, 0])]]
            }
            // Loading a byte of a header that is not there ends the rule.
            (PacketKind::Fragment, Family::V6) => vec![vec![Expr::Exthdr {
                dreg: Register::R0,
                op: ExthdrOp::Ipv6,
                exthdr_type: FRAGMENT_HEADER,
                offset: 0,
                len: 1,
            }]],
            (PacketKind::IcmpAnswer, Family::V4) => vec![icmp_type(ICMP, 0), icmp_type(ICMP, 14)],
            (PacketKind::IcmpAnswer, Family::V6) => vec![icmp_type(ICMPV6, 129)],
        };
        for kind in kinds {
            let mut rule = self.rule(PREROUTING);
            rule = self.addresses(rule, End::Source, family, &sources)?;
            self.rules.push(then(kind.into_iter().fold(rule, Rule::expr)));
        }
        Ok(())
    }

    fn address_set(&mut self, family: Family, prefixes: &[Prefix]) -> Result<String, HostError> {
        let key = match family {
            Family::V4 => SetKeyType::Ipv4Addr,
            Family::V6 => SetKeyType::Ipv6Addr,
        };
        let mut distinct = prefixes.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        let interval = distinct.iter().any(|prefix| !prefix.is_host());
        if interval {
            // Ranges in a set must not overlap.
            let all = distinct.clone();
            distinct.retain(|prefix| !all.iter().any(|other| other != prefix && other.covers(*prefix)));
        }
        let elements: Vec<SetElement> = distinct
            .iter()
            .map(|prefix| match (prefix.address(), interval) {
                (IpAddr::V4(v4), false) => Ok(SetElement::ipv4(v4)),
                (IpAddr::V6(v6), false) => Ok(SetElement::ipv6(v6)),
                (IpAddr::V4(v4), true) => SetElement::ipv4_prefix(v4, prefix.len()),
                (IpAddr::V6(v6), true) => SetElement::ipv6_prefix(v6, prefix.len()),
            })
            .collect::<nlink::Result<_>>()
            .map_err(|error| HostError::netlink("build an nftables set", error))?;
        Ok(self.set(key, interval, elements))
    }

    fn set(&mut self, key: SetKeyType, interval: bool, elements: Vec<SetElement>) -> String {
        let name = format!("s{}", self.sets.len());
        let mut set = Set::new(self.table, &name).family(Table::Inet).key_type(key);
        if interval {
            set = set.interval();
        }
        self.sets.push((set, elements));
        name
    }
}

/// A connection as the key of a set.
fn four_numbers(connection: TcpConnection) -> SetElement {
    let parts = [connection.local, connection.remote].map(|end| {
        let address = match end.ip() {
            IpAddr::V4(v4) => SetElement::ipv4(v4),
            IpAddr::V6(v6) => SetElement::ipv6(v6),
        };
        [address, SetElement::port(end.port())]
    });
    SetElement::concat(parts.into_iter().flatten())
}

fn transport(offset: u32, len: u32) -> Expr {
    Expr::Payload { dreg: Register::R0, base: PayloadBase::Transport, offset, len }
}

fn network(offset: u32, len: u32) -> Expr {
    Expr::Payload { dreg: Register::R0, base: PayloadBase::Network, offset, len }
}

fn masked(mask: &[u8]) -> Expr {
    let len = u32::try_from(mask.len()).unwrap_or(u32::MAX);
    Expr::Bitwise {
        sreg: Register::R0,
        dreg: Register::R0,
        len,
        mask: mask.to_vec(),
        xor: vec![0; mask.len()],
    }
}

fn icmp_type(protocol: u8, kind: u8) -> Vec<Expr> {
    vec![
        Expr::Meta { dreg: Register::R0, key: MetaKey::L4Proto },
        equals(&[protocol]),
        transport(0, 1),
        equals(&[kind]),
    ]
}

fn differs(data: &[u8]) -> Expr {
    Expr::Cmp { sreg: Register::R0, op: CmpOp::Neq, data: data.to_vec() }
}

fn equals(data: &[u8]) -> Expr {
    Expr::Cmp { sreg: Register::R0, op: CmpOp::Eq, data: data.to_vec() }
}
