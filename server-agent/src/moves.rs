//! Which connections are asked to move (PROTOCOL.md §4), how many at a time, and what came of it.
//!
//! Knows no packets and changes nothing: [`Moves::advance`] says which connections are to be diverted and asked, the
//! agent does it. Connections that are not being moved are not known here.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use shunt_host::TcpConnection;
use shunt_host::control::Reply;
use shunt_stack::redirect::RedirectOutcome;
use shunt_stack::time::Instant;
use shunt_stack::wire::SeqNumber;

use crate::config::{Config, Service};

/// Connections that one command asks at the most.
const MOST_OF_A_COMMAND: usize = 65_536;
/// Changes of what is diverted are put together for so long.
const GATHER: Duration = Duration::from_millis(20);
/// After a failure to divert.
const PAUSE: Duration = Duration::from_secs(1);
/// A connection that has sent nothing for so long after it was diverted is idle.
const IDLE: Duration = Duration::from_millis(100);
/// Between probes of one connection: Linux answers one in 500 ms (`net.ipv4.tcp_invalid_ratelimit`).
const BETWEEN_PROBES: Duration = Duration::from_millis(600);
/// Probes of one connection.
const PROBES: u8 = 8;
/// Between two lines that say how far a command is.
const PROGRESS: Duration = Duration::from_secs(1);

/// Which connections are to move, and where to.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MoveRequest {
    /// The service.
    pub(crate) service: String,
    /// Z; the redirect port if left out.
    to: Option<u16>,
    /// Another address than the one the connection is at (PROTOCOL.md §7).
    address: Option<IpAddr>,
    /// Only connections of this client.
    client: Option<IpAddr>,
    /// Only the one from this port.
    client_port: Option<u16>,
    /// As many at the most.
    limit: Option<usize>,
}

impl MoveRequest {
    /// All connections of a service, to one port.
    pub(crate) fn whole(service: &str, to: u16) -> Self {
        let service = service.to_owned();
        Self { service, to: Some(to), address: None, client: None, client_port: None, limit: None }
    }

    /// Where a connection is to go; `None` if it is not meant.
    fn target(&self, service: &Service, connection: TcpConnection) -> Option<SocketAddr> {
        let TcpConnection { local, remote } = connection;
        let meant = local.port() == service.service_port
            && self.client.is_none_or(|client| client == remote.ip())
            && self.client_port.is_none_or(|port| port == remote.port());
        let address = self.address.unwrap_or(local.ip());
        // The path to the other family is another one.
        let reachable = address.is_ipv4() == local.is_ipv4();
        let to = SocketAddr::new(address, self.to.unwrap_or(service.redirect_port));
        (meant && reachable && to != local).then_some(to)
    }

    /// Why it cannot be done.
    pub(crate) fn check(&self, config: &Config) -> Result<(), String> {
        let service = find(config, &self.service)?;
        if self.to == Some(0) {
            return Err("port 0 cannot be used".to_owned());
        }
        if self.address.is_none() && self.to == Some(service.service_port) {
            let (name, port) = (&service.name, service.service_port);
            return Err(format!(
                "{port} is where the connections of {name:?} are: name another server's port"
            ));
        }
        if self.address.is_some() && self.to.is_none() {
            return Err("another address needs a port".to_owned());
        }
        Ok(())
    }
}

/// The service of this name.
pub(crate) fn find<'a>(config: &'a Config, name: &str) -> Result<&'a Service, String> {
    let found = config.services.iter().find(|service| service.name == name);
    found.ok_or_else(|| format!("no service named {name:?}"))
}

/// What came of a command so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub(crate) struct Tally {
    /// Connections that go on where they were asked to.
    moved: usize,
    /// That were closed meanwhile.
    closed: usize,
    /// Whose clients did nothing; they are served on.
    timed_out: usize,
    /// Whose clients did nothing; both ends were reset.
    reset: usize,
    /// That could not be asked.
    refused: usize,
}

/// How far a command is, and at last what came of it.
#[derive(Debug, Serialize)]
struct Report<'a> {
    service: &'a str,
    #[serde(flatten)]
    tally: Tally,
    /// Being asked now.
    moving: usize,
    /// To be asked later.
    waiting: usize,
    /// Not asked, because there are more than the limit.
    left: usize,
    /// Connections of plain clients on the redirect port: nobody can ask them.
    plain: usize,
}

/// A command that is being carried out.
struct Job {
    service: String,
    waiting: VecDeque<(TcpConnection, SocketAddr)>,
    moving: usize,
    left: usize,
    plain: usize,
    tally: Tally,
    reply: Reply,
    tells: Instant,
}

impl Job {
    fn report(&self) -> Report<'_> {
        Report {
            service: &self.service,
            tally: self.tally,
            moving: self.moving,
            waiting: self.waiting.len(),
            left: self.left,
            plain: self.plain,
        }
    }
}

/// A connection that is diverted.
#[derive(Debug)]
struct Active {
    job: u64,
    /// When to make it speak; `None` once its local TCP has sent something that passed (the machine knows where it
    /// stands), or was asked in vain.
    probe_at: Option<Instant>,
    probes: u8,
    /// SEQ and ACK of the probe: any.
    numbers: (u32, u32),
}

/// A segment that makes an idle TCP say where it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Probe {
    pub(crate) connection: TcpConnection,
    pub(crate) seq: SeqNumber,
    pub(crate) ack: SeqNumber,
}

/// All commands that are being carried out.
pub(crate) struct Moves {
    /// Connections diverted at a time.
    most: usize,
    next_job: u64,
    jobs: BTreeMap<u64, Job>,
    active: HashMap<TcpConnection, Active>,
    /// Those that have not spoken, by when to make them.
    silent: BTreeSet<(Instant, TcpConnection)>,
    /// When what is diverted must be changed.
    apply_at: Option<Instant>,
    random: RandomState,
}

impl Moves {
    pub(crate) fn new(most: usize) -> Self {
        Self {
            most,
            next_job: 0,
            jobs: BTreeMap::new(),
            active: HashMap::new(),
            silent: BTreeSet::new(),
            apply_at: None,
            random: RandomState::new(),
        }
    }

    /// Whether connections of the service are being moved.
    pub(crate) fn is_moving(&self, service: &str) -> bool {
        self.jobs.values().any(|job| job.service == service)
    }

    /// Begins with these connections of the service, as the kernel has told them.
    pub(crate) fn begin(
        &mut self,
        now: Instant,
        request: &MoveRequest,
        service: &Service,
        sockets: impl Iterator<Item = TcpConnection>,
        reply: Reply,
    ) {
        let (mut waiting, mut plain) = (VecDeque::new(), 0);
        for connection in sockets {
            plain += usize::from(connection.local.port() == service.redirect_port);
            waiting.extend(request.target(service, connection).map(|to| (connection, to)));
        }
        let limit = request.limit.unwrap_or(MOST_OF_A_COMMAND).min(MOST_OF_A_COMMAND);
        let left = waiting.len().saturating_sub(limit);
        waiting.truncate(limit);
        let service = service.name.clone();
        let (moving, tally, tells) = (0, Tally::default(), now + PROGRESS);
        self.jobs.insert(self.next_job, Job { service, waiting, moving, left, plain, tally, reply, tells });
        self.next_job += 1;
        self.apply_at = Some(now);
    }

    /// The connections that must be diverted.
    pub(crate) fn diverted(&self) -> Vec<TcpConnection> {
        let mut all: Vec<TcpConnection> = self.active.keys().copied().collect();
        all.sort_unstable();
        all
    }

    /// If what is diverted has to change now: the connections that are new, and where they are to go. To be asked once
    /// all of [`diverted`](Self::diverted) are.
    pub(crate) fn advance(&mut self, now: Instant) -> Option<Vec<(TcpConnection, SocketAddr)>> {
        self.apply_at.filter(|at| *at <= now)?;
        self.apply_at = None;
        let mut new = Vec::new();
        for (&id, job) in &mut self.jobs {
            while self.active.len() < self.most
                && let Some((connection, to)) = job.waiting.pop_front()
            {
                if self.active.contains_key(&connection) {
                    // Asked by another command already: the service was renamed meanwhile.
                    job.tally.refused += 1;
                    continue;
                }
                let random = self.random.hash_one(connection);
                let numbers = ((random >> 32) as u32, random as u32);
                let at = now + IDLE;
                self.silent.insert((at, connection));
                self.active.insert(connection, Active { job: id, probe_at: Some(at), probes: 0, numbers });
                job.moving += 1;
                new.push((connection, to));
            }
        }
        Some(new)
    }

    /// What is diverted was changed: commands that are done are answered, and leave nothing behind.
    pub(crate) fn applied(&mut self) {
        let done = |job: &Job| job.moving == 0 && job.waiting.is_empty();
        for (_, job) in self.jobs.extract_if(.., |_, job| done(job)) {
            let report = serde_json::to_value(job.report());
            job.reply.end(report);
        }
    }

    /// What is diverted could not be changed: what is new cannot be asked.
    pub(crate) fn could_not_divert(&mut self, now: Instant, new: &[(TcpConnection, SocketAddr)]) {
        for (connection, _) in new {
            self.refused(now, *connection);
        }
        self.applied();
        self.apply_at = Some(now + PAUSE);
    }

    /// The connection could not be asked.
    pub(crate) fn refused(&mut self, now: Instant, connection: TcpConnection) {
        self.finish(now, connection, |tally| &mut tally.refused);
    }

    /// What became of a connection that was asked.
    pub(crate) fn ended(&mut self, now: Instant, connection: TcpConnection, outcome: RedirectOutcome) {
        self.finish(now, connection, |tally| match outcome {
            RedirectOutcome::Confirmed => &mut tally.moved,
            RedirectOutcome::Closed => &mut tally.closed,
            RedirectOutcome::GivenUp => &mut tally.timed_out,
            RedirectOutcome::Reset => &mut tally.reset,
        });
    }

    fn finish(
        &mut self,
        now: Instant,
        connection: TcpConnection,
        count: impl FnOnce(&mut Tally) -> &mut usize,
    ) {
        let Some(active) = self.active.remove(&connection) else { return };
        if let Some(at) = active.probe_at {
            self.silent.remove(&(at, connection));
        }
        self.apply_at.get_or_insert(now + GATHER);
        if let Some(job) = self.jobs.get_mut(&active.job) {
            *count(&mut job.tally) += 1;
            job.moving -= 1;
        }
    }

    /// Stops what is being done with a service; the connections that are not to be asked any more. `None` if nothing is
    /// being done.
    pub(crate) fn stop(&mut self, now: Instant, service: &str) -> Option<Vec<TcpConnection>> {
        let id = *self.jobs.iter().find(|(_, job)| job.service == service)?.0;
        self.give_up(now, id, "stopped")
    }

    fn give_up(&mut self, now: Instant, id: u64, why: &str) -> Option<Vec<TcpConnection>> {
        let job = self.jobs.remove(&id)?;
        let stopped = self.active.extract_if(|_, active| active.job == id);
        let stopped: Vec<TcpConnection> = stopped.map(|(connection, _)| connection).collect();
        self.silent.retain(|(_, connection)| self.active.contains_key(connection));
        let (moved, left) = (job.tally.moved, stopped.len() + job.waiting.len() + job.left);
        job.reply.refuse(format!("{why}: {moved} connections have moved, {left} were not waited for"));
        self.apply_at.get_or_insert(now + GATHER);
        Some(stopped)
    }

    /// Says how far commands are; the connections of those whose answer nobody waits for any more, which are not to be
    /// asked any more.
    pub(crate) fn tell(&mut self, now: Instant) -> Vec<TcpConnection> {
        let mut gone = Vec::new();
        for (id, job) in &mut self.jobs {
            if job.tells <= now {
                job.tells = now + PROGRESS;
                if !job.reply.progress(job.report()) {
                    gone.push(*id);
                }
            }
        }
        gone.into_iter().filter_map(|id| self.give_up(now, id, "interrupted")).flatten().collect()
    }

    /// The local TCP has sent a segment: a reset with this sequence number, or something that says where it stands.
    /// Whether it only answers a probe of a connection that is no more.
    pub(crate) fn on_local(&mut self, connection: &TcpConnection, reset: Option<SeqNumber>) -> bool {
        let Some(active) = self.active.get_mut(connection) else { return false };
        if let Some(seq) = reset {
            return active.probes > 0 && seq.0 == active.numbers.1;
        }
        if let Some(at) = active.probe_at.take() {
            self.silent.remove(&(at, *connection));
        }
        false
    }

    /// The probes that are due. Their numbers are any: at most one of two whose SEQ is half the space apart can lie in
    /// the window, and its ACK then acknowledges what was never sent. Either is answered by an ACK (RFC 9293 §3.10.7.4).
    pub(crate) fn probes(&mut self, now: Instant) -> Vec<Probe> {
        let mut due = Vec::new();
        while let Some((at, connection)) = self.silent.first().copied()
            && at <= now
        {
            self.silent.pop_first();
            let Some(active) = self.active.get_mut(&connection) else { continue };
            active.probes += 1;
            active.numbers.0 ^= 1 << 31;
            active.probe_at = (active.probes < PROBES).then_some(now + BETWEEN_PROBES);
            self.silent.extend(active.probe_at.map(|at| (at, connection)));
            let (seq, ack) = active.numbers;
            due.push(Probe { connection, seq: SeqNumber(seq), ack: SeqNumber(ack) });
        }
        due
    }

    /// When something is due next.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        let probe = self.silent.first().map(|(at, _)| *at);
        let tells = self.jobs.values().map(|job| job.tells).min();
        [self.apply_at, probe, tells].into_iter().flatten().min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service() -> Service {
        Service { name: "web".to_owned(), redirect_port: 443, service_port: 41001 }
    }

    fn connection(local: &str, remote: &str) -> TcpConnection {
        TcpConnection { local: local.parse().unwrap(), remote: remote.parse().unwrap() }
    }

    fn request(text: &str) -> MoveRequest {
        serde_json::from_str(&format!("{{\"service\":\"web\"{text}}}")).unwrap()
    }

    #[test]
    fn a_request_means_connections_of_the_service_port_that_can_get_there() {
        let v4 = connection("10.0.0.11:41001", "10.1.0.2:50000");
        let v6 = connection("[fd00::11]:41001", "[fd00:1::2]:50000");
        let plain = connection("10.0.0.11:443", "10.1.0.2:50000");
        let targets = |text: &str| {
            let request = request(text);
            [v4, v6, plain].map(|connection| request.target(&service(), connection).map(|to| to.to_string()))
        };
        let some = |v4: &str, v6: &str| {
            [v4, v6, ""].map(|text| Some(text.to_owned()).filter(|text| !text.is_empty()))
        };
        assert_eq!(targets(""), some("10.0.0.11:443", "[fd00::11]:443"));
        assert_eq!(targets(",\"to\":41002"), some("10.0.0.11:41002", "[fd00::11]:41002"));
        assert_eq!(targets(",\"to\":41001,\"address\":\"fd00::12\""), some("", "[fd00::12]:41001"));
        assert_eq!(targets(",\"to\":41002,\"client\":\"10.1.0.2\""), some("10.0.0.11:41002", ""));
        assert_eq!(targets(",\"client\":\"10.1.0.2\",\"client_port\":50001"), some("", ""));
    }

    /// One that is being moved, without the command.
    fn diverted(moves: &mut Moves, connection: TcpConnection, now: Instant) {
        moves.silent.insert((now + IDLE, connection));
        let active = Active { job: 0, probe_at: Some(now + IDLE), probes: 0, numbers: (1, 2) };
        moves.active.insert(connection, active);
    }

    #[test]
    fn an_idle_connection_is_probed_from_two_places_until_it_speaks() {
        let (mut moves, now) = (Moves::new(1), Instant::from_millis(5));
        let one = connection("10.0.0.11:41001", "10.1.0.2:50000");
        diverted(&mut moves, one, now);
        assert!(moves.probes(now).is_empty());
        let first = moves.probes(now + IDLE);
        assert_eq!((first.len(), first[0].connection), (1, one));
        let next = moves.poll_timeout().unwrap();
        assert_eq!(next, now + IDLE + BETWEEN_PROBES);
        let second = moves.probes(next);
        assert_eq!(second[0].seq.0 ^ first[0].seq.0, 1 << 31);
        assert!(!moves.on_local(&one, None), "it is the client's");
        assert_eq!((moves.probes(next + BETWEEN_PROBES).len(), moves.poll_timeout()), (0, None));
    }

    #[test]
    fn probes_are_bounded_and_the_reset_that_answers_one_is_not_for_the_client() {
        let (mut moves, now) = (Moves::new(1), Instant::from_millis(5));
        let one = connection("10.0.0.11:41001", "10.1.0.2:50000");
        diverted(&mut moves, one, now);
        assert!(!moves.on_local(&one, Some(SeqNumber(2))), "nothing has been asked yet");
        let mut count = 0;
        while let Some(at) = moves.poll_timeout() {
            let probes = moves.probes(at);
            assert!(moves.on_local(&one, Some(probes[0].ack)));
            assert!(!moves.on_local(&one, Some(probes[0].ack + 1)));
            count += 1;
        }
        assert_eq!(count, usize::from(PROBES));
        moves.ended(now, one, RedirectOutcome::Closed);
        assert!(
            moves.diverted().is_empty() && moves.poll_timeout().is_some(),
            "what is diverted has changed"
        );
    }
}
