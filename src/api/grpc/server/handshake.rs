//! TLS handshakes: whom the client's certificate names, and what is recorded of those that are refused.

use std::{io, net::SocketAddr, time::Duration};

use tokio_rustls::server::TlsStream;
use tracing::warn;

use super::socket::Socket;
use crate::{
    audit::record::{Event, Record},
    domain::clock::Clock,
    services::refusal_aggregator::RefusalAggregator,
    tls::PeerIdentity,
};

/// How long a refused handshake's record may take; nobody waits for it.
const RECORD_WITHIN: Duration = Duration::from_secs(5);

/// Whom the client's certificate names, if it showed one. The handshake has verified it.
pub(super) fn shown(stream: &TlsStream<Socket>) -> Option<PeerIdentity> {
    let (_, session) = stream.get_ref();
    session.peer_certificates().and_then(|chain| chain.first()).map(PeerIdentity::of)
}

/// Records a handshake that the client lost. One that it only broke off, as probes do, is none.
pub(super) async fn record_refused(
    folds: &RefusalAggregator,
    clock: &Clock,
    address: SocketAddr,
    error: &io::Error,
) {
    let Some(fault) = error.get_ref().and_then(|it| it.downcast_ref::<rustls::Error>()) else {
        return;
    };
    record(folds, clock, address, reason(fault), &fault.to_string()).await;
}

/// Records a connection of a balancer that did not say whose it is. One that was only broken off is none.
pub(super) async fn record_unproxied(
    folds: &RefusalAggregator,
    clock: &Clock,
    address: SocketAddr,
    error: &io::Error,
) {
    if error.kind() == io::ErrorKind::InvalidData {
        record(folds, clock, address, "NO_PROXY_HEADER", &error.to_string()).await;
    }
}

async fn record(
    folds: &RefusalAggregator,
    clock: &Clock,
    address: SocketAddr,
    reason: &str,
    fault: &str,
) {
    let mut record = Record::new(clock.now(), Event::HandshakeRefused)
        .outcome("unauthenticated", reason)
        .with("fault", fault);
    record.peer = Some(address.to_string());
    if folds.record(record, RECORD_WITHIN).await.is_err() {
        warn!(%address, "a refused handshake could not be recorded");
    }
}

/// The reason of a refused handshake, for the audit log.
fn reason(fault: &rustls::Error) -> &'static str {
    use rustls::{CertificateError, Error};
    match fault {
        Error::InvalidCertificate(
            CertificateError::Expired | CertificateError::ExpiredContext { .. },
        ) => "CERTIFICATE_EXPIRED",
        Error::InvalidCertificate(CertificateError::UnknownIssuer) => "UNKNOWN_ISSUER",
        Error::InvalidCertificate(_) | Error::NoCertificatesPresented => "CERTIFICATE_REFUSED",
        Error::InvalidMessage(_) | Error::InappropriateMessage { .. } => "NO_TLS",
        Error::AlertReceived(_) => "CLIENT_ALERT",
        _ => "HANDSHAKE_FAILED",
    }
}
