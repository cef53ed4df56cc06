//! The command `account`.

mod columns;
mod export;
mod history;
mod import;
mod intake_key;
mod known_keys;
mod show;
pub(super) mod wait;

use std::{path::PathBuf, process::ExitCode};

use anyhow::bail;
use clap::{Args, Subcommand};

pub(super) use self::intake_key::remember_successor;
use self::wait::WaitArgs;
use super::{
    bulk,
    global::{GlobalArgs, path_argument},
    output,
    privileges::{self, Needs},
    prompt, sql,
};
use crate::{
    config::{Flags, KnownKeyFlags},
    crypto::IntakePublicKey,
    domain::{
        account::{AccountName, ClientId, Description},
        caller::AccountPattern,
        refresh_state::AccountState,
    },
    store::admin::{Admin, NewAccount, Rotation, Selection},
};

/// Registers and changes accounts of the upstream
#[derive(Args, Debug)]
pub(super) struct AccountArgs {
    #[command(subcommand)]
    command: Command,
    /// The reason, for the audit log, which also gets the name of the user who runs this
    #[arg(long, global = true, value_name = "TEXT")]
    reason: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Registers an account; takes its API KEY from standard input
    #[command(after_help = "\
Examples:
  token-broker account add acme --client-id myMemberId --wait
  vault kv get -field=key acme | token-broker account add acme --client-id myMemberId")]
    Add {
        #[command(flatten)]
        account: NewArgs,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Prints an INSERT that registers an account, with its API KEY sealed for the broker
    #[command(after_help = "\
Example:
  token-broker account seal acme --client-id myMemberId > acme.sql")]
    Seal {
        #[command(flatten)]
        account: NewArgs,
    },
    /// Registers the accounts of a file, and with --update changes them
    #[command(after_help = IMPORT_HELP)]
    Import {
        #[command(flatten)]
        input: bulk::ImportArgs,
        #[command(flatten)]
        intake: Flags<KnownKeyFlags>,
        #[command(flatten)]
        wait: import::WaitArgs,
    },
    /// Writes all accounts into a file for `account import`, without their API KEYs
    #[command(after_help = "\
Example:
  token-broker account export --out accounts.csv --replace && git diff accounts.csv")]
    Export(bulk::ExportArgs),
    /// Lists all accounts
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Shows an account, with a hint if something must be done
    Show {
        /// The account's name
        name: AccountName,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Shows what happened to an account, and who used it, from the audit log
    #[command(after_help = "\
Needs the role token_broker_auditor. Exit code 1 if the log has no record of the account.
`audit tail --account NAME` prints each event.

Examples:
  token-broker account history acme
  token-broker account history acme --since 7d --json")]
    History(history::HistoryArgs),
    /// Replaces an account's API KEY; the old one is kept until the new one has issued
    #[command(after_help = "\
Examples:
  token-broker account rotate acme --wait
  token-broker account rotate acme --purge-old --reason 'leaked, TICKET-7'")]
    Rotate(RotateArgs),
    /// Requests new tokens now
    #[command(after_help = "\
Examples:
  token-broker account reissue acme --wait
  token-broker account reissue --state unreachable")]
    Reissue {
        /// The accounts: a name, or a pattern such as 'acme-*'
        #[arg(required_unless_present = "state")]
        pattern: Option<AccountPattern>,
        /// Only accounts in this state
        #[arg(long, value_parser = AccountState::ALL.map(AccountState::as_str))]
        state: Option<String>,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Enables an account
    Enable {
        /// The account's name
        name: AccountName,
    },
    /// Disables an account: its token is no longer served, at once
    Disable {
        /// The account's name
        name: AccountName,
    },
    /// Removes an account with its token
    Remove {
        /// The account's name
        name: AccountName,
        /// Do not ask for confirmation
        #[arg(long)]
        yes: bool,
    },
}

const IMPORT_HELP: &str = "\
The first line of CSV names the columns, in any order: name, client_id, client_secret, enabled,
description. JSON lines have the same names as keys. With --update, a column that the file lacks
and an empty client_secret leave accounts as they are, and so does the API KEY that they have.
--prune removes accounts that the file lacks, with their API KEYs.

Examples:
  token-broker account import accounts.csv --dry-run
  vault kv get -field=accounts rcs | token-broker account import - --format jsonl --update
  token-broker account import accounts.csv --skip-bad --report faults.csv";

#[derive(Args, Debug)]
struct NewArgs {
    /// The account's name: `[a-z0-9][a-z0-9._-]{0,62}`
    name: AccountName,
    /// The account's ID in the console, 1 to 20 characters
    #[arg(long, value_name = "ID")]
    client_id: ClientId,
    /// A description for people
    #[arg(long, default_value = "", value_name = "TEXT")]
    description: Description,
    #[command(flatten)]
    secret: SecretArgs,
}

#[derive(Args, Debug)]
struct RotateArgs {
    /// The account's name
    name: AccountName,
    /// The account's new ID, if the API KEY belongs to another one
    #[arg(long, value_name = "ID")]
    client_id: Option<ClientId>,
    /// Delete the old API KEY at once, because it leaked
    #[arg(long)]
    purge_old: bool,
    #[command(flatten)]
    secret: SecretArgs,
    #[command(flatten)]
    wait: WaitArgs,
}

#[derive(Args, Debug)]
struct SecretArgs {
    /// Read the API KEY from a file instead of standard input
    #[arg(long, value_name = "FILE", value_parser = path_argument())]
    secret_file: Option<PathBuf>,
    #[command(flatten)]
    intake: Flags<KnownKeyFlags>,
}

impl AccountArgs {
    /// Returns what the command has to be allowed to do in the database.
    pub(super) fn needs(&self) -> Needs {
        match self.command {
            Command::History(_) => privileges::AUDITOR,
            _ => privileges::ACCOUNTS,
        }
    }
}

pub(super) async fn run(global: &GlobalArgs, args: AccountArgs) -> anyhow::Result<ExitCode> {
    let open = || global.admin(args.reason.as_deref());
    match args.command {
        Command::Add { account, wait } => add(global, &open().await?, &account, &wait).await,
        Command::Seal { account } => {
            let trust = intake_key::Trust::new(global, &account.secret.intake)?;
            let key = match trust.configured() {
                Some(key) => key.clone(),
                None => trust.key_for(&open().await?).await?,
            };
            let sealed = seal(&key, &account.name, &account.client_id, &account.secret)?;
            let NewArgs { name, client_id, description, .. } = &account;
            output::block(sql::insert_account(name, client_id, &sealed, description.as_str()))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Import { input, intake, wait } => {
            import::run(global, args.reason.as_deref(), &input, &intake, &wait).await
        }
        Command::Export(output) => export::run(&open().await?, &output).await,
        Command::List { json } => {
            show::list(&open().await?.accounts().await?, json)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Show { name, json } => {
            show::one(&open().await?.account(&name).await?, json)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::History(args) => history::run(global, args).await,
        Command::Rotate(args) => rotate(global, &open().await?, args).await,
        Command::Reissue { pattern, state, wait } => {
            let admin = open().await?;
            let names = admin.reissue(&Selection { pattern, state }).await?;
            if names.is_empty() {
                bail!("no enabled account matches");
            }
            for name in &names {
                output::line(name)?;
            }
            wait.print_outcomes(&admin, &names).await
        }
        Command::Enable { name } => {
            open().await?.enable_account(&name, true).await?;
            output::note(format_args!("account {name} is enabled"));
            Ok(ExitCode::SUCCESS)
        }
        Command::Disable { name } => {
            open().await?.enable_account(&name, false).await?;
            output::note(format_args!("account {name} is disabled"));
            Ok(ExitCode::SUCCESS)
        }
        Command::Remove { name, yes } => {
            let admin = open().await?;
            admin.client_id(&name).await?;
            prompt::confirm_removal("account", name.as_str(), yes)?;
            admin.remove_account(&name).await?;
            output::note(format_args!("account {name} is removed"));
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn add(
    global: &GlobalArgs,
    admin: &Admin,
    account: &NewArgs,
    wait: &WaitArgs,
) -> anyhow::Result<ExitCode> {
    let NewArgs { name, client_id, description, secret } = account;
    let key = intake_key(global, admin, secret).await?;
    let sealed_secret = &seal(&key, name, client_id, secret)?;
    let description = description.as_str();
    admin.add_account(&NewAccount { name, client_id, sealed_secret, description }).await?;
    output::note(format_args!("account {name} is registered"));
    wait.print_outcomes(admin, &[name.to_string()]).await
}

async fn rotate(global: &GlobalArgs, admin: &Admin, args: RotateArgs) -> anyhow::Result<ExitCode> {
    let RotateArgs { name, client_id, purge_old, secret, wait } = args;
    let from = admin.client_id(&name).await?;
    let client_id = client_id.map_or_else(|| ClientId::stored(&from), Ok)?;
    let key = intake_key(global, admin, &secret).await?;
    let sealed = seal(&key, &name, &client_id, &secret)?;
    let rotation = Rotation {
        name: &name,
        client_id: &client_id,
        from_client_id: &from,
        sealed_secret: &sealed,
        purge_old,
    };
    let rotated = admin.rotate(&rotation).await?;
    if purge_old || client_id.as_str() != from {
        output::note(format_args!("account {name} has a new credential"));
    } else {
        output::note(format_args!(
            "the API KEY of account {name} is written; brokers try it unless the account has it already"
        ));
    }
    let code = wait.print_outcomes(admin, &[name.to_string()]).await?;
    // A broker compares an API KEY when it seals it, and then empties the column.
    if wait.is_requested()
        && admin.unsealed(&[name.to_string()]).await? == 0
        && rotated.unchanged_version == Some(admin.outcome(&name).await?.credential_version)
    {
        output::note("the account had this API KEY already: nothing was tried or issued");
    }
    Ok(code)
}

/// Returns the public key to seal to. Get the key before the prompt, so that nobody types a secret that cannot be
/// sealed.
async fn intake_key(
    global: &GlobalArgs,
    admin: &Admin,
    args: &SecretArgs,
) -> anyhow::Result<IntakePublicKey> {
    intake_key::Trust::new(global, &args.intake)?.key_for(admin).await
}

/// Reads the account's API KEY, with a prompt on a terminal, and seals it.
fn seal(
    key: &IntakePublicKey,
    name: &AccountName,
    client_id: &ClientId,
    args: &SecretArgs,
) -> anyhow::Result<String> {
    let secret = prompt::client_secret(args.secret_file.as_deref(), &format!("account {name}"))?;
    Ok(key.seal(client_id, &secret)?)
}
