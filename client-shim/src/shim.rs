//! The transparent shim's packets: which machine input each is, and what becomes of it. Knows no host and no file.

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;

use bytes::BytesMut;
use serde::Serialize;
use shunt_stack::device::{Clock, Device, not_passed_on, recv_now};
use shunt_stack::redirect::{Action, Client, ClientConfig, ClientEvent};
use shunt_stack::time::Instant;
use shunt_stack::wire::{Offload, Packet, Protocol};

use crate::offload::Kernel;

/// Packets for which the kernel is told at once of what settles in them. Connections that settle wait so long for others:
/// longer, and most of their packets have passed; shorter, and there are more transactions.
const BATCH: usize = 8;

/// Which of the machine's inputs a packet out of the device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// From the local TCP to a VIP.
    Local,
    /// From a VIP, or an ICMP error about a packet to one (`I2`).
    Remote,
    /// Neither: passes unchanged (`C12`).
    Neither,
}

/// Sorts a packet.
pub(crate) fn side(packet: &Packet, vips: &HashSet<IpAddr>) -> Side {
    if let Some(icmp) = packet.icmp() {
        let about_vip = icmp
            .quoted()
            .is_some_and(|quoted| quoted.protocol == Protocol::Tcp && vips.contains(&quoted.destination));
        return if about_vip { Side::Remote } else { Side::Neither };
    }
    if packet.protocol() != Protocol::Tcp {
        Side::Neither
    } else if vips.contains(&packet.destination()) {
        Side::Local
    } else if vips.contains(&packet.source()) {
        Side::Remote
    } else {
        Side::Neither
    }
}

/// What the driver counted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct ShimCounters {
    /// Packets read.
    pub(crate) received: u64,
    /// Packets dropped because they are none.
    pub(crate) malformed: u64,
    /// Packets that concern no VIP.
    pub(crate) passed: u64,
    /// Packets that the device did not take.
    pub(crate) unsent: u64,
}

/// The client's machine between a device and itself.
pub(crate) struct Shim {
    client: Client,
    vips: HashSet<IpAddr>,
    clock: Clock,
    pub(crate) counters: ShimCounters,
    kernel: Kernel,
    flows_changed: bool,
}

impl Shim {
    pub(crate) fn new(mut config: ClientConfig, kernel: Kernel) -> Self {
        config.resettle_after = kernel.resettle_after();
        let vips = config.vips.iter().map(|vip| vip.address).collect();
        Self {
            client: Client::new(config),
            vips,
            clock: Clock::start(),
            counters: ShimCounters::default(),
            kernel,
            flows_changed: false,
        }
    }

    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    pub(crate) fn client_mut(&mut self) -> &mut Client {
        &mut self.client
    }

    /// What is left to the kernel.
    pub(crate) fn kernel(&mut self) -> &mut Kernel {
        &mut self.kernel
    }

    /// Lets the kernel know what the machine has come to.
    pub(crate) async fn tell_kernel(&mut self) {
        self.kernel.follow(&mut self.client).await;
        self.kernel.flush().await;
    }

    /// The same where the machine has begun anew.
    pub(crate) async fn take_over_kernel(&mut self) {
        self.kernel.take_over(&mut self.client).await;
    }

    pub(crate) fn vips(&self) -> &HashSet<IpAddr> {
        &self.vips
    }

    /// Whether the redirected flows may have changed since this was asked last.
    pub(crate) fn take_flows_changed(&mut self) -> bool {
        std::mem::take(&mut self.flows_changed)
    }

    /// Notes that flows came or went by other ways than packets.
    pub(crate) fn note_flows_changed(&mut self) {
        self.flows_changed = true;
    }

    /// When [`on_timer`](Self::on_timer) wants to be called next.
    pub(crate) fn deadline(&self) -> Option<tokio::time::Instant> {
        self.client.poll_timeout().map(|at| self.clock.timer(at))
    }

    /// Packets that the device gave: the first, and `more` if they are there already; `buffer` comes back for reuse. The
    /// kernel is told of those that have settled in [`BATCH`] of them together.
    pub(crate) async fn on_packets(
        &mut self,
        device: &impl Device,
        buffer: &mut BytesMut,
        first: Offload,
        more: usize,
    ) {
        self.on_packet(device, buffer, first).await;
        for number in 1..=more {
            if number % BATCH == 0 {
                self.kernel.flush().await;
            }
            // An error is told again.
            let Some(Ok(offload)) = recv_now(device, buffer).await else { break };
            self.on_packet(device, buffer, offload).await;
        }
        self.kernel.flush().await;
    }

    async fn on_packet(&mut self, device: &impl Device, buffer: &mut BytesMut, offload: Offload) {
        self.counters.received += 1;
        let mut packet = match Packet::parse(std::mem::take(buffer), offload) {
            Ok(packet) => packet,
            Err(rejected) => {
                self.counters.malformed += 1;
                tracing::debug!(error = %rejected.error, "dropped what is no packet");
                device.dropped(|| not_passed_on(&rejected.error.to_string()));
                *buffer = rejected.buffer;
                return;
            }
        };
        let now = self.clock.now();
        let action = match side(&packet, &self.vips) {
            Side::Local => self.client.handle_local(now, &mut packet),
            Side::Remote => self.client.handle_remote(now, &mut packet),
            Side::Neither => {
                self.counters.passed += 1;
                Action::Pass
            }
        };
        self.kernel.follow(&mut self.client).await;
        let why = self.tell();
        if action == Action::Pass {
            self.send(device, &packet, why).await;
        } else {
            device.dropped(|| not_passed_on(&in_words(why)));
        }
        *buffer = packet.into_buffer();
        self.drain(device, now, why).await;
    }

    /// Fires what is due.
    pub(crate) async fn on_timer(&mut self, device: &impl Device) {
        self.drain(device, self.clock.now(), None).await;
        self.kernel.flush().await;
    }

    /// Both directions leave by the same device: the host's rules tell them apart by destination.
    async fn drain(&mut self, device: &impl Device, now: Instant, why: Option<ClientEvent>) {
        while let Some(transmit) = self.client.poll_transmit(now) {
            let told = self.tell();
            self.kernel.follow(&mut self.client).await;
            self.send(device, &transmit.packet, told.or(why)).await;
        }
        self.tell();
    }

    /// Logs what has happened; gives the last of it.
    fn tell(&mut self) -> Option<ClientEvent> {
        let mut told = None;
        while let Some(event) = self.client.poll_event() {
            self.flows_changed = true;
            told = Some(event);
            log(event);
        }
        told
    }

    async fn send(&mut self, device: &impl Device, packet: &Packet, why: Option<ClientEvent>) {
        if let Err(error) = device.send_because(packet, || in_words(why)).await {
            self.counters.unsent += 1;
            tracing::debug!(%error, "the device did not take a packet");
        }
    }
}

/// Empty for most packets.
fn in_words(why: Option<ClientEvent>) -> String {
    why.map(|event| event.to_string()).unwrap_or_default()
}

/// Whether a device that gave this error may still give packets.
pub(crate) fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
        // EIO: the device is down, and may come up again.
        || error.raw_os_error() == Some(5)
}

fn log(event: ClientEvent) {
    match event {
        ClientEvent::Redirected { local, vip, service_port, handover } => {
            tracing::debug!(%local, %vip, service_port, handover, "redirected");
        }
        ClientEvent::Confirmed { local, vip } => {
            tracing::debug!(%local, %vip, "confirmed at the port asked");
        }
        ClientEvent::Plain { local, vip, reason } => {
            tracing::info!(%local, %vip, ?reason, "goes on without redirection");
        }
        ClientEvent::HandoverFailed { local, vip, service_port } => {
            tracing::info!(%local, %vip, service_port, "a handover did not complete: connection reset");
        }
        ClientEvent::Hint { local, vip, from, to } | ClientEvent::MoveAsked { local, vip, from, to } => {
            tracing::debug!(%local, %vip, from, %to, "the server would rather have the connection elsewhere");
        }
        ClientEvent::Rebound { local, vip, port } | ClientEvent::RebindFailed { local, vip, port } => {
            tracing::debug!(%local, %vip, port, "another own port");
        }
    }
}

#[cfg(test)]
mod tests {
    use shunt_stack::wire::{Segment, TcpFlags};

    use super::*;

    fn vips() -> HashSet<IpAddr> {
        ["203.0.113.10", "2001:db8::10"].iter().map(|vip| vip.parse().unwrap()).collect()
    }

    fn segment(source: &str, destination: &str) -> Packet {
        Segment::bare(source.parse().unwrap(), destination.parse().unwrap(), TcpFlags::ACK).emit()
    }

    /// An ICMP destination-unreachable from a router to the quoted source.
    fn unreachable(quoted: &Packet) -> Packet {
        let mut bytes = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 1, 0, 0, 192, 0, 2, 1, 10, 0, 0, 2];
        bytes.extend([3, 1, 0, 0, 0, 0, 0, 0]);
        bytes.extend(&quoted.bytes()[..28]);
        let length = u16::try_from(bytes.len()).unwrap();
        bytes[2..4].copy_from_slice(&length.to_be_bytes());
        Packet::from_slice(&bytes).unwrap()
    }

    #[test]
    fn packets_are_sorted_by_where_the_vip_stands() {
        let out = segment("10.0.0.2:50000", "203.0.113.10:443");
        assert_eq!(side(&out, &vips()), Side::Local);
        assert_eq!(side(&segment("203.0.113.10:41001", "10.0.0.2:50000"), &vips()), Side::Remote);
        assert_eq!(side(&segment("[2001:db8::2]:1", "[2001:db8::10]:443"), &vips()), Side::Local);
        assert_eq!(side(&segment("10.0.0.2:1", "10.0.0.3:2"), &vips()), Side::Neither);
        assert_eq!(side(&unreachable(&out), &vips()), Side::Remote);
        assert_eq!(side(&unreachable(&segment("10.0.0.2:1", "10.0.0.3:2")), &vips()), Side::Neither);
    }
}
