//! The `[control]` table of all roles' files, and where the socket is.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use toml::Spanned;

use crate::config::{ConfigError, Role, Source};
use crate::namespace::namespace_id;

/// The longest path of a Unix socket, in bytes.
const MAX_PATH: usize = 107;
/// How long a drained server must be silent, in seconds, unless configured.
const DEFAULT_QUIET: u64 = 60;

/// The `[control]` table as written.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ControlSettings {
    /// Whether there is a control socket; yes unless it says no.
    enabled: Option<bool>,
    /// Its path; by default [`default_socket`].
    socket: Option<Spanned<PathBuf>>,
    /// Balancer: how long no packet must have gone to a drained server without `agent` for it to count as idle; 60.
    quiet_s: Option<Spanned<u64>>,
}

/// The `[control]` table, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlOptions {
    /// Whether there is a control socket.
    pub enabled: bool,
    /// Its path, if it is not [`default_socket`]'s.
    pub socket: Option<PathBuf>,
    /// How long no packet must have gone to a drained server for it to count as idle.
    pub quiet: Duration,
}

impl Default for ControlOptions {
    fn default() -> Self {
        Self { enabled: true, socket: None, quiet: Duration::from_secs(DEFAULT_QUIET) }
    }
}

impl ControlOptions {
    /// The same with the socket elsewhere, if a path is given.
    #[must_use]
    pub fn at(&self, socket: Option<PathBuf>) -> Self {
        match socket {
            Some(path) => Self { enabled: true, socket: Some(path), ..self.clone() },
            None => self.clone(),
        }
    }

    /// Whether the socket is the same: a running daemon keeps its own.
    pub fn same_socket(&self, other: &Self) -> bool {
        (self.enabled, &self.socket) == (other.enabled, &other.socket)
    }
}

impl ControlSettings {
    /// The settings with the defaults filled in.
    ///
    /// # Errors
    /// A path that no socket can have, or a key that the role has no use for; with the line.
    pub fn resolve(&self, role: Role, source: &Source) -> Result<ControlOptions, ConfigError> {
        let mut options = ControlOptions { enabled: self.enabled.unwrap_or(true), ..Default::default() };
        if let Some(written) = &self.socket {
            check_path(written.get_ref()).map_err(|why| source.error_at(written.span(), why))?;
            options.socket = Some(written.get_ref().clone());
        }
        if let Some(written) = &self.quiet_s {
            if role != Role::Balancer {
                return Err(source.error_at(written.span(), "only a balancer waits for drained servers"));
            }
            if !(1..=86_400).contains(written.get_ref()) {
                return Err(source.error_at(written.span(), "this must be between 1 and 86400"));
            }
            options.quiet = Duration::from_secs(*written.get_ref());
        }
        Ok(options)
    }
}

/// Why a path cannot be a socket's.
pub(super) fn check_path(path: &Path) -> Result<(), String> {
    if !path.is_absolute() {
        return Err(format!("write the socket's whole path, beginning with /, not {}", path.display()));
    }
    if path.as_os_str().len() > MAX_PATH {
        return Err(format!("a socket's path has at most {MAX_PATH} bytes"));
    }
    Ok(())
}

/// Where a role's socket is unless configured: `STATE_DIR/control/ROLE.NAMESPACE.sock`, in a directory that only its
/// owner can look into. For the calling thread's network namespace.
///
/// # Errors
/// The namespace cannot be told.
pub fn default_socket(state_dir: &Path, role: Role) -> io::Result<PathBuf> {
    Ok(state_dir.join("control").join(format!("{role}.{}.sock", namespace_id()?)))
}
