//! The part of the start that needs the database. No service runs yet.

use std::{sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use super::{
    app_config::AppConfig, components::Components, database_identity, error::StartError,
    keyring_check::check_keyring, supervise::until_reachable,
};
use crate::{
    audit::record::{Event, Record},
    domain::{account::AccountId, clock::Timestamp},
    files::state_dir::StateDir,
    services::{
        change_feed::ChangeFeed,
        refresher::{PendingTokens, RefreshTrigger, Refresher},
        trust_monitor::{IntakeKeyFault, check_published},
    },
    store::{StoreError, accounts, intake_keys, leases, within},
};

/// How long the record of the start may take to become durable.
const RECORD_TIMEOUT: Duration = Duration::from_secs(10);

/// The services that depend on the database, ready to run. Accounts and callers are loaded.
pub(super) struct Prepared {
    pub(super) refresher: Refresher,
    pub(super) trigger: RefreshTrigger,
    pub(super) change_feed: ChangeFeed,
    /// The database snapshot whose changes are loaded. The change feed continues from there.
    pub(super) snapshot: String,
}

/// Prepares the database and the journal, in this order:
/// 1. applies migrations if `--migrate` was given, and checks the schema and who may create objects in it;
/// 2. checks that the database is the one that this replica used last, and not in an older state;
/// 3. checks that the keyring is the one that sealed the stored secrets, and that admins seal new ones to its
///    intake key, which it publishes if `--migrate` was given;
/// 4. records the start in the audit journal, and the acceptance of a restored database if there was one;
/// 5. marks stored tokens as possibly revoked where an earlier process issued newer ones that it could
///    not store;
/// 6. loads accounts and callers.
///
/// While the database does not answer, a step that needs it is repeated.
///
/// # Errors
/// When a step fails, and [`StartError::Stopped`] once `give_up` is cancelled.
pub(super) async fn prepare(
    components: &Components,
    config: &AppConfig,
    state_dir: &StateDir,
    give_up: &CancellationToken,
) -> Result<Prepared, StartError> {
    let started_at = components.clock.now();
    until_reachable(give_up, || check_schema(components, config)).await?;
    components.connectivity.mark_connected();
    let verify =
        || database_identity::verify(&components.pool, config, state_dir, &components.journal);
    let verified = until_reachable(give_up, verify).await?;
    until_reachable(give_up, || check_keys(components, config)).await?;

    record(components, start_record(config, started_at)).await?;
    if let Some(acceptance) = verified.acceptance {
        record(components, acceptance).await?;
    }

    let pending = PendingTokens::new(state_dir, config.settings.new_token_ends_older);
    let issued_by_earlier_process =
        pending.of_earlier_process().await.map_err(StartError::IssuedAlone)?;
    until_reachable(give_up, || mark_possibly_revoked(components, &issued_by_earlier_process))
        .await?;
    pending.forget_earlier_process().await.map_err(StartError::IssuedAlone)?;

    let issuer = components.token_issuer(config, state_dir, Arc::new(pending));
    let (refresher, trigger) = Refresher::new(issuer);
    let change_feed = components.change_feed(config, state_dir, verified.identity, trigger.clone());
    let snapshot = until_reachable(give_up, || async { Ok(change_feed.start().await?) }).await?;
    Ok(Prepared { refresher, trigger, change_feed, snapshot })
}

async fn check_schema(components: &Components, config: &AppConfig) -> Result<(), StartError> {
    if config.migrate {
        components.database.migrate().await?;
    }
    components.database.check_schema().await?;
    Ok(components.database.check_schema_trust().await?)
}

/// Checks the keyring against the stored secrets and the published intake key. With `--migrate`, publishes the
/// keyring's key, unless a key is published that is not the keyring's: only an admin can know whether that
/// is an attack or a keyring that was replaced.
async fn check_keys(components: &Components, config: &AppConfig) -> Result<(), StartError> {
    let (pool, keyring) = (&components.pool, &config.keyring);
    check_keyring(keyring, &accounts::sealed_samples(pool).await?)?;
    match check_published(keyring, &intake_keys::published(pool).await?) {
        Ok(()) | Err(IntakeKeyFault::NonePublished) if config.migrate => {
            let mut transaction = pool.begin().await.map_err(StoreError::from)?;
            intake_keys::publish(&mut transaction, &keyring.intake_public()).await?;
            Ok(transaction.commit().await.map_err(StoreError::from)?)
        }
        checked => Ok(checked?),
    }
}

fn start_record(config: &AppConfig, started_at: Timestamp) -> Record {
    Record::new(started_at, Event::Started)
        .with("version", env!("CARGO_PKG_VERSION"))
        .with("upstream", config.settings.upstream.to_string())
}

/// Appends `record` to the journal and waits until it is durable.
async fn record(components: &Components, record: Record) -> Result<(), StartError> {
    let appended = components.journal.append(record);
    appended.durable(RECORD_TIMEOUT).await.map_err(StartError::NotRecorded)
}

async fn mark_possibly_revoked(
    components: &Components,
    accounts: &[AccountId],
) -> Result<(), StartError> {
    for account in accounts {
        within(leases::mark_possibly_revoked(&components.pool, *account, None)).await?;
    }
    Ok(())
}
