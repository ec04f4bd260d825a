//! An nftables table in the making: how it is created as a whole, and how it is turned into another.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use nlink::netlink::nftables::{
    BaseChain, Chain, Expr, Family as Nft, Rule, Set, SetDataType, SetElement, SetKeyType, Transaction,
};

use super::expressions::{address_type, element_of};
use super::family_of;
use crate::nft::ELEMENTS_PER_MESSAGE;
use crate::offload::{Goal, PortMap, Spread};
use crate::prefix::Family;

/// The key of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Key {
    /// A slot, or a mark.
    Number(u32),
    Address(IpAddr),
    Socket(SocketAddr),
    /// From the first to the last.
    Range(IpAddr, IpAddr),
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
            Key::Range(first, last) => {
                SetElement::range(element_of(first).key().to_vec(), element_of(last).key().to_vec())
            }
        }
    }
}

/// A set or map, and what is in it.
pub(super) struct Contents {
    pub(super) set: Set,
    pub(super) entries: BTreeMap<Key, Option<Goal>>,
}

/// A table.
pub(super) struct Table<'a> {
    name: &'a str,
    family: Nft,
    /// Which goals the entries of its maps have.
    marks: bool,
    /// Without a hook, others go on in it.
    chains: Vec<(&'static str, Option<BaseChain>)>,
    /// The links it is bound to, by index: one that comes back under its name has to be bound again.
    links: Vec<u32>,
    sets: Vec<Contents>,
    rules: Vec<Rule>,
}

impl<'a> Table<'a> {
    pub(super) fn new(name: &'a str, family: Nft, marks: bool) -> Self {
        Table {
            name,
            family,
            marks,
            chains: Vec::new(),
            links: Vec::new(),
            sets: Vec::new(),
            rules: Vec::new(),
        }
    }

    /// Whether the rules are the same, so that one becomes the other by what is in its sets.
    pub(super) fn is_like(&self, other: &Table<'_>) -> bool {
        let names = |table: &Table<'_>| {
            table.sets.iter().map(|contents| contents.set.name().to_owned()).collect::<Vec<_>>()
        };
        let bound = self.links == other.links && self.chains == other.chains;
        bound && names(self) == names(other) && self.rules == other.rules
    }

    /// A new table in place of an old one.
    pub(super) fn whole(&self, mut transaction: Transaction, exists: bool) -> nlink::Result<Transaction> {
        if exists {
            transaction = transaction.del_table(self.name, self.family);
        }
        transaction = transaction.add_table(self.name, self.family);
        for Contents { set, entries } in &self.sets {
            transaction = added(transaction.add_set(set.clone()), set, entries.iter());
        }
        for (name, base) in &self.chains {
            let chain = Chain::new(self.name, *name)?.family(self.family);
            transaction = transaction.add_chain(match base {
                Some(base) => chain.base(base.clone()),
                None => chain,
            });
        }
        Ok(self.rules.iter().cloned().fold(transaction, Transaction::add_rule))
    }

    /// What makes this out of a table like it.
    pub(super) fn difference(&self, mut transaction: Transaction, old: &Table<'_>) -> Transaction {
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

    pub(super) fn bind(&mut self, links: impl IntoIterator<Item = u32>) {
        self.links.extend(links);
    }

    pub(super) fn chain(&mut self, name: &'static str, base: Option<BaseChain>) {
        self.chains.push((name, base));
    }

    pub(super) fn rule(&self, chain: &str) -> Rule {
        Rule::new(self.name, chain).family(self.family)
    }

    pub(super) fn push(&mut self, rule: Rule) {
        self.rules.push(rule);
    }

    /// A rule of expressions, in order.
    pub(super) fn push_all(&mut self, chain: &str, exprs: impl IntoIterator<Item = Expr>) {
        let rule = exprs.into_iter().fold(self.rule(chain), Rule::expr);
        self.rules.push(rule);
    }

    fn named(&self, name: &str, key: SetKeyType) -> Set {
        Set::new(self.name, name).family(self.family).key_type(key)
    }

    /// A set of a family's addresses.
    pub(super) fn addresses(
        &mut self,
        name: &str,
        family: Family,
        addresses: impl IntoIterator<Item = IpAddr>,
    ) {
        let entries = addresses.into_iter().map(|address| (Key::Address(address), None)).collect();
        self.sets.push(Contents { set: self.named(name, address_type(family)), entries });
    }

    /// A set of ranges of a family's addresses.
    pub(super) fn ranges(&mut self, name: &str, family: Family, ranges: &[(IpAddr, IpAddr)]) {
        let entries = ranges.iter().map(|(first, last)| (Key::Range(*first, *last), None)).collect();
        self.sets.push(Contents { set: self.named(name, address_type(family)).interval(), entries });
    }

    /// What a goal is to a set.
    fn goal_type(&self, family: Family) -> SetKeyType {
        if self.marks { SetKeyType::Mark } else { address_type(family) }
    }

    /// A map of the entries of a family that have a goal which `wanted` wants; what they do is counted.
    pub(super) fn ports(
        &mut self,
        name: &str,
        map: &PortMap,
        family: Family,
        wanted: impl Fn(&Goal) -> bool,
    ) {
        let fits = |(key, goal): &(&SocketAddr, &Goal)| {
            let same = match goal {
                Goal::Mark(_) => true,
                Goal::Address(to) => to.is_ipv4() == key.is_ipv4(),
            };
            Family::of(key.ip()) == family && same && wanted(goal)
        };
        let entries = map.entries.iter().filter(fits);
        let entries = entries.map(|(key, to)| (Key::Socket(*key), Some(*to))).collect();
        let key = SetKeyType::Concat(vec![address_type(family), SetKeyType::InetService]);
        let set = self.named(name, key).map(SetDataType::Value(self.goal_type(family)));
        self.sets.push(Contents { set: set.counter(), entries });
    }

    /// Targets, slots and counters of a spread, by these names.
    pub(super) fn slots(&mut self, [targets, slots, counts]: &[String; 3], spread: &Spread) {
        let family = family_of(spread);
        let key = SetKeyType::Concat(vec![address_type(family), SetKeyType::InetService]);
        let entries = spread.targets.iter().map(|target| (Key::Socket(*target), None)).collect();
        self.sets.push(Contents { set: self.named(targets, key), entries });
        let goal = |index: &u16| spread.goals.get(usize::from(*index)).copied();
        let entries = (0..)
            .zip(spread.slots.iter())
            .filter_map(|(slot, index)| Some((Key::Number(slot), Some(goal(index)?))))
            .collect();
        // A set with a size has a fixed hash, the fastest there is.
        let modulus = u32::try_from(spread.slots.len()).unwrap_or(u32::MAX);
        let set = self.named(slots, SetKeyType::Mark).size(modulus);
        let goals = self.goal_type(family);
        self.sets.push(Contents { set: set.map(SetDataType::Value(goals.clone())), entries });
        let entries = spread.goals.iter().map(|goal| (Key::from(*goal), None)).collect();
        self.sets.push(Contents { set: self.named(counts, goals).counter(), entries });
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
