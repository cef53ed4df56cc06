//! What is delivered, and what may go then.

use chrono::TimeDelta;

use super::*;
use crate::domain::clock::ManualClock;

#[tokio::test]
async fn undelivered_records_fill_the_journal_and_delivery_makes_room() {
    let disk = Disk::default();
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
    journal.delivered(&journal.chain().chain, i64::try_from(last).unwrap());
    until(|| journal.is_writable()).await;
    for more in 0..50 {
        append(&journal, call(more)).await.unwrap();
        let (stats, chain) = (journal.stats(), &journal.chain().chain);
        journal.delivered(chain, i64::try_from(stats.durable).unwrap());
        assert!(stats.segments_bytes <= 6_000);
    }
    assert_eq!(journal.stats().undelivered, 0);
}

#[tokio::test]
async fn a_journal_that_is_nearly_full_says_so_while_it_still_takes_records() {
    let disk = Disk::default();
    let limits = JournalSettings { segment_bytes: 1_500, max_bytes: 12_000, ..settings() };
    let journal = open(&disk, limits).unwrap();
    assert!(journal.is_ready());
    // The disk, by others.
    disk.state().room = Some(1_400);
    append(&journal, call(0)).await.unwrap();
    until(|| !journal.is_ready()).await;
    assert!(journal.is_writable());
    disk.state().room = None;
    until(|| journal.is_ready()).await;
    // The journal itself, for want of delivery.
    let mut nth = 1;
    while journal.stats().segments_bytes < 11_000 {
        append(&journal, call(nth)).await.unwrap();
        nth += 1;
    }
    until(|| !journal.is_ready()).await;
    append(&journal, call(nth)).await.unwrap();
    assert!(journal.is_writable());
    journal.delivered(&journal.chain().chain, i64::try_from(nth + 1).unwrap());
    until(|| journal.is_ready()).await;
}

#[tokio::test]
async fn delivered_segments_go_when_their_time_is_over_and_others_stay() {
    let disk = Disk::default();
    let manual = ManualClock::new(DateTime::UNIX_EPOCH + TimeDelta::days(20_000));
    let limits = JournalSettings { segment_bytes: 1_500, ..settings() };
    let clock = Clock::Manual(manual.clone());
    let journal = Journal::open_on(Arc::new(disk.clone()), "i-0", None, limits, clock).unwrap();
    for nth in 0..10 {
        append(&journal, call(nth)).await.unwrap();
    }
    let before = journal.stats().segments;
    manual.advance(settings().retention);
    journal.delivered(&journal.chain().chain, 5);
    until(|| journal.stats().segments < before).await;
    let chain = &journal.chains()[0];
    let kept = journal.reader(Arc::clone(&chain.link), chain.link.root()).read();
    assert!(matches!(kept, Err(ReadError::Missing { seq: 1, .. })));
    assert_eq!(chain.last_seq, 10);
}

#[tokio::test]
async fn a_start_without_postgres_knows_what_was_delivered() {
    let disk = Disk::default();
    let limits = JournalSettings { segment_bytes: 1_500, ..settings() };
    let journal = open(&disk, limits).unwrap();
    for nth in 0..10 {
        append(&journal, call(nth)).await.unwrap();
    }
    journal.delivered(&journal.chain().chain, 10);
    journal.close().await;
    assert_eq!(open(&disk, limits).unwrap().stats().undelivered, 0);
}
