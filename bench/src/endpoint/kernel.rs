//! The kernel's side: services on kernel sockets.

use std::io::{Read as _, Write as _};
use std::net::{Ipv6Addr, TcpListener, TcpStream};
use std::thread;

use anyhow::{Context as _, Result};

use super::ports;

/// Read and written at a time.
const PIECE: usize = 256 << 10;

/// What is done with a port's connections.
type Service = fn(&TcpListener);

/// Serves all ports until the bench ends.
///
/// # Errors
/// A port is taken, or there are not enough files.
pub fn serve() -> Result<()> {
    rlimit::increase_nofile_limit(u64::MAX).context("raising the number of open files")?;
    let services: [(u16, Service); 4] = [
        (ports::SINK, |listener| each(listener, sink)),
        (ports::SOURCE, |listener| each(listener, source)),
        (ports::HOLD, hold),
        (ports::BRIEF, brief),
    ];
    let mut threads = Vec::new();
    for (port, service) in services {
        let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).context("listening")?;
        threads.push(thread::spawn(move || service(&listener)));
    }
    println!("ready");
    for thread in threads {
        let _ = thread.join();
    }
    Ok(())
}

/// Connections that broke: the endpoint's side tells.
fn each(listener: &TcpListener, serve: fn(TcpStream) -> std::io::Result<()>) {
    for stream in listener.incoming().flatten() {
        thread::spawn(move || serve(stream));
    }
}

fn sink(mut stream: TcpStream) -> std::io::Result<()> {
    let mut piece = vec![0; PIECE];
    while stream.read(&mut piece)? > 0 {}
    Ok(())
}

fn source(mut stream: TcpStream) -> std::io::Result<()> {
    let piece = vec![7; PIECE];
    loop {
        stream.write_all(&piece)?;
    }
}

fn hold(listener: &TcpListener) {
    let mut open = Vec::new();
    for mut stream in listener.incoming().flatten() {
        let mut byte = [0];
        if stream.read_exact(&mut byte).and_then(|()| stream.write_all(&byte)).is_ok() {
            open.push(stream);
        }
    }
}

fn brief(listener: &TcpListener) {
    for mut stream in listener.incoming().flatten() {
        let mut byte = [0];
        let _ = stream.read_exact(&mut byte).and_then(|()| stream.write_all(&byte));
    }
}
