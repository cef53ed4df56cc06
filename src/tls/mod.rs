//! TLS on the gRPC port: the broker's certificate and key, the CAs of callers' certificates, and the lists of
//! revoked ones. They are reloaded when their files change.

mod certificate;
mod client_certificate;
mod client_verifier;
mod error;
mod name;
mod reloaded;
mod revocation;
mod root_verifier;

pub use self::{
    certificate::PeerIdentity,
    client_certificate::ClientCertificate,
    error::TlsError,
    reloaded::{Tls, TlsFiles},
    revocation::{ListScope, RevocationList, UnlistedCas},
};
