//! What the documents say to be done works as it stands there.

use sqlx::AssertSqlSafe;

use crate::harness::database::TestDatabase;

const ROLES: &str = include_str!("../../deploy/roles.sql");
const AUDIT: &str = include_str!("../../docs/audit.md");

/// The blocks of a document that are fenced as `kind`.
fn blocks<'a>(document: &'a str, kind: &str) -> Vec<&'a str> {
    let (open, close) = (format!("\n```{kind}\n"), "\n```\n");
    document.split(&open).skip(1).map(|rest| rest.split(close).next().unwrap()).collect()
}

async fn runs_as(database: &TestDatabase, role: &str, block: &str) {
    let mut transaction = database.pool().begin().await.unwrap();
    let role = format!("set local role {role}");
    sqlx::raw_sql(AssertSqlSafe(role)).execute(&mut *transaction).await.unwrap();
    let ran = sqlx::raw_sql(AssertSqlSafe(block.to_owned())).execute(&mut *transaction).await;
    assert!(ran.is_ok(), "{}\n{block}", ran.unwrap_err());
    transaction.rollback().await.unwrap();
}

#[tokio::test]
async fn the_auditors_questions_are_answered_by_the_sql_that_stands_beside_them() {
    let database = TestDatabase::new().await;
    database.sql(ROLES).await;
    let (audit, runtime) = (blocks(AUDIT, "sql"), blocks(AUDIT, "sql-runtime"));
    assert!(audit.len() >= 10, "{} blocks", audit.len());
    for block in audit {
        runs_as(&database, "token_broker_auditor", block).await;
    }
    for block in runtime {
        runs_as(&database, "token_broker_runtime", block).await;
    }
}
