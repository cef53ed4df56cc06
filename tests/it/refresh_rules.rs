//! Rules that are implemented in Rust and in SQL, or applied to the cache and to a locked row, give the same
//! results.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use proptest::{
    prelude::*,
    sample::select,
    strategy::ValueTree,
    test_runner::{Config, TestRunner},
};
use sqlx::{AssertSqlSafe, PgConnection, Row};
use token_broker::{
    domain::{
        account::AccountId,
        clock::{Timestamp, delta, until_from},
        plausible_time::{LEASE_BEYOND_ATTEMPT, LONGEST_LEASE, LONGEST_UPSTREAM_TIMEOUT},
        refresh_policy::{IssueDecision, IssueView, RefreshPolicy},
        refresh_state::{AccountState, FailureClass},
    },
    store::{
        accounts,
        leases::{self, Claim, LeaseHolder},
    },
    telemetry::Metrics,
};

use crate::harness::{database::TestDatabase, eventually, lease_holder::unlimited_holder};

/// Returns a VALUES list with a row for each of `values`, which have the SQL type `sql_type`.
fn rows(values: &[&str], sql_type: &str) -> String {
    let rows: Vec<_> = values.iter().map(|value| format!("({value}::{sql_type})")).collect();
    format!("(values {})", rows.join(", "))
}

/// Inserts an account for each combination of the facts that its state depends on. Times are before, at and
/// after the start of the transaction.
async fn insert_all_combinations(transaction: &mut PgConnection) {
    let classes: Vec<_> = FailureClass::ALL.iter().map(|class| format!("'{class}'")).collect();
    let mut classes: Vec<_> = classes.iter().map(String::as_str).collect();
    classes.extend(["null", "'of_a_newer_release'"]);
    let times = rows(&["null", "'-1 hour'", "'0'", "'1 hour'"], "interval");
    let booleans = rows(&["true", "false"], "boolean");
    let statements = format!(
        "create temporary table facts on commit drop as
             select row_number() over () as n, *
             from {booleans} a (enabled), {booleans} b (possibly_revoked), {classes} c (error_class),
                 {versions} d (error_version), {times} e (expires), {times} f (lease),
                 {times} g (next_attempt);
         insert into accounts (name, client_id, client_secret, enabled)
             select 'acme-' || n, 'id-' || n, 'SK.1', enabled from facts;
         update refreshes r set possibly_revoked = f.possibly_revoked, error_class = f.error_class,
                 error_version = f.error_version, lease_until = now() + f.lease,
                 next_attempt_at = now() + f.next_attempt
             from facts f join accounts a on a.name = 'acme-' || f.n where r.account_id = a.id;
         insert into tokens (account_id, credential_version, generation, sealed_token, issued_at,
                 expires_at, fingerprint)
             select a.id, 1, 1, 'x', now() - interval '2 hours', now() + f.expires, ''
             from facts f join accounts a on a.name = 'acme-' || f.n where f.expires is not null",
        classes = rows(&classes, "text"),
        versions = rows(&["null", "1", "0"], "bigint"),
    );
    sqlx::raw_sql(AssertSqlSafe(statements)).execute(transaction).await.unwrap();
}

#[tokio::test]
async fn rust_and_the_view_account_status_derive_the_same_state_from_all_facts() {
    let database = TestDatabase::new().await;
    let mut transaction = database.pool().begin().await.unwrap();
    insert_all_combinations(&mut transaction).await;

    let status = sqlx::query(
        "select a.id, s.state, now() as now from account_status s join accounts a using (name)",
    )
    .fetch_all(&mut *transaction)
    .await
    .unwrap();
    let by_view: BTreeMap<i64, String> =
        status.iter().map(|row| (row.get("id"), row.get("state"))).collect();
    let now: Timestamp = status[0].get("now");
    let ids: Vec<_> = by_view.keys().copied().collect();
    let loaded = accounts::load(&mut *transaction, &ids).await.unwrap().rows;
    assert_eq!(loaded.len(), 2 * 2 * (FailureClass::ALL.len() + 2) * 3 * 4 * 4 * 4);

    let mut seen = BTreeSet::new();
    for loaded in loaded {
        let token_ends = loaded.token.as_ref().map(|token| token.expires_at);
        let state = AccountState::of(&loaded.account, &loaded.refresh, token_ends, now);
        let by_view = &by_view[&loaded.account.id.0];
        assert_eq!(by_view, state.as_str(), "at {now}, token ends {token_ends:?}: {loaded:?}");
        seen.insert(state.as_str());
    }
    let all: BTreeSet<_> = AccountState::ALL.iter().map(|state| state.as_str()).collect();
    assert_eq!(seen, all, "each state must occur");
}

/// The minimum issue interval of the claims. It is so long that no generated time is near its end.
const MIN_ISSUE_INTERVAL: Duration = Duration::from_mins(30);
/// How long ago the upstream's outage ended, if there was one.
const OUTAGE_ENDED: Duration = Duration::from_mins(5);

/// The facts that the decision of a claim depends on, as SQL values.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "they are independent columns")]
struct Facts {
    enabled: bool,
    sealed: bool,
    previous: bool,
    version: i64,
    attempt_version: Option<i64>,
    attempt_open: bool,
    failure: Option<(FailureClass, i64)>,
    exceptions: i32,
    generation: Option<i64>,
    /// Times relative to the present: the start of the last attempt, the request for a new token, the end
    /// of the lease, the next attempt, and the start of the window of exceptions.
    times: [Option<&'static str>; 5],
    after_outage: bool,
}

fn facts() -> impl Strategy<Value = Facts> {
    let time = |times: [&'static str; 2]| prop::option::of(select(times.to_vec()));
    let times = (
        time(["-2 hours", "-10 minutes"]),
        time(["-1 hour", "-1 minute"]),
        time(["-1 minute", "10 minutes"]),
        time(["-1 minute", "20 minutes"]),
        time(["-2 hours", "-10 minutes"]),
    );
    let failure = prop::option::of((select(FailureClass::ALL.to_vec()), 0_i64..3));
    let flags = (prop::bool::weighted(0.9), prop::bool::weighted(0.9), any::<bool>());
    let attempt = (prop::option::of(0_i64..3), any::<bool>());
    let rest = (1_i64..3, 0_i32..5, prop::option::of(1_i64..3), any::<bool>());
    (flags, attempt, failure, times, rest).prop_map(|(flags, attempt, failure, times, rest)| {
        Facts {
            enabled: flags.0,
            sealed: flags.1,
            previous: flags.2,
            version: rest.0,
            attempt_version: attempt.0,
            attempt_open: attempt.1,
            failure,
            exceptions: rest.1,
            generation: rest.2,
            times: [times.0, times.1, times.2, times.3, times.4],
            after_outage: rest.3,
        }
    })
}

impl Facts {
    /// Inserts an account with these facts, and returns its id.
    async fn insert(&self, database: &TestDatabase, n: usize) -> i64 {
        let id: i64 = sqlx::query_scalar(
            "insert into accounts (name, client_id, client_secret, credential_version, enabled)
             values ('acme-' || $1::bigint, 'id-' || $1::bigint, 'SK.1', $2, $3) returning id",
        )
        .bind(i64::try_from(n).unwrap())
        .bind(self.version)
        .bind(self.enabled)
        .fetch_one(database.pool())
        .await
        .unwrap();
        let [attempt, reissue, lease, next, exceptions_since] = self.times;
        let mut past_triggers = database.pool().begin().await.unwrap();
        sqlx::raw_sql("set local session_replication_role = replica")
            .execute(&mut *past_triggers)
            .await
            .unwrap();
        sqlx::query(
            "update accounts set client_secret = null,
                 sealed_secret = case when $2 then 'x'::bytea end,
                 previous_secret = case when $3 then 'x'::bytea end,
                 previous_version = case when $3 then 0 end,
                 reissue_requested_at = now() + $4::text::interval
             where id = $1",
        )
        .bind(id)
        .bind(self.sealed)
        .bind(self.previous)
        .bind(reissue)
        .execute(&mut *past_triggers)
        .await
        .unwrap();
        past_triggers.commit().await.unwrap();
        sqlx::query(
            "update refreshes set attempt_started_at = now() + $2::text::interval,
                 attempt_ended_at = case when $3 then null else now() + $2::text::interval end,
                 attempt_version = $4, lease_until = now() + $5::text::interval,
                 next_attempt_at = now() + $6::text::interval,
                 new_secret_retry_at = now() + $6::text::interval, error_class = $7, error_version = $8,
                 interval_exceptions = $9, interval_exceptions_since = now() + $10::text::interval
             where account_id = $1",
        )
        .bind(id)
        .bind(attempt)
        .bind(self.attempt_open)
        .bind(self.attempt_version)
        .bind(lease)
        .bind(next)
        .bind(self.failure.map(|(class, _)| class.as_str()))
        .bind(self.failure.map(|(_, version)| version))
        .bind(self.exceptions)
        .bind(exceptions_since)
        .execute(database.pool())
        .await
        .unwrap();
        if let Some(generation) = self.generation {
            sqlx::query(
                "insert into tokens (account_id, credential_version, generation, sealed_token,
                     issued_at, expires_at, fingerprint)
                 values ($1, 1, $2, 'x', now(), now() + interval '1 hour', '')",
            )
            .bind(id)
            .bind(generation)
            .execute(database.pool())
            .await
            .unwrap();
        }
        id
    }
}

/// A replica with a short time limit for the upstream believes the leases and the calls of one with the longest:
/// otherwise both would issue at once.
#[tokio::test]
async fn a_lease_of_a_replica_with_another_time_limit_is_believed() {
    let database = TestDatabase::new().await;
    let holder = |instance: &str, timeout| LeaseHolder {
        lease_duration: timeout + LEASE_BEYOND_ATTEMPT,
        concurrency: 1,
        ..unlimited_holder(instance)
    };
    let slow = holder("slow", LONGEST_UPSTREAM_TIMEOUT);
    let quick = holder("quick", Duration::from_millis(100));
    let mut ids = vec![];
    for name in ["acme", "bank"] {
        let id: i64 = sqlx::query_scalar(
            "insert into accounts (name, client_id, client_secret) values ($1, $1, 'SK.1') returning id",
        )
        .bind(name)
        .fetch_one(database.pool())
        .await
        .unwrap();
        ids.push(AccountId(id));
    }
    database
        .sql_past_triggers("update accounts set client_secret = null, sealed_secret = 'x'")
        .await;
    let claim = async |account, holder: &LeaseHolder| {
        leases::claim(database.pool(), account, None, None, None, holder).await.unwrap()
    };
    assert!(matches!(claim(ids[0], &slow).await, Claim::Granted(_)));
    // What an earlier claim locked is free once its transaction was rolled back, which its end does not wait for.
    for _ in 0..2 {
        eventually("the lease is believed", async || match claim(ids[0], &quick).await {
            Claim::Wait(pause) => (pause > Duration::from_mins(1)).then_some(()),
            other => panic!("two leases at once: {other:?}"),
        })
        .await;
        eventually("the call is counted", async || match claim(ids[1], &quick).await {
            Claim::Wait(_) => None,
            Claim::Paced(_) => Some(()),
            other => panic!("two calls at once: {other:?}"),
        })
        .await;
    }
    // A process that another one has replaced gets no lease, also while it does not know that.
    let replaced = LeaseHolder { concurrency: 8, ..quick.clone() };
    database
        .sql(
            "insert into instances (id, start_nonce, replica, version, key_ids, started_at, heartbeat_at)
             values ('quick', 'another', 1, '0', '{}', now(), now())",
        )
        .await;
    let claimed = claim(ids[1], &replaced).await;
    assert!(matches!(claimed, Claim::Wait(_)), "{claimed:?}");
    database.sql("update instances set start_nonce = 'quick'").await;
    eventually("a lease", async || {
        matches!(claim(ids[1], &replaced).await, Claim::Granted(_)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_claim_and_the_schedule_decide_the_same_from_the_same_facts() {
    const CLAIMS: usize = 400;
    let database = TestDatabase::new().await;
    let policy = RefreshPolicy { refresh_at: 0.75, min_issue_interval: MIN_ISSUE_INTERVAL };
    let holder = LeaseHolder { policy, ..unlimited_holder("ours") };
    let (strategy, mut runner) = (facts(), TestRunner::new(Config::default()));
    let mut decisions = BTreeSet::new();
    for n in 0..CLAIMS {
        let facts = strategy.new_tree(&mut runner).unwrap().current();
        let id = facts.insert(&database, n).await;
        let mut cached = accounts::load(database.pool(), &[id]).await.unwrap().rows.pop().unwrap();
        let _ = holder.time_limits().correct(&mut cached.refresh, cached.now);
        let outage_ended = facts.after_outage.then_some(OUTAGE_ENDED);
        let outage_ended_at = outage_ended.map(|ago| cached.now - delta(ago));
        let view = IssueView::cached(
            &cached.account,
            &cached.refresh,
            Timestamp::UNIX_EPOCH,
            outage_ended_at,
        );
        let planned = policy.decide(&view, cached.now);
        let scheduled = policy.earliest_issue(&view).map(|earliest| earliest.credential_version);

        let replaces = cached.refresh.stored_generation;
        let claim = leases::claim(
            database.pool(),
            cached.account.id,
            replaces,
            scheduled,
            outage_ended,
            &holder,
        )
        .await
        .unwrap();
        match (planned, &claim) {
            (
                IssueDecision::Issue { credential_version, uses_interval_exception },
                Claim::Granted(lease),
            ) => {
                assert_eq!(lease.attempt.credential.version, credential_version, "{facts:?}");
                assert_eq!(lease.previous_attempt_lost, cached.refresh.attempt_open);
                let now = accounts::load(database.pool(), &[id]).await.unwrap().rows.pop().unwrap();
                let used = cached.refresh.interval_exceptions;
                let used = used.after_issue(cached.now, uses_interval_exception).used;
                assert_eq!(now.refresh.interval_exceptions.used, used, "{facts:?}");
                decisions.insert(if uses_interval_exception { "exception" } else { "issue" });
            }
            (IssueDecision::WaitUntil(at), Claim::Wait(pause)) => {
                // The claim was made a little later than the account was loaded.
                let expected = until_from(cached.now, at);
                assert!(
                    *pause <= expected && *pause + Duration::from_mins(1) > expected,
                    "{pause:?} instead of {expected:?}: {facts:?}"
                );
                decisions.insert("wait");
            }
            (IssueDecision::NotNeeded, Claim::NotNeeded) => {
                decisions.insert("not needed");
            }
            (planned, claim) => panic!("{claim:?} instead of {planned:?}: {facts:?}"),
        }
    }
    assert_eq!(decisions, BTreeSet::from(["exception", "issue", "not needed", "wait"]));
}

/// After the database's clock was set back by ten minutes, everything that it has stamped before lies in the future.
#[tokio::test]
async fn a_claim_believes_no_stored_time_that_cannot_be_true() {
    let database = TestDatabase::new().await;
    let holder = LeaseHolder {
        lease_duration: Duration::from_secs(30),
        policy: RefreshPolicy { refresh_at: 0.75, min_issue_interval: Duration::from_secs(30) },
        rate: 20.0,
        concurrency: 2,
        ..unlimited_holder("ours")
    };
    let mut accounts = vec![];
    for name in ["new", "tried", "failed", "leased", "leased-too", "exceptions"] {
        let id: i64 = sqlx::query_scalar(
            "insert into accounts (name, client_id, client_secret) values ($1, $1, 'SK.1') returning id",
        )
        .bind(name)
        .fetch_one(database.pool())
        .await
        .unwrap();
        accounts.push(id);
    }
    database
        .sql_past_triggers("update accounts set client_secret = null, sealed_secret = 'x'")
        .await;
    database
        .sql(
            "update accounts set reissue_requested_at = now() - interval '1 second' where name = 'tried';
             update upstream_pace set next_slot = now() + interval '10 minutes';
             update refreshes r set attempt_started_at = now() + interval '10 minutes',
                 attempt_ended_at = now() + interval '10 minutes', attempt_version = 1
             from accounts a where a.id = account_id and name <> 'new';
             update refreshes r set next_attempt_at = now() + interval '12 minutes',
                 error_class = 'unreachable', error_version = 1
             from accounts a where a.id = account_id and name = 'failed';
             update refreshes r set lease_holder = 'theirs', lease_until = now() + interval '10 minutes',
                 attempt_ended_at = null
             from accounts a where a.id = account_id and name like 'leased%';
             update refreshes r set interval_exceptions = 3,
                 interval_exceptions_since = now() + interval '10 minutes', attempt_version = 0
             from accounts a where a.id = account_id and name = 'exceptions'",
        )
        .await;
    let claim = async |id: i64| {
        leases::claim(database.pool(), AccountId(id), None, None, None, &holder).await.unwrap()
    };
    let (leased, free): (Vec<_>, Vec<_>) =
        accounts.iter().enumerate().partition(|(n, _)| [3, 4].contains(n));
    for (n, id) in free {
        let claimed = claim(*id).await;
        // The rate's pause follows from the claim before.
        let claimed = if let Claim::Paced(pause) = claimed {
            assert!(pause <= Duration::from_millis(50), "{n}: {pause:?}");
            tokio::time::sleep(pause).await;
            claim(*id).await
        } else {
            claimed
        };
        let Claim::Granted(lease) = claimed else { panic!("{n}: {claimed:?}") };
        leases::release(database.pool(), &lease).await.unwrap();
        // What was requested before is answered once.
        let again = claim(*id).await;
        assert!(matches!(again, Claim::Wait(_)), "{n}: {again:?}");
    }
    for (_, id) in leased {
        // The holder may be calling the upstream, so its lease lasts, but no longer than any replica's.
        let Claim::Wait(pause) = claim(*id).await else { panic!("a lease was ignored") };
        assert!(pause <= LONGEST_LEASE, "{pause:?}");
        let stored: bool = sqlx::query_scalar(
            "select lease_until <= clock_timestamp() + make_interval(secs => $2) from refreshes
             where account_id = $1",
        )
        .bind(id)
        .bind(LONGEST_LEASE.as_secs_f64())
        .fetch_one(database.pool())
        .await
        .unwrap();
        assert!(stored, "the end of the lease is as far away at the next look");
    }
}

#[test]
fn metrics_have_a_series_for_each_account_state_and_failure_class() {
    let metrics = Metrics::new("test").encode();
    for state in AccountState::ALL {
        assert!(metrics.contains(&format!("state=\"{state}\"")), "{state}: {metrics}");
    }
    assert_eq!(metrics.matches("state=\"").count(), AccountState::ALL.len());
    for class in FailureClass::ALL {
        assert!(metrics.contains(&format!("result=\"{class}\"")), "{class}: {metrics}");
    }
}
