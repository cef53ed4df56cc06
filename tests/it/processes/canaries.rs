//! No secret, bearer or token is found in any output. The tests send canary values through successful and
//! failing operations, and then search every output for them.

use std::{collections::BTreeSet, fs, path::Path};

use nix::sys::signal::Signal;
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool};
use token_broker::{
    api::proto::{ReportRejectedTokenRequest, WatchTokensRequest},
    crypto::bearer::Bearer,
    dev::{
        postgres::{DATABASE, EmbeddedPostgres},
        simulator::{Answer, Simulator, SimulatorOptions},
    },
    store::Database,
};
use tonic::{Request, Status};

use crate::harness::{
    broker::TestClient,
    database::start_embedded_postgres,
    eventually,
    http::http,
    process::{BrokerSetup, run},
};

/// The most verbose log filter: it names the modules of the crates that the broker keeps at `info` under a
/// plain `trace`.
const MOST_VERBOSE: &str = "trace,h2::codec=trace,h2::hpack=trace,h2::proto=trace,h2::client=trace,\
    h2::server=trace,hyper::proto=trace,hyper_util::client=trace,reqwest::connect=trace,\
    tonic::transport=trace,sqlx::query=trace";
const SECRET: &str = "SK.canary-right";
const WRONG_SECRET: &str = "SK.canary-wrong";
const MALFORMED_BEARER: &str = "canary-no-bearer";

/// The values that must not be found.
struct Canaries(BTreeSet<String>);

impl Canaries {
    fn add(&mut self, canary: impl Into<String>) {
        self.0.insert(canary.into());
    }

    /// Adds a token, and its payload and its signature on their own.
    fn add_token(&mut self, token: &str) {
        self.0.extend(token.split('.').skip(1).chain([token]).map(str::to_owned));
    }

    #[track_caller]
    fn assert_absent(&self, output: &str, text: &[u8]) {
        for canary in &self.0 {
            let found = text.windows(canary.len()).position(|part| part == canary.as_bytes());
            if let Some(at) = found {
                let around =
                    &text[at.saturating_sub(200)..(at + canary.len() + 50).min(text.len())];
                panic!("{canary} in {output}: {}", String::from_utf8_lossy(around));
            }
        }
    }

    /// Searches every file below `directory`, except those with a name in `except`.
    fn assert_absent_below(&self, directory: &Path, except: &[&str]) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if except.contains(&path.file_name().unwrap().to_str().unwrap()) {
                continue;
            }
            if path.is_dir() {
                self.assert_absent_below(&path, except);
            } else {
                self.assert_absent(path.to_str().unwrap(), &fs::read(&path).unwrap());
            }
        }
    }
}

/// Returns the name and all rows, as text, of each table and view of the broker.
async fn dump(pool: &PgPool) -> Vec<(String, String)> {
    let tables: Vec<String> = sqlx::query_scalar(
        "select c.oid::regclass::text from pg_class c
         where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'v')",
    )
    .fetch_all(pool)
    .await
    .unwrap();
    let mut dumped = vec![];
    for table in tables {
        let rows = AssertSqlSafe(format!(
            "select coalesce(string_agg(t::text, chr(10)), '') from {table} t"
        ));
        dumped.push((table, sqlx::query_scalar(rows).fetch_one(pool).await.unwrap()));
    }
    dumped
}

/// Returns the Postgres server's log without its STATEMENT lines and their continuations.
fn log_without_statements(postgres: &EmbeddedPostgres) -> String {
    let log = fs::read_to_string(postgres.directory().join("log")).unwrap();
    let mut in_statement = false;
    let kept = log.lines().filter(|line| {
        in_statement = line.contains("STATEMENT:") || (in_statement && line.starts_with('\t'));
        !in_statement
    });
    kept.collect::<Vec<_>>().join("\n")
}

#[tokio::test]
#[expect(clippy::too_many_lines, reason = "one list of operations, then one of outputs")]
async fn no_secret_bearer_or_token_is_found_in_anything_that_a_broker_writes() {
    let postgres = start_embedded_postgres().await;
    let url = postgres.url(DATABASE);
    let upstream = Simulator::start_on_loopback(SimulatorOptions::default()).await.unwrap();
    upstream.add_account("id-1", SECRET);
    upstream.add_account("id-2", "SK.other");
    let mut setup = BrokerSetup::new(&url, &upstream.base_url()).await;
    setup.set("RUST_LOG", MOST_VERBOSE);
    let mut canaries = Canaries([SECRET, WRONG_SECRET, MALFORMED_BEARER].map(str::to_owned).into());
    let mut outputs: Vec<(String, String)> = vec![];
    let keyring = fs::read_to_string(setup.directory.path().join("keyring")).unwrap();
    let keys = keyring.lines().filter_map(|line| line.strip_prefix("key = "));
    keys.for_each(|key| canaries.add(key.trim_matches('"')));

    // The commands: accepted and refused secrets; valid, unknown and malformed bearers.
    setup.run(&["migrate"]).await.ok();
    let mut serve = setup.serve().await;
    let pool = Database::new(&url, "test").unwrap().pool(2);
    let bearer = setup.run(&["caller", "add", "demo", "--bearer"]).await.ok();
    setup.run(&["caller", "grant", "demo", "*"]).await.ok();
    let (bearer, unknown) = (Bearer::parse(&bearer).unwrap(), Bearer::generate());
    for bearer in [&bearer, &unknown] {
        canaries.add(bearer.expose().trim_start_matches("tbk_"));
    }
    for (name, client_id, secret) in [
        ("acme", "id-1", SECRET.to_owned()),
        ("wrong", "id-2", WRONG_SECRET.to_owned()),
        ("long", "id-3", format!("{SECRET}-and-more")),
        ("spaced", "id-4", format!("a {SECRET}")),
        ("sealed", "id-5", format!("sealed:{SECRET}")),
    ] {
        let added = ["account", "add", name, "--client-id", client_id, "--wait"];
        let ran = setup.run_with_secret(&added, &secret).await;
        assert_eq!(ran.code == Some(0), name == "acme", "{ran:?}");
        outputs.push((format!("account add {name}"), format!("{ran:?}")));
    }
    for bearer in [unknown.expose(), MALFORMED_BEARER, "tbk_canary-no-bearer"] {
        let mut command = setup.command(&["token", "get", "acme"]);
        command.env("TOKEN_BROKER_BEARER", bearer);
        let ran = run(command, "").await;
        assert_ne!(ran.code, Some(0), "{ran:?}");
        outputs.push(("token get".to_owned(), format!("{ran:?}")));
    }

    // The calls: served, refused, reported, streamed.
    let client = TestClient::connect(&setup.endpoint(), &bearer).await;
    let token = eventually("a token", async || client.get("acme").await.ok()).await;
    canaries.add_token(&token.access_token);
    let mut refusals: Vec<Status> = vec![];
    refusals.push(client.get("wrong").await.unwrap_err());
    refusals.push(
        TestClient::connect(&setup.endpoint(), &unknown).await.get("acme").await.unwrap_err(),
    );
    let mut malformed = client.request(token_broker::api::proto::GetTokenRequest::default());
    malformed.metadata_mut().insert("authorization", MALFORMED_BEARER.parse().unwrap());
    refusals.push(client.grpc.clone().get_token(malformed).await.unwrap_err());
    let watch = WatchTokensRequest { accounts: vec!["acme".to_owned()] };
    let mut stream =
        client.grpc.clone().watch_tokens(client.request(watch)).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    let report = ReportRejectedTokenRequest {
        account: "acme".to_owned(),
        generation: token.generation,
        upstream_code: "61003".to_owned(),
    };
    client.grpc.clone().report_rejected_token(Request::new(report.clone())).await.unwrap_err();
    client.grpc.clone().report_rejected_token(client.request(report)).await.unwrap();

    // Secrets sent by mistake in the place of an account name or an upstream code.
    for secret in [&token.access_token, bearer.expose(), unknown.expose(), SECRET] {
        let (mut grpc, account) = (client.grpc.clone(), secret.to_owned());
        refusals.push(client.get(&account).await.unwrap_err());
        let watch = WatchTokensRequest { accounts: vec!["acme".to_owned(), account.clone()] };
        refusals.push(grpc.watch_tokens(client.request(watch)).await.unwrap_err());
        for (account, upstream_code) in [(account.as_str(), "61003"), ("acme", &account)] {
            let report = ReportRejectedTokenRequest {
                account: account.to_owned(),
                generation: token.generation,
                upstream_code: upstream_code.to_owned(),
            };
            let answer = grpc.report_rejected_token(client.request(report)).await;
            refusals.extend(answer.err());
        }
    }

    // The upstream: answers with a token that cannot be used, and a refused secret.
    for answer in [
        Answer::TruncatedJson,
        Answer::BrokenOff,
        Answer::PastExpiry,
        Answer::FarFutureExpiry,
        Answer::ExpiresInDuration,
        Answer::HugeBody,
        Answer::IssueThenReset,
        Answer::Html,
        Answer::Refuse { status: 401, code: "61099".to_owned() },
        Answer::Issue,
    ] {
        let attempts = upstream.attempts("id-1");
        upstream.script("id-1", [answer]);
        sqlx::query("update accounts set reissue_requested_at = now() where name = 'acme'")
            .execute(&pool)
            .await
            .unwrap();
        eventually("an attempt", async || (upstream.attempts("id-1") > attempts).then_some(()))
            .await;
        if let Some(token) = upstream.live_token("id-1") {
            canaries.add_token(&token);
        }
    }
    eventually("a live token", async || {
        let served = client.get("acme").await.ok()?.access_token;
        (upstream.live_token("id-1")? == served).then(|| canaries.add_token(&served))
    })
    .await;

    for path in ["/metrics", "/readyz", "/livez", "/"] {
        outputs.push((path.to_owned(), http(setup.ops, "GET", path, "").await.1));
    }
    serve.signal(Signal::SIGTERM);
    assert_eq!(serve.wait().await.code(), Some(0));
    let logged = serve.stderr();
    for expected in [r#""level":"TRACE""#, r#""target":"h2::"#] {
        assert!(logged.contains(expected), "the log is as verbose as the test assumes");
    }
    outputs.push(("the log".to_owned(), logged));
    outputs.push(("standard output".to_owned(), serve.stdout()));
    let state = setup.directory.path().join("state");
    for arguments in [
        &["audit", "tail", "-n", "100000", "--json"][..],
        &["audit", "tail", "-n", "100000"],
        &["audit", "export"],
        &["audit", "verify", "--json"],
        &["audit", "verify", "--journal", state.to_str().unwrap()],
        &["audit", "who"],
        &["audit", "who", "--json"],
        &["audit", "ship", state.to_str().unwrap()],
        &["keys", "public", "--signing"],
        &["keys", "status"],
    ] {
        let ran = run(setup.command(arguments), &token.access_token).await;
        assert_eq!(ran.code, Some(0), "{ran:?}");
        outputs.push((arguments.join(" "), ran.stdout + &ran.stderr));
    }
    outputs.extend(
        refusals.iter().map(|status| ("a status".to_owned(), format!("{status:?} {status}"))),
    );
    let mistaken: i64 = sqlx::query_scalar(
        "select count(*) from audit_events
         where account ~ '(eyJ.|tbk_|SK[.]c)…$' or detail ->> 'upstream_code' ~ '…$'",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert_eq!(mistaken, 4 * 4, "the calls with a secret in the wrong place are recorded");
    outputs.extend(dump(&pool).await);
    outputs.push(("the server's log".to_owned(), log_without_statements(&postgres)));

    for (output, text) in &outputs {
        canaries.assert_absent(output, text.as_bytes());
    }
    canaries.assert_absent_below(setup.directory.path(), &["keyring"]);
    pool.close().await;
    postgres.stop().await;
}

#[tokio::test]
async fn a_refused_value_is_in_no_error_and_in_the_postgres_log_only_as_part_of_the_statement() {
    let postgres = start_embedded_postgres().await;
    let url = postgres.url(DATABASE);
    Database::new(&url, "test").unwrap().migrate().await.unwrap();
    let mut connection = PgConnection::connect(&url).await.unwrap();
    // The embedded server logs less than others do by default.
    for setting in ["set log_min_error_statement = 'error'", "set log_error_verbosity = 'verbose'"]
    {
        sqlx::raw_sql(setting).execute(&mut connection).await.unwrap();
    }
    let canaries = Canaries([SECRET.to_owned()].into());
    let values = |name: &str, client_id: &str, secret: &str| {
        format!(
            "insert into accounts (name, client_id, client_secret)
             values ('{name}', '{client_id}', '{secret}')"
        )
    };
    let acme = values("acme", "id-1", SECRET);
    sqlx::raw_sql(AssertSqlSafe(acme)).execute(&mut connection).await.unwrap();

    let columns: Vec<String> = sqlx::query_scalar(
        "select column_name::text from information_schema.columns
         where table_schema = 'public' and table_name = 'accounts' and is_nullable = 'NO'",
    )
    .fetch_all(&mut connection)
    .await
    .unwrap();
    assert!(columns.iter().any(|column| column == "created_at"), "{columns:?}");
    let mut statements = vec![
        values("acme", "id-2", SECRET),
        values("other", "id-1", SECRET),
        values("Other", "id-2", SECRET),
        values("other", "far too long for an id", SECRET),
        values("other", "id-2", &format!("{SECRET}-and-more")),
        values("other", "id-2", &format!("a {SECRET}")),
        values("other", "id-2", &format!("sealed:{SECRET}")),
        format!("update accounts set client_secret = '{SECRET}-and-more'"),
        format!("update accounts set id = default, client_secret = '{SECRET}'"),
        format!("update accounts set description = repeat('x', 1001), client_secret = '{SECRET}'"),
    ];
    let refused = statements.len();
    for column in columns {
        statements.push(format!("update accounts set {column} = null, client_secret = '{SECRET}'"));
        let others = [("name", "'other'"), ("client_id", "'id-2'")];
        let others = others.iter().filter(|(other, _)| *other != column);
        let (names, values): (Vec<_>, Vec<_>) = others.copied().unzip();
        statements.push(format!(
            "insert into accounts ({column}, client_secret, {}) overriding system value
             values (null, '{SECRET}', {})",
            names.join(", "),
            values.join(", "),
        ));
    }
    for (n, statement) in statements.into_iter().enumerate() {
        let mut transaction = connection.begin().await.unwrap();
        let done = sqlx::raw_sql(AssertSqlSafe(statement.clone())).execute(&mut *transaction).await;
        transaction.rollback().await.unwrap();
        // Some of the nulls are replaced by valid values instead of being refused.
        assert!(done.is_err() || n >= refused, "{statement}");
        if let Err(error) = done {
            canaries.assert_absent(&statement, format!("{error:?}").as_bytes());
        }
    }

    let log = fs::read(postgres.directory().join("log")).unwrap();
    assert!(
        String::from_utf8_lossy(&log).contains(SECRET),
        "statements are logged, as the test assumes"
    );
    canaries.assert_absent("the server's log", log_without_statements(&postgres).as_bytes());
    connection.close().await.unwrap();
    postgres.stop().await;
}
