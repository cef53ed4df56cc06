//! The certificate of a connection's client, which is checked again as long as the connection is open.

use std::{fmt, sync::Arc, time::Duration};

use chrono::TimeDelta;
use parking_lot::Mutex;
use rustls::{CertificateError, Error, pki_types::CertificateDer};
use tokio::time::sleep;

use super::{
    certificate::{self, PeerIdentity, unix_time},
    reloaded::Tls,
};
use crate::domain::clock::Timestamp;

/// How often an open connection's certificate is looked at.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// How long a verification counts if neither the files change nor a certificate of the chain ends.
const VERIFICATION_LIFE: TimeDelta = TimeDelta::minutes(1);

/// A client's certificate chain that a handshake has verified. The CAs, the revocation lists and the time
/// go on after that, so each call asks [`ClientCertificate::refusal`].
pub struct ClientCertificate {
    identity: PeerIdentity,
    chain: Vec<CertificateDer<'static>>,
    tls: Arc<Tls>,
    last: Mutex<Option<Verification>>,
}

/// The result of a verification, and for what it counts.
#[derive(Clone, Copy)]
struct Verification {
    /// The generation of the TLS configuration that verified.
    generation: u64,
    /// The result counts from this time on,
    since: Timestamp,
    /// and before this one.
    until: Timestamp,
    refusal: Option<&'static str>,
}

impl Verification {
    fn counts(&self, generation: u64, now: Timestamp) -> bool {
        self.generation == generation && self.since <= now && now < self.until
    }
}

impl ClientCertificate {
    /// Wraps the chain that a client has presented, its own certificate first; `None` if it is empty.
    #[must_use]
    pub fn new(chain: Vec<CertificateDer<'static>>, tls: Arc<Tls>) -> Option<Self> {
        let identity = PeerIdentity::of(chain.first()?);
        Some(Self { identity, chain, tls, last: Mutex::default() })
    }

    /// Returns the identity that the certificate names.
    #[must_use]
    pub fn identity(&self) -> &PeerIdentity {
        &self.identity
    }

    /// Returns why the certificate is not accepted at this moment, with the present CAs and revocation
    /// lists; `None` if it is. Usually costs a lock that only this connection takes.
    #[must_use]
    pub fn refusal(&self) -> Option<&'static str> {
        let now = self.tls.clock.utc();
        let generation = self.tls.current.load().generation;
        let mut last = self.last.lock();
        match *last {
            Some(verification) if verification.counts(generation, now) => verification.refusal,
            _ => last.insert(self.verify(now)).refusal,
        }
    }

    /// Returns once the certificate is not accepted any more, with the reason. Cancel safe.
    pub async fn refused(&self) -> &'static str {
        loop {
            if let Some(reason) = self.refusal() {
                return reason;
            }
            sleep(CHECK_INTERVAL).await;
        }
    }

    fn verify(&self, now: Timestamp) -> Verification {
        let current = self.tls.current.load();
        let verified = match (&current.client_verifier, self.chain.split_first()) {
            (Some(verifier), Some((certificate, intermediates))) => {
                verifier.verify_client_cert(certificate, intermediates, unix_time(now))
            }
            _ => Err(CertificateError::UnknownIssuer.into()),
        };
        // A certificate is valid up to and including the second that it names.
        let ends = self.chain.iter().filter_map(certificate::not_after);
        let ends = ends.map(|end| end + TimeDelta::seconds(1)).filter(|end| *end > now);
        Verification {
            generation: current.generation,
            since: now,
            until: ends.fold(now + VERIFICATION_LIFE, Timestamp::min),
            refusal: verified.err().as_ref().map(cause),
        }
    }
}

impl fmt::Debug for ClientCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ClientCertificate").field(&self.identity).finish()
    }
}

/// Returns the cause of a refusal for the audit log.
fn cause(error: &Error) -> &'static str {
    match error {
        Error::InvalidCertificate(
            CertificateError::Expired | CertificateError::ExpiredContext { .. },
        ) => "the certificate has ended",
        Error::InvalidCertificate(CertificateError::Revoked) => "the certificate was revoked",
        Error::InvalidCertificate(CertificateError::UnknownRevocationStatus) => {
            "no revocation list of the certificate's CA is about it"
        }
        Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "the certificate's CA is not trusted any more"
        }
        _ => "the certificate is not accepted any more",
    }
}
