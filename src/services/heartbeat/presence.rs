//! What the heartbeats of replicas mean: who is alive, who knows of this replica, and whether this process may
//! take over the row of an earlier one. Decisions about values that were read, without effects.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    time::Duration,
};

use tokio::time::Instant;

use crate::{
    domain::clock::Timestamp,
    store::instances::{EarlierProcess, OtherReplica},
};

/// The pause between two heartbeats.
pub(super) const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);
/// A replica whose last heartbeat is older than this counts as stopped.
pub(super) const ABSENT_AFTER: Duration = Duration::from_secs(30);
/// For how long after a heartbeat the knowledge that there is no other replica holds. It is shorter than
/// [`ABSENT_AFTER`]: a replica that was paused does not count as the only one any more when others count it as
/// stopped. It is longer than the change feed needs to notice that the database hangs, 13 seconds.
pub(super) const ALONE_FOR: Duration = Duration::from_secs(25);
/// After a longer gap between two of its own heartbeats, a replica does not trust that the old heartbeats of others
/// mean that they have stopped: the database may have been away for all. It is so much shorter than
/// [`ABSENT_AFTER`] that a replica which stores its heartbeats late, or returns late after an outage, still counts
/// as alive.
pub(super) const LONGEST_GAP: Duration = Duration::from_secs(15);
/// A start does not wait for the acknowledgement of a replica that has stored no heartbeat for this long, while
/// the database answered, since it was probably killed.
pub(super) const PROMPT: Duration = Duration::from_secs(5);
/// The same for a release without announcements, whose heartbeats are ten seconds apart.
pub(super) const PROMPT_OF_EARLIER_RELEASE: Duration = Duration::from_secs(12);
/// What the rows of the other replicas mean for this one.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Standing {
    /// How many others count as alive.
    pub others: usize,
    /// How many of them do not know of this replica, as far as is known.
    pub unaware: usize,
    /// How many of those are expected to acknowledge this replica within moments.
    pub awaited: usize,
}

/// Judges the other replicas. `observed` is for how long this process has seen their heartbeats.
pub(super) fn standing(others: &[OtherReplica], observed: Duration) -> Standing {
    let alive = |other: &&OtherReplica| other.silent_for < ABSENT_AFTER;
    let awaited = |other: &&OtherReplica| {
        let limit = if other.start.is_some() { PROMPT } else { PROMPT_OF_EARLIER_RELEASE };
        !other.knows_us && (other.silent_for < limit || observed < PROMPT)
    };
    Standing {
        others: others.iter().filter(alive).count(),
        unaware: others.iter().filter(alive).filter(|other| !other.knows_us).count(),
        awaited: others.iter().filter(awaited).count(),
    }
}

/// For how long this process has seen the last heartbeat of each other replica unchanged.
///
/// The database's clock may be set. If it was set back, a heartbeat is in the future, and does not grow old; but a
/// replica that is alive replaces it within moments. If it was set ahead, a heartbeat is old at once; but this process
/// knows better if it saw the heartbeat change.
#[derive(Debug, Default)]
pub(super) struct Observed(BTreeMap<String, Observation>);

#[derive(Clone, Copy, Debug)]
struct Observation {
    heartbeat_at: Timestamp,
    /// Since when it has not changed, as far as was seen.
    since: Instant,
    /// Whether that was seen, so that `since` is no earlier than the heartbeat.
    changed: bool,
}

impl Observed {
    /// Records what was read at `now`, and corrects each replica's silence: to the time for which its heartbeat has
    /// not changed, if it was seen to change, and else at least to that time.
    pub(super) fn update(&mut self, others: &mut [OtherReplica], now: Instant) {
        let before = mem::take(&mut self.0);
        for other in others {
            let heartbeat_at = other.heartbeat_at;
            let observation = match before.get(&other.instance) {
                Some(before) if before.heartbeat_at == heartbeat_at => *before,
                before => Observation { heartbeat_at, since: now, changed: before.is_some() },
            };
            let unchanged_for = now.duration_since(observation.since);
            other.silent_for = if observation.changed {
                unchanged_for
            } else {
                other.silent_for.max(unchanged_for)
            };
            self.0.insert(other.instance.clone(), observation);
        }
    }

    /// Returns the instances that were seen to be alive, by the time of this process. Their rows must be read even
    /// if their heartbeats seem to be very old.
    pub(super) fn alive(&self, now: Instant) -> Vec<String> {
        let alive = |it: &&Observation| now.duration_since(it.since) < ABSENT_AFTER;
        let alive = self.0.iter().filter(|(_, it)| alive(it));
        alive.map(|(instance, _)| instance.clone()).collect()
    }
}

/// The heartbeats that this process has stored without a gap. After an outage of the database, the heartbeats of all
/// replicas are old, so the first one to return would take itself for the only one.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Run {
    /// When it began: with the announcement, or with the first heartbeat after a gap.
    since: Instant,
    /// When its last heartbeat began.
    last: Instant,
    /// Whether it began with the announcement of this process.
    from_start: bool,
}

impl Run {
    /// Returns the run that begins with the announcement of this process.
    pub(super) fn from_start(announced: Instant) -> Self {
        Self { since: announced, last: announced, from_start: true }
    }

    /// Returns the run that begins after a gap.
    pub(super) fn after_gap(now: Instant) -> Self {
        Self { since: now, last: now, from_start: false }
    }

    /// Returns whether a heartbeat, after which the others were read at `now`, continues the run.
    pub(super) fn lasts(&self, now: Instant) -> bool {
        now.duration_since(self.last) <= LONGEST_GAP
    }

    /// Continues the run with a heartbeat that began at `began`.
    pub(super) fn extend(&mut self, began: Instant) {
        self.last = began;
    }

    /// Returns whether `standing`, read at `now`, proves that there is no other replica. In the first run it must
    /// suffice what a start waits for, so that a replica that is really alone counts as such at once.
    pub(super) fn proves_alone(&self, standing: Standing, now: Instant) -> bool {
        let looked_long = now.duration_since(self.since) >= ABSENT_AFTER;
        standing.others == 0 && (looked_long || self.from_start && standing.awaited == 0)
    }
}

/// Whether this process may take over the row of its instance.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Takeover {
    /// The earlier process has ended, or counts as stopped.
    Now,
    /// It may be alive: look again.
    Watch,
    /// It is alive.
    Refused,
}

/// Decides whether the row of an earlier process may be taken over. `first` is the row when it was first
/// read, `observed` ago, and `now` as it is now; `ended` are the starts of processes that are known to have ended,
/// since this one holds the lock that they held.
pub(super) fn takeover(
    first: &EarlierProcess,
    now: &EarlierProcess,
    observed: Duration,
    ended: &[String],
) -> Takeover {
    // A heartbeat in the future, since the database's clock was set back, does not grow old.
    let silent_for = now.silent_for.max(observed);
    let has_ended = now.start.as_ref().is_some_and(|start| ended.contains(start));
    if now.stopped || has_ended {
        Takeover::Now
    } else if now.start != first.start || now.heartbeat_at != first.heartbeat_at {
        Takeover::Refused
    } else if silent_for >= ABSENT_AFTER && observed >= PROMPT {
        Takeover::Now
    } else {
        Takeover::Watch
    }
}

/// Returns whether a process whose announcement was lost may store it again: the row is missing, or belongs to one of
/// the starts `ours`.
pub(super) fn may_be_restored(found: Option<&EarlierProcess>, ours: &[String]) -> bool {
    found.is_none_or(|row| row.start.as_ref().is_some_and(|start| ours.contains(start)))
}

/// Returns `own`, or the next number that is not `taken`.
pub(super) fn free_number(own: u16, taken: &BTreeSet<i32>) -> u16 {
    let mut candidates = (0..=u16::MAX).map(|n| own.wrapping_add(n));
    candidates.find(|number| !taken.contains(&i32::from(*number))).unwrap_or(own)
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, TimeDelta};

    use super::*;

    fn other(start: Option<&str>, silent_for: u64, knows_us: bool) -> OtherReplica {
        OtherReplica {
            instance: "i-other".into(),
            start: start.map(Into::into),
            replica: 1,
            heartbeat_at: DateTime::UNIX_EPOCH,
            silent_for: Duration::from_secs(silent_for),
            knows_us,
        }
    }

    fn earlier(start: &str, heartbeat: i64, silent_for: u64, stopped: bool) -> EarlierProcess {
        EarlierProcess {
            start: Some(start.into()),
            heartbeat_at: DateTime::UNIX_EPOCH + TimeDelta::seconds(heartbeat),
            silent_for: Duration::from_secs(silent_for),
            stopped,
        }
    }

    #[test]
    fn only_a_replica_that_is_likely_alive_is_waited_for_but_each_that_may_be_alive_counts() {
        let after = |observed, others: &[OtherReplica]| {
            let Standing { others, unaware, awaited } = standing(others, observed);
            (others, unaware, awaited)
        };
        let facts = |others: &[OtherReplica]| after(PROMPT, others);
        assert_eq!(facts(&[]), (0, 0, 0));
        assert_eq!(facts(&[other(Some("a"), 0, true)]), (1, 0, 0));
        assert_eq!(facts(&[other(Some("a"), 1, false)]), (1, 1, 1));
        assert_eq!(facts(&[other(Some("a"), 6, false)]), (1, 1, 0), "it was probably killed");
        assert_eq!(facts(&[other(Some("a"), 30, false)]), (0, 0, 0), "it counts as stopped");
        assert_eq!(facts(&[other(None, 9, false)]), (1, 1, 1), "an earlier release is slower");
        assert_eq!(facts(&[other(None, 13, false)]), (1, 1, 0));
        let after_an_outage = [other(Some("a"), 600, false)];
        assert_eq!(after(Duration::ZERO, &after_an_outage), (0, 0, 1), "it may be about to return");
        assert_eq!(facts(&after_an_outage), (0, 0, 0));
    }

    #[test]
    fn a_row_is_taken_over_only_from_a_process_that_has_ended_or_counts_as_stopped() {
        let ended = ["mine".to_owned()];
        let after = |observed, first: &EarlierProcess, now: &EarlierProcess| {
            takeover(first, now, observed, &ended)
        };
        let judge = |first: &EarlierProcess, now: &EarlierProcess| after(PROMPT, first, now);
        let first = earlier("twin", 100, 0, false);
        assert_eq!(judge(&first, &first), Takeover::Watch);
        assert_eq!(judge(&first, &earlier("twin", 100, 29, false)), Takeover::Watch);
        let silent = earlier("twin", 100, 30, false);
        assert_eq!(judge(&first, &silent), Takeover::Now);
        assert_eq!(after(Duration::ZERO, &silent, &silent), Takeover::Watch, "as after an outage");
        assert_eq!(judge(&first, &earlier("twin", 101, 0, false)), Takeover::Refused);
        assert_eq!(judge(&first, &earlier("twin", 101, 0, true)), Takeover::Now);
        assert_eq!(judge(&first, &earlier("third", 100, 0, false)), Takeover::Refused);
        let mine = earlier("mine", 100, 0, false);
        assert_eq!(judge(&mine, &mine), Takeover::Now, "a restart is not delayed");
        let observed = ABSENT_AFTER.saturating_sub(Duration::from_millis(1));
        assert_eq!(after(observed, &first, &first), Takeover::Watch, "it is in the future");
        assert_eq!(after(ABSENT_AFTER, &first, &first), Takeover::Now, "it stays in the future");
    }

    #[test]
    fn a_heartbeat_in_the_future_counts_only_until_it_was_seen_unchanged_for_long() {
        let began = Instant::now();
        let mut observed = Observed::default();
        let mut after = |seconds, heartbeat| {
            let mut others = [other(Some("a"), 0, false)];
            others[0].heartbeat_at = DateTime::UNIX_EPOCH + TimeDelta::seconds(heartbeat);
            observed.update(&mut others, began + Duration::from_secs(seconds));
            let Standing { others, unaware, awaited } = standing(&others, PROMPT);
            (others, unaware, awaited)
        };
        assert_eq!(after(0, 100), (1, 1, 1));
        assert_eq!(after(4, 100), (1, 1, 1));
        assert_eq!(after(6, 100), (1, 1, 0), "a start does not wait for it");
        assert_eq!(after(7, 101), (1, 1, 1), "it is alive");
        assert_eq!(after(36, 101), (1, 1, 0));
        assert_eq!(after(37, 101), (0, 0, 0), "it counts as stopped");
        assert_eq!(after(38, 50), (1, 1, 1), "its next heartbeat is not in the future");
    }

    #[test]
    fn a_replica_that_was_seen_alive_counts_for_half_a_minute_whatever_the_databases_clock_says() {
        let began = Instant::now();
        let at = |seconds| began + Duration::from_secs(seconds);
        let mut observed = Observed::default();
        let mut after = |seconds, heartbeat, silent_for| {
            let mut others = [other(Some("a"), silent_for, true)];
            others[0].heartbeat_at = DateTime::UNIX_EPOCH + TimeDelta::seconds(heartbeat);
            observed.update(&mut others, at(seconds));
            (standing(&others, PROMPT).others, observed.alive(at(seconds)).len())
        };
        assert_eq!(after(0, 100, 40), (0, 1), "its heartbeat is old, as far as is known");
        assert_eq!(after(1, 101, 0), (1, 1));
        for (leap, seconds) in [(30, 2), (3_600, 3), (86_400, 30)] {
            assert_eq!(after(seconds, 101, leap), (1, 1), "the clock was set ahead by {leap} s");
        }
        assert_eq!(after(31, 101, 86_430), (0, 0), "it counts as stopped");
        assert_eq!(after(32, 90_000, 0), (1, 1), "its next heartbeat");
        assert_eq!(after(33, 90_001, 1), (1, 1));
    }

    #[test]
    fn a_replica_is_not_alone_just_because_an_outage_made_all_heartbeats_old() {
        let began = Instant::now();
        let at = |seconds| began + Duration::from_secs(seconds);
        let (nobody, old) = (standing(&[], PROMPT), [other(Some("a"), 40, false)]);
        let first = Run::from_start(began);
        assert!(first.proves_alone(nobody, at(0)), "a start that is really alone");
        assert!(
            !first.proves_alone(standing(&old, Duration::ZERO), at(0)),
            "it may be about to return"
        );
        assert!(first.proves_alone(standing(&old, PROMPT), at(5)));
        assert!(!first.proves_alone(standing(&[other(Some("a"), 29, true)], PROMPT), at(60)));

        assert!(first.lasts(at(15)), "as after a short outage");
        assert!(!first.lasts(at(16)));
        let after_outage = Run::after_gap(at(40));
        assert!(!after_outage.proves_alone(nobody, at(40)));
        assert!(!after_outage.proves_alone(standing(&old, PROMPT), at(69)));
        assert!(after_outage.proves_alone(nobody, at(70)));
        assert!(HEARTBEAT_INTERVAL < LONGEST_GAP && LONGEST_GAP * 2 <= ABSENT_AFTER);
    }

    #[test]
    fn a_lost_announcement_is_repeated_only_over_a_row_of_this_process_or_of_one_that_has_ended() {
        let ours = ["ended".to_owned(), "own".to_owned()];
        let may = |found: &EarlierProcess| may_be_restored(Some(found), &ours);
        assert!(may_be_restored(None, &ours), "an admin deleted it");
        assert!(may(&earlier("own", 100, 0, false)), "an answer was lost");
        assert!(may(&earlier("ended", 100, 0, false)), "an older state was restored");
        assert!(!may(&earlier("twin", 100, 0, false)));
        assert!(!may(&EarlierProcess { start: None, ..earlier("own", 100, 0, true) }));
    }

    #[test]
    fn knowledge_of_being_alone_ends_before_others_count_the_replica_as_stopped() {
        assert!(ALONE_FOR + HEARTBEAT_INTERVAL < ABSENT_AFTER);
    }

    #[test]
    fn a_number_that_another_replica_has_is_not_used() {
        assert_eq!(free_number(7, &BTreeSet::from([6])), 7);
        assert_eq!(free_number(7, &BTreeSet::from([7, 8])), 9);
        assert_eq!(free_number(u16::MAX, &BTreeSet::from([65_535])), 0);
    }
}
