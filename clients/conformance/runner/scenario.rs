//! The scenarios as they are written in the files. `clients/conformance/README.md` describes them for their
//! authors. What is misspelt is an error that names the file and the step.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context, ensure};
use serde::{Deserialize, Deserializer, de::Error};

/// One file of `scenarios/`.
#[derive(Debug)]
pub(crate) struct Scenario {
    /// The file's name without `.toml`.
    pub(crate) name: String,
    pub(crate) title: String,
    pub(crate) runs: Runs,
    pub(crate) given: Given,
    pub(crate) steps: Vec<Step>,
}

/// How often a scenario runs.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Runs {
    /// Once with each driver.
    #[default]
    EachDriver,
    /// Once for each adapter of each driver.
    EachAdapter,
    /// Once, with all drivers at the same time.
    AllDrivers,
}

/// What is set up before the steps.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Given {
    /// How many accounts there are: `acme-1`, `acme-2` and so on.
    pub(crate) accounts: usize,
    /// The patterns of the accounts that the callers may use.
    pub(crate) grants: Vec<String>,
    pub(crate) replicas: usize,
    pub(crate) tls: Tls,
    #[serde(deserialize_with = "duration")]
    pub(crate) token_life: Duration,
    /// The share of a token's life after which the broker replaces it.
    pub(crate) refresh_at: f64,
    #[serde(deserialize_with = "duration")]
    pub(crate) min_issue_interval: Duration,
    /// How long the broker waits for the upstream.
    #[serde(deserialize_with = "duration")]
    pub(crate) upstream_timeout: Duration,
    /// How many seconds the clocks of broker, database and upstream are ahead of the driver's.
    pub(crate) clocks_ahead: i64,
    /// Changes of the simulator's faults before the broker starts.
    pub(crate) faults: toml::Table,
    /// Whether the steps begin only when each account has a token.
    pub(crate) tokens: bool,
}

impl Default for Given {
    fn default() -> Self {
        Self {
            accounts: 1,
            grants: vec!["*".to_owned()],
            replicas: 1,
            tls: Tls::None,
            token_life: Duration::from_hours(1),
            refresh_at: 0.75,
            min_issue_interval: Duration::from_millis(100),
            upstream_timeout: Duration::from_secs(10),
            clocks_ahead: 0,
            faults: toml::Table::new(),
            tokens: true,
        }
    }
}

/// How drivers reach the broker.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Tls {
    /// In plain text, on loopback.
    None,
    /// With TLS and a bearer.
    Server,
    /// With TLS and a client certificate, without a bearer.
    Mutual,
}

/// One step. Those about a replica without a `replica` are about all of them.
#[derive(Debug, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Step {
    // The driver's operations.
    Open(Open),
    Token(Ask),
    Tokens(AskAtOnce),
    Report(Report),
    Api(Api),
    Load(Load),
    Show(OnClient),
    Close(OnClient),
    /// Cancels a `token` that runs in the background.
    Cancel {
        request: String,
    },
    /// Waits for the answer of a step that runs in the background, and checks what it expects.
    Answer {
        request: String,
    },

    // The broker.
    Stop(OfReplica),
    Kill(OfReplica),
    Start(OfReplica),
    Pause(OfReplica),
    Continue(OfReplica),
    /// Stops and starts the replicas, one after the other.
    RollingRestart {},

    // What an admin does.
    Reissue(OfAccount),
    RotateSecret(OfAccount),
    Disable(OfAccount),
    Enable(OfAccount),
    Remove(OfAccount),
    RemoveGrants {},
    /// Limits the calls a second of each driver's caller.
    LimitRate {
        to: i32,
    },
    /// Adds a bearer, or with mutual TLS a certificate of another CA, and replaces the driver's files.
    ReplaceCredential {},
    /// Revokes all credentials but the newest, and distrusts the CA of the old certificate.
    RevokeOldCredential {},
    RevokeCredentials {},
    /// Adds a CA to the drivers' file of the broker's CAs.
    AddCa {},
    /// Gives the brokers a certificate of the added CA, and removes the old CA from the drivers' file.
    UseAddedCa {},

    // The upstream.
    /// Changes the simulator's faults. `{stranger}` is the URL of a server that is not the API.
    Faults {
        set: toml::Table,
    },
    /// Issues a token to somebody else, which ends the account's token.
    EndToken(OfAccount),

    // Time, and what is counted.
    Wait {
        #[serde(deserialize_with = "duration")]
        time: Duration,
    },
    /// Waits until a second after the end of a saved answer's token.
    WaitForEnd {
        of: String,
    },
    /// Waits until the broker has stored a later token than that of a saved answer.
    WaitForNewer {
        than: String,
        #[serde(default = "first_account")]
        account: String,
    },
    /// Starts the counts anew.
    Mark {},
    /// Counts audit events of the driver's caller since the last mark.
    Count(Count),
    /// Counts the tokens that the upstream issued since the last mark.
    Issues {
        #[serde(default = "first_account")]
        account: String,
        number: Number,
    },
    /// Counts the requests that the API got since the last mark.
    ApiRequests {
        number: Number,
    },
    /// Requires that nothing was sent to the server that is not the API.
    StrangerHeardNothing {},
    /// Replaces a token, and measures when the driver answers with the new one; again up to `times`, until that took
    /// no longer than `limit` for `quick` of them.
    MeasurePush {
        #[serde(default = "first_account")]
        account: String,
        #[serde(deserialize_with = "duration")]
        limit: Duration,
        #[serde(default = "one_push")]
        times: u32,
        #[serde(default = "one_push")]
        quick: u32,
    },
}

/// `open`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Open {
    #[serde(default = "main_client")]
    pub(crate) client: String,
    /// The replicas to connect to, from 1. Without it, all.
    pub(crate) replicas: Option<Vec<usize>>,
    /// An endpoint to use instead, as it is written here.
    pub(crate) endpoint: Option<String>,
    /// Whether the CA's file is that of another CA than the broker's.
    #[serde(default)]
    pub(crate) wrong_ca: bool,
    #[serde(default, deserialize_with = "some_duration")]
    pub(crate) timeout: Option<Duration>,
    #[serde(default)]
    pub(crate) expect: Expect,
}

/// `token`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Ask {
    #[serde(default = "main_client")]
    pub(crate) client: String,
    /// A name, or a name that ends in `-*` for each of the accounts.
    #[serde(default = "first_account")]
    pub(crate) account: String,
    #[serde(default, deserialize_with = "some_duration")]
    pub(crate) timeout: Option<Duration>,
    /// The name under which the answer is saved.
    pub(crate) save: Option<String>,
    /// The name under which the step runs in the background, until a step `answer`.
    pub(crate) background: Option<String>,
    /// Repeats the step until it is as expected, for at most this long.
    #[serde(default, deserialize_with = "some_duration")]
    pub(crate) repeat_for: Option<Duration>,
    #[serde(default)]
    pub(crate) expect: Expect,
}

/// `tokens`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct AskAtOnce {
    #[serde(default = "main_client")]
    pub(crate) client: String,
    #[serde(default = "first_account")]
    pub(crate) account: String,
    pub(crate) threads: u32,
    #[serde(default, deserialize_with = "some_duration")]
    pub(crate) timeout: Option<Duration>,
    /// The name under which the last answer is saved.
    pub(crate) save: Option<String>,
    /// What is expected of each answer.
    #[serde(default)]
    pub(crate) expect: Expect,
}

/// `report`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Report {
    #[serde(default = "main_client")]
    pub(crate) client: String,
    #[serde(default = "first_account")]
    pub(crate) account: String,
    /// The saved answer whose generation is reported.
    pub(crate) saved: String,
    pub(crate) upstream_code: String,
    #[serde(default)]
    pub(crate) expect: Expect,
}

/// `api`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Api {
    #[serde(default = "main_client")]
    pub(crate) client: String,
    #[serde(default = "first_account")]
    pub(crate) account: String,
    #[serde(default = "get")]
    pub(crate) method: String,
    /// Below the base URL of the simulator's API.
    #[serde(default = "whoami")]
    pub(crate) path: String,
    /// The whole URL, instead of `path`. `{stranger}` is the URL of a server that is not the API.
    pub(crate) url: Option<String>,
    pub(crate) body: Option<String>,
    /// How many such requests are sent at the same time.
    #[serde(default = "once")]
    pub(crate) times: usize,
    #[serde(default, deserialize_with = "some_duration")]
    pub(crate) timeout: Option<Duration>,
    #[serde(default)]
    pub(crate) expect: Expect,
}

/// `load`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Load {
    #[serde(default = "main_client")]
    pub(crate) client: String,
    #[serde(default = "first_account")]
    pub(crate) account: String,
    pub(crate) threads: u32,
    /// How long the load lasts; without it, see `until_end_of`.
    #[serde(default, deserialize_with = "some_duration")]
    pub(crate) time: Option<Duration>,
    /// The saved answer shortly before the end of whose token the load ends.
    pub(crate) until_end_of: Option<String>,
    pub(crate) background: Option<String>,
    #[serde(default)]
    pub(crate) expect: Expect,
}

/// `show` and `close`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct OnClient {
    #[serde(default = "main_client")]
    pub(crate) client: String,
    #[serde(default)]
    pub(crate) expect: Expect,
}

/// Steps about a replica.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct OfReplica {
    /// From 1.
    pub(crate) replica: Option<usize>,
}

/// Steps about an account.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct OfAccount {
    #[serde(default = "first_account")]
    pub(crate) account: String,
}

/// `count`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Count {
    pub(crate) event: String,
    /// Without it, the events of all accounts.
    pub(crate) account: Option<String>,
    /// The gRPC status, such as `ok`. Without it, any.
    pub(crate) outcome: Option<String>,
    pub(crate) number: Number,
}

/// How many there must be: a number, or `{ at_least = 1, at_most = 3 }`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Number {
    pub(crate) at_least: u64,
    pub(crate) at_most: u64,
}

impl Number {
    pub(crate) fn allows(self, number: u64) -> bool {
        (self.at_least..=self.at_most).contains(&number)
    }
}

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Range {
            #[serde(default)]
            at_least: u64,
            #[serde(default = "largest")]
            at_most: u64,
        }
        const fn largest() -> u64 {
            u64::MAX
        }

        let value = toml::Value::deserialize(from)?;
        if value.is_table() {
            let Range { at_least, at_most } = value.try_into().map_err(D::Error::custom)?;
            return Ok(Self { at_least, at_most });
        }
        let number = value.try_into().map_err(D::Error::custom)?;
        Ok(Self { at_least: number, at_most: number })
    }
}

/// What must be true of an answer. Without `error`, it must not be an error.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Expect {
    /// Allows any answer, also an error.
    pub(crate) anything: bool,
    /// The kind of the error, or several that are allowed.
    #[serde(deserialize_with = "one_or_several")]
    pub(crate) error: Vec<String>,
    pub(crate) code: Option<String>,
    pub(crate) reason: Option<String>,
    pub(crate) upstream_code: Option<String>,
    /// A saved answer that has the same generation.
    pub(crate) same_as: Option<String>,
    /// A saved answer that has an older generation.
    pub(crate) newer_than: Option<String>,
    /// Whether the upstream accepts the token.
    pub(crate) live: Option<bool>,
    /// The outcome of a report, or several that are allowed.
    #[serde(deserialize_with = "one_or_several")]
    pub(crate) outcome: Vec<String>,
    pub(crate) status: Option<u16>,
    /// What the text of the body, or of `show`, contains.
    pub(crate) contains: Option<String>,
    /// How long the answer takes at most, and at least.
    #[serde(deserialize_with = "some_duration")]
    pub(crate) within: Option<Duration>,
    #[serde(deserialize_with = "some_duration")]
    pub(crate) after: Option<Duration>,
}

fn main_client() -> String {
    "main".to_owned()
}

fn first_account() -> String {
    "acme-1".to_owned()
}

fn get() -> String {
    "GET".to_owned()
}

fn once() -> usize {
    1
}

const fn one_push() -> u32 {
    1
}

fn whoami() -> String {
    "/whoami".to_owned()
}

fn duration<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    humantime::parse_duration(&String::deserialize(from)?).map_err(D::Error::custom)
}

fn some_duration<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
    duration(from).map(Some)
}

fn one_or_several<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Texts {
        One(String),
        Several(Vec<String>),
    }

    Ok(match Texts::deserialize(from)? {
        Texts::One(text) => vec![text],
        Texts::Several(texts) => texts,
    })
}

/// Reads all scenarios of a directory, in the order of their names.
pub(crate) fn read_all(directory: &Path) -> anyhow::Result<Vec<Scenario>> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    let mut files = entries
        .map(|entry| Ok(entry?.path()))
        .filter(|path| {
            path.as_ref().map_or(true, |path| path.extension().is_some_and(|end| end == "toml"))
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    files.sort();
    files.iter().map(|file| read(file)).collect()
}

fn read(file: &Path) -> anyhow::Result<Scenario> {
    let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
    parse(&name, &text).with_context(|| file.display().to_string())
}

/// Parses the text of a file. The steps are parsed one by one, so that an error can say which one it is about.
pub(crate) fn parse(name: &str, text: &str) -> anyhow::Result<Scenario> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct File {
        title: String,
        #[serde(default)]
        runs: Runs,
        #[serde(default)]
        given: Given,
        steps: Vec<toml::Table>,
    }

    let File { title, runs, given, steps } = toml::from_str(text)?;
    ensure!(!steps.is_empty(), "there are no steps");
    let steps = steps.into_iter().zip(1..).map(|(step, number)| {
        let what = step.get("do").and_then(toml::Value::as_str).unwrap_or("?").to_owned();
        Step::deserialize(step).with_context(|| format!("step {number} ({what})"))
    });
    let steps = steps.collect::<anyhow::Result<_>>()?;
    Ok(Scenario { name: name.to_owned(), title, runs, given, steps })
}
