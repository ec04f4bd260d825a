//! A client that is a script: it speaks TCP segment by segment over a TUN device, so that it can say what a shim says.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use bytes::BytesMut;
use shunt_lab::Host;
use shunt_stack::device::{Device, TunDevice, TunOptions};
use shunt_stack::wire::{
    DEFAULT_EXID, Packet, RedirectOption, Segment, SeqNumber, TcpFlags, observed_digest,
};
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;

pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// What a SYN offers: MSS, SACK-permitted, timestamps, window scale.
const SYN_OPTIONS: [u8; 20] = [2, 4, 5, 0xb4, 4, 2, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0, 1, 3, 3, 7];

/// The TUN device by which scripted clients reach the network.
pub(crate) struct Wire {
    device: TunDevice,
    runtime: Runtime,
}

impl Wire {
    /// A device `raw0` in `host`; `addresses` are those of the host's end.
    pub(crate) fn open(host: &Host, addresses: [&str; 2]) -> Wire {
        let open = || {
            let runtime = Builder::new_current_thread().enable_all().build().unwrap();
            let mut options = TunOptions::new("raw0");
            // Checksums are complete, as on a link.
            options.super_packets = false;
            let device = runtime.block_on(async { TunDevice::create(options) });
            Wire { device: device.expect("a TUN device (this test must run as root)"), runtime }
        };
        let wire = host.enter(open).unwrap();
        for address in addresses {
            host.address("raw0", address).unwrap();
        }
        wire
    }

    pub(crate) fn send(&self, packet: &Packet) {
        self.runtime.block_on(self.device.send(packet)).unwrap();
    }

    /// The next TCP segment to `client`, whatever is in it; `None` if none comes in time.
    pub(crate) fn receive(&self, client: SocketAddr, patience: Duration) -> Option<Packet> {
        let next = async {
            let mut buffer = BytesMut::new();
            loop {
                let offload = self.device.recv(&mut buffer).await.unwrap();
                let Ok(packet) = Packet::parse(buffer.split(), offload) else { continue };
                if packet.tcp().is_some() && packet.destination_socket() == Some(client) {
                    assert!(packet.checksum_ok(), "{packet:?}");
                    return packet;
                }
            }
        };
        self.runtime.block_on(async { timeout(patience, next).await.ok() })
    }
}

/// One TCP connection, or the beginning of one.
pub(crate) struct Connection<'a> {
    wire: &'a Wire,
    pub(crate) client: SocketAddr,
    /// Where segments go now.
    pub(crate) server: SocketAddr,
    iss: SeqNumber,
    snd_nxt: SeqNumber,
    rcv_nxt: SeqNumber,
    clock: u32,
    ts_recent: u32,
}

impl<'a> Connection<'a> {
    pub(crate) fn new(wire: &'a Wire, client: SocketAddr, server: SocketAddr) -> Self {
        let iss = SeqNumber(u32::from(client.port()).wrapping_mul(0x0100_0193));
        Connection {
            wire,
            client,
            server,
            iss,
            snd_nxt: iss + 1,
            rcv_nxt: SeqNumber(0),
            clock: 1000,
            ts_recent: 0,
        }
    }

    pub(crate) fn send_syn(&mut self, option: Option<RedirectOption>) {
        self.clock += 1;
        let mut options = SYN_OPTIONS;
        options[8..12].copy_from_slice(&self.clock.to_be_bytes());
        let bare = Segment::bare(self.client, self.server, TcpFlags::SYN);
        let mut packet = Segment { seq: self.iss, window: 64_240, options: &options, ..bare }.emit();
        if let Some(option) = option {
            packet.insert_redirect(DEFAULT_EXID, &option, 1500).unwrap();
        }
        self.wire.send(&packet);
    }

    fn send(&mut self, flags: TcpFlags, payload: &[u8], option: Option<RedirectOption>) {
        self.clock += 1;
        let mut options = [1, 1, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0];
        options[4..8].copy_from_slice(&self.clock.to_be_bytes());
        options[8..].copy_from_slice(&self.ts_recent.to_be_bytes());
        let bare = Segment::bare(self.client, self.server, flags | TcpFlags::ACK);
        let (seq, ack) = (self.snd_nxt, self.rcv_nxt);
        let mut packet = Segment { seq, ack, window: 500, options: &options, payload, ..bare }.emit();
        if let Some(option) = option {
            packet.insert_redirect(DEFAULT_EXID, &option, 1500).unwrap();
        }
        self.snd_nxt = self.snd_nxt + packet.tcp().unwrap().sequence_len();
        self.wire.send(&packet);
    }

    /// The next segment from `port`; what comes from elsewhere is a failure.
    pub(crate) fn receive(&mut self, port: u16) -> Packet {
        let packet = self.wire.receive(self.client, PATIENCE).expect("an answer");
        assert_eq!(packet.source_socket(), Some(SocketAddr::new(self.server.ip(), port)));
        if let Some((value, _)) = packet.tcp().unwrap().timestamps() {
            self.ts_recent = value;
        }
        packet
    }

    pub(crate) fn silence(&self, patience: Duration) {
        if let Some(packet) = self.wire.receive(self.client, patience) {
            panic!("nothing should have come: {packet:?}");
        }
    }

    /// The SYN-ACK from `port` to the SYN sent last, and its option.
    pub(crate) fn receive_syn_ack(&mut self, port: u16) -> Option<RedirectOption> {
        let packet = self.receive(port);
        let tcp = packet.tcp().unwrap();
        assert!(tcp.is_syn_ack(), "{:?} from {port}", tcp.flags());
        assert_eq!(tcp.ack(), self.iss + 1);
        assert_eq!(tcp.timestamps().expect("timestamps").1, self.clock);
        self.rcv_nxt = tcp.seq() + 1;
        tcp.redirect(DEFAULT_EXID).unwrap()
    }

    fn redirected_to(&mut self, x: u16) -> u16 {
        let option = self.receive_syn_ack(x).expect("a redirect");
        assert!(option.confirm && !option.redirect, "{option:?}");
        assert_eq!(option.observed, Some(observed_digest(self.client)));
        let y = option.port.expect("a port");
        self.server.set_port(y);
        y
    }

    /// The ACK that ends the handshake.
    pub(crate) fn establish(&mut self) {
        self.send(TcpFlags(0), &[], None);
    }

    /// Two round trips: SYN to X, SYN to Y.
    pub(crate) fn reconnect(&mut self) {
        let x = self.server.port();
        self.send_syn(Some(RedirectOption { redirect: true, confirm: true, ..RedirectOption::default() }));
        let y = self.redirected_to(x);
        self.send_syn(Some(RedirectOption {
            redirect: true,
            port: Some(x),
            hops: 1,
            ..RedirectOption::default()
        }));
        let option = self.receive_syn_ack(y).expect("C");
        assert_eq!(option, RedirectOption { confirm: true, hops: 1, ..RedirectOption::default() });
        self.send(TcpFlags(0), &[], None);
    }

    /// One round trip: SYN to X, ACK to Y.
    pub(crate) fn handover(&mut self) {
        let x = self.server.port();
        self.send_syn(Some(RedirectOption { redirect: true, ..RedirectOption::default() }));
        self.redirected_to(x);
        let moved =
            RedirectOption { redirect: true, confirm: true, port: Some(x), hops: 1, ..Default::default() };
        self.send(TcpFlags(0), &[], Some(moved));
    }

    /// A probe: a SYN on the connection, answered by what the kernel has to say.
    pub(crate) fn probe(&mut self, x: u16) -> Packet {
        self.send_syn(Some(RedirectOption {
            redirect: true,
            port: Some(x),
            hops: 1,
            ..RedirectOption::default()
        }));
        self.receive(self.server.port())
    }

    /// Sends `text` and waits until it has come back.
    pub(crate) fn echo(&mut self, text: &[u8]) {
        self.send(TcpFlags::PSH, text, None);
        let mut back = Vec::new();
        while back.len() < text.len() {
            let packet = self.receive(self.server.port());
            let tcp = packet.tcp().unwrap();
            assert!(
                !tcp.flags().intersects(TcpFlags::RST | TcpFlags::SYN | TcpFlags::FIN),
                "{:?}",
                tcp.flags()
            );
            if tcp.seq() == self.rcv_nxt && !tcp.payload().is_empty() {
                back.extend_from_slice(tcp.payload());
                self.rcv_nxt = self.rcv_nxt + tcp.sequence_len();
                self.send(TcpFlags(0), &[], None);
            }
        }
        assert_eq!(back, text);
    }

    /// Ends it at once.
    pub(crate) fn abort(mut self) {
        self.send(TcpFlags::RST, &[], None);
    }
}

/// A scripted client's address in the family of `vip`.
pub(crate) fn client_of(vip: IpAddr, port: u16) -> SocketAddr {
    let address = if vip.is_ipv4() { "10.9.0.2" } else { "2001:db8:9::2" };
    SocketAddr::new(address.parse().unwrap(), port)
}
