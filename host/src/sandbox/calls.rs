//! The system calls that are left: a list of those allowed, all others fail with `EPERM`.
//!
//! No daemon starts a program, so what is allowed can be listed. Calls whose arguments are looked at cost a few
//! instructions each time; the others, those for packets among them, the kernel remembers as allowed.

use std::collections::BTreeMap;

use nix::libc;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::policy::{Policy, Right};

type Rules = BTreeMap<i64, Vec<SeccompRule>>;
type Result<T> = std::result::Result<T, BackendError>;

/// Memory; without new executable pages, see [`conditions`].
const MEMORY: &[i64] =
    &[libc::SYS_brk, libc::SYS_munmap, libc::SYS_mremap, libc::SYS_madvise, libc::SYS_membarrier];

/// Threads (a capture's, those for files and for new tables) and how they wait for each other.
const THREADS: &[i64] = &[
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // A panic that aborts.
    libc::SYS_tgkill,
    libc::SYS_tkill,
];

/// Signals: SIGHUP, SIGTERM, SIGINT.
const SIGNALS: &[i64] = &[
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
];

/// Time, chance, and how much memory there is (the C library's sorting asks).
const FACTS: &[i64] = &[
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    libc::SYS_sysinfo,
];

/// Packets, captures, logs, the configuration, the state directory.
const FILES: &[i64] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_openat,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_lseek,
    libc::SYS_fcntl,
    libc::SYS_flock,
    libc::SYS_mkdirat,
    libc::SYS_unlinkat,
    libc::SYS_renameat2,
    libc::SYS_getdents64,
];

/// The event loop.
const EVENTS: &[i64] = &[
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_ppoll,
    libc::SYS_eventfd2,
];

/// Netlink, the control socket, tunnels, the proxy's clients, health checks.
const SOCKETS: &[i64] = &[
    libc::SYS_bind,
    libc::SYS_accept4,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_shutdown,
];

/// Older forms of the same, which one C library or another still uses on this kind of processor.
#[cfg(target_arch = "x86_64")]
const OLDER: &[i64] = &[
    libc::SYS_epoll_wait,
    libc::SYS_poll,
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_mkdir,
    libc::SYS_unlink,
    libc::SYS_rename,
];
#[cfg(target_arch = "aarch64")]
const OLDER: &[i64] = &[libc::SYS_renameat];
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const OLDER: &[i64] = &[];

/// Kinds of sockets: the control socket's, health checks' and the proxy's, netlink.
const FAMILIES: [i32; 4] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];

/// Sockets that do not wait; a device's name, MTU.
const REQUESTS: &[libc::Ioctl] = &[libc::FIONBIO, libc::TUNGETIFF, libc::SIOCGIFMTU];
/// Making a device.
const DEVICE_REQUESTS: &[libc::Ioctl] =
    &[libc::TUNSETIFF, libc::TUNSETOFFLOAD, libc::SIOCGIFFLAGS, libc::SIOCSIFFLAGS, libc::SIOCSIFTXQLEN];

/// The filters for a policy, to be applied in order; `None` if this kind of processor's calls are not known.
pub(super) fn filters(policy: &Policy) -> Result<Option<[BpfProgram; 2]>> {
    let Ok(processor) = TargetArch::try_from(std::env::consts::ARCH) else { return Ok(None) };
    let program = |rules: Rules, otherwise, then| -> Result<BpfProgram> {
        SeccompFilter::new(rules, otherwise, then, processor)?.try_into()
    };
    // Its flags lie in memory, where a filter does not see them: "not there" makes the C library use clone instead.
    let clone3: Rules = [(libc::SYS_clone3, Vec::new())].into();
    let absent = SeccompAction::Errno(libc::ENOSYS as u32);
    let refused = SeccompAction::Errno(libc::EPERM as u32);
    Ok(Some([
        program(clone3, SeccompAction::Allow, absent)?,
        program(rules(policy)?, refused, SeccompAction::Allow)?,
    ]))
}

/// What is allowed.
fn rules(policy: &Policy) -> Result<Rules> {
    let mut rules: Rules = [MEMORY, THREADS, SIGNALS, FACTS, FILES, EVENTS, SOCKETS, OLDER]
        .into_iter()
        .flatten()
        .map(|call| (*call, Vec::new()))
        .collect();
    // The first of the two filters answers this one.
    rules.insert(libc::SYS_clone3, Vec::new());
    if policy.has(|right| matches!(right, Right::Connect)) {
        rules.insert(libc::SYS_connect, Vec::new());
    }
    if policy.has(|right| matches!(right, Right::Processors)) {
        rules.insert(libc::SYS_sched_setaffinity, Vec::new());
    }
    if policy.has(|right| matches!(right, Right::Listen(_))) {
        rules.insert(libc::SYS_listen, Vec::new());
    }
    conditions(policy, &mut rules)?;
    Ok(rules)
}

/// Calls that are allowed with some arguments.
fn conditions(policy: &Policy, rules: &mut Rules) -> Result<()> {
    // No code but the program's own.
    let no_code = bits(2, libc::PROT_EXEC as u64, 0)?;
    rules.insert(libc::SYS_mmap, vec![no_code.clone()]);
    rules.insert(libc::SYS_mprotect, vec![no_code]);
    // Threads of this process; no other process, no namespace.
    let thread = libc::CLONE_THREAD | libc::CLONE_VM | libc::CLONE_SIGHAND;
    let spaces = libc::CLONE_NEWNS
        | libc::CLONE_NEWCGROUP
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET;
    let mask = u64::from((thread | spaces).cast_unsigned());
    rules.insert(libc::SYS_clone, vec![bits(0, mask, u64::from(thread.cast_unsigned()))?]);
    let families = FAMILIES.map(|family| equals(0, u64::from(family.cast_unsigned())));
    rules.insert(libc::SYS_socket, families.into_iter().collect::<Result<_>>()?);
    let device = policy.has(|right| matches!(right, Right::Device(_)));
    let more = if device { DEVICE_REQUESTS } else { &[] };
    let requests = REQUESTS.iter().chain(more).map(|request| equals(1, u64::from(*request as u32)));
    rules.insert(libc::SYS_ioctl, requests.collect::<Result<_>>()?);
    // Names of threads; names of memory, which the C library gives.
    let names = [libc::PR_SET_NAME, libc::PR_SET_VMA].map(|name| equals(0, u64::from(name.cast_unsigned())));
    rules.insert(libc::SYS_prctl, names.into_iter().collect::<Result<_>>()?);
    Ok(())
}

/// An argument's lower half is this: all that the kernel looks at of these arguments.
fn equals(argument: u8, value: u64) -> Result<SeccompRule> {
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)?;
    SeccompRule::new(vec![condition])
}

/// An argument's bits under a mask are these.
fn bits(argument: u8, mask: u64, value: u64) -> Result<SeccompRule> {
    let comparison = SeccompCmpOp::MaskedEq(mask);
    SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, comparison, value)?])
}
