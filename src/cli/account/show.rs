//! Prints accounts, as tables and as JSON.

use serde_json::{Value, json};

use super::super::{
    output::{self, Table, or_dash},
    time::{LocalTime, seconds},
};
use crate::store::admin::{AccountDetails, AccountSummary};

/// Prints `accounts`, one a line.
pub(super) fn list(accounts: &[AccountSummary], as_json: bool) -> anyhow::Result<()> {
    if as_json {
        return output::json(&accounts.iter().map(summary).collect::<Vec<_>>());
    }
    let mut table =
        Table::new(["NAME", "CLIENT ID", "STATE", "EXPIRES AT", "TIME LEFT", "LAST ERROR"]);
    for account in accounts {
        table.row([
            account.name.clone(),
            account.client_id.clone(),
            account.state.clone(),
            or_dash(account.expires_at.map(LocalTime)),
            or_dash(account.time_left_seconds.map(seconds)),
            or_dash(account.last_error.as_ref()),
        ]);
    }
    table.print("no accounts yet: token-broker account add NAME --client-id ID")
}

/// Prints all that is known of one account.
pub(super) fn one(account: &AccountDetails, as_json: bool) -> anyhow::Result<()> {
    let status = &account.status;
    if as_json {
        let mut value = summary(status);
        value["description"] = json!(account.description);
        value["credential_version"] = json!(account.credential_version);
        value["keeps_previous_secret"] = json!(account.keeps_previous_secret);
        value["reissue_requested_at"] = json!(account.reissue_requested_at.map(LocalTime));
        value["created_at"] = json!(LocalTime(account.created_at));
        value["updated_at"] = json!(LocalTime(account.updated_at));
        return output::json(&value);
    }
    let mut table = Table::without_header();
    let mut row = |name: &str, value: String| table.row([name.to_owned(), value]);
    row("name", status.name.clone());
    row("client id", status.client_id.clone());
    row("state", status.state.clone());
    row("description", account.description.clone());
    row("expires at", or_dash(status.expires_at.map(LocalTime)));
    row("time left", or_dash(status.time_left_seconds.map(seconds)));
    row("last issued at", or_dash(status.last_issued_at.map(LocalTime)));
    row("allowed ip", or_dash(status.allowed_ip.as_ref()));
    row("generation", or_dash(status.generation));
    row("last requested at", or_dash(status.last_requested_at.map(LocalTime)));
    row("next attempt at", or_dash(status.next_attempt_at.map(LocalTime)));
    row("failures in a row", status.consecutive_failures.to_string());
    row("last error", or_dash(status.last_error.as_ref()));
    row("credential version", account.credential_version.to_string());
    row(
        "previous secret",
        if account.keeps_previous_secret { "kept until the new one has issued" } else { "-" }
            .into(),
    );
    row("reissue requested at", or_dash(account.reissue_requested_at.map(LocalTime)));
    row("created at", LocalTime(account.created_at).to_string());
    row("updated at", LocalTime(account.updated_at).to_string());
    row("hint", status.hint.clone());
    table.print("")
}

fn summary(account: &AccountSummary) -> Value {
    json!({
        "name": account.name,
        "client_id": account.client_id,
        "state": account.state,
        "expires_at": account.expires_at.map(LocalTime),
        "time_left_seconds": account.time_left_seconds,
        "last_issued_at": account.last_issued_at.map(LocalTime),
        "allowed_ip": account.allowed_ip,
        "generation": account.generation.map(|generation| generation.to_string()),
        "consecutive_failures": account.consecutive_failures,
        "last_error": account.last_error,
        "next_attempt_at": account.next_attempt_at.map(LocalTime),
        "last_requested_at": account.last_requested_at.map(LocalTime),
        "hint": account.hint,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_is_a_string_in_json_because_many_parsers_round_numbers_beyond_2_to_the_53() {
        let account = AccountSummary {
            name: "acme".into(),
            client_id: "id".into(),
            state: "fresh".into(),
            expires_at: None,
            time_left_seconds: None,
            last_issued_at: None,
            allowed_ip: None,
            generation: Some(i64::MAX),
            consecutive_failures: 0,
            last_error: None,
            next_attempt_at: None,
            last_requested_at: None,
            hint: String::new(),
        };
        assert_eq!(summary(&account)["generation"], "9223372036854775807");
    }
}
