//! The client of a broker for the commands `token` and `agent`, and errors that tell the user what to do.

use std::{fmt, time::Duration};

use token_broker_client::{ErrorKind, TokenClient};
use url::Url;

use super::{output, time::brief};
use crate::{config::ClientSettings, domain::printable::printable};

/// Returns a client for these settings, which connects when it is first used.
///
/// The bearer's file is read again when it changes. A bearer without encryption is sent, with a warning.
pub(super) fn client(settings: &ClientSettings) -> anyhow::Result<TokenClient> {
    let mut builder = TokenClient::builder().allow_plaintext_bearer();
    for url in &settings.endpoints {
        builder = builder.endpoint(url.as_str());
    }
    match (&settings.bearer, &settings.bearer_file) {
        (Some(_), Some(file)) => builder = builder.bearer_file(file),
        (Some(bearer), None) => builder = builder.bearer(bearer.expose()),
        (None, _) => {}
    }
    // The files may be set for other brokers.
    if settings.endpoints.iter().all(|url| url.scheme() == "https") {
        if let Some(file) = &settings.ca_file {
            builder = builder.ca_file(file);
        }
        if let Some((cert, key)) = &settings.identity {
            builder = builder.client_certificate(cert, key);
        }
    } else if settings.bearer.is_some() && !settings.endpoints.iter().all(is_loopback) {
        output::note("warning: the bearer and the token are sent unencrypted");
    }
    builder.build().map_err(|error| anyhow::anyhow!("{}", error.message()))
}

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
        Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
        Some(url::Host::Domain(name)) => name == "localhost",
        None => false,
    }
}

/// Why a call failed, with a hint that says what to do.
#[derive(Debug)]
pub(super) struct CallError {
    code: &'static str,
    reason: Option<String>,
    message: String,
    hint: Option<String>,
}

impl CallError {
    pub(super) fn new(error: &token_broker_client::Error, settings: &ClientSettings) -> Self {
        let hint = hint(error.kind(), error.reason(), error.retry_after(), &settings.endpoints);
        Self {
            code: error.code().unwrap_or(error.kind().name()),
            reason: error.reason().map(ToOwned::to_owned),
            message: error.message().to_owned(),
            hint,
        }
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code)?;
        if let Some(reason) = &self.reason {
            write!(f, " ({})", printable(reason))?;
        }
        write!(f, ": {}", printable(&self.message))?;
        self.hint.as_ref().map_or(Ok(()), |hint| write!(f, "\nhint: {hint}"))
    }
}

impl std::error::Error for CallError {}

/// Returns what the user can do about an error.
fn hint(
    kind: ErrorKind,
    reason: Option<&str>,
    retry_after: Option<Duration>,
    endpoints: &[Url],
) -> Option<String> {
    if let Some(advice) = reason.and_then(advice) {
        return Some(advice.to_owned());
    }
    match retry_after {
        Some(wait) => Some(format!("try again in {}", brief(wait))),
        None if reason.is_none() && kind == ErrorKind::Unavailable => {
            let endpoints: Vec<_> = endpoints.iter().map(Url::as_str).collect();
            Some(format!("is a broker running at {}?", endpoints.join(" or ")))
        }
        None => None,
    }
}

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
    use super::*;

    #[test]
    fn an_error_is_printed_with_its_status_its_reason_and_a_hint() {
        let reason = Some("NOT_GRANTED");
        let error = CallError {
            code: "PERMISSION_DENIED",
            reason: reason.map(Into::into),
            message: "no grant covers it".into(),
            hint: hint(ErrorKind::NotGranted, reason, None, &[]),
        };
        assert_eq!(
            error.to_string(),
            "PERMISSION_DENIED (NOT_GRANTED): no grant covers it\n\
             hint: an admin grants it with `caller grant CALLER ACCOUNT`"
        );
    }

    #[test]
    fn an_error_with_a_retry_delay_says_when_to_try_again() {
        let wait = Some(Duration::from_micros(2_151_003));
        for reason in [None, Some("CALLER_RATE")] {
            let hint = hint(ErrorKind::Overloaded, reason, wait, &[]);
            assert_eq!(hint.as_deref(), Some("try again in 3s"));
        }
    }

    #[test]
    fn an_unreachable_broker_leads_to_a_question_about_its_address() {
        let endpoints = ["http://127.0.0.1:1", "http://127.0.0.1:2"].map(|it| it.parse().unwrap());
        let hint = hint(ErrorKind::Unavailable, None, None, &endpoints).unwrap();
        assert_eq!(hint, "is a broker running at http://127.0.0.1:1/ or http://127.0.0.1:2/?");
    }
}
