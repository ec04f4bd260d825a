//! Sees to it that no child outlives the lab, even when the lab is killed with SIGKILL.
//!
//! A parent-death signal has to be set by the child itself between fork and exec, which safe Rust cannot do for
//! foreign programs. So one small shell waits on a pipe instead: it is told of every process group that starts or
//! ends, and when the pipe closes, because the lab was dropped or died, it kills the groups that are left.

use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use nix::unistd::Pid;

use crate::{Error, Result};

const SCRIPT: &str = r#"
trap '' HUP INT TERM
all=' '
while read -r line; do
  p=${line#?}
  case $line in
    +*) all="$all$p " ;;
    -*) case $all in *" $p "*) all="${all%%" $p "*} ${all#*" $p "}" ;; esac ;;
  esac
done
for p in $all; do kill -KILL "-$p"; done
"#;

/// The shell and the writing end of its pipe; `None` once the lab is gone.
pub(crate) struct Guardian(Mutex<Option<(Child, ChildStdin)>>);

impl Guardian {
    pub(crate) fn start() -> Result<Self> {
        let missing =
            |error| Error::Missing(format!("a lab needs /bin/sh to clean up its children: {error}"));
        let mut shell = Command::new("/bin/sh")
            .args(["-c", SCRIPT])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .current_dir("/")
            .process_group(0)
            .spawn()
            .map_err(missing)?;
        let pipe = shell.stdin.take().expect("standard input was asked to be a pipe");
        Ok(Self(Mutex::new(Some((shell, pipe)))))
    }

    pub(crate) fn add(&self, group: Pid) {
        self.tell('+', group);
    }

    pub(crate) fn remove(&self, group: Pid) {
        self.tell('-', group);
    }

    fn tell(&self, sign: char, group: Pid) {
        if let Some((_, pipe)) = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner)
            && let Err(error) = pipe.write_all(format!("{sign}{group}\n").as_bytes())
        {
            tracing::warn!(%group, %error, "the shell that cleans up after a lab is gone");
        }
    }

    /// Kills every group that is left and waits until that is done.
    pub(crate) fn finish(&self) {
        if let Some((mut shell, pipe)) = self.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            drop(pipe);
            let _ = shell.wait();
        }
    }
}

/// Asks the kernel to kill this process when the lab that started it ends, however it ends.
///
/// For children that are our own binary: call it first in `main`. The lab's guarding shell kills children anyway;
/// this holds even if that shell is killed together with the lab. The signal is tied to the thread that started the
/// child, which in a lab lives as long as the host.
///
/// # Errors
/// The lab is already gone, or the kernel refuses.
pub fn die_with_parent() -> std::io::Result<()> {
    use nix::sys::{prctl, signal};
    prctl::set_pdeathsig(signal::Signal::SIGKILL)?;
    let lab = std::env::var(PARENT_VARIABLE).ok().and_then(|pid| pid.parse().ok()).map(Pid::from_raw);
    // It may have died before the request; a process that is not ours still proves it alive (EPERM).
    if let Some(lab) = lab
        && signal::kill(lab, None) == Err(nix::Error::ESRCH)
    {
        return Err(std::io::Error::other("the lab that started this process is gone"));
    }
    Ok(())
}

/// Names the lab's process to its children.
pub(crate) const PARENT_VARIABLE: &str = "SHUNT_LAB_PID";
