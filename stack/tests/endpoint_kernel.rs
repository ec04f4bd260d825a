//! Endpoints against the kernel's TCP, through a TUN device in a network namespace of its own.

mod common;

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use common::{exchange, pattern};
use nix::sched::{CloneFlags, unshare};
use shunt_stack::device::TunDevice;
use shunt_stack::endpoint::{ClientOptions, Endpoint, ServerOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const LENGTH: usize = 8 << 20;

/// Runs `test` with a TUN device whose other side is the kernel's, with the addresses 10.9.0.1 and `fd09::1`.
fn beside_the_kernel<F: Future<Output = ()>>(test: impl FnOnce(TunDevice) -> F + Send + 'static) {
    let run = move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("this test makes a network namespace: run it as root");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let device = TunDevice::open("tun7").unwrap();
            ip("address add 10.9.0.1/24 dev tun7");
            ip("-6 address add fd09::1/64 dev tun7 nodad");
            tokio::time::timeout(Duration::from_secs(60), test(device)).await.expect("within a minute");
        });
    };
    std::thread::spawn(run).join().unwrap();
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().expect("this test needs iproute2");
    assert!(status.success(), "ip {arguments}");
}

async fn kernel_echo(mut stream: TcpStream) -> std::io::Result<()> {
    let (mut reader, mut writer) = stream.split();
    tokio::io::copy(&mut reader, &mut writer).await?;
    writer.shutdown().await
}

#[test]
fn a_client_endpoint_exchanges_megabytes_with_kernel_servers() {
    beside_the_kernel(|device| async {
        let options = ClientOptions {
            addresses: vec!["10.9.0.2".parse().unwrap(), "fd09::2".parse().unwrap()],
            ..Default::default()
        };
        let client = Endpoint::client(device, options).unwrap();
        for address in ["10.9.0.1:80", "[fd09::1]:80"] {
            let listener = TcpListener::bind(address).await.unwrap();
            let server = tokio::spawn(async move { kernel_echo(listener.accept().await.unwrap().0).await });
            let stream = client.connect(address.parse().unwrap()).await.unwrap();
            let data = pattern(LENGTH);
            assert!(exchange(stream, &data).await.unwrap() == data, "{address}");
            server.await.unwrap().unwrap();
            let refused = client.connect(address.replace(":80", ":81").parse().unwrap()).await;
            assert_eq!(refused.unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
        }
    });
}

#[test]
fn a_server_endpoint_exchanges_megabytes_with_kernel_clients() {
    beside_the_kernel(|device| async {
        let server = Endpoint::server(device, ServerOptions::default()).unwrap();
        for address in ["10.9.0.2:80", "[fd09::2]:80"] {
            let address: SocketAddr = address.parse().unwrap();
            common::echo(server.listen(address).unwrap());
            let mut stream = TcpStream::connect(address).await.unwrap();
            let data = pattern(LENGTH);
            let (mut reader, mut writer) = stream.split();
            let mut back = Vec::new();
            let send = async {
                writer.write_all(&data).await?;
                writer.shutdown().await
            };
            let (sent, received) = tokio::join!(send, reader.read_to_end(&mut back));
            sent.unwrap();
            received.unwrap();
            assert!(back == data, "{address}");
            drop(stream);
            let refused = TcpStream::connect(SocketAddr::new(address.ip(), 81)).await;
            assert_eq!(refused.unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
        }
    });
}
