//! A way to the database that a test can cut or let fall silent.

use std::{io, path::PathBuf};

use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream, UnixStream},
    sync::watch,
    task::JoinHandle,
};
use url::Url;

/// What becomes of connections.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Way {
    /// They go through.
    Open,
    /// Those that are there and new ones end at once.
    Cut,
    /// No byte passes, and nobody is told: those that are there stay silent for ever.
    Silent,
}

/// A TCP port on loopback behind which a database lies.
pub(crate) struct Proxy {
    way: watch::Sender<Way>,
    url: String,
    accepting: JoinHandle<()>,
}

impl Proxy {
    /// A way to the database at `url`, open at first.
    pub(crate) async fn to(url: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (target, url) = (Target::of(&Url::parse(url).unwrap()), by_port(url, port));
        let (way, ways) = watch::channel(Way::Open);
        let accepting = tokio::spawn(async move {
            loop {
                let Ok((client, _)) = listener.accept().await else { return };
                let (target, ways) = (target.clone(), ways.clone());
                tokio::spawn(async move { target.serve(client, ways).await });
            }
        });
        Self { way, url, accepting }
    }

    /// The database as `DATABASE_URL` takes it, by this way.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Ends all connections, and new ones as they come.
    pub(crate) fn cut(&self) {
        self.way.send_replace(Way::Cut);
    }

    /// Swallows every byte from now on, as a firewall does that forgot its connections.
    pub(crate) fn fall_silent(&self) {
        self.way.send_replace(Way::Silent);
    }

    /// Lets new connections through. Those that fell silent stay so.
    pub(crate) fn open(&self) {
        self.way.send_replace(Way::Open);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Where the server listens.
#[derive(Clone, Debug)]
enum Target {
    Socket(PathBuf),
    Tcp(String, u16),
}

impl Target {
    fn of(url: &Url) -> Self {
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

    /// Carries one connection for as long as the way is open.
    async fn serve(&self, client: TcpStream, mut ways: watch::Receiver<Way>) {
        // What was silent once has lost bytes: only its ends are kept.
        let silent = async |mut ways: watch::Receiver<Way>| {
            let _ = ways.wait_for(|way| *way == Way::Cut).await;
        };
        let way = *ways.borrow_and_update();
        match way {
            Way::Cut => {}
            Way::Silent => silent(ways).await,
            Way::Open => {
                let carried = async {
                    match self {
                        Self::Socket(path) => carry(client, UnixStream::connect(path)).await,
                        Self::Tcp(host, port) => {
                            carry(client, TcpStream::connect((host.as_str(), *port))).await
                        }
                    }
                };
                tokio::pin!(carried);
                tokio::select! {
                    _ = &mut carried => {}
                    _ = ways.changed() => {
                        let way = *ways.borrow();
                        if way == Way::Silent {
                            // Not polled any more, so nothing passes; not dropped, so nothing ends.
                            silent(ways).await;
                        }
                    }
                }
            }
        }
    }
}

/// `url` with its host and port those of this way.
fn by_port(url: &str, port: u16) -> String {
    let old = Url::parse(url).unwrap();
    // A URL without a host takes none later.
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

async fn carry<S: AsyncRead + AsyncWrite + Unpin>(
    mut client: TcpStream,
    server: impl Future<Output = io::Result<S>>,
) -> io::Result<()> {
    let mut server = server.await?;
    copy_bidirectional(&mut client, &mut server).await?;
    client.shutdown().await
}
