//! Tells whether this machine and user can have a lab: makes a small one, sends bytes through it, says `ok`.
//!
//! `shunt-lab-probe hold` keeps the lab, with children in it, until the probe is killed; what it prints are their
//! process ids. `shunt-lab-probe child` is such a child, one that sets its own parent-death signal.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, ExitCode};
use std::time::Duration;

use shunt_lab::{Child, Error, Host, Impairment, Lab, Result, rootless};

fn main() -> ExitCode {
    let done = match std::env::args().nth(1).as_deref() {
        None => probe(),
        Some("hold") => hold(),
        Some("child") => child(),
        Some(_) => {
            eprintln!("usage: shunt-lab-probe [hold | child]");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn probe() -> Result<()> {
    let privilege = rootless::enter()?;
    let lab = Lab::new()?;
    let (client, server) = two_hosts(&lab)?;
    server.sysctl("net.ipv4.ip_forward", "1")?;
    let answer = std::thread::scope(|scope| -> Result<std::io::Result<Vec<u8>>> {
        let listener = server.enter(|| TcpListener::bind("10.0.0.2:80"))?;
        scope.spawn(move || {
            let (mut stream, _) = listener?.accept()?;
            stream.write_all(b"hello")
        });
        client.enter(|| {
            let mut stream = TcpStream::connect("10.0.0.2:80")?;
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).map(|_| bytes)
        })
    })?;
    let out = client.run(Command::new("/bin/sh").args(["-c", "echo $$"]))?;
    match answer {
        Ok(bytes) if bytes == b"hello" && !out.stdout.is_empty() => {
            println!("ok: {privilege:?}");
            Ok(())
        }
        other => Err(Error::Missing(format!("the lab does not carry bytes: {other:?}"))),
    }
}

fn hold() -> Result<()> {
    let lab = Lab::new()?;
    let (client, server) = two_hosts(&lab)?;
    let shell = client.spawn(Command::new("/bin/sh").args(["-c", "sleep 1000 & sleep 1000"]))?;
    let own = std::env::current_exe().unwrap_or_else(|_| "shunt-lab-probe".into());
    let child = server.spawn(Command::new(own).arg("child"))?;
    for process in [&shell, &child].map(Child::id) {
        println!("{process}");
    }
    println!("ready");
    loop {
        std::thread::park();
    }
}

fn child() -> Result<()> {
    shunt_lab::die_with_parent().map_err(|error| Error::Missing(error.to_string()))?;
    std::thread::sleep(Duration::from_secs(1000));
    Ok(())
}

fn two_hosts(lab: &Lab) -> Result<(Host, Host)> {
    let (client, server) = (lab.host("client")?, lab.host("server")?);
    lab.impaired_link(&client, "eth0", &server, "eth0", Impairment::default())?;
    client.address("eth0", "10.0.0.1/24")?;
    server.address("eth0", "10.0.0.2/24")?;
    Ok((client, server))
}
