use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;

use super::{Finding, Needs, Severity, examine, examine_host};
use crate::change::{Link, Rule, Sysctl};
use crate::divert::Divert;
use crate::options::HostOptions;
use crate::prefix::Family;
use crate::testing::{in_namespace, run, until};
use crate::{Change, Role};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// What a small agent would need on a host with `nic0`.
fn needs() -> Needs {
    Needs {
        options: HostOptions::defaults(Role::Server),
        changes: vec![
            Link::tun("shunt-srv0", 1500).into(),
            Sysctl::new("net/ipv4/ip_forward", 1).into(),
            Sysctl::interface(Family::V4, "shunt-srv0", "rp_filter", 0).into(),
            Rule::new(Family::V6, 30, 21_300).into(),
            Change::Divert(Divert::default()),
        ],
        interfaces: vec!["nic0".to_owned()],
        reach: vec![ip("10.9.0.1"), ip("2001:db8:9::1")],
        own: vec![ip("203.0.113.10"), ip("2001:db8::10")],
        listening: vec![SocketAddr::new(ip("203.0.113.10"), 41001)],
        ports: vec![443, 41001],
        offload: None,
        forwards: BTreeSet::new(),
    }
}

/// The shell's command line, in the namespace of the test.
fn shell(line: &str) {
    let output = Command::new("sh").args(["-ec", line]).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}

fn bad(findings: &[Finding]) -> Vec<&Finding> {
    findings.iter().filter(|finding| finding.severity >= Severity::Warning).collect()
}

fn sole<'a>(findings: &'a [Finding], subject: &str) -> &'a Finding {
    match bad(findings)[..] {
        [finding] if finding.subject == subject => finding,
        _ => panic!("not one finding about {subject}: {findings:#?}"),
    }
}

/// A host on which nothing is in the way.
fn healthy() -> std::net::TcpListener {
    run("ip", "link add nic0 type veth peer name peer0");
    run("ip", "link set peer0 up");
    run("ip", "link set nic0 up");
    for address in ["10.1.0.2/24 dev nic0", "2001:db8:2::2/64 dev nic0 nodad", "203.0.113.10/32 dev lo"] {
        run("ip", &format!("address add {address}"));
    }
    run("ip", "address add 2001:db8::10/128 dev lo nodad");
    run("ip", "route add default via 10.1.0.1");
    run("ip", "route add default via 2001:db8:2::1");
    std::net::TcpListener::bind("203.0.113.10:41001").unwrap()
}

/// Makes an obstacle, expects exactly one finding about it, does what the finding says, expects none.
async fn is_found_and_mended(obstacle: &str, subject: &str) {
    shell(obstacle);
    let findings = examine(&needs()).await;
    let finding = sole(&findings, subject);
    let commands = finding.mend.split('`').nth(1).unwrap_or_else(|| panic!("no command: {finding:?}"));
    shell(commands);
    let findings = examine(&needs()).await;
    assert!(bad(&findings).is_empty(), "after `{commands}`: {findings:#?}");
}

#[test]
fn a_healthy_host_is_found_healthy_and_told_what_will_be_changed() {
    in_namespace(async || {
        let _listener = healthy();
        run("sysctl", "-qw net.ipv4.ip_forward=0");
        let findings = examine(&needs()).await;
        assert!(bad(&findings).is_empty(), "{findings:#?}");
        let notes: Vec<&Finding> = findings.iter().filter(|f| f.severity == Severity::Note).collect();
        assert_eq!(notes.len(), 1, "{notes:?}");
        assert!(notes[0].found.contains("net.ipv4.ip_forward is 0"), "{notes:?}");
        // Those who run the tests as root can run the daemons.
        let host = examine_host().await;
        assert!(host.iter().all(|finding| finding.severity < Severity::Error), "{host:#?}");
    });
}

#[test]
fn firewalls_and_marks_are_found_and_mended_as_told() {
    in_namespace(async || {
        let _listener = healthy();
        for family in ["inet", "ip", "ip6"] {
            let chain = format!(
                "nft add table {family} f; nft 'add chain {family} f forward {{ type filter hook forward priority 0; policy drop; }}'"
            );
            is_found_and_mended(&chain, "firewall").await;
            // A rule that drops at the end is as good as a policy.
            run("nft", &format!("flush table {family} f"));
            shell(&format!("nft 'chain {family} f forward {{ policy accept; }}'"));
            let last = format!(
                "nft add rule {family} f forward ct state established accept; nft add rule {family} f forward counter drop"
            );
            is_found_and_mended(&last, "firewall").await;
            run("nft", &format!("delete table {family} f"));
        }
        shell(
            "nft add table inet f; nft 'add chain inet f input { type filter hook input priority 0; policy drop; }'; \
             nft 'add rule inet f input tcp dport { 22, 400-500 } accept'",
        );
        let findings = examine(&needs()).await;
        assert!(sole(&findings, "firewall").found.ends_with("TCP port 41001"));
        is_found_and_mended("true", "firewall").await;
        run("nft", "delete table inet f");

        shell(
            "nft add table inet m; nft 'add chain inet m pre { type filter hook prerouting priority 0; }'; \
             nft add rule inet m pre meta mark set 7",
        );
        let findings = examine(&needs()).await;
        assert!(sole(&findings, "marks").mend.contains("and 0x30000000 or"), "{findings:#?}");
        shell(
            "nft flush table inet m; nft 'add rule inet m pre meta mark set meta mark and 0x30000000 or 7'",
        );
        assert!(bad(&examine(&needs()).await).is_empty());
        // Our own tables are not other people's.
        shell(
            "nft add table inet shunt_server; nft 'add chain inet shunt_server c { type filter hook prerouting priority 0; }'; \
             nft add rule inet shunt_server c meta mark set 7",
        );
        assert!(bad(&examine(&needs()).await).is_empty());
    });
}

#[test]
fn rules_marks_and_tables_of_others_are_found() {
    in_namespace(async || {
        let _listener = healthy();
        // As VPNs do.
        for (obstacle, subject, severity) in [
            ("rule add pref 5 from all lookup 51820", "rules", Severity::Warning),
            ("-6 rule add pref 5 from all lookup 51820", "rules", Severity::Warning),
            ("rule add pref 5 fwmark 0x20000000/0x20000000 lookup 51820", "marks", Severity::Error),
            ("rule add pref 5 fwmark 0xffffffff/0x20000000 lookup 51820", "marks", Severity::Error),
            ("route add 192.0.2.0/24 dev nic0 table 21310", "tables", Severity::Error),
        ] {
            run("ip", obstacle);
            let findings = examine(&needs()).await;
            assert_eq!(sole(&findings, subject).severity, severity, "{obstacle}");
            run("ip", &obstacle.replacen("add", "del", 1));
        }
        for harmless in [
            "rule add pref 5 fwmark 0x1/0x1 lookup 51820",
            "rule add pref 5 fwmark 0x10000000/0x30000000 lookup 51820",
            "rule add pref 500 from all lookup 51820",
            "rule add pref 31 from all lookup 21300 protocol 85",
            "route add 192.0.2.0/24 dev nic0 table 21310 proto 85",
        ] {
            run("ip", harmless);
            let findings = examine(&needs()).await;
            assert!(bad(&findings).is_empty(), "{harmless}: {findings:#?}");
        }
        run("ip", "rule add pref 50 lookup local");
        run("ip", "rule del pref 0");
        is_found_and_mended("true", "rules").await;
    });
}

#[test]
fn missing_addresses_routes_listeners_and_interfaces_are_found() {
    in_namespace(async || {
        let listener = healthy();
        for address in ["203.0.113.10/32", "2001:db8::10/128"] {
            is_found_and_mended(&format!("ip address del {address} dev lo"), "address").await;
        }
        drop(listener);
        until(async || {
            examine(&needs()).await.iter().any(|f| f.subject == "listener" && f.severity == Severity::Error)
        })
        .await;
        let listener = std::net::TcpListener::bind("0.0.0.0:41001").unwrap();
        assert!(bad(&examine(&needs()).await).is_empty());
        is_found_and_mended(
            "sysctl -qw net.ipv6.conf.nic0.disable_ipv6=1; ip -6 route add default dev lo; ",
            "ipv6",
        )
        .await;
        run("ip", "route del default");
        let findings = examine(&needs()).await;
        assert!(sole(&findings, "route").found.contains("no route leads to 10.9.0.1"));
        run("ip", "address add 10.9.0.1/32 dev lo");
        let findings = examine(&needs()).await;
        assert!(sole(&findings, "route").found.contains("10.9.0.1 is an address of this host itself"));
        run("ip", "link del nic0");
        let findings = examine(&needs()).await;
        assert!(
            bad(&findings).iter().any(|f| f.subject == "interface" && f.found.contains("nic0")),
            "{findings:#?}"
        );
        drop(listener);
    });
}
