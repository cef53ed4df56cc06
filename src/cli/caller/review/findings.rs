//! The decision which grants, callers and bearers a review reports.

use std::{
    collections::{BTreeMap, HashSet},
    time::Duration,
};

use serde::Serialize;

use crate::{
    cli::time::LocalTime,
    domain::{
        account_pattern::AccountPattern,
        caller::Right,
        clock::{Timestamp, delta},
    },
    store::{
        admin::{BearerSummary, CallerSummary, CredentialDetails, GrantDetails, GrantSummary},
        audit::CallerUse,
    },
};

/// The times by which a review judges.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) now: Timestamp,
    /// What is older, and was not used since, is reported.
    pub(super) unused_since: Timestamp,
    /// What ends by then is reported.
    pub(super) ending_before: Timestamp,
}

impl Limits {
    pub(super) fn new(now: Timestamp, unused: Duration, ending: Duration) -> Self {
        Self { now, unused_since: now - delta(unused), ending_before: now + delta(ending) }
    }
}

/// What an admin should look at.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "finding", rename_all = "snake_case")]
pub(super) enum Finding {
    /// The caller made no call at all.
    IdleCaller { caller: String, created_at: LocalTime, grants: usize },
    /// The caller made no call for which it needs the grant.
    UnusedGrant { caller: String, pattern: String, rights: Vec<String>, created_at: LocalTime },
    /// The grant ends soon.
    EndingGrant { caller: String, pattern: String, ends_at: LocalTime },
    /// The bearer never ends.
    EndlessBearer { caller: String, bearer: i64, created_at: LocalTime },
    /// The bearer ends soon.
    EndingBearer { caller: String, bearer: i64, ends_at: LocalTime },
}

impl Finding {
    /// Returns whether the finding is true only if no calls are missing in the log.
    pub(super) fn needs_calls(&self) -> bool {
        matches!(self, Self::IdleCaller { .. } | Self::UnusedGrant { .. })
    }
}

/// What callers did, as far as it was read.
#[derive(Clone, Debug, Default)]
pub(super) struct Used(BTreeMap<String, Calls>);

#[derive(Clone, Debug, Default)]
struct Calls {
    /// The accounts whose tokens were asked for or pushed.
    got: HashSet<String>,
    /// The accounts of which a token was reported.
    reported: HashSet<String>,
    listed: bool,
}

impl Used {
    pub(super) fn add(&mut self, it: CallerUse) {
        let calls = self.0.entry(it.caller).or_default();
        if !it.granted {
            return;
        }
        match (&*it.event, it.account) {
            ("get_token" | "token_pushed", Some(account)) => _ = calls.got.insert(account),
            ("report_rejected_token", Some(account)) => _ = calls.reported.insert(account),
            ("list_accounts", _) => calls.listed = true,
            _ => {}
        }
    }
}

/// The enabled callers with what is in force of them. A disabled one cannot call, and so is not reported.
#[derive(Debug, Default)]
pub(super) struct Callers(BTreeMap<String, Reviewed>);

#[derive(Debug)]
struct Reviewed {
    created_at: Timestamp,
    bearers: Vec<CredentialDetails>,
    grants: Vec<ReviewedGrant>,
}

#[derive(Debug)]
struct ReviewedGrant {
    grant: GrantDetails,
    /// `None` if nothing can match it.
    pattern: Option<AccountPattern>,
}

impl ReviewedGrant {
    fn is_used(&self, calls: &Calls) -> bool {
        let has = |right: Right| self.grant.rights.iter().any(|it| it == right.as_str());
        (has(Right::Get) && self.matches_any(&calls.got))
            || (has(Right::Report) && self.matches_any(&calls.reported))
            || (has(Right::List) && calls.listed && !has(Right::Get) && !has(Right::Report))
    }

    fn matches_any(&self, accounts: &HashSet<String>) -> bool {
        let Some(pattern) = &self.pattern else { return false };
        match pattern.as_name() {
            Some(name) => accounts.contains(name.as_str()),
            None => accounts.iter().any(|account| pattern.matches(account)),
        }
    }
}

impl Callers {
    pub(super) fn new(
        callers: Vec<CallerSummary>,
        bearers: Vec<BearerSummary>,
        grants: Vec<GrantSummary>,
    ) -> Self {
        let enabled = callers.into_iter().filter(|caller| caller.enabled);
        let mut by_name: BTreeMap<_, _> = enabled
            .map(|caller| {
                let created_at = caller.created_at;
                (caller.name, Reviewed { created_at, bearers: Vec::new(), grants: Vec::new() })
            })
            .collect();
        for BearerSummary { caller, credential } in bearers {
            if let Some(caller) = by_name.get_mut(&caller).filter(|_| credential.in_force) {
                caller.bearers.push(credential);
            }
        }
        for GrantSummary { caller, grant } in grants {
            if let Some(caller) = by_name.get_mut(&caller).filter(|_| grant.in_force) {
                let pattern = grant.pattern.parse().ok();
                caller.grants.push(ReviewedGrant { grant, pattern });
            }
        }
        Self(by_name)
    }

    /// Returns the names of the callers about which further calls would tell something.
    pub(super) fn not_all_used(&self, used: &Used, limits: &Limits) -> Vec<String> {
        let is_open = |(name, caller): &(&String, &Reviewed)| {
            (caller.created_at < limits.unused_since && !used.0.contains_key(*name))
                || caller.unused_grants(used.0.get(*name), limits).next().is_some()
        };
        self.0.iter().filter(is_open).map(|(name, _)| name.clone()).collect()
    }

    /// Returns what a review reports, by caller.
    pub(super) fn findings(&self, used: &Used, limits: &Limits) -> Vec<Finding> {
        let of_caller = |(name, caller): (&String, &Reviewed)| {
            let mut findings = Vec::new();
            let caller_name = || name.clone();
            let calls = used.0.get(name);
            if calls.is_none() && caller.created_at < limits.unused_since {
                findings.push(Finding::IdleCaller {
                    caller: caller_name(),
                    created_at: LocalTime(caller.created_at),
                    grants: caller.grants.len(),
                });
            } else {
                findings.extend(caller.unused_grants(calls, limits).map(|grant| {
                    Finding::UnusedGrant {
                        caller: caller_name(),
                        pattern: grant.pattern.clone(),
                        rights: grant.rights.clone(),
                        created_at: LocalTime(grant.created_at),
                    }
                }));
            }
            let ends_soon = |end: &Timestamp| *end <= limits.ending_before;
            for ReviewedGrant { grant, .. } in &caller.grants {
                findings.extend(grant.ends_at.filter(ends_soon).map(|end| Finding::EndingGrant {
                    caller: caller_name(),
                    pattern: grant.pattern.clone(),
                    ends_at: LocalTime(end),
                }));
            }
            for bearer in &caller.bearers {
                match bearer.ends_at {
                    None => findings.push(Finding::EndlessBearer {
                        caller: caller_name(),
                        bearer: bearer.id,
                        created_at: LocalTime(bearer.created_at),
                    }),
                    Some(end) if ends_soon(&end) => findings.push(Finding::EndingBearer {
                        caller: caller_name(),
                        bearer: bearer.id,
                        ends_at: LocalTime(end),
                    }),
                    Some(_) => {}
                }
            }
            findings
        };
        self.0.iter().flat_map(of_caller).collect()
    }
}

impl Reviewed {
    fn unused_grants<'a>(
        &'a self,
        calls: Option<&'a Calls>,
        limits: &Limits,
    ) -> impl Iterator<Item = &'a GrantDetails> {
        let unused_since = limits.unused_since;
        self.grants
            .iter()
            .filter(move |it| {
                it.grant.created_at < unused_since && !calls.is_some_and(|calls| it.is_used(calls))
            })
            .map(|it| &it.grant)
    }
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, TimeDelta};

    use super::*;

    const DAY: Duration = Duration::from_hours(24);

    fn day(number: i64) -> Timestamp {
        DateTime::UNIX_EPOCH + TimeDelta::days(number)
    }

    /// Now is day 100; what is older than day 10 may be reported as unused, and what ends until day 114 as ending.
    fn limits() -> Limits {
        Limits::new(day(100), 90 * DAY, 14 * DAY)
    }

    fn caller(name: &str, created: i64) -> CallerSummary {
        CallerSummary {
            name: name.into(),
            enabled: true,
            rate_limit: None,
            description: String::new(),
            created_at: day(created),
            credentials: 0,
            grants: 0,
        }
    }

    fn grant(caller: &str, pattern: &str, rights: &[&str]) -> GrantSummary {
        let grant = GrantDetails {
            pattern: pattern.into(),
            rights: rights.iter().map(ToString::to_string).collect(),
            ends_at: None,
            created_at: day(1),
            in_force: true,
        };
        GrantSummary { caller: caller.into(), grant }
    }

    fn bearer(caller: &str, id: i64, ends_at: Option<Timestamp>) -> BearerSummary {
        let credential = CredentialDetails {
            id,
            kind: "bearer".into(),
            identity: None,
            description: String::new(),
            created_at: day(1),
            ends_at,
            revoked_at: None,
            in_force: true,
        };
        BearerSummary { caller: caller.into(), credential }
    }

    fn used(calls: &[(&str, &str, Option<&str>, bool)]) -> Used {
        let mut used = Used::default();
        for (caller, event, account, granted) in calls {
            used.add(CallerUse {
                caller: (*caller).into(),
                event: (*event).into(),
                account: account.map(Into::into),
                granted: *granted,
            });
        }
        used
    }

    /// The findings as `kind caller subject`.
    fn found(callers: &Callers, used: &Used) -> Vec<String> {
        let findings = callers.findings(used, &limits()).into_iter().map(|finding| match finding {
            Finding::IdleCaller { caller, grants, .. } => format!("idle {caller} {grants}"),
            Finding::UnusedGrant { caller, pattern, .. } => format!("unused {caller} {pattern}"),
            Finding::EndingGrant { caller, pattern, .. } => format!("ending {caller} {pattern}"),
            Finding::EndlessBearer { caller, bearer, .. } => format!("endless {caller} {bearer}"),
            Finding::EndingBearer { caller, bearer, .. } => format!("ending {caller} {bearer}"),
        });
        findings.collect()
    }

    #[test]
    fn a_grant_is_used_by_calls_that_needed_it() {
        let all = &["get", "report", "list"][..];
        for (pattern, rights, calls, unused) in [
            ("acme", all, &[("get_token", Some("acme"), true)][..], false),
            ("acme", all, &[("token_pushed", Some("acme"), true)], false),
            ("acme", all, &[("get_token", Some("acme-1"), true)], true),
            ("acme-*", all, &[("get_token", Some("acme-1"), true)], false),
            ("*-eu", all, &[("get_token", Some("acme-1"), true)], true),
            // It was refused for want of a grant.
            ("acme", all, &[("get_token", Some("acme"), false)], true),
            ("acme", &["report"], &[("get_token", Some("acme"), true)], true),
            ("acme", &["report"], &[("report_rejected_token", Some("acme"), true)], false),
            ("acme", &["get"], &[("report_rejected_token", Some("acme"), true)], true),
            // A listing names no account: it tells only of grants that allow nothing else.
            ("acme", &["list"], &[("list_accounts", None, true)], false),
            ("acme", all, &[("list_accounts", None, true)], true),
            ("acme", all, &[("watch_tokens", Some("acme"), true)], true),
            ("NOT a name", all, &[("get_token", Some("NOT a name"), true)], true),
        ] {
            let callers =
                Callers::new(vec![caller("a", 1)], vec![], vec![grant("a", pattern, rights)]);
            let calls: Vec<_> =
                calls.iter().map(|(event, account, ok)| ("a", *event, *account, *ok)).collect();
            let used = used(&calls);
            let expected = if unused { vec![format!("unused a {pattern}")] } else { vec![] };
            assert_eq!(found(&callers, &used), expected, "{pattern} {rights:?} {calls:?}");
            assert_eq!(callers.not_all_used(&used, &limits()).is_empty(), !unused);
        }
    }

    #[test]
    fn a_caller_without_any_call_is_reported_once_and_not_with_each_of_its_grants() {
        let callers = || vec![caller("idle", 1), caller("new", 99)];
        let grants = || vec![grant("idle", "a", &["get"]), grant("idle", "b", &["get"])];
        let reviewed = Callers::new(callers(), vec![], grants());
        assert_eq!(found(&reviewed, &Used::default()), ["idle idle 2"]);
        // A call that was refused shows that somebody is there.
        let refused = used(&[("idle", "get_token", Some("x"), false)]);
        assert_eq!(found(&reviewed, &refused), ["unused idle a", "unused idle b"]);
    }

    #[test]
    fn what_is_young_ended_or_of_a_disabled_caller_is_not_reported() {
        let young = GrantSummary {
            grant: GrantDetails { created_at: day(50), ..grant("a", "x", &["get"]).grant },
            caller: "a".into(),
        };
        let ended = GrantSummary {
            grant: GrantDetails { in_force: false, ..grant("a", "y", &["get"]).grant },
            caller: "a".into(),
        };
        let disabled = CallerSummary { enabled: false, ..caller("off", 1) };
        let of_disabled = (grant("off", "z", &["get"]), bearer("off", 1, None));
        let reviewed = Callers::new(
            vec![caller("a", 1), disabled],
            vec![of_disabled.1],
            vec![young, ended, of_disabled.0],
        );
        let calls = used(&[("a", "get_token", None, true)]);
        assert_eq!(found(&reviewed, &calls), [""; 0]);
    }

    #[test]
    fn bearers_that_end_soon_or_never_and_grants_that_end_soon_are_reported() {
        let ending = GrantSummary {
            grant: GrantDetails { ends_at: Some(day(101)), ..grant("a", "x", &["get"]).grant },
            caller: "a".into(),
        };
        let bearers = vec![
            bearer("a", 1, None),
            bearer("a", 2, Some(day(114))),
            bearer("a", 3, Some(day(115))),
        ];
        let reviewed = Callers::new(vec![caller("a", 1)], bearers, vec![ending]);
        let calls = used(&[("a", "get_token", Some("x"), true)]);
        assert_eq!(found(&reviewed, &calls), ["ending a x", "endless a 1", "ending a 2"]);
    }
}
