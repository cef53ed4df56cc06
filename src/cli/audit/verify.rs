//! `audit verify`: verifies the log in the database, in a journal, or in an export.

mod evidence;
mod head_argument;
mod report;
mod undelivered;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, anyhow};
use clap::Args;
use tokio::task;

use self::{
    evidence::Evidence,
    head_argument::HeadArgument,
    report::{in_json, print},
    undelivered::undelivered,
};
use crate::{
    cli::{
        global::{GlobalArgs, path_argument},
        output,
    },
    config::{self, Flags, KeyringFlag},
    crypto::{Keyring, VerifyingKeys},
    files::{given_path::shown, text},
    store::admin::Admin,
};

/// How many differences between rows and their records are shown.
const SHOWN_CHANGES: i64 = 100;

#[derive(Args, Debug)]
pub(super) struct VerifyArgs {
    /// Verify the journal in this state directory instead of the database
    #[arg(long, value_name = "DIR", conflicts_with = "export", value_parser = path_argument())]
    journal: Option<PathBuf>,
    /// Verify an output of `audit export` instead of the database; `-` for standard input
    #[arg(long, value_name = "FILE", value_parser = path_argument())]
    export: Option<PathBuf>,
    /// Fail unless the export holds the whole log
    #[arg(long, requires = "export")]
    whole: bool,
    /// A signed head that was stored elsewhere: a file of them, such as a copy of audit-heads.jsonl or
    /// the broker's JSON log, or CHAIN:SEQ:HASH. Can be given more than once
    #[arg(long = "head", value_name = "HEAD")]
    heads: Vec<HeadArgument>,
    /// The public keys that check signatures, as `keys public --signing` prints them; default: those of
    /// the keyring, if there is one
    #[arg(long, value_name = "FILE", value_parser = path_argument())]
    keys: Option<PathBuf>,
    #[command(flatten)]
    settings: Flags<KeyringFlag>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(global: &GlobalArgs, args: VerifyArgs) -> anyhow::Result<ExitCode> {
    let keys = keys(global, args.keys.as_deref(), args.settings)?;
    let evidence = Evidence::new(keys, args.heads)?;
    let mut differences = Vec::new();
    let report = match (args.journal, args.export) {
        (Some(directory), _) => {
            task::spawn_blocking(move || evidence.verify_journal(&directory)).await??
        }
        (None, Some(file)) => {
            task::spawn_blocking(move || evidence.verify_export(&file, args.whole)).await??
        }
        (None, None) => {
            let admin = global.auditor().await?;
            differences = unrecorded(&admin).await?;
            let undelivered = undelivered(&admin).await?;
            evidence.verify_database(admin.pool(), &undelivered).await?
        }
    };
    if args.json {
        output::json(&in_json(&report, &differences))?;
    } else {
        print(&report, &differences)?;
    }
    Ok(ExitCode::from(u8::from(!report.holds() || !differences.is_empty())))
}

/// Returns how accounts, callers, credentials, grants and intake keys differ from what was recorded when they were
/// changed, and how those records differ from the audit log.
async fn unrecorded(admin: &Admin) -> anyhow::Result<Vec<String>> {
    let unrecorded = admin.unrecorded_changes(SHOWN_CHANGES).await?;
    let unaudited = admin.unaudited_changes(SHOWN_CHANGES).await?;
    let unaudited = unaudited.iter().map(ToString::to_string);
    Ok(unrecorded.iter().map(ToString::to_string).chain(unaudited).collect())
}

/// The keys that check signatures: those of `file`, else those of the keyring; `None` if no keyring is
/// configured.
fn keys(
    global: &GlobalArgs,
    file: Option<&Path>,
    settings: Flags<KeyringFlag>,
) -> anyhow::Result<Option<VerifyingKeys>> {
    if let Some(file) = file {
        let text = text::read(file).with_context(|| format!("cannot read {}", shown(file)))?;
        let keys =
            VerifyingKeys::parse(&text).map_err(|fault| anyhow!("{}: {fault}", shown(file)))?;
        return Ok(Some(keys));
    }
    let file = config::known_keyring_file(&global.sources(settings.given)?)?;
    Ok(file.map(|file| Keyring::load(&file)).transpose()?.as_ref().map(VerifyingKeys::from))
}
