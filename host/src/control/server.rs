//! The daemon's end: sockets, lines and time-outs. What a request means is the run loop's business.

use std::fmt::Display;
use std::fs::{self, DirBuilder};
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use nix::sys::stat::{Mode, fchmod};
use serde::Serialize;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::options::check_path;
use super::{Answer, ControlOptions, MAX_REQUEST, default_socket};
use crate::config::Role;

/// Connections at once.
const MAX_CONNECTIONS: usize = 32;
/// How long a connection may be silent.
const IDLE: Duration = Duration::from_secs(60);
/// How long a connection may not take its answer.
const WRITING: Duration = Duration::from_secs(10);
/// Progress lines that wait for a slow reader; further ones are left out.
const MAX_PROGRESS: usize = 16;
/// After an accept that failed: no more file descriptors, mostly.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The socket cannot be made.
    #[error(
        "cannot serve the control socket {path}: {reason}; choose another by `[control] socket`, or `enabled = false`"
    )]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The address cannot be listened on.
    #[error("cannot serve status on {address}: {error}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why not.
        error: io::Error,
    },
}

/// A request, and the way to answer it.
#[derive(Debug)]
pub struct Call {
    /// One line, without its newline.
    pub line: String,
    /// The answer.
    pub reply: Reply,
}

/// The way to answer one request; never waits. Dropped without an answer, it says that the daemon is ending.
#[derive(Debug)]
pub struct Reply {
    progress: mpsc::Sender<Value>,
    last: oneshot::Sender<Answer>,
}

impl Reply {
    /// Says how far it is; false if nobody listens any more. Left out if earlier lines have not been taken yet.
    pub fn progress(&self, value: impl Serialize) -> bool {
        if let Ok(value) = serde_json::to_value(value) {
            let _ = self.progress.try_send(value);
        }
        !self.last.is_closed()
    }

    /// Ends the answer with what came of it.
    pub fn done(self, value: impl Serialize) {
        let answer = serde_json::to_value(value).map_or_else(
            |error| Answer::Error(format!("the answer cannot be written: {error}")),
            Answer::Done,
        );
        let _ = self.last.send(answer);
    }

    /// Ends the answer with why it was refused.
    pub fn refuse(self, reason: impl Display) {
        let _ = self.last.send(Answer::Error(reason.to_string()));
    }

    /// Ends the answer one way or the other.
    pub fn end<T: Serialize, E: Display>(self, result: Result<T, E>) {
        match result {
            Ok(value) => self.done(value),
            Err(reason) => self.refuse(reason),
        }
    }
}

/// A listening socket and its connections; they end, and the socket's file goes, when it is dropped.
#[derive(Debug)]
pub struct Server {
    calls: mpsc::Receiver<Call>,
    path: Option<PathBuf>,
    /// Keeps the channel open where nobody accepts.
    _sender: mpsc::Sender<Call>,
    _accepting: JoinSet<()>,
}

impl Server {
    /// The control socket that `options` ask for; none, and no call ever, if they want none.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn open(options: &ControlOptions, state_dir: &Path, role: Role) -> Result<Self, ControlError> {
        if !options.enabled {
            return Ok(Self::none());
        }
        let path = match &options.socket {
            Some(path) => path.clone(),
            None => default_socket(state_dir, role).and_then(std::path::absolute).map_err(|error| {
                ControlError::Socket { path: state_dir.to_owned(), reason: error.to_string() }
            })?,
        };
        Self::bind(path)
    }

    /// One that is never called.
    pub fn none() -> Self {
        let (sender, calls) = mpsc::channel(1);
        Self { calls, path: None, _sender: sender, _accepting: JoinSet::new() }
    }

    /// Serves a path, readable by its owner alone. A socket there that nobody serves any more is removed; the directory
    /// is made, with mode 0700, if it is missing.
    ///
    /// # Errors
    /// Another process serves it; something else is there; or the system refuses.
    pub fn bind(path: PathBuf) -> Result<Self, ControlError> {
        let listener =
            bind_unix(&path).map_err(|reason| ControlError::Socket { path: path.clone(), reason })?;
        tracing::debug!(path = %path.display(), "control socket");
        Ok(Self::over(listener, Some(path)))
    }

    /// Serves a TCP address.
    ///
    /// # Errors
    /// It cannot be listened on.
    pub async fn listen(address: SocketAddr) -> Result<Self, ControlError> {
        let listener =
            TcpListener::bind(address).await.map_err(|error| ControlError::Listen { address, error })?;
        Ok(Self::over(listener, None))
    }

    fn over(listener: impl Listener, path: Option<PathBuf>) -> Self {
        let (sender, calls) = mpsc::channel(1);
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(sender.clone(), listener));
        Self { calls, path, _sender: sender, _accepting: accepting }
    }

    /// The next request. Cancel-safe.
    pub async fn next(&mut self) -> Call {
        match self.calls.recv().await {
            Some(call) => call,
            None => std::future::pending().await,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // Already gone, or the directory is: nothing is left either way.
            let _ = fs::remove_file(path);
        }
    }
}

fn bind_unix(path: &Path) -> Result<UnixListener, String> {
    check_path(path)?;
    if let Some(directory) = path.parent() {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
        made.map_err(|error| format!("the directory cannot be made: {error}"))?;
    }
    remove_stale(path)?;
    let told = |what: &str, error: nix::Error| format!("{what}: {error}");
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Unix, SockType::Stream, flags, None)
        .map_err(|error| told("no socket", error))?;
    // Linux gives the file the mode of the socket at bind: at no time can others connect.
    fchmod(&listener, Mode::S_IRUSR | Mode::S_IWUSR)
        .map_err(|error| told("its mode cannot be set", error))?;
    let address = UnixAddr::new(path).map_err(|error| told("not a path of a socket", error))?;
    bind(listener.as_raw_fd(), &address).map_err(|error| told("it cannot be bound", error))?;
    let queue = Backlog::new(16).map_err(|error| told("no queue", error))?;
    listen(&listener, queue).map_err(|error| told("it cannot listen", error))?;
    UnixListener::from_std(listener.into()).map_err(|error| error.to_string())
}

/// Removes a socket whose daemon is gone.
fn remove_stale(path: &Path) -> Result<(), String> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.to_string()),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err("something else than a socket is there".to_owned());
        }
        Ok(_) => {}
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|error| format!("an old socket cannot be removed: {error}"))
        }
        Err(error) => Err(error.to_string()),
        Ok(_) => Err("another process serves it".to_owned()),
    }
}

/// What connections come from.
trait Listener: Send + 'static {
    type Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static;

    fn next(&self) -> impl Future<Output = io::Result<Self::Stream>> + Send;
}

impl Listener for UnixListener {
    type Stream = UnixStream;

    async fn next(&self) -> io::Result<UnixStream> {
        self.accept().await.map(|(stream, _)| stream)
    }
}

impl Listener for TcpListener {
    type Stream = TcpStream;

    async fn next(&self) -> io::Result<TcpStream> {
        self.accept().await.map(|(stream, _)| stream)
    }
}

/// Accepts for ever; connections end with it.
async fn accept(calls: mpsc::Sender<Call>, listener: impl Listener) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let mut stream = match listener.next().await {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a control connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        while connections.try_join_next().is_some() {}
        if let Ok(permit) = Arc::clone(&permits).try_acquire_owned() {
            connections.spawn(converse(stream, calls.clone(), permit));
        } else {
            let answer = Answer::Error(format!("{MAX_CONNECTIONS} connections are open already"));
            // A fresh socket has room for a line.
            let _ = timeout(Duration::from_millis(100), write(&mut stream, &answer)).await;
        }
    }
}

/// One connection.
async fn converse<S: AsyncRead + AsyncWrite>(
    stream: S,
    calls: mpsc::Sender<Call>,
    _permit: OwnedSemaphorePermit,
) {
    let (reader, mut writer) = tokio::io::split(stream);
    let mut reader = BufReader::new(reader);
    loop {
        let mut line = Vec::new();
        let mut limited = (&mut reader).take(MAX_REQUEST as u64);
        match timeout(IDLE, limited.read_until(b'\n', &mut line)).await {
            Err(_) | Ok(Ok(0) | Err(_)) => return,
            Ok(Ok(_)) => {}
        }
        if line.len() == MAX_REQUEST && line.last() != Some(&b'\n') {
            // Where the next one begins cannot be told without reading it all.
            let answer = Answer::Error(format!("a request has at most {MAX_REQUEST} bytes"));
            let _ = timeout(WRITING, write(&mut writer, &answer)).await;
            return;
        }
        let Ok(text) = String::from_utf8(line) else {
            let answer = Answer::Error("a request is UTF-8 text".to_owned());
            if !matches!(timeout(WRITING, write(&mut writer, &answer)).await, Ok(Ok(()))) {
                return;
            }
            continue;
        };
        let line = text.trim();
        if !line.is_empty() && !ask(line.to_owned(), &calls, &mut writer).await {
            return;
        }
    }
}

/// Has one request answered; false if the connection is of no more use.
async fn ask(line: String, calls: &mpsc::Sender<Call>, writer: &mut (impl AsyncWrite + Unpin)) -> bool {
    let (progress, mut steps) = mpsc::channel(MAX_PROGRESS);
    let (last, mut end) = oneshot::channel();
    if calls.send(Call { line, reply: Reply { progress, last } }).await.is_err() {
        return false;
    }
    loop {
        let answer = tokio::select! {
            biased;
            Some(step) = steps.recv() => Answer::Progress(step),
            answer = &mut end => answer.unwrap_or_else(|_| Answer::Error("the daemon is ending".to_owned())),
        };
        // One that does not take its answers is gone: the operation is told by the closed channels.
        if !matches!(timeout(WRITING, write(writer, &answer)).await, Ok(Ok(()))) {
            return false;
        }
        if answer.is_last() {
            return true;
        }
    }
}

async fn write(writer: &mut (impl AsyncWrite + Unpin), answer: &Answer) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    writer.write_all(&line).await?;
    writer.flush().await
}
