//! Checks of the keyring, the TLS files and the database. None of them changes anything.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{
    super::{privileges, time::LocalTime},
    result::CheckResult,
};
use crate::{
    app::{UnopenedSecret, WrongKeyring, check_keyring},
    config::Settings,
    crypto::{KeyId, Keyring},
    domain::clock::{Clock, Timestamp},
    services::trust_monitor::check_published,
    store::{
        StoreError, UnusableRow, accounts,
        admin::{Admin, Attribution, InstanceSummary, LastIssue, Load},
        callers, intake_keys,
        retention::{self, MinimumRetention},
    },
    tls::{RevocationList, Tls, UnlistedCas},
};

/// The roles that `deploy/roles.sql` creates.
const ROLES: [&str; 4] = [
    "token_broker_runtime",
    "token_broker_accounts",
    "token_broker_access",
    "token_broker_auditor",
];
/// How many differences between rows and their records are shown.
const SHOWN_CHANGES: i64 = 10;
/// The lifetime of a token, in seconds, that is assumed when no token has been issued yet. The example in
/// the upstream's documentation has this lifetime.
const ASSUMED_LIFETIME: f64 = 3_600.0;

/// Loads the keyring, and returns it if it is valid.
pub(super) fn keyring(settings: &Settings) -> (CheckResult, Option<Keyring>) {
    match Keyring::load(&settings.keyring_file) {
        Ok(keyring) => {
            let text = format!("{} keys", keyring.key_ids().len());
            (CheckResult::ok("keyring", text), Some(keyring))
        }
        Err(error) => (CheckResult::failure("keyring", error.to_string()), None),
    }
}

/// Loads the TLS files that gRPC would be served with.
pub(super) fn tls(settings: &Settings) -> CheckResult {
    const SUBJECT: &str = "serving";
    let Some(files) = settings.tls.clone() else {
        return CheckResult::warning(SUBJECT, "without TLS");
    };
    let tls = match Tls::load(files, Clock::System) {
        Ok(tls) => tls,
        Err(error) => return CheckResult::failure(SUBJECT, error.to_string()),
    };
    let now = Clock::System.wall();
    let end = Timestamp::from_timestamp_secs(tls.not_after()).unwrap_or_default();
    let mut text = format!("TLS; the certificate ends at {}", LocalTime(end));
    let lists = tls.revocation_lists();
    text.extend(lists.iter().map(|list| revocation_list_text(list, now)));
    let invalid = tls.invalid_cas();
    text.extend(invalid.iter().map(|ca| {
        format!("; every certificate of {ca} is refused: the CA has ended or is not valid yet")
    }));
    let unlisted = tls.unlisted_cas();
    text.extend(
        unlisted
            .without_list
            .iter()
            .map(|ca| format!("; no certificate of {ca} can be revoked: there is no list of it")),
    );
    text.extend(unlisted.misnamed.iter().map(|ca| {
        format!("; every certificate of {ca} is refused: its lists write its name in another encoding or case")
    }));
    if end <= now {
        CheckResult::failure(SUBJECT, text)
    } else if !invalid.is_empty()
        || unlisted != UnlistedCas::default()
        || lists.iter().any(|list| list.is_out_of_date(now))
    {
        CheckResult::warning(SUBJECT, text)
    } else {
        CheckResult::ok(SUBJECT, text)
    }
}

fn revocation_list_text(list: &RevocationList, now: Timestamp) -> String {
    let revoked = format!("; {} certificates of {} are revoked", list.revoked, list.issuer);
    let revoked = match list.next_update {
        None => format!("{revoked}, by a list without an end"),
        Some(next) if next < now => {
            format!("{revoked}, by a list that is out of date since {}", LocalTime(next))
        }
        Some(next) => format!("{revoked}, by a list that is renewed by {}", LocalTime(next)),
    };
    match &list.scope {
        None => revoked,
        Some(scope) => format!("{revoked} and is only about {scope}"),
    }
}

/// Returns a warning if running brokers have not loaded a key of the file.
fn loaded_check(keyring: &Keyring, instances: &[InstanceSummary]) -> Option<CheckResult> {
    let live: Vec<_> = instances.iter().filter(|it| it.live).collect();
    let lacking = |id: &KeyId| {
        let lacks = |it: &&&InstanceSummary| !it.key_ids.iter().any(|held| held == id.as_str());
        let count = live.iter().filter(lacks).count();
        (count > 0)
            .then(|| format!("{count} of {} running brokers have not loaded {id}", live.len()))
    };
    let lacking: Vec<_> = keyring.key_ids().iter().filter_map(lacking).collect();
    let text = format!("{}: give them this file, and see `/readyz`", lacking.join("; "));
    (!lacking.is_empty()).then(|| CheckResult::warning("keyring", text))
}

/// Runs all checks that need the database.
pub(super) async fn database(settings: &Settings, keyring: Option<&Keyring>) -> Vec<CheckResult> {
    let mut results = Vec::new();
    if let Err(error) = add_database_checks(settings, keyring, &mut results).await {
        results.push(CheckResult::failure("database", with_advice(&error, settings).await));
    }
    results
}

/// Returns the text of `error`, and if a privilege is missing, who the login is and what it lacks.
async fn with_advice(error: &StoreError, settings: &Settings) -> String {
    let advice = if error.lacks_grant() { login_advice(settings).await } else { None };
    advice.map_or_else(|| error.to_string(), |advice| format!("{error}; {advice}"))
}

async fn login_advice(settings: &Settings) -> Option<String> {
    let database = settings.database_url.database("token-broker check").ok()?;
    let admin = Admin::connect_unchecked(&database, Attribution::default()).await.ok()?;
    privileges::of_login(&admin, privileges::RUNTIME).await
}

async fn add_database_checks(
    settings: &Settings,
    keyring: Option<&Keyring>,
    results: &mut Vec<CheckResult>,
) -> Result<(), StoreError> {
    let database = settings.database_url.database("token-broker check")?;
    let admin = Admin::connect_unchecked(&database, Attribution::default()).await?;
    results
        .push(CheckResult::ok("database", format!("PostgreSQL {}", admin.server_version().await?)));
    match database.check_schema().await {
        Ok(()) => results.push(CheckResult::ok("schema", "has every migration of this release")),
        Err(error) => {
            results.push(CheckResult::failure("schema", with_advice(&error, settings).await));
            return Ok(());
        }
    }
    results.push(match database.check_schema_trust().await {
        Ok(()) => {
            CheckResult::ok("names", "only the tables' owner can create objects in the schema")
        }
        Err(StoreError::UnsafeSchema(faults)) => CheckResult::failure("names", faults.join("; ")),
        Err(error) => return Err(error),
    });
    let roles = ROLES.map(ToOwned::to_owned);
    let (missing, superuser) = admin.missing_roles(&roles).await?;
    results.push(roles_check(&missing, superuser));
    results.push(connections_check(admin.can_be_crowded_out().await?));
    let remembered = admin.upstream().await?;
    results.push(deployment_check(&settings.upstream.to_string(), remembered.as_deref()));
    if let Some(keyring) = keyring {
        let published = intake_keys::published(admin.pool()).await?;
        results.push(match check_published(keyring, &published) {
            Ok(()) => CheckResult::ok("intake key", "published"),
            Err(fault) => CheckResult::failure("intake key", fault.to_string()),
        });
        let samples = accounts::sealed_samples(admin.pool()).await?;
        results.push(secrets_check(check_keyring(keyring, &samples), samples.len()));
    }
    results.push(rows_check(&unusable_rows(&admin).await?));
    let instances = admin.instances().await?;
    results.extend(keyring.and_then(|keyring| loaded_check(keyring, &instances)));
    let live = instances.iter().filter(|it| it.live).count();
    results.push(match live {
        0 => CheckResult::warning("brokers", "none has sent a heartbeat in the last minute"),
        live => CheckResult::ok("brokers", format!("{live} live")),
    });
    results.push(changes_check(&admin).await?);
    results.push(match retention::minimum_retention(admin.pool()).await {
        Ok(least) => retention_check(settings, least),
        Err(error @ StoreError::MissingPrivilege(_)) => {
            CheckResult::failure("roles", missing_privilege(&error))
        }
        Err(error) => return Err(error),
    });
    results.push(rate_check(admin.load().await?, settings.upstream_rate, settings.refresh_at));
    results.push(egress_check(admin.last_issue().await?, &settings.expected_egress));
    Ok(())
}

/// Returns the rows that brokers cannot use, since somebody wrote them past the triggers.
async fn unusable_rows(admin: &Admin) -> Result<Vec<UnusableRow>, StoreError> {
    let mut connection = admin.pool().acquire().await?;
    let access = callers::load(&mut connection).await?;
    let mut unusable = access.callers.unusable;
    unusable.extend(access.credentials.unusable);
    unusable.extend(access.grants.unusable);
    let mut last = i64::MIN;
    loop {
        let ids = accounts::ids_after(&mut *connection, last).await?;
        let Some(end) = ids.last() else { return Ok(unusable) };
        last = *end;
        unusable.extend(accounts::load(&mut *connection, &ids).await?.unusable);
    }
}

fn rows_check(unusable: &[UnusableRow]) -> CheckResult {
    const SUBJECT: &str = "rows";
    if unusable.is_empty() {
        return CheckResult::ok(SUBJECT, "brokers can use all of them");
    }
    let named: Vec<_> = unusable.iter().map(ToString::to_string).collect();
    CheckResult::failure(SUBJECT, format!("brokers cannot use: {}", named.join("; ")))
}

fn roles_check(missing: &[String], superuser: bool) -> CheckResult {
    if !missing.is_empty() {
        return CheckResult::warning("roles", format!("missing: {}", missing.join(", ")));
    }
    if superuser {
        return CheckResult::warning(
            "roles",
            "the broker logs in as a superuser, to whom no restriction applies",
        );
    }
    CheckResult::ok("roles", "all there")
}

fn connections_check(can_be_crowded_out: bool) -> CheckResult {
    const SUBJECT: &str = "logins";
    if can_be_crowded_out {
        return CheckResult::warning(
            SUBJECT,
            "other logins can take all connections of the server: limit them (alter role … connection limit), or \
             reserve some for this one (reserved_connections and pg_use_reserved_connections, since Postgres 16)",
        );
    }
    CheckResult::ok(SUBJECT, "others cannot take all connections of the server")
}

fn deployment_check(ours: &str, remembered: Option<&str>) -> CheckResult {
    match remembered {
        None => CheckResult::ok(
            "upstream",
            format!("{ours}; the database does not belong to an upstream yet"),
        ),
        Some(theirs) if theirs == ours => CheckResult::ok("upstream", ours),
        Some(theirs) => CheckResult::failure(
            "upstream",
            format!("the settings say {ours}, but the database belongs to {theirs}"),
        ),
    }
}

fn secrets_check(
    checked: Result<Vec<UnopenedSecret<'_>>, WrongKeyring>,
    samples: usize,
) -> CheckResult {
    const SHOWN: usize = 5;
    match checked {
        Ok(unopened) if unopened.is_empty() => CheckResult::ok(
            "secrets",
            format!("the keyring opens the {samples} stored secrets that were tried"),
        ),
        Ok(unopened) => {
            let shown =
                unopened.iter().take(SHOWN).map(|it| format!("{}: {}", it.account, it.error));
            let shown: Vec<_> = shown.collect();
            let more = if unopened.len() > SHOWN { "; …" } else { "" };
            CheckResult::failure(
                "secrets",
                format!(
                    "{} of the {samples} stored secrets that were tried do not open: {}{more}",
                    unopened.len(),
                    shown.join("; ")
                ),
            )
        }
        Err(error) => CheckResult::failure("secrets", format!("{:#}", anyhow::Error::from(error))),
    }
}

/// Compares accounts, callers, credentials, grants and intake keys with what was recorded when they were changed,
/// and the records with the audit log.
async fn changes_check(admin: &Admin) -> Result<CheckResult, StoreError> {
    const SUBJECT: &str = "changes";
    let found = async {
        let unrecorded = admin.unrecorded_changes(SHOWN_CHANGES).await?;
        let unaudited = admin.unaudited_changes(SHOWN_CHANGES).await?;
        Ok((unrecorded, unaudited))
    };
    let (unrecorded, unaudited) = match found.await {
        Ok(found) => found,
        Err(error @ StoreError::MissingPrivilege(_)) => {
            return Ok(CheckResult::failure(SUBJECT, missing_privilege(&error)));
        }
        Err(error) => return Err(error),
    };
    let texts: Vec<_> = unrecorded
        .iter()
        .map(ToString::to_string)
        .chain(unaudited.iter().map(ToString::to_string))
        .collect();
    Ok(if texts.is_empty() {
        CheckResult::ok(SUBJECT, "accounts, callers and grants are as they were recorded")
    } else {
        CheckResult::failure(SUBJECT, texts.join("; "))
    })
}

fn missing_privilege(error: &StoreError) -> String {
    format!("{error}: run deploy/roles.sql again, as after each migration")
}

/// Checks that the minimum retention in the database is not longer than the retention in the settings.
fn retention_check(settings: &Settings, least: MinimumRetention) -> CheckResult {
    const SUBJECT: &str = "retention";
    let (calls, changes) = (settings.audit_retention, settings.change_retention);
    let limited = |kept| humantime::format_duration(kept).to_string();
    if !least.allows(calls, changes) {
        let text = format!(
            "the table audit_retention keeps calls for {} and changes for {} at least, which is \
             longer than the settings say",
            limited(least.calls),
            limited(least.changes)
        );
        return CheckResult::warning(SUBJECT, text);
    }
    let text = |kept: Option<_>| kept.map_or("ever".to_owned(), limited);
    CheckResult::ok(
        SUBJECT,
        format!("calls are kept for {}, changes for {}", text(calls), text(changes)),
    )
}

/// Checks that the rate is high enough: N accounts whose tokens have a lifetime L need
/// N ÷ (`refresh_at` · L) issues a second.
fn rate_check(load: Load, rate: f64, refresh_at: f64) -> CheckResult {
    let lifetime = load.mean_life_seconds.filter(|lifetime| *lifetime > 0.0);
    #[expect(clippy::cast_precision_loss, reason = "far fewer accounts than 2^53")]
    let needed = load.accounts as f64 / (refresh_at * lifetime.unwrap_or(ASSUMED_LIFETIME));
    let assumed =
        if lifetime.is_some() { "" } else { ", assuming that tokens are valid for an hour" };
    let text =
        format!("{} accounts need {needed:.2} issues a second of {rate}{assumed}", load.accounts);
    // Above four fifths of the rate, too little is left for retries.
    if needed > rate {
        CheckResult::failure(
            "rates",
            format!("{text}: some tokens will expire before they are replaced"),
        )
    } else if needed > 0.8 * rate {
        CheckResult::warning("rates", format!("{text}: little is left for retries"))
    } else {
        CheckResult::ok("rates", text)
    }
}

fn egress_check(last: Option<LastIssue>, expected: &[IpNet]) -> CheckResult {
    const SUBJECT: &str = "egress";
    let Some(last) = last else { return CheckResult::ok(SUBJECT, "no token was issued yet") };
    let Some(seen) = last.allowed_ip else {
        return CheckResult::ok(SUBJECT, "the newest token names no address");
    };
    let text =
        format!("the upstream last saw {seen} ({}, {})", last.account, LocalTime(last.issued_at));
    let expects = |seen: IpAddr| expected.iter().any(|network| network.contains(&seen));
    if expected.is_empty() || seen.parse().is_ok_and(expects) {
        CheckResult::ok(SUBJECT, text)
    } else {
        CheckResult::failure(
            SUBJECT,
            format!("{text}, which is not in TOKEN_BROKER_EXPECTED_EGRESS"),
        )
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::{super::result::Severity, *};

    #[test]
    fn the_rate_must_suffice_for_the_accounts() {
        let load = |accounts| Load { accounts, mean_life_seconds: None };
        assert_eq!(rate_check(load(1_000), 20.0, 0.75).severity, Severity::Ok);
        // 20 issues a second suffice for 54,000 accounts whose tokens are valid for an hour.
        assert_eq!(rate_check(load(50_000), 20.0, 0.75).severity, Severity::Warning);
        assert_eq!(rate_check(load(54_001), 20.0, 0.75).severity, Severity::Failure);
        let short = Load { accounts: 1_000, mean_life_seconds: Some(60.0) };
        assert_eq!(rate_check(short, 20.0, 0.75).severity, Severity::Failure);
    }

    #[test]
    fn the_address_that_the_upstream_saw_must_be_an_expected_one() {
        let seen = |ip: &str| {
            let issued_at = DateTime::UNIX_EPOCH;
            Some(LastIssue { account: "acme".into(), issued_at, allowed_ip: Some(ip.into()) })
        };
        let expected = ["192.0.2.0/24".parse().unwrap()];
        assert_eq!(egress_check(seen("192.0.2.7"), &expected).severity, Severity::Ok);
        assert_eq!(egress_check(seen("198.51.100.1"), &expected).severity, Severity::Failure);
        assert_eq!(egress_check(seen("not an address"), &expected).severity, Severity::Failure);
        assert_eq!(egress_check(seen("198.51.100.1"), &[]).severity, Severity::Ok);
        assert_eq!(egress_check(None, &expected).severity, Severity::Ok);
    }

    #[test]
    fn a_database_of_another_upstream_fails() {
        assert_eq!(deployment_check("staging", Some("production")).severity, Severity::Failure);
        assert_eq!(deployment_check("staging", Some("staging")).severity, Severity::Ok);
        assert_eq!(deployment_check("staging", None).severity, Severity::Ok);
    }
}
