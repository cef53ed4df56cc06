//! An admin's plain SQL takes effect within moments and without a restart.

use std::time::Duration;

use token_broker::dev::simulator::Faults;

use crate::harness::{
    broker::{World, refusal},
    eventually,
};

#[tokio::test]
async fn an_inserted_account_is_sealed_and_served() {
    let world = World::new().await;
    let bearer = world.caller("demo", &["acme*"]).await;
    let broker = world.start().await;
    let client = broker.client(&bearer).await;
    assert_eq!(refusal(&client.get("acme").await.unwrap_err()), "NotFound NO_SUCH_ACCOUNT");

    world.register("acme", "id-1", "SK.1").await;
    let token = eventually("a token", async || client.get("acme").await.ok()).await;
    assert!(world.upstream.is_live(&token.access_token));
    assert_eq!(token.allowed_ip, "127.0.0.1");
    assert_eq!(token.api_base_url, world.upstream.base_url());

    let intake: Option<String> =
        sqlx::query_scalar("select client_secret from accounts where name = 'acme'")
            .fetch_one(world.database.pool())
            .await
            .unwrap();
    assert_eq!(intake, None);
    world.until_state("acme", "fresh").await;
    assert_eq!(world.upstream.issued("id-1"), 1);
    broker.stop().await;
}

#[tokio::test]
async fn a_wrong_secret_is_reported_as_rejected_with_a_hint_and_tried_only_once_until_it_changes() {
    let world = World::new().await;
    let bearer = world.caller("demo", &["*"]).await;
    let broker = world.start().await;
    let client = broker.client(&bearer).await;

    world.register("acme", "id-1", "SK.wrong").await;
    world.until_state("acme", "rejected").await;
    assert!(world.status("acme", "last_error").await.starts_with("61006 "));
    assert!(world.status("acme", "hint").await.contains("client_secret"));
    let refused = client.get("acme").await.unwrap_err();
    assert_eq!(refusal(&refused), "FailedPrecondition CREDENTIAL_REJECTED");

    // Neither calls nor changes that trigger the refresher lead to a second attempt.
    for _ in 0..20 {
        client.get("acme").await.unwrap_err();
    }
    world.database.sql("update accounts set description = 'looked at'").await;
    world.register("other", "id-2", "SK.2").await;
    world.until_state("other", "fresh").await;
    assert_eq!(world.upstream.attempts("id-1"), 1);

    world.database.sql("update accounts set client_secret = 'SK.1' where name = 'acme'").await;
    world.until_state("acme", "fresh").await;
    client.get("acme").await.unwrap();
    assert_eq!(world.upstream.attempts("id-1"), 2);
    broker.stop().await;
}

#[tokio::test]
async fn the_hint_asks_for_a_secret_that_was_emptied_before_it_was_sealed() {
    let world = World::new().await;
    let broker = world.start().await;
    // One transaction, so that the broker cannot seal the secret in between.
    let empty = "update accounts set client_secret = null";
    let register = "insert into accounts (name, client_id, client_secret)
        values ('acme', 'id-1', 'SK.1')";
    world.database.sql(&format!("begin; {register}; {empty}; commit")).await;
    let status = async || [world.status("acme", "state").await, world.status("acme", "hint").await];
    let [state, hint] = status().await;
    assert_eq!(state, "pending");
    assert!(hint.contains("no token can be issued: set it again"), "{hint}");

    world.database.sql("update accounts set client_secret = 'SK.1'").await;
    world.until_state("acme", "fresh").await;
    assert_eq!(world.status("acme", "hint").await, "");
    world.database.sql(empty).await;
    assert_eq!(status().await, ["fresh", ""], "a sealed secret stays");

    let rotate = "update accounts set client_secret = 'SK.new'";
    world.database.sql(&format!("begin; {rotate}; {empty}; commit")).await;
    let [state, hint] = status().await;
    assert_eq!(state, "fresh");
    assert!(hint.contains("the one before it goes on issuing: set it again"), "{hint}");

    let purge = "set local token_broker.purge_old = 'on'";
    world.database.sql(&format!("begin; {purge}; {rotate}; {empty}; commit")).await;
    let [state, hint] = status().await;
    assert_eq!(state, "fresh");
    assert!(hint.contains("nothing replaces the live token: set it again"), "{hint}");
    assert_eq!(world.upstream.attempts("id-1"), 1);
    broker.stop().await;
}

#[tokio::test]
async fn the_previous_secret_goes_on_issuing_when_the_new_one_is_refused() {
    let world = World::new().await;
    let bearer = world.caller("demo", &["*"]).await;
    let broker = world.start().await;
    let client = broker.client(&bearer).await;
    world.register("acme", "id-1", "SK.1").await;
    world.until_state("acme", "fresh").await;
    let first = client.get("acme").await.unwrap();

    world.database.sql("update accounts set client_secret = 'SK.wrong'").await;
    world.until_state("acme", "rejected").await;
    assert_eq!(previous_version(&world).await, Some(1));
    assert_eq!(client.get("acme").await.unwrap().generation, first.generation);

    // The new secret was refused, so the next token is issued by the previous one.
    world.upstream.set_faults(Faults { token_life: Duration::from_secs(3), ..Faults::default() });
    world.database.sql("update accounts set enabled = false").await;
    world.database.sql("update tokens set expires_at = now() + interval '1 second', changed = pg_current_xact_id()").await;
    world.database.sql("update accounts set enabled = true").await;
    let second = eventually("a token by the old secret", async || {
        client.get("acme").await.ok().filter(|token| token.generation > first.generation)
    })
    .await;
    assert!(world.upstream.is_live(&second.access_token));
    assert_eq!(world.status("acme", "state").await, "rejected");
    broker.stop().await;
}

/// Returns the version of the previous secret, if it is kept.
async fn previous_version(world: &World) -> Option<i64> {
    sqlx::query_scalar("select previous_version from accounts")
        .fetch_one(world.database.pool())
        .await
        .unwrap()
}

#[tokio::test]
async fn a_rotation_does_not_keep_a_secret_that_is_refused_or_never_issued_a_token() {
    let world = World::new().await;
    let never_sealed = "insert into accounts (name, client_id, client_secret)
        values ('acme', 'id-1', 'SK.wrong')";
    world.database.sql(never_sealed).await;
    world.upstream.add_account("id-1", "SK.1");
    let broker = world.start().await;
    world.until_state("acme", "rejected").await;
    let rotate = async |secret: &str| {
        world.database.sql(&format!("update accounts set client_secret = '{secret}'")).await;
    };
    rotate("SK.1").await;
    assert_eq!(previous_version(&world).await, None, "the first secret never issued a token");
    world.until_state("acme", "fresh").await;
    rotate("SK.wrong").await;
    assert_eq!(previous_version(&world).await, Some(2), "the second one did");
    world.until_state("acme", "rejected").await;
    rotate("SK.1").await;
    assert_eq!(
        previous_version(&world).await,
        Some(2),
        "the second one is still kept, since the third was refused"
    );
    let issued = async || previous_version(&world).await.is_none().then_some(());
    eventually("a token by the new secret", issued).await;

    // The present secret is refused while it is being rotated, since the upstream has another one now.
    world.upstream.add_account("id-1", "SK.2");
    world.upstream.set_faults(Faults { latency: Duration::from_millis(500), ..Faults::default() });
    world.database.sql("update accounts set reissue_requested_at = now()").await;
    world.until_state("acme", "refreshing").await;
    rotate("SK.wrong").await;
    world.until_state("acme", "rejected").await;
    assert_eq!(previous_version(&world).await, None, "the secret was refused");
    broker.stop().await;
}

#[tokio::test]
async fn disabling_and_deleting_take_effect_and_a_new_row_with_the_same_name_is_another_account() {
    let world = World::new().await;
    let bearer = world.caller("demo", &["*"]).await;
    let broker = world.start().await;
    let client = broker.client(&bearer).await;
    world.register("acme", "id-1", "SK.1").await;
    let first = eventually("a token", async || client.get("acme").await.ok()).await;

    world.database.sql("update accounts set enabled = false").await;
    eventually("disabled", async || {
        let refused = client.get("acme").await.err()?;
        (refusal(&refused) == "FailedPrecondition ACCOUNT_DISABLED").then_some(())
    })
    .await;
    world.database.sql("update accounts set enabled = true").await;
    let again = eventually("a token", async || client.get("acme").await.ok()).await;
    assert_eq!(again.generation, first.generation);

    world.database.sql("delete from accounts").await;
    world.register("acme", "id-2", "SK.2").await;
    let other = eventually("the other account's token", async || {
        client.get("acme").await.ok().filter(|token| token.generation != first.generation)
    })
    .await;
    assert_eq!(world.upstream.live_token("id-2"), Some(other.access_token));
    broker.stop().await;
}

#[tokio::test]
async fn a_transaction_that_commits_late_is_not_missed() {
    let world = World::new().await;
    let bearer = world.caller("demo", &["*"]).await;
    let broker = world.start().await;
    let client = broker.client(&bearer).await;

    let mut late = world.database.pool().begin().await.unwrap();
    sqlx::query(
        "insert into accounts (name, client_id, client_secret) values ('late', 'id-1', 'SK.1')",
    )
    .execute(&mut *late)
    .await
    .unwrap();
    // While that transaction is open, others commit, and the change feed advances.
    world.register("early", "id-2", "SK.2").await;
    world.until_state("early", "fresh").await;
    world.database.sql("update accounts set description = 'again' where name = 'early'").await;
    late.commit().await.unwrap();
    eventually("the late account's token", async || client.get("late").await.ok()).await;
    broker.stop().await;
}

#[tokio::test]
async fn after_a_lost_listening_connection_a_change_still_takes_effect_within_moments() {
    let world = World::new().await;
    let bearer = world.caller("demo", &["*"]).await;
    let broker = world.start().await;
    let client = broker.client(&bearer).await;
    world
        .database
        .sql(
            "select pg_terminate_backend(pid) from pg_stat_activity
             where datname = current_database() and pid <> pg_backend_pid() and query ilike 'listen%'",
        )
        .await;
    world.register("acme", "id-1", "SK.1").await;
    eventually("a token", async || client.get("acme").await.ok()).await;
    broker.stop().await;
}

#[tokio::test]
async fn a_sealed_secret_that_was_copied_to_the_newest_account_does_not_prevent_a_start() {
    let world = World::new().await;
    let bearer = world.caller("demo", &["*"]).await;
    let broker = world.start().await;
    for (name, id) in [("one", 1), ("two", 2), ("three", 3)] {
        world.register(name, &format!("id-{id}"), &format!("SK.{id}")).await;
        world.until_state(name, "fresh").await;
    }
    broker.stop().await;
    world
        .database
        .sql(
            "update accounts set sealed_secret = (select sealed_secret from accounts where name = 'one'),
                 reissue_requested_at = now()
             where name = 'three'",
        )
        .await;

    let broker = world.start().await;

    let client = broker.client(&bearer).await;
    for name in ["one", "two", "three"] {
        client.get(name).await.unwrap();
    }
    world.until_state("three", "rejected").await;
    let error = world.status("three", "last_error").await;
    assert!(error.starts_with("the stored secret does not open"), "{error}");
    assert_eq!(world.upstream.attempts("id-3"), 1, "the copied secret was never sent");
    assert_eq!(world.status("one", "state").await, "fresh");

    world.database.sql("update accounts set client_secret = 'SK.3' where name = 'three'").await;
    eventually("a token by the corrected secret", async || {
        (world.upstream.issued("id-3") == 2).then_some(())
    })
    .await;
    world.until_state("three", "fresh").await;
    broker.stop().await;
}

#[tokio::test]
async fn a_value_that_was_sealed_for_another_row_is_not_used() {
    let world = World::new().await;
    let bearer = world.caller("demo", &["*"]).await;
    let broker = world.start().await;
    let client = broker.client(&bearer).await;
    world.register("one", "id-1", "SK.1").await;
    world.register("two", "id-2", "SK.2").await;
    world.until_state("one", "fresh").await;
    world.until_state("two", "fresh").await;

    // Somebody with access to the database copies the secret of `one` to `two`, and later the token.
    world
        .database
        .sql(
            "update accounts set sealed_secret = (select sealed_secret from accounts where name = 'one'),
                 reissue_requested_at = now()
             where name = 'two'",
        )
        .await;
    world.until_state("two", "rejected").await;
    assert_eq!(world.upstream.attempts("id-2"), 1, "the copied secret was never sent");
    broker.stop().await;

    world
        .database
        .sql(
            "update tokens set sealed_token = (select sealed_token from tokens t
                 join accounts a on a.id = t.account_id where a.name = 'one')
             where account_id = (select id from accounts where name = 'two')",
        )
        .await;
    world.database.sql("update accounts set client_secret = 'SK.2' where name = 'two'").await;
    let broker = world.start().await;
    let client_two = broker.client(&bearer).await;
    let token = eventually("a token of its own", async || client_two.get("two").await.ok()).await;
    assert_eq!(world.upstream.live_token("id-2"), Some(token.access_token));
    drop(client);
    broker.stop().await;
}

#[tokio::test]
async fn changes_made_by_sql_become_audit_events_with_who_made_them() {
    let world = World::new().await;
    // This change is made before any broker has run.
    world.register("early", "id-1", "SK.1").await;
    let broker = world.start().await;
    world
        .database
        .sql(
            "begin; set local token_broker.actor = 'jane'; set local token_broker.reason = 'T-1';
             insert into accounts (name, client_id, client_secret) values ('acme', 'id-2', 'SK.2');
             commit",
        )
        .await;
    world.database.sql("update accounts set enabled = false where name = 'acme'").await;
    world.database.sql("delete from accounts where name = 'acme'").await;
    let changes = "event like 'account\\_%' and detail->>'table' = 'accounts'
        and (detail->>'secret') is null";
    eventually("four changes", async || (world.audit(changes).await.len() == 4).then_some(()))
        .await;
    assert_eq!(
        world.audit(changes).await,
        [
            "account_registered/-/early/ok/-",
            "account_registered/-/acme/ok/-",
            "account_changed/-/acme/ok/-",
            "account_removed/-/acme/ok/-",
        ]
    );
    let who = world
        .audit("account = 'acme' and detail->>'actor' = 'jane' and detail->>'reason' = 'T-1'")
        .await;
    assert_eq!(who.len(), 1);
    broker.stop().await;
}
