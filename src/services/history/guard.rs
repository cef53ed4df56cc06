//! The task that watches the database while the broker runs.
//!
//! It holds one session, over which it asks again and again what the database holds. Every few seconds it opens
//! another connection, to see where the database's address leads by now: a session to an old primary lives on
//! after another server has taken over. When the session ends or connections lead elsewhere, the gate is closed
//! until the database was verified anew; meanwhile it counts as not reachable.

use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::{
    mismatch::is_old_primary,
    verification::{HistoryError, HistoryGuard, VerifiedSession},
};
use crate::store::{Answer, Database, MAX_LIFETIME, StoreError, history};

/// The pause between two readings. The notification of a change ends it early, so that a change that became
/// effective here is remembered at once.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// The shortest pause between two readings.
const MIN_POLL_INTERVAL: Duration = Duration::from_millis(100);
/// The pause between two probes of where new connections lead.
const PROBE_INTERVAL: Duration = Duration::from_secs(2);
/// How long one probe may take.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
/// How many probes in a row must lead elsewhere. Where a name leads to several servers by turns, one does not
/// prove that the session's server was replaced.
const PROBES_ELSEWHERE: u32 = 3;
/// How many probes in a row must lead to the same server, after the address led to two primaries.
const PROBES_OF_ONE_SERVER: u32 = 10;
/// The pause between these probes.
const PROBE_PAUSE: Duration = Duration::from_millis(200);
/// How long the session is believed although no new connection can be opened, so that nobody knows where the
/// address leads.
const UNPROVEN_LIMIT: Duration = Duration::from_secs(30);
/// How long the session is believed although its address refuses all new connections: perhaps another server is there
/// by now. It is as long as the connections of the pools last, so that nothing works for longer.
const REFUSED_LIMIT: Duration = MAX_LIFETIME;
/// The pause between two attempts to verify the database again.
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// The pause between two reports of a database that cannot be used.
const REPORT_INTERVAL: Duration = Duration::from_mins(1);

/// Why a verified session is not enough any more.
#[derive(Debug)]
enum Ended {
    /// The database has to be verified again, for this reason.
    Untrusted(StoreError),
    /// The address leads to this session's server and to one that took over. The database has to be verified again once
    /// the address leads to one of them only.
    Overtaken(StoreError),
    /// The broker has to stop.
    Fatal(HistoryError),
}

/// What is known about where new connections lead.
#[derive(Debug)]
struct Probes {
    /// When a connection last led to the verified server.
    proven: Instant,
    /// How many connections in a row led elsewhere since.
    elsewhere: u32,
    /// Why the last connection was refused, since a connection led to the verified server.
    refusal: Option<String>,
    next: Instant,
}

impl Probes {
    fn new(now: Instant) -> Self {
        Self { proven: now, elsewhere: 0, refusal: None, next: now + PROBE_INTERVAL }
    }

    /// Takes the result of a probe at `now`. Returns why the session's server is not believed any more, if so.
    ///
    /// A server that answers and refuses the login, or a connection pooler that has no free connection, may be the
    /// session's or the one that took over. That cannot be told, so the session is believed for a while.
    fn note(&mut self, result: Result<(), StoreError>, now: Instant) -> Option<StoreError> {
        self.next = now + PROBE_INTERVAL;
        match result {
            Ok(()) => *self = Self::new(now),
            Err(error @ StoreError::Unverified { .. }) => {
                self.elsewhere += 1;
                self.next = now + PROBE_PAUSE;
                return (self.elsewhere >= PROBES_ELSEWHERE).then_some(error);
            }
            Err(error) => {
                let silent = error.is_silence();
                let limit = if silent { UNPROVEN_LIMIT } else { REFUSED_LIMIT };
                if now >= self.proven + limit {
                    return Some(error);
                }
                if !silent {
                    self.refusal = Some(match error {
                        // A pooler answers, though its database cannot be reached over it.
                        StoreError::ConnectionLost { reason, .. } => reason,
                        error => error.to_string(),
                    });
                }
            }
        }
        None
    }
}

impl HistoryGuard {
    /// Watches the database until `stop` is cancelled. Returns earlier only if the broker must stop, since the
    /// database was replaced by another one or by an older state of itself; the log says how it differs.
    pub async fn run(self, session: VerifiedSession, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            why = self.watch(session) => {
                error!("{why}");
            }
        }
        self.remember_seen().await;
    }

    /// Watches the database. Returns why the broker must stop.
    async fn watch(&self, mut session: VerifiedSession) -> HistoryError {
        let gated = self.database.gated(self.gate.clone());
        loop {
            let mut overtaken = false;
            match self.follow(&mut session, &gated).await {
                Ended::Overtaken(error) => {
                    self.gate.close_after(&error);
                    error!(%error, "the database is not used until its address leads to one server");
                    overtaken = true;
                }
                Ended::Untrusted(error) => {
                    if let StoreError::Unverified { .. } = &error {
                        self.gate.close_after(&error);
                    } else {
                        // A lost session does not show whether the server answers. The verification, which
                        // follows at once, does. If it is known why no other session can be opened, that says more.
                        let reason = self.gate.refusal().unwrap_or_else(|| error.to_string());
                        self.gate.close(reason, Answer::Refused);
                    }
                    warn!(%error, "the database is not used until it has been verified again");
                }
                Ended::Fatal(error) => return self.close_for_good(error),
            }
            drop(session);
            if overtaken {
                self.until_one_server().await;
            }
            session = match self.until_verified().await {
                Ok(session) => session,
                Err(error) => return self.close_for_good(error),
            };
            info!("the database was verified: it continues the history that is known");
        }
    }

    fn close_for_good(&self, error: HistoryError) -> HistoryError {
        self.gate.close(error.to_string(), Answer::Refused);
        error
    }

    /// Reads over the session and probes its address until either shows that the session is not enough.
    async fn follow(&self, session: &mut VerifiedSession, gated: &Database) -> Ended {
        let mut probes = Probes::new(Instant::now());
        let mut tokens_due = Instant::now();
        loop {
            // There can be very many accounts, and changes make the pauses short.
            if Instant::now() >= tokens_due {
                self.note_tokens();
                tokens_due = Instant::now() + POLL_INTERVAL;
            }
            if let Err(ended) = self.poll(session).await {
                return ended;
            }
            if let Some(error) = self.overtaken() {
                return Ended::Overtaken(error);
            }
            let polled = Instant::now();
            if polled >= probes.next {
                let probe = async { gated.open().await.map(drop) };
                let late = StoreError::TimedOut { reason: "no new connection within 5 s" };
                let result = timeout(PROBE_TIMEOUT, probe).await.unwrap_or(Err(late));
                if let Some(error) = probes.note(result, Instant::now()) {
                    return Ended::Untrusted(error);
                }
                self.note_refusal(&probes);
            }
            tokio::select! {
                () = sleep_until(probes.next.min(polled + POLL_INTERVAL)) => {}
                () = self.gate.doubted() => probes.next = probes.next.min(polled + PROBE_PAUSE),
                () = self.gate.changed() => sleep_until(polled + MIN_POLL_INTERVAL).await,
            }
        }
    }

    /// Returns why the session's server is not the primary any more, if a connection of this broker has led to one that
    /// took over. One is proof enough: a standby gets a later timeline only by a promotion.
    fn overtaken(&self) -> Option<StoreError> {
        let found = self.gate.take_elsewhere()?;
        let (seen, found) = self.seen_by(|evidence| evidence.overtaken_by(&found))?;
        let reason = format!(
            "its connections lead to two writable servers: to the one that was verified, on timeline {seen}, and to \
             one that took over, on timeline {found}"
        );
        Some(StoreError::Unverified { reason, primary_answers: false })
    }

    /// Waits until several new connections in a row lead to the same server. If none can be opened, the verification,
    /// which follows, says why.
    async fn until_one_server(&self) {
        let (mut last, mut in_a_row, mut enough) = (None, 0, PROBES_OF_ONE_SERVER);
        while in_a_row < enough {
            sleep(PROBE_PAUSE).await;
            let probe = async {
                let position = history::server_position(&mut self.database.open().await?).await?;
                Ok::<_, StoreError>((position.system_identifier, position.timeline))
            };
            let found = timeout(PROBE_TIMEOUT, probe).await.ok().and_then(Result::ok);
            in_a_row = if last.as_ref() == Some(&found) { in_a_row + 1 } else { 1 };
            enough = if found.is_some() { PROBES_OF_ONE_SERVER } else { PROBES_ELSEWHERE };
            last = Some(found);
        }
    }

    /// Lets operators see why new connections are refused, if they are.
    fn note_refusal(&self, probes: &Probes) {
        if let Some(refusal) = probes.refusal.as_ref().filter(|_| self.gate.refusal().is_none()) {
            warn!(refusal, "the database refuses new connections; those that are open are used");
        }
        self.gate.note_refusal(probes.refusal.clone());
    }

    /// Reads once over the session, checks what is found, and remembers it.
    async fn poll(&self, session: &mut VerifiedSession) -> Result<(), Ended> {
        let snapshot = session.snapshot.clone();
        let compare_tokens = !session.tokens_compared;
        let reading = match self.read(&mut session.session, snapshot, compare_tokens).await {
            Ok(reading) => reading,
            Err(error) if is_refused(&error) => {
                if !std::mem::replace(&mut session.refuses, true) {
                    warn!(%error, "the database refuses to tell its history; its session goes on");
                }
                return Ok(());
            }
            Err(error) => return Err(Ended::Untrusted(error)),
        };
        match self.believe(&mut session.session, reading).await {
            Ok(found) => {
                session.snapshot = Some(found.snapshot);
                session.refuses = false;
                session.tokens_compared |= found.older_tokens.is_some();
                Ok(())
            }
            // Only the row of the identity could not be written again.
            Err(HistoryError::Store(error)) if is_refused(&error) => Ok(()),
            Err(HistoryError::Store(error)) => Err(Ended::Untrusted(error)),
            Err(error) => Err(Ended::Fatal(error)),
        }
    }

    /// Verifies the database on new connections until that succeeds. Returns an error if the broker must stop.
    async fn until_verified(&self) -> Result<VerifiedSession, HistoryError> {
        let mut reported: Option<(String, Instant)> = None;
        loop {
            let error = match self.verify_again().await {
                Ok(session) => return Ok(session),
                Err(error) if must_stop(&error) => return Err(error),
                Err(error) => {
                    match &error {
                        HistoryError::Store(error) => self.gate.close_after(error),
                        HistoryError::File(_) => {
                            self.gate.close(error.to_string(), Answer::Refused);
                        }
                        error => self.gate.close(error.to_string(), Answer::Elsewhere),
                    }
                    error.to_string()
                }
            };
            let now = Instant::now();
            let is_known =
                |(text, at): &(String, Instant)| *text == error && now < *at + REPORT_INTERVAL;
            if !reported.as_ref().is_some_and(is_known) {
                error!(
                    error,
                    "the database cannot be used yet; what is cached is served meanwhile"
                );
                reported = Some((error, now));
            }
            sleep(RETRY_PAUSE).await;
        }
    }
}

/// Whether a failed reading leaves the session as it is: the server answers, and has the tables, but refuses
/// the statement, for example because somebody locked a table. A session whose statements are lost would be refused
/// for ever.
fn is_refused(error: &StoreError) -> bool {
    let spoiled = error.may_be_outage() || error.spoils_session();
    !spoiled && !matches!(error, StoreError::UndefinedTable(_))
}

/// Whether the broker must stop because of a failed verification. An old primary is waited for to go away: an
/// address may lead to it for a moment after a failover, and it says itself that it is not the present one.
fn must_stop(error: &HistoryError) -> bool {
    match error {
        HistoryError::Store(_) | HistoryError::File(_) => false,
        HistoryError::AcceptedElsewhere => true,
        HistoryError::Mismatch(mismatch) => !is_old_primary(&mismatch.differences),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::services::history::{DatabaseMismatch, Difference, LostRecords};

    fn elsewhere() -> Result<(), StoreError> {
        let reason = "it leads to a standby".into();
        Err(StoreError::Unverified { reason, primary_answers: false })
    }

    fn silent() -> Result<(), StoreError> {
        Err(StoreError::TimedOut { reason: "test" })
    }

    #[test]
    fn a_session_is_not_believed_after_three_connections_in_a_row_led_elsewhere() {
        let now = Instant::now();
        let mut probes = Probes::new(now);
        assert!(probes.note(elsewhere(), now).is_none());
        assert!(probes.note(elsewhere(), now).is_none());
        assert!(probes.note(Ok(()), now).is_none());
        assert!(probes.note(elsewhere(), now).is_none());
        assert!(probes.note(elsewhere(), now).is_none());
        assert!(probes.note(elsewhere(), now).is_some());
    }

    #[test]
    fn a_session_is_believed_for_half_a_minute_while_no_connection_can_be_opened() {
        let now = Instant::now();
        let mut probes = Probes::new(now);
        assert!(probes.note(silent(), now + UNPROVEN_LIMIT / 2).is_none());
        assert!(probes.note(silent(), now + UNPROVEN_LIMIT).is_some());
    }

    #[test]
    fn a_session_is_believed_for_as_long_as_pooled_connections_while_new_ones_are_refused() {
        type Refusal = fn() -> StoreError;
        let refusals: [Refusal; 3] = [
            || StoreError::UnusableSession("session_replication_role is replica".into()),
            || StoreError::Schema("refused".into()),
            || StoreError::NotFound("no such database".into()),
        ];
        for refused in refusals {
            let now = Instant::now();
            let almost = now + REFUSED_LIMIT - Duration::from_millis(1);
            let mut probes = Probes::new(now);
            assert!(probes.note(Err(refused()), now + 9 * UNPROVEN_LIMIT).is_none());
            assert_eq!(probes.refusal, Some(refused().to_string()), "operators see it");
            assert!(probes.note(Err(refused()), almost).is_none());
            assert!(probes.note(Err(refused()), now + REFUSED_LIMIT).is_some());
            // A connection that leads to the verified server is a new proof.
            assert!(probes.note(Ok(()), almost).is_none());
            assert_eq!(probes.refusal, None);
            assert!(probes.note(Err(refused()), now + REFUSED_LIMIT).is_none());
            // Silence in between does not prolong it, and counts by its own limit.
            assert!(probes.note(silent(), almost + UNPROVEN_LIMIT).is_some());
            // Nor does a server that is another one.
            assert!(probes.note(elsewhere(), almost + UNPROVEN_LIMIT).is_none());
            assert!(probes.note(Err(refused()), almost + REFUSED_LIMIT).is_some());
        }
    }

    #[test]
    fn a_refused_statement_leaves_the_session_as_it_is_unless_it_would_always_be_refused() {
        assert!(is_refused(&StoreError::NotFound("no deployment".into())));
        assert!(!is_refused(&StoreError::TimedOut { reason: "test" }));
        let lost = "a prepared statement was lost".into();
        assert!(!is_refused(&StoreError::UnusableSession(lost)), "a new session may work");
    }

    #[test]
    fn an_old_primary_is_waited_out_and_every_other_mismatch_stops_the_broker() {
        let mismatch = |differences| {
            HistoryError::Mismatch(DatabaseMismatch { differences, lost: LostRecords::default() })
        };
        let old_primary = Difference::OlderTimeline { found: 1, known: 2 };
        let older = Difference::Older { records: 1 };
        assert!(!must_stop(&mismatch(vec![older.clone(), old_primary])));
        assert!(must_stop(&mismatch(vec![older])));
        assert!(must_stop(&HistoryError::AcceptedElsewhere));
        assert!(!must_stop(&StoreError::TimedOut { reason: "test" }.into()));
    }
}
