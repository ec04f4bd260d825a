//! A TUN device whose kind is chosen at run time.

use std::io;

use bytes::BytesMut;

#[cfg(feature = "plain-tun")]
use super::PlainTun;
use super::{Device, TunDevice};
use crate::wire::{Offload, Packet};

/// Which crate makes a TUN device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceKind {
    /// [`TunDevice`].
    #[default]
    Tun,
    /// `PlainTun`; needs the feature `plain-tun`.
    PlainTun,
}

/// A TUN device of either kind.
pub enum AnyDevice {
    /// By tun-rs.
    Tun(TunDevice),
    /// By tun-tap.
    #[cfg(feature = "plain-tun")]
    PlainTun(PlainTun),
}

impl AnyDevice {
    /// Creates an interface of this name, as the kind's own constructor does.
    ///
    /// # Errors
    /// As [`TunDevice::create`]; `Unsupported` where the kind was not compiled in.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn open(kind: DeviceKind, name: &str) -> io::Result<AnyDevice> {
        match kind {
            DeviceKind::Tun => TunDevice::open(name).map(AnyDevice::Tun),
            #[cfg(feature = "plain-tun")]
            DeviceKind::PlainTun => PlainTun::open(name).map(AnyDevice::PlainTun),
            #[cfg(not(feature = "plain-tun"))]
            DeviceKind::PlainTun => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "this build has no plain TUN devices: build it with the feature `plain-tun`, or use the kind `tun`",
            )),
        }
    }
}

impl Device for AnyDevice {
    async fn recv(&self, buffer: &mut BytesMut) -> io::Result<Offload> {
        match self {
            AnyDevice::Tun(device) => device.recv(buffer).await,
            #[cfg(feature = "plain-tun")]
            AnyDevice::PlainTun(device) => device.recv(buffer).await,
        }
    }

    async fn send(&self, packet: &Packet) -> io::Result<()> {
        match self {
            AnyDevice::Tun(device) => device.send(packet).await,
            #[cfg(feature = "plain-tun")]
            AnyDevice::PlainTun(device) => device.send(packet).await,
        }
    }

    fn mtu(&self) -> usize {
        match self {
            AnyDevice::Tun(device) => device.mtu(),
            #[cfg(feature = "plain-tun")]
            AnyDevice::PlainTun(device) => device.mtu(),
        }
    }

    fn name(&self) -> &str {
        match self {
            AnyDevice::Tun(device) => device.name(),
            #[cfg(feature = "plain-tun")]
            AnyDevice::PlainTun(device) => device.name(),
        }
    }

    fn takes_super_packets(&self) -> bool {
        match self {
            AnyDevice::Tun(device) => device.takes_super_packets(),
            #[cfg(feature = "plain-tun")]
            AnyDevice::PlainTun(device) => device.takes_super_packets(),
        }
    }

    fn segmented(&self) -> u64 {
        match self {
            AnyDevice::Tun(device) => device.segmented(),
            #[cfg(feature = "plain-tun")]
            AnyDevice::PlainTun(device) => device.segmented(),
        }
    }
}
