//! Virtual networks for the demo, end-to-end tests and benchmarks: hosts that are network namespaces, links between
//! them, impaired on request, and processes inside them.
//!
//! Everything is made by system calls and netlink; no program is needed but `/bin/sh` (and `nft` for
//! [`Host::nft`]). It takes root, or a user namespace ([`rootless::enter`]). Nothing is left when the [`Lab`] is
//! dropped or its process killed: namespaces have no names, devices live in them, children are killed.
//!
//! ```no_run
//! use shunt_lab::{Impairment, Lab, LinkOptions, Via};
//! use std::process::Command;
//!
//! # fn main() -> shunt_lab::Result<()> {
//! let lab = Lab::new()?;
//! let (client, router, server) = (lab.host("client")?, lab.host("router")?, lab.host("server")?);
//! lab.link(&client, "eth0", &router, "eth0", LinkOptions::default())?;
//! let lossy = Impairment { loss: 0.02, seed: 1, ..Impairment::default() };
//! let link = lab.impaired_link(&router, "eth1", &server, "eth0", lossy)?;
//! client.address("eth0", "10.0.1.2/24")?;
//! router.address("eth0", "10.0.1.1/24")?;
//! router.address("eth1", "10.0.2.1/24")?;
//! router.sysctl("net.ipv4.ip_forward", "1")?;
//! server.address("eth0", "10.0.2.2/24")?;
//! client.route("0.0.0.0/0", Via::gateway("10.0.1.1"))?;
//! server.route("0.0.0.0/0", Via::gateway("10.0.2.1"))?;
//! let nginx = server.spawn(&mut Command::new("nginx"))?;
//! let page = client.run(Command::new("curl").arg("http://10.0.2.2/"))?;
//! link.set(Impairment::default())?;
//! # Ok(())
//! # }
//! ```

mod child;
mod error;
mod guardian;
mod host;
mod impair;
mod network;
mod relay;
pub mod rootless;
mod sockets;

pub use child::Child;
pub use error::{Error, Result};
pub use guardian::die_with_parent;
pub use host::Host;
pub use impair::{ETHERNET_HEADER, Filter, Impairment, LinkCounters, Verdict};
pub use network::{DeviceCounters, Via};
pub use nix::sys::signal::Signal;
pub use relay::{Direction, ImpairedLink};
pub use sockets::{TcpSocket, TcpState};

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use guardian::Guardian;
use nlink::netlink::link::VethLink;

/// How long a device may take until it carries packets.
const LINK_UP: Duration = Duration::from_secs(5);

/// A virtual network. Dropping it ends its links, kills its children and lets its hosts go. (Sockets opened by
/// [`Host::enter`] and still held keep the namespace they are in, without a thread, process or relay of ours.)
pub struct Lab {
    guardian: Arc<Guardian>,
    hosts: Mutex<Vec<Host>>,
    links: Mutex<Vec<ImpairedLink>>,
}

/// Properties of a plain link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkOptions {
    /// Largest IP packet in bytes, at both ends.
    pub mtu: u32,
}

impl Default for LinkOptions {
    /// MTU 1500.
    fn default() -> Self {
        Self { mtu: 1500 }
    }
}

impl std::fmt::Debug for Lab {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lab").field("hosts", &lock(&self.hosts)).finish_non_exhaustive()
    }
}

impl Lab {
    /// An empty lab.
    ///
    /// # Errors
    /// [`Error::Missing`] when this machine or user cannot have one: a sentence that says what is missing (the
    /// privilege to make namespaces, a /dev/net/tun that opens, /bin/sh) and what to do.
    pub fn new() -> Result<Self> {
        rootless::check_tun()?;
        let guardian = Arc::new(Guardian::start()?);
        let lab = Self { guardian, hosts: Mutex::default(), links: Mutex::default() };
        // Fails here rather than at the first host.
        Host::start("lab", Arc::clone(&lab.guardian))?.stop();
        Ok(lab)
    }

    /// Adds a host: a fresh network namespace with `lo` up. The name is for errors, and unique in the lab.
    ///
    /// # Errors
    /// The name is taken, or the kernel refuses.
    pub fn host(&self, name: &str) -> Result<Host> {
        let mut hosts = lock(&self.hosts);
        if hosts.iter().any(|host| host.name() == name) {
            let expected = "a name that no other host of the lab has";
            return Err(Error::Invalid { what: "host", given: name.to_owned(), expected });
        }
        let host = Host::start(name, Arc::clone(&self.guardian))?;
        hosts.push(host.clone());
        Ok(host)
    }

    /// Links two hosts by a veth pair, both ends up and carrying when this returns.
    ///
    /// # Errors
    /// A device of that name exists, or the kernel has no veth.
    pub fn link(&self, a: &Host, name_a: &str, b: &Host, name_b: &str, options: LinkOptions) -> Result<()> {
        self.owns(&[a, b])?;
        let namespace = b.namespace()?;
        let pair = VethLink::new(name_a, name_b).mtu(options.mtu).peer_netns_fd(namespace);
        let made = a.request(format!("link {name_a} to {} {name_b}", b.name()), move |worker| {
            worker.runtime.block_on(worker.route.add_link(pair))
        });
        match made {
            Err(Error::Netlink { source, .. }) if source.is_not_supported() => Err(Error::Missing(
                "the kernel has no veth devices: load the kernel module `veth`".to_owned(),
            )),
            other => other,
        }?;
        a.set_up(name_a, true)?;
        b.set_up(name_b, true)?;
        wait_until_up(a, name_a)?;
        wait_until_up(b, name_b)
    }

    /// Links two hosts by a relay of our own that impairs packets (the kernel's netem is not needed).
    ///
    /// Both ends are Ethernet (TAP) devices, and can be bridged like those of a plain link.
    ///
    /// # Errors
    /// A device of that name exists, a probability is not one, or the kernel refuses.
    pub fn impaired_link(
        &self,
        a: &Host,
        name_a: &str,
        b: &Host,
        name_b: &str,
        impairment: Impairment,
    ) -> Result<ImpairedLink> {
        self.owns(&[a, b])?;
        let link = ImpairedLink::start([(a, name_a), (b, name_b)], impairment)?;
        lock(&self.links).push(link.clone());
        Ok(link)
    }

    fn owns(&self, hosts: &[&Host]) -> Result<()> {
        let own = lock(&self.hosts);
        match hosts.iter().find(|host| !own.iter().any(|other| other.same(host))) {
            None => Ok(()),
            Some(stranger) => {
                let given = stranger.name().to_owned();
                Err(Error::Invalid { what: "host", given, expected: "a host of this lab" })
            }
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for link in lock(&self.links).drain(..) {
            link.stop();
        }
        self.guardian.finish();
        for host in lock(&self.hosts).drain(..) {
            host.stop();
        }
    }
}

/// The kernel reports a device up, and gives it its IPv6 routes, a moment after it was taken up.
fn wait_until_up(host: &Host, name: &str) -> Result<()> {
    let end = Instant::now() + LINK_UP;
    loop {
        let device = name.to_owned();
        let link = host.request(format!("state of {name}"), move |worker| {
            worker.runtime.block_on(worker.route.get_link_by_name(device))
        })?;
        if link.is_some_and(|link| link.is_up() && link.is_running() && link.has_carrier()) {
            return Ok(());
        }
        if Instant::now() >= end {
            let what = format!("{name} carrying packets");
            return Err(Error::TimedOut { host: host.name().to_owned(), what, after: LINK_UP });
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
