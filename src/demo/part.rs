//! The demo's processes: this same program, inside a host.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use shunt_lab::{Child, Host};

use super::error::{Error, PartFault, Result};
use super::message::{LoadReport, Message, Progress};

/// How long a part may take to be ready, or to obey.
const PATIENCE: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(20);
const TAIL_LINES: usize = 12;

/// Whether the user wants it to end.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Makes it end.
    pub(crate) fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// # Errors
    /// It shall end.
    pub(crate) fn check(&self) -> Result<()> {
        if self.0.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
    }

    /// Sleeps, unless it shall end.
    ///
    /// # Errors
    /// It shall end.
    pub(crate) fn sleep(&self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.check()?;
            std::thread::sleep(LOOK.min(time));
        }
        self.check()
    }
}

/// Starts parts: this program, with files in one folder.
#[derive(Debug)]
pub(crate) struct Starter {
    program: PathBuf,
    folder: PathBuf,
    stop: Stop,
}

impl Starter {
    /// For files in `folder`.
    ///
    /// # Errors
    /// The program does not know where it is.
    pub(crate) fn new(folder: &Path, stop: Stop) -> Result<Self> {
        // Also if the file was replaced meanwhile.
        let program = PathBuf::from("/proc/self/exe");
        let program = std::fs::read_link(&program).map_err(Error::file("reading", &program))?;
        Ok(Self { program, folder: folder.to_owned(), stop })
    }

    /// A file's path.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Writes a file as a whole: readers see the old or the new one.
    ///
    /// # Errors
    /// It cannot be written.
    pub(crate) fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let (path, new) = (self.path(name), self.path(&format!("{name}.new")));
        std::fs::write(&new, text).map_err(Error::file("writing", &new))?;
        std::fs::rename(&new, &path).map_err(Error::file("writing", &path))?;
        Ok(path)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(arguments).env("NO_COLOR", "1");
        command
    }

    /// Starts a part that goes on until it is stopped; its log is `NAME.log`.
    ///
    /// # Errors
    /// It cannot be started.
    pub(crate) fn start(&self, host: &Host, name: &str, arguments: &[&str]) -> Result<Part> {
        let log = self.path(&format!("{name}.log"));
        let child = host.spawn_logged(&mut self.command(arguments), &log)?;
        Ok(Part { name: name.to_owned(), child, log, stop: self.stop.clone() })
    }

    /// Starts a client, which tells how far it is.
    ///
    /// # Errors
    /// It cannot be started.
    pub(crate) fn start_load(&self, host: &Host, name: &str, arguments: &[&str]) -> Result<Load> {
        let log = self.path(&format!("{name}.log"));
        let file = std::fs::File::create(&log).map_err(Error::file("creating", &log))?;
        let mut command = self.command(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(file);
        let mut child = host.spawn(&mut command)?;
        let (sender, lines) = channel();
        if let Some(out) = child.process().stdout.take() {
            std::thread::spawn(move || {
                for line in BufReader::new(out).lines().map_while(std::io::Result::ok) {
                    if sender.send(line).is_err() {
                        return;
                    }
                }
            });
        }
        let part = Part { name: name.to_owned(), child, log, stop: self.stop.clone() };
        Ok(Load { part, lines, progress: Progress::default(), report: None })
    }
}

/// One process of the demo.
#[derive(Debug)]
pub(crate) struct Part {
    name: String,
    child: Child,
    log: PathBuf,
    stop: Stop,
}

impl Part {
    /// # Errors
    /// It has ended.
    pub(crate) fn check(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => Err(self.fault(PartFault::Ended(status))),
        }
    }

    /// Waits until it says it is ready.
    ///
    /// # Errors
    /// It ends, or does not say so.
    pub(crate) fn ready(&mut self) -> Result<()> {
        self.says(" ready\n", 1)
    }

    /// Waits until its log has `text` in it `times` times.
    ///
    /// # Errors
    /// It ends, or does not say so.
    pub(crate) fn says(&mut self, text: &'static str, times: usize) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        while self.read_log().matches(text).count() < times {
            self.check()?;
            self.stop.sleep(LOOK)?;
            if Instant::now() > end {
                return Err(self.fault(PartFault::Silent { text, after: PATIENCE }));
            }
        }
        Ok(())
    }

    /// Has it read its configuration again.
    ///
    /// # Errors
    /// It does not say that it has.
    pub(crate) fn reload(&mut self) -> Result<()> {
        const SAYS: &str = "configuration reloaded";
        let before = self.read_log().matches(SAYS).count();
        self.child.signal(Signal::SIGHUP)?;
        self.says(SAYS, before + 1)
    }

    /// Kills it without a chance to tidy up.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        Ok(())
    }

    /// Ends it in order.
    ///
    /// # Errors
    /// It does not end well.
    pub(crate) fn end(mut self) -> Result<()> {
        let status = self.child.terminate(PATIENCE)?;
        // The demo's web server does not catch the signal.
        let asked = std::os::unix::process::ExitStatusExt::signal(&status) == Some(Signal::SIGTERM as i32);
        if status.success() || asked { Ok(()) } else { Err(self.fault(PartFault::Ended(status))) }
    }

    /// An error about it, with the end of its log.
    pub(crate) fn fault(&self, what: PartFault) -> Error {
        Error::Part {
            part: self.name.clone(),
            what,
            log: self.log.clone(),
            tail: tail(&self.read_log(), TAIL_LINES),
        }
    }

    fn read_log(&self) -> String {
        // A log that cannot be read has nothing in it to find.
        std::fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }
}

/// A client at work.
#[derive(Debug)]
pub(crate) struct Load {
    part: Part,
    lines: Receiver<String>,
    progress: Progress,
    report: Option<LoadReport>,
}

impl Load {
    /// How far it is by its last word.
    ///
    /// # Errors
    /// It cannot be understood, or has failed.
    pub(crate) fn progress(&mut self) -> Result<Progress> {
        loop {
            match self.lines.try_recv() {
                Ok(line) => self.take(&line)?,
                Err(TryRecvError::Empty) => return Ok(self.progress),
                Err(TryRecvError::Disconnected) if self.report.is_some() => return Ok(self.progress),
                Err(TryRecvError::Disconnected) => {
                    return Err(self.part.fault(PartFault::NoReport));
                }
            }
        }
    }

    /// Its report, once it has ended.
    pub(crate) fn report(&self) -> Option<&LoadReport> {
        self.report.as_ref()
    }

    fn take(&mut self, line: &str) -> Result<()> {
        match serde_json::from_str(line) {
            Ok(Message::Progress(progress)) => self.progress = progress,
            Ok(Message::Report(report)) => self.report = Some(report),
            Err(source) => {
                let part = self.part.name.clone();
                return Err(Error::Message { part, line: line.to_owned(), source });
            }
        }
        Ok(())
    }
}

/// The last lines of a text, indented.
fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    if all.is_empty() {
        return "  (it is empty)".to_owned();
    }
    let last = &all[all.len().saturating_sub(lines)..];
    last.iter().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_of_a_log_is_its_last_lines() {
        assert_eq!(tail("a\nb\nc\n", 2), "  b\n  c");
        assert_eq!(tail("a", 2), "  a");
        assert_eq!(tail("", 2), "  (it is empty)");
    }

    #[test]
    fn nothing_waits_on_when_the_user_wants_it_to_end() {
        let stop = Stop::default();
        stop.sleep(Duration::ZERO).unwrap();
        stop.clone().set();
        assert!(matches!(stop.sleep(Duration::from_secs(60)), Err(Error::Interrupted)));
    }
}
