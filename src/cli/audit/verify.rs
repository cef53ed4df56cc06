//! `audit verify`.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    str::FromStr,
};

use anyhow::{Context, anyhow, bail, ensure};
use clap::Args;
use futures_util::TryStreamExt;
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::{sync::mpsc, task};

use super::lines::{Lines, heads_in};
use crate::{
    audit::{
        chain::{ChainHead, Digest, StoredEvent},
        checkpoint::SignedCheckpoint,
        export::{Line, Statement},
        journal::{Archive, TornTail},
        verify::{Claim, Extent, Verdict, Verifier},
    },
    cli::{
        Global,
        output::{self, Table, or_dash},
        time::LocalTime,
    },
    config::{self, Flags, KeyringFlag},
    crypto::{Keyring, VerifyingKeys},
    store::audit::{EventFilter, Ledger},
};

/// How many records go from the reader to the verifier at once.
const BATCH: usize = 1_000;
/// How often a journal that changes meanwhile is read, before a last time.
const MOST_READINGS: usize = 10;
/// How many such batches may wait.
const BATCHES: usize = 16;

#[derive(Args, Debug)]
pub(super) struct VerifyArgs {
    /// Proves the journal in this state directory, and not the database
    #[arg(long, value_name = "DIR", conflicts_with = "export")]
    journal: Option<PathBuf>,
    /// Proves what `audit export` wrote, `-` for standard input, and not the database
    #[arg(long, value_name = "FILE")]
    export: Option<PathBuf>,
    /// Demands that the export holds all that there was, and not a part
    #[arg(long, requires = "export")]
    whole: bool,
    /// A head that was kept elsewhere: a file of them, such as a copy of audit-heads.jsonl or the
    /// broker's JSON log, or CHAIN:SEQ:HASH. Any number of times
    #[arg(long = "head", value_name = "HEAD")]
    heads: Vec<KnownHead>,
    /// The public keys of signatures, as `keys public --signing` prints them; else those of the
    /// keyring, if there is one
    #[arg(long, value_name = "FILE")]
    keys: Option<PathBuf>,
    #[command(flatten)]
    settings: Flags<KeyringFlag>,
    /// Prints JSON
    #[arg(long)]
    json: bool,
}

/// A head, or where heads are.
#[derive(Clone, Debug, PartialEq)]
enum KnownHead {
    Here { chain: String, head: ChainHead },
    In(PathBuf),
}

impl FromStr for KnownHead {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((place, hash)) = text.rsplit_once(':').filter(|(_, hash)| hash.len() == 64) else {
            return Ok(Self::In(text.into()));
        };
        let malformed = || "neither a file nor CHAIN:SEQ:HASH".to_owned();
        let (chain, seq) = place.rsplit_once(':').ok_or_else(malformed)?;
        let mut bytes = [0; 32];
        hex::decode_to_slice(hash, &mut bytes).map_err(|_| malformed())?;
        let head = ChainHead { seq: seq.parse().map_err(|_| malformed())?, hash: Digest(bytes) };
        Ok(Self::Here { chain: chain.to_owned(), head })
    }
}

pub(super) async fn run(global: &Global, args: VerifyArgs) -> anyhow::Result<ExitCode> {
    let keys = keys(global, args.keys.as_deref(), args.settings)?;
    let proof = Proof::new(keys, args.heads)?;
    let verdict = match (args.journal, args.export) {
        (Some(directory), _) => {
            task::spawn_blocking(move || proof.of_journal(&directory)).await??
        }
        (None, Some(file)) => {
            task::spawn_blocking(move || proof.of_export(&file, args.whole)).await??
        }
        (None, None) => proof.of_database(global.admin(None).await?.pool()).await?,
    };
    if args.json {
        output::json(&in_json(&verdict))?;
    } else {
        print(&verdict)?;
    }
    Ok(ExitCode::from(u8::from(!verdict.holds())))
}

/// The keys to check signatures with; none if none are told of.
fn keys(
    global: &Global,
    file: Option<&Path>,
    settings: Flags<KeyringFlag>,
) -> anyhow::Result<Option<VerifyingKeys>> {
    if let Some(file) = file {
        let text = std::fs::read_to_string(file)
            .with_context(|| format!("cannot read {}", file.display()))?;
        let keys =
            VerifyingKeys::parse(&text).map_err(|fault| anyhow!("{}: {fault}", file.display()))?;
        return Ok(Some(keys));
    }
    let file = config::known_keyring_file(&global.sources(settings.given)?)?;
    Ok(file.map(|file| Keyring::load(&file)).transpose()?.as_ref().map(VerifyingKeys::from))
}

/// What a proof is made with.
struct Proof {
    keys: Option<VerifyingKeys>,
    given: Vec<(String, ChainHead)>,
    signed: Vec<SignedCheckpoint>,
}

impl Proof {
    /// Reads the heads that are in files.
    fn new(keys: Option<VerifyingKeys>, heads: Vec<KnownHead>) -> anyhow::Result<Self> {
        let (mut given, mut signed) = (Vec::new(), Vec::new());
        for head in heads {
            match head {
                KnownHead::Here { chain, head } => given.push((chain, head)),
                KnownHead::In(file) => {
                    let heads = heads_in(&file)?;
                    ensure!(!heads.is_empty(), "{} holds no signed head", file.display());
                    signed.extend(heads);
                }
            }
        }
        Ok(Self { keys, given, signed })
    }

    fn begin(&self, extent: Extent) -> Verifier {
        let mut verifier = Verifier::new(extent, self.keys.clone());
        for (chain, head) in &self.given {
            verifier.unsigned_head(chain, *head);
        }
        for head in &self.signed {
            verifier.head(head);
        }
        verifier
    }

    /// Reads and decodes on one thread what another hashes.
    async fn of_database(self, pool: &PgPool) -> anyhow::Result<Verdict> {
        let mut verifier = self.begin(Extent::Whole);
        let mut ledger = Ledger::open(pool).await?;
        for claim in ledger.claims().await? {
            claimed(&mut verifier, claim);
        }
        for cut in ledger.cuts().await? {
            verifier.cut(cut);
        }
        for head in &ledger.heads().await? {
            verifier.head(head);
        }
        let (batches, mut taken) = mpsc::channel::<Vec<StoredEvent>>(BATCHES);
        let verifying = task::spawn_blocking(move || {
            while let Some(batch) = taken.blocking_recv() {
                for event in &batch {
                    verifier.record(event);
                }
            }
            verifier
        });
        let filter = EventFilter::default();
        let mut events = ledger.events(&filter).try_chunks(BATCH);
        while let Some(batch) = events.try_next().await.map_err(|error| error.1)? {
            // Its end can only be a panic, which the join tells.
            if batches.send(batch).await.is_err() {
                break;
            }
        }
        drop(batches);
        Ok(verifying.await?.finish())
    }

    fn of_journal(&self, directory: &Path) -> anyhow::Result<Verdict> {
        unless_twice(|| self.of_journal_now(directory))
    }

    fn of_journal_now(&self, directory: &Path) -> anyhow::Result<Verdict> {
        let mut verifier = self.begin(Extent::Kept);
        let archive = Archive::open(directory, None)?;
        // A broker that writes there may be in the middle of a line.
        if let Some(torn) = archive.torn().filter(|torn| torn.records > 0) {
            let TornTail { chain, last_seq, file, line, records } = torn;
            verifier.torn(
                chain,
                *last_seq,
                format!("{file}, line {line}; {records} whole records"),
            );
        }
        for chain in archive.chains() {
            verifier.chain(Claim::of(&chain.link), chain.before);
            let mut reader = archive.reader(chain.link, chain.before);
            loop {
                let events = reader.read()?;
                if events.is_empty() {
                    break;
                }
                // The reader has compared their hashes.
                for event in &events {
                    verifier.hashed_record(event, true);
                }
            }
        }
        Ok(verifier.finish())
    }

    fn of_export(&self, file: &Path, whole: bool) -> anyhow::Result<Verdict> {
        let mut lines = Lines::open(file)?;
        let first = lines.next()?;
        let extent = match &first {
            Some(Line::Statement(Statement::AuditExport(opening))) if opening.whole => {
                Extent::Whole
            }
            Some(_) => Extent::Part,
            None => bail!("{} is empty", file.display()),
        };
        ensure!(
            !whole || extent == Extent::Whole,
            "{} is a part of an audit log, not the whole of one",
            file.display()
        );
        let has_end = matches!(first, Some(Line::Statement(Statement::AuditExport(_))));
        let mut verifier = self.begin(extent);
        let (mut records, mut ended) = (0, !has_end);
        while let Some(line) = lines.next()? {
            match line {
                Line::Record(event) => {
                    records += 1;
                    verifier.record(&event);
                }
                Line::Statement(Statement::AuditExport(_)) => {}
                Line::Statement(Statement::Chain(claim)) => claimed(&mut verifier, claim),
                Line::Statement(Statement::PruningReceipt(cut)) => verifier.cut(cut),
                Line::Statement(Statement::ChainHead(head)) => verifier.head(&head),
                Line::Statement(Statement::End { records: told }) if told == records => {
                    ended = true;
                }
                Line::Statement(Statement::End { records: told }) => {
                    bail!("{}: it ends after {records} records of {told}", file.display())
                }
            }
        }
        if !ended {
            bail!("{}: its last line is missing: it was cut short", file.display());
        }
        Ok(verifier.finish())
    }
}

/// Tries `read` again as long as it fails in another way each time, some times at most. A broker that
/// writes to a journal removes segments that somebody has just listed, and cuts those that it abandons.
/// What it removes is the oldest, which is read first: what failed has not been read for long.
fn unless_twice<T>(read: impl Fn() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let mut last = None;
    for _ in 0..MOST_READINGS {
        match read() {
            Err(error) if last.replace(error.to_string()) != Some(error.to_string()) => {}
            done => return done,
        }
    }
    read()
}

fn claimed(verifier: &mut Verifier, claim: Claim) {
    let root = claim.root();
    verifier.chain(claim, root);
}

fn print(verdict: &Verdict) -> anyhow::Result<()> {
    for finding in &verdict.findings {
        output::line(format_args!("chain {}: {}", finding.chain, finding.fault))?;
    }
    let untold = verdict.faults - verdict.findings.len() as u64;
    if untold > 0 {
        output::line(format_args!("and {untold} more"))?;
    }
    let mut table =
        Table::new(["CHAIN", "RECORDS", "REMOVED", "LAST", "SIGNED TO", "FROM", "TO", "HOLDS"]);
    for chain in &verdict.chains {
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
    for notice in &verdict.notices {
        output::note(format_args!("note: {notice}"));
    }
    let (records, chains) = (verdict.records(), verdict.chains.len());
    let holds = match (verdict.holds(), verdict.signatures_checked) {
        (false, _) => "it does NOT hold",
        (true, true) => "all of it holds",
        (true, false) => "it holds as far as can be told without keys",
    };
    output::note(format_args!("{records} records in {chains} chains: {holds}"));
    Ok(())
}

fn in_json(verdict: &Verdict) -> Value {
    let findings = verdict.findings.iter().map(|finding| {
        json!({
            "chain": finding.chain, "seq": finding.fault.seq(), "fault": finding.fault.name(),
            "says": finding.fault.to_string(),
        })
    });
    json!({
        "holds": verdict.holds(), "signatures_checked": verdict.signatures_checked,
        "records": verdict.records(), "faults": verdict.faults,
        "findings": findings.collect::<Vec<_>>(), "notices": verdict.notices,
        "chains": verdict.chains,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_twice_alike_has_failed_and_what_changes_meanwhile_is_read_anew() {
        let tries = |outcomes: &[Result<u8, &'static str>]| {
            let tried = std::cell::Cell::new(0);
            let read = unless_twice(|| {
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
        let ever_another = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"].map(Err);
        assert_eq!(tries(&ever_another), (Err("k".into()), 11));
    }

    #[test]
    fn a_head_is_a_place_in_a_chain_or_a_file() {
        let hash = "ab".repeat(32);
        let parse = |text: &str| text.parse::<KnownHead>();
        let head = ChainHead { seq: 12, hash: Digest([0xab; 32]) };
        let here = KnownHead::Here { chain: "c00000001-0123456789abcdef".into(), head };
        assert_eq!(parse(&format!("c00000001-0123456789abcdef:12:{hash}")), Ok(here));
        assert_eq!(parse("/a:b/heads"), Ok(KnownHead::In("/a:b/heads".into())));
        for wrong in
            [format!("c1:x:{hash}"), format!("c1:{hash}"), format!("c1:1:{}", "x".repeat(64))]
        {
            assert!(parse(&wrong).is_err(), "{wrong}");
        }
    }
}
