//! Torn tails, damage, and readers whose position is of another journal.

use super::{
    super::recover::{CLOSED_FILE, POSITIONS_FILE},
    *,
};

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
async fn what_an_earlier_start_set_aside_is_kept() {
    let disk = FaultyStorage::default();
    let journal = open(&disk, settings()).unwrap();
    append(&journal, call(0)).await.unwrap();
    journal.close().await;
    let (name, _) = disk.texts(".jsonl").remove(0);
    {
        let mut state = disk.state();
        let mut earlier = state.files[&name].clone();
        earlier.bytes = b"earlier".to_vec();
        state.files.insert(format!("{name}.torn"), earlier);
        state.files.get_mut(&name).unwrap().bytes.extend_from_slice(b"{\"instance");
    }
    open(&disk, settings()).unwrap();
    assert_eq!(disk.texts(".torn"), [(format!("{name}.torn"), "earlier".to_owned())]);
    assert_eq!(disk.texts(".torn.2"), [(format!("{name}.torn.2"), "{\"instance".to_owned())]);
}

#[tokio::test]
async fn a_segment_without_a_header_is_moved_away_unless_it_holds_records() {
    let disk = FaultyStorage::default();
    let journal = open(&disk, settings()).unwrap();
    append(&journal, call(0)).await.unwrap();
    journal.close().await;
    let (name, text) = disk.texts(".jsonl").remove(0);

    let headerless = disk.after_power_loss(0);
    // As after a crash.
    headerless.state().files.remove(CLOSED_FILE).unwrap();
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

/// Settings under which no delivered segment is deleted: the storage says that all files are from 1970.
fn kept() -> JournalSettings {
    JournalSettings { retention: Duration::from_hours(200 * 365 * 24), ..settings() }
}

/// What another program does to a segment: a name, and a function of the storage and of the segment's name.
type Harm = (&'static str, fn(&FaultyStorage, &str));

const HARMS: &[Harm] = &[
    ("it is emptied", |disk, name| overwrite(disk, name, |_| Vec::new())),
    ("its header is cut", |disk, name| overwrite(disk, name, |old| old[..30].to_vec())),
    ("its last line is gone", |disk, name| {
        overwrite(disk, name, |old| {
            let end = old[..old.len() - 1].iter().rposition(|b| *b == b'\n').unwrap();
            old[..=end].to_vec()
        });
    }),
    ("it is cut within a line", |disk, name| {
        overwrite(disk, name, |old| old[..old.len() - 9].to_vec());
    }),
    ("it is garbage", |disk, name| overwrite(disk, name, |old| vec![b'x'; old.len()])),
    ("it is garbage in lines", |disk, name| overwrite(disk, name, |_| b"garbage\n".repeat(9))),
    ("it is zeros", |disk, name| overwrite(disk, name, |old| vec![0; old.len()])),
    ("its records are zeros", |disk, name| {
        overwrite(disk, name, |old| {
            let header = old.iter().position(|b| *b == b'\n').unwrap();
            [&old[..=header], &vec![0; old.len() - header - 1]].concat()
        });
    }),
    ("a record is edited", |disk, name| {
        overwrite(disk, name, |old| String::from_utf8(old).unwrap().replace("acme", "evil").into());
    }),
    ("its header is edited", |disk, name| {
        overwrite(disk, name, |old| {
            String::from_utf8(old).unwrap().replace("started", "ended").into()
        });
    }),
    ("it is another program's file", |disk, name| {
        overwrite(disk, name, |_| b"{\"level\":\"info\",\"msg\":\"rotated\"}\n".to_vec());
    }),
    ("it is another segment", |disk, name| {
        let (_, other) = disk.texts(".jsonl").into_iter().find(|(other, _)| other != name).unwrap();
        overwrite(disk, name, |_| other.into_bytes());
    }),
    ("nobody may read it", |disk, name| {
        disk.state().unreadable.insert(name.to_owned());
    }),
];

fn overwrite(disk: &FaultyStorage, name: &str, by: impl FnOnce(Vec<u8>) -> Vec<u8>) {
    let mut state = disk.state();
    let file = state.files.get_mut(name).unwrap();
    file.bytes = by(std::mem::take(&mut file.bytes));
}

/// Two chains of several segments, all closed, the second one with records up to 9.
async fn two_chains(delivered: bool) -> FaultyStorage {
    let disk = FaultyStorage::default();
    for _ in 0..2 {
        let limits = JournalSettings { segment_bytes: 1_000, ..kept() };
        let journal = open(&disk, limits).unwrap();
        for nth in 0..9 {
            append(&journal, call(nth)).await.unwrap();
        }
        if delivered {
            journal.mark_delivered(&journal.chain().chain, 9);
        }
        journal.close().await;
    }
    disk
}

/// Postgres has what is delivered, so that nothing is lost with the file.
#[tokio::test]
async fn a_delivered_segment_is_set_aside_whatever_is_in_its_place() {
    let names = two_chains(true).await.texts(".jsonl").len();
    assert!(names >= 6, "each chain has a first, a middle and a last segment");
    for (harm, inflict) in HARMS {
        for index in 0..names {
            let disk = two_chains(true).await;
            let before = disk.texts(".jsonl");
            let last = read_end(&disk);
            let name = &before[index].0;
            inflict(&disk, name);
            let reopened = open(&disk, kept()).unwrap_or_else(|e| panic!("{harm}, {name}: {e}"));
            assert_eq!(reopened.chain().root(), last, "{harm}, {name}: the chains stay linked");
            append(&reopened, call(0)).await.unwrap();
            assert_eq!(reopened.stats().lost, 0);
            reopened.close().await;
            // A damage of records that nobody reads any more is not looked for.
            let set_aside = disk.state().files.contains_key(&format!("{name}.torn"));
            assert!(set_aside || index < names - 1, "{harm}, {name}: it was overlooked");
            assert_ne!(set_aside, disk.state().files.contains_key(name), "{harm}, {name}");
            open(&disk, kept()).unwrap_or_else(|e| panic!("{harm}, {name}, again: {e}"));
        }
    }
}

/// Several of them at once, as by a program that rewrites all files of a directory.
#[tokio::test]
async fn all_delivered_segments_are_set_aside_together() {
    for (harm, inflict) in HARMS.iter().filter(|(harm, _)| *harm != "it is another segment") {
        let disk = two_chains(true).await;
        let last = read_end(&disk);
        for (name, _) in disk.texts(".jsonl") {
            inflict(&disk, &name);
        }
        let reopened = open(&disk, kept()).unwrap_or_else(|error| panic!("{harm}: {error}"));
        assert_eq!(reopened.chain().root(), last, "{harm}");
        append(&reopened, call(0)).await.unwrap();
    }
}

#[tokio::test]
async fn an_undelivered_segment_that_is_damaged_stays_as_evidence() {
    let names = two_chains(false).await.texts(".jsonl").len();
    for (harm, inflict) in HARMS {
        for index in 0..names {
            let disk = two_chains(false).await;
            let name = disk.texts(".jsonl")[index].0.clone();
            inflict(&disk, &name);
            let opened = open(&disk, kept());
            let chains = opened.as_ref().map(Journal::chains).unwrap_or_default();
            let readable = chains.iter().all(|chain| read(opened.as_ref().unwrap(), chain).is_ok());
            assert!(opened.is_err() || !readable, "{harm}, {name}: it was overlooked");
            assert!(disk.state().files.contains_key(&name), "{harm}, {name}: it is gone");
            assert!(disk.texts(".torn").is_empty(), "{harm}, {name}");
        }
    }
}

/// After a crash, the last segment alone says where it ended; of the others, their successors say so.
#[tokio::test]
async fn without_a_clean_end_or_positions_a_damaged_segment_counts_as_undelivered() {
    let disk = two_chains(true).await;
    let names: Vec<_> = disk.texts(".jsonl").into_iter().map(|(name, _)| name).collect();
    let garbage = |lost: &str, name: &str| {
        let disk = disk.after_power_loss(0);
        disk.state().files.remove(lost).unwrap();
        overwrite(&disk, name, |old| vec![b'x'; old.len()]);
        open(&disk, kept()).map(drop)
    };
    for name in &names[..names.len() - 1] {
        garbage(CLOSED_FILE, name).unwrap();
        garbage(POSITIONS_FILE, name).unwrap_err();
    }
    let last = names.last().unwrap();
    garbage(CLOSED_FILE, last).unwrap_err();
    garbage(POSITIONS_FILE, last).unwrap_err();
}

/// The end of the chain that was closed last, by the intact files.
fn read_end(disk: &FaultyStorage) -> ChainHead {
    let intact = open(&disk.after_power_loss(0), kept()).unwrap();
    intact.chain().root()
}
