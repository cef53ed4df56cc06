//! The client of the upstream: one fixed host, one call, and the classes of its failures.
//!
//! Nothing is logged here, and no message quotes the upstream, whose answer may repeat the secret that it
//! was sent.

mod issue_error;
pub mod rcs;
mod target;

use std::{
    io, iter,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use bytes::Bytes;
use http::{StatusCode, header};
use reqwest::{Proxy, redirect};
use thiserror::Error;
use url::Url;
use zeroize::Zeroizing;

pub use self::{
    issue_error::IssueError,
    rcs::MAX_BODY,
    target::{LoopbackUrl, Target, TargetError},
};
use crate::domain::{
    account::ClientId, clock::Clock, refresh_state::FailureClass, secret::ClientSecret,
    token::IssuedToken,
};

/// The settings of the client.
#[derive(Clone)]
pub struct UpstreamSettings {
    /// The upstream to call.
    pub target: Target,
    /// The local address to call from, for a machine with several addresses of which only one is registered
    /// with the upstream.
    pub bind_address: Option<IpAddr>,
    /// An explicit forward proxy, `http` or `https`, possibly with a user and password. Proxies from the
    /// environment are never used.
    pub proxy: Option<Url>,
    /// The time limit of one attempt, connecting included. Connecting may take half of it, so that an
    /// attempt without a connection is known to have sent nothing.
    pub timeout: Duration,
}

/// Why the client cannot be set up. No message shows a URL, since a proxy's URL may hold a password.
#[derive(Debug, Error)]
pub enum UpstreamSetupError {
    /// The proxy's URL has no host or a scheme other than `http` and `https`.
    #[error("the upstream's proxy must be an http:// or https:// URL with a host")]
    Proxy,
    /// The upstream is on this machine and the proxy is not: secrets would leave the machine.
    #[error("the upstream is on loopback, so its proxy must be on loopback too")]
    ProxyLeavesLoopback,
    /// TLS cannot be set up, for example because the system has no root certificates.
    #[error(
        "the upstream's client cannot be set up: are the system's root certificates installed?"
    )]
    Tls(#[source] reqwest::Error),
}

/// A client that issues tokens, each over a connection of its own. Cheap to clone.
#[derive(Clone)]
pub struct UpstreamClient {
    http: reqwest::Client,
    token_url: String,
    timeout: Duration,
    clock: Clock,
}

impl UpstreamClient {
    /// Returns a client that calls `settings.target` and no other host, whatever the upstream answers and
    /// whatever the environment holds. It connects when it is first used.
    ///
    /// # Errors
    /// [`UpstreamSetupError`] if the proxy cannot be used or TLS has no root certificates.
    pub fn new(settings: UpstreamSettings, clock: Clock) -> Result<Self, UpstreamSetupError> {
        let UpstreamSettings { target, bind_address, proxy, timeout } = settings;
        let mut http = builder(timeout).https_only(!target.is_loopback());
        if target.is_loopback() {
            // `localhost` means this machine, whatever the resolver says. Port 0 stands for the URL's.
            let localhost: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
            http = http.resolve_to_addrs("localhost", &localhost.map(|ip| SocketAddr::new(ip, 0)));
        }
        let tls = target.base_url().starts_with("https://")
            || proxy.as_ref().is_some_and(|proxy| proxy.scheme() == "https");
        if !tls {
            // A bare container has no root certificates, and none are needed here.
            http = http.tls_certs_only([]);
        }
        if let Some(proxy) = proxy {
            http = http.proxy(forward_proxy(&proxy, &target)?);
        }
        Ok(Self {
            http: http
                .local_address(bind_address)
                .build()
                .map_err(|error| UpstreamSetupError::Tls(error.without_url()))?,
            token_url: format!("{}/token", target.base_url()),
            timeout,
            clock,
        })
    }

    /// Requests a new token, with one request that is never repeated here.
    ///
    /// Not cancel safe: if the future is dropped, the upstream may have issued a token that is lost.
    ///
    /// # Errors
    /// [`IssueError`], whose class says what may be tried next.
    pub async fn issue(
        &self,
        id: &ClientId,
        secret: &ClientSecret,
    ) -> Result<IssuedToken, IssueError> {
        let sent = self.clock.now();
        let mut response = self
            .http
            .post(&self.token_url)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::ACCEPT, "application/json")
            // Without it, any coding would be permitted.
            .header(header::ACCEPT_ENCODING, "identity")
            .header(header::CONNECTION, "close")
            .body(Bytes::from_owner(rcs::request_body(id, secret)))
            .send()
            .await
            .map_err(|error| self.not_answered(&error))?;
        // The time is taken before the body is read, which may arrive late: the upstream has just written
        // `Date`.
        let now = self.clock.now();
        let (body, fault) = self.read_body(&mut response).await;
        let status = response.status();
        let utc_ahead = self.clock.utc_ahead();
        let answer = rcs::read(status, response.headers(), &body, sent, now, utc_ahead);
        match (answer, fault) {
            (Err(error), Some(fault))
                if status.is_success() && error.class == FailureClass::Malformed =>
            {
                Err(fault)
            }
            // What did not arrive might name another cause than the status does.
            (Err(mut error), Some(fault)) if !status.is_success() && error.code.is_none() => {
                error.message = rcs::with_unread_cause(&error.message, &fault);
                Err(error)
            }
            // A JSON object says itself where it ends, so one that is whole lacks nothing, whatever came of the
            // connection. And the status of a refusal is enough to classify it.
            (answer, _) => answer,
        }
    }

    /// Checks that the upstream can be reached, without a login: connects, through the proxy if there is
    /// one, completes TLS, and requests the API's root without a credential. Returns the status of the
    /// answer, whatever it is.
    ///
    /// # Errors
    /// [`IssueError`], whose message names the step that failed.
    pub async fn probe(&self) -> Result<StatusCode, IssueError> {
        let root = self.token_url.trim_end_matches("/token");
        let answer = self.http.head(root).send().await;
        Ok(answer.map_err(|error| self.not_answered(&error))?.status())
    }

    /// Reads the body, and returns what arrived of it. If that is not all, the second value says why.
    async fn read_body(
        &self,
        response: &mut reqwest::Response,
    ) -> (Zeroizing<Vec<u8>>, Option<IssueError>) {
        // The capacity suffices: growing would leave a copy of a token behind in memory.
        let mut body = Zeroizing::new(Vec::with_capacity(MAX_BODY));
        let fault = loop {
            match response.chunk().await {
                Ok(None) => return (body, None),
                Ok(Some(chunk)) if body.len() + chunk.len() > MAX_BODY => {
                    body.clear();
                    break IssueError::malformed("the upstream's answer is longer than 64 KiB");
                }
                Ok(Some(chunk)) => body.extend_from_slice(&chunk),
                Err(error) if error.is_timeout() => {
                    break IssueError::unanswered(self.timed_out());
                }
                Err(_) => break IssueError::malformed("the upstream's answer broke off"),
            }
        };
        (body, Some(fault))
    }

    fn not_answered(&self, error: &reqwest::Error) -> IssueError {
        if error.is_connect() {
            return IssueError::unsent(format!(
                "the upstream cannot be reached: {}",
                connect_fault(error)
            ));
        }
        if error.is_builder() {
            return IssueError::unsent("the upstream's request cannot be built");
        }
        if error.is_timeout() {
            return IssueError::unanswered(self.timed_out());
        }
        if is_unreadable(error) {
            return IssueError::malformed("the head of the upstream's answer is not valid HTTP");
        }
        IssueError::unanswered("the upstream ended the connection without an answer")
    }

    fn timed_out(&self) -> String {
        let limit = humantime::format_duration(self.timeout);
        format!("the upstream did not answer within {limit}")
    }
}

/// The most headers of an answer. Gateways add their own, and a token in an answer that is not read is lost.
const MAX_HEADERS: usize = 1_000;

/// Returns a builder with the settings of every client of the upstream. reqwest's defaults would follow
/// redirects, use the environment's proxies, and send `Referer`.
///
/// No connection is used twice. Between two calls, a firewall or the upstream may forget a connection that was
/// kept, and then a request over it is lost without a trace of whether it arrived: the account waits for the
/// minimum issue interval, for nothing. A new connection costs some work and round trips, a few
/// times an hour for each account; ARCHITECTURE.md has the figure.
///
/// Heads of answers that are not quite HTTP are read, since nothing follows them on the connection for which
/// they could be mistaken.
#[expect(
    clippy::disallowed_methods,
    reason = "the only place that builds a client of the upstream"
)]
fn builder(timeout: Duration) -> reqwest::ClientBuilder {
    reqwest::Client::builder()
        .user_agent(concat!("token-broker/", env!("CARGO_PKG_VERSION")))
        .http1_only()
        .http1_allow_obsolete_multiline_headers_in_responses(true)
        .http1_allow_spaces_after_header_name_in_responses(true)
        .http1_ignore_invalid_headers_in_responses(true)
        .http1_max_headers(MAX_HEADERS)
        .pool_max_idle_per_host(0)
        .redirect(redirect::Policy::none())
        .retry(reqwest::retry::never())
        .referer(false)
        .no_proxy()
        .timeout(timeout)
        .connect_timeout(timeout / 2)
}

fn forward_proxy(proxy: &Url, target: &Target) -> Result<Proxy, UpstreamSetupError> {
    if !matches!(proxy.scheme(), "http" | "https") || !proxy.has_host() {
        return Err(UpstreamSetupError::Proxy);
    }
    if target.is_loopback() && !target::is_loopback(proxy) {
        return Err(UpstreamSetupError::ProxyLeavesLoopback);
    }
    Proxy::all(proxy.clone()).map_err(|_| UpstreamSetupError::Proxy)
}

/// Returns why no connection was made, in as much detail as helps an operator.
fn connect_fault(error: &reqwest::Error) -> &'static str {
    if error.is_dns() {
        return "its name cannot be resolved";
    }
    let mut through_proxy = false;
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        // A failed proxy tunnel is recognised by its text, since the type of its error is private.
        through_proxy |= error.to_string().starts_with("tunnel error");
        if let Some(error) = error.downcast_ref::<io::Error>() {
            if let Some(fault) = io_fault(error) {
                return fault;
            }
            // `source` of an I/O error skips the error that it wraps.
            cause = error.get_ref().map(|inner| inner as _);
        } else {
            cause = error.source();
        }
    }
    match (error.is_timeout(), through_proxy) {
        (true, _) => "connecting took too long",
        (false, true) => "the proxy did not open a tunnel to it",
        (false, false) => "no connection",
    }
}

/// Returns whether there was an answer whose head cannot be read.
fn is_unreadable(error: &reqwest::Error) -> bool {
    let error: &(dyn std::error::Error + 'static) = error;
    iter::successors(Some(error), |error| error.source())
        .any(|error| error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_parse))
}

fn io_fault(error: &io::Error) -> Option<&'static str> {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match (tls, error.kind()) {
        (Some(rustls::Error::InvalidCertificate(_)), _) => Some("its certificate is not accepted"),
        (Some(_), _) => Some("the TLS handshake failed"),
        (None, io::ErrorKind::ConnectionRefused) => Some("connection refused"),
        (None, io::ErrorKind::ConnectionReset) => Some("connection reset"),
        (None, io::ErrorKind::AddrNotAvailable) => {
            Some("the local address to call from is not this machine's")
        }
        (None, io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable) => {
            Some("no route to it")
        }
        (None, _) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(target: &str, proxy: Option<&str>) -> UpstreamSettings {
        UpstreamSettings {
            target: target.parse().unwrap(),
            bind_address: None,
            proxy: proxy.map(|url| url.parse().unwrap()),
            timeout: Duration::from_secs(1),
        }
    }

    #[test]
    fn a_proxy_must_be_http_and_on_loopback_if_the_target_is() {
        let client =
            |target, proxy| UpstreamClient::new(settings(target, Some(proxy)), Clock::System);
        let loopback = "http://127.0.0.1:9";
        assert!(client(loopback, "http://127.0.0.1:3128").is_ok());
        assert!(matches!(client(loopback, "socks5://127.0.0.1:1"), Err(UpstreamSetupError::Proxy)));
        assert!(matches!(
            client(loopback, "http://canary:canary@proxy.example:3128"),
            Err(UpstreamSetupError::ProxyLeavesLoopback)
        ));
    }

    #[test]
    fn the_known_hosts_are_called_at_their_token_path() {
        for target in ["production", "staging"] {
            let client = UpstreamClient::new(settings(target, None), Clock::System).unwrap();
            assert!(client.token_url.starts_with("https://api"), "{}", client.token_url);
            assert!(client.token_url.ends_with(".rcsbizcenter.com/api/1.1/token"));
        }
    }
}
