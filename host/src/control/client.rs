//! The asking end.

use std::io;
use std::path::Path;

use serde::Serialize;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpStream, UnixStream};

use super::{Answer, MAX_ANSWER};

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The socket broke.
    #[error("the connection to the daemon broke: {0}")]
    Io(#[from] io::Error),
    /// The daemon closed the connection before its last line.
    #[error("the daemon closed the connection before it had answered")]
    Closed,
    /// What came is no answer, or too long.
    #[error("this is no answer of a daemon's: {0}")]
    Garbled(String),
}

/// A connection to a daemon.
pub struct Client {
    reader: Box<dyn AsyncBufRead + Send + Unpin>,
    writer: Box<dyn AsyncWrite + Send + Unpin>,
    longest: usize,
}

impl Client {
    /// Connects to a control socket.
    ///
    /// # Errors
    /// Nobody serves it, or it belongs to somebody else.
    pub async fn connect(path: &Path) -> io::Result<Self> {
        let (reader, writer) = UnixStream::connect(path).await?.into_split();
        let (reader, writer) = (Box::new(BufReader::new(reader)), Box::new(writer));
        Ok(Self { reader, writer, longest: MAX_ANSWER })
    }

    /// Asks over a TCP connection; answers longer than `longest` bytes are refused.
    pub fn over_tcp(stream: TcpStream, longest: usize) -> Self {
        let (reader, writer) = stream.into_split();
        Self { reader: Box::new(BufReader::new(reader)), writer: Box::new(writer), longest }
    }

    /// Sends a request.
    ///
    /// # Errors
    /// The socket broke, or the request is no JSON.
    pub async fn ask(&mut self, request: &impl Serialize) -> Result<(), ClientError> {
        let mut line =
            serde_json::to_vec(request).map_err(|error| ClientError::Garbled(error.to_string()))?;
        line.push(b'\n');
        Ok(self.writer.write_all(&line).await?)
    }

    /// The next line of the answer.
    ///
    /// # Errors
    /// There is none.
    pub async fn next(&mut self) -> Result<Answer, ClientError> {
        let mut line = Vec::new();
        let limit = self.longest as u64 + 1;
        let read = (&mut self.reader).take(limit).read_until(b'\n', &mut line).await?;
        if read == 0 {
            return Err(ClientError::Closed);
        }
        if line.len() > self.longest {
            return Err(ClientError::Garbled(format!("it is longer than {} bytes", self.longest)));
        }
        serde_json::from_slice(&line).map_err(|error| ClientError::Garbled(error.to_string()))
    }

    /// Sends a request and waits for the last line of its answer.
    ///
    /// # Errors
    /// As [`ask`](Self::ask) and [`next`](Self::next).
    pub async fn request(&mut self, request: &impl Serialize) -> Result<Answer, ClientError> {
        self.ask(request).await?;
        loop {
            let answer = self.next().await?;
            if answer.is_last() {
                return Ok(answer);
            }
        }
    }
}
