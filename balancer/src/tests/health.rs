//! `B7` where health is looked at.

use std::sync::Arc;
use std::time::Duration;

use shunt_host::{Family, Source, Transport};
use shunt_stack::wire::{SeqNumber, TcpFlags};
use tokio::net::TcpSocket;
use tokio::time::timeout;

use super::packets::segment;
use super::{EXID, R, balancer, casts, three_servers};
use crate::health::Monitor;
use crate::{Balancer, Config, Decision, DropReason, Route, SelectKey, Unfit};

const PATIENCE: Duration = Duration::from_secs(30);

fn config(text: &str) -> Config {
    Config::parse(&Source::new("test.toml", text)).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn b7_an_unfit_server_gets_no_new_selections_in_its_family_and_keeps_its_service_port() {
    let first = balancer(&three_servers(""));
    let mut unfit = Unfit::default();
    unfit.insert(1, 0, Family::V4);
    let next = first.successor_without(&config(&three_servers("")), &unfit);
    for (cast, spared) in casts().into_iter().zip([true, false]) {
        let mut met = 0;
        for n in 0..300 {
            let mut syn = segment(cast.client(), cast.vip(443), TcpFlags::SYN, SeqNumber(n));
            for redirect in [false, true] {
                if redirect {
                    syn.insert_redirect(EXID, &R, 1500).unwrap();
                }
                let Ok(Route::ToServer { server, .. }) = next.route(&syn) else { panic!("{syn:?}") };
                met += usize::from(server.index() == 1);
            }
        }
        assert_eq!(met == 0, spared, "{cast:?}: {met}");
        let Ok(Route::ToServer { server, decision }) = next.route(&cast.ack(41002)) else { panic!() };
        assert_eq!((server.index(), decision), (1, Decision::Owner));
    }
}

#[test]
fn tables_of_sets_that_are_as_before_are_not_filled_again() {
    let filled = |balancer: &Balancer, cast: usize| {
        let table = &balancer.table;
        let vip = table.vip(casts()[cast].vip(443).ip()).unwrap();
        Arc::clone(table.set(vip, Transport::Tcp, 443).unwrap().maglev.as_ref().unwrap())
    };
    let first = balancer(&three_servers(""));
    let mut unfit = Unfit::default();
    unfit.insert(1, 0, Family::V4);
    let next = first.successor_without(&config(&three_servers("")), &unfit);
    assert!(!Arc::ptr_eq(&filled(&first, 0), &filled(&next, 0)));
    assert!(Arc::ptr_eq(&filled(&first, 1), &filled(&next, 1)));
    let anew = Balancer::new_without(&config(&three_servers("")), &unfit, SelectKey([0; 16]));
    for cast in [0, 1] {
        assert_eq!(filled(&anew, cast), filled(&next, cast));
    }
}

#[test]
fn b7_if_all_are_unfit_there_is_no_server() {
    let mut unfit = Unfit::default();
    for server in 0..3 {
        unfit.insert(server, 0, Family::V6);
    }
    let next = balancer(&three_servers("")).successor_without(&config(&three_servers("")), &unfit);
    let [v4, v6] = casts();
    for option in [None, Some(R)] {
        assert_eq!(next.route(&v6.syn(443, option)), Err(DropReason::NoServer(443)));
        assert!(next.route(&v4.syn(443, option)).is_ok());
    }
}

/// A configuration whose first server is this machine, at a port of it; the others are not looked at.
fn here(port: u16, more: &str) -> Config {
    let text = format!(
        "role = \"balancer\"\nvips = [\"203.0.113.10\"]\n[health]\nsource_ports = \"20000-21000\"\n[[service]]\nname = \"web\"\n\
         redirect_port = 443\ncheck = {{ kind = \"tcp\", interval_ms = 20, timeout_ms = 5000, rise = 2, fall = 2 }}\n\
         [[server]]\nname = \"web-1\"\naddress = \"10.0.0.1\"\nports = {{ web = {port} }}\n{more}\n\
         [[server]]\nname = \"web-2\"\naddress = \"10.0.0.2\"\n"
    );
    let mut config = config(&text);
    // Nothing that other hosts could reach, so no file may say it.
    config.servers[0].addresses = vec!["127.0.0.1".parse().unwrap()];
    config
}

#[tokio::test]
async fn b7_the_monitor_follows_a_port_that_goes_and_comes() {
    // Bound all the time, so that nobody else gets the port; refused until it listens.
    let listener = TcpSocket::new_v4().unwrap();
    listener.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let port = listener.local_addr().unwrap().port();
    let config = here(port, "");
    let balancer = Balancer::new(&config, SelectKey([1; 16]));
    let mut monitor = Monitor::new();
    monitor.follow(&config, balancer.server_stats());
    assert_eq!(monitor.unfit(&config), Unfit::default(), "nothing known is healthy");
    let changed = timeout(PATIENCE, monitor.changed()).await.expect("it falls");
    assert!(changed.len() == 1 && !changed[0].healthy && changed[0].server == "web-1", "{changed:?}");
    assert!(changed[0].why.contains("Connection refused"), "{changed:?}");
    let mut unfit = Unfit::default();
    unfit.insert(0, 0, Family::V4);
    assert_eq!(monitor.unfit(&config), unfit);
    assert_eq!((monitor.report("web-1").len(), monitor.report("web-2").len()), (1, 0));

    // What is known stays where only something else changes, and where the check does.
    monitor.follow(&here(port, "weight = 2"), balancer.server_stats());
    assert_eq!(monitor.unfit(&config), unfit);
    let slower = here(port, "");
    let mut slower_check = slower.services[0].check.clone().unwrap();
    slower_check.rise = 3;
    let slower = Config {
        services: vec![crate::config::Service { check: Some(slower_check), ..slower.services[0].clone() }],
        ..slower
    };
    monitor.follow(&slower, balancer.server_stats());
    assert_eq!(monitor.unfit(&slower), unfit);

    let _listening = listener.listen(128).unwrap();
    let changed = timeout(PATIENCE, monitor.changed()).await.expect("it rises");
    assert!(changed.len() == 1 && changed[0].healthy, "{changed:?}");
    assert_eq!(monitor.unfit(&slower), Unfit::default());
    let counted = balancer.snapshot().servers["web-1"];
    assert_eq!(counted.health_changes, 2);
    assert!(counted.checks >= counted.failed_checks + 3 && counted.failed_checks >= 1, "{counted:?}");

    // A server that is gone is not looked at any more.
    let mut without = slower;
    without.servers.remove(0);
    monitor.follow(&without, balancer.server_stats());
    assert!(monitor.report("web-1").is_empty());
}
