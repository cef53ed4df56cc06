//! Errors of the server are converted to the right kinds, and their texts quote no data.

use std::{error::Error, time::Duration};

use sqlx::AssertSqlSafe;
use token_broker::{
    dev::simulator::Faults,
    domain::clock::{Clock, ManualClock},
    store::StoreError,
};

use crate::{
    harness::{broker::Fixture, database::TestDatabase, eventually},
    outages::until_readiness_says,
};

/// Runs a statement that must fail, and returns its error.
async fn error_of(database: &TestDatabase, statement: &str) -> StoreError {
    let done = sqlx::raw_sql(AssertSqlSafe(statement.to_owned())).execute(database.pool()).await;
    done.expect_err(statement).into()
}

#[tokio::test]
async fn an_error_of_the_server_has_its_kind_and_quotes_no_data() {
    let database = TestDatabase::new().await;
    let kind = |error: &StoreError| match error {
        StoreError::ConnectionLost { .. } => "connection lost",
        StoreError::TransactionConflict(_) => "transaction conflict",
        StoreError::MissingPrivilege(_) => "missing privilege",
        StoreError::InvalidValue(_) => "invalid value",
        StoreError::Conflict { .. } => "conflict",
        StoreError::UndefinedTable(_) => "undefined table",
        StoreError::Refused(_) => "refused",
        _ => "another kind",
    };
    for (sqlstate, expected) in [
        ("57P03", "connection lost"),
        ("40001", "transaction conflict"),
        ("40P01", "transaction conflict"),
        ("42501", "missing privilege"),
        ("23514", "invalid value"),
        ("23505", "conflict"),
        ("42P01", "undefined table"),
        ("57014", "refused"),
        ("53300", "refused"),
    ] {
        let raise = format!(
            "do $$ begin raise exception using errcode = '{sqlstate}', message = 'a message',
             detail = 'canary', hint = 'canary', constraint = 'c'; end $$"
        );
        let error = error_of(&database, &raise).await;
        assert_eq!(kind(&error), expected, "{sqlstate}");
        assert_eq!(error.sqlstate(), Some(sqlstate));
        assert_eq!(error.is_retryable(), sqlstate.starts_with("40"), "{sqlstate}");
        assert_eq!(error.source().unwrap().to_string(), format!("SQLSTATE {sqlstate}"));
        let texts = format!("{error} {error:?} {error:#?}");
        assert!(!texts.contains("canary"), "{texts}");
    }

    // The server's messages for these statements quote the value.
    for malformed in ["select 'canary'::text::int", "select to_timestamp('canary', 'YYYY')"] {
        let error = error_of(&database, malformed).await;
        assert_eq!(kind(&error), "refused");
        assert!(!format!("{error} {error:?}").contains("canary"), "{error}");
    }
}

#[tokio::test]
async fn a_lock_that_blocks_the_change_feed_does_not_count_as_an_outage() {
    let manual = ManualClock::new(Clock::System.now());
    let fixture = Fixture::with(Clock::Manual(manual.clone()), Faults::default()).await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    let token = client.get("acme").await.unwrap();

    let mut locking = fixture.database.pool().begin().await.unwrap();
    sqlx::raw_sql("lock table changes in access exclusive mode")
        .execute(&mut *locking)
        .await
        .unwrap();
    until_readiness_says(&broker, "answers, but its changes cannot be followed: ").await;
    manual.advance(Duration::from_secs(59 * 60 + 30));
    eventually("a token that was issued under a lease", async || {
        let next = client.get("acme").await.ok()?;
        (next.generation > token.generation).then_some(())
    })
    .await;
    locking.rollback().await.unwrap();

    until_readiness_says(&broker, "\"answers\"").await;
    broker.stop().await;
    assert_eq!(fixture.audit_events("event = 'token_issued'").await.len(), 2);
    let without_lease =
        fixture.audit_events("event = 'token_issued' and detail ? 'database'").await;
    assert!(without_lease.is_empty(), "{without_lease:?}");
}
