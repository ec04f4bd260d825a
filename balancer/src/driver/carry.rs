//! The packets' way: read, decided about, written. It costs no memory (`allocations`).

#[cfg(test)]
mod allocations;

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::task::Poll;

use bytes::BytesMut;
use shunt_stack::device::{Clock, Device};
use shunt_stack::wire::{Offload, Packet, ParseError};
use tokio::sync::watch;

use crate::connections::Connections;
use crate::{Balancer, DropReason, LoadError, Memory, Output, Route, Snapshot};

/// The most packets for which the time is told once.
const BATCH: u32 = 64;

/// What packets are forwarded by: replaced as a whole.
pub(super) struct Active<D> {
    /// The queues of the device that packets come from.
    pub(super) queues: Arc<[Arc<D>]>,
    pub(super) balancer: Arc<Balancer>,
    /// Statistics only: no decision knows of them.
    pub(super) connections: Option<Connections>,
    /// In `direct` and `datalink` mode one a server, else none.
    pub(super) outputs: Vec<Arc<D>>,
}

/// Reads, decides, writes. The time is told at the begin of each batch: packets that were there without waiting.
pub(super) async fn carry<D: Device>(
    main: &D,
    mut receiver: watch::Receiver<Arc<Active<D>>>,
    clock: Clock,
) -> io::Error {
    let mut active = Arc::clone(&receiver.borrow_and_update());
    let mut memory = Memory::new(&active.balancer);
    let mut buffer = BytesMut::new();
    let mut left = 0;
    loop {
        let (waited, received) = next(main, &mut buffer, &mut receiver).await;
        // Also when no packet comes: devices of servers that have gone are open until they are let go here.
        if received.is_none() || receiver.has_changed().unwrap_or(false) {
            let next = Arc::clone(&receiver.borrow_and_update());
            memory.follow(&active.balancer, &next.balancer);
            active = next;
            left = 0;
        }
        let offload = match received {
            Some(Ok(offload)) => offload,
            Some(Err(error)) => return error,
            None => continue,
        };
        if waited || left == 0 {
            active.balancer.advance(clock.now());
            active.balancer.set_clock(clock.wall());
            left = BATCH;
        }
        left -= 1;
        buffer = active.forward(main, buffer, offload, &mut memory).await;
    }
}

/// Whether it had to be waited for, and the next packet; none if what decides has been replaced first.
async fn next<D: Device, T>(
    main: &D,
    buffer: &mut BytesMut,
    receiver: &mut watch::Receiver<T>,
) -> (bool, Option<io::Result<Offload>>) {
    let mut receiving = std::pin::pin!(main.recv(buffer));
    match std::future::poll_fn(|cx| Poll::Ready(receiving.as_mut().poll(cx))).await {
        Poll::Ready(result) => (false, Some(result)),
        Poll::Pending => tokio::select! {
            result = receiving => (true, Some(result)),
            Ok(()) = receiver.changed() => (true, None),
        },
    }
}

/// What was decided about a packet, and what came of it.
type Decided = (Result<Route, DropReason>, Result<Output, DropReason>);

impl<D: Device> Active<D> {
    /// Takes a server's load now.
    pub(super) fn set_load(&self, clock: Clock, server: &str, load: f32) -> Result<(), LoadError> {
        self.balancer.advance(clock.now());
        self.balancer.set_load(server, load)
    }

    /// All counters now.
    pub(super) fn snapshot(&self, clock: Clock) -> Snapshot {
        self.balancer.advance(clock.now());
        let mut snapshot = self.balancer.snapshot();
        let connections = self.connections.as_ref();
        snapshot.connections = connections.map(|connections| connections.snapshot(self.balancer.now()));
        let devices = self.outputs.iter().chain(&*self.queues);
        snapshot.segmented = devices.map(Device::segmented).sum();
        snapshot
    }

    /// Forwards one packet; gives the buffer back.
    async fn forward(&self, main: &D, buffer: BytesMut, offload: Offload, memory: &mut Memory) -> BytesMut {
        let (packet, (route, result)) = match Packet::parse(buffer, offload) {
            Ok(mut packet) => {
                let route = self.balancer.decide(memory, self.balancer.now(), &packet);
                if let (Some(connections), Ok(route)) = (&self.connections, route) {
                    connections.observe(route, &packet, self.balancer.now());
                }
                let result = self.balancer.carry_out(route, &mut packet);
                (packet, (route, result))
            }
            Err(rejected) => match self.unreadable(rejected.buffer, rejected.error) {
                Ok(done) => done,
                Err((buffer, error)) => {
                    main.dropped(|| format!("dropped: {error}"));
                    return buffer;
                }
            },
        };
        let why = || self.balancer.explain(route, result).to_string();
        let sent = match result {
            Ok(Output::Main) => main.send_because(&packet, why).await,
            Ok(Output::Server(server)) => match self.outputs.get(server.index()) {
                Some(device) => device.send_because(&packet, why).await,
                None => Ok(()),
            },
            Err(_) => {
                main.dropped(why);
                Ok(())
            }
        };
        if sent.is_err() {
            self.balancer.stats.device_error();
        }
        packet.into_buffer()
    }

    /// `B4` for what cannot be parsed.
    fn unreadable(
        &self,
        buffer: BytesMut,
        error: ParseError,
    ) -> Result<(Packet, Decided), (BytesMut, ParseError)> {
        match Packet::parse_opaque(buffer) {
            Ok(mut packet) => {
                let route = self.balancer.route_unreadable(&packet, error);
                let result = self.balancer.carry_out(route, &mut packet);
                Ok((packet, (route, result)))
            }
            Err(rejected) => {
                self.balancer.stats.dropped(DropReason::Parse(rejected.error));
                Err((rejected.buffer, rejected.error))
            }
        }
    }
}
