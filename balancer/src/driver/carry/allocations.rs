//! Packets on their way cost no memory: [`carry`] over a device that gives the same packets again and again.

use std::collections::VecDeque;
use std::sync::Mutex;

use shunt_host::Source;
use shunt_stack::wire::{Gso, GsoKind, Segment, SeqNumber, TcpFlags};

use super::*;
use crate::{Config, SelectKey};

/// Gives packets in turn until so many are given.
struct Mill {
    packets: Vec<(Packet, Offload)>,
    given: Mutex<usize>,
    most: usize,
    sent: Mutex<VecDeque<usize>>,
}

impl Device for Mill {
    async fn recv(&self, buffer: &mut BytesMut) -> io::Result<Offload> {
        let mut given = self.given.lock().unwrap();
        if *given == self.most {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let (packet, offload) = &self.packets[*given % self.packets.len()];
        *given += 1;
        buffer.clear();
        buffer.extend_from_slice(packet.bytes());
        Ok(*offload)
    }

    async fn send(&self, packet: &Packet) -> io::Result<()> {
        let mut sent = self.sent.lock().unwrap();
        // The last of each kind.
        if sent.len() == self.packets.len() {
            sent.pop_front();
        }
        sent.push_back(packet.segment_count());
        Ok(())
    }

    fn mtu(&self) -> usize {
        1500
    }

    fn name(&self) -> &'static str {
        "mill"
    }
}

const FILE: &str = r#"
role = "balancer"
vips = ["203.0.113.10"]
[[service]]
name = "web"
redirect_port = 443
limit = { packets_per_s = 4000000000 }
[[server]]
name = "web-1"
address = "10.0.0.1"
ports = { web = 41001 }
"#;

fn packet(source: &str, destination: &str, flags: TcpFlags, payload: &[u8]) -> Packet {
    let bare = Segment::bare(source.parse().unwrap(), destination.parse().unwrap(), flags);
    Segment { seq: SeqNumber(7), payload, ..bare }.emit()
}

/// Allocations of so many packets, and the segments of those that were sent last.
fn allocations(most: usize) -> (u64, Vec<usize>) {
    let config = Config::parse(&Source::new("test.toml", FILE)).unwrap();
    let balancer = Arc::new(Balancer::new(&config, SelectKey([1; 16])));
    let (client, vip) = ("192.0.2.7:50000", "203.0.113.10:41001");
    let gso = Some(Gso { kind: GsoKind::TcpV4, size: 1448, ecn: false });
    let whole = Offload::default();
    let packets = vec![
        (packet(client, vip, TcpFlags::ACK, &[]), whole),
        (packet(client, vip, TcpFlags::ACK, &[7; 60_000]), Offload { partial_checksum: true, gso }),
        (packet("10.0.0.1:41001", client, TcpFlags::ACK, &[7; 1000]), whole),
        (packet(client, "203.0.113.10:443", TcpFlags::SYN, &[]), whole),
    ];
    let mill = Arc::new(Mill { packets, given: Mutex::new(0), most, sent: Mutex::default() });
    let active =
        Active { queues: [Arc::clone(&mill)].into(), balancer, connections: None, outputs: Vec::new() };
    let (_sender, receiver) = watch::channel(Arc::new(active));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let counted = allocation_counter::measure(|| {
        runtime.block_on(carry(&*mill, receiver.clone(), Clock::start()));
    });
    let sent = mill.sent.lock().unwrap().iter().copied().collect();
    (counted.count_total, sent)
}

#[test]
fn packets_on_their_way_cost_no_memory() {
    let (few, sent) = allocations(400);
    assert_eq!(sent, [1, 42, 1, 1], "all of them are forwarded");
    let (many, _) = allocations(40_000);
    // The buffer that takes the first packets is made once.
    assert!(few > 0, "allocations are counted");
    assert_eq!(many, few);
}
