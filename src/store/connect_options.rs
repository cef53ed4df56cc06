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

use super::{StoreError, database_url};
use crate::{
    domain::loopback::is_loopback_host,
    files::{bounded::may_never_end, text},
};

/// Checks that `url` can be used, and returns it in a form for the driver, without the parameters that are ignored.
/// The names of those are returned too.
///
/// # Errors
/// Returns [`StoreError::InvalidUrl`], which never quotes the URL: it may hold a password.
pub(super) fn known_part(url: &str) -> Result<(Url, Vec<String>), StoreError> {
    let (known, ignored) = database_url::parse(url).map_err(StoreError::InvalidUrl)?;
    options_of(&known)?;
    Ok((known, ignored))
}

fn options_of(url: &Url) -> Result<PgConnectOptions, StoreError> {
    // The driver reads them to their ends.
    if password_files().iter().flatten().any(|file| may_never_end(file)) {
        return Err(StoreError::InvalidUrl("PGPASSFILE and ~/.pgpass must be regular files"));
    }
    PgConnectOptions::from_str(url.as_str())
        .map_err(|_| StoreError::InvalidUrl("a part of it cannot be decoded"))
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
    let (url, ignored) = known_part(url)?;
    for parameter in ignored {
        warn!(parameter, "a parameter of the database's URL is not supported, and is ignored");
    }
    let mut options = options_of(&url)?;
    let local = options.get_socket().is_some()
        || is_loopback_host(options.get_host())
        || options.get_host().starts_with('/');
    if !url.query_pairs().any(|(key, _)| key == "sslmode" || key == "ssl-mode") {
        options = options.ssl_mode(if local { PgSslMode::Prefer } else { PgSslMode::VerifyFull });
    }
    if url.password().is_none() && !url.query_pairs().any(|(key, _)| key == "password") {
        warn_of_malformed_passwords();
    }
    // PgBouncer refuses startup parameters that it does not know, such as these. Settings are set by
    // statements instead: see `session_settings.rs`.
    Ok(options.application_name(application_name).extra_float_digits(None))
}

fn password_files() -> [Option<PathBuf>; 2] {
    let home = env::home_dir().map(|home| home.join(".pgpass"));
    [env::var_os("PGPASSFILE").map(PathBuf::from), home]
}

/// Warns of lines of the password files that the driver cannot read. Its own warning quotes them, so the log leaves
/// that out.
fn warn_of_malformed_passwords() {
    for file in password_files().into_iter().flatten() {
        let Ok(text) = text::read(&file) else { continue };
        for (_, number) in text.lines().zip(1_usize..).filter(|(line, _)| is_malformed(line)) {
            warn!(
                file = %file.display(),
                number,
                "a line of the password file is not host:port:database:user:password"
            );
        }
    }
}

/// Whether a line of a password file is neither empty nor a comment, and has less than five fields.
fn is_malformed(line: &str) -> bool {
    let mut separators = 0;
    let mut bytes = line.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' => drop(bytes.next()),
            b':' => separators += 1,
            _ => {}
        }
    }
    !line.trim().is_empty() && !line.starts_with('#') && separators < 4
}

/// What identifies the content of the password files. If it changes, the options have to be made anew.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct PasswordFiles([Option<(u64, i64, i64, u64)>; 2]);

impl PasswordFiles {
    /// Looks at the password files. Blocks.
    pub(super) fn now() -> Self {
        let identity = |it: Metadata| (it.ino(), it.ctime(), it.ctime_nsec(), it.size());
        Self(password_files().map(|file| file.as_deref().map(Path::metadata)?.ok().map(identity)))
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
    fn a_server_on_this_machine_needs_no_tls_however_its_host_is_written() {
        for (hosts, mode) in [
            (
                &[
                    "localhost",
                    "LOCALHOST",
                    "127.0.0.1",
                    "127.1",
                    "0x7f.1",
                    "0177.0.0.1",
                    "2130706433",
                    "127.9.9.9",
                    "[::1]",
                    "[0::1]",
                    "[::ffff:127.0.0.1]",
                    "%2Ftmp",
                    "%6cocalhost",
                ][..],
                PgSslMode::Prefer,
            ),
            (
                &[
                    "localhost.",
                    "a.localhost",
                    "127.0.0.1.",
                    "127.0.0.1.example.com",
                    "10.1",
                    "0.0.0.0",
                    "[::ffff:10.0.0.1]",
                    "[::]",
                    "db",
                    "ip6-localhost",
                ],
                PgSslMode::VerifyFull,
            ),
        ] {
            for host in hosts {
                let bare = host.trim_start_matches('[').trim_end_matches(']');
                for url in [
                    format!("postgresql://u@{host}/db"),
                    format!("postgresql://u@{host}:5433/db"),
                    format!("postgresql:///db?host={bare}"),
                    format!("postgresql://u@other/db?host={bare}"),
                ] {
                    let options = connect_options(&url, "test").unwrap();
                    let used = format!("{:?}", options.get_ssl_mode());
                    assert_eq!(used, format!("{mode:?}"), "{url}");
                }
            }
        }
        let options = connect_options("postgresql://u@0x7f.1/db", "test").unwrap();
        assert_eq!(options.get_host(), "127.0.0.1");
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
        ] {
            let error = known_part(url).unwrap_err();
            assert!(error.to_string().contains("percent-encoded"), "{url}: {error}");
        }
        for url in ["postgresql://u:a%23%2F%3F%40%25@h/db", "postgresql://u:a@b:c!$&'()*+,;=@h/db"]
        {
            known_part(url).unwrap();
        }
    }

    #[test]
    fn a_malformed_line_of_a_password_file_has_less_than_five_fields() {
        for (line, malformed) in [
            ("h:5432:db:u:p", false),
            ("*:*:*:*:p:w", false),
            ("\\:\\:1:5432:db:u:p\\:w", false),
            ("# comment", false),
            ("", false),
            ("h:5432:db:password", true),
            ("password", true),
            ("h\\:5432:db:u:p", true),
        ] {
            assert_eq!(is_malformed(line), malformed, "{line}");
        }
    }

    #[test]
    fn no_startup_parameter_is_sent_that_a_pooler_would_refuse() {
        let options = connect_options("postgresql://u@h/db", "test").unwrap();
        assert_eq!(options.get_options(), None);
        assert!(format!("{options:?}").contains("extra_float_digits: None"));
    }
}
