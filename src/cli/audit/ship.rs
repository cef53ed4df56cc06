//! `audit ship` and `audit retire`: deliver the journal of a lost replica, or retire its chains if the
//! journal is lost as well.

use std::{io, path::PathBuf, process::ExitCode};

use anyhow::{Context, bail, ensure};
use clap::Args;
use tokio::task;

use crate::{
    audit::journal::{Archive, TornTail, with_causes},
    cli::{
        global::{APPLICATION_NAME, GlobalArgs, path_argument},
        output::{self, Table},
        time::LocalTime,
    },
    config,
    files::{
        given_path::shown,
        state_dir::{StateDir, StateDirError},
    },
    services::journal_delivery::{self, DeliveredChain},
    store::admin::OpenChain,
};

#[derive(Args, Debug)]
pub(super) struct ShipArgs {
    /// The replica's state directory, or a copy of it; its journal is not changed
    #[arg(value_name = "DIR", value_parser = path_argument())]
    directory: PathBuf,
}

#[derive(Args, Debug)]
pub(super) struct RetireArgs {
    /// The replica: the value of `instance` in its events
    instance: String,
    /// The reason, for the audit log
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
}

pub(super) async fn ship(global: &GlobalArgs, args: ShipArgs) -> anyhow::Result<ExitCode> {
    let url = config::database_url(&global.sources(std::collections::BTreeMap::new())?)?;
    let database = url.database(APPLICATION_NAME)?;
    database.check_schema().await?;
    let archive = task::spawn_blocking(move || open(&args.directory)).await??;
    let chains = journal_delivery::deliver_archive(&archive, &database).await?;
    let mut table = Table::new(["CHAIN", "HAD", "HAS NOW"]);
    let mut delivered = 0;
    let mut complete = true;
    for DeliveredChain { chain, from, to, blocked } in &chains {
        delivered += to - from;
        if let Some(why) = blocked {
            complete = false;
            output::note(format_args!(
                "chain {} cannot be delivered any further: {why}",
                chain.chain
            ));
        }
        table.row([chain.chain.clone(), from.to_string(), to.to_string()]);
    }
    table.print("the journal is empty")?;
    for fault in archive.damaged() {
        complete = false;
        output::note(format_args!("{}: it was not delivered", with_causes(fault)));
    }
    output::note(format_args!("{delivered} records were delivered"));
    if let Some(torn) = archive.torn().filter(|torn| torn.records > 0) {
        let TornTail { file, line, records, .. } = torn;
        complete = false;
        output::note(format_args!(
            "{file}: from line {line} on, {records} records do not follow those before, and were not \
             delivered: a crash tore them, or they were altered"
        ));
    }
    Ok(ExitCode::from(u8::from(!complete)))
}

/// Opens the journal in a state directory, and locks the directory against a broker. Blocks on I/O.
fn open(directory: &std::path::Path) -> anyhow::Result<Archive> {
    if !StateDir::journal_below(directory).is_dir() {
        bail!("{} is no state directory: it has no journal", shown(directory));
    }
    let held = match StateDir::open(directory) {
        Ok(held) => Some(held),
        // No broker runs in a directory that cannot be written, so that no lock is needed.
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

pub(super) async fn retire(global: &GlobalArgs, args: RetireArgs) -> anyhow::Result<()> {
    let admin = global.admin(args.reason.as_deref()).await?;
    let chains = admin.open_chains(&args.instance).await?;
    if chains.iter().any(|chain| chain.live) {
        bail!("instance {} runs: it sent a heartbeat within the last minute", args.instance);
    }
    let mut retired = false;
    for chain in &chains {
        if let Some(what) = &chain.retired {
            output::note(format_args!("chain {} is retired already: {what}", chain.chain));
            continue;
        }
        let what = describe_missing(chain);
        admin.retire_chain(&chain.chain, &what).await?;
        output::line(format_args!("chain {} is retired: {what}", chain.chain))?;
        retired = true;
    }
    ensure!(retired, "instance {} has no chain left to retire", args.instance);
    Ok(())
}

/// Says which records of a chain may be missing.
fn describe_missing(last: &OpenChain) -> String {
    let OpenChain { delivered_seq, started_at, .. } = last;
    let reported = last.reported_seq.unwrap_or(*delivered_seq);
    let missing = reported.saturating_sub(*delivered_seq);
    if last.stopped && last.reported_seq.is_some() && missing == 0 {
        return format!("it was stopped, and all {delivered_seq} records are there");
    }
    let until = match last.heartbeat_at {
        Some(at) => format!("its last heartbeat was at {}", LocalTime(at)),
        None => match started_at {
            Some(at) => format!("it was opened at {} and sent no heartbeat", LocalTime(*at)),
            None => "it sent no heartbeat".to_owned(),
        },
    };
    let known = if missing > 0 {
        format!("{missing} records, up to {reported}, are certainly missing")
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
    fn what_may_be_missing_follows_from_the_delivered_and_the_reported_position() {
        let last = OpenChain {
            chain: "c1".into(),
            started_at: Some(DateTime::UNIX_EPOCH),
            delivered_seq: 812,
            reported_seq: Some(840),
            heartbeat_at: Some(DateTime::UNIX_EPOCH),
            live: false,
            stopped: false,
            retired: None,
        };
        let says = |last: OpenChain, words: &str| {
            let said = describe_missing(&last);
            assert!(said.contains(words), "{said}");
        };
        says(
            last.clone(),
            "records after 812 may be missing; 28 records, up to 840, are certainly missing",
        );
        says(
            OpenChain { reported_seq: None, ..last.clone() },
            "none is known to be missing; its last heartbeat",
        );
        says(OpenChain { heartbeat_at: None, ..last.clone() }, "and sent no heartbeat");
        let stopped = OpenChain { stopped: true, reported_seq: Some(812), ..last };
        says(stopped, "all 812 records are there");
    }
}
