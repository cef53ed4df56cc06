//! What an import changes: a function of the file's rows and the callers that exist.

use std::{
    collections::{BTreeMap, HashMap, HashSet, hash_map::Entry},
    fmt,
};

use super::super::setup::{
    COLUMNS, DESCRIPTION, ENABLED, GRANTS, Grant, NAME, NAMES, RATE_LIMIT, has_ended, parse_grant,
    parse_name,
};
use crate::{
    cli::bulk::{Fault, Mode, Row, RowFaults},
    domain::{
        account::{AccountName, Description},
        caller::{CallerKind, Right},
        clock::Timestamp,
    },
    store::admin::{CallerSetup, CallerUpdate, CertificateName, GrantSetup},
};

/// A caller to register or to change.
#[derive(Debug, Default)]
pub(super) struct Update {
    pub(super) write: CallerUpdate,
    /// The columns that change.
    pub(super) changed: Vec<&'static str>,
    /// How much the caller has that its row lacks.
    lacking: Lacking,
}

/// How much there is that the file lacks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Lacking {
    callers: usize,
    grants: usize,
    names: usize,
}

impl Lacking {
    pub(super) fn any(&self) -> bool {
        *self != Self::default()
    }
}

impl fmt::Display for Lacking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { callers, grants, names } = self;
        write!(f, "{callers} callers, {grants} grants and {names} certificate names")
    }
}

/// What an import changes, and the faults of the rows that it cannot use.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) updates: Vec<Update>,
    /// How many of them register a caller.
    pub(super) registered: usize,
    /// How many rows are as the caller is.
    pub(super) unchanged: usize,
    pub(super) faults: Vec<Fault>,
    /// The names of the callers that the file lacks.
    pub(super) removable: Vec<String>,
    pub(super) lacking: Lacking,
}

impl Plan {
    /// Returns what `rows` change in the callers `stored` at `now`.
    pub(super) fn new(rows: &[Row], stored: &[CallerSetup], now: Timestamp, mode: Mode) -> Self {
        let rows_of: HashMap<_, _> =
            rows.iter().filter_map(|row| Some((row.get(NAME)?, row))).collect();
        let owned = |caller: &'_ CallerSetup, it: &CertificateName| {
            // A name that is removed can be given to another caller. Those that were revoked or have ended are not removed.
            it.revoked
                || has_ended(it.ends_at, now)
                || !mode.prune
                || keeps(rows_of.get(&*caller.name).copied(), it)
        };
        let owners = stored.iter().flat_map(|caller| {
            let names = caller.certificate_names.iter().filter(|it| owned(caller, it));
            names.map(|it| ((&*it.kind, &*it.identity), (&*caller.name, it)))
        });
        let mut context = Context {
            stored: stored.iter().map(|caller| (&*caller.name, caller)).collect(),
            owners: owners.collect(),
            lines: HashMap::new(),
            name_lines: HashMap::new(),
            now,
            mode,
        };
        let mut plan = Self::default();
        for row in rows {
            let mut faults = RowFaults::new(row.line);
            match context.update(row, &mut faults) {
                Some(update) if !faults.any() => plan.add(update),
                _ => plan.faults.extend(faults.into_faults()),
            }
        }
        let removable = stored.iter().filter(|caller| !rows_of.contains_key(&*caller.name));
        plan.removable = removable.map(|caller| caller.name.clone()).collect();
        plan.lacking.callers = plan.removable.len();
        plan
    }

    fn add(&mut self, update: Update) {
        self.lacking.grants += update.lacking.grants;
        self.lacking.names += update.lacking.names;
        if update.write.new {
            self.registered += 1;
        } else if update.changed.is_empty() {
            self.unchanged += 1;
            return;
        }
        self.updates.push(update);
    }
}

/// Returns whether a caller keeps a name when what the file lacks is removed: its row lists the name, or none at all.
fn keeps(row: Option<&Row>, name: &CertificateName) -> bool {
    let column = NAMES.iter().find(|(kind, _)| kind.as_str() == name.kind);
    row.zip(column).is_some_and(|(row, (_, column))| {
        let lists = |words: &str| {
            words.split_whitespace().any(|word| word.split('@').next() == Some(&*name.identity))
        };
        row.get(*column).is_none_or(lists)
    })
}

/// Says that the column changes, once.
fn changes(changed: &mut Vec<&'static str>, column: usize) {
    let name = COLUMNS[column].name;
    if !changed.contains(&name) {
        changed.push(name);
    }
}

/// What the rows are compared with.
struct Context<'a> {
    /// The callers by their names.
    stored: HashMap<&'a str, &'a CallerSetup>,
    /// The callers by the names in their certificates.
    owners: HashMap<(&'a str, &'a str), (&'a str, &'a CertificateName)>,
    /// The lines of the callers, and of names in certificates, that the file has so far.
    lines: HashMap<&'a str, usize>,
    name_lines: HashMap<(CallerKind, &'a str), usize>,
    now: Timestamp,
    mode: Mode,
}

impl<'a> Context<'a> {
    /// Returns what the row changes. If it adds a fault, what it returns has no meaning.
    fn update(&mut self, row: &'a Row, faults: &mut RowFaults) -> Option<Update> {
        let text = row.get(NAME).unwrap_or_default();
        let name = faults.check("name", text.parse::<AccountName>())?;
        let stored = self.stored.get(text).copied();
        match self.lines.entry(text) {
            Entry::Occupied(first) => {
                faults.add("name", format!("line {} has the same", first.get()));
            }
            Entry::Vacant(entry) => {
                entry.insert(row.line);
            }
        }
        if stored.is_some() && !self.mode.update {
            faults.add("name", "there is such a caller already: --update changes it");
        }
        let mut update = Update::default();
        update.write.name = name.to_string();
        update.write.new = stored.is_none();
        columns(row, stored, &mut update, faults);
        for (kind, column) in NAMES {
            if let Some(words) = row.get(column) {
                self.names(kind, column, words, stored, &mut update, faults);
            }
        }
        if let Some(words) = row.get(GRANTS) {
            let stored = stored.map(|stored| &*stored.grants).unwrap_or_default();
            self.grants(words, stored, &mut update, faults);
        }
        Some(update)
    }

    /// Compares names in certificates.
    fn names(
        &mut self,
        kind: CallerKind,
        column: usize,
        words: &'a str,
        stored: Option<&CallerSetup>,
        update: &mut Update,
        faults: &mut RowFaults,
    ) {
        let label = COLUMNS[column].name;
        let mut given = HashSet::new();
        for word in words.split_whitespace() {
            let Some((name, ends_at)) = faults.check(label, parse_name(kind, word)) else {
                continue;
            };
            given.insert(name);
            match self.name_lines.entry((kind, name)) {
                Entry::Occupied(first) => {
                    faults.add(label, format!("line {} has the same name", first.get()));
                }
                Entry::Vacant(entry) => {
                    entry.insert(faults.line());
                }
            }
            let known = self.owners.get(&(kind.as_str(), name));
            match known {
                // Also one of another caller, which lost it for a reason.
                Some((_, known)) if known.revoked => {
                    faults.add(
                        label,
                        "a name was revoked: `caller identity add` makes it valid again",
                    );
                }
                Some((owner, known)) if *owner != update.write.name => {
                    let ended = if has_ended(known.ends_at, self.now) {
                        ", where it has ended"
                    } else {
                        ""
                    };
                    faults.add(label, format!("a name belongs to caller {owner} already{ended}"));
                }
                Some((_, known)) if known.ends_at == ends_at => {}
                // What has ended gives nothing, whether it is there or not.
                None if has_ended(ends_at, self.now) => {}
                _ => {
                    update.write.certificate_names.push((kind, name.to_owned(), ends_at));
                    changes(&mut update.changed, column);
                }
            }
        }
        let known = stored.map(|stored| &*stored.certificate_names).unwrap_or_default();
        let extra = known.iter().filter(|it| {
            it.kind == kind.as_str()
                && !it.revoked
                && !has_ended(it.ends_at, self.now)
                && !given.contains(&*it.identity)
        });
        for it in extra {
            update.lacking.names += 1;
            if self.mode.prune {
                update.write.removed_names.push((kind, it.identity.clone()));
                changes(&mut update.changed, column);
            }
        }
    }

    /// Compares grants.
    fn grants(
        &self,
        words: &str,
        stored: &[GrantSetup],
        update: &mut Update,
        faults: &mut RowFaults,
    ) {
        let mut given: BTreeMap<String, Grant> = BTreeMap::new();
        for word in words.split_whitespace() {
            if let Some((pattern, grant)) = faults.check("grants", parse_grant(word))
                && given.insert(pattern, grant).is_some()
            {
                faults.add("grants", "a pattern is there twice");
            }
        }
        let mut known = HashMap::new();
        for it in stored {
            let rights = Right::ALL.into_iter();
            let rights = rights.filter(|right| it.rights.iter().any(|name| name == right.as_str()));
            known.insert(&*it.pattern, Grant { rights: rights.collect(), ends_at: it.ends_at });
            if given.contains_key(&it.pattern) || has_ended(it.ends_at, self.now) {
                continue;
            }
            update.lacking.grants += 1;
            if self.mode.prune {
                update.write.removed_grants.push(it.pattern.clone());
                changes(&mut update.changed, GRANTS);
            }
        }
        for (pattern, grant) in given {
            let known = known.get(&*pattern);
            // What has ended gives nothing, whether it is there or not.
            if known == Some(&grant) || known.is_none() && has_ended(grant.ends_at, self.now) {
                continue;
            }
            update.write.grants.push((pattern, grant.rights, grant.ends_at));
            changes(&mut update.changed, GRANTS);
        }
    }
}

/// Compares the columns with single values.
fn columns(row: &Row, stored: Option<&CallerSetup>, update: &mut Update, faults: &mut RowFaults) {
    let Update { write, changed, .. } = update;
    let enabled = row.get(ENABLED).and_then(|text| match text.to_ascii_lowercase().as_str() {
        "true" => Some(true),
        "false" => Some(false),
        _ => {
            faults.add("enabled", "it must be true or false");
            None
        }
    });
    write.enabled =
        enabled.filter(|enabled| stored.is_none_or(|stored| stored.enabled != *enabled));
    let rate_limit = row.get(RATE_LIMIT).and_then(|text| match text.parse() {
        _ if text.is_empty() => Some(None),
        Ok(limit @ 1..=1_000_000) => Some(Some(limit)),
        _ => {
            faults.add("rate_limit", "it must be 1 to 1000000, or empty for the broker's default");
            None
        }
    });
    write.rate_limit =
        rate_limit.filter(|limit| stored.is_none_or(|stored| stored.rate_limit != *limit));
    write.description = row
        .get(DESCRIPTION)
        .filter(|text| stored.is_none_or(|stored| stored.description != *text))
        .and_then(|text| faults.check("description", text.parse::<Description>()))
        .map(|description| description.to_string());
    changed.extend(write.enabled.map(|_| "enabled"));
    changed.extend(write.rate_limit.map(|_| "rate_limit"));
    changed.extend(write.description.as_ref().map(|_| "description"));
}

#[cfg(test)]
mod tests;
