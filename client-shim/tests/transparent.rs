//! The transparent shim beside a real kernel, in network namespaces. Needs root.

mod support;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use support::scripted::Scripted;
use support::{VIPS, X, config, eventually, exchange, net, pattern};

#[test]
fn shim_process() {
    support::shim_process();
}

#[test]
fn setting_up_and_stopping_leaves_nothing() {
    let net = net();
    let before = net.snapshot();
    let shim = net.start(&config("auto", ""));
    let during = net.snapshot();
    assert!(during.contains("shunt0"), "{during}");
    shim.stop().unwrap();
    assert_eq!(net.snapshot(), before);
}

#[test]
fn a_killed_shim_is_cleaned_up_by_the_next_start() {
    let net = net();
    let before = net.snapshot();
    let mut child = net.spawn(&config("auto", ""));
    child.kill().unwrap();
    eventually("the device is gone", || !net.snapshot().contains("shunt0:"));
    assert_ne!(net.snapshot(), before, "a killed process cannot clean up");
    let shim = net.start(&config("auto", ""));
    shim.stop().unwrap();
    assert_eq!(net.snapshot(), before);
}

#[test]
fn c2_a_server_without_the_extension_works_plainly() {
    let net = net();
    net.plain_server();
    let _shim = net.start(&config("auto", ""));
    for vip in VIPS {
        for _ in 0..3 {
            assert_eq!(exchange(net.connect(vip, X), 300_000), pattern(300_000));
        }
    }
}

#[test]
fn reconnect_goes_on_at_the_service_port() {
    let net = net();
    let server = Scripted::start(&net.server, true);
    let _shim = net.start(&config("reconnect", ""));
    for (i, vip) in VIPS.into_iter().enumerate() {
        assert_eq!(exchange(net.connect(vip, X), 200_000), pattern(200_000));
        assert_eq!(server.count("ask-reconnect"), i + 1);
        assert_eq!(server.count("syn-y"), i + 1);
    }
    assert_eq!((server.count("plain"), server.count("stray-x")), (0, 0));
}

#[test]
fn handover_goes_on_at_the_service_port_without_another_syn() {
    let net = net();
    let server = Scripted::start(&net.server, true);
    // A probe is for silence, which a busy machine can keep for longer than the default waits.
    let _shim = net.start(&config("handover", "\n[timers]\nprobe_ms = 10000\n"));
    for (i, vip) in VIPS.into_iter().enumerate() {
        assert_eq!(exchange(net.connect(vip, X), 200_000), pattern(200_000));
        assert_eq!(server.count("ask-handover"), i + 1);
    }
    assert_eq!((server.count("plain"), server.count("syn-y"), server.count("stray-x")), (0, 0, 0));
}

#[test]
fn auto_learns_from_the_first_connect_that_the_path_is_direct() {
    let net = net();
    let server = Scripted::start(&net.server, true);
    let _shim = net.start(&config("auto", ""));
    for vip in VIPS {
        for _ in 0..3 {
            assert_eq!(exchange(net.connect(vip, X), 1000), pattern(1000));
        }
    }
    assert_eq!((server.count("ask-reconnect"), server.count("ask-handover")), (2, 4));
}

#[test]
fn packet_too_big_reaches_the_kernels_socket() {
    let net = net();
    let server = Scripted::start(&net.server, false);
    let _shim = net.start(&config("reconnect", ""));
    for vip in VIPS {
        server.mtu.store(1300, Ordering::Relaxed);
        server.longest.store(0, Ordering::Relaxed);
        let begin = Instant::now();
        assert_eq!(exchange(net.connect(vip, X), 100_000), Vec::<u8>::new());
        let longest = server.longest.load(Ordering::Relaxed);
        assert!((1200..=1300).contains(&longest), "{vip}: {longest}");
        assert!(begin.elapsed() < Duration::from_secs(5), "{vip}: {:?}", begin.elapsed());
    }
}

/// Uploads while `disturb` runs, and checks that the server has got everything from one connection.
fn upload_through(net: &support::Net, vip: &str, disturb: impl FnOnce()) {
    let mut stream = net.connect(vip, X);
    stream.write_all(&pattern(50_000)).unwrap();
    // Long enough for the flow to be saved.
    std::thread::sleep(Duration::from_millis(1200));
    let mut writer = stream.try_clone().unwrap();
    let writing = std::thread::spawn(move || {
        for _ in 0..400 {
            writer.write_all(&pattern(5000)).unwrap();
            std::thread::sleep(Duration::from_millis(5));
        }
        writer.shutdown(Shutdown::Write).unwrap();
    });
    std::thread::sleep(Duration::from_millis(300));
    disturb();
    writing.join().unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
}

#[test]
fn c12_flows_survive_a_kill_and_restart_in_mid_transfer() {
    let net = net();
    let server = Scripted::start(&net.server, false);
    for vip in VIPS {
        let mut child = net.spawn(&config("reconnect", ""));
        upload_through(&net, vip, || {
            child.kill().unwrap();
            std::thread::sleep(Duration::from_millis(300));
            child = net.spawn(&config("reconnect", ""));
        });
        child.terminate(Duration::from_secs(5)).unwrap();
    }
    assert_eq!((server.count("stray-y"), server.count("rst-y")), (0, 0), "{:?}", server.seen);
}

#[test]
fn c12_flows_survive_an_orderly_restart_if_held() {
    let net = net();
    let before = net.snapshot();
    let server = Scripted::start(&net.server, false);
    let text = config("handover", "hold = \"always\"");
    let mut child = net.spawn(&text);
    upload_through(&net, VIPS[0], || {
        child.terminate(Duration::from_secs(5)).unwrap();
        child = net.spawn(&text);
    });
    assert_eq!((server.count("stray-y"), server.count("rst-y")), (0, 0), "{:?}", server.seen);
    child.terminate(Duration::from_secs(5)).unwrap();
    assert_ne!(net.snapshot(), before);
    net.start(&config("auto", "")).stop().unwrap();
    assert_eq!(net.snapshot(), before);
}

#[test]
fn c12_ended_connections_leave_the_file_of_flows() {
    let net = net();
    let _server = Scripted::start(&net.server, true);
    // TIME-WAIT lasts 60 s: closing by reset leaves none.
    let shim = net.start(&config("reconnect", "\n[timers]\nsockets_s = 1\n"));
    let file = || {
        std::fs::read_dir(net.state.path())
            .unwrap()
            .flatten()
            .any(|entry| entry.file_name().to_string_lossy().starts_with("client-flows."))
    };
    let stream = net.connect(VIPS[0], X);
    eventually("the flow is saved", file);
    nix::sys::socket::setsockopt(
        &stream,
        nix::sys::socket::sockopt::Linger,
        &nix::libc::linger { l_onoff: 1, l_linger: 0 },
    )
    .unwrap();
    drop(stream);
    eventually("the flow is freed", || !file());
    shim.stop().unwrap();
}

#[test]
fn sighup_takes_another_vip_and_keeps_connections() {
    let net = net();
    let server = Scripted::start(&net.server, true);
    let one = format!("role = \"client\"\n[[vip]]\naddress = \"{}\"\n", VIPS[0]);
    let mut child = net.spawn(&one);
    let mut stream = net.connect(VIPS[0], X);
    stream.write_all(b"before").unwrap();
    std::fs::write(net.state.path().join("client.toml"), config("reconnect", "")).unwrap();
    child.signal(Signal::SIGHUP).unwrap();
    child.wait_for_log("reloaded", Duration::from_secs(5)).unwrap();
    assert_eq!(exchange(net.connect(VIPS[1], X), 1000), pattern(1000));
    assert_eq!((server.count("syn-y"), server.count("plain")), (2, 0));
    stream.write_all(b" and after").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut back = String::new();
    stream.read_to_string(&mut back).unwrap();
    assert_eq!(back, "before and after");
    std::fs::write(net.state.path().join("client.toml"), "role = \"client\"\n").unwrap();
    child.signal(Signal::SIGHUP).unwrap();
    child.wait_for_log("going on as before", Duration::from_secs(5)).unwrap();
    child.terminate(Duration::from_secs(5)).unwrap();
}

#[test]
fn a_vip_of_the_host_itself_is_refused_and_nothing_is_left() {
    let net = net();
    net.client.address("lo", &format!("{}/32", VIPS[0])).unwrap();
    let before = net.snapshot();
    let error = net.try_start(&config("auto", ""), None).err().expect("refused");
    assert!(error.to_string().contains("address of this host"), "{error}");
    assert_eq!(net.snapshot(), before);
}

#[test]
fn only_one_shim_runs_in_a_namespace() {
    let net = net();
    let _shim = net.start(&config("auto", ""));
    let during = net.snapshot();
    let error = net.try_start(&config("auto", ""), None).err().expect("refused");
    assert!(error.to_string().contains("another Shunt daemon"), "{error}");
    assert_eq!(net.snapshot(), during);
}

#[test]
fn a_route_that_changes_is_followed() {
    let net = net();
    let server = Scripted::start(&net.server, true);
    let _shim = net.start(&config("reconnect", "\n[timers]\npaths_s = 1\n"));
    net.server.address("eth0", "10.0.0.3/24").unwrap();
    net.client.route(&format!("{}/32", VIPS[0]), shunt_lab::Via::gateway("10.0.0.3")).unwrap();
    eventually("the route is followed", || {
        net.client_runs("ip -4 route show table all")
            .contains("203.0.113.10 via 10.0.0.3 dev eth0 table 21002")
    });
    assert_eq!(exchange(net.connect(VIPS[0], X), 1000), pattern(1000));
    assert_eq!(server.count("syn-y"), 1);
}

#[test]
fn an_mtu_that_changes_is_followed() {
    let net = net();
    let _shim = net.start(&config("reconnect", "\n[timers]\npaths_s = 1\n"));
    for mtu in [1400, 1500] {
        net.client.set_mtu("eth0", mtu).unwrap();
        let wanted = format!("mtu {mtu} ");
        eventually("the MTU is followed", || net.client_runs("ip -o link show shunt0").contains(&wanted));
    }
}

#[test]
fn an_interface_made_anew_is_taken_again() {
    let net = net();
    let server = Scripted::start(&net.server, true);
    let _shim = net.start(&config("reconnect", "\n[timers]\npaths_s = 1\n"));
    // The name stays, the number does not.
    net.client_runs("ip link set eth0 down");
    net.client_runs("ip link set eth0 name old0");
    net.client_runs("ip link add eth0 link old0 type macvlan mode bridge");
    net.client_runs("ip address flush dev old0");
    net.client_runs("ip link set old0 up");
    net.client.set_up("eth0", true).unwrap();
    net.client.address("eth0", "10.0.0.1/24").unwrap();
    net.client.route(&format!("{}/32", VIPS[0]), shunt_lab::Via::gateway("10.0.0.2")).unwrap();
    eventually("the routes are followed", || {
        net.client_runs("ip -4 route show table all")
            .contains("203.0.113.10 via 10.0.0.2 dev eth0 table 21002")
            && net.client_runs("ip -4 rule").contains("iif lo ipproto tcp lookup 21001")
    });
    assert_eq!(exchange(net.connect(VIPS[0], X), 1000), pattern(1000));
    assert_eq!(server.count("syn-y"), 1);
}

#[test]
fn a_route_by_another_interface_than_configured_is_refused() {
    let net = net();
    let error = net.try_start(&config("auto", "interface = \"eth1\""), None).err().expect("refused");
    assert!(error.to_string().contains("leaves by eth0"), "{error}");
}

#[test]
fn a_capture_holds_what_came_in_and_went_out() {
    let net = net();
    let _server = Scripted::start(&net.server, true);
    let file = net.state.path().join("shim.pcapng");
    let shim = net.try_start(&config("reconnect", ""), Some(file.clone())).unwrap();
    assert_eq!(exchange(net.connect(VIPS[0], X), 50_000), pattern(50_000));
    shim.stop().unwrap();
    let bytes = std::fs::read(file).unwrap();
    assert_eq!(bytes[..4], [0x0a, 0x0d, 0x0d, 0x0a]);
    // Each byte passes four times: to the device and from it, there and back.
    assert!(bytes.len() > 200_000, "{}", bytes.len());
}

#[test]
fn while_a_killed_shim_is_away_the_vips_are_held() {
    let net = net();
    net.plain_server();
    let mut child = net.spawn(&config("auto", ""));
    child.kill().unwrap();
    for vip in VIPS {
        let address = std::net::SocketAddr::new(vip.parse().unwrap(), X);
        let connect = || std::net::TcpStream::connect_timeout(&address, Duration::from_secs(3));
        assert!(net.client.enter(connect).unwrap().is_err());
    }
    let mut child = net.spawn(&config("auto", "hold = \"never\""));
    child.kill().unwrap();
    for vip in VIPS {
        assert_eq!(exchange(net.connect(vip, X), 1000), pattern(1000));
    }
}
