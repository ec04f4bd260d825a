//! Which network namespace this is, for the names of files in a folder that namespaces share.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

use nix::libc;
use nix::sys::socket::sockopt::GetStruct;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, getsockopt, socket};

#[derive(Clone, Copy)]
struct Cookie;

nix::getsockopt_impl!(Cookie, libc::SOL_SOCKET, libc::SO_NETNS_COOKIE, u64, GetStruct<u64>);

/// A number that no other network namespace has had since the machine was started: its cookie, from Linux 5.14 on.
/// Before, the namespace's inode, which can come back once the namespace is gone.
///
/// For the calling thread's namespace.
///
/// # Errors
/// Sockets cannot be made, or /proc is not mounted.
pub fn namespace_id() -> io::Result<u64> {
    let inside = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    match getsockopt(&inside, Cookie) {
        Ok(cookie) => Ok(cookie),
        Err(nix::Error::ENOPROTOOPT) => Ok(fs::metadata("/proc/thread-self/ns/net")?.ino()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    #[test]
    fn namespaces_that_come_and_go_never_have_the_same_number() {
        let own = namespace_id().unwrap();
        assert_eq!(own, namespace_id().unwrap());
        let fresh = || {
            unshare(CloneFlags::CLONE_NEWNET).expect("this test makes network namespaces: run it as root");
            namespace_id().unwrap()
        };
        let numbers: HashSet<u64> = (0..5).map(|_| std::thread::spawn(fresh).join().unwrap()).collect();
        assert_eq!(numbers.len(), 5, "{numbers:?}");
        assert!(!numbers.contains(&own));
    }
}
