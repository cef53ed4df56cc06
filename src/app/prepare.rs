//! The part of the start that needs the database. No service runs yet.

use std::{io, time::Duration};

use tokio::{
    sync::{Mutex, watch},
    task,
};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use super::{
    app_config::AppConfig,
    components::Components,
    error::StartError,
    keyring_check::{check_keyring, log_unopened},
    supervise::until_reachable,
    task_group::StartedTasks,
};
use crate::{
    audit::{
        checkpoint_signer::last_signed,
        lost::LostRecords,
        record::{Event, Record},
    },
    crypto::VerifyingKeys,
    domain::{account::AccountId, clock::Timestamp},
    files::state_dir::StateDir,
    services::{
        change_feed::{ChangeFeed, LoadedDuties},
        heartbeat::{HeartbeatTask, Standing},
        refresher::{RefreshTrigger, Refresher},
        trust_monitor::{IntakeKeyFault, check_published},
    },
    store::{accounts, instances, intake_keys, leases, within},
};

/// How long the record of the start may take to become durable.
const RECORD_TIMEOUT: Duration = Duration::from_secs(10);

/// The services that depend on the database, ready to run. Accounts and callers are loaded.
pub(super) struct Prepared {
    pub(super) refresher: Refresher,
    pub(super) trigger: RefreshTrigger,
    pub(super) change_feed: ChangeFeed,
    /// The duties of the change feed that have loaded accounts and callers, and continue from there.
    pub(super) loaded: LoadedDuties,
}

/// Prepares the database and the journal, in this order:
/// 1. applies migrations if `--migrate` was given, and checks the schema and who may create objects in it;
/// 2. verifies that the database is the one that this replica used last, and not in an older state, and
///    watches it from then on, by a task in `tasks`;
/// 3. announces this process, unless another one acts under its identity, and starts the heartbeat in `tasks`;
/// 4. checks that the keyring is the one that sealed the stored secrets, and that admins seal new ones to its
///    intake key, which it publishes if `--migrate` was given;
/// 5. records the start in the audit journal, the records that were removed from the journal while no process ran, if
///    any, and the acceptance of a restored database if there was one;
/// 6. marks stored tokens as possibly revoked where an earlier process issued newer ones that it could
///    not store;
/// 7. loads accounts and callers;
/// 8. waits until the other replicas know of this one.
///
/// While the database does not answer, a step that needs it is repeated.
///
/// # Errors
/// When a step fails, and [`StartError::Stopped`] once `give_up` is cancelled.
pub(super) async fn prepare(
    components: &Components,
    config: &AppConfig,
    state_dir: &StateDir,
    tasks: &mut StartedTasks,
    give_up: &CancellationToken,
) -> Result<Prepared, StartError> {
    let started_at = components.clock.wall();
    until_reachable(give_up, || check_schema(components, config)).await?;
    components.connectivity.mark_connected();
    let guard = components.history_guard(config, state_dir);
    let verified = until_reachable(give_up, || async { Ok(guard.start().await?) }).await?;
    let watch = guard.run(verified.session, tasks.history.stop_token());
    tasks.history.start("history", &components.failed, watch);
    let mut heartbeat = components.heartbeat(state_dir);
    // The announcement replaces what the earlier process reported.
    let lost =
        until_reachable(give_up, || lost_by_earlier_process(components, config, state_dir)).await?;
    announce(&mut heartbeat, give_up).await?;
    let (replica, standing) = (heartbeat.replica_number(), heartbeat.standing());
    let beat = heartbeat.run(tasks.background.stop_token());
    tasks.background.start("heartbeat", &components.failed, beat);
    until_reachable(give_up, || check_keys(components, config)).await?;

    record(components, start_record(config, started_at)).await?;
    if let Some(lost) = lost {
        error!(
            chain = lost.chain,
            first = lost.first,
            last = lost.last,
            "AUDIT RECORDS ARE LOST: the last process of this replica wrote them, and neither the state directory \
             nor Postgres has them"
        );
        record(components, lost.record(components.clock.wall())).await?;
    }
    if let Some(acceptance) = verified.acceptance {
        record(components, acceptance).await?;
    }

    let pending = &components.pending;
    let issued_by_earlier_process =
        pending.of_earlier_process().await.map_err(StartError::IssuedAlone)?;
    until_reachable(give_up, || mark_possibly_revoked(components, &issued_by_earlier_process))
        .await?;
    pending.forget_earlier_process().await.map_err(StartError::IssuedAlone)?;

    let issuer = components.token_issuer(config, state_dir, replica, pending.clone());
    let (refresher, trigger) = Refresher::new(issuer);
    let change_feed = components.change_feed(config, state_dir, verified.identity, trigger.clone());
    // Grants end by the database's clock, so it must be known before calls are served.
    let watch = components.database_clock_watch();
    until_reachable(give_up, || async { Ok(watch.look().await?) }).await?;
    let load = || async { Ok(Box::pin(change_feed.start()).await?) };
    let loaded = until_reachable(give_up, load).await?;
    until_acknowledged(standing, give_up, &components.failed).await?;
    Ok(Prepared { refresher, trigger, change_feed, loaded })
}

/// Returns the records that the last process of this instance wrote, by its heartbeats and by the heads that it signed
/// in the state directory, and that neither Postgres nor the journal has. Heartbeats stop while the database is away;
/// heads are signed each minute, so what was written after the last of both cannot be missed.
async fn lost_by_earlier_process(
    components: &Components,
    config: &AppConfig,
    state_dir: &StateDir,
) -> Result<Option<LostRecords>, StartError> {
    let reported = instances::reported_chain(&components.pool, state_dir.instance());
    let Some(reported) = within(reported).await? else { return Ok(None) };
    let local = components.journal.chains().into_iter().find(|it| it.link.chain == reported.chain);
    let known = local.map_or(0, |local| local.last_seq).max(reported.delivered_seq);
    let signed = last_signed_by(config, state_dir, reported.chain.clone()).await;
    let written = signed.max(reported.seq);
    let lost = LostRecords { chain: reported.chain, first: known + 1, last: written };
    Ok((known < written).then_some(lost))
}

/// Returns the `seq` of the last head of `chain` that was signed in the state directory; 0 if there is none, or if it
/// cannot be read, which is logged: the heartbeats remain as evidence.
async fn last_signed_by(config: &AppConfig, state_dir: &StateDir, chain: String) -> i64 {
    let (file, keys) = (state_dir.checkpoints_file(), VerifyingKeys::from(&*config.keyring));
    let read = task::spawn_blocking(move || last_signed(&file, &chain, &keys)).await;
    read.unwrap_or_else(|panic| Err(io::Error::other(panic))).unwrap_or_else(|error| {
        warn!(%error, "the signed audit heads in the state directory cannot be read");
        0
    })
}

/// Announces this process, and repeats that while the database does not answer.
async fn announce(
    heartbeat: &mut HeartbeatTask,
    give_up: &CancellationToken,
) -> Result<(), StartError> {
    // The steps of `until_reachable` cannot borrow mutably, so they take turns.
    let heartbeat = Mutex::new(heartbeat);
    until_reachable(give_up, || async { Ok(heartbeat.lock().await.announce().await?) }).await
}

/// Waits until every other replica that is likely alive knows of this one. Until then, another replica may count
/// as the only one if the database is lost, and end the tokens that this one would serve.
async fn until_acknowledged(
    mut standing: watch::Receiver<Option<Standing>>,
    give_up: &CancellationToken,
    failed: &CancellationToken,
) -> Result<(), StartError> {
    let acknowledged = |standing: &Option<Standing>| standing.is_some_and(|it| it.awaited == 0);
    tokio::select! {
        () = give_up.cancelled() => Err(StartError::Stopped),
        // The heartbeat has ended, and logged why.
        () = failed.cancelled() => Err(StartError::TaskEnded),
        known = standing.wait_for(acknowledged) => match known.as_deref() {
            Ok(Some(Standing { unaware, .. })) if *unaware > 0 => {
                warn!(replicas = unaware, "other replicas do not answer: until they count as stopped, \
                    nothing is served while the database does not answer");
                Ok(())
            }
            Ok(_) => Ok(()),
            Err(_) => Err(StartError::TaskEnded),
        },
    }
}

async fn check_schema(components: &Components, config: &AppConfig) -> Result<(), StartError> {
    if config.migrate {
        components.unverified_database.migrate().await?;
    }
    let checked = components.unverified_database.check_schema().await;
    if let Err(error) = &checked {
        components.gate.close_after(error);
    }
    checked?;
    Ok(within(components.unverified_database.check_schema_trust()).await?)
}

/// Checks the keyring against the stored secrets and the published intake key. With `--migrate`, publishes the
/// keyring's key, unless a key is published that is not the keyring's: only an admin can know whether that
/// is an attack or a keyring that was replaced.
async fn check_keys(components: &Components, config: &AppConfig) -> Result<(), StartError> {
    let (pool, keyring) = (&components.pool, &config.keyring);
    log_unopened(&check_keyring(keyring, &within(accounts::sealed_samples(pool)).await?)?);
    match check_published(keyring, &within(intake_keys::published(pool)).await?) {
        Ok(()) | Err(IntakeKeyFault::NonePublished) if config.migrate => {
            let published = within(async {
                let mut transaction = pool.begin().await?;
                intake_keys::publish(&mut transaction, &keyring.intake_public()).await?;
                Ok(transaction.commit().await?)
            });
            Ok(published.await?)
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
