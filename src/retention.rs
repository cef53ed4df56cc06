//! Removes the days of the audit log whose time is over, and signs what it removes.

use std::{sync::Arc, time::Duration};

use sqlx::PgPool;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::{
    audit::{runs::Runs, signed::Cut},
    clock::{Clock, Timestamp},
    seal::Keyring,
    store::{
        StoreError,
        retention::{Day, Removal, days_over},
    },
};

/// How often to look.
const AGAIN: Duration = Duration::from_hours(1);

/// Keeps records for as long as the settings say.
pub struct Retention {
    /// The database.
    pub pool: PgPool,
    /// Signs cuts.
    pub keyring: Arc<Keyring>,
    /// Time.
    pub clock: Clock,
    /// How long records are kept that are not changes; `None` for ever.
    pub calls: Option<Duration>,
    /// How long changes are kept; no shorter than calls.
    pub changes: Option<Duration>,
}

impl Retention {
    /// Removes what is over, again and again until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        loop {
            // A removal that is cut off is taken back by the database.
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.remove_all() => {}
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.clock.sleep(AGAIN) => {}
            }
        }
    }

    /// Removes what is over by now. What cannot be removed is tried again the next time.
    pub async fn remove_all(&self) {
        // Nothing is kept shorter than calls: where these are kept for ever, all is.
        if self.calls.is_none() {
            return;
        }
        let now = self.clock.now();
        let days = match days_over(&self.pool, now, self.calls, self.changes).await {
            Ok(days) => days,
            Err(error) => {
                warn!(%error, "it cannot be told which audit records are over");
                return;
            }
        };
        for day in days {
            match self.remove(day, now).await {
                Ok(true) => {}
                // Another replica is at it.
                Ok(false) => return,
                Err(error) => {
                    warn!(day = %day.day, %error, "audit records that are over are not removed yet");
                }
            }
        }
    }

    /// Removes what is over of `day`; `false` while another replica does.
    async fn remove(&self, day: Day, now: Timestamp) -> Result<bool, StoreError> {
        let Some(mut removal) = Removal::begin(&self.pool, day).await? else { return Ok(false) };
        match self.cut(&mut removal, now).await {
            Ok(Some(records)) => {
                removal.finish().await?;
                info!(day = %day.day, changes_too = day.changes_too, records,
                    "audit records whose time is over are removed");
                Ok(true)
            }
            kept => {
                removal.abandon().await?;
                kept.map(|_| true)
            }
        }
    }

    /// Cuts all that goes; how many records that is, or `None` where one of them is evidence.
    async fn cut(&self, removal: &mut Removal, now: Timestamp) -> Result<Option<i64>, StoreError> {
        let mut runs = Runs::default();
        removal.records(|event| runs.add(&event)).await?;
        let records = runs.records();
        match runs.finish() {
            Ok(runs) => {
                for (chain, run) in runs {
                    removal.cut(&Cut::new(&self.keyring, &chain, run, now)).await?;
                }
                Ok(Some(records))
            }
            Err((chain, seq)) => {
                error!(day = %removal.day(), chain, seq, "an audit record is not what was written: \
                    its day is kept as evidence; see `audit verify`");
                Ok(None)
            }
        }
    }
}
