//! Values that must not be printed. They have no `Display`, and their `Debug` shows no content. The memory of
//! plain values is cleared when they are dropped.

use std::{fmt, sync::Arc};

use secrecy::{ExposeSecret, SecretString};

use crate::domain::account::{InvalidValue, printable, visible};

/// The longest client secret of RCS Biz Center, in characters.
pub const MAX_CLIENT_SECRET: usize = 18;

/// An account's client secret, which the upstream's console calls API KEY: 1 to 18 characters without white
/// space and control characters.
#[derive(Clone, Debug)]
pub struct ClientSecret(SecretString);

impl ClientSecret {
    /// Checks a secret and wraps it. One trailing newline, as `echo` adds it, is removed.
    ///
    /// # Errors
    /// Returns the rule that the value breaks. The error never contains the value.
    pub fn new(secret: &str) -> Result<Self, InvalidValue> {
        let secret =
            secret.strip_suffix('\n').map_or(secret, |s| s.strip_suffix('\r').unwrap_or(s));
        visible("client secret", secret, MAX_CLIENT_SECRET)?;
        Ok(Self(secret.into()))
    }

    /// Checks a secret that is stored. Earlier releases took characters that nobody sees.
    ///
    /// # Errors
    /// Returns the rule that the value breaks. The error never contains the value.
    pub fn stored(secret: &str) -> Result<Self, InvalidValue> {
        printable("client secret", secret, MAX_CLIENT_SECRET)?;
        Ok(Self(secret.into()))
    }

    /// Returns the secret as text, for the request to the upstream and for sealing.
    #[must_use]
    pub fn expose(&self) -> &str {
        self.0.expose_secret()
    }
}

/// The upstream's JWT, as an `Authorization: Bearer` header carries it: 1 to 8192 visible ASCII
/// characters.
#[derive(Clone, Debug)]
pub struct AccessToken(SecretString);

impl AccessToken {
    /// The longest token that is accepted, in bytes. The upstream's tokens have about 300.
    pub const MAX: usize = 8192;

    /// Checks a token and wraps it.
    ///
    /// # Errors
    /// Returns the rule that the value breaks. The error never contains the value.
    pub fn new(token: &str) -> Result<Self, InvalidValue> {
        if token.is_empty() {
            return Err(InvalidValue::Empty("access token"));
        }
        if token.len() > Self::MAX {
            return Err(InvalidValue::TooLong("access token", Self::MAX));
        }
        if !token.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(InvalidValue::Malformed("access token", "visible ASCII characters"));
        }
        Ok(Self(token.into()))
    }

    /// Returns the token as text, for the answer to a caller and for sealing.
    #[must_use]
    pub fn expose(&self) -> &str {
        self.0.expose_secret()
    }
}

/// A client secret as the database stores it: sealed, and bound to its account and credential version. It
/// is opened only for a call to the upstream. Cheap to clone.
#[derive(Clone)]
pub struct SealedSecret(Arc<[u8]>);

impl SealedSecret {
    /// Returns the sealed value.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl From<Vec<u8>> for SealedSecret {
    fn from(sealed: Vec<u8>) -> Self {
        Self(sealed.into())
    }
}

impl fmt::Debug for SealedSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SealedSecret({} bytes)", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_not_printed() {
        let secret = ClientSecret::new("SK.canary-0123").unwrap();
        let token = AccessToken::new("eyJ.canary.0123").unwrap();
        let printed = format!("{secret:?} {secret:#?} {token:?} {token:#?}");
        assert!(!printed.contains("canary"), "{printed}");
    }

    #[test]
    fn one_trailing_newline_is_trimmed_from_a_secret() {
        assert_eq!(ClientSecret::new("SK.a\n").unwrap().expose(), "SK.a");
        assert_eq!(ClientSecret::new("SK.a\r\n").unwrap().expose(), "SK.a");
        assert!(ClientSecret::new("SK.a\n\n").is_err());
    }

    #[test]
    fn the_error_of_a_refused_secret_does_not_show_it() {
        for secret in ["", "canary with space", "canary-canary-canary", "can\0ary"] {
            let fault = ClientSecret::new(secret).unwrap_err().to_string();
            assert!(fault.starts_with("client secret") && !fault.contains("canary"), "{fault}");
        }
        let pasted = ClientSecret::new("\u{feff}canary-of-18-chars").unwrap_err().to_string();
        assert!(pasted.ends_with("; character 1 is a byte order mark (U+FEFF)"), "{pasted}");
        assert!(ClientSecret::stored("SK.\u{200b}").is_ok());
        assert!(AccessToken::new("<html> canary").is_err());
        assert!(AccessToken::new(&"a".repeat(8193)).is_err());
    }
}
