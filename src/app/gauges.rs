//! What the broker tells of itself: readiness, and the gauges that are read at each scrape.

use std::sync::{Arc, atomic::Ordering};

use chrono::TimeDelta;

use super::world::World;
use crate::{
    api::ops::{Check, Readiness},
    domain::refresh_state::AccountState,
    services::connectivity::Connectivity,
    telemetry::{AccountGauges, JournalGauges},
};

/// The skew before the first issue.
pub(super) const NO_SKEW: i64 = i64::MIN;

/// Has the metrics read the world at each scrape.
pub(super) fn export(world: &World) {
    let (cache, journal, clock) = (world.cache.clone(), world.journal.clone(), world.clock.clone());
    let (skew, tls) = (world.upstream_skew_ms.clone(), world.tls.clone());
    world.metrics.on_scrape(move |gauges| {
        let now = clock.now();
        for slot in cache.slots() {
            let view = slot.view();
            *count_of(&mut gauges.accounts, view.state(now)) += 1;
            let end = view.live(now).map(|token| token.expires_at);
            gauges.earliest_token_end =
                [gauges.earliest_token_end, end].into_iter().flatten().min();
        }
        let skew = Some(skew.load(Ordering::Relaxed)).filter(|skew| *skew != NO_SKEW);
        gauges.upstream_clock_skew = skew.map(TimeDelta::milliseconds);
        gauges.tls_not_after = tls.as_ref().map(|tls| tls.not_after());
        let stats = journal.stats();
        gauges.journal = JournalGauges {
            appended: stats.appended,
            durable: stats.durable,
            failed: stats.failed,
            bytes: stats.segments_bytes,
            undelivered: stats.undelivered,
            last_delivered_at: stats.last_delivered_at,
        };
    });
}

fn count_of(gauges: &mut AccountGauges, state: AccountState) -> &mut u64 {
    match state {
        AccountState::Pending => &mut gauges.pending,
        AccountState::Fresh => &mut gauges.fresh,
        AccountState::Refreshing => &mut gauges.refreshing,
        AccountState::Expired => &mut gauges.expired,
        AccountState::Rejected => &mut gauges.rejected,
        AccountState::EgressRejected => &mut gauges.egress_rejected,
        AccountState::Unreachable => &mut gauges.unreachable,
        AccountState::Disabled => &mut gauges.disabled,
    }
}

/// Tells how things stand: ready is a journal that can be written and everything loaded once. The
/// database and the upstream are told of, but not required: live tokens are served without them.
pub(super) fn readiness(world: &World) -> Arc<dyn Fn() -> Readiness + Send + Sync> {
    let (cache, journal, clock) = (world.cache.clone(), world.journal.clone(), world.clock.clone());
    let (reach, ready) = (world.reach.clone(), world.ready.clone());
    let outage = world.outage.clone();
    Arc::new(move || {
        let now = clock.now();
        let (mut live, mut unreachable) = (0, 0);
        for slot in cache.slots() {
            let view = slot.view();
            live += usize::from(view.live(now).is_some());
            unreachable += usize::from(view.state(now) == AccountState::Unreachable);
        }
        let accounts = cache.len();
        let serving = ready.load(Ordering::Relaxed);
        let (writable, roomy) = (journal.is_writable(), journal.is_ready());
        let standing = reach.standing();
        let answered = reach.has_answered();
        let problem = reach.problem();
        let reached = answered && standing == Connectivity::Connected;
        let undelivered = journal.stats().undelivered;
        let check = |name, ok, required, detail: String| Check { name, ok, required, detail };
        Readiness {
            checks: vec![
                check(
                    "serving",
                    serving,
                    true,
                    words(serving, "accounts and callers are loaded", "starting or stopping"),
                ),
                check(
                    "journal",
                    roomy,
                    true,
                    match (writable, roomy) {
                        (false, _) => "cannot be written: calls are refused",
                        (true, false) => "is nearly full: calls are still answered",
                        (true, true) => "can be written",
                    }
                    .to_owned(),
                ),
                check(
                    "postgres",
                    reached && problem.is_none(),
                    false,
                    match (standing, problem) {
                        (Connectivity::SoleReplica, _) => {
                            "does not answer; issuing goes on without it".to_owned()
                        }
                        (Connectivity::Partitioned, _) => {
                            "does not answer; serving what is known".to_owned()
                        }
                        (Connectivity::Connected, _) if !answered => {
                            "has not answered yet".to_owned()
                        }
                        (Connectivity::Connected, Some(problem)) => {
                            format!("answers, but its changes cannot be followed: {problem}")
                        }
                        (Connectivity::Connected, None) => "followed".to_owned(),
                    },
                ),
                check(
                    "delivery",
                    reached,
                    false,
                    format!("{undelivered} audit records wait for delivery"),
                ),
                check(
                    "upstream",
                    unreachable == 0 && !outage.is_on(),
                    false,
                    format!(
                        "{}{unreachable} of {accounts} accounts cannot reach it; {live} have a live token",
                        if outage.is_on() {
                            "is away: one account at a time is tried; "
                        } else {
                            ""
                        },
                    ),
                ),
            ],
        }
    })
}

fn words(ok: bool, yes: &str, no: &str) -> String {
    if ok { yes } else { no }.to_owned()
}
