//! Whether the server behind the database's address may be believed.
//!
//! A running broker relies on the history of its database: what was committed stays committed. An address can
//! lead to another server tomorrow: a standby, an old primary, a restored backup. So one task of the broker,
//! the history guard, holds a session, compares what the database holds with what this replica has seen of
//! it, and opens the [`TrustGate`] only if nothing is missing. It closes the gate as soon as its session ends,
//! or new connections lead elsewhere.
//!
//! The guard's session holds an advisory lock whose key is drawn at random each time. A connection proves with
//! it, when it is opened, that it reached the same database in the same uninterrupted run of the same server:
//! nowhere else is this key locked, and the lock ends with the guard's session. Addresses, names and start
//! times would prove less: they can be equal after a crash.

use std::{sync::Arc, time::Duration};

use aws_lc_rs::rand;
use parking_lot::Mutex;
use sqlx::PgConnection;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use super::{
    StoreError,
    history::{self, SeenChange, ServerPosition},
};

/// The most changes that wait for the guard to remember them. It remembers no more of them anyway.
const MAX_NOTED: usize = 256;
/// Why the gate is closed before the guard has verified anything.
const NOT_VERIFIED_YET: &str = "it has not been verified yet";

/// One verification of the database: it holds as long as the guard's session.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Trust {
    /// The key of the advisory lock that the guard's session holds.
    key: i64,
    /// When the gate was opened. Connections that were opened before are not covered.
    since: Instant,
}

#[derive(Clone, Debug)]
enum State {
    /// Nothing has been verified yet.
    New,
    Open(Trust),
    /// The database must not be used, for this reason.
    Closed {
        reason: String,
        answer: Answer,
    },
}

/// Who answers at the database's address while the gate is closed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Answer {
    /// Nobody.
    None,
    /// A server that is not the primary that this broker knows.
    Elsewhere,
    /// The database's server, which refuses something, such as the login or a statement. So the database is not
    /// lost, and a replica must not issue without it.
    Refused,
}

#[derive(Debug)]
struct Shared {
    state: watch::Sender<State>,
    /// Why new connections are refused although the gate is open, if they are.
    refusal: Mutex<Option<String>>,
    /// The last other server that a connection led to, until the guard takes notice.
    elsewhere: Mutex<Option<ServerPosition>>,
    /// Notified when a connection led elsewhere.
    doubted: Notify,
    /// Notified when the database announced a change.
    changed: Notify,
    /// Changes that take effect in this process, until the guard remembers them.
    noted: Mutex<Vec<SeenChange>>,
}

/// Lets connections pass to the database that the history guard has verified, and to no other. Cheap to clone;
/// clones share their state.
#[derive(Clone, Debug)]
pub struct TrustGate(Arc<Shared>);

impl Default for TrustGate {
    /// Returns a closed gate.
    fn default() -> Self {
        Self(Arc::new(Shared {
            state: watch::Sender::new(State::New),
            refusal: Mutex::default(),
            elsewhere: Mutex::default(),
            doubted: Notify::new(),
            changed: Notify::new(),
            noted: Mutex::default(),
        }))
    }
}

impl TrustGate {
    /// Opens the gate for connections on whose server `lock` is held.
    pub fn open(&self, lock: &TrustLock) {
        let trust = Trust { key: lock.0, since: Instant::now() };
        self.note_refusal(None);
        self.0.state.send_replace(State::Open(trust));
    }

    /// Closes the gate: connections that passed before are not used any more. `reason` says why, for operators,
    /// and `answer` who answers all the same.
    pub fn close(&self, reason: String, answer: Answer) {
        self.0.state.send_replace(State::Closed { reason, answer });
    }

    /// Closes the gate because of `error`.
    pub fn close_after(&self, error: &StoreError) {
        match error {
            StoreError::Unverified { reason, primary_answers: false } => {
                self.close(reason.clone(), Answer::Elsewhere);
            }
            error if error.primary_answers() => self.close(error.to_string(), Answer::Refused),
            error => self.close(error.to_string(), Answer::None),
        }
    }

    /// Returns why the database must not be used although it answers, if so.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        match &*self.0.state.borrow() {
            State::Closed { reason, answer: Answer::Elsewhere | Answer::Refused } => {
                Some(reason.clone())
            }
            _ => None,
        }
    }

    /// Records why new connections are refused while the gate is open; `None` if they are not.
    pub fn note_refusal(&self, refusal: Option<String>) {
        *self.0.refusal.lock() = refusal;
    }

    /// Returns why new connections are refused although the gate is open, if they are.
    #[must_use]
    pub fn refusal(&self) -> Option<String> {
        let open = matches!(&*self.0.state.borrow(), State::Open(_));
        self.0.refusal.lock().clone().filter(|_| open)
    }

    /// Waits until a connection led to another server than the verified one. Cancel safe; supports one waiter.
    pub async fn doubted(&self) {
        self.0.doubted.notified().await;
    }

    /// Returns the primary that a connection led to instead of the verified one, if that happened since the last call.
    #[must_use]
    pub fn take_elsewhere(&self) -> Option<ServerPosition> {
        self.0.elsewhere.lock().take()
    }

    /// Waits until the database announced a change. Cancel safe; supports one waiter.
    pub async fn changed(&self) {
        self.0.changed.notified().await;
    }

    /// Wakes [`Self::changed`].
    pub(super) fn note_change(&self) {
        self.0.changed.notify_one();
    }

    /// Keeps changes that were read in the verified database for the guard, and wakes it.
    pub(super) fn note_changes(&self, changes: Vec<SeenChange>) {
        let mut noted = self.0.noted.lock();
        noted.extend(changes);
        let surplus = noted.len().saturating_sub(MAX_NOTED);
        noted.drain(..surplus);
        drop(noted);
        self.note_change();
    }

    /// Returns the changes that were noted since the last call.
    #[must_use]
    pub fn take_noted(&self) -> Vec<SeenChange> {
        std::mem::take(&mut self.0.noted.lock())
    }

    /// Returns the present trust.
    ///
    /// # Errors
    /// Returns [`StoreError::Unverified`] while the gate is closed.
    pub(super) fn trust(&self) -> Result<Trust, StoreError> {
        let (reason, primary_answers) = match &*self.0.state.borrow() {
            State::Open(trust) => return Ok(*trust),
            State::New => (NOT_VERIFIED_YET.to_owned(), false),
            State::Closed { reason, answer } => (reason.clone(), *answer == Answer::Refused),
        };
        Err(StoreError::Unverified { reason, primary_answers })
    }

    /// Waits until the gate is open. Cancel safe.
    pub(super) async fn opened(&self) {
        let mut states = self.0.state.subscribe();
        // The sender lives in `self`, so the wait cannot fail.
        let _ = states.wait_for(|state| matches!(state, State::Open(_))).await;
    }

    /// Waits until `trust` is not the present one any more. Cancel safe.
    pub(super) async fn ended(&self, trust: Trust) {
        let mut states = self.0.state.subscribe();
        let ended = |state: &State| !matches!(state, State::Open(present) if *present == trust);
        // The sender lives in `self`, so the wait cannot fail.
        let _ = states.wait_for(ended).await;
    }

    /// Whether a connection that has this age at `now` was opened under the present trust.
    pub(super) fn covers(&self, age: Duration, now: Instant) -> bool {
        self.trust().is_ok_and(|trust| trust.since + age <= now)
    }

    /// Checks that a connection that was just opened leads to the verified database, and returns the trust under
    /// which that holds.
    ///
    /// # Errors
    /// Returns [`StoreError::Unverified`] if the gate is closed or the connection leads elsewhere, and the
    /// database's error.
    pub(super) async fn admit(&self, connection: &mut PgConnection) -> Result<Trust, StoreError> {
        let trust = self.trust()?;
        // The shared lock conflicts with the guard's exclusive one, and not with those of other connections
        // that are being opened. It ends with the statement.
        let unlocked = sqlx::query_scalar!(
            r#"-- store::trust::admit
            select pg_try_advisory_xact_lock_shared($1) as "unlocked!""#,
            trust.key,
        )
        .fetch_one(&mut *connection)
        .await?;
        if unlocked {
            // The guard decides whether it has taken over. One that does not tell proves nothing.
            if let Ok(position) = history::server_position(connection).await {
                *self.0.elsewhere.lock() = Some(position);
            }
            self.0.doubted.notify_one();
            return Err(StoreError::Unverified {
                reason: "its address leads to another server than the one that was verified".into(),
                // Perhaps the guard's session has just ended, and the server is the same. The guard finds out.
                primary_answers: true,
            });
        }
        // The guard may have closed and opened the gate meanwhile.
        self.holds(trust)?;
        Ok(trust)
    }

    /// Checks that `trust` is still the present one.
    ///
    /// # Errors
    /// Returns [`StoreError::Unverified`] if it is not.
    pub(super) fn holds(&self, trust: Trust) -> Result<(), StoreError> {
        if self.trust()? == trust {
            return Ok(());
        }
        let reason = "it was verified anew meanwhile".into();
        Err(StoreError::Unverified { reason, primary_answers: true })
    }
}

/// The advisory lock of the guard's session.
#[derive(Debug)]
pub struct TrustLock(i64);

impl TrustLock {
    /// Takes a lock with a random key. It is held until the session of `connection` ends.
    ///
    /// # Errors
    /// Returns the database's error.
    pub async fn take(connection: &mut PgConnection) -> Result<Self, StoreError> {
        let mut random = [0; 8];
        rand::fill(&mut random).map_err(|_| StoreError::Unverified {
            reason: "the system has no random numbers".into(),
            primary_answers: true,
        })?;
        let key = i64::from_le_bytes(random);
        sqlx::query!(
            "-- store::trust::take
            select pg_advisory_lock($1)",
            key,
        )
        .execute(connection)
        .await?;
        Ok(Self(key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_covered_only_by_the_trust_under_which_it_was_opened() {
        let second = Duration::from_secs(1);
        let gate = TrustGate::default();
        assert!(gate.trust().is_err() && !gate.covers(Duration::ZERO, Instant::now()));
        gate.open(&TrustLock(1));
        let first = gate.trust().unwrap();
        let later = first.since + 10 * second;
        assert!(gate.covers(9 * second, later) && !gate.covers(11 * second, later));
        gate.note_refusal(Some("no free connection".into()));
        assert_eq!(gate.refusal().as_deref(), Some("no free connection"));
        gate.close("it leads to a standby".into(), Answer::Elsewhere);
        assert_eq!(gate.refusal(), None, "the reason why it is closed says more");
        assert_eq!(gate.problem().as_deref(), Some("it leads to a standby"));
        assert!(!gate.covers(Duration::ZERO, later) && gate.holds(first).is_err());
        gate.open(&TrustLock(2));
        assert!(gate.problem().is_none() && gate.refusal().is_none() && gate.holds(first).is_err());
        let second_trust = gate.trust().unwrap();
        assert!(!gate.covers(2 * second, second_trust.since + second));
    }

    #[tokio::test]
    async fn the_gates_opening_wakes_those_that_wait() {
        let gate = TrustGate::default();
        let waiting = tokio::spawn({
            let gate = gate.clone();
            async move { gate.opened().await }
        });
        tokio::task::yield_now().await;
        gate.open(&TrustLock(1));
        waiting.await.unwrap();
    }

    #[tokio::test]
    async fn whoever_relies_on_a_trust_is_woken_when_it_ends() {
        for reopened in [false, true] {
            let gate = TrustGate::default();
            gate.open(&TrustLock(1));
            let trust = gate.trust().unwrap();
            let waiting = tokio::spawn({
                let gate = gate.clone();
                async move { gate.ended(trust).await }
            });
            tokio::task::yield_now().await;
            assert!(!waiting.is_finished());
            gate.close("it leads to a standby".into(), Answer::Elsewhere);
            if reopened {
                gate.open(&TrustLock(2));
            }
            waiting.await.unwrap();
        }
    }
}
