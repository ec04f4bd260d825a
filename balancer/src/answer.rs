//! `B1` with `answer = "balancer"`: redirects given from the SYN alone (`S2`), and C on the SYN-ACKs of servers without an
//! agent. Nothing is remembered of either.
//!
//! Each packet is answered by one at the most, which is never repeated and about as long: what a service's limits let
//! pass is all that is answered, so there is no limit of its own.

use shunt_stack::redirect::{Answerer, ServerConfig, can_redirect};
use shunt_stack::wire::{Packet, RedirectOption, observed_digest};

use crate::Balancer;
use crate::config::{Config, Transport};
use crate::select::SelectKey;

/// What answers offer and keep to. No client sends a segment after the SYN-ACK: it goes on at the service port, where
/// the server says its own.
const MTU: usize = 1500;

/// What answers SYNs, if any service is answered here.
pub(crate) fn answerer(config: &Config, key: SelectKey) -> Option<Answerer> {
    let any = config.services.iter().any(crate::config::Service::is_answered_here);
    any.then(|| Answerer::new(config.host.exid, key.derived(b"isn"), MTU))
}

impl Balancer {
    /// Whether a SYN with R may be answered here; what may not is plain (`B3`).
    pub(crate) fn can_redirect(&self, packet: &Packet) -> bool {
        let hops = self.asked(packet).map_or(0, |option| option.hops);
        can_redirect(packet)
            && hops < ServerConfig::DEFAULT_MAX_HOPS
            && self.table.vip(packet.source()).is_none()
    }

    fn asked(&self, packet: &Packet) -> Option<RedirectOption> {
        packet.tcp()?.redirect(self.table.exid).ok().flatten()
    }

    /// The SYN-ACK that sends a client to `port`. To a client that would hand over it says no O: nothing is half-open
    /// anywhere, so it has to reconnect (`C5`).
    pub(crate) fn redirecting(&self, syn: &Packet, port: u16) -> Option<Packet> {
        let (answerer, asked, client) = (self.answerer?, self.asked(syn)?, syn.source_socket()?);
        let option = RedirectOption {
            confirm: true,
            port: Some(port),
            hops: asked.hops,
            observed: asked.confirm.then(|| observed_digest(client)),
            token: self.token(syn.destination(), client.ip(), syn.ports()?.1, port),
            ..RedirectOption::default()
        };
        answerer.answer(self.now(), syn, &option, self.tokens.may_demand())
    }

    /// Adds C to a server's SYN-ACK from a service port (`C5`), unless it says something already: an agent's. Whether its
    /// SYN had R nobody knows here; to a plain client C is an unknown option, which it ignores (RFC 9293 §3.2).
    pub(crate) fn confirm(&self, packet: &mut Packet) {
        let Some(tcp) = packet.tcp().filter(|tcp| tcp.is_syn_ack() && packet.fragment().is_none()) else {
            return;
        };
        let back = self.table.back(packet.source(), Transport::Tcp.number(), tcp.source_port());
        if !back.is_some_and(|back| back.confirms) || tcp.redirect(self.table.exid) != Ok(None) {
            return;
        }
        let option = RedirectOption { confirm: true, ..RedirectOption::default() };
        let done = packet.insert_redirect(self.table.exid, &option, MTU).is_ok();
        self.stats.confirmed(done);
    }
}
