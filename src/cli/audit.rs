//! `audit`.

use std::{collections::HashSet, iter, process::ExitCode, time::Duration};

use clap::{Args, Subcommand};
use sqlx::PgPool;

use super::{
    Global, output,
    time::{LocalTime, Moment},
};
use crate::{
    account::AccountName,
    clock::{Clock, Timestamp, delta},
    store::audit::{EventFilter, StoredEvent, events_after, latest_events},
};

/// How often a follower asks for more.
const PAUSE: Duration = Duration::from_secs(1);
/// How far back it asks: a replica that was cut off for less delivers nothing that it misses.
const OVERLAP: Duration = Duration::from_mins(2);
/// Events a question.
const PAGE: i64 = 1_000;

/// Reads the audit log
#[derive(Args, Debug)]
pub(super) struct AuditArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Prints the last events, a line each
    #[command(after_help = "\
Examples:
  token-broker audit tail --follow
  token-broker audit tail -n 100 --account acme --event get_token --outcome permission_denied
  token-broker audit tail --since 24h --json | jq .caller")]
    Tail(TailArgs),
}

#[derive(Args, Debug)]
struct TailArgs {
    /// How many
    #[arg(short, default_value_t = 20, value_name = "N",
          value_parser = clap::value_parser!(i64).range(0..=1_000_000))]
    n: i64,
    /// Goes on with those that come
    #[arg(long, short)]
    follow: bool,
    /// Of this account alone
    #[arg(long)]
    account: Option<AccountName>,
    /// Of this caller alone
    #[arg(long)]
    caller: Option<AccountName>,
    /// Of this kind alone, such as `get_token`
    #[arg(long)]
    event: Option<String>,
    /// With this outcome alone, such as `ok` or `permission_denied`
    #[arg(long)]
    outcome: Option<String>,
    /// From then on: RFC 3339, or so long ago, such as 24h
    #[arg(long, value_name = "T")]
    since: Option<Moment>,
    /// Before then
    #[arg(long, value_name = "T", conflicts_with = "follow")]
    until: Option<Moment>,
    /// Prints one JSON object a line
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(global: &Global, args: AuditArgs) -> anyhow::Result<ExitCode> {
    let Command::Tail(args) = args.command;
    let admin = global.admin(None).await?;
    let now = Clock::System.now();
    let filter = EventFilter {
        account: args.account.map(|name| name.to_string()),
        caller: args.caller.map(|name| name.to_string()),
        event: args.event,
        outcome: args.outcome,
        since: args.since.map(|since| since.before(now)),
        until: args.until.map(|until| until.before(now)),
    };
    let last = latest_events(admin.pool(), &filter, args.n).await?;
    if last.is_empty() && !args.follow {
        output::note("no events");
    }
    for event in &last {
        print(event, args.json)?;
    }
    if args.follow {
        follow(admin.pool(), &filter, Printed::new(&last, now), args.json).await?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn follow(
    pool: &PgPool,
    filter: &EventFilter,
    mut printed: Printed,
    json: bool,
) -> anyhow::Result<()> {
    loop {
        Clock::System.sleep(PAUSE).await;
        let mut after = printed.look_from();
        loop {
            let page = events_after(pool, filter, Some(after.clone()), PAGE).await?;
            let Some(last) = page.last() else { break };
            after = (last.at, last.chain.clone(), last.seq);
            for event in &page {
                if printed.is_new(event) {
                    print(event, json)?;
                }
            }
        }
    }
}

/// What a follower has printed of the time that it looks at again and again.
struct Printed {
    /// What came before the follower did is not its concern, unless it is printed already.
    started_at: Timestamp,
    newest: Timestamp,
    places: HashSet<(Timestamp, String, i64)>,
}

impl Printed {
    fn new(events: &[StoredEvent], now: Timestamp) -> Self {
        let started_at = events.last().map_or(now, |event| event.at);
        let places = events.iter().map(place).collect();
        Self { started_at, newest: started_at, places }
    }

    fn look_from(&mut self) -> (Timestamp, String, i64) {
        let from = (self.newest - delta(OVERLAP)).max(self.started_at);
        self.places.retain(|(at, ..)| *at >= from);
        // No chain's name is empty, so this lies before every event of that moment.
        (from, String::new(), 0)
    }

    fn is_new(&mut self, event: &StoredEvent) -> bool {
        self.newest = self.newest.max(event.at);
        self.places.insert(place(event))
    }
}

fn place(event: &StoredEvent) -> (Timestamp, String, i64) {
    (event.at, event.chain.clone(), event.seq)
}

fn print(event: &StoredEvent, json: bool) -> anyhow::Result<()> {
    if json { output::line(serde_json::to_string(event)?) } else { output::line(describe(event)) }
}

/// A line for eyes; the hashes are left to `--json`.
fn describe(event: &StoredEvent) -> String {
    let known = |name, value: Option<&str>| Some(format!("{name}={}", word(value?)));
    let number = |name, value: Option<i64>| Some(format!("{name}={}", value?));
    let fields = [
        known("reason", event.reason.as_deref()),
        known("account", event.account.as_deref()),
        known("caller", event.caller.as_deref()),
        known("by", event.caller_kind.as_deref()),
        known("peer", event.peer.as_deref()),
        number("generation", event.generation),
        known("token", event.token_fingerprint.as_deref()),
        number("latency_us", event.latency_us),
        number("count", Some(event.count).filter(|count| *count != 1)),
        known("trace", event.trace_id.as_deref()),
    ];
    let details =
        event.detail.iter().map(|(name, value)| format!("{}={}", word(name), word(value)));
    let start = format!("{}  {:<22} {:<18}", LocalTime(event.at), event.event, event.outcome);
    let place = format!("at {}/{}#{}", event.instance, event.chain, event.seq);
    let words: Vec<_> = iter::once(start)
        .chain(fields.into_iter().flatten())
        .chain(details)
        .chain([place])
        .collect();
    words.join(" ")
}

/// `value`, quoted where it would not read as one word.
fn word(value: &str) -> String {
    let plain = |c: char| !c.is_whitespace() && !c.is_control() && !matches!(c, '"' | '=');
    if !value.is_empty() && value.chars().all(plain) {
        return value.to_owned();
    }
    format!("{value:?}")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use chrono::{DateTime, TimeDelta};

    use super::*;
    use crate::audit::chain::Digest;

    fn event(seconds: i64, seq: i64) -> StoredEvent {
        StoredEvent {
            instance: "host-1".into(),
            chain: "c1".into(),
            seq,
            at: DateTime::UNIX_EPOCH + TimeDelta::seconds(seconds),
            event: "get_token".into(),
            caller: Some("billing".into()),
            caller_kind: Some("bearer".into()),
            peer: None,
            account: Some("a name\nof many lines".into()),
            outcome: "permission_denied".into(),
            reason: Some("NOT_GRANTED".into()),
            generation: None,
            token_fingerprint: None,
            trace_id: None,
            latency_us: Some(42),
            count: 3,
            detail: BTreeMap::from([("method".into(), "GetToken".into())]),
            prev_hash: Digest([0; 32]),
            hash: Digest([0; 32]),
        }
    }

    #[test]
    fn an_event_is_one_line_with_all_that_is_known() {
        let line = describe(&event(0, 7));
        assert!(!line.contains('\n'), "{line}");
        assert!(
            line.ends_with(
                "get_token              permission_denied  reason=NOT_GRANTED \
                 account=\"a name\\nof many lines\" caller=billing by=bearer latency_us=42 count=3 \
                 method=GetToken at host-1/c1#7"
            ),
            "{line}"
        );
    }

    #[test]
    fn a_follower_prints_each_event_once_also_late_ones() {
        let mut printed = Printed::new(&[event(10, 1)], DateTime::UNIX_EPOCH);
        assert!(!printed.is_new(&event(10, 1)));
        assert!(printed.is_new(&event(200, 3)));
        let (from, ..) = printed.look_from();
        assert_eq!(from.timestamp(), 80);
        assert!(printed.is_new(&event(90, 2)));
        assert!(!printed.is_new(&event(200, 3)));
    }
}
