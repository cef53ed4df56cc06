//! A driver in a scenario: its steps, with what was saved and what runs in the background.

use std::{
    collections::BTreeMap,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use futures_util::future::try_join_all;
use serde_json::Value;

use super::{
    driver::{Driver, Keys, Language, Pending},
    expect::{Answer, Generations, check, generation, text},
    scenario::{Api, Ask, AskAtOnce, Expect, Load, OnClient, Open, Report},
    secrets::Secrets,
    world::{World, client_id_of},
};

/// The timeout of calls that are not about timeouts, so that no scenario fails because the machine is slow.
const PATIENCE: Duration = Duration::from_secs(30);
/// The pause between two tries of a step that is repeated, or of a measurement.
const PAUSE: Duration = Duration::from_millis(10);

/// How long before the end of a token a load ends that lasts as long as the token: longer than the two seconds that a
/// call may wait for the broker, and the second before its end at which a token is not used any more.
const BEFORE_END: Duration = Duration::from_secs(6);

/// A driver, and what the steps have saved of its answers.
pub(crate) struct Session {
    pub(crate) language: String,
    pub(crate) driver: Driver,
    /// The adapter that `api` uses.
    adapter: Option<String>,
    generations: Generations,
    /// When the tokens of saved answers end.
    ends: BTreeMap<String, Instant>,
    background: BTreeMap<String, (Pending, Checked)>,
    pub(crate) secrets: Secrets,
}

/// A step with an answer, and how that is checked.
enum Checked {
    Token(String, Option<String>, Expect),
    Load(Expect),
}

impl Session {
    pub(crate) async fn start(
        language: &Language,
        adapter: Option<String>,
        directory: &Path,
    ) -> anyhow::Result<Self> {
        let driver = Driver::start(language, directory.join("driver.log")).await?;
        Ok(Self {
            language: language.name.clone(),
            driver,
            adapter,
            generations: Generations::new(),
            ends: BTreeMap::new(),
            background: BTreeMap::new(),
            secrets: Secrets::default(),
        })
    }

    pub(crate) async fn open(&self, step: &Open, world: &World) -> anyhow::Result<()> {
        let mut keys = world.callers.files_of(&self.language, step.wrong_ca);
        let endpoints = match &step.endpoint {
            Some(endpoint) => vec![endpoint.clone()],
            None => world.brokers.endpoints(step.replicas.as_deref())?,
        };
        keys.insert("client".to_owned(), step.client.as_str().into());
        keys.insert("endpoints".to_owned(), endpoints.into());
        set_timeout(&mut keys, Some(step.timeout.unwrap_or(PATIENCE)));
        let answer = self.driver.ask("open", keys).await?;
        check(&answer, &step.expect, &self.generations)
    }

    /// Runs `token` for the account or accounts, again and again if the step says so.
    pub(crate) async fn token(&mut self, step: &Ask, world: &World) -> anyhow::Result<()> {
        let begun = Instant::now();
        loop {
            let result = self.token_once(step, world).await;
            match (result, step.repeat_for) {
                (Ok(()), _) => return Ok(()),
                (Err(error), Some(limit)) if begun.elapsed() >= limit => {
                    return Err(error.context(format!("still after {limit:?}")));
                }
                (Err(error), None) => return Err(error),
                (Err(_), Some(_)) => tokio::time::sleep(PAUSE).await,
            }
        }
    }

    async fn token_once(&mut self, step: &Ask, world: &World) -> anyhow::Result<()> {
        let accounts = world.accounts_like(&step.account);
        let mut asked = vec![];
        for account in accounts {
            let mut keys = on_account(&step.client, &account);
            set_timeout(&mut keys, step.timeout);
            asked.push((self.driver.send("token", keys).await?, account));
        }
        for (pending, account) in asked {
            let checked = Checked::Token(account, step.save.clone(), step.expect.clone());
            if let Some(name) = &step.background {
                self.background.insert(name.clone(), (pending, checked));
            } else {
                let answer = pending.answer().await?;
                self.check(&answer, &checked, world)?;
            }
        }
        Ok(())
    }

    /// Waits for the answer of a step in the background.
    pub(crate) async fn answer(&mut self, request: &str, world: &World) -> anyhow::Result<()> {
        let (pending, checked) = self.background.remove(request).context("no such request")?;
        let answer = pending.answer().await?;
        self.check(&answer, &checked, world)
    }

    fn check(&mut self, answer: &Answer, checked: &Checked, world: &World) -> anyhow::Result<()> {
        match checked {
            Checked::Token(account, save, expect) => {
                if let Ok(ok) = &answer.result {
                    self.look_at(ok, account, expect, world)?;
                }
                check(answer, expect, &self.generations)?;
                if let (Ok(ok), Some(name)) = (&answer.result, save) {
                    self.generations.insert(name.clone(), generation(ok)?);
                    let left = ok["expires_in_ms"].as_u64().context("no `expires_in_ms`")?;
                    self.ends.insert(name.clone(), Instant::now() + Duration::from_millis(left));
                }
            }
            Checked::Load(expect) => {
                check(answer, expect, &self.generations)?;
                if let Ok(ok) = &answer.result {
                    check_load(ok)?;
                }
            }
        }
        Ok(())
    }

    /// Checks what must be true of each answer with a token, and takes note of the token.
    fn look_at(
        &mut self,
        ok: &Value,
        account: &str,
        expect: &Expect,
        world: &World,
    ) -> anyhow::Result<()> {
        let token = text(ok, "token")?;
        self.secrets.add(token);
        ensure!(
            ok["expires_in_ms"].as_u64().is_some_and(|left| left > 0),
            "`expires_in_ms` is {}",
            ok["expires_in_ms"]
        );
        let url = text(ok, "api_base_url")?;
        ensure!(url == world.upstream.base_url(), "`api_base_url` is {url}");
        let address = text(ok, "allowed_ip")?;
        ensure!(address == "127.0.0.1", "`allowed_ip` is {address}");
        ensure!(is_of(token, &client_id_of(account)?), "the token is not one of {account}");
        if let Some(live) = expect.live {
            let is = world.upstream.is_live(token);
            ensure!(
                is == live,
                "the upstream {} the token",
                if is { "accepts" } else { "refuses" }
            );
        }
        Ok(())
    }

    pub(crate) async fn tokens(&mut self, step: &AskAtOnce, world: &World) -> anyhow::Result<()> {
        let mut keys = on_account(&step.client, &step.account);
        set_timeout(&mut keys, step.timeout);
        keys.insert("threads".to_owned(), step.threads.into());
        let answer = self.driver.ask("tokens", keys).await?;
        let Ok(ok) = answer.result else { bail!("{:?}", answer.result) };
        let results = ok["results"].as_array().context("no `results`")?;
        ensure!(results.len() == step.threads as usize, "{} results", results.len());
        for result in results {
            let result = result.get("error").map_or(Ok(result), Err);
            let answer =
                Answer { result: result.cloned().map_err(Clone::clone), took: answer.took };
            let checked =
                Checked::Token(step.account.clone(), step.save.clone(), step.expect.clone());
            self.check(&answer, &checked, world)?;
        }
        Ok(())
    }

    pub(crate) async fn cancel(&self, request: &str) -> anyhow::Result<()> {
        let (pending, _) = self.background.get(request).context("no such request")?;
        let mut keys = Keys::new();
        keys.insert("request".to_owned(), pending.id.into());
        self.driver.ask("cancel", keys).await?.ok().map(drop)
    }

    pub(crate) async fn report(&self, step: &Report) -> anyhow::Result<()> {
        let saved =
            self.generations.get(&step.saved).context("nothing was saved under the name")?;
        let mut keys = on_account(&step.client, &step.account);
        keys.insert("generation".to_owned(), saved.to_string().into());
        keys.insert("upstream_code".to_owned(), step.upstream_code.as_str().into());
        let answer = self.driver.ask("report", keys).await?;
        check(&answer, &step.expect, &self.generations)
    }

    pub(crate) async fn api(&self, step: &Api, world: &World) -> anyhow::Result<()> {
        let url = match &step.url {
            Some(url) => world.stranger.put_into(url),
            None => format!("{}{}", world.upstream.base_url(), step.path),
        };
        let mut keys = on_account(&step.client, &step.account);
        let adapter = self.adapter.as_ref().or(self.driver.adapters.first());
        keys.insert("adapter".to_owned(), adapter.context("no adapters")?.as_str().into());
        keys.insert("method".to_owned(), step.method.as_str().into());
        keys.insert("url".to_owned(), url.into());
        if let Some(body) = &step.body {
            keys.insert("body".to_owned(), body.as_str().into());
        }
        set_timeout(&mut keys, step.timeout);
        let requests = (0..step.times).map(|_| self.driver.ask("api", keys.clone()));
        for answer in try_join_all(requests).await? {
            check(&answer, &step.expect, &self.generations)?;
        }
        Ok(())
    }

    pub(crate) async fn load(&mut self, step: &Load, world: &World) -> anyhow::Result<()> {
        let mut keys = on_account(&step.client, &step.account);
        keys.insert("threads".to_owned(), step.threads.into());
        let time = match (step.time, &step.until_end_of) {
            (Some(time), None) => time,
            (None, Some(name)) => {
                let end = self.ends.get(name).context("nothing was saved under the name")?;
                let left = end.saturating_duration_since(Instant::now());
                let time = left.saturating_sub(BEFORE_END);
                ensure!(!time.is_zero(), "the token ends too soon for a load");
                time
            }
            _ => bail!("a load has `time` or `until_end_of`"),
        };
        keys.insert("stop_after_ms".to_owned(), u64::try_from(time.as_millis())?.into());
        let pending = self.driver.send("load", keys).await?;
        let checked = Checked::Load(step.expect.clone());
        if let Some(name) = &step.background {
            self.background.insert(name.clone(), (pending, checked));
            return Ok(());
        }
        let answer = pending.answer().await?;
        self.check(&answer, &checked, world)
    }

    /// Runs `show` or `close`.
    pub(crate) async fn on_client(&self, op: &str, step: &OnClient) -> anyhow::Result<()> {
        let mut keys = Keys::new();
        keys.insert("client".to_owned(), step.client.as_str().into());
        let answer = self.driver.ask(op, keys).await?;
        check(&answer, &step.expect, &self.generations)
    }

    /// Waits until the token of a saved answer has ended, by all clocks that count whole seconds.
    pub(crate) async fn wait_for_end(&self, name: &str) -> anyhow::Result<()> {
        let end = self.ends.get(name).context("nothing was saved under the name")?;
        tokio::time::sleep_until((*end + Duration::from_secs(1)).into()).await;
        Ok(())
    }

    pub(crate) fn saved(&self, name: &str) -> anyhow::Result<u64> {
        self.generations.get(name).copied().context("nothing was saved under the name")
    }

    /// Returns the generation of the token that the driver has now.
    pub(crate) async fn present_generation(&self, account: &str) -> anyhow::Result<u64> {
        generation(&self.driver.ask("token", on_account("main", account)).await?.ok()?)
    }

    /// Asks again and again until the driver has a later token than `than`.
    pub(crate) async fn until_newer(&self, account: &str, than: u64) -> anyhow::Result<Instant> {
        while self.present_generation(account).await? <= than {
            tokio::time::sleep(PAUSE / 5).await;
        }
        Ok(Instant::now())
    }
}

impl Answer {
    /// Returns the result of an operation that must not fail.
    fn ok(self) -> anyhow::Result<Value> {
        self.result.map_err(|error| anyhow::anyhow!("the error is {error}"))
    }
}

/// Checks that load had an effect and met no error.
fn check_load(ok: &Value) -> anyhow::Result<()> {
    ensure!(ok["calls"].as_u64().is_some_and(|calls| calls > 0), "there were no calls: {ok}");
    let errors = ok["errors"].as_object().context("no `errors`")?;
    ensure!(errors.is_empty(), "of {} calls there were errors: {}", ok["calls"], ok["errors"]);
    Ok(())
}

/// Whether the claims of a token name this id.
fn is_of(token: &str, client_id: &str) -> bool {
    use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};

    let claims = token.split('.').nth(1).and_then(|text| BASE64_URL_SAFE_NO_PAD.decode(text).ok());
    let claims: Option<Value> = claims.and_then(|json| serde_json::from_slice(&json).ok());
    claims.is_some_and(|claims| claims["userId"] == client_id)
}

fn on_account(client: &str, account: &str) -> Keys {
    let mut keys = Keys::new();
    keys.insert("client".to_owned(), client.into());
    keys.insert("account".to_owned(), account.into());
    keys
}

fn set_timeout(keys: &mut Keys, timeout: Option<Duration>) {
    if let Some(timeout) = timeout {
        let milliseconds = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        keys.insert("timeout_ms".to_owned(), milliseconds.into());
    }
}
