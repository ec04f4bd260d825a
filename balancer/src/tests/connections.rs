//! Connection statistics from segments.

use std::net::SocketAddr;
use std::time::Duration;

use shunt_host::Source;
use shunt_stack::time::Instant;
use shunt_stack::wire::{Packet, SeqNumber, TcpFlags};

use super::packets::segment;
use super::{Cast, R, casts, three_servers};
use crate::connections::Connections;
use crate::{Balancer, Config, PairSnapshot, SelectKey};

const FIN: TcpFlags = TcpFlags(TcpFlags::FIN.0 | TcpFlags::ACK.0);
const OFF: &str = "[statistics]\nconnections = false\n";

struct Watched {
    balancer: Balancer,
    connections: Connections,
}

impl Watched {
    fn new(statistics: &str) -> Watched {
        let config = config(statistics);
        let balancer = Balancer::new(&config, SelectKey([1; 16]));
        Watched { balancer, connections: Connections::new(&config).unwrap() }
    }

    /// As the driver does.
    fn see(&self, seconds: u64, packet: &Packet) {
        let route = self.balancer.admit(packet).unwrap();
        self.connections.observe(route, packet, Instant::ZERO + Duration::from_secs(seconds));
    }

    fn pair(&self, seconds: u64, server: &str) -> PairSnapshot {
        self.connections.snapshot(Instant::ZERO + Duration::from_secs(seconds)).servers[server]["web"]
    }
}

fn config(statistics: &str) -> Config {
    let text = format!("{}{statistics}", three_servers(""));
    Config::parse(&Source::new("test.toml", text)).unwrap_or_else(|error| panic!("{error}"))
}

fn from(cast: Cast, n: u16) -> SocketAddr {
    SocketAddr::new(cast.client, 20_000 + n)
}

fn to(cast: Cast, n: u16, port: u16, flags: TcpFlags) -> Packet {
    segment(from(cast, n), cast.vip(port), flags, SeqNumber(1))
}

fn back(cast: Cast, n: u16, server: usize, port: u16, flags: TcpFlags) -> Packet {
    segment(SocketAddr::new(cast.servers[server], port), from(cast, n), flags, SeqNumber(1))
}

const ON: &str = "[statistics]\nconnections = true\n";

#[test]
fn o25_connections_are_counted_from_their_segments() {
    assert!(Connections::new(&config("")).is_none());
    assert!(Connections::new(&config(OFF)).is_none());
    let watched = Watched::new(ON);
    for cast in casts() {
        for n in 0..10 {
            watched.see(100, &to(cast, n, 41001, TcpFlags::SYN));
            watched.see(101, &to(cast, n, 41001, TcpFlags::SYN));
            watched.see(101, &back(cast, n, 0, 41001, TcpFlags::SYN | TcpFlags::ACK));
            watched.see(102, &to(cast, n, 41001, TcpFlags::ACK));
        }
        for n in 0..4 {
            watched.see(103, &back(cast, n, 0, 41001, FIN));
            watched.see(103, &to(cast, n, 41001, FIN));
            watched.see(104, &to(cast, n, 41001, FIN));
            watched.see(104, &back(cast, n, 0, 41001, TcpFlags::RST));
        }
        watched.see(150, &back(cast, 4, 0, 41001, TcpFlags::RST | TcpFlags::ACK));
        watched.see(150, &to(cast, 5, 41001, TcpFlags::RST));
    }
    let pair = watched.pair(200, "web-1");
    let wanted =
        PairSnapshot { opened: 20, closed: 8, reset: 4, open_estimate: 8, ..PairSnapshot::default() };
    assert_eq!(pair, wanted);
    assert_eq!(watched.pair(200, "web-2"), PairSnapshot::default());
    // The same port again is another connection.
    watched.see(201, &to(casts()[0], 0, 41001, TcpFlags::SYN));
    assert_eq!(watched.pair(202, "web-1").opened, 21);
    // What is never closed is forgotten some time.
    let late = watched.pair(201 + 3601, "web-1");
    assert_eq!((late.expired, late.open_estimate), (9, 0));
}

#[test]
fn o25_a_redirected_connect_is_one_connection() {
    let watched = Watched::new(ON);
    let cast = casts()[0];
    let mut opening = to(cast, 1, 443, TcpFlags::SYN);
    opening.insert_redirect(super::EXID, &R, 1500).unwrap();
    watched.see(1, &opening);
    let selected = watched.balancer.route(&opening).unwrap();
    let crate::Route::ToServer { server, .. } = selected else { panic!("{selected:?}") };
    let port = 41001 + server.index() as u16;
    watched.see(1, &to(cast, 1, port, TcpFlags::SYN));
    watched.see(9, &to(cast, 1, port, FIN));
    let pair = watched.pair(10, &format!("web-{}", server.index() + 1));
    assert_eq!((pair.opened, pair.closed, pair.open_estimate), (1, 1, 0));
}

#[test]
fn o25_a_client_port_used_for_two_ports_of_the_vip_is_two_connections() {
    let watched = Watched::new(ON);
    let cast = casts()[0];
    let at = |port, isn| segment(from(cast, 1), cast.vip(port), TcpFlags::SYN, SeqNumber(isn));
    let plain = watched.balancer.route(&at(443, 5)).unwrap();
    let crate::Route::ToServer { server, .. } = plain else { panic!("{plain:?}") };
    let (name, own) = (format!("web-{}", server.index() + 1), 41001 + server.index() as u16);
    watched.see(1, &at(443, 5));
    watched.see(1, &at(own, 6));
    watched.see(2, &at(own, 6));
    assert_eq!((watched.pair(3, &name).opened, watched.pair(3, &name).open_estimate), (2, 2));
    watched.see(4, &to(cast, 1, 443, FIN));
    watched.see(4, &to(cast, 1, own, FIN));
    watched.see(5, &to(cast, 1, own, FIN));
    assert_eq!((watched.pair(6, &name).closed, watched.pair(6, &name).open_estimate), (2, 0));
}

#[test]
fn o25_the_histogram_of_durations_follows_prometheus() {
    let watched = Watched::new(ON);
    let cast = casts()[1];
    for (n, seconds) in [0, 1, 3, 3, 100, 1000, 3000].into_iter().enumerate() {
        watched.see(10, &to(cast, n as u16, 41002, TcpFlags::SYN));
        watched.see(10 + seconds, &to(cast, n as u16, 41002, FIN));
    }
    let snapshot = watched.connections.snapshot(Instant::ZERO);
    let shown = snapshot.to_string();
    for line in [
        "# TYPE shunt_balancer_connection_duration_seconds histogram",
        "shunt_balancer_connection_duration_seconds_bucket{service=\"web\",le=\"0.01\"} 1",
        "shunt_balancer_connection_duration_seconds_bucket{service=\"web\",le=\"1\"} 2",
        "shunt_balancer_connection_duration_seconds_bucket{service=\"web\",le=\"5\"} 4",
        "shunt_balancer_connection_duration_seconds_bucket{service=\"web\",le=\"120\"} 5",
        "shunt_balancer_connection_duration_seconds_bucket{service=\"web\",le=\"3600\"} 7",
        "shunt_balancer_connection_duration_seconds_bucket{service=\"web\",le=\"+Inf\"} 7",
        "shunt_balancer_connection_duration_seconds_sum{service=\"web\"} 4107",
        "shunt_balancer_connection_duration_seconds_count{service=\"web\"} 7",
        "shunt_balancer_connections_closed_total{server=\"web-2\",service=\"web\"} 7",
    ] {
        assert!(shown.lines().any(|shown| shown == line), "{line}\n{shown}");
    }
    let mut whole = watched.balancer.snapshot();
    assert!(serde_json::to_value(&whole).unwrap().get("connections").is_none());
    whole.connections = Some(snapshot);
    let json = serde_json::to_value(&whole).unwrap();
    assert_eq!(json["connections"]["servers"]["web-2"]["web"]["opened"], 7);
    assert_eq!(json["connections"]["durations"]["web"]["buckets"][8]["le"], "+Inf");
    assert!(whole.to_string().ends_with(&shown));
}

#[test]
fn o25_more_flows_than_there_is_room_for_are_estimated() {
    let watched = Watched::new("[statistics]\nconnections = true\nflows = 400\ntimeout_s = 60\n");
    let cast = casts()[0];
    for n in 0..4000 {
        watched.see(1, &to(cast, n, 41001, TcpFlags::SYN));
    }
    let pair = watched.pair(2, "web-1");
    assert_eq!(pair.opened, 4000);
    assert!(pair.unmeasured >= 3600, "{pair:?}");
    assert_eq!(pair.open_estimate, 4000);
    for n in (0..4000).step_by(2) {
        watched.see(3, &to(cast, n, 41001, FIN));
    }
    let pair = watched.pair(4, "web-1");
    assert_eq!(pair.closed, 2000);
    assert!(pair.open_estimate.abs_diff(2000) < 600, "{pair:?}");
}

#[test]
fn o25_a_reload_keeps_counts_and_flows_by_name() {
    let watched = Watched::new(ON);
    let cast = casts()[0];
    for n in 0..20 {
        watched.see(1, &to(cast, n, 41003, TcpFlags::SYN));
    }
    let text = three_servers("").replacen(
        "[[server]]\nname = \"web-1\"\naddress = [\"10.0.0.1\", \"fd00::1\"]\nports = { web = 41001 }\n",
        "",
        1,
    );
    let config = Config::parse(&Source::new("test.toml", text + ON)).unwrap();
    let next = Watched {
        balancer: watched.balancer.successor(&config),
        connections: Connections::successor(Some(&watched.connections), &config).unwrap(),
    };
    assert_eq!((next.pair(2, "web-3").opened, next.pair(2, "web-3").open_estimate), (20, 20));
    for n in 0..5 {
        next.see(3, &to(cast, n, 41003, FIN));
    }
    let pair = next.pair(4, "web-3");
    assert_eq!((pair.closed, pair.open_estimate), (5, 15));
    assert_eq!(next.connections.snapshot(Instant::ZERO).durations["web"].count, 5);
    assert!(!next.connections.snapshot(Instant::ZERO).servers.contains_key("web-1"));
}
