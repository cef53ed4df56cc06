//! Pages of the accounts that a caller may list, sorted by name.

use std::sync::Arc;

use crate::{
    domain::{
        account::AccountName,
        caller::{Caller, Right},
        clock::Timestamp,
        refresh_policy::{IssueView, RefreshPolicy},
        refresh_state::AccountState,
        token::{Generation, Token},
    },
    services::account_cache::{AccountCache, AccountSnapshot, scan::NameScan},
};

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
                .next_issue_at(
                    &IssueView::cached(
                        &snapshot.account,
                        &snapshot.refresh,
                        policy.scheduled_at(&snapshot.account.name, token),
                        None,
                    )
                    .repeating_until(token.and_then(Token::repeats_until)),
                )
                .map(|at| at.max(now)),
        }
    }
}

/// A page of the accounts that a caller may list, sorted by name.
pub(super) struct Page {
    scan: NameScan,
    limit: usize,
    found: Vec<Arc<AccountSnapshot>>,
}

impl Page {
    /// Returns an empty page of up to `limit` accounts after the name `after`.
    pub(super) fn new(
        caller: &Caller,
        after: Option<&AccountName>,
        limit: usize,
        now: Timestamp,
    ) -> Self {
        let covered = Arc::new(caller.covered(Right::List, now));
        let scan = NameScan::new([covered.clone(), covered], after.cloned());
        Self { scan, limit, found: vec![] }
    }

    /// Returns whether the page has all of its accounts.
    pub(super) fn is_complete(&self) -> bool {
        self.scan.is_done() || self.found.len() > self.limit
    }

    /// Returns how many accounts were looked at.
    pub(super) fn examined(&self) -> usize {
        self.scan.examined()
    }

    /// Looks at some further accounts.
    pub(super) fn read_chunk(&mut self, cache: &AccountCache) {
        for (name, cached) in self.scan.next_chunk(cache) {
            let snapshot = cached.snapshot();
            // An account that is being renamed at this moment is listed under its new name only.
            if snapshot.account.name == name {
                self.found.push(snapshot);
            }
        }
    }

    /// Returns the accounts of the page, and whether there are more.
    pub(super) fn finish(mut self) -> (Vec<Arc<AccountSnapshot>>, bool) {
        let more = self.found.len() > self.limit;
        self.found.truncate(self.limit);
        (self.found, more)
    }
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
                let mut page = Page::new(&caller, after.as_ref(), limit, now);
                while !page.is_complete() {
                    page.read_chunk(&cache);
                }
                let (found, more) = page.finish();
                let found: Vec<_> = found.iter().map(|snapshot| snapshot.account.name.clone()).collect();
                let expected = scan(&cache, &caller, after.as_ref(), limit, now);
                prop_assert_eq!((found.clone(), more), expected);
                let Some(last) = found.into_iter().next_back().filter(|_| more) else { break };
                after = Some(last);
            }
        }
    }
}
