//! Sealing at rest: the keyring, values bound to their place, and the intake key pair.
//!
//! What is sealed for one place opens nowhere else: table, column, row and version are
//! authenticated with the value, so that a row copied over another, or an old value put back, is
//! noticed. `docs/keys.md` gives the formats byte by byte.

pub mod bearer;
mod intake;
mod keyring;
mod keyring_document;
mod keyring_file;
mod verifying_keys;

use std::fmt;

use aws_lc_rs::aead::{self, AES_256_GCM, Aad, Nonce};
use thiserror::Error;
use zeroize::Zeroizing;

pub use self::{
    intake::{IntakeError, IntakePublicKey, SEALED_PREFIX},
    keyring::{KeyId, KeyKind, KeyStatus, Keyring},
    keyring_document::KeyringFault,
    keyring_file::KeyringError,
    verifying_keys::{SignatureError, VerifyingKeys, VerifyingKeysFault},
};
use crate::domain::{
    account::{AccountId, CredentialVersion},
    secret::{AccessToken, ClientSecret},
    token::Generation,
};

/// The first byte of every sealed value: the format that the rest has.
const FORMAT: u8 = 1;

/// Where a sealed value lives. It opens only with the same four.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RowBinding {
    /// The table.
    pub table: &'static str,
    /// What the value is to its row; of a value that moves between columns, the name for all.
    pub column: &'static str,
    /// The row's id, which is never reused.
    pub row: i64,
    /// Counts the values that this place has held.
    pub version: i64,
}

impl RowBinding {
    /// An account's client secret, whether it is the current or the previous one: a rotation moves
    /// the sealed value from one column to the other as it is.
    #[must_use]
    pub fn client_secret(account: AccountId, version: CredentialVersion) -> Self {
        Self { table: "accounts", column: "client_secret", row: account.0, version: version.0 }
    }

    /// An account's stored token.
    #[must_use]
    pub fn token(account: AccountId, generation: Generation) -> Self {
        Self { table: "tokens", column: "sealed_token", row: account.0, version: generation.0 }
    }

    /// What is authenticated with a value that lives here.
    fn context(&self) -> Vec<u8> {
        let mut context = Vec::with_capacity(96);
        push_prefixed(&mut context, "token-broker sealed v1");
        push_prefixed(&mut context, self.table);
        push_prefixed(&mut context, self.column);
        context.extend_from_slice(&self.row.to_be_bytes());
        context.extend_from_slice(&self.version.to_be_bytes());
        context
    }
}

impl fmt::Display for RowBinding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { table, column, row, version } = self;
        write!(f, "{table}.{column} of row {row}, version {version}")
    }
}

/// Appends `part` after its length, so that no two lists of parts give the same bytes.
fn push_prefixed(bytes: &mut Vec<u8>, part: &str) {
    bytes.extend_from_slice(&(part.len() as u64).to_be_bytes());
    bytes.extend_from_slice(part.as_bytes());
}

/// Why a sealed value did not open.
#[derive(Clone, Debug, Error, Eq, PartialEq)]
pub enum SealError {
    /// The keyring lacks the key; it was retired too early, or this is another deployment's value.
    #[error("the value is sealed with key {0}, which is not in the keyring")]
    UnknownKey(KeyId),
    /// Too few bytes for a sealed value.
    #[error("the sealed value is cut short")]
    Truncated,
    /// The first bytes are not those of a sealed value that this release knows.
    #[error("the value has no format that this release can open")]
    Format,
    /// The value was altered, or was sealed for another place or version.
    #[error("the sealed value was altered, or belongs to another row or version")]
    Forged,
    /// The value is authentic, but no secret or token.
    #[error("the sealed value opens, but is not what its place holds")]
    Content,
}

impl Keyring {
    /// Seals `plaintext` for `place` with the primary sealing key and a random nonce.
    #[must_use]
    pub fn seal(&self, place: &RowBinding, plaintext: &[u8]) -> Vec<u8> {
        let (id, key) = self.sealing.primary();
        let nonce: [u8; aead::NONCE_LEN] = keyring::random();
        let tag_len = AES_256_GCM.tag_len();
        let mut sealed =
            Vec::with_capacity(2 + id.as_str().len() + nonce.len() + plaintext.len() + tag_len);
        sealed.extend_from_slice(&[FORMAT, id.len()]);
        sealed.extend_from_slice(id.as_str().as_bytes());
        sealed.extend_from_slice(&nonce);
        let start = sealed.len();
        sealed.extend_from_slice(plaintext);
        let tag = key
            .seal_in_place_separate_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(place.context()),
                &mut sealed[start..],
            )
            .expect("AES-GCM seals any value below 64 GiB");
        sealed.extend_from_slice(tag.as_ref());
        sealed
    }

    /// Opens what [`Keyring::seal`] made for the same place, with the key that it names.
    pub fn open(&self, place: &RowBinding, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let sealed = Sealed::parse(sealed)?;
        let key = self
            .sealing
            .get(&sealed.key_id)
            .ok_or_else(|| SealError::UnknownKey(sealed.key_id.clone()))?;
        let mut opened = Zeroizing::new(vec![0; sealed.ciphertext.len()]);
        key.open_separate_gather(
            Nonce::assume_unique_for_key(sealed.nonce),
            Aad::from(place.context()),
            sealed.ciphertext,
            sealed.tag,
            &mut opened,
        )
        .map_err(|_| SealError::Forged)?;
        Ok(opened)
    }

    /// The key that a sealed value names, without opening it: `keys reseal` looks for old ones.
    pub fn sealed_with(sealed: &[u8]) -> Result<KeyId, SealError> {
        Ok(Sealed::parse(sealed)?.key_id)
    }

    /// Seals an account's client secret for `accounts`.
    #[must_use]
    pub fn seal_secret(
        &self,
        account: AccountId,
        version: CredentialVersion,
        secret: &ClientSecret,
    ) -> Vec<u8> {
        self.seal(&RowBinding::client_secret(account, version), secret.expose().as_bytes())
    }

    /// Opens an account's client secret.
    pub fn open_secret(
        &self,
        account: AccountId,
        version: CredentialVersion,
        sealed: &[u8],
    ) -> Result<ClientSecret, SealError> {
        let opened = self.open(&RowBinding::client_secret(account, version), sealed)?;
        let text = str::from_utf8(&opened).map_err(|_| SealError::Content)?;
        ClientSecret::new(text).map_err(|_| SealError::Content)
    }

    /// Seals an account's token for `tokens`.
    #[must_use]
    pub fn seal_token(
        &self,
        account: AccountId,
        generation: Generation,
        token: &AccessToken,
    ) -> Vec<u8> {
        self.seal(&RowBinding::token(account, generation), token.expose().as_bytes())
    }

    /// Opens an account's token.
    pub fn open_token(
        &self,
        account: AccountId,
        generation: Generation,
        sealed: &[u8],
    ) -> Result<AccessToken, SealError> {
        let opened = self.open(&RowBinding::token(account, generation), sealed)?;
        let text = str::from_utf8(&opened).map_err(|_| SealError::Content)?;
        AccessToken::new(text).map_err(|_| SealError::Content)
    }
}

/// The parts of a sealed value.
struct Sealed<'a> {
    key_id: KeyId,
    nonce: [u8; aead::NONCE_LEN],
    ciphertext: &'a [u8],
    tag: &'a [u8],
}

impl<'a> Sealed<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self, SealError> {
        let [format, id_len, rest @ ..] = bytes else { return Err(SealError::Truncated) };
        if *format != FORMAT {
            return Err(SealError::Format);
        }
        let (id, rest) = rest.split_at_checked(usize::from(*id_len)).ok_or(SealError::Truncated)?;
        let key_id =
            str::from_utf8(id).ok().and_then(|id| id.parse().ok()).ok_or(SealError::Format)?;
        let (nonce, rest) = rest.split_first_chunk().ok_or(SealError::Truncated)?;
        let end = rest.len().checked_sub(AES_256_GCM.tag_len()).ok_or(SealError::Truncated)?;
        let (ciphertext, tag) = rest.split_at(end);
        Ok(Self { key_id, nonce: *nonce, ciphertext, tag })
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use proptest::prelude::*;

    use super::*;

    fn keyring() -> Keyring {
        Keyring::parse(&Keyring::generate(DateTime::UNIX_EPOCH)).unwrap()
    }

    const PLACE: RowBinding =
        RowBinding { table: "accounts", column: "client_secret", row: 7, version: 3 };

    #[test]
    fn secrets_and_tokens_come_back_from_their_own_place() {
        let keyring = keyring();
        let (account, version, generation) =
            (AccountId(7), CredentialVersion(3), Generation(1 << 40));
        let secret = ClientSecret::new("SK.비밀").unwrap();
        let sealed = keyring.seal_secret(account, version, &secret);
        let opened = keyring.open_secret(account, version, &sealed).unwrap();
        assert_eq!(opened.expose(), secret.expose());

        let token = AccessToken::new("eyJ.a.b").unwrap();
        let sealed = keyring.seal_token(account, generation, &token);
        let opened = keyring.open_token(account, generation, &sealed).unwrap();
        assert_eq!(opened.expose(), token.expose());
        assert_eq!(
            keyring.open_token(account, Generation(1), &sealed).unwrap_err(),
            SealError::Forged
        );
    }

    #[test]
    fn a_value_opens_in_no_other_place() {
        let keyring = keyring();
        let sealed = keyring.seal(&PLACE, b"value");
        for elsewhere in [
            RowBinding { table: "tokens", ..PLACE },
            RowBinding { column: "sealed_token", ..PLACE },
            RowBinding { row: 8, ..PLACE },
            RowBinding { version: 4, ..PLACE },
            RowBinding { row: PLACE.version, version: PLACE.row, ..PLACE },
            RowBinding { table: "accountsc", column: "lient_secret", ..PLACE },
        ] {
            assert_eq!(keyring.open(&elsewhere, &sealed).unwrap_err(), SealError::Forged);
        }
    }

    #[test]
    fn the_key_is_chosen_by_its_id_and_a_missing_one_is_named() {
        let (ours, theirs) = (keyring(), keyring());
        let sealed = theirs.seal(&PLACE, b"value");
        let id = Keyring::sealed_with(&sealed).unwrap();
        let error = ours.open(&PLACE, &sealed).unwrap_err();
        assert_eq!(error, SealError::UnknownKey(id.clone()));
        assert!(error.to_string().contains(id.as_str()));
    }

    #[test]
    fn an_old_value_opens_after_another_key_became_primary() {
        let before = Keyring::generate(DateTime::UNIX_EPOCH);
        let sealed = Keyring::parse(&before).unwrap().seal(&PLACE, b"value");
        let more = Keyring::generate(DateTime::UNIX_EPOCH);
        let (_, more) = more.split_once("[[key]]").unwrap();
        let after = Keyring::parse(&format!(
            "{}[[key]]{more}",
            before.replace("primary = true", "primary = false")
        ))
        .unwrap();
        assert_eq!(after.open(&PLACE, &sealed).unwrap().as_slice(), b"value");
        let resealed = after.seal(&PLACE, b"value");
        assert_ne!(
            Keyring::sealed_with(&resealed).unwrap(),
            Keyring::sealed_with(&sealed).unwrap()
        );
    }

    #[test]
    fn a_value_sealed_by_another_program_from_the_documented_format_opens() {
        // Made with Python's cryptography from docs/keys.md: the format must never change.
        let key = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
        let entries = KeyKind::ALL.map(|kind| {
            format!(
                "[[key]]\nid = \"{}1\"\nkind = \"{kind}\"\nprimary = true\n\
                 created_at = \"2026-01-01T00:00:00Z\"\nkey = \"{key}\"\n",
                kind.letter(),
            )
        });
        let keyring = Keyring::parse(&format!("version = 1\n{}", entries.concat())).unwrap();
        let sealed =
            concat!("010273316465666768696a6b6c6d6e6f", "1b50f00768f2e2aca832d00491182e0af413cb38");
        let opened = keyring.open(&PLACE, &hex::decode(sealed).unwrap()).unwrap();
        assert_eq!(opened.as_slice(), b"SK.a");
    }

    #[test]
    fn two_seals_of_one_value_differ() {
        let keyring = keyring();
        assert_ne!(keyring.seal(&PLACE, b"value"), keyring.seal(&PLACE, b"value"));
    }

    #[test]
    fn what_opens_but_is_no_secret_is_refused() {
        let keyring = keyring();
        for content in [&b"\xff"[..], b"", b"two words"] {
            let sealed = keyring.seal(&PLACE, content);
            let error = keyring.open_secret(AccountId(7), CredentialVersion(3), &sealed);
            assert_eq!(error.unwrap_err(), SealError::Content);
        }
    }

    proptest! {
        #[test]
        fn any_value_comes_back(
            value in proptest::collection::vec(any::<u8>(), 0..600),
            row in any::<i64>(),
            version in any::<i64>(),
        ) {
            let keyring = keyring();
            let place = RowBinding { row, version, ..PLACE };
            let sealed = keyring.seal(&place, &value);
            let opened = keyring.open(&place, &sealed).unwrap();
            prop_assert_eq!(opened.as_slice(), &value);
            let (next_row, next_version) =
                (RowBinding { row: row ^ 1, ..place }, RowBinding { version: version ^ 1, ..place });
            prop_assert!(keyring.open(&next_row, &sealed).is_err());
            prop_assert!(keyring.open(&next_version, &sealed).is_err());
        }

        #[test]
        fn any_altered_or_missing_byte_is_noticed(at in any::<prop::sample::Index>(), by in 1_u8..) {
            let keyring = keyring();
            let mut sealed = keyring.seal(&PLACE, b"value");
            let at = at.index(sealed.len());
            prop_assert!(keyring.open(&PLACE, &sealed[..at]).is_err());
            sealed[at] ^= by;
            prop_assert!(keyring.open(&PLACE, &sealed).is_err());
        }

        #[test]
        fn arbitrary_bytes_are_refused(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..100),
            genuine_format in any::<bool>(),
        ) {
            if let (true, Some(first)) = (genuine_format, bytes.first_mut()) {
                *first = FORMAT;
            }
            prop_assert!(keyring().open(&PLACE, &bytes).is_err());
        }
    }
}
