//! `audit tail`: prints the last events, and follows later ones.

use std::{collections::HashSet, process::ExitCode, time::Duration};

use clap::Args;
use serde_json::json;
use sqlx::PgPool;

use super::{event_text::describe, filter_args::FilterArgs};
use crate::{
    cli::{global::GlobalArgs, output, time::LocalTime},
    domain::clock::{Clock, Timestamp, delta},
    store::audit::{Decoded, EventFilter, StoredEvent, events_after, latest_events},
};

/// How often later events are queried.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// How far back each query goes from the newest event, or from now if that one's time lies in the future. Events
/// are missed only if their replica could not reach Postgres for longer, or if its clock is behind by more.
const OVERLAP: Duration = Duration::from_mins(2);
/// Most events per query.
const PAGE_SIZE: i64 = 1_000;

/// How many events are printed unless the command says so, or says from when on.
const DEFAULT_EVENTS: i64 = 20;
/// The most events that are printed before following.
const MAX_EVENTS: i64 = 1_000_000;

#[derive(Args, Debug)]
pub(super) struct TailArgs {
    /// The most events; default: 20, or 1,000,000 with --since
    #[arg(short, value_name = "N", value_parser = clap::value_parser!(i64).range(0..=MAX_EVENTS))]
    n: Option<i64>,
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
    let most = args.n.unwrap_or(if filter.since.is_some() { MAX_EVENTS } else { DEFAULT_EVENTS });
    let last = latest_events(admin.pool(), &filter, most).await?;
    if last.is_empty() && !args.follow {
        output::note("no events");
    }
    for event in &last {
        print(event, args.json)?;
    }
    if args.follow {
        follow(admin.pool(), &filter, &last, args.json).await?;
    }
    Ok(ExitCode::from(u8::from(last.iter().any(Result::is_err))))
}

/// Prints the events after `last`, which are printed already.
async fn follow(
    pool: &PgPool,
    filter: &EventFilter,
    last: &[Decoded<StoredEvent>],
    json: bool,
) -> anyhow::Result<()> {
    let now = Clock::System.wall();
    let mut printed = Printed::new(last, now);
    let mut warned = false;
    let mut warn_once = |event: &Decoded<StoredEvent>, now| {
        if !warned && let Some(warning) = future_warning(event, now) {
            output::note(warning);
            warned = true;
        }
    };
    for event in last {
        warn_once(event, now);
    }
    loop {
        Clock::System.sleep(POLL_INTERVAL).await;
        let now = Clock::System.wall();
        let mut after = printed.query_from();
        loop {
            let page = events_after(pool, filter, Some(after.clone()), PAGE_SIZE).await?;
            for event in &page {
                if printed.is_new(event, now) {
                    warn_once(event, now);
                    print(event, json)?;
                }
            }
            match page.last() {
                Some(last) => after = position(last),
                None => break,
            }
        }
    }
}

/// Returns a warning if the event's time lies further in the future than queries go back. Clocks that differ by less
/// are usual.
fn future_warning(event: &Decoded<StoredEvent>, now: Timestamp) -> Option<String> {
    let event = event.as_ref().ok().filter(|event| event.at > now + delta(OVERLAP))?;
    let (at, chain, seq) = (LocalTime(event.at), &event.chain, event.seq);
    Some(format!(
        "warning: a record lies in the future: {at}, chain {chain:?}, record {seq}. Either its replica's clock is \
         ahead, or the clock of this host is behind. Later ones are not reported"
    ))
}

/// The events that were printed, as far back as queries go.
struct Printed {
    /// Time of the last event that was printed before following and is not in the future. No earlier event is
    /// printed after it.
    started_at: Timestamp,
    /// Time of the newest event that was printed, at most the present time: an event from the future must not hide
    /// those that come after it.
    newest: Timestamp,
    /// The events and the rows that cannot be read.
    positions: HashSet<Position>,
}

impl Printed {
    fn new(events: &[Decoded<StoredEvent>], now: Timestamp) -> Self {
        let positions = || events.iter().map(position);
        let past = |position: &Position| position.0 <= now;
        let started_at = positions().rev().find(past).map_or(now, |position| position.0);
        Self { started_at, newest: started_at, positions: positions().collect() }
    }

    fn query_from(&mut self) -> Position {
        let from = (self.newest - delta(OVERLAP)).max(self.started_at);
        self.positions.retain(|(at, ..)| *at >= from);
        // This sorts before every event of that time.
        (from, String::new(), i64::MIN)
    }

    /// Returns whether `event`, read at `now`, was not printed yet, and counts it as printed.
    fn is_new(&mut self, event: &Decoded<StoredEvent>, now: Timestamp) -> bool {
        let position = position(event);
        self.newest = self.newest.max(position.0.min(now));
        self.positions.insert(position)
    }
}

/// Time, chain and number of a row: the order of queries.
type Position = (Timestamp, String, i64);

/// Returns the position of a row, whether it can be read or not. Queries return only rows with a time.
fn position(event: &Decoded<StoredEvent>) -> Position {
    match event {
        Ok(event) => (event.at, event.chain.clone(), event.seq),
        Err(row) => (row.at.unwrap_or_default(), row.chain.clone(), row.seq),
    }
}

fn print(event: &Decoded<StoredEvent>, json: bool) -> anyhow::Result<()> {
    match event {
        Ok(event) if json => output::json_line(event),
        Ok(event) => output::line(describe(event)),
        Err(row) if json => output::json_line(&json!({ "unreadable": row })),
        Err(row) => output::line(row),
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::{super::event_text::tests::event, *};
    use crate::audit::unreadable::Unreadable;

    fn at(seconds: i64) -> Timestamp {
        DateTime::from_timestamp_secs(seconds).unwrap()
    }

    #[test]
    fn late_events_are_printed_and_each_event_once() {
        let now = at(1_000);
        let mut printed = Printed::new(&[Ok(event(10, 1))], now);
        assert!(!printed.is_new(&Ok(event(10, 1)), now));
        assert!(printed.is_new(&Ok(event(200, 3)), now));
        let (from, ..) = printed.query_from();
        assert_eq!(from, at(80));
        assert!(printed.is_new(&Ok(event(90, 2)), now));
        assert!(!printed.is_new(&Ok(event(200, 3)), now));
        let unreadable = |seconds| {
            let row = Unreadable::row("audit_events", "c1", 7, "detail is null");
            Err(Box::new(Unreadable { at: Some(at(seconds)), ..*row }))
        };
        assert!(printed.is_new(&unreadable(250), now) && !printed.is_new(&unreadable(250), now));
        assert!(printed.is_new(&unreadable(251), now), "another row with the same number");
        assert_eq!(printed.query_from().0, at(131), "queries go on after rows that cannot be read");
    }

    #[test]
    fn an_event_from_the_future_is_printed_once_and_hides_no_other() {
        let now = at(1_000);
        let far = 250_000_000_000;
        let mut printed = Printed::new(&[Ok(event(900, 1)), Ok(event(far, 2))], now);
        assert_eq!(printed.query_from().0, at(900));
        assert!(printed.is_new(&Ok(event(far, 3)), now));
        assert_eq!(printed.query_from().0, at(900));
        assert!(printed.is_new(&Ok(event(1_000, 4)), now));
        for seq in [2, 3] {
            assert!(!printed.is_new(&Ok(event(far, seq)), at(5_000)), "{seq}");
        }
        assert_eq!(printed.query_from().0, at(4_880));
        assert!(!printed.is_new(&Ok(event(far, 3)), at(5_000)));

        assert_eq!(Printed::new(&[Ok(event(far, 1))], now).query_from().0, now);
        let warning = future_warning(&Ok(event(far, 2)), now).unwrap();
        assert!(warning.contains("chain \"c1\", record 2"), "{warning}");
        assert_eq!(future_warning(&Ok(event(1_100, 2)), now), None);
    }
}
