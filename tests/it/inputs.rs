//! Invalid rows are refused: each with one error, which names the column and contains no secret, and without
//! a change of any table. A sealed secret that does not open affects only its own account.

use sqlx::{AssertSqlSafe, PgPool, postgres::PgDatabaseError};
use token_broker::{
    crypto::IntakePublicKey,
    domain::{account::ClientId, odd_character::OddCharacter, secret::ClientSecret},
};

use crate::harness::{
    broker::{Fixture, code_and_reason},
    database::TestDatabase,
    eventually,
};

/// A secret that must appear in no error and no log. The tables below contain it as `$CANARY`.
const CANARY: &str = "SK.canary-73";

/// A table, a valid row for it, and the changes to the row, each a column and a value, that make it
/// invalid.
struct InvalidRows {
    table: &'static str,
    row: &'static [(&'static str, &'static str)],
    faults: &'static [(&'static str, &'static str)],
    /// Changes that are invalid only in a new row.
    new_row_faults: &'static [(&'static str, &'static str)],
}

const ACCOUNTS: InvalidRows = InvalidRows {
    table: "accounts",
    row: &[("name", "'bad'"), ("client_id", "'bad-id'"), ("client_secret", "'$CANARY'")],
    faults: &[
        ("name", "null"),
        ("name", "''"),
        ("name", "'Acme'"),
        ("name", "'a b'"),
        ("name", "'-a'"),
        ("name", "'é'"),
        ("name", r"E'acme\n'"),
        ("name", "repeat('a', 64)"),
        ("client_id", "null"),
        ("client_id", "''"),
        ("client_id", "repeat('가', 21)"),
        ("client_id", "'a b'"),
        ("client_id", r"E'id\n'"),
        ("client_id", r"E'a\u0085b'"),
        ("client_id", r"E'a\u00a0b'"),
        ("client_id", r"E'a\u3000b'"),
        ("client_secret", "''"),
        ("client_secret", "'$CANARY' || repeat('x', 18)"),
        ("client_secret", "'$CANARY x'"),
        ("client_secret", r"E'$CANARY\n\n'"),
        ("client_secret", r"E'$CANARY\u00a0'"),
        ("client_secret", "'sealed:$CANARY'"),
        ("client_secret", "'sealed:v2:key:' || repeat('x', 90)"),
        ("client_secret", "'sealed:v1:Key:' || repeat('x', 90)"),
        ("client_secret", "'sealed:v1:key:$CANARY' || repeat('x', 90)"),
        ("client_secret", "'sealed:v1:key:' || repeat('x', 600)"),
        ("enabled", "null"),
        ("provider", "null"),
        ("provider", "'other'"),
        ("description", "repeat('d', 1001)"),
        ("reissue_requested_at", "'infinity'"),
        ("created_at", "null"),
        ("created_at", "'-infinity'"),
    ],
    new_row_faults: &[("client_secret", "null"), ("updated_at", "null")],
};

const CALLERS: InvalidRows = InvalidRows {
    table: "callers",
    row: &[("name", "'bad'")],
    faults: &[
        ("name", "null"),
        ("name", "''"),
        ("name", "'Shop'"),
        ("name", r"E'shop\n'"),
        ("name", "repeat('a', 64)"),
        ("enabled", "null"),
        ("rate_limit", "0"),
        ("rate_limit", "-1"),
        ("rate_limit", "1000001"),
        ("created_at", "null"),
    ],
    new_row_faults: &[],
};

const BEARERS: InvalidRows = InvalidRows {
    table: "caller_credentials",
    row: &[
        ("caller_id", "(select id from callers)"),
        ("kind", "'bearer'"),
        ("bearer_sha256", "sha256('bad')"),
    ],
    faults: &[
        ("caller_id", "null"),
        ("kind", "null"),
        ("kind", "'basic'"),
        ("bearer_sha256", "null"),
        ("bearer_sha256", "'$CANARY'"),
        ("identity", "'shop.example.org'"),
        ("ends_at", "'infinity'"),
        ("ends_at", "'290000-01-01'"),
        ("revoked_at", "'-infinity'"),
        ("created_at", "null"),
    ],
    new_row_faults: &[],
};

const SPIFFE_IDS: InvalidRows = InvalidRows {
    table: "caller_credentials",
    row: &[("caller_id", "(select id from callers)"), ("kind", "'spiffe'")],
    faults: &[],
    new_row_faults: &[
        ("identity", "null"),
        ("identity", "'https://example.org/shop'"),
        ("identity", "'spiffe://example.org'"),
        ("identity", "'spiffe://Example.org/shop'"),
        ("bearer_sha256", "sha256('bad')"),
    ],
};

const DNS_NAMES: InvalidRows = InvalidRows {
    table: "caller_credentials",
    row: &[("caller_id", "(select id from callers)"), ("kind", "'dns'")],
    faults: &[],
    new_row_faults: &[
        ("identity", "null"),
        ("identity", "'Shop.example.org'"),
        ("identity", "'shop..example.org'"),
        ("identity", "repeat('a.', 127)"),
    ],
};

const GRANTS: InvalidRows = InvalidRows {
    table: "grants",
    row: &[("caller_id", "(select id from callers)"), ("pattern", "'bad'")],
    faults: &[
        ("caller_id", "null"),
        ("pattern", "null"),
        ("pattern", "''"),
        ("pattern", "'a**'"),
        ("pattern", "'*a*'"),
        ("pattern", "'Acme-*'"),
        ("pattern", "'-a'"),
        ("pattern", "repeat('a', 64)"),
        ("rights", "null"),
        ("rights", "'{}'"),
        ("rights", "'{get,fly}'"),
        ("rights", "'{get,null}'"),
        ("rights", "'{{get},{list}}'"),
        ("rights", "'[2:2]={get}'"),
        ("ends_at", "'infinity'"),
        ("created_at", "null"),
    ],
    new_row_faults: &[],
};

const TABLES: [InvalidRows; 6] = [ACCOUNTS, CALLERS, BEARERS, SPIFFE_IDS, DNS_NAMES, GRANTS];

/// Statements that conflict with existing rows, and what the error must name.
const CONFLICTS: [(&str, &str); 8] = [
    (
        "insert into accounts (name, client_id, client_secret) values ('acme', 'b', '$CANARY')",
        "accounts_name_key",
    ),
    (
        "insert into accounts (name, client_id, client_secret) values ('b', 'acme-id', '$CANARY')",
        "accounts_provider_client_id_key",
    ),
    (
        "insert into accounts (id, name, client_id, client_secret) values (9, 'b', 'b', '$CANARY')",
        "id",
    ),
    ("update accounts set id = 9, client_secret = '$CANARY'", "id"),
    ("insert into callers (name) values ('shop')", "callers_name_key"),
    (
        "insert into grants (caller_id, pattern) select caller_id, pattern from grants",
        "grants_caller_id_pattern_key",
    ),
    ("insert into grants (caller_id, pattern) values (9, '*')", "grants_caller_id_fkey"),
    (
        "insert into caller_credentials (caller_id, kind, bearer_sha256) values (9, 'bearer', sha256('x'))",
        "caller_credentials_caller_id_fkey",
    ),
];

/// The rows that exist before the statements run.
const EXISTING_ROWS: &str = "
    insert into accounts (name, client_id, client_secret) values ('acme', 'acme-id', 'SK.1');
    insert into callers (name) values ('shop');
    insert into caller_credentials (caller_id, kind, bearer_sha256)
        select id, 'bearer', sha256('good') from callers;
    insert into grants (caller_id, pattern) select id, 'acme' from callers;";

impl InvalidRows {
    /// Returns the statements, each with the beginning of the error that it must cause.
    fn statements(&self) -> Vec<(String, String)> {
        let inserts =
            self.faults.iter().chain(self.new_row_faults).map(|fault| (self.insert(fault), fault));
        let updates = self.faults.iter().map(|fault| (self.update(fault), fault));
        inserts
            .chain(updates)
            .map(|(statement, (column, _))| {
                (statement.replace("$CANARY", CANARY), format!("{}.{column} ", self.table))
            })
            .collect()
    }

    fn insert(&self, (column, value): &(&str, &str)) -> String {
        let others = self.row.iter().filter(|(other, _)| other != column);
        let (columns, values): (Vec<_>, Vec<_>) =
            others.copied().chain([(*column, *value)]).unzip();
        format!(
            "insert into {} ({}) values ({})",
            self.table,
            columns.join(", "),
            values.join(", ")
        )
    }

    fn update(&self, (column, value): &(&str, &str)) -> String {
        let secret = match (self.table, *column) {
            ("accounts", "client_secret") => "",
            ("accounts", _) => ", client_secret = '$CANARY'",
            _ => "",
        };
        format!("update {} set {column} = {value}{secret}", self.table)
    }
}

/// Runs every invalid statement, checks that it is refused and changes nothing, and returns the messages of
/// the errors.
async fn assert_all_refused(pool: &PgPool) -> Vec<String> {
    run(pool, EXISTING_ROWS).await.unwrap();
    let before = all_rows(pool).await;
    let changes_of_ids = [
        ("update accounts set id = default, client_secret = '$CANARY'", "accounts.id "),
        ("update accounts set client_id = 'other'", "accounts.client_id "),
        ("update accounts set login_version = 2", "accounts.login_version "),
        ("update callers set id = default", "callers.id "),
        ("update caller_credentials set id = default", "caller_credentials.id "),
        ("update caller_credentials set caller_id = 9", "caller_credentials.caller_id "),
        ("update grants set caller_id = 9", "grants.caller_id "),
    ];
    let invalid = TABLES.iter().flat_map(InvalidRows::statements).chain(changes_of_ids.map(
        |(statement, beginning)| (statement.replace("$CANARY", CANARY), beginning.to_owned()),
    ));
    let mut messages = vec![];
    for (statement, beginning) in invalid {
        let error = refused(pool, &statement).await;
        assert_eq!(error.code(), "23514", "{statement}: {}", error.message());
        assert!(error.message().starts_with(&beginning), "{statement}: {}", error.message());
        messages.push(error.message().to_owned());
    }
    for (statement, named) in CONFLICTS {
        let error = refused(pool, &statement.replace("$CANARY", CANARY)).await;
        assert!(error.message().contains(named), "{statement}: {}", error.message());
        messages.push(error.message().to_owned());
    }
    assert_eq!(all_rows(pool).await, before);
    messages
}

/// Runs a statement that must fail, and returns its error, which must not contain the secret.
async fn refused(pool: &PgPool, statement: &str) -> Box<PgDatabaseError> {
    let Err(error) = run(pool, statement).await else { panic!("accepted: {statement}") };
    let error = error.into_database_error().unwrap().downcast::<PgDatabaseError>();
    for text in [Some(error.message()), error.detail(), error.hint(), error.r#where()] {
        assert!(!text.unwrap_or_default().contains(CANARY), "{statement}: {text:?}");
    }
    error
}

async fn run(pool: &PgPool, statements: &str) -> sqlx::Result<()> {
    sqlx::raw_sql(AssertSqlSafe(statements.to_owned())).execute(pool).await.map(drop)
}

/// Returns all rows that an admin's statements can change, as one text.
async fn all_rows(pool: &PgPool) -> String {
    sqlx::query_scalar(
        "select concat_ws(E'\n',
             (select string_agg(it::text, ',' order by it.id) from accounts it),
             (select string_agg(it::text, ',' order by it.id) from callers it),
             (select string_agg(it::text, ',' order by it.id) from caller_credentials it),
             (select string_agg(it::text, ',' order by it.id) from grants it),
             (select string_agg(it::text, ',' order by it.id) from changes it),
             (select string_agg(it::text, ',' order by it.account_id) from refreshes it))",
    )
    .fetch_one(pool)
    .await
    .unwrap()
}

#[tokio::test]
async fn an_invalid_row_is_refused_with_one_error_that_names_its_column_and_leaves_no_trace() {
    let database = TestDatabase::new().await;
    assert_all_refused(database.pool()).await;
}

#[cfg(feature = "embedded-postgres")]
#[tokio::test]
async fn the_server_log_contains_no_secret_of_a_refused_row() {
    let postgres = crate::harness::database::start_embedded_postgres().await;
    // With this option, the server logs everything about an error except the statement.
    let url = postgres.url(token_broker::dev::postgres::DATABASE);
    let database = token_broker::store::Database::new(
        &format!("{url}&options=-c%20log_error_verbosity%3Dverbose"),
        "test",
    )
    .unwrap();
    database.migrate().await.unwrap();
    let pool = database.pool(1);

    let messages = assert_all_refused(&pool).await;
    pool.close().await;

    let log = std::fs::read_to_string(postgres.directory().join("log")).unwrap();
    for message in &messages {
        assert!(log.contains(message), "not logged: {message}");
    }
    assert!(log.contains("LOCATION:"), "the log is verbose");
    assert!(!log.contains(CANARY), "{log}");
    postgres.stop().await;
}

#[tokio::test]
async fn one_trailing_newline_of_a_secret_is_removed() {
    let database = TestDatabase::new().await;
    for (n, secret) in ["SK.1", r"SK.1\n", r"SK.1\r\n"].into_iter().enumerate() {
        database
            .sql(&format!(
                "insert into accounts (name, client_id, client_secret) values ('a{n}', 'id-{n}', E'{secret}')"
            ))
            .await;
    }
    let stored: Vec<String> = sqlx::query_scalar("select distinct client_secret from accounts")
        .fetch_all(database.pool())
        .await
        .unwrap();
    assert_eq!(stored, ["SK.1"]);
}

/// A row that the database accepted and the broker could not read would stop the sealing of all accounts.
#[tokio::test]
async fn the_database_accepts_exactly_the_client_ids_that_the_broker_can_read() {
    let database = TestDatabase::new().await;
    let ids: Vec<_> = ('\u{1}'..='\u{ffff}').map(|c| format!("a{c}b")).collect();
    let accepted: Vec<String> = sqlx::query_scalar(
        "select id from unnest($1::text[]) with ordinality as given (id, n)
         where token_broker_is_printable(id, 3) order by n",
    )
    .bind(&ids)
    .fetch_all(database.pool())
    .await
    .unwrap();
    let readable: Vec<_> = ids.into_iter().filter(|id| ClientId::stored(id).is_ok()).collect();
    assert!(accepted == readable, "{} accepted, {} readable", accepted.len(), readable.len());
}

/// The database and the program name the same characters that people do not see, by the same words.
#[tokio::test]
async fn the_database_and_the_program_know_the_same_odd_characters() {
    let database = TestDatabase::new().await;
    let ranges = [
        1..=0xffff,
        0x1_6fe0..=0x1_6ff0,
        0x1_bc90..=0x1_bcb0,
        0x1_d150..=0x1_d810,
        0x1_f120..=0x2_0010,
        0xd_fff0..=0xf_0010,
    ];
    let characters = ranges.into_iter().flatten().chain([0x10_ffff]).filter_map(char::from_u32);
    let values: Vec<_> = characters.map(|c| format!("가{c}b")).collect();
    // All of them at once might take longer than a statement may.
    for (values, in_words) in values.chunks(5_000).flat_map(|part| [(part, true), (part, false)]) {
        let named: Vec<String> = sqlx::query_scalar(
            "select coalesce(token_broker_odd_character(value, $2), '')
             from unnest($1::text[]) with ordinality as given (value, n) order by n",
        )
        .bind(values)
        .bind(in_words)
        .fetch_all(database.pool())
        .await
        .unwrap();
        for (value, named) in values.iter().zip(named) {
            let odd =
                if in_words { OddCharacter::in_word(value) } else { OddCharacter::in_text(value) };
            assert_eq!(named, odd.map(|odd| odd.to_string()).unwrap_or_default(), "{value:?}");
        }
    }
}

/// What programs and people paste with a value: the character, and how the error names it.
const PASTED: [(&str, &str); 20] = [
    ("\u{200b}", "a zero width space (U+200B)"),
    ("\u{feff}", "a byte order mark (U+FEFF)"),
    ("\u{a0}", "a no-break space (U+00A0)"),
    ("\u{ad}", "a soft hyphen (U+00AD)"),
    ("\u{3000}", "an ideographic space (U+3000)"),
    ("\u{200d}", "a zero width joiner or non-joiner"),
    ("\u{202e}", "a mark of the writing direction"),
    ("\u{2066}", "a mark of the writing direction"),
    ("\u{2028}", "a line or paragraph separator"),
    ("\u{2060}", "an invisible character"),
    ("\u{e0041}", "an invisible character"),
    ("\u{fe0f}", "a variation selector"),
    ("\u{85}", "a control character"),
    ("\u{1}", "a control character"),
    ("…", "typographic punctuation"),
    ("Ａ", "a full-width or half-width form"),
    ("К", "neither ASCII nor a Hangul syllable"),
    ("é", "neither ASCII nor a Hangul syllable"),
    ("\u{1ffff}", "a character that does not exist"),
    ("\u{1112}", "a part of a Hangul syllable: compose it (Unicode's form NFC)"),
];

/// Statements that write a value `%`, and the column that the error must name. The value is plain before the pasted
/// character, and its first characters are secret.
const PASTED_INTO: [(&str, &str, bool); 12] = [
    (
        "insert into accounts (name, client_id, client_secret) values ('b', 'b', '%')",
        "accounts.client_secret",
        true,
    ),
    ("update accounts set client_secret = '%'", "accounts.client_secret", true),
    (
        "insert into accounts (name, client_id, client_secret) values ('acme', 'acme-id', '%')
         on conflict (name) do update set client_secret = excluded.client_secret",
        "accounts.client_secret",
        true,
    ),
    (
        "insert into accounts (name, client_id, client_secret) values ('b', '%', 'SK.1')",
        "accounts.client_id",
        true,
    ),
    ("update accounts set client_id = '%', client_secret = 'SK.1'", "accounts.client_id", true),
    (
        "insert into accounts (name, client_id, client_secret) values ('%', 'b', 'SK.1')",
        "accounts.name",
        true,
    ),
    ("insert into callers (name) values ('%')", "callers.name", true),
    ("insert into grants (caller_id, pattern) select id, '%' from callers", "grants.pattern", true),
    (
        "insert into caller_credentials (caller_id, kind, identity) select id, 'dns', '%' from callers",
        "caller_credentials.identity",
        true,
    ),
    ("update accounts set description = '%'", "accounts.description", false),
    ("insert into callers (name, description) values ('b', '%')", "callers.description", false),
    ("update caller_credentials set description = '%'", "caller_credentials.description", false),
];

/// A character that nobody sees is refused where it is written, by its position and kind. The error never has the
/// value. Text for people may have white space, emoji and any script.
#[tokio::test]
async fn a_pasted_character_is_refused_by_its_position_and_kind() {
    const VALUE: &str = "canary73";
    let database = TestDatabase::new().await;
    run(database.pool(), EXISTING_ROWS).await.unwrap();
    let before = all_rows(database.pool()).await;
    for (character, kind) in PASTED {
        for (statement, column, is_word) in PASTED_INTO {
            for (value, position) in [
                (format!("{VALUE}{character}"), 9),
                (format!("{character}{VALUE}"), 1),
                (format!("{VALUE}{character}{VALUE}"), 9),
            ] {
                let statement = statement.replace('%', &value);
                if !is_word && OddCharacter::in_text(&value).is_none() {
                    let mut transaction = database.pool().begin().await.unwrap();
                    sqlx::raw_sql(AssertSqlSafe(statement))
                        .execute(&mut *transaction)
                        .await
                        .unwrap();
                    transaction.rollback().await.unwrap();
                    continue;
                }
                let message = refused(database.pool(), &statement).await.message().to_owned();
                assert!(message.starts_with(column), "{statement}: {message}");
                let says = format!("character {position} is {kind}");
                assert!(message.ends_with(&says), "{statement}: {message}");
                assert!(!message.contains(VALUE), "{message}");
            }
        }
    }
    assert_eq!(all_rows(database.pool()).await, before);
}

/// Rows that an earlier release took can still be changed.
#[tokio::test]
async fn an_account_with_an_invisible_character_in_its_login_can_be_changed() {
    let database = TestDatabase::new().await;
    run(database.pool(), EXISTING_ROWS).await.unwrap();
    database
        .sql_past_triggers(
            "update accounts set client_id = E'id\\u200b', description = E'd\\u200b'",
        )
        .await;
    for statement in [
        "update accounts set enabled = false",
        "update accounts set client_secret = 'SK.2'",
        "update accounts set client_id = 'id', client_secret = 'SK.3', description = 'd'",
    ] {
        database.sql(statement).await;
    }
}

#[tokio::test]
async fn audit_events_and_checkpoints_are_append_only_even_for_their_owner() {
    let database = TestDatabase::new().await;
    database
        .sql(
            "select audit_ensure_partition('2026-01-01');
             insert into audit_events
                 (instance, chain, seq, at, event, outcome, count, detail, prev_hash, hash)
                 values ('i', 'c', 1, '2026-01-01 12:00Z', 'started', 'ok', 1, '{}', '', '');
             insert into audit_heads values ('c', 1, '', now(), 'k', '')",
        )
        .await;
    for table in ["audit_events", "audit_events_20260101", "audit_heads"] {
        for statement in [
            format!("update {table} set seq = 2"),
            format!("delete from {table}"),
            format!("truncate {table}"),
        ] {
            let error = refused(database.pool(), &statement).await;
            assert_eq!(error.code(), "42501", "{statement}: {}", error.message());
            assert!(error.message().starts_with(table), "{statement}: {}", error.message());
        }
    }
}

#[tokio::test]
async fn no_table_can_be_truncated() {
    let database = TestDatabase::new().await;
    database.sql(EXISTING_ROWS).await;
    database.sql("select audit_ensure_partition('2026-01-01')").await;
    let tables: Vec<String> = sqlx::query_scalar(
        "select relname::text from pg_class where relnamespace = 'public'::regnamespace
            and relkind in ('r', 'p') and relname <> '_sqlx_migrations' order by 1",
    )
    .fetch_all(database.pool())
    .await
    .unwrap();
    for table in ["accounts", "changes", "audit_events_20260101", "repeatable_migrations"] {
        assert!(tables.iter().any(|found| found == table), "{tables:?}");
    }
    for table in tables {
        let error = refused(database.pool(), &format!("truncate {table} cascade")).await;
        assert_eq!(error.code(), "42501", "{table}: {}", error.message());
        let message = error.message();
        let says = message.contains("cannot be truncated") || message.contains("append-only");
        assert!(says, "{table}: {message}");
    }
}

#[tokio::test]
async fn a_sealed_secret_that_does_not_open_affects_only_its_account_until_it_is_replaced() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    fixture.add_account("fine", "id-9", "SK.9").await;

    let intake = fixture.keyring.intake_public();
    let seal = |key: &IntakePublicKey, client_id: &str, secret: &str| {
        key.seal(&client_id.parse().unwrap(), &ClientSecret::new(secret).unwrap()).unwrap()
    };
    let elsewhere = IntakePublicKey::new("elsewhere", intake.bytes()).unwrap();
    let mut altered = seal(&intake, "id-3", "SK.3");
    let position = altered.len() - 10;
    let other = if &altered[position..=position] == "A" { "B" } else { "A" };
    altered.replace_range(position..=position, other);
    let sealed_secrets = [
        ("unknown-key", "id-1", seal(&elsewhere, "id-1", "SK.1"), "elsewhere"),
        ("other-login", "id-2", seal(&intake, "id-1", "SK.2"), "another client id"),
        ("altered", "id-3", altered, "altered"),
    ];
    for (name, client_id, sealed, why) in &sealed_secrets {
        fixture.add_account(name, client_id, sealed).await;
        fixture.wait_for_state(name, "rejected").await;
        let error = fixture.account_status(name, "last_error").await;
        assert!(error.contains(why) && !error.contains(&sealed[20..]), "{name}: {error}");
        assert!(fixture.account_status(name, "hint").await.contains("seal it again"));
        eventually("the reason", async || {
            let refused = client.get(name).await.unwrap_err();
            (code_and_reason(&refused) == "FailedPrecondition CREDENTIAL_REJECTED").then_some(())
        })
        .await;
        assert_eq!(fixture.upstream.attempts(client_id), 0);
    }
    fixture.wait_for_state("fine", "fresh").await;
    client.get("fine").await.unwrap();
    let unsealed: i64 =
        sqlx::query_scalar("select count(*) from accounts where client_secret is not null")
            .fetch_one(fixture.database.pool())
            .await
            .unwrap();
    assert_eq!(unsealed, 0, "the intake column is emptied");

    for (n, (name, client_id, ..)) in sealed_secrets.iter().enumerate() {
        let plain = format!("SK.{}", n + 1);
        let good = if n == 0 { plain } else { seal(&intake, client_id, &plain) };
        fixture
            .database
            .sql(&format!("update accounts set client_secret = '{good}' where name = '{name}'"))
            .await;
        fixture.wait_for_state(name, "fresh").await;
        client.get(name).await.unwrap();
        assert_eq!(fixture.upstream.attempts(client_id), 1);
    }
    assert_eq!(fixture.upstream.issued("id-9"), 1);
    broker.stop().await;
}

#[tokio::test]
async fn after_a_rotation_to_a_secret_that_does_not_open_the_previous_one_is_used() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let first = eventually("a token", async || client.get("acme").await.ok()).await;

    let forged =
        format!("sealed:v1:{}:{}", fixture.keyring.intake_public().key_id(), "A".repeat(90));
    fixture.database.sql(&format!("update accounts set client_secret = '{forged}'")).await;
    fixture.wait_for_state("acme", "rejected").await;
    assert_eq!(client.get("acme").await.unwrap().generation, first.generation);

    fixture.database.sql("update accounts set reissue_requested_at = now()").await;
    let second = eventually("a token issued with the previous secret", async || {
        client.get("acme").await.ok().filter(|token| token.generation > first.generation)
    })
    .await;
    assert!(fixture.upstream.is_live(&second.access_token));
    assert_eq!(fixture.account_status("acme", "state").await, "rejected");
    broker.stop().await;
}

/// Part of the promise that a row affects only itself: a stored secret that names a key which nobody has, one that
/// was altered, and one that is no sealed value at all prevent no start, and the other accounts are served.
#[tokio::test]
async fn stored_secrets_that_do_not_open_prevent_no_start() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    for n in 1..=6 {
        fixture.add_account(&format!("acme-{n}"), &format!("id-{n}"), &format!("SK.{n}")).await;
    }
    let broker = fixture.start().await;
    for n in 1..=6 {
        fixture.wait_for_state(&format!("acme-{n}"), "fresh").await;
    }
    broker.stop().await;
    // Those of the newest accounts are tried at the start.
    let unknown = "'\\x01'::bytea || '\\x07'::bytea || 'missing'::bytea || repeat('x', 60)::bytea";
    for (account, sealed) in [
        ("acme-4", unknown),
        ("acme-5", "set_byte(sealed_secret, 40, get_byte(sealed_secret, 40) # 1)"),
        ("acme-6", "'no sealed value'"),
    ] {
        fixture
            .database
            .sql(&format!(
                "begin; set local session_replication_role = replica;
                 update accounts set sealed_secret = {sealed} where name = '{account}';
                 delete from tokens t using accounts a where a.id = t.account_id and a.name = '{account}';
                 commit"
            ))
            .await;
    }
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    for account in ["acme-1", "acme-2", "acme-3"] {
        client.get(account).await.unwrap();
    }
    for account in ["acme-4", "acme-5", "acme-6"] {
        fixture.wait_for_state(account, "rejected").await;
    }
    broker.stop().await;
}
