//! §10 at the balancer: tokens in its own answers (`B1`, `T2`), and the demand for them on SYNs to service ports (`B2`,
//! `T4`).
//!
//! Where a packet goes does not depend on it (`B6`); whether a SYN passes does. The only memory is a driver's: how many
//! such SYNs came lately.

use std::collections::HashMap;
use std::net::IpAddr;

use shunt_stack::redirect::{Gauge, Purpose, TokenPolicy, TokenRefusal};
use shunt_stack::time::{Instant, WallClock};
use shunt_stack::wire::{Packet, TcpView};

use crate::Balancer;
use crate::config::{Config, Transport};

/// Who makes and checks tokens here.
#[derive(Debug)]
pub(crate) struct Tokens {
    policy: TokenPolicy,
    /// The redirect port that each service port of a VIP stands for; empty where no token is ever demanded.
    redirect_ports: HashMap<(IpAddr, u16), u16>,
}

impl Tokens {
    pub(crate) fn new(config: &Config) -> Tokens {
        let policy = config.tokens.clone();
        let mut redirect_ports = HashMap::new();
        if policy.may_demand() {
            for (service, range) in config.servers.iter().flat_map(|server| &server.ports) {
                let service = &config.services[*service];
                let vips = service.vips.iter().filter(|vip| service.is_reached(**vip, Transport::Tcp));
                let all = vips.flat_map(|vip| range.ports().map(move |port| (*vip, port)));
                redirect_ports.extend(all.map(|key| (key, service.redirect_port)));
            }
        }
        Tokens { policy, redirect_ports }
    }

    /// Whether SYNs to a service port need a token.
    pub(crate) fn guards(&self, vip: IpAddr, port: u16) -> bool {
        self.redirect_ports.contains_key(&(vip, port))
    }

    /// Whether tokens are demanded, now or at other times.
    pub(crate) fn may_demand(&self) -> bool {
        self.policy.may_demand()
    }
}

impl Balancer {
    /// Tells Unix time, on which tokens depend; as often as the time is told ([`advance`](Self::advance)).
    pub fn set_clock(&self, clock: WallClock) {
        self.lives.set_wall(clock);
    }

    /// The token for a client that is sent to `port` instead of `asked`.
    pub(crate) fn token(&self, vip: IpAddr, client: IpAddr, asked: u16, port: u16) -> Option<[u8; 8]> {
        let purpose = Purpose { vip, client, redirect_port: asked, service_port: port };
        self.tokens.policy.token(self.lives.wall().seconds(self.now()), &purpose)
    }

    /// Whether a packet passes as far as tokens go: all do but SYNs to service ports.
    pub(crate) fn guard(&self, gauge: &mut Gauge, now: Instant, packet: &Packet) -> Result<(), TokenRefusal> {
        let Some(purpose) = self.guarded(packet) else { return Ok(()) };
        let token = packet.tcp().and_then(|tcp| tcp.redirect(self.table.exid).ok().flatten()?.token);
        let before = gauge.is_loaded();
        let unix = self.lives.wall().seconds(now);
        let admitted = self.tokens.policy.admit(gauge, now, unix, &purpose, None, token);
        if gauge.is_loaded() != before {
            self.stats.load(gauge.is_loaded());
        }
        admitted
    }

    /// What the token of a SYN to a service port has to be for (`B2`); `None` for all else.
    fn guarded(&self, packet: &Packet) -> Option<Purpose> {
        if self.tokens.redirect_ports.is_empty() {
            return None;
        }
        let tcp = packet.tcp().filter(TcpView::is_syn)?;
        let (address, port) = (packet.destination(), tcp.destination_port());
        let redirect_port = *self.tokens.redirect_ports.get(&(address, port))?;
        let vip = self.table.vip(address)?;
        // B1: a port may be both.
        let asks = self.table.set(vip, Transport::Tcp, port).is_some() && self.asks_for_redirect(tcp);
        (!asks).then_some(Purpose {
            vip: address,
            client: packet.source(),
            redirect_port,
            service_port: port,
        })
    }
}
