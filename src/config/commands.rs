//! The settings that single commands read.

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
    /// The CA of the broker's certificate, PEM. Without it, the system's CAs count.
    pub ca_file: Option<PathBuf>,
    /// The caller's certificate chain and its key, PEM, if it has a certificate.
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
    })
}

fn required_database(reader: &mut Reader<'_>) -> DatabaseUrl {
    reader.required(&DATABASE_URL, DatabaseUrl::new)
}

/// Reads the public key that secrets are sealed to, if one is set. Otherwise the caller takes the one
/// that the database has.
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

/// The address at which `health` asks whether the broker serves.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum HealthEndpoint {
    /// gRPC's health service, in plain text.
    Grpc(SocketAddr),
    /// `/readyz`, because gRPC is behind TLS.
    Readyz(SocketAddr),
}

/// Reads where `health` asks. With TLS, gRPC would have to be called by a host name and with a CA that
/// the probe does not know, so `/readyz` is asked instead.
pub fn health_endpoint(sources: &Sources) -> Result<HealthEndpoint, InvalidSettings> {
    read(sources, |reader| {
        let grpc = reader.or_default(&LISTEN, parse::address);
        let ops = reader.or_default(&OPS_LISTEN, parse::address);
        let tls = reader.optional(&TLS_CERT, parse::path).is_some();
        if tls { HealthEndpoint::Readyz(ops) } else { HealthEndpoint::Grpc(grpc) }
    })
}
