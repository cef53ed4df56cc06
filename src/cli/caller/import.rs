//! `caller import`: registers the callers of a file, changes them, and removes those that it lacks.

mod plan;

use std::{mem, process::ExitCode};

use self::plan::{Lacking, Plan};
use super::setup::COLUMNS;
use crate::{
    cli::{
        bulk::{self, Counts, ImportArgs},
        output::{self, note},
    },
    domain::clock::Clock,
    store::admin::{Admin, CallersImport},
};

pub(super) async fn run(admin: &Admin, input: &ImportArgs) -> anyhow::Result<ExitCode> {
    let content = input.read(COLUMNS)?;
    let stored = admin.caller_setups().await?;
    let mode = input.mode();
    let mut plan = Plan::new(&content.rows, &stored, Clock::System.wall(), mode);
    plan.faults.extend(content.faults);
    let incomplete = input.report_faults(mem::take(&mut plan.faults))?;
    let lacking = Some(plan.lacking).filter(Lacking::any);
    input.confirm_prune(lacking, content.rows.len())?;
    // Two imports at once mostly lock rows in the same order. If they do not, the store repeats the one that is aborted.
    plan.updates.sort_unstable_by(|one, other| one.write.name.cmp(&other.write.name));
    let import = CallersImport {
        callers: plan.updates.iter().map(|update| update.write.clone()).collect(),
        removed: if mode.prune { plan.removable } else { Vec::new() },
    };
    let is_empty = import.callers.is_empty() && import.removed.is_empty();
    if !input.dry_run && !is_empty {
        admin.import_callers(&import).await.map_err(bulk::not_imported)?;
    }
    for update in plan.updates.iter().filter(|update| !update.write.new) {
        output::line(format_args!("{}: {}", update.write.name, update.changed.join(", ")))?;
    }
    for name in &import.removed {
        output::line(format_args!("{name}: removed"))?;
    }
    note(bulk::summary(Counts {
        registered: plan.registered,
        changed: plan.updates.len() - plan.registered,
        removed: import.removed.len(),
        unchanged: plan.unchanged,
        dry_run: input.dry_run,
    }));
    // A row that was left out may be why something is lacking.
    if let (false, true, false, Some(lacking)) = (mode.prune, mode.update, incomplete, lacking) {
        note(format_args!("not in the file, and left: {lacking}"));
    }
    Ok(ExitCode::from(u8::from(incomplete)))
}
