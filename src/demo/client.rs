//! One HTTP connection of the demo's client, checked byte for byte.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper::{HeaderMap, Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use super::message::Origin;
use super::pattern::{Pattern, mix};
use super::server::{PORT_HEADER, SERVER_HEADER};

/// How long a connect or the next piece of a response may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two requests on a kept connection.
const IDLE: Duration = Duration::from_millis(100);
/// Between two pieces of a response that is read slowly.
const SIP: Duration = Duration::from_millis(100);
/// Length of a response that is read slowly: more than the two ends buffer, and than is read until it may end.
const SLOW_LENGTH: u64 = 4 << 20;
/// Bytes of a response read at once, at most.
const GULP: usize = 16 << 10;

/// What is done with a connection.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Kind {
    /// One small request.
    Short,
    /// Requests with pauses between them, until the work as a whole has come to this part (0 to 1).
    Kept {
        /// The part.
        until: f64,
    },
    /// One long response, read slowly until then.
    Slow {
        /// The part.
        until: f64,
    },
}

/// Why a connection counts as broken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    #[error("connect: {0}")]
    Connect(std::io::Error),
    #[error("{what}: no answer within {PATIENCE:?}")]
    TimedOut { what: &'static str },
    #[error("{0}")]
    Http(#[from] hyper::Error),
    #[error("a request that cannot be made: {0}")]
    Request(#[from] hyper::http::Error),
    #[error("status {0}")]
    Status(StatusCode),
    #[error("a response that does not say who made it")]
    Anonymous,
    #[error("first {first:?}, then {then:?} on the same connection")]
    Moved { first: Origin, then: Origin },
    #[error("wrong content before byte {0}")]
    Content(u64),
    #[error("{got} bytes instead of {wanted}")]
    Length { got: u64, wanted: u64 },
}

/// A connection as it goes on; what is known of it stays when it breaks.
#[derive(Debug)]
pub(crate) struct Exchange {
    pub(crate) local: Option<SocketAddr>,
    pub(crate) origin: Option<Origin>,
    pub(crate) bytes: u64,
    seed: u64,
}

impl Exchange {
    /// A connection to be; its requests follow from `seed`.
    pub(crate) fn new(seed: u64) -> Self {
        Self { local: None, origin: None, bytes: 0, seed }
    }

    /// Connects and does what `kind` says; `part` tells how far the work as a whole is.
    ///
    /// # Errors
    /// The connection broke.
    pub(crate) async fn run(
        &mut self,
        target: SocketAddr,
        kind: Kind,
        part: impl Fn() -> f64,
    ) -> Result<(), Fault> {
        let stream = within("connect", TcpStream::connect(target)).await?.map_err(Fault::Connect)?;
        self.local = stream.local_addr().ok();
        let mut http = hyper::client::conn::http1::Builder::new();
        let handshake = http.max_buf_size(GULP).handshake(TokioIo::new(stream));
        let (mut sender, connection) = within("handshake", handshake).await??;
        let connection = tokio::spawn(connection);
        let result = match kind {
            Kind::Short => self.get(&mut sender, target, 64 + mix(self.seed) % 65_536, || false).await,
            Kind::Slow { until } => self.get(&mut sender, target, SLOW_LENGTH, || part() < until).await,
            Kind::Kept { until } => self.get_repeatedly(&mut sender, target, || part() < until).await,
        };
        drop(sender);
        result?;
        // Its end in order is part of it: a reset instead of a FIN is not.
        match within("close", connection).await? {
            Ok(closed) => Ok(closed?),
            // The task cannot be cancelled; a panic of the HTTP library is not the network's fault.
            Err(_) => Ok(()),
        }
    }

    async fn get_repeatedly(
        &mut self,
        sender: &mut SendRequest<Empty<Bytes>>,
        target: SocketAddr,
        more: impl Fn() -> bool,
    ) -> Result<(), Fault> {
        loop {
            self.get(sender, target, 64 + mix(self.seed) % 8192, || false).await?;
            if !more() {
                return Ok(());
            }
            sleep(IDLE).await;
        }
    }

    /// One request and its whole response, read with pauses as long as `slowly` says.
    async fn get(
        &mut self,
        sender: &mut SendRequest<Empty<Bytes>>,
        target: SocketAddr,
        length: u64,
        slowly: impl Fn() -> bool,
    ) -> Result<(), Fault> {
        self.seed = mix(self.seed);
        let request = Request::get(format!("/{length}/{}", self.seed)).header("host", target.to_string());
        let request = request.body(Empty::new())?;
        within("request", sender.ready()).await??;
        let response = within("response", sender.send_request(request)).await??;
        self.meets(origin(response.headers()))?;
        if response.status() != StatusCode::OK {
            return Err(Fault::Status(response.status()));
        }
        self.read(response.into_body(), length, slowly).await
    }

    async fn read(
        &mut self,
        mut body: Incoming,
        wanted: u64,
        slowly: impl Fn() -> bool,
    ) -> Result<(), Fault> {
        let (mut pattern, mut got) = (Pattern::new(self.seed), 0);
        while let Some(frame) = within("response body", body.frame()).await? {
            let Ok(data) = frame?.into_data() else { continue };
            got += data.len() as u64;
            self.bytes += data.len() as u64;
            if !pattern.continues_with(&data) {
                return Err(Fault::Content(got));
            }
            if slowly() {
                sleep(SIP).await;
            }
        }
        if got == wanted { Ok(()) } else { Err(Fault::Length { got, wanted }) }
    }

    fn meets(&mut self, origin: Option<Origin>) -> Result<(), Fault> {
        let then = origin.ok_or(Fault::Anonymous)?;
        match &self.origin {
            Some(first) if *first != then => Err(Fault::Moved { first: first.clone(), then }),
            Some(_) => Ok(()),
            None => {
                self.origin = Some(then);
                Ok(())
            }
        }
    }
}

async fn within<T>(what: &'static str, work: impl Future<Output = T>) -> Result<T, Fault> {
    timeout(PATIENCE, work).await.map_err(|_| Fault::TimedOut { what })
}

fn origin(headers: &HeaderMap) -> Option<Origin> {
    let text = |name| headers.get(name)?.to_str().ok();
    Some(Origin { server: text(SERVER_HEADER)?.to_owned(), port: text(PORT_HEADER)?.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_that_changes_its_server_is_broken() {
        let origin = |port| Some(Origin { server: "web-1".to_owned(), port });
        let mut exchange = Exchange::new(1);
        assert!(exchange.meets(origin(41_001)).is_ok());
        assert!(exchange.meets(origin(41_001)).is_ok());
        assert!(matches!(exchange.meets(origin(80)), Err(Fault::Moved { .. })));
        assert!(matches!(exchange.meets(None), Err(Fault::Anonymous)));
    }
}
