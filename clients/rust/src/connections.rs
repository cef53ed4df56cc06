//! The connections to the brokers: one for each address, used in turn.

use std::{
    fmt,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{net::lookup_host, time::Instant};
use tonic::{
    Status,
    transport::{Channel, Endpoint, Uri},
};
use tracing::debug;
use url::{Host, Url};

use crate::{credentials::TlsContents, error, time::Backoff};

/// How long connecting to one address may take before the next one is tried.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// A ping is sent so often, also without calls, so that a broken connection is noticed.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
/// How long the answer to a ping may take.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Host names are resolved again at most so often, and only after an address has failed.
const RESOLVE_INTERVAL: Duration = Duration::from_secs(1);
/// How long an address that failed is avoided while there are others.
const AVOIDANCE: Backoff =
    Backoff { first: Duration::from_secs(1), longest: Duration::from_secs(30) };

/// Opens the connection to an endpoint when it is first used. Tests have their own.
pub(crate) type Connect = Arc<dyn Fn(&Endpoint) -> Channel + Send + Sync>;

/// The connections that belong to one state of the TLS files.
pub(crate) struct Connections {
    urls: Arc<[Url]>,
    /// The content of the TLS files; none for connections without TLS.
    tls: Option<TlsContents>,
    connect: Connect,
    peers: Mutex<Peers>,
    /// Held while host names are resolved, so that one caller does it for all.
    resolving: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Peers {
    all: Vec<Peer>,
    /// The place in `all` from which the next call begins.
    next: usize,
    resolved_at: Option<Instant>,
    /// Whether an address has failed since the host names were resolved.
    is_stale: bool,
}

/// One address of a broker.
struct Peer {
    key: PeerKey,
    channel: Channel,
    failures: u32,
    avoided_until: Option<Instant>,
}

/// The place of a URL in the settings, and one of the addresses that it stands for.
type PeerKey = (usize, SocketAddr);

impl Connections {
    /// Returns connections that are made when they are first used.
    ///
    /// # Errors
    /// When the TLS files cannot be used; says why.
    pub(crate) fn new(
        urls: Arc<[Url]>,
        tls: Option<TlsContents>,
        connect: Connect,
    ) -> Result<Self, String> {
        let connections = Self {
            urls,
            tls,
            connect,
            peers: Mutex::default(),
            resolving: tokio::sync::Mutex::default(),
        };
        let any_address = SocketAddr::from(([127, 0, 0, 1], 1));
        for url in connections.urls.iter() {
            connections.endpoint(url, any_address)?;
        }
        Ok(connections)
    }

    /// Calls `method` with the next connection. If no connection can be made, or it breaks, the next address is
    /// tried, so that the call fails only if all addresses fail.
    pub(crate) async fn call<T, F>(&self, method: impl Fn(Channel) -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<T, Status>>,
    {
        self.resolve().await?;
        let mut failure = Status::unavailable("there is no address of a broker");
        for (key, channel) in self.in_turn() {
            match method(channel).await {
                Err(status) if error::is_local(&status) => {
                    debug!(address = %key.1, "the connection to a broker failed");
                    self.mark_failed(key);
                    failure = status;
                }
                answered => {
                    self.mark_answered(key);
                    return answered;
                }
            }
        }
        Err(failure)
    }

    /// Returns the content of the TLS files that the connections use.
    pub(crate) fn tls(&self) -> Option<&TlsContents> {
        self.tls.as_ref()
    }

    /// Drops the connections. A later call makes new ones.
    pub(crate) fn close(&self) {
        *self.peers() = Peers::default();
    }

    /// Returns all connections in the order in which a call tries them: those that failed lately come last.
    fn in_turn(&self) -> Vec<(PeerKey, Channel)> {
        let now = Instant::now();
        let mut peers = self.peers();
        let count = peers.all.len();
        let first = peers.next;
        peers.next = (first + 1) % count.max(1);
        let mut order: Vec<_> = (0..count).map(|i| &peers.all[(first + i) % count]).collect();
        order.sort_by_key(|peer| peer.avoided_until.is_some_and(|until| now < until));
        order.into_iter().map(|peer| (peer.key, peer.channel.clone())).collect()
    }

    fn mark_failed(&self, key: PeerKey) {
        let mut peers = self.peers();
        peers.is_stale = true;
        if let Some(peer) = peers.all.iter_mut().find(|peer| peer.key == key) {
            let pause = AVOIDANCE.pause(peer.failures, fastrand::f64());
            peer.avoided_until = Some(Instant::now() + pause);
            peer.failures = peer.failures.saturating_add(1);
        }
    }

    fn mark_answered(&self, key: PeerKey) {
        if let Some(peer) = self.peers().all.iter_mut().find(|peer| peer.key == key) {
            peer.failures = 0;
            peer.avoided_until = None;
        }
    }

    /// Resolves the host names, the first time and after an address has failed. Addresses that are still there
    /// keep their connections.
    async fn resolve(&self) -> Result<(), Status> {
        if !self.peers().is_resolution_due(Instant::now()) {
            return Ok(());
        }
        let _resolving = self.resolving.lock().await;
        if !self.peers().is_resolution_due(Instant::now()) {
            return Ok(());
        }
        let mut keys = vec![];
        let mut failure = None;
        for (place, url) in self.urls.iter().enumerate() {
            match addresses(url).await {
                Ok(found) => keys.extend(found.into_iter().map(|address| (place, address))),
                Err(status) => failure = Some(status),
            }
        }
        let mut peers = self.peers();
        peers.resolved_at = Some(Instant::now());
        peers.is_stale = failure.is_some();
        if let Some(failure) = failure {
            // The addresses that were found earlier may still be right.
            return if peers.all.is_empty() && keys.is_empty() {
                Err(failure)
            } else {
                self.add(&mut peers, &keys)
            };
        }
        peers.all.retain(|peer| keys.contains(&peer.key));
        self.add(&mut peers, &keys)
    }

    fn add(&self, peers: &mut Peers, keys: &[PeerKey]) -> Result<(), Status> {
        for &key in keys {
            if peers.all.iter().all(|peer| peer.key != key) {
                let endpoint = self.endpoint(&self.urls[key.0], key.1).map_err(Status::internal)?;
                let channel = (self.connect)(&endpoint);
                peers.all.push(Peer { key, channel, failures: 0, avoided_until: None });
            }
        }
        Ok(())
    }

    fn endpoint(&self, url: &Url, address: SocketAddr) -> Result<Endpoint, String> {
        let host = url.host_str().unwrap_or_default();
        let origin: Uri = url.as_str().parse().map_err(|_| format!("{url} is no URL"))?;
        let endpoint = Endpoint::from_shared(format!("{}://{address}", url.scheme()))
            .map_err(|error| error.to_string())?
            .origin(origin)
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true);
        let Some(tls) = &self.tls else { return Ok(endpoint) };
        let name = host.trim_start_matches('[').trim_end_matches(']');
        endpoint.tls_config(tls.config().domain_name(name)).map_err(|error| {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            cause.unwrap_or_else(|| error.to_string())
        })
    }

    fn peers(&self) -> MutexGuard<'_, Peers> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Peers {
    fn is_resolution_due(&self, now: Instant) -> bool {
        match self.resolved_at {
            _ if self.all.is_empty() => true,
            None => true,
            Some(at) => self.is_stale && now >= at + RESOLVE_INTERVAL,
        }
    }
}

impl fmt::Debug for Connections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let urls: Vec<_> = self.urls.iter().map(Url::as_str).collect();
        f.debug_struct("Connections").field("urls", &urls).finish_non_exhaustive()
    }
}

/// Returns the addresses that the URL stands for, in the resolver's order.
async fn addresses(url: &Url) -> Result<Vec<SocketAddr>, Status> {
    let port = url.port_or_known_default().unwrap_or_default();
    let name = match url.host() {
        Some(Host::Ipv4(ip)) => return Ok(vec![(ip, port).into()]),
        Some(Host::Ipv6(ip)) => return Ok(vec![(ip, port).into()]),
        Some(Host::Domain(name)) => name,
        None => "",
    };
    match lookup_host((name, port)).await {
        Ok(found) => Ok(found.collect()),
        Err(error) => Err(Status::unavailable(format!("cannot resolve {name}: {error}"))),
    }
}
