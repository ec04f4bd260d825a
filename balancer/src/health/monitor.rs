//! Looks at every service port in its rhythm and keeps what was found.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use shunt_host::{Family, PortRange};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use super::probe::{Outcome, look};
use super::{Health, State, Unfit};
use crate::config::{Check, Config};
use crate::stats::ServerStats;

/// Looks at the same time.
const MAX_LOOKS: usize = 256;
/// Results that wait for the balancer.
const MAX_RESULTS: usize = 1024;
/// The first looks are spread over at most so long.
const FIRST_LOOKS: Duration = Duration::from_secs(1);

/// A service port looked at.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    server: String,
    service: String,
    address: SocketAddr,
}

#[derive(Debug)]
struct Target {
    /// Which task's results count.
    run: u64,
    check: Check,
    ports: PortRange,
    health: Health,
    since: Instant,
    /// The latest failure.
    failure: Option<String>,
    stats: Arc<ServerStats>,
    task: AbortHandle,
}

impl Drop for Target {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A server's port has become healthy or unhealthy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Transition {
    pub(crate) server: String,
    pub(crate) service: String,
    pub(crate) address: SocketAddr,
    pub(crate) healthy: bool,
    /// The failure that made it unhealthy.
    pub(crate) why: String,
}

/// What is known of one service port.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct CheckReport {
    pub(crate) service: String,
    pub(crate) address: SocketAddr,
    pub(crate) state: State,
    /// How long it has been in this state.
    pub(crate) seconds: u64,
    /// The latest failure, while it is unhealthy or near to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) failure: Option<String>,
}

struct Found {
    key: Arc<Key>,
    run: u64,
    outcome: Outcome,
}

/// Every look and what came of it.
pub(crate) struct Monitor {
    targets: BTreeMap<Arc<Key>, Target>,
    tasks: JoinSet<()>,
    permits: Arc<Semaphore>,
    sender: mpsc::Sender<Found>,
    found: mpsc::Receiver<Found>,
    batch: Vec<Found>,
    runs: u64,
    start: usize,
}

impl Monitor {
    pub(crate) fn new() -> Self {
        let (sender, found) = mpsc::channel(MAX_RESULTS);
        Self {
            targets: BTreeMap::new(),
            tasks: JoinSet::new(),
            permits: Arc::new(Semaphore::new(MAX_LOOKS)),
            sender,
            found,
            batch: Vec::new(),
            runs: 0,
            start: RandomState::new().hash_one(0) as usize,
        }
    }

    /// Looks at what a configuration says from now on; what is known of ports that stay is kept.
    pub(crate) fn follow<'a>(
        &mut self,
        config: &Config,
        stats: impl Iterator<Item = (&'a str, &'a Arc<ServerStats>)>,
    ) {
        let stats: BTreeMap<&str, &Arc<ServerStats>> = stats.collect();
        let mut before = std::mem::take(&mut self.targets);
        let wanted: Vec<_> = wanted(config).collect();
        for (number, (_, _, key, check)) in wanted.iter().enumerate() {
            let known = before.remove(key);
            let Some(stats) = stats.get(key.server.as_str()) else { continue };
            if let Some(known) = known {
                if known.check == **check && known.ports == config.check_ports {
                    self.targets.insert(Arc::new(key.clone()), known);
                    continue;
                }
                let stats = Arc::clone(stats);
                let (key, mut target) = self.start(key, check, config.check_ports, Duration::ZERO, stats);
                (target.health, target.since) = (known.health, known.since);
                self.targets.insert(key, target);
                continue;
            }
            let spread = check.interval.min(FIRST_LOOKS);
            let delay = spread * number as u32 / wanted.len() as u32;
            let (key, target) = self.start(key, check, config.check_ports, delay, Arc::clone(stats));
            self.targets.insert(key, target);
        }
        // The aborted ones.
        while self.tasks.try_join_next().is_some() {}
    }

    fn start(
        &mut self,
        key: &Key,
        check: &Check,
        ports: PortRange,
        delay: Duration,
        stats: Arc<ServerStats>,
    ) -> (Arc<Key>, Target) {
        let key = Arc::new(key.clone());
        self.runs += 1;
        self.start = self.start.wrapping_add(1);
        let run = Run {
            key: Arc::clone(&key),
            run: self.runs,
            check: check.clone(),
            ports,
            turn: self.start,
            permits: Arc::clone(&self.permits),
            sender: self.sender.clone(),
        };
        let task = self.tasks.spawn(run.forever(delay));
        let target = Target {
            run: self.runs,
            check: check.clone(),
            ports,
            health: Health::default(),
            since: Instant::now(),
            failure: None,
            stats,
            task,
        };
        (key, target)
    }

    /// Waits until the health of a port has changed; says of which. Cancel-safe.
    pub(crate) async fn changed(&mut self) -> Vec<Transition> {
        loop {
            let mut batch = std::mem::take(&mut self.batch);
            // Many at once, so that a whole rack that goes means few new tables. Nothing is lost if this is cancelled.
            self.found.recv_many(&mut batch, MAX_RESULTS).await;
            let changed: Vec<Transition> = batch.drain(..).filter_map(|found| self.note(found)).collect();
            self.batch = batch;
            if !changed.is_empty() {
                return changed;
            }
        }
    }

    fn note(&mut self, found: Found) -> Option<Transition> {
        let target = self.targets.get_mut(&found.key).filter(|target| target.run == found.run)?;
        let good = match found.outcome {
            Outcome::Good => true,
            Outcome::Bad(failure) => {
                target.failure = Some(failure.to_string());
                false
            }
            Outcome::Unable(error) => {
                tracing::warn!(%error, address = %found.key.address, "a health check cannot be made");
                return None;
            }
        };
        target.stats.checked(good);
        let before = target.health.state;
        let changed = target.health.result(good, &target.check);
        if target.health.state != before {
            target.since = Instant::now();
        }
        if target.health.fit() && target.health.against == 0 {
            target.failure = None;
        }
        if !changed {
            return None;
        }
        target.stats.health_changed();
        Some(Transition {
            server: found.key.server.clone(),
            service: found.key.service.clone(),
            address: found.key.address,
            healthy: good,
            why: target.failure.clone().unwrap_or_default(),
        })
    }

    /// Who is not to be selected, by the indices of `config`.
    pub(crate) fn unfit(&self, config: &Config) -> Unfit {
        let mut unfit = Unfit::default();
        if self.targets.values().all(|target| target.health.fit()) {
            return unfit;
        }
        for (server, service, key, _) in wanted(config) {
            if self.targets.get(&key).is_some_and(|target| !target.health.fit()) {
                unfit.insert(server, service, Family::of(key.address.ip()));
            }
        }
        unfit
    }

    /// What is known of a server's ports.
    pub(crate) fn report(&self, server: &str) -> Vec<CheckReport> {
        // Keys sort by server first.
        let first = Key {
            server: server.to_owned(),
            service: String::new(),
            address: SocketAddr::from(([0, 0, 0, 0], 0)),
        };
        self.targets
            .range(Arc::new(first)..)
            .take_while(|(key, _)| key.server == server)
            .map(|(key, target)| CheckReport {
                service: key.service.clone(),
                address: key.address,
                state: target.health.state,
                seconds: target.since.elapsed().as_secs(),
                failure: target.failure.clone(),
            })
            .collect()
    }
}

/// The service ports to be looked at, with the indices of server and service.
fn wanted(config: &Config) -> impl Iterator<Item = (usize, usize, Key, &Check)> {
    config.servers.iter().enumerate().flat_map(move |(index, server)| {
        // Where others are behind the server, it is they who are healthy or not, and a balancer there that knows.
        let alone = |service: &usize| server.port(*service).map(|port| (*service, port));
        let services = 0..config.services.len();
        services.filter_map(move |service| alone(&service)).flat_map(move |(service, port)| {
            let of = &config.services[service];
            let serves = |address: &&std::net::IpAddr| {
                of.vips.iter().any(|vip| Family::of(*vip) == Family::of(**address))
            };
            let checked = of.check.iter();
            checked.flat_map(move |check| {
                server.addresses.iter().filter(serves).map(move |address| {
                    let key = Key {
                        server: server.name.clone(),
                        service: of.name.clone(),
                        address: SocketAddr::new(*address, port),
                    };
                    (index, service, key, check)
                })
            })
        })
    })
}

/// The task of one target.
struct Run {
    key: Arc<Key>,
    run: u64,
    check: Check,
    ports: PortRange,
    /// Which of the own ports is next.
    turn: usize,
    permits: Arc<Semaphore>,
    sender: mpsc::Sender<Found>,
}

impl Run {
    async fn forever(mut self, delay: Duration) {
        let mut ticks = interval_at(Instant::now() + delay, self.check.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let count = usize::from(self.ports.last() - self.ports.first()) + 1;
        loop {
            ticks.tick().await;
            let Ok(permit) = self.permits.acquire().await else { return };
            let own = self.ports.first() + (self.turn % count) as u16;
            self.turn = self.turn.wrapping_add(1);
            let outcome = look(&self.check, self.key.address, own).await;
            drop(permit);
            let found = Found { key: Arc::clone(&self.key), run: self.run, outcome };
            if self.sender.send(found).await.is_err() {
                return;
            }
        }
    }
}
