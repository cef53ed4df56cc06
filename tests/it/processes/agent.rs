//! `token-broker agent` keeps files with tokens, and no file ever holds a token that has ended.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    sys::signal::Signal,
    unistd::{Gid, Group, geteuid},
};
use serde_json::Value;
use tempfile::TempDir;
use token_broker::{crypto::bearer::Bearer, dev::simulator::Faults, domain::clock::Clock};
use tokio::process::Command;

use crate::harness::{
    broker::Fixture,
    eventually, note_skipped,
    process::{BrokerProcess, BrokerSetup, run},
};

/// A broker process with the account `acme`, a caller, and the directory of an agent.
pub(super) struct Bench {
    pub(super) fixture: Fixture,
    pub(super) setup: BrokerSetup,
    serve: BrokerProcess,
    pub(super) bearer: Bearer,
    tokens: TempDir,
}

impl Bench {
    pub(super) async fn new(token_life: Duration) -> Self {
        let faults = Faults { token_life, ..Faults::default() };
        let fixture = Fixture::with(Clock::System, faults).await;
        let bearer = fixture.add_caller("demo", &["*"]).await;
        fixture.add_account("acme", "id-1", "SK.1").await;
        let mut setup =
            BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
        setup.set_from_file("TOKEN_BROKER_BEARER", bearer.expose());
        let tokens = TempDir::new().unwrap();
        setup.set("TOKEN_BROKER_TOKEN_DIR", tokens.path().to_str().unwrap());
        setup.set("TOKEN_BROKER_ACCOUNTS", "acme");
        let serve = setup.serve().await;
        eventually("the account's first token", async || {
            (fixture.account_status("acme", "state").await == "fresh").then_some(())
        })
        .await;
        Self { fixture, setup, serve, bearer, tokens }
    }

    /// Returns a command that runs the agent, without what only the broker may know.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.setup.command(&[&["agent"], arguments].concat());
        for setting in ["DATABASE_URL", "TOKEN_BROKER_KEYRING_FILE", "TOKEN_BROKER_STATE_DIR"] {
            command.env_remove(setting);
        }
        command
    }

    fn file(&self, name: &str) -> PathBuf {
        self.tokens.path().join(name)
    }

    fn token(&self) -> Option<String> {
        fs::read_to_string(self.file("acme.token")).ok()
    }

    pub(super) fn live_token(&self) -> Option<String> {
        self.fixture.upstream.live_token("id-1")
    }

    /// Waits until the file holds the live token, and returns it.
    async fn until_the_file_is_live(&self) -> String {
        eventually("the live token in its file", async || {
            self.token().filter(|token| self.live_token().as_ref() == Some(token))
        })
        .await
    }

    async fn until_the_file_is_gone(&self) {
        eventually("the removal of the files", async || {
            names(self.tokens.path()).is_empty().then_some(())
        })
        .await;
    }

    async fn reissue(&self) {
        self.fixture.database.sql("update accounts set reissue_requested_at = now()").await;
    }

    /// Asserts that the text contains neither the bearer nor any of the tokens.
    fn assert_no_secret(&self, text: &str, tokens: &[&str]) {
        for secret in tokens.iter().chain([&self.bearer.expose()]) {
            assert!(!text.contains(secret), "{text}");
        }
    }
}

pub(super) fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

pub(super) async fn stop(mut agent: BrokerProcess) -> String {
    agent.signal(Signal::SIGTERM);
    assert_eq!(agent.wait().await.code(), Some(0), "{}", agent.stderr());
    agent.stdout() + &agent.stderr()
}

#[tokio::test]
async fn a_directory_that_is_not_there_is_made_and_one_that_cannot_be_is_named() {
    let bench = Bench::new(Duration::from_mins(10)).await;
    let made = bench.file("made/below");
    let directory = made.to_str().unwrap();
    let ran = run(bench.command(&["--once", "--token-dir", directory]), "").await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(names(&made), ["acme.json", "acme.token"]);
    assert_eq!(fs::metadata(&made).unwrap().permissions().mode() & 0o777, 0o700);

    let below_a_file = made.join("acme.token/tokens");
    let directory = below_a_file.to_str().unwrap();
    let refused = run(bench.command(&["--once", "--token-dir", directory]), "").await.failed();
    assert!(refused.contains(&format!("cannot use the directory {directory}")), "{refused}");

    // A secret in the wrong variable becomes no directory, and is not shown.
    let mut command = bench.command(&["--once", "--token-dir", "SK.canary"]);
    command.current_dir(bench.tokens.path());
    let refused = run(command, "").await.failed();
    assert!(
        refused.contains("cannot use the directory")
            && refused.contains("write ./tokens, not tokens")
            && !refused.contains("canary"),
        "{refused}"
    );
    assert!(!bench.tokens.path().join("SK.canary").exists());
}

#[tokio::test]
async fn an_account_that_is_disabled_at_the_start_is_named_and_has_its_file_when_it_is_enabled() {
    let bench = Bench::new(Duration::from_mins(10)).await;
    bench.fixture.database.sql("update accounts set enabled = false").await;
    let agent = BrokerProcess::start(bench.command(&[]));
    eventually("why there is no token", async || {
        let log = agent.stderr();
        (log.contains("there is no token yet") && log.contains("ACCOUNT_DISABLED")).then_some(())
    })
    .await;
    assert_eq!(bench.token(), None);
    bench.fixture.database.sql("update accounts set enabled = true").await;
    bench.until_the_file_is_live().await;
    stop(agent).await;
}

#[tokio::test]
async fn files_hold_the_live_token_with_their_permissions_and_are_removed_at_the_stop() {
    let mut bench = Bench::new(Duration::from_mins(10)).await;
    bench.setup.set("TOKEN_BROKER_ACCOUNTS", "ac*");
    bench.setup.set("TOKEN_BROKER_TOKEN_MODE", "0640");
    bench.setup.set("RUST_LOG", "trace");
    let agent = BrokerProcess::start(bench.command(&[]));
    let first = bench.until_the_file_is_live().await;
    let mode = fs::metadata(bench.file("acme.token")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o640);

    bench.reissue().await;
    let second =
        eventually("the next token", async || bench.token().filter(|token| *token != first)).await;
    let description = eventually("its description", async || {
        let text = fs::read_to_string(bench.file("acme.json")).ok()?;
        let json: Value = serde_json::from_str(&text).unwrap();
        let stored = bench.fixture.account_status("acme", "generation").await;
        (json["generation"] == stored.as_str()).then_some(text)
    })
    .await;
    let json: Value = serde_json::from_str(&description).unwrap();
    assert_eq!((&json["account"], &json["allowed_ip"]), (&"acme".into(), &"127.0.0.1".into()));
    assert_eq!(json["api_base_url"], bench.fixture.upstream.base_url().as_str());
    assert!(json["expires_at"].as_str().unwrap().ends_with('Z'), "{json}");
    bench.assert_no_secret(&description, &[&first, &second]);

    let output = stop(agent).await;
    bench.assert_no_secret(&output, &[&first, &second]);
    assert!(output.contains("a new token is in its file"), "{output}");
    bench.until_the_file_is_gone().await;
}

/// Only root may give files to any group.
#[tokio::test]
async fn files_and_a_directory_that_is_made_belong_to_the_group_that_the_settings_name() {
    if !geteuid().is_root() {
        note_skipped("only root can give files to another group");
        return;
    }
    let mut bench = Bench::new(Duration::from_mins(10)).await;
    bench.setup.set("TOKEN_BROKER_TOKEN_MODE", "0640");
    let named =
        Group::from_gid(Gid::from_raw(1)).unwrap().expect("systems have a group with number 1");
    for (group, number) in [("54321", 54_321), (&named.name, 1)] {
        let made = bench.file(group);
        let directory = made.to_str().unwrap();
        let arguments = ["--once", "--token-group", group, "--token-dir", directory];
        run(bench.command(&arguments), "").await.ok();
        for (path, mode) in [
            (made.clone(), 0o750),
            (made.join("acme.token"), 0o640),
            (made.join("acme.json"), 0o640),
        ] {
            let found = fs::metadata(&path).unwrap();
            let found = (found.gid(), found.permissions().mode() & 0o7777);
            assert_eq!(found, (number, mode), "{}", path.display());
        }
    }
}

/// A directory with the name of the file stands for all that keeps it from being removed.
#[tokio::test]
async fn a_file_that_cannot_be_removed_is_tried_again_and_at_the_stop_the_exit_code_tells() {
    let bench = Bench::new(Duration::from_mins(10)).await;
    let agent = BrokerProcess::start(bench.command(&[]));
    let obstructed = async || {
        bench.until_the_file_is_live().await;
        // The description is written last.
        eventually("its description", async || bench.file("acme.json").exists().then_some(()))
            .await;
        fs::remove_file(bench.file("acme.token")).unwrap();
        fs::create_dir(bench.file("acme.token")).unwrap();
    };
    obstructed().await;
    bench.fixture.database.sql("update accounts set enabled = false").await;
    eventually("a removal that fails", async || {
        agent.stderr().contains("cannot be removed; it is tried again").then_some(())
    })
    .await;
    fs::remove_dir(bench.file("acme.token")).unwrap();
    fs::write(bench.file("acme.token"), "an ended token").unwrap();
    bench.until_the_file_is_gone().await;

    bench.fixture.database.sql("update accounts set enabled = true").await;
    obstructed().await;
    let mut agent = agent;
    agent.signal(Signal::SIGTERM);
    assert_eq!(agent.wait().await.code(), Some(1), "{}", agent.stderr());
    assert!(agent.stderr().contains("the files of these accounts stay"), "{}", agent.stderr());
}

#[tokio::test]
async fn a_token_whose_description_cannot_be_written_is_removed_too() {
    let bench = Bench::new(Duration::from_mins(10)).await;
    let agent = BrokerProcess::start(bench.command(&[]));
    bench.until_the_file_is_live().await;
    bench.fixture.database.sql("update accounts set enabled = false").await;
    bench.until_the_file_is_gone().await;
    fs::create_dir(bench.file("acme.json")).unwrap();
    bench.fixture.database.sql("update accounts set enabled = true").await;
    bench.until_the_file_is_live().await;
    eventually("that it is tried again", async || {
        (agent.stderr().matches("cannot be written; it is tried again").count() > 1).then_some(())
    })
    .await;
    let mut agent = agent;
    agent.signal(Signal::SIGTERM);
    agent.wait().await;
    assert_eq!(bench.token(), None, "{}", agent.stderr());
}

#[tokio::test]
async fn each_replacement_runs_the_command_and_sends_the_signal() {
    let mut bench = Bench::new(Duration::from_mins(10)).await;
    let marks = TempDir::new().unwrap();
    let mark = marks.path().join("mark");
    let pid_file = marks.path().join("pid");
    bench.setup.set("TOKEN_BROKER_SIGNAL_PID_FILE", pid_file.to_str().unwrap());
    bench.setup.set("TOKEN_BROKER_SIGNAL", "USR1");
    // The program that uses the token writes a line at each signal, until it is killed with its group.
    let mut program = Command::new("sh");
    let signalled = marks.path().join("signalled");
    program.args([
        "-c",
        "trap 'echo signal >> \"$0\"' USR1; echo $$ > \"$1\"; while :; do sleep 0.05; done",
    ]);
    program.args([&signalled, &pid_file]);
    let program = BrokerProcess::start(program);
    eventually("the program's number", async || {
        fs::read_to_string(&pid_file).ok().filter(|pid| pid.ends_with('\n'))
    })
    .await;

    let script = "echo \"$1 $TOKEN_BROKER_ACCOUNT $(cat \"$TOKEN_BROKER_TOKEN_FILE\") \
                  $(tr '\\0' ' ' < /proc/$$/cmdline) ${TOKEN_BROKER_BEARER-no bearer}\" >> \"$0\"";
    let command =
        ["--", "sh", "-c", script, mark.to_str().unwrap(), "an argument; with $characters"];
    let agent = BrokerProcess::start(bench.command(&command));
    let first = bench.until_the_file_is_live().await;
    let line = |token: &str| format!("an argument; with $characters acme {token} ");
    let marked = async |token: &str| {
        eventually("the command", async || {
            fs::read_to_string(&mark).ok().filter(|text| text.contains(&line(token)))
        })
        .await
    };
    let text = marked(&first).await;
    assert!(text.contains("no bearer"), "{text}");
    assert_eq!(text.matches(&first).count(), 1, "the token is on no command line: {text}");
    let signals = || fs::read_to_string(&signalled).unwrap_or_default().lines().count();
    eventually("a signal", async || (signals() >= 1).then_some(())).await;

    bench.reissue().await;
    let second =
        eventually("the next token", async || bench.token().filter(|token| *token != first)).await;
    assert_eq!(marked(&second).await.lines().count(), 2);
    eventually("another signal", async || (signals() >= 2).then_some(())).await;
    program.kill().await;
    stop(agent).await;
}

#[tokio::test]
async fn the_file_goes_when_the_account_is_disabled_or_the_grant_is_taken_away() {
    let bench = Bench::new(Duration::from_mins(10)).await;
    let agent = BrokerProcess::start(bench.command(&[]));
    bench.until_the_file_is_live().await;

    bench.fixture.database.sql("update accounts set enabled = false").await;
    bench.until_the_file_is_gone().await;
    bench.fixture.database.sql("update accounts set enabled = true").await;
    bench.until_the_file_is_live().await;

    bench.fixture.database.sql("delete from grants").await;
    bench.until_the_file_is_gone().await;
    stop(agent).await;
}

#[tokio::test]
async fn while_the_broker_is_away_the_file_stays_to_the_end_of_its_token_and_not_longer() {
    let mut bench = Bench::new(Duration::from_secs(8)).await;
    let agent = BrokerProcess::start(bench.command(&[]));
    bench.until_the_file_is_live().await;
    bench.serve.signal(Signal::SIGKILL);
    bench.serve.wait().await;
    let last = bench.token().expect("the broker's end alone changes nothing");
    bench.until_the_file_is_gone().await;
    assert_eq!(bench.live_token(), Some(last), "the file went before its token ended");

    bench.serve = bench.setup.serve().await;
    bench.until_the_file_is_live().await;
    stop(agent).await;
}

#[tokio::test]
async fn an_agent_takes_over_what_a_killed_one_left_and_removes_what_has_ended() {
    let bench = Bench::new(Duration::from_mins(10)).await;
    let agent = BrokerProcess::start(bench.command(&[]));
    let token = bench.until_the_file_is_live().await;
    eventually("the description", async || bench.file("acme.json").exists().then_some(())).await;
    agent.kill().await;
    assert_eq!(bench.token(), Some(token.clone()), "nobody removed it");

    // One that was killed long ago.
    let ended = fs::read_to_string(bench.file("acme.json")).unwrap().replace("acme", "gone");
    let mut ended: Value = serde_json::from_str(&ended).unwrap();
    ended["expires_at"] = "2026-01-01T00:00:00Z".into();
    fs::write(bench.file("gone.json"), ended.to_string()).unwrap();
    fs::write(bench.file("gone.token"), "an ended token").unwrap();

    let agent = BrokerProcess::start(bench.command(&[]));
    // The agent may be writing the other ones again, so there may be temporary files for a moment.
    eventually("the removal", async || {
        (names(bench.tokens.path()) == ["acme.json", "acme.token"]).then_some(())
    })
    .await;
    assert_eq!(bench.token(), Some(token));
    stop(agent).await;
}

#[tokio::test]
async fn once_writes_the_files_or_says_why_it_cannot() {
    let mut bench = Bench::new(Duration::from_mins(10)).await;
    bench.fixture.add_account("shop", "id-2", "SK.2").await;
    bench.fixture.wait_for_state("shop", "fresh").await;
    let once = ["--once", "--timeout", "30s", "--accounts", "acme,shop"];
    run(bench.command(&once), "").await.ok();
    assert_eq!(names(bench.tokens.path()), ["acme.json", "acme.token", "shop.json", "shop.token"]);
    assert_eq!(bench.token(), bench.live_token());

    let pattern = run(bench.command(&["--once", "--accounts", "acme,s*"]), "").await.failed();
    assert!(pattern.contains("each account must be named"), "{pattern}");

    let missing = run(bench.command(&["--once", "--accounts", "acme,none"]), "").await.failed();
    assert!(missing.contains("none: NOT_FOUND (NO_SUCH_ACCOUNT)"), "{missing}");

    bench.serve.signal(Signal::SIGKILL);
    bench.serve.wait().await;
    let away = run(bench.command(&["--once", "--timeout", "1s"]), "").await.failed();
    assert!(away.contains("is a broker running at http://"), "{away}");
    bench.assert_no_secret(&(pattern + &missing + &away), &[&bench.token().unwrap()]);
}

#[tokio::test]
async fn a_hangup_gets_all_tokens_again_and_wrong_settings_are_told_together() {
    let mut bench = Bench::new(Duration::from_mins(10)).await;
    let agent = BrokerProcess::start(bench.command(&[]));
    bench.until_the_file_is_live().await;
    fs::remove_file(bench.file("acme.token")).unwrap();
    agent.signal(Signal::SIGHUP);
    bench.until_the_file_is_live().await;
    stop(agent).await;

    bench.setup.set("TOKEN_BROKER_TOKEN_MODE", "0644");
    bench.setup.set("TOKEN_BROKER_SIGNAL", "KILL");
    let refused = run(bench.command(&[]), "").await;
    assert_eq!(refused.code, Some(2), "{refused:?}");
    for setting in ["TOKEN_BROKER_TOKEN_MODE", "TOKEN_BROKER_SIGNAL"] {
        assert!(refused.stderr.contains(setting), "{refused:?}");
    }
}
