//! What of the device's packets is the endpoint's: the rest, diverted because rules cannot say it better, goes back.

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use bytes::BytesMut;
use shunt_host::{PortRange, Prefix};
use shunt_stack::device::{Device, not_passed_on};
use shunt_stack::wire::{Offload, Packet, Protocol};
use tokio::sync::mpsc;

use crate::config::{Config, ProxyConfig};
use crate::shim::is_passing;

/// Whom the proxy connects to: VIPs, and where their servers may move streams to.
struct Peers {
    vips: HashSet<IpAddr>,
    accepted: Vec<Prefix>,
}

impl Peers {
    fn contains(&self, address: IpAddr) -> bool {
        self.vips.contains(&address) || self.accepted.iter().any(|prefix| prefix.contains(address))
    }
}

/// A device that gives only packets from the proxy's peers to its ports, and ICMP errors about such connections.
pub(super) struct Filtered<D> {
    device: D,
    peers: Peers,
    ports: PortRange,
    /// Told when the device is gone.
    failure: mpsc::Sender<io::Error>,
}

impl<D: Device> Filtered<D> {
    pub(super) fn new(
        device: D,
        config: &Config,
        proxy: &ProxyConfig,
        failure: mpsc::Sender<io::Error>,
    ) -> Self {
        let peers = Peers { vips: config.vips().collect(), accepted: proxy.accept_prefixes.clone() };
        Self { device, peers, ports: proxy.ports, failure }
    }

    fn is_for_us(&self, packet: &Packet) -> bool {
        is_for(packet, &self.peers, self.ports)
    }
}

fn is_for(packet: &Packet, peers: &Peers, ports: PortRange) -> bool {
    let of_range = |port: u16| (ports.first()..=ports.last()).contains(&port);
    match packet.icmp() {
        Some(icmp) => icmp.quoted().is_some_and(|quoted| {
            quoted.protocol == Protocol::Tcp
                && peers.contains(quoted.destination)
                && of_range(quoted.source_port)
        }),
        None => {
            packet.protocol() == Protocol::Tcp
                && peers.contains(packet.source())
                && packet.ports().is_some_and(|(_, port)| of_range(port))
        }
    }
}

impl<D: Device> Device for Filtered<D> {
    async fn recv(&self, buffer: &mut BytesMut) -> io::Result<Offload> {
        loop {
            let offload = match self.device.recv(buffer).await {
                Ok(offload) => offload,
                Err(error) if is_passing(&error) => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
                Err(error) => {
                    // Full if it was told before.
                    let _ = self.failure.try_send(io::Error::new(error.kind(), error.to_string()));
                    return Err(error);
                }
            };
            let packet = match Packet::parse(std::mem::take(buffer), offload) {
                Ok(packet) => packet,
                Err(rejected) => {
                    self.device.dropped(|| not_passed_on(&rejected.error.to_string()));
                    *buffer = rejected.buffer;
                    continue;
                }
            };
            let ours = self.is_for_us(&packet);
            if !ours
                && let Err(error) = self.device.send_because(&packet, || "not the proxy's".to_owned()).await
            {
                tracing::debug!(%error, "the device did not take a packet back");
            }
            *buffer = packet.into_buffer();
            if ours {
                return Ok(offload);
            }
        }
    }

    async fn send(&self, packet: &Packet) -> io::Result<()> {
        self.device.send(packet).await
    }

    fn takes_super_packets(&self) -> bool {
        self.device.takes_super_packets()
    }

    fn mtu(&self) -> usize {
        self.device.mtu()
    }

    fn name(&self) -> &str {
        self.device.name()
    }
}

#[cfg(test)]
mod tests {
    use shunt_stack::wire::{Segment, TcpFlags};

    use super::*;

    #[test]
    fn only_the_proxys_ports_are_its_own() {
        let accepted = vec!["10.3.0.0/24".parse().unwrap()];
        let peers = Peers { vips: HashSet::from(["203.0.113.10".parse().unwrap()]), accepted };
        let ports = PortRange::new(50_000, 50_009);
        let packet = |source: &str, destination: &str| {
            Segment::bare(source.parse().unwrap(), destination.parse().unwrap(), TcpFlags::ACK).emit()
        };
        assert!(is_for(&packet("203.0.113.10:41001", "10.0.0.2:50003"), &peers, ports));
        assert!(is_for(&packet("10.3.0.12:41001", "10.0.0.2:50003"), &peers, ports));
        assert!(!is_for(&packet("203.0.113.10:41001", "10.0.0.2:50010"), &peers, ports));
        assert!(!is_for(&packet("203.0.113.11:41001", "10.0.0.2:50003"), &peers, ports));
    }
}
