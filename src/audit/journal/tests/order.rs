//! The order of records, links between chains, and closing a journal.

use std::sync::atomic::AtomicUsize;

use super::*;

#[tokio::test]
async fn appended_records_read_back_in_order_from_real_files() {
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
async fn each_start_opens_a_chain_that_is_linked_to_the_previous_head() {
    let dir = tempfile::tempdir().unwrap();
    let state_dir = StateDir::open(dir.path()).unwrap();
    let mut last: Option<(String, ChainHead)> = None;
    for start in 0..4 {
        let journal = Journal::open(&state_dir, settings(), Clock::System).unwrap();
        let link = journal.chain().clone();
        assert_eq!(link.linked_chain, last.as_ref().map(|(chain, _)| chain.clone()));
        assert_eq!(
            link.linked_hash,
            last.as_ref().map_or(crate::audit::chain::Digest::ZERO, |(_, head)| head.hash)
        );
        // The third start records nothing; the fourth is linked to its empty chain.
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
async fn a_full_segment_is_followed_by_another_in_the_same_chain() {
    let disk = FaultyStorage::default();
    let journal = open(&disk, JournalSettings { segment_bytes: 2_000, ..settings() }).unwrap();
    for nth in 0..20 {
        append(&journal, call(nth)).await.unwrap();
    }
    assert!(disk.texts(".jsonl").len() > 3);
    assert_eq!(read_all(&journal).len(), 20);
}

#[tokio::test]
async fn close_writes_queued_records_and_later_appends_are_refused() {
    let disk = FaultyStorage::default();
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
fn records_of_many_threads_get_gapless_numbers_in_each_threads_order() {
    let disk = FaultyStorage::default();
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
