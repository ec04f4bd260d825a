//! The captures in `captures/golden`: made by the project's own code in virtual time, the same bytes each time.
//!
//! One for each message of PROTOCOL.md §2 and each case of §11, over IPv4 and IPv6. `cargo run --example golden` writes
//! them, and beside each what replay says of it.

mod file;
mod scenarios;
mod world;

use std::fmt::Write as _;

use shunt_balancer::Config;
use shunt_host::Source;
use shunt_stack::wire::DEFAULT_EXID;

use file::{Entry, Format};
pub use world::BALANCER;
use world::{Family, Tap, World};

use crate::{Reader, Replay, Role};

/// The client's configuration.
pub const CLIENT: &str = r#"role = "client"

[[vip]]
address = "203.0.113.10"

[[vip]]
address = "2001:db8::10"
"#;

/// The first server's configuration.
pub const SERVER: &str = r#"role = "server"
interface = "eth0"
addresses = ["10.0.0.11", "fd00::11"]

[[service]]
name = "web"
redirect_port = 443
service_port = 41001
"#;

/// A capture, and what it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Golden {
    /// The file's name.
    pub name: String,
    /// How it was made, a sentence.
    pub about: String,
    /// The file of the configuration with which it is replayed; none where it is only described.
    pub config: Option<&'static str>,
    /// The file.
    pub bytes: Vec<u8>,
}

/// Configurations by their files' names.
pub const CONFIGS: [(&str, &str); 3] =
    [("balancer.toml", BALANCER), ("client.toml", CLIENT), ("server.toml", SERVER)];

type Takes = &'static [(Tap, Format)];

struct Scenario {
    name: &'static str,
    about: &'static str,
    run: fn(Family) -> World,
    takes: Takes,
}

const ALL: Takes = &[
    (Tap::Wire, Format::PcapEthernet),
    (Tap::Client, Format::NgRaw),
    (Tap::Balancer, Format::NgRaw),
    (Tap::Server, Format::NgRaw),
];
const CLIENTS: Takes = &[(Tap::Wire, Format::NgEthernet), (Tap::Client, Format::NgRaw)];
const ENDS: Takes =
    &[(Tap::Wire, Format::NgVlan), (Tap::Client, Format::NgRaw), (Tap::Server, Format::NgRaw)];
const PLAIN: Takes = &[(Tap::Wire, Format::PcapSll), (Tap::Balancer, Format::NgRaw)];
const RAW: Takes = &[(Tap::Wire, Format::PcapRaw), (Tap::Balancer, Format::NgRaw)];
const COOKED: Takes = &[(Tap::Wire, Format::NgSll2)];
const LOOPBACK: Takes = &[(Tap::Wire, Format::PcapNull)];

const fn scenario(
    name: &'static str,
    about: &'static str,
    run: fn(Family) -> World,
    takes: Takes,
) -> Scenario {
    Scenario { name, about, run, takes }
}

/// Messages first, then the cases of §11 in the order of its table.
const SCENARIOS: [Scenario; 26] = [
    scenario(
        "reconnect",
        "opening SYN R C, redirect, new SYN to Y, confirmation; a line there and back",
        scenarios::reconnect,
        ALL,
    ),
    scenario(
        "handover",
        "two connects: the first reconnects, the second opens with R and hands over",
        scenarios::handover,
        ALL,
    ),
    scenario(
        "confirmed",
        "a SYN with R straight to a service port is confirmed and not redirected",
        scenarios::confirmed,
        CLIENTS,
    ),
    scenario(
        "token",
        "servers demand tokens: the redirect carries T, the SYN to Y shows it",
        scenarios::token,
        RAW,
    ),
    scenario("plain", "a client without the extension", scenarios::plain, PLAIN),
    scenario(
        "move",
        "the server asks an established connection to move, the client closes it by FIN with C P=Z",
        scenarios::moved,
        RAW,
    ),
    scenario("move-reset", "the same, closed by RST with C P=Z", scenarios::moved_by_reset, LOOPBACK),
    scenario("move-on", "the same to a redirect port, which redirects again", scenarios::moved_on, COOKED),
    scenario(
        "rebind",
        "the client asks for another own port, the server confirms it",
        scenarios::rebound,
        RAW,
    ),
    scenario(
        "two-answers",
        "the first SYN arrives twice and two servers answer: the first valid answer wins",
        scenarios::two_answers,
        CLIENTS,
    ),
    scenario("syn-lost", "the first SYN is lost", scenarios::syn_lost, CLIENTS),
    scenario("syn-ack-lost", "the first SYN-ACK is lost", scenarios::syn_ack_lost, CLIENTS),
    scenario(
        "handover-ack-lost",
        "the second connect hands over, and its handover ACK is lost",
        scenarios::handover_ack_lost,
        ENDS,
    ),
    scenario(
        "probe",
        "the second connect hands over; what answers is lost, and a probe SYN meets the established connection",
        scenarios::probe,
        ENDS,
    ),
    scenario(
        "syn-ack-late",
        "the redirecting SYN-ACK comes once more after the move",
        scenarios::syn_ack_late,
        CLIENTS,
    ),
    scenario(
        "new-syn",
        "a new SYN, of nobody's making, on the live connection (client, Y)",
        scenarios::new_syn,
        COOKED,
    ),
    scenario(
        "port-reused",
        "another connect of the host to Y, from a port whose connection to X was redirected there",
        scenarios::port_reused,
        CLIENTS,
    ),
    scenario(
        "bare-syn",
        "a bare SYN from X, of nobody's making, meets the opening one (simultaneous open)",
        scenarios::bare_syn,
        CLIENTS,
    ),
    scenario(
        "token-keys-differ",
        "the servers' keys are replaced without the old ones while T is on its way",
        scenarios::token_of_another_key,
        CLIENTS,
    ),
    scenario("move-r-lost", "the server's first two R P=Z are lost", scenarios::move_r_lost, LOOPBACK),
    scenario("move-syn-lost", "the first SYN to Z is lost", scenarios::move_syn_lost, COOKED),
    scenario("move-fin-lost", "the first FIN with C P=Z is lost", scenarios::move_fin_lost, COOKED),
    scenario("move-rst-lost", "the first RST with C P=Z is lost", scenarios::move_rst_lost, LOOPBACK),
    scenario(
        "move-server-fails",
        "nothing comes from the old server any more once the move has begun",
        scenarios::move_server_fails,
        LOOPBACK,
    ),
    scenario("rebind-r-lost", "the client's first two R P=p' are lost", scenarios::rebind_r_lost, COOKED),
    scenario("rebind-c-lost", "the server's first two C P=p' are lost", scenarios::rebind_c_lost, LOOPBACK),
];

/// Runs all scenarios.
///
/// # Panics
/// If one does not end as it should.
pub fn make() -> Vec<Golden> {
    let mut all = Vec::new();
    for scenario in &SCENARIOS {
        for (family, suffix) in [(Family::V4, "v4"), (Family::V6, "v6")] {
            let world = (scenario.run)(family);
            all.extend(scenario.takes.iter().map(|take| scenario.golden(&world, *take, suffix)));
        }
    }
    all
}

impl Scenario {
    fn golden(&self, world: &World, (tap, format): (Tap, Format), suffix: &str) -> Golden {
        let (place, config) = match tap {
            Tap::Wire => ("on the client's link", None),
            Tap::Client => ("in the client's shim", Some("client.toml")),
            Tap::Balancer => ("in the balancer", Some("balancer.toml")),
            Tap::Server => ("in the first server's agent", Some("server.toml")),
        };
        let about = format!("{}, taken {place}", self.about);
        let tapped = world.tapped.iter().filter(|tapped| tapped.tap == tap);
        let entries: Vec<Entry<'_>> = tapped
            .map(|tapped| Entry { at: tapped.at, direction: tapped.direction, packet: &tapped.packet })
            .collect();
        let short = match tap {
            Tap::Wire => "wire",
            Tap::Client => "client",
            Tap::Balancer => "balancer",
            Tap::Server => "server",
        };
        let name = format!("{}-{short}-{suffix}.{}", self.name, format.extension());
        let bytes = format.write(&about, &entries);
        Golden { name, about: format!("{about}; {}", format.about()), config, bytes }
    }
}

impl Golden {
    /// The code that it is replayed through.
    ///
    /// # Panics
    /// If the configuration of this module is wrong.
    pub fn role(&self) -> Role {
        match self.config {
            Some("balancer.toml") => {
                let config = Config::parse(&Source::new("balancer.toml", BALANCER));
                Role::balancer(&config.expect("the configuration is right"))
            }
            Some("client.toml") => Role::client(scenarios::client_config()),
            Some(_) => {
                let mut config = world::server_config(Family::V4, 0);
                let v6 = world::server_config(Family::V6, 0);
                config.services.extend(v6.services);
                config.shared.clear();
                Role::server(config)
            }
            None => Role::Wire { exid: DEFAULT_EXID },
        }
    }

    /// What `shunt replay` says of it, and what it came to.
    ///
    /// # Panics
    /// If the file is no capture.
    pub fn replayed(&self) -> (String, Replay) {
        let mut replay = Replay::new(self.role());
        let mut reader = Reader::new(self.bytes.as_slice()).expect("it was written to be read");
        let mut text = String::new();
        while let Some(next) = reader.next_record() {
            match next {
                // Writing to a string cannot fail.
                Ok(record) => replay.record(&record, |row| {
                    let _ = writeln!(text, "{row}");
                }),
                Err(trouble) => {
                    let _ = writeln!(text, "{}", replay.trouble(&trouble));
                }
            }
        }
        (text, replay)
    }
}

/// The table of all captures for the folder's README.
pub fn readme(all: &[Golden]) -> String {
    let mut text = README.to_owned();
    for golden in all {
        let config = golden.config.map_or(String::new(), |config| format!("`-c {config}`"));
        // Writing to a string cannot fail.
        let _ = writeln!(text, "| `{}` | {} | {config} |", golden.name, golden.about);
    }
    text
}

const README: &str = "\
# Golden captures

Each message of PROTOCOL.md §2 and each case of §11, over IPv4 (`-v4`) and IPv6 (`-v6`): written by the project's own
client, balancer and servers in virtual time (`captures/src/golden`), the same bytes each time. Packets that no end of the
project sends are said to be of nobody's making. Beside each file stands what replay says of it (`.expect`).

```sh
cargo run --release -p shunt-captures --example golden          # writes all of this folder anew
shunt replay captures/golden/reconnect-balancer-v4.pcapng -c captures/golden/balancer.toml --diff
```

Tests compare the files with what is made now, replay with `.expect`, and what tshark reads with what we read.

| file | how it was made | replayed with |
|---|---|---|
";
