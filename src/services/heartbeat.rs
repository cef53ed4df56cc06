//! Tells the other replicas that this one is alive, learns of them, and ensures that no other process acts under
//! this replica's identity.
//!
//! A replica that loses the database may issue without it only if no other replica can issue or serve. So each
//! one announces itself before it serves, and waits until every replica that is alive knows of it. A replica
//! knows of all others that serve, since it stores whom it knows in its next heartbeat: the acknowledgement is
//! visible only after the knowledge. `ARCHITECTURE.md` has the whole protocol.

mod presence;

use std::{sync::Arc, time::Duration};

use sqlx::PgPool;
use thiserror::Error;
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

pub use self::presence::Standing;
use self::presence::{
    ABSENT_AFTER, ALONE_FOR, HEARTBEAT_INTERVAL, Observed, Run, Takeover, free_number,
    may_be_restored, standing, takeover,
};
use crate::{
    audit::journal::Journal,
    domain::clock::Timestamp,
    services::{connectivity::DatabaseConnectivity, feed_health::FeedHealth, key_usage::KeyUsage},
    store::{
        StoreError,
        instances::{self, EarlierProcess, Heartbeat},
        within,
    },
};

/// A start considers replicas whose last heartbeats are younger than this. After an outage of the database, the
/// heartbeats of all are old, so a start looks for five seconds whether new ones come.
const CONSIDERED: Duration = Duration::from_hours(1);
/// The pause before the row of an earlier process is read again.
const WATCH_PAUSE: Duration = Duration::from_millis(250);
/// How long [`HeartbeatTask::run`] tries to store, at its end, that this instance has stopped.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// The name of the heartbeat among the duties that can fail.
pub const HEARTBEAT_DUTY: &str = "heartbeat";

/// What a replica reports about itself in its heartbeat.
#[derive(Clone, Debug)]
pub struct ReplicaIdentity {
    /// The id of the instance, which belongs to its state directory.
    pub instance: String,
    /// The random number of this start of the process.
    pub start: String,
    /// The number of the replica, which is part of the generations of its tokens.
    pub replica: u16,
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

/// The task that stores this replica's heartbeats, with its dependencies.
pub struct HeartbeatTask {
    /// What this replica reports about itself.
    replica: ReplicaIdentity,
    /// Which keys this replica has and needs.
    keys: KeyUsage,
    pool: PgPool,
    /// Receives whether there are other replicas.
    connectivity: Arc<DatabaseConnectivity>,
    /// Receives whether heartbeats can be stored. A database may answer and store nothing, for example while the
    /// standby is away that each commit waits for.
    health: Arc<FeedHealth>,
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
        keys: KeyUsage,
        mut ended: Vec<String>,
        pool: PgPool,
        connectivity: Arc<DatabaseConnectivity>,
        health: Arc<FeedHealth>,
        journal: Journal,
    ) -> Self {
        let standing = watch::Sender::new(None);
        // An announcement whose answer was lost is repeated.
        ended.push(replica.start.clone());
        let now = Instant::now();
        Self {
            replica,
            keys,
            pool,
            connectivity,
            health,
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
        let others = instances::others(&self.pool, instance, start, CONSIDERED, &[]);
        let others = within(others).await?;
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
        let (loaded, used) = (self.keys.loaded(), self.keys.used());
        let heartbeat = self.heartbeat(&chain, &loaded, &used);
        within(instances::announce(&self.pool, &heartbeat, earlier)).await
    }

    fn heartbeat<'a>(
        &'a self,
        chain: &'a str,
        key_ids: &'a [String],
        used_key_ids: &'a [String],
    ) -> Heartbeat<'a> {
        Heartbeat {
            instance: &self.replica.instance,
            start: &self.replica.start,
            replica: self.replica.replica,
            version: env!("CARGO_PKG_VERSION"),
            key_ids,
            used_key_ids,
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
            let beat = self.beat().await;
            match &beat {
                Ok(_) => self.health.succeeded(HEARTBEAT_DUTY),
                Err(error) => self.health.failed(HEARTBEAT_DUTY, &error.to_string()),
            }
            let pause = match beat {
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
        let (loaded, used) = (self.keys.loaded(), self.keys.used());
        let heartbeat = self.heartbeat(&chain, &loaded, &used);
        if !within(instances::store_heartbeat(&self.pool, &heartbeat)).await? {
            return self.restore_row().await;
        }
        let ReplicaIdentity { instance, start, .. } = &self.replica;
        let alive = self.observed.alive(began);
        let others = instances::others(&self.pool, instance, start, CONSIDERED, &alive);
        let mut others = within(others).await?;
        let now = Instant::now();
        if !self.run.lasts(now) {
            self.begin_run(now);
        }
        self.run.extend(began);
        self.observed.update(&mut others, now);
        let standing = standing(&others, self.announced.elapsed());
        let alone_until = self.run.proves_alone(standing, now).then_some(began + ALONE_FOR);
        let acknowledged_until = (standing.unaware == 0).then_some(began + ABSENT_AFTER);
        self.connectivity.heartbeat_stored(alone_until, acknowledged_until);
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
