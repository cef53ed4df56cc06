//! The embedded Postgres: the store can use it, only its user can connect, and it stops when its parent
//! process ends.

use std::{
    env, fs,
    io::Read,
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        process::CommandExt,
    },
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};
use sqlx::{Connection, PgConnection, Row};
use tempfile::TempDir;
use token_broker::{
    dev::postgres::{
        DATABASE, DataLocation, EmbeddedPostgres, EmbeddedPostgresError, GUARD_COMMAND,
        Installation,
    },
    store::Database,
};

use crate::harness::database::start_embedded_postgres;

const PROGRAM: &str = env!("CARGO_BIN_EXE_token-broker");

/// How long a test waits for a condition before it fails, with a margin for a busy machine.
const WAIT_TIMEOUT: Duration = Duration::from_mins(1);

#[tokio::test]
async fn the_store_can_use_it_and_no_files_are_left_when_it_stops() {
    let postgres = start_embedded_postgres().await;
    let (pid, path) = (postgres.pid(), postgres.directory().to_owned());

    let database = Database::new(&postgres.url(DATABASE), "test").unwrap();
    database.migrate().await.unwrap();
    database.check_schema().await.unwrap();

    postgres.stop().await;
    assert!(!runs(pid));
    assert!(!path.exists());
}

#[tokio::test]
async fn only_its_user_can_connect() {
    let postgres = start_embedded_postgres().await;
    let url = postgres.url(DATABASE);

    assert_eq!(query_text(&url, "show listen_addresses").await, "");
    assert_eq!(query_text(&url, "show synchronous_commit").await, "on");
    assert_eq!(query_text(&url, "show server_encoding").await, "UTF8");
    let directory = fs::metadata(postgres.directory()).unwrap();
    assert_eq!(directory.permissions().mode() & 0o777, 0o700);
    assert_ne!(directory.uid(), 0, "root's server runs as another user");
    postgres.stop().await;
}

#[tokio::test]
async fn its_log_contains_errors_without_their_statements() {
    let postgres = start_embedded_postgres().await;
    let mut connection = PgConnection::connect(&postgres.url(DATABASE)).await.unwrap();

    sqlx::raw_sql("select 'canary' from nowhere").execute(&mut connection).await.unwrap_err();

    let log = fs::read_to_string(postgres.directory().join("log")).unwrap();
    assert!(log.contains("\"nowhere\" does not exist") && !log.contains("canary"), "{log}");
    postgres.stop().await;
}

#[tokio::test]
async fn psql_runs_with_the_command_line_that_is_printed() {
    let postgres = start_embedded_postgres().await;
    let line = format!("psql \'{}\' -Atc 'select 6 * 7'", postgres.url(DATABASE));

    // A port in the environment must not lead to another server.
    let output = Command::new("sh").args(["-c", &line]).env("PGPORT", "1").output().unwrap();

    let psql_is_missing = output.status.code() == Some(127);
    assert!(psql_is_missing || output.stdout == b"42\n", "{output:?}");
    postgres.stop().await;
}

#[tokio::test]
async fn two_servers_at_the_same_time_are_independent() {
    let (one, other) = tokio::join!(start_embedded_postgres(), start_embedded_postgres());

    let mut connection = PgConnection::connect(&one.url(DATABASE)).await.unwrap();
    sqlx::raw_sql("create table here ()").execute(&mut connection).await.unwrap();
    let elsewhere =
        query_text(&other.url(DATABASE), "select to_regclass('here') is null || ''").await;

    assert_eq!(elsewhere, "true");
    tokio::join!(one.stop(), other.stop());
}

#[tokio::test]
async fn a_kept_directory_keeps_its_rows_and_can_be_used_by_one_process_at_a_time() {
    let directory = directory();
    let location = DataLocation::Persistent(directory.path().join("a & b/kept"));
    let program = Path::new(PROGRAM);

    let postgres = EmbeddedPostgres::start(location.clone(), program).await.unwrap();
    let mut connection = PgConnection::connect(&postgres.url(DATABASE)).await.unwrap();
    sqlx::raw_sql("create table kept ()").execute(&mut connection).await.unwrap();
    let refused = EmbeddedPostgres::start(location.clone(), program).await.unwrap_err().to_string();
    assert!(refused.contains("another process uses the directory"), "{refused}");
    postgres.stop().await;

    let postgres = EmbeddedPostgres::start(location, program).await.unwrap();
    assert_eq!(
        query_text(&postgres.url(DATABASE), "select to_regclass('kept')::text").await,
        "kept"
    );
    assert_eq!(query_text(&postgres.url(DATABASE), "show fsync").await, "on");
    postgres.stop().await;
}

#[tokio::test]
async fn dropping_it_stops_the_server() {
    let postgres = start_embedded_postgres().await;
    let (pid, path) = (postgres.pid(), postgres.directory().to_owned());
    drop(postgres);
    eventually("the server has ended", || !runs(pid) && !path.exists());
}

#[tokio::test]
async fn signals_to_the_guard_s_process_group_do_not_end_the_server() {
    let postgres = start_embedded_postgres().await;
    let guard = number(postgres.guard_pid().unwrap());

    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        killpg(guard, signal).unwrap();
        assert_eq!(query_text(&postgres.url(DATABASE), "select 'here'").await, "here", "{signal}");
    }
    let path = postgres.directory().to_owned();
    postgres.stop().await;
    assert!(!path.exists());
}

#[tokio::test]
async fn a_killed_server_ends_its_guard_and_leaves_no_directory() {
    let postgres = start_embedded_postgres().await;
    let path = postgres.directory().to_owned();
    kill(number(postgres.pid()), Signal::SIGKILL).unwrap();
    eventually("the directory is gone", || !path.exists());
    postgres.stop().await;
}

#[tokio::test]
async fn the_directory_of_a_killed_guard_is_removed_by_the_next_start() {
    let postgres = start_embedded_postgres().await;
    let path = postgres.directory().to_owned();
    kill(number(postgres.guard_pid().unwrap()), Signal::SIGKILL).unwrap();
    let orphan = postgres.pid();
    postgres.stop().await;

    start_embedded_postgres().await.stop().await;

    assert!(!path.exists());
    // The server would stop by itself, but it may take a minute.
    let _ = kill(number(orphan), Signal::SIGKILL);
}

#[tokio::test]
async fn no_files_are_left_when_the_parent_ends_during_the_start() {
    let installation = Installation::find_or_download().await.unwrap();
    let directory = directory();
    // The delays reach every stage of the start: before the directory exists, during initdb, and around
    // the start of the server.
    for delay in [0, 50, 200, 400, 600, 800] {
        let path = directory.path().join(delay.to_string());
        let mut guard = guard("temporary", installation.programs(), &path);
        thread::sleep(Duration::from_millis(delay));
        drop(guard.stdin.take());
        assert!(guard.wait().unwrap().success());
        assert!(!path.exists(), "ended after {delay} ms");
    }
}

#[tokio::test]
async fn a_guard_without_a_parent_refuses_to_run() {
    let directory = directory();
    let path = directory.path().join("database");
    let output = Command::new(PROGRAM)
        .args([GUARD_COMMAND, "temporary", "/nowhere"])
        .arg(&path)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert_eq!(output.stdout, b"this command is for token-broker's own use\n");
    assert!(!path.exists());
}

#[tokio::test]
async fn a_path_that_is_too_long_for_a_socket_is_refused_before_anything_is_created() {
    let directory = directory();
    let path = directory.path().join("long".repeat(30));

    let error =
        EmbeddedPostgres::start(DataLocation::Persistent(path.clone()), Path::new(PROGRAM)).await;

    assert!(matches!(error, Err(EmbeddedPostgresError::SocketPathTooLong { .. })), "{error:?}");
    assert!(!path.exists());
}

#[tokio::test]
async fn a_missing_program_is_named_in_the_error_and_no_files_are_left() {
    let directory = directory();
    let path = directory.path().join("database");

    let mut guard = guard("temporary", Path::new("/nowhere"), &path);
    let mut output = String::new();
    guard.stdout.take().unwrap().read_to_string(&mut output).unwrap();

    assert!(output.starts_with("/nowhere/initdb cannot be run: "), "{output}");
    assert!(!guard.wait().unwrap().success());
    assert!(!path.exists());
}

#[tokio::test]
async fn a_directory_that_is_no_database_is_refused_with_the_server_s_message() {
    let directory = directory();
    let path = directory.path().join("database");
    fs::create_dir_all(path.join("data")).unwrap();

    let error = EmbeddedPostgres::start(DataLocation::Persistent(path), Path::new(PROGRAM))
        .await
        .unwrap_err();

    let message = error.to_string();
    assert!(
        message.starts_with("the embedded postgres did not start: postgres failed\n"),
        "{message}"
    );
    assert!(message.contains("postgres"), "{message}");
}

/// Starts a guard in the way in which [`EmbeddedPostgres`] does.
fn guard(location_kind: &str, binaries: &Path, path: &Path) -> Child {
    Command::new(PROGRAM)
        .args([GUARD_COMMAND, location_kind])
        .args([binaries, path])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .process_group(0)
        .spawn()
        .unwrap()
}

/// Returns the first column of the only row of `query`, as text.
async fn query_text(url: &str, query: &'static str) -> String {
    let mut connection = PgConnection::connect(url).await.unwrap();
    sqlx::query(query).fetch_one(&mut connection).await.unwrap().get(0)
}

/// Creates a temporary directory that the user of the server can access.
fn directory() -> TempDir {
    let directory = tempfile::Builder::new().prefix("tb-it-").tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    directory
}

/// Returns whether the process is running. A zombie does not count.
fn runs(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let zombie = stat.rsplit_once(')').is_some_and(|(_, rest)| rest.starts_with(" Z"));
    kill(number(pid), None).is_ok() && !zombie
}

fn number(pid: u32) -> Pid {
    Pid::from_raw(i32::try_from(pid).unwrap())
}

#[track_caller]
fn eventually(what: &str, holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < WAIT_TIMEOUT, "not in time: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}
