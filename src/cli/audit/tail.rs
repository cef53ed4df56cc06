//! `audit tail`.

use std::{collections::HashSet, time::Duration};

use clap::Args;
use sqlx::PgPool;

use super::{FilterArgs, line::describe};
use crate::{
    cli::{Global, output},
    domain::clock::{Clock, Timestamp, delta},
    store::audit::{EventFilter, StoredEvent, events_after, latest_events},
};

/// How often a follower asks for more.
const PAUSE: Duration = Duration::from_secs(1);
/// How far back it asks: a replica that was cut off for less delivers nothing that it misses.
const OVERLAP: Duration = Duration::from_mins(2);
/// Events a question.
const PAGE: i64 = 1_000;

#[derive(Args, Debug)]
pub(super) struct TailArgs {
    /// How many
    #[arg(short, default_value_t = 20, value_name = "N",
          value_parser = clap::value_parser!(i64).range(0..=1_000_000))]
    n: i64,
    /// Goes on with those that come
    #[arg(long, short, conflicts_with = "until")]
    follow: bool,
    #[command(flatten)]
    filter: FilterArgs,
    /// Prints one JSON object a line
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(global: &Global, args: TailArgs) -> anyhow::Result<()> {
    let admin = global.admin(None).await?;
    let now = Clock::System.now();
    let filter = args.filter.filter(now);
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
    Ok(())
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

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::{super::line::tests::event, *};

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
