//! Containment: what a daemon gives up once its devices and sockets are open.
//!
//! [`Policy`] is the one table of what each daemon still needs afterwards, and why; [`enter`] gives up the rest:
//! capabilities, files and TCP ports (Landlock), system calls (seccomp). Nothing can be taken back, and threads that
//! are started later have no more. All of it is about the *calling thread*: enter before there are others.
//!
//! What it is for: whoever gets a daemon to run his code, by a packet or an answer, can still do to packets what the
//! daemon does, and no more: start no program, open no other file, see no other process, load nothing into the kernel.

mod calls;
mod policy;
#[cfg(test)]
mod tests;

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use caps::{CapSet, Capability, CapsHashSet};
use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, LandlockStatus, NetPort, PathBeneath, PathFd, Ruleset,
    RulesetAttr as _, RulesetCreatedAttr as _, RulesetError, Scope,
};
use nix::libc;

pub use policy::{Confined, Grant, Places, Policy, Right};

/// The newest Landlock whose rights are asked for; older kernels have fewer.
const NEWEST: ABI = ABI::V9;

/// Why a daemon could not be contained. What the kernel merely lacks is none: it is logged.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action}: {reason}; without it: --no-sandbox")]
pub struct SandboxError {
    action: String,
    reason: String,
}

fn cannot(action: impl Into<String>) -> impl FnOnce(&dyn fmt::Display) -> SandboxError {
    |reason| SandboxError { action: action.into(), reason: reason.to_string() }
}

/// What the daemons of this process keep open for their sandboxes; empty without one.
///
/// A rule of Landlock is about an inode. Below /proc inodes are made anew when the kernel has forgotten a path, which
/// it does not while the path is open.
static KEPT_OPEN: Mutex<Vec<PathFd>> = Mutex::new(Vec::new());

fn kept_open() -> MutexGuard<'static, Vec<PathFd>> {
    KEPT_OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Enforced {
    /// The capabilities that are left.
    pub capabilities: CapsHashSet,
    /// The version of Landlock that the kernel has, if it has any.
    pub landlock: Option<i32>,
    /// Whether system calls are filtered.
    pub seccomp: bool,
}

/// Gives up what `policy` does not grant, for the calling thread and those it starts from now on. Log lines say what
/// is in force, and what this kernel does not have.
///
/// # Errors
/// The kernel refuses what it has: the daemon must not go on as if it were contained.
pub fn enter(policy: &Policy) -> Result<Enforced, SandboxError> {
    nix::sys::prctl::set_no_new_privs().map_err(|error| cannot("give up new privileges")(&error))?;
    // Before capabilities are dropped: the files may be in a folder that is closed to root without them.
    let (landlock, pinned) = restrict_files(policy)?;
    let capabilities = drop_capabilities(policy)?;
    let seccomp = restrict_calls(policy)?;
    kept_open().extend(pinned);
    for Grant { right, reason } in policy.grants() {
        tracing::debug!("the sandbox leaves {right}: {reason}");
    }
    tracing::info!(capabilities = names(&capabilities), landlock, seccomp, "sandboxed");
    Ok(Enforced { capabilities, landlock, seccomp })
}

/// Behind an error about a file: what it may have to do with the sandbox.
pub fn hint(error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::PermissionDenied && !kept_open().is_empty() {
        " (the sandbox only lets the daemon read the folders that its files were in when it was started: restart it)"
    } else {
        ""
    }
}

fn names(capabilities: &CapsHashSet) -> String {
    let mut names: Vec<String> = capabilities.iter().map(ToString::to_string).collect();
    names.sort();
    names.join(" ")
}

/// Landlock; says its version, and gives what has to stay open.
fn restrict_files(policy: &Policy) -> Result<(Option<i32>, Vec<PathFd>), SandboxError> {
    let failed = |reason: &dyn fmt::Display| cannot("restrict files by Landlock")(reason);
    let open = |(path, access)| PathFd::new(path).map(|open| (open, access)).map_err(|error| failed(&error));
    let open: Vec<_> = policy.grants().iter().filter_map(access).map(open).collect::<Result<_, _>>()?;
    let status = landlock(policy, &open).map_err(|error| failed(&error))?;
    let version = match status {
        LandlockStatus::Available { effective_abi, .. } => Some(effective_abi as i32),
        LandlockStatus::NotEnabled | LandlockStatus::NotImplemented => {
            tracing::warn!(
                "this kernel has no Landlock (or does not enable it: lsm=landlock,...): files and TCP ports stay open to \
                 the daemon as far as its user's rights go"
            );
            None
        }
    };
    Ok((version, open.into_iter().map(|(path, _)| path).collect()))
}

fn landlock(policy: &Policy, files: &[(PathFd, BitFlags<AccessFs>)]) -> Result<LandlockStatus, RulesetError> {
    let mut ruleset =
        Ruleset::default().handle_access(AccessFs::from_all(NEWEST))?.scope(Scope::from_all(NEWEST))?;
    // Who may connect may do so from any own port.
    if !policy.has(|right| matches!(right, Right::Connect)) {
        ruleset = ruleset.handle_access(AccessNet::from_all(NEWEST))?;
    }
    let mut ruleset = ruleset.create()?;
    for (file, access) in files {
        ruleset = ruleset.add_rule(PathBeneath::new(file, *access))?;
    }
    for grant in policy.grants() {
        if let Right::Listen(port) = grant.right {
            ruleset = ruleset.add_rule(NetPort::new(port, AccessNet::BindTcp))?;
        }
    }
    Ok(ruleset.restrict_self()?.landlock)
}

fn access(grant: &Grant) -> Option<(&Path, BitFlags<AccessFs>)> {
    let folder = AccessFs::ReadFile | AccessFs::ReadDir;
    let write = AccessFs::WriteFile | AccessFs::Truncate;
    match &grant.right {
        // The kernel takes no rights about folders for a file.
        Right::Read(path) if path.is_dir() => Some((path, folder)),
        Right::Read(path) => Some((path, AccessFs::ReadFile.into())),
        Right::Write(path) => Some((path, folder | write)),
        Right::Keep(path) => Some((path, folder | write | AccessFs::MakeReg | AccessFs::RemoveFile)),
        Right::Remove(path) => Some((path, AccessFs::RemoveFile.into())),
        Right::Device(path) => Some((path, write | AccessFs::ReadFile | AccessFs::IoctlDev)),
        Right::Capability(_) | Right::Listen(_) | Right::Connect | Right::Processors => None,
    }
}

/// Drops all capabilities but those granted; says which are left.
fn drop_capabilities(policy: &Policy) -> Result<CapsHashSet, SandboxError> {
    let failed = |action: &'static str| move |error: caps::errors::CapsError| cannot(action)(&error);
    let had = caps::read(None, CapSet::Permitted).map_err(failed("read capabilities"))?;
    let granted = |right: &Right| match right {
        Right::Capability(capability) => Some(*capability),
        _ => None,
    };
    let granted: CapsHashSet = policy.grants().iter().filter_map(|grant| granted(&grant.right)).collect();
    let mut kept: CapsHashSet = had.intersection(&granted).copied().collect();
    // Without this one the set cannot be changed; it is about programs that are started, and none is.
    if had.contains(&Capability::CAP_SETPCAP) {
        for capability in caps::runtime::thread_all_supported() {
            caps::drop(None, CapSet::Bounding, capability)
                .map_err(failed("drop the bounding capabilities"))?;
        }
    }
    caps::clear(None, CapSet::Inheritable).map_err(failed("drop inheritable capabilities"))?;
    caps::set(None, CapSet::Effective, &kept).map_err(failed("drop capabilities"))?;
    for (capability, why) in missing(policy, &had) {
        tracing::info!(%capability, why, "kept: files belong to another user than the daemon's");
        kept.insert(capability);
    }
    caps::set(None, CapSet::Effective, &kept).map_err(failed("drop capabilities"))?;
    caps::set(None, CapSet::Permitted, &kept).map_err(failed("drop capabilities"))?;
    Ok(kept)
}

/// What is needed in addition because of who owns the files; asked with all capabilities off that can be off.
fn missing(policy: &Policy, had: &CapsHashSet) -> Vec<(Capability, &'static str)> {
    let refused =
        |result: io::Result<File>| result.is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied);
    // A file without a name: nothing is left of the attempt.
    let made =
        |folder: &Path| OpenOptions::new().write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(folder);
    let unreadable = policy.files().iter().any(|file| refused(File::open(file)));
    let closed = policy.grants().iter().any(|grant| match &grant.right {
        Right::Keep(folder) => refused(made(folder)),
        _ => false,
    });
    let mut missing = Vec::new();
    if unreadable {
        missing.push((Capability::CAP_DAC_READ_SEARCH, "the configuration is read again"));
    }
    if closed {
        missing.push((Capability::CAP_DAC_OVERRIDE, "the state directory is written to"));
    }
    missing.retain(|(capability, _)| had.contains(capability));
    missing
}

/// Seccomp; says whether it is in force.
fn restrict_calls(policy: &Policy) -> Result<bool, SandboxError> {
    let action = "restrict system calls by seccomp";
    let Some(filters) = calls::filters(policy).map_err(|error| cannot(action)(&error))? else {
        tracing::warn!(
            "the system calls of this kind of processor ({}) are not known here: all stay open to the daemon",
            std::env::consts::ARCH
        );
        return Ok(false);
    };
    for filter in filters {
        match seccompiler::apply_filter(&filter) {
            Ok(()) => {}
            Err(seccompiler::Error::Seccomp(error)) if lacks_seccomp(&error) => {
                tracing::warn!(
                    "this kernel has no seccomp ({error}): all system calls stay open to the daemon"
                );
                return Ok(false);
            }
            Err(error) => return Err(cannot(action)(&error)),
        }
    }
    Ok(true)
}

/// `seccomp(2)`: not built in (`EINVAL`, `ENOSYS`).
fn lacks_seccomp(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL))
}
