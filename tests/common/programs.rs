//! Debian's programs as the tests start them.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use super::{Family, IPERF, IPERF_SERVICE, Net, WEB, WEB_SERVICE};

/// What curl says of a transfer.
#[derive(Debug, Clone)]
pub struct Fetched {
    /// Exit status 0.
    pub ok: bool,
    /// The `X-Port` header: the server's own port, so the service port if the connection was redirected.
    pub port: u16,
    /// The `X-Server` header.
    pub server: String,
    /// Seconds until the connection was there, and in all.
    pub connect: f64,
    pub total: f64,
    /// Standard error.
    pub error: String,
}

impl Fetched {
    pub fn redirected(&self) -> bool {
        self.ok && self.port > WEB_SERVICE
    }
}

impl Net {
    /// Runs nginx on every server, on the redirect port and the service port, in both families. `GET /` tells server
    /// and port; files of the server's directory are served, and `PUT /up/NAME` is taken.
    pub fn start_nginx(&mut self) {
        let dir = self.dir.path().to_owned();
        for server in &mut self.servers {
            let (name, service) = (server.name(), WEB_SERVICE + server.number);
            let root = dir.join(&name);
            std::fs::create_dir_all(root.join("up")).expect("a directory");
            let body = format!("hello from {name}\n");
            std::fs::write(root.join("index.html"), body).expect("a file");
            let config = nginx_config(&root, &name, service);
            let path = root.join("nginx.conf");
            std::fs::write(&path, config).expect("a file");
            let mut command = Command::new("nginx");
            command.arg("-c").arg(&path).arg("-e").arg(root.join("error.log"));
            let log = root.join("nginx.out");
            server.programs.push(server.host.spawn_logged(&mut command, log).expect("nginx starts"));
        }
        for server in &self.servers {
            let service = WEB_SERVICE + server.number;
            wait_listening(&server.host, service);
        }
        // The agents look every second who listens on service ports.
        std::thread::sleep(Duration::from_millis(1200));
    }

    pub fn start_iperf(&mut self) {
        let dir = self.dir.path().to_owned();
        for server in &mut self.servers {
            for port in [IPERF, IPERF_SERVICE + server.number] {
                let mut command = Command::new("iperf3");
                command.args(["-s", "-p", &port.to_string()]);
                let log = dir.join(format!("iperf3-{}-{port}.log", server.number));
                server.programs.push(server.host.spawn_logged(&mut command, log).expect("iperf3 starts"));
            }
        }
        for server in &self.servers {
            wait_listening(&server.host, IPERF_SERVICE + server.number);
        }
        std::thread::sleep(Duration::from_millis(1200));
    }

    /// The directory that server `number` serves.
    pub fn root(&self, number: u16) -> PathBuf {
        self.dir.path().join(format!("s{number}"))
    }

    /// curl of `path` from the client, with further arguments.
    pub fn curl(&self, family: Family, path: &str, extra: &[&str]) -> Fetched {
        let mut command = Command::new("curl");
        command
            .args(["-sS", "--max-time", "60", "-o"])
            .arg(self.file("body"))
            .args(["-w", "%header{x-port} %header{x-server} %{time_connect} %{time_total}"])
            .args(extra)
            .arg(family.url(WEB, path));
        let mut child = command;
        let output =
            self.client.enter(|| child.output()).expect("the namespace is there").expect("curl is installed");
        parse_curl(&output)
    }
}

fn parse_curl(output: &std::process::Output) -> Fetched {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // Without headers, as after a failure, the first two fields are missing.
    let words: Vec<&str> = text.split_whitespace().collect();
    let timed = |index: usize| words.get(index).and_then(|word| word.parse().ok()).unwrap_or(f64::NAN);
    let complete = words.len() == 4;
    Fetched {
        ok: output.status.success() && complete,
        port: if complete { words[0].parse().unwrap_or(0) } else { 0 },
        server: if complete { words[1].to_owned() } else { String::new() },
        connect: timed(words.len().wrapping_sub(2)),
        total: timed(words.len().wrapping_sub(1)),
        error: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Waits until a program listens on `port`.
pub fn wait_listening(host: &shunt_lab::Host, port: u16) {
    let end = Instant::now() + Duration::from_secs(10);
    while Instant::now() < end {
        let listening = host
            .tcp_sockets()
            .expect("sockets can be listed")
            .iter()
            .any(|socket| socket.state == shunt_lab::TcpState::Listen && socket.local.port() == port);
        if listening {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("nothing listens on {port} of {}", host.name());
}

fn nginx_config(root: &std::path::Path, name: &str, service: u16) -> String {
    let root = root.display();
    format!(
        "daemon off;\nmaster_process off;\npid {root}/pid;\nworker_rlimit_nofile 65536;\n\
         events {{ worker_connections 32768; }}\n\
         http {{\n  access_log off;\n  client_max_body_size 4g;\n  client_body_temp_path {root}/body;\n\
         proxy_temp_path {root}/proxy;\n  fastcgi_temp_path {root}/fastcgi;\n\
         uwsgi_temp_path {root}/uwsgi;\n  scgi_temp_path {root}/scgi;\n  keepalive_timeout 300;\n\
         server {{\n    listen {WEB} backlog=4096;\n    listen [::]:{WEB} ipv6only=on backlog=4096;\n\
         listen {service} backlog=4096;\n    listen [::]:{service} ipv6only=on backlog=4096;\n\
         port_in_redirect off;\n    root {root};\n    add_header X-Server {name} always;\n\
         add_header X-Port $server_port always;\n\
         location /up/ {{ dav_methods PUT; }}\n  }}\n}}\n"
    )
}
