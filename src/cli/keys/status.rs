//! The command `keys status`.

use std::collections::BTreeMap;

use serde_json::json;

use super::{brokers::live_instances, file};
use crate::{
    cli::{
        global::GlobalArgs,
        output::{self, Table},
        time::LocalTime,
    },
    crypto::{KeyKind, KeyStatus},
    services::trust_monitor::check_published,
    store::{
        StoreError,
        admin::{Admin, InstanceSummary, KeyUse},
        intake_keys::{self, PublishedKey},
    },
};

/// What the database says about the keys.
struct Known {
    instances: Vec<InstanceSummary>,
    published: Vec<PublishedKey>,
    /// `None` if this login may not read the sealed values.
    uses: Option<Vec<KeyUse>>,
}

/// A key of the keyring, with what is known about it.
struct Row<'a> {
    key: &'a KeyStatus,
    /// How many brokers have loaded it, of how many.
    holders: Option<(usize, usize)>,
    /// How many values need it.
    values: Option<i64>,
    published: Option<bool>,
}

pub(super) async fn run(
    global: &GlobalArgs,
    flags: BTreeMap<String, String>,
    as_json: bool,
) -> anyhow::Result<()> {
    let keyring = file::load(global, flags)?;
    let known = match global.admin(None).await {
        Ok(admin) => read(&admin).await,
        Err(error) => Err(error),
    };
    let known = match known {
        Ok(known) => {
            if let Err(fault) = check_published(&keyring, &known.published) {
                output::note(format_args!("warning: {fault}"));
            }
            Some(known)
        }
        Err(error) => {
            output::note(format_args!(
                "warning: it is unknown which keys the brokers have: {error:#}"
            ));
            None
        }
    };
    let rows: Vec<_> = keyring.status().iter().map(|key| row(key, known.as_ref())).collect();
    if as_json {
        let rows: Vec<_> = rows.iter().map(json).collect();
        return output::json(&rows);
    }
    let mut table =
        Table::new(["KEY", "KIND", "PRIMARY", "CREATED AT", "BROKERS", "VALUES", "PUBLISHED"]);
    for Row { key, holders, values, published } in rows {
        table.row([
            key.id.to_string(),
            key.kind.to_string(),
            if key.retired_at.is_some() { "retired".into() } else { yes_or_no(key.primary) },
            LocalTime(key.created_at).to_string(),
            output::or_dash(holders.map(|(with, all)| format!("{with} of {all}"))),
            output::or_dash(values),
            output::or_dash(published.map(yes_or_no)),
        ]);
    }
    table.print("the keyring is empty")
}

fn row<'a>(key: &'a KeyStatus, known: Option<&Known>) -> Row<'a> {
    let id = key.id.as_str();
    let is_in_use = key.retired_at.is_none();
    let holds = |it: &&InstanceSummary| it.key_ids.iter().any(|held| held == id);
    let holders = known
        .filter(|_| is_in_use)
        .map(|known| (known.instances.iter().filter(holds).count(), known.instances.len()));
    let has_values = matches!(key.kind, KeyKind::Sealing | KeyKind::Intake);
    let values = known.and_then(|known| known.uses.as_ref()).filter(|_| has_values);
    let values =
        values.map(|uses| uses.iter().filter(|it| it.key_id == id).map(|it| it.values).sum());
    let published = known
        .filter(|_| key.kind == KeyKind::Intake && is_in_use)
        .map(|known| known.published.iter().any(|published| published.key_id == id));
    Row { key, holders, values, published }
}

fn json(row: &Row<'_>) -> serde_json::Value {
    let Row { key, holders, values, published } = row;
    json!({
        "key_id": key.id.as_str(), "kind": key.kind.as_str(), "primary": key.primary,
        "created_at": LocalTime(key.created_at), "retired_at": key.retired_at.map(LocalTime),
        "brokers_with_it": holders.map(|(with, _)| with),
        "brokers": holders.map(|(_, all)| all), "values": values, "published": published,
    })
}

async fn read(admin: &Admin) -> anyhow::Result<Known> {
    Ok(Known {
        instances: live_instances(admin).await?,
        published: intake_keys::published(admin.pool()).await?,
        uses: match admin.key_uses().await {
            Err(StoreError::MissingPrivilege(_)) => None,
            uses => Some(uses?),
        },
    })
}

fn yes_or_no(yes: bool) -> String {
    if yes { "yes" } else { "no" }.into()
}
