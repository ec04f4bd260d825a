//! What a connection's program does with it.

use std::task::{Poll, Waker};

use super::{Connection, Phase};
use crate::endpoint::error::ConnectionError;

/// How much of a full send buffer has to be free, as a part of it, before its program is told.
const WAKE_PART: usize = 3;

impl Connection {
    /// Wakes who waits to write, once that is worth it: for each segment acknowledged would be too often.
    pub(in crate::endpoint) fn wake_writer(&mut self) {
        let (queued, capacity) = (self.socket().send_queue(), self.socket().send_capacity());
        let ready =
            capacity - queued >= capacity / WAKE_PART || !self.socket().may_send() || self.failure.is_some();
        if ready && let Some(writer) = self.writer.take() {
            writer.wake();
        }
    }

    pub(in crate::endpoint) fn poll_connected(&mut self, waker: &Waker) -> Poll<Result<(), ConnectionError>> {
        if self.phase == Phase::Open && self.failure.is_none() {
            return Poll::Ready(Ok(()));
        }
        if let Some(error) = self.failure {
            return Poll::Ready(Err(error));
        }
        self.socket_mut().register_send_waker(waker);
        Poll::Pending
    }

    /// Bytes read, 0 at the end of the stream.
    pub(in crate::endpoint) fn poll_read(
        &mut self,
        out: &mut [u8],
        waker: &Waker,
    ) -> Poll<Result<usize, ConnectionError>> {
        if self.socket().can_recv() {
            let read = self.socket_mut().recv_slice(out).unwrap_or(0);
            self.read += read as u64;
            return Poll::Ready(Ok(read));
        }
        if self.socket().may_recv() {
            self.socket_mut().register_recv_waker(waker);
            return Poll::Pending;
        }
        Poll::Ready(match self.failure {
            Some(error) => Err(error),
            None => Ok(0),
        })
    }

    /// Bytes written, at least one.
    pub(in crate::endpoint) fn poll_write(
        &mut self,
        data: &[u8],
        waker: &Waker,
    ) -> Poll<Result<usize, ConnectionError>> {
        if let Some(error) = self.failure {
            return Poll::Ready(Err(error));
        }
        if self.shut_down {
            return Poll::Ready(Err(ConnectionError::ShutDown));
        }
        if !self.socket().may_send() {
            return Poll::Ready(Err(ConnectionError::Reset));
        }
        match self.socket_mut().send_slice(data) {
            Ok(0) if !data.is_empty() => {
                self.writer = Some(waker.clone());
                Poll::Pending
            }
            Ok(written) => {
                self.written += written as u64;
                Poll::Ready(Ok(written))
            }
            Err(_) => Poll::Ready(Err(ConnectionError::Reset)),
        }
    }
}
