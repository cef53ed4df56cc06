//! Accounts that admins change by plain SQL: the changes take effect within moments and without a restart.

use std::time::Duration;

use tempfile::TempDir;
use token_broker::dev::simulator::Faults;

use crate::harness::{
    broker::{Fixture, code_and_reason},
    eventually,
};

#[tokio::test]
async fn an_inserted_account_is_sealed_and_served() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["acme*"]).await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    assert_eq!(code_and_reason(&client.get("acme").await.unwrap_err()), "NotFound NO_SUCH_ACCOUNT");

    fixture.add_account("acme", "id-1", "SK.1").await;
    let token = eventually("a token", async || client.get("acme").await.ok()).await;
    assert!(fixture.upstream.is_live(&token.access_token));
    assert_eq!(token.allowed_ip, "127.0.0.1");
    assert_eq!(token.api_base_url, fixture.upstream.base_url());

    let intake: Option<String> =
        sqlx::query_scalar("select client_secret from accounts where name = 'acme'")
            .fetch_one(fixture.database.pool())
            .await
            .unwrap();
    assert_eq!(intake, None);
    fixture.wait_for_state("acme", "fresh").await;
    assert_eq!(fixture.upstream.issued("id-1"), 1);
    broker.stop().await;
}

#[tokio::test]
async fn a_wrong_secret_is_reported_as_rejected_with_a_hint_and_tried_only_once_until_it_changes() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;

    fixture.add_account("acme", "id-1", "SK.wrong").await;
    fixture.wait_for_state("acme", "rejected").await;
    assert!(fixture.account_status("acme", "last_error").await.starts_with("61006 "));
    assert!(fixture.account_status("acme", "hint").await.contains("client_secret"));
    let refused = client.get("acme").await.unwrap_err();
    assert_eq!(code_and_reason(&refused), "FailedPrecondition CREDENTIAL_REJECTED");

    // Neither calls nor changes that trigger the refresher lead to a second attempt.
    for _ in 0..20 {
        client.get("acme").await.unwrap_err();
    }
    fixture.database.sql("update accounts set description = 'looked at'").await;
    fixture.add_account("other", "id-2", "SK.2").await;
    fixture.wait_for_state("other", "fresh").await;
    assert_eq!(fixture.upstream.attempts("id-1"), 1);

    fixture.database.sql("update accounts set client_secret = 'SK.1' where name = 'acme'").await;
    fixture.wait_for_state("acme", "fresh").await;
    client.get("acme").await.unwrap();
    assert_eq!(fixture.upstream.attempts("id-1"), 2);
    broker.stop().await;
}

#[tokio::test]
async fn the_hint_asks_for_a_secret_that_was_emptied_before_it_was_sealed() {
    let fixture = Fixture::new().await;
    let broker = fixture.start().await;
    // One transaction, so that the broker cannot seal the secret in between.
    let empty = "update accounts set client_secret = null";
    let register = "insert into accounts (name, client_id, client_secret)
        values ('acme', 'id-1', 'SK.1')";
    fixture.database.sql(&format!("begin; {register}; {empty}; commit")).await;
    let status = async || {
        [
            fixture.account_status("acme", "state").await,
            fixture.account_status("acme", "hint").await,
        ]
    };
    let [state, hint] = status().await;
    assert_eq!(state, "pending");
    assert!(hint.contains("no token can be issued: set it again"), "{hint}");

    fixture.database.sql("update accounts set client_secret = 'SK.1'").await;
    fixture.wait_for_state("acme", "fresh").await;
    assert_eq!(fixture.account_status("acme", "hint").await, "");
    fixture.database.sql(empty).await;
    assert_eq!(status().await, ["fresh", ""], "a sealed secret stays");

    let rotate = "update accounts set client_secret = 'SK.new'";
    fixture.database.sql(&format!("begin; {rotate}; {empty}; commit")).await;
    let [state, hint] = status().await;
    assert_eq!(state, "fresh");
    assert!(hint.contains("the one before it goes on issuing: set it again"), "{hint}");

    let purge = "set local token_broker.purge_old = 'on'";
    fixture.database.sql(&format!("begin; {purge}; {rotate}; {empty}; commit")).await;
    let [state, hint] = status().await;
    assert_eq!(state, "fresh");
    assert!(hint.contains("nothing replaces the live token: set it again"), "{hint}");
    assert_eq!(fixture.upstream.attempts("id-1"), 1);
    broker.stop().await;
}

#[tokio::test]
async fn tokens_are_issued_with_the_previous_secret_while_the_new_one_is_refused() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    fixture.wait_for_state("acme", "fresh").await;
    let first = client.get("acme").await.unwrap();

    fixture.database.sql("update accounts set client_secret = 'SK.wrong'").await;
    fixture.wait_for_state("acme", "rejected").await;
    assert_eq!(previous_version(&fixture).await, Some(1));
    assert_eq!(client.get("acme").await.unwrap().generation, first.generation);

    // The new secret was refused, so the next token is issued with the previous one.
    fixture.upstream.set_faults(Faults { token_life: Duration::from_secs(3), ..Faults::default() });
    fixture.database.sql("update accounts set enabled = false").await;
    fixture.database.sql("update tokens set expires_at = now() + interval '1 second', changed = pg_current_xact_id()").await;
    fixture.database.sql("update accounts set enabled = true").await;
    let second = eventually("a token issued with the previous secret", async || {
        client.get("acme").await.ok().filter(|token| token.generation > first.generation)
    })
    .await;
    assert!(fixture.upstream.is_live(&second.access_token));
    assert_eq!(fixture.account_status("acme", "state").await, "rejected");
    broker.stop().await;
}

/// Returns the version of the previous secret, if it is kept.
async fn previous_version(fixture: &Fixture) -> Option<i64> {
    sqlx::query_scalar("select previous_version from accounts")
        .fetch_one(fixture.database.pool())
        .await
        .unwrap()
}

#[tokio::test]
async fn a_rotation_does_not_keep_a_secret_that_is_refused_or_never_issued_a_token() {
    let fixture = Fixture::new().await;
    let never_sealed = "insert into accounts (name, client_id, client_secret)
        values ('acme', 'id-1', 'SK.wrong')";
    fixture.database.sql(never_sealed).await;
    fixture.upstream.add_account("id-1", "SK.1");
    let broker = fixture.start().await;
    fixture.wait_for_state("acme", "rejected").await;
    let rotate = async |secret: &str| {
        fixture.database.sql(&format!("update accounts set client_secret = '{secret}'")).await;
    };
    rotate("SK.1").await;
    assert_eq!(previous_version(&fixture).await, None, "the first secret never issued a token");
    fixture.wait_for_state("acme", "fresh").await;
    rotate("SK.wrong").await;
    eventually("the second secret is kept, since it issued a token", async || {
        (previous_version(&fixture).await == Some(2)).then_some(())
    })
    .await;
    fixture.wait_for_state("acme", "rejected").await;
    rotate("SK.1").await;
    assert_eq!(
        previous_version(&fixture).await,
        Some(2),
        "the second secret is still kept, since the third was refused"
    );
    let issued = async || previous_version(&fixture).await.is_none().then_some(());
    eventually("a token issued with the new secret", issued).await;

    // The current secret is rotated while an attempt with it is under way. The attempt fails, since the
    // upstream has another secret now.
    fixture.upstream.add_account("id-1", "SK.2");
    fixture
        .upstream
        .set_faults(Faults { latency: Duration::from_millis(500), ..Faults::default() });
    fixture.database.sql("update accounts set reissue_requested_at = now()").await;
    fixture.wait_for_state("acme", "refreshing").await;
    rotate("SK.wrong").await;
    fixture.wait_for_state("acme", "rejected").await;
    let refused = async || previous_version(&fixture).await.is_none().then_some(());
    eventually("the end of the secret that was refused", refused).await;
    broker.stop().await;
}

#[tokio::test]
async fn disabling_and_deleting_take_effect_and_a_new_row_with_the_name_is_another_account() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let first = eventually("a token", async || client.get("acme").await.ok()).await;

    fixture.database.sql("update accounts set enabled = false").await;
    eventually("disabled", async || {
        let refused = client.get("acme").await.err()?;
        (code_and_reason(&refused) == "FailedPrecondition ACCOUNT_DISABLED").then_some(())
    })
    .await;
    fixture.database.sql("update accounts set enabled = true").await;
    let again = eventually("a token", async || client.get("acme").await.ok()).await;
    assert_eq!(again.generation, first.generation);

    fixture.database.sql("delete from accounts").await;
    fixture.add_account("acme", "id-2", "SK.2").await;
    let other = eventually("the other account's token", async || {
        client.get("acme").await.ok().filter(|token| token.generation != first.generation)
    })
    .await;
    assert_eq!(fixture.upstream.live_token("id-2"), Some(other.access_token));
    broker.stop().await;
}

/// Another account may have the old login by now, and its issues end that login's tokens.
#[tokio::test]
async fn the_token_of_the_old_login_is_served_by_no_replica_once_an_account_was_moved() {
    let fixture = Fixture::new().await;
    fixture.upstream.add_account("id-moved", "SK.moved");
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let home = TempDir::new().unwrap();
    let mut config = fixture.config();
    config.settings.state_dir = home.path().to_owned();
    let replicas = [fixture.start().await, fixture.start_with(config).await];
    let clients = [replicas[0].client(&bearer).await, replicas[1].client(&bearer).await];
    let first = clients[0].get("acme").await.unwrap();
    for client in &clients {
        let served = eventually("a token", async || client.get("acme").await.ok()).await;
        assert_eq!(served.generation, first.generation);
    }

    fixture
        .database
        .sql("update accounts set client_id = 'id-moved', client_secret = 'SK.wrong' where name = 'acme'")
        .await;
    for client in &clients {
        eventually("a refusal", async || {
            let refused = client.get("acme").await.err()?;
            (code_and_reason(&refused) == "FailedPrecondition CREDENTIAL_REJECTED").then_some(())
        })
        .await;
    }
    assert_eq!(fixture.account_status("acme", "time_left").await, "");
    fixture.add_account("other", "id-1", "SK.1").await;
    let theirs = eventually("a token", async || clients[0].get("other").await.ok()).await;
    assert!(fixture.upstream.is_live(&theirs.access_token));
    assert!(!fixture.upstream.is_live(&first.access_token));

    fixture
        .database
        .sql("update accounts set client_secret = 'SK.moved' where name = 'acme'")
        .await;
    for client in &clients {
        let token = eventually("a token", async || client.get("acme").await.ok()).await;
        assert!(token.generation > first.generation);
        assert!(fixture.upstream.is_live(&token.access_token));
    }
    fixture.wait_for_state("acme", "fresh").await;
    for replica in replicas {
        replica.stop().await;
    }
}

#[tokio::test]
async fn a_transaction_that_commits_late_is_not_missed() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;

    let mut late = fixture.database.pool().begin().await.unwrap();
    sqlx::query(
        "insert into accounts (name, client_id, client_secret) values ('late', 'id-1', 'SK.1')",
    )
    .execute(&mut *late)
    .await
    .unwrap();
    // While this transaction is open, others commit, and the change feed advances past it.
    fixture.add_account("early", "id-2", "SK.2").await;
    fixture.wait_for_state("early", "fresh").await;
    fixture.database.sql("update accounts set description = 'again' where name = 'early'").await;
    late.commit().await.unwrap();
    eventually("the late account's token", async || client.get("late").await.ok()).await;
    broker.stop().await;
}

#[tokio::test]
async fn after_a_lost_listening_connection_a_change_still_takes_effect_within_moments() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    fixture
        .database
        .sql(
            "select pg_terminate_backend(pid) from pg_stat_activity
             where datname = current_database() and pid <> pg_backend_pid() and query ilike 'listen%'",
        )
        .await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    eventually("a token", async || client.get("acme").await.ok()).await;
    broker.stop().await;
}

#[tokio::test]
async fn a_sealed_secret_that_was_copied_to_the_newest_account_does_not_prevent_a_start() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let broker = fixture.start().await;
    for (name, id) in [("one", 1), ("two", 2), ("three", 3)] {
        fixture.add_account(name, &format!("id-{id}"), &format!("SK.{id}")).await;
        fixture.wait_for_state(name, "fresh").await;
    }
    broker.stop().await;
    let copy = "update accounts set sealed_secret = (select sealed_secret from accounts where name = 'one')
        where name = 'three'";
    fixture.database.sql_past_triggers(copy).await;
    let reissue = "update accounts set reissue_requested_at = now() where name = 'three'";
    fixture.database.sql(reissue).await;

    let broker = fixture.start().await;

    let client = broker.client(&bearer).await;
    for name in ["one", "two", "three"] {
        client.get(name).await.unwrap();
    }
    fixture.wait_for_state("three", "rejected").await;
    let error = fixture.account_status("three", "last_error").await;
    assert!(error.starts_with("the stored secret does not open"), "{error}");
    assert_eq!(fixture.upstream.attempts("id-3"), 1, "the copied secret was never sent");
    assert_eq!(fixture.account_status("one", "state").await, "fresh");

    fixture.database.sql("update accounts set client_secret = 'SK.3' where name = 'three'").await;
    eventually("a token issued with the corrected secret", async || {
        (fixture.upstream.issued("id-3") == 2).then_some(())
    })
    .await;
    fixture.wait_for_state("three", "fresh").await;
    broker.stop().await;
}

#[tokio::test]
async fn a_value_that_was_sealed_for_another_row_is_not_used() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    fixture.add_account("one", "id-1", "SK.1").await;
    fixture.add_account("two", "id-2", "SK.2").await;
    fixture.wait_for_state("one", "fresh").await;
    fixture.wait_for_state("two", "fresh").await;

    // Somebody with access to the database copies the secret of `one` to `two`, and later the token.
    let copy = "update accounts set sealed_secret = (select sealed_secret from accounts where name = 'one')
        where name = 'two'";
    fixture.database.sql_past_triggers(copy).await;
    let reissue = "update accounts set reissue_requested_at = now() where name = 'two'";
    fixture.database.sql(reissue).await;
    fixture.wait_for_state("two", "rejected").await;
    assert_eq!(fixture.upstream.attempts("id-2"), 1, "the copied secret was never sent");
    broker.stop().await;

    fixture
        .database
        .sql(
            "update tokens set sealed_token = (select sealed_token from tokens t
                 join accounts a on a.id = t.account_id where a.name = 'one')
             where account_id = (select id from accounts where name = 'two')",
        )
        .await;
    fixture.database.sql("update accounts set client_secret = 'SK.2' where name = 'two'").await;
    let broker = fixture.start().await;
    let client_two = broker.client(&bearer).await;
    let token = eventually("a token of its own", async || client_two.get("two").await.ok()).await;
    assert_eq!(fixture.upstream.live_token("id-2"), Some(token.access_token));
    drop(client);
    broker.stop().await;
}

#[tokio::test]
async fn changes_made_by_sql_become_audit_events_with_their_actor_and_reason() {
    let fixture = Fixture::new().await;
    // This change is made before any broker has run.
    fixture.add_account("early", "id-1", "SK.1").await;
    let broker = fixture.start().await;
    fixture
        .database
        .sql(
            "begin; set local token_broker.actor = 'jane'; set local token_broker.reason = 'T-1';
             insert into accounts (name, client_id, client_secret) values ('acme', 'id-2', 'SK.2');
             commit",
        )
        .await;
    fixture.database.sql("update accounts set enabled = false where name = 'acme'").await;
    fixture.database.sql("delete from accounts where name = 'acme'").await;
    let changes = "event like 'account\\_%' and detail->>'table' = 'accounts'
        and (detail->>'secret') is null";
    eventually("four changes", async || {
        (fixture.audit_events(changes).await.len() == 4).then_some(())
    })
    .await;
    assert_eq!(
        fixture.audit_events(changes).await,
        [
            "account_registered/-/early/ok/-",
            "account_registered/-/acme/ok/-",
            "account_changed/-/acme/ok/-",
            "account_removed/-/acme/ok/-",
        ]
    );
    let attributed = fixture
        .audit_events(
            "account = 'acme' and detail->>'actor' = 'jane' and detail->>'reason' = 'T-1'",
        )
        .await;
    assert_eq!(attributed.len(), 1);
    broker.stop().await;
}
