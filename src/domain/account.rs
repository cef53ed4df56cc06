//! Names and identifiers of accounts, as types that hold valid values only.

use std::{borrow::Borrow, fmt, str::FromStr, sync::Arc};

use thiserror::Error;

use super::odd_character::OddCharacter;

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
    /// The value does not match this pattern, because of this character.
    #[error("{0} must match {1}; {2}")]
    OddInPattern(&'static str, &'static str, OddCharacter),
    /// The value has a character that people do not see, or may take for another one.
    #[error("{0} must have visible ASCII and Hangul only; {1}")]
    Odd(&'static str, OddCharacter),
    /// The text for people has a character that they do not see.
    #[error("{0} must have no invisible characters; {1}")]
    Invisible(&'static str, OddCharacter),
    /// The value is not one of the allowed names, which the second field lists.
    #[error("{0} must be {1}")]
    Unknown(&'static str, &'static str),
}

impl InvalidValue {
    /// Returns the fault of `value`, which does not match `pattern`. If a character is the cause that people do not
    /// see, the message names it.
    pub(super) fn malformed(what: &'static str, pattern: &'static str, value: &str) -> Self {
        match OddCharacter::in_word(value) {
            Some(odd) => Self::OddInPattern(what, pattern, odd),
            None => Self::Malformed(what, pattern),
        }
    }
}

/// The longest description, in characters.
const MAX_DESCRIPTION: usize = 1000;

/// A description for people: at most 1000 characters, none of them invisible.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Description(String);

impl Description {
    /// Returns the description as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Description {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        if text.chars().count() > MAX_DESCRIPTION {
            return Err(InvalidValue::TooLong("description", MAX_DESCRIPTION));
        }
        match OddCharacter::in_text(text) {
            Some(odd) => Err(InvalidValue::Invisible("description", odd)),
            None => Ok(Self(text.to_owned())),
        }
    }
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
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
            return Err(InvalidValue::malformed("account name", Self::PATTERN, name));
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

    /// Checks an ID that is stored. Earlier releases took characters that nobody sees.
    ///
    /// # Errors
    /// Returns the rule that the value breaks.
    pub fn stored(id: &str) -> Result<Self, InvalidValue> {
        printable("client id", id, MAX_CLIENT_ID)?;
        Ok(Self(id.into()))
    }
}

impl FromStr for ClientId {
    type Err = InvalidValue;

    fn from_str(id: &str) -> Result<Self, InvalidValue> {
        visible("client id", id, MAX_CLIENT_ID)?;
        Ok(Self(id.into()))
    }
}

impl fmt::Display for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Checks that `value` has 1 to `longest` characters, all of them visible.
pub(super) fn visible(what: &'static str, value: &str, longest: usize) -> Result<(), InvalidValue> {
    if let Some(odd) = OddCharacter::in_word(value) {
        return Err(InvalidValue::Odd(what, odd));
    }
    printable(what, value, longest)
}

/// Checks that `value` has 1 to `longest` characters and neither white space nor control characters.
pub(super) fn printable(
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
            ("a b", "account name must match [a-z0-9][a-z0-9._-]{0,62}; character 2 is a space"),
            (
                "acme\u{200b}",
                "account name must match [a-z0-9][a-z0-9._-]{0,62}; \
                 character 5 is a zero width space (U+200B)",
            ),
            (
                "é",
                "account name must match [a-z0-9][a-z0-9._-]{0,62}; \
                 character 1 is neither ASCII nor a Hangul syllable",
            ),
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

    #[test]
    fn a_client_id_with_an_invisible_character_is_refused_unless_it_is_stored_already() {
        let id = "acme\u{200b}";
        let fault = id.parse::<ClientId>().unwrap_err().to_string();
        assert!(fault.ends_with("character 5 is a zero width space (U+200B)"), "{fault}");
        assert_eq!(ClientId::stored(id).unwrap().as_str(), id);
        assert!(ClientId::stored("a\u{a0}").is_err());
    }

    #[test]
    fn a_client_id_has_visible_ascii_and_hangul_only() {
        assert!("아이디-1".parse::<ClientId>().is_ok());
        let fault = "myIdК".parse::<ClientId>().unwrap_err().to_string();
        assert_eq!(
            fault,
            "client id must have visible ASCII and Hangul only; \
             character 5 is neither ASCII nor a Hangul syllable"
        );
        assert!(ClientId::stored("myIdК").is_ok());
    }

    #[test]
    fn a_description_is_text_for_people() {
        assert_eq!("한국어\n둘".parse::<Description>().unwrap().as_str(), "한국어\n둘");
        assert!("d".repeat(1001).parse::<Description>().is_err());
        let fault = "a\u{202e}b".parse::<Description>().unwrap_err().to_string();
        assert!(fault.ends_with("character 2 is a mark of the writing direction"), "{fault}");
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
