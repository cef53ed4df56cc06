//! Sealing of values in the database: AES-256-GCM with the keyring's sealing keys.

use aws_lc_rs::{
    aead::{self, AES_256_GCM, Aad, Nonce},
    constant_time::verify_slices_are_equal,
};
use thiserror::Error;
use zeroize::Zeroizing;

use super::{
    key::{KeyId, random},
    keyring::Keyring,
    row_binding::RowBinding,
};
use crate::domain::{
    account::{AccountId, CredentialVersion},
    secret::{AccessToken, ClientSecret},
    token::Generation,
};

/// The first byte of every sealed value: the number of its format.
const FORMAT: u8 = 1;

/// Why a sealed value did not open.
#[derive(Clone, Debug, Error, Eq, PartialEq)]
pub enum SealError {
    /// The keyring lacks the key: it was retired too early, or the value is another deployment's.
    #[error("the value is sealed with key {0}, which is not in the keyring")]
    UnknownKey(KeyId),
    /// The value has fewer bytes than any sealed value.
    #[error("the sealed value is truncated")]
    Truncated,
    /// The first bytes do not name a format that this release knows.
    #[error("the value has no format that this release can open")]
    Format,
    /// The value was altered, or was sealed with another binding.
    #[error("the sealed value was altered, or belongs to another row or version")]
    Forged,
    /// The value is authentic, but its content is not a valid secret or token.
    #[error("the sealed value opens, but its content is not what its column holds")]
    Content,
}

impl Keyring {
    /// Seals `plaintext` for the row that `binding` names, with the primary sealing key and a random
    /// nonce.
    #[must_use]
    pub fn seal(&self, binding: &RowBinding, plaintext: &[u8]) -> Vec<u8> {
        let (id, key) = self.sealing.primary();
        let nonce: [u8; aead::NONCE_LEN] = random();
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
                Aad::from(binding.associated_data()),
                &mut sealed[start..],
            )
            .expect("AES-GCM seals any value below 64 GiB");
        sealed.extend_from_slice(tag.as_ref());
        sealed
    }

    /// Opens a value that [`Keyring::seal`] made with the same binding. The value names the key.
    ///
    /// # Errors
    /// [`SealError`], but not [`SealError::Content`].
    pub fn open(
        &self,
        binding: &RowBinding,
        sealed: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let sealed = SealedParts::parse(sealed)?;
        let key = self
            .sealing
            .get(&sealed.key_id)
            .ok_or_else(|| SealError::UnknownKey(sealed.key_id.clone()))?;
        let mut opened = Zeroizing::new(vec![0; sealed.ciphertext.len()]);
        key.open_separate_gather(
            Nonce::assume_unique_for_key(sealed.nonce),
            Aad::from(binding.associated_data()),
            sealed.ciphertext,
            sealed.tag,
            &mut opened,
        )
        .map_err(|_| SealError::Forged)?;
        Ok(opened)
    }

    /// Returns the id of the key that a value is sealed with, without opening it.
    pub fn sealed_with(sealed: &[u8]) -> Result<KeyId, SealError> {
        Ok(SealedParts::parse(sealed)?.key_id)
    }

    /// Seals an account's client secret for the table `accounts`.
    #[must_use]
    pub fn seal_secret(
        &self,
        account: AccountId,
        version: CredentialVersion,
        secret: &ClientSecret,
    ) -> Vec<u8> {
        self.seal(&RowBinding::client_secret(account, version), secret.expose().as_bytes())
    }

    /// Opens an account's client secret that [`Keyring::seal_secret`] sealed.
    pub fn open_secret(
        &self,
        account: AccountId,
        version: CredentialVersion,
        sealed: &[u8],
    ) -> Result<ClientSecret, SealError> {
        let opened = self.open(&RowBinding::client_secret(account, version), sealed)?;
        let text = str::from_utf8(&opened).map_err(|_| SealError::Content)?;
        ClientSecret::stored(text).map_err(|_| SealError::Content)
    }

    /// Returns whether `sealed` is the account's client secret of that version and holds `secret`. It is not if it
    /// does not open. The comparison takes the same time wherever the two differ.
    #[must_use]
    pub fn holds_secret(
        &self,
        account: AccountId,
        version: CredentialVersion,
        sealed: &[u8],
        secret: &ClientSecret,
    ) -> bool {
        self.open(&RowBinding::client_secret(account, version), sealed).is_ok_and(|opened| {
            verify_slices_are_equal(&opened, secret.expose().as_bytes()).is_ok()
        })
    }

    /// Returns whether `sealed` names the primary sealing key.
    #[must_use]
    pub fn is_sealed_with_primary(&self, sealed: &[u8]) -> bool {
        Self::sealed_with(sealed).is_ok_and(|id| id == *self.sealing.primary().0)
    }

    /// Opens `sealed` and seals its content again with the primary key, for the same row.
    ///
    /// # Errors
    /// As [`Keyring::open`].
    pub fn reseal(&self, binding: &RowBinding, sealed: &[u8]) -> Result<Vec<u8>, SealError> {
        Ok(self.seal(binding, &self.open(binding, sealed)?))
    }

    /// Seals an account's token for the table `tokens`.
    #[must_use]
    pub fn seal_token(
        &self,
        account: AccountId,
        generation: Generation,
        token: &AccessToken,
    ) -> Vec<u8> {
        self.seal(&RowBinding::token(account, generation), token.expose().as_bytes())
    }

    /// Opens an account's token that [`Keyring::seal_token`] sealed.
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

/// A sealed value, split into its parts: format, length of the key id, key id, nonce, ciphertext, tag.
struct SealedParts<'a> {
    key_id: KeyId,
    nonce: [u8; aead::NONCE_LEN],
    ciphertext: &'a [u8],
    tag: &'a [u8],
}

impl<'a> SealedParts<'a> {
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

    use super::{super::key::KeyKind, *};

    fn keyring() -> Keyring {
        Keyring::parse(&Keyring::generate(DateTime::UNIX_EPOCH)).unwrap()
    }

    const BINDING: RowBinding =
        RowBinding { table: "accounts", column: "client_secret", row: 7, version: 3 };

    #[test]
    fn secrets_and_tokens_open_with_their_own_binding() {
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
    fn a_sealed_secret_is_compared_with_another_one() {
        let (keyring, another) = (keyring(), keyring());
        let (account, version) = (AccountId(7), CredentialVersion(3));
        let [secret, other] = ["SK.1", "SK.2"].map(|text| ClientSecret::new(text).unwrap());
        let sealed = keyring.seal_secret(account, version, &secret);
        assert!(keyring.holds_secret(account, version, &sealed, &secret));
        assert!(!keyring.holds_secret(account, version, &sealed, &other));
        assert!(!keyring.holds_secret(account, CredentialVersion(4), &sealed, &secret));
        assert!(!keyring.holds_secret(account, version, &sealed[1..], &secret));
        assert!(keyring.is_sealed_with_primary(&sealed));
        assert!(!another.is_sealed_with_primary(&sealed));
    }

    #[test]
    fn a_value_opens_with_no_other_binding() {
        let keyring = keyring();
        let sealed = keyring.seal(&BINDING, b"value");
        for other in [
            RowBinding { table: "tokens", ..BINDING },
            RowBinding { column: "sealed_token", ..BINDING },
            RowBinding { row: 8, ..BINDING },
            RowBinding { version: 4, ..BINDING },
            RowBinding { row: BINDING.version, version: BINDING.row, ..BINDING },
            RowBinding { table: "accountsc", column: "lient_secret", ..BINDING },
        ] {
            assert_eq!(keyring.open(&other, &sealed).unwrap_err(), SealError::Forged);
        }
    }

    #[test]
    fn the_key_is_chosen_by_its_id_and_a_missing_one_is_named() {
        let (ours, theirs) = (keyring(), keyring());
        let sealed = theirs.seal(&BINDING, b"value");
        let id = Keyring::sealed_with(&sealed).unwrap();
        let error = ours.open(&BINDING, &sealed).unwrap_err();
        assert_eq!(error, SealError::UnknownKey(id.clone()));
        assert!(error.to_string().contains(id.as_str()));
    }

    #[test]
    fn an_old_value_opens_after_another_key_became_primary() {
        let before = Keyring::generate(DateTime::UNIX_EPOCH);
        let sealed = Keyring::parse(&before).unwrap().seal(&BINDING, b"value");
        let more = Keyring::generate(DateTime::UNIX_EPOCH);
        let (_, more) = more.split_once("[[key]]").unwrap();
        let after = Keyring::parse(&format!(
            "{}[[key]]{more}",
            before.replace("primary = true", "primary = false")
        ))
        .unwrap();
        assert_eq!(after.open(&BINDING, &sealed).unwrap().as_slice(), b"value");
        let resealed = after.seal(&BINDING, b"value");
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
        let opened = keyring.open(&BINDING, &hex::decode(sealed).unwrap()).unwrap();
        assert_eq!(opened.as_slice(), b"SK.a");
    }

    #[test]
    fn two_seals_of_one_value_differ() {
        let keyring = keyring();
        assert_ne!(keyring.seal(&BINDING, b"value"), keyring.seal(&BINDING, b"value"));
    }

    #[test]
    fn a_value_that_opens_but_is_no_secret_is_refused() {
        let keyring = keyring();
        for content in [&b"\xff"[..], b"", b"two words"] {
            let sealed = keyring.seal(&BINDING, content);
            let error = keyring.open_secret(AccountId(7), CredentialVersion(3), &sealed);
            assert_eq!(error.unwrap_err(), SealError::Content);
        }
    }

    proptest! {
        #[test]
        fn any_value_opens_to_what_was_sealed(
            value in proptest::collection::vec(any::<u8>(), 0..600),
            row in any::<i64>(),
            version in any::<i64>(),
        ) {
            let keyring = keyring();
            let binding = RowBinding { row, version, ..BINDING };
            let sealed = keyring.seal(&binding, &value);
            let opened = keyring.open(&binding, &sealed).unwrap();
            prop_assert_eq!(opened.as_slice(), &value);
            let (next_row, next_version) =
                (RowBinding { row: row ^ 1, ..binding }, RowBinding { version: version ^ 1, ..binding });
            prop_assert!(keyring.open(&next_row, &sealed).is_err());
            prop_assert!(keyring.open(&next_version, &sealed).is_err());
        }

        #[test]
        fn any_altered_or_missing_byte_is_noticed(at in any::<prop::sample::Index>(), by in 1_u8..) {
            let keyring = keyring();
            let mut sealed = keyring.seal(&BINDING, b"value");
            let at = at.index(sealed.len());
            prop_assert!(keyring.open(&BINDING, &sealed[..at]).is_err());
            sealed[at] ^= by;
            prop_assert!(keyring.open(&BINDING, &sealed).is_err());
        }

        #[test]
        fn arbitrary_bytes_are_refused(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..100),
            genuine_format in any::<bool>(),
        ) {
            if let (true, Some(first)) = (genuine_format, bytes.first_mut()) {
                *first = FORMAT;
            }
            prop_assert!(keyring().open(&BINDING, &bytes).is_err());
        }
    }
}
