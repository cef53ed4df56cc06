//! Delivered positions, free space, and the deletion of delivered segments.

use chrono::TimeDelta;

use super::*;
use crate::domain::clock::ManualClock;

#[tokio::test]
async fn undelivered_records_fill_the_journal_and_delivery_makes_room() {
    let disk = FaultyStorage::default();
    let limits = JournalSettings { segment_bytes: 1_500, max_bytes: 6_000, ..settings() };
    let journal = open(&disk, limits).unwrap();
    let mut nth = 0;
    while append(&journal, call(nth)).await.is_ok() {
        nth += 1;
        assert!(nth < 100);
    }
    assert!(!journal.is_writable());
    assert!(journal.stats().segments_bytes <= 6_000);
    let last = journal.stats().durable;
    journal.mark_delivered(&journal.chain().chain, i64::try_from(last).unwrap());
    until(|| journal.is_writable()).await;
    for more in 0..50 {
        append(&journal, call(more)).await.unwrap();
        let (stats, chain) = (journal.stats(), &journal.chain().chain);
        journal.mark_delivered(chain, i64::try_from(stats.durable).unwrap());
        assert!(stats.segments_bytes <= 6_000);
    }
    assert_eq!(journal.stats().undelivered, 0);
}

#[tokio::test]
async fn a_nearly_full_journal_is_not_ready_but_writable() {
    let disk = FaultyStorage::default();
    let limits = JournalSettings { segment_bytes: 1_500, max_bytes: 12_000, ..settings() };
    let journal = open(&disk, limits).unwrap();
    assert!(journal.is_ready());
    // Other files fill the disk.
    disk.state().room = Some(1_400);
    append(&journal, call(0)).await.unwrap();
    until(|| !journal.is_ready()).await;
    assert!(journal.is_writable());
    disk.state().room = None;
    until(|| journal.is_ready()).await;
    // Undelivered records fill the journal.
    let mut nth = 1;
    while journal.stats().segments_bytes < 11_000 {
        append(&journal, call(nth)).await.unwrap();
        nth += 1;
    }
    until(|| !journal.is_ready()).await;
    append(&journal, call(nth)).await.unwrap();
    assert!(journal.is_writable());
    journal.mark_delivered(&journal.chain().chain, i64::try_from(nth + 1).unwrap());
    until(|| journal.is_ready()).await;
}

#[tokio::test]
async fn delivered_segments_are_deleted_after_their_retention_and_others_stay() {
    let disk = FaultyStorage::default();
    let manual = ManualClock::new(DateTime::UNIX_EPOCH + TimeDelta::days(20_000));
    let limits = JournalSettings { segment_bytes: 1_500, ..settings() };
    let clock = Clock::Manual(manual.clone());
    let journal = Journal::open_on(Arc::new(disk.clone()), "i-0", None, limits, clock).unwrap();
    for nth in 0..10 {
        append(&journal, call(nth)).await.unwrap();
    }
    let before = journal.stats().segments;
    manual.advance(settings().retention);
    journal.mark_delivered(&journal.chain().chain, 5);
    until(|| journal.stats().segments < before).await;
    let chain = &journal.chains()[0];
    let kept = journal.reader(Arc::clone(&chain.link), chain.link.root()).read();
    assert!(matches!(kept, Err(ReadError::Missing { seq: 1, .. })));
    assert_eq!(chain.last_seq, 10);
}

#[tokio::test]
async fn delivered_positions_survive_a_restart_without_postgres() {
    let disk = FaultyStorage::default();
    let limits = JournalSettings { segment_bytes: 1_500, ..settings() };
    let journal = open(&disk, limits).unwrap();
    for nth in 0..10 {
        append(&journal, call(nth)).await.unwrap();
    }
    journal.mark_delivered(&journal.chain().chain, 10);
    journal.close().await;
    assert_eq!(open(&disk, limits).unwrap().stats().undelivered, 0);
}
