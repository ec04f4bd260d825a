//! §10: tokens that were given are shown, and no others.

use super::*;

const Z: u16 = 41_002;
const TOKEN: [u8; 8] = [1, 2, 3, 4, 5, 6, 7, 8];
const OTHER: [u8; 8] = [9; 8];

impl World {
    /// The redirecting SYN-ACK from X with a token.
    fn redirect_with(&self, port: u16, token: Option<[u8; 8]>) -> Packet {
        let option = RedirectOption {
            confirm: true,
            port: Some(port),
            observed: Some(observed_digest(self.local)),
            token,
            ..Default::default()
        };
        self.syn_ack(X, IRS, Some(option))
    }
}

#[test]
fn c5_the_syn_to_the_service_port_shows_the_token_given_and_so_does_its_repetition() {
    for mut w in [world(Continuation::Reconnect), world_v6(Continuation::Reconnect)] {
        assert_eq!(w.open().token, None);
        let redirect = w.redirect_with(Y, Some(TOKEN));
        assert!(w.remote(redirect).is_none());
        let syn = w.sent_one(Towards::Network);
        let option = option_of(&syn).unwrap();
        assert_eq!((option.token, option.port, option.redirect), (Some(TOKEN), Some(X), true));
        w.pass(Duration::from_millis(300));
        assert_eq!(w.sent_one(Towards::Network), syn);
        let again = w.syn(ISS, TSVAL + 1);
        assert_eq!(option_of(&w.local(again).unwrap()).unwrap().token, Some(TOKEN));
        // Redirected again, the token is the new one, or none.
        let next = RedirectOption { port: Some(Z), token: Some(OTHER), ..confirm() };
        let next = w.syn_ack(Y, IRS + 1, Some(next));
        assert!(w.remote(next).is_none());
        let sent = w.sent();
        let syn = sent.iter().find(|sent| ports(&sent.packet).1 == Z).unwrap();
        assert_eq!(option_of(&syn.packet).unwrap().token, Some(OTHER));
    }
}

#[test]
fn a_token_that_was_not_given_is_not_shown() {
    let mut w = world(Continuation::Reconnect);
    w.open();
    let redirect = w.redirect_with(Y, Some(TOKEN));
    w.remote(redirect);
    w.sent_one(Towards::Network);
    let next = w.syn_ack(Y, IRS + 1, Some(RedirectOption { port: Some(Z), ..confirm() }));
    w.remote(next);
    let sent = w.sent();
    let syn = sent.iter().find(|sent| ports(&sent.packet).1 == Z).unwrap();
    assert_eq!(option_of(&syn.packet).unwrap().token, None);
    // Nor by a plain SYN, after a failure.
    let refused = w.reset_from(Z, TcpFlags::ACK, SeqNumber(0), ISS + 1);
    w.remote(refused);
    let plain = w.sent().into_iter().find(|sent| ports(&sent.packet).1 == X).unwrap();
    assert_eq!(option_of(&plain.packet), None);
    // Nor by the next connect.
    w.local.set_port(50_001);
    assert_eq!(w.open().token, None);
}

#[test]
fn c10_a_probe_shows_the_token_and_the_handover_ack_none() {
    let mut w = world(Continuation::Handover);
    w.open();
    let redirect = w.redirect_with(Y, Some(TOKEN));
    assert!(w.remote(redirect).is_some());
    let ack = w.local_segment(TcpFlags::ACK, ISS + 1, &[]);
    assert_eq!(option_of(&w.local(ack).unwrap()).unwrap().token, None);
    w.pass(Duration::from_millis(100));
    let probe = w.sent_one(Towards::Network);
    assert!(probe.tcp().unwrap().is_syn());
    assert_eq!(option_of(&probe).unwrap().token, Some(TOKEN));
}

#[test]
fn w2_a_syn_without_room_for_the_token_goes_without() {
    let mut w = world(Continuation::Reconnect);
    let options = [&syn_options(TSVAL)[..], &[1; 8]].concat();
    let bare = Segment::bare(w.local, w.vip, TcpFlags::SYN);
    let syn = Segment { seq: ISS, options: &options, ..bare }.emit();
    assert!(option_of(&w.local(syn).unwrap()).is_some());
    let redirect = w.redirect_with(Y, Some(TOKEN));
    w.remote(redirect);
    let option = option_of(&w.sent_one(Towards::Network)).unwrap();
    assert_eq!((option.token, option.port), (None, Some(X)));
}
