//! A broker in this process, on ports of its own, with a simulated upstream and a database.

use std::{sync::Arc, time::Duration};

use sqlx::Row;
use tempfile::TempDir;
use token_broker::{
    api::proto::{GetTokenRequest, GetTokenResponse, token_service_client::TokenServiceClient},
    app::{App, AppConfig, StartError},
    config::{DatabaseUrl, Settings},
    crypto::{Keyring, bearer::Bearer},
    dev::simulator::{Faults, Options, Simulator},
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

use super::{database::TestDatabase, eventually};

/// The world of a test: an upstream that knows the logins `id-1` … `id-9` with the secrets
/// `SK.1` … `SK.9`, an empty database, a keyring, a state directory.
pub(crate) struct World {
    pub(crate) database: TestDatabase,
    pub(crate) upstream: Simulator,
    pub(crate) keyring: Arc<Keyring>,
    pub(crate) clock: Clock,
    pub(crate) state: TempDir,
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::with(Clock::System, Faults::default()).await
    }

    pub(crate) async fn with(clock: Clock, faults: Faults) -> Self {
        // For whoever looks for the reason of a failure: RUST_LOG says how much to tell.
        let _ = tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_test_writer()
            .try_init();
        let options = Options { accounts: vec![], faults, clock: clock.clone() };
        let upstream = Simulator::start_on_loopback(options).await.unwrap();
        for n in 1..=9 {
            upstream.add_account(&format!("id-{n}"), &format!("SK.{n}"));
        }
        Self {
            database: TestDatabase::new().await,
            upstream,
            keyring: Arc::new(Keyring::parse(&Keyring::generate(clock.now())).unwrap()),
            clock,
            state: TempDir::new().unwrap(),
        }
    }

    /// What a broker of this world is made of; a test changes what it wants otherwise.
    pub(crate) fn plan(&self) -> AppConfig {
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
                deadline_default: super::PATIENCE,
                deadline_max: super::PATIENCE,
                drain: Duration::from_secs(10),
                ..local.settings
            },
            ..local
        }
    }

    pub(crate) async fn start(&self) -> Broker {
        self.start_with(self.plan()).await
    }

    pub(crate) async fn start_with(&self, plan: AppConfig) -> Broker {
        let listen = async || TcpListener::bind("127.0.0.1:0").await.unwrap();
        let app = App::start(plan, listen().await, listen().await, &CancellationToken::new())
            .await
            .unwrap();
        Broker { app }
    }

    /// A caller with the grants `patterns`, all rights; its bearer.
    pub(crate) async fn caller(&self, name: &str, patterns: &[&str]) -> Bearer {
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

    /// Registers an account as an admin would.
    pub(crate) async fn register(&self, name: &str, client_id: &str, secret: &str) {
        self.database
            .sql(&format!(
                "insert into accounts (name, client_id, client_secret)
                 values ('{name}', '{client_id}', '{secret}')"
            ))
            .await;
    }

    /// One column of an account's status, as text.
    pub(crate) async fn status(&self, account: &str, column: &str) -> String {
        let query =
            format!("select coalesce({column}::text, '') from account_status where name = $1");
        sqlx::query_scalar(sqlx::AssertSqlSafe(query))
            .bind(account)
            .fetch_one(self.database.pool())
            .await
            .unwrap()
    }

    /// Waits until the account is in `state`.
    pub(crate) async fn until_state(&self, account: &str, state: &str) {
        eventually(&format!("{account} {state}"), async || {
            (self.status(account, "state").await == state).then_some(())
        })
        .await;
    }

    /// The audit events that match, as `event/caller/account/outcome/reason`, in order.
    pub(crate) async fn audit(&self, where_: &str) -> Vec<String> {
        let query = format!(
            "select concat_ws('/', event, coalesce(caller, '-'), coalesce(account, '-'), outcome,
                 coalesce(reason, '-'))
             from audit_events where {where_} order by at, chain, seq"
        );
        sqlx::query_scalar(sqlx::AssertSqlSafe(query))
            .fetch_all(self.database.pool())
            .await
            .unwrap()
    }
}

/// Starts with `plan`, which must fail; the words.
pub(crate) async fn refused(plan: AppConfig) -> String {
    let listen = async || TcpListener::bind("127.0.0.1:0").await.unwrap();
    let give_up = CancellationToken::new();
    let started = App::start(plan, listen().await, listen().await, &give_up).await;
    match started {
        Ok(_) => panic!("it started"),
        Err(error @ StartError::Stopped) => panic!("{error}"),
        Err(error) => format!("{:#}", anyhow::Error::from(error)),
    }
}

/// A broker that runs in this process.
pub(crate) struct Broker {
    pub(crate) app: App,
}

impl Broker {
    pub(crate) async fn client(&self, bearer: &Bearer) -> Client {
        Client::connect(&format!("http://{}", self.app.grpc_address), bearer).await
    }

    pub(crate) async fn stop(self) {
        self.app.stop().await;
    }
}

/// A caller's connection.
#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) grpc: TokenServiceClient<Channel>,
    authorization: MetadataValue<Ascii>,
}

impl Client {
    pub(crate) async fn connect(endpoint: &str, bearer: &Bearer) -> Self {
        let grpc = TokenServiceClient::connect(endpoint.to_owned()).await.unwrap();
        let authorization = format!("Bearer {}", bearer.expose()).parse().unwrap();
        Self { grpc, authorization }
    }

    /// `message` with the caller's bearer.
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
        let answer = self.grpc.clone().get_token(self.request(request)).await?;
        Ok(answer.into_inner())
    }
}

/// A status as `CODE REASON`.
pub(crate) fn refusal(status: &Status) -> String {
    let details = status.get_error_details();
    let reason = details.error_info().map(|info| info.reason.clone()).unwrap_or_default();
    format!("{:?} {reason}", status.code()).trim_end().to_owned()
}
