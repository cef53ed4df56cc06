//! Checks of the keyring, the TLS files and the database. None of them changes anything.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{super::time::LocalTime, result::CheckResult};
use crate::{
    app::{WrongKeyring, check_keyring},
    config::Settings,
    crypto::Keyring,
    domain::clock::{Clock, Timestamp},
    store::{
        StoreError, UnusableRow, accounts,
        admin::{Admin, Attribution, LastIssue, Load},
        callers,
        retention::{self, MinimumRetention},
    },
    tls::Tls,
};

/// The roles that `deploy/roles.sql` creates.
const ROLES: [&str; 4] = [
    "token_broker_runtime",
    "token_broker_accounts",
    "token_broker_access",
    "token_broker_auditor",
];
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
    let Some(files) = settings.tls.clone() else {
        return CheckResult::warning("serving", "without TLS");
    };
    match Tls::load(files, Clock::System) {
        Ok(tls) => {
            let end = Timestamp::from_timestamp_secs(tls.not_after()).unwrap_or_default();
            let text = format!("TLS; the certificate ends at {}", LocalTime(end));
            let ended = end <= Clock::System.now();
            if ended {
                CheckResult::failure("serving", text)
            } else {
                CheckResult::ok("serving", text)
            }
        }
        Err(error) => CheckResult::failure("serving", error.to_string()),
    }
}

/// Runs all checks that need the database.
pub(super) async fn database(settings: &Settings, keyring: Option<&Keyring>) -> Vec<CheckResult> {
    let mut results = Vec::new();
    if let Err(error) = add_database_checks(settings, keyring, &mut results).await {
        results.push(CheckResult::failure("database", error.to_string()));
    }
    results
}

async fn add_database_checks(
    settings: &Settings,
    keyring: Option<&Keyring>,
    results: &mut Vec<CheckResult>,
) -> Result<(), StoreError> {
    let database = settings.database_url.database("token-broker check")?;
    let admin = Admin::connect(&database, Attribution::default()).await?;
    results
        .push(CheckResult::ok("database", format!("PostgreSQL {}", admin.server_version().await?)));
    match database.check_schema().await {
        Ok(()) => results.push(CheckResult::ok("schema", "has every migration of this release")),
        Err(error) => {
            results.push(CheckResult::failure("schema", error.to_string()));
            return Ok(());
        }
    }
    let roles = ROLES.map(ToOwned::to_owned);
    let (missing, superuser) = admin.missing_roles(&roles).await?;
    results.push(roles_check(&missing, superuser));
    let remembered = admin.upstream().await?;
    results.push(deployment_check(&settings.upstream.to_string(), remembered.as_deref()));
    if let Some(keyring) = keyring {
        let published = admin.published_keys().await?;
        let ours = keyring.intake_public();
        let known = published.iter().any(|key| key.key_id == ours.key_id().as_str());
        results.push(intake_check(known, published.is_empty()));
        let samples = accounts::sealed_samples(admin.pool()).await?;
        results.push(secrets_check(check_keyring(keyring, &samples), samples.len()));
    }
    results.push(rows_check(&unusable_rows(&admin).await?));
    let live = admin.instances().await?.into_iter().filter(|it| it.live).count();
    results.push(match live {
        0 => CheckResult::warning("brokers", "none has sent a heartbeat in the last minute"),
        live => CheckResult::ok("brokers", format!("{live} live")),
    });
    results.push(match retention::minimum_retention(admin.pool()).await {
        Ok(least) => retention_check(settings, least),
        Err(StoreError::Refused(why)) => CheckResult::failure(
            "roles",
            format!("{why}: run deploy/roles.sql again, as after each migration"),
        ),
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

fn secrets_check(checked: Result<(), WrongKeyring>, samples: usize) -> CheckResult {
    match checked {
        Ok(()) => CheckResult::ok(
            "secrets",
            format!("the keyring opens the {samples} stored secrets that were tried"),
        ),
        Err(error) => CheckResult::failure("secrets", format!("{:#}", anyhow::Error::from(error))),
    }
}

fn intake_check(known: bool, none_published: bool) -> CheckResult {
    if known {
        return CheckResult::ok("intake key", "published");
    }
    let text = if none_published {
        "none is published yet: the first broker that starts does so"
    } else {
        "the keyring's key is not among the published ones: do the brokers have another keyring?"
    };
    CheckResult::warning("intake key", text)
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
