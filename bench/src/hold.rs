//! Connections that only stay open.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;

/// Opened at a time by each process: the queue of a TUN device holds 500 packets.
const AT_ONCE: usize = 8;
/// How long opening one may take, with what is lost sent again.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often one connection is tried again that is reset while it opens: a kernel may answer a connection's first data so
/// that comes on another processor than the handshake's last segment, at the same moment.
const TRIES: usize = 3;
/// One in so many is asked again after all are open.
const SAMPLE: usize = 20;

/// Opens connections until there are `count`, and sees whether those that are open live; says how many were tried again.
///
/// # Errors
/// One cannot be opened, or is not answered.
pub async fn open_until(
    open: &mut Vec<TcpStream>,
    count: usize,
    sources: &[Ipv4Addr],
    target: SocketAddr,
) -> Result<usize> {
    let mut again = 0;
    let mut tasks = JoinSet::new();
    for number in open.len()..count {
        if tasks.len() == AT_ONCE
            && let Some(done) = tasks.join_next().await
        {
            let (stream, tries) = done??;
            again += tries;
            open.push(stream);
        }
        tasks.spawn(open_one(sources[number % sources.len()], target));
    }
    while let Some(done) = tasks.join_next().await {
        let (stream, tries) = done??;
        again += tries;
        open.push(stream);
    }
    for stream in open.iter_mut().step_by(SAMPLE) {
        let answer = tokio::time::timeout(PATIENCE, ask(stream)).await;
        answer.context("an open connection does not answer")?.context("an open connection broke")?;
    }
    Ok(again)
}

/// A connection, and how often it was reset before it was open.
async fn open_one(source: Ipv4Addr, target: SocketAddr) -> Result<(TcpStream, usize)> {
    let mut tries = 0;
    loop {
        match try_one(source, target).await {
            Ok(stream) => return Ok((stream, tries)),
            Err(error) if tries < TRIES && is_reset(&error) => tries += 1,
            Err(error) => return Err(error),
        }
    }
}

fn is_reset(error: &anyhow::Error) -> bool {
    let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    kind == Some(std::io::ErrorKind::ConnectionReset)
}

async fn try_one(source: Ipv4Addr, target: SocketAddr) -> Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((source, 0).into()).with_context(|| format!("a port of {source}"))?;
    let opened = tokio::time::timeout(PATIENCE, async {
        let mut stream = socket.connect(target).await?;
        ask(&mut stream).await?;
        std::io::Result::Ok(stream)
    });
    let opened = opened.await.with_context(|| format!("opening a connection to {target} takes too long"))?;
    opened.with_context(|| format!("opening a connection to {target}"))
}

/// One byte there and back.
async fn ask(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.write_all(b"?").await?;
    stream.read_exact(&mut [0]).await.map(|_| ())
}
