//! The command `keys publish`, and the publication by `migrate` and `keys promote`.

use std::collections::BTreeMap;

use super::{brokers::until_loaded, file};
use crate::{
    cli::{
        account::remember_successor,
        global::{self, APPLICATION_NAME, GlobalArgs},
        output,
    },
    config::{self, Sources},
    crypto::{IntakePublicKey, Keyring},
    store::{Database, admin::Admin, intake_keys},
};

/// Publishes the key of the setting, or else of the keyring, with the login that owns the tables.
pub(super) async fn run(
    global: &GlobalArgs,
    flags: BTreeMap<String, String>,
    force: bool,
) -> anyhow::Result<()> {
    let sources = global.sources(flags.clone())?;
    match config::intake_key(&sources)? {
        Some(key) => publish(&sources, &key, force).await,
        None => publish_primary(global, flags, force).await,
    }
}

/// Publishes the primary key of the keyring. If this user's command line remembers another one of its keys, it
/// remembers this one from then on.
pub(super) async fn publish_primary(
    global: &GlobalArgs,
    flags: BTreeMap<String, String>,
    force: bool,
) -> anyhow::Result<()> {
    let sources = global.sources(flags.clone())?;
    let keyring = file::load(global, flags)?;
    publish(&sources, &keyring.intake_public(), force).await?;
    if let Err(error) = remember_successor(&sources, &keyring) {
        output::note(format_args!("warning: the intake key is not remembered here: {error:#}"));
    }
    Ok(())
}

async fn publish(sources: &Sources, key: &IntakePublicKey, force: bool) -> anyhow::Result<()> {
    let database = config::migrate_database_url(sources)?.database(APPLICATION_NAME)?;
    let admin = Admin::connect(&database, global::attribution(None)).await?;
    if !force {
        until_loaded(&admin, key.key_id()).await?;
    }
    if admin.publish_intake_key(key).await? {
        output::note(format_args!("published the intake key {key}"));
    } else {
        output::note(format_args!("the intake key {key} is published already"));
    }
    Ok(())
}

/// Publishes the intake key of the keyring, for `migrate`: if the settings name a keyring, and no key is published.
pub(in crate::cli) async fn publish_first(
    sources: &Sources,
    database: &Database,
) -> anyhow::Result<()> {
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
