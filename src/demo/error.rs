//! Why the demo could not be shown.

use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

/// Why the demo ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The network could not be made; the sentence says what to do where something is missing.
    #[error(transparent)]
    Lab(#[from] shunt_lab::Error),
    /// A part ended, or did not do what it should in time.
    #[error("{part} {what}; the end of its log {log}:\n{tail}", log = log.display())]
    Part {
        /// Its name.
        part: String,
        /// What happened.
        what: PartFault,
        /// Its log.
        log: PathBuf,
        /// The log's last lines.
        tail: String,
    },
    /// A file could not be written or read.
    #[error("{what} {path}: {source}", path = path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A capture could not be read.
    #[error("reading the capture {path}: {source}", path = path.display())]
    Capture {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: pcap_file::pcapng::PcapNgReadError,
    },
    /// The handshake that was to be shown did not happen.
    #[error("{0}")]
    NotShown(String),
    /// What a client said is not understood.
    #[error("{part} says `{line}`: {source}")]
    Message {
        /// The client's name.
        part: String,
        /// Its line.
        line: String,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The user, or the system, wants it to end.
    #[error("interrupted; everything is cleaned up")]
    Interrupted,
}

/// What happened to a part.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PartFault {
    /// It ended.
    #[error("ended with {0}")]
    Ended(ExitStatus),
    /// It did not write something in time.
    #[error("has not written {text:?} within {after:?}")]
    Silent {
        /// What was awaited.
        text: &'static str,
        /// For how long.
        after: Duration,
    },
    /// It ended without a report.
    #[error("ended without a report")]
    NoReport,
    /// Its connections do not end.
    #[error("still has {connections} connections after {after:?}")]
    Busy {
        /// How many.
        connections: usize,
        /// After how long.
        after: Duration,
    },
}

impl Error {
    /// A file's error.
    pub(crate) fn file(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { what, path, source }
    }
}

/// `std::result::Result` with the demo's error.
pub(crate) type Result<T> = std::result::Result<T, Error>;
