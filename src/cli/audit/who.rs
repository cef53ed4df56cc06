//! `audit who`: lists the callers that were given a token.

use std::{
    collections::BTreeMap,
    io::{self, IsTerminal},
    net::SocketAddr,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, bail};
use chrono::TimeDelta;
use clap::Args;
use futures_util::TryStreamExt;
use serde::Serialize;

use crate::{
    cli::{
        global::GlobalArgs,
        output::{self, Table, or_dash},
        prompt,
        time::{LocalTime, Moment},
    },
    config::{self, Flags, KeyringFlag},
    crypto::Keyring,
    domain::{
        clock::{Clock, Timestamp},
        secret::AccessToken,
    },
    files::bounded::Limits,
    store::audit::{AuditSnapshot, EventFilter, StoredEvent},
    upstream::rcs::stated_life,
};

/// How far outside of a token's lifetime its records are searched first, since clocks differ and calls may wait. The
/// time of a record is that of its replica's clock, which may be wrong by more.
const SEARCH_MARGIN: TimeDelta = TimeDelta::minutes(15);

#[derive(Args, Debug)]
pub(super) struct WhoArgs {
    /// Only events from this time on: an RFC 3339 time, or a duration before now, such as 24h; default: the
    /// token's lifetime, and the whole log if nobody was given the token then
    #[arg(long, value_name = "T")]
    since: Option<Moment>,
    /// Only events before this time
    #[arg(long, value_name = "T")]
    until: Option<Moment>,
    #[command(flatten)]
    settings: Flags<KeyringFlag>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A caller that was given the token. Records that differ only in time and port are counted together.
#[derive(Debug, Serialize)]
struct Holder {
    account: Option<String>,
    event: String,
    caller: Option<String>,
    caller_kind: Option<String>,
    /// The address without the port, which differs between connections.
    host: Option<String>,
    times: i64,
    first: LocalTime,
    last: LocalTime,
}

impl Holder {
    /// Returns whether the records say that the caller was given the token. Others say that it was issued, or that a
    /// caller reported it.
    fn is_delivery(&self) -> bool {
        matches!(&*self.event, "get_token" | "token_pushed")
    }
}

pub(super) async fn run(global: &GlobalArgs, args: WhoArgs) -> anyhow::Result<ExitCode> {
    let keyring = Keyring::load(&config::keyring_file(&global.sources(args.settings.given)?)?)?;
    let token = read_token()?;
    let now = Clock::System.wall();
    let (since, until) = match (&args.since, &args.until) {
        (None, None) => search_bounds(&token),
        (since, until) => (since.map(|it| it.before(now)), until.map(|it| it.before(now))),
    };
    let fingerprints = keyring.fingerprints(&token);
    let admin = global.auditor().await?;
    let mut snapshot = AuditSnapshot::open(admin.pool()).await?;
    let filter =
        EventFilter { since, until, fingerprints: Some(fingerprints), ..EventFilter::default() };
    let mut holders = search(&mut snapshot, &filter).await?;
    let chosen = args.since.is_some() || args.until.is_some();
    if let (false, Some(since), Some(until)) = (chosen, since, until)
        && !holders.iter().any(Holder::is_delivery)
    {
        output::note(format_args!(
            "nobody was given the token from {} to {}, its lifetime: the whole log is searched, since the clock of a \
             broker may have been wrong",
            LocalTime(since),
            LocalTime(until),
        ));
        holders =
            search(&mut snapshot, &EventFilter { since: None, until: None, ..filter }).await?;
    }
    let found = !holders.is_empty();
    print(&holders, args.json)?;
    if !found {
        let other = snapshot.other_fingerprint_keys(&keyring.fingerprint_keys()).await?;
        if !other.is_empty() {
            output::note(format_args!(
                "warning: the log also names tokens by keys that this keyring lacks ({}). Whether it names this token \
                 by one of them cannot be told: use a keyring that has these keys",
                other.join(", ")
            ));
        }
        if stated_life(&token).is_none() {
            output::note("note: the standard input does not look like a token of the upstream");
        }
    }
    Ok(ExitCode::from(u8::from(!found)))
}

/// Returns what the log says of the tokens that `filter` selects, in the order of the first records.
async fn search(snapshot: &mut AuditSnapshot, filter: &EventFilter) -> anyhow::Result<Vec<Holder>> {
    let mut holders = BTreeMap::new();
    let mut events = snapshot.events(filter);
    while let Some(event) = events.try_next().await? {
        match event {
            Ok(event) => add(&mut holders, event),
            Err(unreadable) => output::note(format_args!("warning: {unreadable}")),
        }
    }
    let mut holders: Vec<_> = holders.into_values().collect();
    holders.sort_by_key(|holder: &Holder| holder.first.0);
    Ok(holders)
}

fn read_token() -> anyhow::Result<AccessToken> {
    const LIMITS: Limits = Limits { bytes: 64 << 10, wait: Duration::from_mins(1) };
    if io::stdin().is_terminal() {
        output::note("the token, then Ctrl-D:");
    }
    let text = prompt::read(&io::stdin(), LIMITS).context("cannot read standard input")?;
    match AccessToken::new(text.trim()) {
        Ok(token) => Ok(token),
        Err(error) => bail!("standard input holds no token: {error}"),
    }
}

/// The times between which the token's records can lie, if the token says when it was issued.
fn search_bounds(token: &AccessToken) -> (Option<Timestamp>, Option<Timestamp>) {
    let Some((issued_at, expires_at)) = stated_life(token).filter(|(from, to)| from < to) else {
        output::note("the token does not say when it was issued: the whole log is searched");
        return (None, None);
    };
    (Some(issued_at - SEARCH_MARGIN), Some(expires_at + SEARCH_MARGIN))
}

fn add(holders: &mut BTreeMap<[Option<String>; 5], Holder>, event: StoredEvent) {
    let StoredEvent { at, account, caller, peer, count, .. } = event;
    let (event, caller_kind) = (event.event.into_owned(), event.caller_kind.map(Into::into));
    let host = peer.map(|peer| match peer.parse::<SocketAddr>() {
        Ok(address) => address.ip().to_string(),
        Err(_) => peer,
    });
    let key =
        [account.clone(), Some(event.clone()), caller.clone(), caller_kind.clone(), host.clone()];
    let holder = holders.entry(key).or_insert_with(|| Holder {
        account,
        event,
        caller,
        caller_kind,
        host,
        times: 0,
        first: LocalTime(at),
        last: LocalTime(at),
    });
    holder.times = holder.times.saturating_add(count);
    holder.first.0 = holder.first.0.min(at);
    holder.last.0 = holder.last.0.max(at);
}

fn print(holders: &[Holder], as_json: bool) -> anyhow::Result<()> {
    if as_json {
        return output::json(&holders);
    }
    let mut table =
        Table::new(["ACCOUNT", "EVENT", "CALLER", "BY", "HOST", "TIMES", "FIRST", "LAST"]);
    for holder in holders {
        table.row([
            or_dash(holder.account.as_ref()),
            holder.event.clone(),
            or_dash(holder.caller.as_ref()),
            or_dash(holder.caller_kind.as_ref()),
            or_dash(holder.host.as_ref()),
            holder.times.to_string(),
            holder.first.to_string(),
            holder.last.to_string(),
        ]);
    }
    table.print("the log does not name this token: nobody was given it, or its records are older than what is kept")
}
