//! Archives: reading a journal that another process wrote or still writes.

use super::*;

fn names(disk: &FaultyStorage) -> Vec<(String, String)> {
    disk.texts("")
}

fn read_archive(disk: &FaultyStorage) -> Result<Vec<StoredEvent>, ReadError> {
    let archive = Archive::open_on(Arc::new(disk.clone()), None).unwrap();
    let mut events = Vec::new();
    for chain in archive.chains() {
        let mut reader = archive.reader(Arc::clone(&chain.link), chain.before);
        loop {
            let more = reader.read()?;
            if more.is_empty() {
                break;
            }
            events.extend(more);
        }
    }
    Ok(events)
}

#[tokio::test]
async fn an_archive_reads_every_durable_record_and_changes_no_file() {
    let disk = FaultyStorage::default();
    let limits = JournalSettings { segment_bytes: 1_500, ..settings() };
    let journal = open(&disk, limits).unwrap();
    for nth in 0..10 {
        append(&journal, call(nth)).await.unwrap();
    }
    journal.close().await;
    let journal = open(&disk, limits).unwrap();
    append(&journal, call(10)).await.unwrap();
    let expected = read_all(&journal);
    // The journal is still being written.
    let before = names(&disk);
    assert_eq!(read_archive(&disk).unwrap(), expected);
    assert_eq!(names(&disk), before);
    // A crash has torn the last line.
    let torn = disk.after_power_loss(0);
    let last = torn.texts(".jsonl").pop().unwrap().0;
    torn.state().files.get_mut(&last).unwrap().bytes.extend_from_slice(b"{\"instance\":");
    let before = names(&torn);
    assert_eq!(read_archive(&torn).unwrap(), expected);
    assert_eq!(names(&torn), before);
}

#[tokio::test]
async fn an_archive_skips_a_segment_without_a_header_and_reports_damage() {
    let disk = FaultyStorage::default();
    let journal = open(&disk, settings()).unwrap();
    for nth in 0..3 {
        append(&journal, call(nth)).await.unwrap();
    }
    journal.close().await;
    let (name, text) = disk.texts(".jsonl").remove(0);
    let headerless = disk.after_power_loss(0);
    let next = name.replacen("c00000001-", "c00000002-", 1);
    headerless.state().files.insert(next, faulty_storage::StoredFile::default());
    assert_eq!(read_archive(&headerless).unwrap().len(), 3);

    let damaged = disk.after_power_loss(0);
    let edited = text.replace("acme-1", "acme-X").into_bytes();
    damaged.state().files.get_mut(&name).unwrap().bytes = edited;
    let damage = read_archive(&damaged).unwrap_err();
    assert!(matches!(damage, ReadError::Damaged { line: 3, .. }), "{damage}");

    // A segment whose header is damaged is left out, and the others are read.
    let left_out = disk.after_power_loss(0);
    let earlier = name.replacen("c00000001-", "c00000000-", 1);
    left_out.state().files.entry(earlier.clone()).or_default().bytes = b"no header\n".into();
    assert_eq!(read_archive(&left_out).unwrap().len(), 3);
    let archive = Archive::open_on(Arc::new(left_out.clone()), None).unwrap();
    assert!(archive.damaged()[0].to_string().contains(&earlier));
}

#[tokio::test]
async fn an_archive_begins_with_the_oldest_segment_that_is_left() {
    let disk = FaultyStorage::default();
    let limits = JournalSettings { segment_bytes: 1_500, max_bytes: 6_000, ..settings() };
    let journal = open(&disk, limits).unwrap();
    for nth in 0..20 {
        append(&journal, call(nth)).await.unwrap();
        journal.mark_delivered(&journal.chain().chain, i64::try_from(nth).unwrap());
    }
    journal.close().await;
    let events = read_archive(&disk).unwrap();
    let (first, last) = (events.first().unwrap(), events.last().unwrap());
    assert!(first.seq > 1, "the first segments are gone");
    assert_eq!((last.seq, events.len()), (20, usize::try_from(21 - first.seq).unwrap()));
}
