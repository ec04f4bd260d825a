//! A session of changes: applied in order, journalled before they are made, undone in reverse order.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::net::IpAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::Flock;
use serde::{Deserialize, Serialize};

use crate::change::Change;
use crate::error::HostError;
use crate::kernel::{self, LinkState, Netlink};
use crate::ledger::{self, Files};
use crate::maps;
use crate::nft::{self, Nft};
use crate::offload::{Count, Counted, Offload};
use crate::options::HostOptions;
use crate::shortcuts::{self, Detour, Own, Shortcuts};
use crate::swaps::{self, PortSwaps};
use crate::sysctl;

/// Where state files are kept unless told otherwise.
pub const DEFAULT_STATE_DIR: &str = "/run/shunt";

/// A change as the journal holds it, with what undoing it needs.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Entry {
    change: Change,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    link_before: Option<LinkState>,
}

/// Everything one daemon has changed on its host.
///
/// Changes are made in the network namespace of the thread that calls. [`Host::close`] undoes them all; a `Host`
/// dropped without it, or a killed process, leaves them to the next [`Host::open`] or [`Host::sweep`] of the same
/// name.
pub struct Host {
    options: HostOptions,
    name: String,
    files: Files,
    netlink: Netlink,
    applied: Vec<Entry>,
    offload_generation: AtomicU64,
    /// Looked for once: later the daemon may not read such files any more.
    old_iptables: bool,
    closed: bool,
    _lock: Flock<File>,
}

impl Host {
    /// Starts a session under `name` (the role's name, or another for a second daemon of a role), with state in
    /// [`DEFAULT_STATE_DIR`]. Removes first what an earlier session of this name left behind.
    ///
    /// # Errors
    /// Another process uses the name in this namespace; or leftovers cannot be removed.
    pub async fn open(name: &str, options: &HostOptions) -> Result<Self, HostError> {
        Self::open_in(Path::new(DEFAULT_STATE_DIR), name, options).await
    }

    /// The same with state files elsewhere.
    ///
    /// # Errors
    /// As [`Host::open`].
    pub async fn open_in(state_dir: &Path, name: &str, options: &HostOptions) -> Result<Self, HostError> {
        Self::open_keeping(state_dir, name, options, |_| false).await
    }

    /// The same, taking over those of an earlier session's changes that `keep` wants, without a moment in which they
    /// are not there: a balancer's rule to its VIP and the blackhole behind it, so that no connect meets
    /// "unreachable" while it restarts. They count as standing: apply them as always, or use [`Host::replace`], which
    /// also removes those no longer wanted. Only what [`Change::can_stay`] is kept.
    ///
    /// # Errors
    /// As [`Host::open`].
    pub async fn open_keeping(
        state_dir: &Path,
        name: &str,
        options: &HostOptions,
        keep: impl Fn(&Change) -> bool,
    ) -> Result<Self, HostError> {
        let mut host = Self::unswept(state_dir, name, options)?;
        host.remove_leftovers(keep).await?;
        Ok(host)
    }

    /// Removes what an earlier session of this name left behind; nothing if there is nothing. Says how many things
    /// were removed.
    ///
    /// # Errors
    /// As [`Host::open_in`].
    pub async fn sweep(state_dir: &Path, name: &str, options: &HostOptions) -> Result<usize, HostError> {
        Self::unswept(state_dir, name, options)?.remove_leftovers(|_| false).await
    }

    fn unswept(state_dir: &Path, name: &str, options: &HostOptions) -> Result<Self, HostError> {
        let files = Files::new(state_dir, name)?;
        let lock = files.lock()?;
        Ok(Self {
            options: options.clone(),
            name: name.to_owned(),
            files,
            netlink: kernel::connect()?,
            applied: Vec::new(),
            offload_generation: AtomicU64::new(0),
            old_iptables: shortcuts::has_old_iptables(),
            closed: false,
            _lock: lock,
        })
    }

    /// The numbers and names this session uses.
    pub fn options(&self) -> &HostOptions {
        &self.options
    }

    /// The changes that stand now, in the order they were made.
    pub fn changes(&self) -> impl Iterator<Item = &Change> {
        self.applied.iter().map(|entry| &entry.change)
    }

    /// Makes changes in order. If one fails, *everything* of this session is undone and the error returned.
    ///
    /// # Errors
    /// The change that failed; failures of undoing after it are logged.
    pub async fn apply(
        &mut self,
        changes: impl IntoIterator<Item = impl Into<Change>>,
    ) -> Result<(), HostError> {
        match self.make(changes.into_iter().map(Into::into).collect()).await {
            Ok(()) => Ok(()),
            Err(error) => {
                if let Err(undo) = self.undo_unless(|_| false).await {
                    tracing::warn!(%undo, "undoing the changes to the host after a failure failed as well");
                }
                Err(error)
            }
        }
    }

    /// Makes the standing changes be `wanted`: undoes those that are not in it, then makes the missing ones. For
    /// reloads; a change that stays is not touched, and our nftables table is replaced atomically.
    ///
    /// # Errors
    /// The first failure; what was done until then stands, and [`Host::close`] still undoes it.
    pub async fn replace(&mut self, wanted: Vec<Change>) -> Result<(), HostError> {
        for index in (0..self.applied.len()).rev() {
            let change = &self.applied[index].change;
            let replaced = wanted.iter().any(|new| new.replaces(change));
            if !wanted.contains(change) && !replaced {
                self.undo(&self.applied[index]).await?;
                self.applied.remove(index);
                self.save()?;
            }
        }
        let missing =
            wanted.into_iter().filter(|change| !self.changes().any(|applied| applied == change)).collect();
        self.make(missing).await
    }

    /// Undoes every change, in reverse order, and ends the session.
    ///
    /// # Errors
    /// The first failure; the rest is undone all the same, and what failed stays in the journal for the next sweep.
    pub async fn close(self) -> Result<(), HostError> {
        self.close_keeping(|_| false).await
    }

    /// Undoes every change but those that `keep` wants (and that [`Change::can_stay`]), and ends the session. They
    /// stay in the journal for the next session or sweep.
    ///
    /// # Errors
    /// As [`Host::close`].
    pub async fn close_keeping(mut self, keep: impl Fn(&Change) -> bool) -> Result<(), HostError> {
        let result = self.undo_unless(keep).await;
        self.closed = true;
        result
    }

    /// Writes all entries ahead, then makes the changes; leaves out those that stand already.
    async fn make(&mut self, changes: Vec<Change>) -> Result<(), HostError> {
        let mut entries: Vec<Entry> = Vec::with_capacity(changes.len());
        for change in changes {
            if self.applied.iter().chain(&entries).any(|entry| entry.change == change) {
                continue;
            }
            kernel::check(&change)?;
            let link_before = match &change {
                Change::Link(link) => Some(kernel::link_state(&self.netlink, &link.interface).await?),
                _ => None,
            };
            entries.push(Entry { change, link_before });
        }
        let planned: Vec<&Entry> = self.applied.iter().chain(&entries).collect();
        ledger::store(&self.files.journal(), &planned)?;
        for entry in entries {
            if let Err(error) = self.apply_one(&entry).await {
                // It may have been made in part. An address that could not be added is another's, and maps are changed
                // as a whole or not at all.
                let not_made = match &entry.change {
                    Change::Address(_) => true,
                    Change::Offload(_) => self.offload().is_some(),
                    _ => false,
                };
                if !not_made {
                    self.applied.push(entry);
                }
                return Err(error);
            }
            self.applied.retain(|old| !entry.change.replaces(&old.change));
            self.applied.push(entry);
        }
        self.save()
    }

    async fn apply_one(&self, entry: &Entry) -> Result<(), HostError> {
        let (netlink, protocol) = (&self.netlink, self.options.protocol());
        match &entry.change {
            Change::Sysctl(sysctl) => {
                self.files.ledger().await?.hold_sysctl(&sysctl.key, &sysctl.value, sysctl.optional)
            }
            Change::ReservePorts(ports) => self.files.ledger().await?.hold_ports(ports),
            Change::LocalLast => {
                let mut ledger = self.files.ledger().await?;
                ledger.hold_local_last()?;
                let moved = kernel::move_local_last(netlink).await;
                if moved.is_err() && ledger.release_local_last()? {
                    kernel::move_local_first(netlink).await?;
                }
                moved
            }
            Change::Rule(rule) => kernel::add_rule(netlink, rule, protocol).await,
            Change::Route(route) => kernel::add_route(netlink, route, protocol).await,
            Change::Address(address) => kernel::add_address(netlink, address).await,
            Change::Link(link) => match entry.link_before {
                Some(before) => kernel::set_link(netlink, link, before).await,
                None => Err(HostError::NoInterface(link.interface.clone())),
            },
            Change::Divert(divert) => nft::install(&self.table(), divert).await,
            Change::Offload(offload) => {
                if !maps::install(&self.maps_table(), offload, self.offload()).await? {
                    self.offload_generation.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            }
            Change::SwapTable(table) => swaps::install(&self.swaps_table(), table).await,
        }
    }

    async fn undo(&self, entry: &Entry) -> Result<(), HostError> {
        let (netlink, protocol) = (&self.netlink, self.options.protocol());
        match &entry.change {
            Change::Sysctl(sysctl) => self.files.ledger().await?.release_sysctl(&sysctl.key),
            Change::ReservePorts(ports) => self.files.ledger().await?.release_ports(ports),
            Change::LocalLast => {
                let mut ledger = self.files.ledger().await?;
                if ledger.release_local_last()? {
                    kernel::move_local_first(netlink).await?;
                }
                Ok(())
            }
            Change::Rule(rule) => kernel::remove_rule(netlink, rule, protocol).await,
            Change::Route(route) => kernel::remove_route(netlink, route, protocol).await,
            Change::Address(address) => kernel::remove_address(netlink, address).await,
            Change::Link(link) => match entry.link_before {
                Some(before) => kernel::restore_link(netlink, link, before).await,
                None => Ok(()),
            },
            Change::Divert(_) => nft::remove(&self.table(), Nft::Inet).await.map(drop),
            Change::Offload(_) => maps::uninstall(&self.maps_table()).await.map(drop),
            Change::SwapTable(_) => nft::remove(&self.swaps_table(), Nft::Inet).await.map(drop),
        }
    }

    /// Undoes the standing changes that need not stay; keeps those that fail.
    async fn undo_unless(&mut self, keep: impl Fn(&Change) -> bool) -> Result<(), HostError> {
        let mut failure = None;
        let mut kept = Vec::new();
        let stays = |entry: &Entry| entry.change.can_stay() && keep(&entry.change);
        let undoing;
        (self.applied, undoing) = std::mem::take(&mut self.applied).into_iter().partition(stays);
        // `lookup local` can only return once our rules are gone, whatever the order they came in.
        let (local, others): (Vec<Entry>, Vec<Entry>) =
            undoing.into_iter().partition(|entry| entry.change == Change::LocalLast);
        for entry in others.into_iter().rev().chain(local) {
            if let Err(error) = self.undo(&entry).await {
                tracing::warn!(%error, change = ?entry.change, "a change to the host could not be undone");
                failure.get_or_insert(error);
                kept.push(entry);
            }
        }
        kept.reverse();
        self.applied.extend(kept);
        let saved = self.save();
        failure.map_or(saved, Err)
    }

    async fn remove_leftovers(&mut self, keep: impl Fn(&Change) -> bool) -> Result<usize, HostError> {
        self.applied = ledger::load(&self.files.journal())?.unwrap_or_default();
        let journalled = self.applied.len();
        // A device's sysctls went with it.
        let gone = |change: &Change| match change {
            Change::Sysctl(sysctl) => !matches!(sysctl::read(&sysctl.key), Ok(Some(_))),
            _ => false,
        };
        self.undo_unless(|change| keep(change) && !gone(change)).await?;
        let journalled = journalled - self.applied.len();
        // What the journal missed: it may have been lost, or have been another boot's.
        let found = kernel::sweep(&self.netlink, &self.options, &self.changes().collect::<Vec<_>>()).await?;
        let mut stays = BTreeSet::new();
        for entry in &self.applied {
            match &entry.change {
                // Its maps are not in the journal. If it was never made, removing it is no error.
                Change::Offload(_) => continue,
                Change::Sysctl(sysctl) => stays.insert(sysctl.key.clone()),
                _ => false,
            };
            // It may have been written down but never made.
            kernel::or_exists(self.apply_one(entry).await)?;
        }
        let mut table = usize::from(nft::remove(&self.table(), Nft::Inet).await?);
        if !self.changes().any(|change| matches!(change, Change::Offload(_))) {
            table += maps::uninstall(&self.maps_table()).await?;
        }
        table += usize::from(nft::remove(&self.swaps_table(), Nft::Inet).await?);
        let mut ledger = self.files.ledger().await?;
        ledger.release_all_but(&stays)?;
        if ledger.release_local_last()? {
            kernel::move_local_first(&self.netlink).await?;
        }
        let removed = journalled + found + table;
        if removed > 0 {
            tracing::info!(removed, name = self.name, "removed what an earlier run left on this host");
        }
        Ok(removed)
    }

    fn save(&self) -> Result<(), HostError> {
        let journal = self.files.journal();
        if self.applied.is_empty() {
            ledger::discard(&journal)
        } else {
            ledger::store(&journal, &self.applied)
        }
    }

    /// What each entry of the standing [`Offload`] has counted since it was added; nothing if none stands. An entry that
    /// stays the same when the maps are replaced counts on, unless they were made anew
    /// ([`offload_generation`](Self::offload_generation)).
    ///
    /// # Errors
    /// The kernel does not say.
    pub async fn offload_counts(&self) -> Result<BTreeMap<Counted, Count>, HostError> {
        match self.offload() {
            Some(offload) => maps::counts(&self.maps_table(), offload).await,
            None => Ok(BTreeMap::new()),
        }
    }

    /// How often the maps have been made as a whole: then all entries count from 0.
    pub fn offload_generation(&self) -> u64 {
        self.offload_generation.load(Ordering::Relaxed)
    }

    /// The maps that stand.
    fn offload(&self) -> Option<&Offload> {
        self.changes().find_map(|change| match change {
            Change::Offload(offload) => Some(offload),
            _ => None,
        })
    }

    /// The way to the swaps of the standing [`SwapTable`](crate::SwapTable), asked for once, while it is empty; `None` if
    /// there is no such table.
    ///
    /// # Errors
    /// The kernel gives no socket.
    pub fn port_swaps(&self) -> Result<Option<PortSwaps>, HostError> {
        let table = self.changes().find_map(|change| match change {
            Change::SwapTable(table) => Some(table.clone()),
            _ => None,
        });
        match table {
            Some(table) => PortSwaps::open(self.swaps_table(), table).map(Some),
            None => Ok(None),
        }
    }

    /// The ways out of this host; none leads to an address of `except`. What stands because of this session is in
    /// nobody's way.
    ///
    /// # Errors
    /// Netlink fails.
    pub async fn shortcuts(&self, except: &BTreeSet<IpAddr>) -> Result<Result<Shortcuts, Detour>, HostError> {
        match self.detour().await? {
            Some(detour) => Ok(Err(detour)),
            None => shortcuts::find(except).await,
        }
    }

    /// Why there are no shortcuts now, whatever the routes.
    ///
    /// # Errors
    /// Netlink fails.
    pub async fn detour(&self) -> Result<Option<Detour>, HostError> {
        if self.old_iptables {
            return Ok(Some(Detour::Iptables));
        }
        let tables = [self.table(), self.maps_table()];
        shortcuts::detour(Own { protocol: self.options.protocol(), tables: &tables }).await
    }

    /// The name of our nftables table.
    fn table(&self) -> String {
        format!("shunt_{}", self.name)
    }

    /// The name of those of maps.
    fn maps_table(&self) -> String {
        format!("shunt_{}_maps", self.name)
    }

    /// The name of that of swaps.
    fn swaps_table(&self) -> String {
        format!("shunt_{}_swaps", self.name)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if !self.closed && !self.applied.is_empty() {
            tracing::warn!(name = self.name, "the host's changes were not undone; the next start will do it");
        }
    }
}
