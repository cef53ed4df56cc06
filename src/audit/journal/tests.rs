use std::{
    sync::{Mutex, atomic::AtomicUsize},
    time::Instant,
};

use chrono::{DateTime, TimeDelta};
use proptest::prelude::*;

use super::{faults::Disk, shared::stalled, *};
use crate::{
    audit::{chain::StoredEvent, record::Event},
    clock::ManualClock,
};

const AMPLE: Duration = Duration::from_secs(20);

fn settings() -> JournalSettings {
    JournalSettings::default()
}

fn open(disk: &Disk, settings: JournalSettings) -> Result<Journal, JournalError> {
    Journal::open_on(Arc::new(disk.clone()), "i-0123456789abcdef", None, settings, Clock::System)
}

fn call(nth: usize) -> Record {
    Record::new(DateTime::UNIX_EPOCH, Event::GetToken).account_as_asked(&format!("acme-{nth}"))
}

fn issue(nth: usize) -> Record {
    Record::new(DateTime::UNIX_EPOCH, Event::TokenIssued).account_as_asked(&format!("acme-{nth}"))
}

async fn append(journal: &Journal, record: Record) -> Result<(), AuditUnavailable> {
    journal.append(record).durable(AMPLE).await
}

/// Every durable record of `chain`, each checked against the one before.
fn read(journal: &Journal, chain: &LocalChain) -> Result<Vec<StoredEvent>, ReadError> {
    let mut reader = journal.reader(Arc::clone(&chain.link), chain.link.root());
    let mut events = Vec::new();
    loop {
        let more = reader.read()?;
        if more.is_empty() {
            return Ok(events);
        }
        events.extend(more);
    }
}

fn read_all(journal: &Journal) -> Vec<StoredEvent> {
    journal.chains().iter().flat_map(|chain| read(journal, chain).unwrap()).collect()
}

fn accounts(events: &[StoredEvent]) -> Vec<&str> {
    events.iter().filter_map(|event| event.account.as_deref()).collect()
}

async fn until(mut holds: impl FnMut() -> bool) {
    let patience = Instant::now() + AMPLE;
    while !holds() {
        assert!(Instant::now() < patience, "it never came about");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn what_was_appended_reads_back_in_order_from_real_files() {
    let dir = tempfile::tempdir().unwrap();
    let state_dir = StateDir::open(dir.path()).unwrap();
    let journal = Journal::open(&state_dir, settings(), Clock::System).unwrap();
    for nth in 0..50 {
        append(&journal, call(nth)).await.unwrap();
    }
    journal.close().await;
    let events = read_all(&journal);
    assert_eq!(events.len(), 50);
    assert_eq!(events[49].account.as_deref(), Some("acme-49"));
    assert!(events.iter().all(|event| event.instance == state_dir.instance()));
    assert_eq!(journal.stats().durable, 50);
    assert_eq!(journal.stats().undelivered, 50);
}

#[tokio::test]
async fn each_start_opens_a_chain_linked_to_the_head_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let state_dir = StateDir::open(dir.path()).unwrap();
    let mut last: Option<(String, Head)> = None;
    for start in 0..4 {
        let journal = Journal::open(&state_dir, settings(), Clock::System).unwrap();
        let link = journal.chain().clone();
        assert_eq!(link.linked_chain, last.as_ref().map(|(chain, _)| chain.clone()));
        assert_eq!(
            link.linked_hash,
            last.as_ref().map_or(crate::audit::chain::Digest::ZERO, |(_, head)| head.hash)
        );
        // The third start records nothing: the fourth is linked to it all the same.
        let mut head = link.root();
        if start != 2 {
            append(&journal, issue(start)).await.unwrap();
            head = read_all(&journal).last().unwrap().head();
        }
        journal.close().await;
        last = Some((link.chain, head));
    }
    let journal = Journal::open(&state_dir, settings(), Clock::System).unwrap();
    let chains: Vec<_> = journal.chains().iter().map(|chain| chain.last_seq).collect();
    assert_eq!(chains, [1, 1, 0, 1, 0]);
    assert_eq!(accounts(&read_all(&journal)), ["acme-0", "acme-1", "acme-3"]);
}

#[tokio::test]
async fn a_full_segment_is_followed_by_another_and_the_chain_goes_on() {
    let disk = Disk::default();
    let journal = open(&disk, JournalSettings { segment_bytes: 2_000, ..settings() }).unwrap();
    for nth in 0..20 {
        append(&journal, call(nth)).await.unwrap();
    }
    assert!(disk.texts(".jsonl").len() > 3);
    assert_eq!(read_all(&journal).len(), 20);
}

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
    shared.watched(|| assert_ne!(shared.writing_since.load(Ordering::Acquire), 0));
    assert_eq!(shared.writing_since.load(Ordering::Acquire), 0);
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
    let journal = open(&disk, JournalSettings { sync: Sync::Write, ..settings() }).unwrap();
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

#[tokio::test]
async fn a_failed_sync_moves_the_batch_to_a_new_segment_under_the_same_numbers() {
    let disk = Disk::default();
    let journal = open(&disk, settings()).unwrap();
    append(&journal, call(0)).await.unwrap();
    disk.state().failing_syncs = 1;
    append(&journal, call(1)).await.unwrap();
    append(&journal, call(2)).await.unwrap();
    assert!(journal.is_writable());
    let lines: Vec<_> = disk.texts(".jsonl").iter().map(|(_, t)| t.lines().count()).collect();
    assert_eq!(lines, [2, 3], "headers included; the first was cut");
    assert_eq!(accounts(&read_all(&journal)), ["acme-0", "acme-1", "acme-2"]);
    let found = open(&disk.after_power_loss(0), settings()).unwrap();
    assert_eq!(read_all(&found).len(), 3);
}

#[tokio::test]
async fn what_could_not_be_cut_from_an_abandoned_segment_is_overruled_by_its_successor() {
    let disk = Disk::default();
    let journal = open(&disk, settings()).unwrap();
    append(&journal, call(0)).await.unwrap();
    {
        let mut state = disk.state();
        state.failing_syncs = 1;
        state.failing_cuts = 1;
    }
    append(&journal, call(1)).await.unwrap();
    append(&journal, call(2)).await.unwrap();
    journal.close().await;
    let first = &disk.texts(".jsonl")[0].1;
    assert_eq!(first.lines().count(), 3, "the header, the durable record, and the abandoned one");
    let found = open(&disk.after_power_loss(10_000), settings()).unwrap();
    assert_eq!(accounts(&read_all(&found)), ["acme-0", "acme-1", "acme-2"]);
}

#[tokio::test]
async fn a_refused_call_that_could_not_be_cut_does_not_stand_for_the_record_with_its_number() {
    let disk = Disk::default();
    let journal = open(&disk, settings()).unwrap();
    append(&journal, call(0)).await.unwrap();
    {
        let mut state = disk.state();
        state.failing_syncs = 2;
        state.failing_cuts = 2;
    }
    assert!(append(&journal, call(1)).await.is_err());
    until(|| journal.is_writable()).await;
    append(&journal, call(2)).await.unwrap();
    journal.close().await;
    assert!(disk.texts(".jsonl")[0].1.contains("acme-1"), "the refused call is there still");
    let found = open(&disk.after_power_loss(10_000), settings()).unwrap();
    assert_eq!(accounts(&read_all(&found)), ["acme-0", "acme-2"]);
}

#[tokio::test]
async fn a_full_disk_refuses_calls_keeps_the_rest_and_tells_how_many_were_lost() {
    let disk = Disk::default();
    let journal = open(&disk, settings()).unwrap();
    append(&journal, call(0)).await.unwrap();
    // A part of a line fits still.
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
    let told: Vec<_> = events.iter().map(|e| (&*e.event, e.account.as_deref(), e.count)).collect();
    assert_eq!(
        told,
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
async fn a_read_only_disk_refuses_and_recovers() {
    let disk = Disk::default();
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

#[tokio::test]
async fn a_torn_tail_is_set_aside_and_everything_before_it_kept() {
    let disk = Disk::default();
    let journal = open(&disk, settings()).unwrap();
    for nth in 0..3 {
        append(&journal, call(nth)).await.unwrap();
    }
    journal.close().await;
    let (name, text) = disk.texts(".jsonl").remove(0);
    let torn = "{\"instance\":\"i-01";
    for tail in [torn.to_owned(), format!("{torn}\n"), format!("\0\0\0\n{torn}\n{torn}")] {
        let disk = disk.after_power_loss(0);
        disk.state().files.get_mut(&name).unwrap().bytes.extend_from_slice(tail.as_bytes());
        let found = open(&disk, settings()).unwrap();
        assert_eq!(read_all(&found).len(), 3);
        assert_eq!(disk.texts(".torn"), [(format!("{name}.torn"), tail)]);
        assert_eq!(disk.texts(".jsonl")[0].1, text);
    }
}

#[tokio::test]
async fn a_segment_without_a_header_is_set_aside_unless_it_holds_records() {
    let disk = Disk::default();
    let journal = open(&disk, settings()).unwrap();
    append(&journal, call(0)).await.unwrap();
    journal.close().await;
    let (name, text) = disk.texts(".jsonl").remove(0);

    let unmade = disk.after_power_loss(0);
    unmade.state().files.get_mut(&name).unwrap().bytes.truncate(20);
    let found = open(&unmade, settings()).unwrap();
    assert_eq!(unmade.texts(".torn").len(), 1);
    assert!(found.chain().chain.starts_with("c00000002-"), "numbers of starts are not reused");

    let tampered = disk.after_power_loss(0);
    let headless = text.replacen("journal", "journul", 1).into_bytes();
    tampered.state().files.get_mut(&name).unwrap().bytes = headless;
    let damage = open(&tampered, settings()).unwrap_err();
    assert!(matches!(damage, JournalError::Damaged { line: 1, .. }), "{damage}");
}

#[tokio::test]
async fn damage_before_the_tail_is_reported_with_file_and_line() {
    let disk = Disk::default();
    let journal = open(&disk, settings()).unwrap();
    for nth in 0..5 {
        append(&journal, call(nth)).await.unwrap();
    }
    journal.close().await;
    let (name, text) = disk.texts(".jsonl").remove(0);
    let lines: Vec<_> = text.split_inclusive('\n').collect();
    let edited = text.replace("acme-1", "acme-X");
    let removed = [&lines[..2], &lines[3..]].concat().concat();
    let swapped = [lines[0], lines[1], lines[3], lines[2], lines[4], lines[5]].concat();
    for tampered in [edited, removed, swapped] {
        let disk = disk.after_power_loss(0);
        disk.state().files.get_mut(&name).unwrap().bytes = tampered.into_bytes();
        let damage = open(&disk, settings()).unwrap_err();
        let JournalError::Damaged { file, line, .. } = damage else { panic!("{damage}") };
        assert_eq!((file, line), (name.clone(), 3));
    }
}

#[tokio::test]
async fn damage_in_an_older_segment_is_found_when_it_is_read() {
    let disk = Disk::default();
    let limits = JournalSettings { segment_bytes: 1_500, ..settings() };
    let journal = open(&disk, limits).unwrap();
    for nth in 0..10 {
        append(&journal, call(nth)).await.unwrap();
    }
    journal.close().await;
    let (name, text) = disk.texts(".jsonl").remove(0);
    let edited = text.replace("acme-1", "acme-X").into_bytes();
    disk.state().files.get_mut(&name).unwrap().bytes = edited;
    let found = open(&disk, limits).unwrap();
    let damage = read(&found, &found.chains()[0]).unwrap_err();
    assert!(matches!(damage, ReadError::Damaged { line: 3, .. }), "{damage}");
}

#[tokio::test]
async fn a_position_that_this_journal_never_had_is_noticed() {
    let disk = Disk::default();
    let journal = open(&disk, settings()).unwrap();
    for nth in 0..3 {
        append(&journal, call(nth)).await.unwrap();
    }
    let events = read_all(&journal);
    let link = Arc::clone(&journal.chains()[0].link);
    let mut reader = journal.reader(Arc::clone(&link), events[1].head());
    assert_eq!(reader.read().unwrap(), events[2..]);
    let foreign = Head { seq: 2, hash: events[0].hash };
    let refused = journal.reader(link, foreign).read().unwrap_err();
    assert!(matches!(refused, ReadError::Damaged { .. }), "{refused}");
}

#[tokio::test]
async fn close_writes_what_is_queued_and_what_comes_later_is_refused() {
    let disk = Disk::default();
    let journal = open(&disk, settings()).unwrap();
    let waiting: Vec<_> = (0..100).map(|nth| journal.append(call(nth))).collect();
    journal.close().await;
    journal.close().await;
    for appended in waiting {
        appended.durable(Duration::ZERO).await.unwrap();
    }
    assert!(append(&journal, call(0)).await.is_err());
    assert!(append(&journal, issue(0)).await.is_err());
    assert!(!journal.is_writable());
    assert_eq!(read_all(&open(&disk.after_power_loss(0), settings()).unwrap()).len(), 100);
}

#[tokio::test]
async fn a_second_process_on_the_directory_is_refused_while_the_writer_lives() {
    let dir = tempfile::tempdir().unwrap();
    let state_dir = StateDir::open(dir.path()).unwrap();
    let journal = Journal::open(&state_dir, settings(), Clock::System).unwrap();
    drop(state_dir);
    assert!(StateDir::open(dir.path()).is_err());
    drop(journal);
    until(|| StateDir::open(dir.path()).is_ok()).await;
}

#[test]
fn many_threads_get_gapless_numbers_and_keep_their_own_order() {
    let disk = Disk::default();
    let journal = open(&disk, settings()).unwrap();
    let durable = AtomicUsize::new(0);
    thread::scope(|scope| {
        for thread in 0..8 {
            let (journal, durable) = (&journal, &durable);
            scope.spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
                runtime.unwrap().block_on(async {
                    for round in 0..20 {
                        let calls = (0..25).map(|nth| {
                            let order = format!("{:03}", round * 25 + nth);
                            journal.append(call(thread).with("order", order))
                        });
                        for appended in calls.collect::<Vec<_>>() {
                            appended.durable(AMPLE).await.unwrap();
                            durable.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            });
        }
    });
    let events = read_all(&journal);
    assert_eq!((events.len(), durable.into_inner()), (4_000, 4_000));
    for thread in 0..8 {
        let account = format!("acme-{thread}");
        let own = events.iter().filter(|event| event.account.as_deref() == Some(&account));
        let orders: Vec<_> = own.map(|event| &event.detail["order"]).collect();
        assert!(orders.is_sorted() && orders.len() == 500);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Whatever fails, and wherever the power goes: what was answered is there, once, in order.
    #[test]
    fn an_answered_record_survives_any_faults(
        faults in proptest::collection::vec((0_u8..6, 0_usize..3, 0_usize..2_000), 1..12),
        luck in 0_usize..3_000,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let disk = Disk::default();
        let limits = JournalSettings { segment_bytes: 2_500, ..settings() };
        let journal = open(&disk, limits).unwrap();
        let mut answered = Vec::new();
        for (nth, (kind, times, room)) in faults.into_iter().enumerate() {
            {
                let mut state = disk.state();
                state.failing_syncs = if kind == 0 { times } else { 0 };
                state.failing_cuts = if kind <= 1 { times } else { 0 };
                state.room = (kind == 2).then_some(room);
            }
            let account = format!("acme-{nth}");
            if runtime.block_on(append(&journal, call(nth))).is_ok() {
                answered.push(account);
            }
        }
        let disk = disk.after_power_loss(luck);
        let found = open(&disk, limits).unwrap();
        let events = read_all(&found);
        let recorded = accounts(&events);
        let kept: Vec<_> =
            recorded.iter().filter(|name| answered.iter().any(|a| a == *name)).collect();
        prop_assert_eq!(kept, answered.iter().collect::<Vec<_>>());
    }
}
