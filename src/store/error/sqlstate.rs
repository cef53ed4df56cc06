//! The kinds of errors that the codes of the server stand for.

/// The `SQLSTATE` of a relation that does not exist: the schema is missing or too old.
pub(in crate::store) const UNDEFINED_TABLE: &str = "42P01";
/// The `SQLSTATE` of a statement for which the login's role lacks a privilege.
pub(super) const INSUFFICIENT_PRIVILEGE: &str = "42501";
/// The `SQLSTATE` of a value that a check constraint or a trigger refused.
pub(super) const CHECK_VIOLATION: &str = "23514";
/// The `SQLSTATE` of a statement that waited too long for a lock.
pub(super) const LOCK_NOT_AVAILABLE: &str = "55P03";
/// The `SQLSTATE` of a statement that was cancelled, in general by `statement_timeout`.
pub(super) const QUERY_CANCELED: &str = "57014";
/// The `SQLSTATE` of a login that exceeds the server's `max_connections`.
pub(super) const TOO_MANY_CONNECTIONS: &str = "53300";

/// The kind of error that a `SQLSTATE` stands for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Kind {
    ConnectionLost,
    TransactionConflict,
    Locked,
    MissingPrivilege,
    InvalidValue,
    Conflict,
    UndefinedTable,
    LoginRefused,
    StatementLost,
    Refused,
}

impl Kind {
    /// Classifies a `SQLSTATE`, as listed in appendix A of the manual of Postgres.
    ///
    /// An error that a running server reports is not a lost connection, even if the client can do nothing:
    /// a wrong password (28P01), a missing database (3D000), a statement timeout (57014), no free
    /// connection (53300).
    pub(super) fn of(sqlstate: &str) -> Self {
        match sqlstate {
            // The server shuts down, has crashed, starts up, or closed an idle session. Connection poolers
            // report class 08 when they cannot reach the server.
            "57P01" | "57P02" | "57P03" | "57P05" => Self::ConnectionLost,
            _ if sqlstate.starts_with("08") => Self::ConnectionLost,
            // Serialization failure; deadlock.
            "40001" | "40P01" => Self::TransactionConflict,
            // `nowait` or `lock_timeout`.
            "55P03" => Self::Locked,
            INSUFFICIENT_PRIVILEGE => Self::MissingPrivilege,
            CHECK_VIOLATION => Self::InvalidValue,
            // Unique and exclusion constraints.
            "23505" | "23P01" => Self::Conflict,
            UNDEFINED_TABLE => Self::UndefinedTable,
            // Invalid authorization; a database that does not exist.
            "28000" | "28P01" | "3D000" => Self::LoginRefused,
            "26000" | "42P05" => Self::StatementLost,
            _ => Self::Refused,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_sqlstate_has_its_kind() {
        for (sqlstate, kind) in [
            ("08006", Kind::ConnectionLost),
            ("08P01", Kind::ConnectionLost),
            ("57P01", Kind::ConnectionLost),
            ("57P02", Kind::ConnectionLost),
            ("57P03", Kind::ConnectionLost),
            ("57P05", Kind::ConnectionLost),
            ("40001", Kind::TransactionConflict),
            ("40P01", Kind::TransactionConflict),
            ("55P03", Kind::Locked),
            ("42501", Kind::MissingPrivilege),
            ("23514", Kind::InvalidValue),
            ("23505", Kind::Conflict),
            ("23P01", Kind::Conflict),
            ("42P01", Kind::UndefinedTable),
            // A server that answers with these is not lost.
            ("22P02", Kind::Refused),
            ("23503", Kind::Refused),
            ("25006", Kind::Refused),
            ("25P03", Kind::Refused),
            ("26000", Kind::StatementLost),
            ("28000", Kind::LoginRefused),
            ("28P01", Kind::LoginRefused),
            ("3D000", Kind::LoginRefused),
            ("42P05", Kind::StatementLost),
            ("53100", Kind::Refused),
            ("53300", Kind::Refused),
            ("57014", Kind::Refused),
            ("XX001", Kind::Refused),
        ] {
            assert_eq!(Kind::of(sqlstate), kind, "{sqlstate}");
        }
    }
}
