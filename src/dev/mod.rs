//! The commands `dev` and `simulate`: a broker on this machine with its own database and a simulated
//! upstream. Only [`cli`](crate::cli), the tests and the benchmarks use this module.
//!
//! | file | contents |
//! |---|---|
//! | `mod.rs` | [`run`]: starts the parts of `dev` in order, and stops them |
//! | `local_environment.rs` | the database and the directory of a run |
//! | `demo.rs` | the accounts and the caller that `dev` registers |
//! | `welcome.rs` | the text that it prints |
//! | [`simulator`] | the simulated upstream |
//! | [`postgres`] | the embedded `PostgreSQL` server |

mod demo;
mod local_environment;
#[cfg(feature = "embedded-postgres")]
pub mod postgres;
pub mod simulator;
mod welcome;

use std::{
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context, bail};
use local_environment::LocalEnvironment;
use simulator::{Faults, Simulator, SimulatorOptions};
use tokio::{net::TcpListener, sync::oneshot};
use tokio_util::sync::CancellationToken;

use crate::{
    app::{App, AppConfig, StartError},
    config::DatabaseUrl,
    crypto::Keyring,
    domain::clock::Clock,
    files::given_path::shown,
    lifecycle::{self, OnHangup, Signals},
    store::{Database, deployment},
};

/// The address of the HTTP endpoints for operators, unless its port is taken.
const OPS_ADDRESS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9464);
/// The address of the gRPC API, unless `--listen` names another one or its port is taken.
const GRPC_ADDRESS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 50_051);

/// The options of the command `dev`.
#[derive(Clone, Debug)]
pub struct DevOptions {
    /// The directory for the database, the keyring and the journal. When it is absent and
    /// `DATABASE_URL` is not set, they are kept in a temporary directory.
    pub state_dir: Option<PathBuf>,
    /// The lifetime of the simulated upstream's tokens.
    pub token_life: Duration,
    /// The address of the gRPC API, which must be a loopback address. When it is absent, the address
    /// is 127.0.0.1:50051, with another port if that one is taken.
    pub listen: Option<SocketAddr>,
}

/// Runs the broker, its database and the simulated upstream until a signal. `print` gets the text
/// with the commands to try.
///
/// # Errors
/// When a part cannot start, or when `print` fails. The parts that have started are stopped then.
pub async fn run(
    options: DevOptions,
    print: impl Fn(String) -> anyhow::Result<()> + Send + 'static,
) -> anyhow::Result<ExitCode> {
    lifecycle::raise_descriptor_limit();
    let mut signals = Signals::take(OnHangup::Stop)?;
    let environment = tokio::select! {
        environment = LocalEnvironment::open(options.state_dir.as_deref()) => environment?,
        () = signals.next() => return Ok(ExitCode::SUCCESS),
    };
    let result = run_in(&environment, &options, &mut signals, print).await;
    environment.close().await;
    result
}

async fn run_in(
    environment: &LocalEnvironment,
    options: &DevOptions,
    signals: &mut Signals,
    print: impl Fn(String) -> anyhow::Result<()> + Send + 'static,
) -> anyhow::Result<ExitCode> {
    let directory = &environment.directory;
    let database = Database::new(&environment.database_url, "token-broker dev")?;
    // This comes before the first write, because it refuses a database of another upstream.
    let upstream = start_upstream(&database, options.token_life).await?;
    database.migrate().await?;
    let keyring = Arc::new(load_or_create_keyring(directory)?);
    let bearer = demo::register(&database, &keyring, directory).await?;
    let grpc = match options.listen {
        Some(address) => bind(address).await?,
        None => bind_preferring(GRPC_ADDRESS).await?,
    };
    let ops = bind_preferring(OPS_ADDRESS).await?;
    let database_url = DatabaseUrl::new(&environment.database_url).map_err(anyhow::Error::msg)?;
    let target = upstream.base_url().parse()?;
    // This publishes the intake key.
    let config = AppConfig {
        migrate: true,
        keyring_file: Some(directory.join("keyring")),
        ..AppConfig::local(database_url, target, directory.clone(), keyring)
    };
    let start = signals
        .during(async |give_up| Box::pin(App::start(config, grpc, ops, &give_up)).await)
        .await;
    let app = match start {
        Ok(app) => app,
        Err(StartError::Stopped) => return Ok(ExitCode::SUCCESS),
        Err(error @ StartError::WrongKeyring(_)) => {
            return Err(error).with_context(|| {
                format!("this database was used with a keyring other than {}'s", shown(directory))
            });
        }
        Err(error) => return Err(error.into()),
    };
    let text = welcome::welcome(environment, &app, &upstream, &bearer, options.token_life);
    let printed = signals.during(async |give_up| print_on_thread(text, print, give_up).await).await;
    let result = match printed {
        Ok(()) => Ok(lifecycle::run(app, signals, None).await),
        Err(error) => {
            app.stop().await;
            Err(error)
        }
    };
    upstream.shutdown().await;
    result
}

/// Prints `text`, and returns when that is done or `give_up` is cancelled. It is printed on a thread of its
/// own, so that a signal is heeded even if nobody reads standard output.
async fn print_on_thread(
    text: String,
    print: impl Fn(String) -> anyhow::Result<()> + Send + 'static,
    give_up: CancellationToken,
) -> anyhow::Result<()> {
    let (done, printed) = oneshot::channel();
    // If the receiver is gone, nobody waits for the result.
    thread::Builder::new().spawn(move || done.send(print(text)))?;
    tokio::select! {
        printed = printed => printed?,
        () = give_up.cancelled() => Ok(()),
    }
}

fn load_or_create_keyring(directory: &Path) -> anyhow::Result<Keyring> {
    let path = directory.join("keyring");
    if !path.exists() {
        Keyring::create_file(&path, Clock::System.wall())?;
    }
    Ok(Keyring::load(&path)?)
}

/// Starts the simulated upstream. A database belongs to the upstream with which it was first used,
/// so the simulator listens on the same port as in an earlier run with this database.
///
/// # Errors
/// When the database belongs to a real upstream, or when the port is taken.
async fn start_upstream(database: &Database, token_life: Duration) -> anyhow::Result<Simulator> {
    let pool = database.pool(1);
    let bound_upstream = deployment::upstream(&pool).await?;
    pool.close().await;
    // The URLs of the real upstreams have no explicit port.
    let port = bound_upstream.as_deref().and_then(|url| url::Url::parse(url).ok()?.port());
    if let (Some(upstream), None) = (&bound_upstream, port) {
        bail!("this database belongs to the upstream {upstream}, not to dev's simulated one");
    }
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port.unwrap_or(0)));
    let listener = TcpListener::bind(address).await.with_context(|| {
        format!(
            "the simulated upstream cannot listen on {address}: does another dev use this database?"
        )
    })?;
    let options = SimulatorOptions {
        accounts: demo::simulated_accounts(),
        faults: Faults { token_life, ..Faults::default() },
        clock: Clock::System,
    };
    Ok(Simulator::start(listener, options)?)
}

/// Listens on `address`, which must be a loopback address because the API is served without TLS.
async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    if !address.ip().is_loopback() {
        bail!("dev listens on loopback only, not on {address}");
    }
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
}

/// Listens on `address`, or on a free port if that one is taken, so that several `dev` can run.
async fn bind_preferring(address: SocketAddr) -> anyhow::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Err(error) if error.kind() == ErrorKind::AddrInUse => bind((address.ip(), 0).into()).await,
        result => result.with_context(|| format!("cannot listen on {address}")),
    }
}
