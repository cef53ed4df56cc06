//! The commands `audit …`: reading, verifying and exporting the audit log.

mod event_text;
mod export;
mod export_reader;
mod filter_args;
mod ship;
mod tail;
mod verify;
mod who;

use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::{
    global::GlobalArgs,
    privileges::{self, Needs},
};

/// Reads and verifies the audit log
#[derive(Args, Debug)]
pub(super) struct AuditArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Prints the last events, one per line
    #[command(after_help = "\
Examples:
  token-broker audit tail --follow
  token-broker audit tail -n 100 --account acme --event get_token --outcome permission_denied
  token-broker audit tail --since 24h --json | jq .caller")]
    Tail(tail::TailArgs),
    /// Verifies that the log is complete, in order and unmodified; exit code 1 if it is not
    #[command(after_help = "\
Examples:
  token-broker audit verify
  token-broker audit verify --keys audit-keys.pem --head audit-heads.jsonl
  token-broker audit verify --export march.jsonl --keys audit-keys.pem
  token-broker audit verify --journal /var/lib/token-broker")]
    Verify(verify::VerifyArgs),
    /// Prints events as JSON lines, with everything that verification needs
    #[command(after_help = "\
Examples:
  token-broker audit export > audit.jsonl
  token-broker audit export --since 2027-03-01T00:00:00+09:00 --until 2027-04-01T00:00:00+09:00
  token-broker audit export --caller billing | jq -r 'select(.event).account' | sort | uniq -c")]
    Export(export::ExportArgs),
    /// Lists the callers that were given a token; reads the token from standard input
    #[command(after_help = "\
Examples:
  token-broker audit who < leaked-token
  pbpaste | token-broker audit who --json")]
    Who(who::WhoArgs),
    /// Delivers the records that are left in the journal of a lost replica
    #[command(after_help = "\
Example:
  token-broker audit ship /mnt/rescued/var/lib/token-broker")]
    Ship(ship::ShipArgs),
    /// Retires the chains of a replica whose disk is lost, and says which records may be missing
    #[command(after_help = "\
Example:
  token-broker audit retire i-0123456789abcdef --reason 'disk of host 3 failed, TICKET-7'")]
    Retire(ship::RetireArgs),
}

impl AuditArgs {
    /// Returns what the command has to be allowed to do in the database.
    pub(super) fn needs(&self) -> Needs {
        match self.command {
            Command::Ship(_) | Command::Retire(_) => privileges::RUNTIME,
            _ => privileges::AUDITOR,
        }
    }
}

pub(super) async fn run(global: &GlobalArgs, args: AuditArgs) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Tail(args) => return tail::run(global, args).await,
        Command::Verify(args) => return verify::run(global, args).await,
        Command::Export(args) => return export::run(global, args).await,
        Command::Who(args) => return who::run(global, args).await,
        Command::Ship(args) => return ship::ship(global, args).await,
        Command::Retire(args) => ship::retire(global, args).await?,
    }
    Ok(ExitCode::SUCCESS)
}
