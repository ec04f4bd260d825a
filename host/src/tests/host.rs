use std::net::IpAddr;
use std::path::Path;

use crate::change::{Address, LOCAL, Link, MAIN, Route, Rule, Sysctl};
use crate::config::Role;
use crate::prefix::Family;
use crate::testing::{close, in_namespace, run, snapshot, tun};
use crate::{
    Change, Divert, FlagMatch, Host, HostError, HostOptions, PortRange, Prefix, SegmentMatch, sysctl,
};

const VIP4: &str = "203.0.113.10";
const VIP6: &str = "2001:db8:1::10";

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn prefix(text: &str) -> Prefix {
    text.parse().unwrap()
}

/// Two devices: `nic0` (a veth end) with addresses and default routes, and `shunt0`.
fn network() -> tun_tap::Iface {
    run("ip", "link add nic0 type veth peer name peer0");
    run("ip", "link set nic0 up");
    run("ip", "link set peer0 up");
    run("ip", "address add 10.1.0.2/24 dev nic0");
    run("ip", "address add 2001:db8:2::2/64 dev nic0 nodad");
    run("ip", "route add default via 10.1.0.1");
    run("ip", "route add default via 2001:db8:2::1");
    run("nft", "add table inet others");
    let device = tun_tap::Iface::without_packet_info("shunt0", tun_tap::Mode::Tun).unwrap();
    // Link-local addresses and their routes take a moment to settle.
    std::thread::sleep(std::time::Duration::from_millis(50));
    device
}

/// What the client shim needs.
fn client_changes(options: &HostOptions) -> Vec<Change> {
    let (out, inward, app) = (options.table, options.table + 1, options.table + 2);
    let first = options.preference;
    let mut changes: Vec<Change> = vec![
        Link::tun("shunt0", 1400).into(),
        Sysctl::new("net/ipv4/ip_forward", 1).into(),
        Sysctl::new("net/ipv4/tcp_early_demux", 0).into(),
        Sysctl::interface(Family::V4, "all", "rp_filter", 0).into(),
        Sysctl::interface(Family::V4, "nic0", "rp_filter", 0).into(),
        Sysctl::interface(Family::V4, "shunt0", "accept_local", 1).into(),
        Sysctl::interface(Family::V6, "nic0", "accept_ra", 2).into(),
        Sysctl::interface(Family::V6, "all", "forwarding", 1).into(),
        Sysctl::new("net/ipv4/no_such_key", 1).optional().into(),
        Change::ReservePorts(vec![41001.into(), PortRange::new(42000, 42100)]),
    ];
    for (family, vip, gateway, source) in
        [(Family::V4, VIP4, "10.1.0.1", "10.1.0.2"), (Family::V6, VIP6, "2001:db8:2::1", "2001:db8:2::2")]
    {
        let (vip, any) = (Prefix::host(ip(vip)), Prefix::all(family));
        changes.extend([
            Change::from(Route::device(out, vip, "nic0").via(Some(ip(gateway))).source(Some(ip(source)))),
            Route::device(inward, any, "shunt0").into(),
            Route::device(app, vip, "shunt0").source(Some(ip(source))).into(),
            Route::blackhole(MAIN, vip).metric(4000).into(),
            Route::local(
                inward,
                prefix(if family == Family::V4 { "192.0.2.1" } else { "2001:db8:9::1" }),
                "lo",
            )
            .into(),
            Rule::new(family, first, out).interface("shunt0").to(vip).into(),
            Rule::new(family, first + 1, LOCAL).interface("shunt0").into(),
            Rule::new(family, first + 2, inward).interface("nic0").from(vip).tcp().into(),
            Rule::new(family, first + 3, app).interface("lo").to(vip).tcp().into(),
            Rule::new(family, first + 4, inward).mark(options.mark, options.mark_mask).into(),
            Rule::new(family, first + 5, inward).from(vip).source_port(PortRange::new(41001, 41009)).into(),
            Rule::new(family, first + 5, inward).from(vip).destination_port(443).into(),
        ]);
    }
    changes.extend([
        Change::LocalLast,
        Address { interface: "shunt0".into(), address: ip("10.9.0.1"), prefix_len: 32 }.into(),
        Address { interface: "shunt0".into(), address: ip("2001:db8:9::2"), prefix_len: 128 }.into(),
        divert(options).into(),
    ]);
    changes
}

fn divert(options: &HostOptions) -> Divert {
    Divert {
        mark: options.mark,
        mask: options.mark_mask,
        except_interface: Some("shunt0".into()),
        incoming: vec![SegmentMatch {
            flags: Some(FlagMatch::SYN),
            option: Some(253),
            ..SegmentMatch::default()
        }],
        ..Divert::default()
    }
}

async fn open(folder: &Path, role: Role) -> Host {
    Host::open_in(folder, role.name(), &HostOptions::defaults(role)).await.unwrap()
}

fn shows(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
}

#[test]
fn the_clients_changes_are_made_and_undone() {
    in_namespace(async || {
        let folder = tempfile::tempdir().unwrap();
        let device = network();
        sysctl::set_reserved_ports(&[8080.into()]).unwrap();
        let before = snapshot();
        let mut host = open(folder.path(), Role::Client).await;
        host.apply(client_changes(host.options())).await.unwrap();

        shows(
            &run("ip", "-4 rule show"),
            &[
                "10:\tfrom all to 203.0.113.10 iif shunt0 lookup 21000",
                "11:\tfrom all iif shunt0 lookup local",
                "12:\tfrom 203.0.113.10 iif nic0 ipproto tcp lookup 21001",
                "13:\tfrom all to 203.0.113.10 iif lo ipproto tcp lookup 21002",
                "14:\tfrom all fwmark 0x10000000/0x30000000 lookup 21001",
                "15:\tfrom 203.0.113.10 ipproto tcp sport 41001-41009 lookup 21001",
                "15:\tfrom 203.0.113.10 ipproto tcp dport 443 lookup 21001",
                "100:\tfrom all lookup local",
            ],
        );
        assert!(!run("ip", "-4 rule show").contains("\n0:"));
        shows(
            &run("ip", "-6 rule show"),
            &[
                "10:\tfrom all to 2001:db8:1::10 iif shunt0 lookup 21000",
                "14:\tfrom all fwmark 0x10000000/0x30000000 lookup 21001",
                "100:\tfrom all lookup local",
            ],
        );
        shows(&run("ip", "-4 route show table 21000"), &["203.0.113.10 via 10.1.0.1 dev nic0"]);
        shows(&run("ip", "-4 route show table 21001"), &["default dev shunt0", "local 192.0.2.1 dev lo"]);
        shows(&run("ip", "-4 route show"), &["blackhole 203.0.113.10", "metric 4000"]);
        shows(&run("ip", "-6 route show table 21000"), &["2001:db8:1::10 via 2001:db8:2::1 dev nic0"]);
        shows(&run("ip", "-6 route show table 21002"), &["2001:db8:1::10 dev shunt0", "src 2001:db8:2::2"]);
        shows(&run("ip", "-6 route show"), &["blackhole 2001:db8:1::10"]);
        shows(&run("ip", "address show dev shunt0"), &["mtu 1400", "10.9.0.1/32", "2001:db8:9::2/128"]);
        assert!(!run("ip", "address show dev shunt0").contains("fe80"));
        assert_eq!(sysctl::read("net/ipv4/conf/shunt0/accept_local").unwrap().unwrap(), "1");
        assert_eq!(sysctl::read("net/ipv6/conf/nic0/accept_ra").unwrap().unwrap(), "2");
        assert_eq!(
            sysctl::reserved_ports().unwrap(),
            [8080.into(), 41001.into(), PortRange::new(42000, 42100)]
        );
        shows(&run("nft", "list ruleset"), &["table inet shunt_client", "table inet others"]);

        host.close().await.unwrap();
        assert_eq!(snapshot(), before);
        assert_eq!(sysctl::read("net/ipv6/conf/all/forwarding").unwrap().unwrap(), "0");
        let left: Vec<_> = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_none_or(|extension| extension != "lock"))
            .collect();
        assert_eq!(left, Vec::<std::path::PathBuf>::new());
        drop(device);
    });
}

#[test]
fn what_a_killed_daemon_left_is_swept_by_the_next() {
    in_namespace(async || {
        let folder = tempfile::tempdir().unwrap();
        let device = network();
        let mut host = open(folder.path(), Role::Client).await;
        let before = snapshot();
        host.apply(client_changes(host.options())).await.unwrap();
        drop(host);
        assert_ne!(snapshot(), before);

        let options = HostOptions::defaults(Role::Client);
        assert!(Host::sweep(folder.path(), "client", &options).await.unwrap() > 0);
        assert_eq!(snapshot(), before);
        assert_eq!(Host::sweep(folder.path(), "client", &options).await.unwrap(), 0);
        assert_eq!(snapshot(), before);
        drop(device);
    });
}

#[test]
fn rules_routes_and_marks_are_swept_without_the_journal_and_without_the_device() {
    in_namespace(async || {
        let folder = tempfile::tempdir().unwrap();
        let device = network();
        let mut host = open(folder.path(), Role::Client).await;
        host.apply(client_changes(host.options())).await.unwrap();
        drop(host);
        close(device).await;
        for entry in std::fs::read_dir(folder.path()).unwrap() {
            let path = entry.unwrap().path();
            if path.file_name().unwrap().to_string_lossy().starts_with("client.") {
                std::fs::remove_file(path).unwrap();
            }
        }
        let options = HostOptions::defaults(Role::Client);
        assert!(Host::sweep(folder.path(), "client", &options).await.unwrap() > 0);
        let after = snapshot();
        assert!(!after.contains("lookup 210") && !after.contains("shunt_client"), "{after}");
        shows(&run("ip", "rule show"), &["0:\tfrom all lookup local"]);
        assert_eq!(sysctl::read("net/ipv4/ip_forward").unwrap().unwrap(), "0");
        assert_eq!(sysctl::reserved_ports().unwrap(), []);
    });
}

#[test]
fn other_programs_rules_and_routes_stay() {
    in_namespace(async || {
        let folder = tempfile::tempdir().unwrap();
        let device = network();
        run("ip", "rule add pref 12 from 192.0.2.7 lookup 21001");
        run("ip", "route add blackhole 192.0.2.0/24 table 21001");
        let before = snapshot();
        let mut host = open(folder.path(), Role::Client).await;
        host.apply(client_changes(host.options())).await.unwrap();
        drop(host);
        let host = open(folder.path(), Role::Client).await;
        host.close().await.unwrap();
        assert_eq!(snapshot(), before);
        drop(device);
    });
}

#[test]
fn a_failure_undoes_what_came_before_it() {
    in_namespace(async || {
        let folder = tempfile::tempdir().unwrap();
        let device = network();
        let before = snapshot();
        let mut host = open(folder.path(), Role::Client).await;
        let mut changes = client_changes(host.options());
        changes.push(Route::device(21_000, prefix("192.0.2.0/24"), "nowhere0").into());
        let error = host.apply(changes).await.unwrap_err();
        assert!(error.to_string().contains("192.0.2.0/24 in table 21000"), "{error}");
        assert_eq!(host.changes().count(), 0);
        assert_eq!(snapshot(), before);

        let error = host.apply([Sysctl::new("net/ipv4/no_such_key", 1)]).await.unwrap_err();
        assert_eq!(error.to_string(), "this kernel has no sysctl net/ipv4/no_such_key");
        let error = host.apply([Link::tun("nowhere0", 1500)]).await.unwrap_err();
        assert_eq!(error.to_string(), "there is no interface \"nowhere0\" in this network namespace");
        let mixed = Rule::new(Family::V6, 10, 21_000).from(ip("10.0.0.1"));
        assert!(matches!(host.apply([mixed]).await, Err(HostError::Invalid(_))));
        host.close().await.unwrap();
        assert_eq!(snapshot(), before);
        drop(device);
    });
}

#[test]
fn a_name_is_used_once_in_a_namespace() {
    in_namespace(async || {
        let folder = tempfile::tempdir().unwrap();
        let host = open(folder.path(), Role::Server).await;
        let options = HostOptions::defaults(Role::Server);
        let second = Host::open_in(folder.path(), "server", &options).await;
        assert!(matches!(second, Err(HostError::Busy { .. })));
        host.close().await.unwrap();
        open(folder.path(), Role::Server).await.close().await.unwrap();
        assert!(Host::open_in(folder.path(), "a/b", &options).await.is_err());
    });
}

#[test]
fn two_daemons_share_sysctls_ports_and_the_local_rule() {
    in_namespace(async || {
        let folder = tempfile::tempdir().unwrap();
        sysctl::set_reserved_ports(&[41002.into()]).unwrap();
        let before = snapshot();
        let shared = |family| {
            [
                Change::from(Sysctl::new("net/ipv4/ip_forward", 1)),
                Change::ReservePorts(vec![PortRange::new(41000, 41002)]),
                Route::blackhole(21_305, Prefix::all(family)).into(),
                Change::LocalLast,
            ]
        };
        let mut client = open(folder.path(), Role::Client).await;
        client.apply(shared(Family::V4)).await.unwrap();
        let mut server = open(folder.path(), Role::Server).await;
        server.apply(shared(Family::V6)).await.unwrap();
        server.apply([Rule::new(Family::V4, 30, 21_305)]).await.unwrap();

        client.close().await.unwrap();
        assert_eq!(sysctl::read("net/ipv4/ip_forward").unwrap().unwrap(), "1");
        assert_eq!(sysctl::reserved_ports().unwrap(), [PortRange::new(41000, 41002)]);
        shows(&run("ip", "-4 rule show"), &["100:\tfrom all lookup local"]);

        server.close().await.unwrap();
        assert_eq!(sysctl::reserved_ports().unwrap(), [41002.into()]);
        assert_eq!(snapshot(), before);
    });
}

#[test]
fn a_sysctl_that_somebody_else_changed_meanwhile_is_left() {
    in_namespace(async || {
        let folder = tempfile::tempdir().unwrap();
        let mut host = open(folder.path(), Role::Client).await;
        host.apply([Sysctl::new("net/ipv4/tcp_early_demux", 0), Sysctl::new("net/ipv4/ip_default_ttl", 61)])
            .await
            .unwrap();
        sysctl::write("net/ipv4/ip_default_ttl", "62").unwrap();
        host.close().await.unwrap();
        assert_eq!(sysctl::read("net/ipv4/tcp_early_demux").unwrap().unwrap(), "1");
        assert_eq!(sysctl::read("net/ipv4/ip_default_ttl").unwrap().unwrap(), "62");
    });
}

#[test]
fn a_local_rule_that_somebody_moved_before_ours_is_refused() {
    in_namespace(async || {
        let folder = tempfile::tempdir().unwrap();
        run("ip", "rule add pref 7 lookup local");
        run("ip", "rule del pref 0");
        let mut host = open(folder.path(), Role::Client).await;
        let error = host.apply([Change::LocalLast]).await.unwrap_err();
        assert!(matches!(error, HostError::LocalRule { family: Family::V4, preference: 7 }), "{error}");
        run("ip", "rule add pref 200 lookup local");
        run("ip", "rule del pref 7");
        host.apply([Change::LocalLast]).await.unwrap();
        host.close().await.unwrap();
        shows(&run("ip", "rule show"), &["200:\tfrom all lookup local"]);
        assert!(!run("ip", "rule show").contains("0:\tfrom all lookup local\n100:"));
    });
}

#[test]
fn replacing_touches_only_what_differs() {
    in_namespace(async || {
        let folder = tempfile::tempdir().unwrap();
        let _device = tun("shunt0");
        let before = snapshot();
        let mut host = open(folder.path(), Role::Balancer).await;
        let server =
            |n: u8| Rule::new(Family::V4, 51, 21_600).from(ip(&format!("10.0.0.{n}"))).source_port(41001);
        let mut marks = divert(host.options());
        let base = Route::device(21_600, Prefix::all(Family::V4), "shunt0");
        host.replace(vec![base.clone().into(), server(1).into(), server(2).into(), marks.clone().into()])
            .await
            .unwrap();
        marks.incoming[0].destination_ports = vec![443.into(), PortRange::new(8000, 8010)];
        host.replace(vec![base.into(), server(2).into(), server(3).into(), marks.into()]).await.unwrap();
        let rules = run("ip", "rule show");
        shows(&rules, &["from 10.0.0.2 ipproto tcp sport 41001", "from 10.0.0.3 ipproto tcp sport 41001"]);
        assert!(!rules.contains("10.0.0.1 "));
        shows(&run("nft", "list table inet shunt_balancer"), &["443, 8000-8010"]);
        assert_eq!(host.changes().count(), 4);
        drop(host);
        open(folder.path(), Role::Balancer).await.close().await.unwrap();
        assert_eq!(snapshot(), before);
    });
}

#[test]
fn a_thousand_rules_are_made_and_swept_in_reasonable_time() {
    in_namespace(async || {
        let folder = tempfile::tempdir().unwrap();
        let mut host = open(folder.path(), Role::Balancer).await;
        let before = snapshot();
        let changes: Vec<Change> = (0..1000u16)
            .map(|n| {
                let server = std::net::Ipv4Addr::new(10, 0, (n / 250) as u8, (n % 250) as u8);
                Rule::new(Family::V4, 51, 21_600).from(IpAddr::V4(server)).source_port(41001).into()
            })
            .collect();
        let started = std::time::Instant::now();
        host.apply(changes).await.unwrap();
        drop(host);
        open(folder.path(), Role::Balancer).await.close().await.unwrap();
        assert_eq!(snapshot(), before);
        assert!(started.elapsed().as_secs() < 10, "{:?}", started.elapsed());
    });
}

#[test]
fn sessions_can_be_spawned() {
    fn assert_send<T: Send>(_: &T) {}
    in_namespace(async || {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_owned();
        let session = async move {
            let mut host = open(&path, Role::Client).await;
            host.apply([Sysctl::new("net/ipv4/ip_forward", 1)]).await.unwrap();
            host.replace(vec![Change::LocalLast]).await.unwrap();
            host.close().await.unwrap();
        };
        assert_send(&session);
        tokio::spawn(session).await.unwrap();
    });
}

#[test]
fn what_is_kept_stays_without_a_gap_and_goes_in_the_end() {
    in_namespace(async || {
        let folder = tempfile::tempdir().unwrap();
        let before = snapshot();
        let options = HostOptions::defaults(Role::Balancer);
        let (vip, table) = (Prefix::host(ip(VIP4)), options.table);
        let rule = Rule::new(Family::V4, options.preference + 1, table).to(vip);
        let v6 = Route::blackhole(table, Prefix::host(ip(VIP6)));
        let standing: Vec<Change> =
            vec![rule.into(), Route::blackhole(table, vip).metric(9).into(), v6.into()];
        let wanted = |server: &str| {
            let of_server = Rule::new(Family::V4, options.preference, table).from(ip(server));
            standing.iter().cloned().chain([of_server.source_port(41001).into(), Change::LocalLast]).collect()
        };
        let keep = |change: &Change| standing.contains(change);
        let mut host = open(folder.path(), Role::Balancer).await;
        host.replace(wanted("10.0.0.1")).await.unwrap();
        host.close_keeping(keep).await.unwrap();
        let kept = run("ip", "rule show")
            + &run("ip", "route show table all")
            + &run("ip", "-6 route show table all");
        shows(&kept, &["to 203.0.113.10 lookup 21600", "blackhole 203.0.113.10", "blackhole 2001:db8:1::10"]);
        assert!(!kept.contains("10.0.0.1"));

        // Killed, and a rule that is only in the journal.
        let mut host = Host::open_keeping(folder.path(), "balancer", &options, keep).await.unwrap();
        assert_eq!(host.changes().count(), 3);
        host.replace(wanted("10.0.0.2")).await.unwrap();
        drop(host);
        run("ip", "rule del to 203.0.113.10");
        let mut host = Host::open_keeping(folder.path(), "balancer", &options, keep).await.unwrap();
        shows(&run("ip", "rule show"), &["to 203.0.113.10 lookup 21600"]);
        assert!(!run("ip", "rule show").contains("10.0.0.2"));
        host.replace(wanted("10.0.0.3")).await.unwrap();
        assert_eq!(host.changes().count(), 5);
        host.close_keeping(keep).await.unwrap();

        open(folder.path(), Role::Balancer).await.close().await.unwrap();
        assert_eq!(snapshot(), before);
    });
}
