//! Processes inside a host.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

use crate::guardian::{Guardian, PARENT_VARIABLE};
use crate::{Error, Host, Result};

const POLL: Duration = Duration::from_millis(2);
const STDERR_KEPT: usize = 4096;

/// A process inside a host, leader of its own process group.
///
/// When it ends, or when this is dropped, whatever is left of its group is killed, and it is waited for: no zombie,
/// no orphan. It also dies with the lab, even if the lab is killed with SIGKILL. (A program that makes itself a
/// daemon in a new session escapes; run it in the foreground.)
#[derive(Debug)]
pub struct Child {
    process: std::process::Child,
    group: Pid,
    host: String,
    command: String,
    log: Option<PathBuf>,
    guardian: Arc<Guardian>,
    status: Option<ExitStatus>,
}

impl std::fmt::Debug for Guardian {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Guardian")
    }
}

impl Host {
    /// Starts `command` inside this host and does not wait for it.
    ///
    /// Its standard streams are what `command` says; it is not in the terminal's foreground group, so do not let it
    /// read the terminal.
    ///
    /// # Errors
    /// The program cannot be started, or the lab is gone.
    pub fn spawn(&self, command: &mut Command) -> Result<Child> {
        use std::os::unix::process::CommandExt as _;
        command.process_group(0).env(PARENT_VARIABLE, std::process::id().to_string());
        let text = describe(command);
        // The worker starts it, since a child belongs to the namespace and the life of the thread that starts it.
        let mut taken = std::mem::replace(command, Command::new(""));
        let guardian = Arc::clone(self.guardian());
        let (taken, spawned) = self.call(move |_| {
            let spawned = taken.spawn();
            if let Ok(process) = &spawned {
                guardian.add(pid(process));
            }
            Ok((taken, spawned))
        })?;
        *command = taken;
        let process = spawned.map_err(Error::io(self.name(), format!("starting `{text}`")))?;
        Ok(Child {
            group: pid(&process),
            process,
            host: self.name().to_owned(),
            command: text,
            log: None,
            guardian: Arc::clone(self.guardian()),
            status: None,
        })
    }

    /// As [`spawn`](Self::spawn), with standard output and error written to the file `log` and no standard input.
    ///
    /// # Errors
    /// As `spawn`, or the file cannot be made.
    pub fn spawn_logged(&self, command: &mut Command, log: impl AsRef<Path>) -> Result<Child> {
        let log = log.as_ref();
        let context = |what: &str| Error::io(self.name(), format!("{what} {}", log.display()));
        let out = File::create(log).map_err(context("creating"))?;
        let err = out.try_clone().map_err(context("sharing"))?;
        let mut child = self.spawn(command.stdin(Stdio::null()).stdout(out).stderr(err))?;
        // The command must not keep the file open, nor write to it when it is used again.
        command.stdout(Stdio::inherit()).stderr(Stdio::inherit());
        child.log = Some(log.to_owned());
        Ok(child)
    }

    /// Runs `command` to its end inside this host, with no standard input, and returns what it wrote.
    ///
    /// # Errors
    /// As [`spawn`](Self::spawn); [`Error::Failed`] with the end of its standard error if it does not succeed.
    pub fn run(&self, command: &mut Command) -> Result<Output> {
        self.run_with(command, &[], None)
    }

    /// As [`run`](Self::run), but kills the command and fails with [`Error::TimedOut`] after `limit`.
    ///
    /// # Errors
    /// As `run`, and when the time is over.
    pub fn run_within(&self, command: &mut Command, limit: Duration) -> Result<Output> {
        self.run_with(command, &[], Some(limit))
    }

    /// Feeds `rules` to `nft -f -` inside this host.
    ///
    /// # Errors
    /// The nft program is missing, or does not like the rules.
    pub fn nft(&self, rules: &str) -> Result<()> {
        // Some versions do not take the end of the file for the end of a line.
        let rules = format!("{rules}\n");
        let result = self.run_with(Command::new("nft").args(["-f", "-"]), rules.as_bytes(), None);
        match result {
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                Err(Error::Missing("the nft program is missing: install the package nftables".to_owned()))
            }
            other => other.map(|_| ()),
        }
    }

    fn run_with(&self, command: &mut Command, input: &[u8], limit: Option<Duration>) -> Result<Output> {
        use std::io::Write as _;
        let stdin = if input.is_empty() { Stdio::null() } else { Stdio::piped() };
        let mut child = self.spawn(command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()))?;
        let pipe = child.process.stdin.take();
        let (stdout, stderr) = (child.process.stdout.take(), child.process.stderr.take());
        thread::scope(|scope| {
            let stdout = scope.spawn(|| drain(stdout));
            let stderr = scope.spawn(|| drain(stderr));
            scope.spawn(|| {
                if let Some(mut pipe) = pipe {
                    // A program that does not read to the end says why on its standard error.
                    let _ = pipe.write_all(input);
                }
            });
            let status = match limit {
                None => child.wait()?,
                Some(limit) => child.wait_timeout(limit)?.ok_or(limit).or_else(|limit| {
                    // Its pipes must close, too, for the threads above to end.
                    child.kill()?;
                    Err(child.timed_out("ending", limit))
                })?,
            };
            let stdout = stdout.join().unwrap_or_default();
            let stderr = stderr.join().unwrap_or_default();
            if status.success() {
                return Ok(Output { status, stdout, stderr });
            }
            let kept = &stderr[stderr.len().saturating_sub(STDERR_KEPT)..];
            Err(Error::Failed {
                host: child.host.clone(),
                command: child.command.clone(),
                status,
                stderr: String::from_utf8_lossy(kept).trim().to_owned(),
            })
        })
    }
}

impl Child {
    /// The process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// The process as the standard library knows it, for its streams. Do not wait for it there.
    pub fn process(&mut self) -> &mut std::process::Child {
        &mut self.process
    }

    /// Sends `signal` to the process alone; nothing happens if it has ended.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        if self.status.is_some() {
            return Ok(());
        }
        kill(self.group, signal).map_err(Error::errno(&self.host, format!("{signal} to `{}`", self.command)))
    }

    /// How the process ended, `None` while it runs.
    ///
    /// # Errors
    /// The kernel cannot say.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        self.poll(WaitPidFlag::WNOHANG)
    }

    /// Waits until the process has ended.
    ///
    /// # Errors
    /// The kernel cannot say.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        loop {
            if let Some(status) = self.poll(WaitPidFlag::empty())? {
                return Ok(status);
            }
        }
    }

    /// Waits until the process has ended, but not longer than `limit`; `None` if it still runs then.
    ///
    /// # Errors
    /// The kernel cannot say.
    pub fn wait_timeout(&mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        let end = Instant::now() + limit;
        loop {
            let status = self.try_wait()?;
            if status.is_some() || Instant::now() >= end {
                return Ok(status);
            }
            thread::sleep(POLL);
        }
    }

    /// Kills the process and its group, and waits.
    ///
    /// # Errors
    /// The kernel cannot say how it ended.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.signal_group(Signal::SIGKILL);
        self.wait()
    }

    /// Asks the process and its group to end (SIGTERM), and kills what is left after `patience`.
    ///
    /// # Errors
    /// The kernel cannot say how it ended.
    pub fn terminate(&mut self, patience: Duration) -> Result<ExitStatus> {
        self.signal_group(Signal::SIGTERM);
        match self.wait_timeout(patience)? {
            Some(status) => Ok(status),
            None => self.kill(),
        }
    }

    /// What the process has written so far, if it was started by [`Host::spawn_logged`]; otherwise nothing.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn log(&self) -> Result<String> {
        let Some(path) = &self.log else { return Ok(String::new()) };
        let bytes =
            std::fs::read(path).map_err(Error::io(&self.host, format!("reading {}", path.display())))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Waits until the log contains `text`.
    ///
    /// # Errors
    /// [`Error::TimedOut`] after `limit`; [`Error::Failed`], with the log's end, if the process ends without it.
    pub fn wait_for_log(&mut self, text: &str, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        loop {
            let ended = self.try_wait()?;
            let log = self.log()?;
            if log.contains(text) {
                return Ok(());
            }
            if let Some(status) = ended {
                let tail = log.chars().rev().take(STDERR_KEPT).collect::<Vec<_>>();
                let stderr = tail.into_iter().rev().collect::<String>().trim().to_owned();
                let (host, command) = (self.host.clone(), self.command.clone());
                return Err(Error::Failed { host, command, status, stderr });
            }
            if Instant::now() >= end {
                return Err(self.timed_out(&format!("writing {text:?}"), limit));
            }
            thread::sleep(POLL);
        }
    }

    fn timed_out(&self, what: &str, after: Duration) -> Error {
        Error::TimedOut { host: self.host.clone(), what: format!("`{}`: {what}", self.command), after }
    }

    fn signal_group(&self, signal: Signal) {
        if self.status.is_none() {
            // It fails only when nobody is left in the group.
            let _ = killpg(self.group, signal);
        }
    }

    fn poll(&mut self, flags: WaitPidFlag) -> Result<Option<ExitStatus>> {
        if self.status.is_some() {
            return Ok(self.status);
        }
        let context = || format!("waiting for `{}`", self.command);
        // Left as a zombie first: its id cannot be anyone else's while the rest of its group is killed.
        match waitid(Id::Pid(self.group), flags | WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) {
            Ok(WaitStatus::StillAlive) | Err(nix::Error::EINTR) => return Ok(None),
            Ok(_) => {}
            Err(error) => return Err(Error::errno(&self.host, context())(error)),
        }
        self.signal_group(Signal::SIGKILL);
        self.guardian.remove(self.group);
        let status = self.process.wait().map_err(Error::io(&self.host, context()))?;
        self.status = Some(status);
        Ok(self.status)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            tracing::warn!(%error, "a child of the lab could not be waited for");
        }
    }
}

fn pid(process: &std::process::Child) -> Pid {
    Pid::from_raw(process.id().cast_signed())
}

fn drain(pipe: Option<impl Read>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(mut pipe) = pipe {
        let _ = pipe.read_to_end(&mut bytes);
    }
    bytes
}

fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}
