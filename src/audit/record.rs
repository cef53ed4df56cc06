//! What happened, as it is hashed, journaled and delivered.

use std::collections::BTreeMap;

use crate::domain::{
    account::AccountName, caller::AccountPattern, clock::Timestamp, token::Generation,
};

/// What a JWT, a caller's bearer and a client secret begin with.
const SECRETS: [&str; 3] = ["eyJ", "tbk_", "SK."];

/// What kind of thing happened. The names are part of the contract; more may be added.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Event {
    /// A call of `GetToken`.
    GetToken,
    /// A call of `WatchTokens`: its start, or its refusal.
    WatchTokens,
    /// A token sent on a stream.
    TokenPushed,
    /// A call of `ReportRejectedToken`.
    ReportRejectedToken,
    /// A call of `ListAccounts`.
    ListAccounts,
    /// A call of a method that `TokenService` does not have.
    UnknownMethod,
    /// A TLS handshake that was refused.
    HandshakeRefused,
    /// The upstream issued a token.
    TokenIssued,
    /// An issue was tried and failed.
    IssueFailed,
    /// An account was inserted.
    AccountRegistered,
    /// An account was updated.
    AccountChanged,
    /// An account was deleted.
    AccountRemoved,
    /// A caller or one of its credentials changed.
    CallerChanged,
    /// A grant changed.
    GrantChanged,
    /// Calls that were refused because the journal could not be written; `count` tells how many.
    AuditGap,
    /// Retention removed records whose time was over.
    AuditPruned,
    /// The database's owner set how long records are kept at least.
    RetentionChanged,
    /// An admin said that a chain of a lost replica will not go on.
    ChainRetired,
    /// A database that is not as it was left was accepted.
    DatabaseAccepted,
    /// The broker started.
    Started,
    /// The broker stopped.
    Stopped,
}

impl Event {
    /// The name in the `event` column.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::GetToken => "get_token",
            Self::WatchTokens => "watch_tokens",
            Self::TokenPushed => "token_pushed",
            Self::ReportRejectedToken => "report_rejected_token",
            Self::ListAccounts => "list_accounts",
            Self::UnknownMethod => "unknown_method",
            Self::HandshakeRefused => "handshake_refused",
            Self::TokenIssued => "token_issued",
            Self::IssueFailed => "issue_failed",
            Self::AccountRegistered => "account_registered",
            Self::AccountChanged => "account_changed",
            Self::AccountRemoved => "account_removed",
            Self::CallerChanged => "caller_changed",
            Self::GrantChanged => "grant_changed",
            Self::AuditGap => "audit_gap",
            Self::AuditPruned => "audit_pruned",
            Self::RetentionChanged => "retention_changed",
            Self::ChainRetired => "chain_retired",
            Self::DatabaseAccepted => "database_accepted",
            Self::Started => "started",
            Self::Stopped => "stopped",
        }
    }

    /// Whether this is a call whose answer waits for the record. When the journal fails, such a
    /// call is refused and only counted; any other record is kept until it can be written.
    #[must_use]
    pub fn is_call(self) -> bool {
        matches!(
            self,
            Self::GetToken
                | Self::WatchTokens
                | Self::TokenPushed
                | Self::ReportRejectedToken
                | Self::ListAccounts
                | Self::UnknownMethod
        )
    }
}

/// One audit record before it has a place in a chain.
///
/// Text from callers is stored as [`Record`]'s setters leave it: see [`clean`].
#[derive(Clone, Debug)]
pub struct Record {
    /// When it happened.
    pub at: Timestamp,
    /// What happened.
    pub event: Event,
    /// The caller's name, once it is known.
    pub caller: Option<String>,
    /// How the caller identified itself: `bearer`, `spiffe` or `dns`.
    pub caller_kind: Option<&'static str>,
    /// The caller's address and port.
    pub peer: Option<String>,
    /// The account's name, as it was asked for.
    pub account: Option<String>,
    /// The gRPC status in lower case; `ok`.
    pub outcome: &'static str,
    /// Why, for anything but `ok`: the reason of the `ErrorInfo`.
    pub reason: Option<String>,
    /// The token's generation.
    pub generation: Option<i64>,
    /// The token's keyed hash.
    pub token_fingerprint: Option<String>,
    /// The trace id of the caller's `traceparent`.
    pub trace_id: Option<String>,
    /// From the arrival of the headers to the record, in microseconds.
    pub latency_us: Option<i64>,
    /// How many calls this record stands for.
    pub count: i64,
    /// More, as flat strings.
    pub detail: BTreeMap<String, String>,
}

impl Record {
    /// A record of `event` at `at` with outcome `ok`.
    #[must_use]
    pub fn new(at: Timestamp, event: Event) -> Self {
        Self {
            at,
            event,
            caller: None,
            caller_kind: None,
            peer: None,
            account: None,
            outcome: "ok",
            reason: None,
            generation: None,
            token_fingerprint: None,
            trace_id: None,
            latency_us: None,
            count: 1,
            detail: BTreeMap::new(),
        }
    }

    /// Names the account.
    #[must_use]
    pub fn account(mut self, name: &AccountName) -> Self {
        self.account = Some(name.to_string());
        self
    }

    /// Names the account as a caller wrote it, whatever that was: see [`as_asked`].
    #[must_use]
    pub fn account_as_asked(self, name: &str) -> Self {
        self.accounts_as_asked([name])
    }

    /// Names accounts and patterns as a caller wrote them, with commas between them.
    #[must_use]
    pub fn accounts_as_asked<'a>(mut self, names: impl IntoIterator<Item = &'a str>) -> Self {
        let names: Vec<_> = names.into_iter().map(as_asked).collect();
        self.account = Some(clean(&names.join(",")));
        self
    }

    /// Sets what came of it, and why.
    #[must_use]
    pub fn outcome(mut self, outcome: &'static str, reason: impl Into<String>) -> Self {
        self.outcome = outcome;
        self.reason = Some(clean(&reason.into()));
        self
    }

    /// Names the token.
    #[must_use]
    pub fn token(mut self, generation: Generation, fingerprint: &str) -> Self {
        self.generation = Some(generation.0);
        self.token_fingerprint = Some(fingerprint.to_owned());
        self
    }

    /// Adds a detail; its text is cleaned.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl AsRef<str>) -> Self {
        self.detail.insert(clean(key), clean(value.as_ref()));
        self
    }
}

/// What the log keeps of a word that should be a name, a pattern or a code, and may be a secret sent by
/// mistake. Well-formed names and patterns are kept as they are. Of anything else no more than 64
/// characters are kept, and of what looks like a token, a bearer or a client secret, wherever in the
/// word that begins, no more than its first 4; `…` stands for the rest.
#[must_use]
pub fn as_asked(word: &str) -> String {
    const LONGEST: usize = 64;
    const OF_A_SECRET: usize = 4;
    if word.parse::<AccountPattern>().is_ok() {
        return word.to_owned();
    }
    let secret = SECRETS.iter().filter_map(|start| word.find(start)).min();
    let shown = secret.map_or(LONGEST, |at| word[..at].chars().count() + OF_A_SECRET);
    match word.char_indices().nth(shown.min(LONGEST)) {
        Some((end, _)) => format!("{}…", &word[..end]),
        None => word.to_owned(),
    }
}

/// Makes any text fit for the log: control characters are escaped as `\u{…}`, a backslash is
/// doubled, and what exceeds 256 characters is cut and ends in `…`. Postgres cannot store NUL, and a
/// line break in a log is a forgery.
#[must_use]
pub fn clean(text: &str) -> String {
    const LONGEST: usize = 256;
    let mut clean = String::with_capacity(text.len().min(LONGEST));
    for (nth, c) in text.chars().enumerate() {
        if nth == LONGEST {
            clean.push('…');
            break;
        }
        match c {
            '\\' => clean.push_str("\\\\"),
            c if c.is_control() => clean.extend(c.escape_unicode()),
            c => clean.push(c),
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn text_that_could_forge_or_break_the_log_is_escaped_and_cut() {
        assert_eq!(clean("acme"), "acme");
        assert_eq!(clean("a\0b\nc\\d"), "a\\u{0}b\\u{a}c\\\\d");
        let long = clean(&"x".repeat(5_000));
        assert_eq!(long.chars().count(), 257);
        assert!(long.ends_with('…'));
    }

    #[test]
    fn a_secret_sent_as_a_name_is_not_kept() {
        for (sent, kept) in [
            ("eyJhbGciOiJIUzI1NiJ9.e30.c2ln", "eyJh…"),
            ("tbk_0123456789ABCDEF", "tbk_…"),
            ("SK.canary-73", "SK.c…"),
            (" eyJhbGciOiJIUzI1NiJ9", " eyJh…"),
            ("Bearer tbk_0123456789ABCDEF", "Bearer tbk_…"),
            ("acme,SK.canary-73", "acme,SK.c…"),
            ("SK.x then eyJhbGciOiJIUzI1NiJ9", "SK.x…"),
            ("eyJ", "eyJ"),
        ] {
            assert_eq!(as_asked(sent), kept);
        }
    }

    #[test]
    fn names_and_patterns_are_kept_whole_and_of_all_else_64_characters() {
        for name in ["acme", "tbk_prod", "acme-*", "*", &"a".repeat(63)] {
            assert_eq!(as_asked(name), name);
        }
        let long = "가".repeat(65);
        assert_eq!(as_asked(&long), "가".repeat(64) + "…");
        assert_eq!(as_asked(&long[3..]), long[3..]);
        let late = "가".repeat(63) + "SK.canary-73";
        assert_eq!(as_asked(&late), "가".repeat(63) + "S…");
        let record = Record::new(Timestamp::UNIX_EPOCH, Event::WatchTokens);
        let record = record.accounts_as_asked(["acme-*", "SK.canary-73", "a\nb"]);
        assert_eq!(record.account.unwrap(), "acme-*,SK.c…,a\\u{a}b");
    }

    proptest! {
        #[test]
        fn of_a_secret_in_a_word_no_more_than_a_start_is_kept(
            before in "[ -~가]{0,80}",
            secret in "(eyJ|tbk_|SK\\.)[A-Z]{9}",
        ) {
            let kept = as_asked(&format!("{before}{secret}"));
            prop_assert!(!kept.contains(&secret[..6]), "{kept}");
            prop_assert!(kept.chars().count() <= 65);
        }

        #[test]
        fn cleaned_text_has_no_control_characters(text in any::<String>()) {
            prop_assert!(!clean(&text).chars().any(char::is_control));
        }
    }
}
