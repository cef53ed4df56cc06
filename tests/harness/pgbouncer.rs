//! `PgBouncer`, a connection pooler, before a test's database.

use std::{
    env, fs,
    io::{self, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
};

use nix::unistd::{User, geteuid};
use tempfile::TempDir;
use tokio::{
    net::TcpStream,
    process::{Child, Command},
};
use url::Url;

use super::{
    eventually,
    process::{free_address, shared_directory},
};

/// A process of `PgBouncer` on 127.0.0.1. Dropping it kills the process.
pub(crate) struct PgBouncer {
    _process: Child,
    _directory: TempDir,
    address: SocketAddr,
}

impl PgBouncer {
    /// Starts a pooler before the database at `url`, with these lines in its settings. Returns `None` and says
    /// so if the program is not installed.
    pub(crate) async fn start(url: &str, settings: &str) -> Option<Self> {
        let Some(program) = installed() else {
            // Written to the file itself, so that it is seen although the test passes.
            io::stderr().write_all(b"SKIPPED: PgBouncer is not installed\n").unwrap();
            return None;
        };
        let directory = shared_directory();
        let address = free_address();
        let file = directory.path().join("pgbouncer.ini");
        fs::write(&file, ini(url, address, settings)).unwrap();
        let log = fs::File::create(directory.path().join("log")).unwrap();
        let process = Command::new(program)
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let bouncer = Self { _process: process, _directory: directory, address };
        eventually("PgBouncer", async || TcpStream::connect(address).await.ok()).await;
        Some(bouncer)
    }

    /// Returns the database's URL through the pooler.
    pub(crate) fn url(&self) -> String {
        format!("postgresql://broker@{}/pooled?sslmode=disable", self.address)
    }
}

fn installed() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let directories = env::split_paths(&path).chain([PathBuf::from("/usr/sbin")]);
    directories.map(|directory| directory.join("pgbouncer")).find(|program| program.exists())
}

/// Returns the settings. `PgBouncer` logs in to the database in the way of `url`, whoever logs in to it.
fn ini(url: &str, address: SocketAddr, settings: &str) -> String {
    let url = Url::parse(url).unwrap();
    let parameter =
        |name| url.query_pairs().find(|(key, _)| key == name).map(|(_, value)| value.into_owned());
    let host = parameter("host").or(url.host_str().map(str::to_owned)).unwrap();
    let port = parameter("port").or(url.port().map(|port| port.to_string()));
    let user = parameter("user").unwrap_or_else(|| url.username().to_owned());
    let password =
        url.password().map(|password| format!(" password={password}")).unwrap_or_default();
    let database = url.path().trim_start_matches('/');
    format!(
        "[databases]\npooled = host={host} port={} dbname={database} user={user}{password}\n\
         [pgbouncer]\nlisten_addr = {}\nlisten_port = {}\nunix_socket_dir =\nauth_type = any\n{}\n\
         {settings}\n",
        port.unwrap_or_else(|| "5432".into()),
        address.ip(),
        address.port(),
        run_as(Path::new(&host)),
    )
}

/// Returns the setting by which `PgBouncer`, which refuses to run as root, runs as the user who may enter the
/// directory of the database's socket.
fn run_as(socket: &Path) -> String {
    use std::os::unix::fs::MetadataExt;

    if !geteuid().is_root() {
        return String::new();
    }
    let owner = fs::metadata(socket).ok().filter(|_| socket.is_absolute()).map(|it| it.uid());
    let owner = owner.and_then(|uid| User::from_uid(uid.into()).unwrap());
    format!("user = {}", owner.map_or_else(|| "nobody".into(), |it| it.name))
}
