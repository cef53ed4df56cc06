//! The underlying error of a [`StoreError`](super::StoreError), and what of it may be printed.

use std::{
    error::Error,
    fmt::{self, Display, Formatter},
};

use sqlx::postgres::PgDatabaseError;

/// The `SQLSTATE` with which `PgBouncer` refuses logins, for whatever reason, up to version 1.22 at least. It
/// has the same one when it does not reach the server.
const POOLER_ERROR: &str = "08P01";
/// Parts of the messages with which `PgBouncer` refuses a login, or repeats that the server refused its own. Its
/// own messages are never translated.
const REFUSED_BY_POOLER: &[&str] = &[
    "unsupported startup parameter",
    "authentication failed",
    "no such database",
    "no such user",
    "config error",
    "does not exist",
    "not permitted to log in",
    "no pg_hba.conf entry",
];

/// Parts of the messages with which `PgBouncer` says that it, or the server behind it, has no free connection.
const SATURATED_POOLER: &[&str] = &[
    "no more connections allowed",
    "client connections exceeded",
    "too many clients",
    "too many connections",
    "connection slots are reserved",
];

/// The error of the server or the driver from which a [`StoreError`](super::StoreError) was made.
///
/// Its text is the `SQLSTATE`, or a description of what failed in the driver. The wrapped error is never
/// printed and is not returned as a `source`, since its texts can quote rows.
pub struct DatabaseCause(pub(super) sqlx::Error);

impl DatabaseCause {
    pub(super) fn server(&self) -> Option<&PgDatabaseError> {
        self.0.as_database_error()?.try_downcast_ref()
    }

    /// Returns the `SQLSTATE`, if the server reported the error.
    #[must_use]
    pub fn sqlstate(&self) -> Option<&str> {
        self.server().map(PgDatabaseError::code)
    }

    /// Returns whether a connection pooler refused the login, or says that the server did.
    pub(super) fn is_pooler_refusal(&self) -> bool {
        let message = self.message();
        self.sqlstate() == Some(POOLER_ERROR)
            && REFUSED_BY_POOLER.iter().any(|part| message.contains(part))
    }

    /// Returns whether a connection pooler says that there is no free connection.
    pub(super) fn is_saturated_pooler(&self) -> bool {
        let message = self.message();
        self.sqlstate() == Some(POOLER_ERROR)
            && SATURATED_POOLER.iter().any(|part| message.contains(part))
    }

    /// Returns the server's primary message, without its detail.
    ///
    /// Messages of class 22 (data exceptions) quote the value that was refused, so they are replaced.
    pub(super) fn message(&self) -> &str {
        match self.server() {
            Some(error) if error.code().starts_with("22") => "a value is malformed or out of range",
            Some(error) => error.message(),
            None => "the driver failed",
        }
    }
}

/// Describes a fault of TLS. The driver's own texts may quote the files of the URL, or their content.
fn tls_fault(error: &(dyn Error + 'static)) -> String {
    if error.is::<rustls::pki_types::pem::Error>() {
        return "the file of sslcert or sslkey is not PEM".into();
    }
    let text = error.to_string();
    if text.starts_with("Invalid certificate") && !error.is::<rustls::Error>() {
        return "the file of sslrootcert is not PEM".into();
    }
    text
}

impl Display for DatabaseCause {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if let Some(sqlstate) = self.sqlstate() {
            return write!(f, "SQLSTATE {sqlstate}");
        }
        match &self.0 {
            sqlx::Error::Io(error) => write!(f, "{error}"),
            sqlx::Error::Tls(error) => write!(f, "TLS: {}", tls_fault(&**error)),
            sqlx::Error::Protocol(_) => f.write_str("the server's answer is malformed"),
            sqlx::Error::PoolClosed => f.write_str("the pool is closed"),
            sqlx::Error::PoolTimedOut => f.write_str("no connection became free in time"),
            sqlx::Error::Configuration(_) => {
                f.write_str("the settings of the connection cannot be used")
            }
            sqlx::Error::ColumnNotFound(column) => write!(f, "there is no column {column}"),
            sqlx::Error::TypeNotFound { type_name } => write!(f, "there is no type {type_name}"),
            sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) => {
                f.write_str("a value cannot be decoded")
            }
            sqlx::Error::Encode(_) => f.write_str("a parameter cannot be encoded"),
            _ => f.write_str("an unexpected error of the driver"),
        }
    }
}

impl fmt::Debug for DatabaseCause {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "DatabaseCause({self})")
    }
}

impl Error for DatabaseCause {}
