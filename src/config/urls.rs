//! Types for URLs that may contain a password. Their `Debug` output omits it.

use std::fmt;

use secrecy::{ExposeSecret, SecretString};
use url::Url;

use super::{sources::Sources, table::Setting};
use crate::store::{Database, StoreError};

/// A valid `postgresql://` URL, and where it came from.
#[derive(Clone)]
pub struct DatabaseUrl {
    url: SecretString,
    /// Where the URL is read again; `None` if it cannot change.
    source: Option<UrlSource>,
}

/// The settings that say what the URL is, the first of which takes precedence, and their sources.
#[derive(Clone)]
struct UrlSource {
    sources: Sources,
    settings: &'static [&'static Setting],
}

impl DatabaseUrl {
    /// Validates `url`.
    ///
    /// # Errors
    /// When `url` is not the URL of a Postgres database. The message never contains the URL.
    pub fn new(url: &str) -> Result<Self, String> {
        check(url)?;
        Ok(Self { url: url.into(), source: None })
    }

    /// Returns this URL, to be read again from `sources` as the value of the first of `settings` that has
    /// one. Flags and the environment cannot change, but files can.
    pub(super) fn reread_from(
        self,
        sources: &Sources,
        settings: &'static [&'static Setting],
    ) -> Self {
        Self { source: Some(UrlSource { sources: sources.only(settings), settings }), ..self }
    }

    /// Returns the database at this URL. Postgres shows `application_name` in `pg_stat_activity`.
    ///
    /// # Errors
    /// Never for a URL that [`DatabaseUrl::new`] accepted.
    pub fn database(&self, application_name: &str) -> Result<Database, StoreError> {
        let url = self.url.expose_secret();
        match self.source.clone() {
            None => Database::new(url, application_name),
            Some(source) => Database::with_source(url, application_name, move || source.read()),
        }
    }

    /// Returns the URL, with its password if it has one.
    #[cfg(test)]
    pub(super) fn expose(&self) -> &str {
        self.url.expose_secret()
    }
}

impl UrlSource {
    /// Reads the URL again. Blocks.
    ///
    /// # Errors
    /// A line for the user that does not contain the URL.
    fn read(&self) -> Result<SecretString, String> {
        let found = self.sources.find_again(self.settings)?;
        let given = found.ok_or("it is not set any more")?;
        check(&given.value).map_err(|fault| given.fault_line(&fault))?;
        Ok(given.value.as_str().into())
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DatabaseUrl").finish_non_exhaustive()
    }
}

fn check(url: &str) -> Result<(), String> {
    Database::check_url(url).map_err(|_| {
        "not a postgresql://user@host/database URL, in which special characters of the password \
         are percent-encoded"
            .to_owned()
    })
}

/// The URL of a forward proxy. Its `Debug` output has only the host and the port.
#[derive(Clone, Eq, PartialEq)]
pub struct ProxyUrl(pub Url);

impl fmt::Debug for ProxyUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}:{:?}", self.0.host_str(), self.0.port_or_known_default())
    }
}
