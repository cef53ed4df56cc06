//! The README shows the program of `examples/reqwest.rs`, which works.

// Clippy recognises a module of tests only by this attribute, not by the condition in `lib.rs`.
#![cfg(test)]

use std::{env, fs, io, process::Command, time::Duration};

use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::TcpListener,
    task::spawn_blocking,
};

use tonic::transport::Server;

use crate::{
    proto::token_service_server::TokenServiceServer,
    testing::{FakeBroker, answer},
};

const README: &str = include_str!("../README.md");
const EXAMPLE: &str = include_str!("../examples/reqwest.rs");

#[test]
fn the_readme_shows_the_example() {
    let (_, shown) = README.split_once("```rust,no_run\n").unwrap();
    let (shown, _) = shown.split_once("```").unwrap();
    let program = EXAMPLE.split_once("\n\n").unwrap().1;
    assert_eq!(shown, program);
}

/// The published package does not have the document.
#[test]
fn the_lines_in_the_document_of_clients_are_lines_of_the_example() {
    let document = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/clients.md");
    let Ok(document) = fs::read_to_string(document) else { return };
    let lines = document.split_once("```rust\n").unwrap().1.split_once("```").unwrap().0;
    assert!(!lines.is_empty());
    for line in lines.lines() {
        assert!(EXAMPLE.contains(line), "{line}");
    }
}

/// Serves `broker` on a port, for a program of its own. Returns the endpoint.
async fn listen(broker: FakeBroker) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let incoming = tokio_stream::once(Ok::<_, io::Error>(stream));
            let server = Server::builder().add_service(TokenServiceServer::new(broker.clone()));
            tokio::spawn(server.serve_with_incoming(incoming));
        }
    });
    endpoint
}

/// Answers one request with 200, and returns its head.
async fn serve_one(listener: TcpListener) -> String {
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut head = String::new();
    let mut reader = BufReader::new(&mut stream);
    while !head.ends_with("\r\n\r\n") {
        assert_ne!(reader.read_line(&mut head).await.unwrap(), 0, "{head}");
    }
    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await.unwrap();
    head
}

#[tokio::test(flavor = "multi_thread")]
async fn the_example_sends_a_request_with_the_accounts_token() {
    let api = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut token = answer(1, Duration::from_mins(1), Duration::from_mins(2));
    token.api_base_url = format!("http://{}/v1", api.local_addr().unwrap());
    let endpoint = listen(FakeBroker::new([Ok(token)])).await;
    let request = tokio::spawn(serve_one(api));

    let directory = tempfile::tempdir().unwrap();
    let bearer = directory.path().join("bearer");
    fs::write(&bearer, "tbk_canary\n").unwrap();
    let ran = spawn_blocking(move || {
        let mut example = example();
        for name in ["CA_FILE", "CLIENT_CERT", "CLIENT_KEY"] {
            example.env_remove(format!("TOKEN_BROKER_{name}"));
        }
        example
            .env("TOKEN_BROKER_ENDPOINT", endpoint)
            .env("TOKEN_BROKER_BEARER_FILE", bearer)
            .output()
            .unwrap()
    });
    let ran = ran.await.unwrap();
    assert_eq!(String::from_utf8_lossy(&ran.stdout), "200 OK\n", "{ran:?}");
    let request = request.await.unwrap();
    assert!(request.starts_with("GET /v1/whoami HTTP/1.1\r\n"), "{request}");
    assert!(request.contains("authorization: Bearer canary-1\r\n"), "{request}");
}

/// Returns the command that runs the example, which `cargo test` builds unless it is told to build only this test.
fn example() -> Command {
    let this = env::current_exe().unwrap();
    let program = this.ancestors().nth(2).unwrap().join("examples/reqwest");
    if !program.exists() {
        let cargo = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--locked", "--all-features", "--example", "reqwest"])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status();
        assert!(cargo.unwrap().success());
    }
    Command::new(program)
}
