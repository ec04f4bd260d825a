//! Why a connection, a connect or a listener failed.

use std::io;
use std::net::SocketAddr;

use thiserror::Error;

use crate::redirect::{RebindError, RedirectError};

/// Why a connection is no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Error)]
pub enum ConnectionError {
    /// The peer refused it.
    #[error("connection refused")]
    Refused,
    /// The peer reset it.
    #[error("connection reset by peer")]
    Reset,
    /// The peer did not answer in time.
    #[error("the peer did not answer in time")]
    TimedOut,
    /// The network says that there is no way to the peer.
    #[error("host unreachable")]
    Unreachable,
    /// This end gave it up: its endpoint or listener is gone.
    #[error("connection aborted: its endpoint is gone")]
    Aborted,
    /// It is not open for writing: this end has shut it down.
    #[error("the connection was shut down for writing")]
    ShutDown,
}

impl From<ConnectionError> for io::Error {
    fn from(error: ConnectionError) -> io::Error {
        let kind = match error {
            ConnectionError::Refused => io::ErrorKind::ConnectionRefused,
            ConnectionError::Reset => io::ErrorKind::ConnectionReset,
            ConnectionError::TimedOut => io::ErrorKind::TimedOut,
            ConnectionError::Unreachable => io::ErrorKind::HostUnreachable,
            ConnectionError::Aborted => io::ErrorKind::ConnectionAborted,
            ConnectionError::ShutDown => io::ErrorKind::BrokenPipe,
        };
        io::Error::new(kind, error)
    }
}

/// Why a connect could not begin or a listener not be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Error)]
pub enum EndpointError {
    /// The endpoint has no address of the peer's family.
    #[error("no own address of the family of {0}")]
    NoAddress(SocketAddr),
    /// The address or port is not one to connect to or listen on.
    #[error("{0} cannot be an end of a connection")]
    Unusable(SocketAddr),
    /// All own ports towards the peer's address are in use.
    #[error("all own ports towards {0} are in use")]
    NoPort(SocketAddr),
    /// The table of connections is full.
    #[error("{0} connections are open, as many as may be")]
    TooMany(usize),
    /// Somebody listens there already.
    #[error("{0} is listened on already")]
    InUse(SocketAddr),
    /// A client endpoint cannot listen, a server endpoint not connect.
    #[error("an endpoint of the other role is needed for this")]
    Role,
    /// The connection is no more.
    #[error("the connection is over")]
    Over,
    /// A mid-connection redirect could not begin.
    #[error(transparent)]
    Redirect(#[from] RedirectError),
    /// The own port could not be changed.
    #[error(transparent)]
    Rebind(#[from] RebindError),
}

impl From<EndpointError> for io::Error {
    fn from(error: EndpointError) -> io::Error {
        let kind = match error {
            EndpointError::NoAddress(_) | EndpointError::NoPort(_) => io::ErrorKind::AddrNotAvailable,
            EndpointError::Unusable(_) | EndpointError::Redirect(RedirectError::Target(_)) => {
                io::ErrorKind::InvalidInput
            }
            EndpointError::TooMany(_) | EndpointError::Redirect(RedirectError::TooMany(_)) => {
                io::ErrorKind::QuotaExceeded
            }
            EndpointError::InUse(_) | EndpointError::Rebind(RebindError::Port(_)) => io::ErrorKind::AddrInUse,
            EndpointError::Role
            | EndpointError::Redirect(RedirectError::NoServicePort(_))
            | EndpointError::Rebind(RebindError::Translated | RebindError::NotRedirected) => {
                io::ErrorKind::Unsupported
            }
            EndpointError::Over => io::ErrorKind::NotConnected,
            EndpointError::Redirect(RedirectError::UnderWay) | EndpointError::Rebind(RebindError::Busy) => {
                io::ErrorKind::ResourceBusy
            }
        };
        io::Error::new(kind, error)
    }
}
