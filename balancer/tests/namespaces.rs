//! The balancer between kernels: plain clients, real routers, both modes and families.
//!
//! ```text
//! client - rc =1400= lb - s1             (network mode)
//!                     ` - r1 =1280= r2 - s2
//! ```

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shunt_balancer::{Config, RunOptions};
use shunt_lab::{Host, Lab, LinkOptions, Via};
use tokio::sync::oneshot;

const PATIENCE: Duration = Duration::from_secs(10);
const VIPS: [&str; 2] = ["203.0.113.10", "2001:db8::10"];

/// A balancer running inside a host.
struct Running {
    host: Host,
    options: shunt_host::HostOptions,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<(), shunt_balancer::Error>>>,
}

impl Running {
    fn start(host: &Host, file: &Path, capture: Option<PathBuf>) -> Running {
        let config = Config::load(file).unwrap_or_else(|error| panic!("{error}"));
        let options = config.host().clone();
        let (stop, stopped) = oneshot::channel();
        let (ready, is_ready) = oneshot::channel();
        let inside = host.clone();
        let thread = std::thread::spawn(move || {
            inside
                .enter(|| {
                    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                    let options = RunOptions { capture, ready: Some(ready), ..RunOptions::default() };
                    runtime.block_on(shunt_balancer::run(config, options, async {
                        let _ = stopped.await;
                    }))
                })
                .unwrap()
        });
        let running = Running { host: host.clone(), options, stop: Some(stop), thread: Some(thread) };
        if is_ready.blocking_recv().is_ok() {
            return running;
        }
        panic!("{:?}", running.stop_now())
    }

    fn stop_now(mut self) -> Result<(), shunt_balancer::Error> {
        let _ = self.stop.take().map(|stop| stop.send(()));
        self.thread.take().unwrap().join().unwrap()
    }

    /// Stops it; nothing of it is left on the host.
    fn stop(self) {
        let (host, options) = (self.host.clone(), self.options.clone());
        self.stop_now().unwrap();
        let left = host
            .enter(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                let state = Path::new(shunt_host::DEFAULT_STATE_DIR);
                runtime.block_on(shunt_host::Host::sweep(state, "balancer", &options)).unwrap()
            })
            .unwrap();
        assert_eq!(left, 0);
        assert_eq!(host.read_sysctl("net.ipv4.ip_forward").unwrap(), "0");
    }
}

/// Serves on ports, saying its number first, then as many bytes as asked for after as many as announced, again and again.
fn serve(host: &Host, number: u8, ports: &[u16]) {
    for &port in ports {
        host.enter(|| {
            let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).unwrap();
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    std::thread::spawn(move || converse(stream, number));
                }
            });
        })
        .unwrap();
    }
}

fn converse(mut stream: TcpStream, number: u8) -> std::io::Result<()> {
    stream.write_all(&[number])?;
    loop {
        let mut lengths = [0; 8];
        stream.read_exact(&mut lengths)?;
        let both = u64::from_be_bytes(lengths);
        let (up, down) = ((both >> 32) as u32, both as u32);
        let mut sum = 0u8;
        let mut left = up as usize;
        let mut chunk = vec![0; 65536];
        while left > 0 {
            let room = left.min(chunk.len());
            let got = stream.read(&mut chunk[..room])?;
            if got == 0 {
                return Ok(());
            }
            sum = chunk[..got].iter().fold(sum, |sum, byte| sum.wrapping_add(*byte));
            left -= got;
        }
        stream.write_all(&[sum])?;
        stream.write_all(&vec![7; down as usize])?;
    }
}

/// A plain client's connection, and the server it met.
struct Conversation {
    stream: TcpStream,
    server: u8,
}

impl Conversation {
    fn open(client: &Host, vip: &str, port: u16) -> std::io::Result<Conversation> {
        let to = SocketAddr::new(vip.parse::<IpAddr>().unwrap(), port);
        let mut stream = client.enter(|| TcpStream::connect_timeout(&to, PATIENCE)).unwrap()?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut server = [0];
        stream.read_exact(&mut server)?;
        Ok(Conversation { stream, server: server[0] })
    }

    /// Sends `up` bytes, receives `down`.
    fn exchange(&mut self, up: usize, down: usize) {
        self.stream.write_all(&(up as u32).to_be_bytes()).unwrap();
        self.stream.write_all(&(down as u32).to_be_bytes()).unwrap();
        let data: Vec<u8> = (0..up).map(|n| (n * 31 % 251) as u8).collect();
        self.stream.write_all(&data).unwrap();
        let mut back = vec![0; down + 1];
        self.stream.read_exact(&mut back).unwrap();
        assert_eq!(back[0], data.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)));
        assert!(back[1..].iter().all(|byte| *byte == 7));
    }
}

fn forwards(host: &Host) {
    host.sysctl("net.ipv4.ip_forward", "1").unwrap();
    host.sysctl("net.ipv6.conf.all.forwarding", "1").unwrap();
}

fn link(lab: &Lab, (a, a_name): (&Host, &str), (b, b_name): (&Host, &str), mtu: u32, net: u8) {
    lab.link(a, a_name, b, b_name, LinkOptions { mtu }).unwrap();
    for (host, name, last) in [(a, a_name, 1), (b, b_name, 2)] {
        host.address(name, &format!("10.0.{net}.{last}/24")).unwrap();
        host.address(name, &format!("fd00:{net}::{last}/64")).unwrap();
    }
}

fn default_route(host: &Host, net: u8, last: u8) {
    host.route("0.0.0.0/0", Via::gateway(format!("10.0.{net}.{last}"))).unwrap();
    host.route("::/0", Via::gateway(format!("fd00:{net}::{last}"))).unwrap();
}

fn route(host: &Host, to: u8, net: u8, last: u8) {
    host.route(&format!("10.0.{to}.0/24"), Via::gateway(format!("10.0.{net}.{last}"))).unwrap();
    host.route(&format!("fd00:{to}::/64"), Via::gateway(format!("fd00:{net}::{last}"))).unwrap();
}

/// The network of the picture; nets: 1 client, 2 rc, 3 s1, 4 r1, 5 middle, 6 s2.
fn network(lab: &Lab) -> [Host; 4] {
    let [client, rc, lb, s1, r1, r2, s2] =
        ["client", "rc", "lb", "s1", "r1", "r2", "s2"].map(|name| lab.host(name).unwrap());
    link(lab, (&rc, "eth0"), (&client, "eth0"), 1500, 1);
    link(lab, (&lb, "up0"), (&rc, "eth1"), 1400, 2);
    link(lab, (&lb, "down1"), (&s1, "eth0"), 1500, 3);
    link(lab, (&lb, "down2"), (&r1, "eth0"), 1500, 4);
    link(lab, (&r1, "eth1"), (&r2, "eth0"), 1280, 5);
    link(lab, (&r2, "eth1"), (&s2, "eth0"), 1500, 6);
    for router in [&rc, &r1, &r2] {
        forwards(router);
    }
    default_route(&client, 1, 1);
    default_route(&rc, 2, 1);
    default_route(&s1, 3, 1);
    default_route(&s2, 6, 1);
    default_route(&r2, 5, 1);
    default_route(&r1, 4, 1);
    route(&r1, 6, 5, 2);
    route(&lb, 1, 2, 2);
    route(&lb, 5, 4, 2);
    route(&lb, 6, 4, 2);
    serve(&s1, 1, &[443, 41001]);
    serve(&s2, 2, &[443, 41002]);
    [client, lb, s1, s2]
}

const NETWORK: &str = r#"role = "balancer"
vips = ["203.0.113.10", "2001:db8::10"]
[[service]]
name = "web"
redirect_port = 443
[[server]]
name = "s1"
address = ["10.0.3.2", "fd00:3::2"]
ports = { web = 41001 }
[[server]]
name = "s2"
address = ["10.0.6.2", "fd00:6::2"]
ports = { web = 41002 }
"#;

fn file(folder: &tempfile::TempDir, text: &str) -> PathBuf {
    let path = folder.path().join("balancer.toml");
    std::fs::write(&path, text).unwrap();
    path
}

fn servers_met(client: &Host, vip: &str, port: u16, connections: usize) -> [usize; 3] {
    let mut met = [0; 3];
    for _ in 0..connections {
        let mut conversation = Conversation::open(client, vip, port).unwrap();
        conversation.exchange(10, 1000);
        met[usize::from(conversation.server)] += 1;
    }
    met
}

fn plain_clients_are_served(client: &Host) {
    for vip in VIPS {
        assert_eq!(servers_met(client, vip, 41001, 3), [0, 3, 0]);
        assert_eq!(servers_met(client, vip, 41002, 3), [0, 0, 3]);
        let [_, first, second] = servers_met(client, vip, 443, 40);
        assert!(first >= 5 && second >= 5, "{vip}: {first} and {second}");
        for port in [41001, 41002] {
            let mut bulk = Conversation::open(client, vip, port).unwrap();
            bulk.exchange(3_000_000, 3_000_000);
        }
    }
}

/// SIGHUP is the whole process's: tests that send or would feel one take turns.
static TURNS: std::sync::Mutex<()> = std::sync::Mutex::new(());

#[test]
fn network_mode_serves_plain_clients_over_small_mtus_and_reloads_without_breaking_any() {
    let _turn = TURNS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let lab = Lab::new().unwrap();
    let [client, lb, ..] = network(&lab);
    let folder = tempfile::tempdir().unwrap();
    let path = file(&folder, NETWORK);
    let capture = folder.path().join("balancer.pcapng");
    let running = Running::start(&lb, &path, Some(capture.clone()));
    plain_clients_are_served(&client);

    let mut open: Vec<Conversation> = VIPS
        .iter()
        .flat_map(|vip| [41001, 41002].map(|port| Conversation::open(&client, vip, port).unwrap()))
        .collect();
    // Traffic that never stops, whatever is reloaded.
    let busy = Arc::new(AtomicBool::new(true));
    let traffic: Vec<JoinHandle<()>> = VIPS
        .iter()
        .map(|vip| {
            let mut conversation = Conversation::open(&client, vip, 41002).unwrap();
            let busy = Arc::clone(&busy);
            std::thread::spawn(move || {
                while busy.load(Ordering::Relaxed) {
                    conversation.exchange(20_000, 20_000);
                }
            })
        })
        .collect();
    let reload = |text: &str| {
        file(&folder, text);
        kill(Pid::this(), Signal::SIGHUP).unwrap();
        std::thread::sleep(Duration::from_secs(1));
    };
    // A drained server keeps its connections and gets no new plain ones (B7).
    reload(&NETWORK.replace("name = \"s1\"", "name = \"s1\"\nstate = \"drain\""));
    assert_eq!(servers_met(&client, VIPS[0], 443, 20), [0, 0, 20]);
    assert_eq!(servers_met(&client, VIPS[1], 443, 20), [0, 0, 20]);
    for conversation in &mut open {
        conversation.exchange(1000, 100_000);
    }
    // A wrong file is refused whole.
    reload(&NETWORK.replace("name = \"s1\"", "name = \"s1\"\nstate = \"drian\""));
    assert_eq!(servers_met(&client, VIPS[0], 443, 10), [0, 0, 10]);
    // A server that has left is not reached any more, the other's connections go on.
    reload(&NETWORK.replace(
        "[[server]]\nname = \"s1\"\naddress = [\"10.0.3.2\", \"fd00:3::2\"]\nports = { web = 41001 }\n",
        "",
    ));
    for conversation in open.iter_mut().filter(|conversation| conversation.server == 2) {
        conversation.exchange(1000, 100_000);
    }
    // And comes back.
    reload(NETWORK);
    for conversation in &mut open {
        conversation.exchange(100_000, 1000);
    }
    busy.store(false, Ordering::Relaxed);
    for thread in traffic {
        thread.join().unwrap();
    }
    running.stop();
    assert!(std::fs::metadata(&capture).unwrap().len() > 1_000_000);
}

#[test]
fn a_restarted_balancer_carries_on_established_connections() {
    let _turn = TURNS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let lab = Lab::new().unwrap();
    let [client, lb, ..] = network(&lab);
    let folder = tempfile::tempdir().unwrap();
    let path = file(&folder, NETWORK);
    let running = Running::start(&lb, &path, None);
    let mut open: Vec<Conversation> = VIPS
        .iter()
        .flat_map(|vip| [443, 41001, 41002].map(|port| Conversation::open(&client, vip, port).unwrap()))
        .collect();
    running.stop();
    let again = Running::start(&lb, &path, None);
    for conversation in &mut open {
        conversation.exchange(10_000, 10_000);
    }
    again.stop();
}

/// `client - lb = s1, s2`, each server on a link of its own: s1 with the VIPs there, s2 with the VIPs on its loopback
/// and an address there to send them by.
#[test]
fn direct_mode_serves_plain_clients_with_nothing_rewritten() {
    let _turn = TURNS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let lab = Lab::new().unwrap();
    let [client, lb, s1, s2] = ["client", "lb", "s1", "s2"].map(|name| lab.host(name).unwrap());
    link(&lab, (&lb, "up0"), (&client, "eth0"), 1500, 1);
    link(&lab, (&lb, "down1"), (&s1, "eth0"), 1500, 3);
    link(&lab, (&lb, "down2"), (&s2, "eth0"), 1280, 4);
    default_route(&client, 1, 1);
    default_route(&s1, 3, 1);
    default_route(&s2, 4, 1);
    for (server, device) in [(&s1, "eth0"), (&s2, "lo")] {
        server.address(device, "203.0.113.10/32").unwrap();
        server.address(device, "2001:db8::10/128").unwrap();
    }
    // Beside its service and the shared port, s2 takes what nobody knows.
    serve(&s1, 1, &[443, 41001]);
    serve(&s2, 2, &[443, 41002, 8080]);
    let text = NETWORK
        .replacen('\n', "\nforward = \"direct\"\ndefault_server = \"s2\"\n", 1)
        .replace("address = [\"10.0.3.2\", \"fd00:3::2\"]", "device = \"down1\"")
        .replace(
            "address = [\"10.0.6.2\", \"fd00:6::2\"]",
            "device = \"down2\"\ngateway = [\"10.0.4.2\", \"fd00:4::2\"]",
        );
    let folder = tempfile::tempdir().unwrap();
    let running = Running::start(&lb, &file(&folder, &text), None);
    plain_clients_are_served(&client);
    for vip in VIPS {
        assert_eq!(servers_met(&client, vip, 8080, 2), [0, 0, 2]);
    }
    running.stop();
}
