//! A set of account patterns with an index, so that neither looking up a name nor finding the next name that
//! may match depends on the number of patterns.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    ops::Bound,
};

use crate::domain::account_pattern::AccountPattern;

/// A set of [`AccountPattern`]s.
#[derive(Clone, Debug, Default)]
pub struct PatternSet {
    /// The plain names.
    names: HashSet<Box<str>>,
    /// The patterns with a `*`: for each text before it, the texts after it.
    wildcards: HashMap<Box<str>, Suffixes>,
    /// The lengths of the keys of `wildcards`.
    prefix_lengths: BTreeSet<usize>,
    /// The plain names and the keys of `wildcards`, in the order of names.
    starts: BTreeSet<Box<str>>,
}

/// The texts after the `*` of several patterns with the same text before it.
#[derive(Clone, Debug, Default)]
struct Suffixes {
    texts: HashSet<Box<str>>,
    lengths: BTreeSet<usize>,
}

impl Suffixes {
    fn end(&self, rest: &str) -> bool {
        self.lengths
            .range(..=rest.len())
            .any(|length| self.texts.contains(&rest[rest.len() - length..]))
    }
}

impl<'a> FromIterator<&'a AccountPattern> for PatternSet {
    fn from_iter<I: IntoIterator<Item = &'a AccountPattern>>(patterns: I) -> Self {
        let mut set = Self::default();
        for pattern in patterns {
            let (before, after) = pattern.parts();
            set.starts.insert(before.into());
            match after {
                None => {
                    set.names.insert(before.into());
                }
                Some(after) => {
                    set.prefix_lengths.insert(before.len());
                    let suffixes = set.wildcards.entry(before.into()).or_default();
                    suffixes.texts.insert(after.into());
                    suffixes.lengths.insert(after.len());
                }
            }
        }
        set
    }
}

impl PatternSet {
    /// Returns whether the set has no pattern.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    /// Returns whether a pattern matches `name`. Costs at most a lookup for each length of a text before and
    /// after a `*`, whatever the number of patterns.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        self.names.contains(name)
            || self.prefixes_of(name).any(|(length, suffixes)| suffixes.end(&name[length..]))
    }

    /// Returns the first text, at or after `from` in the order of names, that a pattern may match; `None` if
    /// there is none.
    #[must_use]
    pub fn first_match_from<'a>(&'a self, from: &'a str) -> Option<&'a str> {
        if self.prefixes_of(from).next().is_some() {
            return Some(from);
        }
        let range = (Bound::Included(from), Bound::Unbounded);
        self.starts.range::<str, _>(range).next().map(|start| &**start)
    }

    /// Returns whether some name may match a pattern of this set and `other`.
    #[must_use]
    pub fn may_intersect(&self, other: &Self) -> bool {
        first_common_match([self, other], "").is_some()
    }

    /// Returns the texts before a `*` with which `name` begins, as their lengths, with the texts after it.
    fn prefixes_of<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (usize, &'a Suffixes)> {
        self.prefix_lengths.range(..=name.len()).filter_map(move |length| {
            let suffixes = self.wildcards.get(&name[..*length])?;
            Some((*length, suffixes))
        })
    }
}

/// Returns the first text, at or after `from` in the order of names, that all of `sets` may match; `None` if
/// there is none.
#[must_use]
pub fn first_common_match<'a, const N: usize>(
    sets: [&'a PatternSet; N],
    from: &'a str,
) -> Option<&'a str> {
    let mut at = from;
    loop {
        let before = at;
        for set in sets {
            at = set.first_match_from(at)?;
        }
        if at == before {
            return Some(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(patterns: &[String]) -> Vec<AccountPattern> {
        patterns.iter().map(|pattern| pattern.parse().unwrap()).collect()
    }

    /// Names and patterns have two letters only, so that they often match.
    fn patterns() -> impl Strategy<Value = Vec<String>> {
        let pattern = prop_oneof!["[ab]{1,4}", "[ab]{0,3}[*][ab]{0,3}"];
        proptest::collection::vec(pattern, 0..8)
    }

    #[test]
    fn the_first_match_is_the_name_itself_or_the_next_start_of_a_pattern() {
        let patterns = parse(&["d-*", "b", "*z"].map(str::to_owned));
        let set: PatternSet = patterns[..2].iter().collect();
        for (from, expected) in [
            ("", Some("b")),
            ("b", Some("b")),
            ("b-1", Some("d-")),
            ("d-7", Some("d-7")),
            ("d.", None),
        ] {
            assert_eq!(set.first_match_from(from), expected, "{from}");
        }
        let set: PatternSet = patterns.iter().collect();
        assert_eq!(set.first_match_from("x"), Some("x"));
        assert_eq!(PatternSet::default().first_match_from(""), None);
    }

    proptest! {
        #[test]
        fn a_set_matches_what_one_of_its_patterns_matches(
            patterns in patterns(), names in proptest::collection::vec("[abc]{1,6}", 1..50),
        ) {
            let patterns = parse(&patterns);
            let set: PatternSet = patterns.iter().collect();
            for name in names {
                let expected = patterns.iter().any(|pattern| pattern.matches(&name));
                prop_assert_eq!(set.matches(&name), expected, "{}", name);
            }
        }

        /// Following the common matches finds every name that both sets match.
        #[test]
        fn no_name_that_two_sets_match_is_skipped(
            first in patterns(), second in patterns(), name in "[abc]{1,6}", from in "[abc]{0,6}",
        ) {
            let sets = [parse(&first), parse(&second)]
                .map(|patterns| patterns.iter().collect::<PatternSet>());
            let matched = sets.iter().all(|set| set.matches(&name)) && from <= name;
            let next = first_common_match([&sets[0], &sets[1]], &from);
            if matched {
                prop_assert!(next.is_some_and(|next| next <= name.as_str()));
                prop_assert!(sets[0].may_intersect(&sets[1]));
            }
            if let Some(next) = next {
                prop_assert!(next >= from.as_str());
                prop_assert_eq!(first_common_match([&sets[0], &sets[1]], next), Some(next));
            }
        }
    }
}
