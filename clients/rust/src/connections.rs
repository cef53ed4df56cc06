//! The connections to the brokers: one for each address, used in turn.

use std::{
    fmt,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{net::lookup_host, sync::watch, time::Instant};
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
/// Returns the addresses that a URL stands for. Tests have their own.
type Resolve = Arc<dyn Fn(Url) -> Pin<Box<dyn Future<Output = Addresses> + Send>> + Send + Sync>;
type Addresses = Result<Vec<SocketAddr>, Status>;

/// The connections that belong to one state of the TLS files.
pub(crate) struct Connections {
    urls: Arc<[Url]>,
    /// The content of the TLS files; none for connections without TLS.
    tls: Option<TlsContents>,
    connect: Connect,
    resolve: Resolve,
    peers: Mutex<Peers>,
}

#[derive(Default)]
struct Peers {
    all: Vec<Peer>,
    /// The place in `all` from which the next call begins.
    next: usize,
    resolved_at: Option<Instant>,
    /// Whether an address has failed since the host names were resolved.
    is_stale: bool,
    /// How the resolution went that was started last. Its task has the sender.
    resolution: Option<watch::Receiver<Option<Result<(), Status>>>>,
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
            resolve: Arc::new(|url| Box::pin(addresses(url))),
            peers: Mutex::default(),
        };
        let any_address = SocketAddr::from(([127, 0, 0, 1], 1));
        for url in connections.urls.iter() {
            connections.endpoint(url, any_address)?;
        }
        Ok(connections)
    }

    /// Calls `method` with the next connection. If no connection can be made, or it breaks, the next address is
    /// tried, so that the call fails only if all addresses fail.
    pub(crate) async fn call<T, F>(
        self: &Arc<Self>,
        method: impl Fn(Channel) -> F,
    ) -> Result<T, Status>
    where
        F: Future<Output = Result<T, Status>>,
    {
        self.addresses_known().await?;
        let mut failure = Status::unavailable("there is no address of a broker");
        for (key, channel) in self.in_turn() {
            match method(channel).await {
                Err(status) if error::is_local(&status) => {
                    debug!(address = %key.1, "the connection to a broker failed");
                    self.mark_failed(key);
                    self.resolve_if_due();
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

    /// Waits until there are addresses to call. If there are, but one has failed, the host names are resolved in
    /// the background: a resolver that does not answer must not delay calls that need no answer of it.
    async fn addresses_known(self: &Arc<Self>) -> Result<(), Status> {
        let Some(mut resolution) = self.resolve_if_due() else { return Ok(()) };
        match resolution.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(result)) => result.clone(),
            Ok(None) | Err(_) => Err(Status::unavailable("the host names could not be resolved")),
        }
    }

    /// Starts a task that resolves the host names, if they must be resolved and none does so already. No caller
    /// owns it, so it goes on when callers give up. Returns its outcome, if callers must wait for it.
    fn resolve_if_due(self: &Arc<Self>) -> Option<watch::Receiver<Option<Result<(), Status>>>> {
        let mut peers = self.peers();
        // A task has ended when its sender is gone.
        let running = peers.resolution.take().filter(|it| it.has_changed().is_ok());
        if running.is_none() && !peers.is_resolution_due(Instant::now()) {
            return None;
        }
        let resolution = running.unwrap_or_else(|| {
            let (sender, receiver) = watch::channel(None);
            let connections = Arc::clone(self);
            tokio::spawn(async move {
                let result = connections.resolve().await;
                sender.send_replace(Some(result));
            });
            receiver
        });
        peers.resolution = Some(resolution.clone());
        peers.all.is_empty().then_some(resolution)
    }

    /// Resolves the host names. Addresses that are still there keep their connections, and so do those of a host
    /// that cannot be resolved now, because they may still be right.
    async fn resolve(&self) -> Result<(), Status> {
        let mut keys = vec![];
        let mut failures = vec![];
        for (place, url) in self.urls.iter().enumerate() {
            match (self.resolve)(url.clone()).await {
                Ok(found) => keys.extend(found.into_iter().map(|address| (place, address))),
                Err(status) => failures.push((place, status)),
            }
        }
        let mut peers = self.peers();
        peers.resolved_at = Some(Instant::now());
        peers.is_stale = !failures.is_empty();
        let has_failed = |place| failures.iter().any(|(failed, _)| *failed == place);
        peers.all.retain(|peer| keys.contains(&peer.key) || has_failed(peer.key.0));
        self.add(&mut peers, &keys)?;
        match failures.pop() {
            Some((_, status)) if peers.all.is_empty() => Err(status),
            _ => Ok(()),
        }
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
        let is_over = |at| now >= at + RESOLVE_INTERVAL;
        self.all.is_empty() || self.is_stale && self.resolved_at.is_none_or(is_over)
    }
}

impl fmt::Debug for Connections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let urls: Vec<_> = self.urls.iter().map(Url::as_str).collect();
        f.debug_struct("Connections").field("urls", &urls).finish_non_exhaustive()
    }
}

/// Returns the addresses that the URL stands for, in the resolver's order.
async fn addresses(url: Url) -> Addresses {
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::time::{sleep, timeout};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Host names that are resolved after a delay, each to two addresses with the ports 1 and 2.
    #[derive(Default)]
    struct Names {
        delay: Mutex<Duration>,
        is_away: Mutex<bool>,
        resolutions: AtomicUsize,
    }

    impl Names {
        fn set_delay(&self, delay: Duration) {
            *self.delay.lock().unwrap() = delay;
        }

        fn connections(self: &Arc<Self>) -> Arc<Connections> {
            let urls = ["http://broker:1".parse().unwrap()].into();
            let connect: Connect = Arc::new(Endpoint::connect_lazy);
            let mut connections = Connections::new(urls, None, connect).unwrap();
            let names = Arc::clone(self);
            connections.resolve = Arc::new(move |_| {
                let names = Arc::clone(&names);
                Box::pin(async move {
                    names.resolutions.fetch_add(1, Ordering::Relaxed);
                    let delay = *names.delay.lock().unwrap();
                    sleep(delay).await;
                    if *names.is_away.lock().unwrap() {
                        return Err(Status::unavailable("cannot resolve broker"));
                    }
                    Ok([1, 2].map(|port| ([127, 0, 0, 1], port).into()).to_vec())
                })
            });
            Arc::new(connections)
        }

        fn resolutions(&self) -> usize {
            self.resolutions.load(Ordering::Relaxed)
        }
    }

    /// Makes a call whose first `failing` attempts find no connection. Returns the attempts.
    async fn call(connections: &Arc<Connections>, failing: usize) -> Result<usize, Status> {
        let attempts = AtomicUsize::new(0);
        connections
            .call(|_| {
                let attempt = attempts.fetch_add(1, Ordering::Relaxed) + 1;
                async move {
                    if attempt > failing {
                        Ok(attempt)
                    } else {
                        Err(Status::from_error("nobody listens".into()))
                    }
                }
            })
            .await
    }

    #[tokio::test(start_paused = true)]
    async fn a_resolver_that_does_not_answer_delays_no_call_while_an_address_is_known() {
        let names = Arc::new(Names::default());
        let connections = names.connections();
        assert_eq!(call(&connections, 0).await.unwrap(), 1);
        names.set_delay(3600 * SECOND);
        for _ in 0..5 {
            sleep(2 * SECOND).await;
            let start = Instant::now();
            assert_eq!(call(&connections, 1).await.unwrap(), 2);
            assert_eq!(start.elapsed(), Duration::ZERO);
        }
        sleep(SECOND).await;
        assert_eq!(names.resolutions(), 2, "one resolution at a time");
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_that_gives_up_leaves_the_resolution_to_those_that_come_later() {
        let names = Arc::new(Names::default());
        names.set_delay(2 * SECOND);
        let connections = names.connections();
        let start = Instant::now();
        assert!(timeout(SECOND, call(&connections, 0)).await.is_err());
        assert_eq!(call(&connections, 0).await.unwrap(), 1);
        assert_eq!((start.elapsed(), names.resolutions()), (2 * SECOND, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn addresses_that_failed_are_resolved_again_and_kept_if_that_fails() {
        let names = Arc::new(Names::default());
        let connections = names.connections();
        *names.is_away.lock().unwrap() = true;
        let error = call(&connections, 0).await.unwrap_err();
        assert_eq!(error.message(), "cannot resolve broker");
        *names.is_away.lock().unwrap() = false;
        assert_eq!(call(&connections, 0).await.unwrap(), 1);
        *names.is_away.lock().unwrap() = true;
        for resolutions in 3..6 {
            sleep(2 * SECOND).await;
            assert_eq!(call(&connections, 1).await.unwrap(), 2);
            sleep(Duration::from_millis(1)).await;
            assert_eq!(names.resolutions(), resolutions);
        }
    }
}
