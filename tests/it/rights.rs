//! What logins with rights in the database cannot do beyond them: read API KEYs by publishing a key of their own,
//! run code as the owner, get tokens by a name, lose API KEYs, or change something without a trace.

use sqlx::AssertSqlSafe;
use token_broker::{
    api::proto::GetTokenResponse,
    config::DatabaseUrl,
    crypto::Keyring,
    dev::simulator::Faults,
    domain::clock::Clock,
    store::{Database, StoreError},
};

use crate::{
    harness::{
        broker::{Fixture, start_error},
        database::TestDatabase,
        eventually,
        http::http,
    },
    outages::until_readiness_says,
    roles::{
        ACCESS, ACCOUNTS, AUDITOR, ROLES, RUNTIME, attempt, config_as_runtime, database_with_roles,
        sql_as,
    },
};

fn other_keyring() -> Keyring {
    Keyring::parse(&Keyring::generate(Clock::System.now())).unwrap()
}

async fn texts(database: &TestDatabase, query: &'static str) -> Vec<String> {
    sqlx::query_scalar(query).fetch_all(database.pool()).await.unwrap()
}

/// The published intake key cannot be changed by the broker's login or by an admin's. A broker does not start when
/// the published key is not one of its keyring, and is not ready when that happens while it runs.
#[tokio::test]
async fn a_published_key_that_is_not_the_brokers_is_noticed_at_the_start_and_while_it_runs() {
    let fixture = Fixture::new().await;
    let database = &fixture.database;
    database.sql(ROLES).await;
    let other = other_keyring().intake_public();
    let bytes = hex::encode(other.bytes());
    let broker = fixture.start_with(config_as_runtime(&fixture)).await;

    for statement in [
        format!("update intake_keys set public_key = '\\x{bytes}'"),
        format!(
            "insert into intake_keys (key_id, public_key, is_primary, published_at)
             values ('i1', '\\x{bytes}', true, now() + interval '1 day')"
        ),
        "delete from intake_keys".into(),
        "truncate intake_keys".into(),
        "drop table intake_keys".into(),
        "alter table intake_keys disable trigger all".into(),
    ] {
        for role in [RUNTIME, ACCOUNTS, ACCESS, AUDITOR] {
            let error = attempt(database, role, &statement).await.expect_err(&statement);
            let code = error.as_database_error().unwrap().code().unwrap().into_owned();
            assert_eq!(code, "42501", "{role} may not {statement}: {error}");
        }
    }
    assert_eq!(http(broker.app.ops_address, "GET", "/readyz", "").await.0, 200);

    // A superuser can do all of this, and each of it is noticed.
    let ours = fixture.keyring.intake_public();
    for (swap, says) in [
        (format!("update intake_keys set public_key = '\\x{bytes}'"), "differs from"),
        (
            format!(
                "begin; set local session_replication_role = replica;
                 delete from intake_keys;
                 insert into intake_keys (key_id, public_key, is_primary)
                     values ('{}', '\\x{bytes}', true); commit",
                other.key_id()
            ),
            "is not in the keyring",
        ),
        (
            format!(
                "insert into intake_keys (key_id, public_key, is_primary)
                 values ('{}', '\\x{bytes}', false)",
                other.key_id()
            ),
            "is not in the keyring",
        ),
        ("delete from intake_keys".into(), "no intake key is published"),
    ] {
        database.sql(&swap).await;
        until_readiness_says(&broker, says).await;
        assert_eq!(http(broker.app.ops_address, "GET", "/readyz", "").await.0, 503);
        for migrate in [false, true] {
            if migrate && says.starts_with("no ") {
                continue;
            }
            let mut config = fixture.config();
            config.settings.state_dir = fixture.state.path().join("another");
            config.migrate = migrate;
            let error = start_error(config).await;
            assert!(error.contains(says) && error.contains("keys publish"), "{error}");
        }
        database.publish(&ours).await;
        eventually("readiness", async || {
            (http(broker.app.ops_address, "GET", "/readyz", "").await.0 == 200).then_some(())
        })
        .await;
    }
    eventually("the records of the changes", async || {
        let recorded = fixture.audit_events("event = 'keys_changed' and detail ? 'key_id'").await;
        (recorded.len() >= 6).then_some(())
    })
    .await;
    broker.stop().await;
}

/// A broker that migrates publishes its key itself, and does so again after a rotation.
#[tokio::test]
async fn a_broker_that_migrates_publishes_its_own_key() {
    let fixture = Fixture::new().await;
    let database = &fixture.database;
    database.sql("delete from intake_keys").await;
    let error = start_error(fixture.config()).await;
    assert!(error.starts_with("no intake key is published"), "{error}");

    let mut config = fixture.config();
    config.migrate = true;
    fixture.start_with(config).await.stop().await;
    let published = "select key_id from intake_keys where is_primary";
    assert_eq!(
        texts(database, published).await,
        [fixture.keyring.intake_public().key_id().as_str()]
    );
    let changes = "select operation from changes where table_name = 'intake_keys' order by id";
    let count = texts(database, changes).await.len();
    let mut config = fixture.config();
    config.migrate = true;
    fixture.start_with(config).await.stop().await;
    assert_eq!(texts(database, changes).await.len(), count, "the same key is no change");
}

/// Functions and operators that match calls of our triggers, functions and views better than those of Postgres.
/// Each of them writes down who runs it.
const BETTER_MATCHES: &str = "
    create table public.ran (who text default current_user, what text);
    grant insert on public.ran to public;
    create function public.jsonb_build_object(text, text) returns jsonb language plpgsql as
        $$ begin insert into public.ran (what) values ('build 2'); return '{}'; end $$;
    create function public.jsonb_build_object(text, text, text, text) returns jsonb language plpgsql as
        $$ begin insert into public.ran (what) values ('build 4'); return '{}'; end $$;
    create function public.jsonb_build_object(text, text, text, text, text, text) returns jsonb
        language plpgsql as
        $$ begin insert into public.ran (what) values ('build 6'); return '{}'; end $$;
    create function public.jsonb_build_object(text, text, text, text, text, text, text, text)
        returns jsonb language plpgsql as
        $$ begin insert into public.ran (what) values ('build 8'); return '{}'; end $$;
    create function public.format(text, text) returns text language plpgsql as
        $$ begin insert into public.ran (what) values ('format 2'); return ''; end $$;
    create function public.format(text, name) returns text language plpgsql as
        $$ begin insert into public.ran (what) values ('format name'); return ''; end $$;
    create function public.format(text, text, boolean, integer) returns text language plpgsql as
        $$ begin insert into public.ran (what) values ('format caller'); return ''; end $$;
    create function public.format(text, text, text, boolean, bigint) returns text language plpgsql as
        $$ begin insert into public.ran (what) values ('format account'); return ''; end $$;
    create function public.format(text, text, text, text) returns text language plpgsql as
        $$ begin insert into public.ran (what) values ('format partition'); return ''; end $$;
    create function public.array_to_string(text[], text) returns text language plpgsql as
        $$ begin insert into public.ran (what) values ('array_to_string'); return ''; end $$;
    create function public.cardinality(text[]) returns integer language plpgsql as
        $$ begin insert into public.ran (what) values ('cardinality'); return 1; end $$;
    create function public.array_ndims(text[]) returns integer language plpgsql as
        $$ begin insert into public.ran (what) values ('array_ndims'); return 1; end $$;
    create function public.array_lower(text[], integer) returns integer language plpgsql as
        $$ begin insert into public.ran (what) values ('array_lower'); return 1; end $$;
    create function public.array_position(text[], text) returns integer language plpgsql as
        $$ begin insert into public.ran (what) values ('array_position'); return 1; end $$;
    create function public.concat_ws(text, text, text) returns text language plpgsql as
        $$ begin insert into public.ran (what) values ('concat_ws'); return ''; end $$;
    create function public.contained(text[], text[]) returns boolean language plpgsql as
        $$ begin insert into public.ran (what) values ('contained'); return true; end $$;
    create operator public.<@ (leftarg = text[], rightarg = text[], function = public.contained);
    create function public.joined(text, bigint) returns text language plpgsql as
        $$ begin insert into public.ran (what) values ('joined'); return ''; end $$;
    create operator public.|| (leftarg = text, rightarg = bigint, function = public.joined);
    create function public.joined(text, text) returns text language plpgsql as
        $$ begin insert into public.ran (what) values ('joined'); return textcat($1, $2); end $$;
    create operator public.|| (leftarg = text, rightarg = text, function = public.joined);
    create function public.same(text, text) returns boolean language plpgsql as
        $$ begin insert into public.ran (what) values ('same'); return texteq($1, $2); end $$;
    create operator public.= (leftarg = text, rightarg = text, function = public.same);
    create function public.differ(text, text) returns boolean language plpgsql as
        $$ begin insert into public.ran (what) values ('differ'); return textne($1, $2); end $$;
    create operator public.<> (leftarg = text, rightarg = text, function = public.differ);
    create function public.token_broker_refuse(text, name) returns void language plpgsql as
        $$ begin insert into public.ran (what) values ('refuse'); end $$;
    create function public.token_broker_is_printable(varchar, bigint) returns boolean language plpgsql as
        $$ begin insert into public.ran (what) values ('printable'); return true; end $$;";

/// What the roles do, with each trigger and function of ours.
const WORK: &[(&str, &str)] = &[
    (
        ACCOUNTS,
        "insert into accounts (name, client_id, client_secret) values ('new', 'new-id', 'SK.1');
         update accounts set client_secret = 'SK.2', description = 'x' where name = 'new';
         update accounts set enabled = false, reissue_requested_at = now() where name = 'new';
         delete from accounts where name = 'new'",
    ),
    (ACCOUNTS, "select * from account_status"),
    (
        ACCESS,
        "insert into callers (name, rate_limit) values ('new', 5);
         update callers set rate_limit = 6, enabled = false where name = 'new';
         insert into caller_credentials (caller_id, kind, identity)
             select id, 'spiffe', 'spiffe://example.org/new' from callers where name = 'new';
         update caller_credentials set revoked_at = now(), ends_at = now() where kind = 'spiffe';
         insert into grants (caller_id, pattern, rights)
             select id, 'acme', '{get}' from callers where name = 'new';
         update grants set ends_at = now(), rights = '{get,list}';
         delete from callers where name = 'new'",
    ),
    (
        RUNTIME,
        "select audit_ensure_partition('2026-01-01'); select audit_lock_day('2026-01-01');
         insert into audit_pruning_receipts (chain, first_seq, prev_hash, last_seq, hash, at, key_id, signature)
             values ('c', 1, '', 1, '', now(), 'h', '');
         select audit_prune('2026-01-01', true)",
    ),
    (RUNTIME, "select * from unrecorded_changes; select * from unaudited_changes"),
    (AUDITOR, "select * from unrecorded_changes; select * from unaudited_changes"),
];

/// Where everybody may create objects in the schema of the tables, nobody can have a function run with the rights
/// of the owner or of another role.
#[tokio::test]
async fn a_better_match_in_the_tables_schema_never_runs_with_the_rights_of_others() {
    let database = database_with_roles().await;
    database.sql("grant create on schema public to public").await;
    sql_as(&database, ACCOUNTS, BETTER_MATCHES).await;

    let ran_as_others =
        "select who || ' ' || what from public.ran where who <> 'token_broker_accounts'";
    for (role, statements) in WORK {
        let path = format!("set local search_path = pg_catalog, public; {statements}");
        sql_as(&database, role, &path).await;
    }
    assert_eq!(texts(&database, ran_as_others).await, [""; 0]);

    // In this order, their own statements find such objects. Those of our functions do not.
    for (role, statements) in WORK {
        let path = format!("set local search_path = public, pg_catalog; {statements}");
        sql_as(&database, role, &path).await;
    }
    let ran_as_owner = "select what from public.ran where who = session_user";
    assert_eq!(texts(&database, ran_as_owner).await, [""; 0]);
}

/// A schema in which others may create objects, or have done so, is refused by brokers, by migrations and by
/// admins' commands. The error has the statement that mends it.
#[tokio::test]
async fn a_schema_in_which_others_may_create_objects_is_refused_until_that_is_revoked() {
    let fixture = Fixture::new().await;
    let database = &fixture.database;
    database.sql(ROLES).await;
    let store = || Database::new(database.url(), "test").unwrap();
    let broker = fixture.start_with(config_as_runtime(&fixture)).await;
    for (grant, revoke) in [
        ("grant create on schema public to public", "revoke create on schema public from public"),
        (
            "grant create on schema public to token_broker_accounts",
            "revoke create on schema public from token_broker_accounts",
        ),
        (
            "grant all on schema public to token_broker_runtime",
            "revoke create on schema public from token_broker_runtime",
        ),
    ] {
        database.sql(grant).await;
        let error = store().check_schema_trust().await.unwrap_err();
        assert!(matches!(error, StoreError::UnsafeSchema(_)), "{error}");
        assert!(error.to_string().contains(revoke), "{error}");
        until_readiness_says(&broker, revoke).await;
        let mut config = config_as_runtime(&fixture);
        config.settings.state_dir = fixture.state.path().join("another");
        assert!(start_error(config).await.contains(revoke));
        database.sql(ROLES).await;
        store().check_schema_trust().await.unwrap();
    }
    until_readiness_says(&broker, "the published intake key is the keyring's").await;
    broker.stop().await;

    // The owner's migration takes the right from everybody by itself.
    database.sql("grant create on schema public to public").await;
    store().migrate().await.unwrap();
    store().check_schema_trust().await.unwrap();

    // What somebody created before that stays dangerous.
    database
        .sql(
            "grant create on schema public to token_broker_access; set role token_broker_access;
             create function public.lower(varchar) returns text language sql as 'select $1';
             create function public.same(text, varchar) returns boolean language sql as 'select true';
             create operator public.~~~ (leftarg = text, rightarg = varchar, function = public.same);
             reset role; revoke create on schema public from token_broker_access",
        )
        .await;
    for refused in [store().check_schema_trust().await, store().migrate().await] {
        let error = refused.unwrap_err().to_string();
        assert!(error.contains("function public.lower(character varying) belongs to"), "{error}");
        assert!(
            error.contains("operator public.~~~(text,character varying) belongs to"),
            "{error}"
        );
    }
}

/// Who may manage accounts cannot bring an account's tokens to other callers by its name, and who may manage
/// callers cannot make the records of one seem to be of another.
#[tokio::test]
async fn names_of_accounts_and_callers_are_never_changed() {
    let database = database_with_roles().await;
    for (role, statement) in [
        (ACCOUNTS, "update accounts set name = 'other'"),
        (ACCOUNTS, "update accounts set name = upper(name)"),
        (
            ACCOUNTS,
            "update accounts set name = 'other', client_id = 'other', client_secret = 'other'",
        ),
        (
            ACCOUNTS,
            "insert into accounts (name, client_id, client_secret) values ('acme', 'acme-id', 'x')
             on conflict (name) do update set name = 'other'",
        ),
        (ACCESS, "update callers set name = 'other'"),
    ] {
        let error = attempt(&database, role, statement).await.expect_err(statement);
        let error = error.as_database_error().unwrap();
        assert_eq!(error.code().unwrap(), "23514", "{statement}: {error}");
    }
    // Writing the same name again changes nothing.
    attempt(&database, ACCOUNTS, "update accounts set name = name, enabled = false").await.unwrap();
    attempt(&database, ACCESS, "update callers set name = name, enabled = false").await.unwrap();
}

/// The broker's login neither replaces an API KEY, nor loses one without a failure that admins see.
#[tokio::test]
async fn the_runtime_role_moves_api_keys_and_does_nothing_else_with_them() {
    let fixture = Fixture::new().await;
    let database = &fixture.database;
    database.sql(ROLES).await;
    let broker = fixture.start_with(config_as_runtime(&fixture)).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    fixture.wait_for_state("acme", "fresh").await;
    // The secret is rotated to one that is refused, so that the one before it is kept.
    database.sql("update accounts set client_secret = 'SK.wrong'").await;
    fixture.wait_for_state("acme", "rejected").await;
    broker.stop().await;

    let refused = async |statement: &str| {
        let error = attempt(database, RUNTIME, statement).await.expect_err(statement);
        let code = error.as_database_error().unwrap().code().unwrap().into_owned();
        assert_eq!(code, "42501", "{statement}: {error}");
    };
    let sealed = "'\\x0109'::bytea || 's12345678'::bytea || repeat('x', 29)::bytea";
    refused("update accounts set sealed_secret = null").await;
    refused(&format!("update accounts set sealed_secret = {sealed}")).await;
    refused("update accounts set sealed_secret = previous_secret").await;
    refused("update accounts set client_secret = 'SK.mine'").await;
    refused("update accounts set previous_secret = sealed_secret").await;
    refused("update accounts set previous_version = 7").await;
    // This attempt was with the current secret only: the previous one was not tried again.
    database.sql("update refreshes set attempt_version = 2; delete from tokens").await;
    refused("update accounts set previous_secret = null, previous_version = null").await;

    // A secret that was not sealed yet can be sealed, or refused for admins to see, and not be replaced.
    database.sql("update accounts set client_secret = 'SK.1'").await;
    refused("update accounts set client_secret = 'SK.mine'").await;
    refused("update accounts set client_secret = null").await;
    refused("update accounts set client_secret = null, sealed_secret = 'SK.mine'").await;
    refused(&format!("update accounts set client_secret = null, sealed_secret = {sealed}")).await;
    let as_version = |version: i64, statement: &str| {
        format!("set local token_broker.sealing = '{version}'; {statement}")
    };
    let seal = format!("update accounts set client_secret = null, sealed_secret = {sealed}");
    let refuse = "update accounts set client_secret = null, sealed_secret = null";
    let fail = "update refreshes set error_class = 'intake', error_version = 3";
    for statement in [as_version(3, refuse), as_version(4, &seal), as_version(1, &seal)] {
        refused(&statement).await;
    }
    for statement in [
        as_version(3, &seal),
        as_version(2, &seal),
        as_version(2, "update accounts set client_secret = null"),
        as_version(3, &format!("{fail}; {refuse}")),
    ] {
        attempt(database, RUNTIME, &statement).await.unwrap();
    }
}

/// A change cannot be kept out of the audit log by marking it.
#[tokio::test]
async fn a_change_that_is_marked_as_audited_without_its_record_is_recorded_all_the_same() {
    let fixture = Fixture::new().await;
    let database = &fixture.database;
    database.sql(ROLES).await;
    fixture.add_caller("shop", &["acme"]).await;
    sql_as(database, RUNTIME, "update changes set audited_at = now()").await;
    let marked = "select id::text from changes where audited_at is not null";
    assert_eq!(texts(database, marked).await, [""; 0]);

    let broker = fixture.start_with(config_as_runtime(&fixture)).await;
    eventually("the record of the grant", async || {
        (fixture.audit_events("event = 'grant_changed'").await.len() == 1).then_some(())
    })
    .await;
    eventually("all changes to be marked", async || {
        let left = "select id::text from changes where audited_at is null";
        texts(database, left).await.is_empty().then_some(())
    })
    .await;
    for statement in
        ["update changes set audited_at = null", "update changes set recorder = 'another'"]
    {
        attempt(database, RUNTIME, statement).await.expect_err(statement);
    }
    assert_eq!(texts(database, "select problem from unaudited_changes").await, [""; 0]);

    // A change that somebody hides with the triggers off is found.
    database
        .sql(
            "begin; set local session_replication_role = replica;
             insert into changes (table_name, operation, row_id, subject, audited_at)
                 values ('grants', 'insert', 7, 'hidden', now());
             insert into changes (table_name, operation, row_id, subject, at, recorder)
                 values ('grants', 'insert', 8, 'waiting', now() - interval '1 hour', 'nobody');
             update instances set started_at = started_at - interval '10 minutes';
             update changes set what = what || '{\"state\": \"other\"}' where table_name = 'callers';
             update changes set operation = 'delete' where table_name = 'caller_credentials';
             update changes set table_name = 'accounts' where table_name = 'grants' and subject = 'shop';
             commit",
        )
        .await;
    let problems = "select subject || ' ' || problem from unaudited_changes order by id";
    assert_eq!(
        texts(database, problems).await,
        [
            // Its caller, its credential and its grant.
            "shop differs from its audit record",
            "shop differs from its audit record",
            "shop differs from its audit record",
            "hidden counts as audited, but has no audit record",
            "waiting waits for its audit record",
        ]
    );
    broker.stop().await;
}

/// Whoever may write the times of a stored token cannot make a broker serve it beyond its end.
#[tokio::test]
async fn no_stored_time_makes_a_token_outlive_its_issue() {
    let fixture = Fixture::new().await;
    let database = &fixture.database;
    database.sql(ROLES).await;
    let bearer = fixture.add_caller("shop", &["*"]).await;
    let broker = fixture.start().await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    fixture.wait_for_state("acme", "fresh").await;
    let issued = broker.client(&bearer).await.get("acme").await.unwrap();
    broker.stop().await;
    let end = |token: &GetTokenResponse| token.expires_at.unwrap().seconds;
    // Nothing replaces the token.
    fixture.upstream.set_faults(Faults { error_rate: 1.0, ..Faults::default() });
    database.sql("create table kept as select * from tokens").await;
    for times in [
        "expires_at = expires_at + interval '10 hours'",
        "expires_at = expires_at + interval '10 hours', issuer_expires_at = null",
        "expires_at = expires_at + interval '10 hours', issuer_expires_at = issuer_expires_at + interval '10 hours'",
        "issued_at = issued_at + interval '10 hours', expires_at = expires_at + interval '10 hours',
            issuer_expires_at = issuer_expires_at + interval '10 hours'",
        "issued_at = issued_at - interval '40 hours', expires_at = expires_at + interval '40 hours',
            issuer_expires_at = issuer_expires_at + interval '40 hours'",
        "issued_at = '1970-01-01Z', expires_at = '9999-12-31 00:00Z', issuer_expires_at = '9999-12-31 00:00Z'",
        "issued_at = now(), expires_at = now() + interval '90 minutes', issuer_expires_at = null",
    ] {
        let update = format!("update tokens set {times}, changed = pg_current_xact_id()");
        sql_as(database, RUNTIME, &update).await;
        let broker = fixture.start().await;
        let served = broker.client(&bearer).await.get("acme").await;
        let served = served.unwrap_or_else(|error| panic!("{times}: {error}"));
        assert_eq!(served.generation, issued.generation, "{times}");
        // The bound is that of the longest attempt of any replica, 80 s.
        assert!(end(&served) <= end(&issued) + 90, "{times}: {served:?}, {issued:?}");
        assert!(end(&served) >= end(&issued) - 10, "{times}: {served:?}, {issued:?}");
        broker.stop().await;
        database.sql("delete from tokens; insert into tokens select * from kept").await;
    }
}

/// Whoever may insert audit records cannot make a change count as audited by one that does not tell it.
#[tokio::test]
async fn a_record_that_does_not_tell_the_change_does_not_count() {
    let database = database_with_roles().await;
    database
        .sql(
            "insert into grants (caller_id, pattern) select id, 'bank' from callers;
             delete from grants where pattern = 'bank'",
        )
        .await;
    let (table, operation, state) = ("'table', 'grants'", "'operation', 'delete'", "'state', 'x'");
    for (detail, problem) in [
        (vec![], true),
        (vec![table], true),
        (vec![operation], true),
        (vec![table, "'operation', 'insert'"], true),
        (vec!["'table', 'callers'", operation], true),
        (vec!["'table', null", operation], true),
        (vec![state], true),
        (vec![table, operation], false),
    ] {
        let detail = [vec!["'change_id', id::text"], detail].concat().join(", ");
        let forge = format!(
            "select audit_ensure_partition((now() at time zone 'UTC')::date);
             insert into audit_events (instance, chain, seq, at, event, outcome, count, detail, prev_hash, hash)
                 select 'i', 'c', id, at, 'grant_changed', 'ok', 1, jsonb_build_object({detail}), '', ''
                 from changes where table_name = 'grants' and operation = 'delete';
             update changes set audited_at = now() where operation = 'delete'"
        );
        sql_as(&database, RUNTIME, &forge).await;
        let problems = "select operation || ' ' || problem from unaudited_changes
            where operation = 'delete'";
        let expected = if problem { vec!["delete differs from its audit record"] } else { vec![] };
        assert_eq!(texts(&database, problems).await, expected, "{detail}");
        database
            .sql(
                "begin; set local session_replication_role = replica;
                 delete from audit_events where chain = 'c';
                 update changes set audited_at = null; commit",
            )
            .await;
    }
}

/// Rows that were written with the triggers off are told by name, whichever column that decides who gets which
/// tokens was changed.
#[tokio::test]
async fn a_change_without_a_record_is_found_by_name() {
    let database = database_with_roles().await;
    let key = other_keyring().intake_public();
    database.publish(&key).await;
    database
        .sql(
            "insert into caller_credentials (caller_id, kind, identity)
                 select id, 'dns', 'shop.example.com' from callers;
             update grants set rights = '{get}', ends_at = now() + interval '1 day';
             update caller_credentials set ends_at = now() + interval '1 day';
             update callers set rate_limit = 5, enabled = false;
             update accounts set enabled = false, description = 'changed';
             insert into callers (name) values ('gone'); delete from callers where name = 'gone'",
        )
        .await;
    // The text of a time depends on the session's settings.
    database
        .sql("set timezone = 'Asia/Seoul'; set datestyle = 'SQL, DMY';
              update grants set ends_at = ends_at + interval '1 day'; reset timezone; reset datestyle")
        .await;
    assert_eq!(texts(&database, "select subject from unrecorded_changes").await, [""; 0]);

    for (change, table, subject) in [
        ("update accounts set enabled = true", "accounts", "acme"),
        ("update accounts set client_id = 'other'", "accounts", "acme"),
        ("update accounts set name = 'other'", "accounts", "other"),
        ("update accounts set credential_version = 9", "accounts", "acme"),
        ("delete from accounts", "accounts", "acme"),
        ("insert into accounts (name, client_id) values ('new', 'new')", "accounts", "new"),
        ("update callers set enabled = true", "callers", "shop"),
        ("update callers set rate_limit = null", "callers", "shop"),
        ("update callers set name = 'other'", "callers", "other"),
        ("insert into callers (name) values ('new')", "callers", "new"),
        (
            "update caller_credentials set revoked_at = now() where kind = 'dns'",
            "caller_credentials",
            "shop",
        ),
        (
            "update caller_credentials set ends_at = null where kind = 'dns'",
            "caller_credentials",
            "shop",
        ),
        (
            "update caller_credentials set identity = 'evil.example.com' where kind = 'dns'",
            "caller_credentials",
            "shop",
        ),
        (
            "update caller_credentials set bearer_sha256 = sha256('y') where kind = 'bearer'",
            "caller_credentials",
            "shop",
        ),
        (
            "insert into caller_credentials (caller_id, kind, bearer_sha256)
                 select id, 'bearer', sha256('z') from callers",
            "caller_credentials",
            "shop",
        ),
        ("update grants set pattern = '*'", "grants", "shop"),
        ("update grants set rights = '{get,report,list}'", "grants", "shop"),
        ("update grants set ends_at = null", "grants", "shop"),
        ("insert into grants (caller_id, pattern) select id, '*' from callers", "grants", "shop"),
        ("delete from grants", "grants", "shop"),
        (
            "update intake_keys set public_key = sha256('mine')",
            "intake_keys",
            key.key_id().as_str(),
        ),
        ("delete from intake_keys", "intake_keys", key.key_id().as_str()),
    ] {
        let mut transaction = database.pool().begin().await.unwrap();
        for statement in ["set local session_replication_role = replica", change] {
            sqlx::raw_sql(statement).execute(&mut *transaction).await.unwrap();
        }
        let found: Vec<String> =
            sqlx::query_scalar("select table_name || ' ' || subject from unrecorded_changes")
                .fetch_all(&mut *transaction)
                .await
                .unwrap();
        transaction.rollback().await.unwrap();
        assert_eq!(found, [format!("{table} {subject}")], "{change}");
    }
}

/// Rows that are older than the comparison are recorded by the migration that brings it, once.
#[tokio::test]
async fn rows_from_before_the_comparison_are_recorded_by_the_migration() {
    let database = database_with_roles().await;
    database
        .sql(
            "begin; set local session_replication_role = replica;
             update changes set what = what - 'state'; commit;
             update repeatable_migrations set version = 0 where name = 'integrity'",
        )
        .await;
    assert_eq!(texts(&database, "select subject from unrecorded_changes").await.len(), 4);
    let url = DatabaseUrl::new(database.url()).unwrap();
    url.database("test").unwrap().migrate().await.unwrap();
    assert_eq!(texts(&database, "select subject from unrecorded_changes").await, [""; 0]);

    database
        .sql(
            "begin; set local session_replication_role = replica;
             insert into grants (caller_id, pattern) select id, '*' from callers; commit;
             update repeatable_migrations set version = 0 where name = 'integrity'",
        )
        .await;
    url.database("test").unwrap().migrate().await.unwrap();
    assert_eq!(texts(&database, "select table_name from unrecorded_changes").await, ["grants"]);
}

/// What somebody created under the name of a partition, while others could create objects, is never used by the
/// functions that run as the owner.
#[tokio::test]
async fn a_relation_of_others_with_the_name_of_a_partition_is_refused() {
    let database = database_with_roles().await;
    database
        .sql(
            "grant create on schema public to token_broker_access; set role token_broker_access;
             create table audit_events_20260102 (at timestamptz, event text, chain text);
             create view audit_events_20260103 as select * from generate_series(1, 2);
             create table audit_events_20260101_kept ();
             reset role; revoke create on schema public from token_broker_access",
        )
        .await;
    for (relation, statement) in [
        ("audit_events_20260102", "select audit_ensure_partition('2026-01-02')"),
        ("audit_events_20260102", "select audit_lock_day('2026-01-02')"),
        ("audit_events_20260102", "select audit_prune('2026-01-02', true)"),
        ("audit_events_20260103", "select audit_ensure_partition('2026-01-03')"),
        ("audit_events_20260103", "select audit_prune('2026-01-03', false)"),
        (
            "audit_events_20260101_kept",
            "insert into audit_pruning_receipts
                 (chain, first_seq, prev_hash, last_seq, hash, at, key_id, signature)
                 values ('c', 1, '', 1, '', now(), 'h', '');
             select audit_prune('2026-01-01', false)",
        ),
    ] {
        let error = attempt(&database, RUNTIME, statement).await.expect_err(statement);
        let message = error.as_database_error().unwrap().message().to_owned();
        assert!(message.contains(&format!("public.{relation} of role")), "{statement}: {message}");
        assert!(message.ends_with("drop it"), "{statement}: {message}");
    }
    // Other logins cannot hold up that a partition is made.
    attempt(&database, RUNTIME, "select from audit_retention for update").await.unwrap_err();
    attempt(&database, RUNTIME, "select audit_ensure_partition('2026-01-04')").await.unwrap();
}

/// The first migration uses no table that somebody made before it, and runs nothing of theirs.
#[tokio::test]
async fn the_first_migration_refuses_relations_of_others_with_names_that_the_broker_uses() {
    let database = database_with_roles().await;
    let names = texts(
        &database,
        "select relname::text from pg_class where relnamespace = 'public'::regnamespace
            and relkind in ('r', 'p', 'v') and not relispartition order by relname",
    )
    .await;
    assert!(names.len() > 20, "{names:?}");
    let theirs = "
        drop schema public cascade; create schema public;
        create schema if not exists elsewhere;
        grant usage, create on schema public, elsewhere to token_broker_access;
        set role token_broker_access;
        create or replace function elsewhere.trap() returns trigger language plpgsql as
            $$ begin raise exception 'it ran'; end $$;
        create table _sqlx_migrations (version bigint primary key, description text not null,
            installed_on timestamptz not null default now(), success boolean not null,
            checksum bytea not null, execution_time bigint not null);
        create trigger trap before insert on _sqlx_migrations
            for each row execute function elsewhere.trap();
        create sequence numbers; create view seen as select 1 as it;
        reset role; revoke create on schema public from token_broker_access";
    database.sql(theirs).await;
    let store = Database::new(database.url(), "test").unwrap();
    let refusal = async || store.migrate().await.unwrap_err().to_string();
    let error = refusal().await;
    assert!(
        error.contains("table public._sqlx_migrations, which belongs to role token_broker_access"),
        "{error}"
    );
    database.sql("drop table _sqlx_migrations").await;
    for name in names.iter().filter(|name| *name != "accounts") {
        let plant = format!(
            "create view {name} as select 1 as it; alter view {name} owner to token_broker_access"
        );
        database.sql(&plant).await;
        let error = refusal().await;
        assert!(
            error.contains(&format!("view public.{name}, which belongs to role")),
            "{name}: {error}"
        );
        database.sql(&format!("drop view {name}")).await;
    }
    // A table of theirs that has the name of ours does not make them the owner of our tables.
    database
        .sql("create table accounts (); alter table accounts owner to token_broker_access")
        .await;
    let error = refusal().await;
    assert!(error.contains("`grant create on schema public to token_broker_access`"), "{error}");
    database.sql("drop table accounts").await;

    // What has other names stays.
    store.migrate().await.unwrap();
    store.check_schema_trust().await.unwrap();
}

/// Whoever migrates, what is created belongs to the owner of the tables, whose functions use it.
#[tokio::test]
async fn a_superuser_may_migrate_the_tables_of_another_role() {
    let database = database_with_roles().await;
    database
        .sql(
            "grant create, usage on schema public to token_broker_auditor;
             do $$ declare it record; begin
                 for it in select oid::regclass as name, relkind from pg_class
                         where relnamespace = 'public'::regnamespace and relkind in ('r', 'p', 'v') loop
                     execute format('alter %s %s owner to token_broker_auditor',
                         case it.relkind when 'v' then 'view' else 'table' end, it.name);
                 end loop;
                 for it in select oid::regprocedure as name from pg_proc
                         where pronamespace = 'public'::regnamespace loop
                     execute format('alter function %s owner to token_broker_auditor', it.name);
                 end loop;
             end $$;
             drop function audit_check_partition(text);
             delete from repeatable_migrations",
        )
        .await;
    let store = Database::new(database.url(), "test").unwrap();
    store.migrate().await.unwrap();
    store.check_schema_trust().await.unwrap();
    let others = "select format('%s of %s', oid::regprocedure, proowner::regrole) from pg_proc
        where pronamespace = 'public'::regnamespace and proowner <> 'token_broker_auditor'::regrole
        union all select format('%s of %s', oid::regclass, relowner::regrole) from pg_class
        where relnamespace = 'public'::regnamespace and relowner <> 'token_broker_auditor'::regrole";
    assert_eq!(texts(&database, others).await, [""; 0]);
    attempt(&database, RUNTIME, "select audit_ensure_partition('2026-01-04')").await.unwrap();
}

/// Objects of others that no statement of ours means are their own business. So are those of the schema's owner, who
/// could replace ours anyway.
#[tokio::test]
async fn unrelated_relations_and_the_schemas_owner_are_accepted() {
    let database = database_with_roles().await;
    database
        .sql(
            "create table unrelated (); alter table unrelated owner to token_broker_access;
             create sequence numbers; alter sequence numbers owner to token_broker_access;
             alter schema public owner to token_broker_auditor;
             create function public.lower(varchar) returns text language sql as 'select $1';
             alter function public.lower(varchar) owner to token_broker_auditor",
        )
        .await;
    let store = Database::new(database.url(), "test").unwrap();
    store.check_schema_trust().await.unwrap();
    store.migrate().await.unwrap();
    database.sql("alter function public.lower(varchar) owner to token_broker_access").await;
    let error = store.check_schema_trust().await.unwrap_err().to_string();
    assert!(error.contains("function public.lower(character varying) belongs to role"), "{error}");
}

/// Whoever may create schemas can create one with the name of a login, which the default search path names first. Its
/// tables are not taken for the broker's.
#[tokio::test]
async fn a_schema_with_the_name_of_a_login_does_not_take_the_place_of_the_brokers() {
    let database = database_with_roles().await;
    database
        .sql(
            "do $$ begin
                 execute format('create schema %I authorization token_broker_access', current_user);
                 execute format('create table %I.repeatable_migrations (name text)', current_user);
             end $$",
        )
        .await;
    let store = Database::new(database.url(), "test").unwrap();
    for error in [
        store.check_connection().await.unwrap_err(),
        store.check_schema_trust().await.unwrap_err(),
        store.migrate().await.unwrap_err(),
    ] {
        assert!(error.to_string().contains("several schemas of its search_path"), "{error}");
    }
    let mut named = url::Url::parse(database.url()).unwrap();
    named.query_pairs_mut().append_pair("options", "-c search_path=public");
    let store = Database::new(named.as_str(), "test").unwrap();
    store.check_schema_trust().await.unwrap();
}

/// No value that an admin writes is so large that it holds up the brokers that load it.
#[tokio::test]
async fn values_of_admins_are_limited() {
    let database = database_with_roles().await;
    let credential = |columns: &str, values: &str| {
        format!(
            "insert into caller_credentials (caller_id, kind, {columns})
             select id, 'spiffe', {values} from callers"
        )
    };
    let right = |rights: &str| format!("update grants set rights = '{rights}'");
    for (statement, allowed) in [
        ("update callers set description = repeat('x', 1000)".to_owned(), true),
        ("update callers set description = repeat('x', 1001)".to_owned(), false),
        (credential("identity, description", "'spiffe://a/b', repeat('x', 1000)"), true),
        (credential("identity, description", "'spiffe://a/b', repeat('x', 1001)"), false),
        (credential("identity", "rpad('spiffe://a/', 2048, 'x')"), true),
        (credential("identity", "rpad('spiffe://a/', 2049, 'x')"), false),
        (right("{get,report,list}"), true),
        (right("{get,get}"), false),
        (right("{get,report,list,get}"), false),
    ] {
        let done = attempt(&database, ACCESS, &statement).await;
        assert_eq!(done.is_ok(), allowed, "{statement}: {done:?}");
    }
    database
        .sql(
            "begin; set local token_broker.actor = 'a'; set local token_broker.reason = 'r';
             select set_config('token_broker.actor', repeat('a', 5000), true),
                 set_config('token_broker.reason', repeat('r', 5000), true);
             update accounts set description = repeat('d', 1000); commit",
        )
        .await;
    let longest =
        "select greatest(length(actor), length(reason), length(what ->> 'description'))::text
        from changes order by id desc limit 1";
    assert_eq!(texts(&database, longest).await, ["1000"]);
    assert_eq!(texts(&database, "select subject from unrecorded_changes").await, [""; 0]);
}

/// The broker's login can neither prevent that an account is registered, nor that a database is accepted.
#[tokio::test]
async fn the_runtime_role_blocks_neither_new_accounts_nor_acceptance() {
    let database = database_with_roles().await;
    sql_as(
        &database,
        RUNTIME,
        "insert into refreshes (account_id, possibly_revoked, consecutive_failures)
             select n, true, 9 from generate_series(2, 9) n;
         insert into upstream_calls (account_id, lease_id, until, priority)
             values (2, 1, 'infinity', 'x')",
    )
    .await;
    sql_as(
        &database,
        ACCOUNTS,
        "insert into accounts (name, client_id, client_secret) values ('new', 'new-id', 'x')",
    )
    .await;
    let fresh =
        "select concat_ws(' ', a.name, r.possibly_revoked, r.consecutive_failures, c.lease_id)
        from accounts a join refreshes r on r.account_id = a.id
        left join upstream_calls c using (account_id) where a.name = 'new'";
    assert_eq!(texts(&database, fresh).await, ["new f 0"]);

    for statement in [
        "update deployment set epoch = epoch + 2",
        "update deployment set epoch = 9223372036854775807",
        "update deployment set upstream = 'other'",
        "update deployment set system_identifier = 1; update deployment set system_identifier = 2",
        "update deployment set database_oid = 1; update deployment set database_oid = null",
    ] {
        let error = attempt(&database, RUNTIME, statement).await.expect_err(statement);
        let code = error.as_database_error().unwrap().code().unwrap().into_owned();
        assert_eq!(code, "42501", "{statement}: {error}");
    }
    let accepted = "update deployment set system_identifier = 1, database_oid = 1;
        update deployment set epoch = epoch + 1, upstream = 'other', system_identifier = 2";
    attempt(&database, RUNTIME, accepted).await.unwrap();
}

/// A value as the broker seals it: the format, the length of the key's id, the id, a nonce, one byte and a tag.
const SEALED: &str = "'\\x0109'::bytea || 's12345678'::bytea || repeat('x', 29)::bytea";

/// The state of the only account: its secret is sealed, and the secret before it is kept.
const ROTATED: &str =
    "update accounts set client_secret = null, sealed_secret = 'x', credential_version = 2,
    previous_secret = 'x', previous_version = 1;";

/// What an owner changes with the triggers off, a statement of the broker's login after that, and whether it may.
/// Each row differs in one point from one of another outcome, so each condition counts.
fn statements_of_the_runtime_role() -> Vec<(String, String, bool)> {
    let sealing = |sealed: &str| {
        format!("update accounts set client_secret = null, sealed_secret = {sealed}")
    };
    let refuse = "update accounts set client_secret = null".to_owned();
    let with_token = |version: i64| {
        format!(
            "{ROTATED} insert into tokens (account_id, credential_version, generation, sealed_token, issued_at,
                 expires_at, fingerprint) select id, {version}, 1, 'x', now(), now(), 'f' from accounts;"
        )
    };
    let drop_previous =
        || "update accounts set previous_secret = null, previous_version = null".to_owned();
    let set_previous = |values: &str| format!("update accounts set {values}");
    let audited = "do $$ begin update changes set audited_at = now();
        if exists (select from changes where audited_at is not null) then raise exception 'audited'; end if;
        end $$";
    [
        ("", sealing(SEALED), true),
        ("", format!("update accounts set sealed_secret = {SEALED}"), false),
        ("", sealing("''"), false),
        ("", sealing("'\\x01'"), false),
        ("", sealing(&SEALED.replace("x0109", "x0209")), false),
        ("", sealing(&SEALED.replace("29", "28")), false),
        ("update refreshes set error_class = 'intake', error_version = 1;", refuse.clone(), true),
        ("update refreshes set error_class = 'intake', error_version = 7;", refuse.clone(), false),
        ("update refreshes set error_class = 'unreachable', error_version = 1;", refuse, false),
        ("$rotated", drop_previous(), false),
        ("$rotated update refreshes set attempt_version = 1;", drop_previous(), true),
        ("$rotated update refreshes set refused_version = 1;", drop_previous(), true),
        ("$rotated update refreshes set attempt_version = 2, refused_version = 2;", drop_previous(), false),
        ("$token1", drop_previous(), false),
        ("$token2", drop_previous(), true),
        ("$token2", set_previous("previous_secret = 'mine'"), false),
        ("$token2", set_previous("previous_secret = 'mine', previous_version = null"), false),
        ("$token2", set_previous("previous_secret = null, previous_version = 7"), false),
        ("delete from deployment;", "insert into deployment (upstream) values ('staging')".into(), true),
        ("delete from deployment;", "insert into deployment (upstream, epoch) values ('staging', 0)".into(), false),
        (
            "delete from deployment;",
            "insert into deployment (upstream, epoch) values ('staging', 1000000000001)".into(),
            false,
        ),
        ("", "update deployment set created_at = created_at + interval '1 second'".into(), false),
        // The audit record at the time of the change is of another one.
        (
            "select audit_ensure_partition(current_date);
             insert into audit_events (instance, chain, seq, at, event, outcome, count, detail, prev_hash, hash)
                 select 'i', 'c', 100 + id, at, 'grant_changed', 'ok', 1, '{\"change_id\": \"0\"}', '', ''
                 from changes where at::date = current_date;",
            audited.into(),
            true,
        ),
    ]
    .into_iter()
    .map(|(setup, statement, may): (&str, String, bool)| {
        let setup = match setup {
            "$token1" => with_token(1),
            "$token2" => with_token(2),
            setup => setup.replace("$rotated", ROTATED),
        };
        (setup, statement, may)
    })
    .collect()
}

/// Part of the promise that the broker's login moves secrets and does nothing else with them: each condition of the
/// triggers that limit it is needed.
#[tokio::test]
async fn each_condition_that_limits_the_runtime_role_counts() {
    let database = database_with_roles().await;
    for (setup, statement, may) in statements_of_the_runtime_role() {
        let mut transaction = database.pool().begin().await.unwrap();
        for prepared in [
            "set local session_replication_role = replica".to_owned(),
            setup.clone(),
            "set local session_replication_role = origin".to_owned(),
            format!("set local role {RUNTIME}"),
        ] {
            sqlx::raw_sql(AssertSqlSafe(prepared)).execute(&mut *transaction).await.unwrap();
        }
        let done = sqlx::raw_sql(AssertSqlSafe(statement.clone())).execute(&mut *transaction).await;
        let code = done.err().map(|error| {
            let error = error.into_database_error().expect("the server refused it");
            error.code().unwrap().into_owned()
        });
        let expected = (!may).then_some("42501");
        assert_eq!(code.as_deref(), expected, "{setup}\n{statement}");
        transaction.rollback().await.unwrap();
    }
}

/// The owner of the tables publishes keys, by hand too. What is no key is refused, and each change leaves a trace.
#[tokio::test]
async fn a_published_key_has_the_form_of_one_and_each_change_of_it_is_recorded() {
    let database = TestDatabase::new().await;
    let insert = |id: &str, key: &str| {
        format!(
            "insert into intake_keys (key_id, public_key, is_primary) values ({id}, {key}, false)"
        )
    };
    let key = |bytes| format!("decode(repeat('07', {bytes}), 'hex')");
    for (id, bytes) in
        [("'Key'", 32), ("''", 32), ("repeat('k', 33)", 32), ("'key'", 31), ("'key'", 33)]
    {
        let error = database.try_sql(&insert(id, &key(bytes))).await.expect_err(id);
        let error = error.as_database_error().unwrap();
        assert_eq!(error.code().unwrap(), "23514", "{id} {bytes}: {error}");
    }
    database.sql(&insert("'key'", &key(32))).await;
    database.sql("update intake_keys set public_key = sha256('x')").await;
    database.sql("delete from intake_keys").await;
    let recorded = "select operation || ' ' || subject from changes where table_name = 'intake_keys' order by id";
    assert_eq!(texts(&database, recorded).await, ["insert key", "update key", "delete key"]);
    assert!(database.try_sql("truncate intake_keys").await.is_err());
}
