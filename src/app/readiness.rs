//! The checks of `/readyz`.
//!
//! A replica is ready when accounts and callers are loaded, the audit journal has room, and the database can be
//! trusted with the secrets of admins (see [`trust_monitor`](crate::services::trust_monitor)). It stays
//! ready while Postgres or the upstream does not answer: it can still serve live tokens, and no other
//! replica could do better. It is not ready while it serves nothing, since another replica may issue that does
//! not know of it: then that one serves.
//!
//! What an operator sees when the journal's disk fills up, or the journal reaches `JOURNAL_MAX_BYTES`:
//! - Nearly full: the check `journal` fails, `/readyz` answers 503, gRPC health says `NOT_SERVING` (see
//!   `grpc_health.rs`), and calls are still answered.
//! - Full: the same, and each call is refused with `UNAVAILABLE` and the reason `AUDIT_UNAVAILABLE`,
//!   because no answer may leave without its record. `token_broker_journal_failed_total` counts the
//!   records that could not be written.
//!   The check also says why: the disk, or files of the state directory that another program removed.
//! - Room again: calls are answered and all checks pass again without a restart, and the journal gets a
//!   record that says how many records are missing.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
};

use super::components::Components;
use crate::{
    api::ops::{Check, Readiness},
    audit::journal::Journal,
    domain::{clock::Timestamp, refresh_state::AccountState},
    services::{
        account_cache::AccountCache,
        connectivity::{Connectivity, DatabaseConnectivity},
        feed_health::FailingDuty,
        heartbeat::HEARTBEAT_DUTY,
    },
    store::UnusableRow,
};

/// The most unusable rows that an answer names.
const MAX_NAMED_ROWS: usize = 20;

/// Returns a function that runs all checks. The function does not block.
pub(super) fn checks(components: &Components) -> Arc<dyn Fn() -> Readiness + Send + Sync> {
    let (cache, journal) = (components.cache.clone(), components.journal.clone());
    let (connectivity, serving) = (components.connectivity.clone(), components.serving.clone());
    let (outage, clock) = (components.outage.clone(), components.clock.clone());
    let (trust, health) = (components.trust.clone(), components.feed_health.clone());
    let (gate, keyring) = (components.gate.clone(), components.keyring_health.clone());
    Arc::new(move || Readiness {
        checks: vec![
            serving_check(serving.load(Ordering::Relaxed)),
            trust_check(trust.fault()),
            keyring_check(keyring.fault()),
            journal_check(&journal),
            postgres_check(
                &connectivity,
                &health.failing(),
                gate.problem().as_deref(),
                gate.refusal(),
            ),
            rows_check(&health.unusable()),
            delivery_check(&connectivity, &journal),
            upstream_check(&cache, outage.is_on(), clock.now()),
        ],
    })
}

fn serving_check(serving: bool) -> Check {
    let detail = if serving { "accounts and callers are loaded" } else { "starting or stopping" };
    Check { name: "serving", ok: serving, required: true, detail: detail.into() }
}

fn trust_check(fault: Option<String>) -> Check {
    let ok = fault.is_none();
    let detail = fault.unwrap_or_else(|| "the published intake key is the keyring's".into());
    Check { name: "trust", ok, required: true, detail }
}

/// A file that cannot be used is no reason to send calls elsewhere: the keys in use do what they did before.
fn keyring_check(fault: Option<String>) -> Check {
    let ok = fault.is_none();
    let detail = match fault {
        Some(fault) => {
            format!("its file cannot be used, and the previous keyring stays in use: {fault}")
        }
        None => "is that of its file".into(),
    };
    Check { name: "keyring", ok, required: false, detail }
}

fn journal_check(journal: &Journal) -> Check {
    let (writable, has_room) = (journal.is_writable(), journal.is_ready());
    let problem = journal.problem().map(|problem| format!(" ({problem})")).unwrap_or_default();
    let state = match (writable, has_room) {
        (false, _) => format!("cannot be written: calls are refused{problem}"),
        (true, false) => "is nearly full: calls are still answered".into(),
        (true, true) => "can be written".into(),
    };
    let lost = match journal.stats().lost {
        0 => String::new(),
        lost => format!(
            "; {lost} records are lost, which another program removed from it before they were in Postgres"
        ),
    };
    let unreadable: Vec<_> = (journal.unreadable().iter())
        .map(|(chain, why)| format!("; chain {chain} cannot be read to its end ({why})"))
        .collect();
    let detail = state + &lost + &unreadable.concat();
    Check { name: "journal", ok: has_room, required: true, detail }
}

/// `unverified` says why the database must not be used, if so, and `refusal` why it takes no new connections.
fn postgres_check(
    connectivity: &DatabaseConnectivity,
    failing: &[FailingDuty],
    unverified: Option<&str>,
    refusal: Option<String>,
) -> Check {
    let ok =
        answers(connectivity) && failing.is_empty() && unverified.is_none() && refusal.is_none();
    let state = match unverified {
        Some(reason) => format!("is not used: {reason}"),
        None => "does not answer".into(),
    };
    let detail = match connectivity.current() {
        Connectivity::SoleReplica => format!("{state}; issuing goes on without it"),
        Connectivity::Partitioned => format!("{state}; serving what is known"),
        Connectivity::Unacknowledged => format!(
            "{state}; nothing is served, since a replica may issue that does not know of this one"
        ),
        Connectivity::Connected if unverified.is_some() => state,
        Connectivity::Connected if !connectivity.has_answered() => "has not answered yet".into(),
        Connectivity::Connected => answers_but(failing, refusal),
    };
    let required = connectivity.current() == Connectivity::Unacknowledged;
    Check { name: "postgres", ok, required, detail }
}

/// Returns the state of a database that answers: what it refuses, if anything.
fn answers_but(failing: &[FailingDuty], refusal: Option<String>) -> String {
    let refusal = refusal.map(|why| format!("takes no new connections: {why}"));
    let (heartbeat, duties): (Vec<_>, Vec<_>) =
        failing.iter().cloned().partition(|failing| failing.duty == HEARTBEAT_DUTY);
    let unwritten = heartbeat.first().map(|failing| {
        format!("the heartbeat cannot be stored, and maybe nothing else: {}", failing.problem)
    });
    let unread = (!duties.is_empty())
        .then(|| format!("its changes cannot be followed: {}", problems(&duties)));
    let but: Vec<_> = refusal.into_iter().chain(unwritten).chain(unread).collect();
    if but.is_empty() { "answers".into() } else { format!("answers, but {}", but.join("; ")) }
}

/// Returns the problems, each once with the duties that have it.
fn problems(failing: &[FailingDuty]) -> String {
    let mut duties_of: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for FailingDuty { duty, problem } in failing {
        duties_of.entry(problem).or_default().push(duty);
    }
    let texts =
        duties_of.into_iter().map(|(problem, duties)| format!("{problem} ({})", duties.join(", ")));
    texts.collect::<Vec<_>>().join("; ")
}

fn rows_check(unusable: &[UnusableRow]) -> Check {
    let detail = if unusable.is_empty() {
        "all can be used".into()
    } else {
        let named: Vec<_> = unusable.iter().take(MAX_NAMED_ROWS).map(ToString::to_string).collect();
        let more = if unusable.len() > MAX_NAMED_ROWS { "; …" } else { "" };
        format!("{} cannot be used: {}{more}", unusable.len(), named.join("; "))
    };
    Check { name: "rows", ok: unusable.is_empty(), required: false, detail }
}

fn delivery_check(connectivity: &DatabaseConnectivity, journal: &Journal) -> Check {
    let detail = format!("{} audit records wait for delivery", journal.stats().undelivered);
    Check { name: "delivery", ok: answers(connectivity), required: false, detail }
}

fn answers(connectivity: &DatabaseConnectivity) -> bool {
    connectivity.has_answered() && connectivity.current() == Connectivity::Connected
}

fn upstream_check(cache: &AccountCache, outage: bool, now: Timestamp) -> Check {
    let (mut live, mut unreachable) = (0, 0);
    for entry in cache.all() {
        let account = entry.snapshot();
        live += usize::from(account.live_token(now).is_some());
        unreachable += usize::from(account.state(now) == AccountState::Unreachable);
    }
    let accounts = cache.len();
    let probing = if outage { "is away: one account at a time is tried; " } else { "" };
    let detail = format!(
        "{probing}{unreachable} of {accounts} accounts cannot reach it; {live} have a live token"
    );
    Check { name: "upstream", ok: unreachable == 0 && !outage, required: false, detail }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_problem_is_named_once_with_the_duties_that_have_it() {
        let duty = |duty, problem: &str| FailingDuty { duty, problem: problem.into() };
        let failing = [duty("access", "b"), duty("accounts", "a"), duty("intake", "b")];
        assert_eq!(problems(&failing), "a (accounts); b (access, intake)");
    }

    #[test]
    fn a_database_that_answers_is_shown_with_what_it_refuses() {
        let intake = || vec![FailingDuty { duty: "intake", problem: "a".into() }];
        for (failing, refusal, expected) in [
            (vec![], None, "answers"),
            (vec![], Some("b"), "answers, but takes no new connections: b"),
            (intake(), None, "answers, but its changes cannot be followed: a (intake)"),
            (
                vec![FailingDuty { duty: HEARTBEAT_DUTY, problem: "c".into() }],
                None,
                "answers, but the heartbeat cannot be stored, and maybe nothing else: c",
            ),
            (
                intake(),
                Some("b"),
                "answers, but takes no new connections: b; its changes cannot be followed: a (intake)",
            ),
        ] {
            assert_eq!(answers_but(&failing, refusal.map(Into::into)), expected);
        }
    }

    #[test]
    fn unusable_rows_are_named_up_to_a_limit() {
        let rows: Vec<_> = (1..=30).map(|id| UnusableRow::new("grants", id, "malformed")).collect();
        let check = rows_check(&rows);
        assert!(!check.ok && !check.required);
        assert!(
            check.detail.starts_with("30 cannot be used: grants row 1: malformed; grants row 2")
        );
        assert!(check.detail.ends_with("grants row 20: malformed; …"));
        assert!(rows_check(&[]).ok);
    }
}
