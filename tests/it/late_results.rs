//! Results of attempts that come late, when another replica has made an attempt since. Whatever the order, a token
//! that the upstream may have ended is never left as the account's good token.

use std::time::Duration;

use token_broker::{
    dev::simulator::Answer,
    domain::{
        account::{AccountId, CredentialVersion},
        clock::{Clock, delta},
        refresh_state::{FailureClass, IssueFailure},
        token::{Generation, SealedToken},
    },
    store::{
        accounts::{self, LoadedAccount},
        leases::{self, Claim, FailedAttempt, Lease, LeaseHolder},
        tokens::{self, CommitOutcome, PendingToken, ReconcileContext, ReconcileOutcome},
    },
};

use crate::harness::{
    broker::Fixture, database::TestDatabase, eventually, lease_holder::unlimited_holder,
};

const LEASE: Duration = Duration::from_mins(5);

/// An account with a stored token, for which two replicas make attempts.
struct Account {
    database: TestDatabase,
    id: AccountId,
}

impl Account {
    async fn new() -> Self {
        let database = TestDatabase::new().await;
        database
            .sql("insert into accounts (name, client_id, client_secret) values ('acme', 'acme', 'SK.1')")
            .await;
        database
            .sql_past_triggers("update accounts set client_secret = null, sealed_secret = 'x'")
            .await;
        let id =
            sqlx::query_scalar("select id from accounts").fetch_one(database.pool()).await.unwrap();
        let account = Self { database, id: AccountId(id) };
        let first = account.claim("first").await;
        let stored = account.commit(&first, &issued_token(first.attempt.generation), true).await;
        assert_eq!(stored, CommitOutcome::Stored);
        let long_ago = "update refreshes set attempt_started_at = now() - interval '1 hour'";
        account.database.sql(long_ago).await;
        account
    }

    async fn claim(&self, instance: &str) -> Lease {
        let holder = LeaseHolder { lease_duration: LEASE, ..unlimited_holder(instance) };
        let replaces = self.load().await.refresh.stored_generation;
        let claim = async || match leases::claim(
            self.database.pool(),
            self.id,
            replaces,
            None,
            None,
            &holder,
        )
        .await
        {
            Ok(Claim::Granted(lease)) => Some(*lease),
            Ok(Claim::Paced(_)) => None,
            other => panic!("{other:?}"),
        };
        eventually("a lease", claim).await
    }

    /// Ends all leases, as time does.
    async fn end_leases(&self) {
        self.database.sql("update refreshes set lease_until = now() - interval '1 second'").await;
    }

    async fn load(&self) -> LoadedAccount {
        let mut loaded = accounts::load(self.database.pool(), &[self.id.0]).await.unwrap();
        loaded.rows.pop().unwrap()
    }

    async fn commit(&self, lease: &Lease, token: &SealedToken, ends_older: bool) -> CommitOutcome {
        tokens::commit(self.database.pool(), lease, token, ends_older, &Clock::System)
            .await
            .unwrap()
    }

    /// Stores that the attempt under `lease` failed. Returns `false` if the lease is not the account's any more.
    async fn fail(&self, lease: &Lease, class: FailureClass, may_have_issued: bool) -> bool {
        let attempt = FailedAttempt {
            failure: IssueFailure {
                class,
                code: None,
                message: String::new(),
                version: CredentialVersion(1),
            },
            retry_after: Some(Duration::from_secs(1)),
            possibly_revoked: may_have_issued,
        };
        leases::record_failure(self.database.pool(), lease, &attempt).await.unwrap()
    }

    async fn reconcile(
        &self,
        pending: &PendingToken,
        context: ReconcileContext<'_>,
    ) -> ReconcileOutcome {
        tokens::reconcile(self.database.pool(), self.id, pending, context).await.unwrap()
    }
}

/// Returns a token that the upstream issued just now.
fn issued_token(generation: Generation) -> SealedToken {
    let now = Clock::System.now();
    SealedToken {
        sealed: vec![1],
        generation,
        credential_version: CredentialVersion(1),
        issued_at: now,
        expires_at: now + delta(Duration::from_hours(1)),
        issuer_expires_at: None,
        allowed_ip: None,
        repeated_at: None,
        fingerprint: String::new(),
    }
}

/// What another replica does after a token was issued that could not be stored.
#[derive(Clone, Copy, Debug)]
enum Since {
    Nothing,
    /// It was killed during its call, and its lease has ended.
    Killed,
    /// Its call got no answer.
    Unanswered,
    /// The upstream refused the credential.
    Rejected,
    /// It stored a token.
    Issued,
    /// The token was stored all the same, only the answer was lost. Then its call got no answer.
    StoredThenUnanswered,
}

/// How a pending token ended: the outcome, whether it is the stored one, whether that counts as possibly revoked, and
/// the failures in a row.
type End = (ReconcileOutcome, bool, bool, u32);

/// Returns how a token ends that was issued under a lease or without one, and reconciled after `since`.
async fn reconciled_after(
    since: Since,
    under_lease: bool,
    ends_older: bool,
    lost_later: bool,
) -> End {
    let account = Account::new().await;
    let replaces = account.load().await.refresh.stored_generation;
    let (token, lease) = if under_lease {
        let lease = account.claim("ours").await;
        (issued_token(lease.attempt.generation), Some(lease))
    } else {
        (issued_token(Generation(replaces.unwrap().0 + 1)), None)
    };
    // The database's clock has a resolution of a microsecond, and `issued_at` one of the machine's.
    tokio::time::sleep(Duration::from_millis(50)).await;
    if let (Since::StoredThenUnanswered, Some(lease)) = (since, &lease) {
        assert_eq!(account.commit(lease, &token, ends_older).await, CommitOutcome::Stored);
    }
    account.end_leases().await;
    if !matches!(since, Since::Nothing) {
        let theirs = account.claim("theirs").await;
        match since {
            Since::Nothing => {}
            Since::Killed => account.end_leases().await,
            Since::Unanswered | Since::StoredThenUnanswered => {
                assert!(account.fail(&theirs, FailureClass::Unreachable, ends_older).await);
            }
            Since::Rejected => {
                assert!(account.fail(&theirs, FailureClass::Rejected, false).await);
            }
            Since::Issued => {
                let later = issued_token(theirs.attempt.generation);
                assert_eq!(
                    account.commit(&theirs, &later, ends_older).await,
                    CommitOutcome::Stored
                );
            }
        }
    }
    let context = ReconcileContext {
        instance: "ours",
        clock: &Clock::System,
        lease_duration: LEASE,
        possibly_revoked: lost_later,
        new_token_ends_older: ends_older,
    };
    let pending = PendingToken { token, replaces, lease: lease.map(|lease| lease.key()) };
    let outcome = account.reconcile(&pending, context).await;
    let first = account.load().await;
    let again = account.reconcile(&pending, context).await;
    let LoadedAccount { refresh, token, .. } = account.load().await;
    assert_eq!((again, &refresh), (outcome, &first.refresh), "{since:?}: it is not idempotent");
    let is_ours = token.unwrap().generation == pending.token.generation;
    (outcome, is_ours, refresh.token_may_be_revoked(), refresh.consecutive_failures)
}

/// A token that was issued while the database did not answer is stored later. What another replica wrote meanwhile
/// about an attempt that began after the issue remains: its warning that the token may be revoked, and its failure.
#[tokio::test]
async fn a_token_that_is_stored_late_clears_nothing_that_a_later_attempt_left() {
    use ReconcileOutcome::{Dropped, Stored};
    let (lease, alone) = (true, false);
    for (since, how, ends_older, lost_later, expected) in [
        (Since::Nothing, lease, true, false, (Stored, true, false, 0)),
        (Since::Nothing, alone, true, false, (Stored, true, false, 0)),
        (Since::Nothing, lease, true, true, (Stored, true, true, 0)),
        (Since::Nothing, alone, true, true, (Stored, true, true, 0)),
        (Since::Killed, lease, true, false, (Stored, true, true, 0)),
        (Since::Killed, alone, true, false, (Stored, true, true, 0)),
        (Since::Unanswered, lease, true, false, (Stored, true, true, 1)),
        (Since::Unanswered, alone, true, false, (Stored, true, true, 1)),
        (Since::Unanswered, alone, false, false, (Stored, true, false, 1)),
        (Since::Rejected, lease, true, false, (Stored, true, true, 1)),
        (Since::Rejected, alone, true, false, (Stored, true, true, 1)),
        (Since::Issued, lease, true, false, (Dropped, false, false, 0)),
        (Since::Issued, lease, true, true, (Dropped, false, true, 0)),
        (Since::Issued, alone, true, false, (Dropped, false, true, 0)),
        (Since::Issued, alone, false, false, (Dropped, false, false, 0)),
        (Since::StoredThenUnanswered, lease, true, false, (Stored, true, true, 1)),
    ] {
        let end = reconciled_after(since, how, ends_older, lost_later).await;
        assert_eq!(
            end, expected,
            "{since:?}, lease: {how}, {ends_older}, lost later: {lost_later}"
        );
    }
}

/// A failover can lose a claim. The next lease gets the same number then, and the replica whose claim was lost must
/// neither end it nor store under it.
#[tokio::test]
async fn a_lease_that_a_failover_lost_is_not_taken_for_the_next_one_with_its_number() {
    let account = Account::new().await;
    let lost = account.claim("ours").await;
    account
        .database
        .sql(
            "update refreshes set lease_id = lease_id - 1, lease_holder = null, lease_until = null,
                 attempt_started_at = now() - interval '1 hour', attempt_ended_at = now();
             delete from upstream_calls",
        )
        .await;
    let theirs = account.claim("theirs").await;
    assert_eq!(lost.id, theirs.id);

    assert!(!account.fail(&lost, FailureClass::Unreachable, true).await);
    leases::release(account.database.pool(), &lost).await.unwrap();
    leases::end_call(account.database.pool(), &lost).await.unwrap();
    assert_eq!(
        account.commit(&lost, &issued_token(lost.attempt.generation), true).await,
        CommitOutcome::Fenced
    );
    let refresh = account.load().await.refresh;
    assert!(refresh.attempt_open && refresh.lease_until.is_some(), "{refresh:?}");
    assert_eq!((refresh.consecutive_failures, refresh.possibly_revoked), (0, false));
    let calls: i64 = sqlx::query_scalar("select count(*) from upstream_calls")
        .fetch_one(account.database.pool())
        .await
        .unwrap();
    assert_eq!(calls, 1, "their call counts");

    let stored = account.commit(&theirs, &issued_token(theirs.attempt.generation), true).await;
    assert_eq!(stored, CommitOutcome::Stored);
    assert!(!account.load().await.refresh.token_may_be_revoked());
}

/// A token is not stored over one with a later generation. Where new tokens end older ones, it has ended that one.
#[tokio::test]
async fn a_stored_token_of_a_later_generation_counts_as_revoked_if_a_new_one_ended_it() {
    for ends_older in [true, false] {
        let account = Account::new().await;
        let lease = account.claim("ours").await;
        account.database.sql("update tokens set generation = generation + (1::bigint << 40)").await;
        let outcome =
            account.commit(&lease, &issued_token(lease.attempt.generation), ends_older).await;
        assert_eq!(outcome, CommitOutcome::StoredLivesLonger);
        assert_eq!(account.load().await.refresh.token_may_be_revoked(), ends_older);
    }
}

/// A token belongs to the login that it was issued with. Whatever comes late of an earlier login is not the account's
/// token, and the first token of the new login takes its place even if it ends earlier.
#[tokio::test]
async fn nothing_of_an_earlier_login_becomes_the_accounts_token() {
    let account = Account::new().await;
    let of_old_login = account.load().await.refresh.stored_generation;
    let late = account.claim("ours").await;
    let state = async || -> String {
        sqlx::query_scalar("select state from account_status")
            .fetch_one(account.database.pool())
            .await
            .unwrap()
    };
    account
        .database
        .sql("update accounts set client_id = 'moved', client_secret = 'SK.2' where name = 'acme'")
        .await;
    let loaded = account.load().await;
    assert!(loaded.token.is_none() && loaded.refresh.stored_generation == of_old_login);
    // The attempt is under way, and then it is not.
    assert_eq!(state().await, "pending");

    let token = issued_token(late.attempt.generation);
    assert_eq!(account.commit(&late, &token, true).await, CommitOutcome::Fenced);
    leases::release(account.database.pool(), &late).await.unwrap();
    let context = ReconcileContext {
        instance: "ours",
        clock: &Clock::System,
        lease_duration: LEASE,
        possibly_revoked: false,
        new_token_ends_older: true,
    };
    let pending = PendingToken { token, replaces: late.replaces, lease: Some(late.key()) };
    assert_eq!(account.reconcile(&pending, context).await, ReconcileOutcome::Dropped);
    assert!(account.load().await.token.is_none());
    assert_eq!(state().await, "pending");

    account
        .database
        .sql_past_triggers("update accounts set client_secret = null, sealed_secret = 'x'")
        .await;
    let lease = account.claim("ours").await;
    let mut first = issued_token(lease.attempt.generation);
    first.credential_version = lease.attempt.credential.version;
    first.expires_at = first.issued_at + delta(Duration::from_mins(5));
    assert_eq!(account.commit(&lease, &first, false).await, CommitOutcome::Stored);
    assert_eq!(account.load().await.token.unwrap().generation, first.generation);
    assert_eq!(state().await, "fresh");

    // Another secret of the same login takes no token away.
    account.database.sql("update accounts set client_secret = 'SK.3'").await;
    assert!(account.load().await.token.is_some());
    account
        .database
        .sql("set token_broker.purge_old = 'on'; update accounts set client_secret = 'SK.4'; reset token_broker.purge_old")
        .await;
    assert!(account.load().await.token.is_some());
}

/// A replica was paused during its call until another one had issued. Its call gets no answer, but the upstream may
/// have answered it last, and ended the other replica's token.
#[tokio::test]
async fn a_call_without_an_answer_under_an_old_lease_makes_the_stored_token_possibly_revoked() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let mut config = fixture.config();
    config.settings.upstream_timeout = Duration::from_secs(3);
    let broker = fixture.start_with(config).await;
    let client = broker.client(&bearer).await;
    let first = client.get("acme").await.unwrap();

    fixture.upstream.script("id-1", [Answer::IssueThenHang]);
    fixture.database.sql("update accounts set reissue_requested_at = now()").await;
    eventually("the call", async || (fixture.upstream.issued("id-1") == 2).then_some(())).await;
    // Another replica has claimed the account, and stored its token, since.
    let superseded = fixture
        .database
        .sql(
            "update refreshes set lease_id = lease_id + 1, lease_holder = null, lease_until = null,
                 attempt_started_at = clock_timestamp(), attempt_ended_at = clock_timestamp(),
                 possibly_revoked = false where attempt_ended_at is null",
        )
        .await;
    assert_eq!(superseded.rows_affected(), 1, "the call was answered");
    assert!(!fixture.upstream.is_live(&first.access_token));
    eventually("a live token", async || {
        let token = client.get("acme").await.ok()?;
        fixture.upstream.is_live(&token.access_token).then_some(())
    })
    .await;
    broker.stop().await;
}
