//! A duty of the change feed: a step that is repeated, over a session of its own, whatever happens to the
//! other duties.

use std::{sync::Arc, time::Duration};

use tokio::sync::watch;
use tracing::{debug, error};

use crate::{
    services::feed_health::FeedHealth,
    store::{
        Database, Session, StoreError,
        deployment::{self, DatabaseIdentity, IdentityCheck},
        within,
    },
};

/// The pause between two polls; a notification ends it early. An admin's statement must take effect within
/// a second even if its notification is lost.
pub(super) const POLL_INTERVAL: Duration = Duration::from_millis(500);
/// The shortest and the longest pause between two reads of everything, see [`reload_pause`].
const RELOAD_PAUSES: (Duration, Duration) = (Duration::from_secs(5), Duration::from_mins(1));
/// The shortest pause between two polls, since any login can send notifications, as many as it likes.
const MIN_PAUSE: Duration = Duration::from_millis(50);
/// How long a statement may take in all before the server cancels it. The client gives up a little later.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(8);
/// The pause before a duty whose session is lost opens another one.
const RECONNECT_PAUSE: Duration = Duration::from_secs(1);

/// Returns the pause before everything is read again, though no change was announced: a hundred times as
/// long as the last read `took`, so that it costs about a hundredth of the time.
pub(super) fn reload_pause(took: Duration) -> Duration {
    took.saturating_mul(100).clamp(RELOAD_PAUSES.0, RELOAD_PAUSES.1)
}

/// A step that is repeated for as long as the broker runs.
pub(super) trait Duty: Send {
    /// The duty's name, for operators.
    const NAME: &'static str;
    /// How long its statements wait for a lock that another transaction holds.
    const LOCK_TIMEOUT: Duration;

    /// Performs the step once. `session` is the same as at the last call, unless [`Self::forget`] was called
    /// in between.
    ///
    /// # Errors
    /// When the step failed, or a part of it. It is repeated after the pause.
    fn perform(
        &mut self,
        session: &mut Session,
    ) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Forgets what was read over the last session, which is lost: the next call of [`Self::perform`] has a
    /// new one, whose server may be in another state.
    fn forget(&mut self) {}

    /// Is told of each result of [`Self::perform`], and of each failure to open a session.
    fn ended(&mut self, _result: &Result<(), StoreError>) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }

    /// Returns the pause before the next call.
    fn pause(&self) -> Duration;
}

/// What all duties need.
#[derive(Clone)]
pub(super) struct DutyContext {
    pub(super) database: Database,
    /// The identity that the database must have.
    pub(super) identity: DatabaseIdentity,
    pub(super) health: Arc<FeedHealth>,
}

/// A duty with its session.
pub(super) struct RepeatedDuty<D> {
    duty: D,
    context: DutyContext,
    session: Option<Session>,
}

impl<D: Duty> RepeatedDuty<D> {
    pub(super) fn new(duty: D, context: DutyContext) -> Self {
        Self { duty, context, session: None }
    }

    /// Performs the duty until the database has been replaced by another one. A change of `wake` ends a
    /// pause.
    pub(super) async fn run(mut self, mut wake: watch::Receiver<()>) {
        loop {
            let result = self.perform().await;
            let pause = match &result {
                Err(error @ StoreError::Replaced(_)) => {
                    error!(%error, "the broker stops, since its cached accounts and tokens may be outdated");
                    return;
                }
                Err(_) if self.session.is_none() => self.duty.pause().max(RECONNECT_PAUSE),
                Ok(()) | Err(_) => self.duty.pause(),
            };
            tokio::time::sleep(MIN_PAUSE).await;
            tokio::select! {
                () = tokio::time::sleep(pause.saturating_sub(MIN_PAUSE)) => {}
                // The sender is never dropped while the duties run.
                _ = wake.changed(), if self.session.is_some() => {}
            }
        }
    }

    /// Performs the duty once, on a new session if there is none.
    ///
    /// # Errors
    /// Returns the error of the duty, or the reason why no session can be opened.
    pub(super) async fn perform(&mut self) -> Result<(), StoreError> {
        let result = self.perform_over_session().await;
        match &result {
            Ok(()) => self.context.health.succeeded(D::NAME),
            Err(error) => {
                // After a timeout the session may still be busy with the statement.
                if error.may_be_outage() || error.spoils_session() {
                    self.session = None;
                    self.duty.forget();
                }
                self.context.health.failed(D::NAME, &error.to_string());
            }
        }
        self.duty.ended(&result).await;
        result
    }

    async fn perform_over_session(&mut self) -> Result<(), StoreError> {
        if self.session.is_none() {
            self.session = Some(within(self.context.open_session(D::LOCK_TIMEOUT)).await?);
            debug!(duty = D::NAME, "a session is open");
        }
        match &mut self.session {
            Some(session) => self.duty.perform(session).await,
            None => Ok(()),
        }
    }
}

impl DutyContext {
    /// Opens a session, and checks that it leads to the expected database.
    async fn open_session(&self, lock_timeout: Duration) -> Result<Session, StoreError> {
        let mut session = self.database.session().await?;
        session.limit(lock_timeout, STATEMENT_TIMEOUT).await?;
        match deployment::check(session.connection()?, &self.identity).await {
            Ok(IdentityCheck::Same) => {}
            Ok(IdentityCheck::Different) => return Err(REPLACED),
            // The duty `identity` restores it.
            Ok(IdentityCheck::Missing) => {
                return Err(StoreError::NotFound("the row of deployment does not exist".into()));
            }
            Err(error) if error.may_be_outage() => return Err(error),
            // The table may be locked. The duty `identity` reports that, and tries it again.
            Err(error) => debug!(%error, "the database's identity cannot be checked yet"),
        }
        Ok(session)
    }
}

/// The error of a session that leads to another database than before.
pub(super) const REPLACED: StoreError = StoreError::Replaced(
    "another one is in its place, or it was accepted as restored by another replica",
);

/// Keeps the first error of several steps of which each is done whether the others succeed or not.
///
/// # Errors
/// Returns `result` if it says that the session is lost: the next steps are in vain then.
pub(super) fn keep_first(
    outcome: &mut Result<(), StoreError>,
    result: Result<(), StoreError>,
) -> Result<(), StoreError> {
    match result {
        Err(error) if error.may_be_outage() => return Err(error),
        Err(error) if outcome.is_ok() => *outcome = Err(error),
        _ => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A duty that counts what happens to it.
    #[derive(Default)]
    struct Counting {
        performed: usize,
        forgotten: usize,
        failures: usize,
    }

    impl Duty for Counting {
        const NAME: &'static str = "counting";
        const LOCK_TIMEOUT: Duration = Duration::from_secs(1);

        async fn perform(&mut self, _session: &mut Session) -> Result<(), StoreError> {
            self.performed += 1;
            Ok(())
        }

        fn forget(&mut self) {
            self.forgotten += 1;
        }

        async fn ended(&mut self, result: &Result<(), StoreError>) {
            self.failures += usize::from(result.is_err());
        }

        fn pause(&self) -> Duration {
            POLL_INTERVAL
        }
    }

    #[tokio::test]
    async fn a_duty_without_a_session_forgets_what_it_has_read() {
        let health = Arc::new(FeedHealth::default());
        let context = DutyContext {
            // Nobody listens on this port.
            database: Database::new("postgresql://test@127.0.0.1:1/none", "test").unwrap(),
            identity: DatabaseIdentity { id: "ours".into(), epoch: 1 },
            health: health.clone(),
        };
        let mut repeated = RepeatedDuty::new(Counting::default(), context);
        assert!(repeated.perform().await.unwrap_err().may_be_outage());
        let Counting { performed, forgotten, failures } = repeated.duty;
        assert_eq!((performed, forgotten, failures), (0, 1, 1));
        assert_eq!(health.failing()[0].duty, "counting");
    }

    #[test]
    fn reading_everything_costs_a_hundredth_of_the_time_within_limits() {
        assert_eq!(reload_pause(Duration::ZERO), Duration::from_secs(5));
        assert_eq!(reload_pause(Duration::from_millis(200)), Duration::from_secs(20));
        assert_eq!(reload_pause(Duration::from_secs(9)), Duration::from_mins(1));
        assert_eq!(reload_pause(Duration::MAX), Duration::from_mins(1));
    }

    #[test]
    fn the_first_error_is_kept_and_a_lost_session_ends_the_steps() {
        let refused = |name: &str| StoreError::NotFound(name.into());
        let mut outcome = Ok(());
        keep_first(&mut outcome, Ok(())).unwrap();
        assert!(outcome.is_ok());
        keep_first(&mut outcome, Err(refused("first"))).unwrap();
        keep_first(&mut outcome, Err(refused("second"))).unwrap();
        let late = StoreError::TimedOut { reason: "test" };
        assert!(keep_first(&mut outcome, Err(late)).is_err());
        assert_eq!(outcome.unwrap_err().to_string(), "first");
    }
}
