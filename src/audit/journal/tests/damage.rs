//! Torn tails, damage, and readers whose position is of another journal.

use super::*;

#[tokio::test]
async fn a_torn_tail_is_moved_to_its_own_file_and_everything_before_it_is_kept() {
    let disk = FaultyStorage::default();
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
        let reopened = open(&disk, settings()).unwrap();
        assert_eq!(read_all(&reopened).len(), 3);
        assert_eq!(disk.texts(".torn"), [(format!("{name}.torn"), tail)]);
        assert_eq!(disk.texts(".jsonl")[0].1, text);
    }
}

#[tokio::test]
async fn a_segment_without_a_header_is_moved_away_unless_it_holds_records() {
    let disk = FaultyStorage::default();
    let journal = open(&disk, settings()).unwrap();
    append(&journal, call(0)).await.unwrap();
    journal.close().await;
    let (name, text) = disk.texts(".jsonl").remove(0);

    let headerless = disk.after_power_loss(0);
    headerless.state().files.get_mut(&name).unwrap().bytes.truncate(20);
    let reopened = open(&headerless, settings()).unwrap();
    assert_eq!(headerless.texts(".torn").len(), 1);
    assert!(reopened.chain().chain.starts_with("c00000002-"), "numbers of starts are not reused");

    let tampered = disk.after_power_loss(0);
    let headless = text.replacen("journal", "journul", 1).into_bytes();
    tampered.state().files.get_mut(&name).unwrap().bytes = headless;
    let damage = open(&tampered, settings()).unwrap_err();
    assert!(matches!(damage, JournalError::Damaged { line: 1, .. }), "{damage}");
}

#[tokio::test]
async fn damage_before_the_tail_is_reported_with_file_and_line() {
    let disk = FaultyStorage::default();
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
    let disk = FaultyStorage::default();
    let limits = JournalSettings { segment_bytes: 1_500, ..settings() };
    let journal = open(&disk, limits).unwrap();
    for nth in 0..10 {
        append(&journal, call(nth)).await.unwrap();
    }
    journal.close().await;
    let (name, text) = disk.texts(".jsonl").remove(0);
    let edited = text.replace("acme-1", "acme-X").into_bytes();
    disk.state().files.get_mut(&name).unwrap().bytes = edited;
    let reopened = open(&disk, limits).unwrap();
    let damage = read(&reopened, &reopened.chains()[0]).unwrap_err();
    assert!(matches!(damage, ReadError::Damaged { line: 3, .. }), "{damage}");
}

#[tokio::test]
async fn a_position_with_another_hash_is_refused() {
    let disk = FaultyStorage::default();
    let journal = open(&disk, settings()).unwrap();
    for nth in 0..3 {
        append(&journal, call(nth)).await.unwrap();
    }
    let events = read_all(&journal);
    let link = Arc::clone(&journal.chains()[0].link);
    let mut reader = journal.reader(Arc::clone(&link), events[1].head());
    assert_eq!(reader.read().unwrap(), events[2..]);
    let foreign = ChainHead { seq: 2, hash: events[0].hash };
    let refused = journal.reader(link, foreign).read().unwrap_err();
    assert!(matches!(refused, ReadError::Damaged { .. }), "{refused}");
}
