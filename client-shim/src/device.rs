//! The TUN device, recorded if asked for.

use std::path::Path;

use shunt_host::HostOptions;
use shunt_stack::device::{Capture, TunDevice, TunOptions};

use crate::error::Error;

/// Creates the device, down; the host's set-up takes it up.
///
/// # Errors
/// As [`TunDevice::create`].
pub(crate) fn open(host: &HostOptions, mtu: u32) -> Result<TunDevice, Error> {
    let mut options = TunOptions::new(&host.device);
    options.super_packets = host.super_packets;
    options.mtu = u16::try_from(mtu).ok();
    options.up = false;
    TunDevice::create(options).map_err(|error| Error::Device { name: host.device.clone(), error })
}

/// Creates the capture file.
///
/// # Errors
/// It cannot be written.
pub(crate) fn capture(path: &Path) -> Result<Capture, Error> {
    Capture::create(path).map_err(|error| Error::Capture { path: path.to_owned(), error })
}
