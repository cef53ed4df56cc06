//! The settings of the commands other than `serve` and `check`.

use std::{net::SocketAddr, path::PathBuf};

use url::Url;

use super::{
    parse,
    reader::{Reader, read},
    sources::{InvalidSettings, Sources},
    table::{
        BEARER, CA_FILE, CLIENT_CERT, CLIENT_KEY, DATABASE_URL, ENDPOINT, INTAKE_KEY, KEYRING_FILE,
        LISTEN, MIGRATE_DATABASE_URL, OPS_LISTEN, TLS_CERT,
    },
    urls::DatabaseUrl,
};
use crate::crypto::{IntakePublicKey, bearer::Bearer};

/// The settings of `token get`: where the broker is, and how the caller identifies itself.
#[derive(Clone, Debug)]
pub struct ClientSettings {
    /// The broker's URL: a scheme, a host and a port, without a path.
    pub endpoint: Url,
    /// The caller's bearer, if it has one.
    pub bearer: Option<Bearer>,
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

/// Reads the database's URL, for admin commands.
pub fn database_url(sources: &Sources) -> Result<DatabaseUrl, InvalidSettings> {
    read(sources, required_database)
}

/// Reads the database's URL for `migrate`: `MIGRATE_DATABASE_URL`, or else `DATABASE_URL`.
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

/// Reads the path of the keyring, for commands that need it.
pub fn keyring_file(sources: &Sources) -> Result<PathBuf, InvalidSettings> {
    read(sources, |reader| reader.required(&KEYRING_FILE, parse::path))
}

/// Reads the path of the keyring, for commands that can do without it.
pub fn known_keyring_file(sources: &Sources) -> Result<Option<PathBuf>, InvalidSettings> {
    read(sources, |reader| reader.optional(&KEYRING_FILE, parse::path))
}

/// The endpoint that `health` calls to find out whether the broker serves.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum HealthEndpoint {
    /// gRPC's health service, in plain text.
    Grpc(SocketAddr),
    /// `/readyz`, because gRPC is behind TLS.
    Readyz(SocketAddr),
}

/// Reads the endpoint that `health` calls. If gRPC is served with TLS, that is `/readyz`, because the
/// command knows neither the host name in the certificate nor its CA.
pub fn health_endpoint(sources: &Sources) -> Result<HealthEndpoint, InvalidSettings> {
    read(sources, |reader| {
        let grpc = reader.or_default(&LISTEN, parse::address);
        let ops = reader.or_default(&OPS_LISTEN, parse::address);
        let tls = reader.optional(&TLS_CERT, parse::path).is_some();
        if tls { HealthEndpoint::Readyz(ops) } else { HealthEndpoint::Grpc(grpc) }
    })
}
