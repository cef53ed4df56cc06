//! The `token-broker` program as a process: its settings, its output, signals to it, and its end.

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
    sync::OnceCell,
    time::timeout,
};

use super::{TEST_TIMEOUT, eventually, http::try_http, note_skipped};

/// The URL of a database that does not exist.
pub(crate) const NO_DATABASE: &str = "postgresql://127.0.0.1:9/nobody?sslmode=disable";

const PROGRAM: &str = env!("CARGO_BIN_EXE_token-broker");

/// Returns a command that runs the program, without the settings in this process's environment.
pub(crate) fn program(arguments: &[&str]) -> Command {
    let mut command = without_settings(PROGRAM);
    command.args(arguments);
    command
}

/// Runs a command line in a shell.
pub(crate) async fn sh(line: &str) -> CommandOutput {
    let mut command = without_settings("sh");
    command.args(["-c", line]);
    run(command, "").await
}

fn without_settings(program: &str) -> Command {
    let is_a_setting = |name: &OsStr| {
        name.to_str().is_some_and(|name| {
            // TOKEN_BROKER_POSTGRES_BIN stays: where Postgres is installed depends on the machine.
            (name.starts_with("TOKEN_BROKER_") && !name.starts_with("TOKEN_BROKER_POSTGRES"))
                || ["DATABASE_URL", "DATABASE_URL_FILE", "RUST_LOG"].contains(&name)
        })
    };
    let mut command = Command::new(program);
    for (name, _) in env::vars_os().filter(|(name, _)| is_a_setting(name)) {
        command.env_remove(name);
    }
    // Intake keys are remembered here, and not in the home directory of the developer.
    command.env("XDG_CONFIG_HOME", concat!(env!("CARGO_TARGET_TMPDIR"), "/config"));
    command
}

/// The exit code and the output of a command that has ended.
#[derive(Debug)]
pub(crate) struct CommandOutput {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl CommandOutput {
    /// Returns the standard output, without whitespace at the end.
    ///
    /// # Panics
    /// When the exit code is not 0.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.stdout.trim_end().to_owned()
    }

    /// Returns the standard output followed by the standard error output.
    ///
    /// # Panics
    /// When the exit code is not 1.
    #[track_caller]
    pub(crate) fn failed(self) -> String {
        assert_eq!(self.code, Some(1), "{self:?}");
        self.stdout + &self.stderr
    }
}

/// Runs `command` until it ends, with `input` as its standard input.
pub(crate) async fn run(mut command: Command, input: &str) -> CommandOutput {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    // Writing fails if the command ends without reading, which is allowed.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes()).await;
    let output = timeout(TEST_TIMEOUT, child.wait_with_output())
        .await
        .expect("the command ends in time")
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    CommandOutput {
        code: output.status.code(),
        stdout: text(output.stdout),
        stderr: text(output.stderr),
    }
}

/// A running process of the program, which leads a process group. Dropping it kills the process.
pub(crate) struct BrokerProcess {
    child: Child,
    pid: Pid,
    output: TempDir,
}

impl BrokerProcess {
    /// Runs `command`, with its output in files.
    pub(crate) fn start(command: Command) -> Self {
        Self::start_with(command, None)
    }

    /// Runs `command` with `stderr` as its standard error, and its standard output in a file.
    pub(crate) fn start_with_stderr(command: Command, stderr: impl Into<Stdio>) -> Self {
        Self::start_with(command, Some(stderr.into()))
    }

    fn start_with(mut command: Command, stderr: Option<Stdio>) -> Self {
        let output = TempDir::new().unwrap();
        let file = |name| fs::File::create(output.path().join(name)).unwrap();
        let in_file = file("stderr").into();
        let child = command
            .stdin(Stdio::null())
            .stdout(file("stdout"))
            .stderr(stderr.unwrap_or(in_file))
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let pid = Pid::from_raw(child.id().unwrap().try_into().unwrap());
        Self { child, pid, output }
    }

    /// Returns its standard output so far.
    pub(crate) fn stdout(&self) -> String {
        fs::read_to_string(self.output.path().join("stdout")).unwrap()
    }

    /// Returns its standard error output so far, which includes the log.
    pub(crate) fn stderr(&self) -> String {
        fs::read_to_string(self.output.path().join("stderr")).unwrap()
    }

    /// Waits until its standard output contains `text`, and returns the standard output.
    pub(crate) async fn wait_for_stdout(&mut self, text: &str) -> String {
        eventually(text, async || {
            self.assert_running();
            Some(self.stdout()).filter(|stdout| stdout.contains(text))
        })
        .await
    }

    /// # Panics
    /// When the process has ended.
    pub(crate) fn assert_running(&mut self) {
        let ended = self.child.try_wait().unwrap();
        assert!(ended.is_none(), "{ended:?}: {}{}", self.stdout(), self.stderr());
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(self.pid, signal).unwrap();
    }

    /// Waits until the process has installed its handler of SIGINT. A SIGINT before that ends the
    /// process at once, or is ignored if the tests themselves run with SIGINT ignored, as background
    /// jobs of a shell do.
    pub(crate) async fn wait_for_signal_handler(&self) {
        eventually("the handler of SIGINT", async || {
            let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap();
            let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
            let caught = u64::from_str_radix(caught.trim(), 16).unwrap();
            (caught & (1 << (Signal::SIGINT as i32 - 1)) != 0).then_some(())
        })
        .await;
    }

    /// Sends SIGINT to the process group, as a terminal does at Ctrl-C.
    pub(crate) fn interrupt(&self) {
        killpg(self.pid, Signal::SIGINT).unwrap();
    }

    /// Returns the number of its open file descriptors. The program hides them from other processes, so
    /// only root can count them; for other users this returns 0.
    pub(crate) fn open_descriptors(&self) -> usize {
        let Ok(descriptors) = fs::read_dir(format!("/proc/{}/fd", self.pid)) else {
            note_skipped("only root can count the file descriptors of the program");
            return 0;
        };
        descriptors.count()
    }

    /// Returns its process id.
    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// Returns its peak resident memory in KiB.
    pub(crate) fn peak_memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        peak.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// Waits until the process ends.
    pub(crate) async fn wait(&mut self) -> ExitStatus {
        let result = timeout(TEST_TIMEOUT, self.child.wait()).await;
        result.unwrap_or_else(|_| panic!("it does not end: {}", self.stderr())).unwrap()
    }

    /// Kills the process with SIGKILL, and waits until it has ended.
    pub(crate) async fn kill(mut self) {
        self.signal(Signal::SIGKILL);
        self.wait().await;
    }
}

/// Whether the tests run under `nohup`, so that the processes that they start ignore SIGHUP.
pub(crate) fn hangup_is_ignored() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap_or("0");
    let ignored = u64::from_str_radix(ignored.trim(), 16).unwrap() & 1 != 0;
    if ignored {
        note_skipped("the tests run under nohup, so SIGHUP is ignored");
    }
    ignored
}

/// A process and its children, paused with SIGSTOP. Dropping this value resumes them.
pub(crate) struct PausedProcesses(Vec<Pid>);

impl PausedProcesses {
    /// Pauses `parent` first, so that it cannot start more children, and then its children.
    pub(crate) fn pause(parent: u32) -> Self {
        let parent = Pid::from_raw(parent.try_into().unwrap());
        kill(parent, Signal::SIGSTOP).unwrap();
        let mut paused = Self(vec![parent]);
        for child in processes().filter(|process| process.parent == parent) {
            // The child may have ended meanwhile.
            if kill(child.pid, Signal::SIGSTOP).is_ok() {
                paused.0.push(child.pid);
            }
        }
        paused
    }
}

impl Drop for PausedProcesses {
    fn drop(&mut self) {
        for pid in &self.0 {
            let _ = kill(*pid, Signal::SIGCONT);
        }
    }
}

struct ProcessEntry {
    pid: Pid,
    parent: Pid,
}

/// Returns the processes of this machine, without zombies.
fn processes() -> impl Iterator<Item = ProcessEntry> {
    fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let pid = entry.ok()?.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name, in parentheses, may contain anything. After it come the state and the parent.
        let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
        let state = fields.next()?;
        let parent = fields.next()?.parse().ok()?;
        (state != "Z")
            .then(|| ProcessEntry { pid: Pid::from_raw(pid), parent: Pid::from_raw(parent) })
    })
}

/// Returns the command lines of the processes that contain the path of `directory`, or whose working
/// directory is below it.
pub(crate) fn processes_using(directory: &Path) -> Vec<String> {
    processes()
        .filter_map(|process| {
            let proc = PathBuf::from(format!("/proc/{}", process.pid));
            let command = fs::read(proc.join("cmdline")).ok()?;
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            let works_there =
                fs::read_link(proc.join("cwd")).is_ok_and(|cwd| cwd.starts_with(directory));
            (works_there || command.contains(directory.to_str()?)).then_some(command)
        })
        .collect()
}

/// Creates a temporary directory that other users may enter, such as the one that runs the embedded
/// Postgres.
pub(crate) fn shared_directory() -> TempDir {
    let directory = tempfile::Builder::new().prefix("tb-it-").tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    directory
}

/// The setup of one broker process: a directory with its keyring and state, two ports, and settings,
/// which the process gets as environment variables.
pub(crate) struct BrokerSetup {
    pub(crate) directory: TempDir,
    pub(crate) grpc: SocketAddr,
    pub(crate) ops: SocketAddr,
    settings: BTreeMap<String, String>,
    /// Whether the keyring's intake key was published.
    published: OnceCell<()>,
}

impl BrokerSetup {
    /// Creates a setup with a new keyring.
    pub(crate) async fn new(database_url: &str, upstream: &str) -> Self {
        let directory = shared_directory();
        let keyring = directory.path().join("keyring");
        let keyring = keyring.to_str().unwrap();
        run(program(&["keys", "generate", "--out", keyring]), "").await.ok();
        Self::with_keyring(directory, keyring, database_url, upstream)
    }

    /// Creates the setup of a further replica: with the same settings and keyring, but its own ports
    /// and state directory.
    pub(crate) fn replica(&self) -> Self {
        let shared = |name: &str| &self.settings[name];
        let mut replica = Self::with_keyring(
            shared_directory(),
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
        let settings = settings.map(owned).into();
        Self { directory, grpc, ops, settings, published: OnceCell::new() }
    }

    pub(crate) fn set(&mut self, name: &str, value: &str) {
        self.settings.insert(name.to_owned(), value.to_owned());
    }

    pub(crate) fn unset(&mut self, name: &str) {
        self.settings.remove(name);
    }

    /// Sets the files with which the broker serves TLS.
    pub(crate) fn set_tls(&mut self, files: &TlsFiles) {
        let settings = [
            ("TLS_CERT", Some(&files.cert)),
            ("TLS_KEY", Some(&files.key)),
            ("TLS_CLIENT_CA", files.client_ca.as_ref()),
            ("TLS_CLIENT_CRL", files.client_crl.as_ref()),
        ];
        for (name, file) in settings {
            if let Some(file) = file {
                self.set(&format!("TOKEN_BROKER_{name}"), file.to_str().unwrap());
            }
        }
    }

    /// Writes the value into a file from which the broker reads the setting, and returns the file.
    pub(crate) fn set_from_file(&mut self, name: &str, value: &str) -> PathBuf {
        let file = self.directory.path().join(name);
        fs::write(&file, format!("{value}\n")).unwrap();
        self.settings.remove(name);
        self.set(&format!("{name}_FILE"), file.to_str().unwrap());
        file
    }

    /// Returns the names and values of all settings.
    pub(crate) fn settings(&self) -> impl Iterator<Item = (&str, &str)> {
        self.settings.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.grpc)
    }

    /// Returns a command that runs the program with these settings.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = program(arguments);
        command.envs(&self.settings);
        command
    }

    /// Runs a command of the program until it ends.
    pub(crate) async fn run(&self, arguments: &[&str]) -> CommandOutput {
        run(self.command(arguments), "").await
    }

    /// Like [`run`](Self::run), with a client secret as the standard input.
    pub(crate) async fn run_with_secret(&self, arguments: &[&str], secret: &str) -> CommandOutput {
        run(self.command(arguments), &format!("{secret}\n")).await
    }

    /// Publishes the keyring's intake key, the first time that this is called.
    pub(crate) async fn publish_key(&self) {
        self.published
            .get_or_init(async || {
                self.run(&["keys", "publish"]).await.ok();
            })
            .await;
    }

    /// Starts a broker, for which the intake key is published, and waits until `/readyz` says that it is ready.
    pub(crate) async fn serve(&self) -> BrokerProcess {
        self.publish_key().await;
        self.until_ready(BrokerProcess::start(self.command(&["serve"]))).await
    }

    /// Waits until `/readyz` says that `process`, which serves with these settings, is ready.
    pub(crate) async fn until_ready(&self, mut process: BrokerProcess) -> BrokerProcess {
        eventually("/readyz", async || {
            process.assert_running();
            (try_http(self.ops, "GET", "/readyz", "").await?.0 == 200).then_some(())
        })
        .await;
        process
    }
}

/// Returns an address with a free port that is below the range from which the system assigns ports. So no
/// other process is given the port before the broker listens on it, or while the broker restarts.
pub(crate) fn free_address() -> SocketAddr {
    static ATTEMPTS: AtomicU16 = AtomicU16::new(0);
    let start = u16::try_from(process::id() % 100).unwrap() * 200;
    loop {
        let port = 10_000 + (start + ATTEMPTS.fetch_add(1, Relaxed)) % 20_000;
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        if TcpListener::bind(address).is_ok() {
            return address;
        }
    }
}
