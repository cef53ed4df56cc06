//! The command `keys reseal`.

use std::{collections::BTreeMap, process::ExitCode, time::Duration};

use tokio::time::sleep;

use super::{
    brokers::{Need, until_met},
    file,
};
use crate::{
    cli::{
        global::{self, APPLICATION_NAME, GlobalArgs},
        output::{self, Progress},
    },
    config,
    crypto::{KeyId, KeyKind, Keyring},
    store::{
        StoreError,
        admin::{Admin, KeyUse, SealedTable},
    },
};

/// How often all rows are gone through in vain before the rest is left: rows that somebody has locked, or that brokers
/// still seal with another key.
const VAIN_PASSES: u32 = 5;
/// The pause after a pass in vain.
const PAUSE: Duration = Duration::from_secs(1);
/// The most values that do not open which are named.
const NAMED: usize = 20;

pub(super) async fn run(
    global: &GlobalArgs,
    flags: BTreeMap<String, String>,
    reason: Option<&str>,
) -> anyhow::Result<ExitCode> {
    let keyring = file::load(global, flags.clone())?;
    let primary = keyring.primary(KeyKind::Sealing);
    let database =
        config::migrate_database_url(&global.sources(flags)?)?.database(APPLICATION_NAME)?;
    let admin = Admin::connect(&database, global::attribution(reason)).await?;
    // A broker that lacks the key could not open what is sealed with it.
    until_met(&admin, &Need::Loaded(primary)).await?;
    // One that has not read the file yet seals further values with another key, which are left for the next run.
    if let Err(others) = until_met(&admin, &Need::Used(primary)).await {
        output::note(format_args!("warning: {others}"));
    }
    let total = others(&admin.key_uses().await?, primary);
    if total == 0 {
        output::note(format_args!("every value is sealed with {primary} already"));
        return Ok(ExitCode::SUCCESS);
    }
    if let Err(error) = admin.record_reseal(primary, total, false).await {
        let is_denied = matches!(error, StoreError::MissingPrivilege(_));
        let error = anyhow::Error::new(error);
        return Err(if is_denied {
            error.context("`keys reseal` needs the login that owns the tables")
        } else {
            error
        });
    }
    let mut progress = Progress::new("values are sealed again", total);
    let outcome = reseal_all(&admin, &keyring, &mut progress).await;
    progress.finish();
    let Resealed { values, unopened } = outcome?;
    let left = others(&admin.key_uses().await?, primary);
    if values > 0 {
        admin.record_reseal(primary, values, true).await?;
    }
    for text in unopened.iter().take(NAMED) {
        output::note(format_args!("warning: {text}"));
    }
    if left == 0 {
        output::note(format_args!("every value is sealed with {primary}"));
        return Ok(ExitCode::SUCCESS);
    }
    output::note(what_is_left(left, u64::try_from(unopened.len())?, primary));
    Ok(ExitCode::FAILURE)
}

/// Says what to do about values that are not sealed with `primary`, of which some do not open.
fn what_is_left(left: u64, unopened: u64, primary: &KeyId) -> String {
    let others = left.saturating_sub(unopened);
    let not_opening = (unopened > 0).then(|| {
        format!(
            "; {unopened} of them do not open: put the key that they need back into the keyring, or set these API KEYs \
             again"
        )
    });
    let locked = (others > 0).then(|| {
        format!(
            "; {others} are locked by another transaction, or were sealed by a broker meanwhile: run this again"
        )
    });
    let [not_opening, locked] = [not_opening, locked].map(Option::unwrap_or_default);
    format!("{left} values are not sealed with {primary}{not_opening}{locked}")
}

/// What was done.
#[derive(Default)]
struct Resealed {
    values: u64,
    /// The values that do not open, in words.
    unopened: Vec<String>,
}

/// Seals all values again, until none is left that can be.
async fn reseal_all(
    admin: &Admin,
    keyring: &Keyring,
    progress: &mut Progress,
) -> anyhow::Result<Resealed> {
    let primary = keyring.primary(KeyKind::Sealing);
    let (mut values, mut vain) = (0, 0);
    loop {
        let before = values;
        let mut unopened = Vec::new();
        for table in [SealedTable::Accounts, SealedTable::Tokens] {
            let mut after = i64::MIN;
            loop {
                let batch = match admin.reseal(table, keyring, after).await {
                    // Somebody has locked the whole table.
                    Err(StoreError::Locked(_)) => break,
                    batch => batch?,
                };
                values += batch.resealed;
                progress.show(values);
                let text = |(binding, error)| format!("{binding} stays as it is: {error}");
                unopened.extend(batch.unopened.into_iter().map(text));
                let Some(last) = batch.last else { break };
                after = last;
            }
        }
        let left = others(&admin.key_uses().await?, primary);
        if left <= u64::try_from(unopened.len())? {
            return Ok(Resealed { values, unopened });
        }
        vain = if values == before { vain + 1 } else { 0 };
        if vain == VAIN_PASSES {
            return Ok(Resealed { values, unopened });
        }
        if vain > 0 {
            sleep(PAUSE).await;
        }
    }
}

/// Returns how many sealed values need another key than `primary`.
fn others(uses: &[KeyUse], primary: &KeyId) -> u64 {
    let is_other =
        |it: &&KeyUse| it.place != "accounts.client_secret" && it.key_id != primary.as_str();
    let values = uses.iter().filter(is_other).map(|it| it.values).sum::<i64>();
    values.try_into().unwrap_or_default()
}
