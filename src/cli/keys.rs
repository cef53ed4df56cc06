//! The command `keys`.

mod brokers;
mod file;
mod publish;
mod reseal;
mod rotate;
mod status;

use std::{collections::BTreeMap, path::PathBuf, process::ExitCode};

use clap::{Args, Subcommand, builder::PossibleValuesParser, builder::TypedValueParser};

pub(super) use self::publish::publish_first;
use super::{
    global::{GlobalArgs, path_argument},
    output,
    privileges::{self, Needs},
};
use crate::{
    config::{Flags, IntakeKeyFlag, KeyringFlag, MigrateFlag},
    crypto::{KeyId, KeyKind, Keyring, VerifyingKeys},
    domain::clock::Clock,
};

/// Creates, shows and rotates the keys of the keyring
#[derive(Args, Debug)]
pub(super) struct KeysArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Writes a new keyring that only its owner can read; never overwrites a file
    #[command(after_help = "\
Example:
  token-broker keys generate --out /etc/token-broker/keyring")]
    Generate {
        /// The file to write
        #[arg(long, value_name = "FILE", value_parser = path_argument())]
        out: PathBuf,
    },
    /// Shows the keys of the keyring, how many brokers have loaded each of them, and how many values need it
    #[command(after_help = "\
Example:
  token-broker keys status")]
    Status {
        #[command(flatten)]
        settings: Flags<KeyringFlag>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Adds a new key to the keyring, and prints its id; it is used once it is promoted
    #[command(after_help = "\
Brokers read the changed file within a second. If a key of this kind was added before and not promoted, its id is
printed, and none is added.

Example:
  token-broker keys add --kind sealing")]
    Add {
        /// What the key is for
        #[arg(long, value_parser = kind())]
        kind: KeyKind,
        #[command(flatten)]
        settings: Flags<KeyringFlag>,
    },
    /// Makes a key the one that new values are made with; refused until every running broker has loaded it
    #[command(after_help = "\
Publishes an intake key too, which needs the login that owns the tables, from TOKEN_BROKER_MIGRATE_DATABASE_URL or
DATABASE_URL.

Example:
  token-broker keys promote s4711e1f4")]
    Promote {
        /// The key's id, as `keys status` shows it
        #[arg(value_name = "KEY")]
        id: KeyId,
        /// Promote the key even if a running broker has not loaded it, or the database does not answer
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        keyring: Flags<KeyringFlag>,
        #[command(flatten)]
        database: Flags<MigrateFlag>,
    },
    /// Seals every secret and token again with the primary sealing key; needs the login that owns the tables
    #[command(after_help = "\
Can be interrupted and run again, and run twice at once. Brokers go on meanwhile. Takes the database from
TOKEN_BROKER_MIGRATE_DATABASE_URL or DATABASE_URL. Exit code 1 if values are left.

Example:
  token-broker keys reseal --reason 'yearly rotation'")]
    Reseal {
        /// The reason, for the audit log, which also gets the name of the user who runs this
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
        #[command(flatten)]
        keyring: Flags<KeyringFlag>,
        #[command(flatten)]
        database: Flags<MigrateFlag>,
    },
    /// Takes a key out of use for good; refused while a value or a running broker needs it
    #[command(after_help = "\
What checks older audit records stays in the keyring: of a signing key its public half, and a fingerprint key itself.
Backups of the database from before need the keyring from before: keep a copy of it.

Example:
  token-broker keys retire s4711e1f4")]
    Retire {
        /// The key's id, as `keys status` shows it
        #[arg(value_name = "KEY")]
        id: KeyId,
        #[command(flatten)]
        settings: Flags<KeyringFlag>,
    },
    /// Publishes the public key that admins seal secrets to; needs the login that owns the tables
    #[command(after_help = "\
Takes the database from TOKEN_BROKER_MIGRATE_DATABASE_URL or DATABASE_URL, and the key from the keyring or
from --intake-key.

Examples:
  token-broker keys publish
  token-broker keys publish --intake-key i520e41a9:fUetyttumZ233xqf78wn3cyzQpoKc4N7t_OuvbCYgQU")]
    Publish {
        /// Publish the key even if a running broker has not loaded it, and so cannot open what is sealed to it
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        intake: Flags<IntakeKeyFlag>,
        #[command(flatten)]
        keyring: Flags<KeyringFlag>,
        #[command(flatten)]
        database: Flags<MigrateFlag>,
    },
    /// Prints the public key that admins seal secrets to, or those that verify audit signatures
    #[command(after_help = "\
Examples:
  token-broker keys public
  token-broker keys public --signing > audit-keys.pem")]
    Public {
        /// Print the public keys of signatures, in PEM
        #[arg(long)]
        signing: bool,
        #[command(flatten)]
        settings: Flags<KeyringFlag>,
    },
}

impl KeysArgs {
    /// Returns what the command has to be allowed to do in the database.
    pub(super) fn needs(&self) -> Needs {
        match self.command {
            Command::Publish { .. } | Command::Reseal { .. } => Needs::Owner,
            _ => privileges::RUNTIME,
        }
    }
}

/// Returns a parser of the names of kinds.
fn kind() -> impl TypedValueParser<Value = KeyKind> {
    PossibleValuesParser::new(KeyKind::ALL.map(KeyKind::as_str))
        .try_map(|name| KeyKind::from_name(&name).ok_or("unknown"))
}

pub(super) async fn run(global: &GlobalArgs, args: KeysArgs) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Generate { out } => {
            Keyring::create_file(&out, Clock::System.wall())?;
            output::note(format_args!(
                "wrote {}; keep a copy apart from the database's backups: without it no sealed \
                 secret opens",
                out.display()
            ));
        }
        Command::Status { settings, json } => status::run(global, settings.given, json).await?,
        Command::Add { kind, settings } => rotate::add(global, settings.given, kind)?,
        Command::Promote { id, force, keyring, database } => {
            let flags = joined([keyring.given, database.given]);
            rotate::promote(global, flags, &id, force).await?;
        }
        Command::Reseal { reason, keyring, database } => {
            let flags = joined([keyring.given, database.given]);
            return reseal::run(global, flags, reason.as_deref()).await;
        }
        Command::Retire { id, settings } => rotate::retire(global, settings.given, &id).await?,
        Command::Publish { force, intake, keyring, database } => {
            let flags = joined([intake.given, keyring.given, database.given]);
            publish::run(global, flags, force).await?;
        }
        Command::Public { signing, settings } => {
            let keyring = file::load(global, settings.given)?;
            if signing {
                output::block(VerifyingKeys::from(&keyring))?;
            } else {
                output::line(keyring.intake_public())?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn joined<const N: usize>(flags: [BTreeMap<String, String>; N]) -> BTreeMap<String, String> {
    flags.into_iter().flatten().collect()
}
