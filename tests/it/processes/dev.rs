//! The command `dev`: the lines that it prints work, and it leaves nothing behind.

use std::{fs, net::SocketAddr, path::PathBuf, process::Stdio, time::Duration};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use serde_json::Value;
use tempfile::TempDir;
use tokio::{process::Command, time::sleep};
use tokio_stream::once;
use tonic::transport::Endpoint;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::unread_log::full_pipe;
use crate::harness::{
    TEST_TIMEOUT, eventually,
    http::http,
    note_skipped_client_test,
    process::{BrokerProcess, hangup_is_ignored, processes_using, program, sh, shared_directory},
};

/// The directories in which `dev` could leave something, all of them inside one temporary directory.
struct Sandbox(TempDir);

impl Sandbox {
    fn new() -> Self {
        let sandbox = Self(shared_directory());
        for directory in ["temporary", "state", "working"] {
            fs::create_dir(sandbox.0.path().join(directory)).unwrap();
        }
        sandbox
    }

    fn directory(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Starts `dev` and returns at once.
    fn start(&self, arguments: &[&str]) -> BrokerProcess {
        BrokerProcess::start(self.command(arguments))
    }

    /// Returns the command that starts `dev`.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = program(&["dev"]);
        command
            .args(arguments)
            .env("TMPDIR", self.directory("temporary"))
            .env("XDG_STATE_HOME", self.directory("state"))
            .current_dir(self.directory("working"));
        command
    }

    /// Starts `dev` and waits until it has printed its welcome text.
    async fn dev(&self, arguments: &[&str]) -> Dev {
        let mut process = self.start(arguments);
        let printed = process.wait_for_stdout("Ctrl-C ends it").await;
        Dev { process, printed }
    }

    /// Returns what exists at the moment: files, and the processes that use the directories.
    fn contents(&self) -> Vec<String> {
        let mut contents = processes_using(self.0.path());
        for directory in fs::read_dir(self.0.path()).unwrap() {
            for file in fs::read_dir(directory.unwrap().path()).unwrap() {
                contents.push(file.unwrap().path().display().to_string());
            }
        }
        contents
    }
}

struct Dev {
    process: BrokerProcess,
    printed: String,
}

impl Dev {
    /// Returns the printed line that begins with `start` and contains `part`.
    fn line(&self, start: &str, part: &str) -> &str {
        let mut lines = self.printed.lines().map(str::trim);
        lines.find(|line| line.starts_with(start) && line.contains(part)).unwrap()
    }

    fn token_line(&self) -> &str {
        self.line("TOKEN_BROKER_ENDPOINT=", "token get demo-master")
    }

    /// Returns what is printed after a name, up to the next space.
    fn value(&self, name: &str) -> &str {
        self.line(name, "").split_ascii_whitespace().nth(1).unwrap()
    }

    /// Returns the address in the URL that is printed after a name.
    fn address(&self, name: &str) -> SocketAddr {
        let url = self.value(name).strip_prefix("http://").unwrap();
        url.split('/').next().unwrap().parse().unwrap()
    }

    /// Presses Ctrl-C and waits until the process has ended.
    async fn ctrl_c(mut self) {
        self.process.interrupt();
        let status = self.process.wait().await;
        assert_eq!(status.code(), Some(0), "{}", self.process.stderr());
    }
}

#[tokio::test]
async fn the_lines_that_dev_prints_work_unchanged_and_ctrl_c_leaves_nothing() {
    let sandbox = Sandbox::new();
    let dev = sandbox.dev(&["--token-life", "1h"]).await;

    let token = sh(dev.token_line()).await.ok();
    assert_eq!(token.split('.').count(), 3, "a JWT: {token}");
    if sh("command -v grpcurl").await.code == Some(0) {
        let answer = sh(dev.line("grpcurl", "GetToken")).await.ok();
        assert!(answer.contains(&token), "{answer}");
    } else {
        note_skipped_client_test("the line of `dev` with grpcurl, which is not installed");
    }

    // Register an account by plain SQL, and get its token.
    sh(dev.line("psql", "'acme'")).await.ok();
    let token_line = dev.token_line().replace("demo-master", "acme");
    eventually("acme's token", async || {
        let ran = sh(&token_line).await;
        (ran.code == Some(0)).then_some(())
    })
    .await;

    // A wrong secret shows in the status, with a hint.
    sh(dev.line("psql", "SK.wrong")).await.ok();
    let status_line = dev.line("psql", "from account_status");
    let status = eventually("a rejection", async || {
        let status = sh(status_line).await.ok();
        let row = status.lines().find(|line| line.trim_start().starts_with("typo"))?.to_owned();
        row.contains("rejected").then_some(row)
    })
    .await;
    assert!(status.contains("61006") && status.contains("client_secret"), "{status}");
    sh(dev.line("psql", "where name = 'typo'")).await.ok();
    eventually("the right secret", async || {
        let status = sh(status_line).await.ok();
        let mut rows = status.lines().map(str::trim_start);
        rows.find(|row| row.starts_with("typo") && row.contains("fresh")).map(drop)
    })
    .await;

    let events = sh(dev.line("psql", "from audit_events")).await.ok();
    assert!(events.contains("account_registered"), "{events}");
    let (ready, _) = http(dev.address("operators"), "GET", "/readyz", "").await;
    assert_eq!(ready, 200);

    assert!(!sandbox.contents().is_empty(), "the test looks at the right directories");
    dev.ctrl_c().await;
    assert_eq!(sandbox.contents(), [""; 0]);
}

/// Lists the services by one version of the reflection protocol, and requests the description of one.
macro_rules! services {
    ($version:ident, $channel:expr) => {{
        use tonic_reflection::pb::$version::{
            ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
            server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
        };
        let mut client = ServerReflectionClient::new($channel.clone());
        let mut ask = async |request| {
            let request =
                ServerReflectionRequest { host: String::new(), message_request: Some(request) };
            let answers = client.server_reflection_info(once(request)).await.unwrap();
            answers.into_inner().message().await.unwrap().unwrap().message_response.unwrap()
        };
        let symbol = "token_broker.v1.TokenService".to_owned();
        let described = ask(MessageRequest::FileContainingSymbol(symbol)).await;
        assert!(matches!(described, MessageResponse::FileDescriptorResponse(_)), "{described:?}");
        match ask(MessageRequest::ListServices(String::new())).await {
            MessageResponse::ListServicesResponse(list) => {
                list.service.into_iter().map(|service| service.name).collect::<Vec<_>>()
            }
            other => panic!("{other:?}"),
        }
    }};
}

#[tokio::test]
async fn both_versions_of_reflection_and_health_know_the_services() {
    let sandbox = Sandbox::new();
    let dev = sandbox.dev(&[]).await;
    let endpoint = Endpoint::from_shared(format!("http://{}", dev.value("gRPC"))).unwrap();
    let channel = endpoint.connect().await.unwrap();

    let (v1, v1alpha) = (services!(v1, channel), services!(v1alpha, channel));
    for services in [v1, v1alpha] {
        for service in ["token_broker.v1.TokenService", "grpc.health.v1.Health"] {
            assert!(services.iter().any(|it| it == service), "{service} in {services:?}");
        }
    }
    for service in ["", "token_broker.v1.TokenService"] {
        let mut health = HealthClient::new(channel.clone());
        let answer = health.check(HealthCheckRequest { service: service.to_owned() }).await;
        assert_eq!(answer.unwrap().into_inner().status(), ServingStatus::Serving, "{service:?}");
    }
    dev.ctrl_c().await;
    assert_eq!(sandbox.contents(), [""; 0]);
}

#[tokio::test]
async fn sigkill_of_dev_leaves_no_postgres_and_no_directory() {
    let sandbox = Sandbox::new();
    let dev = sandbox.dev(&[]).await;
    assert!(!sandbox.contents().is_empty());

    dev.process.kill().await;

    eventually("nothing is left", async || sandbox.contents().is_empty().then_some(())).await;
}

#[tokio::test]
async fn ctrl_c_during_the_start_of_dev_leaves_nothing() {
    let sandbox = Sandbox::new();
    // The signal arrives while Postgres or the broker starts.
    for delay in [0, 100, 400, 800, 1_200] {
        let mut dev = sandbox.start(&[]);
        dev.wait_for_signal_handler().await;
        sleep(Duration::from_millis(delay)).await;
        dev.interrupt();
        let status = dev.wait().await;
        assert!(status.success(), "after {delay} ms: {status}: {}", dev.stderr());
        eventually("nothing is left", async || sandbox.contents().is_empty().then_some(())).await;
    }
}

#[tokio::test]
async fn two_devs_at_once_do_not_interfere() {
    let sandbox = Sandbox::new();
    let long_lived = ["--token-life", "1h"];
    let (one, other) = tokio::join!(sandbox.dev(&long_lived), sandbox.dev(&long_lived));
    assert_ne!(one.value("gRPC"), other.value("gRPC"));
    assert_ne!(one.value("operators"), other.value("operators"));
    assert_ne!(one.value("upstream"), other.value("upstream"));

    sh(one.line("psql", "'acme'")).await.ok();
    sh(one.token_line()).await.ok();
    let token = sh(other.token_line()).await.ok();
    let accounts = sh(other.line("psql", "from account_status")).await.ok();
    assert!(accounts.contains("demo-master") && !accounts.contains("acme"), "{accounts}");

    // Ending one does not affect the other.
    one.ctrl_c().await;
    assert_eq!(sh(other.token_line()).await.ok(), token);
    other.ctrl_c().await;
    assert_eq!(sandbox.contents(), [""; 0]);
}

#[tokio::test]
async fn dev_with_a_state_directory_continues_where_it_stopped() {
    let (sandbox, kept) = (Sandbox::new(), shared_directory());
    let arguments = ["--state-dir", kept.path().to_str().unwrap(), "--token-life", "1h"];
    let generations = async |dev: &Dev| -> Vec<String> {
        let mut generations = vec![];
        for account in ["demo-master", "demo-agency"] {
            let line = dev.token_line().replace("demo-master", account) + " --json";
            let token: Value = serde_json::from_str(&sh(&line).await.ok()).unwrap();
            generations.push(token["generation"].as_str().unwrap().to_owned());
        }
        generations
    };

    let dev = sandbox.dev(&arguments).await;
    let before = generations(&dev).await;
    let (bearer_line, upstream) = (dev.token_line().to_owned(), dev.address("upstream"));
    dev.ctrl_c().await;
    assert_eq!(sandbox.contents(), [""; 0]);
    assert_eq!(processes_using(kept.path()), [""; 0]);

    let dev = sandbox.dev(&arguments).await;
    assert_eq!(generations(&dev).await, before);
    assert_eq!(dev.address("upstream"), upstream);
    let bearer =
        |line: &str| line.split("BEARER=").nth(1).unwrap().split(' ').next().unwrap().to_owned();
    assert_eq!(bearer(dev.token_line()), bearer(&bearer_line));
    let (_, counts) = http(upstream, "GET", "/simulator/counts", "").await;
    let counts: Value = serde_json::from_str(&counts).unwrap();
    assert_eq!(counts["requests"], 0, "{counts}");
    dev.ctrl_c().await;

    // A crash loses nothing that is kept either.
    let dev = sandbox.dev(&arguments).await;
    dev.process.signal(Signal::SIGKILL);
    drop(dev);
    eventually("nothing runs", async || processes_using(kept.path()).is_empty().then_some(()))
        .await;
    let dev = sandbox.dev(&arguments).await;
    assert_eq!(generations(&dev).await, before);
    dev.ctrl_c().await;
}

#[tokio::test]
async fn ctrl_c_ends_dev_although_nobody_reads_what_it_prints() {
    let sandbox = Sandbox::new();
    let ((_out, stdout), (_err, stderr)) = (full_pipe(), full_pipe());
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut command = sandbox.command(&["--listen", &free.to_string()]);
    command.stdin(Stdio::null()).stdout(stdout).stderr(stderr).process_group(0).kill_on_drop(true);
    let mut dev = command.spawn().unwrap();
    drop(command);
    let channel = Endpoint::from_shared(format!("http://{free}")).unwrap().connect_lazy();
    eventually("dev", async || {
        let answer = HealthClient::new(channel.clone()).check(HealthCheckRequest::default()).await;
        (answer.ok()?.get_ref().status() == ServingStatus::Serving).then_some(())
    })
    .await;
    killpg(Pid::from_raw(dev.id().unwrap().try_into().unwrap()), Signal::SIGINT).unwrap();
    let status = tokio::time::timeout(TEST_TIMEOUT, dev.wait()).await.expect("it ends").unwrap();
    assert_eq!(status.code(), Some(0));
    eventually("nothing to be left", async || sandbox.contents().is_empty().then_some(())).await;
}

#[tokio::test]
async fn a_closed_terminal_ends_dev_and_leaves_nothing() {
    if hangup_is_ignored() {
        return;
    }
    let sandbox = Sandbox::new();
    let mut dev = sandbox.dev(&[]).await;
    // A signal that asks for nothing does not.
    dev.process.signal(Signal::SIGUSR1);
    eventually("its line in the log", async || {
        dev.process.assert_running();
        dev.process.stderr().contains("SIGUSR1").then_some(())
    })
    .await;
    killpg(dev.process.pid(), Signal::SIGHUP).unwrap();
    assert_eq!(dev.process.wait().await.code(), Some(0), "{}", dev.process.stderr());
    eventually("nothing to be left", async || sandbox.contents().is_empty().then_some(())).await;
}
