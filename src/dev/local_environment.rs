//! The database and the directory with which `dev` runs the broker.

use std::{
    env, fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};

use crate::files::given_path::shown;

/// The database and the directory of one run of `dev`.
pub(super) struct LocalEnvironment {
    /// The URL of the database.
    pub(super) database_url: String,
    /// The database as the welcome text names it, without a password.
    pub(super) database_label: String,
    /// The database as an argument of `psql`, quoted for a shell.
    pub(super) psql_argument: String,
    /// The directory that holds the keyring, the demo caller's bearer and the journal.
    pub(super) directory: PathBuf,
    /// Whether database and directory stay when `dev` ends.
    pub(super) persistent: bool,
    #[cfg(feature = "embedded-postgres")]
    postgres: Option<super::postgres::EmbeddedPostgres>,
}

impl LocalEnvironment {
    /// Uses the database of `DATABASE_URL` if that is set, and otherwise starts an embedded server.
    /// `state_dir` is the directory for the keyring, the journal and the embedded server's data.
    pub(super) async fn open(state_dir: Option<&Path>) -> anyhow::Result<Self> {
        match env::var("DATABASE_URL") {
            Ok(url) => Self::with_external_database(url, state_dir),
            Err(env::VarError::NotUnicode(_)) => bail!("DATABASE_URL is not text"),
            Err(env::VarError::NotPresent) => Self::with_embedded_database(state_dir).await,
        }
    }

    /// Uses an existing database. Its rows stay when `dev` ends, so the keyring that decrypts them
    /// must stay too. Without `state_dir` it is kept in the user's state directory, in a directory
    /// for each database.
    fn with_external_database(url: String, state_dir: Option<&Path>) -> anyhow::Result<Self> {
        let directory = match state_dir {
            Some(dir) => std::path::absolute(dir)?,
            None => state_home()?.join(format!("token-broker/dev-{}", database_digest(&url)?)),
        };
        create_private_directory(&directory)?;
        Ok(Self {
            database_url: url,
            // The URL may contain a password.
            database_label: "$DATABASE_URL".into(),
            psql_argument: "\"$DATABASE_URL\"".into(),
            directory,
            persistent: true,
            #[cfg(feature = "embedded-postgres")]
            postgres: None,
        })
    }

    #[cfg(feature = "embedded-postgres")]
    async fn with_embedded_database(state_dir: Option<&Path>) -> anyhow::Result<Self> {
        use super::postgres::{DATABASE, DataLocation, EmbeddedPostgres};
        let program = env::current_exe().context("the path of this program is unknown")?;
        let state_dir = state_dir.map(std::path::absolute).transpose()?;
        let location = state_dir
            .as_ref()
            .map_or(DataLocation::Temporary, |dir| DataLocation::Persistent(dir.join("postgres")));
        if let Some(dir) = &state_dir {
            fs::create_dir_all(dir).with_context(|| format!("cannot create {}", shown(dir)))?;
        }
        let postgres = EmbeddedPostgres::start(location, &program).await?;
        // Without a state directory, keyring and journal lie in the server's temporary directory:
        // the guard removes it, even if this process is killed.
        let directory = state_dir.as_deref().unwrap_or(postgres.directory()).join("broker");
        create_private_directory(&directory)?;
        let url = postgres.url(DATABASE);
        Ok(Self {
            database_label: url.clone(),
            psql_argument: format!("'{url}'"),
            database_url: url,
            directory,
            persistent: state_dir.is_some(),
            postgres: Some(postgres),
        })
    }

    #[cfg(not(feature = "embedded-postgres"))]
    #[expect(clippy::unused_async, reason = "the signature is the same with the feature")]
    async fn with_embedded_database(_: Option<&Path>) -> anyhow::Result<Self> {
        bail!("this build has no embedded Postgres: set DATABASE_URL")
    }

    /// Stops the embedded server, if there is one, and waits until it has stopped.
    #[cfg_attr(
        not(feature = "embedded-postgres"),
        expect(clippy::unused_async, reason = "the signature is the same with the feature")
    )]
    pub(super) async fn close(self) {
        #[cfg(feature = "embedded-postgres")]
        if let Some(postgres) = self.postgres {
            postgres.stop().await;
        }
    }
}

/// Returns the user's directory for the state of programs, as the XDG Base Directory Specification
/// defines it.
fn state_home() -> anyhow::Result<PathBuf> {
    let home = env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|dir| dir.is_absolute());
    home.or_else(|| env::home_dir().map(|home| home.join(".local/state")))
        .context("there is no home directory to keep the keyring in: say --state-dir")
}

/// Returns a short digest of a database's URL, in hexadecimal. The user and the password do not
/// count, so that a changed password does not lead to another keyring.
fn database_digest(url: &str) -> anyhow::Result<String> {
    let mut url = url::Url::parse(url).map_err(|_| anyhow::anyhow!("DATABASE_URL is not a URL"))?;
    // This fails for a URL without a host, which cannot contain a user either.
    let _ = url.set_password(None).and_then(|()| url.set_username(""));
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, url.as_str().as_bytes());
    Ok(hex::encode(&digest.as_ref()[..8]))
}

/// Creates a directory that only the current user may enter, with its parents.
fn create_private_directory(dir: &Path) -> anyhow::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("cannot create {}", shown(dir)))
}
