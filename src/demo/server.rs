//! The demo's web server: says who it is and on which port it was reached.

use std::convert::Infallible;
use std::fs::File;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::task::{Context, Poll};

use anyhow::Context as _;
use bytes::{Bytes, BytesMut};
use hyper::body::{Body, Frame, SizeHint};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinSet;

use super::pattern::Pattern;

/// The response header with the server's name.
pub(crate) const SERVER_HEADER: &str = "shunt-server";
/// The response header with the server's local port: its own (Y) if the client was redirected, the shared one if not.
pub(crate) const PORT_HEADER: &str = "shunt-port";

const BACKLOG: u32 = 4096;
const PIECE: usize = 16 * 1024;
const LONGEST: u64 = 1 << 30;

/// Arguments of `shunt demo-server`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ServerArgs {
    /// What it calls itself.
    #[arg(long)]
    name: String,

    /// Address and port to listen on. Repeatable.
    #[arg(long, required = true)]
    listen: Vec<SocketAddr>,

    /// A file that gets one line for every connection: the client's address, and the port it was accepted on.
    #[arg(long)]
    record: PathBuf,
}

/// `shunt demo-server`: serves until it is killed.
///
/// # Errors
/// It cannot listen, or the record cannot be written.
pub(crate) fn serve(arguments: ServerArgs) -> anyhow::Result<ExitCode> {
    shunt_lab::die_with_parent()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let record = File::create(&arguments.record)
            .with_context(|| format!("creating {}", arguments.record.display()))?;
        let shared = Arc::new(Shared { name: arguments.name, record });
        let mut listeners = JoinSet::new();
        for address in arguments.listen {
            let listener = listen(address).with_context(|| format!("listening on {address}"))?;
            listeners.spawn(accept(listener, Arc::clone(&shared)));
        }
        tracing::info!("ready");
        while let Some(ended) = listeners.join_next().await {
            ended??;
        }
        Ok(ExitCode::SUCCESS)
    })
}

struct Shared {
    name: String,
    record: File,
}

fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) -> anyhow::Result<()> {
    loop {
        let (stream, client) = match listener.accept().await {
            Ok(accepted) => accepted,
            // The connection was reset before it was accepted, or files are short for a moment.
            Err(error) => {
                tracing::warn!(%error, "accepting");
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
                continue;
            }
        };
        let port = stream.local_addr()?.port();
        writeln!(&shared.record, "{client} {port}").context("writing the record")?;
        tokio::spawn(answer(stream, port, Arc::clone(&shared)));
    }
}

async fn answer(stream: TcpStream, port: u16, shared: Arc<Shared>) {
    let peer = stream.peer_addr();
    let service = service_fn(|request| {
        let response = respond(&request, &shared.name, port);
        async move { Ok::<_, Infallible>(response) }
    });
    let connection =
        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        tracing::info!(?peer, port, %error, "a connection ended early");
    }
}

fn respond<T>(request: &Request<T>, name: &str, port: u16) -> Response<PatternBody> {
    let (status, body) = match parse_path(request.uri().path()) {
        Some((length, seed)) => (StatusCode::OK, PatternBody { pattern: Pattern::new(seed), left: length }),
        None => (StatusCode::NOT_FOUND, PatternBody { pattern: Pattern::new(0), left: 0 }),
    };
    let response = Response::builder().status(status).header(SERVER_HEADER, name).header(PORT_HEADER, port);
    response.body(body).unwrap_or_else(|_| {
        // Only a name that no header can hold leads here.
        Response::new(PatternBody { pattern: Pattern::new(0), left: 0 })
    })
}

/// `/LENGTH/SEED`, both decimal.
fn parse_path(path: &str) -> Option<(u64, u64)> {
    let (length, seed) = path.strip_prefix('/')?.split_once('/')?;
    Some((length.parse().ok().filter(|length| *length <= LONGEST)?, seed.parse().ok()?))
}

/// A response body that is made while it is sent.
struct PatternBody {
    pattern: Pattern,
    left: u64,
}

impl Body for PatternBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let length = self.left.min(PIECE as u64) as usize;
        if length == 0 {
            return Poll::Ready(None);
        }
        let mut piece = BytesMut::zeroed(length);
        self.pattern.fill(&mut piece);
        self.left -= length as u64;
        Poll::Ready(Some(Ok(Frame::data(piece.freeze()))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_length_and_seed() {
        assert_eq!(parse_path("/100/7"), Some((100, 7)));
        for path in ["", "/", "/100", "/x/7", "/100/7/8", "/99999999999/1", "/-1/0"] {
            assert_eq!(parse_path(path), None, "{path}");
        }
    }

    #[test]
    fn a_response_names_server_and_port_and_its_exact_length() {
        let response = respond(&Request::builder().uri("/5/1").body(()).unwrap(), "web-1", 41_001);
        assert_eq!(response.headers()[SERVER_HEADER], "web-1");
        assert_eq!(response.headers()[PORT_HEADER], "41001");
        assert_eq!(response.body().size_hint().exact(), Some(5));
        assert_eq!(respond(&Request::new(()), "web-1", 80).status(), StatusCode::NOT_FOUND);
    }
}
