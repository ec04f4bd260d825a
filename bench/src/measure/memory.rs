//! Connections that only stay open, and the memory of the process in the middle.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use procfs::process::{Process, all_processes};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;

use crate::addresses::{CLIENT_ADDRESSES, ECHO_PORTS, Service, client_addresses};
use crate::world::World;

/// Opened at a time: the queue of a TUN device holds 500 packets.
const AT_ONCE: usize = 64;
/// How long opening one may take, with what is lost sent again.
const PATIENCE: Duration = Duration::from_secs(20);
/// Opening a thousand must not take longer.
const PATIENCE_PER_THOUSAND: Duration = Duration::from_secs(5);
/// One in so many is asked again after all are open.
const SAMPLE: usize = 50;

/// Resident memory of the process group that balances, in kilobytes of 1024 bytes; `None` without one.
///
/// # Errors
/// The process is gone.
pub fn resident(world: &World) -> Result<Option<u64>> {
    let Some(child) = &world.balancer else { return Ok(None) };
    let leader = i32::try_from(child.id()).context("a process number")?;
    let of = |process: &Process| Some(process.status().ok()?.vmrss.unwrap_or(0));
    let leader_itself = Process::new(leader).ok().and_then(|process| of(&process));
    let mut sum = leader_itself.context("the process that balances is gone")?;
    for process in all_processes()?.flatten().filter(|process| process.pid != leader) {
        if process.stat().is_ok_and(|stat| stat.pgrp == leader) {
            sum += of(&process).unwrap_or(0);
        }
    }
    Ok(Some(sum))
}

/// Resident memory with so many open connections, `counts` rising; the connections are closed afterwards.
///
/// # Errors
/// One cannot be opened or does not live, or there is no process that balances.
pub fn with_connections(world: &World, counts: &[usize]) -> Result<Vec<(usize, u64)>> {
    let contestant = world.contestant;
    let targets: Vec<SocketAddr> =
        (0..ECHO_PORTS).map(|number| Service::Echo(number).target(contestant)).collect();
    let sources: Vec<SocketAddr> = client_addresses(contestant).map(|address| (address, 0).into()).collect();
    world.client.enter(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut open: Vec<TcpStream> = Vec::new();
            let mut seen = Vec::new();
            for count in counts {
                let more = count.saturating_sub(open.len());
                let limit = PATIENCE + PATIENCE_PER_THOUSAND * u32::try_from(more / 1000)?;
                let opening = open_more(&mut open, more, &sources, &targets);
                match tokio::time::timeout(limit, opening).await {
                    Ok(opened) => opened?,
                    Err(_) => {
                        bail!("only {} of {count} connections could be opened in {limit:?}", open.len())
                    }
                }
                for stream in open.iter_mut().step_by(SAMPLE) {
                    ask(stream).await.context("an open connection broke")?;
                }
                seen.push((*count, resident(world)?.context("nothing that balances is a process")?));
            }
            Ok(seen)
        })
    })?
}

async fn open_more(
    open: &mut Vec<TcpStream>,
    more: usize,
    sources: &[SocketAddr],
    targets: &[SocketAddr],
) -> Result<()> {
    let mut tasks = JoinSet::new();
    for number in 0..more {
        if tasks.len() == AT_ONCE
            && let Some(done) = tasks.join_next().await
        {
            open.push(done??);
        }
        let source = sources[number % usize::from(CLIENT_ADDRESSES)];
        let target = targets[number / usize::from(CLIENT_ADDRESSES) % targets.len()];
        tasks.spawn(open_one(source, target));
    }
    while let Some(done) = tasks.join_next().await {
        open.push(done??);
    }
    Ok(())
}

async fn open_one(source: SocketAddr, target: SocketAddr) -> Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(source).with_context(|| format!("a port of {}", source.ip()))?;
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
