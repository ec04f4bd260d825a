//! The memory of the process in the middle while many connections only stay open.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use procfs::process::{Process, all_processes};
use shunt_lab::Child;

use crate::addresses::{ECHO_PORTS, Service, client_addresses};
use crate::world::World;

/// How long opening connections may take, and longer for each thousand.
const PATIENCE: Duration = Duration::from_secs(30);
const PATIENCE_PER_THOUSAND: Duration = Duration::from_secs(3);

/// Resident memory of the process group that balances, in kilobytes of 1024 bytes.
///
/// # Errors
/// There is none, or it is gone.
fn resident(world: &World) -> Result<u64> {
    let child = world.balancer.as_ref().context("nothing that balances is a process")?;
    let leader = i32::try_from(child.id()).context("a process number")?;
    let of = |process: &Process| Some(process.status().ok()?.vmrss.unwrap_or(0));
    let leader_itself = Process::new(leader).ok().and_then(|process| of(&process));
    let mut sum = leader_itself.context("the process that balances is gone")?;
    for process in all_processes()?.flatten().filter(|process| process.pid != leader) {
        if process.stat().is_ok_and(|stat| stat.pgrp == leader) {
            sum += of(&process).unwrap_or(0);
        }
    }
    Ok(sum)
}

/// Kilobytes with so many open connections, `counts` rising; `seen` is called with each. They are closed afterwards. Says
/// how many were reset while they opened, and tried again.
///
/// # Errors
/// A connection cannot be opened or does not live, or there is no process that balances.
pub fn with_connections(
    world: &mut World,
    counts: &[usize],
    mut seen: impl FnMut(usize, u64),
) -> Result<usize> {
    let mut again = 0;
    let mut holders: Vec<Holder> = Vec::new();
    for count in counts {
        if *count > 0 && holders.is_empty() {
            world.start_echoes()?;
            let all = (0..ECHO_PORTS).map(|number| Holder::start(world, Service::Echo(number)));
            holders = all.collect::<Result<_>>()?;
        }
        let ports = usize::from(ECHO_PORTS);
        for (number, holder) in holders.iter_mut().enumerate() {
            holder.ask(count / ports + usize::from(number < count % ports))?;
        }
        let end = Instant::now() + PATIENCE + PATIENCE_PER_THOUSAND * u32::try_from(count / 1000)?;
        for holder in &mut holders {
            again += holder.wait(end).with_context(|| format!("{count} open connections"))?;
        }
        seen(*count, resident(world)?);
    }
    Ok(again)
}

/// A process on the client with connections to one port.
struct Holder {
    child: Child,
    lines: Receiver<String>,
    log: std::path::PathBuf,
}

impl Holder {
    fn start(world: &World, service: Service) -> Result<Holder> {
        let mut command = Command::new(std::env::current_exe().context("finding this program")?);
        command.args(["hold", "--target", &service.target(world.contestant).to_string()]);
        for source in client_addresses(world.contestant) {
            command.args(["--source", &source.to_string()]);
        }
        let log = world.file(&format!("hold-{}.log", service.name()));
        let file = std::fs::File::create(&log).with_context(|| format!("making {}", log.display()))?;
        let mut child =
            world.client.spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(file))?;
        let out = child.process().stdout.take().context("its standard output")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(std::io::Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Holder { child, lines, log })
    }

    fn ask(&mut self, count: usize) -> Result<()> {
        let input = self.child.process().stdin.as_mut().context("its standard input")?;
        writeln!(input, "{count}").context("telling a process how many connections to open")
    }

    /// How many connections it tried again.
    fn wait(&mut self, end: Instant) -> Result<usize> {
        match self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(line) => line.trim().parse().context("a number of connections"),
            Err(RecvTimeoutError::Timeout) => bail!("they take too long"),
            Err(RecvTimeoutError::Disconnected) => {
                bail!("{}", std::fs::read_to_string(&self.log).unwrap_or_default().trim())
            }
        }
    }
}
