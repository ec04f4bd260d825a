//! Small messages there and back.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use hdrhistogram::Histogram;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::JoinSet;

use crate::addresses::Service;
use crate::world::World;

/// Bytes of a message.
const MESSAGE: usize = 64;
/// Messages before the first that counts.
const WARM_UP: u32 = 200;
/// How long a message may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// More than [`PATIENCE`], in nanoseconds, and how finely a time is kept: to a thousandth.
const HIGHEST: u64 = 20_000_000_000;
const DIGITS: u8 = 3;

/// A connection that has been answered once; call it inside the client.
///
/// # Errors
/// It cannot be opened, or is not answered.
pub fn connect(target: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&target, PATIENCE);
    let mut stream = stream.with_context(|| format!("connecting to {target}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    exchange(&mut stream)?;
    Ok(stream)
}

fn exchange(stream: &mut TcpStream) -> Result<()> {
    let mut message = [b'-'; MESSAGE];
    stream.write_all(&message).context("sending a message")?;
    stream.read_exact(&mut message).context("waiting for a message to come back")
}

/// How long messages took there and back, in nanoseconds, one after the other for `time`.
///
/// # Errors
/// The connection breaks, or a message does not come back.
pub fn ping_pong(world: &World, time: Duration) -> Result<Histogram<u64>> {
    let target = Service::Echo(0).target(world.contestant);
    world.client.enter(|| {
        let mut stream = connect(target)?;
        for _ in 0..WARM_UP {
            exchange(&mut stream)?;
        }
        let mut histogram = Histogram::new_with_max(HIGHEST, DIGITS)?;
        let end = Instant::now() + time;
        let mut sent = Instant::now();
        while sent < end {
            exchange(&mut stream)?;
            let back = Instant::now();
            let nanoseconds = u64::try_from((back - sent).as_nanos()).unwrap_or(HIGHEST);
            histogram.saturating_record(nanoseconds);
            sent = back;
        }
        Ok(histogram)
    })?
}

/// Messages a second there and back over so many connections at once.
///
/// # Errors
/// A connection breaks, or a message does not come back.
pub fn messages(world: &World, time: Duration, connections: usize) -> Result<f64> {
    let target = Service::Echo(0).target(world.contestant);
    let limit = time + 2 * PATIENCE;
    world.client.enter(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            match tokio::time::timeout(limit, exchange_many(target, time, connections)).await {
                Ok(rate) => rate,
                Err(_) => bail!("messages to {target} are not answered"),
            }
        })
    })?
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^52 messages")]
async fn exchange_many(target: SocketAddr, time: Duration, connections: usize) -> Result<f64> {
    let mut streams = Vec::with_capacity(connections);
    for _ in 0..connections {
        let stream = tokio::net::TcpStream::connect(target).await;
        let stream = stream.with_context(|| format!("connecting to {target}"))?;
        stream.set_nodelay(true)?;
        streams.push(stream);
    }
    let began = Instant::now();
    let mut tasks = JoinSet::new();
    for mut stream in streams {
        tasks.spawn(async move {
            let mut message = [b'-'; MESSAGE];
            let mut count = 0_u64;
            while began.elapsed() < time {
                stream.write_all(&message).await?;
                stream.read_exact(&mut message).await?;
                count += 1;
            }
            std::io::Result::Ok(count)
        });
    }
    let mut all = 0;
    while let Some(done) = tasks.join_next().await {
        all += done?.context("exchanging messages")?;
    }
    Ok(all as f64 / began.elapsed().as_secs_f64())
}
