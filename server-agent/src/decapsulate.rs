//! Packets out of a balancer's tunnels (`forward = "gue"`): UDP datagrams in, inner packets out.
//!
//! Linux' own tunnels (fou, gue) do the same inside the kernel; this is for where they are not to be had.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddrV4, SocketAddrV6};
use std::os::fd::AsRawFd;
use std::task::Poll;

use nix::sys::socket::sockopt::{IpRecvTos, Ipv6RecvTClass, Ipv6V6Only, RcvBufForce};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, SockaddrIn, SockaddrIn6,
    SockaddrStorage, bind, recvmsg, setsockopt, socket,
};
use serde::Serialize;
use shunt_host::{Family, Prefix};
use shunt_stack::wire::Packet;
use shunt_stack::wire::gue::{self, GueError};
use tokio::io::Interest;
use tokio::net::UdpSocket;

use crate::config::Decapsulate;

/// Bytes that may wait in the kernel: a bulk transfer comes faster than the loop looks.
const RECEIVE_BUFFER: usize = 4 << 20;
/// The longest UDP payload.
const MAX_DATAGRAM: usize = 65_535;

/// What was done with datagrams, in datagrams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct DecapsulateCounters {
    /// Inner packets taken out.
    pub packets: u64,
    /// Not from a listed balancer: dropped.
    pub strangers: u64,
    /// No tunnel's, or nothing readable inside: dropped.
    pub malformed: u64,
    /// Dropped because the inner packet cannot carry the outer mark of congestion (RFC 6040).
    pub congestion: u64,
    /// To none of this server's addresses: dropped.
    pub foreign: u64,
}

/// The ends of tunnels on this host.
pub(crate) struct Decapsulator {
    sockets: Vec<UdpSocket>,
    from: Vec<Prefix>,
    buffer: Box<[u8]>,
    pub(crate) counters: DecapsulateCounters,
}

impl Decapsulator {
    /// Opens a socket for each family that balancers are listed of, on all addresses of this host.
    ///
    /// # Errors
    /// The port is in use, or the system refuses.
    pub(crate) fn open(config: &Decapsulate) -> io::Result<Self> {
        let listed = |family: &Family| config.from.iter().any(|prefix| prefix.family() == *family);
        let families = Family::BOTH.into_iter().filter(listed);
        Ok(Self {
            sockets: families.map(|family| open(family, config.port)).collect::<io::Result<_>>()?,
            from: config.from.clone(),
            buffer: vec![0; MAX_DATAGRAM].into(),
            counters: DecapsulateCounters::default(),
        })
    }

    /// Waits for an inner packet. Cancel-safe.
    pub(crate) async fn recv(&mut self) -> Packet {
        loop {
            let index = std::future::poll_fn(|cx| {
                let ready = self.sockets.iter().position(|socket| socket.poll_recv_ready(cx).is_ready());
                ready.map_or(Poll::Pending, Poll::Ready)
            });
            let index = index.await;
            if let Some(packet) = self.take(index) {
                return packet;
            }
        }
    }

    fn take(&mut self, index: usize) -> Option<Packet> {
        let socket = self.sockets.get(index)?;
        let (length, source, class) =
            socket.try_io(Interest::READABLE, || receive(socket, &mut self.buffer)).ok()?;
        if !source.is_some_and(|source| self.from.iter().any(|prefix| prefix.contains(source))) {
            self.counters.strangers += 1;
            return None;
        }
        match gue::decapsulate(&self.buffer[..length], class) {
            Ok(packet) => {
                self.counters.packets += 1;
                return Some(packet);
            }
            Err(GueError::Congestion) => self.counters.congestion += 1,
            Err(error) => {
                self.counters.malformed += 1;
                tracing::trace!(%error, ?source, "a datagram that no tunnel sends");
            }
        }
        None
    }
}

/// A datagram's length, source and traffic class.
fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<(usize, Option<IpAddr>, u8)> {
    let mut slices = [IoSliceMut::new(buffer)];
    let mut control = nix::cmsg_space!(i32);
    let message =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut slices, Some(&mut control), MsgFlags::empty())?;
    let mut class = 0;
    for extra in message.cmsgs()? {
        match extra {
            ControlMessageOwned::Ipv4Tos(tos) => class = tos,
            ControlMessageOwned::Ipv6TClass(value) => class = u8::try_from(value).unwrap_or_default(),
            _ => {}
        }
    }
    let source = message.address.and_then(|address| {
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
    });
    Ok((message.bytes, source, class))
}

fn open(family: Family, port: u16) -> io::Result<UdpSocket> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let of = match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    };
    let fd = socket(of, SockType::Datagram, flags, None)?;
    match family {
        Family::V4 => {
            setsockopt(&fd, IpRecvTos, &true)?;
            bind(fd.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port)))?;
        }
        Family::V6 => {
            setsockopt(&fd, Ipv6V6Only, &true)?;
            setsockopt(&fd, Ipv6RecvTClass, &true)?;
            bind(fd.as_raw_fd(), &SockaddrIn6::from(SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0)))?;
        }
    }
    if let Err(error) = setsockopt(&fd, RcvBufForce, &RECEIVE_BUFFER) {
        tracing::warn!(%error, "the receive buffer of tunnels stays as small as the system's default");
    }
    UdpSocket::from_std(std::net::UdpSocket::from(fd))
}
