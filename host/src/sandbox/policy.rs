//! What each daemon needs once it runs, and why.
//!
//! | | balancer | server | client | proxy |
//! |---|---|---|---|---|
//! | `CAP_NET_ADMIN` | x | x | x | x |
//! | `CAP_NET_BIND_SERVICE` | | | | listening below 1024 |
//! | reads the folders of its configuration and keys | x | x | x | x |
//! | writes below `/proc/sys/net` | x | x | x | x |
//! | keeps files in its state directory | x | x | x | x |
//! | removes its control socket, where that is elsewhere | x | x | x | x |
//! | opens `/dev/net/tun` | `direct`, `datalink` | | | |
//! | reads `/dev/urandom` | | | | x |
//! | listens on TCP ports | | | | those it had |
//! | connects by TCP | x | | | |
//! | chooses processors | `pin` | | | |
//!
//! The system calls that go with it are in `calls`.

use std::fmt;
use std::path::{Path, PathBuf};

use caps::Capability;

/// A daemon, and what of its configuration decides on what it needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Confined {
    /// The balancer.
    Balancer {
        /// Whether servers have devices, which are made as servers come (`direct`, `datalink`).
        devices: bool,
        /// Whether its threads choose their processors.
        pins: bool,
    },
    /// The server's agent.
    Server,
    /// The client's shim beside the kernel.
    Client,
    /// The client's proxy.
    Proxy {
        /// The TCP ports it listens on, again when the host's addresses change.
        listens: Vec<u16>,
    },
}

/// A daemon's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    /// The configuration, read again on SIGHUP.
    pub config: PathBuf,
    /// The keys of tokens, read with it.
    pub keys: Option<PathBuf>,
    /// Where the changes made to the host are kept.
    pub state_dir: PathBuf,
    /// The control socket, if it is not below the state directory.
    pub socket: Option<PathBuf>,
}

/// Something a daemon may still do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Right {
    /// Use a capability.
    Capability(Capability),
    /// Read a file, or what is below a folder.
    Read(PathBuf),
    /// Read and change files that exist below a folder.
    Write(PathBuf),
    /// Read, make, change, replace and remove files below a folder.
    Keep(PathBuf),
    /// Remove files below a folder.
    Remove(PathBuf),
    /// Open and configure a device.
    Device(PathBuf),
    /// Listen on a TCP port.
    Listen(u16),
    /// Connect by TCP, from whatever own port.
    Connect,
    /// Choose the processors that threads run on.
    Processors,
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Right::Capability(capability) => write!(f, "{capability}"),
            Right::Read(path) => write!(f, "reading {}", path.display()),
            Right::Write(path) => write!(f, "writing below {}", path.display()),
            Right::Keep(path) => write!(f, "keeping files in {}", path.display()),
            Right::Remove(path) => write!(f, "removing files in {}", path.display()),
            Right::Device(path) => write!(f, "opening {}", path.display()),
            Right::Listen(port) => write!(f, "listening on TCP port {port}"),
            Right::Connect => f.write_str("connecting by TCP"),
            Right::Processors => f.write_str("choosing processors"),
        }
    }
}

/// A right, and what it is needed for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// What is left.
    pub right: Right,
    /// What for.
    pub reason: &'static str,
}

/// All that is left to a daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    grants: Vec<Grant>,
    files: Vec<PathBuf>,
}

impl Policy {
    /// The table's column for a daemon.
    pub fn of(daemon: &Confined, places: &Places) -> Self {
        let files: Vec<PathBuf> = std::iter::once(&places.config).chain(&places.keys).cloned().collect();
        let mut policy = Policy { grants: Vec::new(), files };
        policy.host();
        policy.places(places);
        match daemon {
            Confined::Balancer { devices, pins } => {
                policy.grant(Right::Connect, "servers' health, and their agents while one is drained");
                if *devices {
                    let tun = PathBuf::from("/dev/net/tun");
                    policy.grant(Right::Device(tun), "each new server gets a device of its own");
                }
                if *pins {
                    policy.grant(Right::Processors, "each queue's thread stays on one");
                }
            }
            Confined::Server | Confined::Client => {}
            Confined::Proxy { listens } => {
                let random = PathBuf::from("/dev/urandom");
                policy.grant(Right::Read(random), "a new address of the host begins with new secrets");
                for &port in listens {
                    policy.grant(Right::Listen(port), "again, when the host's addresses have changed");
                }
                if listens.iter().any(|port| *port < 1024) {
                    let right = Right::Capability(Capability::CAP_NET_BIND_SERVICE);
                    policy.grant(right, "listening on a port below 1024 again");
                }
            }
        }
        policy
    }

    /// What changes and restores the host.
    fn host(&mut self) {
        let right = Right::Capability(Capability::CAP_NET_ADMIN);
        self.grant(right, "routes, rules, devices and nftables follow reloads, and are removed at the end");
        let sysctls = PathBuf::from("/proc/sys/net");
        self.grant(Right::Write(sysctls), "sysctls follow reloads, and are restored at the end");
    }

    fn places(&mut self, places: &Places) {
        for folder in folders(&places.config) {
            self.grant(Right::Read(folder), "the configuration is read again on SIGHUP");
        }
        for folder in places.keys.iter().flat_map(|keys| folders(keys)) {
            self.grant(Right::Read(folder), "the keys of tokens are read again on SIGHUP");
        }
        self.grant(
            Right::Keep(places.state_dir.clone()),
            "what is changed on the host is written down first",
        );
        let elsewhere = places.socket.as_deref().filter(|socket| !socket.starts_with(&places.state_dir));
        if let Some(folder) = elsewhere.and_then(Path::parent) {
            self.grant(Right::Remove(folder.to_owned()), "the control socket goes at the end");
        }
    }

    fn grant(&mut self, right: Right, reason: &'static str) {
        if !self.grants.iter().any(|grant| grant.right == right) {
            self.grants.push(Grant { right, reason });
        }
    }

    /// What is left, each once.
    pub fn grants(&self) -> &[Grant] {
        &self.grants
    }

    /// Files that are read again.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    pub(super) fn has(&self, wanted: impl Fn(&Right) -> bool) -> bool {
        self.grants.iter().any(|grant| wanted(&grant.right))
    }
}

/// The folder of a file, and that of what it is a link to: files are replaced as a whole, so that a rule about the file
/// itself would be about the old one.
fn folders(file: &Path) -> Vec<PathBuf> {
    let parent = |file: &Path| match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    let named = parent(file);
    let target = std::fs::canonicalize(file).map(|target| parent(&target));
    let same = target.as_ref().ok() == std::fs::canonicalize(&named).as_ref().ok();
    std::iter::once(named).chain(target.ok().filter(|_| !same)).collect()
}
