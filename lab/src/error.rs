//! What can go wrong in a lab.

use std::io;
use std::process::ExitStatus;
use std::time::Duration;

/// Why a lab, a host or something inside it could not be made or used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// This machine or user lacks something; the sentence says what, and what to do.
    #[error("{0}")]
    Missing(String),
    /// The kernel refused a netlink request.
    #[error("{host}: {what}: {source}")]
    Netlink {
        /// The host it was asked in.
        host: String,
        /// What was asked.
        what: String,
        /// The kernel's answer.
        source: nlink::Error,
    },
    /// A system call or a file failed.
    #[error("{host}: {what}: {source}")]
    Io {
        /// The host it happened in.
        host: String,
        /// What was tried.
        what: String,
        /// The system's answer.
        source: io::Error,
    },
    /// An address, prefix, name or probability that cannot be.
    #[error("{what} `{given}`: {expected}")]
    Invalid {
        /// What kind of value it is.
        what: &'static str,
        /// The value as given.
        given: String,
        /// What it should look like.
        expected: &'static str,
    },
    /// A command ended unsuccessfully.
    #[error("{host}: `{command}` ended with {status}: {stderr}")]
    Failed {
        /// The host it ran in.
        host: String,
        /// The program and its arguments.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// The end of what it wrote to standard error.
        stderr: String,
    },
    /// Something did not happen in time.
    #[error("{host}: {what}: not within {after:?}")]
    TimedOut {
        /// The host it was awaited in.
        host: String,
        /// What was awaited.
        what: String,
        /// For how long.
        after: Duration,
    },
    /// The lab, and this host with it, has already been taken down.
    #[error("{host}: the lab of this host is gone")]
    Gone {
        /// The host.
        host: String,
    },
}

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn io(host: &str, what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let (host, what) = (host.to_owned(), what.into());
        move |source| Self::Io { host, what, source }
    }

    pub(crate) fn errno(host: &str, what: impl Into<String>) -> impl FnOnce(nix::Error) -> Self {
        let error = Self::io(host, what);
        move |source| error(source.into())
    }

    pub(crate) fn netlink(host: &str, what: impl Into<String>) -> impl FnOnce(nlink::Error) -> Self {
        let (host, what) = (host.to_owned(), what.into());
        move |source| Self::Netlink { host, what, source }
    }
}
