//! A service of the tests' own, on X and Y of every server, and clients of it: kernel sockets through the standard
//! library. Nothing here can wait for ever: every socket has a time-out.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use shunt_lab::{TcpSocket, TcpState};
use socket2::{Domain, Socket, Type};

use super::{Family, Net, OTHER, OTHER_SERVICE, wait_listening};

/// How long a socket of the tests waits for anything.
pub const PATIENCE: Duration = Duration::from_secs(12);
/// The agents look every second who listens on service ports.
pub const AGENT_LOOKS: Duration = Duration::from_millis(1300);
/// Bytes a transfer carries in each direction.
pub const TRANSFER: usize = 300_000;

/// What a service does with one connection; `u16` is the server's number.
type Handler = dyn Fn(TcpStream, u16) -> io::Result<()> + Send + Sync;

/// Listens on the redirect port and the service port of every server.
pub struct Service {
    stop: Arc<AtomicBool>,
    handler: Arc<Mutex<Arc<Handler>>>,
    /// Connections accepted so far.
    accepted: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl Service {
    /// Starts listening, with `handler` for every connection, and waits until the agents know.
    pub fn start(
        net: &Net,
        handler: impl Fn(TcpStream, u16) -> io::Result<()> + Send + Sync + 'static,
    ) -> Service {
        Self::start_with(net, |_| (), handler)
    }

    /// As [`start`](Self::start), with `prepare` called for every listening socket.
    pub fn start_with(
        net: &Net,
        prepare: impl Fn(&TcpListener) + Sync,
        handler: impl Fn(TcpStream, u16) -> io::Result<()> + Send + Sync + 'static,
    ) -> Service {
        let mut listeners = Vec::new();
        for server in &net.servers {
            for port in [OTHER, OTHER_SERVICE + server.number] {
                let listener = server.host.enter(|| listen(port));
                let listener = listener.expect("the namespace is there").expect("the port is free");
                prepare(&listener);
                listeners.push((server.number, listener));
            }
        }
        let handler: Arc<Handler> = Arc::new(handler);
        let mut service = Service {
            stop: Arc::default(),
            handler: Arc::new(Mutex::new(handler)),
            accepted: Arc::default(),
            thread: None,
        };
        let (stop, handler) = (Arc::clone(&service.stop), Arc::clone(&service.handler));
        let accepted = Arc::clone(&service.accepted);
        service.thread = Some(thread::spawn(move || accept_all(&listeners, &stop, &handler, &accepted)));
        for server in &net.servers {
            wait_listening(&server.host, OTHER_SERVICE + server.number);
        }
        thread::sleep(AGENT_LOOKS);
        service
    }

    /// Has another handler serve the connections accepted from now on.
    pub fn serve(&self, handler: impl Fn(TcpStream, u16) -> io::Result<()> + Send + Sync + 'static) {
        *self.handler.lock().expect("no handler panics while it is exchanged") = Arc::new(handler);
    }

    /// Connections accepted so far.
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }

    /// Stops listening at once; connections that are there go on.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.end();
    }
}

/// Listens in both families, with room for every connection of a test: a queue that overflows loses some.
fn listen(port: u16) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port).into())?;
    socket.listen(4096)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

fn accept_all(
    listeners: &[(u16, TcpListener)],
    stop: &AtomicBool,
    handler: &Mutex<Arc<Handler>>,
    accepted: &AtomicUsize,
) {
    while !stop.load(Ordering::SeqCst) {
        let mut ready: Vec<PollFd<'_>> =
            listeners.iter().map(|(_, listener)| PollFd::new(listener.as_fd(), PollFlags::POLLIN)).collect();
        let _ = poll(&mut ready, PollTimeout::from(20u8));
        for (number, listener) in listeners {
            while let Ok((stream, _)) = listener.accept() {
                accepted.fetch_add(1, Ordering::SeqCst);
                let handler = Arc::clone(&handler.lock().expect("no handler panics while it is exchanged"));
                let number = *number;
                thread::spawn(move || {
                    // Clients that reset, and time-outs, are part of what is tested; the client's side asserts.
                    let _ = prepare(&stream).and_then(|()| handler(stream, number));
                });
            }
        }
    }
}

/// A stream that blocks, but not for ever.
pub fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))
}

/// Who serves: the server's number and its own port.
fn card(stream: &TcpStream, number: u16) -> io::Result<[u8; 4]> {
    let (number, port) = (number.to_be_bytes(), stream.local_addr()?.port().to_be_bytes());
    Ok([number[0], number[1], port[0], port[1]])
}

/// Says who it is once it has got a byte, then sends back whatever comes, then closes.
pub fn echo(mut stream: TcpStream, number: u16) -> io::Result<()> {
    let mut buffer = vec![0; 65_536];
    stream.read_exact(&mut buffer[..1])?;
    stream.write_all(&card(&stream, number)?)?;
    loop {
        match stream.read(&mut buffer)? {
            0 => return stream.shutdown(Shutdown::Write),
            length => stream.write_all(&buffer[..length])?,
        }
    }
}

/// Says who it is without being asked, then as [`echo`].
pub fn speak_first(mut stream: TcpStream, number: u16) -> io::Result<()> {
    stream.write_all(&card(&stream, number)?)?;
    let mut buffer = vec![0; 65_536];
    loop {
        match stream.read(&mut buffer)? {
            0 => return stream.shutdown(Shutdown::Write),
            length => stream.write_all(&buffer[..length])?,
        }
    }
}

/// Says who it is once it has got a byte, and closes first.
pub fn answer_and_close(mut stream: TcpStream, number: u16) -> io::Result<()> {
    stream.read_exact(&mut [0])?;
    stream.write_all(&card(&stream, number)?)?;
    stream.shutdown(Shutdown::Write)?;
    stream.read_to_end(&mut Vec::new()).map(|_| ())
}

/// Takes whatever comes until the client closes.
pub fn swallow(mut stream: TcpStream, _: u16) -> io::Result<()> {
    io::copy(&mut stream, &mut io::sink()).map(|_| ())
}

/// Who answered, and how long it took.
#[derive(Debug, Clone, Copy)]
pub struct Exchanged {
    pub server: u16,
    /// The server's own port.
    pub port: u16,
    /// Until the connection was there.
    pub connect: Duration,
    /// Until the first answer.
    pub answer: Duration,
}

impl Exchanged {
    pub fn redirected(&self) -> bool {
        self.port == OTHER_SERVICE + self.server
    }
}

/// Reads who serves.
pub fn read_card(stream: &mut TcpStream) -> io::Result<(u16, u16)> {
    let mut card = [0; 4];
    stream.read_exact(&mut card)?;
    Ok((u16::from_be_bytes([card[0], card[1]]), u16::from_be_bytes([card[2], card[3]])))
}

pub fn target(family: Family) -> SocketAddr {
    SocketAddr::new(family.vip().parse().expect("an address"), OTHER)
}

/// Connects; call it inside the client's host.
pub fn connect(family: Family) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&target(family), PATIENCE)?;
    prepare(&stream)?;
    Ok(stream)
}

/// One connection to [`echo`] carrying `bytes` bytes each way, all compared, closed by the client first.
pub fn exchange(family: Family, bytes: usize) -> io::Result<Exchanged> {
    let start = Instant::now();
    let mut stream = connect(family)?;
    let connect = start.elapsed();
    stream.write_all(b"?")?;
    let (server, port) = read_card(&mut stream)?;
    let answer = start.elapsed();
    transfer(&mut stream, bytes)?;
    Ok(Exchanged { server, port, connect, answer })
}

/// Sends `bytes` bytes and FIN, and expects the same back and then FIN.
pub fn transfer(stream: &mut TcpStream, bytes: usize) -> io::Result<()> {
    let sent: Vec<u8> = (0..bytes).map(|at| (at % 251) as u8).collect();
    let mut writer = stream.try_clone()?;
    thread::scope(|scope| {
        let writing = scope.spawn(|| {
            writer.write_all(&sent)?;
            writer.shutdown(Shutdown::Write)
        });
        let mut received = Vec::with_capacity(bytes);
        stream.read_to_end(&mut received)?;
        writing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        if received == sent {
            Ok(())
        } else {
            let text = format!("{} of {bytes} bytes came back, or others", received.len());
            Err(io::Error::new(ErrorKind::InvalidData, text))
        }
    })
}

impl Net {
    /// Runs `f` inside the client for both families at once.
    pub fn in_both<T: Send>(&self, f: impl Fn(Family) -> T + Sync) -> [T; 2] {
        let inside = || {
            thread::scope(|scope| {
                Family::BOTH
                    .map(|family| {
                        let f = &f;
                        scope.spawn(move || f(family))
                    })
                    .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            })
        };
        self.client.enter(inside).expect("the namespace is there")
    }

    /// One exchange from the client.
    ///
    /// # Panics
    /// If it fails.
    pub fn exchange(&self, family: Family, bytes: usize) -> Exchanged {
        let result = self.client.enter(|| exchange(family, bytes)).expect("the namespace is there");
        result.unwrap_or_else(|error| panic!("{family:?}: {error}\n{}", self.logs()))
    }

    /// Starts the shim with `timers`, further lines for that table of its file.
    pub fn start_shim_with(&mut self, continuation: &str, timers: &str) {
        let text = self.client_config(continuation).replace("[timers]\n", &format!("[timers]\n{timers}\n"));
        let config = self.write("client.toml", &text);
        self.shim = Some(self.daemon(&self.client, "client", &config, &[]));
    }

    /// Stops the shim and says what it counted.
    pub fn stop_shim_and_count(&mut self) -> Counts {
        let mut shim = self.shim.take().expect("the shim runs");
        let status = shim.terminate(Duration::from_secs(10)).expect("the shim ends");
        let log = shim.log().expect("a log");
        assert!(status.success(), "the shim ended with {status}:\n{log}");
        let last = log.lines().rev().find(|line| line.contains("stopped") && line.contains("flows="));
        Counts(last.unwrap_or_else(|| panic!("no last line:\n{log}")).to_owned())
    }

    /// Connections of the service on the servers that are neither listening nor in TIME-WAIT.
    pub fn server_sockets(&self) -> Vec<(u16, TcpSocket)> {
        let mut found = Vec::new();
        for server in &self.servers {
            let ports = [OTHER, OTHER_SERVICE + server.number];
            let sockets = server.host.tcp_sockets().expect("sockets can be listed");
            found.extend(
                sockets
                    .into_iter()
                    .filter(|socket| ports.contains(&socket.local.port()))
                    .filter(|socket| !matches!(socket.state, TcpState::Listen | TcpState::TimeWait))
                    .map(|socket| (server.number, socket)),
            );
        }
        found
    }

    /// Waits until no connection is left on the servers.
    ///
    /// # Panics
    /// If some are left after `limit`.
    pub fn wait_no_server_sockets(&self, what: &str, limit: Duration) {
        let end = Instant::now() + limit;
        loop {
            let left = self.server_sockets();
            if left.is_empty() {
                return;
            }
            assert!(
                Instant::now() < end,
                "{what}: {} connections left: {:?}\n{}",
                left.len(),
                left.first(),
                self.logs()
            );
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Half-open connections on all servers.
    pub fn half_open(&self) -> usize {
        let count =
            |host: &shunt_lab::Host| host.tcp_count(TcpState::SynReceived).expect("sockets are listed");
        self.servers.iter().map(|server| count(&server.host)).sum()
    }
}

/// The shim's last line.
#[derive(Debug, Clone)]
pub struct Counts(String);

impl Counts {
    /// Connections it still knew.
    pub fn flows(&self) -> u64 {
        self.number("flows=")
    }

    /// A counter of the machine, by the name of its field.
    pub fn of(&self, counter: &str) -> u64 {
        self.number(&format!(" {counter}: "))
    }

    fn number(&self, name: &str) -> u64 {
        // The first field stands behind the brace instead of a comma.
        let text = self.0.replace('{', "{ ");
        let digits: Option<String> =
            text.split_once(name).map(|(_, rest)| rest.chars().take_while(char::is_ascii_digit).collect());
        digits
            .and_then(|digits| digits.parse().ok())
            .unwrap_or_else(|| panic!("no {name} in the shim's last line: {}", self.0))
    }
}

/// Milliseconds, with a sign.
pub fn extra(measured: Duration, baseline: Duration) -> f64 {
    (measured.as_secs_f64() - baseline.as_secs_f64()) * 1000.0
}

/// The least: what a busy machine has added least to.
pub fn quickest(values: impl Iterator<Item = Duration>) -> Duration {
    values.min().unwrap_or_default()
}
