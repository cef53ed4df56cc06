//! What the broker wrote itself, after somebody had his hands on it.

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

/// A secret's account, version and login.
const ACCOUNT: AccountId = AccountId(7);
const VERSION: CredentialVersion = CredentialVersion(3);
const LOGIN: &str = "acmeId";

/// A keyring, and a secret that it sealed: for a row, and for intake.
static SEALED: LazyLock<(Keyring, Vec<u8>, String)> = LazyLock::new(|| {
    let keyring = Keyring::parse(&Keyring::generate(Clock::System.now())).expect("a keyring");
    let secret = ClientSecret::new("SK.secret").expect("a secret");
    let sealed = keyring.seal_secret(ACCOUNT, VERSION, &secret);
    let login = LOGIN.parse().expect("a client id");
    let intake = keyring.intake_public().seal(&login, &secret).expect("it is sealed");
    (keyring, sealed, intake)
});

/// A sealed value opens as it was sealed, and not at all once anything of it was changed. The bytes are the
/// edits of one; they are tried as a value, too.
pub fn sealed_value(bytes: &[u8]) {
    let (keyring, sealed, intake) = &*SEALED;
    let place = RowBinding::client_secret(ACCOUNT, VERSION);
    let mut edited = sealed.clone();
    apply(&mut edited, bytes);
    for value in [&*edited, bytes] {
        assert_eq!(keyring.open(&place, value).is_ok(), value == sealed);
    }

    let login = LOGIN.parse().expect("a client id");
    let mut edited = intake.clone().into_bytes();
    apply(&mut edited, bytes);
    for value in [&*edited, bytes] {
        let Ok(text) = std::str::from_utf8(value) else { continue };
        assert_eq!(keyring.open_intake(&login, text).is_ok(), text == intake);
        let _ = Keyring::parse(text);
    }
}

/// A segment of a journal: its name, its bytes, and what they say.
struct Written {
    name: String,
    bytes: Vec<u8>,
    events: Vec<StoredEvent>,
}

static WRITTEN: LazyLock<Written> = LazyLock::new(|| {
    let home = TempDir::new().expect("a directory");
    let state_dir = StateDir::open(home.path()).expect("a state directory");
    let settings = JournalSettings { retention: Duration::from_hours(1), ..Default::default() };
    let journal = Journal::open(&state_dir, settings, Clock::System).expect("a journal");
    for nth in 0..5 {
        let record = Record::new(DateTime::UNIX_EPOCH, Event::GetToken)
            .requested_account("acme")
            .with("nth", nth.to_string());
        let _ = journal.append(record);
    }
    // The last handle closes it, and waits for nobody.
    drop(journal);
    loop {
        let events = read(home.path()).expect("it was not touched");
        let segment = fs::read_dir(home.path().join("journal"))
            .expect("it is there")
            .map(|entry| entry.expect("it is there").path())
            .find(|path| path.extension().is_some_and(|it| it == "jsonl"));
        if let Some(segment) = segment.filter(|_| events.len() == 5) {
            let name = segment.file_name().expect("it has one").to_string_lossy().into_owned();
            return Written { name, bytes: fs::read(&segment).expect("it is there"), events };
        }
        std::thread::yield_now();
    }
});

/// Everything that a journal holds, as long as it is what was written.
fn read(state_dir: &std::path::Path) -> Result<Vec<StoredEvent>, String> {
    let archive = Archive::open(state_dir, None).map_err(|error| error.to_string())?;
    let mut events = vec![];
    for chain in archive.chains() {
        let mut reader = archive.reader(chain.link, chain.before);
        loop {
            let more = reader.read().map_err(|error| error.to_string())?;
            if more.is_empty() {
                break;
            }
            events.extend(more);
        }
    }
    Ok(events)
}

/// However a segment was changed, what is read of it is what was written, from the first record on: the
/// rest is damage, or a torn tail. The bytes are the edits; they are tried as a line, too.
pub fn journal(bytes: &[u8]) {
    let written = &*WRITTEN;
    let mut edited = written.bytes.clone();
    apply(&mut edited, bytes);
    let home = TempDir::new().expect("a directory");
    fs::create_dir(home.path().join("journal")).expect("a directory");
    fs::write(home.path().join("journal").join(&written.name), &edited).expect("a file");
    if let Ok(events) = read(home.path()) {
        assert!(written.events.starts_with(&events), "{}", String::from_utf8_lossy(&edited));
    }
    if let Ok(ExportLine::Record(event)) = ExportLine::parse(bytes) {
        let line = serde_json::to_vec(&event).expect("every record is a line");
        assert_eq!(ExportLine::parse(&line), Ok(ExportLine::Record(event)));
    }
}
