//! A userspace TCP (smoltcp) under [`redirect::Client`](crate::redirect::Client) or
//! [`redirect::Server`](crate::redirect::Server), as tokio streams.
//!
//! [`Connections`] is the sans-IO core: all connections of one end, each with a smoltcp interface and socket of its
//! own, found by address and port in a map. [`Endpoint`] runs it over a [`Device`] in one task. Nothing here grows
//! without bound: connections, half-open ones, backlogs, buffers and packets under way all have limits.
//!
//! Data goes out in super-packets where the device takes them: a connection makes them as soon as the peer has acknowledged
//! data, of segments that the peer and the path take, and not while room for an option is kept free (W3). What arrives
//! together is acknowledged together. Work follows packets, calls and timers, never the number of open connections
//! ([`EndpointCounters::polls`]); only what ends is swept together once a second (C12).
//!
//! A client's stream may go through several connections, one after the other: when its server asks for another
//! (PROTOCOL.md §4) and the VIP's redirects are followed, the stream is cut where [`MoveAt`] allows it.
//!
//! It does not do what smoltcp does not: SACK-based recovery, PAWS, SYN cookies, fragments. Moving a connection
//! without a SYN (PROTOCOL.md, M) is not there.

mod arrival;
mod calls;
mod connection;
mod connections;
mod control;
mod driver;
mod error;
mod listener;
mod listeners;
mod machine;
mod moves;
mod options;
mod phy;
mod ports;
mod shared;
mod sockets;
mod stream;
#[cfg(test)]
mod tests;
mod windows;

use std::collections::hash_map::Entry;
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tokio::sync::Notify;

pub use self::connection::ConnectionId;
pub use self::connections::Connections;
pub use self::control::{CloseBy, MoveAt, MoveError, MoveEvent, StreamControl};
pub use self::error::{ConnectionError, EndpointError};
pub use self::listener::TcpListener;
pub use self::options::{ClientOptions, EndpointCounters, ServerOptions, TcpOptions};
pub use self::stream::TcpStream;

use self::shared::{Closing, Shared};
use crate::device::Device;
use crate::redirect::{ClientCounters, PathId, PathState, ServerCounters};

/// The least MTU of a device under an endpoint: that of IPv4 hosts (RFC 1122 §3.3.3). IPv6 wants 1280.
const LEAST_MTU: usize = 576;

/// One end, client or server, over one device. Clones are the same endpoint.
///
/// When the last clone is dropped, connections are reset and the task ends; [`close`](Self::close) delivers first what
/// was written.
#[derive(Clone)]
pub struct Endpoint {
    handle: Arc<Handle>,
}

struct Handle {
    shared: Arc<Shared>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.close(Closing::Now);
    }
}

impl Endpoint {
    /// An endpoint that connects; its task runs in the present tokio runtime.
    ///
    /// # Errors
    /// The options cannot be (no port, no buffer), the device's MTU is too small, or there is no source of random
    /// numbers.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn client(device: impl Device + 'static, options: ClientOptions) -> io::Result<Endpoint> {
        if options.ports.is_empty() || *options.ports.start() == 0 {
            return Err(invalid("the range of own ports is empty or holds port 0"));
        }
        check(&device, &options.tcp)?;
        let connections = Connections::client(options, device.mtu(), random_key()?);
        Ok(Endpoint::spawn(device, connections))
    }

    /// An endpoint that listens; its task runs in the present tokio runtime.
    ///
    /// # Errors
    /// As [`client`](Self::client).
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn server(device: impl Device + 'static, options: ServerOptions) -> io::Result<Endpoint> {
        check(&device, &options.tcp)?;
        let connections = Connections::server(options, device.mtu(), random_key()?);
        Ok(Endpoint::spawn(device, connections))
    }

    fn spawn(device: impl Device + 'static, mut connections: Connections) -> Endpoint {
        connections.set_super_packets(device.takes_super_packets());
        let shared = Arc::new(Shared::new(connections));
        tokio::spawn(driver::run(device, Arc::clone(&shared)));
        Endpoint { handle: Arc::new(Handle { shared }) }
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.handle.shared
    }

    /// Connects to a VIP and redirect port, or plainly to any other address.
    ///
    /// # Errors
    /// `ConnectionRefused`, `TimedOut`, `HostUnreachable`, or the kinds of [`EndpointError`]; `NotConnected` if the
    /// endpoint is over.
    pub async fn connect(&self, peer: SocketAddr) -> io::Result<TcpStream> {
        let shared = self.shared();
        let stream = {
            let now = shared.now();
            let mut state = shared.lock();
            state.check_open()?;
            let id = state.connections.connect(now, peer)?;
            let ends = state.connections.ends(id).ok_or(EndpointError::Unusable(peer))?;
            TcpStream::new(Arc::clone(shared), id, ends)
        };
        shared.work.notify_one();
        stream.connected().await?;
        Ok(stream)
    }

    /// Listens on an address and port: a service port, so that clients are redirected to it, or any other for plain
    /// connections. The unspecified address means all of its family.
    ///
    /// # Errors
    /// The kinds of [`EndpointError`]; `NotConnected` if the endpoint is over.
    pub fn listen(&self, socket: SocketAddr) -> io::Result<TcpListener> {
        let mut state = self.shared().lock();
        state.check_open()?;
        state.connections.listen(socket)?;
        let arrived = Arc::new(Notify::new());
        match state.accepts.entry(socket) {
            Entry::Vacant(entry) => entry.insert(Arc::clone(&arrived)),
            Entry::Occupied(_) => return Err(EndpointError::InUse(socket).into()),
        };
        drop(state);
        Ok(TcpListener::new(Arc::clone(self.shared()), socket, arrived))
    }

    /// Ends the endpoint once what was written to dropped or shut down connections has been delivered; connections
    /// that are still held are reset then.
    pub async fn close(self) {
        self.shared().close(Closing::Settled);
        loop {
            let over = self.shared().over.notified();
            if self.shared().lock().ended.is_some() {
                return;
            }
            over.await;
        }
    }

    /// Says by which way a client reaches a VIP now: what is learnt of paths is kept apart by it. Nothing at a server.
    pub fn set_path(&self, vip: IpAddr, path: PathId) {
        self.shared().lock().connections.set_path(vip, path);
    }

    /// What a client knows of the present way to a VIP; nothing at a server.
    pub fn path(&self, vip: IpAddr) -> PathState {
        let state = self.shared().lock();
        state.connections.redirect_client().map_or(PathState::Unknown, |client| client.path(vip))
    }

    /// What the endpoint has counted.
    pub fn counters(&self) -> EndpointCounters {
        self.shared().lock().connections.counters()
    }

    /// What the redirect machine of a client has counted; `None` for a server.
    pub fn client_counters(&self) -> Option<ClientCounters> {
        self.shared().lock().connections.redirect_client().map(|client| client.counters().clone())
    }

    /// What the redirect machine of a server has counted; `None` for a client.
    pub fn server_counters(&self) -> Option<ServerCounters> {
        self.shared().lock().connections.redirect_server().map(|server| *server.counters())
    }

    /// Connections of which packets may still come, those in TIME-WAIT included.
    pub fn connection_count(&self) -> usize {
        self.shared().lock().connections.len()
    }
}

fn invalid(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

fn check(device: &impl Device, tcp: &TcpOptions) -> io::Result<()> {
    if tcp.receive_buffer == 0 || tcp.send_buffer == 0 || tcp.max_connections == 0 {
        return Err(invalid("buffers and the number of connections cannot be 0"));
    }
    // The window scale of RFC 7323 reaches no further.
    if tcp.receive_buffer > 1 << 30 {
        return Err(invalid("a receive buffer is at most 1 GiB"));
    }
    if device.mtu() < LEAST_MTU {
        return Err(invalid("the device's MTU is below 576 bytes"));
    }
    Ok(())
}

/// The secret behind sequence numbers and ports.
fn random_key() -> io::Result<[u8; 16]> {
    let mut key = [0; 16];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut key)?;
    Ok(key)
}
