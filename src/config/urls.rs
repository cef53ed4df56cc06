//! Types for URLs that may contain a password. Their `Debug` output omits it.

use std::fmt;

use secrecy::{ExposeSecret, SecretString};
use url::Url;

use super::{
    characters::{check_characters, odd_character},
    sources::Sources,
    table::Setting,
};
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
    check_characters(url)
        .and_then(|()| {
            Database::check_url(url).map_err(|error| match error {
                StoreError::InvalidUrl(fault) => fault.to_owned(),
                error => error.to_string(),
            })
        })
        .map_err(|fault| fault + &odd_character(url))
}

/// The URL of a forward proxy. Its `Debug` output has only the host and the port.
#[derive(Clone, Eq, PartialEq)]
pub struct ProxyUrl(pub Url);

impl fmt::Debug for ProxyUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}:{:?}", self.0.host_str(), self.0.port_or_known_default())
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs, path::Path};

    use tempfile::TempDir;

    use super::*;
    use crate::config::commands::{database_url, migrate_database_url};

    fn url(name: &str) -> String {
        format!("postgresql://u:canary@h/{name}")
    }

    /// Returns sources with these environment variables and this TOML file.
    fn sources(env: &[(&str, &str)], toml: Option<&Path>) -> Sources {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let table = |path: &Path| fs::read_to_string(path).unwrap().parse().unwrap();
        Sources {
            env: env.iter().map(owned).collect::<BTreeMap<_, _>>(),
            file: toml.map(|path| (path.to_owned(), table(path))),
            read_file: |path| fs::read_to_string(path),
            ..Sources::empty()
        }
    }

    fn read_again(database: &DatabaseUrl) -> Result<String, String> {
        let url = database.source.as_ref().unwrap().read()?;
        Ok(url.expose_secret().rsplit_once('/').unwrap().1.to_owned())
    }

    #[test]
    fn the_url_is_read_again_from_the_file_that_has_it() {
        let directory = TempDir::new().unwrap();
        let (file, toml) = (directory.path().join("url"), directory.path().join("toml"));
        let write = |name: &str| {
            fs::write(&file, url(name) + "\r\n").unwrap();
            fs::write(&toml, format!("database_url = '{}'", url(name))).unwrap();
        };
        write("first");
        let path = file.to_str().unwrap();
        let given = [
            (database_url(&sources(&[("DATABASE_URL_FILE", path)], None)), "second"),
            (database_url(&sources(&[], Some(&toml))), "second"),
            (migrate_database_url(&sources(&[("DATABASE_URL_FILE", path)], Some(&toml))), "second"),
            (
                migrate_database_url(&sources(
                    &[
                        ("TOKEN_BROKER_MIGRATE_DATABASE_URL_FILE", path),
                        ("DATABASE_URL", "postgresql://u@h/other"),
                    ],
                    None,
                )),
                "second",
            ),
            // The environment cannot change, and takes precedence.
            (database_url(&sources(&[("DATABASE_URL", &url("first"))], Some(&toml))), "first"),
        ];
        write("second");
        for (n, (database, expected)) in given.into_iter().enumerate() {
            assert_eq!(read_again(&database.unwrap()).as_deref(), Ok(expected), "{n}");
        }
    }

    #[test]
    fn a_url_that_cannot_be_read_again_is_not_quoted() {
        let directory = TempDir::new().unwrap();
        let (file, toml) = (directory.path().join("url"), directory.path().join("toml"));
        fs::write(&file, url("first")).unwrap();
        fs::write(&toml, format!("database_url_file = '{}'", file.display())).unwrap();
        let database = database_url(&sources(&[], Some(&toml))).unwrap();
        assert_eq!(read_again(&database).as_deref(), Ok("first"));
        for content in ["", "canary", "postgresql://u:1#canary@h/db", "\npostgresql://u:canary@h/"]
        {
            fs::write(&file, content).unwrap();
            let fault = read_again(&database);
            let quoted = format!("{fault:?} {database:?}");
            assert!(!quoted.contains("canary"), "{quoted}");
            assert!(fault.is_err() || content.starts_with('\n'), "{content}: {quoted}");
        }
        for content in ["canary", "database_url = 7", "listen = 'canary'"] {
            fs::write(&toml, content).unwrap();
            let fault = read_again(&database).unwrap_err();
            assert!(!fault.contains("canary"), "{fault}");
        }
        fs::remove_file(&toml).unwrap();
        read_again(&database).unwrap_err();
    }
}
