//! What a replica has seen of its database, and what follows if the database says otherwise.
//!
//! Rows are the evidence, not numbers of transactions: after a crash or a promotion Postgres uses such numbers
//! again. Rows that were seen in a verified database are there for ever, unless it went back.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::Path,
};

use serde::{Deserialize, Serialize};

use super::mismatch::Difference;
use crate::{
    audit::chain::{ChainHead, Digest},
    files::atomic,
    store::{
        deployment::DatabaseIdentity,
        history::{DatabaseHistory, SeenChange, ServerPosition},
    },
};

/// The most changes that are remembered: those that were committed last.
const MAX_CHANGES: usize = 256;
/// The most tokens that are remembered: those that were issued last.
const MAX_TOKENS: usize = 256;
/// By how many bytes the write-ahead log may be shorter after a crash: a record that was not complete is
/// overwritten.
const INCOMPLETE_RECORD: i64 = 1 << 20;

/// What a replica has seen of its database. The state directory keeps it for the next start.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(super) struct Evidence {
    pub(super) deployment: String,
    pub(super) epoch: i64,
    /// Where the database was, and how far the server's log got.
    #[serde(default)]
    pub(super) server: Option<ServerPosition>,
    /// The last record of each of this replica's audit chains that the database had.
    #[serde(default)]
    pub(super) delivered: BTreeMap<String, Delivered>,
    /// Changes in the order in which they were seen.
    #[serde(default)]
    pub(super) changes: Vec<SeenChange>,
    /// Accounts with the generation of their stored token.
    #[serde(default)]
    pub(super) tokens: BTreeMap<i64, i64>,
}

/// The last delivered record of a chain.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(super) struct Delivered {
    pub(super) seq: i64,
    pub(super) hash: Digest,
}

impl From<ChainHead> for Delivered {
    fn from(ChainHead { seq, hash }: ChainHead) -> Self {
        Self { seq, hash }
    }
}

/// What follows from a comparison of the database with the evidence.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Verdict {
    /// The database continues the history that this replica knows.
    Continues,
    /// Another replica accepted a restored database since. It differs in these points, perhaps in none.
    AcceptedElsewhere(Vec<Difference>),
    /// The database differs in these points, at least one.
    Differs(Vec<Difference>),
}

/// Compares a database with what was seen of it before. `delivered` has the last sequence number that the
/// journal delivered of each chain, and `upstream` is the one of the settings.
pub(super) fn judge(
    remembered: Option<&Evidence>,
    delivered: &BTreeMap<String, i64>,
    found: &DatabaseHistory,
    upstream: &str,
) -> Verdict {
    let mut differences = Vec::new();
    let identity = &found.deployment.identity;
    let foreign = remembered.is_some_and(|it| it.deployment != identity.id);
    if foreign {
        differences.push(Difference::OtherDeployment);
    }
    if !foreign && remembered.is_some_and(|it| it.epoch > identity.epoch) {
        differences.push(Difference::Superseded);
    }
    // The row that says where the database was used last was deleted.
    let found_elsewhere = found.identity_is_missing
        && !remembered
            .and_then(|it| it.server.as_ref())
            .is_some_and(|seen| seen.is_same_place(&found.server));
    if found.deployment.moved || found_elsewhere {
        differences.push(Difference::Moved);
    }
    if found.deployment.upstream != upstream {
        let (theirs, ours) = (found.deployment.upstream.clone(), upstream.to_owned());
        differences.push(Difference::OtherUpstream { theirs, ours });
    }
    if !foreign {
        let missing = missing_records(delivered, found);
        if missing > 0 {
            differences.push(Difference::Older { records: missing });
        }
        if let Some(remembered) = remembered {
            add_lost(remembered, found, &mut differences);
        }
    }
    let accepted_elsewhere = !foreign && remembered.is_some_and(|it| it.epoch < identity.epoch);
    if accepted_elsewhere && differences.iter().all(Difference::is_older_state) {
        Verdict::AcceptedElsewhere(differences)
    } else if differences.is_empty() {
        Verdict::Continues
    } else {
        Verdict::Differs(differences)
    }
}

/// Adds what `found` lacks of the evidence.
fn add_lost(remembered: &Evidence, found: &DatabaseHistory, differences: &mut Vec<Difference>) {
    let differs = |(chain, seen): &(&String, &Delivered)| {
        found.delivered.get(*chain).is_some_and(|it| it.seq == seen.seq && it.hash != seen.hash)
    };
    let chains: Vec<_> =
        remembered.delivered.iter().filter(differs).map(|(chain, _)| chain.clone()).collect();
    if !chains.is_empty() {
        differences.push(Difference::OtherRecords { chains });
    }
    let is_there = |seen: &&SeenChange| found.known_changes.get(&seen.id) == Some(&seen.digest);
    let changes: Vec<_> = remembered
        .changes
        .iter()
        .rev()
        .filter(|seen| !is_there(seen))
        .map(|seen| format!("{} {}", seen.id, seen.what))
        .collect();
    if !changes.is_empty() {
        differences.push(Difference::LostChanges { changes });
    }
    if let Some(accounts) = found.older_tokens.filter(|accounts| *accounts > 0) {
        differences.push(Difference::OlderTokens { accounts });
    }
    let Some(seen) = remembered.server.as_ref().filter(|seen| seen.is_same_place(&found.server))
    else {
        return;
    };
    let shorter = seen.wal.zip(found.server.wal).map_or(0, |(seen, found)| seen - found);
    match seen.timeline.zip(found.server.timeline) {
        Some((known, found)) if found < known => {
            differences.push(Difference::OlderTimeline { found, known });
        }
        // Another timeline may have begun before the end of the one that was seen, if only records of no
        // consequence came after. What matters of them is proven by rows.
        Some((known, found)) if found > known => {}
        _ if shorter > INCOMPLETE_RECORD => {
            differences.push(Difference::ShorterLog { bytes: shorter });
        }
        _ => {}
    }
}

impl ServerPosition {
    /// Whether both are of the same database, in the same server or in one that was copied from it.
    fn is_same_place(&self, other: &Self) -> bool {
        self.system_identifier == other.system_identifier && self.database_oid == other.database_oid
    }
}

/// Returns how many delivered records the database lacks. `delivered` has the last sequence number that
/// the journal delivered of each chain. A chain whose row is malformed proves nothing.
fn missing_records(delivered: &BTreeMap<String, i64>, found: &DatabaseHistory) -> i64 {
    let missing = |(chain, seq): (&String, &i64)| {
        seq.saturating_sub(found.delivered.get(chain).map_or(0, |head| head.seq)).max(0)
    };
    let readable = delivered.iter().filter(|(chain, _)| !found.malformed_chains.contains(*chain));
    readable.map(missing).fold(0, i64::saturating_add)
}

impl Evidence {
    /// Returns the evidence after a database was found to continue `before`, or was accepted, which is `None`
    /// then.
    pub(super) fn after(before: Option<Self>, found: &DatabaseHistory) -> Self {
        let (changes, tokens, mut delivered) = before
            .map(|before| (before.changes, before.tokens, before.delivered))
            .unwrap_or_default();
        // What is known of a chain remains while its row is malformed.
        delivered.retain(|chain, _| found.malformed_chains.contains(chain));
        delivered
            .extend(found.delivered.iter().map(|(chain, head)| (chain.clone(), (*head).into())));
        let mut after = Self {
            deployment: found.deployment.identity.id.clone(),
            epoch: found.deployment.identity.epoch,
            server: Some(found.server.clone()),
            delivered,
            changes,
            tokens,
        };
        after.add_changes(found.new_changes.iter().cloned());
        after
    }

    /// Adds changes that were seen in the verified database. One that is known already is left as it is.
    pub(super) fn add_changes(&mut self, seen: impl IntoIterator<Item = SeenChange>) {
        let known: BTreeSet<_> = self.changes.iter().map(|seen| seen.id).collect();
        self.changes.extend(seen.into_iter().filter(|new| !known.contains(&new.id)));
        self.changes.drain(..self.changes.len().saturating_sub(MAX_CHANGES));
    }

    /// Returns the identity of the database if it can be recognised also without the row that holds it: by where
    /// it is, and by rows that no other database has.
    pub(super) fn recognisable_identity(&self) -> Option<DatabaseIdentity> {
        let has_rows = !self.delivered.is_empty() || !self.changes.is_empty();
        let identity = || DatabaseIdentity { id: self.deployment.clone(), epoch: self.epoch };
        (self.server.is_some() && has_rows).then(identity)
    }

    /// Whether `found` is in the same uninterrupted run of the server in which the database was last seen, and no
    /// further back. Then nothing can have been lost, whatever the tables hold.
    pub(super) fn is_same_run(&self, found: &ServerPosition) -> bool {
        self.server.as_ref().is_some_and(|seen| {
            seen.is_same_place(found)
                && seen.started_at == found.started_at
                && seen.timeline == found.timeline
                && seen.wal <= found.wal
        })
    }

    /// Returns the timelines of the server in which the database was last seen, and of `found`, if `found` is a primary
    /// that was promoted after that one: then the present server is an old primary.
    pub(super) fn overtaken_by(&self, found: &ServerPosition) -> Option<(i64, i64)> {
        let seen = self.server.as_ref().filter(|seen| seen.is_same_place(found))?;
        seen.timeline.zip(found.timeline).filter(|(seen, found)| seen < found)
    }

    /// Adds accounts with the generation of the token that was seen in the database.
    pub(super) fn note_tokens(&mut self, mut seen: Vec<(i64, i64)>) {
        keep_latest(&mut seen);
        for (account, generation) in seen {
            let known = self.tokens.entry(account).or_insert(generation);
            *known = generation.max(*known);
        }
        if self.tokens.len() > MAX_TOKENS {
            let mut tokens = std::mem::take(&mut self.tokens).into_iter().collect();
            keep_latest(&mut tokens);
            self.tokens.extend(tokens);
        }
    }

    /// Whether the next start would judge differently if it had `other` instead of this. The position of the
    /// log, which moves all the time, does not count alone.
    pub(super) fn differs_from(&self, other: &Self) -> bool {
        let timeline = |it: &Self| it.server.as_ref().map(|server| server.timeline);
        timeline(self) != timeline(other)
            || self.epoch != other.epoch
            || self.deployment != other.deployment
            || self.delivered != other.delivered
            || self.changes != other.changes
            || self.tokens != other.tokens
    }

    /// Reads the file at `path`; returns `None` if there is none. Blocks on disk.
    pub(super) fn read(path: &Path) -> io::Result<Option<Self>> {
        match fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|error| {
                // The message of `error` may quote the file.
                let position = format!("line {}, column {}", error.line(), error.column());
                io::Error::new(io::ErrorKind::InvalidData, format!("malformed at {position}"))
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Replaces the file at `path` as a whole, so that a crash leaves the old or the new content. Blocks on
    /// disk.
    pub(super) fn write(&self, path: &Path) -> io::Result<()> {
        atomic::replace(path, &serde_json::to_vec(self)?)
    }
}

/// Keeps the tokens that were issued last. A generation begins with the time of the issue.
fn keep_latest(tokens: &mut Vec<(i64, i64)>) {
    if tokens.len() > MAX_TOKENS {
        tokens.select_nth_unstable_by_key(MAX_TOKENS, |(_, generation)| Reverse(*generation));
        tokens.truncate(MAX_TOKENS);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::store::deployment::Deployment;

    const STAGING: &str = "staging";

    fn change(id: i64) -> SeenChange {
        SeenChange { id, digest: format!("digest {id}"), what: "grants delete demo".into() }
    }

    fn head(seq: i64) -> ChainHead {
        ChainHead { seq, hash: Digest([u8::try_from(seq % 251).unwrap(); 32]) }
    }

    fn server(timeline: i64, wal: i64) -> ServerPosition {
        ServerPosition {
            system_identifier: 7,
            database_oid: 5,
            started_at: 0,
            timeline: Some(timeline),
            wal: Some(wal),
        }
    }

    /// A database at some time of its life: the changes 1 to `changes`, and `records` of chain `c`.
    fn database(timeline: i64, wal: i64, records: i64, changes: i64) -> DatabaseHistory {
        DatabaseHistory {
            deployment: Deployment {
                identity: DatabaseIdentity { id: "ours".into(), epoch: 1 },
                upstream: STAGING.into(),
                moved: false,
            },
            identity_is_missing: false,
            server: server(timeline, wal),
            delivered: [("c".to_owned(), head(records))].into(),
            known_changes: (1..=changes).map(|id| (id, change(id).digest)).collect(),
            new_changes: (1..=changes).map(change).collect(),
            malformed_chains: BTreeSet::new(),
            older_tokens: Some(0),
            snapshot: String::new(),
        }
    }

    fn with_epoch(epoch: i64, mut database: DatabaseHistory) -> DatabaseHistory {
        database.deployment.identity.epoch = epoch;
        database
    }

    /// Judges `found` by a replica that has seen `seen`.
    fn verdict(seen: &DatabaseHistory, found: &DatabaseHistory) -> Verdict {
        let delivered = [("c".to_owned(), seen.delivered["c"].seq)].into();
        judge(Some(&Evidence::after(None, seen)), &delivered, found, STAGING)
    }

    fn differences(seen: &DatabaseHistory, found: &DatabaseHistory) -> Vec<Difference> {
        match verdict(seen, found) {
            Verdict::Differs(differences) => differences,
            other => panic!("{other:?}"),
        }
    }

    const MIB: i64 = 1 << 20;

    #[test]
    fn a_crash_a_restart_and_a_promotion_without_loss_continue_the_history() {
        let seen = database(1, 100 * MIB, 10, 3);
        for found in [
            seen.clone(),
            database(1, 101 * MIB, 12, 4),
            // A record that was not complete at the crash is gone.
            database(1, 100 * MIB - 8_000, 10, 3),
            database(2, 100 * MIB, 10, 3),
            // The standby lacked only records of no consequence.
            database(2, 90 * MIB, 10, 3),
            database(5, 300 * MIB, 20, 9),
        ] {
            assert_eq!(verdict(&seen, &found), Verdict::Continues, "{:?}", found.server);
        }
        assert_eq!(judge(None, &BTreeMap::new(), &seen, STAGING), Verdict::Continues);
    }

    #[test]
    fn whatever_was_lost_is_named() {
        let seen = database(1, 100 * MIB, 10, 3);
        let lost = |changes: &[i64]| Difference::LostChanges {
            changes: changes.iter().map(|id| format!("{id} grants delete demo")).collect(),
        };
        let older = |records| Difference::Older { records };
        assert_eq!(differences(&seen, &database(2, 200 * MIB, 10, 2)), [lost(&[3])]);
        assert_eq!(differences(&seen, &database(2, 200 * MIB, 9, 3)), [older(1)]);
        assert_eq!(differences(&seen, &database(2, 1, 0, 0)), [older(10), lost(&[3, 2, 1])]);
        // A disk was set back to an earlier snapshot.
        let shorter = Difference::ShorterLog { bytes: 90 * MIB };
        assert_eq!(differences(&seen, &database(1, 10 * MIB, 10, 3)), [shorter]);
        // Other rows took the numbers of those that were lost.
        let mut other = database(2, 200 * MIB, 10, 3);
        other.known_changes.insert(3, "another".into());
        other.delivered.insert("c".into(), ChainHead { seq: 10, hash: Digest::ZERO });
        other.older_tokens = Some(2);
        let chains = vec!["c".to_owned()];
        let expected = [
            Difference::OtherRecords { chains },
            lost(&[3]),
            Difference::OlderTokens { accounts: 2 },
        ];
        assert_eq!(differences(&seen, &other), expected);
    }

    #[test]
    fn a_server_was_overtaken_by_one_of_the_same_origin_on_a_later_timeline_alone() {
        let evidence = Evidence::after(None, &database(2, 100, 0, 0));
        assert_eq!(evidence.overtaken_by(&server(3, 50)), Some((2, 3)));
        assert_eq!(evidence.overtaken_by(&server(2, 200)), None);
        assert_eq!(evidence.overtaken_by(&server(1, 200)), None, "an old primary");
        let other = ServerPosition { system_identifier: 9, ..server(3, 50) };
        assert_eq!(evidence.overtaken_by(&other), None);
        let silent = ServerPosition { timeline: None, ..server(3, 50) };
        assert_eq!(evidence.overtaken_by(&silent), None);
    }

    #[test]
    fn an_old_primary_is_recognised_by_its_timeline() {
        let seen = database(3, 100 * MIB, 10, 3);
        let expected = Difference::OlderTimeline { found: 2, known: 3 };
        assert_eq!(differences(&seen, &database(2, 500 * MIB, 10, 3)), [expected]);
    }

    #[test]
    fn a_database_is_recognised_by_its_id_its_epoch_its_location_and_its_upstream() {
        let seen = with_epoch(2, database(1, 100 * MIB, 10, 3));
        let superseded = differences(&seen, &with_epoch(1, database(1, 100 * MIB, 10, 3)));
        assert_eq!(superseded, [Difference::Superseded]);
        let mut foreign = database(1, 1, 0, 0);
        foreign.deployment.identity.id = "theirs".into();
        foreign.deployment.moved = true;
        foreign.deployment.upstream = "production".into();
        let upstream =
            Difference::OtherUpstream { theirs: "production".into(), ours: STAGING.into() };
        let expected = [Difference::OtherDeployment, Difference::Moved, upstream];
        assert_eq!(differences(&seen, &foreign), expected);
    }

    #[test]
    fn a_database_whose_identity_was_deleted_is_recognised_by_its_place_and_its_rows() {
        let seen = database(1, 100 * MIB, 10, 3);
        let without_identity = |mut database: DatabaseHistory| {
            database.identity_is_missing = true;
            database
        };
        assert_eq!(verdict(&seen, &without_identity(seen.clone())), Verdict::Continues);
        let mut copy = without_identity(seen.clone());
        copy.server.database_oid += 1;
        assert_eq!(differences(&seen, &copy), [Difference::Moved]);
        let older = without_identity(database(1, 100 * MIB, 9, 3));
        assert_eq!(differences(&seen, &older), [Difference::Older { records: 1 }]);
        // Without a row that was seen in it, any database of the server could be meant.
        assert!(Evidence::after(None, &seen).recognisable_identity().is_some());
        let mut empty = database(1, 100 * MIB, 10, 0);
        empty.delivered.clear();
        assert!(Evidence::after(None, &empty).recognisable_identity().is_none());
    }

    #[test]
    fn only_the_same_run_of_the_same_server_proves_that_nothing_was_lost() {
        let evidence = Evidence::after(None, &database(2, 100 * MIB, 10, 3));
        assert!(evidence.is_same_run(&server(2, 100 * MIB)));
        assert!(evidence.is_same_run(&server(2, 101 * MIB)));
        let mut restarted = server(2, 101 * MIB);
        restarted.started_at += 1;
        let mut other_server = server(2, 101 * MIB);
        other_server.system_identifier += 1;
        let mut other_database = server(2, 101 * MIB);
        other_database.database_oid += 1;
        for other in
            [restarted, other_server, other_database, server(1, 200 * MIB), server(3, 200 * MIB)]
        {
            assert!(!evidence.is_same_run(&other), "{other:?}");
        }
        assert!(!evidence.is_same_run(&server(2, 100 * MIB - 1)));
    }

    #[test]
    fn a_change_that_took_effect_before_the_guard_read_it_is_missed_in_a_database_without_it() {
        let seen = database(1, 100 * MIB, 10, 3);
        let mut evidence = Evidence::after(None, &seen);
        evidence.add_changes([change(3), change(4)]);
        assert_eq!(evidence.changes.len(), 4);
        let judged =
            |found: DatabaseHistory| judge(Some(&evidence), &BTreeMap::new(), &found, STAGING);
        let lost = Difference::LostChanges { changes: vec!["4 grants delete demo".into()] };
        assert_eq!(judged(database(2, 100 * MIB, 10, 3)), Verdict::Differs(vec![lost]));
        assert_eq!(judged(database(2, 100 * MIB, 10, 4)), Verdict::Continues);
    }

    #[test]
    fn a_database_that_another_replica_accepted_since_is_accepted() {
        let seen = database(1, 100 * MIB, 10, 3);
        let restored = with_epoch(2, database(1, 1, 7, 3));
        let older =
            vec![Difference::Older { records: 3 }, Difference::ShorterLog { bytes: 100 * MIB - 1 }];
        assert_eq!(verdict(&seen, &restored), Verdict::AcceptedElsewhere(older));
        let mut copy = restored;
        copy.deployment.moved = true;
        assert!(matches!(verdict(&seen, &copy), Verdict::Differs(_)));
    }

    #[test]
    fn servers_that_do_not_tell_their_position_are_judged_by_rows() {
        let silent = |mut database: DatabaseHistory| {
            (database.server.timeline, database.server.wal) = (None, None);
            database
        };
        let seen = silent(database(1, 1, 10, 3));
        assert_eq!(verdict(&seen, &silent(database(1, 1, 10, 3))), Verdict::Continues);
        assert_eq!(differences(&seen, &silent(database(1, 1, 10, 2))).len(), 1);
    }

    #[test]
    fn missing_records_are_summed_over_all_chains() {
        let delivered =
            [("a", 10), ("b", 20), ("c", 5)].map(|(chain, seq)| (chain.to_owned(), seq));
        let delivered = delivered.into();
        let mut found = database(1, 1, 0, 0);
        found.delivered =
            [("a", head(7)), ("b", head(25))].map(|(chain, it)| (chain.to_owned(), it)).into();
        assert_eq!(missing_records(&delivered, &found), 3 + 5);
        found.malformed_chains = ["c".to_owned()].into();
        assert_eq!(missing_records(&delivered, &found), 3, "a malformed row proves nothing");
    }

    #[test]
    fn what_is_known_of_a_chain_remains_while_its_row_is_malformed() {
        let seen = database(1, 100 * MIB, 10, 3);
        let mut malformed = seen.clone();
        malformed.delivered.clear();
        malformed.malformed_chains = ["c".to_owned()].into();
        assert_eq!(verdict(&seen, &malformed), Verdict::Continues);
        let evidence = Evidence::after(Some(Evidence::after(None, &seen)), &malformed);
        let mut altered = seen;
        altered.delivered.insert("c".into(), ChainHead { seq: 10, hash: Digest::ZERO });
        let delivered = [("c".to_owned(), 10)].into();
        let chains = vec!["c".to_owned()];
        let expected = Verdict::Differs(vec![Difference::OtherRecords { chains }]);
        assert_eq!(judge(Some(&evidence), &delivered, &altered, STAGING), expected);
    }

    #[test]
    fn the_tokens_that_were_issued_last_are_remembered_also_over_a_restart() {
        let mut evidence = Evidence::after(None, &database(1, 1, 1, 0));
        evidence.note_tokens((0..1_000).map(|account| (account, 5_000 - account)).collect());
        assert_eq!(evidence.tokens, (0..256).map(|account| (account, 5_000 - account)).collect());
        // An older state of the cache, a new token, and a token of another account.
        evidence.note_tokens(vec![(0, 1), (1, 9_000), (7_000, 8_000)]);
        let tokens = &evidence.tokens;
        assert_eq!((tokens[&0], tokens[&1], tokens[&7_000]), (5_000, 9_000, 8_000));
        assert_eq!((tokens.len(), tokens.get(&255)), (MAX_TOKENS, None));
        let before = Evidence::after(None, &database(1, 1, 1, 0));
        assert!(before.differs_from(&evidence), "it is written");
        let next = Evidence::after(Some(evidence.clone()), &database(1, 1, 1, 0));
        assert_eq!(next.tokens, evidence.tokens);
    }

    #[test]
    fn the_changes_that_were_seen_last_are_remembered_whatever_their_numbers() {
        let mut found = database(1, 1, 1, 0);
        found.new_changes = (1_000..2_000).map(change).collect();
        let seen = Evidence::after(None, &found);
        assert_eq!(seen.changes.len(), MAX_CHANGES);
        // A transaction that began early may commit late.
        found.new_changes = vec![change(5), change(1_999)];
        let seen = Evidence::after(Some(seen), &found);
        assert_eq!(seen.changes.last(), Some(&change(5)));
        assert_eq!(seen.changes.len(), MAX_CHANGES);
    }

    #[test]
    fn evidence_is_read_back_also_that_of_an_earlier_release_and_none_without_a_file() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("database");
        assert_eq!(Evidence::read(&path).unwrap(), None);
        let evidence = Evidence::after(None, &database(1, 100, 10, 3));
        evidence.write(&path).unwrap();
        assert_eq!(Evidence::read(&path).unwrap(), Some(evidence));
        fs::write(&path, r#"{"deployment":"ours","epoch":3}"#).unwrap();
        assert_eq!(Evidence::read(&path).unwrap().unwrap().epoch, 3);
        fs::write(&path, "{").unwrap();
        assert!(Evidence::read(&path).is_err());
    }

    proptest! {
        /// Time goes on in one database; a later state continues an earlier one, and an earlier state does not
        /// continue a later one, unless nothing was added between them.
        #[test]
        fn only_later_states_continue_a_history(
            records in 1_i64..200, changes in 1_i64..200, more in 0_i64..3, new in 0_i64..3, promoted in any::<bool>(),
        ) {
            let earlier = database(1, 100 * MIB, records, changes);
            let timeline = if promoted { 2 } else { 1 };
            let later = database(timeline, 100 * MIB, records + more, changes + new);
            prop_assert_eq!(verdict(&earlier, &later), Verdict::Continues);
            let back = verdict(&later, &database(timeline, 100 * MIB, records, changes));
            prop_assert_eq!(back == Verdict::Continues, more == 0 && new == 0);
        }
    }
}
