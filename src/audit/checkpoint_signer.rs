//! Signs checkpoints of this start's chain at an interval.
//!
//! Each checkpoint is written to the broker's own log and to a file in the state directory, and less often
//! to Postgres. A copy of it, stored where those who can change the audit log have no access, shows whether
//! records were later removed from the end of the chain.

use std::{
    cmp::Reverse,
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use chrono::TimeDelta;
use parking_lot::Mutex;
use tokio::{sync::Notify, task};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    checkpoint::{Signature, SignedCheckpoint},
    journal::Journal,
};
use crate::{
    crypto::{LiveKeyring, VerifyingKeys},
    domain::clock::{Clock, Timestamp},
    files::state_dir::StateDir,
};

/// How often the head is signed, if it has moved. Records that are removed from the end of the chain before
/// the next checkpoint leave no trace, unless later records follow them.
const SIGN_INTERVAL: Duration = Duration::from_mins(1);
/// The shortest time between two checkpoints in Postgres, except that the last one of a chain is always
/// stored.
const STORE_INTERVAL: TimeDelta = TimeDelta::minutes(10);
/// Size in bytes at which the checkpoint file is rotated: some six weeks of checkpoints.
const MAX_FILE_BYTES: u64 = 16 << 20;
/// The extension of the rotated checkpoint file.
const ROTATED: &str = "1.jsonl";

/// Signs checkpoints of the chain that this process writes.
///
/// Shared by the task that runs [`CheckpointSigner::run`] and by delivery, which stores checkpoints in
/// Postgres once the records that they cover are there.
pub struct CheckpointSigner {
    journal: Journal,
    keyring: Arc<LiveKeyring>,
    clock: Clock,
    file: PathBuf,
    state: Mutex<SignerState>,
    /// Notified when a checkpoint was signed, and when the last one may be stored.
    signed: Notify,
}

#[derive(Default)]
struct SignerState {
    latest: Option<SignedCheckpoint>,
    /// Time and `seq` of the last checkpoint that Postgres has.
    stored: Option<(Timestamp, i64)>,
    /// `latest` is the chain's last checkpoint.
    ended: bool,
}

impl CheckpointSigner {
    /// Returns a signer for `journal` that appends to the checkpoint file of `state_dir`.
    #[must_use]
    pub fn new(
        journal: Journal,
        keyring: Arc<LiveKeyring>,
        clock: Clock,
        state_dir: &StateDir,
    ) -> Arc<Self> {
        let (state, signed) = (Mutex::default(), Notify::new());
        Arc::new(Self {
            journal,
            keyring,
            clock,
            file: state_dir.checkpoints_file(),
            state,
            signed,
        })
    }

    /// Signs the head at once and again after each interval, until `stop` is cancelled.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        loop {
            self.sign().await;
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.clock.sleep(SIGN_INTERVAL) => {}
            }
        }
    }

    /// Signs the chain's last head. Call this when no more records are appended to the journal.
    ///
    /// Not cancel safe: if it is dropped, the checkpoint may be missing in the file and in Postgres.
    pub async fn sign_last(&self) {
        self.sign().await;
        self.state.lock().ended = true;
        self.signed.notify_one();
    }

    /// Signs the head, if it moved since the last checkpoint. A failure to write the file is only logged,
    /// since the broker's log has the checkpoint too.
    async fn sign(&self) {
        let (head, chain) = (self.journal.head(), &self.journal.chain().chain);
        let signed_seq = self.state.lock().latest.as_ref().map_or(0, |latest| latest.seq);
        if head.seq <= signed_seq {
            return;
        }
        let checkpoint =
            SignedCheckpoint::new(&self.keyring.current(), chain, head, self.clock.wall());
        let Signature { key_id, signature } = &checkpoint.signature;
        // `docs/audit.md` documents this line, so that the log can serve as a copy of the checkpoints.
        info!(chain, seq = head.seq, hash = %head.hash, at = %checkpoint.at.format("%FT%T%.6fZ"),
            key_id, signature = hex::encode(signature), "audit head");
        self.state.lock().latest = Some(checkpoint.clone());
        self.signed.notify_one();
        let file = self.file.clone();
        let appended = task::spawn_blocking(move || append_to_file(file, &checkpoint)).await;
        if let Err(error) = appended.unwrap_or_else(|panic| Err(io::Error::other(panic))) {
            warn!(%error, file = %self.file.display(), "an audit checkpoint was not written to its file");
        }
    }

    /// Returns the checkpoint to store in Postgres now, given that it has the records of `chain` up to
    /// `delivered`; `None` if there is none.
    pub(crate) fn due(&self, chain: &str, delivered: i64) -> Option<SignedCheckpoint> {
        if self.journal.chain().chain != chain {
            return None;
        }
        let state = self.state.lock();
        let latest = state.latest.as_ref().filter(|latest| latest.seq <= delivered)?;
        let due = match state.stored {
            None => true,
            Some((at, seq)) => {
                seq < latest.seq && (state.ended || latest.at - at >= STORE_INTERVAL)
            }
        };
        due.then(|| latest.clone())
    }

    /// Notes that Postgres has `checkpoint`.
    pub(crate) fn mark_stored(&self, checkpoint: &SignedCheckpoint) {
        self.state.lock().stored = Some((checkpoint.at, checkpoint.seq));
    }

    /// Waits until a checkpoint is signed; returns at once if one was signed since the last call returned.
    /// Supports one waiter; cancel safe.
    pub(crate) async fn signed(&self) {
        self.signed.notified().await;
    }
}

/// Appends a line to the checkpoint file and syncs it. Blocks on I/O.
fn append_to_file(file: PathBuf, checkpoint: &SignedCheckpoint) -> io::Result<()> {
    let mut line = serde_json::to_vec(checkpoint)?;
    line.push(b'\n');
    if fs::metadata(&file).is_ok_and(|file| file.len() >= MAX_FILE_BYTES) {
        fs::rename(&file, file.with_extension(ROTATED))?;
    }
    let mut file = OpenOptions::new().append(true).create(true).mode(0o600).open(file)?;
    file.write_all(&line)?;
    file.sync_data()
}

/// Returns the `seq` of the newest head of `chain` in the checkpoint file and in its rotated predecessor; 0 if they have
/// none. Lines that are torn, or not signed by one of `keys`, do not count. Blocks on I/O.
///
/// # Errors
/// When a file exists and cannot be read.
pub(crate) fn last_signed(file: &Path, chain: &str, keys: &VerifyingKeys) -> io::Result<i64> {
    let mut last = 0;
    for file in [file, &file.with_extension(ROTATED)] {
        let bytes = match fs::read(file) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let mut heads: Vec<_> = bytes
            .split(|byte| *byte == b'\n')
            .filter_map(|line| serde_json::from_slice::<SignedCheckpoint>(line).ok())
            .filter(|head| head.chain == chain && head.seq > last)
            .collect();
        // There may be tens of thousands. Only the newest signatures are verified, until one is valid.
        heads.sort_unstable_by_key(|head| Reverse(head.seq));
        let valid = heads.into_iter().find(|head| head.verify(keys).is_ok());
        last = valid.map_or(last, |head| head.seq);
    }
    Ok(last)
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;
    use crate::{
        audit::{
            chain::ChainHead,
            journal::JournalSettings,
            record::{Event, Record},
        },
        crypto::Keyring,
        domain::clock::ManualClock,
    };

    struct Fixture {
        signer: Arc<CheckpointSigner>,
        journal: Journal,
        manual: ManualClock,
        keys: VerifyingKeys,
        directory: tempfile::TempDir,
    }

    impl Fixture {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let state_dir = StateDir::open(directory.path()).unwrap();
            let manual = ManualClock::new(DateTime::UNIX_EPOCH + TimeDelta::days(20_000));
            let clock = Clock::Manual(manual.clone());
            let settings = JournalSettings::default();
            let journal = Journal::open(&state_dir, settings, clock.clone()).unwrap();
            let keyring = Keyring::parse(&Keyring::generate(clock.now())).unwrap();
            let keys = VerifyingKeys::from(&keyring);
            let keyring = Arc::new(LiveKeyring::new(keyring.into()));
            let signer = CheckpointSigner::new(journal.clone(), keyring, clock, &state_dir);
            Self { signer, journal, manual, keys, directory }
        }

        async fn append(&self) {
            let record = Record::new(self.signer.clock.now(), Event::GetToken);
            self.journal.append(record).durable(Duration::from_secs(20)).await.unwrap();
        }

        fn due(&self, delivered: i64) -> Option<i64> {
            let due = self.signer.due(&self.journal.chain().chain, delivered)?;
            self.signer.mark_stored(&due);
            Some(due.seq)
        }

        fn checkpoints_in_file(&self) -> Vec<SignedCheckpoint> {
            let text = fs::read_to_string(self.directory.path().join("audit-heads.jsonl"));
            let text = text.unwrap_or_default();
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
        }
    }

    #[tokio::test]
    async fn a_checkpoint_is_signed_and_written_to_the_file_when_the_chain_has_grown() {
        let fixture = Fixture::new();
        fixture.signer.sign().await;
        assert_eq!(fixture.checkpoints_in_file(), []);
        fixture.append().await;
        fixture.append().await;
        fixture.signer.sign().await;
        fixture.signer.sign().await;
        let [checkpoint] = &fixture.checkpoints_in_file()[..] else { panic!("one checkpoint") };
        assert_eq!((checkpoint.seq, checkpoint.verify(&fixture.keys)), (2, Ok(())));
        assert_eq!(checkpoint.head(), fixture.journal.head());
        assert_eq!(checkpoint.chain, fixture.journal.chain().chain);
    }

    #[tokio::test]
    async fn postgres_gets_the_first_checkpoint_once_it_has_the_records_then_one_each_interval_and_the_last()
     {
        let fixture = Fixture::new();
        fixture.append().await;
        fixture.signer.sign().await;
        assert_eq!((fixture.due(0), fixture.due(1), fixture.due(1)), (None, Some(1), None));
        assert!(fixture.signer.due("another", 1).is_none());
        fixture.append().await;
        fixture.signer.sign().await;
        assert_eq!(fixture.due(2), None, "too soon");
        fixture.manual.advance(Duration::from_mins(10));
        fixture.append().await;
        fixture.signer.sign().await;
        assert_eq!((fixture.due(2), fixture.due(3)), (None, Some(3)));
        fixture.append().await;
        fixture.signer.sign_last().await;
        assert_eq!((fixture.due(4), fixture.due(4)), (Some(4), None));
    }

    #[test]
    fn the_newest_valid_head_of_a_chain_is_found_in_both_files() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("audit-heads.jsonl");
        let keyring = Keyring::parse(&Keyring::generate(DateTime::UNIX_EPOCH)).unwrap();
        let keys = VerifyingKeys::from(&keyring);
        let last = |chain| last_signed(&file, chain, &keys).unwrap();
        assert_eq!(last("c1"), 0);
        let head = |keyring, chain, seq| {
            let head = ChainHead { seq, ..super::super::chain::tests::link().root() };
            SignedCheckpoint::new(keyring, chain, head, DateTime::UNIX_EPOCH)
        };
        append_to_file(file.clone(), &head(&keyring, "c1", 7)).unwrap();
        fs::rename(&file, file.with_extension(ROTATED)).unwrap();
        assert_eq!(last("c1"), 7);
        append_to_file(file.clone(), &head(&keyring, "c1", 5)).unwrap();
        append_to_file(file.clone(), &head(&keyring, "c2", 9)).unwrap();
        let other = Keyring::parse(&Keyring::generate(DateTime::UNIX_EPOCH)).unwrap();
        append_to_file(file.clone(), &head(&other, "c1", 20)).unwrap();
        let altered = SignedCheckpoint { seq: 30, ..head(&keyring, "c1", 8) };
        append_to_file(file.clone(), &altered).unwrap();
        let torn = serde_json::to_string(&head(&keyring, "c1", 40)).unwrap();
        OpenOptions::new()
            .append(true)
            .open(&file)
            .unwrap()
            .write_all(&torn.as_bytes()[..90])
            .unwrap();
        assert_eq!((last("c1"), last("c2"), last("c3")), (7, 9, 0));
    }

    #[test]
    fn a_full_checkpoint_file_is_rotated() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("audit-heads.jsonl");
        let keyring = Keyring::parse(&Keyring::generate(DateTime::UNIX_EPOCH)).unwrap();
        let head = super::super::chain::tests::link().root();
        let checkpoint = SignedCheckpoint::new(&keyring, "c1", head, DateTime::UNIX_EPOCH);
        fs::File::create(&file).unwrap().set_len(MAX_FILE_BYTES).unwrap();
        append_to_file(file.clone(), &checkpoint).unwrap();
        let rotated = directory.path().join("audit-heads.1.jsonl");
        assert_eq!(fs::metadata(rotated).unwrap().len(), MAX_FILE_BYTES);
        let lines = fs::read_to_string(file).unwrap();
        assert_eq!(serde_json::from_str::<SignedCheckpoint>(&lines).unwrap(), checkpoint);
    }
}
