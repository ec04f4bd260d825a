//! One look at a service port.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use bytes::Bytes;
use http_body_util::Empty;
use hyper::Request;
use hyper::client::conn::http1;
use hyper::header::{CONNECTION, HOST, USER_AGENT};
use hyper_util::rt::TokioIo;
use thiserror::Error;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use crate::config::{Check, CheckKind};

/// What is wrong with the server.
#[derive(Debug, Error)]
pub(super) enum Failure {
    #[error("no answer in {} ms", .0.as_millis())]
    Late(std::time::Duration),
    #[error("cannot connect: {0}")]
    Connect(io::Error),
    #[error("no HTTP answer: {0}")]
    Http(hyper::Error),
    #[error("HTTP status {0}")]
    Status(u16),
}

/// What a look found.
#[derive(Debug)]
pub(super) enum Outcome {
    Good,
    Bad(Failure),
    /// Nothing about the server: this host could not look.
    Unable(io::Error),
}

/// Looks once, from an own port: answers to it come to this host's TCP, whatever else is diverted.
pub(super) async fn look(check: &Check, to: SocketAddr, own_port: u16) -> Outcome {
    let socket = match own_socket(to, own_port) {
        Ok(socket) => socket,
        Err(error) => return Outcome::Unable(error),
    };
    match timeout(check.timeout, ask(check, socket, to)).await {
        Err(_) => Outcome::Bad(Failure::Late(check.timeout)),
        Ok(Ok(())) => Outcome::Good,
        // The port is in use for the same destination: an earlier look has not quite ended.
        Ok(Err(Failure::Connect(error)))
            if matches!(error.kind(), ErrorKind::AddrNotAvailable | ErrorKind::AddrInUse) =>
        {
            Outcome::Unable(error)
        }
        Ok(Err(failure)) => Outcome::Bad(failure),
    }
}

fn own_socket(to: SocketAddr, own_port: u16) -> io::Result<TcpSocket> {
    let (socket, any) = match to {
        SocketAddr::V4(_) => (TcpSocket::new_v4()?, IpAddr::from(Ipv4Addr::UNSPECIFIED)),
        SocketAddr::V6(_) => (TcpSocket::new_v6()?, IpAddr::from(Ipv6Addr::UNSPECIFIED)),
    };
    // Looks at different servers share the port.
    socket.set_reuseaddr(true)?;
    // Ends in a reset: no TIME-WAIT keeps the port from the next look.
    socket.set_zero_linger()?;
    socket.bind(SocketAddr::new(any, own_port))?;
    Ok(socket)
}

async fn ask(check: &Check, socket: TcpSocket, to: SocketAddr) -> Result<(), Failure> {
    let stream = socket.connect(to).await.map_err(Failure::Connect)?;
    match check.kind {
        CheckKind::None | CheckKind::Tcp => Ok(()),
        CheckKind::Http => request(check, stream, to).await,
    }
}

async fn request(check: &Check, stream: TcpStream, to: SocketAddr) -> Result<(), Failure> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(Failure::Http)?;
    let host = check.host.clone().unwrap_or_else(|| to.to_string());
    let mut request = Request::new(Empty::<Bytes>::new());
    // Both were read as what they are when the configuration was checked.
    *request.uri_mut() = check.path.parse().unwrap_or_default();
    let headers = request.headers_mut();
    headers.extend(host.parse().ok().map(|host| (HOST, host)));
    headers.insert(USER_AGENT, hyper::header::HeaderValue::from_static("shunt-health"));
    headers.insert(CONNECTION, hyper::header::HeaderValue::from_static("close"));
    let mut response = std::pin::pin!(sender.send_request(request));
    let response = tokio::select! {
        biased;
        response = &mut response => response,
        _ = connection => response.await,
    };
    let status = response.map_err(Failure::Http)?.status().as_u16();
    if check.expect.contains(&status) { Ok(()) } else { Err(Failure::Status(status)) }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    fn check(kind: CheckKind) -> Check {
        Check {
            kind,
            path: "/health".to_owned(),
            host: Some("web.example".to_owned()),
            expect: vec![200, 204],
            interval: Duration::from_secs(2),
            timeout: Duration::from_secs(5),
            rise: 2,
            fall: 3,
        }
    }

    /// Looks from some free port.
    async fn looked(check: &Check, to: SocketAddr) -> Outcome {
        loop {
            let free = TcpListener::bind("0.0.0.0:0").await.unwrap().local_addr().unwrap().port();
            match look(check, to, free).await {
                // Somebody else has got it meanwhile.
                Outcome::Unable(_) => {}
                outcome => return outcome,
            }
        }
    }

    /// Looks at a server that says `answer` to each request.
    async fn asked(check: &Check, answer: &'static [u8]) -> (Outcome, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let (mut text, mut buffer) = (String::new(), [0; 1000]);
            while !text.ends_with("\r\n\r\n") {
                let length = stream.read(&mut buffer).await.unwrap_or(0);
                if length == 0 {
                    break;
                }
                text.push_str(std::str::from_utf8(&buffer[..length]).unwrap());
            }
            let _ = stream.write_all(answer).await;
            text
        });
        let outcome = looked(check, to).await;
        (outcome, server.await.unwrap())
    }

    #[tokio::test]
    async fn tcp_is_content_with_a_connection() {
        let (outcome, _) = asked(&check(CheckKind::Tcp), b"").await;
        assert!(matches!(outcome, Outcome::Good), "{outcome:?}");
    }

    #[tokio::test]
    async fn a_closed_port_is_bad_and_told() {
        // Bound, so that nobody else gets it, and not listening.
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let outcome = looked(&check(CheckKind::Tcp), socket.local_addr().unwrap()).await;
        let Outcome::Bad(failure) = outcome else { panic!("{outcome:?}") };
        assert!(failure.to_string().starts_with("cannot connect: Connection refused"), "{failure}");
    }

    #[tokio::test]
    async fn http_wants_an_expected_status() {
        let http = check(CheckKind::Http);
        let (outcome, request) = asked(&http, b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n").await;
        assert!(matches!(outcome, Outcome::Good), "{outcome:?}");
        assert!(request.starts_with("GET /health HTTP/1.1\r\n"), "{request}");
        assert!(request.contains("host: web.example\r\n"), "{request}");
        for (answer, told) in [
            (&b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n"[..], "HTTP status 503"),
            (b"SSH-2.0-server\r\n\r\n", "no HTTP answer"),
            (b"", "no HTTP answer"),
        ] {
            let (outcome, _) = asked(&http, answer).await;
            let Outcome::Bad(failure) = outcome else { panic!("{outcome:?}") };
            assert!(failure.to_string().starts_with(told), "{failure}");
        }
    }

    #[tokio::test]
    async fn silence_is_bad_after_the_time_out() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap();
        let impatient = Check { timeout: Duration::from_millis(50), ..check(CheckKind::Http) };
        let outcome = looked(&impatient, to).await;
        let Outcome::Bad(failure) = outcome else { panic!("{outcome:?}") };
        assert_eq!(failure.to_string(), "no answer in 50 ms");
    }

    #[tokio::test]
    async fn one_own_port_serves_again_and_again_and_for_several_servers() {
        let listen = async || TcpListener::bind("127.0.0.1:0").await.unwrap();
        let listeners = [listen().await, listen().await];
        // Kept bound as looks bind theirs: others get another port.
        let kept = own_socket(listeners[0].local_addr().unwrap(), 0).unwrap();
        let port = kept.local_addr().unwrap().port();
        for _ in 0..10 {
            for listener in &listeners {
                let outcome = look(&check(CheckKind::Tcp), listener.local_addr().unwrap(), port).await;
                assert!(matches!(outcome, Outcome::Good), "{outcome:?}");
            }
        }
    }

    #[tokio::test]
    async fn a_port_that_cannot_be_had_says_nothing_about_the_server() {
        let taken = TcpListener::bind("0.0.0.0:0").await.unwrap();
        let port = taken.local_addr().unwrap().port();
        let outcome = look(&check(CheckKind::Tcp), "127.0.0.1:9".parse().unwrap(), port).await;
        assert!(matches!(outcome, Outcome::Unable(_)), "{outcome:?}");
    }
}
