//! What an import changes: a function of the file's rows and the accounts that exist.

use std::collections::{HashMap, HashSet, hash_map::Entry};

use super::super::columns::{CLIENT_ID, CLIENT_SECRET, DESCRIPTION, ENABLED, NAME};
use crate::{
    cli::bulk::{Fault, Mode, Row, RowFaults},
    domain::{
        account::{AccountName, ClientId, Description},
        secret::ClientSecret,
    },
    store::admin::StoredAccount,
};

/// An account to register.
#[derive(Debug)]
pub(super) struct Insert {
    pub(super) name: AccountName,
    pub(super) client_id: ClientId,
    pub(super) secret: ClientSecret,
    pub(super) enabled: bool,
    pub(super) description: Description,
}

/// A change of an account. What is `None` stays as it is.
#[derive(Debug)]
pub(super) struct Update {
    pub(super) name: AccountName,
    /// The client id that the account has.
    pub(super) from_client_id: String,
    pub(super) client_id: ClientId,
    /// The secret that the file gives. It may be the one that the account has.
    pub(super) secret: Option<ClientSecret>,
    pub(super) enabled: Option<bool>,
    pub(super) description: Option<Description>,
    /// The columns that certainly change. A secret does if it belongs to another client id.
    pub(super) changed: Vec<&'static str>,
}

impl Update {
    /// Returns whether the file gives a secret of which only a broker can tell whether the account has it. One that belongs
    /// to another client id is another one in any case.
    pub(super) fn may_have_another_secret(&self) -> bool {
        self.secret.is_some() && !self.changed.contains(&"client_secret")
    }
}

/// What an import changes, and the faults of the rows that it cannot use.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) inserts: Vec<Insert>,
    pub(super) updates: Vec<Update>,
    /// How many rows are as the account is.
    pub(super) unchanged: usize,
    /// The names of the accounts that the file lacks.
    pub(super) lacking: Vec<String>,
    pub(super) faults: Vec<Fault>,
}

impl Plan {
    /// Returns what `rows` change in the accounts `stored`.
    pub(super) fn new(rows: &[Row], stored: &[StoredAccount], mode: Mode) -> Self {
        let named: HashSet<_> = rows.iter().filter_map(|row| row.get(NAME)).collect();
        let (kept, lacking): (Vec<_>, Vec<_>) =
            stored.iter().partition(|account| named.contains(&*account.name));
        let lacking: Vec<_> = lacking.into_iter().map(|account| account.name.clone()).collect();
        // An account that is removed leaves its login to another one.
        let owners = if mode.prune { kept } else { stored.iter().collect() };
        let mut context = Context {
            stored: stored.iter().map(|account| (&*account.name, account)).collect(),
            owners: owners.iter().map(|account| (&*account.client_id, &*account.name)).collect(),
            names: HashMap::new(),
            client_ids: HashMap::new(),
            update: mode.update,
        };
        let mut plan = Self { lacking, ..Self::default() };
        for row in rows {
            let mut faults = RowFaults::new(row.line);
            let change = context.change(row, &mut faults);
            match (faults.any(), change) {
                (false, Some(Change::Insert(insert))) => plan.inserts.push(insert),
                (false, Some(Change::Update(update))) => plan.updates.push(update),
                (false, Some(Change::Nothing)) => plan.unchanged += 1,
                _ => plan.faults.extend(faults.into_faults()),
            }
        }
        plan
    }
}

enum Change {
    Insert(Insert),
    Update(Update),
    Nothing,
}

/// What the rows are compared with.
struct Context<'a> {
    /// The accounts by their names.
    stored: HashMap<&'a str, &'a StoredAccount>,
    /// The names of the accounts by their client ids.
    owners: HashMap<&'a str, &'a str>,
    /// The lines of the names and client ids that the file has so far.
    names: HashMap<&'a str, usize>,
    client_ids: HashMap<&'a str, usize>,
    update: bool,
}

impl<'a> Context<'a> {
    /// Returns what the row changes. If it adds a fault, what it returns has no meaning.
    fn change(&mut self, row: &'a Row, faults: &mut RowFaults) -> Option<Change> {
        let name_text = row.get(NAME).unwrap_or_default();
        let name: Option<AccountName> = faults.check("name", name_text.parse());
        let stored = self.stored.get(name_text).copied();
        if name.is_some() {
            once(&mut self.names, name_text, "name", faults);
        }
        if stored.is_some() && !self.update {
            faults.add("name", "there is such an account already: --update changes it");
        }
        let client_id = self.client_id(row, stored, name_text, faults);
        let secret = row.get(CLIENT_SECRET).filter(|secret| !secret.is_empty());
        let secret =
            secret.and_then(|secret| faults.check("client_secret", ClientSecret::new(secret)));
        let given = |column| row.get(column).is_some_and(|text| !text.is_empty());
        let enabled = row.get(ENABLED).and_then(|text| match text.to_ascii_lowercase().as_str() {
            "true" => Some(true),
            "false" => Some(false),
            _ => {
                faults.add("enabled", "it must be true or false");
                None
            }
        });
        let description = row
            .get(DESCRIPTION)
            // An older release may have stored what is refused now.
            .filter(|text| stored.is_none_or(|stored| stored.description != *text))
            .and_then(|text| faults.check("description", text.parse::<Description>()));
        let Some(stored) = stored else {
            if name.is_some() {
                for (column, at) in [("client_id", CLIENT_ID), ("client_secret", CLIENT_SECRET)] {
                    if !given(at) {
                        faults.add(column, "a new account needs it");
                    }
                }
            }
            return Some(Change::Insert(Insert {
                name: name?,
                client_id: client_id?,
                secret: secret?,
                enabled: enabled.unwrap_or(true),
                description: description.unwrap_or_default(),
            }));
        };
        let enabled = enabled.filter(|enabled| *enabled != stored.enabled);
        let mut changed = Vec::new();
        if client_id.is_some() {
            changed.push("client_id");
            if given(CLIENT_SECRET) {
                changed.push("client_secret");
            } else {
                faults.add("client_id", "it can only be changed together with client_secret");
            }
        }
        changed.extend(enabled.map(|_| "enabled"));
        changed.extend(description.as_ref().map(|_| "description"));
        if changed.is_empty() && secret.is_none() {
            return Some(Change::Nothing);
        }
        Some(Change::Update(Update {
            name: name?,
            from_client_id: stored.client_id.clone(),
            client_id: match client_id {
                Some(client_id) => client_id,
                None => faults.check("client_id", ClientId::stored(&stored.client_id))?,
            },
            secret,
            enabled,
            description,
            changed,
        }))
    }

    /// Returns the row's client id, unless it is the one that the account has.
    fn client_id(
        &mut self,
        row: &'a Row,
        stored: Option<&StoredAccount>,
        name: &str,
        faults: &mut RowFaults,
    ) -> Option<ClientId> {
        let text = row.get(CLIENT_ID).filter(|text| !text.is_empty())?;
        if stored.is_some_and(|stored| stored.client_id == text) {
            once(&mut self.client_ids, text, "client_id", faults);
            return None;
        }
        let client_id = faults.check("client_id", text.parse())?;
        once(&mut self.client_ids, text, "client_id", faults);
        // Also if the file gives the other account another one: the order of the rows would decide.
        if let Some(owner) = self.owners.get(text).filter(|owner| **owner != name) {
            faults.add("client_id", format!("it belongs to account {owner} already"));
        }
        Some(client_id)
    }
}

/// Adds a fault if an earlier row has the same value.
fn once<'a>(
    lines: &mut HashMap<&'a str, usize>,
    value: &'a str,
    column: &'static str,
    faults: &mut RowFaults,
) {
    match lines.entry(value) {
        Entry::Occupied(first) => faults.add(column, format!("line {} has the same", first.get())),
        Entry::Vacant(entry) => {
            entry.insert(faults.line());
        }
    }
}

#[cfg(test)]
mod tests;
