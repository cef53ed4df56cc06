//! Replaces the keyring in use when its file changes.
//!
//! The file is read each second and compared by its content, as the TLS files are: secret stores replace it with
//! symbolic links, and copies keep modification times. A file that cannot be used is refused: the keyring in use
//! stays, and the log, `/metrics` and `/readyz` say why.

use std::{path::PathBuf, sync::Arc, time::Duration};

use parking_lot::Mutex;
use thiserror::Error;
use tokio::task;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::{
    key_usage::KeyUsage,
    trust_monitor::{IntakeKeyFault, Trust, check_published},
};
use crate::{
    audit::{
        journal::{Appended, AuditUnavailable, Journal},
        record::{Event, Record},
    },
    crypto::{AlteredKey, KeyId, Keyring, KeyringChange, KeyringError},
    domain::clock::Clock,
};

/// How often the file is read.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// How long the record of a change may take to become durable.
const RECORD_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a changed keyring is not used. No message holds a key.
#[derive(Debug, Error)]
enum Refusal {
    #[error(transparent)]
    File(#[from] KeyringError),
    #[error(transparent)]
    Altered(#[from] AlteredKey),
    #[error(
        "it lacks the key {0}, which secrets or tokens in use are sealed with: run `token-broker keys reseal` first"
    )]
    Missing(KeyId),
    #[error("{0}")]
    Intake(IntakeKeyFault),
    #[error("its change cannot be recorded in the audit journal")]
    NotRecorded,
}

/// Why the file cannot be used, if so. Cheap to clone; all clones share it.
#[derive(Clone, Debug, Default)]
pub struct KeyringHealth(Arc<Mutex<Option<String>>>);

impl KeyringHealth {
    /// Returns why the file cannot be used; `None` if it is in use.
    #[must_use]
    pub fn fault(&self) -> Option<String> {
        self.0.lock().clone()
    }
}

/// The record of a change of the keyring, while it is written.
#[derive(Debug)]
pub struct Recording {
    /// The hash of the changed keyring's text.
    hash: [u8; 32],
    appended: Appended,
}

/// The task that follows the file.
#[derive(Debug)]
pub struct KeyringWatch {
    /// The file.
    pub file: PathBuf,
    /// The keyring in use, and what it is needed for.
    pub usage: KeyUsage,
    /// What is published in the database, as far as it is known.
    pub trust: Trust,
    /// Receives a record of each change before the new keys are used.
    pub journal: Journal,
    /// The time of the records.
    pub clock: Clock,
    /// Receives why the file cannot be used.
    pub health: KeyringHealth,
    /// The record of a change that is not known to be durable. It excludes two reloads at once.
    pub recording: tokio::sync::Mutex<Option<Recording>>,
}

impl KeyringWatch {
    /// Follows the file until `stop` is cancelled.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        while stop.run_until_cancelled(tokio::time::sleep(POLL_INTERVAL)).await.is_some() {
            // A record that is under way is awaited, so this is not cancelled.
            self.reload(false).await;
        }
    }

    /// Reads the file now, and uses it if it has changed and can be used. With `always`, logs the outcome even if it is
    /// the same as before. Cancel safe.
    pub async fn reload(&self, always: bool) {
        let mut recording = self.recording.lock().await;
        let outcome = self.replace(&mut recording).await;
        let fault = outcome.as_ref().err().map(ToString::to_string);
        let is_new = {
            let mut last = self.health.0.lock();
            let is_new = *last != fault;
            last.clone_from(&fault);
            is_new
        };
        match (outcome, fault) {
            (_, Some(fault)) if is_new || always => {
                error!(%fault, "the keyring's file cannot be used; the previous keyring stays in use");
            }
            (Ok(Some(change)), _) => info!(
                keyring = %self.file.display(), added = list(&change.added), promoted = list(&change.promoted),
                retired = list(&change.retired), removed = list(&change.removed), "the keyring was reloaded"
            ),
            (Ok(None), _) if always => info!("the keyring has not changed"),
            (Ok(None), _) if is_new => info!("the keyring's file is again what is in use"),
            _ => {}
        }
    }

    /// Returns what has changed; `None` if the keyring in use is that of the file.
    async fn replace(
        &self,
        recording: &mut Option<Recording>,
    ) -> Result<Option<KeyringChange>, Refusal> {
        let file = self.file.clone();
        let read = task::spawn_blocking(move || Keyring::load(&file)).await;
        let next = match read {
            Ok(read) => read?,
            Err(bug) => std::panic::resume_unwind(bug.into_panic()),
        };
        let current = self.usage.keyring.current();
        if next.text_hash() == current.text_hash() {
            return Ok(None);
        }
        let change = current.change_to(&next)?;
        if let Some(id) = self.usage.missing_in(&next) {
            return Err(Refusal::Missing(id));
        }
        // A replica that lacks the published key is not ready. Without any, it was not before either.
        match check_published(&next, &self.trust.published()) {
            Ok(()) | Err(IntakeKeyFault::NonePublished) => {}
            Err(fault) => return Err(Refusal::Intake(fault)),
        }
        if change != KeyringChange::default() {
            self.record(&next, &change, recording).await?;
        }
        if !change.removed.is_empty() {
            warn!(
                keys = list(&change.removed),
                "keys were removed from the keyring and not retired: records that name them cannot be checked with it"
            );
        }
        self.usage.keyring.replace(Arc::new(next));
        Ok(Some(change))
    }

    /// Records the change once, and returns when the record is durable: that is before the new keys are used. A record
    /// that takes longer is waited for again by the next call, and one that could not be written is repeated by it.
    async fn record(
        &self,
        next: &Keyring,
        change: &KeyringChange,
        slot: &mut Option<Recording>,
    ) -> Result<(), Refusal> {
        let hash = next.text_hash();
        let under_way = slot.take().filter(|recording| recording.hash == hash);
        let recording = slot
            .insert(under_way.unwrap_or_else(|| Recording { hash, appended: self.append(change) }));
        match recording.appended.clone().durable(RECORD_TIMEOUT).await {
            Err(AuditUnavailable::TooSlow(_)) => Err(Refusal::NotRecorded),
            ended => {
                *slot = None;
                ended.map_err(|_| Refusal::NotRecorded)
            }
        }
    }

    fn append(&self, change: &KeyringChange) -> Appended {
        let mut record =
            Record::new(self.clock.wall(), Event::KeysChanged).with("keyring", "loaded");
        for (what, keys) in [
            ("added", &change.added),
            ("promoted", &change.promoted),
            ("retired", &change.retired),
            ("removed", &change.removed),
        ] {
            if !keys.is_empty() {
                record = record.with(what, list(keys));
            }
        }
        self.journal.append(record)
    }
}

fn list(keys: &[KeyId]) -> String {
    keys.iter().map(KeyId::as_str).collect::<Vec<_>>().join(", ")
}
