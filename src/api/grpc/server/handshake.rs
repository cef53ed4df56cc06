//! The client's identity after a TLS handshake, and the audit records of connections that are refused before
//! they make a call.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tokio_rustls::server::TlsStream;
use tracing::warn;

use super::socket::Socket;
use crate::{
    audit::record::{Event, Record},
    domain::clock::Clock,
    services::refusal_aggregator::RefusalAggregator,
    tls::{ClientCertificate, Tls},
};

/// How long the record may take to become durable. The connection counts against the limits meanwhile.
const RECORD_TIMEOUT: Duration = Duration::from_secs(5);

/// Returns the client's certificate, if the client presented one. The handshake has verified it.
pub(super) fn client_certificate(
    stream: &TlsStream<Socket>,
    tls: &Arc<Tls>,
) -> Option<ClientCertificate> {
    let (_, session) = stream.get_ref();
    let chain = session.peer_certificates()?.iter().map(|it| it.clone().into_owned()).collect();
    ClientCertificate::new(chain, Arc::clone(tls))
}

/// Records a TLS handshake that failed, unless the client only closed the connection, as TCP probes do.
pub(super) async fn record_failure(
    refusals: &RefusalAggregator,
    clock: &Clock,
    address: SocketAddr,
    error: &io::Error,
) {
    let Some(fault) = error.get_ref().and_then(|source| source.downcast_ref::<rustls::Error>())
    else {
        return;
    };
    record(refusals, clock, address, reason(fault), &fault.to_string()).await;
}

/// Records a connection from a trusted balancer that began without a PROXY protocol header, unless it was
/// only closed.
pub(super) async fn record_no_proxy_header(
    refusals: &RefusalAggregator,
    clock: &Clock,
    address: SocketAddr,
    error: &io::Error,
) {
    if error.kind() == io::ErrorKind::InvalidData {
        record(refusals, clock, address, "NO_PROXY_HEADER", &error.to_string()).await;
    }
}

async fn record(
    refusals: &RefusalAggregator,
    clock: &Clock,
    address: SocketAddr,
    reason: &str,
    fault: &str,
) {
    let mut record = Record::new(clock.wall(), Event::HandshakeRefused)
        .outcome("unauthenticated", reason)
        .with("fault", fault);
    record.peer = Some(address.to_string());
    if refusals.record(record, RECORD_TIMEOUT).await.is_err() {
        warn!(%address, "a refused handshake could not be recorded");
    }
}

/// Returns the `reason` of a failed handshake in the audit log. `docs/tls.md` lists them.
fn reason(fault: &rustls::Error) -> &'static str {
    use rustls::{CertificateError, Error};
    match fault {
        Error::InvalidCertificate(
            CertificateError::Expired | CertificateError::ExpiredContext { .. },
        ) => "CERTIFICATE_EXPIRED",
        Error::InvalidCertificate(CertificateError::UnknownIssuer) => "UNKNOWN_ISSUER",
        Error::InvalidCertificate(CertificateError::Revoked) => "CERTIFICATE_REVOKED",
        Error::InvalidCertificate(CertificateError::UnknownRevocationStatus) => {
            "REVOCATION_UNKNOWN"
        }
        Error::InvalidCertificate(_) | Error::NoCertificatesPresented => "CERTIFICATE_REFUSED",
        Error::InvalidMessage(_) | Error::InappropriateMessage { .. } => "NO_TLS",
        Error::AlertReceived(_) => "CLIENT_ALERT",
        _ => "HANDSHAKE_FAILED",
    }
}
