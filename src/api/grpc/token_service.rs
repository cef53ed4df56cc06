//! The RPCs of `TokenService`: each checks its request, calls the token provider, and builds its response.
//! The audit layer has authenticated the caller before.

use std::{future::Future, sync::Arc};

use tonic::{Request, Response, Status};

use super::{
    audit::CallContext,
    convert::{self, PageRequest},
    watch,
};
use crate::{
    api::proto::{
        GetTokenRequest, GetTokenResponse, ListAccountsRequest, ListAccountsResponse,
        ReportRejectedTokenRequest, ReportRejectedTokenResponse, WatchTokensRequest,
        report_rejected_token_response::Outcome, token_service_server::TokenService,
    },
    audit::{journal::Journal, record::sanitize_requested_name},
    services::token_provider::{CallRefusal, ReportOutcome, TokenProvider, TokenRequest},
};

/// Implements the generated [`TokenService`] trait. Cheap to clone.
#[derive(Clone)]
pub struct TokenServiceHandler {
    /// The operations behind the RPCs.
    pub provider: TokenProvider,
    /// The audit log, for the tokens that streams push.
    pub journal: Journal,
    /// The base URL of the upstream's API, sent with every token.
    pub api_base_url: Arc<str>,
}

#[tonic::async_trait]
impl TokenService for TokenServiceHandler {
    async fn get_token(
        &self,
        request: Request<GetTokenRequest>,
    ) -> Result<Response<GetTokenResponse>, Status> {
        let context = context_of(&request)?;
        let request = request.into_inner();
        context.draft.set_account(&request.account);
        let (name, account, token) = noting_refusal(&context, async {
            let name = convert::account_name(&request.account)?;
            let wanted = TokenRequest {
                min_ttl: convert::min_ttl(request.min_ttl)?,
                newer_than: convert::generation(request.newer_than_generation),
            };
            let CallContext { caller, deadline, .. } = &context;
            let (account, token) =
                self.provider.get_token(caller, &name, wanted, *deadline).await?;
            // The call may have waited for the token, and credential, grant or account may have ended meanwhile.
            context.check_certificate()?;
            self.provider.authorize_again(&context.credential, &account, &token)?;
            Ok((name, account, token))
        })
        .await?;
        let provider = &self.provider;
        let response = convert::token_response(provider, &self.api_base_url, &name, &token);
        context.set_token(account, &token);
        Ok(Response::new(response))
    }

    type WatchTokensStream = watch::Events;

    async fn watch_tokens(
        &self,
        request: Request<WatchTokensRequest>,
    ) -> Result<Response<Self::WatchTokensStream>, Status> {
        let context = context_of(&request)?;
        let accounts = request.into_inner().accounts;
        context.draft.set_accounts(&accounts);
        let stream = noting_refusal(&context, async {
            let Self { provider, journal, api_base_url } = self.clone();
            let patterns = convert::patterns(&accounts)?;
            watch::start(provider, journal, api_base_url, &context, patterns).await
        });
        Ok(Response::new(stream.await?))
    }

    async fn report_rejected_token(
        &self,
        request: Request<ReportRejectedTokenRequest>,
    ) -> Result<Response<ReportRejectedTokenResponse>, Status> {
        let context = context_of(&request)?;
        let ReportRejectedTokenRequest { account, generation, upstream_code } =
            request.into_inner();
        context.draft.set_account(&account);
        context.draft.add_detail("reported_generation", &generation.to_string());
        context.draft.add_detail("upstream_code", &sanitize_requested_name(&upstream_code));
        let outcome = noting_refusal(&context, async {
            let account = convert::account_name(&account)?;
            self.provider
                .report_rejected_token(&context.caller, &account, generation, &upstream_code)
                .await
        })
        .await?;
        let (outcome, retry_after) = match outcome {
            ReportOutcome::Reissuing { retry_after, .. } => (Outcome::Reissuing, Some(retry_after)),
            ReportOutcome::AlreadyReplaced => (Outcome::AlreadyReplaced, None),
            ReportOutcome::TooSoon { retry_after } => (Outcome::TooSoon, Some(retry_after)),
            ReportOutcome::NotATokenFault => (Outcome::NotATokenFault, None),
        };
        context.draft.add_detail("report", outcome.as_str_name());
        Ok(Response::new(ReportRejectedTokenResponse {
            outcome: outcome.into(),
            retry_after: retry_after.map(convert::proto_duration),
        }))
    }

    async fn list_accounts(
        &self,
        request: Request<ListAccountsRequest>,
    ) -> Result<Response<ListAccountsResponse>, Status> {
        let context = context_of(&request)?;
        let request = request.into_inner();
        let (accounts, more) = noting_refusal(&context, async {
            let PageRequest { after, size } = convert::page_request(&request)?;
            self.provider.list(&context.caller, after.as_ref(), size).await
        })
        .await?;
        let last = accounts.last().filter(|_| more);
        Ok(Response::new(ListAccountsResponse {
            next_page_token: last.map(|last| convert::page_token(&last.name)).unwrap_or_default(),
            accounts: accounts
                .iter()
                .map(|account| convert::proto_account(&self.provider, account))
                .collect(),
        }))
    }
}

/// Returns the context that the audit layer put into the request.
fn context_of<T>(request: &Request<T>) -> Result<CallContext, Status> {
    request
        .extensions()
        .get::<CallContext>()
        .cloned()
        .ok_or_else(|| Status::internal("the call was not admitted"))
}

/// Runs `answer`. Notes its refusal in the call's record, and converts it to a status.
async fn noting_refusal<T>(
    context: &CallContext,
    answer: impl Future<Output = Result<T, CallRefusal>>,
) -> Result<T, Status> {
    answer.await.map_err(|refusal| context.draft.refuse(refusal))
}
