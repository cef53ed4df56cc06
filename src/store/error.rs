//! Errors of the database, in kinds by what a caller does about them.
//!
//! The text of an error may be shown in a log, on a terminal or in an answer of `/readyz`, so it never
//! quotes a row, a parameter or a URL. Neither `Display` nor `Debug` prints the server's detail, hint,
//! context or statement.

mod cause;
mod sqlstate;

use std::fmt::Display;

use sqlx::postgres::PgDatabaseError;
use thiserror::Error;

pub use self::cause::DatabaseCause;
pub(super) use self::sqlstate::UNDEFINED_TABLE;
use self::sqlstate::{Kind, LOCK_NOT_AVAILABLE, QUERY_CANCELED, TOO_MANY_CONNECTIONS};
use super::distrust;

/// An error of the database or of the driver that talks to it.
///
/// | kind | does the server answer? | what to do |
/// |---|---|---|
/// | [`ConnectionLost`](Self::ConnectionLost) | this session is lost; a new one may work | try again later |
/// | [`Unverified`](Self::Unverified) | a server does, but perhaps not the primary | try again later |
/// | [`TimedOut`](Self::TimedOut) | unknown | try again later; [`Database::probe`](super::Database::probe) finds out whether it answers |
/// | [`TransactionConflict`](Self::TransactionConflict) | yes | repeat the transaction |
/// | all others | yes | retrying does not help: an admin has to change something |
#[derive(Debug, Error)]
pub enum StoreError {
    /// There is no session with the server: it could not be opened, or it ended.
    #[error("the database cannot be reached: {reason}")]
    ConnectionLost {
        /// The reason, without the database's URL.
        reason: String,
        /// The underlying error; its text is part of `reason`.
        #[source]
        cause: DatabaseCause,
    },
    /// The server answers, but must not be used for now: it is a standby, or it was not verified to be the one
    /// that this broker knows. To a caller that is as if the primary did not answer.
    #[error("the database cannot be used for now: {reason}")]
    Unverified {
        /// Why it must not be used.
        reason: String,
        /// Whether the primary itself answers, and only refuses something.
        primary_answers: bool,
    },
    /// The server did not answer in time. It may hang, or it may answer other statements, for example while
    /// this one waits for a lock.
    #[error("the database took too long: {reason}")]
    TimedOut {
        /// What took too long.
        reason: &'static str,
    },
    /// The server aborted the transaction because of another one, by a serialization failure or a deadlock.
    /// Nothing of it was committed, and it may be repeated.
    #[error("the database ended a transaction that was in conflict with another one: {0}")]
    TransactionConflict(#[source] DatabaseCause),
    /// A lock that another transaction holds was not released in time (`SQLSTATE` 55P03). Nothing of the
    /// transaction was committed.
    #[error("another transaction holds a lock that is needed: {0}")]
    Locked(#[source] DatabaseCause),
    /// The login's role lacks a privilege, or a trigger forbids the statement to every role (`SQLSTATE`
    /// 42501).
    #[error("{} ({})", .0.message(), .0)]
    MissingPrivilege(#[source] DatabaseCause),
    /// A check constraint or trigger refused a value (`SQLSTATE` 23514). The message is the
    /// trigger's, written for admins.
    #[error("{}", .0.message())]
    InvalidValue(#[source] DatabaseCause),
    /// A unique name or key is taken.
    #[error("{message}")]
    Conflict {
        /// Which name or key is taken, and which row has it if that is known.
        message: String,
        /// The server's error, unless the conflict was found without one.
        #[source]
        cause: Option<DatabaseCause>,
    },
    /// The server does not let this login in: its password, role or database is refused, for example.
    #[error("the database refuses the login ({}): {}", .0, .0.message())]
    LoginRefused(#[source] DatabaseCause),
    /// The session cannot be used as it must be, because of a connection pooler or of the login's settings.
    /// The text says what has to be changed.
    #[error("the database's sessions cannot be used: {0}")]
    UnusableSession(String),
    /// The server refused a statement for any other reason.
    #[error("the database refused a statement ({}): {}", .0, .0.message())]
    Refused(#[source] DatabaseCause),
    /// The requested row does not exist. The text says which one.
    #[error("{0}")]
    NotFound(String),
    /// The schema lacks migrations that this release needs, or its migrations contradict the release's.
    #[error("{0}")]
    Schema(String),
    /// Others could have functions run with the rights of this session: see
    /// [`schema_trust`](super::schema_trust).
    #[error("others could run code with the rights of this login: {}", .0.join("; "))]
    UnsafeSchema(
        /// What is unsafe, with the statements that mend it.
        Vec<String>,
    ),
    /// A migration failed.
    #[error("{name} failed: {} ({cause})", .cause.message())]
    MigrationFailed {
        /// Which migration it was.
        name: String,
        /// The error of its statement.
        #[source]
        cause: DatabaseCause,
    },
    /// A table of this release does not exist.
    #[error("{}: run `token-broker migrate`", .0.message())]
    UndefinedTable(#[source] DatabaseCause),
    /// Since it was last read, the database was restored to an older state, or replaced by another one.
    #[error("the database is not the same any more: {0}")]
    Replaced(&'static str),
    /// A row holds a value that the triggers would refuse, so it was written while they were disabled.
    #[error("{table} row {id}: {problem}")]
    UnreadableRow {
        /// The table.
        table: &'static str,
        /// The row's primary key.
        id: String,
        /// What is wrong, without the value.
        problem: &'static str,
    },
    /// A column of a result has another type than the statement was compiled for.
    #[error("column {column} holds an unexpected value")]
    UnreadableColumn {
        /// The column's name or index.
        column: String,
        /// The driver's error.
        #[source]
        cause: DatabaseCause,
    },
    /// The database's URL cannot be used. The text never quotes it: it may hold a password.
    #[error("the database's URL cannot be used: {0}")]
    InvalidUrl(&'static str),
    /// The driver failed before it sent a request, or could not decode the answer.
    #[error("the database driver failed: {0}")]
    Driver(#[source] DatabaseCause),
}

impl StoreError {
    /// Returns the error that the row `id` of `table` is unreadable because of `problem`, which must not
    /// quote the row.
    #[must_use]
    pub(super) fn unreadable_row(
        table: &'static str,
        id: impl Display,
        problem: &'static str,
    ) -> Self {
        Self::UnreadableRow { table, id: id.to_string(), problem }
    }

    /// Returns the error that the statement of a migration failed. `name` says which migration it was.
    #[must_use]
    pub(super) fn migration_failed(name: String, error: sqlx::Error) -> Self {
        Self::MigrationFailed { name, cause: DatabaseCause(error) }
    }

    /// Returns a conflict with `message`, a text for admins that says what is taken. `error` is the
    /// violation of the unique constraint.
    #[must_use]
    pub(super) fn taken(message: String, error: sqlx::Error) -> Self {
        Self::Conflict { message, cause: Some(DatabaseCause(error)) }
    }

    /// Returns the error that a connection could not be opened.
    #[must_use]
    pub(super) fn of_login(error: sqlx::Error) -> Self {
        match Self::from(error) {
            Self::Refused(cause) | Self::MissingPrivilege(cause)
                if cause.sqlstate() != Some(TOO_MANY_CONNECTIONS) =>
            {
                Self::LoginRefused(cause)
            }
            Self::ConnectionLost { cause, .. } if cause.is_pooler_refusal() => {
                Self::LoginRefused(cause)
            }
            error => error,
        }
    }

    /// Returns the `SQLSTATE` with which the server answered, if it did.
    #[must_use]
    pub fn sqlstate(&self) -> Option<&str> {
        match self {
            Self::ConnectionLost { cause, .. }
            | Self::UnreadableColumn { cause, .. }
            | Self::Conflict { cause: Some(cause), .. }
            | Self::TransactionConflict(cause)
            | Self::Locked(cause)
            | Self::MissingPrivilege(cause)
            | Self::InvalidValue(cause)
            | Self::LoginRefused(cause)
            | Self::Refused(cause)
            | Self::UndefinedTable(cause)
            | Self::MigrationFailed { cause, .. }
            | Self::Driver(cause) => cause.sqlstate(),
            Self::TimedOut { .. }
            | Self::Unverified { .. }
            | Self::Conflict { cause: None, .. }
            | Self::NotFound(_)
            | Self::Schema(_)
            | Self::UnsafeSchema(_)
            | Self::UnusableSession(_)
            | Self::Replaced(_)
            | Self::UnreadableRow { .. }
            | Self::InvalidUrl(_) => None,
        }
    }

    /// Returns whether the role lacks a privilege on an object. `false` if a trigger or a function forbids something to
    /// every role.
    #[must_use]
    pub fn lacks_grant(&self) -> bool {
        // The message says the same in the server's language.
        let is_check = |cause: &DatabaseCause| {
            cause
                .server()
                .and_then(PgDatabaseError::routine)
                .is_some_and(|it| it.starts_with("aclcheck_error"))
        };
        match self {
            Self::MissingPrivilege(cause) | Self::MigrationFailed { cause, .. } => is_check(cause),
            _ => false,
        }
    }

    /// Returns whether the session with the server is lost, or must not be used any more. The server may still
    /// answer on a new session.
    #[must_use]
    pub fn is_connection_lost(&self) -> bool {
        matches!(self, Self::ConnectionLost { .. } | Self::Unverified { .. })
    }

    /// Returns whether it is known that the primary answers. A replica may then not issue without a lease.
    #[must_use]
    pub fn primary_answers(&self) -> bool {
        match self {
            Self::Unverified { primary_answers, .. } => *primary_answers,
            error => !error.may_be_outage(),
        }
    }

    /// Returns whether the session may fail again and again, though a new one would not: its prepared statements
    /// are lost or no longer fit their tables, its transaction has failed, or its server is read-only.
    #[must_use]
    pub fn spoils_session(&self) -> bool {
        // A lost prepared statement is one of the reasons for `UnusableSession`.
        matches!(self, Self::UnusableSession(_))
            || matches!(self.sqlstate(), Some("0A000" | "25006" | "25P02" | "26000" | "42P05"))
    }

    /// Returns whether an attempt to open a connection got no answer: neither from the server nor from a connection
    /// pooler that says that none is free. Such a pooler proves as little about where the address leads as a server
    /// that refuses a login, and nothing about sessions that are open.
    #[must_use]
    pub fn is_silence(&self) -> bool {
        let saturated =
            matches!(self, Self::ConnectionLost { cause, .. } if cause.is_saturated_pooler());
        self.may_be_outage() && !saturated
    }

    /// Returns whether the session must be given up, since the primary possibly does not answer at all. See
    /// [`Self::primary_answers`] for what that means for issuing.
    #[must_use]
    pub fn may_be_outage(&self) -> bool {
        self.is_connection_lost() || matches!(self, Self::TimedOut { .. })
    }

    /// Returns whether the statement waited for another transaction's lock for too long, or was cancelled
    /// because it took too long. It says nothing about a row or a privilege.
    #[must_use]
    pub fn is_delayed(&self) -> bool {
        matches!(self.sqlstate(), Some(LOCK_NOT_AVAILABLE | QUERY_CANCELED))
    }

    /// Returns whether a starting broker should wait and try again, since the server cannot be reached yet,
    /// has no free connection, or another transaction has locked what is needed.
    #[must_use]
    pub fn is_unavailable(&self) -> bool {
        self.may_be_outage() || self.is_delayed() || self.sqlstate() == Some(TOO_MANY_CONNECTIONS)
    }

    /// Returns whether a transaction that failed with this error may have been committed, because the server's answer to
    /// the commit may be lost. `false` if the server refused a statement, or if nothing was sent.
    #[must_use]
    pub fn is_outcome_uncertain(&self) -> bool {
        match self {
            Self::NotFound(_)
            | Self::Conflict { .. }
            | Self::InvalidUrl(_)
            | Self::Schema(_)
            | Self::UnsafeSchema(_)
            | Self::UnusableSession(_) => false,
            // A server or pooler that shuts down reports that too, with an SQLSTATE.
            error => error.may_be_outage() || error.sqlstate().is_none(),
        }
    }

    /// Returns whether the same transaction may succeed when it is repeated at once.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::TransactionConflict(_))
    }
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        let error = match error {
            sqlx::Error::Configuration(error) => match error.downcast::<Unusable>() {
                Ok(unusable) => return Self::UnusableSession(unusable.0),
                Err(error) => sqlx::Error::Configuration(error),
            },
            error => error,
        };
        let cause = DatabaseCause(error);
        if let Some(error) = cause.server() {
            distrust::consider(error);
        }
        if let Some(sqlstate) = cause.sqlstate() {
            return match Kind::of(sqlstate) {
                Kind::ConnectionLost => {
                    Self::ConnectionLost { reason: cause.message().to_owned(), cause }
                }
                Kind::TransactionConflict => Self::TransactionConflict(cause),
                Kind::Locked => Self::Locked(cause),
                Kind::MissingPrivilege => Self::MissingPrivilege(cause),
                Kind::InvalidValue => Self::InvalidValue(cause),
                Kind::Conflict => {
                    Self::Conflict { message: cause.message().to_owned(), cause: Some(cause) }
                }
                Kind::UndefinedTable => Self::UndefinedTable(cause),
                Kind::LoginRefused => Self::LoginRefused(cause),
                Kind::StatementLost => Self::UnusableSession(format!(
                    "a prepared statement was lost ({cause}): a connection pooler must keep sessions, \
                     as PgBouncer does with pool_mode = session"
                )),
                Kind::Refused => Self::Refused(cause),
            };
        }
        match &cause.0 {
            sqlx::Error::PoolTimedOut => {
                Self::TimedOut { reason: "no connection became free or could be opened in time" }
            }
            sqlx::Error::RowNotFound => Self::NotFound("no such row".into()),
            sqlx::Error::ColumnDecode { index, .. } => {
                Self::UnreadableColumn { column: index.clone(), cause }
            }
            sqlx::Error::Io(_)
            | sqlx::Error::Tls(_)
            | sqlx::Error::Protocol(_)
            | sqlx::Error::PoolClosed => Self::ConnectionLost { reason: cause.to_string(), cause },
            _ => Self::Driver(cause),
        }
    }
}

/// The reason why a session cannot be used, on its way through the driver, which takes no other errors.
#[derive(Debug, Error)]
#[error("{0}")]
struct Unusable(String);

/// Returns the error that becomes [`StoreError::UnusableSession`] with `reason`, which must not quote data.
pub(super) fn unusable(reason: String) -> sqlx::Error {
    sqlx::Error::Configuration(Box::new(Unusable(reason)))
}

#[cfg(test)]
mod tests {
    use std::{error::Error, io};

    use super::*;

    #[test]
    fn only_lost_connections_and_timeouts_may_be_an_outage() {
        let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
        for (error, lost, may_be_outage) in [
            (sqlx::Error::Io(refused()), true, true),
            (sqlx::Error::Tls(refused().into()), true, true),
            (sqlx::Error::Protocol("canary".into()), true, true),
            (sqlx::Error::PoolClosed, true, true),
            (sqlx::Error::PoolTimedOut, false, true),
            (sqlx::Error::RowNotFound, false, false),
            (sqlx::Error::Configuration("canary".into()), false, false),
            (sqlx::Error::Decode("canary".into()), false, false),
            (
                sqlx::Error::ColumnDecode { index: "at".into(), source: "canary".into() },
                false,
                false,
            ),
        ] {
            let error = StoreError::from(error);
            let kind = (error.is_connection_lost(), error.may_be_outage());
            assert_eq!(kind, (lost, may_be_outage), "{error}");
            assert!(!error.is_retryable() && error.sqlstate().is_none());
            let source = error.source().map(ToString::to_string).unwrap_or_default();
            let texts = format!("{error} {error:?} {error:#?} {source}");
            assert!(!texts.contains("canary"), "{texts}");
        }
    }
}
