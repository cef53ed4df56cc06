//! Names and identifiers of accounts, as types that hold valid values only.

use std::{borrow::Borrow, fmt, str::FromStr, sync::Arc};

use thiserror::Error;

/// The longest account name, in characters.
pub const MAX_NAME: usize = 63;
/// The longest client id of RCS Biz Center, in characters.
pub const MAX_CLIENT_ID: usize = 20;

/// The reason why a value was refused: the name of the value, and the rule that it breaks. The message
/// never shows the value.
#[derive(Clone, Copy, Debug, Error, Eq, PartialEq)]
pub enum InvalidValue {
    /// The value is empty.
    #[error("{0} is empty")]
    Empty(&'static str),
    /// The value is longer than this many characters.
    #[error("{0} is longer than {1} characters")]
    TooLong(&'static str, usize),
    /// The value does not match this pattern.
    #[error("{0} must match {1}")]
    Malformed(&'static str, &'static str),
    /// The value is not one of the allowed names, which the second field lists.
    #[error("{0} must be {1}")]
    Unknown(&'static str, &'static str),
}

/// An account's name: `[a-z0-9][a-z0-9._-]{0,62}`. Cheap to clone.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct AccountName(Arc<str>);

impl AccountName {
    /// The rule as a regular expression. The database's trigger states it too.
    pub const PATTERN: &'static str = "[a-z0-9][a-z0-9._-]{0,62}";

    /// Returns the name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for AccountName {
    type Err = InvalidValue;

    fn from_str(name: &str) -> Result<Self, InvalidValue> {
        let first = name.chars().next().ok_or(InvalidValue::Empty("account name"))?;
        if matches!(first, '.' | '_' | '-') || !name.chars().all(is_name_character) {
            return Err(InvalidValue::Malformed("account name", Self::PATTERN));
        }
        if name.len() > MAX_NAME {
            return Err(InvalidValue::TooLong("account name", MAX_NAME));
        }
        Ok(Self(name.into()))
    }
}

impl fmt::Display for AccountName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Borrow<str> for AccountName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// Returns whether an account's name may contain `c`. The first character must be a letter or a digit.
pub(super) fn is_name_character(c: char) -> bool {
    c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '_' | '-')
}

/// An account's id in the database. It is never reused: a name that was deleted and inserted again has
/// another id and is another account.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct AccountId(pub i64);

impl fmt::Display for AccountId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Counts the credentials that an account has had, from 1. Sealed secrets, attempts and failures store
/// the version that they belong to.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct CredentialVersion(pub i64);

/// The login's ID at the upstream's console: 1 to 20 characters without white space and control
/// characters.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct ClientId(Arc<str>);

impl ClientId {
    /// Returns the ID as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ClientId {
    type Err = InvalidValue;

    fn from_str(id: &str) -> Result<Self, InvalidValue> {
        printable("client id", id, MAX_CLIENT_ID)?;
        Ok(Self(id.into()))
    }
}

impl fmt::Display for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Checks that `value` has 1 to `longest` characters and neither white space nor control characters.
pub(crate) fn printable(
    what: &'static str,
    value: &str,
    longest: usize,
) -> Result<(), InvalidValue> {
    if value.is_empty() {
        return Err(InvalidValue::Empty(what));
    }
    if value.chars().count() > longest {
        return Err(InvalidValue::TooLong(what, longest));
    }
    if value.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err(InvalidValue::Malformed(what, "printable characters without white space"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn valid_names_are_accepted() {
        for name in ["a", "0", "acme-prod.eu_1", &"a".repeat(63)] {
            assert_eq!(name.parse::<AccountName>().unwrap().as_str(), name);
        }
    }

    #[test]
    fn invalid_names_are_refused_with_their_fault() {
        for (name, fault) in [
            ("", "account name is empty"),
            ("-a", "account name must match [a-z0-9][a-z0-9._-]{0,62}"),
            ("Acme", "account name must match [a-z0-9][a-z0-9._-]{0,62}"),
            ("a b", "account name must match [a-z0-9][a-z0-9._-]{0,62}"),
            ("é", "account name must match [a-z0-9][a-z0-9._-]{0,62}"),
            (&"a".repeat(64), "account name is longer than 63 characters"),
        ] {
            assert_eq!(name.parse::<AccountName>().unwrap_err().to_string(), fault);
        }
    }

    #[test]
    fn client_ids_are_counted_in_characters() {
        assert!("가".repeat(20).parse::<ClientId>().is_ok());
        assert!("가".repeat(21).parse::<ClientId>().is_err());
        assert!("a b".parse::<ClientId>().is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_refused_or_is_a_name_with_the_same_text(text in ".{0,80}") {
            if let Ok(name) = text.parse::<AccountName>() {
                prop_assert_eq!(name.as_str(), text.as_str());
                prop_assert!(text.len() <= MAX_NAME);
            }
        }
    }
}
