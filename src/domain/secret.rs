//! Values that must not be printed: they have no `Display`, their `Debug` says only that they are
//! there, and their memory is cleared when they go.

use std::{fmt, sync::Arc};

use secrecy::{ExposeSecret, SecretString};

use crate::domain::account::{Invalid, printable};

/// The longest client secret of RCS Biz Center, in characters.
pub const MAX_CLIENT_SECRET: usize = 18;

/// An account's API KEY: 1 to 18 characters, none of them white space or control characters.
#[derive(Clone, Debug)]
pub struct ClientSecret(SecretString);

impl ClientSecret {
    /// Takes a secret; one trailing newline, as `echo` leaves it, is trimmed.
    ///
    /// # Errors
    /// Names what is wrong with the value, never the value.
    pub fn new(secret: &str) -> Result<Self, Invalid> {
        let secret =
            secret.strip_suffix('\n').map_or(secret, |s| s.strip_suffix('\r').unwrap_or(s));
        printable("client secret", secret, MAX_CLIENT_SECRET)?;
        Ok(Self(secret.into()))
    }

    /// The secret itself, for the upstream's request and for sealing.
    #[must_use]
    pub fn expose(&self) -> &str {
        self.0.expose_secret()
    }
}

/// The upstream's JWT, as it goes into an `Authorization: Bearer` header: 1 to 8192 visible ASCII
/// characters.
#[derive(Clone, Debug)]
pub struct AccessToken(SecretString);

impl AccessToken {
    /// The longest token that is taken, in bytes; the seen ones have about 300.
    pub const MAX: usize = 8192;

    /// Takes a token.
    ///
    /// # Errors
    /// Names what is wrong with the value, never the value.
    pub fn new(token: &str) -> Result<Self, Invalid> {
        if token.is_empty() {
            return Err(Invalid::Empty("access token"));
        }
        if token.len() > Self::MAX {
            return Err(Invalid::TooLong("access token", Self::MAX));
        }
        if !token.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(Invalid::Malformed("access token", "visible ASCII characters"));
        }
        Ok(Self(token.into()))
    }

    /// The token itself, for the caller's answer and for sealing.
    #[must_use]
    pub fn expose(&self) -> &str {
        self.0.expose_secret()
    }
}

/// A client secret as the database has it: sealed to its account and credential version. Cheap to
/// clone; opened only for a call.
#[derive(Clone)]
pub struct SealedSecret(Arc<[u8]>);

impl SealedSecret {
    /// The sealed value.
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
    fn refused_secrets_are_named_but_not_shown() {
        for secret in ["", "canary with space", "canary-canary-canary", "can\0ary"] {
            let fault = ClientSecret::new(secret).unwrap_err().to_string();
            assert!(fault.starts_with("client secret") && !fault.contains("canary"), "{fault}");
        }
        assert!(AccessToken::new("<html> canary").is_err());
        assert!(AccessToken::new(&"a".repeat(8193)).is_err());
    }
}
