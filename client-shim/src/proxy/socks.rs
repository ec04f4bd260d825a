//! SOCKS5 (RFC 1928): CONNECT to VIPs, nothing else.

use std::io;
use std::net::SocketAddr;

use fast_socks5::server::{Socks5ServerProtocol, SocksServerError, states::CommandRead};
use fast_socks5::util::target_addr::TargetAddr;
use fast_socks5::{ReplyError, Socks5Command};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{Upstream, relay};

type Request = Socks5ServerProtocol<TcpStream, CommandRead>;

/// Why a program does not get what it asked for.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error("only CONNECT is offered")]
    Command,
    #[error("{0} is no VIP; other destinations are not for this proxy")]
    NotVip(TargetAddr),
    #[error("{name:?} cannot be resolved: {error}")]
    Unresolved { name: String, error: io::Error },
    #[error("{target}: {error}")]
    Connect { target: SocketAddr, error: io::Error },
}

impl Refusal {
    fn reply(&self) -> ReplyError {
        match self {
            Refusal::Command => ReplyError::CommandNotSupported,
            Refusal::NotVip(_) => ReplyError::ConnectionNotAllowed,
            Refusal::Unresolved { .. } => ReplyError::HostUnreachable,
            Refusal::Connect { error, .. } => match error.kind() {
                io::ErrorKind::ConnectionRefused => ReplyError::ConnectionRefused,
                io::ErrorKind::TimedOut => ReplyError::ConnectionTimeout,
                io::ErrorKind::HostUnreachable => ReplyError::HostUnreachable,
                io::ErrorKind::NetworkUnreachable => ReplyError::NetworkUnreachable,
                _ => ReplyError::GeneralFailure,
            },
        }
    }
}

/// Serves one connection of a SOCKS client.
pub(super) async fn serve(program: TcpStream, upstream: &Upstream) -> io::Result<()> {
    let request = timeout(upstream.request_timeout(), read(program)).await;
    let (request, command, target) =
        request.map_err(|_| io::ErrorKind::TimedOut)?.map_err(io::Error::other)?;
    match connect(command, target, upstream).await {
        Ok(stream) => {
            let program = request.reply_success(stream.local_addr()).await.map_err(io::Error::other)?;
            relay::relay(program, stream, upstream.marks_lines()).await
        }
        Err(refusal) => {
            request.reply_error(&refusal.reply()).await.map_err(io::Error::other)?;
            Err(io::Error::other(refusal))
        }
    }
}

async fn read(program: TcpStream) -> Result<(Request, Socks5Command, TargetAddr), SocksServerError> {
    Socks5ServerProtocol::accept_no_auth(program).await?.read_command().await
}

async fn connect(
    command: Socks5Command,
    target: TargetAddr,
    upstream: &Upstream,
) -> Result<shunt_stack::endpoint::TcpStream, Refusal> {
    if !matches!(command, Socks5Command::TCPConnect) {
        return Err(Refusal::Command);
    }
    let target = resolve(target, upstream).await?;
    upstream.connect(target).await.map_err(|error| Refusal::Connect { target, error })
}

/// The first of a name's addresses that is a VIP.
async fn resolve(target: TargetAddr, upstream: &Upstream) -> Result<SocketAddr, Refusal> {
    let found = match &target {
        TargetAddr::Ip(address) => vec![*address],
        TargetAddr::Domain(name, port) => tokio::net::lookup_host((name.as_str(), *port))
            .await
            .map_err(|error| Refusal::Unresolved { name: name.clone(), error })?
            .collect(),
    };
    let canonical = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    let vip = found.into_iter().map(canonical).find(|address| upstream.is_vip(address.ip()));
    vip.ok_or(Refusal::NotVip(target))
}
