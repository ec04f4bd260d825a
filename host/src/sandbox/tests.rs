//! The table, and what the kernel makes of it. Each sandbox is entered by a thread of its own, which it ends with.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::process::Command;

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

use super::*;

struct Folders {
    _all: tempfile::TempDir,
    /// Of a daemon's.
    places: Places,
    /// Of nobody's.
    outside: std::path::PathBuf,
}

fn folders() -> Folders {
    let all = tempfile::tempdir().unwrap();
    let folder = |name: &str| {
        let path = all.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    };
    let (files, state_dir, outside) = (folder("etc"), folder("state"), folder("outside"));
    let config = files.join("role.toml");
    fs::write(&config, "role = \"server\"\n").unwrap();
    let places = Places { config, keys: None, state_dir, socket: None };
    Folders { _all: all, places, outside }
}

/// What `f` gives inside of the sandbox.
fn inside<T: Send>(policy: &Policy, f: impl FnOnce(&Enforced) -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| f(&enter(policy).unwrap()));
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// `/proc/self/status` of the calling thread; what Landlock hides from it was opened before.
fn status_of(file: &mut File) -> BTreeMap<String, String> {
    use std::io::{Read as _, Seek as _};
    let mut text = String::new();
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    let fields = text.lines().filter_map(|line| line.split_once(':'));
    fields.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()
}

fn landlock_is_there() -> bool {
    use landlock::Compatible as _;
    let strict = Ruleset::default().set_compatibility(landlock::CompatLevel::HardRequirement);
    strict.handle_access(AccessFs::Execute).is_ok()
}

fn refused<T: std::fmt::Debug>(result: io::Result<T>) -> bool {
    result.is_err_and(|error| error.kind() == ErrorKind::PermissionDenied)
}

#[test]
fn the_table_gives_each_daemon_what_it_needs() {
    let Folders { _all, mut places, outside } = folders();
    places.socket = Some(outside.join("x.sock"));
    let rights = |daemon: &Confined| {
        let policy = Policy::of(daemon, &places);
        policy.grants().iter().map(|grant| grant.right.to_string()).collect::<Vec<_>>()
    };
    let (etc, state) = (places.config.parent().unwrap().display(), places.state_dir.display());
    let all = vec![
        "CAP_NET_ADMIN".to_owned(),
        "writing below /proc/sys/net".to_owned(),
        format!("reading {etc}"),
        format!("keeping files in {state}"),
        format!("removing files in {}", outside.display()),
    ];
    let with = |more: &[&str]| [all.clone(), more.iter().map(ToString::to_string).collect()].concat();
    assert_eq!(rights(&Confined::Server), all);
    assert_eq!(rights(&Confined::Client), all);
    assert_eq!(rights(&Confined::Balancer { devices: false, pins: false }), with(&["connecting by TCP"]));
    let devices = with(&["connecting by TCP", "opening /dev/net/tun"]);
    assert_eq!(rights(&Confined::Balancer { devices: true, pins: false }), devices);
    let pinned = with(&["connecting by TCP", "choosing processors"]);
    assert_eq!(rights(&Confined::Balancer { devices: false, pins: true }), pinned);
    let proxy = |listens: &[u16]| rights(&Confined::Proxy { listens: listens.to_vec() });
    assert_eq!(proxy(&[1080]), with(&["reading /dev/urandom", "listening on TCP port 1080"]));
    let low = ["reading /dev/urandom", "listening on TCP port 80", "CAP_NET_BIND_SERVICE"];
    assert_eq!(proxy(&[80]), with(&low));
}

#[test]
fn a_link_to_a_configuration_elsewhere_is_followed() {
    let Folders { _all, mut places, outside } = folders();
    let target = outside.join("real.toml");
    fs::rename(&places.config, &target).unwrap();
    std::os::unix::fs::symlink(&target, &places.config).unwrap();
    places.keys = Some(places.config.clone());
    let policy = Policy::of(&Confined::Server, &places);
    let read = |right: &Right| matches!(right, Right::Read(_));
    assert_eq!(policy.grants().iter().filter(|grant| read(&grant.right)).count(), 2);
    assert!(policy.has(|right| *right == Right::Read(outside.clone())));
}

#[test]
fn files_outside_of_the_daemons_places_cannot_be_opened_made_or_removed() {
    let Folders { _all, places, outside } = folders();
    let (foreign, state) = (outside.join("foreign"), places.state_dir.join("journal"));
    fs::write(&foreign, "text").unwrap();
    let landlock = landlock_is_there();
    inside(&Policy::of(&Confined::Server, &places), |enforced| {
        assert_eq!(enforced.landlock.is_some(), landlock, "{enforced:?}");
        fs::write(state.with_extension("new"), "{}").unwrap();
        fs::rename(state.with_extension("new"), &state).unwrap();
        assert_eq!(fs::read_to_string(&state).unwrap(), "{}");
        fs::remove_file(&state).unwrap();
        fs::read_to_string(&places.config).unwrap();
        fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap();
        if enforced.landlock.is_some() {
            assert!(refused(fs::read(&foreign)));
            assert!(refused(fs::write(outside.join("new"), "")));
            assert!(refused(fs::remove_file(&foreign)));
            assert!(refused(fs::write(&places.config, "")), "the configuration is only read");
            assert!(refused(fs::read("/etc/passwd")));
            let error = fs::read(&foreign).unwrap_err();
            assert!(hint(&error).contains("restart it"), "the message says what to do");
        }
    });
    assert_eq!(fs::read_to_string(&foreign).unwrap(), "text");
}

#[test]
fn capabilities_go_and_none_comes_back() {
    let Folders { _all, places, outside: _ } = folders();
    let policy = Policy::of(&Confined::Client, &places);
    std::thread::spawn(move || {
        let mut status = File::open("/proc/thread-self/status").unwrap();
        let before = status_of(&mut status);
        assert_ne!(before["CapPrm"], "0000000000001000", "this test begins with more: run it as root");
        let enforced = enter(&policy).unwrap();
        assert_eq!(enforced.capabilities, [Capability::CAP_NET_ADMIN].into());
        let after = status_of(&mut status);
        for (set, left) in
            [("CapInh", 0), ("CapPrm", 0x1000), ("CapEff", 0x1000), ("CapBnd", 0), ("CapAmb", 0)]
        {
            assert_eq!(u64::from_str_radix(&after[set], 16).unwrap(), left, "{set}");
        }
        assert_eq!((after["NoNewPrivs"].as_str(), after["Seccomp"].as_str()), ("1", "2"));
        assert!(caps::raise(None, CapSet::Effective, Capability::CAP_SYS_ADMIN).is_err());
    })
    .join()
    .unwrap();
}

#[test]
fn files_of_another_user_keep_the_capabilities_that_open_them() {
    let Folders { _all, places, outside: _ } = folders();
    let stranger = 12_345;
    let policy = Policy::of(&Confined::Server, &places);
    for (path, mode, capability) in [
        (&places.config, 0o600, Capability::CAP_DAC_READ_SEARCH),
        (&places.state_dir, 0o700, Capability::CAP_DAC_OVERRIDE),
    ] {
        chown(path, Some(stranger), Some(stranger)).expect("this test is for root");
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        inside(&policy, |enforced| {
            assert_eq!(enforced.capabilities, [Capability::CAP_NET_ADMIN, capability].into(), "{path:?}");
            fs::read(&places.config).unwrap();
            fs::write(places.state_dir.join("journal"), "{}").unwrap();
        });
        chown(path, Some(0), Some(0)).unwrap();
    }
}

#[test]
fn no_program_process_or_namespace_can_be_begun() {
    let Folders { _all, places, outside: _ } = folders();
    inside(&Policy::of(&Confined::Server, &places), |enforced| {
        assert!(enforced.seccomp);
        assert!(Command::new("true").status().is_err_and(|error| error.raw_os_error() == Some(libc::EPERM)));
        assert_eq!(unshare(CloneFlags::CLONE_NEWUSER), Err(Errno::EPERM));
        assert_eq!(nix::unistd::chroot("/"), Err(Errno::EPERM));
        assert_eq!(nix::sys::signal::kill(nix::unistd::Pid::this(), None), Err(Errno::EPERM));
        assert_eq!(nix::unistd::pipe().map(drop), Err(Errno::EPERM), "not on the list");
        let raw = socket(AddressFamily::Packet, SockType::Datagram, SockFlag::empty(), None);
        assert_eq!(raw.map(drop), Err(Errno::EPERM));
        // Threads can, and have no more.
        let threads = std::thread::spawn(|| unshare(CloneFlags::CLONE_NEWUSER)).join().unwrap();
        assert_eq!(threads, Err(Errno::EPERM));
        UdpSocket::bind("127.0.0.1:0").unwrap();
    });
}

#[test]
fn tcp_is_for_those_who_need_it() {
    let Folders { _all, places, outside: _ } = folders();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    // Somebody has had it, and gives it back.
    let own = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (connects, listens) = (|| TcpStream::connect(to).is_ok(), || TcpListener::bind(own).is_ok());
    let tried = |daemon: &Confined| inside(&Policy::of(daemon, &places), |_| (connects(), listens()));
    assert_eq!(tried(&Confined::Server), (false, false));
    assert_eq!(tried(&Confined::Client), (false, false));
    assert_eq!(tried(&Confined::Balancer { devices: false, pins: false }), (true, false));
    assert_eq!(tried(&Confined::Proxy { listens: vec![own.port()] }), (false, true));
    let elsewhere = Confined::Proxy { listens: vec![to.port()] };
    assert_eq!(tried(&elsewhere), (false, !landlock_is_there()));
}

/// A kernel that answers these calls like this.
fn kernel_with(calls: &[(i64, i32)]) {
    for (call, errno) in calls {
        let processor = TargetArch::try_from(std::env::consts::ARCH).unwrap();
        let answer = SeccompAction::Errno(errno.cast_unsigned());
        let rules = [(*call, Vec::new())].into();
        let filter = SeccompFilter::new(rules, SeccompAction::Allow, answer, processor).unwrap();
        seccompiler::apply_filter(&BpfProgram::try_from(filter).unwrap()).unwrap();
    }
}

#[test]
fn what_the_kernel_lacks_is_done_without() {
    let Folders { _all, places, outside } = folders();
    let policy = Policy::of(&Confined::Server, &places);
    let (landlock, seccomp) = (libc::SYS_landlock_create_ruleset, libc::SYS_seccomp);
    for (calls, has) in [
        (vec![(landlock, libc::ENOSYS)], (false, true)),
        (vec![(landlock, libc::EOPNOTSUPP)], (false, true)),
        (vec![(landlock, libc::ENOSYS), (seccomp, libc::EINVAL)], (false, false)),
    ] {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                kernel_with(&calls);
                let enforced = enter(&policy).unwrap();
                assert_eq!((enforced.landlock.is_some(), enforced.seccomp), has);
                assert_eq!(enforced.capabilities, [Capability::CAP_NET_ADMIN].into());
                fs::write(outside.join("new"), "").expect("nothing keeps root from it");
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        });
    }
}

#[test]
fn what_the_kernel_has_and_refuses_is_an_error() {
    let Folders { _all, places, outside: _ } = folders();
    let policy = Policy::of(&Confined::Server, &places);
    std::thread::spawn(move || {
        kernel_with(&[(libc::SYS_landlock_restrict_self, libc::E2BIG)]);
        let error = enter(&policy).unwrap_err().to_string();
        assert!(error.contains("Landlock") && error.ends_with("--no-sandbox"), "{error}");
    })
    .join()
    .unwrap();
}
