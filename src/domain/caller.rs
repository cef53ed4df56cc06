//! Callers, and what their grants permit.

use std::{fmt, str::FromStr, sync::Arc};

use crate::domain::{
    account::{AccountName, InvalidValue, MAX_NAME, is_name_character},
    clock::Timestamp,
    named_enum::named_enum,
};

/// A caller's id in the database. It is never reused.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct CallerId(pub i64);

named_enum! {
    /// The kind of credential by which a caller was identified.
    pub enum CallerKind {
        /// A bearer that the broker issued.
        Bearer = "bearer",
        /// A SPIFFE ID in a verified client certificate.
        Spiffe = "spiffe",
        /// A DNS name in a verified client certificate.
        Dns = "dns",
    }
}

/// A service that requests tokens, with its grants and limits.
#[derive(Clone, Debug, PartialEq)]
pub struct Caller {
    /// The caller's id.
    pub id: CallerId,
    /// The caller's name, for people and the audit log.
    pub name: Arc<str>,
    /// Whether the caller is enabled. A disabled caller is refused like an unknown one.
    pub enabled: bool,
    /// The limit in calls per second; `None` means the broker's default.
    pub rate_limit: Option<u32>,
    /// What the caller may do with which accounts.
    pub grants: Vec<Grant>,
}

impl Caller {
    /// Returns whether a grant gives `right` on `account` at `now`. Without a grant nothing is permitted.
    #[must_use]
    pub fn permits(&self, right: Right, account: &AccountName, now: Timestamp) -> bool {
        self.enabled
            && self.grants.iter().any(|grant| {
                grant.rights.contains(right)
                    && grant.is_current(now)
                    && grant.pattern.matches(account.as_str())
            })
    }

    /// Returns the first name, at or after `from` in the order of names, that a grant with `right` may
    /// cover, so that a listing can skip the names before it. `None` if no such name is covered.
    #[must_use]
    pub fn first_covered_from<'a>(
        &'a self,
        right: Right,
        from: &'a str,
        now: Timestamp,
    ) -> Option<&'a str> {
        let grants = self.grants.iter().filter(|_| self.enabled);
        let grants = grants.filter(|it| it.rights.contains(right) && it.is_current(now));
        grants.filter_map(|grant| grant.pattern.first_match_from(from)).min()
    }
}

named_enum! {
    /// A right that a grant can give.
    pub enum Right {
        /// To get and watch tokens.
        Get = "get",
        /// To report a token that the upstream refused.
        Report = "report",
        /// To see the account in lists.
        List = "list",
    }
}

impl FromStr for Right {
    type Err = InvalidValue;

    fn from_str(name: &str) -> Result<Self, InvalidValue> {
        Self::ALL
            .into_iter()
            .find(|right| right.as_str() == name)
            .ok_or(InvalidValue::Unknown("right", "get, report or list"))
    }
}

/// A set of rights, as one bit for each.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Rights(u8);

impl Rights {
    /// Returns whether the set contains `right`.
    #[must_use]
    pub fn contains(self, right: Right) -> bool {
        self.0 & (1 << right as u8) != 0
    }
}

impl FromIterator<Right> for Rights {
    fn from_iter<I: IntoIterator<Item = Right>>(rights: I) -> Self {
        Self(rights.into_iter().fold(0, |set, right| set | 1 << right as u8))
    }
}

/// Rights on the accounts that match a pattern, for ever or until a given time.
#[derive(Clone, Debug, PartialEq)]
pub struct Grant {
    /// The accounts that the grant covers.
    pub pattern: AccountPattern,
    /// What the grant permits with these accounts.
    pub rights: Rights,
    /// The time at which the grant ends; `None` for a grant that does not end.
    pub ends_at: Option<Timestamp>,
}

impl Grant {
    fn is_current(&self, now: Timestamp) -> bool {
        self.ends_at.is_none_or(|end| now < end)
    }
}

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

    /// Returns the first text, at or after `from` in the order of names, that the pattern may match.
    fn first_match_from<'a>(&'a self, from: &'a str) -> Option<&'a str> {
        if from <= &*self.before {
            return Some(&self.before);
        }
        (self.after.is_some() && from.starts_with(&*self.before)).then_some(from)
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
            return Err(InvalidValue::Malformed("account pattern", RULE));
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
    use chrono::{DateTime, TimeDelta};
    use proptest::prelude::*;

    use super::*;

    fn caller(grants: Vec<Grant>) -> Caller {
        Caller { id: CallerId(1), name: "demo".into(), enabled: true, rate_limit: None, grants }
    }

    fn grant(pattern: &str, rights: &[Right], ends_at: Option<Timestamp>) -> Grant {
        Grant {
            pattern: pattern.parse().unwrap(),
            rights: rights.iter().copied().collect(),
            ends_at,
        }
    }

    #[test]
    fn nothing_is_permitted_without_a_grant() {
        let now = DateTime::UNIX_EPOCH;
        let acme = "acme".parse().unwrap();
        for right in Right::ALL {
            assert!(!caller(vec![]).permits(right, &acme, now));
        }
    }

    #[test]
    fn a_grant_permits_its_rights_on_its_accounts_until_its_end() {
        let now = DateTime::UNIX_EPOCH;
        let end = now + TimeDelta::seconds(1);
        let caller = caller(vec![grant("acme-*", &[Right::Get], Some(end))]);
        let (acme, other) = ("acme-1".parse().unwrap(), "other".parse().unwrap());
        assert!(caller.permits(Right::Get, &acme, now));
        assert!(!caller.permits(Right::Report, &acme, now));
        assert!(!caller.permits(Right::Get, &other, now));
        assert!(!caller.permits(Right::Get, &acme, end));
        assert!(!Caller { enabled: false, ..caller }.permits(Right::Get, &acme, now));
    }

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
    fn names_that_no_grant_covers_are_skipped_in_the_order_of_names() {
        let now = DateTime::UNIX_EPOCH;
        let caller = caller(vec![
            grant("d-*", &[Right::List], None),
            grant("b", &[Right::List], None),
            grant("a", &[Right::Get], None),
            grant("c", &[Right::List], Some(now)),
        ]);
        for (from, expected) in [
            ("", Some("b")),
            ("b", Some("b")),
            ("b-1", Some("d-")),
            ("d-7", Some("d-7")),
            ("d.", None),
        ] {
            assert_eq!(caller.first_covered_from(Right::List, from, now), expected, "{from}");
        }
        assert_eq!(
            Caller { enabled: false, ..caller }.first_covered_from(Right::List, "", now),
            None
        );
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
