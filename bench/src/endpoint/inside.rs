//! The process in which the endpoint runs: it does what lines on standard input say, and answers each with one.

use std::io::{BufRead as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use shunt_stack::device::{TunDevice, TunOptions};
use shunt_stack::endpoint::{ClientOptions, Endpoint, TcpOptions, TcpStream};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::JoinSet;

use super::ports;

/// The kernel's address, and the endpoint's ones.
pub const KERNEL: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const OWN: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 9, 0, 2), Ipv4Addr::new(10, 9, 0, 3)];
/// The device.
pub const DEVICE: &str = "tun0";

/// Read and written at a time.
const PIECE: usize = 256 << 10;
/// Not measured at the beginning of a stream.
const WARM_UP: Duration = Duration::from_millis(300);
/// Connections opened at a time.
const AT_ONCE: usize = 64;
/// How long one may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// How the endpoint's process is started.
#[derive(Debug, Clone, Args)]
pub struct Inside {
    /// A device without super-packets
    #[arg(long)]
    segments: bool,
    /// Connections at the most
    #[arg(long, default_value_t = 100_000)]
    connections: usize,
    /// Bytes of each connection's buffers, if not the default
    #[arg(long)]
    buffer: Option<usize>,
}

impl Inside {
    /// Until standard input ends.
    ///
    /// # Errors
    /// The device cannot be made, or something that was asked fails.
    pub async fn run(&self) -> Result<()> {
        let mut device = TunOptions::new(DEVICE);
        device.super_packets = !self.segments;
        let device = TunDevice::create(device)?;
        let mut tcp = TcpOptions { max_connections: self.connections, ..TcpOptions::default() };
        if let Some(bytes) = self.buffer {
            (tcp.receive_buffer, tcp.send_buffer) = (bytes, bytes);
        }
        let options = ClientOptions {
            addresses: OWN.map(IpAddr::V4).into(),
            ports: 1024..=65_535,
            tcp,
            ..ClientOptions::default()
        };
        let endpoint = Endpoint::client(device, options)?;
        let mut open = Vec::new();
        answer("ready")?;
        loop {
            let line = tokio::task::spawn_blocking(|| std::io::stdin().lock().lines().next()).await?;
            let Some(line) = line.transpose()? else { return Ok(()) };
            let (word, number) = line.split_once(' ').context("a word and a number")?;
            let number: u64 = number.parse()?;
            let time = Duration::from_millis(number);
            let result = match word {
                "send" => send(&endpoint, time).await?,
                "receive" => receive(&endpoint, time).await?,
                "connect" => connect(&endpoint, time).await?,
                "hold" => hold(&endpoint, &mut open, usize::try_from(number)?).await?,
                _ => bail!("what is {word}?"),
            };
            answer(&result.to_string())?;
        }
    }
}

fn answer(text: &str) -> Result<()> {
    println!("{text}");
    Ok(std::io::stdout().flush()?)
}

fn at(port: u16) -> SocketAddr {
    SocketAddr::new(KERNEL.into(), port)
}

/// Gigabits a second that went out, beyond what buffers hold.
async fn send(endpoint: &Endpoint, time: Duration) -> Result<f64> {
    let mut stream = endpoint.connect(at(ports::SINK)).await?;
    let piece = vec![7; PIECE];
    let rate = timed(time, async || Ok(stream.write(&piece).await?)).await?;
    stream.shutdown().await?;
    Ok(rate)
}

/// Gigabits a second that came in.
async fn receive(endpoint: &Endpoint, time: Duration) -> Result<f64> {
    let mut stream = endpoint.connect(at(ports::SOURCE)).await?;
    let mut piece = vec![0; PIECE];
    timed(time, async || Ok(stream.read(&mut piece).await?)).await
}

async fn timed(time: Duration, mut step: impl AsyncFnMut() -> Result<usize>) -> Result<f64> {
    let warm = Instant::now() + WARM_UP;
    while Instant::now() < warm {
        moved(step().await?)?;
    }
    let (start, mut bytes) = (Instant::now(), 0);
    while start.elapsed() < time {
        bytes += moved(step().await?)?;
    }
    Ok(bytes as f64 * 8.0 / start.elapsed().as_secs_f64() / 1e9)
}

fn moved(bytes: usize) -> Result<u64> {
    if bytes == 0 {
        bail!("the stream ended too early");
    }
    Ok(bytes as u64)
}

/// Connections a second.
async fn connect(endpoint: &Endpoint, time: Duration) -> Result<f64> {
    let done = Arc::new(AtomicU64::new(0));
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    for _ in 0..AT_ONCE {
        let (endpoint, done) = (endpoint.clone(), Arc::clone(&done));
        tasks.spawn(async move {
            while start.elapsed() < time {
                let mut stream = ask(&endpoint, ports::BRIEF).await?;
                // The kernel closes first.
                stream.read_to_end(&mut Vec::new()).await?;
                done.fetch_add(1, Ordering::Relaxed);
            }
            anyhow::Ok(())
        });
    }
    while let Some(task) = tasks.join_next().await {
        task??;
    }
    Ok(done.load(Ordering::Relaxed) as f64 / start.elapsed().as_secs_f64())
}

/// Opens connections until there are `count`.
async fn hold(endpoint: &Endpoint, open: &mut Vec<TcpStream>, count: usize) -> Result<f64> {
    let mut tasks = JoinSet::new();
    while open.len() < count {
        while tasks.len() < AT_ONCE.min(count - open.len()) {
            let endpoint = endpoint.clone();
            tasks.spawn(async move { ask(&endpoint, ports::HOLD).await });
        }
        if let Some(stream) = tasks.join_next().await {
            open.push(stream??);
        }
    }
    Ok(open.len() as f64)
}

/// A connection over which a byte went there and back.
async fn ask(endpoint: &Endpoint, port: u16) -> Result<TcpStream> {
    let asked = tokio::time::timeout(PATIENCE, async {
        let mut stream = endpoint.connect(at(port)).await?;
        stream.write_all(b"?").await?;
        stream.read_exact(&mut [0]).await?;
        std::io::Result::Ok(stream)
    });
    let stream =
        asked.await.with_context(|| format!("opening a connection to port {port} takes too long"))?;
    stream.with_context(|| format!("a connection to port {port}"))
}
