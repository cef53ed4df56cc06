//! Seals the client secrets that admins write into the intake column, and empties the column.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use tracing::{debug, info};

use super::{POLL_INTERVAL, duty::Duty};
use crate::{
    crypto::{Keyring, SEALED_PREFIX},
    domain::secret::ClientSecret,
    services::feed_health::FeedHealth,
    store::{
        Session, StoreError, UnusableRow,
        intake::{self, Intake, SealedBatch},
        within,
    },
};

/// The name under which rows are reported whose secret cannot be sealed.
const COLUMN: &str = "accounts.client_secret";
/// After this time, rows that could not be written are tried again.
const RETRY_REFUSED: Duration = Duration::from_secs(30);

/// The duty that seals secrets.
pub(super) struct IntakeSealer {
    pub(super) keyring: Arc<Keyring>,
    pub(super) health: Arc<FeedHealth>,
    pub(super) refused: Refused,
}

/// The rows that the database refused to write.
#[derive(Default)]
pub(super) struct Refused {
    rows: BTreeSet<UnusableRow>,
    /// When the first of them was refused.
    since: Option<Instant>,
}

impl Duty for IntakeSealer {
    const NAME: &'static str = "intake";
    const LOCK_TIMEOUT: Duration = Duration::from_secs(1);

    async fn perform(&mut self, session: &mut Session) -> Result<(), StoreError> {
        if self.refused.since.is_some_and(|since| since.elapsed() > RETRY_REFUSED) {
            self.refused = Refused::default();
        }
        let refused_before = self.refused.rows.clone();
        let result = self.seal_all(session).await;
        if self.refused.rows != refused_before || self.refused.rows.is_empty() {
            let rows: Vec<_> = self.refused.rows.iter().cloned().collect();
            self.health.replace_unusable(&[COLUMN], &rows);
        }
        result
    }

    fn pause(&self) -> Duration {
        POLL_INTERVAL
    }
}

impl IntakeSealer {
    /// Seals until no value is left that can be sealed. One that cannot be stored does not hinder the
    /// others.
    async fn seal_all(&mut self, session: &mut Session) -> Result<(), StoreError> {
        let mut sealed = 0;
        // Rows that were locked, for example by an admin, are left for the next call.
        let mut locked = Vec::new();
        loop {
            let mut except: Vec<_> = self.refused.rows.iter().map(|row| row.id).collect();
            except.extend(&locked);
            let seal = |intake: &Intake| seal(&self.keyring, intake);
            match within(intake::seal_intake(session.connection()?, &except, seal)).await? {
                SealedBatch::Processed(0) => break,
                SealedBatch::Processed(count) => sealed += count,
                SealedBatch::Refused { id, error } if error.is_delayed() => {
                    debug!(id, %error, "a secret is sealed later");
                    locked.push(id);
                }
                SealedBatch::Refused { id, error } => {
                    let problem = format!("the secret cannot be sealed: {error}");
                    self.refused.rows.insert(UnusableRow::new(COLUMN, id, problem));
                    self.refused.since.get_or_insert_with(Instant::now);
                }
            }
        }
        if sealed > 0 {
            info!(accounts = sealed, "secrets were sealed and the intake column emptied");
        }
        Ok(())
    }
}

/// Seals the value of an intake column for its row, or returns why the value is refused, without quoting it.
fn seal(keyring: &Keyring, intake: &Intake) -> Result<Vec<u8>, String> {
    let secret = if intake.value.starts_with(SEALED_PREFIX) {
        let opened = keyring.open_intake(&intake.client_id, &intake.value);
        opened.map_err(|error| error.to_string())?
    } else {
        ClientSecret::new(&intake.value).map_err(|error| error.to_string())?
    };
    Ok(keyring.seal_secret(intake.id, intake.version, &secret))
}
