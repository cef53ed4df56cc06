//! The upstreams that can be called: two known hosts, or a simulator on this machine, and no other.

use std::{fmt, str::FromStr};

use thiserror::Error;
use url::Url;

use crate::domain::loopback::is_loopback_host;

const PRODUCTION: &str = "https://api.rcsbizcenter.com/api/1.1";
const STAGING: &str = "https://api-qa.rcsbizcenter.com/api/1.1";

/// The upstream that secrets are sent to. Its text is `production`, `staging`, or a loopback URL in
/// canonical spelling, which the database remembers.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Target {
    /// RCS Biz Center.
    Production,
    /// The staging system of RCS Biz Center.
    Staging,
    /// A simulator on this machine.
    Loopback(LoopbackUrl),
}

impl Target {
    /// Returns the URL to which `/token` and the other paths of the API are appended, without a final `/`.
    #[must_use]
    pub fn base_url(&self) -> &str {
        match self {
            Self::Production => PRODUCTION,
            Self::Staging => STAGING,
            Self::Loopback(url) => &url.0,
        }
    }

    /// Returns whether the upstream is on this machine.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        matches!(self, Self::Loopback(_))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Production => f.write_str("production"),
            Self::Staging => f.write_str("staging"),
            Self::Loopback(url) => f.write_str(&url.0),
        }
    }
}

impl FromStr for Target {
    type Err = TargetError;

    fn from_str(target: &str) -> Result<Self, TargetError> {
        match target {
            "production" => Ok(Self::Production),
            "staging" => Ok(Self::Staging),
            url => Ok(Self::Loopback(url.parse()?)),
        }
    }
}

/// An `http` or `https` URL whose host is a loopback address or `localhost`. Parsing is the only way to
/// make one, so no other host is possible.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct LoopbackUrl(String);

impl FromStr for LoopbackUrl {
    type Err = TargetError;

    fn from_str(url: &str) -> Result<Self, TargetError> {
        // The parser would drop line breaks and tabs, and take circled letters, full-width digits and the like for plain
        // ones.
        if url.contains(char::is_whitespace) || !url.is_ascii() {
            return Err(TargetError::NotAUrl);
        }
        let url = Url::parse(url).map_err(|_| TargetError::NotAUrl)?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(TargetError::Scheme);
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(TargetError::UserInfo);
        }
        if url.query().is_some() {
            return Err(TargetError::Query);
        }
        if url.fragment().is_some() {
            return Err(TargetError::Fragment);
        }
        if !is_loopback(&url) {
            return Err(TargetError::Host);
        }
        Ok(Self(url.as_str().trim_end_matches('/').to_owned()))
    }
}

/// Returns whether the host of `url` is this machine.
pub(super) fn is_loopback(url: &Url) -> bool {
    url.host_str().is_some_and(is_loopback_host)
}

/// Why a value names no upstream. No message shows the value, which may hold a password.
#[derive(Clone, Copy, Debug, Error, Eq, PartialEq)]
pub enum TargetError {
    /// The value is neither a known name nor a URL.
    #[error("the upstream must be `production`, `staging`, or the URL of a simulator on loopback")]
    NotAUrl,
    /// The URL's scheme is neither `http` nor `https`.
    #[error("the upstream's URL must begin with http:// or https://")]
    Scheme,
    /// The URL's host is not on loopback.
    #[error(
        "the upstream's URL must name a loopback address or localhost; \
         for the real upstream say `production` or `staging`"
    )]
    Host,
    /// The URL has a user name or a password.
    #[error("the upstream's URL must not hold a user name or password")]
    UserInfo,
    /// The URL has a query.
    #[error("the upstream's URL must not have a query")]
    Query,
    /// The URL has a fragment.
    #[error("the upstream's URL must not have a fragment")]
    Fragment,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_known_hosts_have_names() {
        for (word, base) in [
            ("production", "https://api.rcsbizcenter.com/api/1.1"),
            ("staging", "https://api-qa.rcsbizcenter.com/api/1.1"),
        ] {
            let target: Target = word.parse().unwrap();
            assert_eq!((target.to_string().as_str(), target.base_url()), (word, base));
            assert!(!target.is_loopback());
        }
    }

    #[test]
    fn a_loopback_url_has_a_canonical_spelling() {
        for (given, canonical) in [
            ("http://127.0.0.1:9000/api/1.1", "http://127.0.0.1:9000/api/1.1"),
            ("http://127.0.0.1:9000/api/1.1/", "http://127.0.0.1:9000/api/1.1"),
            ("HTTP://LOCALHOST:80", "http://localhost"),
            ("https://[::1]:8443/", "https://[::1]:8443"),
            ("http://127.1.2.3", "http://127.1.2.3"),
            ("http://127.1:8080", "http://127.0.0.1:8080"),
            ("http://0x7f.1", "http://127.0.0.1"),
            ("http://[::FFFF:127.0.0.1]:9", "http://[::ffff:7f00:1]:9"),
        ] {
            let target: Target = given.parse().unwrap();
            assert!(target.is_loopback());
            assert_eq!(target.to_string(), canonical);
            assert_eq!(target.base_url(), canonical);
            assert_eq!(canonical.parse::<Target>().unwrap(), target);
        }
    }

    #[test]
    fn other_hosts_and_forms_are_refused_with_their_fault() {
        for (value, fault) in [
            ("", TargetError::NotAUrl),
            ("Production", TargetError::NotAUrl),
            ("127.0.0.1:9000", TargetError::NotAUrl),
            ("ftp://127.0.0.1", TargetError::Scheme),
            ("localhost:9000", TargetError::Scheme),
            ("https://api.rcsbizcenter.com/api/1.1", TargetError::Host),
            ("http://127.0.0.1.example.com", TargetError::Host),
            ("http://localhost.example.com", TargetError::Host),
            ("http://localhost.", TargetError::Host),
            ("http://10.0.0.1", TargetError::Host),
            ("http://0.0.0.0", TargetError::Host),
            ("http://[::]", TargetError::Host),
            ("http://[::ffff:10.0.0.1]", TargetError::Host),
            ("http://a.localhost", TargetError::Host),
            ("http://10.1", TargetError::Host),
            ("http://127.0.0.1@example.com", TargetError::UserInfo),
            ("http://canary:canary@127.0.0.1", TargetError::UserInfo),
            ("http://ⓛocalhost", TargetError::NotAUrl),
            ("http://127。0。0。1", TargetError::NotAUrl),
            ("http://１２７.0.0.1", TargetError::NotAUrl),
            ("http://loca\u{ad}lhost", TargetError::NotAUrl),
            ("http://127.0.0.1/é", TargetError::NotAUrl),
            ("http://127.0.0.1/?to=canary", TargetError::Query),
            ("http://127.0.0.1/#canary", TargetError::Fragment),
        ] {
            let refused = value.parse::<Target>().unwrap_err();
            assert_eq!(refused, fault, "{value}");
            assert!(!refused.to_string().contains("canary"));
        }
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_stays_on_this_machine(value in "https?://[a-z0-9.:@\\[\\]/\\\\-]{1,40}") {
            if let Ok(target) = value.parse::<Target>() {
                let url = Url::parse(target.base_url()).unwrap();
                prop_assert!(is_loopback(&url));
                prop_assert_eq!(target.to_string().parse::<Target>().unwrap(), target);
            }
        }
    }
}
