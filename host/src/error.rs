//! What can go wrong when the host is changed.

use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::prefix::Family;

/// Why a change, an undoing or a query failed.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The kernel refused a netlink request.
    #[error("cannot {action}: {error}{}", hint(error))]
    Netlink {
        /// What was tried.
        action: String,
        /// The kernel's answer.
        error: nlink::Error,
    },
    /// A file could not be read or written.
    #[error("cannot {action} {path}: {error}{}", file_hint(error))]
    File {
        /// `read`, `write`, ...
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// A state file of ours does not hold what we write there.
    #[error("{path} is damaged ({reason}); remove it if no Shunt daemon runs here")]
    State {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Another process holds this name in this network namespace.
    #[error("another Shunt daemon named {name:?} runs in this network namespace (it holds {path})")]
    Busy {
        /// The name given to [`Host::open`](crate::Host::open).
        name: String,
        /// The lock file.
        path: PathBuf,
    },
    /// No such interface in this network namespace.
    #[error("there is no interface {0:?} in this network namespace")]
    NoInterface(String),
    /// A thread that something is left to cannot be started, or has failed.
    #[error("no thread for it: {0}; if there are too many, raise their limit (ulimit -u)")]
    Thread(io::Error),
    /// No route leads to an address.
    #[error("no route leads to {0}")]
    NoRoute(std::net::IpAddr),
    /// Somebody moved the `lookup local` rule to where our rules would come after it.
    #[error(
        "the {family} rule `lookup local` has preference {preference}; Shunt's rules need it at {} or later",
        crate::kernel::LOCAL_PREFERENCE
    )]
    LocalRule {
        /// Of which family's rules.
        family: Family,
        /// Where the rule is.
        preference: u32,
    },
    /// A change that cannot be meant as it is written.
    #[error("{0}")]
    Invalid(String),
}

impl HostError {
    pub(crate) fn netlink(action: impl fmt::Display, error: nlink::Error) -> Self {
        HostError::Netlink { action: action.to_string(), error }
    }

    pub(crate) fn file(action: &'static str, path: impl Into<PathBuf>, error: io::Error) -> Self {
        HostError::File { action, path: path.into(), error }
    }
}

fn hint(error: &nlink::Error) -> &'static str {
    if error.is_permission_denied() { " (root or CAP_NET_ADMIN is needed)" } else { "" }
}

fn file_hint(error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::PermissionDenied { " (root is needed)" } else { "" }
}

/// Whether the kernel says that what was to be removed is not there.
pub(crate) fn absent(error: &nlink::Error) -> bool {
    error.is_not_found()
        || error.is_no_device()
        || matches!(
            error.errno(),
            Some(no) if [nix::libc::ESRCH, nix::libc::ENOENT, nix::libc::ENODEV, nix::libc::EADDRNOTAVAIL].contains(&no)
        )
}
