//! The callers of a scenario: one for each driver, with files for its credential, and one for the runner itself.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context;
use sqlx::PgPool;
use token_broker::{
    api::proto::{ListAccountsRequest, token_service_client::TokenServiceClient},
    crypto::bearer::Bearer,
    tls::TlsFiles,
};
use tonic::{Request, Status, transport::Channel};

use super::{
    driver::Keys,
    harness::certificates::{BROKER_DNS_NAME, PemIdentity, TestCa, connect_tls, write_tls_files},
    scenario::Tls,
    world::replace_file,
};

/// The name of the runner's own caller.
pub(crate) const RUNNER: &str = "runner";

/// What the broker's certificate is for.
const BROKER_NAMES: [&str; 3] = [BROKER_DNS_NAME, "localhost", "127.0.0.1"];

/// All callers.
pub(crate) struct Callers {
    tls: Tls,
    directory: PathBuf,
    runner: Bearer,
    drivers: Vec<Caller>,
    /// The CAs that drivers trust. The broker's certificate is of the first.
    broker_cas: Vec<TestCa>,
    broker: PemIdentity,
    /// The CAs of certificates, the newest last.
    cas: Vec<TestCa>,
    broker_tls: Option<TlsFiles>,
    /// How many of each driver's credentials were revoked, the oldest.
    revoked: usize,
}

/// The caller of a driver.
struct Caller {
    name: String,
    /// Its credentials, the newest last.
    credentials: Vec<Credential>,
}

enum Credential {
    Bearer(Bearer),
    /// A certificate, and the DNS name in it.
    Certificate(PemIdentity, String),
}

impl Callers {
    /// Makes callers with one credential each, and their files.
    pub(crate) fn new(directory: &Path, tls: Tls, languages: &[&str]) -> anyhow::Result<Self> {
        let broker_ca = TestCa::new("broker");
        let mut callers = Self {
            tls,
            directory: directory.to_owned(),
            runner: Bearer::generate(),
            drivers: vec![],
            broker: broker_ca.issue(&BROKER_NAMES),
            broker_cas: vec![broker_ca],
            cas: vec![TestCa::new("callers 1")],
            broker_tls: None,
            revoked: 0,
        };
        for name in languages {
            let name = (*name).to_owned();
            let credentials = vec![callers.new_credential(&name, 1)];
            fs::create_dir(callers.directory.join(&name))?;
            callers.drivers.push(Caller { name, credentials });
        }
        callers.write_broker_cas()?;
        replace_file(&callers.file("wrong-ca.pem"), &TestCa::new("another").pem())?;
        callers.write_broker_files();
        callers.write_files()?;
        Ok(callers)
    }

    pub(crate) fn broker_tls(&self) -> Option<&TlsFiles> {
        self.broker_tls.as_ref()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn new_credential(&self, caller: &str, number: usize) -> Credential {
        if self.tls != Tls::Mutual {
            return Credential::Bearer(Bearer::generate());
        }
        let name = format!("{caller}-{number}.test");
        let ca = &self.cas[self.cas.len() - 1];
        Credential::Certificate(ca.issue(&[&name]), name)
    }

    /// Writes the files of the broker, which reads them again when they have changed.
    fn write_broker_files(&mut self) {
        if self.tls != Tls::None {
            let cas: Vec<_> = self.cas.iter().filter(|_| self.tls == Tls::Mutual).collect();
            self.broker_tls = Some(write_tls_files(&self.directory, &self.broker, &cas));
        }
    }

    /// Writes the file of the CAs that drivers trust.
    fn write_broker_cas(&self) -> anyhow::Result<()> {
        replace_file(
            &self.file("ca.pem"),
            &self.broker_cas.iter().map(TestCa::pem).collect::<String>(),
        )
    }

    /// Lets drivers trust another CA too.
    pub(crate) fn add_ca(&mut self) -> anyhow::Result<()> {
        self.broker_cas.push(TestCa::new("broker, added"));
        self.write_broker_cas()
    }

    /// Gives the brokers a certificate of the added CA, which is the only one that drivers trust then.
    pub(crate) fn use_added_ca(&mut self) -> anyhow::Result<()> {
        let added = self.broker_cas.pop().context("no CA was added")?;
        self.broker = added.issue(&BROKER_NAMES);
        self.broker_cas = vec![added];
        self.write_broker_files();
        self.write_broker_cas()
    }

    /// Writes the newest credentials into the files of the drivers.
    pub(crate) fn write_files(&self) -> anyhow::Result<()> {
        for caller in &self.drivers {
            let file = |name: &str| self.directory.join(&caller.name).join(name);
            match caller.newest()? {
                Credential::Bearer(bearer) => {
                    replace_file(&file("bearer"), &format!("{}\n", bearer.expose()))?;
                }
                Credential::Certificate(PemIdentity { cert, key }, _) => {
                    replace_file(&file("cert.pem"), cert)?;
                    replace_file(&file("key.pem"), key)?;
                }
            }
        }
        Ok(())
    }

    /// Returns the keys of an `open` of this caller that name its files.
    pub(crate) fn files_of(&self, caller: &str, wrong_ca: bool) -> Keys {
        let path = |name: &str| self.file(name).to_string_lossy().into_owned().into();
        let own = |name: &str| path(&format!("{caller}/{name}"));
        let mut keys = Keys::new();
        if self.tls == Tls::Mutual {
            keys.insert("client_cert".to_owned(), own("cert.pem"));
            keys.insert("client_key".to_owned(), own("key.pem"));
        } else {
            keys.insert("bearer_file".to_owned(), own("bearer"));
        }
        if self.tls != Tls::None {
            let ca = if wrong_ca { "wrong-ca.pem" } else { "ca.pem" };
            keys.insert("ca_file".to_owned(), path(ca));
        }
        keys
    }

    /// Returns all bearers that there have been.
    pub(crate) fn bearers(&self) -> impl Iterator<Item = &str> {
        let credentials = self.drivers.iter().flat_map(|caller| &caller.credentials);
        credentials.filter_map(|credential| match credential {
            Credential::Bearer(bearer) => Some(bearer.expose()),
            Credential::Certificate(..) => None,
        })
    }

    /// Inserts the callers into the database.
    pub(crate) async fn register(&self, pool: &PgPool, grants: &[String]) -> anyhow::Result<()> {
        insert_caller(pool, RUNNER).await?;
        insert_bearer(pool, RUNNER, &self.runner).await?;
        insert_grant(pool, RUNNER, "*").await?;
        for caller in &self.drivers {
            insert_caller(pool, &caller.name).await?;
            caller.insert_newest(pool).await?;
            for pattern in grants {
                insert_grant(pool, &caller.name, pattern).await?;
            }
        }
        Ok(())
    }

    /// Adds a credential to each driver's caller. The brokers trust both the old and the new CA then.
    pub(crate) async fn add_credentials(&mut self, pool: &PgPool) -> anyhow::Result<()> {
        let number = self.drivers.first().map_or(0, |caller| caller.credentials.len()) + 1;
        self.cas.push(TestCa::new(&format!("callers {number}")));
        self.write_broker_files();
        for n in 0..self.drivers.len() {
            let credential = self.new_credential(&self.drivers[n].name, number);
            self.drivers[n].credentials.push(credential);
            self.drivers[n].insert_newest(pool).await?;
        }
        Ok(())
    }

    /// Revokes all credentials of the drivers, or all but the newest, whose CAs the brokers distrust then.
    pub(crate) async fn revoke(&mut self, pool: &PgPool, also_newest: bool) -> anyhow::Result<()> {
        sqlx::query(
            "update caller_credentials c set revoked_at = now()
             from callers where callers.id = c.caller_id and callers.name <> $1 and ($2 or c.id <
                 (select max(newer.id) from caller_credentials newer where newer.caller_id = c.caller_id))",
        )
        .bind(RUNNER)
        .bind(also_newest)
        .execute(pool)
        .await?;
        let all = self.drivers.first().map_or(0, |caller| caller.credentials.len());
        self.revoked = if also_newest { all } else { all - 1 };
        if !also_newest {
            self.cas.drain(..self.cas.len() - 1);
            self.write_broker_files();
        }
        Ok(())
    }

    /// Returns how many accounts the broker on this port knows, up to a thousand.
    pub(crate) async fn count_accounts(&self, port: u16) -> anyhow::Result<usize> {
        let channel = self.connect(port, None).await?;
        Ok(list_accounts(channel, Some(&self.runner)).await?)
    }

    /// Whether the broker on this port accepts the drivers' credentials, and refuses those that were revoked.
    pub(crate) async fn are_known(&self, port: u16) -> bool {
        for caller in &self.drivers {
            for (n, credential) in caller.credentials.iter().enumerate() {
                if self.is_accepted(port, credential).await != (n >= self.revoked) {
                    return false;
                }
            }
        }
        true
    }

    async fn is_accepted(&self, port: u16, credential: &Credential) -> bool {
        let (identity, bearer) = match credential {
            Credential::Bearer(bearer) => (None, Some(bearer)),
            Credential::Certificate(identity, _) => (Some(identity), None),
        };
        match self.connect(port, identity).await {
            Ok(channel) => list_accounts(channel, bearer).await.is_ok(),
            Err(_) => false,
        }
    }

    async fn connect(&self, port: u16, identity: Option<&PemIdentity>) -> anyhow::Result<Channel> {
        if self.tls != Tls::None {
            return Ok(connect_tls(port, &self.broker_cas[0], identity).await?);
        }
        Ok(Channel::from_shared(format!("http://127.0.0.1:{port}"))?.connect().await?)
    }
}

impl Caller {
    fn newest(&self) -> anyhow::Result<&Credential> {
        self.credentials.last().context("a caller without a credential")
    }

    async fn insert_newest(&self, pool: &PgPool) -> anyhow::Result<()> {
        match self.newest()? {
            Credential::Bearer(bearer) => insert_bearer(pool, &self.name, bearer).await,
            Credential::Certificate(_, identity) => {
                sqlx::query(
                    "insert into caller_credentials (caller_id, kind, identity)
                     select id, 'dns', $2 from callers where name = $1",
                )
                .bind(&self.name)
                .bind(identity)
                .execute(pool)
                .await?;
                Ok(())
            }
        }
    }
}

async fn insert_caller(pool: &PgPool, name: &str) -> anyhow::Result<()> {
    sqlx::query("insert into callers (name) values ($1)").bind(name).execute(pool).await?;
    Ok(())
}

async fn insert_grant(pool: &PgPool, caller: &str, pattern: &str) -> anyhow::Result<()> {
    sqlx::query(
        "insert into grants (caller_id, pattern) select id, $2 from callers where name = $1",
    )
    .bind(caller)
    .bind(pattern)
    .execute(pool)
    .await?;
    Ok(())
}

async fn insert_bearer(pool: &PgPool, caller: &str, bearer: &Bearer) -> anyhow::Result<()> {
    sqlx::query(
        "insert into caller_credentials (caller_id, kind, bearer_sha256)
         select id, 'bearer', $2 from callers where name = $1",
    )
    .bind(caller)
    .bind(bearer.sha256().as_slice())
    .execute(pool)
    .await?;
    Ok(())
}

/// Lists accounts, and returns how many there are, up to a thousand. It is the cheapest call that says whether a
/// credential is accepted.
async fn list_accounts(channel: Channel, bearer: Option<&Bearer>) -> Result<usize, Status> {
    let mut request = Request::new(ListAccountsRequest { page_size: 1_000, ..Default::default() });
    if let Some(bearer) = bearer {
        let value = format!("Bearer {}", bearer.expose()).parse();
        let value = value.map_err(|_| Status::internal("a bearer is no header"))?;
        request.metadata_mut().insert("authorization", value);
    }
    let listed = TokenServiceClient::new(channel).list_accounts(request).await?;
    Ok(listed.into_inner().accounts.len())
}
