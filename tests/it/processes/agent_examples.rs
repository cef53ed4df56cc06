//! The agent runs as the examples for systemd and Kubernetes say, and `docs/agent.md` puts in place what they name.

use std::{fmt::Write, fs, os::unix::fs::PermissionsExt, path::Path, time::Duration};

use tempfile::TempDir;
use tokio::process::Command;

use super::agent::{Bench, names, stop};
use crate::harness::{
    eventually, note_skipped,
    process::{BrokerProcess, program, run},
};

const DOCUMENT: &str = include_str!("../../../docs/agent.md");
const UNIT: &str = include_str!("../../../deploy/systemd/token-broker-agent.service");
const PODS: &str = include_str!("../../../deploy/kubernetes/agent.yaml");

/// Returns the values of a key in the unit.
fn unit(key: &str) -> Vec<&'static str> {
    UNIT.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('=')).collect()
}

/// Returns the settings in the document, as keys and values.
fn documented_settings() -> Vec<(&'static str, &'static str)> {
    let lines = DOCUMENT.lines().skip_while(|line| !line.starts_with("    endpoint = "));
    let lines = lines.take_while(|line| line.starts_with("    "));
    lines.map(|line| line.trim().split_once(" = ").unwrap()).collect()
}

/// Returns the paths that the commands in the document have installed, in their order. Asserts that each is in a
/// directory of the system, or in one that an earlier command has made.
fn installed() -> Vec<String> {
    let mut paths: Vec<String> = vec![];
    for command in DOCUMENT.lines().filter_map(|line| line.strip_prefix("    install ")) {
        let [.., source, target] = command.split(' ').collect::<Vec<_>>()[..] else {
            panic!("{command}")
        };
        if command.starts_with("-d ") {
            paths.push(target.to_owned());
            continue;
        }
        let path = match target.strip_suffix('/') {
            Some(directory) => {
                format!("{directory}/{}", Path::new(source).file_name().unwrap().to_str().unwrap())
            }
            None => target.to_owned(),
        };
        let directory = Path::new(&path).parent().unwrap().to_str().unwrap();
        let is_there = ["/usr/local/bin", "/etc/systemd/system"].contains(&directory);
        assert!(is_there || paths.iter().any(|made| made == directory), "{command}");
        paths.push(path);
    }
    paths
}

/// Waits until `directory` has the live token, with these permissions.
async fn until_there(bench: &Bench, directory: &Path, mode: u32) {
    let file = directory.join("acme.token");
    eventually("the live token in its file", async || {
        let token = fs::read_to_string(&file).ok();
        (token.is_some() && token == bench.live_token()).then_some(())
    })
    .await;
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o7777, mode);
}

#[tokio::test]
async fn the_unit_for_systemd_runs_the_agent_with_the_settings_of_the_document() {
    let bench = Bench::new(Duration::from_mins(10)).await;
    let root = TempDir::new().unwrap();
    let directory = |name: &str| {
        let path = root.path().join(name);
        fs::create_dir_all(&path).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (runtime, credentials) = (directory("run"), directory("credentials"));
    let [own_runtime] = unit("RuntimeDirectory")[..] else { panic!() };
    let tokens = directory(&format!("run/{own_runtime}"));
    let [credential] = unit("LoadCredential")[..] else { panic!() };
    let (name, bearer_file) = credential.split_once(':').unwrap();
    fs::write(format!("{credentials}/{name}"), bench.bearer.expose()).unwrap();

    // As the document says which of its settings the unit's file has.
    let mut settings = format!("endpoint = \"{}\"\n", bench.setup.endpoint());
    let mut named = vec![bearer_file.to_owned()];
    for (key, value) in documented_settings() {
        match key {
            "endpoint" | "bearer_file" | "token_dir" | "token_group" => {}
            // The broker of this test has no TLS.
            "ca_file" => named.push(value.trim_matches('"').to_owned()),
            _ => writeln!(settings, "{key} = {value}").unwrap(),
        }
    }
    let file = root.path().join("agent.toml");
    fs::write(&file, settings).unwrap();

    let [start] = unit("ExecStart")[..] else { panic!() };
    let mut words = start.split(' ');
    named.push(words.next().unwrap().to_owned());
    let arguments: Vec<_> = words.collect();
    let ["agent", "--config", config] = arguments[..] else { panic!("{arguments:?}") };
    named.push(config.to_owned());
    let mut command = program(&["agent", "--config", file.to_str().unwrap()]);
    for variable in unit("Environment") {
        let (name, value) = variable.split_once('=').unwrap();
        command.env(name, value.replace("%t", &runtime).replace("%d", &credentials));
    }
    let agent = BrokerProcess::start(command);
    until_there(&bench, Path::new(&tokens), 0o640).await;
    stop(agent).await;
    assert!(names(Path::new(&tokens)).is_empty());

    let installed = installed();
    for path in named {
        assert!(installed.contains(&path), "docs/agent.md does not install {path}: {installed:?}");
    }
}

#[tokio::test]
async fn systemd_knows_all_that_the_unit_says() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/systemd/token-broker-agent.service");
    let mut command = Command::new("systemd-analyze");
    command.args(["verify", "--man=no", file]);
    match command.output().await {
        Ok(output) => {
            // It fails where the program is not installed.
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(!text.contains("nknown") && !text.contains("ignoring"), "{text}");
        }
        Err(error) => note_skipped(&format!("systemd-analyze: {error}")),
    }
}

#[tokio::test]
async fn the_containers_for_kubernetes_run_the_agent_one_after_the_other() {
    let bench = Bench::new(Duration::from_mins(10)).await;
    let root = TempDir::new().unwrap();
    let tokens = root.path().join("tokens");
    let bearer = root.path().join("bearer");
    fs::create_dir(&tokens).unwrap();
    fs::write(&bearer, bench.bearer.expose()).unwrap();

    let data = PODS.lines().skip_while(|line| *line != "data:").skip(1);
    let data = data.take_while(|line| line.starts_with("  "));
    let data: Vec<_> = data.map(|line| line.trim().split_once(": ").unwrap()).collect();
    let value = |name: &str| data.iter().find(|(key, _)| *key == name).unwrap().1;
    let mounted = |path: &str| PODS.contains(&format!("mountPath: {path}\n"));
    assert!(mounted(value("TOKEN_BROKER_TOKEN_DIR")));
    for (name, key) in [("TOKEN_BROKER_BEARER_FILE", "bearer"), ("TOKEN_BROKER_CA_FILE", "ca.crt")]
    {
        let (directory, file) = value(name).rsplit_once('/').unwrap();
        assert!(mounted(directory) && file == key, "{name}");
        let option = format!("--from-file={key}=");
        assert!(PODS.contains(&option) && DOCUMENT.contains(&option), "{option}");
    }

    // The sidecar is an init container too, which is stopped after the program.
    let (_, init) = PODS.split_once("\n      initContainers:\n").unwrap();
    let (init, others) = init.split_once("\n      containers:\n").unwrap();
    let init = format!("\n{init}");
    let containers: Vec<_> = init.split("\n        - name: ").skip(1).collect();
    let [first, sidecar] = containers[..] else { panic!("{init}") };
    let restarts = |container: &str| container.contains("\n          restartPolicy: Always\n");
    assert!(!restarts(first) && restarts(sidecar) && !others.contains("args: [agent"));

    let command = |container: &str| -> Command {
        let mut lines = container.lines();
        let arguments = lines.find_map(|line| line.trim().strip_prefix("args: [")).unwrap();
        let arguments: Vec<_> = arguments.trim_end_matches(']').split(", ").collect();
        let mut command = program(&arguments);
        for (name, value) in &data {
            match *name {
                "TOKEN_BROKER_ENDPOINT" => command.env(name, bench.setup.endpoint()),
                "TOKEN_BROKER_BEARER_FILE" => command.env(name, &bearer),
                "TOKEN_BROKER_TOKEN_DIR" => command.env(name, &tokens),
                // The broker of this test has no TLS.
                "TOKEN_BROKER_CA_FILE" => &mut command,
                _ => command.env(name, value.trim_matches('"')),
            };
        }
        command
    };
    run(command(first), "").await.ok();
    until_there(&bench, &tokens, 0o640).await;
    let agent = BrokerProcess::start(command(sidecar));
    // It takes the file over, and replaces it.
    let first = fs::read_to_string(tokens.join("acme.token")).unwrap();
    bench.fixture.database.sql("update accounts set reissue_requested_at = now()").await;
    eventually("the next token", async || {
        let token = fs::read_to_string(tokens.join("acme.token")).ok();
        (token.as_ref() != Some(&first) && token == bench.live_token()).then_some(())
    })
    .await;
    stop(agent).await;
    assert!(names(&tokens).is_empty());
}
