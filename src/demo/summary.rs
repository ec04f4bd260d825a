//! What came of all connections: who was redirected is what servers saw, not what the shim says.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::net::SocketAddr;

use serde::Serialize;

use super::message::{Broken, LoadReport, Origin};
use super::plan::SHARED_PORT;

/// The end of the demo; as JSON it is the last line of standard output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Summary {
    /// All of them.
    pub(crate) connections: u64,
    /// Those that a server accepted on its own port, broken ones included.
    pub(crate) redirected: u64,
    /// The others.
    pub(crate) plain: u64,
    /// Redirected ones with a wrong or incomplete response, a reset or a time-out.
    pub(crate) broken_redirected: u64,
    /// The same of plain ones.
    pub(crate) broken_plain: u64,
    /// By server, in the order given.
    pub(crate) servers: Vec<ServerSummary>,
    /// Why connections broke, for people.
    #[serde(skip)]
    pub(crate) reasons: Vec<String>,
}

/// One server's part.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct ServerSummary {
    /// Its name.
    pub(crate) name: String,
    /// Connections it accepted on its own port.
    pub(crate) redirected: u64,
    /// Connections it accepted on the shared port.
    pub(crate) plain: u64,
    /// Bytes of response bodies that clients got from it.
    pub(crate) bytes: u64,
}

/// Which connections the servers have accepted, by the client's address; the latest where a port was used again.
#[derive(Debug, Default)]
pub(crate) struct Accepted(HashMap<SocketAddr, Origin>);

impl Accepted {
    /// Takes in the record that a server wrote.
    pub(crate) fn add(&mut self, server: &str, record: &str) {
        for line in record.lines() {
            let Some((client, port)) = line.split_once(' ') else { continue };
            if let (Ok(client), Ok(port)) = (client.parse(), port.parse()) {
                self.0.insert(client, Origin { server: server.to_owned(), port });
            }
        }
    }
}

impl Summary {
    /// Adds up the client beside the shim and the one without it.
    pub(crate) fn new(
        servers: &[String],
        shim: &LoadReport,
        plain: &LoadReport,
        accepted: &Accepted,
    ) -> Self {
        let named = |name: &String| ServerSummary { name: name.clone(), ..ServerSummary::default() };
        let mut summary = Self {
            connections: 0,
            redirected: 0,
            plain: 0,
            broken_redirected: 0,
            broken_plain: 0,
            servers: servers.iter().map(named).collect(),
            reasons: Vec::new(),
        };
        for (report, through_shim) in [(shim, true), (plain, false)] {
            for (name, load) in &report.complete {
                summary.enter(Some(name), load.redirected, load.plain, load.bytes);
            }
            for broken in &report.broken {
                summary.enter_broken(broken, through_shim, accepted);
            }
        }
        summary
    }

    fn enter(&mut self, server: Option<&String>, redirected: u64, plain: u64, bytes: u64) {
        self.connections += redirected + plain;
        self.redirected += redirected;
        self.plain += plain;
        if let Some(server) = self.servers.iter_mut().find(|known| Some(&known.name) == server) {
            server.redirected += redirected;
            server.plain += plain;
            server.bytes += bytes;
        }
    }

    /// What nobody can tell counts against the shim.
    fn enter_broken(&mut self, broken: &Broken, through_shim: bool, accepted: &Accepted) {
        let record = broken.local.and_then(|local| accepted.0.get(&local));
        let origin = broken.origin.as_ref().or(record);
        let redirected = origin.map_or(through_shim, |origin| origin.port != SHARED_PORT);
        self.enter(
            origin.map(|origin| &origin.server),
            u64::from(redirected),
            u64::from(!redirected),
            broken.bytes,
        );
        let (counter, what) = if redirected {
            (&mut self.broken_redirected, "redirected")
        } else {
            (&mut self.broken_plain, "plain")
        };
        *counter += 1;
        let client = broken.local.map_or("no address yet".to_owned(), |local| local.to_string());
        let server = origin.map_or("no server", |origin| &origin.server);
        self.reasons.push(format!("{what}, {client}, {server}: {}", broken.reason));
    }

    /// The table for people. `remarks` go beside the servers.
    pub(crate) fn table(&self, remarks: &[String]) -> String {
        let mut text = format!("{:<8}{:>12}{:>10}{:>16}\n", "server", "redirected", "plain", "bytes");
        let mut row = |name: &str, redirected: u64, plain: u64, bytes: u64, remark: &str| {
            // Writing to a string cannot fail.
            let _ = write!(text, "{name:<8}{redirected:>12}{plain:>10}{:>16}", grouped(bytes));
            let _ = if remark.is_empty() { writeln!(text) } else { writeln!(text, "   {remark}") };
        };
        for (index, server) in self.servers.iter().enumerate() {
            let remark = remarks.get(index).map_or("", String::as_str);
            row(&server.name, server.redirected, server.plain, server.bytes, remark);
        }
        let bytes = self.servers.iter().map(|server| server.bytes).sum();
        row("all", self.redirected, self.plain, bytes, "");
        text
    }
}

/// `1234567` as `1,234,567`.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::message::ServerLoad;
    use super::*;

    fn broken(local: &str, port: Option<u16>) -> Broken {
        let origin = port.map(|port| Origin { server: "web-2".to_owned(), port });
        Broken { local: local.parse().ok(), origin, bytes: 5, reason: "reset".to_owned() }
    }

    fn summary() -> Summary {
        let load = ServerLoad { redirected: 10, plain: 1, bytes: 1_000_000 };
        let shim = LoadReport {
            complete: [("web-1".to_owned(), load)].into(),
            broken: vec![broken("10.0.0.1:1", Some(41_002)), broken("10.0.0.1:2", None)],
        };
        let load = ServerLoad { redirected: 0, plain: 7, bytes: 7 };
        let plain = LoadReport {
            complete: [("web-2".to_owned(), load)].into(),
            broken: vec![broken("10.0.0.2:1", Some(80)), broken("", None)],
        };
        let mut accepted = Accepted::default();
        accepted.add("web-1", "10.0.0.1:2 80\nnonsense\n");
        Summary::new(&["web-1".to_owned(), "web-2".to_owned()], &shim, &plain, &accepted)
    }

    #[test]
    fn broken_connections_are_told_apart_by_what_servers_saw() {
        let summary = summary();
        assert_eq!((summary.connections, summary.redirected, summary.plain), (22, 11, 11));
        assert_eq!((summary.broken_redirected, summary.broken_plain), (1, 3));
        assert_eq!(summary.servers[0].plain, 2);
        assert_eq!(summary.servers[1].redirected, 1);
        assert_eq!(summary.reasons[0], "redirected, 10.0.0.1:1, web-2: reset");
    }

    #[test]
    fn what_breaks_unseen_through_the_shim_counts_as_redirected() {
        let shim = LoadReport { broken: vec![broken("10.0.0.1:9", None)], ..LoadReport::default() };
        let summary = Summary::new(&[], &shim, &LoadReport::default(), &Accepted::default());
        assert_eq!((summary.broken_redirected, summary.broken_plain), (1, 0));
    }

    #[test]
    fn json_has_the_promised_shape() {
        let expected = "{\"connections\":22,\"redirected\":11,\"plain\":11,\"broken_redirected\":1,\"broken_plain\":3,\
             \"servers\":[{\"name\":\"web-1\",\"redirected\":10,\"plain\":2,\"bytes\":1000005},\
             {\"name\":\"web-2\",\"redirected\":1,\"plain\":8,\"bytes\":17}]}";
        assert_eq!(serde_json::to_string(&summary()).unwrap(), expected);
    }

    #[test]
    fn the_table_has_a_row_a_server_and_one_for_all() {
        let table = summary().table(&["added".to_owned()]);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 4);
        assert_eq!(lines[1], "web-1             10         2       1,000,005   added");
        assert!(lines[3].starts_with("all               11        11"));
    }

    #[test]
    fn numbers_are_grouped_by_three_digits() {
        assert_eq!([0, 999, 1000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
    }
}
