//! Audit records before they have a position in a chain.

use std::collections::BTreeMap;

use crate::domain::{
    account::AccountName, caller::AccountPattern, clock::Timestamp, token::Generation,
};

/// Prefixes of a JWT (the upstream's tokens), of a caller's bearer and of a client secret.
const SECRET_PREFIXES: [&str; 3] = ["eyJ", "tbk_", "SK."];

/// What happened. The names are public (`docs/audit.md` lists them); more may be added.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Event {
    /// A call of `GetToken`.
    GetToken,
    /// A call of `WatchTokens`: the start of its stream, or its refusal.
    WatchTokens,
    /// A token sent on a stream.
    TokenPushed,
    /// A call of `ReportRejectedToken`.
    ReportRejectedToken,
    /// A call of `ListAccounts`.
    ListAccounts,
    /// A call of a method that `TokenService` does not have.
    UnknownMethod,
    /// The broker refused a TLS handshake.
    HandshakeRefused,
    /// The upstream issued a token.
    TokenIssued,
    /// The upstream gave an account's token again instead of a new one.
    TokenRepeated,
    /// An attempt to issue a token failed.
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
    /// The published intake key changed.
    KeysChanged,
    /// A table changed that this release does not know.
    OtherChanged,
    /// Calls that were refused because the journal could not be written; `count` is how many.
    AuditGap,
    /// Retention removed records that were older than the retention settings.
    AuditPruned,
    /// The database's owner changed the minimum retention.
    RetentionChanged,
    /// An admin retired a chain: its replica is lost and will deliver nothing more.
    ChainRetired,
    /// An admin accepted a database that is not in the state in which the broker left it, such as a
    /// restored one.
    DatabaseAccepted,
    /// The broker started.
    Started,
    /// The broker stopped.
    Stopped,
}

impl Event {
    /// All events.
    pub const ALL: [Self; 24] = [
        Self::GetToken,
        Self::WatchTokens,
        Self::TokenPushed,
        Self::ReportRejectedToken,
        Self::ListAccounts,
        Self::UnknownMethod,
        Self::HandshakeRefused,
        Self::TokenIssued,
        Self::TokenRepeated,
        Self::IssueFailed,
        Self::AccountRegistered,
        Self::AccountChanged,
        Self::AccountRemoved,
        Self::CallerChanged,
        Self::GrantChanged,
        Self::KeysChanged,
        Self::OtherChanged,
        Self::AuditGap,
        Self::AuditPruned,
        Self::RetentionChanged,
        Self::ChainRetired,
        Self::DatabaseAccepted,
        Self::Started,
        Self::Stopped,
    ];

    /// Returns the name in the `event` column.
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
            Self::TokenRepeated => "token_repeated",
            Self::IssueFailed => "issue_failed",
            Self::AccountRegistered => "account_registered",
            Self::AccountChanged => "account_changed",
            Self::AccountRemoved => "account_removed",
            Self::CallerChanged => "caller_changed",
            Self::GrantChanged => "grant_changed",
            Self::KeysChanged => "keys_changed",
            Self::OtherChanged => "other_changed",
            Self::AuditGap => "audit_gap",
            Self::AuditPruned => "audit_pruned",
            Self::RetentionChanged => "retention_changed",
            Self::ChainRetired => "chain_retired",
            Self::DatabaseAccepted => "database_accepted",
            Self::Started => "started",
            Self::Stopped => "stopped",
        }
    }

    /// Whether this is an event of a call. A call is answered only once its record is durable. While the
    /// journal cannot be written, calls are refused and only counted, and other records are retained in
    /// memory until they can be written.
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

    /// Whether a record of the event waits in memory while the journal cannot be written. Calls are refused then.
    /// Strangers cause refused handshakes, as many as they like, which must not displace other records: they are
    /// only counted.
    #[must_use]
    pub fn is_retained(self) -> bool {
        !self.is_call() && self != Self::HandshakeRefused
    }
}

/// One audit record, before it has a position in a chain.
///
/// The setters sanitize text that callers send: see [`sanitize`] and [`sanitize_requested_name`].
#[derive(Clone, Debug)]
pub struct Record {
    /// When the event happened.
    pub at: Timestamp,
    /// What happened.
    pub event: Event,
    /// The caller's name, once it is known.
    pub caller: Option<String>,
    /// How the caller authenticated: `bearer`, `spiffe` or `dns`.
    pub caller_kind: Option<&'static str>,
    /// The caller's address and port.
    pub peer: Option<String>,
    /// The account's name, as the caller wrote it.
    pub account: Option<String>,
    /// The gRPC status in lower case, such as `ok` or `permission_denied`.
    pub outcome: &'static str,
    /// For any outcome but `ok`, the reason: the `ErrorInfo` reason of the answer.
    pub reason: Option<String>,
    /// The token's generation.
    pub generation: Option<i64>,
    /// The token's keyed hash.
    pub token_fingerprint: Option<String>,
    /// The trace id of the caller's `traceparent`.
    pub trace_id: Option<String>,
    /// Microseconds from the arrival of the request headers to the record.
    pub latency_us: Option<i64>,
    /// How many calls this record stands for: 1, except for aggregated refusals and `audit_gap` records.
    pub count: i64,
    /// Further details, as flat strings.
    pub detail: BTreeMap<String, String>,
}

impl Record {
    /// Returns a record of `event` at `at` with outcome `ok` and a count of 1.
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

    /// Sets the account.
    #[must_use]
    pub fn account(mut self, name: &AccountName) -> Self {
        self.account = Some(name.to_string());
        self
    }

    /// Sets the account to a name as a caller wrote it, sanitized by [`sanitize_requested_name`].
    #[must_use]
    pub fn requested_account(self, name: &str) -> Self {
        self.requested_accounts([name])
    }

    /// Sets the account to the names and patterns that a caller wrote, sanitized and separated by
    /// commas.
    #[must_use]
    pub fn requested_accounts<'a>(mut self, names: impl IntoIterator<Item = &'a str>) -> Self {
        let names: Vec<_> = names.into_iter().map(sanitize_requested_name).collect();
        self.account = Some(sanitize(&names.join(",")));
        self
    }

    /// Sets the outcome, a gRPC status in lower case, and the reason.
    #[must_use]
    pub fn outcome(mut self, outcome: &'static str, reason: impl Into<String>) -> Self {
        self.outcome = outcome;
        self.reason = Some(sanitize(&reason.into()));
        self
    }

    /// Sets the token's generation and keyed fingerprint.
    #[must_use]
    pub fn token(mut self, generation: Generation, fingerprint: &str) -> Self {
        self.generation = Some(generation.0);
        self.token_fingerprint = Some(fingerprint.to_owned());
        self
    }

    /// Adds a detail, sanitized.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl AsRef<str>) -> Self {
        self.detail.insert(sanitize(key), sanitize(value.as_ref()));
        self
    }
}

/// Returns what the log keeps of text that should be a name, a pattern or a code, and may be a
/// secret sent by mistake.
///
/// Well-formed names and patterns are returned unchanged. Of anything else, at most 64 characters
/// are kept; where it contains the prefix of a token, a bearer or a client secret, only the first 4
/// characters from there. `…` stands for omitted text.
#[must_use]
pub fn sanitize_requested_name(word: &str) -> String {
    const MAX_CHARS: usize = 64;
    const SECRET_CHARS_KEPT: usize = 4;
    if word.parse::<AccountPattern>().is_ok() {
        return word.to_owned();
    }
    let secret = SECRET_PREFIXES.iter().filter_map(|start| word.find(start)).min();
    let shown = secret.map_or(MAX_CHARS, |at| word[..at].chars().count() + SECRET_CHARS_KEPT);
    match word.char_indices().nth(shown.min(MAX_CHARS)) {
        Some((end, _)) => format!("{}…", &word[..end]),
        None => word.to_owned(),
    }
}

/// Makes any text safe to log: control characters are escaped as `\u{…}`, a backslash is doubled,
/// and text beyond 256 characters is replaced by `…`. Postgres cannot store NUL, and a line
/// break could forge a log line.
#[must_use]
pub fn sanitize(text: &str) -> String {
    const MAX_CHARS: usize = 256;
    let mut sanitized = String::with_capacity(text.len().min(MAX_CHARS));
    for (nth, c) in text.chars().enumerate() {
        if nth == MAX_CHARS {
            sanitized.push('…');
            break;
        }
        match c {
            '\\' => sanitized.push_str("\\\\"),
            c if c.is_control() => sanitized.extend(c.escape_unicode()),
            c => sanitized.push(c),
        }
    }
    sanitized
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn text_that_could_forge_or_break_a_log_line_is_escaped_and_truncated() {
        assert_eq!(sanitize("acme"), "acme");
        assert_eq!(sanitize("a\0b\nc\\d"), "a\\u{0}b\\u{a}c\\\\d");
        let long = sanitize(&"x".repeat(5_000));
        assert_eq!(long.chars().count(), 257);
        assert!(long.ends_with('…'));
    }

    #[test]
    fn a_secret_sent_as_a_name_is_truncated_after_four_characters() {
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
            assert_eq!(sanitize_requested_name(sent), kept);
        }
    }

    #[test]
    fn names_and_patterns_are_kept_and_anything_else_is_truncated_after_64_characters() {
        for name in ["acme", "tbk_prod", "acme-*", "*", &"a".repeat(63)] {
            assert_eq!(sanitize_requested_name(name), name);
        }
        let long = "가".repeat(65);
        assert_eq!(sanitize_requested_name(&long), "가".repeat(64) + "…");
        assert_eq!(sanitize_requested_name(&long[3..]), long[3..]);
        let late = "가".repeat(63) + "SK.canary-73";
        assert_eq!(sanitize_requested_name(&late), "가".repeat(63) + "S…");
        let record = Record::new(Timestamp::UNIX_EPOCH, Event::WatchTokens);
        let record = record.requested_accounts(["acme-*", "SK.canary-73", "a\nb"]);
        assert_eq!(record.account.unwrap(), "acme-*,SK.c…,a\\u{a}b");
    }

    proptest! {
        #[test]
        fn a_secret_anywhere_in_a_word_is_truncated(
            before in "[ -~가]{0,80}",
            secret in "(eyJ|tbk_|SK\\.)[A-Z]{9}",
        ) {
            let kept = sanitize_requested_name(&format!("{before}{secret}"));
            prop_assert!(!kept.contains(&secret[..6]), "{kept}");
            prop_assert!(kept.chars().count() <= 65);
        }

        #[test]
        fn sanitized_text_has_no_control_characters(text in any::<String>()) {
            prop_assert!(!sanitize(&text).chars().any(char::is_control));
        }
    }
}
