//! A client and a server endpoint on the two ends of a link, and what can be done to the link.
#![allow(dead_code, reason = "each test file uses its part")]

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::BytesMut;
use shunt_stack::device::{Device, MemoryDevice};
use shunt_stack::endpoint::{ClientOptions, Endpoint, ServerOptions, TcpListener, TcpStream};
use shunt_stack::redirect::{ClientConfig, Continuation, OnRedirect, ServerConfig, ServicePorts, VipConfig};
use shunt_stack::wire::{Offload, Packet, RedirectOption};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

pub const MTU: usize = 1500;
pub const X: u16 = 443;
pub const Y: u16 = 41001;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub fn vip(self) -> IpAddr {
        match self {
            Family::V4 => "203.0.113.10".parse().unwrap(),
            Family::V6 => "2001:db8::10".parse().unwrap(),
        }
    }

    pub fn own(self) -> IpAddr {
        match self {
            Family::V4 => "192.0.2.1".parse().unwrap(),
            Family::V6 => "2001:db8:1::1".parse().unwrap(),
        }
    }

    /// VIP:`port`.
    pub fn at(self, port: u16) -> SocketAddr {
        SocketAddr::new(self.vip(), port)
    }
}

pub fn client_options(family: Family, continuation: Continuation) -> ClientOptions {
    let vips = vec![VipConfig { address: family.vip(), continuation, on_redirect: OnRedirect::default() }];
    ClientOptions {
        redirect: ClientConfig { vips, ..Default::default() },
        addresses: vec![family.own()],
        ..Default::default()
    }
}

pub fn server_options(family: Family) -> ServerOptions {
    let services = vec![ServicePorts { address: family.vip(), redirect_port: X, service_port: Y }];
    ServerOptions { redirect: ServerConfig { services, ..Default::default() }, ..Default::default() }
}

/// Client and server on a clean link.
pub fn endpoints(client: ClientOptions, server: ServerOptions) -> (Endpoint, Endpoint) {
    let (left, right) = MemoryDevice::pair(MTU, 65_536);
    (Endpoint::client(left, client).unwrap(), Endpoint::server(right, server).unwrap())
}

/// Sends back what comes, connection by connection.
pub fn echo(listener: TcpListener) {
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut reader, mut writer) = tokio::io::split(stream);
                let _ = tokio::io::copy(&mut reader, &mut writer).await;
                let _ = writer.shutdown().await;
            });
        }
    });
}

/// Sends `data`, closes, and reads what comes back, both at the same time.
pub async fn exchange(stream: TcpStream, data: &[u8]) -> io::Result<Vec<u8>> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let mut back = Vec::new();
    let send = async {
        writer.write_all(data).await?;
        writer.shutdown().await
    };
    let (sent, received) = tokio::join!(send, reader.read_to_end(&mut back));
    sent?;
    received?;
    Ok(back)
}

/// Bytes that show when any is lost, repeated or moved.
pub fn pattern(length: usize) -> Vec<u8> {
    (0..length as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

/// `future`, but no longer than a minute.
pub async fn within_a_minute<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), future).await.expect("within a minute")
}

/// A device over which packets get lost, come twice and overtake each other.
pub struct Impaired<D> {
    device: Arc<D>,
    /// Of 1,000 packets sent, each.
    loss: u64,
    twice: u64,
    late: u64,
    random: Mutex<u64>,
}

impl<D> Impaired<D> {
    /// Loses `loss` of 1,000 packets, sends `twice` of them twice and `late` of them up to 10 ms later.
    pub fn new(device: D, [loss, twice, late]: [u64; 3], seed: u64) -> Self {
        Impaired { device: Arc::new(device), loss, twice, late, random: Mutex::new(seed) }
    }

    fn chance(&self, per_mille: u64) -> bool {
        let mut random = self.random.lock().unwrap();
        *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*random >> 33) % 1000 < per_mille
    }
}

impl<D: Device + 'static> Device for Impaired<D> {
    fn recv(&self, buffer: &mut BytesMut) -> impl Future<Output = io::Result<Offload>> + Send {
        self.device.recv(buffer)
    }

    async fn send(&self, packet: &Packet) -> io::Result<()> {
        assert!(packet.len() <= self.device.mtu(), "W3: {} bytes", packet.len());
        if self.chance(self.loss) {
            return Ok(());
        }
        if self.chance(self.twice) {
            self.device.send(packet).await?;
        }
        if self.chance(self.late) {
            let (device, packet) = (Arc::clone(&self.device), packet.clone());
            let wait = Duration::from_millis(1 + u64::from(self.chance(500)) * 9);
            tokio::spawn(async move {
                tokio::time::sleep(wait).await;
                let _ = device.send(&packet).await;
            });
            return Ok(());
        }
        self.device.send(packet).await
    }

    fn mtu(&self) -> usize {
        self.device.mtu()
    }

    fn name(&self) -> &str {
        self.device.name()
    }
}

/// A device that sends only what a function lets it, and at most `MTU` bytes of that.
pub struct Filtered<D, F> {
    device: D,
    lets: F,
}

impl<D, F: Fn(&Packet) -> bool + Send + Sync> Filtered<D, F> {
    pub fn new(device: D, lets: F) -> Self {
        Filtered { device, lets }
    }
}

impl<D: Device, F: Fn(&Packet) -> bool + Send + Sync> Device for Filtered<D, F> {
    fn recv(&self, buffer: &mut BytesMut) -> impl Future<Output = io::Result<Offload>> + Send {
        self.device.recv(buffer)
    }

    async fn send(&self, packet: &Packet) -> io::Result<()> {
        assert!(packet.len() <= self.device.mtu(), "W3: {} bytes", packet.len());
        if (self.lets)(packet) { self.device.send(packet).await } else { Ok(()) }
    }

    fn mtu(&self) -> usize {
        self.device.mtu()
    }

    fn name(&self) -> &str {
        self.device.name()
    }
}

/// The redirect option of a packet.
pub fn option_of(packet: &Packet) -> Option<RedirectOption> {
    packet.tcp()?.redirect(shunt_stack::wire::DEFAULT_EXID).ok()?
}

/// A device that loses packets, and lets a test see those it sends.
pub struct Lossy<D> {
    device: D,
    /// Of 1,000 packets sent.
    per_mille: u64,
    random: Mutex<u64>,
    pub lost: AtomicU64,
}

impl<D> Lossy<D> {
    pub fn new(device: D, per_mille: u64, seed: u64) -> Self {
        Lossy { device, per_mille, random: Mutex::new(seed), lost: AtomicU64::new(0) }
    }
}

impl<D: Device> Device for Lossy<D> {
    fn recv(&self, buffer: &mut BytesMut) -> impl Future<Output = io::Result<Offload>> + Send {
        self.device.recv(buffer)
    }

    async fn send(&self, packet: &Packet) -> io::Result<()> {
        let number = {
            let mut random = self.random.lock().unwrap();
            *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *random >> 33
        };
        if number % 1000 < self.per_mille {
            self.lost.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        self.device.send(packet).await
    }

    fn mtu(&self) -> usize {
        self.device.mtu()
    }

    fn name(&self) -> &str {
        self.device.name()
    }
}
