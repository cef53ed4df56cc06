//! Runs the lines of the documents that use grpcurl and `grpc_health_probe` unchanged.
//!
//! They name the port 50051 and files in the present directory. So the broker and the tools run in a network of their
//! own, where no other process has that port.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use crate::harness::{
    broker::Fixture,
    note_skipped_client_test,
    process::{BrokerSetup, CommandOutput, sh},
};

/// The document with the recipe for the certificates that the lines use.
const RECIPE: &str = include_str!("../../../docs/tls.md");
/// The tools, each with the other name under which it is installed from its source.
const TOOLS: [(&str, &str); 2] =
    [("grpcurl", "grpcurl"), ("grpc_health_probe", "grpc-health-probe")];

/// A command of a document.
struct DocumentedCommand {
    document: String,
    tool: &'static str,
    command: String,
}

/// The documents: README.md, those in `docs`, and the README of each client.
fn documents() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let in_directory = |name| fs::read_dir(root.join(name)).unwrap().map(|it| it.unwrap().path());
    let clients = in_directory("clients").map(|client| client.join("README.md"));
    let all = in_directory("docs").chain(clients).chain([root.join("README.md")]);
    all.filter(|path| path.extension().is_some_and(|it| it == "md") && path.is_file()).collect()
}

/// Returns the commands of the documents that begin with the name of a tool, each with the lines that continue it.
/// A line with `…` shows what `dev` prints, which its own test runs.
fn documented_commands() -> Vec<DocumentedCommand> {
    let mut found = vec![];
    for document in documents() {
        let text = fs::read_to_string(&document).unwrap();
        let mut lines = text.lines();
        while let Some(line) = lines.next() {
            let first = line.trim_start();
            let first = first.strip_prefix("$ ").unwrap_or(first);
            let Some((tool, _)) =
                TOOLS.iter().find(|(tool, _)| first.starts_with(&format!("{tool} -")))
            else {
                continue;
            };
            let mut command = first.to_owned();
            while command.ends_with('\\') {
                command.push('\n');
                command.push_str(lines.next().unwrap());
            }
            if !command.contains('…') {
                found.push(DocumentedCommand {
                    document: document.display().to_string(),
                    tool,
                    command,
                });
            }
        }
    }
    found
}

/// Makes `directory/bin`, in which the program and the tools have the names that the documents use. Returns the tools
/// that are missing.
async fn install(directory: &Path) -> Vec<&'static str> {
    let bin = directory.join("bin");
    fs::create_dir(&bin).unwrap();
    symlink(env!("CARGO_BIN_EXE_token-broker"), bin.join("token-broker")).unwrap();
    let mut missing = vec![];
    for (tool, other_name) in TOOLS {
        let found = sh(&format!("command -v {tool} || command -v {other_name}")).await;
        match found.code {
            Some(0) => symlink(found.ok(), bin.join(tool)).unwrap(),
            _ => missing.push(tool),
        }
    }
    missing
}

/// Runs `script` in a network of its own that has only the loopback device; `None` if the system permits none.
async fn in_own_network(script: &Path) -> Option<CommandOutput> {
    let enter = ["unshare --net", "unshare --map-root-user --net"];
    for enter in enter {
        if sh(&format!("{enter} ip link set lo up")).await.code == Some(0) {
            let script = script.display();
            let line = format!("{enter} sh -ec 'ip link set lo up; exec bash {script}'");
            return Some(sh(&line).await);
        }
    }
    None
}

#[tokio::test]
async fn each_documented_line_with_grpcurl_or_a_health_probe_works_unchanged() {
    let commands = documented_commands();
    for document in ["README.md", "docs/tls.md"] {
        let is_of = |it: &DocumentedCommand| it.document.ends_with(document);
        assert!(commands.iter().any(is_of), "{document} has no command");
    }
    for (tool, _) in TOOLS {
        assert!(commands.iter().any(|it| it.tool == tool), "no command uses {tool}");
    }

    let fixture = Fixture::new().await;
    if !fixture.database.url().contains("host=/") {
        return note_skipped_client_test(
            "grpcurl's lines: the database is not reached through a Unix socket",
        );
    }
    let mut setup = BrokerSetup::new(fixture.database.url(), "http://127.0.0.1:8080/api/1.1").await;
    let directory = setup.directory.path().to_owned();
    let missing = install(&directory).await;
    for tool in &missing {
        note_skipped_client_test(&format!(
            "the documents' lines with {tool}, which is not installed"
        ));
    }
    for (name, value) in [
        ("LISTEN", "127.0.0.1:50051"),
        ("TLS_CERT", "broker.pem"),
        ("TLS_KEY", "broker.key"),
        ("TLS_CLIENT_CA", "callers-ca.pem"),
        ("TRUST_DOMAIN", "example.com"),
        ("ENDPOINT", "https://localhost:50051"),
        ("CA_FILE", "broker-ca.pem"),
        ("CLIENT_CERT", "billing.pem"),
        ("CLIENT_KEY", "billing.key"),
    ] {
        setup.set(&format!("TOKEN_BROKER_{name}"), value);
    }
    let settings: Vec<_> =
        setup.settings().map(|(name, value)| format!("export {name}='{value}'")).collect();
    let recipe = RECIPE.split("\n```sh\n").nth(1).unwrap().split("\n```\n").next().unwrap();
    let mut script = format!(
        r#"set -euo pipefail
cd '{directory}'
export PATH='{directory}/bin':$PATH
{settings}
stop() {{ kill $(jobs -p) 2>/dev/null; wait; }}
trap stop EXIT
({recipe}) >recipe.out 2>&1
echo '[{{"client_id": "acme", "client_secret": "SK.1"}}]' >accounts.json
token-broker simulate --accounts-file accounts.json >simulate.out 2>&1 &
token-broker keys publish >publish.out 2>&1
token-broker serve >serve.out 2>&1 &
until token-broker health >/dev/null 2>&1; do kill -0 $! || {{ cat serve.out; exit 1; }}; sleep 0.1; done
echo SK.1 | token-broker account add acme --client-id acme --wait >account.out 2>&1
token-broker caller add billing --spiffe-id spiffe://example.com/billing
token-broker caller bearer add billing --out billing.bearer
token-broker caller grant billing acme
exec 2>&1
"#,
        directory = directory.display(),
        settings = settings.join("\n"),
    );
    let usable: Vec<_> = commands.iter().filter(|it| !missing.contains(&it.tool)).collect();
    for command in &usable {
        script.extend(["echo '-- next --'\n", &command.command, "\n"]);
    }
    let file = directory.join("lines.sh");
    fs::write(&file, script).unwrap();
    let Some(ran) = in_own_network(&file).await else {
        return note_skipped_client_test(
            "grpcurl's lines: a process here gets no network of its own",
        );
    };
    let output = ran.ok();
    let answers: Vec<_> = output.split("-- next --\n").skip(1).collect();
    assert_eq!(answers.len(), usable.len(), "{output}");
    for (DocumentedCommand { document, command, .. }, answer) in usable.iter().zip(answers) {
        let expected = match () {
            () if command.contains("GetToken") => "\"accessToken\": \"eyJ",
            () if command.contains("Health/Check") => "\"status\": \"SERVING\"",
            () => "status: SERVING",
        };
        assert!(answer.contains(expected), "{document}: {command}\n{answer}");
    }
}
