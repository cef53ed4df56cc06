//! Callers, and what their grants permit.

use std::{str::FromStr, sync::Arc};

pub use crate::domain::account_pattern::AccountPattern;
use crate::domain::{
    account::{AccountName, InvalidValue},
    clock::Timestamp,
    named_enum::named_enum,
    pattern_set::PatternSet,
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

impl CallerKind {
    /// Checks a name in a client certificate: a SPIFFE ID or a DNS name. The database's trigger has the same rule.
    ///
    /// # Errors
    /// Returns the rule that the value breaks. A bearer has no such name.
    pub fn check_identity(self, identity: &str) -> Result<(), InvalidValue> {
        let is_lower = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        let (what, rule, longest, fits) = match self {
            Self::Bearer => return Err(InvalidValue::Unknown("kind", "spiffe or dns")),
            Self::Spiffe => {
                let fits = identity
                    .strip_prefix("spiffe://")
                    .and_then(|id| id.split_once('/'))
                    .is_some_and(|(domain, path)| {
                        let in_domain = |c| is_lower(c) || matches!(c, '.' | '_' | '-');
                        let in_path =
                            |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
                        (1..=255).contains(&domain.len())
                            && domain.chars().all(in_domain)
                            && path
                                .split('/')
                                .all(|part| !part.is_empty() && part.chars().all(in_path))
                    });
                ("SPIFFE ID", "spiffe://trust-domain/path", 2048, fits)
            }
            Self::Dns => {
                let fits = identity.split('.').all(|label| {
                    (1..=63).contains(&label.len())
                        && label.starts_with(is_lower)
                        && label.chars().all(|c| is_lower(c) || c == '-')
                });
                ("DNS name", "a DNS name in lower case", 253, fits)
            }
        };
        if !fits {
            return Err(InvalidValue::malformed(what, rule, identity));
        }
        if identity.len() > longest {
            return Err(InvalidValue::TooLong(what, longest));
        }
        Ok(())
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

    /// Returns the patterns of the grants that give `right` at `now`. A name is covered if the set matches it.
    #[must_use]
    pub fn covered(&self, right: Right, now: Timestamp) -> PatternSet {
        self.grants
            .iter()
            .filter(|grant| self.enabled && grant.rights.contains(right) && grant.is_current(now))
            .map(|grant| &grant.pattern)
            .collect()
    }

    /// Returns whether a grant ended after `since` and not after `now`.
    #[must_use]
    pub fn has_grant_ended(&self, since: Timestamp, now: Timestamp) -> bool {
        self.grants.iter().any(|grant| grant.ends_at.is_some_and(|end| since < end && end <= now))
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

#[cfg(test)]
mod tests {
    use super::*;
    use chrono::{DateTime, TimeDelta};

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
    fn names_in_certificates_are_checked_as_the_database_does() {
        for (kind, identity, valid) in [
            (CallerKind::Spiffe, "spiffe://example.com/a/B_c.d-e", true),
            (CallerKind::Spiffe, "spiffe://Example.com/a", false),
            (CallerKind::Spiffe, "spiffe://example.com/", false),
            (CallerKind::Spiffe, "spiffe://example.com/a//b", false),
            (CallerKind::Spiffe, "spiffe:///a", false),
            (CallerKind::Spiffe, "spiffe://example.com", false),
            (CallerKind::Spiffe, "https://example.com/a", false),
            (CallerKind::Dns, "a", true),
            (CallerKind::Dns, "a-.0b.example.com", true),
            (CallerKind::Dns, "A.example.com", false),
            (CallerKind::Dns, "-a.example.com", false),
            (CallerKind::Dns, "a..b", false),
            (CallerKind::Dns, "", false),
            (CallerKind::Bearer, "a", false),
        ] {
            assert_eq!(kind.check_identity(identity).is_ok(), valid, "{identity}");
        }
        assert!(CallerKind::Dns.check_identity(&"a".repeat(64)).is_err());
        assert!(CallerKind::Dns.check_identity(&"a.".repeat(126)).is_err());
        assert!(CallerKind::Dns.check_identity(&["a"; 128].join(".")).is_err());
        let pasted = CallerKind::Dns.check_identity("a\u{200b}").unwrap_err().to_string();
        assert!(pasted.ends_with("character 2 is a zero width space (U+200B)"), "{pasted}");
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
    fn a_right_covers_the_patterns_of_its_grants_until_they_end() {
        let now = DateTime::UNIX_EPOCH;
        let end = now + TimeDelta::seconds(1);
        let caller = caller(vec![
            grant("d-*", &[Right::List], None),
            grant("a", &[Right::Get], None),
            grant("c", &[Right::List], Some(end)),
        ]);
        let covered = caller.covered(Right::List, now);
        let later = caller.covered(Right::List, end);
        for (name, before, after) in
            [("d-1", true, true), ("a", false, false), ("c", true, false), ("e", false, false)]
        {
            assert_eq!((covered.matches(name), later.matches(name)), (before, after), "{name}");
        }
        assert!(caller.has_grant_ended(now, end) && !caller.has_grant_ended(end, end));
        assert!(Caller { enabled: false, ..caller }.covered(Right::List, now).is_empty());
    }
}
