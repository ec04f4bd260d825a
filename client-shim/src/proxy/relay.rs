//! Bytes between a program's connection and one to a VIP.

use std::io;
use std::net::SocketAddr;

use shunt_stack::endpoint::TcpStream as Upward;
use tokio::io::copy_bidirectional;
use tokio::net::TcpStream;

use super::Upstream;

/// Connects, then relays; a program whose target cannot be reached is reset.
pub(super) async fn forward(program: TcpStream, target: SocketAddr, upstream: &Upstream) -> io::Result<()> {
    match upstream.connect(target).await {
        Ok(stream) => relay(program, stream).await,
        Err(error) => {
            reset(&program);
            Err(error)
        }
    }
}

/// Relays both ways until both have ended, half-closes included.
///
/// # Errors
/// Either end broke. The program then gets a reset: an end of stream would look as if all had arrived.
pub(super) async fn relay(mut program: TcpStream, mut stream: Upward) -> io::Result<()> {
    // A relay must not wait for more than the program did.
    program.set_nodelay(true)?;
    match copy_bidirectional(&mut program, &mut stream).await {
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

fn reset(program: &TcpStream) {
    if let Err(error) = program.set_zero_linger() {
        tracing::debug!(%error, "a program's connection cannot be reset");
    }
}
