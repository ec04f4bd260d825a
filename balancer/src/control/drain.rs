//! Waiting until a drained server can be removed without breaking a connection.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use shunt_host::control::{Answer, Client, ClientError, Reply};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use crate::config::{Config, State};
use crate::stats::ServerStats;

/// Between two looks.
const LOOK: Duration = Duration::from_secs(1);
/// The agent's count has to be 0 so often in a row: a client that was told of the service port just before the drain may
/// not have come there yet (`C5` repeats its SYN after 250 ms and more).
const ZEROS: u32 = 3;
/// How long an agent may take to answer.
const AGENT: Duration = Duration::from_secs(2);
/// The longest answer of an agent, in bytes.
const MAX_COUNT: usize = 256 << 10;

/// A wait.
pub(super) struct Wait {
    pub(super) name: String,
    pub(super) stats: Arc<ServerStats>,
    /// The configuration in force.
    pub(super) config: watch::Receiver<Arc<Config>>,
    pub(super) limit: Duration,
}

/// What is known of a drained server.
#[derive(Debug, Clone, Serialize)]
struct Progress {
    server: String,
    /// Its connections on service ports, as its agent counts them; `None` without an agent, or while it does not answer.
    connections: Option<u64>,
    /// Why the agent does not answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    agent_error: Option<String>,
    /// For how long no packet has gone to it here.
    quiet_s: u64,
    /// How long that has to be; `None` with an agent.
    quiet_needed_s: Option<u64>,
    /// How long it has been waited for.
    waited_s: u64,
}

impl Progress {
    fn left(&self) -> String {
        let Progress { server, waited_s, .. } = self;
        let what = match (self.connections, &self.agent_error, self.quiet_needed_s) {
            (_, Some(error), _) => format!("its agent does not say how many connections it has ({error})"),
            (Some(count), _, _) => format!("it still has {count} connections"),
            (None, None, Some(needed)) => {
                format!("the last packet to it was {} s ago, not {needed}", self.quiet_s)
            }
            (None, None, None) => "nothing is known of it".to_owned(),
        };
        format!("{server} is not safe to remove after {waited_s} s: {what}; it stays drained")
    }
}

impl Wait {
    /// Reports until the server is safe to remove, is no longer drained, or the time is over.
    pub(super) async fn until_safe(self, reply: Reply) {
        let begun = Instant::now();
        let (mut packets, mut quiet_since, mut zeros) = (self.packets(), begun, 0);
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            looks.tick().await;
            let found = {
                let config = self.config.borrow();
                let server = config.servers.iter().find(|server| server.name == self.name);
                server.map(|server| (server.state, server.agent, config.control.quiet))
            };
            let (agent, quiet) = match found {
                None => return reply.refuse(format!("{} has been removed meanwhile", self.name)),
                Some((State::Up, ..)) => {
                    return reply.refuse(format!("{} is no longer drained", self.name));
                }
                Some((_, agent, quiet)) => (agent, quiet),
            };
            let now = self.packets();
            if now != packets {
                (packets, quiet_since) = (now, Instant::now());
            }
            let mut progress = Progress {
                server: self.name.clone(),
                connections: None,
                agent_error: None,
                quiet_s: quiet_since.elapsed().as_secs(),
                quiet_needed_s: agent.is_none().then_some(quiet.as_secs()),
                waited_s: begun.elapsed().as_secs(),
            };
            let safe = match agent {
                None => quiet_since.elapsed() >= quiet,
                Some(agent) => {
                    match ask(agent).await {
                        Ok(count) => {
                            progress.connections = Some(count);
                            zeros = if count == 0 { zeros + 1 } else { 0 };
                        }
                        Err(error) => {
                            progress.agent_error = Some(format!("{agent}: {error}"));
                            zeros = 0;
                        }
                    }
                    zeros >= ZEROS
                }
            };
            progress.waited_s = begun.elapsed().as_secs();
            if safe {
                tracing::info!(server = self.name, "drained: safe to remove");
                return reply.done(progress);
            }
            if begun.elapsed() >= self.limit {
                return reply.refuse(progress.left());
            }
            if !reply.progress(&progress) {
                return;
            }
        }
    }

    fn packets(&self) -> u64 {
        self.stats.snapshot().packets
    }
}

/// What an agent says of one service; it may say more.
#[derive(Debug, Deserialize)]
struct ServiceCount {
    connections: u64,
}

#[derive(Debug, Deserialize)]
struct Counts {
    services: Vec<ServiceCount>,
}

/// The connections on service ports that an agent counts.
async fn ask(agent: SocketAddr) -> Result<u64, ClientError> {
    let late = || ClientError::Io(io::ErrorKind::TimedOut.into());
    let answer = timeout(AGENT, async {
        let mut client = Client::over_tcp(TcpStream::connect(agent).await?, MAX_COUNT);
        client.request(&serde_json::json!({ "command": "connections" })).await
    });
    match answer.await.map_err(|_| late())?? {
        Answer::Done(value) => {
            let counts: Counts =
                serde_json::from_value(value).map_err(|error| ClientError::Garbled(error.to_string()))?;
            Ok(counts.services.iter().map(|service| service.connections).sum())
        }
        Answer::Error(reason) => Err(ClientError::Garbled(reason)),
        Answer::Progress(_) => Err(ClientError::Closed),
    }
}
