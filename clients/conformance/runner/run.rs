//! Runs a scenario with one driver, or with several at the same time.

use std::{
    fs,
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use futures_util::{FutureExt, future::try_join_all};
use nix::sys::signal::Signal;

use super::{
    callers::RUNNER,
    driver::Language,
    scenario::{Count, Scenario, Step},
    session::Session,
    world::World,
};

/// How long the steps of a scenario may take, and so may the setup.
const LONGEST: Duration = Duration::from_mins(2);
/// How long the runner waits until a count is as expected.
const COUNT: Duration = Duration::from_secs(10);

/// What a run needs beside the scenario.
pub(crate) struct Run<'a> {
    pub(crate) scenario: &'a Scenario,
    pub(crate) languages: Vec<Language>,
    pub(crate) adapter: Option<String>,
    /// Where logs are kept when it fails.
    pub(crate) directory: PathBuf,
}

/// What a scenario measured, such as `pushed 12 ms`.
pub(crate) type Figures = Vec<String>;

impl Run<'_> {
    /// Runs the scenario. When it fails, its directory has the logs.
    pub(crate) async fn run(&self) -> anyhow::Result<Figures> {
        let names: Vec<_> = self.languages.iter().map(|language| language.name.as_str()).collect();
        let mut world = guard(World::start(&self.scenario.given, &names)).await?;
        let directory = |name: &str| world.directory.path().join(name);
        let sessions = self.languages.iter().map(|language| {
            let directory = directory(&language.name);
            async move { Session::start(language, self.adapter.clone(), &directory).await }
        });
        let mut sessions = try_join_all(sessions).await?;
        let result = guard(async {
            // Only now, because the start of some drivers takes as long as some tokens live.
            world.begin(&self.scenario.given).await?;
            let figures = self.steps(&mut world, &mut sessions).await?;
            self.end(&world, &mut sessions).await?;
            Ok(figures)
        });
        let result = result.await;
        if result.is_err() {
            self.keep_logs(&world, &sessions)?;
        }
        result
    }

    async fn steps(&self, world: &mut World, sessions: &mut [Session]) -> anyhow::Result<Figures> {
        let mut figures = vec![];
        for (step, number) in self.scenario.steps.iter().zip(1..) {
            let result = run_step(step, world, sessions, &mut figures).await;
            for session in &mut *sessions {
                world.live_tokens().iter().for_each(|token| session.secrets.add(token));
            }
            result.with_context(|| format!("step {number} ({})", name_of(step)))?;
        }
        Ok(figures)
    }

    /// Ends the drivers, and searches all that they have printed for secrets.
    async fn end(&self, world: &World, sessions: &mut [Session]) -> anyhow::Result<()> {
        for session in sessions {
            session.driver.end().await.with_context(|| session.language.clone())?;
            world.callers.bearers().for_each(|bearer| session.secrets.add(bearer));
            let printed = session.driver.printed()?;
            if let Some(line) = session.secrets.find_in(&printed) {
                bail!("{}: a secret was printed: {line}", session.language);
            }
            if let Some(line) = session.secrets.find_in(&world.stranger.heard()) {
                bail!("{}: a secret was sent to another host: {line}", session.language);
            }
        }
        Ok(())
    }

    fn keep_logs(&self, world: &World, sessions: &[Session]) -> anyhow::Result<()> {
        fs::create_dir_all(&self.directory)?;
        fs::write(self.directory.join("broker.log"), world.brokers.logs())?;
        for Session { language, driver, .. } in sessions {
            let kept = |what: &str| self.directory.join(format!("{language}.{what}"));
            fs::copy(world.directory.path().join(language).join("driver.log"), kept("log"))?;
            driver.write_answers(&kept("answers"))?;
        }
        Ok(())
    }
}

/// Bounds the time of a part of a run, and makes a panic of the tests' harness an error.
pub(crate) async fn guard<T>(part: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let part = AssertUnwindSafe(tokio::time::timeout(LONGEST, part)).catch_unwind();
    match part.await {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => bail!("not over after {LONGEST:?}"),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            bail!("{}", text.unwrap_or("a panic"))
        }
    }
}

/// Runs a step: those of drivers with each of them at the same time.
async fn run_step(
    step: &Step,
    world: &mut World,
    sessions: &mut [Session],
    figures: &mut Figures,
) -> anyhow::Result<()> {
    if of_world(step, world).await? {
        return Ok(());
    }
    match step {
        Step::Count(count) => return check_count(count, world, sessions).await,
        Step::MeasurePush { account, limit, times, quick } => {
            let pushes = Pushes { account, limit: *limit, times: *times, quick: *quick };
            figures.push(pushes.measure(world, sessions).await?);
            return Ok(());
        }
        _ => {}
    }
    let world = &*world;
    let steps = sessions.iter_mut().map(async |session| {
        of_driver(step, world, session).await.with_context(|| session.language.clone())
    });
    try_join_all(steps).await.map(drop)
}

/// Runs a step that is not about drivers; returns whether it is one.
async fn of_world(step: &Step, world: &mut World) -> anyhow::Result<bool> {
    match step {
        Step::Stop(of) => world.brokers.end(of.replica, Signal::SIGTERM).await?,
        Step::Kill(of) => world.brokers.end(of.replica, Signal::SIGKILL).await?,
        Step::Start(of) => world.brokers.start(of.replica).await?,
        Step::Pause(of) => world.brokers.pause(of.replica, true)?,
        Step::Continue(of) => world.brokers.pause(of.replica, false)?,
        Step::RollingRestart {} => world.brokers.rolling_restart().await?,
        Step::Reissue(of) => world.change(&of.account, "reissue_requested_at = now()").await?,
        Step::RotateSecret(of) => world.rotate_secret(&of.account).await?,
        Step::Disable(of) => world.change(&of.account, "enabled = false").await?,
        Step::Enable(of) => world.change(&of.account, "enabled = true").await?,
        Step::Remove(of) => {
            world.sql(&format!("delete from accounts where name = '{}'", of.account)).await?;
        }
        Step::RemoveGrants {} => world.sql("delete from grants").await?,
        Step::LimitRate { to } => {
            world
                .sql(&format!("update callers set rate_limit = {to} where name <> '{RUNNER}'"))
                .await?;
        }
        Step::AddCa {} => world.callers.add_ca()?,
        Step::UseAddedCa {} => world.callers.use_added_ca()?,
        Step::ReplaceCredential {} => world.replace_credential().await?,
        Step::RevokeOldCredential {} => world.revoke_credentials(false).await?,
        Step::RevokeCredentials {} => world.revoke_credentials(true).await?,
        Step::Faults { set } => world.set_faults(set)?,
        Step::EndToken(of) => world.end_token(&of.account).await?,
        Step::Wait { time } => tokio::time::sleep(*time).await,
        Step::Mark {} => world.mark().await?,
        Step::Issues { account, number } => {
            let issues = world.issues(account)?;
            ensure!(number.allows(issues), "the upstream issued {issues} tokens");
        }
        Step::ApiRequests { number } => {
            let requests = world.api_requests();
            ensure!(number.allows(requests), "the API got {requests} requests");
        }
        Step::StrangerHeardNothing {} => {
            let heard = world.stranger.heard();
            ensure!(heard.is_empty(), "{} bytes were sent to another server", heard.len());
        }
        _ => return Ok(false),
    }
    Ok(true)
}

async fn of_driver(step: &Step, world: &World, session: &mut Session) -> anyhow::Result<()> {
    match step {
        Step::Open(open) => session.open(open, world).await,
        Step::Token(ask) => session.token(ask, world).await,
        Step::Tokens(threads) => session.tokens(threads, world).await,
        Step::Report(report) => session.report(report).await,
        Step::Api(api) => session.api(api, world).await,
        Step::Load(load) => session.load(load, world).await,
        Step::Show(of) => session.on_client("show", of).await,
        Step::Close(of) => session.on_client("close", of).await,
        Step::Cancel { request } => session.cancel(request).await,
        Step::Answer { request } => session.answer(request, world).await,
        Step::WaitForEnd { of } => session.wait_for_end(of).await,
        Step::WaitForNewer { than, account } => {
            world.until_stored(account, session.saved(than)?).await.map(drop)
        }
        _ => bail!("this step is not one of drivers"),
    }
}

/// Counts until the count is as expected, because what is counted may be on its way.
async fn check_count(count: &Count, world: &mut World, sessions: &[Session]) -> anyhow::Result<()> {
    let Count { event, account, outcome, number } = count;
    for session in sessions {
        let begun = Instant::now();
        loop {
            let counted = world
                .count(&session.language, event, account.as_deref(), outcome.as_deref())
                .await?;
            if number.allows(counted) {
                break;
            }
            let may_change = counted < number.at_least && begun.elapsed() < COUNT;
            ensure!(may_change, "{}: {counted} times {event}", session.language);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    Ok(())
}

/// Pushes to be measured until enough of them were quick.
///
/// A busy machine makes pushes slower and never quicker, so not all of them have to be quick. One is not enough: a client
/// that looks once a second is quick one time in ten by chance, and hardly ever ten times of thirty.
struct Pushes<'a> {
    account: &'a str,
    limit: Duration,
    /// The most pushes.
    times: u32,
    /// How many must take at most `limit`.
    quick: u32,
}

impl Pushes<'_> {
    /// Returns the quickest, and how many were needed.
    async fn measure(&self, world: &World, sessions: &[Session]) -> anyhow::Result<String> {
        let (mut quickest, mut quick) = (Duration::MAX, 0);
        for number in 1..=self.times {
            let took = measure_push(self.account, world, sessions).await?;
            quickest = quickest.min(took);
            quick += u32::from(took <= self.limit);
            if quick == self.quick {
                return Ok(format!("{quick} of {number} pushes, {} ms", quickest.as_millis()));
            }
        }
        bail!(
            "of {} new tokens, {quick} were used in time, the quickest after {quickest:?}",
            self.times
        )
    }
}

/// Replaces the account's token. Returns how long after the broker stored the new one all drivers answered with it.
async fn measure_push(
    account: &str,
    world: &World,
    sessions: &[Session],
) -> anyhow::Result<Duration> {
    let generations = sessions.iter().map(|session| session.present_generation(account));
    let before = try_join_all(generations).await?.into_iter().max().context("no driver")?;
    world.change(account, "reissue_requested_at = now()").await?;
    let answered = sessions.iter().map(|session| session.until_newer(account, before));
    let (stored, answered) = tokio::try_join!(world.until_stored(account, before), async {
        let answered = tokio::time::timeout(Duration::from_mins(1), try_join_all(answered)).await;
        answered.context("no newer token within a minute")?
    })?;
    Ok(answered.into_iter().max().unwrap_or(stored).saturating_duration_since(stored))
}

/// Returns the name of a step as the files have it.
fn name_of(step: &Step) -> String {
    let debug = format!("{step:?}");
    let name: String = debug.chars().take_while(char::is_ascii_alphanumeric).collect();
    let mut words = String::new();
    for letter in name.chars() {
        if letter.is_ascii_uppercase() && !words.is_empty() {
            words.push('_');
        }
        words.push(letter.to_ascii_lowercase());
    }
    words
}

/// Returns where the logs of a failed run are kept.
pub(crate) fn logs_of(base: &Path, scenario: &str, column: &str, adapter: Option<&str>) -> PathBuf {
    let adapter = adapter.map(|adapter| adapter.replace(|c: char| !c.is_ascii_alphanumeric(), "-"));
    let name = [Some(scenario), Some(column), adapter.as_deref()];
    base.join(name.into_iter().flatten().collect::<Vec<_>>().join("."))
}
