//! A UDP service of the tests' own on the redirect port and the service port of every server, and a client of it: kernel
//! sockets. Datagrams may be lost, so a client asks again; nothing waits for ever.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::{Family, Net, OTHER, OTHER_SERVICE};

/// How long a client waits for one answer, and how often it asks.
const ONE_ANSWER: Duration = Duration::from_millis(1500);
const ATTEMPTS: u32 = 10;
/// Bytes in front of an answer's content: the server's number and the question's number.
const CARD: usize = 4;

/// The balancer's file with the service [`OTHER`] reached by UDP, too.
pub fn with_udp(text: &str) -> String {
    let port = format!("redirect_port = {OTHER}\n");
    assert!(text.contains(&port));
    text.replace(&port, &format!("{port}protocols = [\"tcp\", \"udp\"]\n"))
}

/// Answers on every server; ends when dropped.
pub struct Answerer {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Answerer {
    pub fn start(net: &Net) -> Answerer {
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for server in &net.servers {
            for port in [OTHER, OTHER_SERVICE + server.number] {
                let bind = || UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)).expect("the port is free");
                let socket = server.host.enter(bind).expect("a namespace");
                socket.set_read_timeout(Some(Duration::from_millis(100))).expect("a time-out");
                let (stop, number) = (Arc::clone(&stop), server.number);
                threads.push(std::thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        answer(&socket, number);
                    }
                }));
            }
        }
        Answerer { stop, threads }
    }
}

impl Drop for Answerer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// A question is: its number (2 bytes), the answer's length (4 bytes), and content. The answer: the server's number, the
/// question's, and content.
fn answer(socket: &UdpSocket, number: u16) {
    let mut question = vec![0; 65_536];
    // Also the error of an answer before, which some client did not wait for.
    let Ok((length, client)) = socket.recv_from(&mut question) else { return };
    assert!(question[6..length].iter().enumerate().all(|(at, byte)| *byte == content(at)));
    let wanted = u32::from_be_bytes([question[2], question[3], question[4], question[5]]) as usize;
    let mut answer = number.to_be_bytes().to_vec();
    answer.extend_from_slice(&question[..2]);
    answer.extend((0..wanted.saturating_sub(CARD)).map(content));
    // Too big for a path that is just being learnt: the client asks again.
    let _ = socket.send_to(&answer, client);
}

fn content(at: usize) -> u8 {
    (at % 251) as u8
}

/// Who answered, and when.
#[derive(Debug, Clone, Copy)]
pub struct Answered {
    pub server: u16,
    pub attempts: u32,
}

/// A client's socket, connected: it takes answers from the VIP and the port alone.
pub fn socket(net: &Net, family: Family, port: u16) -> UdpSocket {
    let to = SocketAddr::new(family.vip().parse::<IpAddr>().expect("an address"), port);
    let any: IpAddr = match family {
        Family::V4 => [0, 0, 0, 0].into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    };
    let connect = || -> std::io::Result<UdpSocket> {
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(ONE_ANSWER))?;
        Ok(socket)
    };
    net.client.enter(connect).expect("a namespace").expect("a socket")
}

/// Asks `question` bytes for `answer` bytes (at least 8), until the answer is there.
///
/// # Panics
/// There is none in ten attempts, or it is not what was asked for.
pub fn ask_by(socket: &UdpSocket, net: &Net, question: usize, answer: usize) -> Answered {
    for attempt in 1..=ATTEMPTS {
        let mut asked = (attempt as u16).to_be_bytes().to_vec();
        asked.extend_from_slice(&(answer as u32).to_be_bytes());
        asked.extend((0..question.saturating_sub(6)).map(content));
        let mut buffer = vec![0; 65_536];
        // An ICMP error about the attempt before may be what sending or receiving tells.
        if socket.send(&asked).is_err() {
            continue;
        }
        while let Ok(length) = socket.recv(&mut buffer) {
            assert_eq!(length, answer, "the answer's length\n{}", net.logs());
            assert!(buffer[CARD..length].iter().enumerate().all(|(at, byte)| *byte == content(at)));
            if buffer[2..4] == (attempt as u16).to_be_bytes() {
                return Answered { server: u16::from_be_bytes([buffer[0], buffer[1]]), attempts: attempt };
            }
        }
    }
    panic!("no answer of {answer} bytes to {question} bytes from {socket:?}\n{}", net.logs());
}

/// The same by a socket of its own.
pub fn ask(net: &Net, family: Family, port: u16, question: usize, answer: usize) -> Answered {
    ask_by(&socket(net, family, port), net, question, answer)
}
