//! The command `keys`.

use std::{collections::BTreeMap, path::PathBuf, process::ExitCode};

use anyhow::ensure;
use clap::{Args, Subcommand};
use serde_json::json;

use super::{
    global::{self, APPLICATION_NAME, GlobalArgs, path_argument},
    output::{self, Table},
    time::LocalTime,
};
use crate::{
    config::{self, Flags, IntakeKeyFlag, KeyringFlag, MigrateFlag, Sources},
    crypto::{KeyKind, Keyring, VerifyingKeys},
    domain::clock::Clock,
    services::trust_monitor::check_published,
    store::{
        Database,
        admin::{Admin, InstanceSummary},
        intake_keys::{self, PublishedKey},
    },
};

/// Creates and shows the keyring
#[derive(Args, Debug)]
pub(super) struct KeysArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Writes a new keyring that only its owner can read; never overwrites a file
    #[command(after_help = "\
Example:
  token-broker keys generate --out /etc/token-broker/keyring")]
    Generate {
        /// The file to write
        #[arg(long, value_name = "FILE", value_parser = path_argument())]
        out: PathBuf,
    },
    /// Shows the keys of the keyring, and how many brokers have loaded each of them
    Status {
        #[command(flatten)]
        settings: Flags<KeyringFlag>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Publishes the public key that admins seal secrets to; needs the login that owns the tables
    #[command(after_help = "\
Takes the database from TOKEN_BROKER_MIGRATE_DATABASE_URL or DATABASE_URL, and the key from the keyring or
from --intake-key.

Examples:
  token-broker keys publish
  token-broker keys publish --intake-key i520e41a9:fUetyttumZ233xqf78wn3cyzQpoKc4N7t_OuvbCYgQU")]
    Publish {
        /// Publish the key even if a running broker has not loaded it, and so cannot open what is sealed to it
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        intake: Flags<IntakeKeyFlag>,
        #[command(flatten)]
        keyring: Flags<KeyringFlag>,
        #[command(flatten)]
        database: Flags<MigrateFlag>,
    },
    /// Prints the public key that admins seal secrets to, or those that verify audit signatures
    #[command(after_help = "\
Examples:
  token-broker keys public
  token-broker keys public --signing > audit-keys.pem")]
    Public {
        /// Print the public keys of signatures, in PEM
        #[arg(long)]
        signing: bool,
        #[command(flatten)]
        settings: Flags<KeyringFlag>,
    },
}

pub(super) async fn run(global: &GlobalArgs, args: KeysArgs) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Generate { out } => {
            Keyring::create_file(&out, Clock::System.wall())?;
            output::note(format_args!(
                "wrote {}; keep a copy apart from the database's backups: without it no sealed \
                 secret opens",
                out.display()
            ));
        }
        Command::Publish { force, intake, keyring, database } => {
            let mut flags = intake.given;
            flags.extend(keyring.given);
            flags.extend(database.given);
            publish(global, flags, force).await?;
        }
        Command::Status { settings, json } => status(global, settings.given, json).await?,
        Command::Public { signing, settings } => {
            let keyring = keyring(global, settings.given)?;
            if signing {
                output::block(VerifyingKeys::from(&keyring))?;
            } else {
                output::line(keyring.intake_public())?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn keyring(global: &GlobalArgs, flags: BTreeMap<String, String>) -> anyhow::Result<Keyring> {
    Ok(Keyring::load(&config::keyring_file(&global.sources(flags)?)?)?)
}

/// Publishes the key of the setting, or else of the keyring, with the login that owns the tables.
async fn publish(
    global: &GlobalArgs,
    flags: BTreeMap<String, String>,
    force: bool,
) -> anyhow::Result<()> {
    let sources = global.sources(flags.clone())?;
    let key = match config::intake_key(&sources)? {
        Some(key) => key,
        None => keyring(global, flags)?.intake_public(),
    };
    let database = config::migrate_database_url(&sources)?.database(APPLICATION_NAME)?;
    let admin = Admin::connect(&database, global::attribution(None)).await?;
    let instances = live_instances(&admin).await?;
    let id = key.key_id().as_str();
    let lacking = instances.iter().filter(|it| !it.key_ids.iter().any(|held| held == id)).count();
    ensure!(
        force || lacking == 0,
        "{lacking} of {} running brokers have not loaded {id}, and could not open what is sealed to it: give \
         them the keyring first, or say --force",
        instances.len()
    );
    if admin.publish_intake_key(&key).await? {
        output::note(format_args!("published the intake key {key}"));
    } else {
        output::note(format_args!("the intake key {key} is published already"));
    }
    Ok(())
}

/// Publishes the intake key of the keyring, for `migrate`: if the settings name a keyring, and no key is published.
pub(super) async fn publish_first(sources: &Sources, database: &Database) -> anyhow::Result<()> {
    let Some(file) = config::known_keyring_file(sources)? else { return Ok(()) };
    let admin = Admin::connect(database, global::attribution(None)).await?;
    if !intake_keys::published(admin.pool()).await?.is_empty() {
        return Ok(());
    }
    match Keyring::load(&file) {
        Ok(keyring) => {
            let key = keyring.intake_public();
            admin.publish_intake_key(&key).await?;
            output::note(format_args!("published the intake key {key}"));
        }
        // The owner of the tables need not be able to read the keyring.
        Err(error) => output::note(format_args!("warning: no intake key was published: {error}")),
    }
    Ok(())
}

async fn status(
    global: &GlobalArgs,
    flags: BTreeMap<String, String>,
    as_json: bool,
) -> anyhow::Result<()> {
    let keyring = keyring(global, flags)?;
    let known = match global.admin(None).await {
        Ok(admin) => brokers_and_published_keys(&admin).await,
        Err(error) => Err(error),
    };
    let (instances, published) = match known {
        Ok((instances, published)) => {
            if let Err(fault) = check_published(&keyring, &published) {
                output::note(format_args!("warning: {fault}"));
            }
            (Some(instances), Some(published))
        }
        Err(error) => {
            output::note(format_args!(
                "warning: it is unknown which keys the brokers have: {error:#}"
            ));
            (None, None)
        }
    };
    let rows = keyring.status().iter().map(|key| {
        let id = key.id.as_str();
        let holders = instances.as_ref().map(|instances| {
            let holds = |it: &&InstanceSummary| it.key_ids.iter().any(|held| held == id);
            (instances.iter().filter(holds).count(), instances.len())
        });
        let published = published
            .as_ref()
            .filter(|_| key.kind == KeyKind::Intake)
            .map(|keys| keys.iter().any(|published| published.key_id == id));
        (key, holders, published)
    });
    if as_json {
        let rows: Vec<_> = rows
            .map(|(key, holders, published)| {
                json!({
                    "key_id": key.id.as_str(), "kind": key.kind.as_str(), "primary": key.primary,
                    "created_at": LocalTime(key.created_at),
                    "brokers_with_it": holders.map(|(with, _)| with),
                    "brokers": holders.map(|(_, all)| all), "published": published,
                })
            })
            .collect();
        return output::json(&rows);
    }
    let mut table = Table::new(["KEY", "KIND", "PRIMARY", "CREATED AT", "BROKERS", "PUBLISHED"]);
    for (key, holders, published) in rows {
        table.row([
            key.id.to_string(),
            key.kind.to_string(),
            yes_or_no(key.primary),
            LocalTime(key.created_at).to_string(),
            output::or_dash(holders.map(|(with, all)| format!("{with} of {all}"))),
            output::or_dash(published.map(yes_or_no)),
        ]);
    }
    table.print("the keyring is empty")
}

/// Returns the brokers that are live, and the public intake keys in the database.
async fn brokers_and_published_keys(
    admin: &Admin,
) -> anyhow::Result<(Vec<InstanceSummary>, Vec<PublishedKey>)> {
    Ok((live_instances(admin).await?, intake_keys::published(admin.pool()).await?))
}

async fn live_instances(admin: &Admin) -> anyhow::Result<Vec<InstanceSummary>> {
    let mut instances = admin.instances().await?;
    instances.retain(|instance| instance.live);
    Ok(instances)
}

fn yes_or_no(yes: bool) -> String {
    if yes { "yes" } else { "no" }.into()
}
