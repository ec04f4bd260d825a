//! Test help: a fresh network namespace per test, with devices in it.

use std::future::Future;
use std::process::Command;

use nix::sched::{CloneFlags, unshare};
use tun_tap::{Iface, Mode};

/// Runs a test on a thread in a network namespace of its own.
pub(crate) fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace (this test must run as root)");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            run("ip", "link set lo up");
            test().await;
        });
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs a program in the test's namespace and returns what it prints.
pub(crate) fn run(program: &str, arguments: &str) -> String {
    let output = Command::new(program)
        .args(arguments.split_whitespace())
        .output()
        .unwrap_or_else(|error| panic!("{program} is needed for this test: {error}"));
    assert!(output.status.success(), "{program} {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A TUN device that is up, without packet information, non-blocking.
pub(crate) fn tun(name: &str) -> Iface {
    device(name, Mode::Tun)
}

/// The same of Ethernet's kind, with its own address.
pub(crate) fn tap(name: &str) -> Iface {
    device(name, Mode::Tap)
}

fn device(name: &str, mode: Mode) -> Iface {
    let device = Iface::without_packet_info(name, mode).expect("a device (this test must run as root)");
    device.set_non_blocking().expect("a non-blocking device");
    run("ip", &format!("link set {name} up"));
    device
}

/// Waits until a condition holds. What is closed here can stay open for a moment in a program that another test's
/// thread is just starting.
pub(crate) async fn until(condition: impl AsyncFn() -> bool) {
    for _ in 0..500 {
        if condition().await {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("it did not come true within 5 s");
}

/// Closes a TUN device and waits until the interface has gone.
pub(crate) async fn close(device: Iface) {
    let path = format!("/proc/sys/net/ipv4/conf/{}", device.name());
    drop(device);
    until(async || !std::path::Path::new(&path).exists()).await;
}

/// The rules, routes of all tables, nftables and sysctls of the namespace, to compare before and after.
pub(crate) fn snapshot() -> String {
    let mut all = String::new();
    for (program, arguments) in [
        ("ip", "-4 rule show"),
        ("ip", "-6 rule show"),
        ("ip", "-4 route show table all"),
        ("ip", "-6 route show table all"),
        ("ip", "-brief address show"),
        ("nft", "list ruleset"),
    ] {
        all.extend(["# ", program, " ", arguments, "\n", &run(program, arguments)]);
    }
    for key in ["net/ipv4/ip_forward", "net/ipv4/tcp_early_demux", "net/ipv4/ip_local_reserved_ports"] {
        all.extend([key, " = ", &crate::sysctl::read(key).unwrap().unwrap_or_default(), "\n"]);
    }
    all
}
