//! A client with the shim, and a host across the wire that is the VIPs' server.

#![allow(dead_code, unreachable_pub, reason = "each test file uses a part")]

pub mod scripted;

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use shunt_client_shim::{Config, Error, RunOptions, run};
use shunt_host::Source;
use shunt_lab::{Child, Host, Lab, LinkOptions, Via};
use tokio::sync::oneshot;

pub const VIP4: &str = "203.0.113.10";
pub const VIP6: &str = "2001:db8::10";
pub const VIPS: [&str; 2] = [VIP4, VIP6];
/// The redirect port.
pub const X: u16 = 443;

pub struct Net {
    pub client: Host,
    pub server: Host,
    pub state: tempfile::TempDir,
    _lab: Lab,
}

pub fn net() -> Net {
    let lab = Lab::new().expect("a lab");
    let (client, server) = (lab.host("client").unwrap(), lab.host("server").unwrap());
    lab.link(&client, "eth0", &server, "eth0", LinkOptions::default()).unwrap();
    for (host, v4, v6) in [(&client, "10.0.0.1/24", "fd00::1/64"), (&server, "10.0.0.2/24", "fd00::2/64")] {
        host.address("eth0", v4).unwrap();
        host.address("eth0", v6).unwrap();
    }
    client.route(&format!("{VIP4}/32"), Via::gateway("10.0.0.2")).unwrap();
    client.route(&format!("{VIP6}/128"), Via::gateway("fd00::2")).unwrap();
    let net = Net { client, server, state: tempfile::tempdir().unwrap(), _lab: lab };
    // The kernel adds these a moment after the addresses; snapshots are to agree.
    eventually("the client's own addresses", || {
        let local = net.client_runs("ip -6 route show table local");
        local.contains("local fd00::1 ") && local.contains("local fe80::")
    });
    net
}

/// The smallest configuration for both VIPs.
pub fn config(continuation: &str, extra: &str) -> String {
    let vip = |vip| format!("[[vip]]\naddress = \"{vip}\"\ncontinuation = \"{continuation}\"\n");
    format!("role = \"client\"\n{extra}\n{}{}", vip(VIP4), vip(VIP6))
}

/// A shim on a thread of the test.
pub struct Running {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<(), Error>>>,
}

impl Net {
    pub fn start(&self, text: &str) -> Running {
        self.try_start(text, None).unwrap_or_else(|error| panic!("the shim does not start: {error}"))
    }

    pub fn try_start(&self, text: &str, capture: Option<PathBuf>) -> Result<Running, Error> {
        log_to_stderr();
        let config = Config::from_source(&Source::new("client.toml", text)).unwrap_or_else(|e| panic!("{e}"));
        let (ready, is_ready) = oneshot::channel();
        let (stop, stopped) = oneshot::channel::<()>();
        let options = RunOptions {
            ready: Some(ready),
            capture,
            state_dir: self.state.path().to_owned(),
            ..RunOptions::default()
        };
        let host = self.client.clone();
        let thread = std::thread::spawn(move || {
            let inside = || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(run(config, options, async { drop(stopped.await) }))
            };
            host.enter(inside).expect("the client's namespace")
        });
        if is_ready.blocking_recv().is_err() {
            return Err(thread.join().unwrap().expect_err("it ended before it was ready"));
        }
        Ok(Running { stop: Some(stop), thread: Some(thread) })
    }

    /// A shim in a process of its own; see [`shim_process`].
    pub fn spawn(&self, text: &str) -> Child {
        let folder = self.state.path();
        let file = folder.join("client.toml");
        std::fs::write(&file, text).unwrap();
        let number = std::fs::read_dir(folder).unwrap().count();
        let log = folder.join(format!("shim.{number}.log"));
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "shim_process", "--nocapture", "--test-threads=1"]);
        command.env("SHUNT_TEST_CONFIG", &file).env("SHUNT_TEST_STATE", folder);
        let mut child = self.client.spawn_logged(&mut command, &log).unwrap();
        child.wait_for_log("shim is ready", Duration::from_secs(10)).unwrap();
        child
    }

    /// Everything of the client that the shim might change.
    pub fn snapshot(&self) -> String {
        [
            "ip -4 rule show",
            "ip -6 rule show",
            "ip -4 route show table all",
            "ip -6 route show table all",
            "ip -o link show",
            "nft list ruleset",
            "sysctl -a -r net.ipv[46].(ip_forward|tcp_early_demux|ip_local_reserved_ports|conf..*.(rp_filter|forwarding|accept_ra|accept_local)$)",
        ]
        .map(|words| format!("# {words}\n{}", self.client_runs(words)))
        .concat()
    }

    pub fn client_runs(&self, words: &str) -> String {
        let mut words = words.split(' ');
        let mut command = Command::new(words.next().unwrap());
        let output = self.client.run(command.args(words)).unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Gives the VIPs to the server's kernel: a plain server without any extension.
    pub fn plain_server(&self) {
        self.server.address("lo", &format!("{VIP4}/32")).unwrap();
        self.server.address("lo", &format!("{VIP6}/128")).unwrap();
        let listener = self.server.enter(|| TcpListener::bind(("::", X))).unwrap().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || echo(stream));
            }
        });
    }

    /// A connection of the client's kernel.
    pub fn connect(&self, vip: &str, port: u16) -> TcpStream {
        let address = SocketAddr::new(vip.parse::<IpAddr>().unwrap(), port);
        let connect = || TcpStream::connect_timeout(&address, Duration::from_secs(10));
        let stream = self.client.enter(connect).unwrap().unwrap_or_else(|e| panic!("{address}: {e}"));
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        // The logs of child processes, beside what the test itself has said.
        for entry in std::fs::read_dir(self.state.path()).into_iter().flatten().flatten() {
            if let Ok(text) = std::fs::read_to_string(entry.path()) {
                eprintln!("--- {}\n{text}", entry.path().display());
            }
        }
    }
}

impl Running {
    /// Stops the shim in order.
    pub fn stop(mut self) -> Result<(), Error> {
        drop(self.stop.take());
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn echo(mut stream: TcpStream) {
    let mut bytes = [0; 16384];
    while let Ok(n @ 1..) = stream.read(&mut bytes) {
        if stream.write_all(&bytes[..n]).is_err() {
            return;
        }
    }
    let _ = stream.shutdown(Shutdown::Write);
}

/// Sends `length` bytes and returns all that comes back; both ways at once.
pub fn exchange(stream: TcpStream, length: usize) -> Vec<u8> {
    let sent = pattern(length);
    let mut writer = stream.try_clone().unwrap();
    let writing = std::thread::spawn(move || {
        writer.write_all(&sent).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut back = Vec::new();
    let mut stream = stream;
    stream.read_to_end(&mut back).unwrap();
    writing.join().unwrap();
    back
}

pub fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 7 + i / 251) as u8).collect()
}

pub fn eventually(what: &str, mut is_true: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(15);
    while !is_true() {
        assert!(Instant::now() < end, "not within 15 s: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

pub fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| "info,shunt_client_shim=debug".into());
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
}

/// The body of the `shim_process` test, which [`Net::spawn`] starts as a process of its own.
pub fn shim_process() {
    let Ok(file) = std::env::var("SHUNT_TEST_CONFIG") else { return };
    let state = std::env::var("SHUNT_TEST_STATE").unwrap();
    log_to_stderr();
    let config = Config::load(Path::new(&file)).unwrap_or_else(|e| panic!("{e}"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (ready, is_ready) = oneshot::channel();
        let options = RunOptions { ready: Some(ready), state_dir: state.into(), ..RunOptions::default() };
        let mut terminate =
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).unwrap();
        tokio::spawn(async {
            if is_ready.await.is_ok() {
                eprintln!("shim is ready");
            }
        });
        run(config, options, async move {
            let _ = terminate.recv().await;
        })
        .await
        .unwrap();
    });
}
