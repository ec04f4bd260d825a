//! Real sockets in a temporary directory.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::*;
use crate::config::{Role, Source};

/// Answers `count` with progress, `fail` with an error, `leave` never; everything else with itself.
async fn serve(mut server: Server) {
    loop {
        let Call { line, reply } = server.next().await;
        match line.as_str() {
            "\"count\"" => {
                for n in 1..=3 {
                    assert!(reply.progress(n));
                }
                reply.done("counted");
            }
            "\"fail\"" => reply.refuse("it failed"),
            "\"leave\"" => drop(reply),
            _ => reply.end(parse::<Value>(&line)),
        }
    }
}

fn start(folder: &Path) -> (std::path::PathBuf, tokio::task::JoinHandle<()>) {
    let path = folder.join("control/test.sock");
    let server = Server::bind(path.clone()).unwrap();
    (path, tokio::spawn(serve(server)))
}

async fn raw(path: &Path, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(path).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

#[tokio::test]
async fn requests_are_answered_in_order_with_progress() {
    let folder = tempfile::tempdir().unwrap();
    let (path, _server) = start(folder.path());
    let mut client = Client::connect(&path).await.unwrap();
    client.ask(&"count").await.unwrap();
    client.ask(&json!({ "a": 1 })).await.unwrap();
    for n in 1..=3 {
        assert_eq!(client.next().await.unwrap(), Answer::Progress(json!(n)));
    }
    assert_eq!(client.next().await.unwrap(), Answer::Done(json!("counted")));
    assert_eq!(client.next().await.unwrap(), Answer::Done(json!({ "a": 1 })));
    assert_eq!(client.request(&"fail").await.unwrap(), Answer::Error("it failed".to_owned()));
    let ending = client.request(&"leave").await.unwrap();
    assert_eq!(ending, Answer::Error("the daemon is ending".to_owned()));
}

#[tokio::test]
async fn who_has_asked_may_close_its_half_before_the_answer() {
    let folder = tempfile::tempdir().unwrap();
    let (path, _server) = start(folder.path());
    assert_eq!(raw(&path, b"{}\n\n[1]").await, "{\"done\":{}}\n{\"done\":[1]}\n");
}

#[tokio::test]
async fn what_is_no_request_gets_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let (path, _server) = start(folder.path());
    let answer = raw(&path, b"{\"command\": \n").await;
    assert!(
        answer.starts_with("{\"error\":\"this is no request of this daemon (EOF while parsing"),
        "{answer}"
    );
    let answer = raw(&path, b"\xff\xfe\n{}\n").await;
    assert_eq!(answer, "{\"error\":\"a request is UTF-8 text\"}\n{\"done\":{}}\n");
}

#[tokio::test]
async fn a_request_that_is_too_long_ends_the_connection_and_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let (path, _server) = start(folder.path());
    let mut stream = UnixStream::connect(&path).await.unwrap();
    stream.write_all(&vec![b' '; MAX_REQUEST]).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "{\"error\":\"a request has at most 65536 bytes\"}\n");
    assert_eq!(raw(&path, b"{}\n").await, "{\"done\":{}}\n");
}

#[tokio::test]
async fn connections_are_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let (path, _server) = start(folder.path());
    let mut open = Vec::new();
    for _ in 0..32 {
        let mut client = Client::connect(&path).await.unwrap();
        assert_eq!(client.request(&1).await.unwrap(), Answer::Done(json!(1)));
        open.push(client);
    }
    let mut stream = UnixStream::connect(&path).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "{\"error\":\"32 connections are open already\"}\n");
    open.pop();
    loop {
        let mut client = Client::connect(&path).await.unwrap();
        if let Ok(Answer::Done(_)) = client.request(&1).await {
            break;
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn only_the_owner_can_get_at_the_socket_and_it_goes_with_its_server() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control/test.sock");
    let server = Server::bind(path.clone()).unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
    drop(server);
    assert!(!path.exists());
}

#[tokio::test]
async fn a_stale_socket_is_replaced_and_nothing_else_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("test.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let server = Server::bind(path.clone()).unwrap();
    let error = Server::bind(path.clone()).unwrap_err();
    assert!(error.to_string().contains("another process serves it"), "{error}");
    assert!(path.exists());
    drop(server);
    std::fs::write(&path, "precious").unwrap();
    let error = Server::bind(path.clone()).unwrap_err();
    assert!(error.to_string().contains("something else than a socket"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[tokio::test]
async fn over_tcp_the_same_is_said() {
    let server = Server::listen("127.0.0.1:0".parse().unwrap()).await;
    drop(server.unwrap());
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let server = Server::listen(free).await.unwrap();
    let _serving = tokio::spawn(serve(server));
    let stream = tokio::net::TcpStream::connect(free).await.unwrap();
    let mut client = Client::over_tcp(stream, 100);
    assert_eq!(client.request(&"count").await.unwrap(), Answer::Done(json!("counted")));
    // Longer than what it takes.
    let long = "x".repeat(100);
    assert!(matches!(client.request(&long).await, Err(ClientError::Garbled(_))));
}

#[test]
fn the_control_table_is_checked() {
    #[derive(serde::Deserialize)]
    struct File {
        control: ControlSettings,
    }
    let resolve = |role, text: &str| {
        let source = Source::new("x.toml", text);
        source.parse::<File>().unwrap().control.resolve(role, &source)
    };
    let options = resolve(Role::Balancer, "[control]\nsocket = \"/run/a.sock\"\nquiet_s = 5\n").unwrap();
    assert_eq!(options.socket.as_deref(), Some(Path::new("/run/a.sock")));
    assert_eq!((options.enabled, options.quiet.as_secs()), (true, 5));
    assert!(!resolve(Role::Client, "[control]\nenabled = false\n").unwrap().enabled);
    for (role, text, message) in [
        (Role::Client, "quiet_s = 5", "only a balancer"),
        (Role::Balancer, "quiet_s = 0", "between 1 and"),
        (Role::Balancer, "socket = \"a.sock\"", "whole path"),
        (Role::Balancer, &format!("socket = \"/{}\"", "a".repeat(107)), "at most 107"),
    ] {
        let error = resolve(role, &format!("[control]\n{text}\n")).unwrap_err();
        assert_eq!(error.line(), Some(2), "{error}");
        assert!(error.message().contains(message), "{error}");
    }
}

#[test]
fn numbers_become_counters_named_by_their_way() {
    let text = prometheus("shunt_server", &json!({ "packets": 3, "server": { "answered": 1, "name": "x" } }));
    assert_eq!(
        text,
        "# TYPE shunt_server_packets_total counter\nshunt_server_packets_total 3\n\
         # TYPE shunt_server_server_answered_total counter\nshunt_server_server_answered_total 1\n"
    );
}
