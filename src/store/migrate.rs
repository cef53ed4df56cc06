//! Migrations, which bring a database to the schema of a release, and a check that they were applied.
//!
//! Tables and indexes are in the numbered files of `migrations/`, each of which is applied once and never
//! edited afterwards. Functions, triggers and views are in `migrations/repeatable/`: those files can be
//! applied any number of times, and are applied again when they changed. The first line of each states its
//! version, so that an older release leaves a newer release's functions as they are.

use std::collections::HashMap;

use sqlx::{
    AssertSqlSafe, Connection, PgConnection,
    migrate::{Migrate, MigrateError, Migration, Migrator},
};

use super::{
    connection::Database,
    error::{StoreError, UNDEFINED_TABLE},
    mass_changes, schema_trust, within,
};

/// What the first line of a repeatable migration begins with; the version follows.
const VERSION_PREFIX: &str = "-- version: ";

/// What stands in repeatable migrations for the schema that is migrated. Their functions look no names up in a
/// schema that others may write, so they name their objects with it.
const SCHEMA_PLACEHOLDER: &str = "@schema@";

/// The encoding that the database must have.
const ENCODING: &str = "UTF8";

/// The schema that a release needs.
pub struct Schema {
    numbered: Migrator,
    /// The repeatable migrations, in the order in which they are applied.
    repeatable: Vec<Repeatable>,
}

/// A file that is applied whenever it changed.
struct Repeatable {
    version: i32,
    /// The file. Its `description`, which is its name without number and ending, identifies it in the
    /// database.
    migration: Migration,
}

/// The version of a repeatable migration that was applied to the database.
struct Applied {
    version: i32,
    checksum: Vec<u8>,
}

impl Database {
    /// Applies the migrations that are missing or have changed: see [`Schema::apply`].
    ///
    /// # Errors
    /// When the server cannot be reached, the database has another encoding than UTF8, or a migration fails.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        self.check_connection().await?;
        self.check_encoding().await?;
        Schema::of_this_release()?.apply(self).await
    }

    /// Checks that the database can be used (see [`Self::check_connection`]), and that it has the encoding UTF8 and
    /// every migration of this release.
    ///
    /// # Errors
    /// [`StoreError::Schema`] names what is missing and the command that applies it.
    pub async fn check_schema(&self) -> Result<(), StoreError> {
        // Each step has a limit of its own. A limit of them all could never be kept over a slow link.
        self.check_connection().await?;
        within(self.check_encoding()).await?;
        within(Schema::of_this_release()?.check(self)).await
    }

    /// Checks that the database keeps text in UTF8. In other encodings a value of an admin can stop everything: what
    /// is stored cannot be read as UTF8, or what is to be stored has no such character.
    async fn check_encoding(&self) -> Result<(), StoreError> {
        let mut connection = self.open().await?;
        let encoding = sqlx::query_scalar!(
            r#"-- store::migrate::check_encoding
            select current_setting('server_encoding') as "encoding!""#,
        )
        .fetch_one(&mut connection)
        .await?;
        connection.close().await?;
        if encoding == ENCODING {
            return Ok(());
        }
        Err(StoreError::Schema(format!(
            "the encoding of the database is {encoding}, and only {ENCODING} can be used: create another database \
             with `create database … encoding '{ENCODING}' locale 'C' template template0`"
        )))
    }
}

impl Schema {
    /// Returns the schema that this release was built with.
    ///
    /// # Errors
    /// When a repeatable migration does not state its version.
    pub fn of_this_release() -> Result<Self, StoreError> {
        // sqlx ignores subdirectories, so the first does not contain the second.
        Self::new(sqlx::migrate!("./migrations"), &sqlx::migrate!("./migrations/repeatable"))
    }

    /// Combines numbered and repeatable migrations.
    ///
    /// # Errors
    /// When a repeatable migration does not state its version.
    pub fn new(mut numbered: Migrator, repeatable: &Migrator) -> Result<Self, StoreError> {
        // The schema may be that of a newer release, which this one can use. Locking is off because `apply`
        // takes the lock.
        numbered.set_ignore_missing(true).set_locking(false);
        let repeatable =
            repeatable.iter().cloned().map(Repeatable::new).collect::<Result<_, _>>()?;
        Ok(Self { numbered, repeatable })
    }

    /// Applies the numbered migrations that the database lacks, and then the repeatable ones that it lacks or
    /// has an older version of, all in one transaction. Concurrent calls wait for each other. A call that is
    /// dropped before it returns leaves the database either as it was or fully migrated.
    ///
    /// # Errors
    /// When the server cannot be reached or a migration fails. The database then is as it was before.
    pub async fn apply(&self, database: &Database) -> Result<(), StoreError> {
        let mut connection = database.open().await?;
        let no_limit =
            "/* store::migrate::apply */ set statement_timeout = 0; set lock_timeout = '30s'";
        sqlx::raw_sql(no_limit).execute(&mut connection).await?;
        // This is sqlx's own lock, so other programs that migrate with sqlx wait for it too. It belongs to
        // the session, and ends with the connection.
        connection.lock().await.map_err(migrate_error)?;
        let applied = self.apply_locked(&mut connection).await;
        // After a failure, the server rolls back when the connection is closed.
        let closed = connection.close().await;
        applied?;
        Ok(closed?)
    }

    async fn apply_locked(&self, connection: &mut PgConnection) -> Result<(), StoreError> {
        let mut transaction = connection.begin().await?;
        schema_trust::close_schema(&mut transaction).await?;
        // Before anything is applied: sqlx writes to a table that somebody may have made before us.
        refuse_unsafe_schema(&mut transaction).await?;
        become_owner(&mut transaction).await?;
        mass_changes::allow(&mut transaction, None).await?;
        self.numbered.run(&mut *transaction).await.map_err(migrate_error)?;
        let applied = applied(&mut transaction).await?;
        let schema = SessionSchema::of(&mut transaction).await?;
        for ours in &self.repeatable {
            if !ours.is_newer_than(applied.get(ours.name()))? {
                continue;
            }
            sqlx::raw_sql(AssertSqlSafe(schema.fill_in(ours.migration.sql.as_str())))
                .execute(&mut *transaction)
                .await
                .map_err(|error| ours.failed(error))?;
            schema.restore_search_path(&mut transaction).await?;
            sqlx::query!(
                "-- store::migrate::apply
                insert into repeatable_migrations (name, version, checksum) values ($1, $2, $3)
                on conflict (name) do update set version = excluded.version,
                    checksum = excluded.checksum, applied_at = excluded.applied_at",
                ours.name(),
                ours.version,
                &*ours.migration.checksum,
            )
            .execute(&mut *transaction)
            .await?;
        }
        // Until the commit, others can create objects if they could before.
        refuse_unsafe_schema(&mut transaction).await?;
        transaction.commit().await?;
        Ok(())
    }

    /// Checks that the database has every migration of this schema, or a newer version of it.
    ///
    /// # Errors
    /// [`StoreError::Schema`] names what is missing and the command that applies it.
    pub async fn check(&self, database: &Database) -> Result<(), StoreError> {
        let mut connection = database.open().await?;
        let missing = self.missing(&mut connection).await?;
        connection.close().await?;
        if missing.is_empty() {
            return Ok(());
        }
        Err(StoreError::Schema(format!(
            "the database's schema is too old: it lacks migration {}; run `token-broker migrate`",
            missing.join(", ")
        )))
    }

    async fn missing(&self, connection: &mut PgConnection) -> Result<Vec<String>, StoreError> {
        let applied_numbers =
            match connection.list_applied_migrations(&self.numbered.table_name).await {
                Ok(applied) => applied,
                Err(MigrateError::Execute(sqlx::Error::Database(error)))
                    if error.code().as_deref() == Some(UNDEFINED_TABLE) =>
                {
                    Vec::new()
                }
                Err(error) => return Err(migrate_error(error)),
            };
        let numbered: Vec<_> = self
            .numbered
            .iter()
            .filter(|ours| !applied_numbers.iter().any(|theirs| theirs.version == ours.version))
            .map(|ours| format!("{} ({})", ours.version, ours.description))
            .collect();
        if !numbered.is_empty() {
            // The table `repeatable_migrations` may be missing too.
            return Ok(numbered);
        }
        let applied = applied(connection).await?;
        let mut repeatable = Vec::new();
        for ours in &self.repeatable {
            if ours.is_newer_than(applied.get(ours.name()))? {
                repeatable.push(format!("\"{}\" version {}", ours.name(), ours.version));
            }
        }
        Ok(repeatable)
    }
}

/// The schema that is migrated: the first one in the search path of the session.
struct SessionSchema {
    quoted: String,
    search_path: String,
}

impl SessionSchema {
    async fn of(connection: &mut PgConnection) -> Result<Self, StoreError> {
        let row = sqlx::query!(
            r#"-- store::migrate::SessionSchema::of
            select current_schema()::text as name, quote_ident(current_schema()) as quoted,
                current_setting('search_path') as "search_path!""#,
        )
        .fetch_one(connection)
        .await?;
        let name = row.name.unwrap_or_default();
        // The name is written into string literals too.
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        if name.is_empty() || !name.chars().all(plain) {
            return Err(StoreError::Schema(format!(
                "the name of the schema {name:?} must consist of a-z, 0-9 and _"
            )));
        }
        Ok(Self { quoted: row.quoted.unwrap_or_default(), search_path: row.search_path })
    }

    /// Returns a repeatable migration with the schema in the place of `@schema@`.
    fn fill_in(&self, sql: &str) -> String {
        sql.replace(SCHEMA_PLACEHOLDER, &self.quoted)
    }

    /// Undoes that a repeatable migration sets the search path.
    async fn restore_search_path(&self, connection: &mut PgConnection) -> Result<(), StoreError> {
        sqlx::query!(
            "-- store::migrate::SessionSchema::restore_search_path
            select pg_catalog.set_config('search_path', $1, true)",
            self.search_path,
        )
        .fetch_one(connection)
        .await?;
        Ok(())
    }
}

impl Repeatable {
    fn new(migration: Migration) -> Result<Self, StoreError> {
        let version = stated_version(migration.sql.as_str()).ok_or_else(|| {
            StoreError::Schema(format!(
                "repeatable migration {} does not begin with `{VERSION_PREFIX}` and a number",
                migration.description
            ))
        })?;
        Ok(Self { version, migration })
    }

    fn name(&self) -> &str {
        &self.migration.description
    }

    fn failed(&self, error: sqlx::Error) -> StoreError {
        match error {
            error @ sqlx::Error::Database(_) => {
                StoreError::migration_failed(format!("repeatable migration {}", self.name()), error)
            }
            error => error.into(),
        }
    }

    /// Returns whether this file has to be applied to a database whose version of it is `applied`.
    fn is_newer_than(&self, applied: Option<&Applied>) -> Result<bool, StoreError> {
        let Some(applied) = applied else { return Ok(true) };
        // With equal versions, it is not known which of the two texts is newer.
        if applied.version == self.version && *applied.checksum != *self.migration.checksum {
            return Err(StoreError::Schema(format!(
                "repeatable migration {} differs from the one in the database, and both are version {}: \
                 it was changed without a new version",
                self.name(),
                self.version
            )));
        }
        Ok(applied.version < self.version)
    }
}

/// Makes the owner of the tables the role of the transaction, if there are tables. A superuser or a member of
/// that role may migrate too, and what he created as himself, the owner's functions could not use.
async fn become_owner(connection: &mut PgConnection) -> Result<(), StoreError> {
    let owner = sqlx::query_scalar!(
        r#"-- store::migrate::become_owner
        select quote_ident(pg_get_userbyid(relowner)) as "owner!" from pg_class
        where relnamespace = current_schema()::regnamespace and relname = 'accounts'
            and pg_get_userbyid(relowner) <> current_user"#,
    )
    .fetch_optional(&mut *connection)
    .await?;
    if let Some(owner) = owner {
        let set = format!("/* store::migrate::become_owner */ set local role {owner}");
        sqlx::raw_sql(AssertSqlSafe(set)).execute(connection).await?;
    }
    Ok(())
}

async fn refuse_unsafe_schema(connection: &mut PgConnection) -> Result<(), StoreError> {
    let faults = schema_trust::faults_before_migration(connection).await?;
    if faults.is_empty() { Ok(()) } else { Err(StoreError::UnsafeSchema(faults)) }
}

fn stated_version(sql: &str) -> Option<i32> {
    sql.strip_prefix(VERSION_PREFIX)?.split_whitespace().next()?.parse().ok()
}

/// Returns the repeatable migrations that were applied to the database, by name.
async fn applied(connection: &mut PgConnection) -> Result<HashMap<String, Applied>, StoreError> {
    let rows = sqlx::query!(
        "-- store::migrate::applied
        select name, version, checksum from repeatable_migrations",
    )
    .fetch_all(connection)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| (row.name, Applied { version: row.version, checksum: row.checksum }))
        .collect())
}

fn migrate_error(error: MigrateError) -> StoreError {
    match error {
        MigrateError::Execute(error) => error.into(),
        MigrateError::ExecuteMigration(error, number) => {
            StoreError::migration_failed(format!("migration {number}"), error)
        }
        MigrateError::VersionMismatch(number) => StoreError::Schema(format!(
            "the database has another migration {number} than this release: it was made by a build \
             before the first release; make a new database"
        )),
        error => StoreError::Schema(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_repeatable_migration_states_its_version() {
        let schema = Schema::of_this_release().unwrap();
        assert!(!schema.repeatable.is_empty());
        assert!(schema.repeatable.iter().all(|file| file.version >= 1));
    }

    #[test]
    fn a_version_is_a_number_on_the_first_line() {
        assert_eq!(stated_version("-- version: 12 (raise it)\nselect 1"), Some(12));
        assert_eq!(stated_version("-- version: 3\nselect 1"), Some(3));
        for sql in ["", "select 1", "-- version: \nselect 1", "\n-- version: 3\n"] {
            assert_eq!(stated_version(sql), None, "{sql}");
        }
    }

    #[test]
    fn no_numbered_migration_runs_outside_of_the_transaction() {
        // sqlx runs each file in a savepoint, except files that begin with `-- no-transaction`. Those could
        // not be applied in one transaction with the others.
        let schema = Schema::of_this_release().unwrap();
        assert!(schema.numbered.iter().all(|file| !file.no_tx));
    }
}
