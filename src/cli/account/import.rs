//! `account import`: registers the accounts of a file, changes them, and removes those that it lacks.

mod plan;

use std::{
    collections::{BTreeSet, HashMap},
    mem,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, ensure};
use clap::Args;

use self::plan::{Insert, Plan};
use super::{columns::COLUMNS, intake_key};
use crate::{
    cli::{
        bulk::{self, Counts, ImportArgs},
        global::GlobalArgs,
        output::{self, Progress, note},
    },
    config::{Flags, KnownKeyFlags},
    crypto::IntakePublicKey,
    domain::{
        account::ClientId,
        clock::{Clock, delta},
        secret::ClientSecret,
    },
    store::admin::{AccountUpdate, AccountsImport, Admin, StoredAccount, WholeAccount},
};

/// The pause between two queries whether the API KEYs are sealed.
const POLL_INTERVAL: Duration = Duration::from_millis(300);
/// From how many accounts on it is said how far the command is.
const PROGRESS_FROM: usize = 1000;

#[derive(Args, Debug)]
pub(super) struct WaitArgs {
    /// Wait until brokers have sealed the API KEYs, and print the accounts whose API KEY was another one
    #[arg(long)]
    wait: bool,
    /// The longest time to wait while none is sealed
    #[arg(long, default_value = "60s", value_parser = humantime::parse_duration, requires = "wait")]
    timeout: Duration,
}

pub(super) async fn run(
    global: &GlobalArgs,
    reason: Option<&str>,
    input: &ImportArgs,
    intake: &Flags<KnownKeyFlags>,
    wait: &WaitArgs,
) -> anyhow::Result<ExitCode> {
    let content = input.read(COLUMNS)?;
    let admin = global.admin(reason).await?;
    let stored = admin.stored_accounts().await?;
    let mode = input.mode();
    let mut plan = Plan::new(&content.rows, &stored, mode);
    plan.faults.extend(content.faults);
    let incomplete = input.report_faults(mem::take(&mut plan.faults))?;
    let lacking = Some(plan.lacking.len()).filter(|count| *count > 0);
    input.confirm_prune(lacking.map(|count| format!("{count} accounts")), content.rows.len())?;
    let removed = if mode.prune { plan.lacking.as_slice() } else { &[] };
    if !input.dry_run {
        write(global, &admin, intake, &plan, removed).await?;
    }
    for update in plan.updates.iter().filter(|update| !update.changed.is_empty()) {
        output::line(format_args!("{}: {}", update.name, update.changed.join(", ")))?;
    }
    for name in removed {
        output::line(format_args!("{name}: removed"))?;
    }
    note(summary(&plan, removed.len(), input.dry_run));
    if wait.wait && !input.dry_run {
        print_rotated(&admin, &plan, &stored, wait.timeout).await?;
    }
    Ok(ExitCode::from(u8::from(incomplete)))
}

fn summary(plan: &Plan, removed: usize, dry_run: bool) -> String {
    let changed = plan.updates.iter().filter(|update| !update.changed.is_empty()).count();
    let compared = plan.updates.iter().filter(|update| update.may_have_another_secret()).count();
    let text = bulk::summary(Counts {
        registered: plan.inserts.len(),
        changed,
        removed,
        unchanged: plan.unchanged + plan.updates.len() - changed,
        dry_run,
    });
    if compared == 0 {
        return text;
    }
    format!("{text}; brokers compare {compared} API KEYs with those that the accounts have")
}

/// Seals the API KEYs, and writes all of the plan or nothing.
async fn write(
    global: &GlobalArgs,
    admin: &Admin,
    intake: &Flags<KnownKeyFlags>,
    plan: &Plan,
    removed: &[String],
) -> anyhow::Result<()> {
    let secrets = plan.inserts.len() + plan.updates.iter().filter(|it| it.secret.is_some()).count();
    // A file without secrets needs no key that is trusted.
    let key = match secrets {
        0 => None,
        _ => Some(intake_key::Trust::new(global, intake)?.key_for(admin).await?),
    };
    let import = AccountsImport { removed: removed.to_vec(), ..sealed(key.as_ref(), plan)? };
    let total = import.len();
    if total == 0 {
        return Ok(());
    }
    let mut progress = progress("accounts are written", total);
    let written = admin
        .import_accounts(&import, &mut |done| {
            if let Some(progress) = &mut progress {
                progress.show(done as u64);
            }
        })
        .await;
    if let Some(progress) = progress {
        progress.finish();
    }
    written.map_err(bulk::not_imported)
}

/// Returns what to write, with the API KEYs sealed to `key`. It takes a second for 10,000 of them.
fn sealed(key: Option<&IntakePublicKey>, plan: &Plan) -> anyhow::Result<AccountsImport> {
    let seal = |client_id: &ClientId, secret: &ClientSecret| -> anyhow::Result<String> {
        let key = key.context("there is no key to seal to")?;
        Ok(key.seal(client_id, secret)?)
    };
    let mut import = AccountsImport::default();
    for Insert { name, client_id, secret, enabled, description } in &plan.inserts {
        import.inserts.push(WholeAccount {
            name: name.to_string(),
            client_id: client_id.to_string(),
            sealed_secret: seal(client_id, secret)?,
            enabled: *enabled,
            description: description.to_string(),
        });
    }
    for update in &plan.updates {
        let secret = update.secret.as_ref();
        import.updates.push(AccountUpdate {
            name: update.name.to_string(),
            from_client_id: update.from_client_id.clone(),
            client_id: update.client_id.to_string(),
            sealed_secret: secret.map(|secret| seal(&update.client_id, secret)).transpose()?,
            enabled: update.enabled,
            description: update.description.as_ref().map(ToString::to_string),
        });
    }
    // Two imports at once mostly lock rows in the same order. If they do not, the store repeats the one that is aborted.
    import.inserts.sort_unstable_by(|one, other| one.name.cmp(&other.name));
    import.updates.sort_unstable_by(|one, other| one.name.cmp(&other.name));
    Ok(import)
}

/// Waits until no API KEY of the plan waits for its sealing, and prints which known accounts have another one now.
async fn print_rotated(
    admin: &Admin,
    plan: &Plan,
    before: &[StoredAccount],
    timeout: Duration,
) -> anyhow::Result<()> {
    let updated = plan.updates.iter().filter(|update| update.may_have_another_secret());
    let updated: BTreeSet<&str> = updated.map(|update| update.name.as_str()).collect();
    let written = plan.updates.iter().filter(|it| it.secret.is_some()).map(|it| &it.name);
    let written = written.chain(plan.inserts.iter().map(|insert| &insert.name));
    let names: Vec<String> = written.map(ToString::to_string).collect();
    until_sealed(admin, &names, timeout).await?;
    let known = before.iter().map(|account| (&*account.name, account.credential_version));
    let known: HashMap<_, _> = known.collect();
    let mut rotated = 0;
    for account in admin.stored_accounts().await? {
        let name = &*account.name;
        if updated.contains(name) && known.get(name) != Some(&account.credential_version) {
            rotated += 1;
            output::line(format_args!("{name}: client_secret"))?;
        }
    }
    note(format_args!("{rotated} known accounts have another API KEY now"));
    Ok(())
}

/// Waits until brokers have sealed the API KEYs of these accounts, for as long as they go on within `timeout`.
async fn until_sealed(admin: &Admin, names: &[String], timeout: Duration) -> anyhow::Result<()> {
    let mut progress = progress("API KEYs are sealed by brokers", names.len());
    let (mut least, mut end) = (usize::MAX, Clock::System.now() + delta(timeout));
    let waiting = loop {
        let waiting = usize::try_from(admin.unsealed(names).await?)?;
        if waiting < least {
            (least, end) = (waiting, Clock::System.now() + delta(timeout));
        }
        if waiting == 0 || Clock::System.now() >= end {
            break waiting;
        }
        if let Some(progress) = &mut progress {
            progress.show((names.len() - waiting) as u64);
        }
        Clock::System.sleep(POLL_INTERVAL).await;
    };
    if let Some(progress) = progress {
        progress.finish();
    }
    ensure!(
        waiting == 0,
        "the file is imported, but {waiting} API KEYs wait for their sealing: is a broker running?"
    );
    Ok(())
}

/// Returns the progress of `total` accounts, if it takes so long that it is shown.
fn progress(what: &'static str, total: usize) -> Option<Progress> {
    (total >= PROGRESS_FROM).then(|| Progress::new(what, total as u64))
}

#[cfg(test)]
mod tests {
    use super::{plan::Update, *};

    #[test]
    fn accounts_are_written_in_the_order_of_their_names() {
        let update = |name: &str| Update {
            name: name.parse().unwrap(),
            from_client_id: format!("{name}-id"),
            client_id: format!("{name}-id").parse().unwrap(),
            secret: None,
            enabled: Some(false),
            description: None,
            changed: vec!["enabled"],
        };
        let written = |names: [&str; 3]| {
            let plan = Plan { updates: names.map(update).into(), ..Plan::default() };
            let import = sealed(None, &plan).unwrap();
            import.updates.into_iter().map(|update| update.name).collect::<Vec<_>>()
        };
        assert_eq!(written(["b", "a", "c"]), ["a", "b", "c"]);
        assert_eq!(written(["c", "b", "a"]), ["a", "b", "c"]);
    }
}
