//! Recognition of a connection pooler that does not keep sessions.
//!
//! `PgBouncer`'s pool modes `transaction` and `statement` give each transaction or statement any of the
//! server's sessions. Then settings, prepared statements, locks of sessions and notifications are lost or
//! belong to somebody else.

use std::collections::HashSet;

use sqlx::{Connection, PgConnection, Row};

use super::session_settings::set_statement_timeout;

/// How a pooler that does not keep sessions is reported.
pub(super) const KEEPS_NO_SESSIONS: &str = "a connection pooler in between does not keep sessions: use its mode for sessions, which is \
     pool_mode = session in PgBouncer";

/// How often the server process is asked for in a row.
const REPETITIONS: usize = 2;

/// Returns whether the server processes behind two open connections show that a pooler changes them.
///
/// A session has one process for its whole life, so `false` is never returned of a session. A pooler that
/// gives out the idle process that was used last gives both connections the same one. One that gives out
/// idle processes in turn gives one connection different ones. Other clients only add to that.
///
/// # Errors
/// When a statement fails.
pub(super) async fn keeps_sessions(
    one: &mut PgConnection,
    other: &mut PgConnection,
) -> Result<bool, sqlx::Error> {
    set_statement_timeout(one).await?;
    set_statement_timeout(other).await?;
    let (mut of_one, mut of_other) = (HashSet::new(), HashSet::new());
    for _ in 0..REPETITIONS {
        for (connection, processes) in [(&mut *one, &mut of_one), (&mut *other, &mut of_other)] {
            for _ in 0..REPETITIONS {
                processes.insert(server_process(connection).await?);
            }
        }
    }
    Ok(are_of_sessions(&of_one, &of_other))
}

/// Returns whether these processes, each the answers to one of two open connections, can be two sessions.
fn are_of_sessions(one: &HashSet<i32>, other: &HashSet<i32>) -> bool {
    one.len() == 1 && other.len() == 1 && one.is_disjoint(other)
}

/// Returns the server process that runs the next statement. Without a prepared statement, since a pooler may
/// have lost it.
async fn server_process(connection: &mut PgConnection) -> Result<i32, sqlx::Error> {
    let ask = "/* store::pooler */ select pg_catalog.pg_backend_pid()";
    sqlx::raw_sql(ask).fetch_one(connection).await?.try_get(0)
}

/// Closes connections after use; failures do not matter.
pub(super) async fn close(connections: [PgConnection; 2]) {
    for connection in connections {
        let _ = connection.close().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns whether statement `n` is one of the first connection's.
    fn is_of_one(n: usize) -> bool {
        (n / REPETITIONS).is_multiple_of(2)
    }

    /// Returns whether a pooler that picks process `pick(n)` for statement `n` is taken for sessions.
    fn seen(pick: impl Fn(usize) -> i32) -> bool {
        let (mut one, mut other) = (HashSet::new(), HashSet::new());
        for n in 0..2 * REPETITIONS * REPETITIONS {
            let processes = if is_of_one(n) { &mut one } else { &mut other };
            processes.insert(pick(n));
        }
        are_of_sessions(&one, &other)
    }

    #[test]
    fn sessions_are_recognized_by_one_process_each() {
        assert!(seen(|n| if is_of_one(n) { 7 } else { 9 }));
    }

    #[test]
    fn any_number_of_processes_that_are_given_out_in_turn_or_last_first_is_recognized() {
        for processes in 1..10 {
            assert!(!seen(|n| i32::try_from(n % processes).unwrap()), "{processes} in turn");
        }
        assert!(!seen(|_| 7), "last first");
    }
}
