//! The servers and balancers, and what is done to them. Not a word here of who chooses which server.

use std::collections::VecDeque;
use std::ops::Range;

/// A server, by its number; after a restart it is the same one.
pub type Server = u16;

/// The first port that a server names as its own; the real agents' examples begin here too.
const FIRST_PORT: u16 = 41_000;

/// How many servers there may be: each needs a port of its own.
pub const MAX_SERVERS: usize = (u16::MAX - FIRST_PORT) as usize;

/// What a server does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Nobody knows of it yet.
    Planned,
    /// It will come next: in JET's horizon.
    Announced,
    /// It takes new connections.
    Up,
    /// It takes no new connections and keeps those that it has.
    Draining,
    /// It was stopped or is dead; it may come back.
    Gone,
}

/// Something done to the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// So many servers that were planned come up.
    Add(usize),
    /// These take no new connections any more.
    Drain(Vec<Server>),
    /// These end, whatever connections they still have.
    Stop(Vec<Server>),
    /// These come up again.
    Return(Vec<Server>),
    /// These have this weight from now on.
    Weigh(Vec<Server>, u32),
    /// There are so many balancers from now on; routers spread connections anew over all of them.
    Balancers(usize),
}

/// When another server may have a server's port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reuse {
    /// When the server that had it is gone.
    #[default]
    WhenGone,
    /// As soon as it takes no new connections: a mistake, planted to see that the simulation would show it.
    AtOnce,
}

#[derive(Debug, Clone, Copy)]
struct Member {
    state: State,
    weight: u32,
    port: u16,
}

/// All servers that there are and will be.
#[derive(Debug)]
pub struct Cluster {
    members: Vec<Member>,
    balancers: usize,
    horizon: usize,
    reuse: Reuse,
    next_port: u16,
    free_ports: VecDeque<u16>,
}

impl Cluster {
    /// The first `up` of `servers` are up, the rest are planned; `horizon` of those are announced at any time.
    pub fn new(servers: usize, up: usize, balancers: usize, horizon: usize, reuse: Reuse) -> Cluster {
        let member = Member { state: State::Planned, weight: 1, port: 0 };
        let members = vec![member; servers.min(MAX_SERVERS)];
        let (next_port, free_ports) = (FIRST_PORT, VecDeque::new());
        let mut cluster = Cluster { members, balancers, horizon, reuse, next_port, free_ports };
        cluster.add(up);
        cluster.announce();
        cluster
    }

    /// How many balancers there are.
    pub fn balancers(&self) -> usize {
        self.balancers
    }

    /// How many servers there are or will be.
    pub fn servers(&self) -> usize {
        self.members.len()
    }

    /// The servers that take new connections, with their weights, by number.
    pub fn up(&self) -> impl Iterator<Item = (Server, u32)> + '_ {
        self.in_states(&[State::Up])
    }

    /// JET's horizon: the servers that may be added next, which are those announced and those that were taken out.
    pub fn horizon(&self) -> impl Iterator<Item = (Server, u32)> + '_ {
        self.in_states(&[State::Announced, State::Draining, State::Gone])
    }

    /// The ports of servers that keep connections, and whose they are. A port that is on two of them comes with the
    /// one that got it last.
    pub fn ports(&self) -> impl Iterator<Item = (u16, Server)> + '_ {
        let of = |state| self.in_states(state).map(|(server, _)| (self.port(server), server));
        of(&[State::Draining]).chain(of(&[State::Up]))
    }

    /// The port that a server names as its own.
    pub fn port(&self, server: Server) -> u16 {
        self.members[usize::from(server)].port
    }

    /// Does something to the cluster; tells which servers ended by it.
    pub fn apply(&mut self, change: &Change) -> Vec<Server> {
        let mut ended = Vec::new();
        match change {
            Change::Add(count) => self.add(*count),
            Change::Drain(servers) => servers.iter().for_each(|server| self.drain(*server)),
            Change::Stop(servers) => {
                for server in servers {
                    self.stop(*server);
                }
                ended.clone_from(servers);
            }
            Change::Return(servers) => servers.iter().for_each(|server| self.raise(*server)),
            Change::Weigh(servers, weight) => {
                for server in servers {
                    self.members[usize::from(*server)].weight = *weight;
                }
            }
            Change::Balancers(count) => self.balancers = *count,
        }
        self.announce();
        ended
    }

    fn in_states<'a>(&'a self, states: &'a [State]) -> impl Iterator<Item = (Server, u32)> + 'a {
        let numbered = (0..).zip(&self.members);
        numbered.filter(|(_, member)| states.contains(&member.state)).map(|(id, member)| (id, member.weight))
    }

    fn add(&mut self, count: usize) {
        let waiting = |member: &Member| matches!(member.state, State::Planned | State::Announced);
        let all: Range<usize> = 0..self.members.len();
        let next: Vec<usize> = all.filter(|index| waiting(&self.members[*index])).take(count).collect();
        for index in next {
            self.raise(index as Server);
        }
    }

    fn announce(&mut self) {
        let waiting = |member: &&mut Member| matches!(member.state, State::Planned | State::Announced);
        for member in self.members.iter_mut().filter(waiting).take(self.horizon) {
            member.state = State::Announced;
        }
    }

    fn raise(&mut self, server: Server) {
        let port = self.free_ports.pop_front().unwrap_or_else(|| {
            let fresh = self.next_port;
            self.next_port = fresh.saturating_add(1);
            fresh
        });
        let member = &mut self.members[usize::from(server)];
        (member.state, member.port) = (State::Up, port);
    }

    fn drain(&mut self, server: Server) {
        let member = &mut self.members[usize::from(server)];
        member.state = State::Draining;
        if self.reuse == Reuse::AtOnce {
            self.free_ports.push_back(member.port);
        }
    }

    fn stop(&mut self, server: Server) {
        let reuse = self.reuse;
        let member = &mut self.members[usize::from(server)];
        if reuse == Reuse::WhenGone || member.state == State::Up {
            self.free_ports.push_back(member.port);
        }
        member.state = State::Gone;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn up(cluster: &Cluster) -> Vec<Server> {
        cluster.up().map(|(server, _)| server).collect()
    }

    #[test]
    fn a_drained_server_keeps_its_port_until_it_is_gone() {
        let mut cluster = Cluster::new(4, 2, 1, 1, Reuse::WhenGone);
        assert_eq!(up(&cluster), [0, 1]);
        cluster.apply(&Change::Drain(vec![0]));
        cluster.apply(&Change::Add(1));
        let ports: Vec<_> = cluster.ports().collect();
        assert_eq!(ports, [(FIRST_PORT, 0), (FIRST_PORT + 1, 1), (FIRST_PORT + 2, 2)]);
        assert_eq!(cluster.apply(&Change::Stop(vec![0])), [0]);
        cluster.apply(&Change::Add(1));
        assert_eq!(cluster.port(3), FIRST_PORT, "the first that is free");
        assert_eq!(up(&cluster), [1, 2, 3]);
    }

    #[test]
    fn the_planted_mistake_gives_a_port_to_two_servers() {
        let mut cluster = Cluster::new(3, 2, 1, 1, Reuse::AtOnce);
        cluster.apply(&Change::Drain(vec![0]));
        cluster.apply(&Change::Add(1));
        assert_eq!(cluster.port(2), cluster.port(0));
        assert_eq!(cluster.ports().filter(|(port, _)| *port == FIRST_PORT).last(), Some((FIRST_PORT, 2)));
    }

    #[test]
    fn the_horizon_has_the_next_and_those_taken_out() {
        let mut cluster = Cluster::new(6, 2, 1, 2, Reuse::WhenGone);
        let horizon = |cluster: &Cluster| cluster.horizon().map(|(server, _)| server).collect::<Vec<_>>();
        assert_eq!(horizon(&cluster), [2, 3]);
        cluster.apply(&Change::Add(1));
        assert_eq!(horizon(&cluster), [3, 4]);
        cluster.apply(&Change::Drain(vec![1]));
        assert_eq!(horizon(&cluster), [1, 3, 4]);
        cluster.apply(&Change::Return(vec![1]));
        assert_eq!((horizon(&cluster), up(&cluster)), (vec![3, 4], vec![0, 1, 2]));
    }
}
