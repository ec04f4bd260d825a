//! `shunt doctor`: on hosts where all works it finds nothing in the way; where something breaks connections it finds
//! that, and doing what it says mends them.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Family, Net, Options, shunt};
use serde_json::Value;
use shunt_lab::Host;

fn findings(host: &Host, file: &Path) -> (Option<i32>, Vec<Value>) {
    let mut command = shunt();
    command.args(["doctor", "--json"]).arg(file);
    let output = host.enter(|| command.output()).expect("the namespace is there").expect("it runs");
    let text = String::from_utf8_lossy(&output.stdout);
    let findings = serde_json::from_str(&text)
        .unwrap_or_else(|error| panic!("{error}: {text}{}", String::from_utf8_lossy(&output.stderr)));
    (output.status.code(), findings)
}

/// Those that matter, about the file.
fn obstacles(findings: &[Value]) -> Vec<&Value> {
    let bad = |finding: &&Value| {
        finding.get("file").is_some() && matches!(finding["severity"].as_str(), Some("error" | "warning"))
    };
    findings.iter().filter(bad).collect()
}

/// Where each role runs, and its file.
fn places(net: &Net) -> Vec<(&'static str, &Host, PathBuf)> {
    let mut places = vec![
        ("client", &net.client, net.file("client.toml")),
        ("balancer", &net.balancer, net.file("balancer.toml")),
    ];
    places.extend(
        net.servers
            .iter()
            .map(|server| ("server", &server.host, net.file(&format!("agent{}.toml", server.number)))),
    );
    places
}

#[test]
fn a_firewall_that_breaks_connections_is_found_and_mended_as_told() {
    let mut net = Net::new(Options { servers: 1, ..Options::default() });
    net.start_nginx();
    net.start_iperf();
    let other = common::service::Service::start(&net, common::service::echo);
    net.start_shim("reconnect");
    let fetch = |seconds: &str| {
        Family::BOTH
            .map(|family| net.curl(family, "/", &["--max-time", seconds]))
            .iter()
            .all(|fetched| fetched.ok && fetched.redirected())
    };
    assert!(fetch("10"), "{}", net.logs());
    for (role, host, file) in places(&net) {
        let (code, healthy) = findings(host, &file);
        assert!(obstacles(&healthy).is_empty(), "{role}: {healthy:#?}");
        assert_eq!(code, Some(0), "{role}: {healthy:#?}");

        host.nft("table inet fw { chain forward { type filter hook forward priority 0; policy drop; }\n}")
            .expect("rules");
        assert!(!fetch("1"), "{role}: connections pass a firewall that drops all that is forwarded");
        let (code, found) = findings(host, &file);
        assert_eq!(code, Some(1), "{role}: {found:#?}");
        let obstacle = obstacles(&found)[0];
        assert_eq!(
            (obstacle["subject"].as_str(), obstacle["severity"].as_str()),
            (Some("firewall"), Some("error"))
        );
        let mend = obstacle["mend"].as_str().and_then(|mend| mend.split('`').nth(1)).expect("a command");
        host.run(Command::new("sh").args(["-ec", mend])).expect("it can be done");
        assert!(fetch("10"), "{role}: `{mend}` does not mend it\n{}", net.logs());
        let (code, mended) = findings(host, &file);
        assert_eq!((code, obstacles(&mended).len()), (Some(0), 0), "{role}: {mended:#?}");
    }
    other.stop();
    net.stop_shim();
}

#[test]
fn a_host_is_looked_at_before_a_daemon_runs_there() {
    let net = Net::new(Options { servers: 1, start: false, ..Options::default() });
    let server = &net.servers[0];
    let file = net.file("agent.toml");
    std::fs::write(&file, net.agent_config(1, "")).expect("a file");
    let (code, found) = findings(&server.host, &file);
    assert_eq!(code, Some(1), "{found:#?}");
    // Nobody listens yet; everything else is in order.
    assert!(!obstacles(&found).is_empty());
    assert!(obstacles(&found).iter().all(|finding| finding["subject"] == "listener"), "{found:#?}");
    for subject in ["privileges", "tun", "nftables"] {
        assert!(
            found.iter().any(|finding| finding["subject"] == subject && finding["severity"] == "good"),
            "{subject}: {found:#?}"
        );
    }
}
