//! The demo itself: builds the network, shows a handshake, then changes everything under load.

use std::path::Path;
use std::time::{Duration, Instant};

use shunt_lab::{Lab, TcpState};

use super::config::{self, State};
use super::error::{Error, PartFault, Result};
use super::handshake::{self, Handshake};
use super::ladder;
use super::message::LoadReport;
use super::network::Network;
use super::output::Narrator;
use super::part::{Load, Part, Starter, Stop};
use super::plan::{
    ADD_AT, ADDED, DRAIN_AT, DRAINED, Family, KILL_AT, SERVERS, SHARED_PORT, owner, server_address,
    server_name, service_port, share,
};
use super::summary::{Accepted, Summary};

/// How long connections are begun for, unless there are too many.
const LOAD_TIME: u64 = 20;
/// Connections to begin in a second, at most.
const FASTEST: u64 = 1000;
/// One in so many connections is made by the client without a shim.
const PLAIN_SHARE: u64 = 5;
/// Long connections of the client with a shim, and of the one without.
const LONG: [u64; 2] = [40, 16];
/// How long the balancer stays dead.
const DEAD: Duration = Duration::from_millis(300);
const LOOK: Duration = Duration::from_millis(50);
/// How long the drained server's connections may take to end once all clients have.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is to be shown.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) family: Family,
    pub(crate) connections: u64,
    /// Whether every daemon records its packets.
    pub(crate) capture: bool,
}

/// The stage: everything that runs. The lab ends last.
pub(crate) struct Show<'a> {
    plan: Plan,
    narrator: &'a mut Narrator,
    stop: Stop,
    starter: Starter,
    servers: [Option<WebServer>; SERVERS],
    states: [State; SERVERS],
    balancer: Option<Part>,
    shim: Option<Part>,
    network: Network,
    _lab: Lab,
}

/// A server host's two processes.
struct WebServer {
    web: Part,
    agent: Part,
}

/// What happens to the drained server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Drain {
    Not,
    Waiting,
    Removed,
}

impl<'a> Show<'a> {
    /// Makes the network and starts all parts but the server that is added later.
    ///
    /// # Errors
    /// Something is missing on this machine, or a part does not start.
    pub(crate) fn open(plan: Plan, folder: &Path, stop: Stop, narrator: &'a mut Narrator) -> Result<Self> {
        let lab = Lab::new()?;
        narrator.say(&introduction(plan.family));
        let network = Network::build(&lab, plan.family)?;
        stop.check()?;
        let mut states = [State::Up; SERVERS];
        states[ADDED] = State::Absent;
        let mut show = Self {
            plan,
            narrator,
            starter: Starter::new(folder, stop.clone())?,
            stop,
            servers: [const { None }; SERVERS],
            states,
            balancer: None,
            shim: None,
            network,
            _lab: lab,
        };
        for server in (0..SERVERS).filter(|server| *server != ADDED) {
            show.servers[server] = Some(show.start_server(server)?);
        }
        show.starter.write("balancer.toml", &config::balancer(plan.family, states))?;
        show.balancer = Some(show.start_daemon(Role::Balancer, "balancer", "balancer.toml", plan.capture)?);
        show.starter.write("client.toml", &config::client(plan.family))?;
        for part in show.parts() {
            part.ready()?;
        }
        Ok(show)
    }

    fn start_server(&self, server: usize) -> Result<WebServer> {
        let (family, host, name) = (self.plan.family, &self.network.servers[server], server_name(server));
        let address = server_address(family, server);
        let listen = [SHARED_PORT, service_port(server)]
            .map(|port| std::net::SocketAddr::new(address, port).to_string());
        let record = self.starter.path(&record_name(server)).display().to_string();
        let arguments = [
            "demo-server",
            "--name",
            &name,
            "--listen",
            &listen[0],
            "--listen",
            &listen[1],
            "--record",
            &record,
        ];
        let web = self.starter.start(host, &name, &arguments)?;
        let file = format!("{name}-agent.toml");
        self.starter.write(&file, &config::server(family, server))?;
        let agent =
            self.start_daemon(Role::Server(server), &format!("{name}-agent"), &file, self.plan.capture)?;
        Ok(WebServer { web, agent })
    }

    fn start_daemon(&self, role: Role, name: &str, file: &str, capture: bool) -> Result<Part> {
        let (command, host) = match role {
            Role::Balancer => ("balancer", &self.network.balancer),
            Role::Client => ("client", &self.network.client),
            Role::Server(server) => ("server", &self.network.servers[server]),
        };
        let file = self.starter.path(file).display().to_string();
        let captured = self.starter.path(&format!("{name}.pcapng")).display().to_string();
        let state = self.starter.path("state").display().to_string();
        let mut arguments = vec![command, "--config", &file, "--state-dir", &state];
        if capture {
            arguments.extend(["--capture", &captured]);
        }
        self.starter.start(host, name, &arguments)
    }

    fn parts(&mut self) -> impl Iterator<Item = &mut Part> {
        let servers =
            self.servers.iter_mut().flatten().flat_map(|server| [&mut server.web, &mut server.agent]);
        servers.chain(&mut self.balancer).chain(&mut self.shim)
    }

    /// Shows how one connection is redirected, from the packets themselves.
    ///
    /// # Errors
    /// It is not, or a part fails.
    pub(crate) fn handshake(&mut self) -> Result<()> {
        self.narrator.say("\n1. One connection, as the shim's capture shows it\n");
        let name = "client-first";
        let mut shim = self.start_daemon(Role::Client, name, "client.toml", true)?;
        shim.ready()?;
        self.shim = Some(shim);
        for turn in 1..=2 {
            let mut load = self.start_load(&format!("connect-{turn}"), true, 1, 0, 1)?;
            let report = self.wait_for(&mut load)?;
            if let Some(broken) = report.broken.first() {
                let text = format!("the connection that was to be shown broke: {}", broken.reason);
                return Err(Error::NotShown(text));
            }
        }
        // Its capture is complete when it has ended.
        if let Some(shim) = self.shim.take() {
            shim.end()?;
        }
        let packets = handshake::read(&self.starter.path(&format!("{name}.pcapng")))?;
        let found = handshake::find(&packets, self.plan.family.vip());
        let redirected: Vec<&Handshake> = found.iter().filter(|one| owner(one.port).is_some()).collect();
        let Some(first) = redirected.first() else {
            return Err(Error::NotShown("the connections worked, but none was redirected".to_owned()));
        };
        self.narrate(first);
        if let Some(next) = redirected.get(1).filter(|next| next.reconnected != first.reconnected) {
            self.narrator.say("\n   The next one, now that the path is known to translate nothing:\n");
            self.narrate(next);
        }
        let shim = self.start_daemon(Role::Client, "client", "client.toml", self.plan.capture)?;
        self.shim.insert(shim).ready()
    }

    fn narrate(&self, handshake: &Handshake) {
        let server = owner(handshake.port).unwrap_or_default();
        let names = ["client's TCP", "shim", "balancer, servers"];
        self.narrator.say(&ladder::draw(names, &handshake.steps));
        let port = handshake.port;
        let how = if handshake.reconnected {
            format!(
                "The shim asks (R); {server} answers from the SYN alone that it goes on at {port} (P); the shim repeats\n   the SYN there"
            )
        } else {
            format!(
                "The shim asks (R); {server} answers from port {SHARED_PORT}, names {port} (P), and the shim goes on there: no round trip\n   more than plain TCP"
            )
        };
        self.narrator.say(&format!(
            "   {how}. The client's TCP sees port {SHARED_PORT} all the time. The balancer only knows that {port} is {server}'s."
        ));
    }

    fn start_load(&self, name: &str, shim: bool, connections: u64, long: u64, rate: u64) -> Result<Load> {
        let host = if shim { &self.network.client } else { &self.network.plain_client };
        let target = self.plan.family.target().to_string();
        let [connections, long, rate] = [connections, long, rate].map(|number| number.to_string());
        let arguments = [
            "demo-client",
            "--target",
            &target,
            "--connections",
            &connections,
            "--long",
            &long,
            "--rate",
            &rate,
        ];
        self.starter.start_load(host, name, &arguments)
    }

    fn wait_for(&mut self, load: &mut Load) -> Result<LoadReport> {
        loop {
            load.progress()?;
            if let Some(report) = load.report() {
                return Ok(report.clone());
            }
            self.look()?;
        }
    }

    /// Sees that all is well, and waits a moment.
    fn look(&mut self) -> Result<()> {
        self.parts().try_for_each(Part::check)?;
        self.stop.sleep(LOOK)
    }

    /// Makes connections while a server is added, one drained and removed, and the balancer killed.
    ///
    /// # Errors
    /// A part fails.
    pub(crate) fn changes(&mut self) -> Result<Summary> {
        let total = self.plan.connections.max(2);
        let plain = (total / PLAIN_SHARE).max(1);
        let shares = [total - plain, plain];
        self.narrator.say(&format!(
            "\n2. {total} connections, {plain} of them from a client without a shim; some live long, most are short\n"
        ));
        let seconds = LOAD_TIME.max(total.div_ceil(FASTEST));
        let mut loads = Vec::new();
        for (index, name) in ["load", "plain-load"].into_iter().enumerate() {
            let share = shares[index];
            let long = LONG[index].min(share / 4);
            loads.push(self.start_load(
                name,
                index == 0,
                share,
                long,
                (share - long).div_ceil(seconds).max(1),
            )?);
        }
        let mut script =
            [(ADD_AT, Act::Add), (DRAIN_AT, Act::Drain), (KILL_AT, Act::Kill)].into_iter().peekable();
        let mut drain = Drain::Not;
        while loads.iter().any(|load| load.report().is_none()) {
            let part = self.progress(&mut loads, shares)?;
            if let Some((_, act)) = script.next_if(|(at, _)| *at <= part) {
                self.act(act)?;
                if act == Act::Drain {
                    drain = Drain::Waiting;
                }
            }
            if drain == Drain::Waiting && part > KILL_AT && self.connections_of_drained()? == 0 {
                self.remove_drained()?;
                drain = Drain::Removed;
            }
            self.look()?;
        }
        self.narrator.finish();
        for (_, act) in script {
            self.act(act)?;
        }
        if drain != Drain::Removed {
            self.wait_for_drained()?;
            self.remove_drained()?;
        }
        self.summarize(&loads)
    }

    /// Shows how far the clients are; says which part of the connections through the shim has begun.
    fn progress(&mut self, loads: &mut [Load], shares: [u64; 2]) -> Result<f64> {
        let (mut ended, mut open, mut part) = (0, 0, 0.0);
        for (index, load) in loads.iter_mut().enumerate() {
            let progress = load.progress()?;
            ended += progress.ended;
            open += progress.begun.saturating_sub(progress.ended);
            if index == 0 {
                part = share(progress.begun, shares[0]);
            }
        }
        self.narrator.progress(ended, open, shares.iter().sum());
        Ok(part)
    }

    fn act(&mut self, act: Act) -> Result<()> {
        match act {
            Act::Add => {
                let name = server_name(ADDED);
                let mut server = self.start_server(ADDED)?;
                server.web.ready()?;
                server.agent.ready()?;
                self.servers[ADDED] = Some(server);
                self.set_state(ADDED, State::Up)?;
                self.narrator.say(&format!("   + {name} is added: it takes new connections from now on"));
            }
            Act::Drain => {
                self.set_state(DRAINED, State::Drain)?;
                let (name, left) = (server_name(DRAINED), self.connections_of_drained()?);
                self.narrator.say(&format!(
                    "   ~ {name} is drained: no new connections; {left} redirected ones go on"
                ));
            }
            Act::Kill => self.restart_balancer()?,
        }
        Ok(())
    }

    fn set_state(&mut self, server: usize, state: State) -> Result<()> {
        self.states[server] = state;
        self.starter.write("balancer.toml", &config::balancer(self.plan.family, self.states))?;
        self.balancer.as_mut().map_or(Ok(()), Part::reload)
    }

    fn restart_balancer(&mut self) -> Result<()> {
        let open: usize = (0..SERVERS).map(|server| self.connections_of(server)).sum::<Result<usize>>()?;
        let begin = Instant::now();
        if let Some(balancer) = self.balancer.take() {
            balancer.kill()?;
        }
        self.stop.sleep(DEAD)?;
        let balancer =
            self.start_daemon(Role::Balancer, "balancer-again", "balancer.toml", self.plan.capture)?;
        self.balancer.insert(balancer).ready()?;
        let milliseconds = begin.elapsed().as_millis();
        self.narrator.say(&format!(
            "   x the balancer is killed (SIGKILL) and started again {milliseconds} ms later, with {open} redirected connections open"
        ));
        Ok(())
    }

    /// Redirected connections that a server's kernel knows of, TIME-WAIT left out.
    fn connections_of(&self, server: usize) -> Result<usize> {
        let sockets = self.network.servers[server].tcp_sockets()?;
        let alive = |state| !matches!(state, TcpState::Listen | TcpState::TimeWait | TcpState::Closed);
        let port = service_port(server);
        Ok(sockets.iter().filter(|socket| socket.local.port() == port && alive(socket.state)).count())
    }

    fn connections_of_drained(&self) -> Result<usize> {
        self.connections_of(DRAINED)
    }

    fn wait_for_drained(&mut self) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        loop {
            let connections = self.connections_of_drained()?;
            if connections == 0 {
                return Ok(());
            }
            if Instant::now() > end
                && let Some(server) = &self.servers[DRAINED]
            {
                return Err(server.web.fault(PartFault::Busy { connections, after: PATIENCE }));
            }
            self.look()?;
        }
    }

    fn remove_drained(&mut self) -> Result<()> {
        self.set_state(DRAINED, State::Absent)?;
        if let Some(WebServer { web, agent }) = self.servers[DRAINED].take() {
            agent.end()?;
            web.end()?;
        }
        let name = server_name(DRAINED);
        self.narrator.say(&format!(
            "   - {name} is removed and switched off: its last redirected connection has ended"
        ));
        Ok(())
    }

    fn summarize(&self, loads: &[Load]) -> Result<Summary> {
        let mut accepted = Accepted::default();
        for server in 0..SERVERS {
            let path = self.starter.path(&record_name(server));
            match std::fs::read_to_string(&path) {
                Ok(record) => accepted.add(&server_name(server), &record),
                Err(error) => return Err(Error::file("reading", path)(error)),
            }
        }
        let names: Vec<String> = (0..SERVERS).map(server_name).collect();
        let report = |index: usize| loads.get(index).and_then(Load::report).cloned().unwrap_or_default();
        Ok(Summary::new(&names, &report(0), &report(1), &accepted))
    }

    /// Ends every part in order.
    ///
    /// # Errors
    /// One does not end well.
    pub(crate) fn close(mut self) -> Result<()> {
        let servers = self.servers.iter_mut().filter_map(Option::take).collect::<Vec<_>>();
        self.shim.take().map_or(Ok(()), Part::end)?;
        self.balancer.take().map_or(Ok(()), Part::end)?;
        for WebServer { web, agent } in servers {
            agent.end()?;
            web.end()?;
        }
        Ok(())
    }
}

/// What is started.
#[derive(Debug, Clone, Copy)]
enum Role {
    Balancer,
    Client,
    Server(usize),
}

/// What is done under load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    Add,
    Drain,
    Kill,
}

fn record_name(server: usize) -> String {
    format!("{}.accepted", server_name(server))
}

/// What happened to each server, for the table.
pub(crate) fn remarks() -> Vec<String> {
    let remark = |server| match server {
        ADDED => "added on the way",
        DRAINED => "drained, then removed",
        _ => "",
    };
    (0..SERVERS).map(|server| remark(server).to_owned()).collect()
}

fn introduction(family: Family) -> String {
    let ports: Vec<String> =
        (0..SERVERS).map(|server| format!("{} {}", server_name(server), service_port(server))).collect();
    format!(
        "A client with a shim, one without, a router, a balancer and {SERVERS} web servers, each a network namespace of \
         its own.\nThe servers share {} (X); each also has a port of its own there (Y): {}.",
        family.target(),
        ports.join(", ")
    )
}
