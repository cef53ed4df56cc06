//! Files that another program removes, moves, replaces or truncates while the journal is used, in a real directory.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use super::*;

/// What another program does: its name, and a function of the state directory.
type Disturbance = (&'static str, fn(&Path));

/// What other programs do to the journal's files.
const DISTURBANCES: &[Disturbance] = &[
    ("a cleaner removes the files", |state| each(state, |file| fs::remove_file(file).unwrap())),
    ("a cleaner removes all but the last file", |state| {
        let files = files(state);
        files[..files.len() - 1].iter().for_each(|file| fs::remove_file(file).unwrap());
    }),
    ("a cleaner removes the last file", |state| fs::remove_file(last(state)).unwrap()),
    ("logrotate moves the files", |state| each(state, |file| drop(moved(file)))),
    ("logrotate moves the files and creates empty ones", |state| {
        each(state, |file| {
            moved(file);
            File::create(file).unwrap();
        });
    }),
    ("logrotate copies and truncates the files", |state| {
        each(state, |file| {
            fs::copy(file, file.with_extension("1")).unwrap();
            File::create(file).unwrap();
        });
    }),
    ("files are compressed", |state| {
        each(state, |file| {
            fs::write(file.with_extension("jsonl.gz"), "compressed").unwrap();
            fs::remove_file(file).unwrap();
        });
    }),
    ("files lose their second half", |state| {
        each(state, |file| {
            let opened = OpenOptions::new().write(true).open(file).unwrap();
            opened.set_len(opened.metadata().unwrap().len() / 2).unwrap();
        });
    }),
    ("files are replaced by copies", |state| {
        each(state, |file| {
            let original = moved(file);
            fs::copy(original, file).unwrap();
        });
    }),
    ("files are overwritten by something as long", |state| {
        each(state, |file| {
            let len = fs::metadata(file).unwrap().len();
            fs::write(file, vec![b'x'; usize::try_from(len).unwrap() + 1]).unwrap();
        });
    }),
    ("files are moved, and overwritten by others as long", |state| {
        each(state, |file| {
            let len = fs::metadata(moved(file)).unwrap().len();
            fs::write(file, vec![b'x'; usize::try_from(len).unwrap()]).unwrap();
        });
    }),
    ("files are overwritten in place with nothing else to show it", |state| {
        each(state, |file| {
            until_file_times_move_on(file);
            let opened = OpenOptions::new().write(true).open(file).unwrap();
            let len = usize::try_from(opened.metadata().unwrap().len()).unwrap();
            opened.write_all_at(&vec![b'x'; len - len / 3], (len / 3) as u64).unwrap();
        });
    }),
    ("files are truncated and extended to their lengths", |state| {
        each(state, |file| {
            until_file_times_move_on(file);
            let len = fs::metadata(file).unwrap().len();
            File::create(file).unwrap().set_len(len).unwrap();
        });
    }),
    ("files are appended to", |state| {
        each(state, |file| {
            let mut opened = OpenOptions::new().append(true).open(file).unwrap();
            opened.write_all(b"another line\n").unwrap();
        });
    }),
    ("all but the last file are edited in place", |state| {
        let files = files(state);
        for file in &files[..files.len() - 1] {
            let edited = fs::read_to_string(file).unwrap().replace("acme-", "evil-");
            fs::write(file, edited).unwrap();
        }
    }),
    ("the directory of the files is removed", |state| {
        remove_dir(&state.join("journal"));
    }),
    ("the directory of the files is moved", |state| {
        fs::rename(state.join("journal"), state.join("old")).unwrap();
    }),
    ("the directory of the files is replaced", |state| {
        fs::rename(state.join("journal"), state.join("old")).unwrap();
        fs::create_dir(state.join("journal")).unwrap();
    }),
    ("the state directory is removed", |state| remove_dir(state)),
    ("the state directory is moved", |state| {
        fs::rename(state, state.with_extension("old")).unwrap();
    }),
    ("the state directory is removed and created", |state| {
        remove_dir(state);
        fs::create_dir(state).unwrap();
    }),
    ("the delivered positions and the lock are removed", |state| {
        let _ = fs::remove_file(state.join("journal/delivered.json"));
        fs::remove_file(state.join("lock")).unwrap();
    }),
];

/// Waits until a change of `file` gives it another time: file systems do not distinguish times of a few milliseconds.
fn until_file_times_move_on(file: &Path) {
    let probe = tempfile::NamedTempFile::new_in(file.parent().unwrap()).unwrap();
    let changed = |path: &Path| fs::metadata(path).unwrap().modified().unwrap();
    while changed(probe.path()) <= changed(file) {
        fs::write(probe.path(), "now").unwrap();
    }
}

/// Removes a directory, into which the journal may write meanwhile.
fn remove_dir(path: &Path) {
    while fs::remove_dir_all(path).is_err() {}
}

fn files(state: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(state.join("journal")).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> =
        entries.filter(|path| path.extension().is_some_and(|it| it == "jsonl")).collect();
    files.sort();
    files
}

fn last(state: &Path) -> PathBuf {
    files(state).pop().unwrap()
}

fn each(state: &Path, disturb: impl Fn(&Path)) {
    for file in files(state) {
        disturb(&file);
    }
}

fn moved(file: &Path) -> PathBuf {
    let to = file.with_extension("1");
    fs::rename(file, &to).unwrap();
    to
}

/// A journal of several small segments in a real directory, with ten records.
struct Disturbed {
    parent: tempfile::TempDir,
    settings: JournalSettings,
    journal: Journal,
}

impl Disturbed {
    async fn new(settings: JournalSettings) -> Self {
        let parent = tempfile::tempdir().unwrap();
        let settings = JournalSettings { segment_bytes: 1_500, ..settings };
        let state_dir = StateDir::open(&parent.path().join("state")).unwrap();
        let journal = Journal::open(&state_dir, settings, Clock::System).unwrap();
        for nth in 0..10 {
            append(&journal, call(nth)).await.unwrap();
        }
        assert!(journal.stats().segments > 2);
        Self { parent, settings, journal }
    }

    fn state(&self) -> PathBuf {
        self.parent.path().join("state")
    }

    /// Closes the journal, and opens it as the next start does.
    async fn reopened(self) -> (tempfile::TempDir, Journal) {
        self.journal.close().await;
        drop(self.journal);
        let state_dir = StateDir::open(&self.parent.path().join("state")).unwrap();
        let journal = Journal::open(&state_dir, self.settings, Clock::System).unwrap();
        (self.parent, journal)
    }
}

/// Reads all records of a journal, with those after gaps, as delivery does.
fn read_beyond_gaps(journal: &Journal, chain: &LocalChain, after: ChainHead) -> Vec<StoredEvent> {
    let (mut events, mut after) = (Vec::new(), after);
    loop {
        let mut reader = journal.reader(Arc::clone(&chain.link), after);
        loop {
            match reader.read() {
                Ok(more) if more.is_empty() => return events,
                Ok(more) => events.extend(more),
                Err(ReadError::Missing { seq, .. }) => {
                    after = journal.after_gap(&chain.link.chain, seq).unwrap();
                    break;
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
}

fn expected(records: std::ops::Range<usize>) -> Vec<String> {
    records.map(|nth| format!("acme-{nth}")).collect()
}

/// Promise: whatever another program does to the files, it is noticed before the next answer leaves, and the records
/// that are not delivered are written again.
#[tokio::test]
async fn no_undelivered_record_is_lost_whatever_other_programs_do_to_the_files() {
    for (what, disturb) in DISTURBANCES {
        let disturbed = Disturbed::new(settings()).await;
        let journal = &disturbed.journal;
        disturb(&disturbed.state());
        append(journal, call(10)).await.unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(accounts(&read_all(journal)), expected(0..11), "{what}");
        // The files are there when the call is answered, as a kill of the process shows.
        let on_disk: String =
            files(&disturbed.state()).iter().map(|it| fs::read_to_string(it).unwrap()).collect();
        for account in expected(0..11) {
            assert!(on_disk.contains(&format!("\"{account}\"")), "{what}: {account}");
        }
        append(journal, call(11)).await.unwrap();
        let (_parent, reopened) = disturbed.reopened().await;
        assert_eq!(
            accounts(&read(&reopened, &reopened.chains()[0]).unwrap()),
            expected(0..12),
            "{what}"
        );
        assert_eq!(reopened.stats().lost, 0, "{what}");
    }
}

/// Promise: an idle broker notices it too, at the latest when it stops.
#[tokio::test]
async fn files_that_vanish_from_an_idle_journal_are_restored() {
    for (what, disturb) in DISTURBANCES {
        let disturbed = Disturbed::new(settings()).await;
        disturb(&disturbed.state());
        let (_parent, reopened) = disturbed.reopened().await;
        assert_eq!(
            accounts(&read(&reopened, &reopened.chains()[0]).unwrap()),
            expected(0..10),
            "{what}"
        );
    }
}

#[tokio::test]
async fn only_undelivered_records_are_written_again_and_delivery_goes_on_behind_the_delivered_ones()
{
    for (what, disturb) in DISTURBANCES {
        let disturbed = Disturbed::new(settings()).await;
        let journal = &disturbed.journal;
        let delivered = read_all(journal)[5].head();
        journal.mark_delivered(&journal.chain().chain, delivered.seq);
        disturb(&disturbed.state());
        append(journal, call(10)).await.unwrap();
        let chain = &journal.chains()[0];
        let rest = read_beyond_gaps(journal, chain, delivered);
        assert_eq!(accounts(&rest), expected(6..11), "{what}");
        assert_eq!(journal.stats().lost, 0, "{what}");
    }
}

/// Promise: what is lost is said, and recorded in the log; calls go on.
#[tokio::test]
async fn records_that_are_neither_in_a_file_nor_in_memory_are_reported_as_lost() {
    let disturbed = Disturbed::new(JournalSettings { memory_bytes: 0, ..settings() }).await;
    let journal = &disturbed.journal;
    let delivered = read_all(journal)[2].head();
    journal.mark_delivered(&journal.chain().chain, delivered.seq);
    each(&disturbed.state(), |file| drop(File::create(file).unwrap()));
    append(journal, call(10)).await.unwrap();
    append(journal, call(11)).await.unwrap();
    until(|| journal.stats().lost == 7).await;
    let chain = &journal.chains()[0];
    let recorded = || read_beyond_gaps(journal, chain, delivered);
    until(|| recorded().iter().any(|event| event.event == "audit_gap")).await;
    let rest = recorded();
    assert_eq!(accounts(&rest), expected(10..12));
    let lost: Vec<_> = rest.iter().filter_map(crate::audit::lost::LostRecords::of).collect();
    let ranges: Vec<_> = lost.iter().map(|lost| (lost.first, lost.last)).collect();
    assert_eq!(ranges.first().map(|range| range.0), Some(4), "{ranges:?}");
    assert_eq!(ranges.last().map(|range| range.1), Some(10), "{ranges:?}");
    assert_eq!(lost.iter().map(|lost| lost.last - lost.first + 1).sum::<i64>(), 7);
}

/// Promise: as long as the files cannot be restored, nothing is answered.
#[tokio::test]
async fn while_the_files_cannot_be_restored_calls_are_refused_and_later_nothing_is_lost() {
    let disturbed = Disturbed::new(settings()).await;
    let (journal, state) = (&disturbed.journal, disturbed.state());
    remove_dir(&state);
    fs::write(&state, "not a directory").unwrap();
    assert!(append(journal, call(99)).await.is_err());
    assert!(!journal.is_writable());
    until(|| journal.problem().is_some()).await;
    assert_eq!(accounts(&read_all(journal)), expected(0..10), "delivery goes on");
    fs::remove_file(&state).unwrap();
    until(|| journal.is_writable()).await;
    append(journal, call(10)).await.unwrap();
    assert_eq!(journal.problem(), None);
    let (_parent, reopened) = disturbed.reopened().await;
    let events = read(&reopened, &reopened.chains()[0]).unwrap();
    assert_eq!(accounts(&events), expected(0..11));
    assert_eq!(events.iter().filter(|event| event.event == "audit_gap").count(), 1);
}

/// Promise: two processes never write to one state directory.
#[tokio::test]
async fn a_directory_that_another_process_has_taken_meanwhile_is_left_to_it() {
    let disturbed = Disturbed::new(settings()).await;
    let (journal, state) = (&disturbed.journal, disturbed.state());
    remove_dir(&state);
    let other = StateDir::open(&state).unwrap();
    assert!(append(journal, call(99)).await.is_err());
    until(|| journal.problem().is_some_and(|it| it.contains("in use by another process"))).await;
    assert!(!state.join("journal").exists());
    drop(other);
    until(|| journal.problem().is_some_and(|it| it.contains("another replica"))).await;
    remove_dir(&state);
    until(|| journal.is_writable()).await;
}

/// Segments of an earlier start are restored too.
#[tokio::test]
async fn undelivered_segments_of_an_earlier_start_are_restored() {
    for (what, disturb) in DISTURBANCES {
        // Only this start's records are in memory.
        if ["truncate", "half", "overwritten", "edited"].iter().any(|it| what.contains(it)) {
            continue;
        }
        let (parent, journal) = Disturbed::new(settings()).await.reopened().await;
        disturb(&parent.path().join("state"));
        append(&journal, call(10)).await.unwrap();
        assert_eq!(accounts(&read_all(&journal)), expected(0..11), "{what}");
        journal.close().await;
    }
}
