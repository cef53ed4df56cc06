//! The real binary as a process: set up by its environment, watched, signalled, and gone with its
//! test.

use std::{
    collections::BTreeMap,
    env,
    ffi::OsStr,
    fs,
    net::{SocketAddr, TcpListener},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{self, ExitStatus, Stdio},
    sync::atomic::{AtomicU16, Ordering::Relaxed},
};

use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};
use tempfile::TempDir;
use token_broker::tls::TlsFiles;
use tokio::{
    io::AsyncWriteExt,
    process::{Child, Command},
    time::timeout,
};

use super::{PATIENCE, eventually, http::try_http};

const PROGRAM: &str = env!("CARGO_BIN_EXE_token-broker");

/// The program, with none of this process's settings in its environment.
pub(crate) fn program(arguments: &[&str]) -> Command {
    let mut command = clean(PROGRAM);
    command.args(arguments);
    command
}

/// Runs a line as a person would type it.
pub(crate) async fn sh(line: &str) -> Ran {
    let mut command = clean("sh");
    command.args(["-c", line]);
    run(command, "").await
}

fn clean(program: &str) -> Command {
    let is_a_setting = |name: &OsStr| {
        name.to_str().is_some_and(|name| {
            // Which Postgres `dev` is to run is a fact about the machine.
            (name.starts_with("TOKEN_BROKER_") && !name.starts_with("TOKEN_BROKER_POSTGRES"))
                || ["DATABASE_URL", "DATABASE_URL_FILE", "RUST_LOG"].contains(&name)
        })
    };
    let mut command = Command::new(program);
    for (name, _) in env::vars_os().filter(|(name, _)| is_a_setting(name)) {
        command.env_remove(name);
    }
    command
}

/// What a command that has ended left.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    /// Its standard output, without the last line's end.
    ///
    /// # Panics
    /// When it failed.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.stdout.trim_end().to_owned()
    }

    /// All that it said.
    ///
    /// # Panics
    /// When it did not fail with exit code 1.
    #[track_caller]
    pub(crate) fn failed(self) -> String {
        assert_eq!(self.code, Some(1), "{self:?}");
        self.stdout + &self.stderr
    }
}

/// Runs `command` to its end, with `input` as its standard input.
pub(crate) async fn run(mut command: Command, input: &str) -> Ran {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    // A command that ends without reading it is none the worse.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes()).await;
    let output = timeout(PATIENCE, child.wait_with_output()).await.expect("it ends").unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ran { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// A process that runs until it is told to end, the leader of its group; killed when dropped.
pub(crate) struct Process {
    child: Child,
    pid: Pid,
    output: TempDir,
}

impl Process {
    pub(crate) fn start(mut command: Command) -> Self {
        let output = TempDir::new().unwrap();
        let file = |name| fs::File::create(output.path().join(name)).unwrap();
        let child = command
            .stdin(Stdio::null())
            .stdout(file("stdout"))
            .stderr(file("stderr"))
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let pid = Pid::from_raw(child.id().unwrap().try_into().unwrap());
        Self { child, pid, output }
    }

    /// What it has said so far.
    pub(crate) fn stdout(&self) -> String {
        fs::read_to_string(self.output.path().join("stdout")).unwrap()
    }

    /// What it has complained of and logged so far.
    pub(crate) fn stderr(&self) -> String {
        fs::read_to_string(self.output.path().join("stderr")).unwrap()
    }

    /// Waits until it has said `words`; all that it has said by then.
    pub(crate) async fn says(&mut self, words: &str) -> String {
        eventually(words, async || {
            self.assert_runs();
            Some(self.stdout()).filter(|said| said.contains(words))
        })
        .await
    }

    fn assert_runs(&mut self) {
        let ended = self.child.try_wait().unwrap();
        assert!(ended.is_none(), "{ended:?}: {}{}", self.stdout(), self.stderr());
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(self.pid, signal).unwrap();
    }

    /// Waits until it handles SIGINT. One that comes before ends it at once, or is lost where the
    /// tests themselves were started with SIGINT ignored, as a shell does in the background.
    pub(crate) async fn takes_signals(&self) {
        eventually("its signal handlers", async || {
            let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap();
            let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
            let caught = u64::from_str_radix(caught.trim(), 16).unwrap();
            (caught & (1 << (Signal::SIGINT as i32 - 1)) != 0).then_some(())
        })
        .await;
    }

    /// What a terminal does at Ctrl-C.
    pub(crate) fn interrupt(&self) {
        killpg(self.pid, Signal::SIGINT).unwrap();
    }

    /// How many files and sockets it has open.
    pub(crate) fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid)).unwrap().count()
    }

    /// The most memory that it has had so far, in KiB.
    pub(crate) fn peak_memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        peak.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// Waits for its end.
    pub(crate) async fn ended(&mut self) -> ExitStatus {
        let ended = timeout(PATIENCE, self.child.wait()).await;
        ended.unwrap_or_else(|_| panic!("it does not end: {}", self.stderr())).unwrap()
    }

    /// Ends it as a crash does, and waits until it is gone.
    pub(crate) async fn crash(mut self) {
        self.signal(Signal::SIGKILL);
        self.ended().await;
    }
}

/// A process that stands still while this lives, with its children.
pub(crate) struct Standstill(Vec<Pid>);

impl Standstill {
    /// Stops `parent`, so that it has no more children, and then those that it has.
    pub(crate) fn of(parent: u32) -> Self {
        let parent = Pid::from_raw(parent.try_into().unwrap());
        kill(parent, Signal::SIGSTOP).unwrap();
        let mut stopped = Self(vec![parent]);
        for child in processes().filter(|process| process.parent == parent) {
            // It may have ended meanwhile.
            if kill(child.pid, Signal::SIGSTOP).is_ok() {
                stopped.0.push(child.pid);
            }
        }
        stopped
    }
}

impl Drop for Standstill {
    fn drop(&mut self) {
        for pid in &self.0 {
            let _ = kill(*pid, Signal::SIGCONT);
        }
    }
}

struct Running {
    pid: Pid,
    parent: Pid,
}

/// All processes of this machine but those that have ended and are not yet waited for.
fn processes() -> impl Iterator<Item = Running> {
    fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let pid = entry.ok()?.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // After the name, which may hold anything: state, parent.
        let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
        let state = fields.next()?;
        let parent = fields.next()?.parse().ok()?;
        (state != "Z").then(|| Running { pid: Pid::from_raw(pid), parent: Pid::from_raw(parent) })
    })
}

/// The command lines of the processes that work in `directory` or were told of it.
pub(crate) fn processes_about(directory: &Path) -> Vec<String> {
    processes()
        .filter_map(|process| {
            let place = PathBuf::from(format!("/proc/{}", process.pid));
            let command = fs::read(place.join("cmdline")).ok()?;
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            let works_there =
                fs::read_link(place.join("cwd")).is_ok_and(|cwd| cwd.starts_with(directory));
            (works_there || command.contains(directory.to_str()?)).then_some(command)
        })
        .collect()
}

/// A directory of the test's own that another user, such as an embedded Postgres's, may enter.
pub(crate) fn open_directory() -> TempDir {
    let directory = tempfile::Builder::new().prefix("tb-it-").tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    directory
}

/// What one broker runs by: a directory with its keyring and its state, two ports, and settings, all
/// of them in the environment.
pub(crate) struct Site {
    pub(crate) directory: TempDir,
    pub(crate) grpc: SocketAddr,
    pub(crate) ops: SocketAddr,
    settings: BTreeMap<String, String>,
}

impl Site {
    /// A site with a new keyring.
    pub(crate) async fn new(database_url: &str, upstream: &str) -> Self {
        let directory = open_directory();
        let keyring = directory.path().join("keyring");
        let keyring = keyring.to_str().unwrap();
        run(program(&["keys", "generate", "--out", keyring]), "").await.ok();
        Self::with_keyring(directory, keyring, database_url, upstream)
    }

    /// Another broker's site beside this one: the same settings and keyring, and its own ports and
    /// state.
    pub(crate) fn replica(&self) -> Self {
        let shared = |name: &str| &self.settings[name];
        let mut replica = Self::with_keyring(
            open_directory(),
            shared("TOKEN_BROKER_KEYRING_FILE"),
            shared("DATABASE_URL"),
            shared("TOKEN_BROKER_UPSTREAM"),
        );
        for (name, value) in &self.settings {
            replica.settings.entry(name.clone()).or_insert_with(|| value.clone());
        }
        replica
    }

    fn with_keyring(directory: TempDir, keyring: &str, database: &str, upstream: &str) -> Self {
        let (grpc, ops) = (free_address(), free_address());
        let state = directory.path().join("state");
        let settings = [
            ("DATABASE_URL", database),
            ("TOKEN_BROKER_UPSTREAM", upstream),
            ("TOKEN_BROKER_KEYRING_FILE", keyring),
            ("TOKEN_BROKER_STATE_DIR", state.to_str().unwrap()),
            ("TOKEN_BROKER_LISTEN", &grpc.to_string()),
            ("TOKEN_BROKER_OPS_LISTEN", &ops.to_string()),
            ("TOKEN_BROKER_ENDPOINT", &format!("http://{grpc}")),
            ("TOKEN_BROKER_MIN_ISSUE_INTERVAL", "100ms"),
            ("TOKEN_BROKER_UPSTREAM_RATE", "1000"),
            ("TOKEN_BROKER_CALLER_RATE", "100000"),
        ];
        let owned = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
        Self { directory, grpc, ops, settings: settings.map(owned).into() }
    }

    pub(crate) fn set(&mut self, name: &str, value: &str) {
        self.settings.insert(name.to_owned(), value.to_owned());
    }

    /// Serves TLS with these files.
    pub(crate) fn set_tls(&mut self, files: &TlsFiles) {
        let settings = [
            ("TLS_CERT", Some(&files.cert)),
            ("TLS_KEY", Some(&files.key)),
            ("TLS_CLIENT_CA", files.client_ca.as_ref()),
        ];
        for (name, file) in settings {
            if let Some(file) = file {
                self.set(&format!("TOKEN_BROKER_{name}"), file.to_str().unwrap());
            }
        }
    }

    /// Has the setting read from a file of that content; the file.
    pub(crate) fn set_by_file(&mut self, name: &str, value: &str) -> PathBuf {
        let file = self.directory.path().join(name);
        fs::write(&file, format!("{value}\n")).unwrap();
        self.settings.remove(name);
        self.set(&format!("{name}_FILE"), file.to_str().unwrap());
        file
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.grpc)
    }

    /// The program with this site's settings.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = program(arguments);
        command.envs(&self.settings);
        command
    }

    /// Runs a command to its end.
    pub(crate) async fn run(&self, arguments: &[&str]) -> Ran {
        run(self.command(arguments), "").await
    }

    /// Runs a command to its end that is given an API KEY.
    pub(crate) async fn run_with_secret(&self, arguments: &[&str], secret: &str) -> Ran {
        run(self.command(arguments), &format!("{secret}\n")).await
    }

    /// Starts a broker and waits until it is ready.
    pub(crate) async fn serve(&self) -> Process {
        let mut process = Process::start(self.command(&["serve"]));
        eventually("a broker that is ready", async || {
            process.assert_runs();
            (try_http(self.ops, "GET", "/readyz", "").await?.0 == 200).then_some(())
        })
        .await;
        process
    }
}

/// A free port below those that the system gives out by itself: no connection takes it before the
/// broker does, nor while the broker is being restarted.
fn free_address() -> SocketAddr {
    static TRIED: AtomicU16 = AtomicU16::new(0);
    let start = u16::try_from(process::id() % 100).unwrap() * 200;
    loop {
        let port = 10_000 + (start + TRIED.fetch_add(1, Relaxed)) % 20_000;
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        if TcpListener::bind(address).is_ok() {
            return address;
        }
    }
}
