//! Account names and patterns, by which grants and watch streams select accounts.

use std::{fmt, str::FromStr};

use crate::domain::account::{AccountName, InvalidValue, MAX_NAME, is_name_character};

/// An account's name, or a pattern in which one `*` stands for any number of characters, also none. At
/// most 63 characters.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct AccountPattern {
    before: Box<str>,
    /// The text after the `*`; `None` for a plain name.
    after: Option<Box<str>>,
}

impl AccountPattern {
    /// Returns whether the pattern matches `name`.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        match &self.after {
            None => *self.before == *name,
            Some(after) => {
                name.strip_prefix(&*self.before).is_some_and(|rest| rest.ends_with(&**after))
            }
        }
    }

    /// Returns the text before the `*` and the one after it, or the name and `None`.
    pub(super) fn parts(&self) -> (&str, Option<&str>) {
        (&self.before, self.after.as_deref())
    }

    /// Returns the name, unless this is a pattern with a `*`.
    #[must_use]
    pub fn as_name(&self) -> Option<AccountName> {
        if self.after.is_some() {
            return None;
        }
        self.before.parse().ok()
    }
}

impl FromStr for AccountPattern {
    type Err = InvalidValue;

    fn from_str(pattern: &str) -> Result<Self, InvalidValue> {
        const RULE: &str = "an account name in which one * may stand for any characters";
        let Some((before, after)) = pattern.split_once('*') else {
            let name: AccountName = pattern.parse()?;
            return Ok(Self { before: name.as_str().into(), after: None });
        };
        if pattern.len() > MAX_NAME {
            return Err(InvalidValue::TooLong("account pattern", MAX_NAME));
        }
        let mut characters = before.chars().chain(after.chars());
        if !characters.all(is_name_character) || before.starts_with(['.', '_', '-']) {
            return Err(InvalidValue::malformed("account pattern", RULE, pattern));
        }
        Ok(Self { before: before.into(), after: Some(after.into()) })
    }
}

impl fmt::Display for AccountPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.before)?;
        self.after.as_ref().map_or(Ok(()), |after| write!(f, "*{after}"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_star_matches_any_number_of_characters() {
        for (pattern, name, expected) in [
            ("acme", "acme", true),
            ("acme", "acme-1", false),
            ("acme-*", "acme-", true),
            ("acme-*", "acme", false),
            ("*", "anything", true),
            ("*-prod", "acme-prod", true),
            ("a*a", "a", false),
            ("a*a", "aa", true),
            ("acme-*-eu", "acme-1-eu", true),
        ] {
            let parsed: AccountPattern = pattern.parse().unwrap();
            assert_eq!(parsed.matches(name), expected, "{pattern} on {name}");
            assert_eq!(parsed.to_string(), pattern);
        }
    }

    #[test]
    fn malformed_patterns_are_refused() {
        for pattern in ["", "a**", "*a*", "A*", "-*", "a b*", &format!("{}*", "a".repeat(63))] {
            assert!(pattern.parse::<AccountPattern>().is_err(), "{pattern}");
        }
    }

    proptest! {
        #[test]
        fn a_name_matches_every_pattern_made_by_cutting_a_piece_out_of_it(
            name in "[a-z0-9][a-z0-9._-]{0,40}", cut in 1_usize..40, kept in 0_usize..40,
        ) {
            let cut = cut.min(name.len());
            let kept = kept.min(name.len() - cut);
            let pattern = format!("{}*{}", &name[..cut], &name[name.len() - kept..]);
            prop_assert!(pattern.parse::<AccountPattern>().unwrap().matches(&name));
        }
    }
}
