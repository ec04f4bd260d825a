//! What ends the agent.

use std::io;
use std::path::PathBuf;

use shunt_host::HostError;
use shunt_host::control::ControlError;
use shunt_host::sandbox::SandboxError;

/// Why the agent could not start, or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host could not be set up, asked or restored.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The control socket or the status address cannot be served.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// It could not be contained.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The packet device could not be made; the message says which and what to do.
    #[error(transparent)]
    Device(io::Error),
    /// The packet device is gone.
    #[error("reading from the device {name} failed: {error}")]
    Read {
        /// Its name.
        name: String,
        /// Why.
        error: io::Error,
    },
    /// Balancers' tunnels cannot end here.
    #[error("cannot take packets out of tunnels at UDP port {port}: {error}")]
    Tunnels {
        /// The port.
        port: u16,
        /// Why not.
        error: io::Error,
    },
    /// The capture file could not be made.
    #[error("cannot write the capture {path}: {error}")]
    Capture {
        /// The file.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// The system has no random numbers.
    #[error("cannot read /dev/urandom: {0}")]
    Random(io::Error),
    /// The system refused a signal handler.
    #[error("cannot wait for SIGHUP: {0}")]
    Signal(io::Error),
}
