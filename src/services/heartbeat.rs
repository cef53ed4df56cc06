//! Tells the other replicas that this one is alive, learns of them, and ensures that no other process acts under
//! this replica's identity.
//!
//! A replica that loses the database may issue without it only if no other replica can issue or serve. So each
//! one announces itself before it serves, and waits until every replica that is alive knows of it. A replica
//! knows of all others that serve, since it stores whom it knows in its next heartbeat: the acknowledgement is
//! visible only after the knowledge. `ARCHITECTURE.md` has the whole protocol.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    sync::Arc,
    time::Duration,
};

use sqlx::PgPool;
use thiserror::Error;
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::{
    audit::journal::Journal,
    domain::clock::Timestamp,
    services::connectivity::DatabaseConnectivity,
    store::{
        StoreError,
        instances::{self, EarlierProcess, Heartbeat, OtherReplica},
        within,
    },
};

/// The pause between two heartbeats.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);
/// A replica whose last heartbeat is older than this counts as stopped.
const ABSENT_AFTER: Duration = Duration::from_secs(30);
/// For how long after a heartbeat the knowledge that there is no other replica holds. It is shorter than
/// [`ABSENT_AFTER`]: a replica that was paused does not count as the only one any more when others count it as
/// stopped. It is longer than the change feed needs to notice that the database hangs, 13 seconds.
const ALONE_FOR: Duration = Duration::from_secs(25);
/// After a longer gap between two of its own heartbeats, a replica does not trust that the old heartbeats of others
/// mean that they have stopped: the database may have been away for all. It is so much shorter than
/// [`ABSENT_AFTER`] that a replica which stores its heartbeats late, or returns late after an outage, still counts
/// as alive.
const LONGEST_GAP: Duration = Duration::from_secs(15);
/// A start does not wait for the acknowledgement of a replica that has stored no heartbeat for this long, while
/// the database answered, since it was probably killed.
const PROMPT: Duration = Duration::from_secs(5);
/// The same for a release without announcements, whose heartbeats are ten seconds apart.
const PROMPT_OF_EARLIER_RELEASE: Duration = Duration::from_secs(12);
/// A start considers replicas whose last heartbeats are younger than this. After an outage of the database, the
/// heartbeats of all are old, so a start looks for [`PROMPT`] whether new ones come.
const CONSIDERED: Duration = Duration::from_hours(1);
/// The pause before the row of an earlier process is read again.
const WATCH_PAUSE: Duration = Duration::from_millis(250);
/// How long [`HeartbeatTask::run`] tries to store, at its end, that this instance has stopped.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// What a replica reports about itself in its heartbeat.
#[derive(Clone, Debug)]
pub struct ReplicaIdentity {
    /// The id of the instance, which belongs to its state directory.
    pub instance: String,
    /// The random number of this start of the process.
    pub start: String,
    /// The number of the replica, which is part of the generations of its tokens.
    pub replica: u16,
    /// The ids of the keys in its keyring.
    pub key_ids: Vec<String>,
    /// When the process started.
    pub started_at: Timestamp,
}

/// Why a process may not act under its identity.
#[derive(Debug, Error)]
pub enum IdentityError {
    /// Another process with the same identity is alive.
    #[error(
        "another process is running with the identity {0} of this state directory: the directory was copied, \
         or is used on two hosts; stop the other process, or give this one an empty state directory of its own"
    )]
    InUse(String),
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

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
fn standing(others: &[OtherReplica], observed: Duration) -> Standing {
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
/// If the database's clock was set back, a heartbeat is in the future, and does not grow old. But a replica that is
/// alive replaces it within moments.
#[derive(Debug, Default)]
struct Observed(BTreeMap<String, (Timestamp, Instant)>);

impl Observed {
    /// Records what was read at `now`, and raises each replica's silence to the time for which its heartbeat has
    /// not changed.
    fn update(&mut self, others: &mut [OtherReplica], now: Instant) {
        let before = mem::take(&mut self.0);
        for other in others {
            let since = match before.get(&other.instance) {
                Some((heartbeat_at, since)) if *heartbeat_at == other.heartbeat_at => *since,
                _ => now,
            };
            other.silent_for = other.silent_for.max(now.duration_since(since));
            self.0.insert(other.instance.clone(), (other.heartbeat_at, since));
        }
    }
}

/// The heartbeats that this process has stored without a gap. After an outage of the database, the heartbeats of all
/// replicas are old, so the first one to return would take itself for the only one.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Run {
    /// When it began: with the announcement, or with the first heartbeat after a gap.
    since: Instant,
    /// When its last heartbeat began.
    last: Instant,
    /// Whether it began with the announcement of this process.
    from_start: bool,
}

impl Run {
    /// Returns the run that begins with the announcement of this process.
    fn from_start(announced: Instant) -> Self {
        Self { since: announced, last: announced, from_start: true }
    }

    /// Returns the run that begins after a gap.
    fn after_gap(now: Instant) -> Self {
        Self { since: now, last: now, from_start: false }
    }

    /// Returns whether a heartbeat, after which the others were read at `now`, continues the run.
    fn lasts(&self, now: Instant) -> bool {
        now.duration_since(self.last) <= LONGEST_GAP
    }

    /// Returns whether `standing`, read at `now`, proves that there is no other replica. In the first run it must
    /// suffice what a start waits for, so that a replica that is really alone counts as such at once.
    fn proves_alone(&self, standing: Standing, now: Instant) -> bool {
        let looked_long = now.duration_since(self.since) >= ABSENT_AFTER;
        standing.others == 0 && (looked_long || self.from_start && standing.awaited == 0)
    }
}

/// Whether this process may take over the row of its instance.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Takeover {
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
fn takeover(
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
fn may_be_restored(found: Option<&EarlierProcess>, ours: &[String]) -> bool {
    found.is_none_or(|row| row.start.as_ref().is_some_and(|start| ours.contains(start)))
}

/// Returns `own`, or the next number that is not `taken`.
fn free_number(own: u16, taken: &BTreeSet<i32>) -> u16 {
    let mut candidates = (0..=u16::MAX).map(|n| own.wrapping_add(n));
    candidates.find(|number| !taken.contains(&i32::from(*number))).unwrap_or(own)
}

/// The task that stores this replica's heartbeats, with its dependencies.
pub struct HeartbeatTask {
    /// What this replica reports about itself.
    replica: ReplicaIdentity,
    pool: PgPool,
    /// Receives whether there are other replicas.
    connectivity: Arc<DatabaseConnectivity>,
    /// The audit journal, whose position is part of the heartbeat.
    journal: Journal,
    /// The starts of earlier processes of this instance that are known to have ended.
    ended: Vec<String>,
    /// The starts of the others that this replica knows of.
    seen: Vec<String>,
    /// When this process announced itself.
    announced: Instant,
    /// The heartbeats that this process has stored without a gap.
    run: Run,
    /// What was read of the others in that run.
    observed: Observed,
    standing: watch::Sender<Option<Standing>>,
}

impl HeartbeatTask {
    /// Returns a task that reports `replica`, which is not announced yet. `ended` are the starts of earlier
    /// processes of the instance that are known to have ended.
    #[must_use]
    pub fn new(
        replica: ReplicaIdentity,
        mut ended: Vec<String>,
        pool: PgPool,
        connectivity: Arc<DatabaseConnectivity>,
        journal: Journal,
    ) -> Self {
        let standing = watch::Sender::new(None);
        // An announcement whose answer was lost is repeated.
        ended.push(replica.start.clone());
        let now = Instant::now();
        Self {
            replica,
            pool,
            connectivity,
            journal,
            ended,
            seen: Vec::new(),
            announced: now,
            run: Run::from_start(now),
            observed: Observed::default(),
            standing,
        }
    }

    /// Returns a receiver of what each heartbeat found; `None` before the first one of [`Self::run`].
    #[must_use]
    pub fn standing(&self) -> watch::Receiver<Option<Standing>> {
        self.standing.subscribe()
    }

    /// Returns this replica's number. It may change when the replica announces itself.
    #[must_use]
    pub fn replica_number(&self) -> u16 {
        self.replica.replica
    }

    /// Stores this process as the one that acts under the identity of its state directory.
    ///
    /// If an earlier process may be alive, this waits until a heartbeat shows that it is, or until it counts as
    /// stopped, at most 30 seconds. If another replica has the same replica number, this one takes the next
    /// free number. Cancel safe.
    ///
    /// # Errors
    /// [`IdentityError::InUse`] if another process acts under the identity; else the database's error.
    pub async fn announce(&mut self) -> Result<(), IdentityError> {
        let instance = self.replica.instance.clone();
        let (mut first, mut began) = (None, Instant::now());
        self.choose_number().await?;
        loop {
            let now = within(instances::earlier_process(&self.pool, &instance)).await?;
            if first.is_none() {
                began = Instant::now();
            }
            let may = match (&first, &now) {
                (_, None) => Takeover::Now,
                (first, Some(now)) => {
                    takeover(first.as_ref().unwrap_or(now), now, began.elapsed(), &self.ended)
                }
            };
            match may {
                Takeover::Now if self.try_announce(now.as_ref()).await? => {
                    self.announced = Instant::now();
                    self.run = Run::from_start(self.announced);
                    return Ok(());
                }
                Takeover::Refused => return Err(IdentityError::InUse(instance)),
                Takeover::Watch if first.is_none() => info!(
                    instance,
                    "the last process with this identity did not report its end: waiting up to 30 s to see \
                     whether it is alive"
                ),
                Takeover::Now | Takeover::Watch => {}
            }
            // A row that changed under `try_announce` belongs to another process that has just started.
            first = first.or(now);
            sleep(WATCH_PAUSE).await;
        }
    }

    /// Takes another replica number if another replica has this one's.
    async fn choose_number(&mut self) -> Result<(), IdentityError> {
        let ReplicaIdentity { instance, start, replica, .. } = &self.replica;
        let others = within(instances::others(&self.pool, instance, start, CONSIDERED)).await?;
        let free = free_number(*replica, &others.iter().map(|other| other.replica).collect());
        if free != *replica {
            info!(
                number = free,
                "another replica has this one's number: it takes the next free one"
            );
            self.replica.replica = free;
        }
        Ok(())
    }

    async fn try_announce(&self, earlier: Option<&EarlierProcess>) -> Result<bool, StoreError> {
        let chain = self.journal.chain().chain.clone();
        within(instances::announce(&self.pool, &self.heartbeat(&chain), earlier)).await
    }

    fn heartbeat<'a>(&'a self, chain: &'a str) -> Heartbeat<'a> {
        Heartbeat {
            instance: &self.replica.instance,
            start: &self.replica.start,
            replica: self.replica.replica,
            version: env!("CARGO_PKG_VERSION"),
            key_ids: &self.replica.key_ids,
            started_at: self.replica.started_at,
            chain,
            seq: self.journal.head().seq,
            seen: &self.seen,
        }
    }

    /// Stores heartbeats until `stop` is cancelled, and then that this process has stopped. Returns earlier
    /// only if another process acts under this identity; the broker must then stop.
    pub async fn run(mut self, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.keep_alive() => {}
        }
        let stopped =
            instances::mark_stopped(&self.pool, &self.replica.instance, &self.replica.start);
        if !matches!(timeout(STOP_TIMEOUT, stopped).await, Ok(Ok(()))) {
            debug!("cannot store in the database that this instance has stopped");
        }
    }

    /// Sends heartbeats until another process has taken the instance over.
    async fn keep_alive(&mut self) {
        loop {
            let pause = match self.beat().await {
                Ok(pause) => pause,
                Err(error @ IdentityError::InUse(_)) => {
                    error!(%error, "the broker stops");
                    return;
                }
                // The change feed detects whether the database answers. What is known of the others
                // grows old until the next heartbeat.
                Err(IdentityError::Store(error)) if error.may_be_outage() => {
                    debug!(%error, "the heartbeat cannot be stored");
                    HEARTBEAT_INTERVAL
                }
                Err(IdentityError::Store(error)) => {
                    warn!(%error, "the database refuses the heartbeat: other replicas do not see this one");
                    self.connectivity.heartbeat_refused();
                    HEARTBEAT_INTERVAL
                }
            };
            sleep(pause).await;
        }
    }

    /// Stores a heartbeat, and reports what the rows of the others say. Returns the pause before the next
    /// heartbeat: none if there is a replica to acknowledge.
    async fn beat(&mut self) -> Result<Duration, IdentityError> {
        // The knowledge is as old as the heartbeat, from which the others count.
        let began = Instant::now();
        let chain = self.journal.chain().chain.clone();
        if !within(instances::store_heartbeat(&self.pool, &self.heartbeat(&chain))).await? {
            return self.restore_row().await;
        }
        let ReplicaIdentity { instance, start, .. } = &self.replica;
        let mut others = within(instances::others(&self.pool, instance, start, CONSIDERED)).await?;
        let now = Instant::now();
        if !self.run.lasts(now) {
            self.begin_run(now);
        }
        self.run.last = began;
        self.observed.update(&mut others, now);
        let standing = standing(&others, self.announced.elapsed());
        let alone_until = self.run.proves_alone(standing, now).then_some(began + ALONE_FOR);
        self.connectivity.heartbeat_stored(alone_until, standing.unaware > 0);
        let seen: Vec<_> = others.into_iter().filter_map(|other| other.start).collect();
        let unacknowledged = seen.iter().any(|start| !self.seen.contains(start));
        self.seen = seen;
        self.standing.send_replace(Some(standing));
        Ok(if unacknowledged { Duration::ZERO } else { HEARTBEAT_INTERVAL })
    }

    /// Begins another run of heartbeats. What was read of the others before the gap says nothing about them.
    fn begin_run(&mut self, now: Instant) {
        self.run = Run::after_gap(now);
        self.observed = Observed::default();
    }

    /// Announces this process again if the database lost its announcement: an admin deleted the row, or an older
    /// state was restored, which the change feed examines.
    async fn restore_row(&mut self) -> Result<Duration, IdentityError> {
        // The rows of the others may be lost, or old, too.
        self.begin_run(Instant::now());
        let found = self.read_own_row().await?;
        if self.try_announce(found.as_ref()).await? {
            return Ok(Duration::ZERO);
        }
        // The row has changed since it was read. That may be an earlier announcement of this process, whose answer
        // was lost; then the next heartbeat finds it.
        self.read_own_row().await?;
        Ok(HEARTBEAT_INTERVAL)
    }

    /// Returns the row of this instance, if there is one. Fails if it belongs to another process.
    async fn read_own_row(&self) -> Result<Option<EarlierProcess>, IdentityError> {
        let instance = &self.replica.instance;
        let found = within(instances::earlier_process(&self.pool, instance)).await?;
        if may_be_restored(found.as_ref(), &self.ended) {
            Ok(found)
        } else {
            Err(IdentityError::InUse(instance.clone()))
        }
    }
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
