//! §10: tokens in the balancer's answers, and SYNs to service ports that need one (J8).

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use shunt_stack::redirect::{Purpose, TokenKeys, TokenRefusal};
use shunt_stack::time::{Instant, WallClock};
use shunt_stack::wire::{Packet, RedirectOption, TcpFlags};

use super::{Cast, EXID, R, balancer, casts, three_servers};
use crate::{Balancer, DropReason, Memory, Output};

const KEYS: &str = "3 000102030405060708090a0b0c0d0e0f";
const UNIX: u64 = 1_800_000_000;
const NOW: Instant = Instant::from_millis(7000);

/// A balancer whose clock is told; `top` goes to the top of its file, `table` into `[token]`.
fn demanding(top: &str, table: &str) -> Balancer {
    with_keys(&three_servers(top), table)
}

fn with_keys(file: &str, table: &str) -> Balancer {
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys");
    std::fs::write(&keys, KEYS).unwrap();
    std::fs::set_permissions(&keys, std::fs::Permissions::from_mode(0o600)).unwrap();
    let text = format!("{file}[token]\nkeys = \"{}\"\n{table}\n", keys.display());
    let balancer = balancer(&text);
    balancer.advance(NOW);
    balancer.set_clock(WallClock::new(NOW, Duration::from_secs(UNIX)));
    balancer
}

fn token(cast: &Cast, unix: u64, port: u16) -> [u8; 8] {
    let purpose = Purpose { vip: cast.vip, client: cast.client, redirect_port: 443, service_port: port };
    TokenKeys::parse(KEYS).unwrap().make(unix, &purpose)
}

fn showing(token: [u8; 8]) -> RedirectOption {
    RedirectOption { port: Some(443), token: Some(token), ..R }
}

fn handled(
    balancer: &Balancer,
    memory: &mut Memory,
    now: Instant,
    packet: Packet,
) -> Result<Output, DropReason> {
    let mut packet = packet;
    balancer.handle(memory, now, &mut packet)
}

#[test]
fn b1_an_answer_carries_a_token_that_b2_takes() {
    let balancer = demanding("answer = \"balancer\"", "require = \"always\"");
    let mut memory = Memory::new(&balancer);
    for cast in casts() {
        let mut answer = cast.syn(443, Some(RedirectOption { confirm: true, ..R }));
        assert_eq!(balancer.handle(&mut memory, NOW, &mut answer), Ok(Output::Main));
        let option = answer.tcp().unwrap().redirect(EXID).unwrap().unwrap();
        let port = option.port.unwrap();
        assert_eq!(option.token, Some(token(&cast, UNIX, port)));
        assert!(option.observed.is_some(), "O and T both fit");
        let next = cast.syn(port, Some(showing(option.token.unwrap())));
        assert_eq!(handled(&balancer, &mut memory, NOW, next), Ok(Output::Main));
    }
}

#[test]
fn b2_syns_to_service_ports_need_a_good_token_and_nothing_else_needs_any() {
    let balancer = demanding("default_server = \"web-1\"", "require = \"always\"");
    let mut memory = Memory::new(&balancer);
    for cast in casts() {
        let good = token(&cast, UNIX, 41_001);
        let changed = |at: usize, bits: u8| {
            let mut token = good;
            token[at] ^= bits;
            token
        };
        let refused = |refusal| Err(DropReason::Token(refusal));
        for (packet, expected) in [
            (cast.syn(41_001, Some(showing(good))), Ok(Output::Main)),
            (cast.syn(41_002, Some(showing(good))), refused(TokenRefusal::Mismatch)),
            (cast.syn(41_001, Some(showing(changed(7, 1)))), refused(TokenRefusal::Mismatch)),
            (cast.syn(41_001, Some(showing(changed(0, 0x40)))), refused(TokenRefusal::UnknownKey(2))),
            (
                cast.syn(41_001, Some(showing(token(&cast, UNIX - 100, 41_001)))),
                refused(TokenRefusal::Expired),
            ),
            (cast.syn(41_001, Some(R)), refused(TokenRefusal::Missing)),
            (cast.syn(41_001, None), refused(TokenRefusal::Missing)),
            // Not a new connection, and not a service port.
            (cast.ack(41_001), Ok(Output::Main)),
            (cast.syn(443, Some(R)), Ok(Output::Main)),
            (cast.syn(443, None), Ok(Output::Main)),
            (cast.syn(9999, None), Ok(Output::Main)),
        ] {
            assert_eq!(handled(&balancer, &mut memory, NOW, packet.clone()), expected, "{packet:?}");
        }
        let answer = super::packets::segment(
            std::net::SocketAddr::new(cast.servers[0], 41_001),
            cast.client(),
            TcpFlags::SYN | TcpFlags::ACK,
            shunt_stack::wire::SeqNumber(1),
        );
        assert_eq!(handled(&balancer, &mut memory, NOW, answer), Ok(Output::Main));
    }
    let drops = balancer.snapshot().drops;
    let named =
        ["token_missing", "token_unknown_key", "token_expired", "token_mismatch"].map(|name| drops[name]);
    assert_eq!(named, [4, 2, 2, 4]);
}

#[test]
fn what_is_not_let_in_takes_nothing_from_a_limit() {
    let limited = three_servers("").replace(
        "redirect_port = 443",
        "redirect_port = 443\nlimit = { packets_per_s = 10, burst_ms = 1000 }",
    );
    let balancer = with_keys(&limited, "require = \"always\"");
    let mut memory = Memory::new(&balancer);
    let [cast, _] = casts();
    for _ in 0..1000 {
        let result = handled(&balancer, &mut memory, NOW, cast.syn(41_001, None));
        assert_eq!(result, Err(DropReason::Token(TokenRefusal::Missing)));
    }
    assert_eq!(handled(&balancer, &mut memory, NOW, cast.syn(443, None)), Ok(Output::Main));
}

#[test]
fn under_load_is_shown_and_survives_a_reload() {
    let balancer = demanding("", "require = \"under-load\"\nunder_load_syns_per_s = 5");
    let mut memory = Memory::new(&balancer);
    let [cast, _] = casts();
    let passed = |balancer: &Balancer, memory: &mut Memory, now| {
        handled(balancer, memory, now, cast.syn(41_001, None)).is_ok()
    };
    assert_eq!((0..20).filter(|_| passed(&balancer, &mut memory, NOW)).count(), 5);
    assert_eq!((balancer.snapshot().token_load, balancer.snapshot().token_loads), (true, 1));
    let good = cast.syn(41_001, Some(showing(token(&cast, UNIX, 41_001))));
    assert_eq!(handled(&balancer, &mut memory, NOW, good), Ok(Output::Main));
    let next = demanding("", "require = \"under-load\"\nunder_load_syns_per_s = 5");
    memory.follow(&balancer, &next);
    assert!(!passed(&next, &mut memory, NOW + Duration::from_secs(1)));
    assert!(passed(&balancer, &mut memory, NOW + Duration::from_secs(15)));
    assert!(!balancer.snapshot().token_load);
    assert!(balancer.snapshot().to_string().contains("shunt_balancer_token_load 0\n"));
}

#[test]
fn a_port_that_is_both_is_asked_for_a_redirect_without_a_token() {
    let [cast, _] = casts();
    let other = "[[service]]\nname = \"other\"\nredirect_port = 41001\n";
    let balancer = with_keys(&(three_servers("") + other), "require = \"always\"");
    let mut memory = Memory::new(&balancer);
    let result = handled(&balancer, &mut memory, NOW, cast.syn(41_001, Some(R)));
    assert_eq!(result, Err(DropReason::NoServer(41_001)), "B1: a redirect port of a service without servers");
    let plain = handled(&balancer, &mut memory, NOW, cast.syn(41_001, None));
    assert_eq!(plain, Err(DropReason::Token(TokenRefusal::Missing)), "B2");
}
