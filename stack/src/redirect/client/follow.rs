//! §4: what a confirmed connection is asked beyond its handshake. The machine judges and marks; opening and closing the
//! parts of a byte stream is for who has it.

use std::net::SocketAddr;

use super::config::{ClientEvent, OnRedirect};
use super::flow::{Attempt, Coming, Flow, FlowKey, Live, State};
use super::{Action, Client};
use crate::redirect::numbers::{NumbersOf, Track};
use crate::time::Instant;
use crate::wire::{Packet, RedirectOption, TcpFlags};

impl Live {
    pub(super) fn new(track: Option<Track>, origin: u16) -> Live {
        Live {
            track,
            origin,
            asked: None,
            token: None,
            failed: false,
            close: None,
            own_ports: Vec::new(),
            wire_port: None,
            rebind: None,
        }
    }
}

impl Flow {
    /// The port it is on, Y; the port asked where the server stayed there.
    pub(super) fn present_port(&self) -> u16 {
        self.service.unwrap_or(self.key.vip.port())
    }

    /// The local socket as the network knows it (§5).
    pub(super) fn wire_local(&self) -> SocketAddr {
        let port = self.live.as_ref().and_then(|live| live.wire_port);
        SocketAddr::new(self.key.local.ip(), port.unwrap_or(self.key.local.port()))
    }
}

impl Client {
    pub(super) fn on_redirect(&self, vip: SocketAddr) -> OnRedirect {
        // What is no VIP of ours was opened because a redirect to it was followed (§7).
        self.vips.get(&vip.ip()).map_or(OnRedirect::Follow, |vip| vip.on_redirect)
    }

    /// The connection is confirmed by `syn_ack`.
    pub(super) fn go_live(&self, flow: &mut Flow, attempt: &Attempt, syn_ack: &Packet) {
        let track = attempt.syn.tcp().zip(syn_ack.tcp());
        self.set_live(flow, track.map(|(syn, syn_ack)| Track::new(&syn, &syn_ack)), attempt.origin);
    }

    pub(super) fn set_live(&self, flow: &mut Flow, track: Option<Track>, origin: u16) {
        let follows = self.on_redirect(flow.key.vip) != OnRedirect::Ignore;
        flow.live = Some(Box::new(Live::new(track.filter(|_| follows), origin)));
    }

    /// A segment of the local TCP of a connection beyond its handshake.
    pub(super) fn on_live_local(&mut self, now: Instant, key: FlowKey, packet: &mut Packet) -> Action {
        let (exid, mtu) = (self.config.exid, self.config.mtu);
        let Some(flow) = self.flows.get_mut(&key) else { return Action::Pass };
        if let State::Redirected { service_port, .. } = flow.state {
            packet.set_destination_port(service_port);
        }
        if let Some(after) = self.config.resettle_after {
            self.swaps.extend(flow.on_segment(after, packet, true));
        }
        let settled = flow.is_settled();
        let Some(live) = &mut flow.live else { return Action::Pass };
        let Some(tcp) = packet.tcp() else { return Action::Pass };
        if let Some(track) = live.track.as_mut().filter(|_| !settled) {
            track.on_local(&tcp);
        }
        let closes = tcp.flags().intersects(TcpFlags::FIN | TcpFlags::RST);
        let mut said = false;
        if let Some(port) = live.close.filter(|_| closes) {
            let option = RedirectOption { confirm: true, port: Some(port), ..Default::default() };
            self.counters.moves_closed += u64::from(packet.insert_redirect(exid, &option, mtu).is_ok());
        } else if let Some(rebind) = &mut live.rebind {
            said = rebind.announcement.on_local(now, packet, exid, mtu);
        }
        if let Some(port) = live.wire_port {
            packet.set_source_port(port);
        }
        if said {
            self.schedule_rebind(key);
        }
        Action::Pass
    }

    /// A segment of the network of a connection beyond its handshake, as the network addressed it; shown to the local
    /// TCP with the own port that it knows.
    pub(super) fn on_live_remote(&mut self, key: FlowKey, packet: &mut Packet, numbers: NumbersOf<'_>) {
        let Some(flow) = self.flows.get_mut(&key) else { return };
        if let Some(after) = self.config.resettle_after {
            self.swaps.extend(flow.on_segment(after, packet, false));
        }
        let Some(tcp) = packet.tcp() else { return };
        if flow.live.is_none() {
            return;
        }
        let marked = tcp.header_len() > 20 && !tcp.flags().intersects(TcpFlags::SYN | TcpFlags::RST);
        let option = if marked { self.option(&tcp) } else { None };
        match option {
            // R with C is an echo of our own (§2); a handover says so, too.
            Some(RedirectOption {
                redirect: true, confirm: false, port: Some(port), address, token, ..
            }) => {
                let address = address.unwrap_or(key.vip.ip());
                self.on_move_asked(key, packet, SocketAddr::new(address, port), token, numbers);
            }
            Some(RedirectOption { redirect: false, confirm: true, port: Some(port), .. }) => {
                self.on_rebind_confirmed(key, packet, port, numbers);
            }
            _ => {}
        }
        let Some(flow) = self.flows.get_mut(&key) else { return };
        let settled = flow.is_settled();
        let Some(live) = flow.live.as_mut() else { return };
        if let Some((track, tcp)) = live.track.as_mut().filter(|_| !settled).zip(packet.tcp()) {
            track.on_remote(&tcp);
        }
        packet.set_destination_port(key.local.port());
    }

    /// `M3`, `M5`: R P=Z on a segment from Y.
    fn on_move_asked(
        &mut self,
        key: FlowKey,
        packet: &Packet,
        to: SocketAddr,
        token: Option<[u8; 8]>,
        numbers: NumbersOf<'_>,
    ) {
        let on_redirect = self.on_redirect(key.vip);
        let accepted = self.may_move(key, to);
        let Some(flow) = self.flows.get_mut(&key) else { return };
        let from = flow.present_port();
        let Some(live) = flow.live.as_mut() else { return };
        // M4: once a connection, again only elsewhere, after the first has failed.
        let again = live.asked.is_some_and(|asked| asked == to || !live.failed);
        if on_redirect == OnRedirect::Ignore || again {
            return;
        }
        // Its numbers have passed elsewhere. It comes back, and the repeated request (M1) can be judged.
        self.swaps.extend(flow.unsettle());
        let Some(live) = flow.live.as_mut() else { return };
        if !exact(live, key, packet, numbers) {
            self.counters.moves_inexact += 1;
            return;
        }
        if !accepted {
            self.counters.moves_refused += 1;
            return;
        }
        (live.asked, live.token, live.failed) = (Some(to), token, false);
        self.counters.moves_asked += 1;
        let FlowKey { local, vip } = key;
        self.event(match on_redirect {
            OnRedirect::Follow => ClientEvent::MoveAsked { local, vip, from, to },
            _ => ClientEvent::Hint { local, vip, from, to },
        });
    }

    /// Whether a connection may go there at all (`M4`, `C3`, §7): another port, in the allowed range or the one that the
    /// program has asked for itself, not denied; another address only if configured.
    fn may_move(&self, key: FlowKey, to: SocketAddr) -> bool {
        let Some(flow) = self.flows.get(&key) else { return false };
        let same = to.ip() == key.vip.ip();
        let origin = flow.live.as_ref().is_some_and(|live| live.origin == to.port());
        let ranged = self.config.ports.contains(&to.port()) || same && origin;
        let reachable = same || self.config.accept_prefixes.iter().any(|prefix| prefix.contains(to.ip()));
        ranged
            && reachable
            && !self.config.denied_ports.contains(&to.port())
            && !(same && to.port() == flow.present_port())
    }

    /// The SYN that `opening` sends to where the connection (`local`, `vip`) was asked to go will open its next part
    /// (`M6`): it carries R C P=Y, and what is not confirmed is refused, never plain. `opening` has an own port that no
    /// other connection to that address uses (`C8`). False if no such move was asked for.
    pub fn expect_move(&mut self, local: SocketAddr, vip: SocketAddr, opening: SocketAddr) -> bool {
        let Some(flow) = self.flows.get(&FlowKey { local, vip }) else { return false };
        let Some(to) = flow.live.as_ref().and_then(|live| live.asked.filter(|_| !live.failed)) else {
            return false;
        };
        let next = FlowKey { local: opening, vip: to };
        let taken = self.flows.contains_key(&next) || self.services.contains_key(&(opening, to));
        if taken || self.moves.len() >= self.config.max_flows {
            return false;
        }
        let origin = flow.live.as_ref().map_or(vip.port(), |live| live.origin);
        let token = flow.live.as_ref().and_then(|live| live.token);
        self.moves.insert(next, Coming { from: flow.present_port(), origin, token });
        true
    }

    /// The move that the connection was asked for is off: it stays, and may be asked to go elsewhere, or with `retry`
    /// there again.
    pub fn move_failed(&mut self, local: SocketAddr, vip: SocketAddr, retry: bool) {
        let flow = self.flows.get_mut(&FlowKey { local, vip });
        if let Some(live) = flow.and_then(|flow| flow.live.as_mut()) {
            live.failed = true;
            live.asked = live.asked.filter(|_| !retry);
        }
    }

    /// The connection has moved (`M7`): FINs and RSTs of its old part carry C P=Z from now on.
    pub fn close_moved(&mut self, local: SocketAddr, vip: SocketAddr) {
        let Some(flow) = self.flows.get_mut(&FlowKey { local, vip }) else { return };
        let Some(live) = &mut flow.live else { return };
        live.close = live.asked.map(|to| to.port());
        self.swaps.extend(flow.unsettle());
    }
}

/// Whether a segment may ask or confirm anything (`M3`). The driver's numbers are better than those followed: a local
/// TCP has received more than it has acknowledged.
pub(super) fn exact(live: &Live, key: FlowKey, packet: &Packet, numbers: NumbersOf<'_>) -> bool {
    let known = numbers(key.local, key.vip).or(live.track.as_ref().and_then(Track::known));
    known.zip(packet.tcp()).is_some_and(|(known, tcp)| known.exact(&tcp))
}
