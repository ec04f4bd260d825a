//! What a running balancer can be asked and told (see [`shunt_host::control`] for the socket).
//!
//! A change is an edit of the configuration's text ([`edit`]), which is then checked and taken over as a whole, exactly
//! as a file is on SIGHUP: so every check applies, and a refused change changes nothing. The file is not written; the
//! next SIGHUP takes it as it is.

mod drain;
pub mod edit;
mod show;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Map, Value as Json, json};
use shunt_host::Source;
use shunt_host::control::{Call, Reply};
use shunt_stack::device::Device;

use self::edit::Edit;
use crate::config::Config;
use crate::driver::Daemon;

/// How long a drain is waited for unless asked otherwise, in seconds.
const DEFAULT_WAIT: u64 = 600;
/// The longest, in seconds.
const MAX_WAIT: u64 = 7 * 86_400;

/// A request, as its line says it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Services, servers, their states and health.
    Show {},
    /// The counters.
    Counters {
        /// As Prometheus reads them.
        #[serde(default)]
        prometheus: bool,
    },
    /// The configuration in force.
    Config {},
    /// Take the file as it is now.
    Reload {},
    /// One more server.
    ServerAdd {
        /// Its name.
        name: String,
        /// Its keys, as in the file.
        keys: Map<String, Json>,
    },
    /// Other keys for a server, merged as RFC 7396 says.
    ServerSet {
        /// Its name.
        name: String,
        /// Its keys, as in the file.
        keys: Map<String, Json>,
    },
    /// A server less.
    ServerRemove {
        /// Its name.
        name: String,
    },
    /// No new connections for a server.
    Drain {
        /// Its name.
        name: String,
        /// Whether to wait until it can be removed.
        #[serde(default)]
        wait: bool,
        /// For how long, in seconds.
        #[serde(default)]
        timeout_s: Option<u64>,
    },
    /// New connections for a server again.
    Enable {
        /// Its name.
        name: String,
    },
    /// Another weight for a server.
    Weight {
        /// Its name.
        name: String,
        /// The weight.
        weight: u32,
    },
    /// A server's load now, from 0.0 (idle) to 1.0 (full), for `least-load`.
    Load {
        /// Its name.
        name: String,
        /// The load.
        load: f32,
    },
    /// Another policy for a service.
    Policy {
        /// Its name.
        service: String,
        /// The policy, as in the file.
        policy: String,
    },
}

impl Request {
    /// Reads a request.
    ///
    /// # Errors
    /// A sentence for whoever sent it.
    pub fn parse(line: &str) -> Result<Request, String> {
        shunt_host::control::parse(line)
    }

    /// What it changes in the configuration's text.
    pub fn edit(&self) -> Option<Edit> {
        let set = |name: &str, key: &str, value: Json| {
            let keys = Map::from_iter([(key.to_owned(), value)]);
            Some(Edit::Set { name: name.to_owned(), keys })
        };
        match self {
            Request::Show {}
            | Request::Counters { .. }
            | Request::Config {}
            | Request::Reload {}
            | Request::Load { .. } => None,
            Request::ServerAdd { name, keys } => Some(Edit::Add { name: name.clone(), keys: keys.clone() }),
            Request::ServerSet { name, keys } => Some(Edit::Set { name: name.clone(), keys: keys.clone() }),
            Request::ServerRemove { name } => Some(Edit::Remove { name: name.clone() }),
            Request::Drain { name, .. } => set(name, "state", "drain".into()),
            Request::Enable { name } => set(name, "state", "up".into()),
            Request::Weight { name, weight } => set(name, "weight", (*weight).into()),
            Request::Policy { service, policy } => {
                Some(Edit::Policy { service: service.clone(), policy: policy.clone() })
            }
        }
    }
}

/// The configuration after a change, checked as a whole.
///
/// # Errors
/// A sentence why it cannot be; where the text is to blame, with the line.
pub fn changed(config: &Config, edit: &Edit) -> Result<Config, String> {
    let text = edit::apply(config.text(), edit)?;
    // Lines count in the text in force, which no file holds.
    let source = Source::new("the configuration in force, so changed", text);
    let mut changed = Config::parse(&source).map_err(|error| error.to_string())?;
    changed.path.clone_from(&config.path);
    Ok(changed)
}

impl<D: Device + 'static, F: Fn(&str) -> io::Result<D>> Daemon<D, F> {
    /// Answers a request; long waits go on beside.
    pub(crate) async fn call(&mut self, Call { line, reply }: Call) {
        match Request::parse(&line) {
            Ok(request) => self.carry_out(request, reply).await,
            Err(reason) => reply.refuse(reason),
        }
    }

    async fn carry_out(&mut self, request: Request, reply: Reply) {
        if let Some(edit) = request.edit() {
            if let Err(reason) = self.change(&edit).await {
                return reply.refuse(reason);
            }
            return match request {
                Request::Drain { name, wait: true, timeout_s } => self.wait_for_drain(name, timeout_s, reply),
                _ => reply.done(json!({ "changed": true })),
            };
        }
        self.count_offloaded().await;
        match request {
            Request::Counters { prometheus: true } => reply.done(self.snapshot().to_string()),
            Request::Counters { prometheus: false } => reply.done(self.snapshot()),
            Request::Config {} => {
                reply.done(json!({ "toml": self.config.text(), "file": self.path.display().to_string() }));
            }
            Request::Load { name, load } => {
                let told = self.set_load(&name, load).map_err(|error| error.to_string());
                reply.end(told.map(|()| json!({ "changed": true })));
            }
            Request::Reload {} => reply.end(self.reload().await.map(|()| json!({ "changed": true }))),
            _ => reply.done(show::show(
                &self.config,
                &self.monitor,
                &self.offload,
                |server| self.way_to(server),
                &self.snapshot(),
            )),
        }
    }

    /// Changes the configuration in force, or refuses to and leaves everything as it is.
    async fn change(&mut self, edit: &Edit) -> Result<(), String> {
        let result = match changed(&self.config, edit) {
            Ok(config) => self.take_over(config).await,
            Err(reason) => Err(reason),
        };
        self.balancer().stats.reload(result.is_ok());
        match &result {
            Ok(()) => tracing::info!(?edit, "configuration changed by request; the file is as it was"),
            Err(reason) => tracing::warn!(?edit, "a change is refused, the configuration stands: {reason}"),
        }
        result
    }

    fn wait_for_drain(&mut self, name: String, timeout_s: Option<u64>, reply: Reply) {
        let stats =
            self.balancer().server_stats().find(|(known, _)| *known == name).map(|(_, s)| Arc::clone(s));
        let Some(stats) = stats else { return reply.refuse(format!("there is no server named {name:?}")) };
        let limit = Duration::from_secs(timeout_s.unwrap_or(DEFAULT_WAIT).min(MAX_WAIT));
        let wait = drain::Wait { name, stats, config: self.published.subscribe(), limit };
        while self.waits.try_join_next().is_some() {}
        self.waits.spawn(wait.until_safe(reply));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"role = "balancer"
vips = ["203.0.113.10"]
default_server = "web-2"
[[service]]
name = "web"
redirect_port = 443
[[server]]
name = "web-1"
address = "10.0.0.11"
ports = { web = 41001 }
[[server]]
name = "web-2"
address = "10.0.0.12"
ports = { web = 41002 }
"#;

    fn config() -> Config {
        Config::parse(&Source::new("balancer.toml", GOOD)).unwrap()
    }

    fn request(line: &str) -> Result<Config, String> {
        let edit = Request::parse(line)?.edit().expect("a change");
        changed(&config(), &edit)
    }

    #[test]
    fn requests_are_read_and_others_are_told_what_there_is() {
        assert_eq!(Request::parse("{\"command\":\"show\"}"), Ok(Request::Show {}));
        let drain = Request::Drain { name: "a".to_owned(), wait: true, timeout_s: Some(3) };
        let line = "{\"command\":\"drain\",\"name\":\"a\",\"wait\":true,\"timeout_s\":3}";
        assert_eq!(Request::parse(line), Ok(drain));
        for (line, told) in [
            ("", "EOF"),
            ("{}", "missing field `command`"),
            ("[1]", "invalid"),
            ("{\"command\":\"shew\"}", "unknown variant `shew`, expected one of `show`"),
            ("{\"command\":\"show\",\"more\":1}", "unknown field `more`"),
            ("{\"command\":\"weight\",\"name\":\"a\",\"weight\":-1}", "invalid value"),
            ("{\"command\":\"drain\"}", "missing field `name`"),
        ] {
            let error = Request::parse(line).unwrap_err();
            assert!(error.contains(told) && error.contains("write one object a line"), "{line}: {error}");
        }
    }

    #[test]
    fn a_change_is_a_whole_checked_configuration_of_the_same_file() {
        let line = "{\"command\":\"server-add\",\"name\":\"web-3\",\"keys\":{\"address\":\"10.0.0.13\",\"ports\":{\"web\":41003}}}";
        let more = request(line).unwrap();
        assert_eq!(more.servers().len(), 3);
        assert_eq!(more.path(), config().path());
        // What is in force says what is in force.
        assert_eq!(Config::parse(&Source::new("balancer.toml", more.text())).unwrap(), more);
        assert_eq!(request("{\"command\":\"server-remove\",\"name\":\"web-1\"}").unwrap().servers().len(), 1);
        let drained = request("{\"command\":\"drain\",\"name\":\"web-1\"}").unwrap();
        assert_eq!(drained.servers()[0].state, crate::config::State::Drain);
    }

    #[test]
    fn every_check_of_a_file_applies_to_a_change() {
        for (line, told) in [
            ("{\"command\":\"weight\",\"name\":\"web-1\",\"weight\":0}", "a weight is between"),
            ("{\"command\":\"policy\",\"service\":\"web\",\"policy\":\"best\"}", "unknown variant `best`"),
            ("{\"command\":\"server-remove\",\"name\":\"web-2\"}", "no server named \"web-2\""),
            ("{\"command\":\"server-add\",\"name\":\"web-1\",\"keys\":{}}", "another server is named"),
            ("{\"command\":\"server-add\",\"name\":\"w\",\"keys\":{}}", "no `address`"),
            (
                "{\"command\":\"server-set\",\"name\":\"web-1\",\"keys\":{\"colour\":1}}",
                "unknown field `colour`",
            ),
            (
                "{\"command\":\"server-set\",\"name\":\"web-1\",\"keys\":{\"ports\":{\"web\":41002}}}",
                "is the server",
            ),
        ] {
            let error = request(line).unwrap_err();
            assert!(error.contains(told) && error.contains("in force"), "{line}: {error}");
        }
    }
}
