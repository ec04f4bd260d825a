//! §5: another own port for a connection on a service port, asked for by the client.

use std::net::SocketAddr;

use super::config::{ClientEvent, RebindError};
use super::flow::{FlowKey, Rebind, State};
use super::follow::exact;
use super::path::PathState;
use super::{Client, Towards};
use crate::redirect::announce::Announcement;
use crate::redirect::numbers::{ConnectionNumbers, NumbersOf, Track};
use crate::time::Instant;
use crate::wire::{Packet, RedirectOption};

/// Own ports that one connection may go through: segments of all of them are taken while it lasts (`P4`).
const MAX_REBINDS: usize = 4;

impl Client {
    /// Asks the server of (`local`, `vip`) to send to own port `port` from now on (`P1`). [`ClientEvent::Rebound`] or
    /// [`ClientEvent::RebindFailed`] follows; until then and afterwards segments to either port are taken. `numbers`
    /// are the connection's, where the driver knows them.
    ///
    /// # Errors
    /// [`RebindError`]: nothing was changed.
    pub fn rebind(
        &mut self,
        now: Instant,
        local: SocketAddr,
        vip: SocketAddr,
        port: u16,
        numbers: Option<ConnectionNumbers>,
    ) -> Result<(), RebindError> {
        let key = FlowKey { local, vip };
        let path = self.paths.state(self.paths.key(vip.ip()));
        let own = SocketAddr::new(local.ip(), port);
        let flow = self.flows.get(&key).ok_or(RebindError::NotRedirected)?;
        let service = key.service(flow.present_port());
        let live = flow.live.as_ref().ok_or(RebindError::NotRedirected)?;
        if path != PathState::Direct {
            return Err(RebindError::Translated);
        }
        if live.rebind.is_some() || live.close.is_some() || live.own_ports.len() >= MAX_REBINDS {
            return Err(RebindError::Busy);
        }
        let taken = self.services.contains_key(&(own, service))
            || self.flows.contains_key(&FlowKey { local: own, vip: service })
            || self.flows.contains_key(&FlowKey { local: own, vip });
        if port == 0 || port == local.port() || taken {
            return Err(RebindError::Port(port));
        }
        let numbers = numbers.or(live.track.as_ref().and_then(Track::known));
        let option = RedirectOption { redirect: true, port: Some(port), ..Default::default() };
        let announcement = Announcement::new(now, option, numbers);
        let give_up = now + self.config.rebind_timeout;
        self.services.insert((own, service), key);
        if let Some(flow) = self.flows.get_mut(&key) {
            self.swaps.extend(flow.unsettle());
            if let Some(live) = flow.live.as_mut() {
                live.own_ports.push(port);
                live.rebind = Some(Rebind { port, announcement, give_up });
            }
        }
        self.schedule_rebind(key);
        Ok(())
    }

    /// `P3`: C P=p' on a segment from Y.
    pub(super) fn on_rebind_confirmed(
        &mut self,
        key: FlowKey,
        packet: &Packet,
        port: u16,
        numbers: NumbersOf<'_>,
    ) {
        let Some(live) = self.flows.get_mut(&key).and_then(|flow| flow.live.as_mut()) else { return };
        if live.wire_port == Some(port) {
            // Said again until the server hears from there.
            return;
        }
        let asked = live.rebind.as_ref().is_some_and(|rebind| rebind.port == port);
        if !asked || !exact(live, key, packet, numbers) {
            self.counters.rebinds_refused += 1;
            return;
        }
        (live.rebind, live.wire_port) = (None, Some(port));
        self.counters.rebinds += 1;
        self.schedule_rebind(key);
        self.event(ClientEvent::Rebound { local: key.local, vip: key.vip, port });
    }

    pub(super) fn on_live_timer(&mut self, now: Instant, key: FlowKey) {
        let (exid, mtu) = (self.config.exid, self.config.mtu);
        let Some(flow) = self.flows.get_mut(&key) else { return };
        let ends = (flow.wire_local(), key.service(flow.present_port()));
        let Some(live) = flow.live.as_mut() else { return };
        let Some(rebind) = live.rebind.as_mut() else { return };
        if now >= rebind.give_up {
            let port = rebind.port;
            live.rebind = None;
            self.counters.rebinds_failed += 1;
            self.event(ClientEvent::RebindFailed { local: key.local, vip: key.vip, port });
            return;
        }
        let said = rebind.announcement.poll(now, ends, exid, mtu);
        self.schedule_rebind(key);
        if let Some(packet) = said {
            self.transmit(Towards::Network, packet);
        }
    }

    /// Sets the timer of a connection beyond its handshake.
    pub(super) fn schedule_rebind(&mut self, key: FlowKey) {
        let Some(flow) = self.flows.get_mut(&key) else { return };
        if matches!(flow.state, State::Attempt(_)) {
            return;
        }
        let rebind = flow.live.as_ref().and_then(|live| live.rebind.as_ref());
        let at = rebind.map(|rebind| rebind.announcement.deadline().min(rebind.give_up));
        let before = std::mem::replace(&mut flow.timer, at);
        if before != at {
            before.map(|before| self.timers.remove(&(before, key)));
            self.timers.extend(at.map(|at| (at, key)));
        }
    }
}
