//! Labs for users who are not root: a user namespace of one's own.

use std::fs;
use std::io;

use nix::sched::{CloneFlags, unshare};
use nix::unistd::{getegid, geteuid};

use crate::{Error, Result};

/// How this process came by the privilege to make a lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privilege {
    /// It ran as root already; nothing was changed.
    Root,
    /// It is now root in a user namespace of its own, without power over the machine.
    UserNamespace,
}

/// Gives this process, if it is not root, a user, network and mount namespace in which it may make a [`Lab`].
///
/// Call it first in `main`, before any thread exists. Afterwards the process seems to be uid and gid 0; files it
/// makes still belong to the user. It needs unprivileged user namespaces and a /dev/net/tun the user may open.
///
/// [`Lab`]: crate::Lab
///
/// # Errors
/// [`Error::Missing`]: one sentence that says what is missing and what to do.
pub fn enter() -> Result<Privilege> {
    let (uid, gid) = (geteuid(), getegid());
    if uid.is_root() {
        return Ok(Privilege::Root);
    }
    check_tun()?;
    let flags = CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS;
    unshare(flags).map_err(|error| match error {
        nix::Error::EINVAL => Error::Missing(
            "a user namespace can only be entered before any thread is started: call rootless::enter first in main"
                .to_owned(),
        ),
        error => refused(&error),
    })?;
    fs::write("/proc/self/setgroups", "deny").map_err(|error| refused(&error))?;
    fs::write("/proc/self/uid_map", format!("0 {uid} 1")).map_err(|error| refused(&error))?;
    fs::write("/proc/self/gid_map", format!("0 {gid} 1")).map_err(|error| refused(&error))?;
    Ok(Privilege::UserNamespace)
}

fn refused(error: &dyn std::fmt::Display) -> Error {
    Error::Missing(format!(
        "unprivileged user namespaces are not allowed here ({error}): run as root, or allow them with `sysctl \
         user.max_user_namespaces=10000` and, where they exist, `kernel.unprivileged_userns_clone=1` and \
         `kernel.apparmor_restrict_unprivileged_userns=0`"
    ))
}

/// Checks that TUN devices can be made, as far as opening the control device tells.
pub(crate) fn check_tun() -> Result<()> {
    let Err(error) = fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun") else {
        return Ok(());
    };
    let what_to_do = match error.kind() {
        io::ErrorKind::NotFound => {
            "it does not exist: load the kernel module `tun`, or, in a container, add the device (`--device /dev/net/tun`)"
        }
        io::ErrorKind::PermissionDenied => {
            "not permitted: run as root, or allow it with `chmod 666 /dev/net/tun`"
        }
        _ => "the kernel has no TUN devices: load the kernel module `tun`",
    };
    Err(Error::Missing(format!("/dev/net/tun cannot be opened ({error}); {what_to_do}")))
}
