//! What surrounds the drivers in a scenario: database, upstream and brokers, and what an admin does and counts.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail, ensure};
use chrono::{DateTime, Utc};
use serde_json::json;
use sqlx::{AssertSqlSafe, PgPool};
use tempfile::TempDir;
use token_broker::dev::simulator::{Faults, Simulator, SimulatorOptions};

use super::{
    brokers::Brokers,
    callers::{Callers, RUNNER},
    harness::{
        database::{TestDatabase, pool_for_mass_changes},
        eventually,
        http::http,
        process::BrokerSetup,
        shifted_clock::{ShiftedClock, ShiftedPostgres},
    },
    scenario::Given,
    stranger::Stranger,
};

/// How long the runner waits for what the broker does soon.
const SOON: Duration = Duration::from_secs(20);

/// Why a scenario cannot run on this machine.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Skipped(pub(crate) String);

/// The brokers with all that they need. Dropping it ends them.
pub(crate) struct World {
    pub(crate) brokers: Brokers,
    pub(crate) callers: Callers,
    pub(crate) upstream: Simulator,
    pub(crate) stranger: Stranger,
    secrets_of_accounts: Vec<String>,
    marked: Marked,
    /// How often the runner has called a replica to see that the audit log is complete.
    flushes: i64,
    pool: PgPool,
    _database: WorldDatabase,
    _clock: Option<ShiftedClock>,
    pub(crate) directory: TempDir,
}

/// A database on the server that all scenarios share, or on one whose clock is shifted.
enum WorldDatabase {
    Shared(TestDatabase),
    Shifted(ShiftedPostgres),
}

/// The counts at the last mark.
#[derive(Default)]
struct Marked {
    at: DateTime<Utc>,
    issued: Vec<u64>,
    api_requests: u64,
}

impl World {
    /// Sets up what a scenario needs except accounts, with a caller for each of `languages`.
    pub(crate) async fn start(given: &Given, languages: &[&str]) -> anyhow::Result<Self> {
        let clock = shifted_clock(given)?;
        let upstream = start_upstream(given).await?;
        let database = match &clock {
            Some(clock) => WorldDatabase::Shifted(ShiftedPostgres::start(clock).await),
            None => WorldDatabase::Shared(TestDatabase::new().await),
        };
        let directory = tempfile::Builder::new().prefix("tb-conformance-").tempdir()?;
        let callers = Callers::new(directory.path(), given.tls, languages)?;
        let mut setup = BrokerSetup::new(database.url(), &upstream.base_url()).await;
        for (name, value) in clock.iter().flat_map(ShiftedClock::variables) {
            setup.set(name, &value);
        }
        if let WorldDatabase::Shifted(_) = database {
            setup.run(&["migrate"]).await.ok();
        }
        let pool = pool_for_mass_changes(database.url(), "conformance");
        callers.register(&pool, &given.grants).await?;
        let mut world = Self {
            brokers: Brokers::new(setup, given, callers.broker_tls()),
            callers,
            upstream,
            stranger: Stranger::start().await?,
            secrets_of_accounts: vec![],
            marked: Marked::default(),
            flushes: 0,
            pool,
            _database: database,
            _clock: clock,
            directory,
        };
        world.brokers.start(None).await?;
        Ok(world)
    }

    /// Registers the accounts, whose tokens live from now on, waits until the brokers know them, and begins to count.
    pub(crate) async fn begin(&mut self, given: &Given) -> anyhow::Result<()> {
        self.register_accounts(given).await?;
        self.until_accounts_known(given.accounts).await?;
        self.mark().await
    }

    async fn register_accounts(&mut self, given: &Given) -> anyhow::Result<()> {
        let mut values = vec![];
        for n in 1..=given.accounts {
            let secret = format!("SK.{n}");
            self.upstream.add_account(&client_id(n), &secret);
            values.push(format!("('acme-{n}', '{}', '{secret}')", client_id(n)));
            self.secrets_of_accounts.push(secret);
        }
        if values.is_empty() {
            return Ok(());
        }
        self.sql(&format!(
            "insert into accounts (name, client_id, client_secret) values {}",
            values.join(", ")
        ))
        .await?;
        if given.tokens {
            let query = "select count(*) from account_status where state = 'fresh'";
            let all = i64::try_from(given.accounts)?;
            self.until("a token of each account", query, |fresh| fresh == all).await?;
        }
        Ok(())
    }

    /// Runs statements as an admin.
    pub(crate) async fn sql(&self, statements: &str) -> anyhow::Result<()> {
        sqlx::raw_sql(AssertSqlSafe(statements.to_owned())).execute(&self.pool).await?;
        Ok(())
    }

    /// Returns the number that a query returns.
    pub(crate) async fn number(&self, query: &str) -> anyhow::Result<i64> {
        let query = AssertSqlSafe(query.to_owned());
        Ok(sqlx::query_scalar(query).fetch_one(&self.pool).await?)
    }

    /// Waits until the number that a query returns satisfies `is_enough`.
    pub(crate) async fn until(
        &self,
        what: &str,
        query: &str,
        is_enough: impl Fn(i64) -> bool,
    ) -> anyhow::Result<()> {
        let begun = Instant::now();
        while !is_enough(self.number(query).await?) {
            ensure!(begun.elapsed() < SOON, "no {what} within {SOON:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Changes a column of an account's row.
    pub(crate) async fn change(&self, account: &str, assignment: &str) -> anyhow::Result<()> {
        self.sql(&format!("update accounts set {assignment} where name = '{account}'")).await
    }

    /// Waits until a later token of the account than `than` is stored. Returns a time before that: when the last look
    /// began that did not find it.
    pub(crate) async fn until_stored(&self, account: &str, than: u64) -> anyhow::Result<Instant> {
        let query = format!(
            "select count(*) from tokens t join accounts a on a.id = t.account_id
             where a.name = '{account}' and t.generation > {than}"
        );
        let begun = Instant::now();
        let mut before = begun;
        loop {
            let look = Instant::now();
            if self.number(&query).await? > 0 {
                return Ok(before);
            }
            before = look;
            ensure!(begun.elapsed() < Duration::from_mins(1), "no new token is stored");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Returns the accounts that a name, or a pattern such as `acme-*`, means.
    pub(crate) fn accounts_like(&self, account: &str) -> Vec<String> {
        match account.strip_suffix('*') {
            Some(prefix) => {
                (1..=self.secrets_of_accounts.len()).map(|n| format!("{prefix}{n}")).collect()
            }
            None => vec![account.to_owned()],
        }
    }

    /// Gives the account a new secret, at the upstream and at the broker.
    pub(crate) async fn rotate_secret(&mut self, account: &str) -> anyhow::Result<()> {
        let n = number_of(account)?;
        let secret = self.secrets_of_accounts.get_mut(n - 1).context("no such account")?;
        *secret = format!("{secret}x");
        let secret = secret.clone();
        self.upstream.add_account(&client_id(n), &secret);
        self.sql(&format!(
            "update accounts set client_secret = '{secret}' where name = '{account}'"
        ))
        .await
    }

    /// Has the upstream issue a token to somebody else who knows the account's secret.
    pub(crate) async fn end_token(&self, account: &str) -> anyhow::Result<()> {
        let n = number_of(account)?;
        let secret = self.secrets_of_accounts.get(n - 1).context("no such account")?;
        let request = json!({"clientId": client_id(n), "clientSecret": secret}).to_string();
        let (status, body) =
            http(self.upstream.address(), "POST", "/api/1.1/token", &request).await;
        ensure!(status == 200, "the upstream answered {status}: {body}");
        Ok(())
    }

    /// Changes the simulator's faults.
    pub(crate) fn set_faults(&self, changes: &toml::Table) -> anyhow::Result<()> {
        let changes = self.stranger.put_into(&json_faults(changes)?.to_string());
        let changes = serde_json::from_str(&changes)?;
        self.upstream.set_faults(self.upstream.faults().changed_by(changes)?);
        Ok(())
    }

    /// Starts the counts anew.
    pub(crate) async fn mark(&mut self) -> anyhow::Result<()> {
        self.flush_audit().await?;
        let query = "select coalesce(max(at), timestamptz '2000-01-01') from audit_events";
        let at = sqlx::query_scalar(query).fetch_one(&self.pool).await?;
        let accounts = 1..=self.secrets_of_accounts.len();
        let issued = accounts.map(|n| self.upstream.issued(&client_id(n))).collect();
        self.marked = Marked { at, issued, api_requests: self.upstream.api_requests() };
        Ok(())
    }

    /// Returns how many tokens the upstream issued for the account since the last mark.
    pub(crate) fn issues(&self, account: &str) -> anyhow::Result<u64> {
        let n = number_of(account)?;
        let marked = self.marked.issued.get(n - 1).copied().unwrap_or(0);
        Ok(self.upstream.issued(&client_id(n)) - marked)
    }

    /// Returns how many requests the API got since the last mark.
    pub(crate) fn api_requests(&self) -> u64 {
        self.upstream.api_requests() - self.marked.api_requests
    }

    /// Counts the audit events of a caller since the last mark, of all brokers that run.
    pub(crate) async fn count(
        &mut self,
        caller: &str,
        event: &str,
        account: Option<&str>,
        outcome: Option<&str>,
    ) -> anyhow::Result<u64> {
        self.flush_audit().await?;
        let count: i64 = sqlx::query_scalar(
            "select count(*) from audit_events where at > $1 and caller = $2 and event = $3
             and ($4::text is null or account = $4) and ($5::text is null or outcome = $5)",
        )
        .bind(self.marked.at)
        .bind(caller)
        .bind(event)
        .bind(account)
        .bind(outcome)
        .fetch_one(&self.pool)
        .await?;
        Ok(count.try_into()?)
    }

    /// Waits until the audit log in the database has all calls that the running brokers have answered. The records
    /// of a broker are delivered in order, so it calls each broker and waits for the record of that call.
    async fn flush_audit(&mut self) -> anyhow::Result<()> {
        let ports: Vec<_> = self.brokers.ports().collect();
        for port in ports {
            self.call_as_runner(port).await?;
        }
        let query = format!(
            "select count(*) from audit_events where caller = '{RUNNER}' and event = 'list_accounts'"
        );
        self.until("audit record of the runner", &query, |calls| calls >= self.flushes).await
    }

    /// Waits until each running broker knows this number of accounts.
    async fn until_accounts_known(&mut self, number: usize) -> anyhow::Result<()> {
        let begun = Instant::now();
        let ports: Vec<_> = self.brokers.ports().collect();
        for port in ports {
            while self.call_as_runner(port).await? < number {
                ensure!(begun.elapsed() < SOON, "a broker does not know all accounts");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        Ok(())
    }

    /// Calls the broker on this port without asking for a token. Returns how many accounts it knows.
    async fn call_as_runner(&mut self, port: u16) -> anyhow::Result<usize> {
        let accounts = self.callers.count_accounts(port).await?;
        self.flushes += 1;
        Ok(accounts)
    }

    /// Adds a credential for each driver's caller, and waits until the brokers know it. Then replaces the drivers'
    /// files.
    pub(crate) async fn replace_credential(&mut self) -> anyhow::Result<()> {
        self.callers.add_credentials(&self.pool).await?;
        self.until_known().await;
        self.callers.write_files()
    }

    /// Revokes the credentials of the drivers, with or without the newest, and waits until the brokers refuse them.
    pub(crate) async fn revoke_credentials(&mut self, also_newest: bool) -> anyhow::Result<()> {
        self.callers.revoke(&self.pool, also_newest).await?;
        self.until_known().await;
        Ok(())
    }

    /// Waits until all running brokers accept the drivers' credentials, and refuse the revoked ones.
    async fn until_known(&self) {
        for port in self.brokers.ports() {
            eventually("brokers that know the credentials", async || {
                self.callers.are_known(port).await.then_some(())
            })
            .await;
        }
    }

    /// Returns the tokens that the upstream accepts now.
    pub(crate) fn live_tokens(&self) -> Vec<String> {
        let accounts = 1..=self.secrets_of_accounts.len();
        accounts.filter_map(|n| self.upstream.live_token(&client_id(n))).collect()
    }
}

impl WorldDatabase {
    fn url(&self) -> &str {
        match self {
            Self::Shared(database) => database.url(),
            Self::Shifted(postgres) => postgres.url(),
        }
    }
}

async fn start_upstream(given: &Given) -> anyhow::Result<Simulator> {
    let faults = Faults {
        token_life: given.token_life,
        clock_skew_seconds: given.clocks_ahead,
        ..Faults::default()
    };
    let faults = faults.changed_by(json_faults(&given.faults)?)?;
    let options = SimulatorOptions { faults, ..SimulatorOptions::default() };
    Ok(Simulator::start_on_loopback(options).await?)
}

/// Returns a clock that is as far ahead as the scenario says.
fn shifted_clock(given: &Given) -> anyhow::Result<Option<ShiftedClock>> {
    if given.clocks_ahead == 0 {
        return Ok(None);
    }
    let clock = ShiftedClock::build()
        .ok_or_else(|| anyhow!(Skipped("no C compiler, so no clock can be shifted".to_owned())))?;
    clock.set_ahead(given.clocks_ahead);
    Ok(Some(clock))
}

fn json_faults(faults: &toml::Table) -> anyhow::Result<serde_json::Value> {
    Ok(serde_json::to_value(faults)?)
}

/// Returns the number of an account, which its name ends in.
fn number_of(account: &str) -> anyhow::Result<usize> {
    let number = account.strip_prefix("acme-").and_then(|number| number.parse().ok());
    match number {
        Some(number) if number > 0 => Ok(number),
        _ => bail!("there is no account {account}"),
    }
}

/// Returns the account's id at the upstream.
pub(crate) fn client_id_of(account: &str) -> anyhow::Result<String> {
    Ok(client_id(number_of(account)?))
}

fn client_id(number: usize) -> String {
    format!("id-{number}")
}

/// Writes a file and moves it into its place, so that no reader sees a half of it.
pub(crate) fn replace_file(file: &Path, text: &str) -> anyhow::Result<()> {
    let temporary: PathBuf = file.with_extension("new");
    fs::write(&temporary, text)?;
    Ok(fs::rename(temporary, file)?)
}
