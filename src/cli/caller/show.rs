//! Prints callers, as tables and as JSON.

use std::process::ExitCode;

use serde_json::{Value, json};

use super::super::{
    output::{self, Table, or_dash},
    time::LocalTime,
};
use crate::store::admin::{
    BearerSummary, CallerDetails, CallerSummary, CredentialDetails, GrantDetails, Listed,
};

/// Prints `callers`, one a line.
pub(super) fn list(callers: &[CallerSummary], as_json: bool) -> anyhow::Result<()> {
    if as_json {
        return output::json(&callers.iter().map(summary).collect::<Vec<_>>());
    }
    let mut table =
        Table::new(["NAME", "STATE", "RATE LIMIT", "CREDENTIALS", "GRANTS", "DESCRIPTION"]);
    for caller in callers {
        table.row([
            caller.name.clone(),
            state(caller).into(),
            caller.rate_limit.map_or_else(|| "default".into(), |limit| format!("{limit}/s")),
            caller.credentials.to_string(),
            caller.grants.to_string(),
            caller.description.clone(),
        ]);
    }
    table.print("no callers yet: token-broker caller add NAME --bearer")
}

/// Prints one caller with its credentials and grants.
pub(super) fn one(caller: &CallerDetails, as_json: bool) -> anyhow::Result<()> {
    if as_json {
        let mut value = summary(&caller.summary);
        value["credentials"] = caller.credentials.iter().map(credential).collect();
        value["grants"] = caller.grants.iter().map(grant).collect();
        return output::json(&value);
    }
    list(std::slice::from_ref(&caller.summary), false)?;
    output::line("")?;
    let mut credentials = Table::new(["CREDENTIAL", "KIND", "IDENTITY", "CREATED AT", "STATE"]);
    for it in &caller.credentials {
        credentials.row([
            it.id.to_string(),
            it.kind.clone(),
            or_dash(it.identity.as_ref()),
            LocalTime(it.created_at).to_string(),
            credential_state(it),
        ]);
    }
    credentials.print(
        "no credentials: token-broker caller bearer add NAME, or caller identity add NAME",
    )?;
    output::line("")?;
    let mut grants = Table::new(["ACCOUNTS", "RIGHTS", "UNTIL"]);
    for it in &caller.grants {
        let ended = if it.in_force { "" } else { " (ended)" };
        grants.row([
            it.pattern.clone(),
            it.rights.join(","),
            or_dash(it.ends_at.map(|end| format!("{}{ended}", LocalTime(end)))),
        ]);
    }
    grants.print("no grants: token-broker caller grant NAME PATTERN")
}

/// Prints the numbers and times of `bearers`. The bearers themselves are not known: only their hashes
/// are stored.
pub(super) fn bearers(bearers: &[BearerSummary], as_json: bool) -> anyhow::Result<()> {
    if as_json {
        let rows: Vec<_> = bearers
            .iter()
            .map(|bearer| {
                let mut value = credential(&bearer.credential);
                value["caller"] = json!(bearer.caller);
                value
            })
            .collect();
        return output::json(&rows);
    }
    let mut table = Table::new(["BEARER", "CALLER", "CREATED AT", "STATE", "DESCRIPTION"]);
    for BearerSummary { caller, credential } in bearers {
        table.row([
            credential.id.to_string(),
            caller.clone(),
            LocalTime(credential.created_at).to_string(),
            credential_state(credential),
            credential.description.clone(),
        ]);
    }
    table.print("no bearers: token-broker caller bearer add NAME")
}

/// Names the rows that are missing in a list because they cannot be read. Returns the exit code.
pub(super) fn name_unreadable<T>(listed: &Listed<T>) -> ExitCode {
    for error in &listed.unreadable {
        output::note(format_args!("error: {error}"));
    }
    if listed.unreadable.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn summary(caller: &CallerSummary) -> Value {
    json!({
        "name": caller.name,
        "enabled": caller.enabled,
        "rate_limit": caller.rate_limit,
        "description": caller.description,
        "created_at": LocalTime(caller.created_at),
        "credentials_in_force": caller.credentials,
        "grants_in_force": caller.grants,
    })
}

fn credential(it: &CredentialDetails) -> Value {
    json!({
        "id": it.id,
        "kind": it.kind,
        "identity": it.identity,
        "description": it.description,
        "created_at": LocalTime(it.created_at),
        "ends_at": it.ends_at.map(LocalTime),
        "revoked_at": it.revoked_at.map(LocalTime),
        "in_force": it.in_force,
    })
}

fn grant(it: &GrantDetails) -> Value {
    json!({
        "pattern": it.pattern,
        "rights": it.rights,
        "ends_at": it.ends_at.map(LocalTime),
        "created_at": LocalTime(it.created_at),
        "in_force": it.in_force,
    })
}

fn state(caller: &CallerSummary) -> &'static str {
    if caller.enabled { "enabled" } else { "disabled" }
}

fn credential_state(it: &CredentialDetails) -> String {
    match (it.revoked_at, it.ends_at) {
        (Some(at), _) => format!("revoked at {}", LocalTime(at)),
        (None, Some(at)) if it.in_force => format!("until {}", LocalTime(at)),
        (None, Some(at)) => format!("ended at {}", LocalTime(at)),
        (None, None) => "in force".into(),
    }
}
