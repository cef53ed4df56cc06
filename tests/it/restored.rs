//! A database that is a copy, an older state or another deployment's is detected. It is used only after an
//! admin has accepted it.

use token_broker::app::AppConfig;

use crate::harness::{
    TEST_TIMEOUT,
    broker::{Fixture, code_and_reason, start_error},
    database::TestDatabase,
    eventually,
};

/// Counts the audit events that meet the SQL condition.
async fn count(fixture: &Fixture, condition: &str) -> usize {
    fixture.audit_events(condition).await.len()
}

/// Makes a copy of the database look like one that was restored in the same server under the same `oid`.
async fn set_restored_in_place(database: &TestDatabase) {
    let statement = "update deployment set database_oid =
        (select oid::bigint from pg_database where datname = current_database())";
    database.sql(statement).await;
}

#[tokio::test]
async fn a_copy_of_the_database_is_refused_until_it_is_accepted_and_the_original_is_refused_from_then_on()
 {
    let mut fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    let before = eventually("a token", async || client.get("acme").await.ok()).await;
    broker.stop().await;

    let copy = fixture.database.copy().await;
    let original = std::mem::replace(&mut fixture.database, copy);
    let error = start_error(fixture.config()).await;
    assert!(error.contains("it lies elsewhere than when it was used last"), "{error}");
    assert!(error.contains("start once with --accept-restored"), "{error}");
    assert_eq!(fixture.upstream.issued("id-1"), 1);

    let broker = fixture.start_with(AppConfig { accept_restored: true, ..fixture.config() }).await;
    let client = broker.client(&bearer).await;
    // A broker on the original may have issued since, so the token of the copy may be revoked.
    let after = eventually("a newer token", async || {
        client.get("acme").await.ok().filter(|token| token.generation > before.generation)
    })
    .await;
    assert!(fixture.upstream.is_live(&after.access_token));
    broker.stop().await;
    assert_eq!(count(&fixture, "event = 'database_accepted'").await, 1);

    let broker = fixture.start().await;
    broker.stop().await;
    assert_eq!(
        count(&fixture, "event = 'database_accepted'").await,
        1,
        "it needs to be accepted only once"
    );

    fixture.database = original;
    let error = start_error(fixture.config()).await;
    assert!(error.contains("a restored one was accepted in its place"), "{error}");
}

#[tokio::test]
async fn an_older_state_of_the_database_is_refused_with_a_list_of_what_was_lost() {
    let mut fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    // A second replica, which does not run while the older state is restored and accepted.
    let other = tempfile::tempdir().unwrap();
    let mut replica = fixture.config();
    replica.settings.state_dir = other.path().to_owned();
    fixture.start_with(replica).await.stop().await;
    fixture.start().await.stop().await;
    let dump = fixture.database.copy().await;

    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    fixture.add_account("late", "id-2", "SK.2").await;
    fixture
        .database
        .sql("update accounts set reissue_requested_at = now() where name = 'acme'")
        .await;
    eventually("a second token", async || (fixture.upstream.issued("id-1") == 2).then_some(()))
        .await;
    let before = eventually("a token", async || client.get("late").await.ok()).await;
    let newest = client.get("acme").await.unwrap();
    broker.stop().await;
    let recorded = count(&fixture, "true").await;

    fixture.database = dump;
    set_restored_in_place(&fixture.database).await;
    let error = start_error(fixture.config()).await;
    assert!(error.contains("it went back in time, by "), "{error}");
    assert!(error.contains(" account_registered late insert "), "{error}");
    assert!(error.contains(" token_issued acme"), "{error}");
    assert!(error.contains(" get_token"), "{error}");
    assert!(!error.contains(&before.access_token), "{error}");

    let broker = fixture.start_with(AppConfig { accept_restored: true, ..fixture.config() }).await;
    let client = broker.client(&bearer).await;
    let after = eventually("a token", async || {
        client.get("acme").await.ok().filter(|token| token.generation > newest.generation)
    })
    .await;
    assert!(fixture.upstream.is_live(&after.access_token));
    broker.stop().await;
    // The journal still has the records that the database lost, and delivers them again.
    assert!(count(&fixture, "true").await > recorded);
    assert_eq!(count(&fixture, "event = 'account_registered' and account = 'late'").await, 1);
    assert_eq!(
        count(&fixture, "event = 'database_accepted' and detail ? 'lost_account_registered'").await,
        1
    );

    let mut replica = fixture.config();
    replica.settings.state_dir = other.path().to_owned();
    fixture.start_with(replica).await.stop().await;
}

#[tokio::test]
async fn a_state_directory_is_not_used_with_another_deployments_database() {
    let fixture = Fixture::new().await;
    fixture.start().await.stop().await;
    let mut foreign = Fixture::new().await;
    foreign.start().await.stop().await;
    foreign.state = fixture.state;
    let error = start_error(foreign.config()).await;
    assert!(error.contains("not the one that the state directory belongs to"), "{error}");
}

#[tokio::test]
async fn a_broker_stops_when_its_database_is_replaced() {
    let fixture = Fixture::new().await;
    let broker = fixture.start().await;
    fixture.database.sql("update deployment set epoch = epoch + 1").await;
    tokio::time::timeout(TEST_TIMEOUT, broker.app.failed()).await.unwrap();
    broker.stop().await;
}

/// What was seen in the database must be there for ever, also while the sessions live on, as when a dump is
/// restored into the same database.
#[tokio::test]
async fn a_broker_stops_when_a_change_that_it_has_seen_is_gone() {
    let fixture = Fixture::new().await;
    let broker = fixture.start().await;
    fixture.add_caller("demo", &["*"]).await;
    eventually("the change is remembered", async || {
        let remembered = std::fs::read_to_string(fixture.state.path().join("database")).ok()?;
        remembered.contains("grants insert demo").then_some(())
    })
    .await;
    fixture.database.sql("delete from changes where table_name = 'grants'").await;
    tokio::time::timeout(TEST_TIMEOUT, broker.app.failed()).await.unwrap();
    broker.stop().await;
    let error = start_error(fixture.config()).await;
    assert!(error.contains("lacks changes that were seen in it: "), "{error}");
    assert!(error.contains(" grants insert demo"), "{error}");
}

/// A failover lost the last token together with its issuer's record. A replica had loaded that token and delivered no
/// record of its own since. It ends, and its next start must still know of the token: the older one was ended by it.
#[tokio::test]
async fn a_start_refuses_a_database_with_an_older_token_than_an_earlier_process_has_seen() {
    let fixture = Fixture::new().await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let broker = fixture.start().await;
    fixture.wait_for_state("acme", "fresh").await;
    let status = async || fixture.account_status("acme", "generation").await;
    let file = fixture.state.path().join("database");
    let generation = status().await;
    eventually("the token in the evidence", async || {
        std::fs::read_to_string(&file).unwrap().contains(&generation).then_some(())
    })
    .await;
    broker.stop().await;
    fixture.start().await.stop().await;

    // Changes and records are as they were; only the token is an older one.
    fixture.database.sql("update tokens set generation = generation - 65536").await;
    for _ in 0..2 {
        let error = start_error(fixture.config()).await;
        assert!(error.contains("to older tokens of 1 accounts"), "{error}");
    }
    let broker = fixture.start_with(AppConfig { accept_restored: true, ..fixture.config() }).await;
    eventually("a new token", async || (fixture.upstream.issued("id-1") == 2).then_some(())).await;
    broker.stop().await;
    fixture.start().await.stop().await;
}

/// Somebody with the broker's login made the broker's own rows of `audit_chains` malformed. They prove nothing then, but
/// the database is used: revocations are followed over a new session, and a start succeeds.
#[tokio::test]
async fn a_malformed_row_of_an_audit_chain_keeps_no_revocation_from_being_followed() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    fixture.start().await.stop().await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    client.get("acme").await.unwrap();
    eventually("a delivered record", async || {
        (count(&fixture, "event = 'get_token'").await > 0).then_some(())
    })
    .await;
    // The chain of the earlier process, and that of this one.
    fixture
        .database
        .sql(
            "update audit_chains set delivered_seq = -9223372036854775808
             where started_at = (select min(started_at) from audit_chains);
             update audit_chains set delivered_hash = '' where delivered_seq >= 0",
        )
        .await;
    fixture
        .database
        .sql(
            "select pg_terminate_backend(pid) from pg_stat_activity
             where datname = current_database() and application_name <> 'test'",
        )
        .await;
    fixture.database.sql("update accounts set enabled = false").await;
    eventually("the revocation", async || {
        let refused = client.get("acme").await.err()?;
        code_and_reason(&refused).contains("ACCOUNT_DISABLED").then_some(())
    })
    .await;
    broker.stop().await;
    fixture.start().await.stop().await;
}
