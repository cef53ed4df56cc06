//! Checks and converts the fields of requests, and builds responses.

use std::time::Duration;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use prost_types::{Duration as ProtoDuration, Timestamp as ProtoTimestamp};

use crate::{
    api::proto::{self, GetTokenResponse, ListAccountsRequest, account::State},
    domain::{
        account::{AccountName, InvalidValue},
        caller::AccountPattern,
        clock::Timestamp,
        refresh_state::AccountState,
        token::{Generation, Token},
    },
    services::token_provider::{CallRefusal, ListedAccount, TokenProvider},
};

/// How many names or patterns one stream may watch.
const MAX_PATTERNS: usize = 1_000;
/// The number of accounts on a page if the request names none.
const DEFAULT_PAGE_SIZE: usize = 100;
/// The largest number of accounts on a page. A request for more gets this many.
const MAX_PAGE_SIZE: usize = 1_000;

pub(super) fn account_name(name: &str) -> Result<AccountName, CallRefusal> {
    name.parse().map_err(|error: InvalidValue| invalid("account", error.to_string()))
}

/// Converts a generation that a client sent. A number beyond the range of stored generations becomes
/// `i64::MAX`, which is later than each of them.
pub(super) fn generation(sent: u64) -> Generation {
    Generation(i64::try_from(sent).unwrap_or(i64::MAX))
}

pub(super) fn min_ttl(sent: Option<ProtoDuration>) -> Result<Duration, CallRefusal> {
    let Some(sent) = sent else { return Ok(Duration::ZERO) };
    match (u64::try_from(sent.seconds), u32::try_from(sent.nanos)) {
        (Ok(seconds), Ok(nanos)) if nanos < 1_000_000_000 => Ok(Duration::new(seconds, nanos)),
        _ => Err(invalid("min_ttl", "must be a duration that is not negative")),
    }
}

pub(super) fn patterns(accounts: &[String]) -> Result<Vec<AccountPattern>, CallRefusal> {
    if accounts.is_empty() {
        return Err(invalid("accounts", "name at least one account or pattern"));
    }
    if accounts.len() > MAX_PATTERNS {
        let description = format!("at most {MAX_PATTERNS} names or patterns a stream");
        return Err(invalid("accounts", description));
    }
    let parse = |pattern: &String| {
        pattern.parse().map_err(|error: InvalidValue| invalid("accounts", error.to_string()))
    };
    accounts.iter().map(parse).collect()
}

/// The page of accounts that a client asks for.
pub(super) struct PageRequest {
    /// The last name on the previous page; `None` for the first page.
    pub(super) after: Option<AccountName>,
    /// The largest number of accounts on the page.
    pub(super) size: usize,
}

pub(super) fn page_request(request: &ListAccountsRequest) -> Result<PageRequest, CallRefusal> {
    let size = match usize::try_from(request.page_size) {
        Ok(0) => DEFAULT_PAGE_SIZE,
        Ok(size) => size.min(MAX_PAGE_SIZE),
        Err(_) => return Err(invalid("page_size", "must not be negative")),
    };
    if request.page_token.is_empty() {
        return Ok(PageRequest { after: None, size });
    }
    let after = URL_SAFE_NO_PAD
        .decode(&request.page_token)
        .ok()
        .and_then(|name| String::from_utf8(name).ok())
        .and_then(|name| name.parse().ok())
        .ok_or_else(|| invalid("page_token", "is not one that this service returned"))?;
    Ok(PageRequest { after: Some(after), size })
}

/// Returns the token of the page that follows the account `last`. It is opaque to clients.
pub(super) fn page_token(last: &AccountName) -> String {
    URL_SAFE_NO_PAD.encode(last.as_str())
}

fn invalid(field: &'static str, description: impl Into<String>) -> CallRefusal {
    CallRefusal::Invalid { field, description: description.into() }
}

pub(super) fn token_response(
    provider: &TokenProvider,
    api_base_url: &str,
    account: &AccountName,
    token: &Token,
) -> GetTokenResponse {
    let now = provider.clock.now();
    let utc = |time| proto_timestamp(provider.database_clock.to_utc(time));
    GetTokenResponse {
        access_token: token.access_token.expose().to_owned(),
        expires_at: Some(utc(token.expires_at)),
        generation: token.generation.as_u64(),
        issued_at: Some(utc(token.issued_at)),
        reuse_for: Some(proto_duration(provider.reuse_for(account, token))),
        expires_in: Some(proto_duration(token.time_left(now))),
        allowed_ip: token.allowed_ip.clone().unwrap_or_default(),
        api_base_url: api_base_url.to_owned(),
    }
}

pub(super) fn proto_account(provider: &TokenProvider, listed: &ListedAccount) -> proto::Account {
    let utc = |time| proto_timestamp(provider.database_clock.to_utc(time));
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
    let token = listed.token.as_ref();
    proto::Account {
        name: listed.name.to_string(),
        state: state.into(),
        issued_at: token.map(|token| utc(token.issued_at)),
        expires_at: token.map(|token| utc(token.expires_at)),
        generation: token.map_or(0, |token| token.generation.as_u64()),
        next_attempt_at: listed.next_attempt_at.map(utc),
    }
}

fn proto_timestamp(at: Timestamp) -> ProtoTimestamp {
    ProtoTimestamp {
        seconds: at.timestamp(),
        nanos: i32::try_from(at.timestamp_subsec_nanos()).unwrap_or_default(),
    }
}

/// Converts a duration. A duration beyond the range of the proto's type is clamped.
pub(super) fn proto_duration(duration: Duration) -> ProtoDuration {
    ProtoDuration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).unwrap_or_default(),
    }
}
