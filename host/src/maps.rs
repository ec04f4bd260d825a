//! Turns an [`Offload`] into one nftables table of stateless maps, created and replaced in one batch, and reads its
//! counters.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};

use nlink::Connection;
use nlink::netlink::Nftables;
use nlink::netlink::nftables::{
    BaseChain, Chain, CmpOp, Expr, Family as Table, FibFlags, FilterHook, HashKind, LookupExpr, MetaKey,
    PacketField, PayloadBase, PayloadCsum, Priority, Register, Rule, Set, SetDataType, SetElement,
    SetKeyType, Transaction, Verdict,
};

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::SndBufForce;
use nlink::netlink::types::route::RouteType;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::error::{HostError, absent};
use crate::nft::{ELEMENTS_PER_MESSAGE, connect, exists};
use crate::offload::{Count, Counted, End, Goal, Offload, PortMap, Spread};
use crate::prefix::{Family, Transport};

const CHAIN: &str = "forward";
const OUTPUT: &str = "output";
/// "Another router is nearer" (RFC 792; RFC 4861 §4.5).
const ICMP_REDIRECT: u8 = 5;
const ICMPV6_REDIRECT: u8 = 137;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
/// Registers: what is looked up begins in the first; results go to one that no key reaches.
const KEY: Register = Register::R0;
const RESULT: Register = Register::R2;

/// Creates the table, or turns it into what it has to be, atomically. `old` is what stands if the table is ours: where
/// the rules stay the same, entries that do keep their counters. Says whether they did.
pub(crate) async fn install(
    table: &str,
    offload: &Offload,
    old: Option<&Offload>,
) -> Result<bool, HostError> {
    let nft = connect()?;
    let exists = exists(&nft, table).await?;
    let old = old.filter(|old| exists && shape(old) == shape(offload)).cloned();
    let (table, offload, runtime) = (table.to_owned(), offload.clone(), Handle::current());
    make_room(&nft, &offload);
    // Tens of thousands of elements take the kernel a while: nothing else of the daemon waits for it. A thread of its own:
    // one of the event loop's would stay, with the rights that the daemon has until it is sandboxed.
    let (done, made) = oneshot::channel();
    let make = move || -> Result<bool, HostError> {
        let new = Build::new(&table, &offload);
        if let Some(old) = old {
            let difference = new.difference(nft.transaction(), &Build::new(&table, &old));
            match runtime.block_on(difference.commit(&nft)) {
                Ok(()) => return Ok(true),
                // Somebody else has changed our table.
                Err(error) => {
                    tracing::debug!(%error, table, "the maps cannot be changed: they are made anew");
                }
            }
        }
        let failed = |error| HostError::netlink(format!("create the nftables table {table}"), error);
        let transaction = new.whole(nft.transaction(), exists).map_err(failed)?;
        runtime.block_on(transaction.commit(&nft)).map_err(failed)?;
        Ok(false)
    };
    let thread = std::thread::Builder::new().name("maps".to_owned());
    thread.spawn(move || drop(done.send(make()))).map_err(HostError::Thread)?;
    made.await.unwrap_or_else(|_| Err(HostError::Thread(io::Error::other("it panicked"))))
}

/// What the rules depend on.
fn shape(offload: &Offload) -> impl PartialEq {
    let both = |has: &dyn Fn(Family) -> bool| Family::BOTH.map(has);
    let maps: Vec<_> =
        offload.maps.iter().map(|map| (map.end, map.transport, both(&|family| holds(map, family)))).collect();
    let spreads: Vec<_> =
        offload.spreads.iter().map(|spread| (family_of(spread), spread.seed, spread.slots.len())).collect();
    let quiet = both(&|family| !forwarded_to(offload, family).is_empty());
    let except = both(&|family| offload.except_destinations.iter().any(|to| Family::of(*to) == family));
    let interfaces = (offload.except_interface.clone(), offload.except_prefix.clone());
    let ports = offload.except_local_ports.clone();
    (maps, spreads, (except, quiet), interfaces, ports, (offload.except_flags, offload.mark_mask))
}

/// Lets one batch be as large as it has to be. What is forbidden here shows when the batch is sent.
fn make_room(nft: &Connection<Nftables>, offload: &Offload) {
    // Of a key and a value with their headers, rounded up.
    const ELEMENT: usize = 128;
    let slots: usize = offload.spreads.iter().map(|spread| spread.slots.len() + spread.targets.len()).sum();
    let entries: usize = offload.maps.iter().map(|map| map.entries.len()).sum();
    let wanted = (slots + entries) * ELEMENT + (1 << 20);
    if let Err(error) = setsockopt(nft.socket(), SndBufForce, &wanted) {
        tracing::debug!(%error, wanted, "the netlink socket's buffer stays as it is");
    }
}

/// What each entry has counted since it was added; empty if the table is gone.
pub(crate) async fn counts(table: &str, offload: &Offload) -> Result<BTreeMap<Counted, Count>, HostError> {
    let nft = connect()?;
    let mut counts = BTreeMap::new();
    let mut add = |of: Counted, element: &SetElement| {
        if let Some((packets, bytes)) = element.counter() {
            counts.insert(of, Count { packets, bytes });
        }
    };
    for (index, map) in offload.maps.iter().enumerate() {
        for family in Family::BOTH.into_iter().filter(|family| holds(map, *family)) {
            for element in elements(&nft, table, &map_name(index, family)).await? {
                if let Some(key) = socket(element.key(), family) {
                    add(Counted::Map(index, key), &element);
                }
            }
        }
    }
    for (index, spread) in offload.spreads.iter().enumerate() {
        for element in elements(&nft, table, &spread_names(index)[2]).await? {
            let goal = match offload.mark_mask {
                None => address(element.key(), family_of(spread)).map(Goal::Address),
                Some(_) => element.key().first_chunk().map(|mark| Goal::Mark(u32::from_ne_bytes(*mark))),
            };
            if let Some(goal) = goal {
                add(Counted::Spread(index, goal), &element);
            }
        }
    }
    Ok(counts)
}

async fn elements(nft: &Connection<Nftables>, table: &str, set: &str) -> Result<Vec<SetElement>, HostError> {
    match nft.list_set_elements(table, set, Table::Inet).await {
        Ok(elements) => Ok(elements),
        Err(error) if absent(&error) => Ok(Vec::new()),
        Err(error) => Err(HostError::netlink(format!("read counters of the nftables table {table}"), error)),
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

/// The key of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    /// A slot, or a mark.
    Number(u32),
    Address(IpAddr),
    Socket(SocketAddr),
}

impl From<Goal> for Key {
    fn from(goal: Goal) -> Self {
        match goal {
            Goal::Address(address) => Key::Address(address),
            Goal::Mark(mark) => Key::Number(mark),
        }
    }
}

impl Key {
    fn element(self) -> SetElement {
        match self {
            // Any number in the machine's byte order.
            Key::Number(number) => SetElement::mark(number),
            Key::Address(address) => element_of(address),
            Key::Socket(socket) => {
                SetElement::concat([element_of(socket.ip()), SetElement::port(socket.port())])
            }
        }
    }
}

/// A set or map, and what is in it.
struct Contents {
    set: Set,
    entries: BTreeMap<Key, Option<Goal>>,
}

/// The table in the making.
struct Build<'a> {
    table: &'a str,
    except_flags: u8,
    mark_mask: Option<u32>,
    sets: Vec<Contents>,
    rules: Vec<Rule>,
}

impl<'a> Build<'a> {
    fn new(table: &'a str, offload: &Offload) -> Self {
        let Offload { except_flags, mark_mask, .. } = *offload;
        let mut build = Build { table, except_flags, mark_mask, sets: Vec::new(), rules: Vec::new() };
        if let Some(interface) = &offload.except_interface {
            build.rules.push(build.rule().match_iif(interface).accept());
        }
        if let Some(prefix) = &offload.except_prefix {
            build.rules.push(build.rule().match_iif_prefix(prefix).accept());
        }
        for ports in &offload.except_local_ports {
            for transport in [Transport::Tcp, Transport::Udp] {
                let rule = build.rule().match_l4proto(transport.number());
                let rule = rule.match_range(destination_port(transport), ports.first(), ports.last());
                build.rules.push(rule.match_fib_type(FibFlags::DADDR, RouteType::Local).accept());
            }
        }
        for family in Family::BOTH {
            let except = build.excepted(family, &offload.except_destinations);
            for (index, map) in offload.maps.iter().enumerate().filter(|(_, map)| holds(map, family)) {
                let except = except.as_deref().filter(|_| map.end == End::Source);
                build.map(index, map, family, except);
            }
        }
        for (index, spread) in offload.spreads.iter().enumerate() {
            build.spread(index, spread);
        }
        for family in Family::BOTH {
            build.no_redirects(family, forwarded_to(offload, family));
        }
        build
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
        let entries = destinations.into_iter().map(|address| (Key::Address(address), None)).collect();
        self.sets.push(Contents { set: self.named(name, address_type(family)), entries });
        let mut rule = Rule::new(self.table, OUTPUT).family(Table::Inet).match_l4proto(l4proto);
        for expr in [
            payload(PayloadBase::Transport, 0, 1, KEY),
            compare(CmpOp::Eq, &[kind]),
            // The destination in the packet quoted by the one, and in the other's own fields.
            payload(PayloadBase::Transport, 24, len, KEY),
            LookupExpr::new(name, KEY).into(),
        ] {
            rule = rule.expr(expr);
        }
        self.rules.push(rule.drop());
    }

    /// A new table in place of an old one.
    fn whole(self, mut transaction: Transaction, exists: bool) -> nlink::Result<Transaction> {
        let base = BaseChain::filter(FilterHook::Prerouting, Priority::Raw);
        let chain = Chain::new(self.table, CHAIN)?.family(Table::Inet).base(base);
        let base = BaseChain::filter(FilterHook::Output, Priority::Raw);
        let output = Chain::new(self.table, OUTPUT)?.family(Table::Inet).base(base);
        if exists {
            transaction = transaction.del_table(self.table, Table::Inet);
        }
        transaction = transaction.add_table(self.table, Table::Inet);
        for Contents { set, entries } in &self.sets {
            transaction = added(transaction.add_set(set.clone()), set, entries.iter());
        }
        let transaction = transaction.add_chain(chain).add_chain(output);
        Ok(self.rules.into_iter().fold(transaction, Transaction::add_rule))
    }

    /// What makes this out of a table of the same shape.
    fn difference(&self, mut transaction: Transaction, old: &Build<'_>) -> Transaction {
        for (Contents { set, entries }, old) in self.sets.iter().zip(&old.sets) {
            let gone = old.entries.iter().filter(|(key, to)| entries.get(key) != Some(to));
            let gone: Vec<SetElement> = gone.map(|(key, _)| key.element()).collect();
            for chunk in gone.chunks(ELEMENTS_PER_MESSAGE) {
                transaction = transaction.del_set_elements(set, chunk);
            }
            let new = entries.iter().filter(|(key, to)| old.entries.get(key) != Some(to));
            transaction = added(transaction, set, new);
        }
        transaction
    }

    fn rule(&self) -> Rule {
        Rule::new(self.table, CHAIN).family(Table::Inet)
    }

    fn named(&self, name: &str, key: SetKeyType) -> Set {
        Set::new(self.table, name).family(Table::Inet).key_type(key)
    }

    /// A set of a family's addresses, if there are any.
    fn excepted(&mut self, family: Family, addresses: &BTreeSet<IpAddr>) -> Option<String> {
        let name = match family {
            Family::V4 => "except_4",
            Family::V6 => "except_6",
        };
        let of_family = addresses.iter().filter(|address| Family::of(**address) == family);
        let entries: BTreeMap<_, _> = of_family.map(|address| (Key::Address(*address), None)).collect();
        if entries.is_empty() {
            return None;
        }
        let set = self.named(name, address_type(family));
        self.sets.push(Contents { set, entries });
        Some(name.to_owned())
    }

    /// What a goal is to a set.
    fn goal_type(&self, family: Family) -> SetKeyType {
        if self.mark_mask.is_some() { SetKeyType::Mark } else { address_type(family) }
    }

    /// Only whole packets of a protocol, without flags that are left alone and marks that are not ours.
    fn taken(&self, family: Family, transport: Transport) -> Vec<Expr> {
        let mut exprs = whole(family, transport, self.except_flags);
        if let Some(mask) = self.mark_mask {
            exprs.extend([
                Expr::Meta { dreg: KEY, key: MetaKey::Mark },
                masked(&(!mask).to_ne_bytes()),
                compare(CmpOp::Eq, &[0; 4]),
            ]);
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

    fn map(&mut self, index: usize, map: &PortMap, family: Family, except_to: Option<&str>) {
        let name = map_name(index, family);
        let fits = |(key, goal): &(&SocketAddr, &Goal)| {
            let same = matches!(goal, Goal::Mark(_))
                || matches!(goal, Goal::Address(to) if to.is_ipv4() == key.is_ipv4());
            Family::of(key.ip()) == family && same
        };
        let entries = map.entries.iter().filter(fits);
        let entries = entries.map(|(key, to)| (Key::Socket(*key), Some(*to))).collect();
        let key = SetKeyType::Concat(vec![address_type(family), SetKeyType::InetService]);
        let set = self.named(&name, key).map(SetDataType::Value(self.goal_type(family)));
        self.sets.push(Contents { set: set.counter(), entries });
        let (offset, len) = place(End::Destination, family);
        let not_to = except_to.map(|set| {
            [payload(PayloadBase::Network, offset, len, KEY), LookupExpr::new(set, KEY).invert().into()]
        });
        let mut rule = self.rule();
        for expr in self
            .taken(family, map.transport)
            .into_iter()
            .chain(not_to.into_iter().flatten())
            .chain(load(map.end, family))
            .chain([LookupExpr::new(&name, KEY).dreg(RESULT).into(), self.reach(map.end, family)])
        {
            rule = rule.expr(expr);
        }
        self.rules.push(rule.notrack().expr(Expr::Verdict(Verdict::Accept)));
    }

    fn spread(&mut self, index: usize, spread: &Spread) {
        let family = family_of(spread);
        let [targets, slots, counts] = spread_names(index);
        let key = SetKeyType::Concat(vec![address_type(family), SetKeyType::InetService]);
        let entries = spread.targets.iter().map(|target| (Key::Socket(*target), None)).collect();
        self.sets.push(Contents { set: self.named(&targets, key), entries });
        let goal = |index: &u16| spread.goals.get(usize::from(*index)).copied();
        let entries = (0..)
            .zip(spread.slots.iter())
            .filter_map(|(slot, index)| Some((Key::Number(slot), Some(goal(index)?))))
            .collect();
        // A set with a size has a fixed hash, the fastest there is.
        let modulus = u32::try_from(spread.slots.len()).unwrap_or(u32::MAX);
        let set = self.named(&slots, SetKeyType::Mark).size(modulus);
        let goals = self.goal_type(family);
        self.sets.push(Contents { set: set.map(SetDataType::Value(goals.clone())), entries });
        let entries = spread.goals.iter().map(|goal| (Key::from(*goal), None)).collect();
        self.sets.push(Contents { set: self.named(&counts, goals).counter(), entries });
        let (offset, len) = place(End::Destination, family);
        let hash = Expr::Hash {
            dreg: RESULT,
            kind: HashKind::Jenkins,
            sreg: Some(KEY),
            len: key_len(family),
            modulus,
            seed: Some(spread.seed),
            offset: 0,
        };
        // Read again: the program `nft` cannot show a set that a map's result is looked up in.
        let again = match self.mark_mask {
            None => payload(PayloadBase::Network, offset, len, KEY),
            Some(_) => Expr::Meta { dreg: KEY, key: MetaKey::Mark },
        };
        let mut rule = self.rule();
        for expr in self
            .taken(family, Transport::Tcp)
            .into_iter()
            .chain(load(End::Destination, family))
            .chain([LookupExpr::new(&targets, KEY).into()])
            .chain(load(End::Source, family))
            .chain([
                hash,
                LookupExpr::new(&slots, RESULT).dreg(RESULT).into(),
                self.reach(End::Destination, family),
                again,
                LookupExpr::new(&counts, KEY).into(),
            ])
        {
            rule = rule.expr(expr);
        }
        self.rules.push(rule.notrack().expr(Expr::Verdict(Verdict::Accept)));
    }
}

/// A batch that adds entries to a set.
fn added<'e>(
    transaction: Transaction,
    set: &Set,
    entries: impl Iterator<Item = (&'e Key, &'e Option<Goal>)>,
) -> Transaction {
    let element = |(key, to): (&Key, &Option<Goal>)| match to {
        Some(to) => key.element().value(Key::from(*to).element()),
        None => key.element(),
    };
    let elements: Vec<SetElement> = entries.map(element).collect();
    elements
        .chunks(ELEMENTS_PER_MESSAGE)
        .fold(transaction, |transaction, chunk| transaction.add_set_elements(set, chunk))
}

/// Only whole packets of a protocol, of IPv6 those without extension headers; of TCP those without any flag of `except`.
pub(crate) fn whole(family: Family, transport: Transport, except: u8) -> Vec<Expr> {
    let meta = |key| Expr::Meta { dreg: KEY, key };
    let mut exprs = match family {
        Family::V4 => vec![
            meta(MetaKey::NfProto),
            compare(CmpOp::Eq, &[NFPROTO_IPV4]),
            meta(MetaKey::L4Proto),
            compare(CmpOp::Eq, &[transport.number()]),
            payload(PayloadBase::Network, 6, 2, KEY),
            masked(&[0x3f, 0xff]),
            compare(CmpOp::Eq, &[0, 0]),
        ],
        Family::V6 => vec![
            meta(MetaKey::NfProto),
            compare(CmpOp::Eq, &[NFPROTO_IPV6]),
            payload(PayloadBase::Network, 6, 1, KEY),
            compare(CmpOp::Eq, &[transport.number()]),
        ],
    };
    if transport == Transport::Tcp && except != 0 {
        exprs.extend([
            payload(PayloadBase::Transport, 13, 1, KEY),
            masked(&[except]),
            compare(CmpOp::Eq, &[0]),
        ]);
    }
    exprs
}

fn destination_port(transport: Transport) -> PacketField {
    match transport {
        Transport::Tcp => PacketField::TcpDport,
        Transport::Udp => PacketField::UdpDport,
    }
}

/// Address and port of one end, one behind the other, the port filled up with zeros.
fn load(end: End, family: Family) -> [Expr; 2] {
    let (offset, len) = place(end, family);
    let (port, behind) = match (end, family) {
        (End::Source, Family::V4) => (0, Register::Reg32_01),
        (End::Destination, Family::V4) => (2, Register::Reg32_01),
        (End::Source, Family::V6) => (0, Register::R1),
        (End::Destination, Family::V6) => (2, Register::R1),
    };
    [payload(PayloadBase::Network, offset, len, KEY), payload(PayloadBase::Transport, port, 2, behind)]
}

/// Replaces an address; the checksums follow.
fn write(end: End, family: Family, sreg: Register) -> Expr {
    let (offset, len) = place(end, family);
    let (csum, csum_offset) = match family {
        Family::V4 => (PayloadCsum::Inet, 10),
        Family::V6 => (PayloadCsum::None, 0),
    };
    Expr::PayloadSet {
        sreg,
        base: PayloadBase::Network,
        offset,
        len,
        csum,
        csum_offset,
        l4_pseudo_header: true,
    }
}

/// Offset and length of an address in its IP header.
pub(crate) fn place(end: End, family: Family) -> (u32, u32) {
    match (end, family) {
        (End::Source, Family::V4) => (12, 4),
        (End::Destination, Family::V4) => (16, 4),
        (End::Source, Family::V6) => (8, 16),
        (End::Destination, Family::V6) => (24, 16),
    }
}

/// Of address and port as [`load`] leaves them.
fn key_len(family: Family) -> u32 {
    place(End::Source, family).1 + 4
}

pub(crate) fn payload(base: PayloadBase, offset: u32, len: u32, dreg: Register) -> Expr {
    Expr::Payload { dreg, base, offset, len }
}

fn masked(mask: &[u8]) -> Expr {
    let len = u32::try_from(mask.len()).unwrap_or(u32::MAX);
    Expr::Bitwise { sreg: KEY, dreg: KEY, len, mask: mask.to_vec(), xor: vec![0; mask.len()] }
}

fn compare(op: CmpOp, data: &[u8]) -> Expr {
    Expr::Cmp { sreg: KEY, op, data: data.to_vec() }
}

pub(crate) fn address_type(family: Family) -> SetKeyType {
    match family {
        Family::V4 => SetKeyType::Ipv4Addr,
        Family::V6 => SetKeyType::Ipv6Addr,
    }
}

pub(crate) fn element_of(address: IpAddr) -> SetElement {
    match address {
        IpAddr::V4(v4) => SetElement::ipv4(v4),
        IpAddr::V6(v6) => SetElement::ipv6(v6),
    }
}

/// The address that a key begins with.
fn address(key: &[u8], family: Family) -> Option<IpAddr> {
    match family {
        Family::V4 => key.first_chunk::<4>().map(|octets| (*octets).into()),
        Family::V6 => key.first_chunk::<16>().map(|octets| (*octets).into()),
    }
}

/// What a [`Key::Socket`] was.
fn socket(key: &[u8], family: Family) -> Option<SocketAddr> {
    let port = key.get(place(End::Source, family).1 as usize..)?.first_chunk::<2>()?;
    Some(SocketAddr::new(address(key, family)?, u16::from_be_bytes(*port)))
}
