//! The settings of `serve` and `check`.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use ipnet::IpNet;

use super::{
    commands::required_database,
    parse,
    reader::{Reader, read},
    sources::{InvalidSettings, Sources},
    table::{
        AUDIT_RETENTION, AUDIT_SYNC, CALLER_RATE, CHANGE_RETENTION, DEADLINE_DEFAULT, DEADLINE_MAX,
        DRAIN, EXPECTED_EGRESS, JOURNAL_MAX_BYTES, KEYRING_FILE, LISTEN, LOG_FORMAT,
        MAX_AUTHORIZATION_STALENESS, MIN_ISSUE_INTERVAL, NEW_TOKEN_ENDS_OLDER, OPS_LISTEN,
        PLAINTEXT, PROXY_PROTOCOL_FROM, REFRESH_AT, STATE_DIR, TLS_CERT, TLS_CLIENT_CA,
        TLS_CLIENT_CRL, TLS_KEY, TRUST_DOMAIN, UPSTREAM, UPSTREAM_BIND_ADDRESS,
        UPSTREAM_CONCURRENCY, UPSTREAM_PROXY, UPSTREAM_RATE, UPSTREAM_TIMEOUT,
    },
    urls::{DatabaseUrl, ProxyUrl},
};
use crate::{
    audit::journal::SyncMode,
    domain::{
        loopback::is_loopback_address, plausible_time::LONGEST_UPSTREAM_TIMEOUT,
        refresh_policy::RefreshPolicy,
    },
    telemetry::LogFormat,
    tls::TlsFiles,
    upstream::{Target, UpstreamSettings},
};

const MILLISECOND: Duration = Duration::from_millis(1);
const HOUR: Duration = Duration::from_hours(1);
const YEAR: Duration = Duration::from_hours(24 * 366);

/// The settings of `serve`. The constant of the same name in [`table`](super::table) says what each field
/// means and what its default is.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the table documents each setting, once")]
pub struct Settings {
    pub database_url: DatabaseUrl,
    pub listen: SocketAddr,
    pub ops_listen: SocketAddr,
    pub state_dir: PathBuf,
    pub keyring_file: PathBuf,
    pub upstream: Target,
    pub upstream_bind_address: Option<IpAddr>,
    pub upstream_proxy: Option<ProxyUrl>,
    pub expected_egress: Vec<IpNet>,
    pub new_token_ends_older: bool,
    pub refresh_at: f64,
    pub min_issue_interval: Duration,
    pub upstream_timeout: Duration,
    /// In calls a second.
    pub upstream_rate: f64,
    pub upstream_concurrency: usize,
    pub audit_sync: SyncMode,
    /// `None` means without limit.
    pub audit_retention: Option<Duration>,
    /// `None` means without limit.
    pub change_retention: Option<Duration>,
    pub journal_max_bytes: u64,
    /// In calls a second.
    pub caller_rate: u32,
    pub deadline_default: Duration,
    pub deadline_max: Duration,
    pub drain: Duration,
    pub max_authorization_staleness: Duration,
    pub plaintext: bool,
    /// The files of `tls_cert`, `tls_key`, `tls_client_ca` and `tls_client_crl`. Without them gRPC is served in plain
    /// text.
    pub tls: Option<TlsFiles>,
    pub trust_domain: Option<String>,
    pub proxy_protocol_from: Vec<IpNet>,
    pub log_format: Option<LogFormat>,
}

/// The path of the upstream's API.
const API_PATH: &str = "/api/1.1";

impl Settings {
    /// Reads every setting from `sources`. Also returns warnings, one line each, for environment variables that begin
    /// with the broker's prefix and are not settings, and for values that are hardly what was meant.
    ///
    /// # Errors
    /// Lists everything that is wrong: missing and malformed values, unknown keys of the file, and
    /// settings that contradict each other.
    pub fn resolve(sources: &Sources) -> Result<(Self, Vec<String>), InvalidSettings> {
        let settings = read(sources, |reader| {
            let settings = Self::read(reader);
            settings.refuse_contradictions(reader);
            settings
        })?;
        let mut warnings = sources.warnings();
        warnings.extend(settings.warning_of_upstream());
        Ok((settings, warnings))
    }

    /// Returns a warning if the upstream's URL is hardly what was meant. A database belongs to the upstream with which a
    /// broker was first started on it.
    fn warning_of_upstream(&self) -> Option<String> {
        let is_complete =
            !self.upstream.is_loopback() || self.upstream.base_url().ends_with(API_PATH);
        (!is_complete).then(|| {
            format!(
                "{}: the URL does not end in {API_PATH}, as that of `simulate` does; a database that belongs to no \
                 upstream yet is bound to it",
                UPSTREAM.env()
            )
        })
    }

    /// Returns the required settings and the state directory as given, and all others with their defaults.
    /// Reads neither flags nor the environment nor a file.
    #[must_use]
    pub fn with_defaults(
        database_url: DatabaseUrl,
        keyring_file: PathBuf,
        upstream: Target,
        state_dir: PathBuf,
    ) -> Self {
        let defaults = Self::read(&mut Reader::new(&Sources::empty()));
        Self { database_url, state_dir, keyring_file, upstream, ..defaults }
    }

    /// Returns the settings of the upstream's client.
    #[must_use]
    pub fn upstream_client(&self) -> UpstreamSettings {
        UpstreamSettings {
            target: self.upstream.clone(),
            bind_address: self.upstream_bind_address,
            proxy: self.upstream_proxy.clone().map(|proxy| proxy.0),
            timeout: self.upstream_timeout,
        }
    }

    /// Returns the rules that decide when a token is replaced.
    #[must_use]
    pub fn refresh_policy(&self) -> RefreshPolicy {
        RefreshPolicy { refresh_at: self.refresh_at, min_issue_interval: self.min_issue_interval }
    }

    fn read(reader: &mut Reader<'_>) -> Self {
        use parse::{address, boolean, bytes, duration, number, path, rate};
        Self {
            database_url: required_database(reader),
            listen: reader.or_default(&LISTEN, address),
            ops_listen: reader.or_default(&OPS_LISTEN, address),
            state_dir: reader.or_default(&STATE_DIR, path),
            keyring_file: reader.required(&KEYRING_FILE, path),
            upstream: reader.required(&UPSTREAM, parse::target),
            upstream_bind_address: reader.optional(&UPSTREAM_BIND_ADDRESS, parse::ip),
            upstream_proxy: reader.optional(&UPSTREAM_PROXY, parse::proxy),
            expected_egress: reader.optional(&EXPECTED_EGRESS, parse::networks).unwrap_or_default(),
            new_token_ends_older: reader.or_default(&NEW_TOKEN_ENDS_OLDER, boolean),
            refresh_at: reader.or_default(&REFRESH_AT, number(0.1, 0.9)),
            min_issue_interval: reader
                .or_default(&MIN_ISSUE_INTERVAL, duration(100 * MILLISECOND, 24 * HOUR)),
            upstream_timeout: reader.or_default(
                &UPSTREAM_TIMEOUT,
                duration(100 * MILLISECOND, LONGEST_UPSTREAM_TIMEOUT),
            ),
            upstream_rate: reader.or_default(&UPSTREAM_RATE, rate(0.01, 10_000.0)),
            upstream_concurrency: reader.or_default(&UPSTREAM_CONCURRENCY, number(1, 1_000)),
            audit_sync: reader.or_default(&AUDIT_SYNC, parse::audit_sync),
            audit_retention: reader.or_default(&AUDIT_RETENTION, parse::retention),
            change_retention: reader.or_default(&CHANGE_RETENTION, parse::retention),
            journal_max_bytes: reader.or_default(&JOURNAL_MAX_BYTES, bytes),
            caller_rate: reader.or_default(&CALLER_RATE, rate(1, 1_000_000)),
            deadline_default: reader.or_default(&DEADLINE_DEFAULT, duration(MILLISECOND, HOUR)),
            deadline_max: reader.or_default(&DEADLINE_MAX, duration(MILLISECOND, HOUR)),
            drain: reader.or_default(&DRAIN, duration(Duration::ZERO, HOUR)),
            max_authorization_staleness: reader
                .or_default(&MAX_AUTHORIZATION_STALENESS, duration(1_000 * MILLISECOND, YEAR)),
            plaintext: reader.or_default(&PLAINTEXT, boolean),
            tls: Self::read_tls(reader),
            trust_domain: reader.optional(&TRUST_DOMAIN, parse::trust_domain),
            proxy_protocol_from: reader
                .optional(&PROXY_PROTOCOL_FROM, parse::load_balancers)
                .unwrap_or_default(),
            log_format: reader.optional(&LOG_FORMAT, parse::log_format),
        }
    }

    /// Reads the paths of the TLS files. The certificate and the key must be set together, the callers' CAs
    /// only with them, and the lists of revoked certificates only with the CAs.
    fn read_tls(reader: &mut Reader<'_>) -> Option<TlsFiles> {
        let cert = reader.optional(&TLS_CERT, parse::path);
        let key = reader.optional(&TLS_KEY, parse::path);
        let client_ca = reader.optional(&TLS_CLIENT_CA, parse::path);
        let client_crl = reader.optional(&TLS_CLIENT_CRL, parse::path);
        if client_crl.is_some() && client_ca.is_none() {
            let fault = "set without TOKEN_BROKER_TLS_CLIENT_CA: it lists callers' certificates";
            reader.contradiction(&TLS_CLIENT_CRL, &TLS_CLIENT_CA, fault);
        }
        match (cert, key) {
            (Some(cert), Some(key)) => {
                return Some(TlsFiles { cert, key, client_ca, client_crl });
            }
            (Some(_), None) => reader.contradiction(&TLS_CERT, &TLS_KEY, "set without its key"),
            (None, Some(_)) => {
                reader.contradiction(&TLS_KEY, &TLS_CERT, "set without its certificate");
            }
            (None, None) if client_ca.is_some() => {
                let fault = "set without TOKEN_BROKER_TLS_CERT: callers' certificates need TLS";
                reader.contradiction(&TLS_CLIENT_CA, &TLS_CERT, fault);
            }
            (None, None) => {}
        }
        None
    }

    /// Reports settings that contradict each other although each of them is valid.
    fn refuse_contradictions(&self, reader: &mut Reader<'_>) {
        if !is_loopback_address(self.listen.ip()) && !self.plaintext && self.tls.is_none() {
            let fault = "beyond loopback without TLS; set TOKEN_BROKER_TLS_CERT and _KEY, or \
                         TOKEN_BROKER_PLAINTEXT=true to accept unencrypted calls";
            reader.contradiction(&LISTEN, &PLAINTEXT, fault);
        }
        if self.plaintext && self.tls.is_some() {
            reader.contradiction(
                &PLAINTEXT,
                &TLS_CERT,
                "set to true although TLS is configured by TOKEN_BROKER_TLS_CERT",
            );
        }
        if self.trust_domain.is_some() && self.tls.as_ref().is_none_or(|it| it.client_ca.is_none())
        {
            let fault = "set without TOKEN_BROKER_TLS_CLIENT_CA: SPIFFE IDs come from callers' \
                         certificates";
            reader.contradiction(&TRUST_DOMAIN, &TLS_CLIENT_CA, fault);
        }
        if self.listen.port() != 0 && self.listen == self.ops_listen {
            reader.contradiction(&OPS_LISTEN, &LISTEN, "the same address as that of gRPC");
        }
        let or_unlimited = |kept: Option<Duration>| kept.unwrap_or(Duration::MAX);
        if or_unlimited(self.change_retention) < or_unlimited(self.audit_retention) {
            reader.contradiction(
                &CHANGE_RETENTION,
                &AUDIT_RETENTION,
                "shorter than the retention of call records, TOKEN_BROKER_AUDIT_RETENTION",
            );
        }
        if self.deadline_default > self.deadline_max {
            reader.contradiction(
                &DEADLINE_DEFAULT,
                &DEADLINE_MAX,
                "longer than the longest deadline, TOKEN_BROKER_DEADLINE_MAX",
            );
        }
    }
}
