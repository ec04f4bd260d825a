//! The task of an endpoint: between a device and its [`Connections`](super::Connections). Decides nothing.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use bytes::BytesMut;

use super::shared::{Closing, Shared};
use crate::device::Device;
use crate::wire::{Offload, Packet};

/// Packets read, and packets written, before the other direction has its turn.
const BATCH: usize = 64;

/// Drives until the endpoint is closed or the device fails, then resets what is left.
pub(super) async fn run<D: Device>(device: D, shared: Arc<Shared>) {
    // Also after a panic nobody may wait for ever.
    let guard = EndGuard(Arc::clone(&shared));
    match drive(&device, &shared).await {
        Ok(()) => shared.end_closed(),
        Err(error) => {
            tracing::warn!(device = device.name(), %error, "the endpoint's device failed");
            shared.end(&error);
        }
    }
    drop(guard);
    // The resets of the end, as far as they go without waiting.
    loop {
        let Some(packet) = shared.lock().connections.poll_transmit() else { break };
        if !matches!(once(device.send(&packet)).await, Some(Ok(()))) {
            break;
        }
    }
}

struct EndGuard(Arc<Shared>);

impl Drop for EndGuard {
    fn drop(&mut self) {
        self.0.end_closed();
    }
}

/// The future's result if it has one right now.
async fn once<F: Future>(future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    poll_fn(|context| match future.as_mut().poll(context) {
        Poll::Ready(result) => Poll::Ready(Some(result)),
        Poll::Pending => Poll::Ready(None),
    })
    .await
}

async fn drive<D: Device>(device: &D, shared: &Shared) -> io::Result<()> {
    let mut packets = Vec::with_capacity(BATCH);
    // Of the packet received last: the next one is like it.
    let mut length = 0;
    loop {
        let (deadline, closing) = collect(shared, &mut packets);
        send(device, shared, &mut packets).await;
        if closing {
            return Ok(());
        }
        tokio::task::coop::consume_budget().await;
        let mut buffer = shared.lock().connections.take_buffer(length);
        let due = async {
            match deadline {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            received = device.recv(&mut buffer) => {
                length = receive(device, shared, buffer, received?).await?;
            }
            () = shared.work.notified() => shared.lock().connections.give_buffer(buffer),
            () = due => shared.lock().connections.give_buffer(buffer),
        }
    }
}

/// Lets pass what is due and takes packets to send; also: when to come again, and whether to end.
fn collect(shared: &Shared, packets: &mut Vec<Packet>) -> (Option<tokio::time::Instant>, bool) {
    let now = shared.now();
    let mut state = shared.lock();
    state.connections.set_clock(shared.wall());
    if state.closing >= Closing::Settled {
        for socket in state.accepts.keys().copied().collect::<Vec<_>>() {
            state.connections.stop_listening(now, socket);
        }
    }
    state.connections.handle_timeout(now);
    while packets.len() < BATCH
        && let Some(packet) = state.connections.poll_transmit()
    {
        packets.push(packet);
    }
    state.notify_accepts();
    let deadline = state.connections.poll_timeout().map(|at| shared.timer(at));
    let closing = match state.closing {
        Closing::No => false,
        Closing::Settled => packets.is_empty() && state.connections.is_settled(),
        Closing::Now => true,
    };
    (deadline, closing)
}

async fn send<D: Device>(device: &D, shared: &Shared, packets: &mut Vec<Packet>) {
    if packets.is_empty() {
        return;
    }
    let mut unsent = 0;
    for packet in packets.iter() {
        if let Err(error) = device.send(packet).await {
            // One packet's fault, or the device is gone, which reading will tell.
            tracing::debug!(%error, length = packet.len(), "the device did not take a packet");
            unsent += 1;
        }
    }
    let mut state = shared.lock();
    state.connections.count_unsent(unsent);
    for packet in packets.drain(..) {
        state.connections.give_buffer(packet.into_buffer());
    }
}

/// Hands a packet in, and those that are there already; gives back the length of the last.
async fn receive<D: Device>(
    device: &D,
    shared: &Shared,
    buffer: BytesMut,
    offload: Offload,
) -> io::Result<usize> {
    let now = shared.now();
    let mut received = (buffer, offload);
    for _ in 0..BATCH {
        let length = received.0.len();
        let mut buffer = {
            let mut state = shared.lock();
            state.connections.handle_input(now, received.0, received.1);
            state.connections.take_buffer(length)
        };
        let Some(result) = once(device.recv(&mut buffer)).await else {
            shared.lock().connections.give_buffer(buffer);
            return Ok(length);
        };
        received = (buffer, result?);
    }
    let length = received.0.len();
    shared.lock().connections.handle_input(now, received.0, received.1);
    Ok(length)
}
