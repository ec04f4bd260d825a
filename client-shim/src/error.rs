//! What ends the shim.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

use shunt_host::HostError;
use shunt_host::control::ControlError;
use shunt_host::sandbox::SandboxError;

/// Why the shim could not start, or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host could not be set up, asked or restored.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The control socket cannot be served.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// It could not be contained.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The packet device could not be made, or broke.
    #[error("TUN device {name}: {error}")]
    Device {
        /// Its name.
        name: String,
        /// Why.
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
    /// A VIP is an address of this host.
    #[error("the VIP {0} is an address of this host itself: the client shim belongs on the clients' hosts")]
    OwnVip(IpAddr),
    /// The configured interface is not the one the VIP is reached by.
    #[error(
        "the route to the VIP {vip} leaves by {found}, but the configuration says interface = \"{wanted}\""
    )]
    Interface {
        /// The VIP.
        vip: IpAddr,
        /// The configured interface.
        wanted: String,
        /// The route's interface.
        found: String,
    },
    /// A proxy's listening address cannot be had.
    #[error("cannot listen on {address}: {error}")]
    Listen {
        /// The address.
        address: std::net::SocketAddr,
        /// Why not.
        error: io::Error,
    },
    /// The system refused a signal handler.
    #[error("cannot wait for SIGHUP: {0}")]
    Signal(io::Error),
}
