//! Callers' bearers: generating them, checking their form, and hashing them. The broker stores only the
//! SHA-256 of a bearer.
//!
//! A bearer has 53 characters: `tbk_`, 43 random characters of base 62 (256 bits), and 6 characters that
//! are a checksum of those before. Scanners for leaked secrets find bearers with
//!
//! ```text
//! \btbk_[0-9A-Za-z]{49}\b
//! ```
//!
//! and can verify the checksum offline. The broker refuses a mistyped bearer by its checksum, without a
//! lookup.
//!
//! **Why a map lookup by the hash is safe.** The time of a lookup by the secret itself could reveal how
//! many of its first bytes are right. Here the key is the SHA-256 of the text that the caller sent. To
//! learn from the time, an attacker would have to choose the hash, and then to find a text with that hash.
//! A salt or a slow hash adds nothing for 256 random bits.

use std::fmt;

use aws_lc_rs::digest::{SHA256, digest};
use secrecy::{ExposeSecret, SecretString};
use thiserror::Error;
use zeroize::Zeroizing;

const PREFIX: &str = "tbk_";
/// The least length that holds 256 bits: 62⁴³ is just above 2²⁵⁶.
const RANDOM_LEN: usize = 43;
const CHECKSUM_LEN: usize = 6;
/// The length of a bearer, in characters, all of them ASCII.
pub const BEARER_LEN: usize = PREFIX.len() + RANDOM_LEN + CHECKSUM_LEN;

const BASE62: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// The text does not have the form of a bearer: it was mistyped or truncated, or is something else.
#[derive(Clone, Copy, Debug, Error, Eq, PartialEq)]
#[error("a bearer is tbk_ and 49 letters and digits, the last 6 of them a checksum")]
pub struct BearerMalformed;

/// The secret by which a caller identifies itself to the broker. It is shown once, when it is generated; the
/// broker keeps only its SHA-256.
#[derive(Clone)]
pub struct Bearer(SecretString);

impl Bearer {
    /// Generates a bearer from the system's random source.
    #[must_use]
    pub fn generate() -> Self {
        let mut text = Zeroizing::new(String::with_capacity(BEARER_LEN));
        text.push_str(PREFIX);
        while text.len() < PREFIX.len() + RANDOM_LEN {
            push_random(&mut text);
        }
        let checksum = checksum(&text);
        text.extend(checksum.map(char::from));
        Self(SecretString::from(text.as_str()))
    }

    /// Checks the form of a text that a caller sent. Does not check whether the bearer is known.
    ///
    /// # Errors
    /// [`BearerMalformed`] if the prefix, the length, a character or the checksum is wrong.
    pub fn parse(text: &str) -> Result<Self, BearerMalformed> {
        let (body, sum) = text
            .split_at_checked(PREFIX.len() + RANDOM_LEN)
            .filter(|(body, sum)| body.starts_with(PREFIX) && sum.len() == CHECKSUM_LEN)
            .ok_or(BearerMalformed)?;
        let plain = body[PREFIX.len()..].bytes().all(|b| b.is_ascii_alphanumeric());
        if !plain || checksum(body) != sum.as_bytes() {
            return Err(BearerMalformed);
        }
        Ok(Self(text.into()))
    }

    /// Returns the SHA-256 of the whole text, by which the database and the broker know the bearer.
    #[must_use]
    pub fn sha256(&self) -> [u8; 32] {
        sha256(self.expose())
    }

    /// Returns the bearer as text, to be shown once and for an `authorization` header.
    #[must_use]
    pub fn expose(&self) -> &str {
        self.0.expose_secret()
    }
}

impl fmt::Debug for Bearer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Bearer(tbk_…)")
    }
}

/// Appends random characters, at most as many as are missing. Every character is equally likely: bytes of
/// 248 and above are skipped, since 256 is not a multiple of 62.
fn push_random(text: &mut String) {
    const FAIR: u8 = 62 * 4;
    let mut bytes = Zeroizing::new([0; RANDOM_LEN]);
    aws_lc_rs::rand::fill(&mut *bytes).expect("aws-lc aborts where there is no randomness");
    let missing = PREFIX.len() + RANDOM_LEN - text.len();
    let fair = bytes.iter().filter(|byte| **byte < FAIR).take(missing);
    text.extend(fair.map(|byte| char::from(BASE62[usize::from(byte % 62)])));
}

/// Returns the first bytes of the SHA-256 of `body`, each as one character: about 35 bits.
fn checksum(body: &str) -> [u8; CHECKSUM_LEN] {
    let hash = sha256(body);
    std::array::from_fn(|nth| BASE62[usize::from(hash[nth] % 62)])
}

fn sha256(text: &str) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, text.as_bytes()).as_ref());
    hash
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_new_bearer_matches_the_scanners_expression() {
        let bearer = Bearer::generate();
        let text = bearer.expose();
        assert_eq!(text.len(), 53);
        let rest = text.strip_prefix("tbk_").unwrap();
        assert!(rest.bytes().all(|b| b.is_ascii_alphanumeric()));
        assert_ne!(text, Bearer::generate().expose());
    }

    #[test]
    fn a_parsed_bearer_has_the_hash_of_the_generated_one() {
        let bearer = Bearer::generate();
        let read = Bearer::parse(bearer.expose()).unwrap();
        assert_eq!(read.sha256(), bearer.sha256());
        assert_ne!(Bearer::generate().sha256(), bearer.sha256());
    }

    #[test]
    fn the_format_never_changes() {
        // Bearers are in callers' hands: what was valid once stays valid.
        let text = concat!("tbk_0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefg", "9E6KiZ");
        assert!(Bearer::parse(text).is_ok());
    }

    #[test]
    fn a_bearer_is_not_printed() {
        let bearer = Bearer::generate();
        let printed = format!("{bearer:?} {bearer:#?} {BearerMalformed:?} {BearerMalformed}");
        assert!(!printed.contains(&bearer.expose()[4..12]), "{printed}");
    }

    #[test]
    fn a_text_of_another_form_is_refused() {
        let good = Bearer::generate().expose().to_owned();
        for text in [
            "",
            "tbk_",
            &good[..52],
            &format!("{good}0"),
            &format!(" {good}"),
            &format!("{good}\n"),
            &good.replace("tbk_", "TBK_"),
            &"é".repeat(27),
            &good.to_ascii_lowercase(),
        ] {
            assert_eq!(Bearer::parse(text).unwrap_err(), BearerMalformed, "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_mistyped_bearer_is_refused(at in 0_usize..BEARER_LEN, with in "[0-9A-Za-z_]") {
            let bearer = Bearer::generate();
            let mut mistyped = bearer.expose().to_owned();
            mistyped.replace_range(at..=at, &with);
            prop_assume!(mistyped != bearer.expose());
            prop_assert!(Bearer::parse(&mistyped).is_err());
        }

        #[test]
        fn arbitrary_text_is_refused(text in "(tbk_)?\\PC{0,60}") {
            prop_assert!(Bearer::parse(&text).is_err());
        }
    }
}
