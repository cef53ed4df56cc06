//! The client of a broker for the commands `token` and `agent`, and errors that tell the user what to do.

use std::{fmt, time::Duration};

use token_broker_client::{ErrorKind, TokenClient};
use url::Url;

use super::{output, time::brief};
use crate::{
    config::ClientSettings,
    domain::{loopback::is_loopback_host, printable::printable},
};

/// Returns a client for these settings, which connects when it is first used.
///
/// The bearer's file is read again when it changes. A bearer without encryption is sent, with a warning.
pub(super) fn client(settings: &ClientSettings) -> anyhow::Result<TokenClient> {
    let mut builder = TokenClient::builder().allow_plaintext_bearer();
    for url in &settings.endpoints {
        builder = builder.endpoint(with_port(url));
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

/// Returns the endpoint with its port, which a parsed URL lacks if its scheme implies it.
fn with_port(url: &Url) -> String {
    let (host, port) = (url.host_str().unwrap_or_default(), url.port_or_known_default());
    format!("{}://{host}:{}", url.scheme(), port.unwrap_or_default())
}

fn is_loopback(url: &Url) -> bool {
    url.host_str().is_some_and(is_loopback_host)
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
        let hint = hint(error.reason(), error.retry_after()).or_else(|| {
            // Without a reason, the broker did not answer.
            let is_away = error.reason().is_none() && error.kind() == ErrorKind::Unavailable;
            is_away.then(|| connection_hint(error.message(), settings))
        });
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
fn hint(reason: Option<&str>, retry_after: Option<Duration>) -> Option<String> {
    if let Some(advice) = reason.and_then(advice) {
        return Some(advice.to_owned());
    }
    retry_after.map(|wait| format!("try again in {}", brief(wait)))
}

/// Returns what may be wrong with a connection that failed with `why`, the text of the libraries for TLS and HTTP/2.
/// A text that is not known leads to the general hint.
fn connection_hint(why: &str, settings: &ClientSettings) -> String {
    let endpoints: Vec<_> = settings.endpoints.iter().map(with_port).collect();
    let endpoints = endpoints.join(" or ");
    let says = |parts: &[&str]| parts.iter().any(|part| why.contains(part));
    if says(&["UnknownIssuer", "BadSignature"]) {
        return match &settings.ca_file {
            Some(file) => format!(
                "the broker's certificate does not come from a CA in {}: set TOKEN_BROKER_CA_FILE to its CA",
                file.display()
            ),
            None => "the system does not trust the CA of the broker's certificate: set TOKEN_BROKER_CA_FILE \
                     to that CA"
                .into(),
        };
    }
    if says(&["not valid for name", "NotValidForName"]) {
        return "TOKEN_BROKER_ENDPOINT must have a host name that is in the broker's certificate"
            .into();
    }
    if says(&["certificate expired", "Expired", "not valid yet", "NotValidYet"]) {
        return "an admin replaces the broker's certificate, unless the clock of this machine is wrong".into();
    }
    if says(&["CertificateRequired"]) {
        return "the broker requires a client certificate: set TOKEN_BROKER_CLIENT_CERT and \
                TOKEN_BROKER_CLIENT_KEY"
            .into();
    }
    if says(&["fatal alert"]) {
        return "the broker does not accept the connection's certificate or version of TLS: its log says why"
            .into();
    }
    if says(&["cannot resolve"]) {
        return "is the host name in TOKEN_BROKER_ENDPOINT right?".into();
    }
    if says(&["Connection refused"]) {
        return format!("is a broker running at {endpoints}?");
    }
    if settings.endpoints.iter().all(|url| url.scheme() == "https") {
        let general =
            format!("is a broker with TLS running at {endpoints}? One without TLS needs http://");
        // A broker that closes the connection may have said why too late to be heard.
        let certificate = ", and one that requires a client certificate needs \
                           TOKEN_BROKER_CLIENT_CERT and TOKEN_BROKER_CLIENT_KEY";
        general + if settings.identity.is_none() { certificate } else { "" }
    } else {
        format!("is a broker without TLS running at {endpoints}? One with TLS needs https://")
    }
}

/// Returns what an admin or the caller can do about an error with this reason.
fn advice(reason: &str) -> Option<&'static str> {
    Some(match reason {
        "CREDENTIAL_MISSING" => {
            "set TOKEN_BROKER_BEARER_FILE to the file that holds your bearer, or TOKEN_BROKER_CLIENT_CERT and \
             TOKEN_BROKER_CLIENT_KEY to a certificate"
        }
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
            hint: hint(reason, None),
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
            let hint = hint(reason, wait);
            assert_eq!(hint.as_deref(), Some("try again in 3s"));
        }
    }

    #[test]
    fn an_endpoint_keeps_the_port_that_its_scheme_implies() {
        for url in ["https://broker:443", "http://broker:80", "https://[::1]:50051"] {
            assert_eq!(with_port(&url.parse().unwrap()), url);
        }
    }
}
