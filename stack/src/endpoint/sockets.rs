//! smoltcp's sockets, used again: their buffers are large, and clearing new ones costs more than a short connection.

use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp::{CongestionControl, Socket, SocketBuffer};

use super::options::TcpOptions;

/// Sockets kept for reuse, with their buffers.
const SPARE: usize = 64;

/// A socket alone in its set: smoltcp looks at all of a set for each packet.
pub(super) struct OwnSocket {
    set: SocketSet<'static>,
    handle: SocketHandle,
}

impl OwnSocket {
    fn new(options: &TcpOptions) -> OwnSocket {
        let buffer = |size: usize| SocketBuffer::new(vec![0; size.max(1)]);
        let mut set = SocketSet::new(Vec::with_capacity(1));
        let handle = set.add(Socket::new(buffer(options.receive_buffer), buffer(options.send_buffer)));
        OwnSocket { set, handle }
    }

    /// One that is closed, new or used: smoltcp clears it when it is opened.
    pub(super) fn closed(used: Option<OwnSocket>, options: &TcpOptions) -> OwnSocket {
        let mut own = used.unwrap_or_else(|| OwnSocket::new(options));
        let socket = own.socket_mut();
        socket.abort();
        socket.set_nagle_enabled(!options.nodelay);
        socket.set_congestion_control(CongestionControl::Cubic);
        socket.set_keep_alive(options.keep_alive.map(Into::into));
        own
    }

    pub(super) fn socket(&self) -> &Socket<'static> {
        self.set.get(self.handle)
    }

    pub(super) fn socket_mut(&mut self) -> &mut Socket<'static> {
        self.set.get_mut(self.handle)
    }

    pub(super) fn set(&mut self) -> &mut SocketSet<'static> {
        &mut self.set
    }
}

/// Sockets of connections that are over.
#[derive(Default)]
pub(super) struct Sockets(Vec<OwnSocket>);

impl Sockets {
    pub(super) fn take(&mut self) -> Option<OwnSocket> {
        self.0.pop()
    }

    pub(super) fn give(&mut self, socket: OwnSocket) {
        if self.0.len() < SPARE {
            self.0.push(socket);
        }
    }
}
