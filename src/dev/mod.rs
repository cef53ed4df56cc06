//! The embedded world of `dev` and `simulate`; nothing on the floors below knows it.

mod ground;
#[cfg(feature = "embedded-postgres")]
pub mod postgres;
pub mod simulator;

use std::{
    env, fs,
    io::{ErrorKind, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, bail};
use ground::Ground;
use simulator::{Faults, SimulatedAccount, Simulator};
use tokio::net::TcpListener;

use crate::{
    app::{App, AppConfig, StartError},
    config::DatabaseUrl,
    crypto::{Keyring, bearer::Bearer},
    domain::{account::AccountName, caller::Right, clock::Clock},
    lifecycle::{self, Signals},
    store::{
        Database, StoreError,
        admin::{Admin, Attribution, NewAccount, NewBearer, NewCaller, NewGrant},
        deployment,
    },
};

/// Where the operators' face listens, if nobody else does.
const OPS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9464);
const GRPC: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 50_051);
/// The accounts that are registered, with their logins at the simulated upstream.
const ACCOUNTS: [(&str, &str, &str); 2] = [
    ("demo-master", "demoMaster", "SK.demo-master"),
    ("demo-agency", "demoAgency", "SK.demo-agency"),
];
/// Logins that the simulated upstream knows and that nobody has registered yet; one to try with its
/// secret, and one with another.
const SPARE: [(&str, &str, &str); 2] =
    [("acme", "acmeId", "SK.acme"), ("typo", "typoId", "SK.right")];
/// The caller that may have every account.
const CALLER: &str = "demo";

/// How `dev` is to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where to keep database, keyring and journal; a temporary place when absent.
    pub state_dir: Option<PathBuf>,
    /// The life of the simulated upstream's tokens.
    pub token_life: Duration,
    /// Where gRPC listens; if it is not said, on 50051, or another port when that one is taken.
    pub listen: Option<SocketAddr>,
}

/// Runs the whole system until a signal. `print` gets the lines that say what to try.
///
/// # Errors
/// When a part cannot start; nothing is left behind then.
pub async fn run(
    options: Options,
    print: impl Fn(String) -> anyhow::Result<()>,
) -> anyhow::Result<ExitCode> {
    lifecycle::raise_descriptor_limit();
    let mut signals = Signals::take()?;
    let ground = tokio::select! {
        ground = Ground::find(options.state_dir.as_deref()) => ground?,
        () = signals.next() => return Ok(ExitCode::SUCCESS),
    };
    let ended = on_ground(&ground, &options, &mut signals, print).await;
    ground.leave().await;
    ended
}

async fn on_ground(
    ground: &Ground,
    options: &Options,
    signals: &mut Signals,
    print: impl Fn(String) -> anyhow::Result<()>,
) -> anyhow::Result<ExitCode> {
    let database = Database::new(&ground.url, "token-broker dev")?;
    // First whose database it is: another's is not touched.
    let upstream = simulate(&database, options.token_life).await?;
    database.migrate().await?;
    let keyring = Arc::new(keyring(&ground.home)?);
    let bearer = register(&database, &keyring, &ground.home).await?;
    let plan = plan(ground, &upstream, keyring)?;
    let grpc = match options.listen {
        Some(address) => bind(address).await?,
        None => bind_near(GRPC).await?,
    };
    let ops = bind_near(OPS).await?;
    let started =
        signals.during(async |give_up| Box::pin(App::start(plan, grpc, ops, &give_up)).await).await;
    let app = match started {
        Ok(app) => app,
        Err(StartError::Stopped) => return Ok(ExitCode::SUCCESS),
        Err(error @ StartError::WrongKeyring(_)) => {
            return Err(error).with_context(|| {
                format!(
                    "this database was used with a keyring other than {}'s",
                    ground.home.display()
                )
            });
        }
        Err(error) => return Err(error.into()),
    };
    let told = print(welcome(ground, &app, &upstream, &bearer, options));
    let ended = match told {
        Ok(()) => lifecycle::run(app, signals).await,
        Err(error) => {
            app.stop().await;
            upstream.shutdown().await;
            return Err(error);
        }
    };
    upstream.shutdown().await;
    Ok(ended)
}

fn keyring(home: &Path) -> anyhow::Result<Keyring> {
    let path = home.join("keyring");
    if !path.exists() {
        Keyring::create_file(&path, Clock::System.now())?;
    }
    Ok(Keyring::load(&path)?)
}

/// Starts the simulated upstream, on the port that a database of an earlier run belongs to.
async fn simulate(database: &Database, token_life: Duration) -> anyhow::Result<Simulator> {
    let pool = database.pool(1);
    let before = deployment::upstream(&pool).await?;
    pool.close().await;
    let port = before.as_deref().and_then(|url| url::Url::parse(url).ok()?.port());
    if let (Some(upstream), None) = (&before, port) {
        bail!("this database belongs to the upstream {upstream}, not to dev's simulated one");
    }
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port.unwrap_or(0)));
    let listener = TcpListener::bind(address).await.with_context(|| {
        format!(
            "the simulated upstream cannot listen on {address}: does another dev use this database?"
        )
    })?;
    let account = |(_, client_id, client_secret): (&str, &str, &str)| SimulatedAccount {
        client_id: client_id.to_owned(),
        client_secret: client_secret.to_owned(),
        locked: false,
    };
    let options = simulator::Options {
        accounts: ACCOUNTS.into_iter().chain(SPARE).map(account).collect(),
        faults: Faults { token_life, ..Faults::default() },
        clock: Clock::System,
    };
    Ok(Simulator::start(listener, options)?)
}

/// Registers the accounts and the caller that are not there yet; the caller's bearer.
async fn register(database: &Database, keyring: &Keyring, home: &Path) -> anyhow::Result<Bearer> {
    let attribution =
        Attribution { actor: Some("dev".into()), reason: Some("the demo's own".into()) };
    let admin = Admin::connect(database, attribution).await?;
    let there = admin.accounts().await?;
    for (name, client_id, secret) in ACCOUNTS {
        if there.iter().any(|account| account.name == name) {
            continue;
        }
        let client_id = client_id.parse()?;
        let secret = crate::domain::secret::ClientSecret::new(secret)?;
        let sealed = keyring.intake_public().seal(&client_id, &secret)?;
        let account = NewAccount {
            name: &name.parse()?,
            client_id: &client_id,
            sealed_secret: &sealed,
            description: "registered by dev",
        };
        admin.add_account(&account).await?;
    }
    let bearer_file = home.join("demo.bearer");
    let caller: AccountName = CALLER.parse()?;
    let (bearer, new_bearer) = match fs::read_to_string(&bearer_file) {
        Ok(text) => (Bearer::parse(text.trim())?, false),
        Err(error) if error.kind() == ErrorKind::NotFound => (Bearer::generate(), true),
        Err(error) => return Err(error).context(format!("cannot read {}", bearer_file.display())),
    };
    let new_caller = NewCaller {
        name: &caller,
        rate_limit: None,
        description: "made by dev",
        bearer_sha256: Some(bearer.sha256()),
        identities: &[],
    };
    match admin.caller(&caller).await {
        Err(StoreError::NotFound(_)) => {
            admin.add_caller(&new_caller).await?;
            let grant = NewGrant { patterns: &["*".parse()?], rights: &Right::ALL, ends_at: None };
            admin.grant(&caller, &grant).await?;
        }
        Ok(_) if new_bearer => {
            let new =
                NewBearer { sha256: bearer.sha256(), ends_at: None, description: "made by dev" };
            admin.add_bearer(&caller, new).await?;
        }
        known => drop(known?),
    }
    if new_bearer {
        let mut file =
            fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&bearer_file)?;
        file.write_all(bearer.expose().as_bytes())?;
    }
    Ok(bearer)
}

fn plan(ground: &Ground, upstream: &Simulator, keyring: Arc<Keyring>) -> anyhow::Result<AppConfig> {
    let database = DatabaseUrl::new(&ground.url).map_err(anyhow::Error::msg)?;
    Ok(AppConfig::local(database, upstream.base_url().parse()?, ground.home.clone(), keyring))
}

/// Listens on `address`.
async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    if !address.ip().is_loopback() {
        bail!("dev listens on loopback only, not on {address}");
    }
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
}

/// Listens on `address`, or on another port of it when that one is taken: two `dev`s may run.
async fn bind_near(address: SocketAddr) -> anyhow::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Err(error) if error.kind() == ErrorKind::AddrInUse => bind((address.ip(), 0).into()).await,
        bound => bound.with_context(|| format!("cannot listen on {address}")),
    }
}

/// This program as a shell takes it, from wherever it is run.
fn program() -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    match env::current_exe() {
        Ok(path) => match path.to_str() {
            Some(path) if path.chars().all(plain) => path.to_owned(),
            _ => format!("'{}'", path.display().to_string().replace('\'', r"'\''")),
        },
        Err(_) => "token-broker".into(),
    }
}

fn welcome(
    ground: &Ground,
    app: &App,
    upstream: &Simulator,
    bearer: &Bearer,
    options: &Options,
) -> String {
    let Ground { shown, psql, kept, .. } = ground;
    let (grpc, ops) = (app.grpc_address, app.ops_address);
    let base_url = upstream.base_url();
    let life = humantime::format_duration(options.token_life);
    let bearer = bearer.expose();
    let [(acme, acme_id, acme_secret), (typo, typo_id, typo_secret)] = SPARE;
    let program = program();
    let end = if *kept {
        format!("Ctrl-C ends it; {} keeps what it knows.", ground.home.display())
    } else {
        "Ctrl-C ends it and leaves nothing behind.".to_owned()
    };
    format!(
        r#"
Token Broker runs, all of it on this machine:

  gRPC       {grpc} (plaintext)
  operators  http://{ops}/readyz and http://{ops}/metrics
  upstream   {base_url} (simulated; a token lives {life})
  database   {shown}

Get a token, with grpcurl or without:

  grpcurl -plaintext -H 'authorization: Bearer {bearer}' -d '{{"account": "demo-master"}}' {grpc} token_broker.v1.TokenService/GetToken

  TOKEN_BROKER_ENDPOINT=http://{grpc} TOKEN_BROKER_BEARER={bearer} {program} token get demo-master

Register an account by plain SQL and ask for its token the same way; then one with a wrong secret, which
the last of these puts right. (The simulated upstream knows these two logins and those of demo-….)

  psql {psql} -c "insert into accounts (name, client_id, client_secret) values ('{acme}', '{acme_id}', '{acme_secret}')"

  psql {psql} -c "insert into accounts (name, client_id, client_secret) values ('{typo}', '{typo_id}', 'SK.wrong')"

  psql {psql} -c "update accounts set client_secret = '{typo_secret}' where name = '{typo}'"

See where the accounts stand, and who did what:

  psql {psql} -c 'select name, state, time_left, last_error, hint from account_status'

  psql {psql} -c 'select at, event, caller, account, outcome, reason from audit_events order by at desc limit 20'

{end}
"#
    )
}
