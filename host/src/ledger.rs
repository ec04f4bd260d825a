//! State kept on disk, so that changes survive the daemon that made them: a journal for each daemon, and a ledger
//! that all daemons of one network namespace share.
//!
//! Files are named after the namespace ([`namespace_id`]), because `/run` is often shared between namespaces. Old
//! kernels' numbers can come back after a namespace has gone: what the ledger says about a sysctl is therefore only
//! acted on where the sysctl still has the value written down.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::error::HostError;
use crate::namespace::namespace_id;
use crate::prefix::PortRange;
use crate::sysctl;

/// Names the files of one daemon.
#[derive(Debug, Clone)]
pub(crate) struct Files {
    directory: PathBuf,
    name: String,
    namespace: u64,
}

impl Files {
    /// The files of `name` in the calling thread's network namespace; creates the directory.
    pub(crate) fn new(directory: &Path, name: &str) -> Result<Self, HostError> {
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
        if name.is_empty() || name.len() > 32 || !name.chars().all(good) {
            return Err(HostError::Invalid(format!(
                "{name:?} cannot name a daemon: 1 to 32 letters, digits, hyphens and underscores"
            )));
        }
        fs::create_dir_all(directory).map_err(|error| HostError::file("create", directory, error))?;
        let namespace = namespace_id()
            .map_err(|error| HostError::file("look at", Path::new("/proc/thread-self/ns/net"), error))?;
        Ok(Self { directory: directory.to_owned(), name: name.to_owned(), namespace })
    }

    fn path(&self, name: &str, extension: &str) -> PathBuf {
        self.directory.join(format!("{name}.{}.{extension}", self.namespace))
    }

    /// The daemon's journal.
    pub(crate) fn journal(&self) -> PathBuf {
        self.path(&self.name, "json")
    }

    /// Takes the daemon's name in this namespace, until dropped.
    pub(crate) fn lock(&self) -> Result<Flock<File>, HostError> {
        let path = self.path(&self.name, "lock");
        match try_lock(&path)? {
            Some(lock) => Ok(lock),
            None => Err(HostError::Busy { name: self.name.clone(), path }),
        }
    }

    /// Opens the shared ledger, waiting for its turn.
    pub(crate) async fn ledger(&self) -> Result<Ledger, HostError> {
        // The dot keeps it apart from daemons' names.
        let lock_path = self.path(".shared", "lock");
        // Never blocks the thread: two daemons of one process may take turns on it.
        let lock = loop {
            match try_lock(&lock_path)? {
                Some(lock) => break lock,
                None => tokio::time::sleep(Duration::from_millis(2)).await,
            }
        };
        let path = self.path(".shared", "json");
        let shared = load(&path)?.unwrap_or_default();
        Ok(Ledger { _lock: lock, path, name: self.name.clone(), shared })
    }
}

fn try_lock(path: &Path) -> Result<Option<Flock<File>>, HostError> {
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path)
        .map_err(|error| HostError::file("open", path, error))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, error)) => Err(HostError::file("lock", path, error.into())),
    }
}

/// Reads a state file; `None` if there is none.
pub(crate) fn load<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, HostError> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(HostError::file("read", path, error)),
    };
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|error| HostError::State { path: path.to_owned(), reason: error.to_string() })
}

/// Replaces a state file as a whole.
pub(crate) fn store<T: Serialize>(path: &Path, value: &T) -> Result<(), HostError> {
    let text = serde_json::to_vec(value)
        .map_err(|error| HostError::State { path: path.to_owned(), reason: error.to_string() })?;
    let new = path.with_extension("new");
    fs::write(&new, text).map_err(|error| HostError::file("write", &new, error))?;
    fs::rename(&new, path).map_err(|error| HostError::file("replace", path, error))
}

/// Removes a state file, if it is there.
pub(crate) fn discard(path: &Path) -> Result<(), HostError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(HostError::file("remove", path, error)),
        _ => Ok(()),
    }
}

#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Shared {
    /// By key.
    sysctls: BTreeMap<String, Held>,
    /// By daemon: the ports it wants reserved and that nobody else than Shunt had reserved.
    ports: BTreeMap<String, Vec<PortRange>>,
    /// The daemons that need `lookup local` after their rules.
    local_last: BTreeSet<String>,
}

/// A sysctl that daemons hold at a value.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Held {
    original: String,
    /// The value each daemon wants, by its name.
    holders: BTreeMap<String, String>,
}

/// What the daemons of one namespace share: sysctls, reserved ports, the place of `lookup local`. Locked while it
/// exists.
pub(crate) struct Ledger {
    _lock: Flock<File>,
    path: PathBuf,
    name: String,
    shared: Shared,
}

impl Ledger {
    fn save(&self) -> Result<(), HostError> {
        if self.shared == Shared::default() { discard(&self.path) } else { store(&self.path, &self.shared) }
    }

    /// Sets a sysctl and remembers what it was.
    pub(crate) fn hold_sysctl(&mut self, key: &str, value: &str, optional: bool) -> Result<(), HostError> {
        let value = sysctl::normal(value);
        let Some(current) = sysctl::read(key)? else {
            if optional {
                return Ok(());
            }
            return Err(HostError::Invalid(format!("this kernel has no sysctl {key}")));
        };
        let held = self
            .shared
            .sysctls
            .entry(key.to_owned())
            .or_insert_with(|| Held { original: current.clone(), holders: BTreeMap::new() });
        if !held.holders.values().any(|wanted| *wanted == current) {
            // Somebody else has set it since.
            held.original.clone_from(&current);
        }
        held.holders.insert(self.name.clone(), value.clone());
        self.save()?;
        if current == value { Ok(()) } else { sysctl::write(key, &value) }
    }

    /// Gives a sysctl up: to the value another daemon wants, or to what it was.
    pub(crate) fn release_sysctl(&mut self, key: &str) -> Result<(), HostError> {
        let Some(held) = self.shared.sysctls.get_mut(key) else { return Ok(()) };
        let Some(ours) = held.holders.get(&self.name) else { return Ok(()) };
        let others = || held.holders.iter().filter(|(name, _)| **name != self.name).map(|(_, value)| value);
        let next = if others().any(|value| value == ours) {
            ours.clone()
        } else {
            others().next().unwrap_or(&held.original).clone()
        };
        if sysctl::read(key)?.as_ref() == Some(ours) && next != *ours {
            sysctl::write(key, &next)?;
        }
        held.holders.remove(&self.name);
        if held.holders.is_empty() {
            self.shared.sysctls.remove(key);
        }
        self.save()
    }

    /// Reserves ports beside those that are reserved already.
    pub(crate) fn hold_ports(&mut self, wanted: &[PortRange]) -> Result<(), HostError> {
        let current = sysctl::reserved_ports()?;
        let of_shunt: Vec<PortRange> = self.shared.ports.values().flatten().copied().collect();
        let foreign = PortRange::without(&current, &of_shunt);
        let ours = self.shared.ports.entry(self.name.clone()).or_default();
        *ours = PortRange::merged(ours.iter().copied().chain(PortRange::without(wanted, &foreign)));
        self.save()?;
        let all = PortRange::merged(current.iter().chain(wanted).copied());
        if all == current { Ok(()) } else { sysctl::set_reserved_ports(&all) }
    }

    /// Gives `wanted` up, but for what other daemons want.
    pub(crate) fn release_ports(&mut self, wanted: &[PortRange]) -> Result<(), HostError> {
        let Some(ours) = self.shared.ports.get(&self.name) else { return Ok(()) };
        let others: Vec<PortRange> = self
            .shared
            .ports
            .iter()
            .filter(|(name, _)| **name != self.name)
            .flat_map(|(_, ranges)| ranges.iter().copied())
            .collect();
        let kept = PortRange::without(ours, wanted);
        let given_up = PortRange::without(&PortRange::without(ours, &kept), &others);
        let current = sysctl::reserved_ports()?;
        let left = PortRange::without(&current, &given_up);
        if left != current {
            sysctl::set_reserved_ports(&left)?;
        }
        if kept.is_empty() {
            self.shared.ports.remove(&self.name);
        } else {
            self.shared.ports.insert(self.name.clone(), kept);
        }
        self.save()
    }

    /// Notes that this daemon needs `lookup local` last.
    pub(crate) fn hold_local_last(&mut self) -> Result<(), HostError> {
        self.shared.local_last.insert(self.name.clone());
        self.save()
    }

    /// Notes that this daemon no longer does; says whether nobody does.
    pub(crate) fn release_local_last(&mut self) -> Result<bool, HostError> {
        self.shared.local_last.remove(&self.name);
        self.save()?;
        Ok(self.shared.local_last.is_empty())
    }

    /// Gives up all that this daemon's journal may have missed, but for the sysctls of these keys.
    pub(crate) fn release_all_but(&mut self, kept: &BTreeSet<String>) -> Result<(), HostError> {
        let held: Vec<String> = self
            .shared
            .sysctls
            .iter()
            .filter(|(key, held)| held.holders.contains_key(&self.name) && !kept.contains(*key))
            .map(|(key, _)| key.clone())
            .collect();
        for key in held {
            self.release_sysctl(&key)?;
        }
        self.release_ports(&[PortRange::new(0, u16::MAX)])
    }
}
