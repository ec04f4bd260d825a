//! What a capture tells of the deployment it was taken in, for a replay without a configuration.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::net::{IpAddr, SocketAddr};

use shunt_stack::redirect::ServicePorts;
use shunt_stack::wire::{Packet, TcpFlags};

use crate::frame::Frame;
use crate::read::Reader;

/// Addresses and services kept, at most.
const MOST: usize = 4096;

/// Shared addresses and services, as the options in a capture name them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Learned {
    /// Where SYNs with R go to, and SYN-ACKs with C come from.
    pub vips: BTreeSet<IpAddr>,
    /// Service sockets and the redirect port that each stands for.
    services: BTreeMap<SocketAddr, u16>,
    /// Addresses and services that were too many to be kept.
    pub left_out: u64,
}

impl Learned {
    /// Reads a capture to its end, or to where it cannot be read.
    pub fn of<R: Read>(reader: &mut Reader<R>, exid: u16) -> Learned {
        let mut learned = Learned::default();
        while let Some(record) = reader.next_record() {
            if let Ok(record) = record
                && let Ok(frame) = Frame::read(&record)
            {
                learned.packet(&frame.packet, exid);
            }
        }
        learned
    }

    /// The services; a port that confirms and stands for no other stands for itself.
    pub fn services(&self) -> Vec<ServicePorts> {
        let of = |(socket, asked): (&SocketAddr, &u16)| ServicePorts {
            address: socket.ip(),
            redirect_port: *asked,
            service_port: socket.port(),
        };
        self.services.iter().map(of).collect()
    }

    fn packet(&mut self, packet: &Packet, exid: u16) {
        let Some(tcp) = packet.tcp().filter(|tcp| tcp.flags().contains(TcpFlags::SYN)) else { return };
        let Ok(Some(option)) = tcp.redirect(exid) else { return };
        if tcp.is_syn() && option.redirect {
            self.vip(packet.destination());
            // R P=X on its way to Y: Y stands for X.
            if let Some(asked) = option.port.filter(|_| !option.confirm) {
                self.service(SocketAddr::new(packet.destination(), tcp.destination_port()), asked);
            }
        } else if tcp.is_syn_ack() && option.confirm && !option.redirect {
            self.vip(packet.source());
            match option.port {
                Some(port) => self.service(SocketAddr::new(packet.source(), port), tcp.source_port()),
                None => self.confirmed(SocketAddr::new(packet.source(), tcp.source_port())),
            }
        }
    }

    fn vip(&mut self, address: IpAddr) {
        if self.vips.len() < MOST {
            self.vips.insert(address);
        } else {
            self.left_out += u64::from(!self.vips.contains(&address));
        }
    }

    fn service(&mut self, socket: SocketAddr, asked: u16) {
        if self.services.len() < MOST || self.services.contains_key(&socket) {
            self.services.insert(socket, asked);
        } else {
            self.left_out += 1;
        }
    }

    fn confirmed(&mut self, socket: SocketAddr) {
        if !self.services.contains_key(&socket) {
            self.service(socket, socket.port());
        }
    }
}
