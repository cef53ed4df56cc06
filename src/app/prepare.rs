//! The part of the start that needs the database. No service runs yet.

use std::{sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use super::{
    app_config::AppConfig, components::Components, error::StartError, keyring_check::check_keyring,
    supervise::until_reachable, task_group::TaskGroup,
};
use crate::{
    audit::record::{Event, Record},
    domain::{account::AccountId, clock::Timestamp},
    files::state_dir::StateDir,
    services::{
        change_feed::{ChangeFeed, LoadedDuties},
        heartbeat::HeartbeatTask,
        refresher::{PendingTokens, RefreshTrigger, Refresher},
    },
    store::{accounts, instances, leases, within},
};

/// How long the record of the start may take to become durable.
const RECORD_TIMEOUT: Duration = Duration::from_secs(10);

/// The services that depend on the database, ready to run. Accounts and callers are loaded.
pub(super) struct Prepared {
    pub(super) refresher: Refresher,
    pub(super) trigger: RefreshTrigger,
    pub(super) change_feed: ChangeFeed,
    pub(super) heartbeat: HeartbeatTask,
    /// The duties of the change feed that have loaded accounts and callers, and continue from there.
    pub(super) loaded: LoadedDuties,
}

/// Prepares the database and the journal, in this order:
/// 1. applies migrations if `--migrate` was given, and checks the schema;
/// 2. verifies that the database is the one that this replica used last, and not in an older state, and
///    watches it from then on, by a task in `history`;
/// 3. checks that the keyring is the one that sealed the stored secrets, and publishes the public keys
///    that admins seal new secrets to;
/// 4. records the start in the audit journal, and the acceptance of a restored database if there was one;
/// 5. marks stored tokens as possibly revoked where an earlier process issued newer ones that it could
///    not store;
/// 6. loads accounts and callers;
/// 7. stores the first heartbeat.
///
/// While the database does not answer, a step that needs it is repeated.
///
/// # Errors
/// When a step fails, and [`StartError::Stopped`] once `give_up` is cancelled.
pub(super) async fn prepare(
    components: &Components,
    config: &AppConfig,
    state_dir: &StateDir,
    history: &mut TaskGroup,
    give_up: &CancellationToken,
) -> Result<Prepared, StartError> {
    let started_at = components.clock.now();
    until_reachable(give_up, || check_schema(components, config)).await?;
    components.connectivity.mark_connected();
    let guard = components.history_guard(config, state_dir);
    let verified = until_reachable(give_up, || async { Ok(guard.start().await?) }).await?;
    let watch = guard.run(verified.session, history.stop_token());
    history.start("history", &components.failed, watch);
    until_reachable(give_up, || use_keyring(components, config)).await?;

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
    let load = || async { Ok(Box::pin(change_feed.start()).await?) };
    let loaded = until_reachable(give_up, load).await?;
    let heartbeat = components.heartbeat(config, state_dir);
    until_reachable(give_up, || async { Ok(heartbeat.start().await?) }).await?;
    Ok(Prepared { refresher, trigger, change_feed, heartbeat, loaded })
}

async fn check_schema(components: &Components, config: &AppConfig) -> Result<(), StartError> {
    if config.migrate {
        components.unverified_database.migrate().await?;
    }
    let checked = components.unverified_database.check_schema().await;
    if let Err(error) = &checked {
        components.gate.close_after(error);
    }
    Ok(checked?)
}

async fn use_keyring(components: &Components, config: &AppConfig) -> Result<(), StartError> {
    check_keyring(&config.keyring, &accounts::sealed_samples(&components.pool).await?)?;
    let keys: Vec<_> = config
        .keyring
        .intake_publics()
        .iter()
        .map(|key| (key.key_id().to_string(), key.bytes().to_vec()))
        .collect();
    let primary = config.keyring.intake_public();
    instances::publish_intake_keys(&components.pool, &keys, primary.key_id().as_str()).await?;
    Ok(())
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
