//! `account history`: what happened to an account, and who used it, from the audit log.

use std::{collections::BTreeMap, process::ExitCode};

use clap::Args;
use futures_util::TryStreamExt;
use serde::Serialize;

use crate::{
    audit::record::Event,
    cli::{
        global::GlobalArgs,
        output::{self, Table, or_dash, word},
        time::{LocalTime, Moment},
    },
    domain::{
        account::AccountName,
        clock::{Clock, Timestamp},
    },
    store::audit::{AccountUse, AuditSnapshot, EventFilter, StoredEvent},
};

/// What happened to an account itself; calls are summed up for each caller.
const EVENTS: [Event; 6] = [
    Event::AccountRegistered,
    Event::AccountChanged,
    Event::AccountRemoved,
    Event::TokenIssued,
    Event::TokenRepeated,
    Event::IssueFailed,
];

/// Details that say nothing to people: positions in tables, and the whole row after the change.
const HIDDEN: [&str; 4] = ["change_id", "table", "operation", "state"];

#[derive(Args, Debug)]
pub(super) struct HistoryArgs {
    /// The account's name; it may have been removed since
    name: AccountName,
    /// Only from this time on: an RFC 3339 time, or a duration before now, such as 7d
    #[arg(long, value_name = "T")]
    since: Option<Moment>,
    /// Only before this time
    #[arg(long, value_name = "T")]
    until: Option<Moment>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Events in a row that differ only in their times and numbers.
#[derive(Debug, Serialize)]
struct EventRun {
    first: LocalTime,
    last: LocalTime,
    times: i64,
    event: String,
    outcome: String,
    reason: Option<String>,
    /// The details of the last of them.
    detail: BTreeMap<String, String>,
}

/// The calls of one caller on the account.
#[derive(Debug, Serialize)]
struct User {
    caller: Option<String>,
    served: i64,
    reported: i64,
    refused: i64,
    first: LocalTime,
    last: LocalTime,
}

pub(super) async fn run(global: &GlobalArgs, args: HistoryArgs) -> anyhow::Result<ExitCode> {
    let now = Clock::System.wall();
    let filter = EventFilter {
        account: Some(args.name.to_string()),
        events: Some(EVENTS.map(|event| event.as_str().to_owned()).to_vec()),
        since: args.since.map(|since| since.before(now)),
        until: args.until.map(|until| until.before(now)),
        ..EventFilter::default()
    };
    let admin = global.auditor().await?;
    let mut snapshot = AuditSnapshot::open(admin.pool()).await?;
    let kept_since = snapshot.calls_kept_since().await?;
    let users = snapshot.users_of(args.name.as_str(), filter.since, filter.until).await?;
    let mut runs = Vec::new();
    let mut unreadable = false;
    let mut events = snapshot.events(&filter);
    while let Some(event) = events.try_next().await? {
        match event {
            Ok(event) => add(&mut runs, event),
            Err(row) => {
                unreadable = true;
                output::note(format_args!("warning: {row}"));
            }
        }
    }
    drop(events);
    // Retention waits for it, and the output may be read slowly.
    snapshot.close().await?;
    let known = !runs.is_empty() || !users.is_empty();
    if known || args.json {
        print(&args.name, &runs, users, args.json)?;
    }
    if let Some(kept) = kept_since.filter(|kept| filter.since.is_none_or(|since| since < *kept)) {
        output::note(removed_note(kept));
    }
    if !known {
        output::note(format_args!("the log has no record of account {} at such a time", args.name));
    }
    Ok(ExitCode::from(u8::from(!known || unreadable)))
}

/// Says that earlier calls and issues are unknown.
fn removed_note(kept: Timestamp) -> String {
    format!(
        "note: records of calls and issues before {} were removed by retention",
        LocalTime(kept)
    )
}

/// Adds `event`, to the last run of events if it differs from that only in times and numbers.
fn add(runs: &mut Vec<EventRun>, event: StoredEvent) {
    let at = LocalTime(event.at);
    let mut detail = event.detail;
    detail.retain(|name, _| !HIDDEN.contains(&&**name));
    if let Some(generation) = event.generation {
        detail.insert("generation".into(), generation.to_string());
    }
    let run = EventRun {
        first: at,
        last: at,
        times: event.count,
        event: event.event.into_owned(),
        outcome: event.outcome.into_owned(),
        reason: event.reason,
        detail,
    };
    match runs.last_mut().filter(|last| last.continues_with(&run)) {
        Some(last) => {
            last.last = at;
            last.times = last.times.saturating_add(run.times);
            last.detail = run.detail;
        }
        None => runs.push(run),
    }
}

impl EventRun {
    /// Returns whether `next` is more of the same: issues for the same credential, or failures with the same reason.
    /// Each change stands for itself.
    fn continues_with(&self, next: &Self) -> bool {
        let issues = [Event::TokenIssued, Event::TokenRepeated, Event::IssueFailed];
        let same = |name| self.detail.get(name) == next.detail.get(name);
        issues.iter().any(|event| event.as_str() == self.event)
            && (&self.event, &self.outcome, &self.reason)
                == (&next.event, &next.outcome, &next.reason)
            && ["client_id", "upstream_code", "allowed_ip"].into_iter().all(same)
    }

    fn describe(&self) -> String {
        let reason = self.reason.iter().map(|reason| format!("reason={reason}"));
        let details = self.detail.iter().map(|(name, value)| format!("{name}={}", word(value)));
        reason.chain(details).collect::<Vec<_>>().join(" ")
    }
}

fn print(
    name: &AccountName,
    runs: &[EventRun],
    users: Vec<AccountUse>,
    as_json: bool,
) -> anyhow::Result<()> {
    let users: Vec<_> = users
        .into_iter()
        .map(|it| User {
            caller: it.caller,
            served: it.served,
            reported: it.reported,
            refused: it.refused,
            first: LocalTime(it.first_at),
            last: LocalTime(it.last_at),
        })
        .collect();
    if as_json {
        return output::json(
            &serde_json::json!({ "account": name.as_str(), "events": runs, "callers": users }),
        );
    }
    let mut table = Table::new(["FIRST", "LAST", "TIMES", "EVENT", "DETAILS"]);
    for run in runs {
        let ended = (run.times > 1).then_some(run.last);
        table.row([
            run.first.to_string(),
            or_dash(ended),
            run.times.to_string(),
            run.event.clone(),
            run.describe(),
        ]);
    }
    table.print("no changes and no issues")?;
    output::line("")?;
    let mut table = Table::new(["CALLER", "SERVED", "REPORTED", "REFUSED", "FIRST", "LAST"]);
    for user in &users {
        table.row([
            or_dash(user.caller.as_ref()),
            user.served.to_string(),
            user.reported.to_string(),
            user.refused.to_string(),
            user.first.to_string(),
            user.last.to_string(),
        ]);
    }
    table.print("no calls")
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, TimeDelta};

    use super::*;
    use crate::audit::{chain::tests::link, record::Record};

    fn event(seconds: i64, event: Event, detail: &[(&'static str, &str)]) -> StoredEvent {
        let mut record = Record::new(DateTime::UNIX_EPOCH + TimeDelta::seconds(seconds), event);
        if event == Event::IssueFailed {
            record = record.outcome("unavailable", "UNREACHABLE");
        }
        record.generation = (event == Event::TokenIssued).then_some(seconds);
        let record = detail.iter().fold(record, |record, (name, value)| record.with(name, *value));
        StoredEvent::from_record(record, &link())
    }

    #[test]
    fn issues_and_failures_of_the_same_kind_in_a_row_are_one_line_and_changes_are_not() {
        let mut runs = Vec::new();
        let id = ("client_id", "a");
        for it in [
            event(1, Event::AccountRegistered, &[("change_id", "1"), ("session_user", "jane")]),
            event(2, Event::TokenIssued, &[id]),
            event(3, Event::TokenIssued, &[id, ("expires_at", "later")]),
            event(4, Event::TokenIssued, &[("client_id", "b")]),
            event(5, Event::IssueFailed, &[("message", "m 1")]),
            event(6, Event::IssueFailed, &[("message", "m 2")]),
            event(7, Event::IssueFailed, &[("upstream_code", "61006")]),
            event(8, Event::AccountChanged, &[("enabled", "true → false")]),
            event(9, Event::AccountChanged, &[("enabled", "false → true")]),
        ] {
            add(&mut runs, it);
        }
        let lines: Vec<_> =
            runs.iter().map(|it| format!("{} {} {}", it.times, it.event, it.describe())).collect();
        assert_eq!(
            lines,
            [
                "1 account_registered session_user=jane",
                "2 token_issued client_id=a expires_at=later generation=3",
                "1 token_issued client_id=b generation=4",
                "2 issue_failed reason=UNREACHABLE message=\"m 2\"",
                "1 issue_failed reason=UNREACHABLE upstream_code=61006",
                "1 account_changed enabled=\"true → false\"",
                "1 account_changed enabled=\"false → true\"",
            ]
        );
        assert_eq!(runs[1].last.0.timestamp(), 3);
    }
}
