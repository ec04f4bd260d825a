//! A namespace with the endpoint's process and the kernel's services.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use procfs::process::Process;
use shunt_lab::{Child, Lab};

use super::inside::{DEVICE, KERNEL, brief_addresses};
use super::{Measure, Setting};

/// How long the services may take to be ready.
const READY: Duration = Duration::from_secs(15);

/// Fields are dropped in order: processes before the host they live on.
pub struct World {
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    endpoint: Child,
    _kernel: Child,
    _lab: Lab,
}

impl World {
    /// Builds it; logs go to `folder`.
    ///
    /// # Errors
    /// The kernel refuses something, or a process does not start.
    pub fn build(setting: Setting, buffer: Option<u32>, folder: &Path) -> Result<World> {
        let program = std::env::current_exe().context("finding this program")?;
        let lab = Lab::new()?;
        let host = lab.host("host")?;
        host.sysctl("net.core.somaxconn", "4096")?;
        // Not one that paces, whatever this machine's is: what the endpoint can take is measured.
        let congestion_control = "net.ipv4.tcp_congestion_control";
        host.sysctl(congestion_control, "cubic").or_else(|_| host.sysctl(congestion_control, "reno"))?;
        // The kernel closes first.
        host.sysctl("net.ipv4.tcp_max_tw_buckets", "4000000")?;
        let log = folder.join(format!("{}.log", setting.key()));
        let mut kernel = host.spawn_logged(Command::new(&program).arg("endpoint-kernel"), log)?;
        kernel.wait_for_log("ready", READY)?;
        let mut command = Command::new(&program);
        command.arg("endpoint-inside").stdin(Stdio::piped()).stdout(Stdio::piped());
        if setting == Setting::Segments {
            command.arg("--segments");
        }
        if let Some(bytes) = buffer {
            command.arg("--buffer").arg(bytes.to_string());
        }
        let mut endpoint = host.spawn(&mut command)?;
        let (input, output) = (endpoint.process().stdin.take(), endpoint.process().stdout.take());
        let (input, output) = input.zip(output).context("the endpoint's input and output")?;
        let output = BufReader::new(output);
        let mut world = World { input, output, endpoint, _kernel: kernel, _lab: lab };
        world.answer()?;
        for address in std::iter::once(KERNEL).chain(brief_addresses()) {
            host.address(DEVICE, &format!("{address}/24"))?;
        }
        Ok(world)
    }

    fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            bail!("the endpoint's process has ended");
        }
        Ok(line.trim().to_owned())
    }

    fn ask(&mut self, word: &str, number: u128) -> Result<(f64, f64)> {
        writeln!(self.input, "{word} {number}")?;
        let answer = self.answer()?;
        let parsed = answer.split_once(' ').and_then(|(rate, cost)| rate.parse().ok().zip(cost.parse().ok()));
        parsed.with_context(|| format!("the answer to {word}: {answer}"))
    }

    /// Measures for `time`: a rate and what it costs.
    ///
    /// # Errors
    /// A connection fails.
    pub fn measure(&mut self, measure: Measure, time: Duration) -> Result<(f64, f64)> {
        let word = match measure {
            Measure::Send => "send",
            Measure::Receive => "receive",
            Measure::Connections => "connect",
        };
        self.ask(word, time.as_millis())
    }

    /// Opens connections that stay open.
    ///
    /// # Errors
    /// One cannot be opened.
    pub fn hold(&mut self, count: u32) -> Result<()> {
        self.ask("hold", count.into()).map(|_| ())
    }

    /// Resident memory of the endpoint's process, bytes.
    ///
    /// # Errors
    /// It is gone.
    pub fn memory(&self) -> Result<u64> {
        let status = Process::new(i32::try_from(self.endpoint.id())?)?.status()?;
        Ok(status.vmrss.context("its memory")? * 1024)
    }
}
