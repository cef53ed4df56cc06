//! `caller review`: what of the callers' access to take away or to renew.

mod findings;

use std::{process::ExitCode, time::Duration};

use chrono::{NaiveTime, TimeDelta};
use clap::Args;
use serde_json::json;

use self::findings::{Callers, Finding, Limits, Used};
use super::{
    super::{
        output::{self, Table, note},
        time::{LocalTime, positive_duration},
    },
    show::name_unreadable,
};
use crate::{
    domain::clock::Clock,
    store::{
        StoreError,
        admin::{Admin, Listed},
        audit::AuditSnapshot,
    },
};

/// The exit code if there are findings: a pipeline can tell them from a failure of the command, which is 1.
const FOUND: u8 = 3;

#[derive(Args, Debug)]
pub(super) struct ReviewArgs {
    /// For how long a grant or a caller was not used, to be reported
    #[arg(long, value_name = "DURATION", default_value = "90d", value_parser = positive_duration)]
    unused: Duration,
    /// How soon a bearer or a grant ends, to be reported
    #[arg(long, value_name = "DURATION", default_value = "14d", value_parser = humantime::parse_duration)]
    ending: Duration,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(admin: &Admin, args: ReviewArgs) -> anyhow::Result<ExitCode> {
    let now = Clock::System.wall();
    let (callers, bearers, grants) =
        (admin.callers().await?, admin.bearers(None).await?, admin.grants().await?);
    let (callers, bearers, grants) = (readable(callers), readable(bearers), readable(grants));
    let all_read = callers.1 && bearers.1 && grants.1;
    let limits = Limits::new(now, args.unused, args.ending);
    let callers = Callers::new(callers.0, bearers.0, grants.0);
    let mut snapshot = AuditSnapshot::open(admin.pool()).await?;
    let kept_since = snapshot.calls_kept_since().await?;
    let used = read_uses(&mut snapshot, &callers, &limits).await?;
    let (unknown, findings): (Vec<_>, Vec<_>) =
        callers.findings(&used, &limits).into_iter().partition(|finding| {
            finding.needs_calls() && kept_since.is_some_and(|kept| kept > limits.unused_since)
        });
    // Retention waits for it, and the output may be read slowly.
    snapshot.close().await?;
    if args.json {
        output::json(&json!({
            "unused_since": LocalTime(limits.unused_since),
            "ending_before": LocalTime(limits.ending_before),
            "calls_kept_since": kept_since.map(LocalTime),
            "not_known": unknown.len(),
            "findings": findings,
        }))?;
    } else {
        print(&findings, &limits)?;
    }
    if let Some(kept) = kept_since.filter(|_| !unknown.is_empty()) {
        note(format_args!(
            "note: {} grants or callers were not used since {}. Whether they were used before is not known, because \
             retention removed the records: --unused {}d reports them",
            unknown.len(),
            LocalTime(kept),
            (now - kept).num_days(),
        ));
    }
    Ok(match (all_read, findings.is_empty()) {
        (false, _) => ExitCode::FAILURE,
        (true, true) => ExitCode::SUCCESS,
        (true, false) => ExitCode::from(FOUND),
    })
}

/// Returns the rows that can be read, and whether these are all. Names the others.
fn readable<T>(listed: Listed<T>) -> (Vec<T>, bool) {
    name_unreadable(&listed);
    (listed.rows, listed.unreadable.is_empty())
}

fn print(findings: &[Finding], limits: &Limits) -> anyhow::Result<()> {
    let since = LocalTime(limits.unused_since);
    let mut table = Table::new(["FINDING", "CALLER", "SUBJECT", "DETAILS"]);
    for finding in findings {
        table.row(match finding {
            Finding::IdleCaller { caller, created_at, grants } => [
                "idle caller".into(),
                caller.clone(),
                "-".into(),
                format!("no call since {since}; created at {created_at}, {grants} grants"),
            ],
            Finding::UnusedGrant { caller, pattern, rights, created_at } => [
                "unused grant".into(),
                caller.clone(),
                pattern.clone(),
                format!("not used since {since}; {}, granted at {created_at}", rights.join(",")),
            ],
            Finding::EndingGrant { caller, pattern, ends_at } => [
                "ending grant".into(),
                caller.clone(),
                pattern.clone(),
                format!("ends at {ends_at}"),
            ],
            Finding::EndlessBearer { caller, bearer, created_at } => [
                "endless bearer".into(),
                caller.clone(),
                format!("bearer {bearer}"),
                format!("never ends; created at {created_at}"),
            ],
            Finding::EndingBearer { caller, bearer, ends_at } => [
                "ending bearer".into(),
                caller.clone(),
                format!("bearer {bearer}"),
                format!("ends at {ends_at}"),
            ],
        });
    }
    table.print("nothing to review")
}

/// Reads the log day by day, the newest first, until everything is known to be used, or the time is over.
async fn read_uses(
    snapshot: &mut AuditSnapshot,
    callers: &Callers,
    limits: &Limits,
) -> Result<Used, StoreError> {
    let mut used = Used::default();
    // Clocks of brokers may be a little ahead.
    let mut until = limits.now + TimeDelta::days(1);
    let Some(first) = snapshot.first_at().await? else { return Ok(used) };
    let begin = first.max(limits.unused_since);
    while until > begin {
        let undecided: Vec<_> = callers.not_all_used(&used, limits);
        if undecided.is_empty() {
            break;
        }
        let day =
            (until - TimeDelta::microseconds(1)).date_naive().and_time(NaiveTime::MIN).and_utc();
        let since = day.max(begin);
        for it in snapshot.uses(&undecided, since, until).await? {
            used.add(it);
        }
        until = since;
    }
    Ok(used)
}
