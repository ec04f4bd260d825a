//! The smallest whole use: a client connects to port 443 of a shared address, the server moves the connection to its
//! own port 41001, and neither program notices.

use std::io;

use shunt_stack::device::MemoryDevice;
use shunt_stack::endpoint::{ClientOptions, Endpoint, ServerOptions};
use shunt_stack::redirect::{ClientConfig, Continuation, OnRedirect, ServerConfig, ServicePorts, VipConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::main(flavor = "current_thread")]
async fn main() -> io::Result<()> {
    let vip = "203.0.113.10:443".parse().expect("an address and port");
    // A cable; in a network the devices would be TUN devices, and balancers between them.
    let (left, right) = MemoryDevice::pair(1500, 1024);

    let services = vec![ServicePorts {
        address: "203.0.113.10".parse().expect("an address"),
        redirect_port: 443,
        service_port: 41001,
    }];
    let server = Endpoint::server(
        right,
        ServerOptions { redirect: ServerConfig { services, ..Default::default() }, ..Default::default() },
    )?;
    let listener = server.listen("203.0.113.10:41001".parse().expect("an address and port"))?;
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut reader, mut writer) = tokio::io::split(stream);
                tokio::io::copy(&mut reader, &mut writer).await?;
                writer.shutdown().await
            });
        }
    });

    let vips = vec![VipConfig {
        address: "203.0.113.10".parse().expect("an address"),
        continuation: Continuation::Auto,
        on_redirect: OnRedirect::default(),
    }];
    let client = Endpoint::client(
        left,
        ClientOptions {
            redirect: ClientConfig { vips, ..Default::default() },
            addresses: vec!["192.0.2.1".parse().expect("an address")],
            ..Default::default()
        },
    )?;
    let mut stream = client.connect(vip).await?;
    stream.write_all(b"hello").await?;
    stream.shutdown().await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    println!(
        "{} answered {answer:?}; the connection is on port {:?}",
        stream.peer_addr(),
        stream.redirected_to()
    );
    Ok(())
}
