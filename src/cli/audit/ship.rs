//! `audit ship` and `audit retire`: what becomes of the journal of a replica that is gone.

use std::{io, path::PathBuf, process::ExitCode};

use anyhow::{Context, bail, ensure};
use clap::Args;
use tokio::task;

use crate::{
    audit::journal::{Archive, TornTail},
    cli::{
        APPLICATION_NAME, Global,
        output::{self, Table},
        time::LocalTime,
    },
    config,
    files::state_dir::{StateDir, StateDirError},
    services::journal_delivery::{self, Shipped},
    store::admin::OpenChain,
};

#[derive(Args, Debug)]
pub(super) struct ShipArgs {
    /// Its state directory, or a copy of it; nothing there is changed
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

#[derive(Args, Debug)]
pub(super) struct RetireArgs {
    /// The replica, as `instance` in its events names it
    instance: String,
    /// Why, for the audit log
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
}

pub(super) async fn ship(global: &Global, args: ShipArgs) -> anyhow::Result<ExitCode> {
    let url = config::database_url(&global.sources(std::collections::BTreeMap::new())?)?;
    let database = url.database(APPLICATION_NAME)?;
    database.check_schema().await?;
    let archive = task::spawn_blocking(move || open(&args.directory)).await??;
    let shipped = journal_delivery::ship(&archive, database.connection()).await?;
    let mut table = Table::new(["CHAIN", "HAD", "HAS NOW"]);
    let mut delivered = 0;
    let mut whole = true;
    for Shipped { chain, from, to, stuck } in &shipped {
        delivered += to - from;
        if let Some(error) = stuck {
            whole = false;
            output::note(format_args!("chain {} cannot be delivered on: {error}", chain.chain));
        }
        table.row([chain.chain.clone(), from.to_string(), to.to_string()]);
    }
    table.print("the journal is empty")?;
    output::note(format_args!("{delivered} records were delivered"));
    if let Some(torn) = archive.torn().filter(|torn| torn.records > 0) {
        let TornTail { file, line, records, .. } = torn;
        whole = false;
        output::note(format_args!(
            "{file}: from line {line} on, {records} records do not follow those before, and were not \
             delivered: a crash tore them, or they were altered"
        ));
    }
    Ok(ExitCode::from(u8::from(!whole)))
}

/// Opens the journal of a directory that no broker uses.
fn open(directory: &std::path::Path) -> anyhow::Result<Archive> {
    if !StateDir::journal_below(directory).is_dir() {
        bail!("{} is no state directory: it has no journal", directory.display());
    }
    let held = match StateDir::open(directory) {
        Ok(held) => Some(held),
        // Where nothing can be written, no broker runs either.
        Err(StateDirError::Io { error, .. })
            if error.kind() == io::ErrorKind::ReadOnlyFilesystem =>
        {
            None
        }
        Err(error @ StateDirError::InUse(_)) => {
            return Err(error).context("the broker that runs there delivers by itself");
        }
        Err(error) => return Err(error.into()),
    };
    Ok(Archive::open(directory, held)?)
}

pub(super) async fn retire(global: &Global, args: RetireArgs) -> anyhow::Result<()> {
    let admin = global.admin(args.reason.as_deref()).await?;
    let chains = admin.open_chains(&args.instance).await?;
    if chains.iter().any(|chain| chain.live) {
        bail!("instance {} runs: it told so within the last minute", args.instance);
    }
    let mut retired = false;
    for chain in &chains {
        if let Some(what) = &chain.retired {
            output::note(format_args!("chain {} is retired already: {what}", chain.chain));
            continue;
        }
        let what = what_may_be_missing(chain);
        admin.retire(&chain.chain, &what).await?;
        output::line(format_args!("chain {} is retired: {what}", chain.chain))?;
        retired = true;
    }
    ensure!(retired, "instance {} has no chain left to retire", args.instance);
    Ok(())
}

/// What a chain that ends where it does may lack.
fn what_may_be_missing(last: &OpenChain) -> String {
    let OpenChain { delivered_seq, started_at, .. } = last;
    let told = last.told_seq.unwrap_or(*delivered_seq);
    let missing = told - delivered_seq;
    if last.stopped && last.told_seq.is_some() && missing == 0 {
        return format!("it was stopped, and all {delivered_seq} records are there");
    }
    let until = match last.heartbeat_at {
        Some(at) => format!("it was heard of last at {}", LocalTime(at)),
        None => format!("it was opened at {} and not heard of", LocalTime(*started_at)),
    };
    let known = if missing > 0 {
        format!("{missing} records, up to {told}, are missing for sure")
    } else {
        "none is known to be missing".to_owned()
    };
    format!("records after {delivered_seq} may be missing; {known}; {until}")
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;

    #[test]
    fn what_may_be_missing_follows_from_what_was_delivered_and_what_was_told() {
        let last = OpenChain {
            chain: "c1".into(),
            started_at: DateTime::UNIX_EPOCH,
            delivered_seq: 812,
            told_seq: Some(840),
            heartbeat_at: Some(DateTime::UNIX_EPOCH),
            live: false,
            stopped: false,
            retired: None,
        };
        let says = |last: OpenChain, words: &str| {
            let said = what_may_be_missing(&last);
            assert!(said.contains(words), "{said}");
        };
        says(last.clone(), "records after 812 may be missing; 28 records, up to 840, are missing");
        says(
            OpenChain { told_seq: None, ..last.clone() },
            "none is known to be missing; it was heard",
        );
        says(OpenChain { heartbeat_at: None, ..last.clone() }, "and not heard of");
        let stopped = OpenChain { stopped: true, told_seq: Some(812), ..last };
        says(stopped, "all 812 records are there");
    }
}
