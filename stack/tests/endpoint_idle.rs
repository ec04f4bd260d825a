//! Where a stream that may be cut in idleness is cut (M8), in virtual time.

mod common;

use std::time::Duration;

use common::{Family, Impaired, MTU, X, Y, client_options, pattern, server_options};
use shunt_stack::device::MemoryDevice;
use shunt_stack::endpoint::{ClientOptions, Endpoint, MoveAt, MoveEvent};
use shunt_stack::redirect::{Continuation, OnRedirect, ServicePorts};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const Z: u16 = 41002;
const LENGTH: usize = 20_000;

/// A program whose buffer is full waits a round trip for acknowledgements, longer than the idleness that is asked for.
#[tokio::test(start_paused = true)]
async fn m8_a_program_that_waits_to_write_on_is_not_idle() {
    let family = Family::V4;
    let mut near = client_options(family, Continuation::Reconnect);
    near.redirect.vips[0].on_redirect = OnRedirect::Follow;
    near.tcp.send_buffer = 2_000;
    let mut far = server_options(family);
    far.redirect.services.push(ServicePorts { address: family.vip(), redirect_port: Z, service_port: Z });
    let (left, right) = MemoryDevice::pair(MTU, 1_024);
    // Every packet takes a millisecond at least.
    let slow = |device, seed| Impaired::new(device, [0, 0, 1_000], seed);
    let options = ClientOptions { move_at: MoveAt::Idle(Duration::from_micros(1_500)), ..near };
    let client = Endpoint::client(slow(left, 1), options).unwrap();
    let server = Endpoint::server(slow(right, 2), far).unwrap();
    let (first, second) = (server.listen(family.at(Y)).unwrap(), server.listen(family.at(Z)).unwrap());
    let mut near = client.connect(family.at(X)).await.unwrap();
    let (mut far, _) = first.accept().await.unwrap();
    let (control, asking) = (near.control(), far.control());
    let asked = tokio::spawn(async move { asking.redirect(Z).await });
    assert!(matches!(control.next_event().await, Some(MoveEvent::Asked { .. })));
    let reading = tokio::spawn(async move {
        let mut read = vec![0; LENGTH];
        far.read_exact(&mut read).await.map(|_| read)
    });
    near.write_all(&pattern(LENGTH)).await.unwrap();
    let (_next, _) = second.accept().await.unwrap();
    let moved = MoveEvent::Moved { from: Y, to: family.at(Z), offset: LENGTH as u64 };
    assert_eq!(control.next_event().await, Some(moved));
    assert_eq!(reading.await.unwrap().unwrap(), pattern(LENGTH));
    asked.await.unwrap().unwrap();
}
