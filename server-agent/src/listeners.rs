//! Who listens on the service ports (`S6`), as the kernel says from time to time.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use shunt_host::query::Listeners;
use shunt_stack::redirect::Server;

use crate::config::Config;

/// The latest answers, so that changes are logged once.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    known: BTreeMap<SocketAddr, bool>,
    failing: bool,
}

impl Watch {
    /// Whether somebody listened at the last look; `None` if that is not known.
    pub(crate) fn listening(&self, socket: SocketAddr) -> Option<bool> {
        self.known.get(&socket).copied()
    }

    /// Asks the kernel and tells the machine. If the kernel does not answer, the latest answers stay; at first
    /// everybody counts as listening.
    pub(crate) async fn look(&mut self, config: &Config, server: &mut Server) {
        let listeners = match Listeners::now().await {
            Ok(listeners) => listeners,
            Err(error) => {
                if !self.failing {
                    tracing::warn!(%error, "cannot see who listens on the service ports: clients are redirected there anyway");
                }
                self.failing = true;
                return;
            }
        };
        self.failing = false;
        let mut now = BTreeMap::new();
        for (socket, name) in config.service_sockets() {
            let listening = listeners.accepts(socket);
            server.set_listening(socket, listening);
            match (self.known.get(&socket), listening) {
                (Some(before), _) if *before == listening => {}
                (_, false) => {
                    tracing::warn!(%socket, service = name, "nobody listens: clients are not redirected there");
                }
                (Some(_), true) => {
                    tracing::info!(%socket, service = name, "somebody listens again: clients are redirected there");
                }
                (None, true) => tracing::debug!(%socket, service = name, "somebody listens"),
            }
            now.insert(socket, listening);
        }
        self.known = now;
    }
}
