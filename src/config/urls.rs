//! Types for URLs that may contain a password. Their `Debug` output omits it.

use std::fmt;

use secrecy::{ExposeSecret, SecretString};
use url::Url;

use crate::store::{Database, StoreError};

/// A valid `postgresql://` URL.
#[derive(Clone, Debug)]
pub struct DatabaseUrl(SecretString);

impl DatabaseUrl {
    /// Validates `url`.
    ///
    /// # Errors
    /// When `url` is not the URL of a Postgres database. The message never contains the URL.
    pub fn new(url: &str) -> Result<Self, String> {
        Database::new(url, "token-broker")
            .map_err(|_| "not a postgresql://user@host/database URL")?;
        Ok(Self(url.into()))
    }

    /// Returns the database at this URL. Postgres shows `application_name` in `pg_stat_activity`.
    ///
    /// # Errors
    /// Never for a URL that [`DatabaseUrl::new`] accepted.
    pub fn database(&self, application_name: &str) -> Result<Database, StoreError> {
        Database::new(self.0.expose_secret(), application_name)
    }

    /// Returns the URL, with its password if it has one.
    #[cfg(test)]
    pub(super) fn expose(&self) -> &str {
        self.0.expose_secret()
    }
}

/// The URL of a forward proxy. Its `Debug` output has only the host and the port.
#[derive(Clone, Eq, PartialEq)]
pub struct ProxyUrl(pub Url);

impl fmt::Debug for ProxyUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}:{:?}", self.0.host_str(), self.0.port_or_known_default())
    }
}
