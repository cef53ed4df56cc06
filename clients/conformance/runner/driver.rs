//! A driver: the program under test, which this runner asks over its standard input and output.

use std::{
    collections::HashMap,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use parking_lot::Mutex;
use serde_json::{Map, Value};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    process::{Child, ChildStdin, ChildStdout, Command},
    sync::oneshot,
    task::JoinHandle,
    time::timeout,
};

use super::expect::Answer;

/// How long a driver may take for its start, which for some languages includes compiling.
const START: Duration = Duration::from_mins(1);
/// How long a driver may take to end after the end of its input.
const END: Duration = Duration::from_secs(10);
/// How long the runner waits for any answer.
const LONGEST: Duration = Duration::from_secs(90);

/// The keys of a request.
pub(crate) type Keys = Map<String, Value>;

/// What has been asked and not answered, by the `id`.
type Waiting = Arc<Mutex<Option<HashMap<u64, oneshot::Sender<(Value, Instant)>>>>>;

/// A driver to start, and its executable.
#[derive(Clone, Debug)]
pub(crate) struct Language {
    /// The language. If it has several drivers, `-` and what distinguishes this one follow.
    pub(crate) name: String,
    pub(crate) executable: PathBuf,
}

/// A running driver, which leads a process group. Dropping it kills the group.
pub(crate) struct Driver {
    child: Child,
    /// Its process group, until it has ended.
    group: Option<Pid>,
    /// `None` once the input has ended.
    stdin: tokio::sync::Mutex<Option<ChildStdin>>,
    reader: JoinHandle<()>,
    waiting: Waiting,
    /// What it has answered, one line each.
    answers: Arc<Mutex<Vec<String>>>,
    log: PathBuf,
    last_id: AtomicU64,
    /// The names of its adapters.
    pub(crate) adapters: Vec<String>,
}

/// A request whose answer has not been waited for.
pub(crate) struct Pending {
    pub(crate) id: u64,
    sent: Instant,
    /// With the time at which it came.
    answer: oneshot::Receiver<(Value, Instant)>,
}

impl Driver {
    /// Starts the driver, with its standard error in `log`, and says hello.
    pub(crate) async fn start(language: &Language, log: PathBuf) -> anyhow::Result<Self> {
        let mut child = Command::new(&language.executable)
            .env_clear()
            .envs(std::env::vars_os().filter(|(name, _)| !is_setting(&name.to_string_lossy())))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(&log)?)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {}", language.executable.display()))?;
        let stdin = child.stdin.take().context("no standard input")?;
        let stdout = child.stdout.take().context("no standard output")?;
        let waiting: Waiting = Arc::new(Mutex::new(Some(HashMap::new())));
        let answers = Arc::<Mutex<_>>::default();
        let reader = tokio::spawn(read_answers(stdout, waiting.clone(), answers.clone()));
        let pid = child.id().context("the driver has ended")?;
        let mut driver = Self {
            child,
            group: Some(Pid::from_raw(pid.try_into()?)),
            stdin: Some(stdin).into(),
            reader,
            waiting,
            answers,
            log,
            last_id: AtomicU64::new(0),
            adapters: vec![],
        };
        let hello = driver.send("hello", Keys::new()).await?;
        let hello = timeout(START, hello.answer()).await.context("no answer to `hello`")??;
        let hello = hello.result.map_err(|error| anyhow::anyhow!("`hello`: {error}"))?;
        let expected = language.name.split('-').next().unwrap_or_default();
        ensure!(hello["language"] == expected, "`language` is {}", hello["language"]);
        driver.adapters =
            serde_json::from_value(hello["adapters"].clone()).context("`adapters`")?;
        Ok(driver)
    }

    /// Sends a request.
    pub(crate) async fn send(&self, op: &str, mut keys: Keys) -> anyhow::Result<Pending> {
        let id = self.last_id.fetch_add(1, Relaxed) + 1;
        keys.insert("id".to_owned(), id.into());
        keys.insert("op".to_owned(), op.into());
        let (sender, answer) = oneshot::channel();
        self.waiting.lock().as_mut().context("the driver has ended")?.insert(id, sender);
        let line = format!("{}\n", Value::Object(keys));
        let sent = Instant::now();
        let mut stdin = self.stdin.lock().await;
        let stdin = stdin.as_mut().context("the driver's input has ended")?;
        stdin.write_all(line.as_bytes()).await.context("the driver has ended")?;
        stdin.flush().await.context("the driver has ended")?;
        Ok(Pending { id, sent, answer })
    }

    /// Sends a request and waits for the answer.
    pub(crate) async fn ask(&self, op: &str, keys: Keys) -> anyhow::Result<Answer> {
        self.send(op, keys).await?.answer().await
    }

    /// Returns what must contain no secret: the standard error output, and all answers without their tokens.
    pub(crate) fn printed(&self) -> anyhow::Result<String> {
        let mut printed = String::from_utf8_lossy(&fs::read(&self.log)?).into_owned();
        for line in &*self.answers.lock() {
            let mut answer: Value =
                serde_json::from_str(line).unwrap_or_else(|_| line.as_str().into());
            remove_tokens(&mut answer);
            printed.push('\n');
            printed.push_str(&answer.to_string());
        }
        Ok(printed)
    }

    /// Writes the answers into a file, for whoever looks for the reason of a failure.
    pub(crate) fn write_answers(&self, file: &Path) -> anyhow::Result<()> {
        Ok(fs::write(file, self.answers.lock().join("\n"))?)
    }

    /// Ends the driver's input, and waits until it has ended well.
    pub(crate) async fn end(&mut self) -> anyhow::Result<()> {
        *self.stdin.get_mut() = None;
        let status = timeout(END, self.child.wait()).await;
        let status = status.context("the driver does not end after the end of its input")??;
        self.group = None;
        ensure!(status.success(), "the driver ended with {status}");
        self.reader.abort();
        Ok(())
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // A driver may be a script whose child is the program.
        if let Some(group) = self.group {
            let _ = killpg(group, Signal::SIGKILL);
        }
    }
}

impl Pending {
    /// Waits for the answer.
    pub(crate) async fn answer(self) -> anyhow::Result<Answer> {
        let answer = timeout(LONGEST, self.answer).await;
        let (answer, at) =
            answer.context("no answer")?.context("the driver ended without an answer")?;
        let took = at - self.sent;
        let Value::Object(mut fields) = answer else { bail!("the answer is no object") };
        match (fields.remove("ok"), fields.remove("error")) {
            (Some(ok), None) => Ok(Answer { result: Ok(ok), took }),
            (None, Some(error)) => Ok(Answer { result: Err(error), took }),
            _ => bail!("the answer has not either `ok` or `error`"),
        }
    }
}

/// Whether a variable of this process's environment would be a setting of the client.
fn is_setting(name: &str) -> bool {
    name.starts_with("TOKEN_BROKER_") || name.starts_with("CARGO") || name == "RUST_LOG"
}

/// Gives each answer to the request with its `id`. At the end of the output, nobody waits any longer.
async fn read_answers(stdout: ChildStdout, waiting: Waiting, answers: Arc<Mutex<Vec<String>>>) {
    let mut lines = BufReader::new(stdout).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let at = Instant::now();
        let answer: Value = serde_json::from_str(&line).unwrap_or_default();
        answers.lock().push(line);
        let sender = answer["id"]
            .as_u64()
            .and_then(|id| waiting.lock().as_mut().and_then(|waiting| waiting.remove(&id)));
        if let Some(sender) = sender {
            let _ = sender.send((answer, at));
        }
    }
    *waiting.lock() = None;
}

/// Removes the tokens from an answer where the protocol wants them.
fn remove_tokens(answer: &mut Value) {
    if let Some(ok) = answer.get_mut("ok").and_then(Value::as_object_mut) {
        ok.remove("token");
        let results = ok.get_mut("results").and_then(Value::as_array_mut);
        for result in results.into_iter().flatten().filter_map(Value::as_object_mut) {
            result.remove("token");
        }
    }
}
