//! What an answer waits for, and what a loss of power leaves.

use super::{super::shared::stalled, *};

#[tokio::test]
async fn an_answer_waits_for_the_disk_and_one_sync_serves_all_that_wait() {
    let disk = Disk::default();
    let journal = open(&disk, settings()).unwrap();
    let gate = Arc::new(Mutex::new(()));
    disk.state().gate = Some(Arc::clone(&gate));
    let before = disk.state().syncs;
    let waiters: Vec<_> = {
        let _shut = gate.lock().unwrap();
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
#[expect(clippy::await_holding_lock, reason = "the writer's thread is to be held up by it")]
async fn a_wait_ends_in_time_though_the_disk_hangs_and_the_record_is_written_all_the_same() {
    let disk = Disk::default();
    let journal = open(&disk, settings()).unwrap();
    let gate = Arc::new(Mutex::new(()));
    disk.state().gate = Some(Arc::clone(&gate));
    let shut = gate.lock().unwrap();
    let within = Duration::from_millis(10);
    let refused = journal.append(call(0)).durable(within).await;
    assert_eq!(refused, Err(AuditUnavailable::TooSlow(within)));
    drop(shut);
    until(|| journal.stats().durable == 1).await;
    assert_eq!(accounts(&read_all(&journal)), ["acme-0"]);
}

#[test]
fn a_write_that_takes_longer_than_two_seconds_makes_the_journal_unwritable() {
    let journal = open(&Disk::default(), settings()).unwrap();
    let shared = &journal.0.shared;
    assert!(journal.is_writable());
    shared.watched(|| assert_ne!(shared.touching_since.load(Ordering::Acquire), 0));
    assert_eq!(shared.touching_since.load(Ordering::Acquire), 0);
    assert!(!stalled(0, 60_000) && !stalled(1, 2_001) && stalled(1, 2_002));
}

#[tokio::test]
async fn nothing_durable_is_lost_and_nothing_answered_is_missing_after_power_loss() {
    let disk = Disk::default();
    let journal = open(&disk, JournalSettings { segment_bytes: 3_000, ..settings() }).unwrap();
    for nth in 0..30 {
        append(&journal, call(nth)).await.unwrap();
        let luck = nth * 7;
        let found = open(&disk.after_power_loss(luck), settings()).unwrap();
        assert_eq!(read_all(&found).len(), nth + 1);
    }
}

#[tokio::test]
async fn unsynced_bytes_may_be_lost_with_write_but_never_tear_the_journal() {
    let disk = Disk::default();
    let journal = open(&disk, JournalSettings { sync: SyncMode::Write, ..settings() }).unwrap();
    for nth in 0..30 {
        append(&journal, call(nth)).await.unwrap();
    }
    for luck in (0..20_000).step_by(97) {
        let found = open(&disk.after_power_loss(luck), settings()).unwrap();
        let events = read_all(&found);
        assert!(events.len() <= 30);
    }
    journal.close().await;
    assert_eq!(read_all(&open(&disk.after_power_loss(0), settings()).unwrap()).len(), 30);
}
