//! A lab for a user who is not root. Needs root, to become such a user and to make a device node.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Output};

/// Runs the probe as an unprivileged user, in a mount namespace where /dev/net/tun has the given mode.
fn probe_with_tun_mode(mode: u32) -> Output {
    // Copied to where anyone may run it: the build's folder may be closed to others.
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = folder.path().join("probe");
    fs::copy(env!("CARGO_BIN_EXE_shunt-lab-probe"), &program).unwrap();
    let (node, program) = (folder.path().join("tun"), program.display().to_string());
    let node = node.display();
    let script = format!(
        "set -e; mknod -m {mode:o} {node} c 10 200; mount --bind {node} /dev/net/tun; \
         exec setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps=-all --bounding-set=-all {program}"
    );
    let output = Command::new("unshare").args(["--mount", "sh", "-c", &script]).output().unwrap();
    println!("mode {mode:o}: {output:?}");
    output
}

#[test]
fn an_unprivileged_user_makes_a_lab_where_tun_is_open_to_all() {
    let output = probe_with_tun_mode(0o666);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "ok: UserNamespace\n");
    assert!(output.status.success());
}

#[test]
fn an_unprivileged_user_is_told_what_is_missing_where_tun_is_closed() {
    let output = probe_with_tun_mode(0o600);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("/dev/net/tun cannot be opened") && error.contains("chmod 666"), "{error}");
    assert_eq!((error.lines().count(), output.status.code()), (1, Some(1)));
}
