//! A page of accounts, by name.

use std::{ops::Bound, sync::Arc};

use crate::{
    domain::{
        account::AccountName,
        caller::{Caller, Right},
        clock::Timestamp,
    },
    services::account_cache::{AccountCache, AccountSnapshot},
};

/// How many accounts are taken from the cache at a time: loads wait no longer than that takes.
const STRETCH: usize = 64;

/// Up to `limit` accounts after `after` that `caller` may list, by name, and whether there are more.
/// What no grant covers is passed over, so that a page costs what a page is long. Only a pattern that
/// begins alike for many accounts and ends otherwise, as `*-prod` may, has all those looked at.
pub(super) fn page(
    cache: &AccountCache,
    caller: &Caller,
    after: Option<&AccountName>,
    limit: usize,
    now: Timestamp,
) -> (Vec<Arc<AccountSnapshot>>, bool) {
    let mut found = Vec::new();
    // Where the last look ended: the name itself is done with.
    let mut last = after.cloned();
    'look: loop {
        let done = last.as_ref().map_or("", AccountName::as_str);
        let Some(next) = caller.first_covered_from(Right::List, done, now) else { break };
        let from = if next == done { Bound::Excluded(done) } else { Bound::Included(next) };
        let stretch = cache.range_by_name(from, STRETCH);
        if stretch.is_empty() {
            break;
        }
        for (name, slot) in stretch {
            let view = slot.snapshot();
            let permitted = caller.permits(Right::List, &name, now);
            // One that is being renamed at this moment is found under its other name.
            if permitted && view.account.name == name {
                if found.len() == limit {
                    return (found, true);
                }
                found.push(view);
            }
            let name_follows =
                caller.first_covered_from(Right::List, name.as_str(), now) == Some(name.as_str());
            last = Some(name);
            if !name_follows {
                continue 'look;
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
        // As accounts that are renamed, deleted and inserted again leave it.
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

    /// The same by looking at every account.
    fn scan(
        cache: &AccountCache,
        caller: &Caller,
        after: Option<&AccountName>,
        limit: usize,
        now: Timestamp,
    ) -> (Vec<AccountName>, bool) {
        let names = cache.all().into_iter().map(|slot| slot.snapshot().account.name.clone());
        let mut names: Vec<_> = names
            .filter(|name| after.is_none_or(|after| name > after))
            .filter(|name| caller.permits(Right::List, name, now))
            .collect();
        names.sort();
        let more = names.len() > limit;
        names.truncate(limit);
        (names, more)
    }

    /// A few letters, so that names and patterns meet.
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
        fn the_pages_are_those_of_a_look_at_every_account(
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
                let found: Vec<_> = found.iter().map(|view| view.account.name.clone()).collect();
                let expected = scan(&cache, &caller, after.as_ref(), limit, now);
                prop_assert_eq!((found.clone(), more), expected);
                let Some(last) = found.into_iter().next_back().filter(|_| more) else { break };
                after = Some(last);
            }
        }
    }
}
