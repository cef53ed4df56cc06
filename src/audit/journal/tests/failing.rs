//! Storage that fails, fills up or is read-only.

use proptest::prelude::*;

use super::*;

#[tokio::test]
async fn a_failed_sync_moves_the_batch_to_a_new_segment_under_the_same_numbers() {
    let disk = FaultyStorage::default();
    let journal = open(&disk, settings()).unwrap();
    append(&journal, call(0)).await.unwrap();
    disk.state().failing_syncs = 1;
    append(&journal, call(1)).await.unwrap();
    append(&journal, call(2)).await.unwrap();
    assert!(journal.is_writable());
    let lines: Vec<_> = disk.texts(".jsonl").iter().map(|(_, t)| t.lines().count()).collect();
    assert_eq!(lines, [2, 3], "headers included; the first segment was truncated");
    assert_eq!(accounts(&read_all(&journal)), ["acme-0", "acme-1", "acme-2"]);
    let reopened = open(&disk.after_power_loss(0), settings()).unwrap();
    assert_eq!(read_all(&reopened).len(), 3);
}

#[tokio::test]
async fn records_that_could_not_be_truncated_from_an_abandoned_segment_are_ignored() {
    let disk = FaultyStorage::default();
    let journal = open(&disk, settings()).unwrap();
    append(&journal, call(0)).await.unwrap();
    {
        let mut state = disk.state();
        state.failing_syncs = 1;
        state.failing_removals = 1;
    }
    append(&journal, call(1)).await.unwrap();
    append(&journal, call(2)).await.unwrap();
    journal.close().await;
    let first = &disk.texts(".jsonl")[0].1;
    assert_eq!(first.lines().count(), 3, "the header, the durable record, and the abandoned one");
    let reopened = open(&disk.after_power_loss(10_000), settings()).unwrap();
    assert_eq!(accounts(&read_all(&reopened)), ["acme-0", "acme-1", "acme-2"]);
}

#[tokio::test]
async fn a_refused_call_that_could_not_be_truncated_does_not_replace_the_record_with_its_number() {
    let disk = FaultyStorage::default();
    let journal = open(&disk, settings()).unwrap();
    append(&journal, call(0)).await.unwrap();
    {
        let mut state = disk.state();
        state.failing_syncs = 2;
        state.failing_removals = 2;
    }
    assert!(append(&journal, call(1)).await.is_err());
    until(|| journal.is_writable()).await;
    append(&journal, call(2)).await.unwrap();
    journal.close().await;
    assert!(disk.texts(".jsonl")[0].1.contains("acme-1"), "the refused call is still in the file");
    let reopened = open(&disk.after_power_loss(10_000), settings()).unwrap();
    assert_eq!(accounts(&read_all(&reopened)), ["acme-0", "acme-2"]);
}

#[tokio::test]
async fn a_full_disk_refuses_calls_retains_other_records_and_a_gap_record_counts_the_calls() {
    let disk = FaultyStorage::default();
    let journal = open(&disk, settings()).unwrap();
    append(&journal, call(0)).await.unwrap();
    // Only a part of a line fits.
    disk.state().room = Some(100);
    assert_eq!(append(&journal, call(1)).await, Err(AuditUnavailable::Unwritable));
    assert!(!journal.is_writable());
    assert_eq!(append(&journal, call(2)).await, Err(AuditUnavailable::Unwritable));
    assert_eq!(append(&journal, issue(3)).await, Err(AuditUnavailable::Unwritable));
    assert_eq!(append(&journal, issue(4)).await, Err(AuditUnavailable::Unwritable));
    disk.state().room = None;
    until(|| journal.is_writable()).await;
    append(&journal, call(5)).await.unwrap();
    let events = read_all(&journal);
    let recorded: Vec<_> =
        events.iter().map(|e| (&*e.event, e.account.as_deref(), e.count)).collect();
    assert_eq!(
        recorded,
        [
            ("get_token", Some("acme-0"), 1),
            ("token_issued", Some("acme-3"), 1),
            ("token_issued", Some("acme-4"), 1),
            ("audit_gap", None, 2),
            ("get_token", Some("acme-5"), 1),
        ]
    );
    assert_eq!(journal.stats().failed, 2);
    journal.close().await;
    assert_eq!(read_all(&open(&disk.after_power_loss(0), settings()).unwrap()).len(), 5);
}

#[tokio::test]
async fn refused_handshakes_are_counted_and_displace_no_record_while_the_journal_cannot_be_written()
{
    let disk = FaultyStorage::default();
    let journal = open(&disk, settings()).unwrap();
    disk.state().room = Some(100);
    assert!(append(&journal, call(0)).await.is_err());
    let handshakes = i64::try_from(2 * queue::MAX_RECORDS_PER_SHARD).unwrap();
    for _ in 0..handshakes {
        let handshake = Record::new(DateTime::UNIX_EPOCH, Event::HandshakeRefused);
        drop(journal.append(handshake));
    }
    assert_eq!(append(&journal, issue(1)).await, Err(AuditUnavailable::Unwritable));
    disk.state().room = None;
    until(|| journal.is_writable()).await;
    append(&journal, call(2)).await.unwrap();
    let events = read_all(&journal);
    let recorded: Vec<_> = events.iter().map(|e| (&*e.event, e.account.as_deref())).collect();
    let expected =
        [("token_issued", Some("acme-1")), ("audit_gap", None), ("get_token", Some("acme-2"))];
    assert_eq!(recorded, expected);
    assert_eq!(events[1].detail["other_records"], handshakes.to_string());
}

#[tokio::test]
async fn a_read_only_disk_makes_the_journal_unwritable_until_it_is_writable_again() {
    let disk = FaultyStorage::default();
    let journal = open(&disk, settings()).unwrap();
    {
        let mut state = disk.state();
        state.read_only = true;
    }
    assert!(append(&journal, call(0)).await.is_err());
    disk.state().read_only = false;
    until(|| journal.is_writable()).await;
    append(&journal, call(1)).await.unwrap();
    let events = read_all(&journal);
    assert_eq!(events.iter().map(|e| &*e.event).collect::<Vec<_>>(), ["audit_gap", "get_token"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Storage fails at random before a power failure. Each record that was reported durable is present,
    /// once and in order.
    #[test]
    fn a_record_that_was_reported_durable_survives_any_faults(
        faults in proptest::collection::vec((0_u8..6, 0_usize..3, 0_usize..2_000), 1..12),
        surviving in 0_usize..3_000,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let disk = FaultyStorage::default();
        let limits = JournalSettings { segment_bytes: 2_500, ..settings() };
        let journal = open(&disk, limits).unwrap();
        let mut durable = Vec::new();
        for (nth, (kind, times, room)) in faults.into_iter().enumerate() {
            {
                let mut state = disk.state();
                state.failing_syncs = if kind == 0 { times } else { 0 };
                state.failing_removals = if kind <= 1 { times } else { 0 };
                state.room = (kind == 2).then_some(room);
            }
            let account = format!("acme-{nth}");
            if runtime.block_on(append(&journal, call(nth))).is_ok() {
                durable.push(account);
            }
        }
        let disk = disk.after_power_loss(surviving);
        let reopened = open(&disk, limits).unwrap();
        let events = read_all(&reopened);
        let recorded = accounts(&events);
        let kept: Vec<_> =
            recorded.iter().filter(|name| durable.iter().any(|a| a == *name)).collect();
        prop_assert_eq!(kept, durable.iter().collect::<Vec<_>>());
    }
}
