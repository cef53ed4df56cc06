//! The commands `keys add`, `keys promote` and `keys retire`, which edit the keyring's file.

use std::collections::BTreeMap;

use anyhow::{Context, ensure};

use super::{
    brokers::{Need, until_loaded, until_met},
    file, publish,
};
use crate::{
    cli::{global::GlobalArgs, output},
    crypto::{KeyId, KeyKind, Keyring},
    domain::clock::Clock,
    store::{
        admin::KeyUse,
        intake_keys::{self, PublishedKey},
    },
};

/// Adds a key of `kind` to the file, and prints its id.
pub(super) fn add(
    global: &GlobalArgs,
    flags: BTreeMap<String, String>,
    kind: KeyKind,
) -> anyhow::Result<()> {
    let file = file::path(global, flags)?;
    let (id, is_new) = Keyring::add_to_file(&file, kind, Clock::System.wall())?;
    output::note(format_args!(
        "{id} {} {}; give the file to every replica and to its backup, and then run `token-broker keys promote {id}`",
        if is_new { "was added to" } else { "was added before and waits in" },
        file.display()
    ));
    output::line(id)
}

/// Makes the key `id` the primary of its kind, and publishes it if it is an intake key.
pub(super) async fn promote(
    global: &GlobalArgs,
    flags: BTreeMap<String, String>,
    id: &KeyId,
    force: bool,
) -> anyhow::Result<()> {
    let file = file::path(global, flags.clone())?;
    let kind = kind_of(&Keyring::load(&file)?, id);
    if !force {
        let admin = global.admin(None).await.context(
            "it is unknown which keys the running brokers have; --force promotes the key all the same",
        )?;
        until_loaded(&admin, id).await?;
    }
    let next = match kind {
        Some(KeyKind::Sealing) => "; then run `token-broker keys reseal`",
        _ => "",
    };
    if Keyring::promote_in_file(&file, id)? {
        output::note(format_args!(
            "{id} is primary in {}; give the file to every replica and to its backup{next}",
            file.display()
        ));
    } else {
        output::note(format_args!("{id} is primary already{next}"));
    }
    if kind == Some(KeyKind::Intake) {
        publish::publish_primary(global, flags, force).await.context(
            "the key is primary, but not published: run `token-broker keys publish` as the owner of the tables",
        )?;
    }
    Ok(())
}

/// Retires the key `id`.
pub(super) async fn retire(
    global: &GlobalArgs,
    flags: BTreeMap<String, String>,
    id: &KeyId,
) -> anyhow::Result<()> {
    let file = file::path(global, flags)?;
    let keyring = Keyring::load(&file)?;
    let status = keyring.status().iter().find(|key| key.id == *id);
    // The edit checks this again. Here it comes before what takes longer, and needs no database.
    let needs_check = status.is_some_and(|key| !key.primary && key.retired_at.is_none());
    if needs_check {
        let admin = global.admin(None).await.context(
            "it is unknown whether the key is still needed: a key is retired while the database answers",
        )?;
        // The brokers come first: once none uses the key, no further value is made with it.
        until_met(&admin, &Need::NotUsed(id)).await?;
        check_values(id, &admin.key_uses().await?, &intake_keys::published(admin.pool()).await?)?;
    }
    if !Keyring::retire_in_file(&file, id, Clock::System.wall())? {
        output::note(format_args!("{id} is retired already"));
        return Ok(());
    }
    let rest = match kind_of(&keyring, id) {
        Some(KeyKind::Fingerprint) => "; it stays there for `audit who`",
        Some(KeyKind::Signing) => "; its public half stays there for `audit verify`",
        _ => "; backups of the database from before need the keyring from before",
    };
    output::note(format_args!(
        "{id} is retired in {}{rest}; give the file to every replica",
        file.display()
    ));
    Ok(())
}

fn kind_of(keyring: &Keyring, id: &KeyId) -> Option<KeyKind> {
    keyring.status().iter().find(|key| key.id == *id).map(|key| key.kind)
}

/// Checks that no value needs the key `id`, and that admins seal to another one.
///
/// # Errors
/// Returns what needs it.
fn check_values(id: &KeyId, uses: &[KeyUse], published: &[PublishedKey]) -> anyhow::Result<()> {
    ensure!(
        published.iter().all(|key| key.key_id != id.as_str()),
        "admins seal secrets to {id}: run `token-broker keys publish` as the owner of the tables first"
    );
    let of_key: Vec<_> = uses.iter().filter(|it| it.key_id == id.as_str()).collect();
    let places: Vec<_> = of_key.iter().map(|it| format!("{} of {}", it.values, it.place)).collect();
    let is_intake = of_key.iter().any(|it| it.place == "accounts.client_secret");
    ensure!(
        of_key.is_empty(),
        "values need {id}: {}; {}",
        places.join(", "),
        if is_intake {
            "a running broker takes them in within a second"
        } else {
            "run `token-broker keys reseal` first"
        }
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_values_need_or_that_is_published_is_not_retired() {
        let id: KeyId = "k1".parse().unwrap();
        let uses = |place: &str, key_id: &str| {
            [KeyUse { place: place.into(), key_id: key_id.into(), values: 3 }]
        };
        let refused = |uses: &[KeyUse]| check_values(&id, uses, &[]).unwrap_err().to_string();
        let sealed = refused(&uses("tokens.sealed_token", "k1"));
        assert!(
            sealed.contains("3 of tokens.sealed_token") && sealed.contains("reseal"),
            "{sealed}"
        );
        let waiting = refused(&uses("accounts.client_secret", "k1"));
        assert!(waiting.contains("within a second"), "{waiting}");
        assert!(check_values(&id, &uses("tokens.sealed_token", "k2"), &[]).is_ok());
        let published = PublishedKey { key_id: "k1".into(), public_key: vec![], is_primary: true };
        assert!(check_values(&id, &[], &[published]).is_err());
    }
}
