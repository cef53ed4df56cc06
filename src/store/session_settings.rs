//! The settings of a session with the server.
//!
//! Admins can give a server, a database or a login other defaults (`alter role … set …`), under which
//! statements would behave differently than they were written for. So each new session sets what the
//! statements rely on, and reads it back. It does so by statements: `PgBouncer` refuses or drops settings that
//! are sent as startup parameters.

use sqlx::{AssertSqlSafe, PgConnection};

use super::error::unusable;

/// The settings, by their name and in the form in which the server shows them: times are in milliseconds.
/// The server may lack some of them, since they came with later versions.
const SETTINGS: &[(&str, &str)] = &[
    // Under other levels, transactions fail that should wait for each other.
    ("default_transaction_isolation", "read committed"),
    ("default_transaction_read_only", "off"),
    ("default_transaction_deferrable", "off"),
    // Statements that wait for a lock or take long must not occupy their connection for ever. Those that may
    // take longer set their own limit.
    ("statement_timeout", "30000"),
    // Less than a step of the services waits for the database, so that the reason is known.
    ("lock_timeout", "5000"),
    // If this process is paused within a transaction, others must not wait for its locks for ever.
    ("idle_in_transaction_session_timeout", "60000"),
    ("idle_session_timeout", "0"),
    ("transaction_timeout", "0"),
    ("exit_on_error", "off"),
    // A policy that hides rows then is an error, instead of hiding for example a revocation.
    ("row_security", "off"),
    ("restrict_nonsystem_relation_kind", ""),
    ("client_encoding", "UTF8"),
    ("TimeZone", "UTC"),
    ("DateStyle", "ISO, MDY"),
    ("IntervalStyle", "postgres"),
    ("bytea_output", "hex"),
    ("extra_float_digits", "1"),
    ("standard_conforming_strings", "on"),
    ("array_nulls", "on"),
    ("transform_null_equals", "off"),
    ("check_function_bodies", "on"),
    ("quote_all_identifiers", "off"),
    ("client_min_messages", "notice"),
];

/// The least durability of a commit: with `off`, a crash of the server could forget audit records that were
/// reported as stored, and tokens that were already served.
const SYNCHRONOUS_COMMIT: &str = "on";
/// What an admin may have chosen instead, since it waits for more.
const STRICTER_COMMIT: &str = "remote_apply";

/// The setting with which a superuser could make every session skip the triggers.
const TRIGGERS: (&str, &str) = ("session_replication_role", "origin");

/// How often the first statement is tried. The login's own `statement_timeout` still applies to it.
const FIRST_STATEMENT_ATTEMPTS: usize = 20;
/// The `SQLSTATE` of a statement that the server cancelled, by its timeout for example.
const CANCELLED: &str = "57014";

/// Sets and checks the settings of a new session.
///
/// # Errors
/// When a statement fails, or a setting does not hold.
pub(super) async fn establish(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    set_statement_timeout(connection).await?;
    let initial = initial(connection).await?;
    // Until here, `search_path` may name schemas in which others can create functions.
    set_search_path(connection, "pg_catalog, pg_temp").await?;
    let schema = schema_in_use(connection, &initial.schemas).await?;
    let mut settings = SETTINGS.to_vec();
    if initial.synchronous_commit != STRICTER_COMMIT {
        settings.push(("synchronous_commit", SYNCHRONOUS_COMMIT));
    }
    // The server searches `pg_catalog` first, which is not listed, and temporary tables last.
    let search_path = format!("{schema}, pg_temp");
    settings.push(("search_path", &search_path));
    apply(connection, &settings).await?;
    settings.push(TRIGGERS);
    check(connection, &settings).await
}

/// Lets statements take as long as [`SETTINGS`] says. A shorter time may cancel even this statement, but not
/// always.
pub(super) async fn set_statement_timeout(
    connection: &mut PgConnection,
) -> Result<(), sqlx::Error> {
    let set =
        "/* store::session_settings */ set statement_timeout = 30000; set lock_timeout = 5000;
               set quote_all_identifiers = off";
    for _ in 1..FIRST_STATEMENT_ATTEMPTS {
        match sqlx::raw_sql(set).execute(&mut *connection).await {
            Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some(CANCELLED) => {}
            done => return done.map(drop),
        }
    }
    sqlx::raw_sql(set).execute(connection).await.map(drop)
}

/// What an admin's settings determine of a new session.
struct Initial {
    /// The existing schemas of `search_path`.
    schemas: Vec<String>,
    synchronous_commit: String,
}

async fn initial(connection: &mut PgConnection) -> Result<Initial, sqlx::Error> {
    sqlx::query_as!(
        Initial,
        r#"-- store::session_settings::initial
        select pg_catalog.current_schemas(false)::pg_catalog.text[] as "schemas!",
            pg_catalog.current_setting('synchronous_commit') as "synchronous_commit!""#
    )
    .fetch_one(connection)
    .await
}

/// Sets `search_path` to `path`, a list of quoted names.
async fn set_search_path(connection: &mut PgConnection, path: &str) -> Result<(), sqlx::Error> {
    let set = format!("/* store::session_settings */ set search_path = {path}");
    sqlx::raw_sql(AssertSqlSafe(set)).execute(connection).await.map(drop)
}

/// Returns the quoted name of the schema that has the broker's tables, or in which `migrate` creates them:
/// of the schemas of `search_path`, the one that has them, or else the first. If none of `search_path`
/// exists, the only one that has them, or else `public`.
///
/// # Errors
/// When several schemas of `search_path` have such tables: whoever may create schemas can create one with the name
/// of a login, which the default `search_path` names first.
async fn schema_in_use(
    connection: &mut PgConnection,
    search_path: &[String],
) -> Result<String, sqlx::Error> {
    let found = sqlx::query!(
        r#"-- store::session_settings::schema_in_use
        with named as (
            select name, place from unnest($1::text[]) with ordinality as listed (name, place)
            where name not in ('pg_catalog', 'information_schema')
        ), having_tables as (
            select n.nspname::text as name from pg_class c join pg_namespace n on n.oid = c.relnamespace
            where c.relname = 'repeatable_migrations' and c.relkind in ('r', 'p')
        ), candidates as (
            select name, place from named join having_tables using (name)
        )
        select quote_ident(coalesce(
            (select min(name) from candidates),
            (select name from named order by place limit 1),
            (select min(name) from having_tables having count(*) = 1),
            'public')) as "schema!",
            (select count(*) from candidates) as "candidates!",
            (select string_agg(name, ', ' order by place) from candidates) as names"#,
        search_path,
    )
    .fetch_one(connection)
    .await?;
    if found.candidates > 1 {
        return Err(unusable(format!(
            "several schemas of its search_path have the broker's tables ({}): find out who created them, and \
             set search_path to one of them for the login or in the URL",
            found.names.unwrap_or_default()
        )));
    }
    Ok(found.schema)
}

/// Sets those of `settings` that the server has.
async fn apply(
    connection: &mut PgConnection,
    settings: &[(&str, &str)],
) -> Result<(), sqlx::Error> {
    let (names, values) = names_and_values(settings);
    sqlx::query!(
        "-- store::session_settings::apply
        select set_config(wanted.name, wanted.value, false)
        from unnest($1::text[], $2::text[]) as wanted (name, value)
        join pg_settings using (name)",
        &names,
        &values,
    )
    .fetch_all(&mut *connection)
    .await?;
    // The server's end of an idle connection notices a client that is gone, and firewalls keep the
    // connection. Read back, these are 0 if the connection is a local one.
    let keepalive = "/* store::session_settings */ set tcp_keepalives_idle = 60;
                     set tcp_keepalives_interval = 10; set tcp_keepalives_count = 6";
    sqlx::raw_sql(keepalive).execute(connection).await.map(drop)
}

/// Checks by a statement of its own that `settings` hold.
async fn check(
    connection: &mut PgConnection,
    settings: &[(&str, &str)],
) -> Result<(), sqlx::Error> {
    let (names, values) = names_and_values(settings);
    let different = sqlx::query!(
        r#"-- store::session_settings::check
        select wanted.name as "name!", wanted.value as "wanted!", setting as "actual!"
        from unnest($1::text[], $2::text[]) as wanted (name, value)
        join pg_settings using (name)
        where setting <> wanted.value"#,
        &names,
        &values,
    )
    .fetch_optional(connection)
    .await?;
    match different {
        None => Ok(()),
        Some(it) if it.name == TRIGGERS.0 => Err(unusable(format!(
            "{} is {} for this login, so that triggers do not fire: reset it for the login and the \
             database",
            it.name, it.actual
        ))),
        Some(it) => Err(unusable(format!(
            "{} was set to `{}` but is `{}`: a connection pooler must keep sessions, as PgBouncer \
             does with pool_mode = session",
            it.name, it.wanted, it.actual
        ))),
    }
}

fn names_and_values(settings: &[(&str, &str)]) -> (Vec<String>, Vec<String>) {
    settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).unzip()
}
