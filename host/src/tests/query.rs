use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};

use tokio::net::{TcpListener, TcpStream};

use crate::HostError;
use crate::query::{
    InterfaceAddress, Listeners, NextHop, TcpSockets, has_ipv6, interface_addresses, is_listening, link_mtu,
    next_hop,
};
use crate::testing::{in_namespace, run, until};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn next_hops_are_what_the_kernel_would_use() {
    in_namespace(async || {
        assert!(matches!(next_hop(ip("203.0.113.10")).await, Err(HostError::NoRoute(_))));
        assert!(matches!(next_hop(ip("2001:db8::1")).await, Err(HostError::NoRoute(_))));
        run("ip", "link add nic0 type veth peer name peer0");
        run("ip", "link set peer0 up");
        run("ip", "link set nic0 up mtu 1400");
        run("ip", "address add 10.1.0.2/24 dev nic0");
        run("ip", "address add 2001:db8:2::2/64 dev nic0 nodad");
        run("ip", "route add default via 10.1.0.1");
        run("ip", "route add default via 2001:db8:2::1");
        run("ip", "route add blackhole 192.0.2.0/24");
        run("ip", "route add prohibit 198.51.100.0/24");
        for (destination, gateway, source) in [
            ("203.0.113.10", Some("10.1.0.1"), "10.1.0.2"),
            ("10.1.0.9", None, "10.1.0.2"),
            ("2001:db8:1::10", Some("2001:db8:2::1"), "2001:db8:2::2"),
            ("2001:db8:2::9", None, "2001:db8:2::2"),
        ] {
            let hop = next_hop(ip(destination)).await.unwrap();
            let expected = NextHop {
                index: hop.index,
                interface: "nic0".into(),
                gateway: gateway.map(ip),
                source: Some(ip(source)),
                local: false,
            };
            assert_eq!(hop, expected);
        }
        assert!(next_hop(ip("10.1.0.2")).await.unwrap().local);
        for dropped in ["192.0.2.1", "198.51.100.1"] {
            assert!(matches!(next_hop(ip(dropped)).await, Err(HostError::NoRoute(_))));
        }
        assert_eq!(link_mtu("nic0").await.unwrap(), 1400);
        assert!(matches!(link_mtu("nic7").await, Err(HostError::NoInterface(_))));
        let addresses = interface_addresses("nic0").await.unwrap();
        for (address, network) in [("10.1.0.2", "10.1.0.0/24"), ("2001:db8:2::2", "2001:db8:2::/64")] {
            let expected = InterfaceAddress { address: ip(address), network: network.parse().unwrap() };
            assert!(addresses.contains(&expected), "{addresses:?}");
        }
        assert!(matches!(interface_addresses("nic7").await, Err(HostError::NoInterface(_))));
        assert!(has_ipv6());
    });
}

#[test]
fn connections_are_found_in_every_state_and_family() {
    in_namespace(async || {
        run("ip", "link add nic0 type veth peer name peer0");
        run("ip", "link set peer0 up");
        run("ip", "link set nic0 up");
        run("ip", "address add 10.1.0.2/24 dev nic0");
        let listener = TcpListener::bind("[::]:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let v4 = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let v6 = TcpStream::connect(("::1", port)).await.unwrap();
        let (accepted, _) = listener.accept().await.unwrap();
        let closing = TcpStream::connect(("127.0.0.2", port)).await.unwrap();
        let closed: SocketAddr = closing.local_addr().unwrap();
        drop(closing);
        // Nobody answers: SYN-SENT.
        let opening = tokio::spawn(TcpStream::connect(("10.1.0.77", 443)));
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;

        let remotes: HashSet<IpAddr> = ["127.0.0.1", "127.0.0.2", "::1", "10.1.0.77"].map(ip).into();
        let found = TcpSockets::connected_to(&remotes).await.unwrap();
        for stream in [&v4, &v6, &accepted] {
            assert!(found.contains(stream.local_addr().unwrap(), stream.peer_addr().unwrap()), "{found:?}");
        }
        assert!(found.contains(closed, SocketAddr::new(ip("127.0.0.2"), port)), "FIN-WAIT: {found:?}");
        assert!(found.pairs().iter().any(|(_, remote)| *remote == "10.1.0.77:443".parse().unwrap()));
        assert!(found.pairs().iter().all(|(local, remote)| {
            local.ip().to_canonical() == local.ip() && remote.ip().to_canonical() == remote.ip()
        }));
        assert!(!found.is_waiting(closed, SocketAddr::new(ip("127.0.0.2"), port)), "{found:?}");
        while listener.accept().await.unwrap().1.port() != closed.port() {}
        until(async || {
            let found = TcpSockets::connected_to(&remotes).await.unwrap();
            found.contains(v4.local_addr().unwrap(), v4.peer_addr().unwrap())
                && !found.is_waiting(v4.local_addr().unwrap(), v4.peer_addr().unwrap())
                && found.is_waiting(closed, SocketAddr::new(ip("127.0.0.2"), port))
        })
        .await;
        let none = TcpSockets::connected_to(&[ip("192.0.2.1")].into()).await.unwrap();
        assert!(none.pairs().is_empty());
        opening.abort();

        // By local socket: the accepted ends, whatever family they were accepted on, and no TIME-WAIT.
        let served: HashSet<SocketAddr> =
            ["127.0.0.1", "::1"].map(|address| SocketAddr::new(ip(address), port)).into();
        let found = TcpSockets::served_at(&served).await.unwrap();
        assert_eq!(found.pairs().len(), 2, "{found:?}");
        assert!(found.contains(v4.peer_addr().unwrap(), v4.local_addr().unwrap()), "{found:?}");
        assert!(found.contains(v6.peer_addr().unwrap(), v6.local_addr().unwrap()), "{found:?}");
    });
}

#[test]
fn listeners_are_found_on_their_address_or_on_all() {
    in_namespace(async || {
        run("ip", "address add 10.1.0.2/24 dev lo");
        let one = TcpListener::bind("127.0.0.1:5001").await.unwrap();
        let all4 = TcpListener::bind("0.0.0.0:5002").await.unwrap();
        let all6 = TcpListener::bind("[::]:5003").await.unwrap();
        let listeners = Listeners::now().await.unwrap();
        for (address, expected) in [
            ("127.0.0.1:5001", true),
            ("10.1.0.2:5001", false),
            ("10.1.0.2:5002", true),
            ("[::1]:5002", false),
            ("10.1.0.2:5003", true),
            ("[::1]:5003", true),
            ("[::ffff:127.0.0.1]:5001", true),
            ("127.0.0.1:5004", false),
        ] {
            assert_eq!(listeners.accepts(address.parse().unwrap()), expected, "{address}");
        }
        drop((one, all4, all6));
        until(async || !is_listening("127.0.0.1:5001".parse().unwrap()).await.unwrap()).await;
    });
}
