//! What the programs are told: all defaults but what the comparison needs.

use std::fmt::Write as _;
use std::path::Path;

use crate::addresses::{SERVER, Service, VIP};
use crate::contestant::Contestant;

/// Connections that a proxy has to take: more than are ever opened.
const MOST_CONNECTIONS: u32 = 150_000;

/// Files that a proxy has open beside two for each connection, at the most.
pub const FILES_BESIDE: u64 = 200;

/// The web server beside the clients' target.
pub fn web_server(folder: &Path, open_files: u64) -> String {
    let files = open_files.min(65_536);
    let folder = folder.display();
    let (redirect, service) = (Service::Web.redirect_port(), Service::Web.service_port());
    let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|name| format!("  {name}_temp_path {folder}/{name};\n"))
        .concat();
    format!(
        "user root;\ndaemon off;\nworker_processes auto;\npid {folder}/web.pid;\nerror_log stderr;\n\
         worker_rlimit_nofile {files};\nevents {{ worker_connections 16384; }}\nhttp {{\n{temporary}\
         access_log off;\n  keepalive_requests 1000000000;\n  server {{\n    listen {redirect} backlog=4096;\n\
         listen {service} backlog=4096;\n    location / {{ return 200 \"hello\\n\"; }}\n  }}\n}}\n"
    )
}

/// `HAProxy` with one pass-through for each service; it refuses to start for more connections than it may open files.
pub fn haproxy(open_files: u64) -> String {
    let most = (open_files.saturating_sub(FILES_BESIDE) / 2).min(MOST_CONNECTIONS.into());
    let mut text = format!(
        "global\n  maxconn {most}\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client 10m\n  \
         timeout server 10m\n  maxconn {most}\n"
    );
    for service in Service::all() {
        let (name, port) = (service.name(), service.redirect_port());
        let _ = write!(text, "listen {name}\n  bind {VIP}:{port}\n  server one {SERVER}:{port}\n");
    }
    text
}

/// nginx with one pass-through for each service; `module` is the file of its module stream, if it is not built in.
pub fn nginx_stream(folder: &Path, module: Option<&Path>, open_files: u64) -> String {
    let files = open_files.min(2 * u64::from(MOST_CONNECTIONS));
    let folder = folder.display();
    let load = module.map(|path| format!("load_module {};\n", path.display())).unwrap_or_default();
    let mut text = format!(
        "{load}user root;\ndaemon off;\nworker_processes auto;\npid {folder}/stream.pid;\nerror_log stderr;\n\
         worker_rlimit_nofile {files};\nevents {{ worker_connections {files}; }}\nstream {{\n"
    );
    for service in Service::all() {
        let port = service.redirect_port();
        let _ = writeln!(
            text,
            "  server {{ listen {VIP}:{port} backlog=4096; proxy_pass {SERVER}:{port}; proxy_timeout 10m; }}"
        );
    }
    text.push_str("}\n");
    text
}

/// Destination NAT; the answers come back by themselves.
pub fn nft() -> String {
    format!(
        "table ip bench {{\n  chain prerouting {{\n    type nat hook prerouting priority dstnat;\n    ip daddr {VIP} dnat to {SERVER}\n  }}\n}}"
    )
}

/// The balancer, with `host_keys` in its table `[host]`.
pub fn balancer(host_keys: &[&str]) -> String {
    let mut text = format!("role = \"balancer\"\nvips = [\"{VIP}\"]\n");
    for service in Service::all() {
        let (name, port) = (service.name(), service.redirect_port());
        let _ = write!(text, "\n[[service]]\nname = \"{name}\"\nredirect_port = {port}\n");
    }
    let ports: Vec<String> =
        Service::all().map(|service| format!("{} = {}", service.name(), service.service_port())).collect();
    let ports = ports.join(", ");
    let _ = write!(
        text,
        "\n[[server]]\nname = \"one\"\naddress = \"{SERVER}\"\nports = {{ {ports} }}\n\n[host]\n"
    );
    for key in host_keys {
        let _ = writeln!(text, "{key}");
    }
    text
}

/// The agent beside the server.
pub fn agent() -> String {
    let mut text = format!("role = \"server\"\ninterface = \"eth0\"\naddresses = [\"{SERVER}\"]\n");
    for service in Service::all() {
        let (name, x, y) = (service.name(), service.redirect_port(), service.service_port());
        let _ = write!(text, "\n[[service]]\nname = \"{name}\"\nredirect_port = {x}\nservice_port = {y}\n");
    }
    text
}

/// The shim beside the client.
pub fn shim(contestant: Contestant) -> Option<String> {
    let continuation = contestant.continuation()?;
    Some(format!(
        "role = \"client\"\n\n[[vip]]\naddress = \"{VIP}\"\ncontinuation = \"{continuation}\"\n\n[limits]\nflows = {MOST_CONNECTIONS}\n"
    ))
}
