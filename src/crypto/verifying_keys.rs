//! The public halves of the signing keys, which verify the broker's signatures.

use std::fmt;

use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use base64::{Engine, engine::general_purpose::STANDARD};
use thiserror::Error;

use super::{KeyId, Keyring};

/// The bytes before an Ed25519 key's 32 bytes in its `SubjectPublicKeyInfo` (RFC 8410).
const DER_PREFIX: [u8; 12] =
    [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
const BEGIN: &str = "-----BEGIN PUBLIC KEY-----";
const END: &str = "-----END PUBLIC KEY-----";

/// Public signing keys, by their ids.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct VerifyingKeys(Vec<(KeyId, [u8; 32])>);

/// Why a signature was not accepted.
#[derive(Clone, Debug, Error, Eq, PartialEq)]
pub enum SignatureError {
    /// The key that the signature names is not known.
    #[error("it is signed with key {0}, which is not among the given public keys")]
    UnknownKey(String),
    /// The named key did not make the signature over this message.
    #[error("the signature of key {0} is not genuine")]
    Forged(String),
}

/// Why a text was not read as a list of public keys.
#[derive(Clone, Debug, Error, Eq, PartialEq)]
pub enum VerifyingKeysFault {
    /// The text holds no key.
    #[error("there is no `{BEGIN}` in it")]
    None,
    /// A key has no id. Holds the line, from 1.
    #[error("line {0}: a public key has no line `# key id` before it")]
    Unnamed(usize),
    /// A key is not in the format that `keys public --signing` prints. Holds the line, from 1.
    #[error("line {0}: no Ed25519 public key in PEM")]
    Malformed(usize),
}

impl VerifyingKeys {
    /// Reads keys in the format that `Display` writes: each in PEM, after a line `# key id`.
    ///
    /// # Errors
    /// [`VerifyingKeysFault`] with the faulty line.
    pub fn parse(text: &str) -> Result<Self, VerifyingKeysFault> {
        let mut keys = Vec::new();
        let mut name = None;
        let mut lines = text.lines().zip(1..);
        while let Some((line, at)) = lines.next() {
            if let Some(id) = line.strip_prefix("# ") {
                name = id.trim().parse::<KeyId>().ok();
            } else if line.trim() == BEGIN {
                let body: String = lines
                    .by_ref()
                    .map(|(line, _)| line.trim())
                    .take_while(|line| *line != END)
                    .collect();
                let der = STANDARD.decode(body).unwrap_or_default();
                let key = der.strip_prefix(&DER_PREFIX).and_then(|key| key.try_into().ok());
                let id = name.take().ok_or(VerifyingKeysFault::Unnamed(at))?;
                keys.push((id, key.ok_or(VerifyingKeysFault::Malformed(at))?));
            }
        }
        if keys.is_empty() { Err(VerifyingKeysFault::None) } else { Ok(Self(keys)) }
    }

    /// Checks that the key `key_id` made `signature` over `message`.
    ///
    /// # Errors
    /// [`SignatureError`] if the key is not known or did not make the signature.
    pub fn verify(
        &self,
        key_id: &str,
        message: &[u8],
        signature: &[u8],
    ) -> Result<(), SignatureError> {
        let known = self.0.iter().find(|(id, _)| id.as_str() == key_id);
        let (_, key) = known.ok_or_else(|| SignatureError::UnknownKey(key_id.to_owned()))?;
        UnparsedPublicKey::new(&ED25519, key)
            .verify(message, signature)
            .map_err(|_| SignatureError::Forged(key_id.to_owned()))
    }
}

impl From<&Keyring> for VerifyingKeys {
    fn from(keyring: &Keyring) -> Self {
        Self(keyring.signing_publics())
    }
}

impl fmt::Display for VerifyingKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (nth, (id, key)) in self.0.iter().enumerate() {
            let der = [&DER_PREFIX[..], key].concat();
            let gap = if nth == 0 { "" } else { "\n" };
            write!(f, "{gap}# {id}\n{BEGIN}\n{}\n{END}", STANDARD.encode(der))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;

    fn keyring() -> Keyring {
        Keyring::parse(&Keyring::generate(DateTime::UNIX_EPOCH)).unwrap()
    }

    #[test]
    fn a_signature_is_checked_with_the_key_that_it_names() {
        let (ours, theirs) = (keyring(), keyring());
        let (id, signature) = ours.sign(b"head");
        let (id, keys) = (id.as_str(), VerifyingKeys::from(&ours));
        assert_eq!(keys.verify(id, b"head", &signature), Ok(()));
        let forged = Err(SignatureError::Forged(id.to_owned()));
        assert_eq!(keys.verify(id, b"tail", &signature), forged);
        assert_eq!(keys.verify(id, b"head", &signature[1..]), forged);
        let unknown = Err(SignatureError::UnknownKey(id.to_owned()));
        assert_eq!(VerifyingKeys::from(&theirs).verify(id, b"head", &signature), unknown);
    }

    #[test]
    fn keys_are_written_in_a_format_that_openssl_reads() {
        let keys =
            VerifyingKeys(vec![("h1".parse().unwrap(), [7; 32]), ("h2".parse().unwrap(), [8; 32])]);
        let text = keys.to_string();
        // `openssl pkey -pubin -text` shows 07:07:… for this.
        assert!(text.starts_with(
            "# h1\n-----BEGIN PUBLIC KEY-----\n\
             MCowBQYDK2VwAyEABwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=\n"
        ));
        assert_eq!(VerifyingKeys::parse(&text), Ok(keys.clone()));
        assert_eq!(VerifyingKeys::parse(&format!("x\n\n{text}\n")), Ok(keys));
    }

    #[test]
    fn a_malformed_list_of_keys_is_refused_with_its_line() {
        use VerifyingKeysFault::{Malformed, None, Unnamed};
        let pem = |body: &str| format!("{BEGIN}\n{body}\n{END}\n");
        for (text, fault) in [
            (String::new(), None),
            (pem("AAAA"), Unnamed(1)),
            (format!("# h1\n{}", pem("AAAA")), Malformed(2)),
            (format!("# H!\n{}", pem("AAAA")), Unnamed(2)),
            (format!("# h1\n{BEGIN}\n"), Malformed(2)),
        ] {
            assert_eq!(VerifyingKeys::parse(&text), Err(fault), "{text}");
        }
    }
}
