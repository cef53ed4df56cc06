//! Settings: flags, environment and file, checked all at once.
//!
//! [`table`] has what settings there are; [`Sources`] what was said; [`Settings::resolve`] makes of
//! both either the whole or a [`Report`] of everything that is wrong.

mod flags;
mod parse;
mod reader;
mod sources;
pub mod table;

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use ipnet::IpNet;
use secrecy::{ExposeSecret, SecretString};
use url::Url;

pub use self::{
    flags::{Broker, Client, Flags, Group, Intake, Keys, Listen, Migrate},
    sources::{Report, Sources},
};
use self::{
    reader::{Reader, read},
    table::{
        AUDIT_RETENTION, AUDIT_SYNC, BEARER, CA_FILE, CALLER_RATE, CHANGE_RETENTION, CLIENT_CERT,
        CLIENT_KEY, DATABASE_URL, DEADLINE_DEFAULT, DEADLINE_MAX, DRAIN, ENDPOINT, EXPECTED_EGRESS,
        INTAKE_KEY, JOURNAL_MAX_BYTES, KEYRING_FILE, LISTEN, LOG_FORMAT,
        MAX_AUTHORIZATION_STALENESS, MIGRATE_DATABASE_URL, MIN_ISSUE_INTERVAL,
        NEW_TOKEN_ENDS_OLDER, OPS_LISTEN, PLAINTEXT, PROXY_PROTOCOL_FROM, REFRESH_AT, STATE_DIR,
        TLS_CERT, TLS_CLIENT_CA, TLS_KEY, TRUST_DOMAIN, UPSTREAM, UPSTREAM_BIND_ADDRESS,
        UPSTREAM_CONCURRENCY, UPSTREAM_PROXY, UPSTREAM_RATE, UPSTREAM_TIMEOUT,
    },
};
use crate::{
    crypto::{IntakePublicKey, bearer::Bearer},
    store::{Database, StoreError},
    telemetry::LogFormat,
    tls::TlsFiles,
    upstream::Target,
};

const MILLISECOND: Duration = Duration::from_millis(1);
const HOUR: Duration = Duration::from_hours(1);
const YEAR: Duration = Duration::from_hours(24 * 366);

/// A checked `postgresql://` URL. It may hold a password, so it is not printed.
#[derive(Clone, Debug)]
pub struct DatabaseUrl(SecretString);

impl DatabaseUrl {
    /// Takes a URL.
    ///
    /// # Errors
    /// Says what is wrong with the URL, never the URL.
    pub fn new(url: &str) -> Result<Self, String> {
        Database::new(url, "token-broker")
            .map_err(|_| "not a postgresql://user@host/database URL")?;
        Ok(Self(url.into()))
    }

    /// The database there, which will know its client as `application_name`.
    pub fn database(&self, application_name: &str) -> Result<Database, StoreError> {
        Database::new(self.0.expose_secret(), application_name)
    }
}

/// When an audit record counts as kept.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum AuditSync {
    /// On disk before the answer.
    Fsync,
    /// With the kernel before the answer.
    Write,
}

/// What `serve` runs by. The meaning and default of each field are those of its [`table`] entry.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the table says it, once")]
pub struct Settings {
    pub database_url: DatabaseUrl,
    pub listen: SocketAddr,
    pub ops_listen: SocketAddr,
    pub state_dir: PathBuf,
    pub keyring_file: PathBuf,
    pub upstream: Target,
    pub upstream_bind_address: Option<IpAddr>,
    /// May hold a password.
    pub upstream_proxy: Option<ProxyUrl>,
    pub expected_egress: Vec<IpNet>,
    pub new_token_ends_older: bool,
    pub refresh_at: f64,
    pub min_issue_interval: Duration,
    pub upstream_timeout: Duration,
    /// Calls a second.
    pub upstream_rate: f64,
    pub upstream_concurrency: usize,
    pub audit_sync: AuditSync,
    /// `None` is for ever.
    pub audit_retention: Option<Duration>,
    /// `None` is for ever.
    pub change_retention: Option<Duration>,
    pub journal_max_bytes: u64,
    /// Calls a second.
    pub caller_rate: u32,
    pub deadline_default: Duration,
    pub deadline_max: Duration,
    pub drain: Duration,
    pub max_authorization_staleness: Duration,
    pub plaintext: bool,
    /// What TLS is served with; without it, plain text.
    pub tls: Option<TlsFiles>,
    pub trust_domain: Option<String>,
    pub proxy_protocol_from: Vec<IpNet>,
    pub log_format: Option<LogFormat>,
}

/// A proxy's URL; its `Debug` leaves out all but the host and port.
#[derive(Clone, Eq, PartialEq)]
pub struct ProxyUrl(pub Url);

impl std::fmt::Debug for ProxyUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}:{:?}", self.0.host_str(), self.0.port_or_known_default())
    }
}

impl Settings {
    /// Reads every setting from `sources`. Beside them come warnings, a line each, for variables
    /// that look like the broker's and are none.
    ///
    /// # Errors
    /// All that is wrong, in one report.
    pub fn resolve(sources: &Sources) -> Result<(Self, Vec<String>), Report> {
        let settings = read(sources, |reader| {
            let settings = Self::read(reader);
            settings.refuse_contradictions(reader);
            settings
        })?;
        Ok((settings, sources.warnings()))
    }

    fn read(reader: &mut Reader<'_>) -> Self {
        use parse::{address, boolean, bytes, duration, number, path, rate};
        Self {
            database_url: reader.required(
                &DATABASE_URL,
                "postgresql://localhost/broker",
                DatabaseUrl::new,
            ),
            listen: reader.or_default(&LISTEN, address),
            ops_listen: reader.or_default(&OPS_LISTEN, address),
            state_dir: reader.or_default(&STATE_DIR, path),
            keyring_file: reader.required(&KEYRING_FILE, "/etc/token-broker/keyring", path),
            upstream: reader.required(&UPSTREAM, "staging", parse::target),
            upstream_bind_address: reader.optional(&UPSTREAM_BIND_ADDRESS, parse::ip),
            upstream_proxy: reader.optional(&UPSTREAM_PROXY, parse::proxy),
            expected_egress: reader.optional(&EXPECTED_EGRESS, parse::networks).unwrap_or_default(),
            new_token_ends_older: reader.or_default(&NEW_TOKEN_ENDS_OLDER, boolean),
            refresh_at: reader.or_default(&REFRESH_AT, number(0.1, 0.9)),
            min_issue_interval: reader
                .or_default(&MIN_ISSUE_INTERVAL, duration(100 * MILLISECOND, 24 * HOUR)),
            upstream_timeout: reader
                .or_default(&UPSTREAM_TIMEOUT, duration(100 * MILLISECOND, HOUR / 60)),
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
                .optional(&PROXY_PROTOCOL_FROM, parse::balancers)
                .unwrap_or_default(),
            log_format: reader.optional(&LOG_FORMAT, parse::log_format),
        }
    }

    /// Certificate and key go together, and callers' CAs with them.
    fn read_tls(reader: &mut Reader<'_>) -> Option<TlsFiles> {
        let cert = reader.optional(&TLS_CERT, parse::path);
        let key = reader.optional(&TLS_KEY, parse::path);
        let client_ca = reader.optional(&TLS_CLIENT_CA, parse::path);
        match (cert, key) {
            (Some(cert), Some(key)) => return Some(TlsFiles { cert, key, client_ca }),
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

    fn refuse_contradictions(&self, reader: &mut Reader<'_>) {
        if !self.listen.ip().is_loopback() && !self.plaintext && self.tls.is_none() {
            let fault = "beyond loopback without TLS; set TOKEN_BROKER_TLS_CERT and _KEY, or \
                         TOKEN_BROKER_PLAINTEXT=true to let callers in unencrypted";
            reader.contradiction(&LISTEN, &PLAINTEXT, fault);
        }
        if self.plaintext && self.tls.is_some() {
            reader.contradiction(
                &PLAINTEXT,
                &TLS_CERT,
                "both plain text and TLS, TOKEN_BROKER_TLS_CERT",
            );
        }
        if self.trust_domain.is_some() && self.tls.as_ref().is_none_or(|it| it.client_ca.is_none())
        {
            let fault =
                "without callers' certificates, TOKEN_BROKER_TLS_CLIENT_CA, nobody is in it";
            reader.contradiction(&TRUST_DOMAIN, &TLS_CLIENT_CA, fault);
        }
        if self.listen.port() != 0 && self.listen == self.ops_listen {
            reader.contradiction(&OPS_LISTEN, &LISTEN, "the same address as gRPC listens on");
        }
        let forever = |kept: Option<Duration>| kept.unwrap_or(Duration::MAX);
        if forever(self.change_retention) < forever(self.audit_retention) {
            reader.contradiction(
                &CHANGE_RETENTION,
                &AUDIT_RETENTION,
                "shorter than the records of calls are kept, TOKEN_BROKER_AUDIT_RETENTION",
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

/// Where a broker is called, and as whom.
#[derive(Clone, Debug)]
pub struct ClientSettings {
    /// The broker: scheme, host and port.
    pub endpoint: Url,
    /// The caller's secret, if it has one.
    pub bearer: Option<Bearer>,
    /// The CA of the broker's certificate; the system's without one.
    pub ca_file: Option<PathBuf>,
    /// The caller's certificate chain and key, if it has them.
    pub identity: Option<(PathBuf, PathBuf)>,
}

impl ClientSettings {
    /// Reads what `token get` needs from `sources`.
    ///
    /// # Errors
    /// All that is wrong, in one report.
    pub fn resolve(sources: &Sources) -> Result<Self, Report> {
        read(sources, |reader| {
            let cert = reader.optional(&CLIENT_CERT, parse::path);
            let key = reader.optional(&CLIENT_KEY, parse::path);
            match (&cert, &key) {
                (Some(_), None) => {
                    reader.contradiction(&CLIENT_CERT, &CLIENT_KEY, "set without its key");
                }
                (None, Some(_)) => {
                    reader.contradiction(&CLIENT_KEY, &CLIENT_CERT, "set without its certificate");
                }
                _ => {}
            }
            Self {
                endpoint: reader.or_default(&ENDPOINT, parse::endpoint),
                bearer: reader.optional(&BEARER, parse::bearer),
                ca_file: reader.optional(&CA_FILE, parse::path),
                identity: cert.zip(key),
            }
        })
    }
}

/// The database's URL alone, for the commands of an admin.
pub fn database_url(sources: &Sources) -> Result<DatabaseUrl, Report> {
    read(sources, required_database)
}

/// The URL to migrate with: the one for it, or else the broker's own.
pub fn migrate_database_url(sources: &Sources) -> Result<DatabaseUrl, Report> {
    read(sources, |reader| {
        reader
            .optional(&MIGRATE_DATABASE_URL, DatabaseUrl::new)
            .unwrap_or_else(|| required_database(reader))
    })
}

fn required_database(reader: &mut Reader<'_>) -> DatabaseUrl {
    reader.required(&DATABASE_URL, "postgresql://localhost/broker", DatabaseUrl::new)
}

/// The key to seal a secret to, if one was given; else the database has it.
pub fn intake_key(sources: &Sources) -> Result<Option<IntakePublicKey>, Report> {
    read(sources, |reader| reader.optional(&INTAKE_KEY, parse::intake_key))
}

/// Where the keyring lies.
pub fn keyring_file(sources: &Sources) -> Result<PathBuf, Report> {
    read(sources, |reader| reader.required(&KEYRING_FILE, "/etc/token-broker/keyring", parse::path))
}

/// Where the keyring lies, if that is said.
pub fn known_keyring_file(sources: &Sources) -> Result<Option<PathBuf>, Report> {
    read(sources, |reader| reader.optional(&KEYRING_FILE, parse::path))
}

/// Where a probe asks whether the broker serves.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Probe {
    /// gRPC's health service, in plain text.
    Grpc(SocketAddr),
    /// `/readyz`, since gRPC is behind TLS.
    Ops(SocketAddr),
}

/// Where to ask a broker with these settings.
pub fn probe(sources: &Sources) -> Result<Probe, Report> {
    read(sources, |reader| {
        let grpc = reader.or_default(&LISTEN, parse::address);
        let ops = reader.or_default(&OPS_LISTEN, parse::address);
        let tls = reader.optional(&TLS_CERT, parse::path).is_some();
        if tls { Probe::Ops(ops) } else { Probe::Grpc(grpc) }
    })
}

#[cfg(test)]
mod tests;
