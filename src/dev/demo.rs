//! The accounts, the logins and the caller that `dev` sets up.

use std::{
    fs,
    io::{ErrorKind, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use anyhow::Context;

use super::simulator::SimulatedAccount;
use crate::{
    crypto::{Keyring, bearer::Bearer},
    domain::{account::AccountName, caller::Right, secret::ClientSecret},
    files::text,
    store::{
        Database, StoreError,
        admin::{Admin, Attribution, NewAccount, NewBearer, NewCaller, NewGrant},
    },
};

/// A login at the simulated upstream, and the name of the account that uses it.
#[derive(Clone, Copy)]
pub(super) struct DemoLogin {
    pub(super) account: &'static str,
    pub(super) client_id: &'static str,
    pub(super) client_secret: &'static str,
}

const fn login(
    account: &'static str,
    client_id: &'static str,
    client_secret: &'static str,
) -> DemoLogin {
    DemoLogin { account, client_id, client_secret }
}

/// The logins whose accounts `dev` registers.
const REGISTERED_LOGINS: [DemoLogin; 2] = [
    login("demo-master", "demoMaster", "SK.demo-master"),
    login("demo-agency", "demoAgency", "SK.demo-agency"),
];

/// The logins whose accounts the user registers with the commands of the welcome text: `acme` with the
/// right secret, and `typo` first with a wrong one.
pub(super) const UNREGISTERED_LOGINS: [DemoLogin; 2] =
    [login("acme", "acmeId", "SK.acme"), login("typo", "typoId", "SK.right")];

/// The name of the caller that `dev` registers, with all rights on all accounts.
const CALLER: &str = "demo";

/// Returns all logins in the form that the simulated upstream takes.
pub(super) fn simulated_accounts() -> Vec<SimulatedAccount> {
    let logins = REGISTERED_LOGINS.into_iter().chain(UNREGISTERED_LOGINS);
    let account = |login: DemoLogin| SimulatedAccount {
        client_id: login.client_id.to_owned(),
        client_secret: login.client_secret.to_owned(),
        locked: false,
    };
    logins.map(account).collect()
}

/// Registers the demo's accounts and its caller, unless an earlier run did, and returns the
/// caller's bearer, which is kept in the file `demo.bearer` of `directory`. If that file is lost,
/// the caller gets another bearer.
pub(super) async fn register(
    database: &Database,
    keyring: &Keyring,
    directory: &Path,
) -> anyhow::Result<Bearer> {
    let attribution =
        Attribution { actor: Some("dev".into()), reason: Some("set up by dev".into()) };
    let admin = Admin::connect(database, attribution).await?;
    register_accounts(&admin, keyring).await?;
    register_caller(&admin, &directory.join("demo.bearer")).await
}

async fn register_accounts(admin: &Admin, keyring: &Keyring) -> anyhow::Result<()> {
    let registered = admin.accounts().await?;
    for DemoLogin { account: name, client_id, client_secret } in REGISTERED_LOGINS {
        if registered.iter().any(|account| account.name == name) {
            continue;
        }
        let client_id = client_id.parse()?;
        let secret = ClientSecret::new(client_secret)?;
        let account = NewAccount {
            name: &name.parse()?,
            client_id: &client_id,
            sealed_secret: &keyring.intake_public().seal(&client_id, &secret)?,
            description: "registered by dev",
        };
        admin.add_account(&account).await?;
    }
    Ok(())
}

async fn register_caller(admin: &Admin, bearer_file: &Path) -> anyhow::Result<Bearer> {
    let name: AccountName = CALLER.parse()?;
    let (bearer, is_new) = match text::read(bearer_file) {
        Ok(text) => (Bearer::parse(text.trim())?, false),
        Err(error) if error.kind() == ErrorKind::NotFound => (Bearer::generate(), true),
        Err(error) => return Err(error).context(format!("cannot read {}", bearer_file.display())),
    };
    match admin.caller(&name).await {
        Err(StoreError::NotFound(_)) => {
            let caller = NewCaller {
                name: &name,
                rate_limit: None,
                description: "registered by dev",
                bearer_sha256: Some(bearer.sha256()),
                identities: &[],
            };
            admin.add_caller(&caller).await?;
            let grant = NewGrant { patterns: &["*".parse()?], rights: &Right::ALL, ends_at: None };
            admin.grant(&name, &grant).await?;
        }
        Ok(_) if is_new => {
            let new_bearer =
                NewBearer { sha256: bearer.sha256(), ends_at: None, description: "created by dev" };
            admin.add_bearer(&name, new_bearer).await?;
        }
        caller => drop(caller?),
    }
    if is_new {
        // The file is written last, because `dev` would never replace a file whose bearer is not registered.
        let mut file =
            fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(bearer_file)?;
        file.write_all(bearer.expose().as_bytes())?;
    }
    Ok(bearer)
}
