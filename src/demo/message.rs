//! What a client process tells the demo, one JSON object a line on its standard output.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Message {
    /// How far it is; several a second.
    Progress(Progress),
    /// What came of it; the last line.
    Report(LoadReport),
}

/// How far a client is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Progress {
    /// Connections begun.
    pub(crate) begun: u64,
    /// Connections ended.
    pub(crate) ended: u64,
    /// Those of them that broke.
    pub(crate) broken: u64,
}

/// What came of a client's connections.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LoadReport {
    /// Connections that ended as they should, by the server's name.
    pub(crate) complete: BTreeMap<String, ServerLoad>,
    /// The others.
    pub(crate) broken: Vec<Broken>,
}

/// A server's complete connections.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ServerLoad {
    /// Those that it accepted on its own port.
    pub(crate) redirected: u64,
    /// Those that it accepted on the shared port.
    pub(crate) plain: u64,
    /// Bytes of response bodies.
    pub(crate) bytes: u64,
}

/// A connection that broke.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Broken {
    /// The client's address and port, if it got that far.
    pub(crate) local: Option<SocketAddr>,
    /// What the first response said about where it came from.
    pub(crate) origin: Option<Origin>,
    /// Bytes of response bodies until then.
    pub(crate) bytes: u64,
    /// What went wrong.
    pub(crate) reason: String,
}

/// Where responses come from, by their headers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Origin {
    /// The server's name.
    pub(crate) server: String,
    /// The port it accepted the connection on.
    pub(crate) port: u16,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_one_line_and_is_read_back() {
        let local = "[2001:db8::1]:50000".parse().ok();
        let broken = Broken { local, origin: None, bytes: 1, reason: "line\nbreak".to_owned() };
        let report = LoadReport { broken: vec![broken], ..LoadReport::default() };
        for message in [Message::Progress(Progress::default()), Message::Report(report)] {
            let line = serde_json::to_string(&message).unwrap();
            assert!(!line.contains('\n'));
            assert_eq!(serde_json::from_str::<Message>(&line).unwrap(), message);
        }
    }
}
