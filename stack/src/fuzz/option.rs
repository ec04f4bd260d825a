//! Target `option`: the redirect option by itself and in a segment, rules `W1` to `W4`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::draw::Draw;
use super::invariants::{Snapshot, same, well_made};
use crate::wire::{DEFAULT_EXID, NoRoom, OptionError, Packet, RedirectOption, Segment, TcpFlags, TcpOptions};

/// Kind of the shared experimental option (RFC 6994).
const KIND: u8 = 253;
/// Option bytes that a segment has.
const ROOM: usize = 40;

/// The bytes as an option; then, read as values, an option that is put into a segment with any other options and taken
/// out again, which must restore every byte.
///
/// # Panics
/// If that does not hold, or what `W1` to `W4` say.
pub fn option(data: &[u8]) {
    bare(data);
    framed(data);
    in_a_segment(&mut Draw::new(data));
}

/// What parses is written as it was read.
fn bare(bytes: &[u8]) {
    let Ok(option) = RedirectOption::parse(bytes) else { return };
    let exid = u16::from_be_bytes([bytes[2], bytes[3]]);
    if bytes[0] == KIND {
        assert_eq!(emitted(&option, exid), bytes);
    }
}

/// The same with kind, length and identifier made right, so that the flags are what is tried.
fn framed(data: &[u8]) {
    let mut bytes = data.get(..data.len().min(ROOM)).unwrap_or_default().to_vec();
    if let [kind, length, high, low, ..] = &mut bytes[..] {
        [*high, *low] = DEFAULT_EXID.to_be_bytes();
        (*kind, *length) = (KIND, 0);
        bytes[1] = bytes.len() as u8;
    }
    bare(&bytes);
    match RedirectOption::parse(&bytes) {
        Ok(option) => {
            assert_eq!(option.len(), bytes.len());
            assert_ne!(option.port, Some(0));
        }
        // W1: what is wrong with it, and only that.
        Err(OptionError::Duplicate | OptionError::Malformed) => panic!("no error of one option"),
        Err(_) => {}
    }
}

fn emitted(option: &RedirectOption, exid: u16) -> Vec<u8> {
    let mut out = [0; 36];
    let used = option.emit(exid, &mut out);
    assert_eq!((used, used % 4), (option.padded_len(), 0));
    out[used - option.len()..used].to_vec()
}

fn values(draw: &mut Draw<'_>) -> RedirectOption {
    let [flags, more] = [draw.byte(), draw.byte()];
    let value = draw.double();
    let address = match more >> 4 & 3 {
        1 => Some(IpAddr::V4(Ipv4Addr::from(value))),
        2 => Some(IpAddr::V6(Ipv6Addr::from(u128::from(value) << 77))),
        _ => None,
    };
    RedirectOption {
        redirect: flags & 1 != 0,
        confirm: flags & 2 != 0,
        port: Some(value as u16).filter(|port| *port != 0 && flags & 4 != 0),
        hops: more & 7,
        observed: (more & 8 != 0).then_some((value >> 16) as u16),
        address,
        token: (flags & 8 != 0).then_some(u64::from(value).to_be_bytes()),
    }
}

fn in_a_segment(draw: &mut Draw<'_>) {
    let option = values(draw);
    let control = draw.byte();
    let mtu = usize::from(draw.byte()) * 8;
    let (source, destination): (IpAddr, IpAddr) = if control & 0x80 == 0 {
        (Ipv4Addr::new(10, 1, 0, 2).into(), Ipv4Addr::new(203, 0, 113, 10).into())
    } else {
        (Ipv6Addr::LOCALHOST.into(), Ipv6Addr::from(u128::from(control)).into())
    };
    let others = draw.bytes(ROOM);
    let others = &others[..others.len() / 4 * 4];
    let payload = draw.bytes(255);
    let bare = Segment::bare(
        SocketAddr::new(source, 50_000),
        SocketAddr::new(destination, 443),
        TcpFlags(control & 0x7f),
    );
    let packet = Segment { options: others, payload, ..bare }.emit();
    well_made(&packet);
    if option.port != Some(0) {
        inserted_and_stripped(&packet, &option, mtu);
        fitted(&packet, &option, mtu, control & 1 != 0);
    }
    stripped(&packet);
}

/// `W4`: in front of the others, all other bytes exact; and gone again.
fn inserted_and_stripped(original: &Packet, option: &RedirectOption, mtu: usize) {
    let mut packet = original.clone();
    let have = room(original, mtu);
    let result = packet.insert_redirect(DEFAULT_EXID, option, mtu);
    let need = option.padded_len();
    if need > have {
        assert_eq!((result, &packet), (Err(NoRoom { need, have }), original));
        return;
    }
    assert_eq!(result, Ok(()));
    Snapshot::of(original).check(&packet, mtu);
    well_made(&packet);
    let (Some(before), Some(after)) = (original.tcp(), packet.tcp()) else { panic!("no longer TCP") };
    assert_eq!(&after.option_bytes()[need..], before.option_bytes());
    assert_eq!(after.payload(), before.payload());
    assert_eq!((after.seq(), after.ack(), after.flags()), (before.seq(), before.ack(), before.flags()));
    assert_eq!((after.window(), packet.ports()), (before.window(), original.ports()));
    assert_eq!(packet.len(), original.len() + need);
    let alone = !copies(original);
    if alone && well_formed(original) {
        assert_eq!(after.redirect(DEFAULT_EXID), Ok(Some(*option)));
    }
    if alone {
        assert!(packet.strip_redirect(DEFAULT_EXID));
        assert!(same(&packet, original), "{packet:?} is not {original:?}");
    } else if well_formed(original) {
        assert_eq!(after.redirect(DEFAULT_EXID), Err(OptionError::Duplicate));
    }
}

fn room(packet: &Packet, mtu: usize) -> usize {
    let free = packet.tcp().map_or(0, |tcp| ROOM - tcp.option_bytes().len());
    free.min(mtu.saturating_sub(packet.len()))
}

/// `W2`: first T (or O, where tokens are required), then the other, then the option.
fn fitted(original: &Packet, option: &RedirectOption, mtu: usize, token_required: bool) {
    let bare = RedirectOption { token: None, observed: None, ..*option };
    let middle = if token_required {
        RedirectOption { observed: None, ..*option }
    } else {
        RedirectOption { token: None, ..*option }
    };
    let have = room(original, mtu);
    let expected = [*option, middle, bare].into_iter().find(|option| option.padded_len() <= have);
    let mut packet = original.clone();
    let result = packet.insert_redirect_fitting(DEFAULT_EXID, option, token_required, mtu);
    assert_eq!(result.is_ok(), expected.is_some());
    match expected {
        Some(expected) if !copies(original) && well_formed(original) => {
            let found = packet.tcp().map(|tcp| tcp.redirect(DEFAULT_EXID));
            assert_eq!(found, Some(Ok(Some(expected))));
        }
        Some(_) => {}
        None => assert_eq!(&packet, original),
    }
    Snapshot::of(original).check(&packet, mtu);
}

/// Stripping leaves none, and nothing but none.
fn stripped(original: &Packet) {
    let mut packet = original.clone();
    let found = packet.strip_redirect(DEFAULT_EXID);
    assert_eq!(found, copies(original));
    assert!(!copies(&packet), "{original:?} -> {packet:?}");
    if !found {
        assert_eq!(&packet, original);
    }
    Snapshot::of(original).check(&packet, 0);
    if well_formed(original) {
        let kept = |packet: &Packet| -> Vec<Vec<u8>> {
            let other = |bytes: &[u8]| bytes[0] != 1 && !is_ours(bytes);
            split(packet).into_iter().filter(|bytes| other(bytes)).collect()
        };
        assert_eq!(kept(&packet), kept(original));
    }
    packet.blank_fast_open();
    Snapshot::of(original).check(&packet, 0);
}

fn is_ours(option: &[u8]) -> bool {
    option[0] == KIND && option.get(2..4) == Some(&DEFAULT_EXID.to_be_bytes()[..])
}

fn copies(packet: &Packet) -> bool {
    split(packet).iter().any(|option| is_ours(option))
}

fn well_formed(packet: &Packet) -> bool {
    packet.tcp().is_some_and(|tcp| tcp.options().all(|option| option.is_ok()))
}

/// The options as an independent walk finds them, up to the end or the first malformed one.
fn split(packet: &Packet) -> Vec<Vec<u8>> {
    let Some(tcp) = packet.tcp() else { return Vec::new() };
    let mut rest = tcp.option_bytes();
    let mut found = Vec::new();
    loop {
        let length = match rest {
            [] | [0, ..] => break,
            [1, ..] => 1,
            [_, length, ..] if (2..=rest.len()).contains(&usize::from(*length)) => usize::from(*length),
            _ => break,
        };
        found.push(rest[..length].to_vec());
        rest = &rest[length..];
    }
    let iterated = TcpOptions::new(tcp.option_bytes()).flatten().count();
    assert_eq!(found.len(), iterated);
    found
}
