//! Signs the head of this start's chain at an interval, for the log, for a file, and for Postgres: a copy
//! of any of them, kept where the log's keeper cannot reach, shows whether the log was cut short since.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use chrono::TimeDelta;
use tokio::{sync::Notify, task};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    checkpoint::{Signature, SignedCheckpoint},
    journal::Journal,
};
use crate::{
    crypto::Keyring,
    domain::clock::{Clock, Timestamp},
    files::state_dir::StateDir,
};

/// How often a head is signed, if the chain has grown: what is cut off sooner than that leaves no trace
/// of a chain that does not go on.
const INTERVAL: Duration = Duration::from_mins(1);
/// How often one goes to Postgres, beside the last of the chain.
const KEPT_EVERY: TimeDelta = TimeDelta::minutes(10);
/// The size at which the file of heads becomes the one before: some six weeks.
const FILE_BYTES: u64 = 16 << 20;

/// Signs heads. Shared by its own task and the delivery, which takes them to Postgres.
pub struct CheckpointSigner {
    journal: Journal,
    keyring: Arc<Keyring>,
    clock: Clock,
    file: PathBuf,
    signed: Mutex<Signed>,
    /// Told when there is a head for Postgres.
    wanted: Notify,
}

#[derive(Default)]
struct Signed {
    latest: Option<SignedCheckpoint>,
    /// When the last head that Postgres has was signed, and of which record it is.
    kept: Option<(Timestamp, i64)>,
    /// There will be no later one.
    ended: bool,
}

impl CheckpointSigner {
    /// A notary for `journal`, whose heads go into a file of `state_dir`.
    #[must_use]
    pub fn new(
        journal: Journal,
        keyring: Arc<Keyring>,
        clock: Clock,
        state_dir: &StateDir,
    ) -> Arc<Self> {
        let (signed, wanted) = (Mutex::default(), Notify::new());
        Arc::new(Self { journal, keyring, clock, file: state_dir.heads_file(), signed, wanted })
    }

    /// Signs a head now and at each interval, until `stop`.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        loop {
            Arc::clone(&self).sign().await;
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.clock.sleep(INTERVAL) => {}
            }
        }
    }

    /// Signs the chain's last head, once nothing is appended any more.
    pub async fn end(self: Arc<Self>) {
        Arc::clone(&self).sign().await;
        self.signed().ended = true;
        self.wanted.notify_one();
    }

    /// Signs the head, if it moved since the last time.
    async fn sign(self: Arc<Self>) {
        let (head, chain) = (self.journal.head(), &self.journal.chain().chain);
        let known = self.signed().latest.as_ref().map_or(0, |latest| latest.seq);
        if head.seq <= known {
            return;
        }
        let signed = SignedCheckpoint::new(&self.keyring, chain, head, self.clock.now());
        let Signature { key_id, signature } = &signed.signature;
        info!(chain, seq = head.seq, hash = %head.hash, at = %signed.at.format("%FT%T%.6fZ"), key_id,
            signature = hex::encode(signature), "audit head");
        self.signed().latest = Some(signed.clone());
        self.wanted.notify_one();
        let file = self.file.clone();
        let written = task::spawn_blocking(move || write(file, &signed)).await;
        if let Err(error) = written.unwrap_or_else(|bug| Err(io::Error::other(bug))) {
            warn!(%error, file = %self.file.display(), "a signed head of the audit log was not kept");
        }
    }

    /// The head that Postgres should have now that it has the records of `chain` up to `delivered`.
    pub(crate) fn due(&self, chain: &str, delivered: i64) -> Option<SignedCheckpoint> {
        if self.journal.chain().chain != chain {
            return None;
        }
        let signed = self.signed();
        let latest = signed.latest.as_ref().filter(|latest| latest.seq <= delivered)?;
        let due = match signed.kept {
            None => true,
            Some((at, seq)) => seq < latest.seq && (signed.ended || latest.at - at >= KEPT_EVERY),
        };
        due.then(|| latest.clone())
    }

    /// Notes that Postgres has `head`.
    pub(crate) fn kept(&self, head: &SignedCheckpoint) {
        self.signed().kept = Some((head.at, head.seq));
    }

    /// Returns when there is a new head for Postgres; for one waiter.
    pub(crate) async fn wanted(&self) {
        self.wanted.notified().await;
    }

    fn signed(&self) -> MutexGuard<'_, Signed> {
        // Held for a look or a note; nothing panics in between.
        self.signed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Appends a line to the file, which is on disk then.
fn write(file: PathBuf, head: &SignedCheckpoint) -> io::Result<()> {
    let mut line = serde_json::to_vec(head)?;
    line.push(b'\n');
    if fs::metadata(&file).is_ok_and(|file| file.len() >= FILE_BYTES) {
        fs::rename(&file, file.with_extension("1.jsonl"))?;
    }
    let mut file = OpenOptions::new().append(true).create(true).mode(0o600).open(file)?;
    file.write_all(&line)?;
    file.sync_data()
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;
    use crate::{
        audit::{
            journal::JournalSettings,
            record::{Event, Record},
        },
        crypto::VerifyingKeys,
        domain::clock::ManualClock,
    };

    struct Office {
        notary: Arc<CheckpointSigner>,
        journal: Journal,
        manual: ManualClock,
        keys: VerifyingKeys,
        home: tempfile::TempDir,
    }

    impl Office {
        fn open() -> Self {
            let home = tempfile::tempdir().unwrap();
            let state_dir = StateDir::open(home.path()).unwrap();
            let manual = ManualClock::new(DateTime::UNIX_EPOCH + TimeDelta::days(20_000));
            let clock = Clock::Manual(manual.clone());
            let settings = JournalSettings::default();
            let journal = Journal::open(&state_dir, settings, clock.clone()).unwrap();
            let keyring = Arc::new(Keyring::parse(&Keyring::generate(clock.now())).unwrap());
            let keys = VerifyingKeys::from(&*keyring);
            let notary = CheckpointSigner::new(journal.clone(), keyring, clock, &state_dir);
            Self { notary, journal, manual, keys, home }
        }

        async fn append(&self) {
            let record = Record::new(self.notary.clock.now(), Event::GetToken);
            self.journal.append(record).durable(Duration::from_secs(20)).await.unwrap();
        }

        fn due(&self, delivered: i64) -> Option<i64> {
            let due = self.notary.due(&self.journal.chain().chain, delivered)?;
            self.notary.kept(&due);
            Some(due.seq)
        }

        fn filed(&self) -> Vec<SignedCheckpoint> {
            let text = fs::read_to_string(self.home.path().join("audit-heads.jsonl"));
            let text = text.unwrap_or_default();
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
        }
    }

    #[tokio::test]
    async fn a_head_is_signed_when_the_chain_has_grown_and_filed() {
        let office = Office::open();
        office.notary.clone().sign().await;
        assert_eq!(office.filed(), []);
        office.append().await;
        office.append().await;
        office.notary.clone().sign().await;
        office.notary.clone().sign().await;
        let [head] = &office.filed()[..] else { panic!("one head") };
        assert_eq!((head.seq, head.verify(&office.keys)), (2, Ok(())));
        assert_eq!(head.head(), office.journal.head());
        assert_eq!(head.chain, office.journal.chain().chain);
    }

    #[tokio::test]
    async fn postgres_gets_a_head_once_it_has_its_records_then_at_times_and_the_last() {
        let office = Office::open();
        office.append().await;
        office.notary.clone().sign().await;
        assert_eq!((office.due(0), office.due(1), office.due(1)), (None, Some(1), None));
        assert!(office.notary.due("another", 1).is_none());
        office.append().await;
        office.notary.clone().sign().await;
        assert_eq!(office.due(2), None, "too soon");
        office.manual.advance(Duration::from_mins(10));
        office.append().await;
        office.notary.clone().sign().await;
        assert_eq!((office.due(2), office.due(3)), (None, Some(3)));
        office.append().await;
        office.notary.clone().end().await;
        assert_eq!((office.due(4), office.due(4)), (Some(4), None));
    }

    #[test]
    fn a_file_that_is_large_becomes_the_one_before() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("audit-heads.jsonl");
        let keyring = Keyring::parse(&Keyring::generate(DateTime::UNIX_EPOCH)).unwrap();
        let head = super::super::chain::tests::link().root();
        let head = SignedCheckpoint::new(&keyring, "c1", head, DateTime::UNIX_EPOCH);
        fs::File::create(&file).unwrap().set_len(FILE_BYTES).unwrap();
        write(file.clone(), &head).unwrap();
        let before = home.path().join("audit-heads.1.jsonl");
        assert_eq!(fs::metadata(before).unwrap().len(), FILE_BYTES);
        let lines = fs::read_to_string(file).unwrap();
        assert_eq!(serde_json::from_str::<SignedCheckpoint>(&lines).unwrap(), head);
    }
}
