//! The hosts of one contestant, and what runs on them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use shunt_lab::{Child, Host, Lab, LinkOptions, TcpState, Via};

use crate::addresses::{ECHO_PORTS, MIDDLE, SERVER, Service, VIP, client_addresses};
use crate::config;
use crate::contestant::Contestant;
use crate::installed::Installed;

/// How long a program may take to be ready.
const READY: Duration = Duration::from_secs(15);
/// How long one may take to end.
const PATIENCE: Duration = Duration::from_secs(3);
/// The agents look every second who listens on service ports.
const AGENT_LOOKS: Duration = Duration::from_millis(1300);

/// A client, a server and what is between them. Fields are dropped in order: processes before the hosts they live on.
pub struct World {
    /// Who is in the middle.
    pub contestant: Contestant,
    /// The process that balances, where there is one.
    pub balancer: Option<Child>,
    shim: Option<Child>,
    programs: Vec<Child>,
    /// Where measurements start.
    pub client: Host,
    server: Host,
    middle: Option<Host>,
    folder: PathBuf,
    lab: Lab,
}

impl World {
    /// Builds the hosts, starts the programs and waits until they are ready; files go to a folder in `folder`.
    ///
    /// # Errors
    /// The kernel refuses something, or a program does not start.
    pub fn build(contestant: Contestant, installed: &Installed, folder: &Path) -> Result<World> {
        let lab = Lab::new()?;
        let (client, server) = (lab.host("client")?, lab.host("server")?);
        let middle = (contestant != Contestant::Direct).then(|| lab.host("middle")).transpose()?;
        let folder = folder.join(contestant.name());
        std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        let mut world = World {
            contestant,
            balancer: None,
            shim: None,
            programs: Vec::new(),
            client,
            server,
            middle,
            folder,
            lab,
        };
        world.plug()?;
        world.start_server(installed)?;
        world.start_middle(installed)?;
        if contestant.has_agent() {
            let agent = world.daemon(&world.server, installed, "server", &config::agent())?;
            world.programs.push(agent);
            std::thread::sleep(AGENT_LOOKS);
        }
        if let Some(text) = config::shim(contestant) {
            world.shim = Some(world.daemon(&world.client, installed, "client", &text)?);
        }
        Ok(world)
    }

    fn plug(&self) -> Result<()> {
        let (near, far) = match &self.middle {
            None => (&self.server, &self.client),
            Some(middle) => (middle, middle),
        };
        self.lab.link(&self.client, "eth0", near, "eth0", LinkOptions::default())?;
        if let Some(middle) = &self.middle {
            self.lab.link(middle, "eth1", &self.server, "eth0", LinkOptions::default())?;
            middle.address("eth0", &format!("{}/24", MIDDLE[0]))?;
            middle.address("eth1", &format!("{}/24", MIDDLE[1]))?;
            middle.sysctl("net.ipv4.ip_forward", "1")?;
        }
        for address in client_addresses(self.contestant) {
            self.client.address("eth0", &format!("{address}/24"))?;
        }
        self.server.address("eth0", &format!("{SERVER}/24"))?;
        if self.middle.is_some() {
            self.client.route("0.0.0.0/0", Via::gateway(MIDDLE[0].to_string()))?;
            self.server.route("0.0.0.0/0", Via::gateway(MIDDLE[1].to_string()))?;
        }
        // A connection a request takes more ports than there are by default.
        for host in [&self.client, far] {
            host.sysctl("net.ipv4.ip_local_port_range", "10000 65535")?;
        }
        for host in [&self.server, far] {
            host.sysctl("net.core.somaxconn", "4096")?;
        }
        Ok(())
    }

    fn start_server(&mut self, installed: &Installed) -> Result<()> {
        let config = self.write("web.conf", &config::web_server(&self.folder, installed.open_files))?;
        let web = self.start(&self.server, "web", Command::new("nginx").arg("-c").arg(config))?;
        self.programs.push(web);
        for port in [Service::Iperf.redirect_port(), Service::Iperf.service_port()] {
            let mut command = Command::new("iperf3");
            let name = format!("iperf3-{port}");
            let iperf = self.start(&self.server, &name, command.args(["-s", "-p", &port.to_string()]))?;
            self.programs.push(iperf);
        }
        self.start_echo(0)?;
        let ports =
            [Service::Web, Service::Iperf].map(|service| [service.redirect_port(), service.service_port()]);
        wait_listening(&self.server, ports.as_flattened())
    }

    fn start_echo(&mut self, number: u16) -> Result<()> {
        let service = Service::Echo(number);
        let ports = [service.redirect_port(), service.service_port()];
        let mut command = Command::new(std::env::current_exe().context("finding this program")?);
        command.arg("echo").args(ports.map(|port| port.to_string()));
        let echo = self.start(&self.server, &service.name(), &mut command)?;
        self.programs.push(echo);
        wait_listening(&self.server, &ports)
    }

    /// Starts the echoes that only many connections need.
    ///
    /// # Errors
    /// One cannot be started.
    pub fn start_echoes(&mut self) -> Result<()> {
        for number in 1..ECHO_PORTS {
            self.start_echo(number)?;
        }
        if self.contestant.has_agent() {
            std::thread::sleep(AGENT_LOOKS);
        }
        Ok(())
    }

    /// A file of this world.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn start_middle(&mut self, installed: &Installed) -> Result<()> {
        let Some(middle) = &self.middle else { return Ok(()) };
        let balancer = match self.contestant {
            Contestant::Direct | Contestant::Kernel => return Ok(()),
            Contestant::Nft => return Ok(middle.nft(&config::nft())?),
            Contestant::Haproxy => {
                let config = self.write("haproxy.cfg", &config::haproxy(installed.open_files))?;
                middle.address("lo", &format!("{VIP}/32"))?;
                self.start(middle, "haproxy", Command::new("haproxy").arg("-db").arg("-f").arg(config))?
            }
            Contestant::Nginx => {
                let text = config::nginx_stream(
                    &self.folder,
                    installed.stream_module.as_deref(),
                    installed.open_files,
                );
                let config = self.write("stream.conf", &text)?;
                middle.address("lo", &format!("{VIP}/32"))?;
                self.start(middle, "stream", Command::new("nginx").arg("-c").arg(config))?
            }
            _ => {
                let text = config::balancer(&installed.host_keys(self.contestant));
                self.daemon(middle, installed, "balancer", &text)?
            }
        };
        self.balancer = Some(balancer);
        if !self.contestant.is_shunt() {
            let ports: Vec<u16> = Service::all().map(Service::redirect_port).collect();
            wait_listening(middle, &ports)?;
        }
        Ok(())
    }

    fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.file(name);
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        Ok(path)
    }

    fn start(&self, host: &Host, name: &str, command: &mut Command) -> Result<Child> {
        Ok(host.spawn_logged(command, self.file(&format!("{name}.log")))?)
    }

    /// One of Shunt's, ready.
    fn daemon(&self, host: &Host, installed: &Installed, role: &str, text: &str) -> Result<Child> {
        let config = self.write(&format!("{role}.toml"), text)?;
        let mut command = Command::new(&installed.shunt);
        let mut child =
            self.start(host, role, command.env("NO_COLOR", "1").arg(role).arg("-c").arg(config))?;
        child.wait_for_log("ready", READY)?;
        Ok(child)
    }

    /// Sees to it that connections go where the contestant's name says: one is opened, and the server asked.
    ///
    /// # Errors
    /// It cannot be opened, or ends at another port.
    pub fn verify(&self) -> Result<()> {
        let service = Service::Echo(0);
        let target = service.target(self.contestant);
        let stream = self.client.enter(|| crate::measure::latency::connect(target))??;
        let expected = service.reached_port(self.contestant);
        let sockets = self.server.tcp_sockets()?;
        let ports: Vec<u16> = sockets
            .iter()
            .filter(|socket| socket.state == TcpState::Established)
            .map(|socket| socket.local.port())
            .collect();
        drop(stream);
        if ports != [expected] {
            bail!(
                "{}: a connection to {target} ends at {ports:?}, not at {expected}",
                self.contestant.name()
            );
        }
        Ok(())
    }

    /// What the programs in the way have logged last, for errors.
    pub fn logs(&self) -> String {
        let children = self.balancer.iter().chain(&self.shim);
        let tails = children.filter_map(|child| {
            let log = child.log().ok()?;
            let from = log.lines().count().saturating_sub(5);
            Some(log.lines().skip(from).collect::<Vec<_>>().join("\n"))
        });
        tails.filter(|tail| !tail.is_empty()).collect::<Vec<_>>().join("\n")
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // Those with workers of their own wait for them; what does not end is killed.
        for child in self.balancer.iter_mut().chain(&mut self.shim).chain(&mut self.programs) {
            let _ = child.terminate(PATIENCE);
        }
    }
}

fn wait_listening(host: &Host, ports: &[u16]) -> Result<()> {
    let end = Instant::now() + READY;
    loop {
        let sockets = host.tcp_sockets()?;
        let listens = |port: &u16| {
            sockets.iter().any(|socket| socket.state == TcpState::Listen && socket.local.port() == *port)
        };
        let Some(silent) = ports.iter().find(|port| !listens(port)) else { return Ok(()) };
        if Instant::now() > end {
            bail!("nothing listens on port {silent} of the host {} after {READY:?}", host.name());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
