//! The server of the bench's own: it sends back what it gets.

use std::net::Ipv4Addr;

use anyhow::{Context as _, Result};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// Largest piece that is sent back at once; small, since thousands of connections have one each.
const PIECE: usize = 256;
/// Connections that wait to be accepted.
const QUEUE: u32 = 4096;

/// Serves all connections to `ports`, for ever.
///
/// # Errors
/// A port is taken.
pub async fn serve(ports: &[u16]) -> Result<()> {
    for port in ports {
        let socket = TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        socket.bind((Ipv4Addr::UNSPECIFIED, *port).into()).with_context(|| format!("the port {port}"))?;
        tokio::spawn(accept(socket.listen(QUEUE)?));
    }
    std::future::pending().await
}

async fn accept(listener: TcpListener) {
    loop {
        // Without a file left, the client finds its connection unanswered and says so.
        if let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(answer(stream));
        } else {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    }
}

/// Until the client closes or resets; what went wrong, the client's side sees.
async fn answer(mut stream: TcpStream) {
    let mut piece = [0; PIECE];
    if stream.set_nodelay(true).is_err() {
        return;
    }
    while let Ok(length @ 1..) = stream.read(&mut piece).await {
        if stream.write_all(&piece[..length]).await.is_err() {
            return;
        }
    }
}
