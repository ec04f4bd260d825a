//! §10 beside a real kernel: who gets in at a service port, and who does not (J8).

use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::signal::Signal;
use shunt_stack::redirect::{Purpose, TokenKeys};
use shunt_stack::wire::RedirectOption;

use crate::network::{Network, X, Y, vips};
use crate::raw::{self, Connection, client_of};

const KEYS: &str = "1 000102030405060708090a0b0c0d0e0f\n";
const OTHER_KEYS: &str = "2 ffeeddccbbaa99887766554433221100\n";
/// Longer than the kernel takes for a SYN-ACK.
const SILENCE: Duration = Duration::from_millis(300);

fn unix() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// Writes the file of keys.
fn write_keys(network: &Network, text: &str, mode: u32) -> PathBuf {
    let path = network.folder.path().join("keys");
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    path
}

/// The `[token]` table, with further keys.
fn table(network: &Network, require: &str, more: &str) -> String {
    let path = write_keys(network, KEYS, 0o600);
    format!("[token]\nkeys = \"{}\"\nrequire = \"{require}\"\n{more}\n", path.display())
}

/// The token that the agent gives to a client of that address.
fn given(network: &Network, vip: IpAddr, port: u16) -> [u8; 8] {
    let mut connection = Connection::new(&network.wire, client_of(vip, port), SocketAddr::new(vip, X));
    connection.send_syn(Some(RedirectOption { redirect: true, confirm: true, ..RedirectOption::default() }));
    let option = connection.receive_syn_ack(X).expect("a redirect");
    assert_eq!(option.port, Some(Y));
    assert!(option.observed.is_some(), "O and T both fit");
    option.token.expect("a token")
}

fn showing(token: Option<[u8; 8]>) -> RedirectOption {
    RedirectOption { redirect: true, port: Some(X), hops: 1, token, ..RedirectOption::default() }
}

/// A SYN from `client` to the service port; whether it is answered.
fn gets_in(network: &Network, client: SocketAddr, vip: IpAddr, option: Option<RedirectOption>) -> bool {
    let mut connection = Connection::new(&network.wire, client, SocketAddr::new(vip, Y));
    connection.send_syn(option);
    let answer = network.wire.receive(client, SILENCE);
    answer.is_some_and(|packet| {
        let tcp = packet.tcp().unwrap();
        assert!(tcp.is_syn_ack(), "{packet:?}");
        true
    })
}

#[test]
fn j8_only_who_was_sent_to_the_service_port_gets_in() {
    let network = Network::new();
    network.echo_server(X);
    network.echo_server(Y);
    let agent = network.agent(&table(&network, "always", ""));
    let keys = TokenKeys::parse(KEYS).unwrap();
    for vip in vips() {
        let token = given(&network, vip, 50_000);
        // Not bound to the client's port, and good for more than once.
        for port in [50_001, 50_002] {
            let mut connection =
                Connection::new(&network.wire, client_of(vip, port), SocketAddr::new(vip, Y));
            connection.send_syn(Some(showing(Some(token))));
            assert!(connection.receive_syn_ack(Y).is_some_and(|option| option.confirm));
            connection.establish();
            connection.echo(b"let in");
            connection.abort();
        }
        // S1: what the agent has begun itself needs none.
        let mut connection = Connection::new(&network.wire, client_of(vip, 50_003), SocketAddr::new(vip, X));
        connection.handover();
        connection.echo(b"handed over");
        connection.abort();

        let client = client_of(vip, 50_010);
        let forged = std::array::from_fn(|at| if at == 7 { token[7] ^ 1 } else { token[at] });
        let purpose = Purpose { vip, client: client.ip(), redirect_port: X, service_port: Y };
        let expired = keys.make(unix() - 120, &purpose);
        let foreign = TokenKeys::parse(OTHER_KEYS).unwrap().make(unix(), &purpose);
        for option in [
            None,
            Some(showing(None)),
            Some(showing(Some(forged))),
            Some(showing(Some(expired))),
            Some(showing(Some(foreign))),
        ] {
            assert!(!gets_in(&network, client, vip, option), "{option:?}");
        }
        let address: IpAddr = if vip.is_ipv4() { "10.9.0.3" } else { "2001:db8:9::3" }.parse().unwrap();
        assert!(
            !gets_in(&network, SocketAddr::new(address, 50_000), vip, Some(showing(Some(token)))),
            "replayed"
        );
        // The redirect port stays open to plain clients.
        let mut plain = Connection::new(&network.wire, client_of(vip, 50_020), SocketAddr::new(vip, X));
        plain.send_syn(None);
        assert_eq!(plain.receive_syn_ack(X), None);
        plain.abort();
    }
    let counters = agent.counters();
    assert_eq!((counters.tokens_missing, counters.tokens_expired), (4, 2));
    assert_eq!((counters.tokens_mismatch, counters.tokens_unknown_key), (4, 2));
}

#[test]
fn j8_trusted_sources_need_no_token_also_when_everything_is_diverted() {
    for divert in ["", "divert = \"all\"\n"] {
        let network = Network::new();
        network.echo_server(Y);
        let trusted = "trusted = [\"10.9.0.0/30\", \"2001:db8:9::2\"]";
        let _agent = network.agent(&format!("{divert}{}", table(&network, "always", trusted)));
        for vip in vips() {
            assert!(gets_in(&network, client_of(vip, 50_000), vip, None));
            let address: IpAddr = if vip.is_ipv4() { "10.9.0.4" } else { "2001:db8:9::3" }.parse().unwrap();
            assert!(!gets_in(&network, SocketAddr::new(address, 50_000), vip, None));
        }
    }
}

#[test]
fn j8_under_load_tokens_are_demanded_until_it_is_calm() {
    let network = Network::new();
    network.echo_server(Y);
    let agent = network.agent(&table(&network, "under-load", "under_load_syns_per_s = 20"));
    for vip in vips() {
        let token = given(&network, vip, 50_000);
        assert!(gets_in(&network, client_of(vip, 50_001), vip, None), "before there is load");
        for port in 51_000..51_060 {
            let server = SocketAddr::new(vip, Y);
            Connection::new(&network.wire, client_of(vip, port), server).send_syn(None);
        }
        assert!(!gets_in(&network, client_of(vip, 50_002), vip, None));
        assert!(gets_in(&network, client_of(vip, 50_003), vip, Some(showing(Some(token)))));
        // The second in which load was seen, and the calm behind it.
        std::thread::sleep(shunt_stack::redirect::LOAD_CALM + Duration::from_millis(1500));
        assert!(gets_in(&network, client_of(vip, 50_004), vip, None), "after the load");
    }
    assert!(agent.counters().tokens_missing >= 60, "{:?}", agent.counters());
}

#[test]
fn j8_keys_are_read_again_and_a_wrong_file_changes_nothing() {
    let network = Network::new();
    network.echo_server(Y);
    let config = network.write_config(&table(&network, "always", ""), &[(X, Y)]);
    let mut agent = network.agent_process(&config);
    let vip = vips()[0];
    let old = given(&network, vip, 50_000);
    assert!(gets_in(&network, client_of(vip, 50_001), vip, Some(showing(Some(old)))));

    write_keys(&network, OTHER_KEYS, 0o600);
    agent.signal(Signal::SIGHUP).unwrap();
    agent.wait_for_log("was read again", raw::PATIENCE).unwrap();
    assert!(!gets_in(&network, client_of(vip, 50_002), vip, Some(showing(Some(old)))));
    let new = given(&network, vip, 50_003);
    assert!(gets_in(&network, client_of(vip, 50_004), vip, Some(showing(Some(new)))));

    write_keys(&network, "2 ffeeddccbbaa99887766554433221100\n2 0\n", 0o600);
    agent.signal(Signal::SIGHUP).unwrap();
    agent.wait_for_log("keys:2: ", raw::PATIENCE).unwrap();
    write_keys(&network, OTHER_KEYS, 0o644);
    agent.signal(Signal::SIGHUP).unwrap();
    agent.wait_for_log("others can read", raw::PATIENCE).unwrap();
    let new = given(&network, vip, 50_005);
    assert!(gets_in(&network, client_of(vip, 50_006), vip, Some(showing(Some(new)))));
    let log = agent.log().unwrap();
    assert!(!log.contains("ffeeddcc") && !log.contains("00010203"), "a key shows:\n{log}");
}
