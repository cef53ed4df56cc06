//! Looks through the accounts whose names two sets of patterns match, in the order of their names.

use std::{ops::Bound, sync::Arc};

use super::{AccountCache, CachedAccount};
use crate::domain::{
    account::AccountName,
    pattern_set::{PatternSet, first_common_match},
};

/// How many names are looked at under one lock, during which loads wait.
const CHUNK: usize = 64;

/// A position among the names that both of two sets of patterns match, for example what a caller asks for and
/// what its grants cover.
///
/// Names that a set cannot match are skipped by searching for the next one that it can. So the cost depends on
/// the number of accounts that are found, and on neither the number of accounts nor that of patterns. The
/// exception is a pattern with text after its `*`, such as `*-prod`: all accounts are then looked at that
/// begin with the text before it, as far as the other set may match them.
#[derive(Debug)]
pub struct NameScan {
    sets: [Arc<PatternSet>; 2],
    /// The last name that was looked at.
    last: Option<AccountName>,
    is_done: bool,
    examined: usize,
}

impl NameScan {
    /// Returns a scan of the names after `after`, or of all.
    #[must_use]
    pub fn new(sets: [Arc<PatternSet>; 2], after: Option<AccountName>) -> Self {
        Self { sets, last: after, is_done: false, examined: 0 }
    }

    /// Returns whether there are no further names.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.is_done
    }

    /// Returns how many names were looked at.
    #[must_use]
    pub fn examined(&self) -> usize {
        self.examined
    }

    /// Returns the next accounts, at most 64. There may be further ones even if it returns none, until
    /// [`NameScan::is_done`].
    pub fn next_chunk(&mut self, cache: &AccountCache) -> Vec<(AccountName, Arc<CachedAccount>)> {
        let mut found = vec![];
        let sets = [&*self.sets[0], &*self.sets[1]];
        let ordered = cache.ordered.read();
        for _ in 0..CHUNK {
            let last = self.last.as_ref().map_or("", AccountName::as_str);
            let next = first_common_match(sets, last);
            let bound =
                next.map(
                    |next| {
                        if next == last { Bound::Excluded(next) } else { Bound::Included(next) }
                    },
                );
            let next =
                bound.and_then(|from| ordered.range::<str, _>((from, Bound::Unbounded)).next());
            let Some((name, account)) = next else {
                self.is_done = true;
                break;
            };
            self.examined += 1;
            if sets.iter().all(|set| set.matches(name.as_str())) {
                found.push((name.clone(), account.clone()));
            }
            self.last = Some(name.clone());
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{
        account_pattern::AccountPattern,
        refresh_state::{Account, RefreshState},
    };

    fn cache(accounts: usize) -> AccountCache {
        let cache = AccountCache::default();
        for (id, nth) in (0..).zip(0..accounts) {
            let account = Account::example(id, &format!("acme-{nth:05}"));
            cache.put(account, RefreshState::default(), None);
        }
        cache
    }

    fn set(patterns: impl IntoIterator<Item = String>) -> Arc<PatternSet> {
        let patterns: Vec<AccountPattern> =
            patterns.into_iter().map(|pattern| pattern.parse().unwrap()).collect();
        Arc::new(patterns.iter().collect())
    }

    /// Returns how many accounts are found and how many are looked at.
    fn scan(
        cache: &AccountCache,
        requested: &Arc<PatternSet>,
        granted: &Arc<PatternSet>,
    ) -> (usize, usize) {
        let mut scan = NameScan::new([requested.clone(), granted.clone()], None);
        let mut found = 0;
        while !scan.is_done() {
            found += scan.next_chunk(cache).len();
        }
        (found, scan.examined())
    }

    /// A caller costs what it may use, however much it asks for.
    #[test]
    fn what_is_not_granted_is_not_looked_at() {
        let cache = cache(10_000);
        let thousand = set((0..1_000).map(|n| format!("acme-*{n:03}")));
        let everything = set(["*".to_owned()]);
        for requested in [&thousand, &everything] {
            assert_eq!(scan(&cache, requested, &set([])), (0, 0));
            assert_eq!(scan(&cache, requested, &set(["other-*".to_owned()])), (0, 0));
            assert_eq!(scan(&cache, requested, &set(["acme-00007".to_owned()])).1, 2);
            assert_eq!(scan(&cache, requested, &set(["acme-0000*".to_owned()])).1, 11);
            assert_eq!(scan(&cache, requested, &everything), (10_000, 10_000));
        }
        let names = set((0..1_000).map(|n| format!("acme-{n:05}")));
        assert_eq!(scan(&cache, &names, &everything), (1_000, 1_001));
        assert_eq!(scan(&cache, &names, &names).0, 1_000);
    }
}
