//! The process in which the endpoint runs: it does what lines on standard input say, and answers each with one.

use std::io::{BufRead as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use shunt_stack::device::{TunDevice, TunOptions};
use shunt_stack::endpoint::{ClientOptions, Endpoint, TcpOptions, TcpStream};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::JoinSet;

use super::ports;
use crate::measure::cpu::Own;

/// The kernel's address, and the endpoint's ones.
pub const KERNEL: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const OWN: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 9, 0, 2), Ipv4Addr::new(10, 9, 0, 3)];

/// The kernel's addresses for short connections: as many, and not a divisor of the ports, that no pair of ends is used
/// again while the kernel still remembers it.
pub fn brief_addresses() -> impl Iterator<Item = Ipv4Addr> {
    (101..=117).map(|last| Ipv4Addr::new(10, 9, 0, last))
}

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
    pub async fn run(self) -> Result<()> {
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
            let Measured { rate, cost } = match word {
                "send" => stream(&endpoint, true, time).await?,
                "receive" => stream(&endpoint, false, time).await?,
                "connect" => connect(&endpoint, time).await?,
                "hold" => hold(&endpoint, &mut open, usize::try_from(number)?).await?,
                _ => bail!("what is {word}?"),
            };
            answer(&format!("{rate} {cost}"))?;
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

/// What a measurement gives: a rate, and what each unit of what it counts has cost this process, seconds of processors.
struct Measured {
    rate: f64,
    cost: f64,
}

/// A stream to the kernel (`sends`) or from it: gigabits a second, and seconds for a gigabyte.
#[expect(clippy::cast_precision_loss, reason = "far below 2^52 bytes")]
async fn stream(endpoint: &Endpoint, sends: bool, time: Duration) -> Result<Measured> {
    let port = if sends { ports::SINK } else { ports::SOURCE };
    let mut stream = endpoint.connect(at(port)).await?;
    let mut piece = vec![7; PIECE];
    let begin = Instant::now() + WARM_UP;
    while Instant::now() < begin {
        step(&mut stream, &mut piece, sends).await?;
    }
    let (start, spent, mut bytes) = (Instant::now(), Own::now()?, 0);
    while start.elapsed() < time {
        bytes += step(&mut stream, &mut piece, sends).await?;
    }
    let (elapsed, gigabytes) = (start.elapsed().as_secs_f64(), bytes as f64 / 1e9);
    Ok(Measured { rate: gigabytes * 8.0 / elapsed, cost: spent.elapsed()? / gigabytes })
}

async fn step(stream: &mut TcpStream, piece: &mut [u8], sends: bool) -> Result<u64> {
    moved(if sends { stream.write(piece).await? } else { stream.read(piece).await? })
}

fn moved(bytes: usize) -> Result<u64> {
    if bytes == 0 {
        bail!("the stream ended too early");
    }
    Ok(bytes as u64)
}

/// Connections a second, and seconds for each.
#[expect(clippy::cast_precision_loss, reason = "far below 2^52 connections")]
async fn connect(endpoint: &Endpoint, time: Duration) -> Result<Measured> {
    let done = Arc::new(AtomicU64::new(0));
    let (start, spent) = (Instant::now(), Own::now()?);
    let mut tasks = JoinSet::new();
    let next = Arc::new(Mutex::new(brief_addresses().collect::<Vec<_>>().into_iter().cycle()));
    for _ in 0..AT_ONCE {
        let (endpoint, done, next) = (endpoint.clone(), Arc::clone(&done), Arc::clone(&next));
        tasks.spawn(async move {
            while start.elapsed() < time {
                let address = next.lock().unwrap_or_else(PoisonError::into_inner).next();
                let address = address.context("an endless row of addresses")?;
                let mut stream = ask(&endpoint, (address, ports::BRIEF).into()).await?;
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
    let done = done.load(Ordering::Relaxed) as f64;
    Ok(Measured { rate: done / start.elapsed().as_secs_f64(), cost: spent.elapsed()? / done })
}

/// Opens connections until there are `count`, which is what it gives back.
#[expect(clippy::cast_precision_loss, reason = "far below 2^52 connections")]
async fn hold(endpoint: &Endpoint, open: &mut Vec<TcpStream>, count: usize) -> Result<Measured> {
    let mut tasks = JoinSet::new();
    while open.len() < count {
        while tasks.len() < AT_ONCE.min(count - open.len()) {
            let endpoint = endpoint.clone();
            tasks.spawn(async move { ask(&endpoint, at(ports::HOLD)).await });
        }
        if let Some(stream) = tasks.join_next().await {
            open.push(stream??);
        }
    }
    Ok(Measured { rate: open.len() as f64, cost: 0.0 })
}

/// A connection over which a byte went there and back.
async fn ask(endpoint: &Endpoint, peer: SocketAddr) -> Result<TcpStream> {
    let asked = tokio::time::timeout(PATIENCE, async {
        let mut stream = endpoint.connect(peer).await?;
        stream.write_all(b"?").await?;
        stream.read_exact(&mut [0]).await?;
        std::io::Result::Ok(stream)
    });
    let stream = asked.await.with_context(|| format!("opening a connection to {peer} takes too long"))?;
    stream.with_context(|| format!("a connection to {peer}"))
}
