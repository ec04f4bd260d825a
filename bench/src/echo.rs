//! The server of the bench's own: it sends back what it gets.

use std::net::TcpListener;
use std::thread::JoinHandle;

use anyhow::{Context as _, Result};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::oneshot;

/// Largest piece that is sent back at once; small, since a hundred thousand connections have one each.
const PIECE: usize = 256;

/// A thread that serves all connections; ends when dropped.
pub struct Echo {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    /// Serves `listeners`, on whatever host they are.
    ///
    /// # Errors
    /// The thread cannot be started, or a listener not be used.
    pub fn start(listeners: Vec<TcpListener>) -> Result<Echo> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let inside = runtime.enter();
        let listeners = listeners.into_iter().map(|listener| {
            listener.set_nonblocking(true)?;
            tokio::net::TcpListener::from_std(listener)
        });
        let listeners = listeners.collect::<std::io::Result<Vec<_>>>().context("using a listener")?;
        drop(inside);
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new().name("echo".to_owned()).spawn(move || {
            runtime.block_on(async {
                for listener in listeners {
                    tokio::spawn(accept(listener));
                }
                let _ = stopped.await;
            });
        })?;
        Ok(Echo { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn accept(listener: tokio::net::TcpListener) {
    loop {
        // Without a file descriptor left, the client finds its connection unanswered and says so.
        if let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream));
        } else {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    }
}

/// Until the client closes or resets; what went wrong, the client's side sees.
async fn serve(mut stream: TcpStream) {
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
