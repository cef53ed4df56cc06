//! Authentication of callers: by a bearer in the request's metadata, or by the client certificate of the
//! connection.

use std::sync::Arc;

use http::{HeaderMap, header::AUTHORIZATION};

use crate::{
    crypto::bearer::Bearer,
    domain::{
        caller::{Caller, CallerKind},
        clock::Timestamp,
    },
    services::{caller_directory::CallerDirectory, token_provider::CallRefusal},
    store::callers::CredentialKey,
    tls::PeerIdentity,
};

/// A caller and the credential by which it was found.
#[derive(Clone, Debug)]
pub struct AuthenticatedCaller {
    /// The caller.
    pub caller: Arc<Caller>,
    /// The kind of its credential.
    pub kind: CallerKind,
    /// The key of the credential. Of a bearer it holds only the hash.
    pub credential: CredentialKey,
}

/// A failed authentication: the refusal for the caller, and facts that only the audit log receives.
#[derive(Debug)]
pub struct AuthenticationFailure {
    /// The refusal that the caller reads. It does not reveal whether the credential is known.
    pub refusal: CallRefusal,
    /// The caller that the refused credential belongs to, if the credential is known. For the audit log.
    pub known_caller: Option<Box<AuthenticatedCaller>>,
    /// The exact cause, if there is more to say than the caller reads. For the audit log.
    pub cause: Option<&'static str>,
    /// The names in the client certificate, if it was the credential. For the audit log.
    pub certificate_names: Option<String>,
}

impl From<CallRefusal> for AuthenticationFailure {
    fn from(refusal: CallRefusal) -> Self {
        Self { refusal, known_caller: None, cause: None, certificate_names: None }
    }
}

/// The client certificate of a connection.
#[derive(Clone, Copy, Debug)]
pub struct PresentedCertificate<'a> {
    /// The identity that it names.
    pub identity: &'a PeerIdentity,
    /// Why it is not accepted any more, if so: since the handshake it may have ended or been revoked.
    pub refusal: Option<&'static str>,
}

/// Authenticates callers at one moment.
#[derive(Clone, Copy)]
pub struct Authenticator<'a> {
    /// Callers with their credentials and grants, as last followed from the database.
    pub callers: &'a CallerDirectory,
    /// The trust domain whose SPIFFE IDs are accepted; without one, none is.
    pub trust_domain: Option<&'a str>,
    /// The present moment.
    pub now: Timestamp,
}

impl Authenticator<'_> {
    /// Finds the caller of a request. If the request has a bearer, it alone decides, even where it is
    /// refused and the certificate would be accepted: a client sends a bearer on purpose, while a
    /// certificate comes with the connection.
    ///
    /// # Errors
    /// [`CallRefusal::CredentialMissing`], [`CallRefusal::BearerMalformed`] (also for more than one), or
    /// [`CallRefusal::CredentialRefused`], which is the same for unknown, ended, revoked and disabled
    /// credentials.
    pub fn authenticate(
        self,
        headers: &HeaderMap,
        certificate: Option<PresentedCertificate<'_>>,
    ) -> Result<AuthenticatedCaller, AuthenticationFailure> {
        let mut bearers = headers.get_all(AUTHORIZATION).iter();
        match (bearers.next(), bearers.next(), certificate) {
            (Some(bearer), None, _) => self.by_bearer(bearer.to_str().unwrap_or_default()),
            (Some(_), Some(_), _) => Err(CallRefusal::BearerMalformed.into()),
            (None, _, Some(certificate)) => self.by_certificate(certificate),
            (None, _, None) => Err(CallRefusal::CredentialMissing.into()),
        }
    }

    /// Checks the value of an `authorization` header: `Bearer tbk_…`. The bearer is looked up by its
    /// SHA-256, since only hashes are stored.
    fn by_bearer(self, value: &str) -> Result<AuthenticatedCaller, AuthenticationFailure> {
        let (scheme, bearer) = value.split_once(' ').ok_or(CallRefusal::BearerMalformed)?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err(CallRefusal::BearerMalformed.into());
        }
        let bearer = Bearer::parse(bearer.trim()).map_err(|_| CallRefusal::BearerMalformed)?;
        self.look_up(CallerKind::Bearer, CredentialKey::BearerSha256(bearer.sha256()))
    }

    /// Finds the caller that a client certificate identifies. The TLS handshake has verified the certificate.
    fn by_certificate(
        self,
        certificate: PresentedCertificate<'_>,
    ) -> Result<AuthenticatedCaller, AuthenticationFailure> {
        let refused = |cause, certificate_names: Option<String>| AuthenticationFailure {
            cause: Some(cause),
            certificate_names,
            ..CallRefusal::CredentialRefused.into()
        };
        let identity = certificate.identity;
        if let Some(cause) = certificate.refusal {
            return Err(refused(cause, identity.names()));
        }
        match identity {
            PeerIdentity::Unidentified(cause) => Err(refused(*cause, None)),
            PeerIdentity::Spiffe { id, trust_domain } => match self.trust_domain {
                Some(ours) if ours == trust_domain => {
                    let credential = CredentialKey::Identity(CallerKind::Spiffe, id.clone());
                    self.look_up(CallerKind::Spiffe, credential).map_err(|failure| {
                        AuthenticationFailure { certificate_names: Some(id.clone()), ..failure }
                    })
                }
                Some(_) => Err(refused("another trust domain", Some(id.clone()))),
                None => Err(refused("no trust domain is set", Some(id.clone()))),
            },
            PeerIdentity::Dns(names) => self.by_dns_names(names).map_err(|failure| {
                AuthenticationFailure { certificate_names: identity.names(), ..failure }
            }),
        }
    }

    /// Authenticates by the first of the certificate's DNS names that is registered. If that credential is
    /// refused, the call is refused too: later names are not tried.
    fn by_dns_names(self, names: &[String]) -> Result<AuthenticatedCaller, AuthenticationFailure> {
        names
            .iter()
            .map(|name| CredentialKey::Identity(CallerKind::Dns, name.clone()))
            .map(|credential| self.look_up(CallerKind::Dns, credential))
            .find(|found| !matches!(found, Err(failure) if failure.known_caller.is_none()))
            .unwrap_or_else(|| {
                let cause = Some("no DNS name is registered");
                Err(AuthenticationFailure { cause, ..CallRefusal::CredentialRefused.into() })
            })
    }

    fn look_up(
        self,
        kind: CallerKind,
        credential: CredentialKey,
    ) -> Result<AuthenticatedCaller, AuthenticationFailure> {
        match self.callers.authenticate(&credential, self.now) {
            Ok(caller) => Ok(AuthenticatedCaller { caller, kind, credential }),
            Err(refused) => {
                let cause = refused.as_ref().map(|refused| refused.reason);
                let known_caller = refused.map(|refused| {
                    Box::new(AuthenticatedCaller { caller: refused.caller, kind, credential })
                });
                let refusal = CallRefusal::CredentialRefused;
                Err(AuthenticationFailure { known_caller, cause, ..refusal.into() })
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
        let credential = |caller: &Arc<Caller>, key| CallerCredential {
            caller: caller.clone(),
            key,
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

    fn authenticate(
        directory: &CallerDirectory,
        authorization: &[&str],
        certificate: Option<&PeerIdentity>,
        trust_domain: Option<&str>,
    ) -> Result<String, (CallRefusal, Option<&'static str>)> {
        let mut headers = HeaderMap::new();
        for value in authorization {
            headers.append(AUTHORIZATION, value.parse().unwrap());
        }
        let now = DateTime::UNIX_EPOCH;
        let certificate =
            certificate.map(|identity| PresentedCertificate { identity, refusal: None });
        Authenticator { callers: directory, trust_domain, now }
            .authenticate(&headers, certificate)
            .map(|found| format!("{} by {}", found.caller.name, found.kind.as_str()))
            .map_err(|failure| (failure.refusal, failure.cause))
    }

    fn spiffe(id: &str) -> PeerIdentity {
        let trust_domain = id.split('/').nth(2).unwrap().to_owned();
        PeerIdentity::Spiffe { id: id.into(), trust_domain }
    }

    fn dns(names: &[&str]) -> PeerIdentity {
        PeerIdentity::Dns(names.iter().map(|&name| name.to_owned()).collect())
    }

    #[test]
    fn a_certificate_identifies_a_caller_by_spiffe_id_in_our_trust_domain_or_by_dns_name() {
        let directory = directory(&Bearer::generate());
        let ours = Some("example.com");
        let by = |certificate, domain| authenticate(&directory, &[], Some(&certificate), domain);
        assert_eq!(by(spiffe(BILLING), ours), Ok("billing by spiffe".into()));
        assert_eq!(
            by(dns(&["x.example.com", "search.example.com"]), None),
            Ok("search by dns".into())
        );
        let refused = |cause| Err((CallRefusal::CredentialRefused, cause));
        for (certificate, domain, cause) in [
            (spiffe(BILLING), None, Some("no trust domain is set")),
            (spiffe(BILLING), Some("example.org"), Some("another trust domain")),
            (spiffe("spiffe://example.org/billing"), ours, Some("another trust domain")),
            (spiffe("spiffe://example.com/other"), ours, None),
            (dns(&["x.example.com"]), ours, Some("no DNS name is registered")),
            (PeerIdentity::Unidentified("it has two URIs"), ours, Some("it has two URIs")),
        ] {
            assert_eq!(by(certificate, domain), refused(cause));
        }
        let disabled = by(dns(&["old.example.com"]), ours);
        assert!(matches!(disabled, Err((CallRefusal::CredentialRefused, Some(_)))), "{disabled:?}");
    }

    #[test]
    fn a_certificate_that_has_ended_since_the_handshake_identifies_nobody() {
        let directory = directory(&Bearer::generate());
        let (headers, now) = (HeaderMap::new(), DateTime::UNIX_EPOCH);
        let authenticator =
            Authenticator { callers: &directory, trust_domain: Some("example.com"), now };
        for identity in [spiffe(BILLING), dns(&["search.example.com"])] {
            let ended = PresentedCertificate { identity: &identity, refusal: Some("it has ended") };
            let failure = authenticator.authenticate(&headers, Some(ended)).unwrap_err();
            assert_eq!(failure.refusal, CallRefusal::CredentialRefused);
            assert_eq!(failure.cause, Some("it has ended"));
            assert_eq!(failure.certificate_names, identity.names());
        }
    }

    #[test]
    fn a_bearer_decides_alone_whatever_the_certificate_says() {
        let bearer = Bearer::generate();
        let directory = directory(&bearer);
        let header = format!("Bearer {}", bearer.expose());
        let by = |headers: &[&str]| {
            authenticate(&directory, headers, Some(&spiffe(BILLING)), Some("example.com"))
        };
        assert_eq!(by(&[&header]), Ok("search by bearer".into()));
        for malformed in [&["Bearer x"][..], &["nonsense"], &["Basic x"], &[&header, &header]] {
            assert_eq!(by(malformed), Err((CallRefusal::BearerMalformed, None)), "{malformed:?}");
        }
        let none = authenticate(&directory, &[], None, Some("example.com"));
        assert_eq!(none, Err((CallRefusal::CredentialMissing, None)));
    }
}
