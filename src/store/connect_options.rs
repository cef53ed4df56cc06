//! The options of a connection, from the database's URL.

use std::{
    env,
    fs::Metadata,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    str::FromStr,
};

use sqlx::postgres::{PgConnectOptions, PgSslMode};
use tracing::warn;
use url::Url;

use super::StoreError;

/// The parameters of a URL that the driver knows; in addition to them, `options[…]`.
const PARAMETERS: &[&str] = &[
    "sslmode",
    "ssl-mode",
    "sslrootcert",
    "ssl-root-cert",
    "ssl-ca",
    "sslcert",
    "ssl-cert",
    "sslkey",
    "ssl-key",
    "statement-cache-capacity",
    "host",
    "hostaddr",
    "port",
    "dbname",
    "user",
    "password",
    "application_name",
    "options",
];

/// Checks that `url` can be used, and returns it without the parameters that the driver does not know. The
/// names of those are returned too. The driver itself would write them to the log with their values.
///
/// # Errors
/// Returns [`StoreError::InvalidUrl`], which never quotes the URL: it may hold a password.
pub(super) fn known_part(url: &str) -> Result<(Url, Vec<String>), StoreError> {
    let mut known = Url::parse(url).map_err(|_| StoreError::InvalidUrl)?;
    let is_name = |key: &str| {
        !key.is_empty() && key.bytes().all(|it| it.is_ascii_alphanumeric() || b"-_".contains(&it))
    };
    let is_known =
        |key: &str| PARAMETERS.contains(&key) || key.starts_with("options[") && key.ends_with(']');
    let pairs: Vec<(String, String)> = known.query_pairs().into_owned().collect();
    // A `#`, `/` or `?` in a password ends the host's part of the URL, so the rest of the password would be
    // taken for something else. It has to be percent-encoded.
    if !matches!(known.scheme(), "postgres" | "postgresql")
        || known.fragment().is_some()
        || known.path().contains('@')
        || pairs.iter().any(|(key, _)| !is_known(key) && !is_name(key))
    {
        return Err(StoreError::InvalidUrl);
    }
    let (pairs, unknown): (Vec<_>, Vec<_>) = pairs.into_iter().partition(|(key, _)| is_known(key));
    if !unknown.is_empty() {
        known.query_pairs_mut().clear().extend_pairs(pairs);
    }
    let options = PgConnectOptions::from_str(known.as_str());
    options.map_err(|_| StoreError::InvalidUrl)?;
    Ok((known, unknown.into_iter().map(|(key, _)| key).collect()))
}

/// Returns the options for connections to the database at `url`. Reads the password file of libpq
/// (`PGPASSFILE`, `~/.pgpass`) if the URL has no password, so it blocks.
///
/// # Errors
/// Like [`known_part`].
pub(super) fn connect_options(
    url: &str,
    application_name: &str,
) -> Result<PgConnectOptions, StoreError> {
    let (url, unknown) = known_part(url)?;
    for parameter in unknown {
        warn!(parameter, "the database's URL has an unknown parameter, which is ignored");
    }
    let mut options =
        PgConnectOptions::from_str(url.as_str()).map_err(|_| StoreError::InvalidUrl)?;
    let local = options.get_socket().is_some()
        || matches!(options.get_host(), "localhost" | "127.0.0.1" | "::1" | "[::1]")
        || options.get_host().starts_with('/');
    if !url.query_pairs().any(|(key, _)| key == "sslmode" || key == "ssl-mode") {
        options = options.ssl_mode(if local { PgSslMode::Prefer } else { PgSslMode::VerifyFull });
    }
    // PgBouncer refuses startup parameters that it does not know, such as these. Settings are set by
    // statements instead: see `session_settings.rs`.
    Ok(options.application_name(application_name).extra_float_digits(None))
}

/// What identifies the content of the password files. If it changes, the options have to be made anew.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct PasswordFiles([Option<(u64, i64, i64, u64)>; 2]);

impl PasswordFiles {
    /// Looks at the password files. Blocks.
    pub(super) fn now() -> Self {
        let home = env::home_dir().map(|home| home.join(".pgpass"));
        let files = [env::var_os("PGPASSFILE").map(PathBuf::from), home];
        let identity = |it: Metadata| (it.ino(), it.ctime(), it.ctime_nsec(), it.size());
        Self(files.map(|file| file.as_deref().map(Path::metadata)?.ok().map(identity)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_parameters_are_named_without_their_values_and_not_given_to_the_driver() {
        let url = "postgresql://u:p@h/db?sslmode=require&channel_binding=canary&options[role]=r";
        let (known, unknown) = known_part(url).unwrap();
        assert_eq!(unknown, ["channel_binding"]);
        assert!(!known.as_str().contains("canary"));
        let options = PgConnectOptions::from_str(known.as_str()).unwrap();
        assert_eq!(options.get_options(), Some("-c role=r"));
    }

    #[test]
    fn a_password_that_is_not_percent_encoded_is_not_taken_for_another_part_of_the_url() {
        for url in [
            "postgresql://u:1#2@h/db",
            "postgresql://u:1/2@h/db",
            "postgresql://u:1?2@h/db",
            "postgresql://u:a#b@h/db",
            "postgresql://u:a/b@h/db",
            "postgresql://u:a?b@h/db",
            "mysql://u:p@h/db",
            "postgresql://u:p@h/db?port=canary",
            "u:p@h/db",
            "",
        ] {
            let error = known_part(url).unwrap_err();
            assert!(matches!(error, StoreError::InvalidUrl), "{url}");
        }
        for url in ["postgresql://u:a%23%2F%3F%40%25@h/db", "postgresql://u:a@b:c!$&'()*+,;=@h/db"]
        {
            known_part(url).unwrap();
        }
    }

    #[test]
    fn no_startup_parameter_is_sent_that_a_pooler_would_refuse() {
        let options = connect_options("postgresql://u@h/db", "test").unwrap();
        assert_eq!(options.get_options(), None);
        assert!(format!("{options:?}").contains("extra_float_digits: None"));
    }
}
