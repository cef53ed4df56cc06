//! Targets for data that the broker has stored and that somebody has changed.

use std::{fs, sync::LazyLock, time::Duration};

use chrono::DateTime;
use tempfile::TempDir;
use token_broker::{
    audit::{
        chain::StoredEvent,
        export::ExportLine,
        journal::{Archive, Journal, JournalSettings},
        record::{Event, Record},
    },
    crypto::{Keyring, RowBinding},
    domain::{
        account::{AccountId, CredentialVersion},
        clock::Clock,
        secret::ClientSecret,
    },
    files::state_dir::StateDir,
};

use super::edits::apply;

// The account, credential version and client id of the sealed secret.
const ACCOUNT: AccountId = AccountId(7);
const VERSION: CredentialVersion = CredentialVersion(3);
const CLIENT_ID: &str = "acmeId";

/// A keyring and a secret in two sealed forms: for its database row, and for intake (the form in which
/// an admin registers it).
static SEALED: LazyLock<(Keyring, Vec<u8>, String)> = LazyLock::new(|| {
    let keyring =
        Keyring::parse(&Keyring::generate(Clock::System.now())).expect("a new keyring is valid");
    let secret = ClientSecret::new("SK.secret").expect("the secret is valid");
    let sealed = keyring.seal_secret(ACCOUNT, VERSION, &secret);
    let client_id = CLIENT_ID.parse().expect("the client id is valid");
    let intake = keyring.intake_public().seal(&client_id, &secret).expect("sealing succeeds");
    (keyring, sealed, intake)
});

/// A sealed value opens only if it is unchanged. The input is a list of edits to a sealed value; it is also
/// tried as a value itself.
pub fn sealed_value(bytes: &[u8]) {
    let (keyring, sealed, intake) = &*SEALED;
    let binding = RowBinding::client_secret(ACCOUNT, VERSION);
    let mut edited = sealed.clone();
    apply(&mut edited, bytes);
    for value in [&*edited, bytes] {
        assert_eq!(keyring.open(&binding, value).is_ok(), value == sealed);
    }

    let client_id = CLIENT_ID.parse().expect("the client id is valid");
    let mut edited = intake.clone().into_bytes();
    apply(&mut edited, bytes);
    for value in [&*edited, bytes] {
        let Ok(text) = std::str::from_utf8(value) else { continue };
        assert_eq!(keyring.open_intake(&client_id, text).is_ok(), text == intake);
        let _ = Keyring::parse(text);
    }
}

/// A valid segment of a journal: the name and the contents of the file, and the events in it.
struct Segment {
    name: String,
    bytes: Vec<u8>,
    events: Vec<StoredEvent>,
}

static SEGMENT: LazyLock<Segment> = LazyLock::new(|| {
    let home = TempDir::new().expect("a directory can be created");
    let state_dir = StateDir::open(home.path()).expect("the state directory can be opened");
    let settings = JournalSettings { retention: Duration::from_hours(1), ..Default::default() };
    let journal =
        Journal::open(&state_dir, settings, Clock::System).expect("the journal can be opened");
    for nth in 0..5 {
        let record = Record::new(DateTime::UNIX_EPOCH, Event::GetToken)
            .requested_account("acme")
            .with("nth", nth.to_string());
        let _ = journal.append(record);
    }
    // Dropping the last handle closes the journal in the background. The loop waits for that.
    drop(journal);
    loop {
        let events = read_journal(home.path()).expect("an unchanged journal is valid");
        let segment = fs::read_dir(home.path().join("journal"))
            .expect("the file can be read")
            .map(|entry| entry.expect("the file can be read").path())
            .find(|path| path.extension().is_some_and(|it| it == "jsonl"));
        if let Some(segment) = segment.filter(|_| events.len() == 5) {
            let name = segment
                .file_name()
                .expect("the path ends in a name")
                .to_string_lossy()
                .into_owned();
            return Segment {
                name,
                bytes: fs::read(&segment).expect("the file can be read"),
                events,
            };
        }
        std::thread::yield_now();
    }
});

/// Returns all events of a journal, or the error if it is damaged.
fn read_journal(state_dir: &std::path::Path) -> Result<Vec<StoredEvent>, String> {
    let archive = Archive::open(state_dir, None).map_err(|error| error.to_string())?;
    let mut events = vec![];
    for chain in archive.chains() {
        let mut reader = archive.reader(chain.link, chain.before);
        loop {
            let next = reader.read().map_err(|error| error.to_string())?;
            if next.is_empty() {
                break;
            }
            events.extend(next);
        }
    }
    Ok(events)
}

/// However a segment was changed, the events that are read from it are the first of those that were written.
/// The rest is reported as damage, or ignored as an incomplete last line. The input is a list of edits to a
/// segment; it is also tried as a line.
pub fn journal(bytes: &[u8]) {
    let segment = &*SEGMENT;
    let mut edited = segment.bytes.clone();
    apply(&mut edited, bytes);
    let home = TempDir::new().expect("a directory can be created");
    fs::create_dir(home.path().join("journal")).expect("a directory can be created");
    fs::write(home.path().join("journal").join(&segment.name), &edited)
        .expect("a file can be written");
    if let Ok(events) = read_journal(home.path()) {
        assert!(segment.events.starts_with(&events), "{}", String::from_utf8_lossy(&edited));
    }
    if let Ok(ExportLine::Record(event)) = ExportLine::parse(bytes) {
        let line = serde_json::to_vec(&event).expect("every event can be serialized");
        assert_eq!(ExportLine::parse(&line), Ok(ExportLine::Record(event)));
    }
}
