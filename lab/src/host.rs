//! A host: one anonymous network namespace and the thread that owns it.

use std::fs::File;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use nix::sched::{CloneFlags, setns, unshare};
use nlink::{Connection, Route};
use tokio::runtime::{Builder, Runtime};

use crate::guardian::Guardian;
use crate::{Error, Result};

/// A host of a [`Lab`](crate::Lab): a network namespace of its own.
///
/// The namespace has no name and no file, so that nothing of it is left when the lab ends, however it ends. It
/// belongs to one thread, which does the netlink requests and starts the children. A clone is the same host.
#[derive(Clone)]
pub struct Host(Arc<Inner>);

struct Inner {
    name: String,
    guardian: Arc<Guardian>,
    state: Mutex<Option<State>>,
}

struct State {
    jobs: Sender<Job>,
    thread: JoinHandle<()>,
    namespace: Arc<File>,
}

type Job = Box<dyn FnOnce(&Worker) + Send>;

/// What the host's thread holds: it lives in the namespace, and so do the sockets it opens.
pub(crate) struct Worker {
    pub(crate) runtime: Runtime,
    pub(crate) route: Connection<Route>,
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Host").field(&self.0.name).finish()
    }
}

impl Host {
    pub(crate) fn start(name: &str, guardian: Arc<Guardian>) -> Result<Self> {
        let (jobs, queue) = channel::<Job>();
        let (ready, started) = channel();
        let owned = name.to_owned();
        let thread = thread::Builder::new()
            .name(format!("lab {name}"))
            .spawn(move || match Worker::start(&owned) {
                Ok((worker, namespace)) => {
                    let _ = ready.send(Ok(namespace));
                    drop(ready);
                    // Ends when the lab lets go of the other end.
                    for job in queue {
                        job(&worker);
                    }
                }
                Err(error) => drop(ready.send(Err(error))),
            })
            .map_err(Error::io(name, "starting its thread"))?;
        let namespace = Arc::new(started.recv().map_err(|_| Error::Gone { host: name.to_owned() })??);
        let state = Mutex::new(Some(State { jobs, thread, namespace }));
        Ok(Self(Arc::new(Inner { name: name.to_owned(), guardian, state })))
    }

    /// The name it was given in the lab; it appears in errors only.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    pub(crate) fn guardian(&self) -> &Arc<Guardian> {
        &self.0.guardian
    }

    pub(crate) fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    pub(crate) fn namespace(&self) -> Result<Arc<File>> {
        self.with_state(|state| Arc::clone(&state.namespace))
    }

    fn with_state<T>(&self, f: impl FnOnce(&State) -> T) -> Result<T> {
        let state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.as_ref().map(f).ok_or_else(|| self.gone())
    }

    fn gone(&self) -> Error {
        Error::Gone { host: self.0.name.clone() }
    }

    /// Has the host's thread do something short, and waits for the result.
    pub(crate) fn call<T: Send + 'static>(
        &self,
        f: impl FnOnce(&Worker) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (reply, result) = channel();
        let job: Job = Box::new(move |worker| drop(reply.send(f(worker))));
        self.with_state(|state| state.jobs.send(job))?.map_err(|_| self.gone())?;
        result.recv().map_err(|_| self.gone())?
    }

    /// Runs `f` inside this host, on a thread of its own, and returns its value.
    ///
    /// Sockets it opens belong to this host for their whole life, wherever they are used later. Threads it starts,
    /// also those of a tokio runtime it builds, live inside this host too. A panic in `f` goes on in the caller.
    ///
    /// # Errors
    /// The namespace cannot be entered, or the lab is gone.
    pub fn enter<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        let namespace = self.namespace()?;
        thread::scope(|scope| {
            let inside =
                thread::Builder::new().name(format!("in {}", self.0.name)).spawn_scoped(scope, || {
                    setns(namespace, CloneFlags::CLONE_NEWNET)
                        .map_err(Error::errno(self.name(), "entering its namespace"))?;
                    Ok(f())
                });
            let inside = inside.map_err(Error::io(self.name(), "starting a thread"))?;
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Writes a kernel setting of this host, for example `net.ipv4.ip_forward`.
    ///
    /// Where a part has a dot in it (an interface `eth0.5`), separate the parts by `/` instead.
    ///
    /// # Errors
    /// There is no such setting, or the kernel refuses the value.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        let path = sysctl_path(name)?;
        let (host, value) = (self.0.name.clone(), value.to_owned());
        self.call(move |_| {
            std::fs::write(&path, &value).map_err(Error::io(&host, format!("writing {value} to {path}")))
        })
    }

    /// Reads a kernel setting of this host, without the newline at its end.
    ///
    /// # Errors
    /// There is no such setting.
    pub fn read_sysctl(&self, name: &str) -> Result<String> {
        let path = sysctl_path(name)?;
        let host = self.0.name.clone();
        self.call(move |_| {
            let text = std::fs::read_to_string(&path).map_err(Error::io(&host, format!("reading {path}")))?;
            Ok(text.trim_end().to_owned())
        })
    }

    /// Ends the host's thread; the namespace ends with the last process, socket or thread inside it.
    pub(crate) fn stop(&self) {
        let state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(State { jobs, thread, .. }) = state {
            drop(jobs);
            let _ = thread.join();
        }
    }
}

impl Worker {
    /// Moves this thread into a new namespace and prepares it.
    fn start(name: &str) -> Result<(Self, File)> {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|error| match error {
            nix::Error::EPERM => no_privilege(),
            error => Error::errno(name, "making a network namespace")(error),
        })?;
        let namespace = File::open("/proc/thread-self/ns/net").map_err(Error::io(name, "its namespace"))?;
        let runtime = Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(Error::io(name, "starting its runtime"))?;
        let route = {
            let _inside = runtime.enter();
            Connection::<Route>::new().map_err(Error::netlink(name, "opening netlink"))?
        };
        let worker = Self { runtime, route };
        quiet_ipv6(name)?;
        worker.runtime.block_on(worker.route.set_link_up("lo")).map_err(Error::netlink(name, "lo up"))?;
        Ok((worker, namespace))
    }
}

/// Addresses shall work at once, and nothing but what a test does shall be on the wire. For the thread's namespace.
fn quiet_ipv6(host: &str) -> Result<()> {
    for scope in ["all", "default"] {
        let folder = format!("/proc/sys/net/ipv6/conf/{scope}");
        if !std::path::Path::new(&folder).exists() {
            continue;
        }
        for setting in ["accept_dad", "dad_transmits", "router_solicitations", "accept_ra"] {
            let path = format!("{folder}/{setting}");
            std::fs::write(&path, "0").map_err(Error::io(host, format!("writing 0 to {path}")))?;
        }
    }
    Ok(())
}

fn no_privilege() -> Error {
    Error::Missing(
        "making network namespaces is not permitted: run as root (in a container: with CAP_SYS_ADMIN and \
         CAP_NET_ADMIN), or enter a user namespace first"
            .to_owned(),
    )
}

fn sysctl_path(name: &str) -> Result<String> {
    let path = if name.contains('/') { name.to_owned() } else { name.replace('.', "/") };
    if path.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
        let expected = "a name such as net.ipv4.ip_forward";
        return Err(Error::Invalid { what: "kernel setting", given: name.to_owned(), expected });
    }
    Ok(format!("/proc/sys/{path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_named_with_dots_or_slashes_and_stay_below_proc_sys() {
        assert_eq!(sysctl_path("net.ipv4.ip_forward").unwrap(), "/proc/sys/net/ipv4/ip_forward");
        assert_eq!(
            sysctl_path("net/ipv4/conf/a.5/rp_filter").unwrap(),
            "/proc/sys/net/ipv4/conf/a.5/rp_filter"
        );
        for name in ["", "net..x", "net/../../etc/passwd", "/etc/passwd"] {
            assert!(sysctl_path(name).is_err(), "{name}");
        }
    }
}
