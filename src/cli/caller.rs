//! The command `caller`.

mod export;
mod import;
mod review;
mod setup;
mod show;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context, ensure};
use clap::{Args, Subcommand};

use super::{
    bulk,
    global::{GlobalArgs, path_argument},
    output::{self, note},
    privileges::{self, Needs},
    prompt,
    time::{LocalTime, Moment},
};
use crate::{
    crypto::bearer::Bearer,
    domain::{
        account::{AccountName, Description},
        caller::{AccountPattern, CallerKind, Right},
        clock::{Clock, Timestamp},
    },
    files::{given_path::shown, secret_file::SecretFile},
    store::{
        StoreError,
        admin::{Admin, NewBearer, NewCaller, NewGrant},
    },
};

/// Registers callers and grants them accounts
#[derive(Args, Debug)]
pub(super) struct CallerArgs {
    #[command(subcommand)]
    command: Command,
    /// The reason, for the audit log, which also gets the name of the user who runs this
    #[arg(long, global = true, value_name = "TEXT")]
    reason: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Registers a caller
    #[command(after_help = "\
Examples:
  token-broker caller add billing --bearer --out billing.bearer
  token-broker caller add billing --spiffe-id spiffe://example.com/billing")]
    Add {
        /// The caller's name: `[a-z0-9][a-z0-9._-]{0,62}`
        name: AccountName,
        /// Create a bearer and print it, once, as the only output
        #[arg(long)]
        bearer: bool,
        /// Write the bearer into this new file, which only you can read, instead of printing it
        #[arg(long, value_name = "FILE", requires = "bearer", value_parser = path_argument())]
        out: Option<PathBuf>,
        /// A SPIFFE ID in the caller's certificates
        #[arg(long, value_name = "URI")]
        spiffe_id: Vec<String>,
        /// A DNS name in the caller's certificates
        #[arg(long, value_name = "NAME")]
        dns: Vec<String>,
        /// Calls a second, instead of the broker's default
        #[arg(long, value_name = "N", value_parser = rate_limit())]
        rate_limit: Option<i32>,
        /// A description for people
        #[arg(long, default_value = "", value_name = "TEXT")]
        description: Description,
    },
    /// Registers the callers of a file, and with --update changes them
    #[command(after_help = IMPORT_HELP)]
    Import(bulk::ImportArgs),
    /// Writes all callers into a file for `caller import`, without their bearers
    #[command(after_help = "\
Example:
  token-broker caller export --out callers.csv --replace && git diff callers.csv")]
    Export(bulk::ExportArgs),
    /// Lists all callers
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Shows a caller with its credentials and grants
    Show {
        /// The caller's name
        name: AccountName,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Lists what to take away or renew: unused grants, callers without a call, bearers and grants that end soon or never
    #[command(after_help = "\
Reads callers and the audit log, so that it needs the roles token_broker_access and token_broker_auditor.
Exit code 3 if it found anything, else 0.

Examples:
  token-broker caller review
  token-broker caller review --unused 30d --ending 7d --json")]
    Review(review::ReviewArgs),
    /// Grants a caller the use of accounts; replaces its grants on the same patterns
    #[command(after_help = "\
Examples:
  token-broker caller grant billing acme 'acme-*'
  token-broker caller grant audit '*' --rights list --until 90d")]
    Grant {
        /// The caller's name
        name: AccountName,
        /// The accounts: names, or patterns in which one * stands for any characters
        #[arg(required = true, value_name = "PATTERN")]
        patterns: Vec<AccountPattern>,
        /// What the caller may do
        #[arg(long, value_delimiter = ',', default_value = "get,report,list")]
        rights: Vec<Right>,
        /// The end: an RFC 3339 time, or a duration from now, such as 90d
        #[arg(long, value_name = "T")]
        until: Option<Moment>,
    },
    /// Removes grants of a caller
    Ungrant {
        /// The caller's name
        name: AccountName,
        /// The patterns of the grants, as they were granted
        #[arg(required = true, value_name = "PATTERN")]
        patterns: Vec<AccountPattern>,
    },
    /// Sets how many calls a second a caller may make
    Limit {
        /// The caller's name
        name: AccountName,
        /// Calls a second
        #[arg(value_parser = rate_limit(), required_unless_present = "default")]
        rate_limit: Option<i32>,
        /// Use the broker's default
        #[arg(long, conflicts_with = "rate_limit")]
        default: bool,
    },
    /// Enables a caller
    Enable {
        /// The caller's name
        name: AccountName,
    },
    /// Disables a caller: it is refused like an unknown one, at once
    Disable {
        /// The caller's name
        name: AccountName,
    },
    /// Removes a caller with its credentials and grants
    Remove {
        /// The caller's name
        name: AccountName,
        /// Do not ask for confirmation
        #[arg(long)]
        yes: bool,
    },
    /// Adds and revokes bearers
    #[command(subcommand)]
    Bearer(BearerCommand),
    /// Adds and revokes names in client certificates
    #[command(subcommand)]
    Identity(IdentityCommand),
}

const IMPORT_HELP: &str = "\
The first line of CSV names the columns, in any order: name, enabled, rate_limit, description,
spiffe_ids, dns_names, grants. JSON lines have the same names as keys. With --update, a column that
the file lacks leaves callers as they are. The last three are lists, separated by blanks: each name
is NAME[@END], each grant PATTERN[=RIGHTS][@END], such as acme-*=get,list@2027-01-31T00:00:00Z.
Bearers are not in a file: `caller bearer add` creates them. --prune removes callers that the file
lacks, with their bearers, and grants and names that their rows lack.

Examples:
  token-broker caller import callers.csv --update --dry-run
  token-broker caller import callers.csv --update --prune --yes --reason TICKET-7";

#[derive(Debug, Subcommand)]
enum BearerCommand {
    /// Creates another bearer and prints it, once, as the only output; the others stay valid
    #[command(after_help = "\
Example:
  token-broker caller bearer add billing --expires 90d --out next.bearer")]
    Add {
        /// The caller's name
        name: AccountName,
        /// Write the bearer into this new file, which only you can read, instead of printing it
        #[arg(long, value_name = "FILE", value_parser = path_argument())]
        out: Option<PathBuf>,
        /// The end: an RFC 3339 time, or a duration from now, such as 90d
        #[arg(long, value_name = "T")]
        expires: Option<Moment>,
        /// A description for people
        #[arg(long, default_value = "", value_name = "TEXT")]
        description: Description,
    },
    /// Lists bearers with their numbers and times, never the bearers themselves
    List {
        /// Only those of this caller
        name: Option<AccountName>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Revokes a bearer, at once
    Revoke {
        /// The bearer's number, as `bearer list` shows it
        id: i64,
    },
}

#[derive(Debug, Subcommand)]
enum IdentityCommand {
    /// Lets certificates with these names identify a caller; names that were revoked may be added again
    #[command(after_help = "\
Example:
  token-broker caller identity add billing --spiffe-id spiffe://example.com/billing --dns billing.example.com")]
    Add {
        /// The caller's name
        name: AccountName,
        #[command(flatten)]
        identities: IdentityArgs,
    },
    /// Revokes a name, at once: certificates with it no longer identify the caller
    Revoke {
        /// The number of the credential, as `caller show` shows it
        id: i64,
    },
}

/// Names in the certificates of a caller, at least one.
#[derive(Args, Debug)]
#[group(required = true, multiple = true)]
struct IdentityArgs {
    /// A SPIFFE ID in the caller's certificates
    #[arg(long, value_name = "URI")]
    spiffe_id: Vec<String>,
    /// A DNS name in the caller's certificates
    #[arg(long, value_name = "NAME")]
    dns: Vec<String>,
}

/// Returns the names in certificates with their kinds.
fn identities(spiffe_ids: Vec<String>, dns_names: Vec<String>) -> Vec<(CallerKind, String)> {
    let spiffe = spiffe_ids.into_iter().map(|id| (CallerKind::Spiffe, id));
    spiffe.chain(dns_names.into_iter().map(|name| (CallerKind::Dns, name))).collect()
}

fn rate_limit() -> clap::builder::RangedI64ValueParser<i32> {
    clap::value_parser!(i32).range(1..=1_000_000)
}

impl CallerArgs {
    /// Returns what the command has to be allowed to do in the database.
    pub(super) fn needs(&self) -> Needs {
        match self.command {
            Command::Review(_) => privileges::REVIEW,
            _ => privileges::ACCESS,
        }
    }
}

pub(super) async fn run(global: &GlobalArgs, args: CallerArgs) -> anyhow::Result<ExitCode> {
    let admin = global.admin(args.reason.as_deref()).await?;
    match args.command {
        Command::Review(args) => return review::run(&admin, args).await,
        Command::Add { name, bearer, out, spiffe_id, dns, rate_limit, description } => {
            let identities = identities(spiffe_id, dns);
            let bearer = bearer.then(|| NewSecret::create(out)).transpose()?;
            let caller = NewCaller {
                name: &name,
                rate_limit,
                description: description.as_str(),
                bearer_sha256: bearer.as_ref().map(|new| new.bearer.sha256()),
                identities: &identities,
            };
            if let Err(error) = admin.add_caller(&caller).await {
                return Err(match bearer {
                    Some(bearer) => bearer.not_registered(error),
                    None => error.into(),
                });
            }
            note(format_args!("caller {name} is registered; it has no grants yet"));
            if let Some(bearer) = bearer {
                bearer.hand_over()?;
            }
        }
        Command::Import(input) => return import::run(&admin, &input).await,
        Command::Export(output) => return export::run(&admin, &output).await,
        Command::List { json } => {
            let listed = admin.callers().await?;
            show::list(&listed.rows, json)?;
            return Ok(show::name_unreadable(&listed));
        }
        Command::Show { name, json } => show::one(&admin.caller(&name).await?, json)?,
        Command::Grant { name, patterns, rights, until } => {
            let ends_at = until.map(|until| future_time("--until", until)).transpose()?;
            let grant = NewGrant { patterns: &patterns, rights: &rights, ends_at };
            admin.grant(&name, &grant).await?;
            let end = ends_at.map(|end| format!(" until {}", LocalTime(end))).unwrap_or_default();
            note(format_args!("caller {name} may use {}{end}", joined(&patterns)));
        }
        Command::Ungrant { name, patterns } => {
            admin.ungrant(&name, &patterns).await?;
            note(format_args!("caller {name} has no grant on {} any more", joined(&patterns)));
        }
        Command::Limit { name, rate_limit, default: _ } => {
            admin.limit_caller(&name, rate_limit).await?;
            match rate_limit {
                Some(limit) => note(format_args!("caller {name} may call {limit} times a second")),
                None => note(format_args!("caller {name} has the broker's default rate")),
            }
        }
        Command::Enable { name } => {
            admin.enable_caller(&name, true).await?;
            note(format_args!("caller {name} is enabled"));
        }
        Command::Disable { name } => {
            admin.enable_caller(&name, false).await?;
            note(format_args!("caller {name} is disabled"));
        }
        Command::Remove { name, yes } => {
            admin.caller(&name).await?;
            prompt::confirm_removal("caller", name.as_str(), yes)?;
            admin.remove_caller(&name).await?;
            note(format_args!("caller {name} is removed"));
        }
        Command::Bearer(command) => return bearer(&admin, command).await,
        Command::Identity(command) => identity(&admin, command).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Returns the time that `end`, the value of `flag`, stands for.
///
/// # Errors
/// When that time is not in the future, which would be a mistake.
fn future_time(flag: &str, end: Moment) -> anyhow::Result<Timestamp> {
    let now = Clock::System.wall();
    let end = end.after(now);
    ensure!(end > now, "{flag}: {} is not in the future", LocalTime(end));
    Ok(end)
}

async fn bearer(admin: &Admin, command: BearerCommand) -> anyhow::Result<ExitCode> {
    match command {
        BearerCommand::Add { name, out, expires, description } => {
            let ends_at = expires.map(|expires| future_time("--expires", expires)).transpose()?;
            let secret = NewSecret::create(out)?;
            let new = NewBearer {
                sha256: secret.bearer.sha256(),
                ends_at,
                description: description.as_str(),
            };
            let id = match admin.add_bearer(&name, new).await {
                Ok(id) => id,
                Err(error) => return Err(secret.not_registered(error)),
            };
            note(format_args!("caller {name} has a new bearer, number {id}"));
            secret.hand_over()?;
        }
        BearerCommand::List { name, json } => {
            if let Some(name) = &name {
                admin.caller(name).await?;
            }
            let listed = admin.bearers(name.as_ref()).await?;
            show::bearers(&listed.rows, json)?;
            return Ok(show::name_unreadable(&listed));
        }
        BearerCommand::Revoke { id } => {
            let caller = admin.revoke_bearer(id).await?;
            note(format_args!("bearer {id} of caller {caller} is revoked"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn identity(admin: &Admin, command: IdentityCommand) -> anyhow::Result<()> {
    match command {
        IdentityCommand::Add { name, identities: IdentityArgs { spiffe_id, dns } } => {
            let identities = identities(spiffe_id, dns);
            admin.add_identities(&name, &identities).await?;
            for (_, identity) in identities {
                note(format_args!("certificates with {identity} identify caller {name}"));
            }
        }
        IdentityCommand::Revoke { id } => {
            let (caller, identity) = admin.revoke_identity(id).await?;
            note(format_args!(
                "certificates with {identity} do not identify caller {caller} any more"
            ));
        }
    }
    Ok(())
}

/// A bearer that is about to be registered, and the file that it was written to, if any. The file is removed
/// if this is dropped, because nothing was registered.
struct NewSecret {
    bearer: Bearer,
    file: Option<(PathBuf, SecretFile)>,
}

impl NewSecret {
    /// Generates a bearer, and writes it to `out`. That comes before its registration, so that no bearer is
    /// registered which nobody has.
    fn create(out: Option<PathBuf>) -> anyhow::Result<Self> {
        let bearer = Bearer::generate();
        let write = |path: PathBuf| match SecretFile::create(&path, bearer.expose()) {
            Ok(file) => Ok((path, file)),
            Err(error) => {
                Err(error).with_context(|| format!("{}: nothing was registered", shown(&path)))
            }
        };
        let file = out.map(write).transpose()?;
        Ok(Self { bearer, file })
    }

    /// Returns the error to show after the registration has failed with `error`. Unless it is certain that nothing
    /// was registered, the file stays: it may hold a bearer that is valid.
    fn not_registered(self, error: StoreError) -> anyhow::Error {
        let uncertain = error.is_outcome_uncertain();
        let error = anyhow::Error::from(error);
        match self.file {
            Some((path, file)) if uncertain => {
                file.keep();
                error.context(format!(
                    "the bearer may be registered; it stays in {}. See `caller bearer list`",
                    shown(&path)
                ))
            }
            _ => error,
        }
    }

    /// Leaves the bearer to the user after its registration: in its file, or else printed. It cannot be
    /// printed again, because only its hash is stored.
    fn hand_over(self) -> anyhow::Result<()> {
        if let Some((path, file)) = self.file {
            file.keep();
            note(format_args!("the bearer is in {}, which only you can read", shown(&path)));
            return Ok(());
        }
        note("keep the bearer now: it is shown only once");
        output::secret_line(self.bearer.expose())
    }
}

fn joined(patterns: &[AccountPattern]) -> String {
    patterns.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_of_a_bearer_stays_only_if_the_bearer_may_be_registered() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bearer");
        let secret = NewSecret::create(Some(path.clone())).unwrap();
        drop(secret.not_registered(StoreError::NotFound("caller shop does not exist".into())));
        assert!(!path.exists());
        let secret = NewSecret::create(Some(path.clone())).unwrap();
        let error = secret.not_registered(StoreError::TimedOut { reason: "the commit" });
        assert!(path.exists());
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");
    }
}
