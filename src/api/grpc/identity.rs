//! Who calls: by a bearer, or by the client certificate of the connection.

use std::sync::Arc;

use http::{HeaderMap, header::AUTHORIZATION};

use crate::{
    crypto::bearer::Bearer,
    domain::{
        caller::{Caller, CallerKind},
        clock::Timestamp,
    },
    services::{caller_directory::CallerDirectory, token_provider::Refusal},
    store::callers::CredentialKey,
    tls::PeerIdentity,
};

/// What is known of who called, for the audit log also when the call is refused.
#[derive(Clone, Debug)]
pub struct Identified {
    /// The caller.
    pub caller: Arc<Caller>,
    /// How it was identified.
    pub kind: CallerKind,
    /// What it showed.
    pub proof: CredentialKey,
}

/// A refused identity: what the caller hears, and what the audit log is told.
#[derive(Debug)]
pub struct Unidentified {
    /// What the caller hears.
    pub refusal: Refusal,
    /// The caller whose credential it was, if it is known.
    pub known: Option<Box<Identified>>,
    /// Why, where that is more than the caller hears.
    pub why: Option<&'static str>,
    /// The name that a client certificate showed.
    pub shown: Option<String>,
}

impl From<Refusal> for Unidentified {
    fn from(refusal: Refusal) -> Self {
        Self { refusal, known: None, why: None, shown: None }
    }
}

/// How callers are found.
#[derive(Clone, Copy)]
pub struct Identifier<'a> {
    /// Who there is.
    pub directory: &'a CallerDirectory,
    /// Whose SPIFFE IDs count; without one, none do.
    pub trust_domain: Option<&'a str>,
    /// The present.
    pub now: Timestamp,
}

impl Identifier<'_> {
    /// Finds the caller of a request. A bearer, if one is sent, counts alone; else the certificate that
    /// the connection was made with.
    ///
    /// # Errors
    /// [`Refusal::CredentialMissing`], [`Refusal::BearerMalformed`], or, alike for unknown, ended and
    /// disabled credentials, [`Refusal::CredentialRefused`].
    pub fn identify(
        self,
        headers: &HeaderMap,
        certificate: Option<&PeerIdentity>,
    ) -> Result<Identified, Unidentified> {
        let mut bearers = headers.get_all(AUTHORIZATION).iter();
        match (bearers.next(), bearers.next(), certificate) {
            (Some(bearer), None, _) => self.by_bearer(bearer.to_str().unwrap_or_default()),
            (Some(_), Some(_), _) => Err(Refusal::BearerMalformed.into()),
            (None, _, Some(shown)) => self.by_certificate(shown),
            (None, _, None) => Err(Refusal::CredentialMissing.into()),
        }
    }

    fn by_bearer(self, value: &str) -> Result<Identified, Unidentified> {
        let (scheme, bearer) = value.split_once(' ').ok_or(Refusal::BearerMalformed)?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err(Refusal::BearerMalformed.into());
        }
        let bearer = Bearer::parse(bearer.trim()).map_err(|_| Refusal::BearerMalformed)?;
        self.by_proof(CallerKind::Bearer, CredentialKey::BearerSha256(bearer.sha256()))
    }

    fn by_certificate(self, shown: &PeerIdentity) -> Result<Identified, Unidentified> {
        let refused = |why, shown: Option<String>| Unidentified {
            why: Some(why),
            shown,
            ..Refusal::CredentialRefused.into()
        };
        match shown {
            PeerIdentity::Nobody(why) => Err(refused(*why, None)),
            PeerIdentity::Spiffe { id, trust_domain } => match self.trust_domain {
                Some(ours) if ours == trust_domain => {
                    let proof = CredentialKey::Identity(CallerKind::Spiffe, id.clone());
                    self.by_proof(CallerKind::Spiffe, proof)
                        .map_err(|refused| Unidentified { shown: Some(id.clone()), ..refused })
                }
                Some(_) => Err(refused("another trust domain", Some(id.clone()))),
                None => Err(refused("no trust domain is set", Some(id.clone()))),
            },
            PeerIdentity::Dns(names) => {
                let mut first = None;
                for name in names {
                    let proof = CredentialKey::Identity(CallerKind::Dns, name.clone());
                    match self.by_proof(CallerKind::Dns, proof) {
                        Err(refused) if refused.known.is_none() => {}
                        // A name that is known decides, also by being refused.
                        found => first = first.or(Some(found)),
                    }
                }
                first
                    .unwrap_or_else(|| Err(refused("no name is known", None)))
                    .map_err(|refused| Unidentified { shown: Some(names.join(",")), ..refused })
            }
        }
    }

    fn by_proof(self, kind: CallerKind, proof: CredentialKey) -> Result<Identified, Unidentified> {
        match self.directory.authenticate(&proof, self.now) {
            Ok(caller) => Ok(Identified { caller, kind, proof }),
            Err(refused) => {
                let why = refused.as_ref().map(|refused| refused.why);
                let known =
                    refused.map(|it| Box::new(Identified { caller: it.caller, kind, proof }));
                Err(Unidentified { known, why, ..Refusal::CredentialRefused.into() })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;
    use crate::{domain::caller::CallerId, store::callers::CallerCredential};

    const BILLING: &str = "spiffe://example.com/billing";

    fn directory(bearer: &Bearer) -> CallerDirectory {
        let caller = |id, name: &str, enabled| {
            let (id, name) = (CallerId(id), name.into());
            Arc::new(Caller { id, name, enabled, rate_limit: None, grants: vec![] })
        };
        let credential = |caller: &Arc<Caller>, proof| CallerCredential {
            caller: caller.clone(),
            key: proof,
            ends_at: None,
            revoked: false,
        };
        let (billing, search, old) =
            (caller(1, "billing", true), caller(2, "search", true), caller(3, "old", false));
        let dns = |name: &str| CredentialKey::Identity(CallerKind::Dns, name.into());
        let directory = CallerDirectory::default();
        directory.replace(vec![
            credential(&billing, CredentialKey::Identity(CallerKind::Spiffe, BILLING.into())),
            credential(&search, dns("search.example.com")),
            credential(&search, CredentialKey::BearerSha256(bearer.sha256())),
            credential(&old, dns("old.example.com")),
        ]);
        directory
    }

    fn found(
        directory: &CallerDirectory,
        authorization: &[&str],
        certificate: Option<&PeerIdentity>,
        trust_domain: Option<&str>,
    ) -> Result<String, (Refusal, Option<&'static str>)> {
        let mut headers = HeaderMap::new();
        for value in authorization {
            headers.append(AUTHORIZATION, value.parse().unwrap());
        }
        let identifier = Identifier { directory, trust_domain, now: DateTime::UNIX_EPOCH };
        identifier
            .identify(&headers, certificate)
            .map(|it| format!("{} by {}", it.caller.name, it.kind.as_str()))
            .map_err(|it| (it.refusal, it.why))
    }

    fn spiffe(id: &str) -> PeerIdentity {
        let trust_domain = id.split('/').nth(2).unwrap().to_owned();
        PeerIdentity::Spiffe { id: id.into(), trust_domain }
    }

    fn dns(names: &[&str]) -> PeerIdentity {
        PeerIdentity::Dns(names.iter().map(|&name| name.to_owned()).collect())
    }

    #[test]
    fn a_caller_is_who_its_certificate_names_in_our_trust_domain() {
        let directory = directory(&Bearer::generate());
        let ours = Some("example.com");
        let by = |certificate, domain| found(&directory, &[], Some(&certificate), domain);
        assert_eq!(by(spiffe(BILLING), ours), Ok("billing by spiffe".into()));
        assert_eq!(
            by(dns(&["x.example.com", "search.example.com"]), None),
            Ok("search by dns".into())
        );
        let refused = |why| Err((Refusal::CredentialRefused, why));
        for (certificate, domain, why) in [
            (spiffe(BILLING), None, Some("no trust domain is set")),
            (spiffe(BILLING), Some("example.org"), Some("another trust domain")),
            (spiffe("spiffe://example.org/billing"), ours, Some("another trust domain")),
            (spiffe("spiffe://example.com/other"), ours, None),
            (dns(&["x.example.com"]), ours, Some("no name is known")),
            (PeerIdentity::Nobody("it has two URIs"), ours, Some("it has two URIs")),
        ] {
            assert_eq!(by(certificate, domain), refused(why));
        }
        let disabled = by(dns(&["old.example.com"]), ours);
        assert!(matches!(disabled, Err((Refusal::CredentialRefused, Some(_)))), "{disabled:?}");
    }

    #[test]
    fn a_bearer_counts_alone_whatever_the_certificate_says() {
        let bearer = Bearer::generate();
        let directory = directory(&bearer);
        let shown = format!("Bearer {}", bearer.expose());
        let by = |headers: &[&str]| {
            found(&directory, headers, Some(&spiffe(BILLING)), Some("example.com"))
        };
        assert_eq!(by(&[&shown]), Ok("search by bearer".into()));
        for malformed in [&["Bearer x"][..], &["nonsense"], &["Basic x"], &[&shown, &shown]] {
            assert_eq!(by(malformed), Err((Refusal::BearerMalformed, None)), "{malformed:?}");
        }
        let none = found(&directory, &[], None, Some("example.com"));
        assert_eq!(none, Err((Refusal::CredentialMissing, None)));
    }
}
