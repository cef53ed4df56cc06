//! `audit verify`: verifies the log in the database, in a journal, or in an export.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    str::FromStr,
    time::Duration,
};

use anyhow::{Context, anyhow, bail, ensure};
use clap::Args;
use futures_util::TryStreamExt;
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::{
    sync::mpsc,
    task,
    time::{Instant, sleep},
};

use super::export_reader::{ExportReader, UnreadableLine, read_checkpoints};
use crate::{
    audit::{
        chain::{ChainHead, Digest, StoredEvent},
        checkpoint::SignedCheckpoint,
        export::{ExportLine, ExportStatement},
        journal::{Archive, TornTail, with_causes},
        verify::{ChainClaim, Extent, VerificationReport, Verifier},
    },
    cli::{
        global::GlobalArgs,
        output::{self, Table, or_dash},
        time::LocalTime,
    },
    config::{self, Flags, KeyringFlag},
    crypto::{Keyring, VerifyingKeys},
    domain::clock::Clock,
    files::text,
    store::{
        admin::{Admin, UndeliveredReport},
        audit::{AuditSnapshot, Decoded, EventFilter},
    },
};

/// How many records are passed from the reader to the verifier at a time.
const BATCH_RECORDS: usize = 1_000;
/// How many times reading a journal is retried at most while a broker changes it.
const MAX_RETRIES: usize = 10;
/// How many batches may wait for the verifier.
const QUEUED_BATCHES: usize = 16;
/// How long a replica that runs may deliver nothing, although it has reported records that are not delivered.
const DELIVERY_PATIENCE: Duration = Duration::from_secs(10);
/// The pause between two readings of what is delivered.
const DELIVERY_POLL: Duration = Duration::from_millis(250);
/// How many differences between rows and their records are shown.
const SHOWN_CHANGES: i64 = 100;

#[derive(Args, Debug)]
pub(super) struct VerifyArgs {
    /// Verify the journal in this state directory instead of the database
    #[arg(long, value_name = "DIR", conflicts_with = "export")]
    journal: Option<PathBuf>,
    /// Verify an output of `audit export` instead of the database; `-` for standard input
    #[arg(long, value_name = "FILE")]
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
    #[arg(long, value_name = "FILE")]
    keys: Option<PathBuf>,
    #[command(flatten)]
    settings: Flags<KeyringFlag>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A value of `--head`: a head, or a file of signed heads.
#[derive(Clone, Debug, PartialEq)]
enum HeadArgument {
    Head { chain: String, head: ChainHead },
    File(PathBuf),
}

impl FromStr for HeadArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((position, hash)) = text.rsplit_once(':').filter(|(_, hash)| hash.len() == 64)
        else {
            return Ok(Self::File(text.into()));
        };
        let malformed = || "neither a file nor CHAIN:SEQ:HASH".to_owned();
        let (chain, seq) = position.rsplit_once(':').ok_or_else(malformed)?;
        let mut bytes = [0; 32];
        hex::decode_to_slice(hash, &mut bytes).map_err(|_| malformed())?;
        let head = ChainHead { seq: seq.parse().map_err(|_| malformed())?, hash: Digest(bytes) };
        Ok(Self::Head { chain: chain.to_owned(), head })
    }
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
        print(&report)?;
        for difference in &differences {
            output::line(difference)?;
        }
    }
    Ok(ExitCode::from(u8::from(!report.holds() || !differences.is_empty())))
}

/// Returns the replicas that have reported records which are not in the database. Waits for those that run and reach
/// the database, as long as they deliver.
async fn undelivered(admin: &Admin) -> anyhow::Result<Vec<UndeliveredReport>> {
    let mut waiting = admin.undelivered_reports().await?;
    let mut progress_at = Instant::now();
    while waiting.iter().any(|it| it.live && it.connected)
        && progress_at.elapsed() < DELIVERY_PATIENCE
    {
        sleep(DELIVERY_POLL).await;
        let now = admin.undelivered_reports().await?;
        // Only what was reported at first is waited for.
        let mut still = Vec::new();
        for report in &waiting {
            let same = now.iter().find(|it| it.chain == report.chain);
            let delivered_seq = same.map_or(report.reported_seq, |it| it.delivered_seq);
            if delivered_seq > report.delivered_seq {
                progress_at = Instant::now();
            }
            if delivered_seq < report.reported_seq {
                let UndeliveredReport { live, connected, .. } = same.unwrap_or(report);
                let (live, connected) = (*live, *connected);
                still.push(UndeliveredReport { delivered_seq, live, connected, ..report.clone() });
            }
        }
        waiting = still;
    }
    Ok(waiting)
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
        let text = text::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        let keys =
            VerifyingKeys::parse(&text).map_err(|fault| anyhow!("{}: {fault}", file.display()))?;
        return Ok(Some(keys));
    }
    let file = config::known_keyring_file(&global.sources(settings.given)?)?;
    Ok(file.map(|file| Keyring::load(&file)).transpose()?.as_ref().map(VerifyingKeys::from))
}

/// The keys and heads against which a log is verified.
struct Evidence {
    keys: Option<VerifyingKeys>,
    /// Heads from the command line.
    trusted: Vec<(String, ChainHead)>,
    /// Checkpoints from files.
    checkpoints: Vec<SignedCheckpoint>,
}

impl Evidence {
    /// Reads the files that `heads` names.
    fn new(keys: Option<VerifyingKeys>, heads: Vec<HeadArgument>) -> anyhow::Result<Self> {
        let (mut trusted, mut checkpoints) = (Vec::new(), Vec::new());
        for head in heads {
            match head {
                HeadArgument::Head { chain, head } => trusted.push((chain, head)),
                HeadArgument::File(file) => {
                    let found = read_checkpoints(&file)?;
                    ensure!(!found.is_empty(), "{} holds no signed head", file.display());
                    checkpoints.extend(found);
                }
            }
        }
        Ok(Self { keys, trusted, checkpoints })
    }

    fn verifier(&self, extent: Extent) -> Verifier {
        let mut verifier = Verifier::new(extent, self.keys.clone());
        for (chain, head) in &self.trusted {
            verifier.add_trusted_head(chain, *head);
        }
        for checkpoint in &self.checkpoints {
            verifier.add_checkpoint(checkpoint);
        }
        verifier
    }

    /// Verifies the database. Records are read and decoded here, and hashed on another thread.
    async fn verify_database(
        self,
        pool: &PgPool,
        undelivered: &[UndeliveredReport],
    ) -> anyhow::Result<VerificationReport> {
        let mut verifier = self.verifier(Extent::Whole);
        verifier.require_signed_heads(Clock::System.now());
        for UndeliveredReport { chain, instance, reported_seq, live, connected, .. } in undelivered
        {
            if *live && !connected {
                output::note(format_args!(
                    "note: replica {instance} has not reached the database for some seconds; it has records up to \
                     {reported_seq} of chain {chain}, which are not delivered yet"
                ));
            } else {
                verifier.add_reported_end(chain, instance, *reported_seq);
            }
        }
        let mut snapshot = AuditSnapshot::open(pool).await?;
        for claim in snapshot.claims().await? {
            match claim {
                Ok(claim) => add_chain(&mut verifier, claim),
                Err(unreadable) => verifier.add_unreadable(&unreadable),
            }
        }
        for receipt in snapshot.receipts().await? {
            match receipt {
                Ok(receipt) => verifier.add_receipt(receipt),
                Err(unreadable) => verifier.add_unreadable(&unreadable),
            }
        }
        for checkpoint in &snapshot.checkpoints().await? {
            match checkpoint {
                Ok(checkpoint) => verifier.add_checkpoint(checkpoint),
                Err(unreadable) => verifier.add_unreadable(unreadable),
            }
        }
        let (batches, mut received) = mpsc::channel::<Vec<Decoded<StoredEvent>>>(QUEUED_BATCHES);
        let verifying = task::spawn_blocking(move || {
            while let Some(batch) = received.blocking_recv() {
                for event in &batch {
                    match event {
                        Ok(event) => verifier.add_record(event),
                        Err(unreadable) => verifier.add_unreadable(unreadable),
                    }
                }
            }
            verifier
        });
        let filter = EventFilter::default();
        let mut events = snapshot.events(&filter).try_chunks(BATCH_RECORDS);
        while let Some(batch) = events.try_next().await.map_err(|error| error.1)? {
            // The verifier can only have panicked; joining it reports that.
            if batches.send(batch).await.is_err() {
                break;
            }
        }
        drop(batches);
        Ok(verifying.await?.finish())
    }

    fn verify_journal(&self, directory: &Path) -> anyhow::Result<VerificationReport> {
        // A running broker changes the journal, so that a fault counts only if it is found twice.
        match retry_while_changing(|| self.verify_journal_once(directory, OnDamage::Stop)) {
            Ok(report) => Ok(report),
            Err(_) => self.verify_journal_once(directory, OnDamage::Report),
        }
    }

    fn verify_journal_once(
        &self,
        directory: &Path,
        on_damage: OnDamage,
    ) -> anyhow::Result<VerificationReport> {
        let mut verifier = self.verifier(Extent::Retained);
        let archive = Archive::open(directory, None)?;
        for fault in archive.damaged() {
            match on_damage {
                OnDamage::Stop => bail!("{}", with_causes(fault)),
                OnDamage::Report => verifier.add_unreadable_line(with_causes(fault)),
            }
        }
        // A tail without a complete record is ignored: a running broker may be writing it.
        if let Some(torn) = archive.torn().filter(|torn| torn.records > 0) {
            let TornTail { chain, last_seq, file, line, records } = torn;
            verifier.add_torn_tail(
                chain,
                *last_seq,
                format!("{file}, line {line}; {records} complete records"),
            );
        }
        for chain in archive.chains() {
            verifier.add_chain(ChainClaim::of(&chain.link), chain.before);
            let name = chain.link.chain.clone();
            let mut reader = archive.reader(chain.link, chain.before);
            loop {
                let events = match (reader.read(), on_damage) {
                    (Ok(events), _) => events,
                    (Err(error), OnDamage::Stop) => return Err(error.into()),
                    (Err(error), OnDamage::Report) => {
                        let (after, why) = (reader.head().seq, with_causes(&error));
                        verifier.add_unreadable_rest(&name, after, why);
                        break;
                    }
                };
                if events.is_empty() {
                    break;
                }
                // The reader has checked the hashes.
                for event in &events {
                    verifier.add_hashed_record(event, true);
                }
            }
        }
        Ok(verifier.finish())
    }

    /// Verifies an export. Lines that cannot be read are faults.
    fn verify_export(&self, file: &Path, whole: bool) -> anyhow::Result<VerificationReport> {
        let mut export = ExportReader::open(file)?;
        let Some(first) = export.next()? else { bail!("{} is empty", file.display()) };
        let extent = match &first {
            Ok(ExportLine::Statement(ExportStatement::AuditExport(header))) if header.whole => {
                Extent::Whole
            }
            _ => Extent::Partial,
        };
        ensure!(
            !whole || extent == Extent::Whole,
            "{} is a part of an audit log, not the whole of one",
            file.display()
        );
        let has_end = matches!(first, Ok(ExportLine::Statement(ExportStatement::AuditExport(_))));
        let mut verifier = self.verifier(extent);
        let (mut records, mut stated) = (0, None);
        let mut next = Some(first);
        while let Some(line) = next {
            match line {
                Ok(ExportLine::Record(event)) => {
                    records += 1;
                    verifier.add_record(&event);
                }
                Ok(ExportLine::Statement(ExportStatement::End { records })) => {
                    stated = Some(records);
                }
                Ok(ExportLine::Statement(statement)) => add_statement(&mut verifier, statement),
                Err(UnreadableLine(why)) => verifier.add_unreadable_line(why),
            }
            next = export.next()?;
        }
        let file = file.display();
        match stated {
            Some(stated) if stated != records => verifier.add_unreadable_line(format!(
                "{file}: it ends after {records} records of {stated}"
            )),
            None if has_end => verifier.add_unreadable_line(format!(
                "{file}: its last line is missing: the file is truncated"
            )),
            _ => {}
        }
        Ok(verifier.finish())
    }
}

fn add_statement(verifier: &mut Verifier, statement: ExportStatement) {
    match statement {
        ExportStatement::AuditExport(_) | ExportStatement::End { .. } => {}
        ExportStatement::Chain(claim) => add_chain(verifier, claim),
        ExportStatement::PruningReceipt(receipt) => verifier.add_receipt(receipt),
        ExportStatement::Checkpoint(checkpoint) => verifier.add_checkpoint(&checkpoint),
        ExportStatement::Unreadable(row) => verifier.add_unreadable(&row),
    }
}

/// What to do with a part of a journal that cannot be read.
#[derive(Clone, Copy)]
enum OnDamage {
    /// Fail, so that the journal is read again.
    Stop,
    /// Report it as a fault, and go on with the next chain.
    Report,
}

/// Calls `read`, and again while it fails with another error than the time before, up to [`MAX_RETRIES`]
/// times.
///
/// A running broker deletes segments that were just listed, and truncates those that it abandons, so that
/// reading its journal can fail although nothing is wrong. It deletes the oldest segments, which are read
/// first, so that a failed attempt takes little time.
fn retry_while_changing<T>(read: impl Fn() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let mut last = None;
    for _ in 0..MAX_RETRIES {
        match read() {
            Err(error) => {
                let text = format!("{error:#}");
                if last.as_ref() == Some(&text) {
                    return Err(error);
                }
                last = Some(text);
            }
            read => return read,
        }
    }
    read()
}

fn add_chain(verifier: &mut Verifier, claim: ChainClaim) {
    let root = claim.root();
    verifier.add_chain(claim, root);
}

fn print(report: &VerificationReport) -> anyhow::Result<()> {
    for finding in &report.findings {
        match finding.chain.as_str() {
            "" => output::line(&finding.fault)?,
            chain => output::line(format_args!("chain {chain}: {}", finding.fault))?,
        }
    }
    let unlisted = report.faults - report.findings.len() as u64;
    if unlisted > 0 {
        output::line(format_args!("and {unlisted} more"))?;
    }
    let mut table =
        Table::new(["CHAIN", "RECORDS", "REMOVED", "LAST", "SIGNED TO", "FROM", "TO", "HOLDS"]);
    for chain in &report.chains {
        table.row([
            chain.chain.clone(),
            chain.records.to_string(),
            chain.removed.to_string(),
            chain.last_seq.to_string(),
            or_dash(Some(chain.signed_seq).filter(|seq| *seq > 0)),
            or_dash(chain.times.map(|(from, _)| LocalTime(from))),
            or_dash(chain.times.map(|(_, to)| LocalTime(to))),
            if chain.faults == 0 { "yes" } else { "NO" }.into(),
        ]);
    }
    table.print("there are no chains")?;
    for notice in &report.notices {
        output::note(format_args!("note: {notice}"));
    }
    let (records, chains) = (report.records(), report.chains.len());
    let holds = match (report.holds(), report.signatures_checked) {
        (false, _) => "it does NOT hold",
        (true, true) => "all of it holds",
        (true, false) => "it holds as far as can be checked without keys",
    };
    output::note(format_args!("{records} records in {chains} chains: {holds}"));
    Ok(())
}

fn in_json(report: &VerificationReport, differences: &[String]) -> Value {
    let findings = report.findings.iter().map(|finding| {
        json!({
            "chain": finding.chain, "seq": finding.fault.seq(), "fault": finding.fault.name(),
            "says": finding.fault.to_string(),
        })
    });
    json!({
        "holds": report.holds(), "signatures_checked": report.signatures_checked,
        "records": report.records(), "faults": report.faults,
        "findings": findings.collect::<Vec<_>>(), "notices": report.notices,
        "chains": report.chains, "unrecorded_changes": differences,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_is_retried_until_it_fails_twice_in_the_same_way() {
        let tries = |outcomes: &[Result<u8, &'static str>]| {
            let tried = std::cell::Cell::new(0);
            let read = retry_while_changing(|| {
                let outcome = outcomes[tried.get()];
                tried.set(tried.get() + 1);
                outcome.map_err(anyhow::Error::msg)
            });
            (read.map_err(|error| error.to_string()), tried.get())
        };
        assert_eq!(tries(&[Ok(1)]), (Ok(1), 1));
        assert_eq!(tries(&[Err("a"), Ok(1)]), (Ok(1), 2));
        assert_eq!(tries(&[Err("a"), Err("a"), Ok(1)]), (Err("a".into()), 2));
        assert_eq!(tries(&[Err("a"), Err("b"), Err("c"), Ok(1)]), (Ok(1), 4));
        let always_different =
            ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"].map(Err);
        assert_eq!(tries(&always_different), (Err("k".into()), 11));
    }

    #[test]
    fn a_head_is_a_position_with_a_hash_or_a_file() {
        let hash = "ab".repeat(32);
        let parse = |text: &str| text.parse::<HeadArgument>();
        let head = ChainHead { seq: 12, hash: Digest([0xab; 32]) };
        let expected = HeadArgument::Head { chain: "c00000001-0123456789abcdef".into(), head };
        assert_eq!(parse(&format!("c00000001-0123456789abcdef:12:{hash}")), Ok(expected));
        assert_eq!(parse("/a:b/heads"), Ok(HeadArgument::File("/a:b/heads".into())));
        for wrong in
            [format!("c1:x:{hash}"), format!("c1:{hash}"), format!("c1:1:{}", "x".repeat(64))]
        {
            assert!(parse(&wrong).is_err(), "{wrong}");
        }
    }
}
