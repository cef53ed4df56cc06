//! The verification of a log in the database, in a journal or in an export, against keys and heads.

use std::path::Path;

use anyhow::{bail, ensure};
use futures_util::TryStreamExt;
use sqlx::PgPool;
use tokio::{sync::mpsc, task};

use super::{
    super::export_reader::{ExportReader, UnreadableLine, read_checkpoints},
    head_argument::HeadArgument,
};
use crate::{
    audit::{
        chain::{ChainHead, StoredEvent},
        checkpoint::SignedCheckpoint,
        export::{ExportLine, ExportStatement},
        journal::{Archive, TornTail, with_causes},
        verify::{ChainClaim, Extent, VerificationReport, Verifier},
    },
    cli::output,
    crypto::VerifyingKeys,
    domain::clock::Clock,
    files::given_path::shown,
    store::{
        admin::UndeliveredReport,
        audit::{AuditSnapshot, Decoded, EventFilter},
    },
};

/// How many records are passed from the reader to the verifier at a time.
const BATCH_RECORDS: usize = 1_000;
/// How many times reading a journal is retried at most while a broker changes it.
const MAX_RETRIES: usize = 10;
/// How many batches may wait for the verifier.
const QUEUED_BATCHES: usize = 16;

/// The keys and heads against which a log is verified.
pub(super) struct Evidence {
    keys: Option<VerifyingKeys>,
    /// Heads from the command line.
    trusted: Vec<(String, ChainHead)>,
    /// Checkpoints from files.
    checkpoints: Vec<SignedCheckpoint>,
}

impl Evidence {
    /// Reads the files that `heads` names.
    pub(super) fn new(
        keys: Option<VerifyingKeys>,
        heads: Vec<HeadArgument>,
    ) -> anyhow::Result<Self> {
        let (mut trusted, mut checkpoints) = (Vec::new(), Vec::new());
        for head in heads {
            match head {
                HeadArgument::Head { chain, head } => trusted.push((chain, head)),
                HeadArgument::File(file) => {
                    let found = read_checkpoints(&file)?;
                    ensure!(!found.is_empty(), "{} holds no signed head", shown(&file));
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
    pub(super) async fn verify_database(
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

    pub(super) fn verify_journal(&self, directory: &Path) -> anyhow::Result<VerificationReport> {
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
    pub(super) fn verify_export(
        &self,
        file: &Path,
        whole: bool,
    ) -> anyhow::Result<VerificationReport> {
        let mut export = ExportReader::open(file)?;
        let Some(first) = export.next()? else { bail!("{} is empty", shown(file)) };
        let extent = match &first {
            Ok(ExportLine::Statement(ExportStatement::AuditExport(header))) if header.whole => {
                Extent::Whole
            }
            _ => Extent::Partial,
        };
        ensure!(
            !whole || extent == Extent::Whole,
            "{} is a part of an audit log, not the whole of one",
            shown(file)
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
        let file = shown(file);
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
}
