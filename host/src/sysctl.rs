//! Sysctls of the calling thread's network namespace, through `/proc/sys`.

use std::io;
use std::path::{Path, PathBuf};

use crate::error::HostError;
use crate::prefix::PortRange;

/// The key of the ports that are not handed out as ephemeral ones; it is the same for both families.
pub(crate) const RESERVED_PORTS: &str = "net/ipv4/ip_local_reserved_ports";

fn path(key: &str) -> Result<PathBuf, HostError> {
    let good = |part: &str| !part.is_empty() && part != "." && part != "..";
    if !key.starts_with("net/") || !key.split('/').all(good) {
        return Err(HostError::Invalid(format!("{key:?} is no sysctl: write it like net/ipv4/ip_forward")));
    }
    Ok(Path::new("/proc/sys").join(key))
}

/// A value as the kernel and people write it, with white space made equal.
pub(crate) fn normal(value: &str) -> String {
    value.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The value of `key`, `None` if this kernel has no such key.
pub(crate) fn read(key: &str) -> Result<Option<String>, HostError> {
    let path = path(key)?;
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(Some(normal(&text))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(HostError::file("read", path, error)),
    }
}

/// Sets `key`.
pub(crate) fn write(key: &str, value: &str) -> Result<(), HostError> {
    let path = path(key)?;
    std::fs::write(&path, format!("{value}\n")).map_err(|error| HostError::file("write", path, error))
}

/// The reserved ports.
pub(crate) fn reserved_ports() -> Result<Vec<PortRange>, HostError> {
    Ok(parse_ports(&read(RESERVED_PORTS)?.unwrap_or_default()))
}

/// Sets the reserved ports.
pub(crate) fn set_reserved_ports(ranges: &[PortRange]) -> Result<(), HostError> {
    let list: Vec<String> = ranges.iter().map(ToString::to_string).collect();
    write(RESERVED_PORTS, &list.join(","))
}

fn parse_ports(text: &str) -> Vec<PortRange> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(PortRange::new(first.trim().parse().ok()?, last.trim().parse().ok()?))
    };
    PortRange::merged(text.split(',').filter_map(range))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_ports_are_read_as_the_kernel_prints_them() {
        assert_eq!(parse_ports(""), []);
        assert_eq!(parse_ports("8080,41000-41003,9"), [9.into(), 8080.into(), PortRange::new(41000, 41003)]);
    }

    #[test]
    fn keys_stay_below_net() {
        for key in ["kernel/hostname", "net/../kernel/hostname", "net//x", "/etc/passwd", ""] {
            assert!(read(key).is_err(), "{key}");
        }
        assert_eq!(read("net/ipv4/no_such_key").unwrap(), None);
    }
}
