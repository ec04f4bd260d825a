//! SYN-ACKs made from the SYN alone (`S2`): no state before, none after. Servers' agents and balancers (`B1`) answer alike.

use std::fmt;
use std::hash::Hasher;
use std::net::{IpAddr, SocketAddr};

use siphasher::sip::SipHasher24;

use crate::redirect::reply::can_answer;
use crate::time::Instant;
use crate::wire::{Packet, RedirectOption, Segment, SeqNumber, TcpFlags, TcpOption, TcpView};

/// The window offered. Nothing is ever sent into it: the client goes on at another port.
const WINDOW: u16 = 65_535;
const WINDOW_SCALE: u8 = 7;

/// What a stateless SYN-ACK depends on beside the SYN.
#[derive(Clone, Copy)]
pub struct Answerer {
    exid: u16,
    key: [u8; 16],
    mtu: usize,
}

impl Answerer {
    /// An answerer under an experiment identifier (RFC 6994). `key` is the secret behind its sequence numbers; `mtu` is
    /// that of the segments offered and of the answer, in bytes.
    pub fn new(exid: u16, key: [u8; 16], mtu: usize) -> Answerer {
        Answerer { exid, key, mtu }
    }

    /// The SYN-ACK to `syn`, from the port asked, carrying `option`; `None` if `syn` is not TCP or without room (`W2`):
    /// its token is the last to go where `token_required`, else the first.
    pub fn answer(
        &self,
        now: Instant,
        syn: &Packet,
        option: &RedirectOption,
        token_required: bool,
    ) -> Option<Packet> {
        let tcp = syn.tcp()?;
        let client = SocketAddr::new(syn.source(), tcp.source_port());
        let asked = SocketAddr::new(syn.destination(), tcp.destination_port());
        let mut options = [0; 20];
        let used = self.write_options(&mut options, now, client, asked, tcp);
        let mut answer = Segment {
            source: asked,
            destination: client,
            seq: self.isn(client, asked, tcp.seq()),
            ack: tcp.seq() + 1,
            flags: TcpFlags::SYN | TcpFlags::ACK,
            window: WINDOW,
            options: &options[..used],
            payload: &[],
        }
        .emit();
        answer.insert_redirect_fitting(self.exid, option, token_required, self.mtu).ok()?;
        Some(answer)
    }

    /// The same for every repetition of a SYN, another for every other.
    fn isn(&self, client: SocketAddr, asked: SocketAddr, client_isn: SeqNumber) -> SeqNumber {
        let mut hasher = SipHasher24::new_with_key(&self.key);
        write_address(&mut hasher, client.ip());
        write_address(&mut hasher, asked.ip());
        hasher.write_u16(client.port());
        hasher.write_u16(asked.port());
        hasher.write_u32(client_isn.0);
        SeqNumber(hasher.finish() as u32)
    }

    /// A millisecond clock with an offset for each pair of addresses, as hosts have it (RFC 7323 §5.4).
    fn timestamp(&self, now: Instant, client: IpAddr, server: IpAddr) -> u32 {
        let mut hasher = SipHasher24::new_with_key(&self.key);
        write_address(&mut hasher, client);
        write_address(&mut hasher, server);
        ((now.micros() / 1000) as u32).wrapping_add(hasher.finish() as u32)
    }

    /// MSS, SACK-permitted, timestamps and window scale, each only if the SYN has it: at most 20 bytes.
    fn write_options(
        &self,
        out: &mut [u8; 20],
        now: Instant,
        client: SocketAddr,
        asked: SocketAddr,
        syn: TcpView<'_>,
    ) -> usize {
        let (mut mss, mut sack, mut scale, mut echo) = (false, false, false, None);
        for option in syn.options().map_while(Result::ok) {
            match option {
                TcpOption::MaximumSegmentSize(_) => mss = true,
                TcpOption::SackPermitted => sack = true,
                TcpOption::WindowScale(_) => scale = true,
                TcpOption::Timestamps { value, .. } => echo = Some(value),
                _ => {}
            }
        }
        let mut used = 0;
        let mut put = |bytes: &[u8]| {
            out[used..used + bytes.len()].copy_from_slice(bytes);
            used += bytes.len();
        };
        if mss {
            let [high, low] = self.mss(client.ip()).to_be_bytes();
            put(&[2, 4, high, low]);
        }
        if sack || echo.is_some() {
            put(if sack && echo.is_some() { &[4, 2] } else { &[1, 1] });
        }
        if let Some(echo) = echo {
            put(&[8, 10]);
            put(&self.timestamp(now, client.ip(), asked.ip()).to_be_bytes());
            put(&echo.to_be_bytes());
        } else if sack {
            put(&[4, 2]);
        }
        if scale {
            put(&[1, 3, 3, WINDOW_SCALE]);
        }
        used
    }

    fn mss(&self, client: IpAddr) -> u16 {
        let headers = if client.is_ipv4() { 40 } else { 60 };
        u16::try_from(self.mtu.saturating_sub(headers)).unwrap_or(u16::MAX).max(88)
    }
}

impl fmt::Debug for Answerer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answerer").field("exid", &self.exid).field("mtu", &self.mtu).finish_non_exhaustive()
    }
}

/// Whether a SYN with R may be redirected, or touched at all.
pub fn can_redirect(syn: &Packet) -> bool {
    // A signature or another protocol's token over the segment would not survive a rewrite (C1).
    let bound = |tcp: TcpView<'_>| {
        tcp.options().map_while(Result::ok).any(|option| {
            matches!(option, TcpOption::Md5Signature | TcpOption::Authentication | TcpOption::Multipath)
        })
    };
    syn.fragment().is_none()
        && syn.offload().gso.is_none()
        && syn.source() != syn.destination()
        && syn.source_socket().is_some_and(|client| client.port() != 0 && can_answer(client.ip()))
        && syn.checksum_ok()
        && !syn.tcp().is_some_and(bound)
}

fn write_address(hasher: &mut SipHasher24, address: IpAddr) {
    match address {
        IpAddr::V4(address) => hasher.write(&address.octets()),
        IpAddr::V6(address) => hasher.write(&address.octets()),
    }
}
