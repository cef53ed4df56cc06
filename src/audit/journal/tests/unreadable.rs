//! Segments whose contents were changed without any other trace, in a storage without times.

use super::*;

/// A journal with five records in its open segment.
async fn filled(settings: JournalSettings) -> (FaultyStorage, Journal) {
    let disk = FaultyStorage::default();
    let journal = open(&disk, settings).unwrap();
    for nth in 0..5 {
        append(&journal, call(nth)).await.unwrap();
    }
    (disk, journal)
}

/// Overwrites the last segment from its third line on. Its length stays.
fn overwrite(disk: &FaultyStorage) {
    let (name, text) = disk.texts(".jsonl").pop().unwrap();
    let keep: usize = text.split_inclusive('\n').take(2).map(str::len).sum();
    disk.state().files.get_mut(&name).unwrap().bytes[keep..].fill(b'x');
}

/// Reads as delivery does, which has a segment restored that it cannot read.
async fn read_restored(journal: &Journal) -> Vec<StoredEvent> {
    let chain = &journal.chains()[0];
    let Err(ReadError::Damaged { file, .. }) = read(journal, chain) else { panic!("no damage") };
    assert!(journal.restore(&file).await);
    read(journal, chain).unwrap()
}

/// Promise 34: what delivery cannot read back is written again from memory.
#[tokio::test]
async fn records_that_cannot_be_read_back_are_written_again_from_memory() {
    let (disk, journal) = filled(settings()).await;
    overwrite(&disk);
    append(&journal, call(5)).await.unwrap();
    let events = read_restored(&journal).await;
    assert_eq!(accounts(&events), ["acme-0", "acme-1", "acme-2", "acme-3", "acme-4", "acme-5"]);
    append(&journal, call(6)).await.unwrap();
    journal.close().await;
    assert_eq!(journal.stats().lost, 0);
    let reopened = open(&disk, settings()).unwrap();
    assert_eq!(read(&reopened, &reopened.chains()[0]).unwrap().len(), 7);
    assert_eq!(disk.texts(".torn").len(), 1, "what was found stays as evidence");
}

#[tokio::test]
async fn a_journal_that_closes_reads_back_what_is_not_delivered() {
    let (disk, journal) = filled(settings()).await;
    overwrite(&disk);
    journal.close().await;
    let reopened = open(&disk, settings()).unwrap();
    assert_eq!(read(&reopened, &reopened.chains()[0]).unwrap().len(), 5);
}

/// Otherwise the next start would refuse the damaged file.
#[tokio::test]
async fn a_damaged_segment_whose_records_are_delivered_is_moved_aside_when_the_journal_closes() {
    let (disk, journal) = filled(settings()).await;
    journal.mark_delivered(&journal.chain().chain, 5);
    overwrite(&disk);
    journal.close().await;
    assert_eq!(journal.stats().lost, 0);
    open(&disk, settings()).unwrap();
}

#[tokio::test]
async fn after_its_end_a_journal_restores_what_delivery_asks_for() {
    let (disk, journal) = filled(settings()).await;
    journal.close().await;
    overwrite(&disk);
    assert_eq!(read_restored(&journal).await.len(), 5);
}

#[tokio::test]
async fn what_can_neither_be_read_back_nor_restored_counts_as_lost() {
    let (disk, journal) = filled(JournalSettings { memory_bytes: 0, ..settings() }).await;
    overwrite(&disk);
    let chain = &journal.chains()[0];
    let Err(ReadError::Damaged { file, .. }) = read(&journal, chain) else { panic!("no damage") };
    assert!(journal.restore(&file).await);
    assert_eq!(journal.stats().lost, 4);
    until(|| journal.after_gap(&chain.link.chain, 2).is_some_and(|after| after.seq == 5)).await;
}

/// A position in Postgres that is not this journal's looks like damage to the reader.
#[tokio::test]
async fn an_intact_segment_is_left_as_it_is() {
    let (disk, journal) = filled(settings()).await;
    let before = disk.texts(".jsonl");
    assert!(journal.restore(&before[0].0).await);
    assert_eq!(disk.texts(".jsonl"), before);
    append(&journal, call(5)).await.unwrap();
    assert_eq!(journal.stats().segments, 1);
}

#[tokio::test]
async fn segments_of_earlier_starts_are_left_as_evidence() {
    let (disk, journal) = filled(settings()).await;
    journal.close().await;
    let reopened = open(&disk, settings()).unwrap();
    let before = disk.texts(".jsonl");
    assert!(!reopened.restore(&before[0].0).await);
    assert_eq!(disk.texts(".jsonl"), before);
}

#[tokio::test]
async fn nothing_is_missing_of_a_chain_whose_segments_are_delivered_and_gone() {
    let (disk, journal) = filled(settings()).await;
    journal.close().await;
    let reopened =
        open(&disk, JournalSettings { retention: Duration::ZERO, ..settings() }).unwrap();
    let chain = reopened.chains().remove(0);
    let head = read(&reopened, &chain).unwrap().last().unwrap().head();
    let mut reader = reopened.reader(Arc::clone(&chain.link), head);
    reopened.mark_delivered(&chain.link.chain, head.seq);
    until(|| reopened.chains().iter().all(|it| it.link.chain != chain.link.chain)).await;
    assert_eq!(reader.read().unwrap(), []);
}
