//! Issues each account's token ahead of the end of the last one: due → lease → attempt → issue →
//! record → store → cache, one account at a time, many at once.

mod alone;
mod attempt;
mod leased;
mod outage;
mod queue;
mod show;
mod stamps;
mod unstored;

use std::{collections::HashMap, mem, sync::Arc, time::Duration};

pub use attempt::{Issuing, Outcome};
pub use outage::Outage;
use queue::Queue;
use tokio::{
    sync::mpsc,
    task::{self, JoinError, JoinSet},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error};
pub use unstored::PendingTokens;

use crate::{
    domain::{
        account::AccountId,
        clock::{Timestamp, delta},
    },
    services::account_cache::CachedAccount,
};

/// When an account whose attempt panicked is tried again.
const AFTER_A_BUG: Duration = Duration::from_mins(1);

/// Tells the refresher to look at an account again. Cheap to clone.
#[derive(Clone, Debug)]
pub struct RefreshTrigger(mpsc::UnboundedSender<AccountId>);

impl RefreshTrigger {
    /// Asks for another look at `account`: something changed, or somebody waits.
    pub fn wake(&self, account: AccountId) {
        // A refresher that is gone has stopped with the process.
        let _ = self.0.send(account);
    }
}

/// The loop that starts attempts.
pub struct Refresher {
    issuing: Arc<Issuing>,
    queue: Queue,
    wakes: mpsc::UnboundedReceiver<AccountId>,
    attempts: JoinSet<Outcome>,
    /// Whose attempts they are.
    accounts: HashMap<task::Id, AccountId>,
    /// The least time between two starts here; the database holds all replicas together to it.
    pause: Duration,
    next_start: Timestamp,
    concurrency: usize,
    /// The last end of an outage that was planned for.
    outage_over: Option<Timestamp>,
}

impl Refresher {
    /// A refresher and the handle that wakes it.
    #[must_use]
    pub fn new(issuing: Issuing) -> (Self, RefreshTrigger) {
        let (sender, wakes) = mpsc::unbounded_channel();
        let claimant = &issuing.claimant;
        let refresher = Self {
            pause: Duration::from_secs_f64(1.0 / claimant.rate.max(0.001)),
            next_start: Timestamp::UNIX_EPOCH,
            concurrency: claimant.concurrency.max(1),
            issuing: Arc::new(issuing),
            queue: Queue::default(),
            wakes,
            attempts: JoinSet::new(),
            accounts: HashMap::new(),
            outage_over: None,
        };
        (refresher, RefreshTrigger(sender))
    }

    /// Runs until `stop`, then waits for the attempts that are under way: each has an upstream call
    /// out whose token must be kept.
    pub async fn run(mut self, stop: CancellationToken) {
        self.plan_all();
        let issuing = self.issuing.clone();
        let clock = &issuing.clock;
        let settling = issuing.keep_settling();
        tokio::pin!(settling);
        let mut reach = issuing.reach.changes();
        loop {
            let now = clock.now();
            let next = self.next_start(now);
            tokio::select! {
                () = stop.cancelled() => break,
                Some(id) = self.wakes.recv() => self.replan(id, None),
                Some(ended) = self.attempts.join_next_with_id(), if !self.attempts.is_empty() => {
                    self.ended(ended);
                }
                _ = reach.changed() => self.plan_all(),
                () = &mut settling => {}
                () = clock.sleep_until(next.unwrap_or(now)), if next.is_some() => self.start(),
            }
        }
        // Longer than a lease nobody waits: whoever claims next knows that a token may be out.
        let lease = self.issuing.claimant.lease;
        let rest = async { while self.attempts.join_next().await.is_some() {} };
        if tokio::time::timeout(lease, rest).await.is_err() {
            error!("some attempts did not end and are left to their leases");
        }
        issuing.settle_all().await;
    }

    fn plan_all(&mut self) {
        for slot in self.issuing.cache.slots() {
            self.plan(&slot, None);
        }
    }

    /// When the next attempt may start; `None` while as many as may be are under way, or none is
    /// planned.
    fn next_start(&self, now: Timestamp) -> Option<Timestamp> {
        let canary = self.issuing.outage.next_canary();
        let concurrency = if canary.is_some() { 1 } else { self.concurrency };
        if self.attempts.len() >= concurrency {
            return None;
        }
        let start = self.next_start.max(canary.unwrap_or(self.next_start));
        self.queue.next(now).map(|due| due.max(start))
    }

    fn start(&mut self) {
        let now = self.issuing.clock.now();
        let Some(id) = self.queue.take(now) else { return };
        let Some(slot) = self.issuing.cache.numbered(id) else { return };
        self.next_start = now + delta(self.pause);
        self.queue.began(id);
        let issuing = self.issuing.clone();
        let attempt = self.attempts.spawn(async move { issuing.attempt(&slot).await });
        self.accounts.insert(attempt.id(), id);
    }

    fn ended(&mut self, ended: Result<(task::Id, Outcome), JoinError>) {
        let (task, outcome) = match ended {
            Ok(ended) => ended,
            Err(bug) => {
                error!(error = %bug, "an attempt panicked");
                (bug.id(), Outcome::NotBefore(AFTER_A_BUG))
            }
        };
        let Some(id) = self.accounts.remove(&task) else { return };
        debug!(account = %id, ?outcome, "an attempt ended");
        self.queue.ended(id);
        let outage_over = self.issuing.outage.over_at();
        if mem::replace(&mut self.outage_over, outage_over) != outage_over {
            // Whoever failed meanwhile is due now.
            self.plan_all();
        }
        let not_before = match outcome {
            Outcome::NotBefore(pause) => Some(self.issuing.clock.now() + delta(pause)),
            Outcome::Done => None,
        };
        self.replan(id, not_before);
    }

    fn replan(&mut self, id: AccountId, not_before: Option<Timestamp>) {
        match self.issuing.cache.numbered(id) {
            Some(slot) => self.plan(&slot, not_before),
            None => self.queue.forget(id),
        }
    }

    fn plan(&mut self, slot: &CachedAccount, not_before: Option<Timestamp>) {
        let view = slot.view();
        let token = view.token.as_deref();
        let due = self.issuing.due(&view);
        self.queue.plan(
            slot.id(),
            due.map(|due| not_before.map_or(due, |not_before| due.max(not_before))),
            token.map(|token| token.expires_at),
        );
    }
}
