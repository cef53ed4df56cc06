//! An account's token: as the upstream issued it, as callers get it, and as the database stores it.

use std::{fmt, time::Duration};

use chrono::TimeDelta;

use crate::domain::{
    account::CredentialVersion,
    clock::{Timestamp, delta, until_from},
    secret::AccessToken,
};

/// The longest life of a token that is accepted. The upstream's tokens live an hour. A later end is taken
/// for a misread number: such a token would be served long after its real end.
pub const LONGEST_LIFE: TimeDelta = TimeDelta::hours(48);

/// How long after the end of a token that the upstream repeats the next one is requested. The upstream counts
/// that end in milliseconds, and the broker may know it in whole seconds only.
const REPEAT_MARGIN: TimeDelta = TimeDelta::seconds(1);

/// A number that grows with each new token of an account.
///
/// It contains the time of the issue, as milliseconds since 1970 in the upper 48 bits, and the number of
/// the replica in the lower 16. So it never repeats, even after an older state of the database was
/// restored.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Generation(pub i64);

impl Generation {
    /// Returns the generation of a token that `replica` issues at `at`. It is greater than `last` even if
    /// the clock was set back.
    #[must_use]
    pub fn next(at: Timestamp, replica: u16, last: Option<Self>) -> Self {
        let made = (at.timestamp_millis() << 16) | i64::from(replica);
        Self(last.map_or(made, |last| made.max(last.0 + 1)))
    }

    /// Returns the time that the number contains: that of the start, or a later one if the clock was set back
    /// before it. `None` if it is none of a broker.
    #[must_use]
    pub fn started_at(self) -> Option<Timestamp> {
        Timestamp::from_timestamp_millis(self.0 >> 16)
    }

    /// Returns the number as callers see it.
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

/// The upstream's answer to an issue: a token that has no generation yet.
#[derive(Clone, Debug)]
pub struct IssuedToken {
    /// The JWT.
    pub access_token: AccessToken,
    /// When it ends, by the local clock: the earlier of the times in the answer and in the claims, minus
    /// the amount by which the upstream's clock is ahead.
    pub expires_at: Timestamp,
    /// The one address from which it may work, if its claims name one.
    pub allowed_ip: Option<String>,
    /// How far the upstream's clock is ahead of the local one, by the answer's `Date` header, in
    /// milliseconds with an error of a second or two. `None` without a readable `Date`.
    pub skew_ms: Option<i64>,
}

/// A token that can be served.
#[derive(Clone, Debug)]
pub struct Token {
    /// The JWT.
    pub access_token: AccessToken,
    /// The number that orders the account's tokens; a later token has a greater one.
    pub generation: Generation,
    /// The version of the credential that it was issued with.
    pub credential_version: CredentialVersion,
    /// When it was issued, by the time of this process.
    pub issued_at: Timestamp,
    /// When it ends, by the time of this process.
    pub expires_at: Timestamp,
    /// The one address from which it may work, if its claims name one.
    pub allowed_ip: Option<String>,
    /// The keyed hash that identifies it in the audit log.
    pub fingerprint: String,
    /// When the upstream last gave this same token again instead of a new one, by the database's clock: compare
    /// it only with another such time. `None` if it never did.
    pub repeated_at: Option<Timestamp>,
}

/// A token as the database stores it: like [`Token`], with the JWT sealed.
#[derive(Clone, Debug)]
pub struct SealedToken {
    /// The JWT, sealed to the account and the generation.
    pub sealed: Vec<u8>,
    /// See [`Token::generation`].
    pub generation: Generation,
    /// See [`Token::credential_version`].
    pub credential_version: CredentialVersion,
    /// When it was issued: by the database's clock if it was loaded, else by the time of this process.
    pub issued_at: Timestamp,
    /// When it ends, by the same clock.
    pub expires_at: Timestamp,
    /// When it ends by the wall clock of the replica that issued it. Set if it was loaded, and a release that
    /// knows of it has stored it.
    pub issuer_expires_at: Option<Timestamp>,
    /// See [`Token::allowed_ip`].
    pub allowed_ip: Option<String>,
    /// See [`Token::fingerprint`].
    pub fingerprint: String,
    /// See [`Token::repeated_at`].
    pub repeated_at: Option<Timestamp>,
}

impl SealedToken {
    /// Returns the stored form of `token`, whose JWT the caller has `sealed`.
    #[must_use]
    pub fn new(token: &Token, sealed: Vec<u8>) -> Self {
        Self {
            sealed,
            generation: token.generation,
            credential_version: token.credential_version,
            issued_at: token.issued_at,
            expires_at: token.expires_at,
            issuer_expires_at: None,
            allowed_ip: token.allowed_ip.clone(),
            fingerprint: token.fingerprint.clone(),
            repeated_at: token.repeated_at,
        }
    }

    /// Returns until when the upstream repeats the token, by the clock of its times: see
    /// [`Token::repeats_until`].
    #[must_use]
    pub fn repeats_until(&self) -> Option<Timestamp> {
        self.repeated_at.map(|_| self.expires_at + REPEAT_MARGIN)
    }

    /// Returns the token with the JWT that the caller opened. Its times must be by the time of this process.
    #[must_use]
    pub fn opened(self, access_token: AccessToken) -> Token {
        Token {
            access_token,
            generation: self.generation,
            credential_version: self.credential_version,
            issued_at: self.issued_at,
            expires_at: self.expires_at,
            allowed_ip: self.allowed_ip,
            fingerprint: self.fingerprint,
            repeated_at: self.repeated_at,
        }
    }
}

impl Token {
    /// Returns whether the token may still be served at `now`.
    #[must_use]
    pub fn is_live(&self, now: Timestamp) -> bool {
        self.expires_at > now
    }

    /// Returns the rest of the token's life at `now`; zero once it has ended.
    #[must_use]
    pub fn time_left(&self, now: Timestamp) -> Duration {
        until_from(now, self.expires_at)
    }

    /// Returns until when the upstream gives this token again instead of a new one: shortly after its end.
    /// `None` if it has not done so yet.
    #[must_use]
    pub fn repeats_until(&self) -> Option<Timestamp> {
        self.repeated_at.map(|_| self.expires_at + REPEAT_MARGIN)
    }

    /// Returns the whole life, from issue to end.
    #[must_use]
    pub fn life(&self) -> Duration {
        until_from(self.issued_at, self.expires_at)
    }

    /// Returns the moment at which `share` of the life has passed; `share` is clamped to 0..=1.
    #[must_use]
    pub fn at_share(&self, share: f64) -> Timestamp {
        self.issued_at + delta(self.life().mul_f64(share.clamp(0.0, 1.0)))
    }
}

#[cfg(test)]
impl Token {
    /// Returns a token of the first credential that lives from 1970 on for `life` seconds, for tests.
    pub(crate) fn example(generation: i64, life: i64) -> Self {
        Self {
            access_token: AccessToken::new("t").unwrap(),
            generation: Generation(generation),
            credential_version: CredentialVersion(1),
            issued_at: Timestamp::UNIX_EPOCH,
            expires_at: Timestamp::UNIX_EPOCH + TimeDelta::seconds(life),
            allowed_ip: None,
            fingerprint: String::new(),
            repeated_at: None,
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
                prop_assert!(next.started_at().unwrap() >= at);
                last = Some(next);
            }
        }
    }
}
