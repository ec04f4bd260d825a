//! What one segment says against PROTOCOL.md, whoever sent it.

use std::fmt;

use shunt_stack::redirect::ServerConfig;
use shunt_stack::wire::{OptionError, Packet, RedirectOption, TcpFlags, TcpOption, TcpView};

/// Service ports below are not obeyed, unless configured (`C3`).
const LEAST_SERVICE_PORT: u16 = 1024;

/// Something against a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Violation {
    /// `W1`: the option is ignored.
    Ignored(OptionError),
    /// `W4`: it stands behind other options.
    NotInFront,
    /// `C1`: R on a SYN that must stay plain.
    NotPlain(&'static str),
    /// §2: our own option, come back.
    Echo,
    /// §2: a combination that no message has.
    NoMessage,
    /// `S1`: a digest where nobody looks at it.
    Observed,
    /// §10: a token on what leads nowhere.
    Token,
    /// `C3`: a redirect that no client obeys.
    Refused(&'static str),
    /// `C3`: a service port that clients refuse unless configured.
    LowPort(u16),
    /// The transport checksum is wrong.
    Checksum,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Violation::Ignored(error) => write!(f, "W1: {error}: the option is ignored"),
            Violation::NotInFront => write!(f, "W4: the option is not in front of the others"),
            Violation::NotPlain(why) => write!(f, "C1: R on a SYN with {why}"),
            Violation::Echo => {
                write!(f, "§2: an echo by something in the path, no redirect: the path is plain")
            }
            Violation::NoMessage => write!(f, "§2: no message says this"),
            Violation::Observed => write!(f, "S1: O on what is no redirecting SYN-ACK"),
            Violation::Token => write!(f, "§10: T on what leads to no port"),
            Violation::Refused(why) => write!(f, "C3: no client obeys: {why}"),
            Violation::LowPort(port) => write!(f, "C3: port {port} is obeyed only where configured"),
            Violation::Checksum => write!(f, "the checksum is wrong"),
        }
    }
}

/// All that is wrong with a packet.
pub fn violations(packet: &Packet, exid: u16) -> Vec<Violation> {
    let mut found = Vec::new();
    if !packet.checksum_ok() {
        found.push(Violation::Checksum);
    }
    let Some(tcp) = packet.tcp() else { return found };
    match tcp.redirect(exid) {
        Ok(None) => {}
        Err(error) => found.push(Violation::Ignored(error)),
        Ok(Some(option)) => {
            if !is_in_front(&tcp, exid) {
                found.push(Violation::NotInFront);
            }
            option_violations(&tcp, &option, &mut found);
        }
    }
    found
}

fn is_in_front(tcp: &TcpView<'_>, exid: u16) -> bool {
    let first = tcp.options().flatten().find(|option| *option != TcpOption::NoOperation);
    matches!(first, Some(TcpOption::Experiment { exid: id, .. }) if id == exid)
}

fn option_violations(tcp: &TcpView<'_>, option: &RedirectOption, found: &mut Vec<Violation>) {
    let flags = tcp.flags();
    let syn = flags.contains(TcpFlags::SYN);
    let syn_ack = tcp.is_syn_ack();
    let redirects = syn_ack && option.confirm && !option.redirect && option.port.is_some();
    if tcp.is_syn() && option.redirect {
        found.extend(must_stay_plain(tcp).map(Violation::NotPlain));
    }
    match crate::describe::message(flags, option) {
        "echo" => found.push(Violation::Echo),
        "nothing known" | "nothing said" | "confirmation of nothing" => found.push(Violation::NoMessage),
        _ => {}
    }
    if option.observed.is_some() && !redirects {
        found.push(Violation::Observed);
    }
    if option.token.is_some() && option.port.is_none() {
        found.push(Violation::Token);
    }
    if syn && option.address.is_some() {
        found.push(Violation::Refused("it names an address in a handshake (§7)"));
    }
    if let Some(port) = option.port.filter(|_| redirects) {
        if port == tcp.source_port() {
            found.push(Violation::Refused("it leads to the port it comes from"));
        }
        if option.hops >= ServerConfig::DEFAULT_MAX_HOPS {
            found.push(Violation::Refused("too many redirects in one connect"));
        }
        if port < LEAST_SERVICE_PORT {
            found.push(Violation::LowPort(port));
        }
    }
}

/// `C1`.
fn must_stay_plain(tcp: &TcpView<'_>) -> Option<&'static str> {
    if !tcp.payload().is_empty() {
        return Some("data");
    }
    tcp.options().flatten().find_map(|option| match option {
        TcpOption::Md5Signature => Some("an MD5 signature"),
        TcpOption::Authentication => Some("an authentication option"),
        TcpOption::Multipath => Some("an MPTCP option"),
        TcpOption::FastOpen(_) => Some("a fast-open option"),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use shunt_stack::wire::{DEFAULT_EXID, Segment};

    use super::*;

    fn segment(flags: u8, option: RedirectOption, payload: &[u8]) -> Packet {
        let (from, to) = ("10.1.0.2:50000".parse().unwrap(), "203.0.113.10:443".parse().unwrap());
        let mut packet = Segment { payload, ..Segment::bare(from, to, TcpFlags(flags)) }.emit();
        packet.insert_redirect(DEFAULT_EXID, &option, 1500).unwrap();
        packet
    }

    fn found(flags: u8, option: RedirectOption, payload: &[u8]) -> Vec<Violation> {
        violations(&segment(flags, option, payload), DEFAULT_EXID)
    }

    const R: RedirectOption = RedirectOption {
        redirect: true,
        confirm: false,
        port: None,
        hops: 0,
        observed: None,
        address: None,
        token: None,
    };
    const C: RedirectOption = RedirectOption { redirect: false, confirm: true, ..R };

    #[test]
    fn what_the_protocol_says_is_no_violation() {
        assert_eq!(found(2, R, b""), []);
        assert_eq!(found(0x12, RedirectOption { port: Some(41001), observed: Some(1), ..C }, b""), []);
        assert_eq!(found(0x10, RedirectOption { confirm: true, port: Some(443), ..R }, b"data"), []);
    }

    #[test]
    fn each_violation_is_found() {
        assert_eq!(found(2, R, b"data"), [Violation::NotPlain("data")]);
        assert_eq!(found(0x12, R, b""), [Violation::Echo]);
        assert_eq!(found(2, C, b""), [Violation::NoMessage]);
        assert_eq!(found(0x12, RedirectOption { observed: Some(1), ..C }, b""), [Violation::Observed]);
        assert_eq!(found(0x12, RedirectOption { token: Some([0; 8]), ..C }, b""), [Violation::Token]);
        let back = RedirectOption { port: Some(50_000), ..C };
        assert_eq!(found(0x12, back, b""), [Violation::Refused("it leads to the port it comes from")]);
        let hops = RedirectOption { port: Some(41_001), hops: 3, ..C };
        assert_eq!(found(0x12, hops, b""), [Violation::Refused("too many redirects in one connect")]);
        assert_eq!(found(0x12, RedirectOption { port: Some(22), ..C }, b""), [Violation::LowPort(22)]);
        let mut wrong = segment(2, R, b"").bytes().to_vec();
        wrong[36] ^= 1;
        let wrong = Packet::from_slice(&wrong).unwrap();
        assert_eq!(violations(&wrong, DEFAULT_EXID), [Violation::Checksum]);
    }

    #[test]
    fn an_ignored_option_and_one_behind_others_are_pointed_at() {
        let (from, to) = ("10.1.0.2:50000".parse().unwrap(), "203.0.113.10:443".parse().unwrap());
        let with = |options: &[u8]| {
            let packet = Segment { options, ..Segment::bare(from, to, TcpFlags::SYN) }.emit();
            violations(&packet, DEFAULT_EXID)
        };
        let length = Violation::Ignored(OptionError::Length(7));
        assert_eq!(with(&[253, 7, 0x52, 0x44, 1, 0, 0, 0]), [length]);
        assert_eq!(with(&[2, 4, 5, 180, 253, 8, 0x52, 0x44, 1, 0, 0, 0]), [Violation::NotInFront]);
    }
}
