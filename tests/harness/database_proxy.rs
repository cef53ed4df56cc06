//! A TCP proxy before the database, with which a test interrupts the connections.

use std::{io, path::PathBuf, sync::Arc};

use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream, UnixStream},
    sync::watch,
    task::JoinHandle,
};
use url::Url;

/// What the proxy does with connections.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum ProxyMode {
    /// It forwards them to the database.
    Forward,
    /// It closes all of them, and new ones as soon as they are accepted.
    Disconnect,
    /// It keeps them open but forwards no bytes, also when the mode changes to `Forward` later.
    Blackhole,
}

/// A proxy on a TCP port of 127.0.0.1. Dropping it stops the acceptance of connections.
pub(crate) struct DatabaseProxy {
    mode: watch::Sender<ProxyMode>,
    /// New connections are forwarded to these by turns.
    targets: Arc<Mutex<Vec<DatabaseAddress>>>,
    url: String,
    accepting: JoinHandle<()>,
}

impl DatabaseProxy {
    /// Starts a proxy for the database at `url`, which forwards at first.
    pub(crate) async fn start(url: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (target, url) = (DatabaseAddress::of(url), replace_address(url, port));
        let targets = Arc::new(Mutex::new(vec![target]));
        let addresses = targets.clone();
        let (mode, modes) = watch::channel(ProxyMode::Forward);
        let accepting = tokio::spawn(async move {
            loop {
                let Ok((client, _)) = listener.accept().await else { return };
                addresses.lock().rotate_left(1);
                let (target, modes) = (addresses.lock()[0].clone(), modes.clone());
                tokio::spawn(async move { target.serve(client, modes).await });
            }
        });
        Self { mode, targets, url, accepting }
    }

    /// Returns the URL of the database with the address of the proxy.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Forwards new connections to the server of another URL, as an address does after a failover. Open
    /// connections stay where they are.
    pub(crate) fn lead_to(&self, url: &str) {
        self.lead_by_turns_to(&[url]);
    }

    /// Forwards new connections to the servers of several URLs by turns.
    pub(crate) fn lead_by_turns_to(&self, urls: &[&str]) {
        *self.targets.lock() = urls.iter().map(|url| DatabaseAddress::of(url)).collect();
    }

    /// Closes all connections, and goes on forwarding new ones.
    pub(crate) fn cut(&self) {
        self.disconnect();
        self.forward();
    }

    /// Closes all connections, and new ones as soon as they are accepted.
    pub(crate) fn disconnect(&self) {
        self.mode.send_replace(ProxyMode::Disconnect);
    }

    /// Forwards no more bytes but keeps the connections open, like a firewall that has lost its
    /// connection table.
    pub(crate) fn blackhole(&self) {
        self.mode.send_replace(ProxyMode::Blackhole);
    }

    /// Forwards new connections. Those that a blackhole kept open stay without traffic.
    pub(crate) fn forward(&self) {
        self.mode.send_replace(ProxyMode::Forward);
    }
}

impl Drop for DatabaseProxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// The address on which the database server listens.
#[derive(Clone, Debug)]
enum DatabaseAddress {
    Socket(PathBuf),
    Tcp(String, u16),
}

impl DatabaseAddress {
    fn of(url: &str) -> Self {
        Self::parse(&Url::parse(url).unwrap())
    }

    fn parse(url: &Url) -> Self {
        let parameter = |name| {
            url.query_pairs().find(|(key, _)| key == name).map(|(_, value)| value.into_owned())
        };
        let port = parameter("port").map(|port| port.parse().unwrap()).or(url.port());
        let port = port.unwrap_or(5432);
        let host = parameter("host").or(url.host_str().map(str::to_owned)).unwrap();
        if host.starts_with('/') {
            Self::Socket(PathBuf::from(host).join(format!(".s.PGSQL.{port}")))
        } else {
            Self::Tcp(host, port)
        }
    }

    /// Handles one connection until it ends or the mode closes it.
    async fn serve(&self, client: TcpStream, mut modes: watch::Receiver<ProxyMode>) {
        // A connection that was in blackhole mode cannot continue, because bytes may be missing. It
        // stays open until the proxy disconnects.
        let keep_open = async |mut modes: watch::Receiver<ProxyMode>| {
            let _ = modes.wait_for(|mode| *mode == ProxyMode::Disconnect).await;
        };
        let mode = *modes.borrow_and_update();
        match mode {
            ProxyMode::Disconnect => {}
            ProxyMode::Blackhole => keep_open(modes).await,
            ProxyMode::Forward => {
                let forwarding = async {
                    match self {
                        Self::Socket(path) => forward(client, UnixStream::connect(path)).await,
                        Self::Tcp(host, port) => {
                            forward(client, TcpStream::connect((host.as_str(), *port))).await
                        }
                    }
                };
                tokio::pin!(forwarding);
                tokio::select! {
                    _ = &mut forwarding => {}
                    _ = modes.changed() => {
                        let mode = *modes.borrow();
                        if mode == ProxyMode::Blackhole {
                            // `forwarding` is not polled, so no bytes pass, and not dropped, so the
                            // sockets stay open.
                            keep_open(modes).await;
                        }
                    }
                }
            }
        }
    }
}

/// Returns `url` with the host 127.0.0.1 and this port.
fn replace_address(url: &str, port: u16) -> String {
    let old = Url::parse(url).unwrap();
    // The URL is built anew because none can be added to a URL without a host.
    let mut new = Url::parse(&format!("postgresql://127.0.0.1:{port}{}", old.path())).unwrap();
    for (key, value) in old.query_pairs() {
        match &*key {
            "host" | "port" => {}
            "user" => new.set_username(&value).unwrap(),
            _ => {
                new.query_pairs_mut().append_pair(&key, &value);
            }
        }
    }
    if !old.username().is_empty() {
        new.set_username(old.username()).unwrap();
        new.set_password(old.password()).unwrap();
    }
    new.into()
}

async fn forward<S: AsyncRead + AsyncWrite + Unpin>(
    mut client: TcpStream,
    server: impl Future<Output = io::Result<S>>,
) -> io::Result<()> {
    let mut server = server.await?;
    copy_bidirectional(&mut client, &mut server).await?;
    client.shutdown().await
}
