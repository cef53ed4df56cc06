//! Formatting of an event as one line of text.

use std::iter;

use crate::{
    cli::{output::word, time::LocalTime},
    store::audit::StoredEvent,
};

/// Formats an event as a line for people. The hashes are only in `--json`.
pub(super) fn describe(event: &StoredEvent) -> String {
    let text = |name, value: Option<&str>| Some(format!("{name}={}", word(value?)));
    let number = |name, value: Option<i64>| Some(format!("{name}={}", value?));
    let fields = [
        text("reason", event.reason.as_deref()),
        text("account", event.account.as_deref()),
        text("caller", event.caller.as_deref()),
        text("by", event.caller_kind.as_deref()),
        text("peer", event.peer.as_deref()),
        number("generation", event.generation),
        text("token", event.token_fingerprint.as_deref()),
        number("latency_us", event.latency_us),
        number("count", Some(event.count).filter(|count| *count != 1)),
        text("trace", event.trace_id.as_deref()),
    ];
    let details =
        event.detail.iter().map(|(name, value)| format!("{}={}", word(name), word(value)));
    let (name, outcome) = (word(&event.event), word(&event.outcome));
    let start = format!("{}  {name:<22} {outcome:<18}", LocalTime(event.at));
    let position = format!("at {}/{}#{}", word(&event.instance), word(&event.chain), event.seq);
    let words: Vec<_> = iter::once(start)
        .chain(fields.into_iter().flatten())
        .chain(details)
        .chain([position])
        .collect();
    words.join(" ")
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;

    use chrono::{DateTime, TimeDelta};

    use super::*;
    use crate::audit::chain::Digest;

    pub(in super::super) fn event(seconds: i64, seq: i64) -> StoredEvent {
        StoredEvent {
            instance: "host-1".into(),
            chain: "c1".into(),
            seq,
            at: DateTime::UNIX_EPOCH + TimeDelta::seconds(seconds),
            event: "get_token".into(),
            caller: Some("billing".into()),
            caller_kind: Some("bearer".into()),
            peer: None,
            account: Some("a name\nof many lines".into()),
            outcome: "permission_denied".into(),
            reason: Some("NOT_GRANTED".into()),
            generation: None,
            token_fingerprint: None,
            trace_id: None,
            latency_us: Some(42),
            count: 3,
            detail: BTreeMap::from([("method".into(), "GetToken".into())]),
            prev_hash: Digest([0; 32]),
            hash: Digest([0; 32]),
        }
    }

    #[test]
    fn an_event_is_one_line_with_all_its_columns() {
        let line = describe(&event(0, 7));
        assert!(!line.contains('\n'), "{line}");
        assert!(
            line.ends_with(
                "get_token              permission_denied  reason=NOT_GRANTED \
                 account=\"a name\\nof many lines\" caller=billing by=bearer latency_us=42 count=3 \
                 method=GetToken at host-1/c1#7"
            ),
            "{line}"
        );
    }
}
