//! How each VIP is reached: asked of the kernel, watched, and told to the core as an opaque [`PathId`].

use std::collections::BTreeMap;
use std::hash::{Hash, Hasher};
use std::net::IpAddr;

use shunt_host::HostError;
use shunt_host::query::{self, NextHop};
use shunt_stack::redirect::PathId;
use siphasher::sip::SipHasher13;

use crate::error::Error;

/// The way to one VIP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Path {
    /// As the kernel routes it.
    pub(crate) hop: NextHop,
    /// The interface's MTU in bytes.
    pub(crate) mtu: u32,
}

impl Path {
    /// What the core remembers the path by: interface and next hop.
    pub(crate) fn id(&self) -> PathId {
        let mut hasher = SipHasher13::new();
        (self.hop.index, &self.hop.interface, self.hop.gateway).hash(&mut hasher);
        hasher.finish()
    }
}

/// The ways to all VIPs that have one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Paths(BTreeMap<IpAddr, Path>);

impl Paths {
    /// Asks the kernel; VIPs without a route are left out.
    ///
    /// # Errors
    /// A VIP is this host's own, or goes by another interface than `interface`; or the kernel does not answer.
    pub(crate) async fn look_up(
        vips: impl IntoIterator<Item = IpAddr>,
        interface: Option<&str>,
    ) -> Result<Self, Error> {
        let mut paths = BTreeMap::new();
        for vip in vips {
            if vip.is_ipv6() && !query::has_ipv6() {
                continue;
            }
            let hop = match query::next_hop(vip).await {
                Ok(hop) => hop,
                Err(HostError::NoRoute(_)) => continue,
                Err(error) => return Err(error.into()),
            };
            if hop.local {
                return Err(Error::OwnVip(vip));
            }
            if let Some(wanted) = interface
                && wanted != hop.interface
            {
                return Err(Error::Interface { vip, wanted: wanted.to_owned(), found: hop.interface });
            }
            let mtu = query::link_mtu(&hop.interface).await?;
            paths.insert(vip, Path { hop, mtu });
        }
        Ok(Self(paths))
    }

    /// The VIPs and the ways to them.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (IpAddr, &Path)> {
        self.0.iter().map(|(vip, path)| (*vip, path))
    }

    /// The way to `vip`.
    pub(crate) fn get(&self, vip: IpAddr) -> Option<&Path> {
        self.0.get(&vip)
    }

    /// The smallest MTU of the interfaces used, in bytes.
    pub(crate) fn mtu(&self) -> Option<u32> {
        self.0.values().map(|path| path.mtu).min()
    }

    /// The same with the ways of `old` to VIPs that have none now: a route that flaps must not undo everything.
    pub(crate) fn or(mut self, old: &Paths) -> Self {
        for (vip, path) in &old.0 {
            self.0.entry(*vip).or_insert_with(|| path.clone());
        }
        self
    }

    /// Whether an interface of `old` was replaced by another of its name.
    pub(crate) fn has_new_interface(&self, old: &Paths) -> bool {
        let replaced =
            |one: &NextHop, other: &NextHop| one.interface == other.interface && one.index != other.index;
        self.0.values().any(|new| old.0.values().any(|old| replaced(&new.hop, &old.hop)))
    }

    #[cfg(test)]
    pub(crate) fn from_iter(paths: impl IntoIterator<Item = (IpAddr, Path)>) -> Self {
        Self(paths.into_iter().collect())
    }
}
