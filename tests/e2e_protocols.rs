//! Programs of every habit over redirected connections: who speaks first, who closes how, how often and from which
//! port. No hang, nothing left on the servers, no flow left in the shim.

mod common;

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::service::{
    AGENT_LOOKS, Counts, PATIENCE, Service, TRANSFER, answer_and_close, connect, echo, exchange, prepare,
    read_card, speak_first, swallow, target, transfer,
};
use common::{Family, Net, Options};
use nix::libc;
use shunt_lab::TcpState;
use socket2::{Domain, Socket, Type};

/// `TCP_DEFER_ACCEPT`, in seconds.
#[derive(Debug, Clone, Copy)]
struct DeferAccept;

nix::setsockopt_impl!(
    DeferAccept,
    libc::IPPROTO_TCP,
    libc::TCP_DEFER_ACCEPT,
    u32,
    nix::sys::socket::sockopt::SetStruct<u32>
);

/// How long everybody is silent.
const SILENCE: Duration = Duration::from_secs(3);
/// Until connections that are ending have ended on the servers.
const ENDING: Duration = Duration::from_secs(10);

const STRICT: &str = "table inet test {\nchain strict { type filter hook forward priority 0\nct state invalid drop\n\
                      tcp flags & (fin|syn|rst|ack) != syn ct state new drop\n}\n}";

/// The network, and how its connections go on.
struct Case {
    net: Net,
    name: String,
    /// Resets right after connect do not reach the server.
    half_opens_linger: bool,
}

impl Case {
    fn new(continuation: &str, strict: bool) -> Case {
        let mut net = Net::new(Options::default());
        let path = if strict { "behind a strict firewall" } else { "on a clean path" };
        if strict {
            net.middle.nft(STRICT).expect("the kernel takes the rules");
            // A handover that is reset before its ACK has arrived leaves a half-open connection to its time-out:
            // let that come soon.
            for server in &net.servers {
                server.host.sysctl("net.ipv4.tcp_synack_retries", "1").expect("a sysctl");
            }
            // Flows are kept as long as TIME-WAIT: here there is none.
            net.client.sysctl("net.ipv4.tcp_max_tw_buckets", "0").expect("a sysctl");
        }
        net.start_shim(continuation);
        let half_opens_linger = strict && continuation == "handover";
        Case { net, name: format!("{continuation} {path}"), half_opens_linger }
    }

    /// Runs `f` for both families at once; says how long it took.
    fn both(&self, what: &str, f: impl Fn(Family) -> io::Result<()> + Sync) {
        let start = Instant::now();
        let results = self.net.in_both(f);
        for (family, result) in Family::BOTH.iter().zip(results) {
            if let Err(error) = result {
                panic!("{}, {what}, {family:?}: {error}\n{}", self.name, self.net.logs());
            }
        }
        println!("{}: {what} in {:.1} s", self.name, start.elapsed().as_secs_f64());
    }

    fn nothing_left(&self, what: &str) {
        self.net.wait_no_server_sockets(&format!("{}, {what}", self.name), ENDING);
    }

    /// Stops the shim; it has freed every flow but those in TIME-WAIT.
    fn finish(mut self) -> Counts {
        thread::sleep(Duration::from_millis(2600));
        let sockets = self.net.client.tcp_sockets().expect("sockets can be listed");
        let to_vip: Vec<_> = sockets
            .iter()
            .filter(|socket| [Family::V4, Family::V6].iter().any(|family| socket.remote == target(*family)))
            .collect();
        let waiting = to_vip.iter().filter(|socket| socket.state == TcpState::TimeWait).count();
        assert_eq!(to_vip.len(), waiting, "{}: sockets left at the client: {to_vip:?}", self.name);
        let counts = self.net.stop_shim_and_count();
        println!("{}: flows={} with {waiting} in TIME-WAIT; {counts:?}", self.name, counts.flows());
        assert!(counts.flows() <= waiting as u64, "{}: {counts:?}", self.name);
        counts
    }
}

/// The path is learnt: the next connects hand over, if they may at all.
fn learn(case: &Case, service: &Service) {
    service.serve(echo);
    case.both("learning", |family| {
        for _ in 0..3 {
            let exchanged = exchange(family, 1000)?;
            assert!(exchanged.redirected(), "{exchanged:?}");
        }
        Ok(())
    });
}

fn server_speaks_first(case: &Case, service: &Service) {
    service.serve(speak_first);
    case.both("server speaks first", |family| {
        for _ in 0..10 {
            let mut stream = connect(family)?;
            read_card(&mut stream)?;
            transfer(&mut stream, TRANSFER)?;
        }
        Ok(())
    });
    case.nothing_left("server speaks first");
}

/// Both are idle for some seconds; then the client speaks, or the server does.
fn silent_at_first(case: &Case, service: &Service) {
    service.serve(|mut stream, number| {
        stream.set_read_timeout(Some(SILENCE))?;
        let asked = stream.read_exact(&mut [0]).is_ok();
        prepare(&stream)?;
        if asked {
            stream.write_all(b"c")?;
        } else {
            stream.write_all(b"s")?;
        }
        speak_first(stream, number)
    });
    case.both("both silent at first", |family| {
        let talk = |client_first: bool| -> io::Result<()> {
            let mut stream = connect(family)?;
            let mut who = [0];
            if client_first {
                thread::sleep(SILENCE * 2 / 3);
                stream.write_all(b"?")?;
            }
            stream.read_exact(&mut who)?;
            assert_eq!(&who, if client_first { b"c" } else { b"s" });
            read_card(&mut stream)?;
            transfer(&mut stream, TRANSFER)
        };
        thread::scope(|scope| {
            let threads =
                [true, false, true, false].map(|client_first| scope.spawn(move || talk(client_first)));
            threads.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
        })
    });
    case.nothing_left("both silent at first");
}

fn half_close(case: &Case, service: &Service) {
    // The client closes its half; the server answers only then.
    service.serve(|mut stream, _| {
        let taken = io::copy(&mut stream, &mut io::sink())?;
        thread::sleep(Duration::from_millis(300));
        stream.write_all(&taken.to_be_bytes())?;
        stream.write_all(&vec![7; TRANSFER])
    });
    case.both("the client closes its half", |family| {
        let mut stream = connect(family)?;
        stream.write_all(&vec![1; TRANSFER])?;
        stream.shutdown(Shutdown::Write)?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        assert_eq!(answer.len(), TRANSFER + 8);
        assert_eq!(answer[..8], (TRANSFER as u64).to_be_bytes());
        Ok(())
    });
    // The server closes its half at once; the client goes on sending.
    let taken = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&taken);
    service.serve(move |mut stream, _| {
        stream.write_all(&vec![7; TRANSFER])?;
        stream.shutdown(Shutdown::Write)?;
        let length = io::copy(&mut stream, &mut io::sink())?;
        counted.fetch_add(usize::try_from(length).unwrap_or_default(), Ordering::SeqCst);
        Ok(())
    });
    case.both("the server closes its half", |family| {
        let mut stream = connect(family)?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        assert_eq!(answer.len(), TRANSFER);
        thread::sleep(Duration::from_millis(300));
        stream.write_all(&vec![1; TRANSFER])
    });
    case.nothing_left("half-close");
    assert_eq!(taken.load(Ordering::SeqCst), 2 * TRANSFER, "{}", case.name);
}

fn reset_at_once(case: &Case, service: &Service) {
    service.serve(swallow);
    case.both("100 resets right after connect", |family| {
        for number in 0..100 {
            let mut stream = connect(family)?;
            if number % 2 == 1 {
                stream.write_all(b"?")?;
            }
            // Closing it resets.
            socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        }
        Ok(())
    });
    case.nothing_left("resets right after connect");
}

fn very_short(case: &Case, service: &Service) {
    service.serve(swallow);
    let before = service.accepted();
    case.both("300 connects closed at once", |family| {
        thread::scope(|scope| {
            let threads =
                [(); 2].map(|()| scope.spawn(move || (0..150).try_for_each(|_| connect(family).map(drop))));
            threads.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
        })
    });
    case.nothing_left("very short connections");
    assert_eq!(service.accepted() - before, 600, "{}", case.name);
}

/// Connects from a port of the program's choice: none that the kernel may have given to another connection before.
fn connect_from(family: Family, port: u16) -> io::Result<TcpStream> {
    let (domain, own): (_, IpAddr) = match family {
        Family::V4 => (Domain::IPV4, Ipv4Addr::UNSPECIFIED.into()),
        Family::V6 => (Domain::IPV6, Ipv6Addr::UNSPECIFIED.into()),
    };
    let end = Instant::now() + PATIENCE;
    loop {
        let socket = Socket::new(domain, Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::new(own, port).into())?;
        match socket.connect_timeout(&target(family).into(), PATIENCE) {
            // The connection before is still waiting for the last ACK.
            Err(error) if error.kind() == ErrorKind::AddrNotAvailable && Instant::now() < end => {
                thread::sleep(Duration::from_millis(1));
            }
            result => {
                result?;
                let stream = TcpStream::from(socket);
                return prepare(&stream).map(|()| stream);
            }
        }
    }
}

fn port_reuse(case: &Case, service: &Service) {
    // The server closes first: its kernel keeps TIME-WAIT while the same port comes again.
    service.serve(answer_and_close);
    case.both("20 connects from one port, closed by the server", |family| {
        for _ in 0..20 {
            let mut stream = connect_from(family, 30_001)?;
            stream.write_all(b"?")?;
            read_card(&mut stream)?;
            assert_eq!(stream.read(&mut [0])?, 0);
        }
        Ok(())
    });
    if case.half_opens_linger {
        // The server cannot have seen the reset of a handover whose ACK the firewall dropped: its half-open connection
        // waits, and the next SYN of that port meets it.
        thread::sleep(ENDING / 2);
        case.nothing_left("port reuse");
        return;
    }
    service.serve(swallow);
    case.both("20 connects from one port, reset by the client", |family| {
        for _ in 0..20 {
            let mut stream = connect_from(family, 30_002)?;
            stream.write_all(b"?")?;
            socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        }
        Ok(())
    });
    // The client closes first: its kernel lets the port out of TIME-WAIT after a second.
    case.net.client.sysctl("net.ipv4.tcp_tw_reuse", "1").expect("a sysctl");
    service.serve(echo);
    case.both("connects from one port in TIME-WAIT", |family| {
        for _ in 0..3 {
            let mut stream = connect_from(family, 30_003)?;
            stream.write_all(b"?")?;
            read_card(&mut stream)?;
            transfer(&mut stream, 1000)?;
            drop(stream);
            thread::sleep(Duration::from_millis(1200));
        }
        Ok(())
    });
    case.net.client.sysctl("net.ipv4.tcp_tw_reuse", "2").expect("a sysctl");
    case.nothing_left("port reuse");
}

fn refused(case: &Case, service: Service) {
    service.stop();
    // The agents do not know yet, then they do.
    for what in ["refused right after the program ended", "refused later"] {
        case.both(what, |family| {
            let start = Instant::now();
            let kind = connect(family).expect_err("nobody listens").kind();
            assert_eq!(kind, ErrorKind::ConnectionRefused);
            assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
            Ok(())
        });
        thread::sleep(AGENT_LOOKS);
    }
    case.nothing_left("refused");
}

fn servers_down(case: &Case) {
    for server in &case.net.servers {
        server.host.set_up("eth0", false).expect("a device");
    }
    case.both("connects while all servers are down", |family| {
        let start = Instant::now();
        let result = TcpStream::connect_timeout(&target(family), Duration::from_secs(4));
        let kind = result.expect_err("nobody is there").kind();
        let expected = [ErrorKind::TimedOut, ErrorKind::HostUnreachable, ErrorKind::NetworkUnreachable];
        assert!(expected.contains(&kind), "{kind}");
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
        Ok(())
    });
    case.nothing_left("servers down");
}

fn defer_accept(case: &Case) {
    let defer = |listener: &std::net::TcpListener| {
        nix::sys::socket::setsockopt(listener, DeferAccept, &2).expect("the option is known");
    };
    let service = Service::start_with(&case.net, defer, echo);
    case.both("TCP_DEFER_ACCEPT", |family| {
        for _ in 0..10 {
            exchange(family, 1000)?;
        }
        // Longer than probes wait, and longer than the server defers.
        for silence in [Duration::from_millis(700), Duration::from_secs(5)] {
            let mut stream = connect(family)?;
            thread::sleep(silence);
            stream.write_all(b"?")?;
            read_card(&mut stream)?;
            transfer(&mut stream, TRANSFER)?;
        }
        // Never a word.
        drop(connect(family)?);
        Ok(())
    });
    case.nothing_left("TCP_DEFER_ACCEPT");
    service.stop();
}

/// The mutes of [`defer_accept`] prove nothing against the path: connects are handed over as before.
fn still_handed_over(counts: &Counts) {
    assert_eq!(counts.of("reconnected"), 2, "one a family, to learn the path: {counts:?}");
}

fn run(continuation: &str, strict: bool) -> Counts {
    let case = Case::new(continuation, strict);
    let service = Service::start(&case.net, echo);
    learn(&case, &service);
    server_speaks_first(&case, &service);
    silent_at_first(&case, &service);
    half_close(&case, &service);
    reset_at_once(&case, &service);
    very_short(&case, &service);
    port_reuse(&case, &service);
    refused(&case, service);
    defer_accept(&case);
    servers_down(&case);
    case.finish()
}

#[test]
fn every_habit_by_handover_on_a_clean_path() {
    let counts = run("auto", false);
    assert_eq!(counts.of("handovers_failed"), 0, "{counts:?}");
    assert!(counts.of("handed_over") > 800, "{counts:?}");
    still_handed_over(&counts);
}

#[test]
fn every_habit_by_reconnect_on_a_clean_path() {
    let counts = run("reconnect", false);
    assert_eq!(counts.of("handed_over"), 0, "{counts:?}");
}

#[test]
fn every_habit_by_auto_behind_a_strict_firewall() {
    let counts = run("auto", true);
    assert_eq!((counts.of("handovers_failed"), counts.flows()), (0, 0), "{counts:?}");
    assert!(counts.of("reconnected") > 800, "{counts:?}");
}

#[test]
fn every_habit_by_handover_behind_a_strict_firewall() {
    let counts = run("handover", true);
    assert_eq!((counts.of("handovers_failed"), counts.flows()), (0, 0), "{counts:?}");
}

#[test]
fn every_habit_by_reconnect_behind_a_strict_firewall() {
    let counts = run("reconnect", true);
    assert_eq!((counts.of("handed_over"), counts.flows()), (0, 0), "{counts:?}");
}
