//! Every mistake is refused with the line it is on.

use shunt_host::Source;

use super::*;

const GOOD: &str = r#"role = "balancer"
vips = ["203.0.113.10", "2001:db8::10"]
legacy = "hash"
forward = "network"
default_server = "web-2"

[[service]]
name = "web"
redirect_port = 443
policy = "round-robin"

[[server]]
name = "web-1"
address = ["10.0.0.11", "fd00::11"]
weight = 3
ports = { web = 41001 }

[[server]]
name = "web-2"
address = "10.0.0.12"
state = "drain"
ports = { web = 41002 }

[host]
exid = 0x1234
"#;

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(&Source::new("balancer.toml", text))
}

/// The error of the good file with `from` replaced by `to`.
fn mistake(from: &str, to: &str) -> ConfigError {
    assert!(GOOD.contains(from), "{from}");
    let text = GOOD.replacen(from, to, 1);
    parse(&text).expect_err(to)
}

#[test]
fn a_good_file_is_understood() {
    let config = parse(GOOD).unwrap();
    assert_eq!(config.vips.len(), 2);
    assert_eq!(config.services[0].policy, PolicyName::RoundRobin);
    assert_eq!((config.servers[0].weight, config.servers[1].weight), (3, 1));
    assert_eq!(config.servers[1].state, State::Drain);
    assert_eq!(config.default_server, Some(1));
    assert_eq!(config.host.exid, 0x1234);
    assert_eq!(config.path(), Path::new("balancer.toml"));
}

#[test]
fn a_balancer_without_servers_is_good() {
    parse("role = \"balancer\"\nvips = [\"203.0.113.10\"]\n").unwrap();
}

#[test]
fn each_mistake_is_refused_with_its_line() {
    for (from, to, line, message) in [
        ("role = \"balancer\"", "role = \"balancr\"", 1, "no role is named"),
        ("role = \"balancer\"", "role = \"client\"", 1, "of a client"),
        ("[\"203.0.113.10\", \"2001:db8::10\"]", "[]", 2, "VIPs are needed"),
        ("\"2001:db8::10\"", "\"203.0.113.10\"", 2, "listed twice"),
        ("\"2001:db8::10\"", "\"2001:db8::zz\"", 2, "invalid"),
        ("\"2001:db8::10\"", "\"ff02::1\"", 2, "cannot be reached"),
        ("legacy = \"hash\"", "legacy = \"random\"", 3, "unknown variant"),
        ("forward = \"network\"", "forward = \"geneve\"", 4, "unknown variant"),
        ("default_server = \"web-2\"", "default_server = \"web-3\"", 5, "no server named"),
        ("default_server = \"web-2\"", "legacy_server = \"web-2\"", 5, "only serves with"),
        ("default_server = \"web-2\"", "defaultserver = 2", 5, "unknown field"),
        (
            "legacy = \"hash\"\nforward = \"network\"\ndefault_server = \"web-2\"",
            "\nlegacy = \"default-server\"",
            4,
            "no default server",
        ),
        ("name = \"web\"", "name = \"we b\"", 8, "cannot name"),
        ("redirect_port = 443", "redirect_port = 0", 9, "port 0"),
        ("redirect_port = 443", "redirect_port = 66000", 9, "invalid value"),
        (
            "redirect_port = 443",
            "redirect_port = 443\n[[service]]\nname = \"web\"\nredirect_port = 80",
            11,
            "another service is named",
        ),
        (
            "redirect_port = 443",
            "redirect_port = 443\n[[service]]\nname = \"w\"\nredirect_port = 443",
            12,
            "\"web\"'s already",
        ),
        ("redirect_port = 443", "redirect_port = 443\nvips = [\"192.0.2.1\"]", 10, "none of the file's"),
        ("redirect_port = 443", "redirect_port = 443\nvips = []", 10, "needs a VIP"),
        ("policy = \"round-robin\"", "policy = \"robin\"", 10, "unknown variant"),
        ("name = \"web-1\"", "name = \"\"", 13, "cannot name"),
        ("[\"10.0.0.11\", \"fd00::11\"]", "\"10.0.0\"", 14, "no IP address"),
        ("[\"10.0.0.11\", \"fd00::11\"]", "[\"10.0.0.11\", \"10.0.0.13\"]", 14, "more than one IPv4"),
        ("[\"10.0.0.11\", \"fd00::11\"]", "[]", 14, "missing"),
        ("[\"10.0.0.11\", \"fd00::11\"]", "\"203.0.113.10\"", 14, "is a VIP"),
        ("[\"10.0.0.11\", \"fd00::11\"]", "\"127.0.0.1\"", 14, "cannot be reached"),
        ("address = [\"10.0.0.11\", \"fd00::11\"]\n", "", 13, "no `address`"),
        ("weight = 3", "weight = 0", 15, "a weight is between"),
        ("weight = 3", "weight = -1", 15, "invalid"),
        ("weight = 3", "device = \"eth1\"", 15, "only `forward = \"direct\"`"),
        ("weight = 3", "gateway = \"10.0.0.1\"", 15, "only `forward = \"direct\"`"),
        ("{ web = 41001 }", "{ mail = 41001 }", 16, "no service named \"mail\""),
        ("{ web = 41001 }", "{ web = 0 }", 16, "port 0"),
        ("name = \"web-2\"", "name = \"web-1\"", 19, "another server is named"),
        ("state = \"drain\"", "state = \"gone\"", 21, "unknown variant"),
        ("{ web = 41002 }", "{ web = 41001 }", 22, "the server \"web-1\"'s already"),
        ("exid = 0x1234", "exid = 70000", 25, "invalid"),
        ("exid = 0x1234", "mark = 0", 25, "mark 0"),
    ] {
        let error = mistake(from, to);
        assert_eq!(error.line(), Some(line), "{to}: {error}");
        assert!(error.message().contains(message), "{to}: {error}");
    }
}

#[test]
fn a_missing_role_and_missing_vips_are_the_files_mistakes() {
    let error = mistake("role = \"balancer\"\n", "");
    assert!(error.message().contains("add `role = \"balancer\"`"), "{error}");
    let error = mistake("vips = [\"203.0.113.10\", \"2001:db8::10\"]\n", "");
    assert!(error.message().contains("missing field `vips`"), "{error}");
}

#[test]
fn an_address_of_a_family_without_vip_is_refused() {
    let error = mistake(", \"2001:db8::10\"", "");
    assert_eq!((error.line(), error.message()), (Some(14), "fd00::11 is IPv6, but no VIP is"));
}

#[test]
fn one_port_for_two_services_of_a_server_is_refused() {
    let two = "redirect_port = 443\n[[service]]\nname = \"plain\"\nredirect_port = 80";
    let text = GOOD.replace("redirect_port = 443", two).replace("web = 41001", "web = 41001, plain = 41001");
    let error = parse(&text).unwrap_err();
    assert_eq!(error.line(), Some(19), "{error}");
    assert!(error.message().contains("another service of this server"), "{error}");
}

const TWO_VIPS: &str = r#"role = "balancer"
vips = ["203.0.113.10", "203.0.113.20"]
[[service]]
name = "a"
redirect_port = 443
vips = ["203.0.113.10"]
[[service]]
name = "b"
redirect_port = 444
vips = ["203.0.113.20"]
[[server]]
name = "s1"
address = "10.0.0.11"
ports.a = 41001
ports.b = 41002
"#;

#[test]
fn the_vip_of_an_answer_must_follow_from_the_source_port() {
    parse(TWO_VIPS).unwrap();
    // Both services on 443: answers of plain connections could be either's.
    let error = parse(&TWO_VIPS.replace("444", "443")).unwrap_err();
    assert_eq!(error.line(), Some(15), "{error}");
    assert!(
        error.message().starts_with("answers of 10.0.0.11 from port 443 could be 203.0.113.10's or"),
        "{error}"
    );
    // One service on two VIPs.
    let error = parse(&TWO_VIPS.replacen("vips = [\"203.0.113.10\"]", "", 1)).unwrap_err();
    assert_eq!(error.line(), Some(14), "{error}");
    // One server for each VIP may have the other's numbers.
    let apart = TWO_VIPS
        .replace("444", "443")
        .replace("ports.b = 41002", "[[server]]\nname = \"s2\"\naddress = \"10.0.0.12\"\nports.b = 41001");
    let config = parse(&apart).unwrap();
    // But a default server could meet plain segments of both.
    let error = parse(&apart.replacen('\n', "\ndefault_server = \"s2\"\n", 1)).unwrap_err();
    assert_eq!(error.line(), Some(19), "{error}");
    assert_eq!(config.ways_back().len(), 4);
    // In direct mode nothing has to follow.
    let direct = TWO_VIPS
        .replace("444", "443")
        .replacen('\n', "\nforward = \"direct\"\n", 1)
        .replace("address", "device = \"eth1\"\naddress");
    parse(&direct).unwrap();
}

#[test]
fn direct_mode_needs_a_device_for_each_server() {
    let direct = GOOD.replace("\"network\"", "\"direct\"");
    let error = parse(&direct).unwrap_err();
    assert_eq!(error.line(), Some(13), "{error}");
    assert!(error.message().contains("has no `device`"), "{error}");
    let with = |device: &str| {
        let text =
            direct.replace("name = \"web-1\"", &format!("name = \"web-1\"\ndevice = \"{device}\"")).replace(
                "name = \"web-2\"\naddress = \"10.0.0.12\"",
                "name = \"web-2\"\ndevice = \"eth2\"\ngateway = \"10.2.0.1\"",
            );
        parse(&text)
    };
    let config = with("eth1").unwrap();
    assert_eq!(config.servers[0].next_hop(Family::V6), "fd00::11".parse().ok());
    assert_eq!(config.servers[1].next_hop(Family::V4), "10.2.0.1".parse().ok());
    assert!(config.servers[1].serves(Family::V6));
    assert_eq!(config.servers[1].next_hop(Family::V6), None);
    assert_eq!(with("sixteen-letters-").unwrap_err().line(), Some(14));
    assert_eq!(with("../eth").unwrap_err().line(), Some(14));
}

const PACKETS: &str = r#"role = "balancer"
vips = ["203.0.113.10", "2001:db8::10"]
[[service]]
name = "dns"
redirect_port = 53
protocols = ["tcp", "udp"]
udp_policy = "round-robin"
[[server]]
name = "d1"
address = ["10.0.0.11", "fd00::11"]
ports = { dns = 41001 }
[[server]]
name = "d2"
address = "10.0.0.12"
ports = { dns = 41002 }
[[protocol]]
number = 47
to = { server = "d2" }
[icmp]
default = "drop"
echo = "answer"
v4 = { 13 = "balance" }
[limits]
fragments = 100
answers_per_second = 5
[timers]
fragments_s = 60
"#;

#[test]
fn o12_and_i4_a_file_says_where_datagrams_and_packets_without_ports_go() {
    let config = parse(PACKETS).unwrap();
    let service = &config.services[0];
    assert_eq!(service.protocols, [Transport::Tcp, Transport::Udp]);
    assert_eq!(service.udp_policy, UdpPolicy::RoundRobin);
    assert_eq!(config.protocols, BTreeMap::from([(47, Portless::Server(1))]));
    assert_eq!(config.icmp.of(Family::V4, 8), Portless::Answer);
    assert_eq!(config.icmp.of(Family::V6, 128), Portless::Answer);
    assert_eq!(config.icmp.of(Family::V4, 13), Portless::Balance);
    assert_eq!(config.icmp.of(Family::V6, 13), Portless::Drop);
    let Limits { fragments, fragment_lifetime, answers_per_second } = config.limits;
    assert_eq!((fragments, fragment_lifetime.as_secs(), answers_per_second), (100, 60, 5));
    // Two ports by two protocols, d1 in both families; GRE of d2; ICMP (IPv4 alone is balanced, but answers tell no
    // type apart) of both.
    let ways = config.ways_back();
    let of = |protocol| ways.iter().filter(|way| way.protocol == protocol).count();
    assert_eq!([6, 17, 47, 1, 58].map(of), [6, 6, 1, 2, 1]);
    // As before without any of it.
    let plain = parse(GOOD).unwrap();
    assert_eq!(plain.services[0].protocols, [Transport::Tcp]);
    assert_eq!(plain.limits, Limits::default());
    assert_eq!(plain.icmp.of(Family::V4, 8), Portless::DefaultServer);
    assert!(plain.ways_back().iter().all(|way| way.protocol == 6));
}

#[test]
fn mistakes_about_packets_without_ports_are_refused_with_their_line() {
    for (from, to, line, words) in [
        ("[\"tcp\", \"udp\"]", "[]", 6, "a service is reached by"),
        ("[\"tcp\", \"udp\"]", "[\"udp\", \"udp\"]", 6, "a service is reached by"),
        ("[\"tcp\", \"udp\"]", "[\"sctp\"]", 6, "unknown variant"),
        ("[\"tcp\", \"udp\"]", "[\"tcp\"]", 7, "not reached by UDP"),
        ("number = 47", "number = 17", 17, "TCP and UDP are services"),
        ("number = 47", "number = 58", 17, "[icmp]"),
        ("number = 47", "number = 44", 17, "extension header"),
        ("server = \"d2\"", "server = \"d3\"", 18, "no server named \"d3\""),
        ("to = { server = \"d2\" }", "to = \"answer\"", 18, "only echo requests"),
        ("to = { server = \"d2\" }", "to = \"d2\"", 18, "{ server = \"NAME\" }"),
        ("default = \"drop\"", "default = \"answer\"", 20, "only echo requests"),
        ("13 = \"balance\"", "3 = \"balance\"", 22, "follows the packet that it quotes"),
        ("13 = \"balance\"", "echo = \"balance\"", 22, "no ICMP type"),
        ("fragments = 100", "fragments = 0", 24, "between 1 and"),
        ("fragments_s = 60", "fragments_s = 0", 27, "between 1 and"),
    ] {
        assert!(PACKETS.contains(from), "{from}");
        let error = parse(&PACKETS.replacen(from, to, 1)).unwrap_err();
        assert_eq!(error.line(), Some(line), "{to}: {error}");
        assert!(error.message().contains(words), "{to}: {error}");
    }
}

#[test]
fn the_vip_of_an_answer_without_ports_must_follow_from_its_server() {
    let two = PACKETS.replace("vips = [\"203.0.113.10\", ", "vips = [\"203.0.113.10\", \"203.0.113.20\", ");
    let one_each =
        two.replace("redirect_port = 53", "redirect_port = 53\nvips = [\"203.0.113.10\", \"2001:db8::10\"]");
    let error = parse(&one_each).unwrap_err();
    assert!(error.message().contains("answers of 10.0.0.12 by protocol 47 could be"), "{error}");
    assert_eq!(error.line(), Some(14), "{error}");
    parse(&one_each.replace("to = { server = \"d2\" }", "to = \"balance\"")).unwrap();
}

#[test]
fn one_port_by_two_protocols_can_be_two_services() {
    let text = GOOD
        .replace(
            "policy = \"round-robin\"",
            "[[service]]\nname = \"quic\"\nprotocols = [\"udp\"]\nredirect_port = 443",
        )
        .replace("web = 41001", "web = 41001, quic = 41001");
    let config = parse(&text).unwrap();
    assert_eq!(config.servers[0].ports.len(), 2);
    let error = parse(&text.replace("protocols = [\"udp\"]", "protocols = [\"tcp\", \"udp\"]")).unwrap_err();
    assert!(error.message().contains("is the service \"web\"'s already"), "{error}");
}

const TRAFFIC: &str = r#"role = "balancer"
vips = ["203.0.113.10"]
load_max_age_s = 20
packets_half_life_s = 5
admin_ports = [22, 2222]
[[service]]
name = "web"
redirect_port = 443
policy = "payload"
otherwise = "elevator"
slow_start_s = 30
mark_dscp = 26
limit = { packets_per_s = 1000, burst_ms = 50 }
[[service.pattern]]
class = "gold"
at = 4
hex = "de:ad be ef"
[[server]]
name = "web-1"
address = "10.0.0.11"
classes = ["gold"]
ports = { web = 41001 }
[[class]]
name = "gold"
dscp = [46, 34]
fallback = "drop"
mark_dscp = 0
[statistics]
connections = true
flows = 1000
timeout_s = 60
"#;

#[test]
fn traffic_is_understood() {
    let config = parse(TRAFFIC).unwrap();
    let traffic = &config.services[0].traffic;
    assert_eq!((config.services[0].policy, traffic.otherwise), (PolicyName::Payload, PolicyName::Elevator));
    assert_eq!(traffic.patterns, [Pattern { at: 4, bytes: vec![0xde, 0xad, 0xbe, 0xef], class: 0 }]);
    assert_eq!((traffic.slow_start, traffic.mark_dscp), (Duration::from_secs(30), Some(26)));
    let limit = traffic.limit.unwrap();
    assert_eq!((limit.packets_per_s, limit.bytes_per_s), (Some(1000), None));
    assert_eq!(limit.burst, Duration::from_millis(50));
    assert_eq!((config.classes[0].fallback, config.classes[0].mark_dscp), (Fallback::Drop, Some(0)));
    assert_eq!(config.servers[0].classes, [0]);
    assert_eq!(
        (config.load_max_age, config.packets_half_life),
        (Duration::from_secs(20), Duration::from_secs(5))
    );
    assert_eq!(config.admin_ports, [22, 2222]);
    assert_eq!(config.statistics, Some(Statistics { flows: 1000, timeout: Duration::from_secs(60) }));
    let plain = parse(GOOD).unwrap();
    assert_eq!((plain.load_max_age.as_secs(), plain.packets_half_life.as_secs()), (30, 10));
    assert_eq!((plain.statistics, plain.services[0].traffic.limit), (None, None));
}

#[test]
fn each_mistake_about_traffic_is_refused_with_its_line() {
    for (from, to, line, message) in [
        ("load_max_age_s = 20", "load_max_age_s = 0", 3, "between 1 and 86400 seconds"),
        ("packets_half_life_s = 5", "packets_half_life_s = 100000", 4, "between 1 and 86400 seconds"),
        ("[22, 2222]", "[22, 22]", 5, "listed twice"),
        ("[22, 2222]", "[0]", 5, "port 0"),
        ("[22, 2222]", "[443]", 5, "redirect port of the service \"web\""),
        ("[22, 2222]", "[41001]", 5, "service port of the server \"web-1\""),
        ("policy = \"payload\"", "policy = \"random\"", 15, "only `policy = \"payload\"`"),
        ("policy = \"payload\"", "policy = \"least\"", 9, "unknown variant"),
        ("otherwise = \"elevator\"", "otherwise = \"payload\"", 10, "another policy is needed"),
        ("slow_start_s = 30", "slow_start_s = 90000", 11, "between 1 and 86400 seconds"),
        ("mark_dscp = 26", "mark_dscp = 64", 12, "between 0 and 63"),
        ("packets_per_s = 1000", "packets_per_s = 0", 13, "leave it out for none"),
        ("packets_per_s = 1000", "packets = 1000", 13, "unknown field"),
        ("burst_ms = 50", "burst_ms = 0", 13, "burst is between"),
        ("class = \"gold\"", "class = \"glod\"", 15, "add `[[class]]`"),
        ("at = 4", "at = 2000", 16, "at the latest"),
        ("at = 4", "text = \"GET\"", 17, "not both"),
        ("de:ad be ef", "dead bee", 17, "two hexadecimal digits"),
        ("de:ad be ef", "xy", 17, "two hexadecimal digits"),
        ("de:ad be ef", "", 17, "between 1 and 1024 bytes"),
        ("hex = \"de:ad be ef\"", "", 15, "`text` or `hex`"),
        ("classes = [\"gold\"]", "classes = [\"gold\", \"gold\"]", 21, "listed twice"),
        ("classes = [\"gold\"]", "classes = [\"silver\"]", 21, "no class named \"silver\""),
        ("name = \"gold\"", "name = \"g ld\"", 24, "cannot name a class"),
        ("[46, 34]", "[46, 64]", 25, "between 0 and 63"),
        ("[46, 34]", "[46, 46]", 25, "the class \"gold\"'s already"),
        ("fallback = \"drop\"", "fallback = \"none\"", 26, "unknown variant"),
        ("flows = 1000", "flows = 0", 30, "flows can be measured"),
        ("timeout_s = 60", "timeout_s = 0", 31, "between 1 and 86400 seconds"),
        ("connections = true", "connection = true", 29, "unknown field"),
    ] {
        assert!(TRAFFIC.contains(from), "{from}");
        let error = parse(&TRAFFIC.replacen(from, to, 1)).expect_err(to);
        assert_eq!(error.line(), Some(line), "{to}: {error}");
        assert!(error.message().contains(message), "{to}: {error}");
    }
    let pattern = "[[service.pattern]]\nclass = \"gold\"\nat = 4\nhex = \"de:ad be ef\"\n";
    let error = parse(&TRAFFIC.replace(pattern, "")).unwrap_err();
    assert_eq!(error.line(), Some(9), "{error}");
    assert!(error.message().contains("needs patterns"), "{error}");
    let error = parse(&GOOD.replace("policy = \"round-robin\"", "otherwise = \"random\"")).unwrap_err();
    assert_eq!(error.line(), Some(10), "{error}");
}

#[test]
fn checks_take_their_own_keys_then_those_of_health_then_the_defaults() {
    assert_eq!(parse(GOOD).unwrap().services[0].check, None);
    let text = GOOD.replace(
        "policy = \"round-robin\"",
        "policy = \"round-robin\"\ncheck = { kind = \"http\", path = \"/up?x=1\", fall = 5 }\n\
         [[service]]\nname = \"mail\"\nredirect_port = 25\n\
         [[service]]\nname = \"raw\"\nredirect_port = 26\ncheck = { kind = \"none\" }",
    ) + "[health]\nkind = \"tcp\"\ninterval_ms = 500\nfall = 4\nsource_ports = \"20000-20001\"\n";
    let config = parse(&text).unwrap();
    let [web, mail, raw] = &config.services[..] else { panic!() };
    let check = web.check.as_ref().unwrap();
    assert_eq!(
        (check.kind, check.path.as_str(), &check.expect[..]),
        (CheckKind::Http, "/up?x=1", &[200][..])
    );
    assert_eq!((check.interval.as_millis(), check.timeout.as_millis()), (500, 1000));
    assert_eq!((check.rise, check.fall), (2, 5));
    assert_eq!(mail.check.as_ref().map(|check| (check.kind, check.fall)), Some((CheckKind::Tcp, 4)));
    assert_eq!(raw.check, None);
    assert_eq!((config.check_ports.first(), config.check_ports.last()), (20_000, 20_001));
}

#[test]
fn mistakes_about_health_and_control_are_refused_with_their_line() {
    let policy = "policy = \"round-robin\"";
    for (to, line, message) in [
        ("check = {}", 10, "a check has a kind"),
        ("check = { kind = \"icmp\" }", 10, "unknown variant"),
        ("check = { kind = \"http\", path = \"up\" }", 10, "no path of a URL"),
        ("check = { kind = \"http\", expect = [20] }", 10, "HTTP statuses"),
        ("check = { kind = \"http\", host = \"a\\nb\" }", 10, "Host header"),
        ("check = { kind = \"tcp\", rise = 0 }", 10, "between 1 and 100"),
        ("check = { kind = \"tcp\", interval_ms = 1 }", 10, "between 10 and"),
        ("check = { kind = \"tcp\", source_ports = \"1-2\" }", 10, "belongs into [health]"),
    ] {
        let error = mistake(policy, to);
        assert_eq!(error.line(), Some(line), "{to}: {error}");
        assert!(error.message().contains(message), "{to}: {error}");
    }
    for (from, to, line, message) in [
        ("[host]", "[health]\nsource_ports = \"1-2\"\n[host]", 25, "ports from 1024 on"),
        ("[host]", "[control]\nsocket = \"x\"\n[host]", 25, "whole path"),
        ("exid = 0x1234", "server_mark_mask = 0x1ff", 25, "one run of at least 10 bits"),
        ("exid = 0x1234", "server_mark_mask = 0xbff0", 25, "one run of at least 10 bits"),
        ("exid = 0x1234", "server_mark_mask = 0xfff00000", 25, "has bits of mark_mask"),
        ("exid = 0x1234", "mark = 0x10000\nmark_mask = 0xff0000", 26, "has bits of mark_mask"),
        ("exid = 0x1234", "queues = 0", 25, "1 to 64 queues"),
        ("exid = 0x1234", "queues = 65", 25, "1 to 64 queues"),
        ("weight = 3", "agent = \"10.0.0.11\"", 15, "invalid"),
        ("weight = 3", "agent = \"10.0.0.11:0\"", 15, "port 0"),
        ("weight = 3", "agent = \"0.0.0.0:9000\"", 15, "cannot be reached"),
    ] {
        let error = mistake(from, to);
        assert_eq!(error.line(), Some(line), "{to}: {error}");
        assert!(error.message().contains(message), "{to}: {error}");
    }
}

#[test]
fn o19_servers_on_a_shared_link_need_an_address_there_and_the_link() {
    let datalink = GOOD.replace("\"network\"", "\"datalink\"\nlink = \"eth1\"");
    let config = parse(&datalink).unwrap();
    let devices: Vec<_> = config.servers.iter().map(|server| server.device.as_deref()).collect();
    assert_eq!(devices, [Some("eth1"), Some("eth1")]);
    assert_eq!(config.servers[0].next_hop(Family::V6), "fd00::11".parse().ok());
    assert!(config.servers[0].serves(Family::V6) && !config.servers[1].serves(Family::V6));
    let own = datalink.replace("state = \"drain\"", "device = \"eth2\"");
    assert_eq!(parse(&own).unwrap().servers[1].device.as_deref(), Some("eth2"));
    for (from, to, line, told) in [
        ("link = \"eth1\"\n", "", 13, "no link leads to the server \"web-1\""),
        ("link = \"eth1\"", "link = \"eth/1\"", 5, "interface's name"),
        ("state = \"drain\"", "device = \"\"", 22, "interface's name"),
        ("address = \"10.0.0.12\"\n", "", 20, "no `address`"),
        ("state = \"drain\"", "gateway = \"10.0.0.1\"", 22, "on the link itself"),
        ("\"datalink\"", "\"direct\"", 5, "only `forward = \"datalink\"`"),
        ("policy = ", "check = { kind = \"tcp\" }\npolicy = ", 11, "only looked at with"),
    ] {
        assert!(datalink.contains(from), "{from}");
        let error = parse(&datalink.replacen(from, to, 1)).unwrap_err();
        assert!(error.message().contains(told), "{error}");
        assert_eq!(error.line(), Some(line), "{error}");
    }
}

#[test]
fn o21_a_server_may_own_several_ports_and_ranges_of_them() {
    let with = |ports: &str| parse(&GOOD.replace("{ web = 41001 }", &format!("{{ web = {ports} }}")));
    let ranges = |ports: &str| -> Vec<String> {
        with(ports).unwrap().servers[0].ports_of(0).map(|range| range.to_string()).collect()
    };
    assert_eq!(ranges("41001"), ["41001"]);
    assert_eq!(ranges("\"41001\""), ["41001"]);
    assert_eq!(ranges("\"41010-41019\""), ["41010-41019"]);
    assert_eq!(ranges("[41001, \"41010-41019\", 41003]"), ["41001", "41010-41019", "41003"]);
    assert_eq!(with("41001").unwrap().servers[0].port(0), Some(41001));
    assert_eq!(with("[41001, 41003]").unwrap().servers[0].port(0), None);
    assert_eq!(with("\"41010-41011\"").unwrap().servers[0].port(0), None);
    for (ports, told) in [
        ("[]", "a service port is missing"),
        ("[41001, 0]", "port 0"),
        ("\"0-7\"", "port 0"),
        ("70000", "invalid value"),
        ("-1", "invalid value"),
        ("\"41019-41010\"", "a range of ports as"),
        ("\"41010-\"", "a range of ports as"),
        ("true", "a range of ports as"),
        ("[41001, 41001]", "service port 41001 of 203.0.113.10 stands for another service of this server"),
        ("[\"41010-41019\", \"41000-41010\"]", "service port 41010 of"),
    ] {
        let error = with(ports).unwrap_err();
        assert!(error.message().contains(told), "{ports}: {error}");
        assert_eq!(error.line(), Some(16), "{ports}: {error}");
    }
    let answering = GOOD
        .replace("{ web = 41001 }", "{ web = [41001, 41003] }")
        .replace("policy = ", "answer = \"balancer\"\npolicy = ");
    let error = parse(&answering).unwrap_err();
    assert!(error.message().contains("only the balancer below knows"), "{error}");
    // The second server's port lies within the first one's.
    let error = with("\"41000-41009\"").unwrap_err();
    assert!(error.message().contains("41002 of 203.0.113.10 is the server \"web-1\"'s already"), "{error}");
    assert_eq!(error.line(), Some(22), "{error}");
    let deep = GOOD.replace("legacy = \"hash\"", "level = 4");
    let error = parse(&deep).unwrap_err();
    assert!(error.line() == Some(3) && error.message().contains("levels 0 to 3"), "{error}");
    assert_eq!(parse(&deep.replace("level = 4", "level = 3")).unwrap().level, 3);
}

#[test]
fn tunnels_end_at_addresses_of_any_family_and_follow_the_hosts_routes() {
    let gue = GOOD.replace("\"network\"", "\"gue\"").replace(", \"2001:db8::10\"]", "]");
    let config = parse(&gue).unwrap();
    let server = &config.servers[0];
    assert_eq!((server.ends.len(), server.addresses.len(), config.gue_port), (2, 0, 6080));
    assert!(server.serves(Family::V4) && server.serves(Family::V6) && config.sends(Family::V6));
    assert_eq!(parse(&format!("{gue}[gue]\nport = 6081\n")).unwrap().gue_port, 6081);
    for (text, line, told) in [
        (gue.replace("weight = 3", "device = \"eth1\""), 15, "follow the host's routes"),
        (gue.replace("address = \"10.0.0.12\"\n", ""), 19, "no `address`"),
        (format!("{gue}[gue]\nport = 0\n"), 27, "port 0"),
        (format!("{GOOD}[gue]\nport = 1\n"), 26, "only `forward = \"gue\"`"),
        (gue.replace("policy = ", "check = { kind = \"tcp\" }\npolicy = "), 10, "only looked at with"),
    ] {
        let error = parse(&text).unwrap_err();
        assert!(error.message().contains(told), "{error}");
        assert_eq!(error.line(), Some(line), "{error}");
    }
}

#[test]
fn in_direct_mode_health_is_not_looked_at_and_the_file_is_told_so() {
    let direct = "role = \"balancer\"\nvips = [\"203.0.113.10\"]\nforward = \"direct\"\n[[service]]\nname = \"web\"\n\
                  redirect_port = 443\n";
    parse(direct).unwrap();
    let own = parse(&format!("{direct}check = {{ kind = \"tcp\" }}\n")).unwrap_err();
    assert_eq!(own.line(), Some(7), "{own}");
    assert!(own.message().contains("only looked at with `forward = \"network\"`"), "{own}");
    let all = parse(&format!("{direct}[health]\nkind = \"tcp\"\n")).unwrap_err();
    assert_eq!(all.line(), Some(8), "{all}");
}
