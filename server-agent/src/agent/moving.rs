//! Moving live connections: what the control socket orders, the diversion of just these connections, the machine that
//! asks their clients, and the probes that make idle ones say where they stand.

use std::net::SocketAddr;

use serde_json::json;
use shunt_host::control::Reply;
use shunt_host::query::TcpSockets;
use shunt_host::{HostError, TcpConnection};
use shunt_stack::device::Device;
use shunt_stack::redirect::{Action, ServerEvent};
use shunt_stack::time::Instant;
use shunt_stack::wire::{Packet, Segment, TcpFlags};

use super::Agent;
use crate::control::Order;
use crate::moves::{self, MoveRequest};
use crate::setup;

/// A command that waits for the kernel to say which connections there are.
pub(super) type Waiting = (MoveRequest, Reply);

impl Agent<'_> {
    pub(super) fn obey(&mut self, order: Order) {
        match order {
            Order::Move(request, reply) => self.ask_to_move(request, reply),
            Order::MoveStop(service, reply) => match self.moves.stop(self.clock.now(), &service) {
                Some(stopped) => {
                    self.cancel(&stopped);
                    reply.done(json!({}));
                }
                None => reply.refuse(format!("no connections of {service:?} are being moved")),
            },
            Order::Drain { service, to, reply } => {
                let request = MoveRequest::whole(&service, to);
                let checked = request.check(&self.config).and_then(|()| moves::find(&self.config, &service));
                match checked {
                    Ok(found) if found.redirect_port == to => {
                        return reply.refuse(format!(
                            "{to} is the redirect port: name another server's service port"
                        ));
                    }
                    Ok(_) => {}
                    Err(reason) => return reply.refuse(reason),
                }
                if self.moves.is_moving(&service) {
                    return reply.refuse(already(&service));
                }
                self.send_elsewhere(&service, Some(to));
                self.ask_to_move(request, reply);
            }
            Order::Enable(service, reply) => match moves::find(&self.config, &service) {
                Ok(_) => {
                    self.send_elsewhere(&service, None);
                    reply.done(json!({}));
                }
                Err(reason) => reply.refuse(reason),
            },
            Order::Established(sockets) => self.begin_moves(&sockets),
        }
    }

    fn ask_to_move(&mut self, request: MoveRequest, reply: Reply) {
        if let Err(reason) = request.check(&self.config) {
            return reply.refuse(reason);
        }
        self.asked.push((request, reply));
        self.desk.ask_established(&self.config);
    }

    fn begin_moves(&mut self, sockets: &Result<TcpSockets, HostError>) {
        let now = self.clock.now();
        for (request, reply) in std::mem::take(&mut self.asked) {
            let sockets = match sockets {
                Ok(sockets) => sockets,
                Err(error) => {
                    reply.refuse(format!("the kernel does not say which connections there are: {error}"));
                    continue;
                }
            };
            if self.moves.is_moving(&request.service) {
                reply.refuse(already(&request.service));
                continue;
            }
            match moves::find(&self.config, &request.service) {
                Ok(service) => {
                    let all = sockets.pairs().iter().map(|&(local, remote)| TcpConnection { local, remote });
                    self.moves.begin(now, &request, service, all, reply);
                }
                // A reload came between.
                Err(reason) => reply.refuse(reason),
            }
        }
    }

    /// Where new clients of a service go: here, or to another server's port.
    fn send_elsewhere(&mut self, service: &str, to: Option<u16>) {
        if let Some(to) = to {
            self.drained.insert(service.to_owned(), to);
            tracing::info!(service, to, "new clients are sent elsewhere");
        } else if self.drained.remove(service).is_some() {
            tracing::info!(service, "new clients are served here again");
        }
        self.apply_drains();
    }

    /// Tells the machine where new clients of each service go (`S2`).
    pub(super) fn apply_drains(&mut self) {
        let config = &self.config;
        self.drained.retain(|service, _| moves::find(config, service).is_ok());
        for service in &config.services {
            let to = self.drained.get(&service.name).copied();
            for address in &config.addresses {
                for port in [service.redirect_port, service.service_port] {
                    self.server.set_elsewhere(SocketAddr::new(*address, port), to);
                }
            }
        }
    }

    fn cancel(&mut self, connections: &[TcpConnection]) {
        for connection in connections {
            self.server.cancel_redirect(connection.remote, connection.local);
        }
    }

    /// What is due: changes of what is diverted, probes, progress.
    pub(super) async fn advance_moves<D: Device>(&mut self, device: &D) {
        let now = self.clock.now();
        let interrupted = self.moves.tell(now);
        self.cancel(&interrupted);
        if let Some(new) = self.moves.advance(now) {
            self.divert(now, &new).await;
        }
        for probe in self.moves.probes(now) {
            let TcpConnection { local, remote } = probe.connection;
            let bare = Segment::bare(remote, local, TcpFlags::ACK);
            let packet = Segment { seq: probe.seq, ack: probe.ack, ..bare }.emit();
            self.stats.probes += 1;
            self.send(device, &packet, None).await;
        }
    }

    /// Diverts what is being moved and nothing else, then has the new ones asked.
    async fn divert(&mut self, now: Instant, new: &[(TcpConnection, SocketAddr)]) {
        let changes = setup::changes(&self.config, &self.facts, &self.moves.diverted());
        if let Err(error) = self.host.replace(changes).await {
            tracing::error!(%error, "connections that are to move could not be diverted");
            self.moves.could_not_divert(now, new);
            return;
        }
        for &(connection, to) in new {
            let TcpConnection { local, remote } = connection;
            if let Err(error) = self.server.redirect_connection(now, remote, local, to, None) {
                tracing::debug!(client = %remote, service = %local, %to, %error, "not asked to move");
                self.moves.refused(now, connection);
            }
        }
        self.moves.applied();
    }

    /// A packet of the local TCP.
    pub(super) fn on_local(&mut self, now: Instant, packet: &mut Packet) -> Action {
        let unwanted = self.hear(packet);
        let action = self.server.handle_local(now, packet);
        if unwanted { Action::Drop } else { action }
    }

    /// Whether the packet answers only a probe of ours.
    fn hear(&mut self, packet: &Packet) -> bool {
        let Some(tcp) = packet.tcp().filter(|tcp| !tcp.flags().contains(TcpFlags::SYN)) else { return false };
        let ends = packet.source_socket().zip(packet.destination_socket());
        let Some((local, remote)) = ends else { return false };
        let reset = tcp.flags().contains(TcpFlags::RST).then(|| tcp.seq());
        self.moves.on_local(&TcpConnection { local, remote }, reset)
    }

    pub(super) fn on_event(&mut self, event: ServerEvent) {
        if let ServerEvent::Redirection { client, service, outcome, .. } = event {
            let connection = TcpConnection { local: service, remote: client };
            self.moves.ended(self.clock.now(), connection, outcome);
        }
    }
}

fn already(service: &str) -> String {
    format!(
        "connections of {service:?} are being moved already; `shunt ctl move --service {service} --stop` ends that"
    )
}
