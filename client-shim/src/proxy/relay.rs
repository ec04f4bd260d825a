//! Bytes between a program's connection and one to a VIP.

use std::io;
use std::net::SocketAddr;

use shunt_stack::endpoint::TcpStream as Upward;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::TcpStream;

use super::Upstream;

/// Bytes of a program that are passed on at a time, as `copy_bidirectional` does.
const CHUNK: usize = 8192;

/// Connects, then relays; a program whose target cannot be reached is reset.
pub(super) async fn forward(program: TcpStream, target: SocketAddr, upstream: &Upstream) -> io::Result<()> {
    match upstream.connect(target).await {
        Ok(stream) => relay(program, stream, upstream.marks_lines()).await,
        Err(error) => {
            reset(&program);
            Err(error)
        }
    }
}

/// Relays both ways until both have ended, half-closes included. With `marks_lines` the stream may be cut behind data of
/// the program that ends with a newline (`M8`).
///
/// # Errors
/// Either end broke. The program then gets a reset: an end of stream would look as if all had arrived.
pub(super) async fn relay(mut program: TcpStream, mut stream: Upward, marks_lines: bool) -> io::Result<()> {
    // A relay must not wait for more than the program did.
    program.set_nodelay(true)?;
    let relayed = if marks_lines {
        relay_lines(&mut program, &mut stream).await
    } else {
        copy_bidirectional(&mut program, &mut stream).await
    };
    match relayed {
        Ok((up, down)) => {
            let (vip, port) = (stream.peer_addr(), stream.redirected_to());
            tracing::debug!(%vip, service_port = port, up, down, "a connection has ended");
            Ok(())
        }
        Err(error) => {
            reset(&program);
            Err(error)
        }
    }
}

/// As `copy_bidirectional`, marking boundaries.
async fn relay_lines(program: &mut TcpStream, stream: &mut Upward) -> io::Result<(u64, u64)> {
    let control = stream.control();
    let (mut from_program, mut to_program) = program.split();
    let (mut from_stream, mut to_stream) = tokio::io::split(stream);
    let up = async {
        let mut buffer = vec![0; CHUNK];
        let mut all = 0;
        loop {
            let length = from_program.read(&mut buffer).await?;
            if length == 0 {
                to_stream.shutdown().await?;
                return Ok(all);
            }
            to_stream.write_all(&buffer[..length]).await?;
            all += length as u64;
            if buffer[..length].ends_with(b"\n") {
                control.mark_boundary();
            }
        }
    };
    let down = async {
        let all = tokio::io::copy(&mut from_stream, &mut to_program).await?;
        to_program.shutdown().await?;
        Ok(all)
    };
    tokio::try_join!(up, down)
}

fn reset(program: &TcpStream) {
    if let Err(error) = program.set_zero_linger() {
        tracing::debug!(%error, "a program's connection cannot be reset");
    }
}
