use super::*;

const GOOD: &str = r#"role = "server"
interface = "eth0"
addresses = ["203.0.113.10", "2001:db8::10"]

[[service]]
name = "web"
redirect_port = 443
service_port = 41001

[[service]]
name = "db"
redirect_port = 5432
service_port = 41002
"#;

fn config(text: &str) -> Result<Config, ConfigError> {
    Config::from_source(&Source::new("server.toml", text))
}

#[test]
fn a_small_file_means_the_defaults_of_the_protocol() {
    let config = config(GOOD).unwrap();
    assert_eq!((config.divert, config.notrack), (DivertMode::Nft, true));
    assert_eq!((config.half_open_limit, config.half_open_lifetime), (65_536, Duration::from_secs(64)));
    assert_eq!((config.max_hops, config.listener_interval), (3, Duration::from_secs(1)));
    let moving = (config.moves, config.move_timeout, config.move_silence);
    assert_eq!(moving, (256, Duration::from_secs(30), Silence::GiveUp));
    assert_eq!(config.host, HostOptions::defaults(shunt_host::Role::Server));
    let ports = config.service_ports();
    assert_eq!(ports.len(), 4);
    assert!(ports.contains(&ServicePorts {
        address: "2001:db8::10".parse().unwrap(),
        redirect_port: 443,
        service_port: 41001
    }));
}

#[test]
fn every_key_is_read() {
    let text = GOOD.replace(
        "\n\n[[service]]\nname = \"web\"",
        concat!(
            "\ndivert = \"all\"\nnotrack = false\n",
            "[limits]\nhalf_open = 100\nhops = 2\nmoves = 7\n",
            "[timers]\nhalf_open_s = 10\nlisteners_s = 5\nmove_s = 3\nmove_reset_s = 9\n",
            "[control]\nenabled = false\n[status]\nlisten = \"[::]:9000\"\n",
            "[decapsulate]\nport = 6081\nfrom = [\"10.2.0.2\", \"fd00:2::/64\"]\n",
            "[host]\nexid = 0x1111\n[[service]]\nname = \"web\"",
        ),
    );
    let config = config(&text).unwrap();
    assert_eq!((config.divert, config.notrack, config.half_open_limit), (DivertMode::All, false, 100));
    assert_eq!((config.half_open_lifetime, config.max_hops), (Duration::from_secs(10), 2));
    let silence = Silence::ResetAfter(Duration::from_secs(9));
    assert_eq!(
        (config.moves, config.move_timeout, config.move_silence),
        (7, Duration::from_secs(3), silence)
    );
    assert_eq!((config.control.enabled, config.status), (false, "[::]:9000".parse().ok()));
    let from = vec!["10.2.0.2".parse().unwrap(), "fd00:2::/64".parse().unwrap()];
    assert_eq!(config.decapsulate, Some(crate::Decapsulate { port: 6081, from }));
    assert_eq!((config.listener_interval, config.host.exid), (Duration::from_secs(5), 0x1111));
}

#[test]
fn mistakes_are_refused_with_their_line() {
    for (from, to, line, message) in [
        ("role = \"server\"", "role = \"client\"", 1, "of a client, not of a server"),
        ("role = \"server\"", "role = \"waiter\"", 1, "no role is named"),
        ("\"eth0\"", "\"\"", 2, "interface's name"),
        ("\"eth0\"", "\"an-interface-too-long\"", 2, "interface's name"),
        ("\"eth0\"", "\"lo\"", 2, "loopback"),
        ("\"203.0.113.10\", \"2001:db8::10\"", "", 3, "between 1 and"),
        ("2001:db8::10", "203.0.113.10", 3, "listed twice"),
        ("2001:db8::10", "::1", 3, "cannot be reached"),
        ("2001:db8::10", "::ffff:1.2.3.4", 3, "cannot be reached"),
        ("203.0.113.10", "203.0.113", 3, "invalid IP address"),
        ("name = \"web\"", "name = \"\"", 6, "cannot name a service"),
        ("name = \"db\"", "name = \"web\"", 11, "another service"),
        ("redirect_port = 443", "redirect_port = 0", 7, "port 0"),
        ("redirect_port = 443", "redirect_port = 70000", 7, "invalid value"),
        ("service_port = 41001", "service_port = 443", 8, "cannot be both"),
        ("service_port = 41001", "port = 443", 8, "unknown field"),
        ("redirect_port = 5432", "redirect_port = 443", 12, "redirect port of \"web\""),
        ("service_port = 41002", "service_port = 41001", 13, "service port of \"web\""),
        ("service_port = 41002", "service_port = 443", 13, "redirect port of \"web\""),
        ("service_port = 41002", "service_port = 41002\n[limits]\nhops = 8", 15, "between 1 and 7"),
        ("service_port = 41002", "service_port = 41002\n[limits]\nhalf_open = 0", 15, "between 1 and"),
        ("service_port = 41002", "service_port = 41002\n[timers]\nlisteners_s = 0", 15, "between 1 and"),
        ("service_port = 41002", "service_port = 41002\n[limits]\nmoves = 0", 15, "between 1 and 4096"),
        ("service_port = 41002", "service_port = 41002\n[timers]\nmove_reset_s = 29", 15, "between 30 and"),
        ("service_port = 41002", "service_port = 41002\n[host]\nmark = 0", 15, "mark 0"),
        ("service_port = 41002", "service_port = 41002\n[status]\nlisten = \"10.0.0.1:0\"", 15, "port 0"),
        ("service_port = 41002", "service_port = 41002\n[control]\nquiet_s = 3", 15, "only a balancer"),
        ("interface = \"eth0\"", "interface = \"eth0\"\ndivert = \"some\"", 3, "unknown variant"),
    ] {
        let text = GOOD.replace(from, to);
        assert_ne!(text, GOOD, "{from}");
        let error = config(&text).unwrap_err();
        assert!(error.message().contains(message), "{error}");
        assert_eq!(error.line(), Some(line), "{error}");
    }
    let error = config("role = \"server\"\ninterface = \"eth0\"\naddresses = [\"10.0.0.1\"]\n").unwrap_err();
    assert!(error.message().contains("[[service]]"), "{error}");
    let error = config("interface = \"eth0\"\n").unwrap_err();
    assert!(error.message().contains("role"), "{error}");
}

#[test]
fn vips_are_what_clients_know_addresses_as() {
    let behind = GOOD.replace(
        "addresses = [\"203.0.113.10\", \"2001:db8::10\"]",
        "addresses = [\"10.0.0.11\", \"fd00::11\"]\nvips = [\"203.0.113.10\", \"2001:db8::10\"]",
    );
    let shared = config(&behind).unwrap().shared;
    let vip = |socket: &str| shared.get(&socket.parse().unwrap()).map(ToString::to_string);
    assert_eq!(vip("10.0.0.11:41001").as_deref(), Some("203.0.113.10"));
    assert_eq!(vip("[fd00::11]:41002").as_deref(), Some("2001:db8::10"));
    // A service may be another VIP's.
    let own = behind.replace("service_port = 41002", "service_port = 41002\nvips = [\"203.0.113.11\"]");
    let shared = config(&own).unwrap().shared;
    assert_eq!(shared.get(&"10.0.0.11:41002".parse().unwrap()), Some(&"203.0.113.11".parse().unwrap()));
    assert_eq!(shared.get(&"[fd00::11]:41002".parse().unwrap()), None);
    // An address that is a VIP stands for itself.
    assert!(config(GOOD).unwrap().shared.is_empty());
    let itself =
        GOOD.replace("[[service]]\nname = \"web\"", "vips = [\"203.0.113.10\"]\n[[service]]\nname = \"web\"");
    assert!(config(&itself).unwrap().shared.is_empty());
    let error = config(&behind.replace("vips = [", "vips = [\"203.0.113.11\", ")).unwrap_err();
    assert_eq!(error.line(), Some(4), "{error}");
    assert!(error.message().contains("not clear"), "{error}");
}

#[test]
fn tokens_are_made_and_demanded_as_the_file_says() {
    use shunt_stack::redirect::Require;
    let error = config(&format!("{GOOD}[token]\nrequire = \"always\"\n")).unwrap_err();
    assert!(error.message().contains("keys"), "{error}");
    assert_eq!(error.line(), Some(15));
    let tokens = config(GOOD).unwrap().tokens;
    assert_eq!((tokens.keys, tokens.require), (None, Require::Never));
    let trusting = config(&format!("{GOOD}[token]\ntrusted = [\"10.0.0.1\"]\n")).unwrap().tokens;
    assert!(trusting.trusts("10.0.0.1".parse().unwrap()) && !trusting.trusts("10.0.0.2".parse().unwrap()));
}

#[test]
fn a_reload_may_change_services_but_not_the_device() {
    let old = config(GOOD).unwrap();
    let with = |from: &str, to: &str| config(&GOOD.replace(from, to)).unwrap();
    assert_eq!(old.needs_restart(&with("5432", "5433")), None);
    assert_eq!(old.needs_restart(&with("2001:db8::10", "2001:db8::11")), None);
    assert_eq!(old.needs_restart(&with("eth0", "eth1")), Some("interface"));
    let status = "41002\n[status]\nlisten = \"10.0.0.1:9\"";
    assert_eq!(old.needs_restart(&with("41002", status)), Some("[status]"));
    assert_eq!(old.needs_restart(&with("41002", "41002\n[host]\ndevice = \"x\"")), Some("[host]"));
    assert_eq!(old.needs_restart(&with("41002", "41002\n[limits]\nhops = 1")), Some("[limits]"));
    let moves = "41002\n[timers]\nmove_s = 5";
    assert_eq!(old.needs_restart(&with("41002", moves)), Some("moves, move_s and move_reset_s"));
}
