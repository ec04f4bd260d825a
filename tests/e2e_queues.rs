//! Several queues of the balancer's device, each carried by a thread of its own.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use common::{Family, Net, Options, Way};

const QUEUES: usize = 3;
const MEBIBYTES: u64 = 16;
const CONNECTIONS: usize = 200;

/// The threads of a process that carry queues but for the first, by name: where the kernel says what they do.
fn queue_threads(process: u32) -> BTreeMap<String, PathBuf> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).expect("the process runs");
    let named = tasks.flatten().map(|task| {
        let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        (name.trim().to_owned(), task.path())
    });
    named.filter(|(name, _)| name.starts_with("queue-")).collect()
}

/// How often a thread has waited for something.
fn waits(thread: &Path) -> u64 {
    status(thread, "voluntary_ctxt_switches").parse().expect("a number")
}

fn status(thread: &Path, key: &str) -> String {
    let text = fs::read_to_string(thread.join("status")).expect("the thread runs");
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.expect("the kernel says it").trim().to_owned()
}

#[test]
fn connections_pass_by_all_queues_each_on_its_own_processor() {
    let mut net = Net::new(Options { servers: 2, start: false, ..Options::default() });
    let text = net.balancer_config(|_| Some("up"));
    let host = |queues| format!("{text}\n[host]\nqueues = {queues}\npin = true\noffload = \"off\"\n");
    net.start_balancer_with(&host(QUEUES));
    for number in 1..=2 {
        net.start_agent(number);
    }
    net.start_nginx();
    net.start_shim("auto");
    let file = net.make_file("bulk", MEBIBYTES);
    let threads = queue_threads(net.balancer_process.as_ref().expect("the balancer runs").id());
    assert_eq!(threads.keys().collect::<Vec<_>>(), ["queue-1", "queue-2"]);
    let before: Vec<u64> = threads.values().map(|thread| waits(thread)).collect();

    for family in Family::BOTH {
        for way in Way::BOTH {
            let done = net.transfer(family, way, &file);
            assert!(done.redirected, "{done:?}\n{}", net.logs());
        }
        let tally = net.connections(family, CONNECTIONS, 4);
        assert_eq!(tally.redirected, CONNECTIONS, "{tally:?}\n{}", net.logs());
    }

    for (thread, before) in threads.values().zip(before) {
        let waited = waits(thread) - before;
        assert!(waited > 20, "{}: nothing has come by this queue", thread.display());
        let processors = status(thread, "Cpus_allowed_list");
        assert!(processors.parse::<usize>().is_ok(), "one processor, not {processors}");
    }
    // The devices cannot be made anew while packets pass them.
    net.reload_balancer(&host(1));
    net.wait_for_balancer("[host] cannot change while the balancer runs", 1);
    net.stop_shim();
    let counts = net.stop_balancer_and_count();
    assert_eq!(counts.of("shunt_balancer_device_errors_total"), 0);
    assert!(counts.decided("selected") > 2 * CONNECTIONS as u64);
}
