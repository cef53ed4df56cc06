//! Files that never end or never answer, as every file that a setting or flag names: the command says which it is, and
//! ends.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    time::Duration,
};

use futures_util::future::join_all;
use nix::sys::signal::Signal;
use tokio::{process::Command, time::timeout};

use crate::harness::{
    broker::Fixture,
    certificates::{BROKER_DNS_NAME, TestCa, write_revocation_lists, write_tls_files},
    process::{BrokerProcess, BrokerSetup, NO_DATABASE, run, sh},
};

/// Far longer than the limits, and far shorter than for ever.
const AMPLE: Duration = Duration::from_mins(2);

/// Makes files that cannot be read to an end, below `directory`.
async fn endless(directory: &Path) -> Vec<PathBuf> {
    let pipe = directory.join("pipe");
    sh(&format!("mkfifo -m 600 {}", pipe.display())).await.ok();
    let sparse = directory.join("sparse");
    File::create(&sparse).unwrap().set_len(1 << 40).unwrap();
    let devices = ["/dev/zero", "/dev/full"].map(PathBuf::from);
    [vec![directory.to_owned(), pipe, sparse], devices.to_vec()].concat()
}

/// Runs a command that must fail soon with a text that contains `named`.
async fn failing(what: String, command: Command, named: &str) {
    let ran = timeout(AMPLE, run(command, "")).await.unwrap_or_else(|_| panic!("{what} waits"));
    assert_ne!(ran.code, Some(0), "{what}: {ran:?}");
    let output = ran.stdout + &ran.stderr;
    assert!(output.contains(named), "{what} does not name {named}: {output}");
}

#[tokio::test]
async fn every_file_of_the_broker_is_read_within_limits_and_the_setting_is_named() {
    let mut setup = BrokerSetup::new(NO_DATABASE, "http://127.0.0.1:9").await;
    let ca = TestCa::new("broker");
    let mut files = write_tls_files(setup.directory.path(), &ca.issue(&[BROKER_DNS_NAME]), &[&ca]);
    files.client_crl =
        Some(write_revocation_lists(setup.directory.path(), &[ca.revocation_list(&[], 4096)]));
    setup.set_tls(&files);
    let settings = [
        ("TOKEN_BROKER_KEYRING_FILE", "keyring"),
        ("DATABASE_URL_FILE", "DATABASE_URL_FILE"),
        ("TOKEN_BROKER_UPSTREAM_PROXY_FILE", "TOKEN_BROKER_UPSTREAM_PROXY_FILE"),
        ("TOKEN_BROKER_TLS_CERT", "TOKEN_BROKER_TLS_CERT"),
        ("TOKEN_BROKER_TLS_KEY", "TOKEN_BROKER_TLS_KEY"),
        ("TOKEN_BROKER_TLS_CLIENT_CA", "TOKEN_BROKER_TLS_CLIENT_CA"),
        ("TOKEN_BROKER_TLS_CLIENT_CRL", "TOKEN_BROKER_TLS_CLIENT_CRL"),
        ("TOKEN_BROKER_CONFIG", "cannot read the settings"),
    ];
    let mut runs = Vec::new();
    for file in endless(setup.directory.path()).await {
        for (setting, named) in settings {
            let mut command = setup.command(&["check"]);
            if setting == "DATABASE_URL_FILE" {
                command.env_remove("DATABASE_URL");
            }
            command.env(setting, &file);
            runs.push(failing(format!("{setting}={}", file.display()), command, named));
        }
    }
    join_all(runs).await;
}

#[tokio::test]
async fn every_file_of_an_admin_or_a_caller_is_read_within_limits() {
    let setup = BrokerSetup::new(NO_DATABASE, "http://127.0.0.1:9").await;
    let directory = setup.directory.path();
    let mut runs = Vec::new();
    for file in endless(directory).await {
        let name = file.to_str().unwrap().to_owned();
        for setting in ["BEARER_FILE", "CA_FILE", "CLIENT_CERT", "CLIENT_KEY"] {
            let setting = format!("TOKEN_BROKER_{setting}");
            let mut command = setup.command(&["token", "get", "acme"]);
            command.env("TOKEN_BROKER_ENDPOINT", "https://127.0.0.1:9").env(&setting, &name);
            let name = name.clone();
            runs.push(async move {
                failing(format!("{setting}={name}"), command, &setting).await;
            });
        }
    }
    join_all(runs).await;
}

/// The wait for a file is short, and a signal ends the process at the latest after it.
#[tokio::test]
async fn a_start_that_waits_for_a_file_ends_at_sigterm() {
    let fixture = Fixture::new().await;
    let mut setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
    let ca = TestCa::new("broker");
    setup.set_tls(&write_tls_files(setup.directory.path(), &ca.issue(&[BROKER_DNS_NAME]), &[&ca]));
    let pipe = setup.directory.path().join("pipe");
    sh(&format!("mkfifo -m 600 {}", pipe.display())).await.ok();
    let ends = ["KEYRING_FILE", "TLS_CERT", "TLS_CLIENT_CA", "CONFIG"].map(|setting| {
        let mut command = setup.command(&["serve"]);
        command.env(format!("TOKEN_BROKER_{setting}"), &pipe);
        async move {
            let mut serve = BrokerProcess::start(command);
            serve.signal(Signal::SIGTERM);
            let ended = timeout(AMPLE, serve.wait()).await;
            ended.unwrap_or_else(|_| panic!("{setting}: the process goes on"));
        }
    });
    join_all(ends).await;
    fs::remove_file(&pipe).unwrap();
}
