//! The gRPC face: proto ↔ domain.

pub mod audit;
mod connection;
mod held;
pub mod identity;
mod public;
pub mod server;
pub mod status;
mod watch;

use std::{sync::Arc, time::Duration};

use audit::{AuditLayer, AuditService, CallContext};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use prost_types::Timestamp as ProtoTimestamp;
use public::Public;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, service::Routes};

use crate::{
    api::proto::{
        self, GetTokenRequest, GetTokenResponse, ListAccountsRequest, ListAccountsResponse,
        ReportRejectedTokenRequest, ReportRejectedTokenResponse, WatchTokensRequest,
        WatchTokensResponse,
        account::State,
        report_rejected_token_response::Outcome,
        token_service_server::{TokenService, TokenServiceServer},
    },
    audit::{journal::Journal, record::sanitize_requested_name},
    domain::{
        account::AccountName,
        caller::AccountPattern,
        clock::Timestamp,
        refresh_state::AccountState,
        token::{Generation, Token},
    },
    services::token_provider::{Listed, Refusal, ReportOutcome, TokenProvider, TokenRequest},
};

/// The longest request message that is read, in bytes; a `WatchTokens` for a thousand accounts fits.
const LONGEST_MESSAGE: usize = 64 * 1024;
/// How many names or patterns one stream may watch.
const MOST_PATTERNS: usize = 1_000;
/// Accounts a page when the request does not say, and at most.
const PAGE: usize = 100;
const LONGEST_PAGE: usize = 1_000;

/// The service, as tonic calls it.
pub struct TokenServer {
    /// The use case.
    pub broker: TokenProvider,
    /// Records what streams push.
    pub journal: Journal,
    /// Told with every token.
    pub api_base_url: Arc<str>,
}

/// Everything that the gRPC port serves: the recorded service, health, and reflection.
///
/// # Errors
/// When the descriptor set cannot be read: a fault of the build.
pub fn routes(
    server: TokenServer,
    desk: Arc<AuditLayer>,
) -> Result<(Routes, tonic_health::server::HealthReporter), tonic_reflection::server::Error> {
    let (health_reporter, health) = tonic_health::server::health_reporter();
    let descriptors = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let service = TokenServiceServer::new(server).max_decoding_message_size(LONGEST_MESSAGE);
    let health = health.max_decoding_message_size(public::LONGEST_REQUEST);
    let first = descriptors().build_v1()?.max_decoding_message_size(public::LONGEST_REQUEST);
    let second = descriptors().build_v1alpha()?.max_decoding_message_size(public::LONGEST_REQUEST);
    let routes = Routes::new(AuditService::new(service, desk))
        .add_service(Public(health))
        .add_service(Public(first))
        .add_service(Public(second))
        .prepare();
    Ok((routes, health_reporter))
}

#[tonic::async_trait]
impl TokenService for TokenServer {
    async fn get_token(
        &self,
        request: Request<GetTokenRequest>,
    ) -> Result<Response<GetTokenResponse>, Status> {
        let context = context(&request)?;
        let request = request.into_inner();
        let draft = &context.draft;
        draft.account(&request.account);
        let answer = async {
            let account = account_name(&request.account)?;
            let ask = TokenRequest {
                min_ttl: min_ttl(request.min_ttl)?,
                newer_than: generation(request.newer_than_generation),
            };
            let token =
                self.broker.get_token(&context.caller, &account, ask, context.deadline).await?;
            Ok((account, token))
        };
        let (account, token) = answer.await.map_err(|refusal| draft.refuse(refusal))?;
        draft.token(&token);
        Ok(Response::new(token_response(&self.broker, &self.api_base_url, &account, &token)))
    }

    type WatchTokensStream = ReceiverStream<Result<WatchTokensResponse, Status>>;

    async fn watch_tokens(
        &self,
        request: Request<WatchTokensRequest>,
    ) -> Result<Response<Self::WatchTokensStream>, Status> {
        let context = context(&request)?;
        let accounts = request.into_inner().accounts;
        let draft = &context.draft;
        draft.accounts(&accounts);
        let patterns = patterns(&accounts).map_err(|refusal| draft.refuse(refusal))?;
        let stream = watch::start(self, &context, patterns)
            .await
            .map_err(|refusal| draft.refuse(refusal))?;
        Ok(Response::new(stream))
    }

    async fn report_rejected_token(
        &self,
        request: Request<ReportRejectedTokenRequest>,
    ) -> Result<Response<ReportRejectedTokenResponse>, Status> {
        let context = context(&request)?;
        let request = request.into_inner();
        let draft = &context.draft;
        draft.account(&request.account);
        draft.note("reported_generation", &request.generation.to_string());
        draft.note("upstream_code", &sanitize_requested_name(&request.upstream_code));
        let answer = async {
            let account = account_name(&request.account)?;
            let ReportRejectedTokenRequest { generation, upstream_code, .. } = &request;
            self.broker.report(&context.caller, &account, *generation, upstream_code).await
        };
        let outcome = answer.await.map_err(|refusal| draft.refuse(refusal))?;
        let (outcome, retry_after) = match outcome {
            ReportOutcome::Reissuing { retry_after, .. } => (Outcome::Reissuing, Some(retry_after)),
            ReportOutcome::AlreadyReplaced => (Outcome::AlreadyReplaced, None),
            ReportOutcome::TooSoon { retry_after } => (Outcome::TooSoon, Some(retry_after)),
            ReportOutcome::NotATokenFault => (Outcome::NotATokenFault, None),
        };
        draft.note("report", outcome.as_str_name());
        Ok(Response::new(ReportRejectedTokenResponse {
            outcome: outcome.into(),
            retry_after: retry_after.map(proto_duration),
        }))
    }

    async fn list_accounts(
        &self,
        request: Request<ListAccountsRequest>,
    ) -> Result<Response<ListAccountsResponse>, Status> {
        let context = context(&request)?;
        let request = request.into_inner();
        let page = page(&request).map_err(|refusal| context.draft.refuse(refusal))?;
        let (accounts, more) = self
            .broker
            .list(&context.caller, page.after.as_ref(), page.size)
            .map_err(|refusal| context.draft.refuse(refusal))?;
        let next_page_token = accounts
            .last()
            .filter(|_| more)
            .map(|last| URL_SAFE_NO_PAD.encode(last.name.as_str()))
            .unwrap_or_default();
        Ok(Response::new(ListAccountsResponse {
            accounts: accounts.iter().map(proto_account).collect(),
            next_page_token,
        }))
    }
}

/// Whether a call of `path` is answered with a stream, which lasts for as long as its client wants.
fn is_stream(path: &str) -> bool {
    const STREAMS: [&str; 3] = ["WatchTokens", "Watch", "ServerReflectionInfo"];
    path.rsplit('/').next().is_some_and(|method| STREAMS.contains(&method))
}

/// What the layer put beside the request.
fn context<T>(request: &Request<T>) -> Result<CallContext, Status> {
    request
        .extensions()
        .get::<CallContext>()
        .cloned()
        .ok_or_else(|| Status::internal("the call was not admitted"))
}

fn account_name(name: &str) -> Result<AccountName, Refusal> {
    name.parse().map_err(|error: crate::domain::account::Invalid| Refusal::Invalid {
        field: "account",
        description: error.to_string(),
    })
}

/// A generation that a caller sent; one beyond ours is later than all of ours.
fn generation(sent: u64) -> Generation {
    Generation(i64::try_from(sent).unwrap_or(i64::MAX))
}

fn min_ttl(sent: Option<prost_types::Duration>) -> Result<Duration, Refusal> {
    let Some(sent) = sent else { return Ok(Duration::ZERO) };
    match (u64::try_from(sent.seconds), u32::try_from(sent.nanos)) {
        (Ok(seconds), Ok(nanos)) if nanos < 1_000_000_000 => Ok(Duration::new(seconds, nanos)),
        _ => Err(Refusal::Invalid {
            field: "min_ttl",
            description: "must be a duration that is not negative".into(),
        }),
    }
}

fn patterns(accounts: &[String]) -> Result<Vec<AccountPattern>, Refusal> {
    let invalid = |description: String| Refusal::Invalid { field: "accounts", description };
    if accounts.is_empty() {
        return Err(invalid("name at least one account or pattern".into()));
    }
    if accounts.len() > MOST_PATTERNS {
        return Err(invalid(format!("at most {MOST_PATTERNS} names or patterns a stream")));
    }
    accounts
        .iter()
        .map(|pattern| {
            pattern
                .parse()
                .map_err(|error: crate::domain::account::Invalid| invalid(error.to_string()))
        })
        .collect()
}

struct Page {
    after: Option<AccountName>,
    size: usize,
}

fn page(request: &ListAccountsRequest) -> Result<Page, Refusal> {
    let size = match usize::try_from(request.page_size) {
        Ok(0) => PAGE,
        Ok(size) => size.min(LONGEST_PAGE),
        Err(_) => {
            return Err(Refusal::Invalid {
                field: "page_size",
                description: "must not be negative".into(),
            });
        }
    };
    if request.page_token.is_empty() {
        return Ok(Page { after: None, size });
    }
    let after = URL_SAFE_NO_PAD
        .decode(&request.page_token)
        .ok()
        .and_then(|name| String::from_utf8(name).ok())
        .and_then(|name| name.parse().ok())
        .ok_or(Refusal::Invalid {
            field: "page_token",
            description: "is none that this service gave".into(),
        })?;
    Ok(Page { after: Some(after), size })
}

fn token_response(
    broker: &TokenProvider,
    api_base_url: &str,
    account: &AccountName,
    token: &Token,
) -> GetTokenResponse {
    let now = broker.clock.now();
    GetTokenResponse {
        access_token: token.access_token.expose().to_owned(),
        expires_at: Some(proto_timestamp(token.expires_at)),
        generation: token.generation.as_u64(),
        issued_at: Some(proto_timestamp(token.issued_at)),
        reuse_for: Some(proto_duration(broker.reuse_for(account, token))),
        expires_in: Some(proto_duration(token.time_left(now))),
        allowed_ip: token.allowed_ip.clone().unwrap_or_default(),
        api_base_url: api_base_url.to_owned(),
    }
}

fn proto_account(listed: &Listed) -> proto::Account {
    let state = match listed.state {
        AccountState::Pending => State::Pending,
        AccountState::Fresh => State::Fresh,
        AccountState::Refreshing => State::Refreshing,
        AccountState::Expired => State::Expired,
        AccountState::Rejected => State::Rejected,
        AccountState::EgressRejected => State::EgressRejected,
        AccountState::Unreachable => State::Unreachable,
        AccountState::Disabled => State::Disabled,
    };
    proto::Account {
        name: listed.name.to_string(),
        state: state.into(),
        issued_at: listed.token.map(|(issued_at, ..)| proto_timestamp(issued_at)),
        expires_at: listed.token.map(|(_, expires_at, _)| proto_timestamp(expires_at)),
        generation: listed.token.map_or(0, |(.., generation)| generation.as_u64()),
        next_attempt_at: listed.next_attempt_at.map(proto_timestamp),
    }
}

fn proto_timestamp(at: Timestamp) -> ProtoTimestamp {
    ProtoTimestamp {
        seconds: at.timestamp(),
        nanos: i32::try_from(at.timestamp_subsec_nanos()).unwrap_or_default(),
    }
}

/// A pause in the proto's terms; the domain's pauses are far from its limits.
fn proto_duration(pause: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(pause.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(pause.subsec_nanos()).unwrap_or_default(),
    }
}
