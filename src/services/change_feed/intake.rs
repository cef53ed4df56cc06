//! Seals the client secrets that admins write into the intake column, and empties the column.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use tracing::{debug, info};

use super::duty::{Duty, POLL_INTERVAL};
use crate::{
    crypto::{Keyring, LiveKeyring, SEALED_PREFIX},
    domain::secret::{ClientSecret, SealedSecret},
    services::feed_health::FeedHealth,
    store::{
        Session, StoreError, UnusableRow,
        intake::{self, Intake, Sealed, SealedBatch},
        within,
    },
};

/// The name under which rows are reported whose secret cannot be sealed.
const COLUMN: &str = "accounts.client_secret";
/// After this time, rows that could not be written are tried again.
const RETRY_REFUSED: Duration = Duration::from_secs(30);

/// The duty that seals secrets.
pub(super) struct IntakeSealer {
    pub(super) keyring: Arc<LiveKeyring>,
    pub(super) health: Arc<FeedHealth>,
    pub(super) refused: Refused,
}

/// The rows that the database refused to write.
#[derive(Default)]
pub(super) struct Refused {
    rows: BTreeSet<UnusableRow>,
    /// When the first of them was refused.
    since: Option<Instant>,
}

impl Duty for IntakeSealer {
    const NAME: &'static str = "intake";
    const LOCK_TIMEOUT: Duration = Duration::from_secs(1);

    async fn perform(&mut self, session: &mut Session) -> Result<(), StoreError> {
        if self.refused.since.is_some_and(|since| since.elapsed() > RETRY_REFUSED) {
            self.refused = Refused::default();
        }
        let refused_before = self.refused.rows.clone();
        let result = self.seal_all(session).await;
        if self.refused.rows != refused_before || self.refused.rows.is_empty() {
            let rows: Vec<_> = self.refused.rows.iter().cloned().collect();
            self.health.replace_unusable(&[COLUMN], &rows);
        }
        result
    }

    fn pause(&self) -> Duration {
        POLL_INTERVAL
    }
}

impl IntakeSealer {
    /// Seals until no value is left that can be sealed. One that cannot be stored does not hinder the
    /// others.
    async fn seal_all(&mut self, session: &mut Session) -> Result<(), StoreError> {
        let mut sealed = 0;
        // Rows that were locked, for example by an admin, are left for the next call.
        let mut locked = Vec::new();
        loop {
            let mut except: Vec<_> = self.refused.rows.iter().map(|row| row.id).collect();
            except.extend(&locked);
            // It is kept until the values are stored, so that its primary key counts as used.
            let keyring = self.keyring.current();
            let seal = |intake: &Intake| seal(&keyring, intake);
            match within(intake::seal_intake(session.connection()?, &except, seal)).await? {
                SealedBatch::Processed(0) => break,
                SealedBatch::Processed(count) => sealed += count,
                SealedBatch::Refused { id, error } if error.is_delayed() => {
                    debug!(id, %error, "a secret is sealed later");
                    locked.push(id);
                }
                SealedBatch::Refused { id, error } => {
                    let problem = format!("the secret cannot be sealed: {error}");
                    self.refused.rows.insert(UnusableRow::new(COLUMN, id, problem));
                    self.refused.since.get_or_insert_with(Instant::now);
                }
            }
        }
        if sealed > 0 {
            info!(accounts = sealed, "secrets were sealed and the intake column emptied");
        }
        Ok(())
    }
}

/// Seals the value of an intake column for its row, or returns why the value is refused, without quoting it.
///
/// If it is the secret that is sealed already, its version stays, and so does the sealed value, unless that was sealed
/// with a key that is not primary any more.
fn seal(keyring: &Keyring, intake: &Intake) -> Result<Sealed, String> {
    let secret = if intake.value.starts_with(SEALED_PREFIX) {
        let opened = keyring.open_intake(&intake.client_id, &intake.value);
        opened.map_err(|error| error.to_string())?
    } else {
        ClientSecret::new(&intake.value).map_err(|error| error.to_string())?
    };
    let same = intake
        .sealed
        .as_ref()
        .map(SealedSecret::bytes)
        .filter(|sealed| keyring.holds_secret(intake.id, intake.version, sealed, &secret));
    if let Some(sealed) = same.filter(|sealed| keyring.is_sealed_with_primary(sealed)) {
        return Ok(Sealed { version: intake.version, value: sealed.to_vec() });
    }
    let version = if same.is_some() { intake.version } else { intake.next_version() };
    Ok(Sealed { version, value: keyring.seal_secret(intake.id, version, &secret) })
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;
    use crate::domain::account::{AccountId, CredentialVersion};

    fn intake(value: &str, sealed: Option<Vec<u8>>) -> Intake {
        Intake {
            id: AccountId(7),
            client_id: "acme".parse().unwrap(),
            version: CredentialVersion(3),
            sealed: sealed.map(Into::into),
            value: value.to_owned().into(),
        }
    }

    #[test]
    fn the_secret_that_is_sealed_already_keeps_its_version_however_it_is_written() {
        let text = Keyring::generate(DateTime::UNIX_EPOCH);
        let keyring = Keyring::parse(&text).unwrap();
        let first = seal(&keyring, &intake("SK.1", None)).unwrap();
        assert_eq!(first.version, CredentialVersion(3));

        let secret = ClientSecret::new("SK.1").unwrap();
        let sealed = keyring.intake_public().seal(&"acme".parse().unwrap(), &secret).unwrap();
        for again in ["SK.1", &sealed] {
            let again = seal(&keyring, &intake(again, Some(first.value.clone()))).unwrap();
            assert_eq!(again.version, CredentialVersion(3));
            assert_eq!(again.value, first.value);
        }
        let other = seal(&keyring, &intake("SK.2", Some(first.value.clone()))).unwrap();
        assert_eq!(other.version, CredentialVersion(4));
        let secret = keyring.open_secret(AccountId(7), CredentialVersion(4), &other.value).unwrap();
        assert_eq!(secret.expose(), "SK.2");

        // A value that does not open is replaced, and one of an older key is sealed again.
        let forged = seal(&keyring, &intake("SK.1", Some(vec![1; 60]))).unwrap();
        assert_eq!(forged.version, CredentialVersion(4));
        let newer = Keyring::generate(DateTime::UNIX_EPOCH);
        let (_, newer) = newer.split_once("[[key]]").unwrap();
        let newer = format!("{}[[key]]{newer}", text.replace("primary = true", "primary = false"));
        let newer = Keyring::parse(&newer).unwrap();
        let again = seal(&newer, &intake("SK.1", Some(first.value.clone()))).unwrap();
        assert_eq!(again.version, CredentialVersion(3));
        assert!(again.value != first.value && newer.is_sealed_with_primary(&again.value));
    }
}
