//! §10: tokens on redirects (`T2`), and the demand for them on SYNs to service ports (`T4`).

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use super::config::{ServerEvent, ServicePorts};
use super::half_open::Key;
use super::{Port, Server};
use crate::redirect::Action;
use crate::redirect::guard::{TokenPolicy, TokenRefusal};
use crate::redirect::token::Purpose;
use crate::time::{Instant, WallClock};
use crate::wire::Packet;

impl Server {
    /// Tells Unix time: at the start, and again from time to time, for clocks are set and slewed.
    pub fn set_clock(&mut self, clock: WallClock) {
        self.clock = clock;
    }

    /// Other keys and demands from now on (a reload), and other VIPs of the service sockets
    /// ([`ServerConfig::shared`](super::ServerConfig::shared)). What is known of the load stays.
    pub fn set_tokens(&mut self, tokens: TokenPolicy, shared: BTreeMap<SocketAddr, IpAddr>) {
        self.tokens = tokens;
        self.shared = shared;
    }

    /// What a token is to be good for: that `client` goes to `port` for a service.
    fn purpose(&self, client: IpAddr, of: &ServicePorts, port: u16) -> Purpose {
        let vip = self.shared.get(&of.service_socket()).copied().unwrap_or(of.address);
        Purpose { vip, client, redirect_port: of.redirect_port, service_port: port }
    }

    /// The token that goes with a redirect of `client` to `port`.
    pub(super) fn token(
        &self,
        now: Instant,
        client: IpAddr,
        of: &ServicePorts,
        port: u16,
    ) -> Option<[u8; 8]> {
        self.tokens.token(self.clock.seconds(now), &self.purpose(client, of, port))
    }

    /// Whether a SYN to a service port of ours is dropped; counted.
    pub(super) fn refuses(
        &mut self,
        now: Instant,
        client: IpAddr,
        service: &ServicePorts,
        token: Option<[u8; 8]>,
    ) -> bool {
        let purpose = self.purpose(client, service, service.service_port);
        let (unix, before) = (self.clock.seconds(now), self.gauge.is_loaded());
        let own = Some(service.address).filter(|own| *own != purpose.vip);
        let admitted = self.tokens.admit(&mut self.gauge, now, unix, &purpose, own, token);
        let demanded = self.gauge.is_loaded();
        if demanded != before {
            self.report(ServerEvent::Load { demanded });
        }
        let Err(refusal) = admitted else { return false };
        *match refusal {
            TokenRefusal::Missing => &mut self.counters.tokens_missing,
            TokenRefusal::UnknownKey(_) => &mut self.counters.tokens_unknown_key,
            TokenRefusal::Expired => &mut self.counters.tokens_expired,
            TokenRefusal::Mismatch => &mut self.counters.tokens_mismatch,
        } += 1;
        true
    }

    /// A fragment: one of a SYN to a service port counts as a SYN without a token, or tokens could be got around.
    pub(super) fn on_fragment(&mut self, now: Instant, packet: &Packet) -> Action {
        let syn = packet.tcp().is_some_and(|tcp| tcp.is_syn());
        let asked = packet.destination_socket().filter(|_| syn);
        if let Some(Port::Service(service)) = asked.and_then(|asked| self.ports.get(&asked).copied())
            && self.refuses(now, packet.source(), &service, None)
        {
            return Action::Drop;
        }
        self.pass()
    }

    /// What a redirect of an established connection to `to` gives a token for (§4); a redirect port needs none.
    pub(super) fn purpose_of_move(&self, key: Key, to: SocketAddr) -> Option<Purpose> {
        let Some(Port::Service(from)) = self.ports.get(&key.service) else { return None };
        let purpose = match self.ports.get(&to) {
            Some(Port::Redirect(_)) => return None,
            Some(Port::Service(service)) => self.purpose(key.client.ip(), service, to.port()),
            None => self.purpose(key.client.ip(), from, to.port()),
        };
        // §7: another address is known there by itself.
        let vip = if to.ip() == key.service.ip() { purpose.vip } else { to.ip() };
        Some(Purpose { vip, ..purpose })
    }
}
