//! Proxy mode: curl over SOCKS5 and over a port forward, on Shunt's own TCP, through the same balancer and agents.

mod common;

use common::{Family, Net, Options, VIP4, VIP6, WEB};

const SOCKS: &str = "127.0.0.1:1080";

/// A network whose shim is a proxy, with one forward a family.
fn proxied() -> Net {
    let mut net = Net::new(Options::default());
    net.start_nginx();
    let text = net.client_config("auto").replacen("\n\n", "\nmode = \"proxy\"\n\n", 1);
    let config = net.file("client.toml");
    std::fs::write(&config, text).expect("a file can be written");
    let forwards = [format!("127.0.0.1:8080={VIP4}:{WEB}"), format!("[::1]:8080=[{VIP6}]:{WEB}")];
    let extra = ["--socks5", SOCKS, "--forward", &forwards[0], "--forward", &forwards[1]];
    net.shim = Some(net.daemon(&net.client, "client", &config, &extra));
    net
}

#[test]
fn socks5_clients_are_redirected() {
    let mut net = proxied();
    for family in Family::BOTH {
        for _ in 0..20 {
            let fetched = net.curl(family, "/", &["--socks5", SOCKS]);
            assert!(fetched.redirected(), "{fetched:?}\n{}", net.logs());
        }
    }
    net.stop_shim();
}

#[test]
fn a_port_forward_carries_a_file_both_ways() {
    let mut net = proxied();
    let data: Vec<u8> = (0..8_u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for server in &net.servers {
        std::fs::write(net.root(server.number).join("big"), &data).expect("a file can be written");
    }
    let upload = net.file("upload");
    std::fs::write(&upload, &data).expect("a file can be written");
    for (family, to) in Family::BOTH.into_iter().zip(["127.0.0.1:8080", "[::1]:8080"]) {
        let to = format!("::{to}");
        let fetched = net.curl(family, "/big", &["--connect-to", &to]);
        assert!(fetched.redirected(), "{fetched:?}\n{}", net.logs());
        assert!(std::fs::read(net.file("body")).expect("a body") == data, "the download differs");

        let upload = upload.to_str().expect("a path");
        let fetched = net.curl(family, "/up/big", &["--connect-to", &to, "-T", upload]);
        assert!(fetched.redirected(), "{fetched:?}\n{}", net.logs());
        let server: u16 = fetched.server[1..].parse().expect("a server's number");
        let arrived = std::fs::read(net.root(server).join("up/big")).expect("an upload");
        assert!(arrived == data, "the upload differs");
    }
    net.stop_shim();
}
