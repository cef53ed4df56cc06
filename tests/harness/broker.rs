//! A broker in this process, on ports of its own, with a simulated upstream and a database.

use std::{sync::Arc, time::Duration};

use sqlx::Row;
use tempfile::TempDir;
use token_broker::{
    api::proto::{GetTokenRequest, GetTokenResponse, token_service_client::TokenServiceClient},
    app::{App, AppConfig, StartError},
    config::{DatabaseUrl, Settings},
    crypto::{Keyring, bearer::Bearer},
    dev::simulator::{Faults, Simulator, SimulatorOptions},
    domain::clock::Clock,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    transport::Channel,
};
use tonic_types::StatusExt;

use super::{TEST_TIMEOUT, database::TestDatabase, eventually};

/// What a broker needs to run: an empty database with the published intake key, a simulated upstream, a keyring
/// and a state directory. The upstream has the accounts `id-1` to `id-9` with the secrets `SK.1` to `SK.9`.
pub(crate) struct Fixture {
    pub(crate) database: TestDatabase,
    pub(crate) upstream: Simulator,
    pub(crate) keyring: Arc<Keyring>,
    pub(crate) clock: Clock,
    pub(crate) state: TempDir,
}

impl Fixture {
    pub(crate) async fn new() -> Self {
        Self::with(Clock::System, Faults::default()).await
    }

    /// Creates a fixture whose broker and upstream take their time from `clock`.
    pub(crate) async fn with(clock: Clock, faults: Faults) -> Self {
        // With RUST_LOG set, the broker's log shows why a test fails. Only the first call in a
        // process has an effect.
        let _ = tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_test_writer()
            .try_init();
        let options = SimulatorOptions { accounts: vec![], faults, clock: clock.clone() };
        let upstream = Simulator::start_on_loopback(options).await.unwrap();
        for n in 1..=9 {
            upstream.add_account(&format!("id-{n}"), &format!("SK.{n}"));
        }
        let database = TestDatabase::new().await;
        let keyring = Keyring::parse(&Keyring::generate(clock.now())).unwrap();
        database.publish(&keyring.intake_public()).await;
        Self {
            database,
            upstream,
            keyring: Arc::new(keyring),
            clock,
            state: TempDir::new().unwrap(),
        }
    }

    /// Returns the configuration of a broker that uses this fixture. Limits that would slow tests
    /// down are relaxed. A test changes the fields that matter to it.
    pub(crate) fn config(&self) -> AppConfig {
        let database = DatabaseUrl::new(self.database.url()).unwrap();
        let target = self.upstream.base_url().parse().unwrap();
        let (state, keyring) = (self.state.path().to_owned(), self.keyring.clone());
        let local = AppConfig::local(database, target, state, keyring);
        AppConfig {
            journal_segment_bytes: 1 << 20,
            clock: self.clock.clone(),
            settings: Settings {
                upstream_rate: 1_000.0,
                min_issue_interval: Duration::from_millis(100),
                journal_max_bytes: 1 << 30,
                caller_rate: 100_000,
                deadline_default: TEST_TIMEOUT,
                deadline_max: TEST_TIMEOUT,
                drain: Duration::from_secs(10),
                ..local.settings
            },
            ..local
        }
    }

    pub(crate) async fn start(&self) -> TestBroker {
        self.start_with(self.config()).await
    }

    /// Starts a broker with `config` on free ports of 127.0.0.1.
    pub(crate) async fn start_with(&self, config: AppConfig) -> TestBroker {
        TestBroker { app: start_app(config).await.unwrap() }
    }

    /// Adds a caller with all rights on the accounts that match `patterns`, and returns its bearer.
    pub(crate) async fn add_caller(&self, name: &str, patterns: &[&str]) -> Bearer {
        let bearer = Bearer::generate();
        let id: i64 = sqlx::query("insert into callers (name) values ($1) returning id")
            .bind(name)
            .fetch_one(self.database.pool())
            .await
            .unwrap()
            .get(0);
        sqlx::query(
            "insert into caller_credentials (caller_id, kind, bearer_sha256) values ($1, 'bearer', $2)",
        )
        .bind(id)
        .bind(bearer.sha256().as_slice())
        .execute(self.database.pool())
        .await
        .unwrap();
        for pattern in patterns {
            sqlx::query("insert into grants (caller_id, pattern) values ($1, $2)")
                .bind(id)
                .bind(pattern)
                .execute(self.database.pool())
                .await
                .unwrap();
        }
        bearer
    }

    /// Registers an account with the SQL statement that an admin would use.
    pub(crate) async fn add_account(&self, name: &str, client_id: &str, secret: &str) {
        self.database
            .sql(&format!(
                "insert into accounts (name, client_id, client_secret)
                 values ('{name}', '{client_id}', '{secret}')"
            ))
            .await;
    }

    /// Returns a column of the account's row in `account_status`, as text.
    pub(crate) async fn account_status(&self, account: &str, column: &str) -> String {
        let query =
            format!("select coalesce({column}::text, '') from account_status where name = $1");
        sqlx::query_scalar(sqlx::AssertSqlSafe(query))
            .bind(account)
            .fetch_one(self.database.pool())
            .await
            .unwrap()
    }

    /// Waits until `account_status` shows the account in `state`.
    pub(crate) async fn wait_for_state(&self, account: &str, state: &str) {
        eventually(&format!("{account} {state}"), async || {
            (self.account_status(account, "state").await == state).then_some(())
        })
        .await;
    }

    /// Returns the audit events that satisfy the SQL condition, in order, each as
    /// `event/caller/account/outcome/reason`.
    pub(crate) async fn audit_events(&self, condition: &str) -> Vec<String> {
        let query = format!(
            "select concat_ws('/', event, coalesce(caller, '-'), coalesce(account, '-'), outcome,
                 coalesce(reason, '-'))
             from audit_events where {condition} order by at, chain, seq"
        );
        sqlx::query_scalar(sqlx::AssertSqlSafe(query))
            .fetch_all(self.database.pool())
            .await
            .unwrap()
    }
}

async fn start_app(config: AppConfig) -> Result<App, StartError> {
    let listen = async || TcpListener::bind("127.0.0.1:0").await.unwrap();
    App::start(config, listen().await, listen().await, &CancellationToken::new()).await
}

/// Starts a broker with `config`, which must fail, and returns the error message.
pub(crate) async fn start_error(config: AppConfig) -> String {
    match start_app(config).await {
        Ok(_) => panic!("it started"),
        Err(error @ StartError::Stopped) => panic!("{error}"),
        Err(error) => format!("{:#}", anyhow::Error::from(error)),
    }
}

/// A broker that runs in this process.
pub(crate) struct TestBroker {
    pub(crate) app: App,
}

impl TestBroker {
    pub(crate) async fn client(&self, bearer: &Bearer) -> TestClient {
        TestClient::connect(&format!("http://{}", self.app.grpc_address), bearer).await
    }

    /// Stops the broker, and waits until it has stopped.
    pub(crate) async fn stop(self) {
        self.app.stop().await;
    }
}

/// A connection to a broker that sends a caller's bearer with each request.
#[derive(Clone)]
pub(crate) struct TestClient {
    pub(crate) grpc: TokenServiceClient<Channel>,
    authorization: MetadataValue<Ascii>,
}

impl TestClient {
    pub(crate) async fn connect(endpoint: &str, bearer: &Bearer) -> Self {
        let grpc = TokenServiceClient::connect(endpoint.to_owned()).await.unwrap();
        let authorization = format!("Bearer {}", bearer.expose()).parse().unwrap();
        Self { grpc, authorization }
    }

    /// Returns a request with `message` and the bearer.
    pub(crate) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", self.authorization.clone());
        request
    }

    pub(crate) async fn get(&self, account: &str) -> Result<GetTokenResponse, Status> {
        self.get_with(GetTokenRequest { account: account.into(), ..Default::default() }).await
    }

    pub(crate) async fn get_with(
        &self,
        request: GetTokenRequest,
    ) -> Result<GetTokenResponse, Status> {
        let response = self.grpc.clone().get_token(self.request(request)).await?;
        Ok(response.into_inner())
    }
}

/// Returns the code of a status and the reason in its `ErrorInfo`, separated by a space.
pub(crate) fn code_and_reason(status: &Status) -> String {
    let details = status.get_error_details();
    let reason = details.error_info().map(|info| info.reason.clone()).unwrap_or_default();
    format!("{:?} {reason}", status.code()).trim_end().to_owned()
}
