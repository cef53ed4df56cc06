//! What `dev` stands on: a database, and a home for its keyring and journal.

use std::{
    env, fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};

/// What `dev` stands on: a database, and a home for keyring and journal.
pub(super) struct Ground {
    /// The database.
    pub(super) url: String,
    /// The same for people's eyes, and as `psql` takes it in a shell.
    pub(super) shown: String,
    pub(super) psql: String,
    /// Where keyring and journal lie.
    pub(super) home: PathBuf,
    /// Whether all of it stays when `dev` ends.
    pub(super) kept: bool,
    #[cfg(feature = "embedded-postgres")]
    postgres: Option<super::postgres::EmbeddedPostgres>,
}

impl Ground {
    /// `DATABASE_URL` if it is set, else a Postgres of its own.
    pub(super) async fn find(state_dir: Option<&Path>) -> anyhow::Result<Self> {
        match env::var("DATABASE_URL") {
            Ok(url) => Self::given(url, state_dir),
            Err(env::VarError::NotUnicode(_)) => bail!("DATABASE_URL is not text"),
            Err(env::VarError::NotPresent) => Self::own(state_dir).await,
        }
    }

    /// A database of somebody else's stays, and so must what opens it: the keyring's home is kept
    /// too, one for each database.
    fn given(url: String, state_dir: Option<&Path>) -> anyhow::Result<Self> {
        let home = match state_dir {
            Some(dir) => std::path::absolute(dir)?,
            None => state_home()?.join(format!("token-broker/dev-{}", name_of(&url)?)),
        };
        make_private(&home)?;
        Ok(Self {
            url,
            // It may hold a password.
            shown: "$DATABASE_URL".into(),
            psql: "\"$DATABASE_URL\"".into(),
            home,
            kept: true,
            #[cfg(feature = "embedded-postgres")]
            postgres: None,
        })
    }

    #[cfg(feature = "embedded-postgres")]
    async fn own(state_dir: Option<&Path>) -> anyhow::Result<Self> {
        use super::postgres::{DATABASE, EmbeddedPostgres, Place};
        let program = env::current_exe().context("the path of this program is unknown")?;
        let state_dir = state_dir.map(std::path::absolute).transpose()?;
        let place =
            state_dir.as_ref().map_or(Place::Temporary, |dir| Place::Kept(dir.join("postgres")));
        if let Some(dir) = &state_dir {
            fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        let postgres = EmbeddedPostgres::start(place, &program).await?;
        // A temporary home lies beside the data: the guard removes both, also after a SIGKILL.
        let home = state_dir.as_deref().unwrap_or(postgres.directory()).join("broker");
        make_private(&home)?;
        let url = postgres.url(DATABASE);
        Ok(Self {
            shown: url.clone(),
            psql: format!("'{url}'"),
            url,
            home,
            kept: state_dir.is_some(),
            postgres: Some(postgres),
        })
    }

    #[cfg(not(feature = "embedded-postgres"))]
    #[expect(clippy::unused_async, reason = "as with the feature")]
    async fn own(_: Option<&Path>) -> anyhow::Result<Self> {
        bail!("this build has no Postgres of its own: set DATABASE_URL")
    }

    /// Ends a Postgres of its own.
    #[cfg_attr(not(feature = "embedded-postgres"), expect(clippy::unused_async))]
    pub(super) async fn leave(self) {
        #[cfg(feature = "embedded-postgres")]
        if let Some(postgres) = self.postgres {
            postgres.stop().await;
        }
    }
}

/// Where a user's programs keep their state, as the XDG base directories have it.
fn state_home() -> anyhow::Result<PathBuf> {
    let home = env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|dir| dir.is_absolute());
    home.or_else(|| env::home_dir().map(|home| home.join(".local/state")))
        .context("there is no home directory to keep the keyring in: say --state-dir")
}

/// A short name for the database behind `url`, without its user and password.
fn name_of(url: &str) -> anyhow::Result<String> {
    let mut url = url::Url::parse(url).map_err(|_| anyhow::anyhow!("DATABASE_URL is not a URL"))?;
    // A URL without a host has no user to forget.
    let _ = url.set_password(None).and_then(|()| url.set_username(""));
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, url.as_str().as_bytes());
    Ok(hex::encode(&digest.as_ref()[..8]))
}

fn make_private(dir: &Path) -> anyhow::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("cannot make {}", dir.display()))
}
