//! A client of the broker's gRPC service, whose errors tell the user what to do.

use std::{fmt, fs, path::Path, time::Duration};

use anyhow::Context;
use tonic::{
    Code, Request, Status, Streaming,
    metadata::{Ascii, MetadataValue},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};
use tonic_types::StatusExt;

use super::super::{output, time::brief};
use crate::{
    api::{
        grpc::status::outcome_of,
        proto::{
            GetTokenRequest, GetTokenResponse, WatchTokensRequest, WatchTokensResponse,
            token_service_client::TokenServiceClient,
        },
    },
    config::ClientSettings,
    domain::printable::printable,
    files::text,
};

/// How long connecting may take, and how long the client waits for the answer to a keepalive ping.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a keepalive ping is sent, so that a watch notices when the broker's machine has failed.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);

/// A connection to one broker as one caller.
pub(super) struct BrokerClient {
    client: TokenServiceClient<Channel>,
    authorization: Option<MetadataValue<Ascii>>,
    endpoint: String,
}

impl BrokerClient {
    /// Returns a client that connects when it is first called.
    pub(super) fn new(settings: &ClientSettings) -> anyhow::Result<Self> {
        let url = &settings.endpoint;
        let mut endpoint = Endpoint::from_shared(url.to_string())?
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(CONNECT_TIMEOUT);
        if url.scheme() == "https" {
            endpoint = endpoint.tls_config(tls(settings)?)?;
        } else if settings.bearer.is_some() && !is_loopback(url) {
            output::note("warning: the bearer and the token are sent unencrypted");
        }
        let authorization = settings.bearer.as_ref().map(|bearer| {
            MetadataValue::try_from(format!("Bearer {}", bearer.expose())).map(|mut value| {
                value.set_sensitive(true);
                value
            })
        });
        Ok(Self {
            client: TokenServiceClient::new(endpoint.connect_lazy()),
            authorization: authorization.transpose()?,
            endpoint: url.to_string(),
        })
    }

    /// Gets a token. `timeout` becomes the deadline of the call.
    pub(super) async fn get_token(
        &mut self,
        message: GetTokenRequest,
        timeout: Duration,
    ) -> Result<GetTokenResponse, CallError> {
        let mut request = self.request(message);
        request.set_timeout(timeout);
        let answer = self.client.get_token(request).await;
        answer.map(tonic::Response::into_inner).map_err(|status| self.error(&status))
    }

    /// Starts a watch.
    pub(super) async fn watch_tokens(
        &mut self,
        message: WatchTokensRequest,
    ) -> Result<Streaming<WatchTokensResponse>, CallError> {
        let request = self.request(message);
        let answer = self.client.watch_tokens(request).await;
        answer.map(tonic::Response::into_inner).map_err(|status| self.error(&status))
    }

    /// Waits for the next message of a watch. Returns `None` when the broker has ended it.
    pub(super) async fn next(
        &self,
        stream: &mut Streaming<WatchTokensResponse>,
    ) -> Result<Option<WatchTokensResponse>, CallError> {
        stream.message().await.map_err(|status| self.error(&status))
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(authorization) = &self.authorization {
            request.metadata_mut().insert("authorization", authorization.clone());
        }
        request
    }

    fn error(&self, status: &Status) -> CallError {
        CallError::new(status, &self.endpoint)
    }
}

fn tls(settings: &ClientSettings) -> anyhow::Result<ClientTlsConfig> {
    let mut tls = ClientTlsConfig::new();
    tls = match &settings.ca_file {
        Some(path) => tls.ca_certificate(Certificate::from_pem(read(path)?)),
        None => tls.with_enabled_roots(),
    };
    if let Some((cert, key)) = &settings.identity {
        tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?));
    }
    Ok(tls)
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let read = fs::read(path).and_then(|bytes| Ok(text::to_utf8(bytes)?));
    Ok(read.with_context(|| format!("cannot read {}", path.display()))?.to_vec())
}

fn is_loopback(url: &url::Url) -> bool {
    match url.host() {
        Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
        Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
        Some(url::Host::Domain(name)) => name == "localhost",
        None => false,
    }
}

/// Why a call failed, with a hint that says what to do.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct CallError {
    code: String,
    reason: Option<String>,
    message: String,
    hint: Option<String>,
}

impl CallError {
    fn new(status: &Status, endpoint: &str) -> Self {
        let details = status.get_error_details();
        let info = details.error_info().filter(|info| info.domain == "token-broker");
        let reason = info.map(|info| info.reason.clone());
        let wait = details.retry_info().and_then(|retry| retry.retry_delay);
        let hint = match (reason.as_deref(), wait) {
            (Some(reason), _) if advice(reason).is_some() => advice(reason).map(Into::into),
            (_, Some(wait)) => Some(format!("try again in {}", brief(wait))),
            (None, None) if status.code() == Code::Unavailable => {
                Some(format!("is a broker running at {endpoint}?"))
            }
            _ => None,
        };
        Self {
            code: outcome_of(status.code()).to_uppercase(),
            reason,
            message: status.message().to_owned(),
            hint,
        }
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.code)?;
        if let Some(reason) = &self.reason {
            write!(f, " ({})", printable(reason))?;
        }
        write!(f, ": {}", printable(&self.message))?;
        self.hint.as_ref().map_or(Ok(()), |hint| write!(f, "\nhint: {hint}"))
    }
}

impl std::error::Error for CallError {}

/// Returns what an admin or the caller can do about an error with this reason.
fn advice(reason: &str) -> Option<&'static str> {
    Some(match reason {
        "CREDENTIAL_MISSING" => "set TOKEN_BROKER_BEARER_FILE to the file that holds your bearer",
        "BEARER_MALFORMED" => {
            "the bearer is incomplete or mistyped: it has 53 characters, with tbk_"
        }
        "CREDENTIAL_REFUSED" => {
            "the bearer or certificate is unknown, expired or revoked, or its caller is disabled: an \
             admin sees which with `caller show CALLER`"
        }
        "NOT_GRANTED" => "an admin grants it with `caller grant CALLER ACCOUNT`",
        "NO_SUCH_ACCOUNT" => "`account list` shows the registered accounts",
        "ACCOUNT_DISABLED" => "an admin enables it with `account enable`",
        "CREDENTIAL_REJECTED" => {
            "the upstream refuses the account's API KEY: an admin replaces it with `account rotate`"
        }
        "EGRESS_REJECTED" => {
            "the upstream refuses the broker's address or the account: `account show` says more"
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use tonic_types::ErrorDetails;

    use super::*;

    fn printed(code: Code, details: ErrorDetails) -> String {
        let status = Status::with_error_details(code, "no grant covers it", details);
        CallError::new(&status, "http://127.0.0.1:50051/").to_string()
    }

    #[test]
    fn an_error_is_printed_with_its_status_its_reason_and_a_hint() {
        let mut details = ErrorDetails::new();
        details.set_error_info("NOT_GRANTED", "token-broker", [("a".into(), "b".into())]);
        assert_eq!(
            printed(Code::PermissionDenied, details),
            "PERMISSION_DENIED (NOT_GRANTED): no grant covers it\n\
             hint: an admin grants it with `caller grant CALLER ACCOUNT`"
        );
    }

    #[test]
    fn an_error_with_a_retry_delay_says_when_to_try_again() {
        let mut details = ErrorDetails::new();
        details.set_retry_info(Some(Duration::from_micros(2_151_003)));
        let printed = printed(Code::ResourceExhausted, details);
        assert_eq!(printed, "RESOURCE_EXHAUSTED: no grant covers it\nhint: try again in 3s");
    }

    #[test]
    fn an_unreachable_broker_leads_to_a_question_about_its_address() {
        let printed = printed(Code::Unavailable, ErrorDetails::new());
        assert!(
            printed.ends_with("hint: is a broker running at http://127.0.0.1:50051/?"),
            "{printed}"
        );
    }
}
