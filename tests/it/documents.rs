//! The documents agree with the code: the SQL in them runs, and their tables list the settings and metrics
//! that exist.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use sqlx::AssertSqlSafe;
use token_broker::{
    config::table::{self, Setting, WhenUnset},
    telemetry::Metrics,
};

use crate::{
    harness::database::TestDatabase,
    roles::{ACCOUNTS, database_with_roles},
};

const ROLES: &str = include_str!("../../deploy/roles.sql");
const AUDIT: &str = include_str!("../../docs/audit.md");
const CLIENTS: &str = include_str!("../../docs/clients.md");
const OPERATIONS: &str = include_str!("../../docs/operations.md");
const PROMISES: &str = include_str!("../../docs/promises.md");

/// Returns the blocks of `document` that are fenced as `kind`.
fn blocks<'a>(document: &'a str, kind: &str) -> Vec<&'a str> {
    let (open, close) = (format!("\n```{kind}\n"), "\n```\n");
    document.split(&open).skip(1).map(|rest| rest.split(close).next().unwrap()).collect()
}

/// Runs `block` as `role`, and undoes what it did.
async fn assert_runs_as(database: &TestDatabase, role: &str, block: &str) {
    let mut transaction = database.pool().begin().await.unwrap();
    let role = format!("set local role {role}");
    sqlx::raw_sql(AssertSqlSafe(role)).execute(&mut *transaction).await.unwrap();
    let ran = sqlx::raw_sql(AssertSqlSafe(block.to_owned())).execute(&mut *transaction).await;
    assert!(ran.is_ok(), "{}\n{block}", ran.unwrap_err());
    transaction.rollback().await.unwrap();
}

#[tokio::test]
async fn the_sql_in_the_audit_document_runs_as_the_role_that_it_is_meant_for() {
    let database = TestDatabase::new().await;
    database.sql(ROLES).await;
    let (audit, runtime) = (blocks(AUDIT, "sql"), blocks(AUDIT, "sql-runtime"));
    assert!(audit.len() >= 10, "{} blocks", audit.len());
    for block in audit {
        assert_runs_as(&database, "token_broker_auditor", block).await;
    }
    for block in runtime {
        assert_runs_as(&database, "token_broker_runtime", block).await;
    }
}

#[tokio::test]
async fn the_sql_in_the_clients_document_runs_as_the_auditor() {
    let database = TestDatabase::new().await;
    database.sql(ROLES).await;
    // The block is a part of a list.
    let unindented: String = CLIENTS.lines().flat_map(|line| [line.trim_start(), "\n"]).collect();
    let blocks = blocks(&unindented, "sql");
    assert_eq!(blocks.len(), 1);
    assert!(blocks[0].contains("'report_rejected_token'"), "{}", blocks[0]);
    assert_runs_as(&database, "token_broker_auditor", blocks[0]).await;
}

/// Returns the indented block of `document` whose first line begins with `beginning`.
fn indented_block(document: &str, beginning: &str) -> String {
    let first = format!("    {beginning}");
    let lines = document.lines().skip_while(|line| !line.starts_with(&first));
    let lines: Vec<_> = lines.take_while(|line| line.starts_with("    ")).collect();
    assert!(!lines.is_empty(), "no block begins with {beginning}");
    lines.join("\n")
}

/// The upserts run as the role of accounts' admins, for an account that exists and for a new one.
#[tokio::test]
async fn the_upserts_in_the_operations_document_run_as_the_role_that_it_names() {
    let database = database_with_roles().await;
    let version: String = sqlx::query_scalar("select current_setting('server_version_num')")
        .fetch_one(database.pool())
        .await
        .unwrap();
    let mut beginnings = vec!["insert into accounts (name, client_id, client_secret) values ($1"];
    if version.parse::<u32>().unwrap() >= 150_000 {
        beginnings.push("merge into accounts");
    }
    for beginning in beginnings {
        let upsert = indented_block(OPERATIONS, beginning);
        let run = format!(
            "prepare upsert (text, text, text) as {upsert}
             execute upsert ('acme', 'acme-id', 'SK.2'); execute upsert ('new', 'new-id', 'SK.3');
             deallocate upsert"
        );
        assert_runs_as(&database, ACCOUNTS, &run).await;
    }
}

/// Returns the rows of the tables in `document` whose first header cell is one of `headers`, as cells
/// without the space around them.
fn rows<'a>(document: &'a str, headers: &[&str]) -> Vec<Vec<&'a str>> {
    let mut rows = Vec::new();
    let mut in_table = None;
    for line in document.lines() {
        let Some(inner) = line.strip_prefix('|').and_then(|line| line.trim_end().strip_suffix('|'))
        else {
            in_table = None;
            continue;
        };
        let cells: Vec<_> = inner.split('|').map(str::trim).collect();
        let wanted = *in_table.get_or_insert_with(|| {
            headers.iter().any(|header| cells[0].eq_ignore_ascii_case(header))
        });
        let is_header = headers.iter().any(|header| cells[0].eq_ignore_ascii_case(header));
        let is_rule = cells[0].starts_with("---") || cells[0].starts_with(":--");
        if wanted && !is_header && !is_rule {
            rows.push(cells);
        }
    }
    rows
}

/// Returns the parts of `text` that are enclosed in backticks.
fn code_spans(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// Returns the name of the setting as the document has it: without the prefix of the environment.
fn documented_name(setting: &Setting) -> String {
    setting.env().trim_start_matches(table::ENV_PREFIX).to_owned()
}

/// Returns the default in a cell, with the same text for all spellings of "none".
fn normalized_default(cell: &str) -> String {
    if let [default] = code_spans(cell)[..] {
        return default.into();
    }
    match cell.to_lowercase().trim_matches('*') {
        "" | "-" | "–" | "—" | "none" | "not set" => "–".into(),
        other => other.to_owned(),
    }
}

/// Returns what the column "default" must say for the setting.
fn expected_default(setting: &Setting) -> String {
    match setting.when_unset {
        WhenUnset::Required { .. } => "required".into(),
        WhenUnset::Default(default) => default.into(),
        WhenUnset::UseSetting(other) => documented_name(other),
        WhenUnset::NoValue => "–".into(),
    }
}

#[test]
fn the_settings_table_in_the_operations_document_is_that_of_the_code() {
    let mut documented = BTreeMap::new();
    for row in rows(OPERATIONS, &["setting", "variable"]) {
        // One row may describe several settings that share a default, such as TLS_CERT and TLS_KEY.
        for name in code_spans(row[0]) {
            let name = name.trim_start_matches(table::ENV_PREFIX).to_owned();
            let earlier = documented.insert(name.clone(), normalized_default(row[1]));
            assert!(earlier.is_none(), "{name} has two rows");
        }
    }
    let serve = table::DATABASE.iter().chain(table::BROKER).chain([&&table::MIGRATE_DATABASE_URL]);
    let mut expected = BTreeMap::new();
    for setting in serve {
        expected.insert(documented_name(setting), expected_default(setting));
    }
    // The settings of single commands may be described below the table instead.
    let single_commands: Vec<_> =
        table::all().filter(|setting| !expected.contains_key(&documented_name(setting))).collect();
    for setting in single_commands {
        let name = documented_name(setting);
        if documented.contains_key(&name) {
            expected.insert(name, expected_default(setting));
            continue;
        }
        let spans: Vec<_> = OPERATIONS.lines().flat_map(code_spans).collect();
        let has = |text: &str| {
            spans.iter().any(|span| span.trim_start_matches(table::ENV_PREFIX) == text)
        };
        assert!(has(&name), "docs/operations.md does not mention `{name}`");
        if let Some(default) = setting.default() {
            assert!(has(default), "docs/operations.md does not mention `{default}` of `{name}`");
        }
    }
    assert_eq!(documented, expected, "docs/operations.md differs from src/config/table.rs");
}

/// Returns the names of all samples that `/metrics` exports, without the parts of histograms.
fn exported_metrics() -> BTreeSet<String> {
    let metrics = Metrics::new("1.2.3");
    metrics.on_scrape(|gauges| {
        // These are exported only when they are known.
        let now = Some(token_broker::domain::clock::Timestamp::default());
        gauges.earliest_token_end = now;
        gauges.upstream_clock_skew = Some(chrono::TimeDelta::zero());
        gauges.tls_not_after = Some(0);
        gauges.journal.last_delivered_at = now;
    });
    let text = metrics.encode();
    let is_histogram = |name: &str| text.contains(&format!("# TYPE {name} histogram\n"));
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| {
            let name = line.split(['{', ' ']).next().unwrap();
            let family = name.rsplit_once('_').map_or(name, |(family, _)| family);
            if is_histogram(family) { family } else { name }.to_owned()
        })
        .collect()
}

#[test]
fn the_metrics_table_in_the_operations_document_lists_what_is_exported() {
    const PREFIX: &str = "token_broker_";
    let exported = exported_metrics();
    let mut documented = BTreeSet::new();
    for row in rows(OPERATIONS, &["metric"]) {
        // `…_durable_total` stands for the first name in the row, with its last words replaced.
        let mut first: Option<&str> = None;
        let spans = row.iter().flat_map(|cell| code_spans(cell));
        for name in spans.map(|span| span.split('{').next().unwrap()) {
            if name.starts_with(PREFIX) {
                documented.insert(name.to_owned());
                first = Some(name);
            } else if let (Some(end), Some(first)) = (name.strip_prefix('…'), first) {
                let matching = exported.iter().filter(|other| {
                    other.strip_suffix(end).is_some_and(|start| first.starts_with(start))
                });
                let before = documented.len();
                documented.extend(matching.cloned());
                assert!(documented.len() > before, "`{name}` is not a metric");
            }
        }
    }
    assert_eq!(documented, exported, "docs/operations.md differs from what /metrics exports");
}

/// Whether the repository has the test `path`, such as `it::serving::a_call_…` or `domain::token::tests::a_token_…`.
fn has_test(path: &str) -> bool {
    let modules: Vec<_> = path.split("::").collect();
    let (name, modules) = modules.split_last().unwrap();
    let root = env!("CARGO_MANIFEST_DIR");
    let files = match modules {
        ["it", modules @ ..] => vec![format!("{root}/tests/it/{}.rs", modules.join("/"))],
        // Tests are in the file that they test, or in a file of their own.
        [.., _] => [modules, &modules[..modules.len() - 1]]
            .map(|modules| format!("{root}/src/{}.rs", modules.join("/")))
            .into(),
        [] => vec![],
    };
    let is_in = |file: &String| {
        let text = fs::read_to_string(file).unwrap_or_default();
        text.contains(&format!("fn {name}("))
    };
    files.iter().any(is_in)
}

#[test]
fn each_promise_names_tests_that_exist() {
    let rows = PROMISES.lines().filter_map(|line| line.strip_prefix("| "));
    let rows = rows.filter(|row| row.starts_with(|it: char| it.is_ascii_digit()));
    let mut numbers = vec![];
    for row in rows {
        let cells: Vec<_> = row.split(" | ").collect();
        let [number, _, tests] = cells[..] else { panic!("{row}") };
        numbers.push(number.parse::<usize>().unwrap());
        let tests: Vec<_> = tests.split('`').filter(|it| it.contains("::")).collect();
        assert!(!tests.is_empty(), "promise {number} names no test");
        for test in tests {
            assert!(has_test(test), "promise {number}: there is no test {test}");
        }
    }
    assert_eq!(numbers, (1..=40).collect::<Vec<_>>());
    assert!(!has_test("it::serving::no_such_test"));
}
