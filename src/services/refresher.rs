//! Replaces each account's token before it ends. The loop in this file schedules accounts and starts
//! attempts: at most one at a time for each account, but several at once for different accounts. The module
//! [`attempt`] has the steps of one attempt.

mod attempt;
mod dependencies;
mod intent_log;
mod notify;
mod outage;
mod pending;
mod queue;
mod reconcile;
mod records;

use std::{collections::HashMap, mem, sync::Arc, time::Duration};

pub use attempt::{AttemptOutcome, TokenIssuer};
pub use dependencies::{IssueInfrastructure, IssueSettings, IssueState};
pub use outage::Outage;
pub use pending::PendingTokens;
use queue::{RefreshQueue, Schedule, TokenTimes};
use tokio::{
    sync::mpsc,
    task::{self, JoinError, JoinSet},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error};

use crate::{
    domain::{
        account::AccountId,
        attempt_priority::ConcurrencyLimits,
        clock::{Timestamp, delta},
        refresh_policy::RefreshPolicy,
    },
    services::account_cache::CachedAccount,
};

/// The pause after an attempt that panicked.
const PANIC_PAUSE: Duration = Duration::from_mins(1);

/// A handle that asks the refresher to reschedule an account. Cheap to clone.
#[derive(Clone, Debug)]
pub struct RefreshTrigger(mpsc::UnboundedSender<AccountId>);

impl RefreshTrigger {
    /// Asks the refresher to reschedule the account, because the account changed or a call waits for its
    /// token. Does not block.
    pub fn wake(&self, account: AccountId) {
        // Sending fails only after the refresher has stopped, when the process is about to end.
        let _ = self.0.send(account);
    }
}

/// The loop that schedules accounts and starts attempts.
pub struct Refresher {
    issuer: Arc<TokenIssuer>,
    queue: RefreshQueue,
    triggers: mpsc::UnboundedReceiver<AccountId>,
    attempts: JoinSet<AttemptOutcome>,
    /// The account of each attempt under way.
    accounts: HashMap<task::Id, AccountId>,
    /// The time before which this replica starts no further attempt, to keep to the upstream's rate. The
    /// database enforces the rate for all replicas together.
    paced_until: Timestamp,
    /// The end of the last outage after which all accounts were rescheduled.
    outage_ended_at: Option<Timestamp>,
}

impl Refresher {
    /// Returns a refresher, and the handle that asks it to reschedule accounts.
    #[must_use]
    pub fn new(issuer: TokenIssuer) -> (Self, RefreshTrigger) {
        let (sender, triggers) = mpsc::unbounded_channel();
        let refresher = Self {
            issuer: Arc::new(issuer),
            queue: RefreshQueue::default(),
            triggers,
            attempts: JoinSet::new(),
            accounts: HashMap::new(),
            paced_until: Timestamp::UNIX_EPOCH,
            outage_ended_at: None,
        };
        (refresher, RefreshTrigger(sender))
    }

    /// Runs until `stop` is cancelled. Then waits for the attempts under way, at most for the duration of a
    /// lease, since they may have called the upstream and their tokens must be stored. Dropping the future
    /// aborts them.
    pub async fn run(mut self, stop: CancellationToken) {
        let issuer = self.issuer.clone();
        let clock = issuer.clock();
        issuer.resume_outage();
        self.plan_all();
        let reconciling = issuer.reconciler().run();
        tokio::pin!(reconciling);
        let mut connectivity = issuer.state().connectivity.changes();
        loop {
            let now = clock.now();
            let next = self.next_start(now);
            tokio::select! {
                () = stop.cancelled() => break,
                Some(id) = self.triggers.recv() => self.replan(id, None),
                Some(ended) = self.attempts.join_next_with_id(), if !self.attempts.is_empty() => {
                    self.attempt_ended(ended);
                }
                _ = connectivity.changed() => self.plan_all(),
                () = &mut reconciling => {}
                () = clock.sleep_until(next.unwrap_or(now)), if next.is_some() => {
                    self.start_attempt();
                }
            }
        }
        // An attempt that outlives its lease can be abandoned: the next claim sees that it has no end.
        let rest = async { while self.attempts.join_next().await.is_some() {} };
        if tokio::time::timeout(issuer.holder().lease_duration, rest).await.is_err() {
            error!("some attempts did not end before their leases");
        }
        issuer.reconciler().reconcile_all().await;
    }

    fn plan_all(&mut self) {
        for entry in self.issuer.state().cache.all() {
            self.plan(&entry, None);
        }
    }

    /// Returns when the next attempt may start; `None` while the limits of concurrent attempts are reached or
    /// no account is scheduled.
    fn next_start(&mut self, now: Timestamp) -> Option<Timestamp> {
        let canary = self.issuer.state().outage.next_canary();
        let start = self.queue.next_start(now, self.limits(), canary);
        start.map(|at| at.max(self.paced_until))
    }

    fn limits(&self) -> ConcurrencyLimits {
        ConcurrencyLimits::new(self.issuer.holder().concurrency)
    }

    fn start_attempt(&mut self) {
        let now = self.issuer.clock().now();
        let canary = self.issuer.state().outage.next_canary();
        let Some(id) = self.queue.take(now, self.limits(), canary) else { return };
        let Some(entry) = self.issuer.state().cache.by_id(id) else {
            self.queue.attempt_ended(id);
            return;
        };
        self.paced_until = now + delta(self.issuer.holder().pause_between_attempts());
        let issuer = self.issuer.clone();
        let attempt = self.attempts.spawn(async move { issuer.attempt(&entry).await });
        self.accounts.insert(attempt.id(), id);
    }

    fn attempt_ended(&mut self, ended: Result<(task::Id, AttemptOutcome), JoinError>) {
        let (task, outcome) = match ended {
            Ok(ended) => ended,
            Err(panicked) => {
                error!(error = %panicked, "an attempt panicked");
                (panicked.id(), AttemptOutcome::RetryAfter(PANIC_PAUSE))
            }
        };
        let Some(id) = self.accounts.remove(&task) else { return };
        debug!(account = %id, ?outcome, "an attempt ended");
        self.queue.attempt_ended(id);
        let outage_ended_at = self.issuer.state().outage.ended_at();
        if mem::replace(&mut self.outage_ended_at, outage_ended_at) != outage_ended_at {
            // The accounts that failed in the outage are due now.
            self.plan_all();
        }
        let not_before = match outcome {
            AttemptOutcome::RetryAfter(pause) => Some(self.issuer.clock().now() + delta(pause)),
            AttemptOutcome::Done => None,
        };
        self.replan(id, not_before);
    }

    fn replan(&mut self, id: AccountId, not_before: Option<Timestamp>) {
        match self.issuer.state().cache.by_id(id) {
            Some(entry) => self.plan(&entry, not_before),
            None => self.queue.remove(id),
        }
    }

    fn plan(&mut self, entry: &CachedAccount, not_before: Option<Timestamp>) {
        let snapshot = entry.snapshot();
        let view = self.issuer.view(&snapshot);
        let schedule = self.issuer.next_attempt(&snapshot).map(|(due, version)| Schedule {
            due: not_before.map_or(due, |not_before| due.max(not_before)),
            priority: view.priority_class(version),
            failures: view.failures(version),
            token: snapshot.token.as_ref().map(|token| TokenTimes {
                ends: token.expires_at,
                mandatory_from: RefreshPolicy::mandatory_window_starts_at(token),
            }),
        });
        self.queue.plan(entry.id(), schedule);
    }
}
