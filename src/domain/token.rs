//! An account's token with its generation, its times and what its claims say.

use std::{fmt, time::Duration};

use crate::domain::{
    account::CredentialVersion,
    clock::{Timestamp, delta, until_from},
    secret::AccessToken,
};

/// A number that grows with each new token of an account.
///
/// Made from the time of the issue and the replica, so that it never repeats, also after a restored
/// database: milliseconds since 1970 in the upper bits, 16 bits of the replica in the lower.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Generation(pub i64);

impl Generation {
    /// The generation of an issue at `at` by `replica`, later than `last` whatever the clocks say.
    #[must_use]
    pub fn next(at: Timestamp, replica: u16, last: Option<Self>) -> Self {
        let made = (at.timestamp_millis() << 16) | i64::from(replica);
        Self(last.map_or(made, |last| made.max(last.0 + 1)))
    }

    /// The number that callers see.
    #[must_use]
    pub fn as_u64(self) -> u64 {
        self.0.unsigned_abs()
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A token as the upstream issued it, before it has a generation.
#[derive(Clone, Debug)]
pub struct IssuedToken {
    /// The JWT.
    pub access_token: AccessToken,
    /// Its end by *our* clock: the earlier of what the answer and the claims say, less the lead of
    /// the upstream's clock over ours.
    pub expires_at: Timestamp,
    /// The one address from which it may work, if its claims name one.
    pub allowed_ip: Option<String>,
    /// How far the upstream's clock is ahead of ours, by the answer's `Date`, in milliseconds;
    /// absent without a readable `Date`. Good to a second or two.
    pub skew_ms: Option<i64>,
}

/// A token that the broker holds.
#[derive(Clone, Debug)]
pub struct Token {
    /// The JWT.
    pub access_token: AccessToken,
    /// Its place in the account's series of tokens.
    pub generation: Generation,
    /// The credential that it was issued with.
    pub credential_version: CredentialVersion,
    /// When it was issued.
    pub issued_at: Timestamp,
    /// When it ends.
    pub expires_at: Timestamp,
    /// The one address from which it may work.
    pub allowed_ip: Option<String>,
    /// The keyed hash under which the audit log knows it.
    pub fingerprint: String,
}

impl Token {
    /// Whether it may still be served at `now`.
    #[must_use]
    pub fn is_live(&self, now: Timestamp) -> bool {
        self.expires_at > now
    }

    /// What is left of its life at `now`.
    #[must_use]
    pub fn time_left(&self, now: Timestamp) -> Duration {
        until_from(now, self.expires_at)
    }

    /// Its whole life, from issue to end.
    #[must_use]
    pub fn life(&self) -> Duration {
        until_from(self.issued_at, self.expires_at)
    }

    /// The moment `share` of the way through its life.
    #[must_use]
    pub fn at_share(&self, share: f64) -> Timestamp {
        self.issued_at + delta(self.life().mul_f64(share.clamp(0.0, 1.0)))
    }
}

#[cfg(test)]
impl Token {
    /// A token of the first credential that lives from 1970 on for `life` seconds, for tests.
    pub(crate) fn example(generation: i64, life: i64) -> Self {
        Self {
            access_token: AccessToken::new("t").unwrap(),
            generation: Generation(generation),
            credential_version: CredentialVersion(1),
            issued_at: Timestamp::UNIX_EPOCH,
            expires_at: Timestamp::UNIX_EPOCH + chrono::TimeDelta::seconds(life),
            allowed_ip: None,
            fingerprint: String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn generations_grow_even_when_the_clock_goes_back(
            times in proptest::collection::vec(0_i64..4_000_000_000_000, 1..20),
            replicas in proptest::collection::vec(any::<u16>(), 20),
        ) {
            let mut last = None;
            for (ms, replica) in times.into_iter().zip(replicas) {
                let at = DateTime::from_timestamp_millis(ms).unwrap();
                let next = Generation::next(at, replica, last);
                prop_assert!(last.is_none_or(|last| next > last));
                prop_assert!(next.0 >= 0);
                last = Some(next);
            }
        }
    }
}
