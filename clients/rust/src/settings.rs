//! Where the broker is, and how the caller identifies itself.

use std::{env, fmt, path::PathBuf, sync::Arc, time::Duration};

use tonic::transport::Endpoint;
use url::{Host, Url};

use crate::{
    broker::Broker,
    client::TokenClient,
    connections::Connect,
    credentials::{Bearer, TlsFiles},
    error::Error,
    files::shown,
};

/// How long `token` waits unless told otherwise.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);

/// The variables that [`TokenClientBuilder::from_env`] reads.
const ENDPOINT: &str = "TOKEN_BROKER_ENDPOINT";
const BEARER_FILE: &str = "TOKEN_BROKER_BEARER_FILE";
const CA_FILE: &str = "TOKEN_BROKER_CA_FILE";
const CLIENT_CERT: &str = "TOKEN_BROKER_CLIENT_CERT";
const CLIENT_KEY: &str = "TOKEN_BROKER_CLIENT_KEY";

/// The settings of a [`TokenClient`]. Its `Debug` output does not contain the bearer.
#[derive(Clone, Default)]
pub struct TokenClientBuilder {
    endpoints: Vec<String>,
    bearer: BearerSource,
    tls_files: TlsFiles,
    client_cert: Option<PathBuf>,
    client_key: Option<PathBuf>,
    allow_plaintext_bearer: bool,
    timeout: Option<Duration>,
    connect: Option<Connect>,
}

#[derive(Clone, Default)]
enum BearerSource {
    #[default]
    None,
    File(PathBuf),
    Fixed(String),
}

/// Settings that were checked.
pub(crate) struct Settings {
    pub(crate) endpoints: Arc<[Url]>,
    bearer: BearerSource,
    pub(crate) tls_files: TlsFiles,
    pub(crate) timeout: Duration,
    pub(crate) connect: Connect,
}

impl TokenClientBuilder {
    /// Returns settings from the environment: `TOKEN_BROKER_ENDPOINT` (several are separated by commas),
    /// `TOKEN_BROKER_BEARER_FILE`, `TOKEN_BROKER_CA_FILE`, `TOKEN_BROKER_CLIENT_CERT`, `TOKEN_BROKER_CLIENT_KEY`.
    #[must_use]
    pub fn from_env() -> Self {
        Self::from_variables(|name| env::var(name).ok())
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Self {
        let given = |name| variable(name).filter(|value| !value.is_empty());
        let file = |name| given(name).map(PathBuf::from);
        let endpoints = given(ENDPOINT).unwrap_or_default();
        Self {
            endpoints: endpoints
                .split(',')
                .map(|url| url.trim().to_owned())
                .filter(|url| !url.is_empty())
                .collect(),
            bearer: file(BEARER_FILE).map_or(BearerSource::None, BearerSource::File),
            tls_files: TlsFiles { ca: file(CA_FILE), identity: None },
            client_cert: file(CLIENT_CERT),
            client_key: file(CLIENT_KEY),
            ..Self::default()
        }
    }

    /// Adds a URL of the broker: `http://host:port` or `https://host:port`. Calls are spread over all URLs, and
    /// over all addresses of each host.
    #[must_use]
    pub fn endpoint(mut self, url: impl Into<String>) -> Self {
        self.endpoints.push(url.into());
        self
    }

    /// Sets the file with the caller's bearer. It is read again when it changes.
    #[must_use]
    pub fn bearer_file(mut self, file: impl Into<PathBuf>) -> Self {
        self.bearer = BearerSource::File(file.into());
        self
    }

    /// Sets the caller's bearer. Prefer [`bearer_file`](Self::bearer_file): a file can be replaced while the
    /// program runs.
    #[must_use]
    pub fn bearer(mut self, bearer: impl Into<String>) -> Self {
        self.bearer = BearerSource::Fixed(bearer.into());
        self
    }

    /// Sets the PEM file of the CAs that the broker's certificate must come from. Without it, the system's CAs are
    /// trusted. It is read again when it changes.
    #[must_use]
    pub fn ca_file(mut self, file: impl Into<PathBuf>) -> Self {
        self.tls_files.ca = Some(file.into());
        self
    }

    /// Sets the PEM files of the caller's certificate chain and of its key. They are read again when they change.
    #[must_use]
    pub fn client_certificate(mut self, cert: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        (self.client_cert, self.client_key) = (Some(cert.into()), Some(key.into()));
        self
    }

    /// Allows to send the bearer, and to receive tokens, without encryption to another host than this one.
    #[must_use]
    pub fn allow_plaintext_bearer(mut self) -> Self {
        self.allow_plaintext_bearer = true;
        self
    }

    /// Sets how long [`TokenClient::token`] waits. The default is 5 s.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Connects in another way than by TCP.
    #[cfg(test)]
    pub(crate) fn connect(mut self, connect: Connect) -> Self {
        self.connect = Some(connect);
        self
    }

    /// Returns the client. Reads the files, but opens no connection, so it does not fail when the broker is away.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) when the settings cannot be used.
    pub fn build(self) -> Result<TokenClient, Error> {
        Ok(TokenClient::new(Broker::new(self.check()?)?))
    }

    fn check(self) -> Result<Settings, Error> {
        let endpoints =
            self.endpoints.iter().map(|text| endpoint(text)).collect::<Result<Vec<_>, _>>();
        let endpoints = endpoints.map_err(Error::settings)?;
        let Some(first) = endpoints.first() else {
            return Err(Error::settings(format!("no endpoint is set: {ENDPOINT}, or `endpoint`")));
        };
        if endpoints.iter().any(|url| url.scheme() != first.scheme()) {
            return Err(Error::settings("the endpoints must all be http, or all be https"));
        }
        let mut tls_files = self.tls_files;
        tls_files.identity = match (self.client_cert, self.client_key) {
            (Some(cert), Some(key)) => Some((cert, key)),
            (None, None) => None,
            _ => {
                return Err(Error::settings(
                    "a client's certificate and its key must be set together",
                ));
            }
        };
        let is_plaintext = first.scheme() == "http";
        if is_plaintext && !tls_files.is_empty() {
            return Err(Error::settings("a CA or a certificate has no use without https"));
        }
        let has_bearer = !matches!(self.bearer, BearerSource::None);
        if is_plaintext
            && has_bearer
            && !self.allow_plaintext_bearer
            && let Some(url) = endpoints.iter().find(|url| !is_loopback(url))
        {
            return Err(Error::settings(format!(
                "the bearer would be sent to {url} without encryption: use https, or allow it with \
                 `allow_plaintext_bearer`"
            )));
        }
        Ok(Settings {
            endpoints: endpoints.into(),
            bearer: self.bearer,
            tls_files,
            timeout: self.timeout.unwrap_or(DEFAULT_TIMEOUT),
            connect: self.connect.unwrap_or_else(|| Arc::new(Endpoint::connect_lazy)),
        })
    }
}

impl Settings {
    /// Whether connections are encrypted.
    pub(crate) fn is_tls(&self) -> bool {
        self.endpoints.iter().any(|url| url.scheme() == "https")
    }

    /// Returns the caller's bearer, if it has one. Blocks on disk.
    pub(crate) fn bearer(&self) -> Result<Option<Bearer>, Error> {
        match &self.bearer {
            BearerSource::None => Ok(None),
            BearerSource::File(file) => Bearer::from_file(file.clone()).map(Some),
            BearerSource::Fixed(bearer) => Bearer::fixed(bearer).map(Some),
        }
    }
}

/// Parses an endpoint. The error does not quote it, because a URL may contain a password.
fn endpoint(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).ok().filter(|url| {
        matches!(url.scheme(), "http" | "https")
            && url.has_host()
            && names_a_port(text)
            && url.path() == "/"
            && url.query().is_none()
            && url.fragment().is_none()
            && url.username().is_empty()
            && url.password().is_none()
    });
    url.ok_or_else(|| "an endpoint must look like https://host:port".into())
}

/// Whether the URL in `text` has a port. A parsed URL does not tell: it lacks the port that its scheme implies.
fn names_a_port(text: &str) -> bool {
    let text = text.trim().trim_end_matches('/');
    let port = text.rsplit_once(':').map_or("", |(_, port)| port);
    !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit())
}

/// Whether the URL's host is this machine.
fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(ip)) => ip.is_loopback(),
        // The system takes `::ffff:127.0.0.1` for `127.0.0.1`.
        Some(Host::Ipv6(ip)) => ip.to_canonical().is_loopback(),
        Some(Host::Domain(name)) => name == "localhost",
        None => false,
    }
}

impl fmt::Debug for BearerSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::File(file) => f.debug_tuple("File").field(&shown(file)).finish(),
            Self::Fixed(_) => f.write_str("Fixed(_)"),
        }
    }
}

impl fmt::Debug for TokenClientBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // What is no endpoint may contain a password.
        let endpoints: Vec<_> = self.endpoints.iter().map(|text| endpoint(text).ok()).collect();
        let endpoints: Vec<_> =
            endpoints.iter().map(|url| url.as_ref().map_or("?", Url::as_str)).collect();
        f.debug_struct("TokenClientBuilder")
            .field("endpoints", &endpoints)
            .field("bearer", &self.bearer)
            .field("ca_file", &self.tls_files.ca.as_deref().map(shown))
            .field("client_cert", &self.client_cert.as_deref().map(shown))
            .field("client_key", &self.client_key.as_deref().map(shown))
            .field("allow_plaintext_bearer", &self.allow_plaintext_bearer)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let endpoints: Vec<_> = self.endpoints.iter().map(Url::as_str).collect();
        f.debug_struct("Settings")
            .field("endpoints", &endpoints)
            .field("bearer", &self.bearer)
            .field("tls_files", &self.tls_files)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(builder: TokenClientBuilder) -> String {
        builder.check().unwrap_err().message().to_owned()
    }

    #[test]
    fn the_debug_text_shows_no_secret_that_was_given_as_a_path() {
        let builder = TokenClient::builder()
            .bearer_file("tbk_canary")
            .ca_file("-----BEGIN canary")
            .client_certificate("canary", "canary");
        let text = format!("{builder:?}");
        assert!(!text.contains("canary") && text.contains("not shown"), "{text}");
    }

    #[test]
    fn endpoints_that_cannot_be_used_are_refused_without_quoting_them() {
        for text in [
            "host:50051",
            "ftp://host:1",
            "http://host:1/path",
            "http://u:canary@host:1",
            "http://",
            "",
            "http://host",
            "https://host:",
            "https://[::1]",
            "https://192.0.2.1/",
        ] {
            let refusal = refusal(TokenClientBuilder::default().endpoint(text));
            assert_eq!(refusal, "an endpoint must look like https://host:port", "{text}");
        }
        for text in ["http://host:80", "https://host:443/", "https://[::1]:443", "HTTPS://host:1"] {
            assert!(TokenClientBuilder::default().endpoint(text).check().is_ok(), "{text}");
        }
        assert!(refusal(TokenClientBuilder::default()).contains("no endpoint"));
        let mixed = TokenClientBuilder::default().endpoint("http://a:1").endpoint("https://b:1");
        assert!(refusal(mixed).contains("all be http"));
    }

    #[test]
    fn a_bearer_goes_in_plaintext_to_this_machine_only_unless_allowed() {
        let builder = |url: &str| TokenClientBuilder::default().endpoint(url).bearer("tbk_x");
        for url in [
            "http://127.0.0.1:1",
            "http://[::1]:1",
            "http://[::ffff:127.0.0.1]:1",
            "http://LOCALHOST:1",
            "https://b:1",
        ] {
            assert!(builder(url).check().is_ok(), "{url}");
        }
        for url in ["http://broker:1", "http://192.0.2.1:1", "http://localhost.example:1"] {
            assert!(refusal(builder(url)).contains("without encryption"), "{url}");
            assert!(builder(url).allow_plaintext_bearer().check().is_ok(), "{url}");
        }
    }

    #[test]
    fn a_certificate_needs_its_key_and_encryption() {
        let half = TokenClientBuilder { client_cert: Some("c".into()), ..Default::default() };
        assert!(refusal(half.endpoint("https://b:1")).contains("together"));
        let plaintext = TokenClientBuilder::default().ca_file("ca").endpoint("http://localhost:1");
        assert!(refusal(plaintext).contains("https"));
    }

    #[test]
    fn the_environment_may_name_several_endpoints() {
        let builder = TokenClientBuilder::from_variables(|name| {
            Some(match name {
                ENDPOINT => "https://a:1, https://b:2".into(),
                CLIENT_CERT => "cert".into(),
                CLIENT_KEY => "key".into(),
                _ => String::new(),
            })
        });
        let settings = builder.check().unwrap();
        let endpoints: Vec<_> = settings.endpoints.iter().map(Url::as_str).collect();
        assert_eq!(endpoints, ["https://a:1/", "https://b:2/"]);
        assert_eq!(settings.tls_files.identity, Some(("cert".into(), "key".into())));
        assert!(matches!(settings.bearer, BearerSource::None));
        assert_eq!(settings.timeout, DEFAULT_TIMEOUT);
    }

    #[test]
    fn no_text_form_contains_the_bearer() {
        let builder =
            TokenClientBuilder::default().endpoint("http://localhost:1").bearer("tbk_canary");
        let mistaken = builder.clone().endpoint("http://u:canary@host:1");
        let text = format!("{builder:?} {mistaken:?} {:?}", builder.clone().check().unwrap());
        assert!(!text.contains("canary"), "{text}");
    }
}
