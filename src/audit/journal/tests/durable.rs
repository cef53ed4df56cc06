//! Durability: what an append waits for, and what survives a power failure.

use super::{super::shared::has_stalled, *};

#[tokio::test]
async fn an_append_waits_for_the_sync_and_one_sync_serves_all_waiting_appends() {
    let disk = FaultyStorage::default();
    let journal = open(&disk, settings()).unwrap();
    let gate = Arc::new(Mutex::new(()));
    disk.state().gate = Some(Arc::clone(&gate));
    let before = disk.state().syncs;
    let waiters: Vec<_> = {
        let _shut = gate.lock();
        let first = journal.append(call(0));
        let waiters = (1..500).map(|nth| journal.append(call(nth)));
        std::iter::once(first).chain(waiters).collect()
    };
    for waiter in waiters {
        waiter.durable(AMPLE).await.unwrap();
    }
    let syncs = disk.state().syncs - before;
    assert!(syncs <= 2, "{syncs} syncs for 500 records");
    assert_eq!(read_all(&journal).len(), 500);
}

#[tokio::test]
#[expect(clippy::await_holding_lock, reason = "the lock blocks the writer thread")]
async fn a_wait_times_out_while_the_disk_hangs_and_the_record_is_written_later() {
    let disk = FaultyStorage::default();
    let journal = open(&disk, settings()).unwrap();
    let gate = Arc::new(Mutex::new(()));
    disk.state().gate = Some(Arc::clone(&gate));
    let shut = gate.lock();
    let within = Duration::from_millis(10);
    let refused = journal.append(call(0)).durable(within).await;
    assert_eq!(refused, Err(AuditUnavailable::TooSlow(within)));
    drop(shut);
    until(|| journal.stats().durable == 1).await;
    assert_eq!(accounts(&read_all(&journal)), ["acme-0"]);
}

#[test]
fn a_write_that_takes_longer_than_two_seconds_makes_the_journal_unwritable() {
    let journal = open(&FaultyStorage::default(), settings()).unwrap();
    let shared = &journal.0.shared;
    assert!(journal.is_writable());
    shared.track_io(|| assert_ne!(shared.io_started_at.load(Ordering::Acquire), 0));
    assert_eq!(shared.io_started_at.load(Ordering::Acquire), 0);
    assert!(!has_stalled(0, 60_000) && !has_stalled(1, 2_001) && has_stalled(1, 2_002));
}

#[tokio::test]
async fn every_durable_record_survives_a_power_failure() {
    let disk = FaultyStorage::default();
    let journal = open(&disk, JournalSettings { segment_bytes: 3_000, ..settings() }).unwrap();
    for nth in 0..30 {
        append(&journal, call(nth)).await.unwrap();
        let surviving = nth * 7;
        let reopened = open(&disk.after_power_loss(surviving), settings()).unwrap();
        assert_eq!(read_all(&reopened).len(), nth + 1);
    }
}

#[tokio::test]
async fn with_sync_mode_write_unsynced_records_may_be_lost_but_the_journal_opens() {
    let disk = FaultyStorage::default();
    let journal = open(&disk, JournalSettings { sync: SyncMode::Write, ..settings() }).unwrap();
    for nth in 0..30 {
        append(&journal, call(nth)).await.unwrap();
    }
    for surviving in (0..20_000).step_by(97) {
        let reopened = open(&disk.after_power_loss(surviving), settings()).unwrap();
        let events = read_all(&reopened);
        assert!(events.len() <= 30);
    }
    journal.close().await;
    assert_eq!(read_all(&open(&disk.after_power_loss(0), settings()).unwrap()).len(), 30);
}
