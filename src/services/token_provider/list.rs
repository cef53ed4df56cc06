//! Pages of the accounts that a caller may list, sorted by name.

use std::{ops::Bound, sync::Arc};

use crate::{
    domain::{
        account::AccountName,
        caller::{Caller, Right},
        clock::Timestamp,
        refresh_policy::{IssueView, RefreshPolicy},
        refresh_state::AccountState,
        token::Generation,
    },
    services::account_cache::{AccountCache, AccountSnapshot},
};

/// How many accounts are read from the cache under one lock, during which loads wait.
const BATCH: usize = 64;

/// An account as `ListAccounts` shows it.
#[derive(Clone, Debug)]
pub struct ListedAccount {
    /// The account's name.
    pub name: AccountName,
    /// The state at the time of the call.
    pub state: AccountState,
    /// The token, live or expired, if the account has one.
    pub token: Option<ListedToken>,
    /// When the next attempt to issue is due, but not before the time of the call. `None` if no attempt is
    /// planned until the account changes.
    pub next_attempt_at: Option<Timestamp>,
}

/// What `ListAccounts` shows of a token: never the token itself.
#[derive(Clone, Copy, Debug)]
pub struct ListedToken {
    /// When the token was issued.
    pub issued_at: Timestamp,
    /// When the token expires.
    pub expires_at: Timestamp,
    /// The token's generation.
    pub generation: Generation,
}

impl ListedAccount {
    pub(super) fn new(snapshot: &AccountSnapshot, policy: &RefreshPolicy, now: Timestamp) -> Self {
        let token = snapshot.token.as_deref();
        Self {
            name: snapshot.account.name.clone(),
            state: snapshot.state(now),
            token: token.map(|token| ListedToken {
                issued_at: token.issued_at,
                expires_at: token.expires_at,
                generation: token.generation,
            }),
            next_attempt_at: policy
                .next_issue_at(&IssueView::cached(
                    &snapshot.account,
                    &snapshot.refresh,
                    policy.scheduled_at(&snapshot.account.name, token),
                    None,
                ))
                .map(|at| at.max(now)),
        }
    }
}

/// Returns up to `limit` accounts after the name `after` that `caller` may list, sorted by name, and
/// whether there are more.
///
/// Names that no grant can cover are skipped by searching for the next name that one can, so the cost
/// depends on the length of the page and not on the number of accounts. The exception is a pattern whose
/// fixed end decides, such as `*-prod`: every account is then examined.
pub(super) fn page(
    cache: &AccountCache,
    caller: &Caller,
    after: Option<&AccountName>,
    limit: usize,
    now: Timestamp,
) -> (Vec<Arc<AccountSnapshot>>, bool) {
    let mut found = Vec::new();
    // The last name that was examined.
    let mut last = after.cloned();
    'batches: loop {
        let done = last.as_ref().map_or("", AccountName::as_str);
        let Some(next) = caller.first_covered_from(Right::List, done, now) else { break };
        let from = if next == done { Bound::Excluded(done) } else { Bound::Included(next) };
        let batch = cache.range_by_name(from, BATCH);
        if batch.is_empty() {
            break;
        }
        for (name, cached) in batch {
            let snapshot = cached.snapshot();
            let permitted = caller.permits(Right::List, &name, now);
            // An account that is being renamed at this moment is listed under its new name only.
            if permitted && snapshot.account.name == name {
                if found.len() == limit {
                    return (found, true);
                }
                found.push(snapshot);
            }
            let next_name_may_be_covered =
                caller.first_covered_from(Right::List, name.as_str(), now) == Some(name.as_str());
            last = Some(name);
            if !next_name_may_be_covered {
                continue 'batches;
            }
        }
    }
    (found, false)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use chrono::{DateTime, TimeDelta};
    use proptest::prelude::*;

    use super::*;
    use crate::domain::{
        caller::{CallerId, Grant},
        refresh_state::{Account, RefreshState},
    };

    fn caller(grants: Vec<Grant>) -> Caller {
        Caller { id: CallerId(1), name: "demo".into(), enabled: true, rate_limit: None, grants }
    }

    fn cache(names: &[String]) -> AccountCache {
        let cache = AccountCache::default();
        // Some accounts are renamed, and some are deleted and inserted again, since an index of names could
        // go wrong there.
        let ids: BTreeMap<_, _> = names.iter().zip(0..).collect();
        for (nth, (name, id)) in (0..).zip(&ids) {
            let account = |name: &str| Account::example(*id, name);
            cache.put(account(&format!("{name}-before")), RefreshState::default(), None);
            cache.put(account(name), RefreshState::default(), None);
            if nth % 5 == 0 {
                let again = Account::example(1_000 + id, name);
                cache.put(again, RefreshState::default(), None);
                cache.remove(crate::domain::account::AccountId(*id));
            }
        }
        cache
    }

    /// The reference implementation: the same page, found by examining every account.
    fn scan(
        cache: &AccountCache,
        caller: &Caller,
        after: Option<&AccountName>,
        limit: usize,
        now: Timestamp,
    ) -> (Vec<AccountName>, bool) {
        let names = cache.all().into_iter().map(|cached| cached.snapshot().account.name.clone());
        let mut names: Vec<_> = names
            .filter(|name| after.is_none_or(|after| name > after))
            .filter(|name| caller.permits(Right::List, name, now))
            .collect();
        names.sort();
        let more = names.len() > limit;
        names.truncate(limit);
        (names, more)
    }

    /// Names and patterns have two letters only, so that they often match.
    fn grants() -> impl Strategy<Value = Vec<Grant>> {
        let pattern = prop_oneof!["[ab]{1,3}", "[ab]{0,2}[*][ab]{0,2}"];
        let rights = prop_oneof![9 => Just(Right::List), 1 => Just(Right::Get)];
        let ends_at = prop_oneof![9 => Just(None), 1 => Just(Some(DateTime::UNIX_EPOCH))];
        let grant = (pattern, rights, ends_at).prop_map(|(pattern, right, ends_at)| Grant {
            pattern: pattern.parse().unwrap(),
            rights: [right].into_iter().collect(),
            ends_at,
        });
        proptest::collection::vec(grant, 0..5)
    }

    proptest! {
        #[test]
        fn the_pages_equal_those_of_a_scan_of_every_account(
            names in proptest::collection::vec("[abc]{1,5}", 0..200),
            grants in grants(),
            after in proptest::option::of("[abc]{1,5}"),
            limit in 0_usize..100,
        ) {
            let (cache, caller) = (cache(&names), caller(grants));
            let now = DateTime::UNIX_EPOCH + TimeDelta::seconds(1);
            let mut after: Option<AccountName> = after.map(|name| name.parse().unwrap());
            loop {
                let (found, more) = page(&cache, &caller, after.as_ref(), limit, now);
                let found: Vec<_> = found.iter().map(|snapshot| snapshot.account.name.clone()).collect();
                let expected = scan(&cache, &caller, after.as_ref(), limit, now);
                prop_assert_eq!((found.clone(), more), expected);
                let Some(last) = found.into_iter().next_back().filter(|_| more) else { break };
                after = Some(last);
            }
        }
    }
}
