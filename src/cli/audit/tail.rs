//! `audit tail`: prints the last events, and follows later ones.

use std::{collections::HashSet, process::ExitCode, time::Duration};

use clap::Args;
use serde_json::json;
use sqlx::PgPool;

use super::{event_text::describe, filter_args::FilterArgs};
use crate::{
    cli::{global::GlobalArgs, output},
    domain::clock::{Clock, Timestamp, delta},
    store::audit::{Decoded, EventFilter, StoredEvent, events_after, latest_events},
};

/// How often later events are queried.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// How far back each query goes. Events are missed only if their replica could not reach Postgres for
/// longer.
const OVERLAP: Duration = Duration::from_mins(2);
/// Most events per query.
const PAGE_SIZE: i64 = 1_000;

#[derive(Args, Debug)]
pub(super) struct TailArgs {
    /// The number of events
    #[arg(short, default_value_t = 20, value_name = "N",
          value_parser = clap::value_parser!(i64).range(0..=1_000_000))]
    n: i64,
    /// Print later events as they arrive
    #[arg(long, short, conflicts_with = "until")]
    follow: bool,
    #[command(flatten)]
    filter: FilterArgs,
    /// Print one JSON object per line
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(global: &GlobalArgs, args: TailArgs) -> anyhow::Result<ExitCode> {
    let admin = global.auditor().await?;
    let now = Clock::System.wall();
    let filter = args.filter.into_filter(now);
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
    Ok(ExitCode::from(u8::from(last.iter().any(Result::is_err))))
}

async fn follow(
    pool: &PgPool,
    filter: &EventFilter,
    mut printed: Printed,
    json: bool,
) -> anyhow::Result<()> {
    loop {
        Clock::System.sleep(POLL_INTERVAL).await;
        let mut after = printed.query_from();
        loop {
            let page = events_after(pool, filter, Some(after.clone()), PAGE_SIZE).await?;
            for event in &page {
                if printed.is_new(event) {
                    print(event, json)?;
                }
            }
            // A record that cannot be read has no time from which to go on. Pages are large, so that this
            // is the next record that can.
            match page.iter().rev().find_map(|event| event.as_ref().ok()) {
                Some(last) => after = position(last),
                None => break,
            }
        }
    }
}

/// The events that were printed, as far back as queries go.
struct Printed {
    /// Time of the last event that was printed before following. No earlier event is printed after it.
    started_at: Timestamp,
    /// Time of the newest event that was printed.
    newest: Timestamp,
    positions: HashSet<(Timestamp, String, i64)>,
    /// Chain and number of the rows that cannot be read and were reported.
    unreadable: HashSet<(String, i64)>,
}

impl Printed {
    fn new(events: &[Decoded<StoredEvent>], now: Timestamp) -> Self {
        let readable = || events.iter().filter_map(|event| event.as_ref().ok());
        let started_at = readable().next_back().map_or(now, |event| event.at);
        let positions = readable().map(position).collect();
        let unreadable = events.iter().filter_map(|event| event.as_ref().err());
        let unreadable = unreadable.map(|row| (row.chain.clone(), row.seq)).collect();
        Self { started_at, newest: started_at, positions, unreadable }
    }

    fn query_from(&mut self) -> (Timestamp, String, i64) {
        let from = (self.newest - delta(OVERLAP)).max(self.started_at);
        self.positions.retain(|(at, ..)| *at >= from);
        // No chain has an empty name, so this sorts before every event of that time.
        (from, String::new(), 0)
    }

    fn is_new(&mut self, event: &Decoded<StoredEvent>) -> bool {
        match event {
            Ok(event) => {
                self.newest = self.newest.max(event.at);
                self.positions.insert(position(event))
            }
            Err(row) => self.unreadable.insert((row.chain.clone(), row.seq)),
        }
    }
}

fn position(event: &StoredEvent) -> (Timestamp, String, i64) {
    (event.at, event.chain.clone(), event.seq)
}

fn print(event: &Decoded<StoredEvent>, json: bool) -> anyhow::Result<()> {
    match event {
        Ok(event) if json => output::line(serde_json::to_string(event)?),
        Ok(event) => output::line(describe(event)),
        Err(row) if json => output::line(json!({ "unreadable": row })),
        Err(row) => output::line(row),
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::{super::event_text::tests::event, *};
    use crate::audit::unreadable::Unreadable;

    #[test]
    fn late_events_are_printed_and_each_event_once() {
        let mut printed = Printed::new(&[Ok(event(10, 1))], DateTime::UNIX_EPOCH);
        assert!(!printed.is_new(&Ok(event(10, 1))));
        assert!(printed.is_new(&Ok(event(200, 3))));
        let (from, ..) = printed.query_from();
        assert_eq!(from.timestamp(), 80);
        assert!(printed.is_new(&Ok(event(90, 2))));
        assert!(!printed.is_new(&Ok(event(200, 3))));
        let unreadable = Err(Unreadable::row("audit_events", "c1", 7, "detail is null"));
        assert!(printed.is_new(&unreadable) && !printed.is_new(&unreadable));
    }
}
