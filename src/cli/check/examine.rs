//! The examinations of what is here. Each makes findings; none changes anything.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{super::time::LocalTime, Finding};
use crate::{
    app::{self, StartError},
    config::Settings,
    crypto::Keyring,
    domain::clock::{Clock, Timestamp},
    store::{
        StoreError, accounts,
        admin::{Admin, Attribution, LastIssue, Load},
        retention::{self, MinimumRetention},
    },
    tls::Tls,
};

/// The roles that the documented script makes.
const ROLES: [&str; 4] = [
    "token_broker_runtime",
    "token_broker_accounts",
    "token_broker_access",
    "token_broker_auditor",
];
/// A token's life, in seconds, where none is known: that of the upstream's own sample.
const USUAL_LIFE: f64 = 3_600.0;

/// The keyring, and what it is.
pub(super) fn keyring(settings: &Settings) -> (Finding, Option<Keyring>) {
    match Keyring::load(&settings.keyring_file) {
        Ok(keyring) => {
            let text = format!("{} keys", keyring.key_ids().len());
            (Finding::good("keyring", text), Some(keyring))
        }
        Err(error) => (Finding::bad("keyring", error.to_string()), None),
    }
}

/// What TLS would be served with.
pub(super) fn tls(settings: &Settings) -> Finding {
    let Some(files) = settings.tls.clone() else {
        return Finding::doubtful("serving", "without TLS");
    };
    match Tls::load(files, Clock::System) {
        Ok(tls) => {
            let end = Timestamp::from_timestamp_secs(tls.not_after()).unwrap_or_default();
            let text = format!("TLS; the certificate ends at {}", LocalTime(end));
            let ended = end <= Clock::System.now();
            if ended { Finding::bad("serving", text) } else { Finding::good("serving", text) }
        }
        Err(error) => Finding::bad("serving", error.to_string()),
    }
}

/// All that the database tells.
pub(super) async fn database(settings: &Settings, keyring: Option<&Keyring>) -> Vec<Finding> {
    let mut findings = Vec::new();
    if let Err(error) = ask(settings, keyring, &mut findings).await {
        findings.push(Finding::bad("database", error.to_string()));
    }
    findings
}

async fn ask(
    settings: &Settings,
    keyring: Option<&Keyring>,
    findings: &mut Vec<Finding>,
) -> Result<(), StoreError> {
    let database = settings.database_url.database("token-broker check")?;
    let admin = Admin::connect(&database, Attribution::default()).await?;
    findings
        .push(Finding::good("database", format!("PostgreSQL {}", admin.server_version().await?)));
    match database.check_schema().await {
        Ok(()) => findings.push(Finding::good("schema", "has every migration of this release")),
        Err(error) => {
            findings.push(Finding::bad("schema", error.to_string()));
            return Ok(());
        }
    }
    let roles = ROLES.map(ToOwned::to_owned);
    let (missing, superuser) = admin.missing_roles(&roles).await?;
    findings.push(roles_finding(&missing, superuser));
    let remembered = admin.upstream().await?;
    findings.push(deployment_finding(&settings.upstream.to_string(), remembered.as_deref()));
    if let Some(keyring) = keyring {
        let published = admin.published_keys().await?;
        let ours = keyring.intake_public();
        let known = published.iter().any(|key| key.key_id == ours.key_id().as_str());
        findings.push(intake_finding(known, published.is_empty()));
        let samples = accounts::sealed_samples(admin.pool()).await?;
        findings.push(secrets_finding(app::prove(keyring, &samples), samples.len()));
    }
    let live = admin.instances().await?.into_iter().filter(|it| it.live).count();
    findings.push(match live {
        0 => Finding::doubtful("brokers", "none was heard of in the last minute"),
        live => Finding::good("brokers", format!("{live} live")),
    });
    findings.push(match retention::least_kept(admin.pool()).await {
        Ok(least) => retention_finding(settings, least),
        Err(why @ StoreError::MissingPrivilege(_)) => Finding::bad(
            "roles",
            format!("{why}: run deploy/roles.sql again, as after each migration"),
        ),
        Err(error) => return Err(error),
    });
    findings.push(rate_finding(admin.load().await?, settings.upstream_rate, settings.refresh_at));
    findings.push(egress_finding(admin.last_issue().await?, &settings.expected_egress));
    Ok(())
}

fn roles_finding(missing: &[String], superuser: bool) -> Finding {
    if !missing.is_empty() {
        return Finding::doubtful("roles", format!("missing: {}", missing.join(", ")));
    }
    if superuser {
        return Finding::doubtful("roles", "the broker's login is a superuser's: nothing binds it");
    }
    Finding::good("roles", "all there")
}

fn deployment_finding(ours: &str, remembered: Option<&str>) -> Finding {
    match remembered {
        None => Finding::good("upstream", format!("{ours}; the database belongs to none yet")),
        Some(theirs) if theirs == ours => Finding::good("upstream", ours),
        Some(theirs) => Finding::bad(
            "upstream",
            format!("the settings say {ours}, but the database belongs to {theirs}"),
        ),
    }
}

fn secrets_finding(proven: Result<(), StartError>, samples: usize) -> Finding {
    match proven {
        Ok(()) => Finding::good(
            "secrets",
            format!("the keyring opens {samples} stored ones that were tried"),
        ),
        Err(error) => Finding::bad("secrets", error.to_string()),
    }
}

fn intake_finding(known: bool, none_published: bool) -> Finding {
    if known {
        return Finding::good("intake key", "published");
    }
    let text = if none_published {
        "none is published yet: the first broker does so"
    } else {
        "the keyring's is not among the published: do the brokers have another keyring?"
    };
    Finding::doubtful("intake key", text)
}

/// Whether the database lets records go when the settings say.
fn retention_finding(settings: &Settings, least: MinimumRetention) -> Finding {
    const SUBJECT: &str = "retention";
    let (calls, changes) = (settings.audit_retention, settings.change_retention);
    if !least.allows(calls, changes) {
        let days = |kept| humantime::format_duration(kept).to_string();
        let text = format!(
            "the table audit_retention keeps calls for {} and changes for {} at least, which is \
             longer than the settings say",
            days(least.calls),
            days(least.changes)
        );
        return Finding::doubtful(SUBJECT, text);
    }
    let told = |kept: Option<std::time::Duration>| {
        kept.map_or("ever".to_owned(), |kept| humantime::format_duration(kept).to_string())
    };
    Finding::good(
        SUBJECT,
        format!("calls are kept for {}, changes for {}", told(calls), told(changes)),
    )
}

/// Whether the rate can carry the accounts: N accounts of life L need N ÷ (`refresh_at` L) a second.
fn rate_finding(load: Load, rate: f64, refresh_at: f64) -> Finding {
    let life = load.mean_life_seconds.filter(|life| *life > 0.0);
    #[expect(clippy::cast_precision_loss, reason = "far fewer accounts than 2^53")]
    let needed = load.accounts as f64 / (refresh_at * life.unwrap_or(USUAL_LIFE));
    let assumed = if life.is_some() { "" } else { ", assuming that tokens live an hour" };
    let text =
        format!("{} accounts need {needed:.2} issues a second of {rate}{assumed}", load.accounts);
    // More than four fifths leave no room for retries.
    if needed > rate {
        Finding::bad("rates", format!("{text}: tokens will end before their turn comes"))
    } else if needed > 0.8 * rate {
        Finding::doubtful("rates", format!("{text}: little is left for retries"))
    } else {
        Finding::good("rates", text)
    }
}

fn egress_finding(last: Option<LastIssue>, expected: &[IpNet]) -> Finding {
    const SUBJECT: &str = "egress";
    let Some(last) = last else { return Finding::good(SUBJECT, "no token was issued yet") };
    let Some(seen) = last.allowed_ip else {
        return Finding::good(SUBJECT, "the newest token names no address");
    };
    let text =
        format!("the upstream last saw {seen} ({}, {})", last.account, LocalTime(last.issued_at));
    let fits = |seen: IpAddr| expected.iter().any(|network| network.contains(&seen));
    if expected.is_empty() || seen.parse().is_ok_and(fits) {
        Finding::good(SUBJECT, text)
    } else {
        Finding::bad(SUBJECT, format!("{text}, which is not in TOKEN_BROKER_EXPECTED_EGRESS"))
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::{super::Verdict, *};

    #[test]
    fn the_rate_must_carry_the_accounts() {
        let load = |accounts| Load { accounts, mean_life_seconds: None };
        assert_eq!(rate_finding(load(1_000), 20.0, 0.75).verdict, Verdict::Good);
        // 20 a second carry 54,000 accounts whose tokens live an hour.
        assert_eq!(rate_finding(load(50_000), 20.0, 0.75).verdict, Verdict::Doubtful);
        assert_eq!(rate_finding(load(54_001), 20.0, 0.75).verdict, Verdict::Bad);
        let short = Load { accounts: 1_000, mean_life_seconds: Some(60.0) };
        assert_eq!(rate_finding(short, 20.0, 0.75).verdict, Verdict::Bad);
    }

    #[test]
    fn the_address_that_the_upstream_saw_is_held_against_the_expected_ones() {
        let seen = |ip: &str| {
            let issued_at = DateTime::UNIX_EPOCH;
            Some(LastIssue { account: "acme".into(), issued_at, allowed_ip: Some(ip.into()) })
        };
        let expected = ["192.0.2.0/24".parse().unwrap()];
        assert_eq!(egress_finding(seen("192.0.2.7"), &expected).verdict, Verdict::Good);
        assert_eq!(egress_finding(seen("198.51.100.1"), &expected).verdict, Verdict::Bad);
        assert_eq!(egress_finding(seen("not an address"), &expected).verdict, Verdict::Bad);
        assert_eq!(egress_finding(seen("198.51.100.1"), &[]).verdict, Verdict::Good);
        assert_eq!(egress_finding(None, &expected).verdict, Verdict::Good);
    }

    #[test]
    fn a_database_of_another_upstream_is_refused() {
        assert_eq!(deployment_finding("staging", Some("production")).verdict, Verdict::Bad);
        assert_eq!(deployment_finding("staging", Some("staging")).verdict, Verdict::Good);
        assert_eq!(deployment_finding("staging", None).verdict, Verdict::Good);
    }
}
