//! Tokens (§10) between userspace stacks, where no SYN gets in at a service port without one.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{Family, X, Y, client_options, endpoints, server_options};
use shunt_stack::endpoint::{ClientOptions, MoveAt, MoveEvent, ServerOptions};
use shunt_stack::redirect::{
    Continuation, OnRedirect, RedirectOutcome, Require, ServicePorts, TokenKeys, TokenPolicy,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const Z: u16 = 41_002;

fn demanding(family: Family) -> ServerOptions {
    let keys = TokenKeys::parse("0 000102030405060708090a0b0c0d0e0f").unwrap();
    let mut options = server_options(family);
    let other = ServicePorts { address: family.vip(), redirect_port: Z, service_port: Z };
    options.redirect.services.push(other);
    options.redirect.tokens =
        TokenPolicy { keys: Some(Arc::new(keys)), require: Require::Always, ..TokenPolicy::default() };
    options
}

fn client(family: Family, continuation: Continuation) -> ClientOptions {
    let mut options = client_options(family, continuation);
    options.redirect.vips[0].on_redirect = OnRedirect::Follow;
    ClientOptions { move_at: MoveAt::Immediately, connect_timeout: Duration::from_secs(5), ..options }
}

#[tokio::test(start_paused = true)]
async fn o7_a_stream_is_redirected_and_moves_on_by_tokens() {
    for family in [Family::V4, Family::V6] {
        for continuation in [Continuation::Reconnect, Continuation::Handover] {
            let (near, far) = endpoints(client(family, continuation), demanding(family));
            let first = far.listen(family.at(Y)).unwrap();
            let second = far.listen(family.at(Z)).unwrap();
            let mut stream = near.connect(family.at(X)).await.unwrap();
            let (mut at_first, _) = first.accept().await.unwrap();
            let events = stream.control();
            stream.write_all(b"one").await.unwrap();
            at_first.read_exact(&mut [0; 3]).await.unwrap();
            let control = at_first.control();
            let outcome = tokio::spawn(async move { control.redirect(Z).await });
            let (mut at_second, _) = second.accept().await.unwrap();
            let to = family.at(Z);
            assert_eq!(events.next_event().await, Some(MoveEvent::Asked { from: Y, to }));
            assert_eq!(events.next_event().await, Some(MoveEvent::Moved { from: Y, to, offset: 3 }));
            at_first.shutdown().await.unwrap();
            assert_eq!(outcome.await.unwrap().unwrap(), RedirectOutcome::Confirmed);
            stream.write_all(b"two").await.unwrap();
            let mut text = [0; 3];
            at_second.read_exact(&mut text).await.unwrap();
            assert_eq!(&text, b"two");
            let counters = far.server_counters().unwrap();
            assert_eq!((counters.tokens_missing, counters.tokens_mismatch), (0, 0), "{continuation:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn j8_who_was_not_sent_is_not_let_in() {
    for family in [Family::V4, Family::V6] {
        let (near, far) = endpoints(client(family, Continuation::Plain), demanding(family));
        let _listener = far.listen(family.at(Y)).unwrap();
        assert!(near.connect(family.at(Y)).await.is_err());
        let counters = far.server_counters().unwrap();
        assert!(counters.tokens_missing >= 1, "{counters:?}");
    }
}
