//! Errors after which the pooled connections must not be used any more.
//!
//! A session may be usable by itself and yet fail every time: its server has become a standby, a migration
//! changed a table for which it has prepared statements, or a pooler lost those. A connection that the server
//! closed is noticed by the pool. But a pool does not learn of the errors of statements, and such an error
//! concerns the other connections too. So all that were opened before are replaced when they are next needed.

use std::time::Duration;

use parking_lot::Mutex;
use sqlx::postgres::PgDatabaseError;
use tokio::time::Instant;

/// When the last such error was received by this process.
static LAST_ERROR: Mutex<Option<Instant>> = Mutex::new(None);

/// Remembers `error` if connections that were opened before it must not be used any more.
pub(super) fn consider(error: &PgDatabaseError) {
    if condemns_sessions(error.code(), error.routine()) {
        *LAST_ERROR.lock() = Some(Instant::now());
    }
}

/// Returns whether a connection of this age must not be used any more.
pub(super) fn applies_to_age(age: Duration) -> bool {
    LAST_ERROR.lock().is_some_and(|error| error.elapsed() <= age)
}

/// Returns whether an error means that older connections must be replaced. `routine` is the function of
/// Postgres that reported it.
fn condemns_sessions(sqlstate: &str, routine: Option<&str>) -> bool {
    match sqlstate {
        // The server became read-only; the transaction was left in a failed state; the server shuts down or
        // crashed; the statement that was prepared is not known or known already.
        "25006" | "25P02" | "57P01" | "57P02" | "57P03" | "26000" | "42P05" => true,
        // A prepared statement no longer fits its tables. The code has other meanings too.
        "0A000" => routine == Some("RevalidateCachedQuery"),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_sessions_condemn_them_and_errors_of_statements_do_not() {
        for sqlstate in ["25006", "25P02", "26000", "42P05", "57P01", "57P02", "57P03"] {
            assert!(condemns_sessions(sqlstate, None), "{sqlstate}");
        }
        assert!(condemns_sessions("0A000", Some("RevalidateCachedQuery")));
        // That a new connection is refused, by the server or by a pooler, says nothing about the others.
        for sqlstate in [
            "08P01", "0A000", "23505", "28000", "28P01", "40001", "42501", "53300", "55P03",
            "57014",
        ] {
            assert!(!condemns_sessions(sqlstate, Some("other")), "{sqlstate}");
        }
    }
}
