//! The settings of the commands other than `serve` and `check`.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
};

use rustix::process::Signal;
use url::Url;

use super::{
    parse,
    reader::{Reader, read},
    sources::{InvalidSettings, Sources},
    table::{
        ACCOUNTS, BEARER, CA_FILE, CLIENT_CERT, CLIENT_KEY, DATABASE_URL, ENDPOINT, INTAKE_KEY,
        KEYRING_FILE, KNOWN_KEYS_FILE, LISTEN, LOG_FORMAT, MIGRATE_DATABASE_URL, OPS_LISTEN,
        PROXY_PROTOCOL_FROM, SIGNAL, SIGNAL_PID_FILE, TLS_CERT, TOKEN_DIR, TOKEN_GROUP, TOKEN_MODE,
    },
    urls::DatabaseUrl,
};
use crate::{
    crypto::{IntakePublicKey, bearer::Bearer},
    domain::caller::AccountPattern,
    files::atomic::Access,
    telemetry::LogFormat,
};

/// The settings of `token get` and `agent`: where the broker is, and how the caller identifies itself.
#[derive(Clone, Debug)]
pub struct ClientSettings {
    /// The broker's URLs, at least one: a scheme, a host and a port, without a path.
    pub endpoints: Vec<Url>,
    /// The caller's bearer, if it has one.
    pub bearer: Option<Bearer>,
    /// The file from which the bearer came, if it came from one. It may be replaced while a command runs.
    pub bearer_file: Option<PathBuf>,
    /// The file of the CA of the broker's certificate, PEM. Without it, the system's CAs are trusted.
    pub ca_file: Option<PathBuf>,
    /// The files of the caller's certificate chain and of its key, PEM, if it has a certificate.
    pub identity: Option<(PathBuf, PathBuf)>,
}

impl ClientSettings {
    /// Reads the settings from `sources`.
    ///
    /// # Errors
    /// Lists everything that is wrong.
    pub fn resolve(sources: &Sources) -> Result<Self, InvalidSettings> {
        read(sources, Self::read)
    }

    fn read(reader: &mut Reader<'_>) -> Self {
        let cert = reader.optional(&CLIENT_CERT, parse::regular_file);
        let key = reader.optional(&CLIENT_KEY, parse::regular_file);
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
            endpoints: reader.or_default(&ENDPOINT, parse::endpoints),
            bearer: reader.optional(&BEARER, parse::bearer),
            bearer_file: reader.sources().file_of(&BEARER),
            ca_file: reader.optional(&CA_FILE, parse::regular_file),
            identity: cert.zip(key),
        }
    }
}

/// The settings of `agent`, in addition to [`ClientSettings`].
#[derive(Clone, Debug)]
pub struct AgentSettings {
    /// The names and patterns of the accounts, at least one.
    pub accounts: Vec<AccountPattern>,
    /// The directory of the files.
    pub token_dir: PathBuf,
    /// Who may read the files.
    pub access: Access,
    /// The file with the number of the process that gets a signal after each replacement, and the signal.
    pub signal: Option<(PathBuf, Signal)>,
    /// The format of the log; `None` stands for the one that fits standard error.
    pub log_format: Option<LogFormat>,
}

impl AgentSettings {
    /// Reads the settings from `sources`.
    ///
    /// # Errors
    /// Lists everything that is wrong, also with the settings of the client.
    pub fn resolve(sources: &Sources) -> Result<(Self, ClientSettings), InvalidSettings> {
        read(sources, |reader| {
            let signal = reader.or_default(&SIGNAL, parse::signal);
            let settings = Self {
                accounts: reader.required(&ACCOUNTS, parse::accounts),
                token_dir: reader.required(&TOKEN_DIR, parse::path),
                access: Access {
                    mode: reader.or_default(&TOKEN_MODE, parse::secret_mode),
                    group: reader.optional(&TOKEN_GROUP, parse::group),
                },
                signal: reader
                    .optional(&SIGNAL_PID_FILE, parse::path)
                    .map(|pid_file| (pid_file, signal)),
                log_format: reader.optional(&LOG_FORMAT, parse::log_format),
            };
            (settings, ClientSettings::read(reader))
        })
    }
}

/// Reads the database's URL, for admin commands.
pub fn database_url(sources: &Sources) -> Result<DatabaseUrl, InvalidSettings> {
    read(sources, required_database)
}

/// Reads the database's URL for commands that need the tables' owner: `MIGRATE_DATABASE_URL`, or else `DATABASE_URL`.
pub fn migrate_database_url(sources: &Sources) -> Result<DatabaseUrl, InvalidSettings> {
    read(sources, |reader| {
        reader
            .optional(&MIGRATE_DATABASE_URL, DatabaseUrl::new)
            .unwrap_or_else(|| required_database(reader))
            .reread_from(reader.sources(), &[&MIGRATE_DATABASE_URL, &DATABASE_URL])
    })
}

/// Reads the database's URL, which is read again when the file that has it changes.
pub(super) fn required_database(reader: &mut Reader<'_>) -> DatabaseUrl {
    let url = reader.required(&DATABASE_URL, DatabaseUrl::new);
    url.reread_from(reader.sources(), &[&DATABASE_URL])
}

/// Reads the public key that secrets are sealed to. When this returns `None`, the command takes the key
/// from the database.
pub fn intake_key(sources: &Sources) -> Result<Option<IntakePublicKey>, InvalidSettings> {
    read(sources, |reader| reader.optional(&INTAKE_KEY, parse::intake_key))
}

/// Reads the path of the file that remembers intake keys; `None` stands for the one in the home directory.
pub fn known_keys_file(sources: &Sources) -> Result<Option<PathBuf>, InvalidSettings> {
    read(sources, |reader| reader.optional(&KNOWN_KEYS_FILE, parse::path))
}

/// Reads the path of the keyring, for commands that need it.
pub fn keyring_file(sources: &Sources) -> Result<PathBuf, InvalidSettings> {
    read(sources, |reader| reader.required(&KEYRING_FILE, parse::path))
}

/// Reads the path of the keyring, for commands that can do without it.
pub fn known_keyring_file(sources: &Sources) -> Result<Option<PathBuf>, InvalidSettings> {
    read(sources, |reader| reader.optional(&KEYRING_FILE, parse::path))
}

/// The endpoint that `health` calls to find out whether the broker serves: an address of this machine.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum HealthEndpoint {
    /// gRPC's health service, in plain text.
    Grpc(SocketAddr),
    /// `/readyz`, because gRPC is behind TLS, or begins with a header of the PROXY protocol.
    Readyz(SocketAddr),
}

/// Reads the endpoint that `health` calls. If gRPC is served with TLS, that is `/readyz`, because the command knows
/// neither the host name in the certificate nor its CA. It is also `/readyz` if this machine counts as a load balancer:
/// a header by this command would be believed, and stand in the audit log.
pub fn health_endpoint(sources: &Sources) -> Result<HealthEndpoint, InvalidSettings> {
    read(sources, |reader| {
        let grpc = local_address(reader.or_default(&LISTEN, parse::address));
        let ops = local_address(reader.or_default(&OPS_LISTEN, parse::address));
        let tls = reader.optional(&TLS_CERT, parse::path).is_some();
        let balancers = reader.optional(&PROXY_PROTOCOL_FROM, parse::load_balancers);
        // Connections within a machine come from the address that they go to.
        let is_balancer = balancers.unwrap_or_default().iter().any(|it| it.contains(&grpc.ip()));
        if tls || is_balancer { HealthEndpoint::Readyz(ops) } else { HealthEndpoint::Grpc(grpc) }
    })
}

/// Returns the address at which a server that listens on `listen` can be called from this machine.
fn local_address(mut listen: SocketAddr) -> SocketAddr {
    match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => listen.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => listen.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    listen
}
