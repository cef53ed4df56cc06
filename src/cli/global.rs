//! The flags that every command has. They lead to the settings, and to the admin commands' connection to
//! the database.

use std::{collections::BTreeMap, env, path::PathBuf};

use clap::{
    Args,
    builder::{OsStringValueParser, TypedValueParser},
};

use crate::{
    config::{self, InvalidSettings, Sources},
    files::given_path,
    store::{
        Database,
        admin::{Admin, Attribution},
    },
};

/// The name of the admin commands' connections in `pg_stat_activity`.
pub(super) const APPLICATION_NAME: &str = "token-broker admin";

/// The flags that every command has.
#[derive(Args, Debug)]
pub(super) struct GlobalArgs {
    #[arg(
        long,
        global = true,
        value_name = "PATH",
        value_parser = path_argument(),
        help = "A TOML file with settings: their names in lower case [env: TOKEN_BROKER_CONFIG]"
    )]
    pub(super) config: Option<PathBuf>,
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        help = "A file with the database's URL [env: DATABASE_URL or DATABASE_URL_FILE]"
    )]
    pub(super) database_url_file: Option<String>,
}

impl GlobalArgs {
    /// Returns the sources of the settings: these flags with those of a command, the environment, and
    /// the TOML file.
    pub(super) fn sources(
        &self,
        mut flags: BTreeMap<String, String>,
    ) -> Result<Sources, InvalidSettings> {
        if let Some(file) = &self.database_url_file {
            flags.insert(config::table::DATABASE_URL.file_key(), file.clone());
        }
        Sources::of_process(flags, self.config.clone())
    }

    /// Connects to the database as an admin. Changes are recorded in the audit log with `reason` and the
    /// name of the user who runs the command.
    pub(super) async fn admin(&self, reason: Option<&str>) -> anyhow::Result<Admin> {
        Ok(Admin::connect(&self.database()?, attribution(reason)).await?)
    }

    /// Connects to the database in order to read the audit log, for which a standby is enough.
    pub(super) async fn auditor(&self) -> anyhow::Result<Admin> {
        Ok(Admin::connect(&self.database()?.only_reads(), Attribution::default()).await?)
    }

    fn database(&self) -> anyhow::Result<Database> {
        let url = config::database_url(&self.sources(BTreeMap::new())?)?;
        Ok(url.database(APPLICATION_NAME)?)
    }
}

/// Returns a parser of arguments that are paths.
pub(super) fn path_argument() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().try_map(given_path::parse)
}

/// Returns who acts, and why, for the records of changes.
pub(super) fn attribution(reason: Option<&str>) -> Attribution {
    Attribution { actor: Some(user_name()), reason: reason.map(ToOwned::to_owned) }
}

/// Returns the user's name for the audit log, or the user's number if the environment has no name, as in a
/// container.
fn user_name() -> String {
    ["SUDO_USER", "USER", "LOGNAME"]
        .into_iter()
        .find_map(|name| env::var(name).ok().filter(|name| !name.is_empty()))
        .unwrap_or_else(|| format!("uid {}", rustix::process::getuid().as_raw()))
}
