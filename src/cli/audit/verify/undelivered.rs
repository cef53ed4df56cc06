//! Which records the replicas have reported that the database does not have.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::store::admin::{Admin, UndeliveredReport};

/// How long a replica that runs may deliver nothing, although it has reported records that are not delivered.
const DELIVERY_PATIENCE: Duration = Duration::from_secs(10);
/// The pause between two readings of what is delivered.
const DELIVERY_POLL: Duration = Duration::from_millis(250);

/// Returns the replicas that have reported records which are not in the database. Waits for those that run and reach
/// the database, as long as they deliver.
pub(super) async fn undelivered(admin: &Admin) -> anyhow::Result<Vec<UndeliveredReport>> {
    let mut waiting = admin.undelivered_reports().await?;
    let mut progress_at = Instant::now();
    while waiting.iter().any(|it| it.live && it.connected)
        && progress_at.elapsed() < DELIVERY_PATIENCE
    {
        sleep(DELIVERY_POLL).await;
        let now = admin.undelivered_reports().await?;
        // Only what was reported at first is waited for.
        let mut still = Vec::new();
        for report in &waiting {
            let same = now.iter().find(|it| it.chain == report.chain);
            let delivered_seq = same.map_or(report.reported_seq, |it| it.delivered_seq);
            if delivered_seq > report.delivered_seq {
                progress_at = Instant::now();
            }
            if delivered_seq < report.reported_seq {
                let UndeliveredReport { live, connected, .. } = same.unwrap_or(report);
                let (live, connected) = (*live, *connected);
                still.push(UndeliveredReport { delivered_seq, live, connected, ..report.clone() });
            }
        }
        waiting = still;
    }
    Ok(waiting)
}
