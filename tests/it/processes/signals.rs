//! Signals to a broker and to `simulate`: those that stop it, the one that reloads, and those that do nothing.

use std::fs;

use nix::sys::signal::Signal;
use tokio::process::Command;

use crate::harness::{
    broker::{Fixture, TestClient},
    certificates::{BROKER_DNS_NAME, TestCa, connect_tls, write_tls_files},
    eventually,
    process::{BrokerProcess, BrokerSetup, free_address, hangup_is_ignored, program, sh},
};

/// Signals that tools send to programs of other kinds, and that would end a process which does not handle them.
const WITHOUT_EFFECT: [(Signal, &str); 10] = [
    (Signal::SIGUSR1, "SIGUSR1"),
    (Signal::SIGUSR2, "SIGUSR2"),
    (Signal::SIGALRM, "SIGALRM"),
    (Signal::SIGIO, "SIGIO"),
    (Signal::SIGXFSZ, "SIGXFSZ"),
    (Signal::SIGXCPU, "SIGXCPU"),
    (Signal::SIGVTALRM, "SIGVTALRM"),
    (Signal::SIGPROF, "SIGPROF"),
    (Signal::SIGSTKFLT, "SIGSTKFLT"),
    // Ignored by the runtime, without a line.
    (Signal::SIGPIPE, ""),
];

async fn until_logged(process: &mut BrokerProcess, text: &str, times: usize) {
    eventually(text, async || {
        process.assert_running();
        (process.stderr().matches(text).count() >= times).then_some(())
    })
    .await;
}

/// Sends a real-time signal, which has no name of its own.
async fn send_real_time(process: &BrokerProcess, number: i32) {
    sh(&format!("kill -{number} {}", process.pid())).await.ok();
}

/// Promise: no signal but those that ask for it ends the broker, and SIGHUP reloads what can be reloaded.
#[tokio::test]
async fn sighup_reloads_and_stray_signals_do_nothing_while_every_call_is_answered() {
    let fixture = Fixture::new().await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let mut setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
    let settings = setup.directory.path().join("settings.toml");
    fs::write(&settings, "drain = '10s'\n").unwrap();
    setup.set("TOKEN_BROKER_CONFIG", settings.to_str().unwrap());
    let mut serve = setup.serve().await;
    let client = TestClient::connect(&setup.endpoint(), &bearer).await;
    eventually("a token", async || client.get("acme").await.ok()).await;

    for (signal, name) in WITHOUT_EFFECT {
        serve.signal(signal);
        if !name.is_empty() {
            until_logged(&mut serve, name, 1).await;
        }
        client.get("acme").await.unwrap();
    }
    for number in (34..=64).filter(|number| *number != 37) {
        send_real_time(&serve, number).await;
        until_logged(&mut serve, &format!("SIGRTMIN+{}", number - 34), 1).await;
    }
    client.get("acme").await.unwrap();
    serve.signal(Signal::SIGHUP);
    until_logged(&mut serve, "SIGHUP", 1).await;
    client.get("acme").await.unwrap();
    fs::write(&settings, "drain = '11s'\nupstream_rate = 7\n").unwrap();
    serve.signal(Signal::SIGHUP);
    until_logged(&mut serve, "drain, upstream_rate", 1).await;
    assert!(serve.stderr().contains("they take effect at the next start"));
    fs::write(&settings, "drain = canary").unwrap();
    serve.signal(Signal::SIGHUP);
    until_logged(&mut serve, "the next start will fail", 1).await;
    assert!(!serve.stderr().contains("canary"), "{}", serve.stderr());
    client.get("acme").await.unwrap();

    serve.signal(Signal::SIGTERM);
    assert_eq!(serve.wait().await.code(), Some(0), "{}", serve.stderr());
    assert_eq!(fixture.audit_events("event = 'stopped'").await.len(), 1);
}

#[tokio::test]
async fn sighup_reloads_the_tls_files_also_those_that_have_not_changed_and_says_what_is_wrong() {
    let fixture = Fixture::new().await;
    let mut setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
    let (first, second) = (TestCa::new("first"), TestCa::new("second"));
    let directory = setup.directory.path().to_owned();
    let files = write_tls_files(&directory, &first.issue(&[BROKER_DNS_NAME]), &[]);
    setup.set_tls(&files);
    let mut serve = setup.serve().await;
    connect_tls(setup.grpc.port(), &first, None).await.unwrap();

    serve.signal(Signal::SIGHUP);
    until_logged(&mut serve, "the TLS files were reloaded", 1).await;
    write_tls_files(&directory, &second.issue(&[BROKER_DNS_NAME]), &[]);
    serve.signal(Signal::SIGHUP);
    until_logged(&mut serve, "the TLS files were reloaded", 2).await;
    eventually("the new certificate", async || {
        connect_tls(setup.grpc.port(), &second, None).await.ok()
    })
    .await;
    fs::write(&files.key, "no key").unwrap();
    serve.signal(Signal::SIGHUP);
    until_logged(&mut serve, "it holds no private key in PEM", 1).await;
    connect_tls(setup.grpc.port(), &second, None).await.unwrap();
}

#[tokio::test]
async fn each_signal_that_asks_for_it_stops_the_broker_with_a_record() {
    let fixture = Fixture::new().await;
    let setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
    let named = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGPWR];
    for (n, signal) in named.into_iter().enumerate() {
        let mut serve = setup.serve().await;
        serve.signal(signal);
        assert_eq!(serve.wait().await.code(), Some(0), "{signal}: {}", serve.stderr());
        let stops = fixture.audit_events("event = 'stopped'").await.len();
        assert_eq!(stops, n + 1, "{signal}");
    }
    let mut serve = setup.serve().await;
    send_real_time(&serve, 37).await;
    assert_eq!(serve.wait().await.code(), Some(0), "SIGRTMIN+3: {}", serve.stderr());
    assert_eq!(fixture.audit_events("event = 'stopped'").await.len(), named.len() + 1);
}

/// A thread that waits for a file which never answers, here a named pipe without a writer, does not keep the process:
/// its successor could not take the state directory over.
#[tokio::test]
async fn a_file_that_never_answers_does_not_keep_a_broker_that_was_stopped() {
    let fixture = Fixture::new().await;
    let mut setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
    let ca = TestCa::new("broker");
    let directory = setup.directory.path().to_owned();
    let files = write_tls_files(&directory, &ca.issue(&[BROKER_DNS_NAME]), &[]);
    setup.set_tls(&files);
    setup.set_from_file("DATABASE_URL", fixture.database.url());
    for name in [files.cert.to_str().unwrap(), directory.join("DATABASE_URL").to_str().unwrap()] {
        let mut serve = setup.serve().await;
        let content = fs::read(name).unwrap();
        fs::remove_file(name).unwrap();
        sh(&format!("mkfifo {name}")).await.ok();
        // SIGHUP reads the file now, and not within a second.
        serve.signal(Signal::SIGHUP);
        until_logged(&mut serve, "SIGHUP", 1).await;
        serve.signal(Signal::SIGTERM);
        assert_eq!(serve.wait().await.code(), Some(0), "{name}: {}", serve.stderr());
        fs::remove_file(name).unwrap();
        fs::write(name, content).unwrap();
    }
}

#[tokio::test]
async fn simulate_ends_with_its_terminal_and_not_under_nohup() {
    let start = |mut command: Command| {
        let address = free_address();
        command.args(["--listen", &address.to_string()]);
        BrokerProcess::start(command)
    };
    if !hangup_is_ignored() {
        let mut simulate = start(program(&["simulate"]));
        simulate.wait_for_stdout("http://").await;
        simulate.signal(Signal::SIGUSR1);
        simulate.signal(Signal::SIGHUP);
        assert_eq!(simulate.wait().await.code(), Some(0), "{}", simulate.stderr());
    }
    let mut nohup = Command::new("nohup");
    nohup.arg(env!("CARGO_BIN_EXE_token-broker")).arg("simulate");
    let mut simulate = start(nohup);
    simulate.wait_for_stdout("http://").await;
    simulate.signal(Signal::SIGHUP);
    simulate.signal(Signal::SIGUSR1);
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    simulate.assert_running();
    simulate.signal(Signal::SIGTERM);
    assert_eq!(simulate.wait().await.code(), Some(0), "{}", simulate.stderr());
}
