//! Intake: admins seal client secrets to the broker's public key. They hold no key that opens them.
//!
//! The scheme is HPKE (RFC 9180), base mode: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM.

use std::{fmt, str::FromStr};

use aws_lc_rs::agreement::{PrivateKey, X25519};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use rustls::crypto::{
    aws_lc_rs::hpke::DH_KEM_X25519_HKDF_SHA256_AES_256 as SUITE,
    hpke::{EncapsulatedSecret, Hpke, HpkePrivateKey, HpkePublicKey},
};
use thiserror::Error;
use zeroize::Zeroizing;

use super::{
    key::{KEY_LEN, KeyId},
    row_binding::push_prefixed,
};
use crate::domain::{
    account::{ClientId, InvalidValue},
    secret::ClientSecret,
};

/// The prefix of every sealed value in the intake column. A plain secret must not begin with it.
pub const SEALED_PREFIX: &str = "sealed:";
const FORMAT: &str = "sealed:v1:";
/// HPKE's `info`: it separates these values from any others that may be sealed to the same key.
const INFO: &[u8] = b"token-broker intake v1";
/// The name in `accounts.provider` of the upstream that a login belongs to.
const PROVIDER: &str = "rcs";
/// The length in bytes of HPKE's encapsulated key, an X25519 public key.
const ENC_LEN: usize = 32;

/// Why a secret could not be sealed for intake, or a sealed one not be opened. No message holds a
/// value.
#[derive(Clone, Debug, Error, Eq, PartialEq)]
pub enum IntakeError {
    /// The value is not of the form `sealed:v1:<key id>:<base64url>`.
    #[error("the value is not what `account seal` prints")]
    Malformed,
    /// The public key is not of the form `<key id>:<base64url of 32 bytes>`, or its bytes are not a
    /// usable X25519 public key.
    #[error("the intake key is not what `keys public` prints")]
    Key,
    /// The keyring lacks the key.
    #[error("the value is sealed for intake key {0}, which is not in the keyring")]
    UnknownKey(KeyId),
    /// The value was altered, or was sealed for another client id.
    #[error("the value does not open: it was altered, or sealed for another client id")]
    Forged,
    /// The value opened, but its content is not a valid client secret.
    #[error("the value opens, but its {0}")]
    Secret(InvalidValue),
}

/// An intake key: a private key with its public half.
pub(super) struct IntakeKeyPair {
    private: HpkePrivateKey,
    public: [u8; KEY_LEN],
}

impl IntakeKeyPair {
    pub(super) fn new(bytes: &[u8; KEY_LEN]) -> Self {
        let public = PrivateKey::from_private_key(&X25519, bytes)
            .ok()
            .and_then(|key| key.compute_public_key().ok())
            .and_then(|public| public.as_ref().try_into().ok())
            .expect("any 32 bytes are an X25519 private key");
        Self { private: HpkePrivateKey::from(bytes.to_vec()), public }
    }

    /// Returns the public half, under the id that the keyring gives the pair.
    pub(super) fn public_key(&self, key_id: &KeyId) -> IntakePublicKey {
        IntakePublicKey { key_id: key_id.clone(), bytes: self.public }
    }

    /// Opens `sealed`, which names this key, for the login `client_id`.
    pub(super) fn open(
        &self,
        client_id: &ClientId,
        sealed: &SealedIntake,
    ) -> Result<ClientSecret, IntakeError> {
        let opened = SUITE
            .open(
                &sealed.encapsulated,
                INFO,
                &associated_data(client_id),
                &sealed.ciphertext,
                &self.private,
            )
            .map(Zeroizing::new)
            .map_err(|_| IntakeError::Forged)?;
        let text = str::from_utf8(&opened)
            .map_err(|_| IntakeError::Secret(InvalidValue::Malformed("client secret", "UTF-8")))?;
        ClientSecret::new(text).map_err(IntakeError::Secret)
    }
}

/// The public half of an intake key. It seals secrets and opens none.
///
/// Its text is `<key id>:<base64url of the 32 bytes, without padding>`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct IntakePublicKey {
    key_id: KeyId,
    bytes: [u8; KEY_LEN],
}

impl IntakePublicKey {
    /// Returns the key with that id and those bytes, as the table `intake_keys` holds them.
    pub fn new(key_id: &str, bytes: &[u8]) -> Result<Self, IntakeError> {
        let key_id = key_id.parse().map_err(|_| IntakeError::Key)?;
        let bytes = bytes.try_into().map_err(|_| IntakeError::Key)?;
        Ok(Self { key_id, bytes })
    }

    /// Returns the key's id.
    #[must_use]
    pub fn key_id(&self) -> &KeyId {
        &self.key_id
    }

    /// Returns the key's 32 bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Seals `secret` for the login `client_id` and no other one. Returns text for the intake column
    /// `accounts.client_secret`.
    ///
    /// # Errors
    /// [`IntakeError::Key`] if the key's bytes are not a usable public key.
    pub fn seal(&self, client_id: &ClientId, secret: &ClientSecret) -> Result<String, IntakeError> {
        let recipient = HpkePublicKey(self.bytes.to_vec());
        let (enc, ciphertext) = SUITE
            .seal(INFO, &associated_data(client_id), secret.expose().as_bytes(), &recipient)
            .map_err(|_| IntakeError::Key)?;
        let sealed = URL_SAFE_NO_PAD.encode([enc.0, ciphertext].concat());
        Ok(format!("{FORMAT}{}:{sealed}", self.key_id))
    }
}

impl FromStr for IntakePublicKey {
    type Err = IntakeError;

    fn from_str(text: &str) -> Result<Self, IntakeError> {
        let (key_id, bytes) = text.split_once(':').ok_or(IntakeError::Key)?;
        Self::new(key_id, &URL_SAFE_NO_PAD.decode(bytes).map_err(|_| IntakeError::Key)?)
    }
}

impl fmt::Display for IntakePublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.key_id, URL_SAFE_NO_PAD.encode(self.bytes))
    }
}

/// A value of the intake column, split into its parts.
pub(super) struct SealedIntake {
    /// The id of the key that opens it.
    pub(super) key_id: KeyId,
    encapsulated: EncapsulatedSecret,
    ciphertext: Vec<u8>,
}

impl SealedIntake {
    /// Reads what [`IntakePublicKey::seal`] wrote; `None` if `sealed` is not of that form.
    pub(super) fn parse(sealed: &str) -> Option<Self> {
        let (key_id, payload) = sealed.strip_prefix(FORMAT)?.split_once(':')?;
        let payload = URL_SAFE_NO_PAD.decode(payload).ok()?;
        let (encapsulated, ciphertext) = payload.split_at_checked(ENC_LEN)?;
        Some(Self {
            key_id: key_id.parse().ok()?,
            encapsulated: EncapsulatedSecret(encapsulated.to_vec()),
            ciphertext: ciphertext.to_vec(),
        })
    }
}

/// Returns the associated data of a secret: the login that it belongs to.
fn associated_data(client_id: &ClientId) -> Vec<u8> {
    let mut data = Vec::with_capacity(64);
    push_prefixed(&mut data, PROVIDER);
    push_prefixed(&mut data, client_id.as_str());
    data
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use proptest::prelude::*;

    use super::*;
    use crate::crypto::Keyring;

    fn keyring() -> Keyring {
        Keyring::parse(&Keyring::generate(DateTime::UNIX_EPOCH)).unwrap()
    }

    fn client_id() -> ClientId {
        "acme".parse().unwrap()
    }

    /// The rule of the trigger in `migrations/repeatable/2_accounts.sql`, after `sealed:v1:`.
    fn the_database_takes(sealed: &str) -> bool {
        let Some((key_id, payload)) =
            sealed.strip_prefix("sealed:v1:").and_then(|rest| rest.split_once(':'))
        else {
            return false;
        };
        key_id.parse::<KeyId>().is_ok()
            && (40..=400).contains(&payload.len())
            && payload.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
    }

    #[test]
    fn a_secret_sealed_for_one_login_opens_for_no_other() {
        let keyring = keyring();
        let sealed = keyring
            .intake_public()
            .seal(&client_id(), &ClientSecret::new("SK.a").unwrap())
            .unwrap();
        assert_eq!(keyring.open_intake(&client_id(), &sealed).unwrap().expose(), "SK.a");
        let other = "acme2".parse().unwrap();
        assert_eq!(keyring.open_intake(&other, &sealed).unwrap_err(), IntakeError::Forged);
    }

    #[test]
    fn a_value_sealed_to_an_unknown_key_is_refused_by_the_key_id() {
        let (ours, theirs) = (keyring(), keyring());
        let public = theirs.intake_public();
        let sealed = public.seal(&client_id(), &ClientSecret::new("SK.a").unwrap()).unwrap();
        assert_eq!(
            ours.open_intake(&client_id(), &sealed).unwrap_err(),
            IntakeError::UnknownKey(public.key_id().clone())
        );
    }

    #[test]
    fn the_shortest_and_the_longest_secret_fit_the_intake_column() {
        let public = keyring().intake_public();
        for secret in ["a", &"a".repeat(18), &"가".repeat(18)] {
            let secret = ClientSecret::new(secret).unwrap();
            assert!(the_database_takes(&public.seal(&client_id(), &secret).unwrap()));
        }
    }

    #[test]
    fn a_public_key_reads_back_from_its_text() {
        let public = keyring().intake_public();
        assert_eq!(public.to_string().parse(), Ok(public.clone()));
        assert_eq!(IntakePublicKey::new(public.key_id().as_str(), public.bytes()), Ok(public));
        for text in ["", "i1", "i1:", "I1:AAAA", "i1:!!!!", "i1:AAAA"] {
            assert_eq!(text.parse::<IntakePublicKey>(), Err(IntakeError::Key), "{text}");
        }
    }

    #[test]
    fn a_public_key_of_low_order_is_refused() {
        let low_order = IntakePublicKey::new("i1", &[0; KEY_LEN]).unwrap();
        let secret = ClientSecret::new("SK.a").unwrap();
        assert_eq!(low_order.seal(&client_id(), &secret), Err(IntakeError::Key));
    }

    #[test]
    fn the_public_half_is_the_one_of_rfc_9180() {
        let private = "4612c550263fc8ad58375df3f557aac531d26850903e55a9f23f21d8534e8ac8";
        let pair = IntakeKeyPair::new(&hex::decode(private).unwrap().try_into().unwrap());
        assert_eq!(
            hex::encode(pair.public),
            "3948cfe0ad1ddb695d780e59077195da6c56506b027329794ab02bca80815c4d"
        );
    }

    proptest! {
        #[test]
        fn any_altered_byte_is_noticed(at in any::<prop::sample::Index>(), with in "[A-Za-z0-9_:-]") {
            let keyring = keyring();
            let secret = ClientSecret::new("SK.a").unwrap();
            let sealed = keyring.intake_public().seal(&client_id(), &secret).unwrap();
            let at = at.index(sealed.len());
            let mut altered = sealed.clone();
            altered.replace_range(at..=at, &with);
            prop_assume!(altered != sealed);
            prop_assert!(keyring.open_intake(&client_id(), &altered).is_err());
        }

        #[test]
        fn arbitrary_text_is_refused(text in "(sealed:v1:)?[a-z0-9]{0,9}:?[ -~é]{0,120}") {
            prop_assert!(keyring().open_intake(&client_id(), &text).is_err());
        }
    }
}
