//! One call: its method, its deadline, and the record that grows with it.

use std::{
    mem,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use http::HeaderMap;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::{
    api::grpc::identity::{Identified, Unidentified},
    audit::record::{Event, Record},
    domain::{caller::Caller, clock::Timestamp, token::Token},
    services::token_provider::Refusal,
    store::callers::CredentialKey,
    telemetry::Method,
    tls::PeerIdentity,
};

/// Who is connected; an extension of each request.
#[derive(Clone, Debug)]
pub struct Peer {
    /// From where.
    pub address: SocketAddr,
    /// Whom the verified client certificate names, if there is one.
    pub certificate: Option<Arc<PeerIdentity>>,
}

/// What the layer hands to a method: an extension of the request.
#[derive(Clone)]
pub struct CallContext {
    /// The admitted caller.
    pub caller: Arc<Caller>,
    /// What the caller showed.
    pub proof: CredentialKey,
    /// When the method must have its answer: a little before the call's deadline, so that what can
    /// be told by then still arrives.
    pub deadline: Instant,
    /// The record of this call.
    pub draft: DraftRecord,
    /// Cancelled when the call's connection is to end, and with it a stream.
    pub leaving: CancellationToken,
}

/// The method that a request's path names.
pub(super) fn method_of(path: &str) -> Method {
    match path.rsplit('/').next() {
        Some("GetToken") => Method::GetToken,
        Some("WatchTokens") => Method::WatchTokens,
        Some("ReportRejectedToken") => Method::ReportRejectedToken,
        Some("ListAccounts") => Method::ListAccounts,
        _ => Method::Unknown,
    }
}

/// The event of a call of `method`.
pub(super) fn event_of(method: Method) -> Event {
    match method {
        Method::GetToken => Event::GetToken,
        Method::WatchTokens => Event::WatchTokens,
        Method::ReportRejectedToken => Event::ReportRejectedToken,
        Method::ListAccounts => Event::ListAccounts,
        Method::Unknown => Event::UnknownMethod,
    }
}

/// How much of a call's time is kept for the way of its answer, and for the record of a late one.
const MARGIN: Duration = Duration::from_millis(200);

/// When a call must have been answered.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadline(pub(super) Instant);

impl Deadline {
    /// Returns once it has passed.
    pub(super) async fn passes(self) {
        tokio::time::sleep_until(self.0).await;
    }

    /// Whether it has.
    pub(super) fn has_passed(self) -> bool {
        self.0 <= Instant::now()
    }

    /// When a method must have its answer, so that it still arrives: a tenth of the time before the
    /// deadline, at most [`MARGIN`].
    pub(super) fn for_method(self, arrived: Instant) -> Instant {
        self.0 - (self.0.saturating_duration_since(arrived) / 10).min(MARGIN)
    }

    /// How long from now the record may take: beyond the deadline by [`MARGIN`], so that what was answered
    /// in the last moment is recorded as that.
    pub(super) fn left_for_record(self, longest: Duration) -> Duration {
        longest.min(self.0.saturating_duration_since(Instant::now()) + MARGIN)
    }
}

/// The `grpc-timeout` of a request: at most eight digits and a unit.
///
/// # Errors
/// [`Refusal::Invalid`] for anything else, which tonic would ignore.
pub(super) fn deadline_of(headers: &HeaderMap) -> Result<Option<Duration>, Refusal> {
    let Some(value) = headers.get("grpc-timeout") else { return Ok(None) };
    let parsed = value.to_str().ok().and_then(|text| {
        let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
        if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        let number: u64 = digits.parse().ok()?;
        Some(match unit {
            "H" => Duration::from_hours(number),
            "M" => Duration::from_mins(number),
            "S" => Duration::from_secs(number),
            "m" => Duration::from_millis(number),
            "u" => Duration::from_micros(number),
            "n" => Duration::from_nanos(number),
            _ => return None,
        })
    });
    parsed.map(Some).ok_or(Refusal::Invalid {
        field: "grpc-timeout",
        description: "must be at most eight digits and one of H, M, S, m, u, n".into(),
    })
}

/// The trace id of a well-formed W3C `traceparent`.
pub(super) fn trace_id_of(headers: &HeaderMap) -> Option<String> {
    let text = headers.get("traceparent")?.to_str().ok()?;
    let id = text.split('-').nth(1)?;
    let well_formed = id.len() == 32
        && id.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        && id.bytes().any(|b| b != b'0');
    well_formed.then(|| id.to_owned())
}

/// The record of a call under way, shared by the layer and the method.
#[derive(Clone)]
pub struct DraftRecord(Arc<Mutex<Drafted>>);

struct Drafted {
    record: Record,
    token_ends: Option<Timestamp>,
}

impl DraftRecord {
    pub(super) fn new(record: Record) -> Self {
        Self(Arc::new(Mutex::new(Drafted { record, token_ends: None })))
    }

    fn change(&self, change: impl FnOnce(&mut Drafted)) {
        // A panic between two fields leaves a record that is still true.
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn record(&self, change: impl FnOnce(Record) -> Record) {
        self.change(|drafted| drafted.record = change(drafted.take()));
    }

    pub(super) fn identified(&self, identified: &Identified) {
        self.change(|drafted| {
            drafted.record.caller = Some(identified.caller.name.to_string());
            drafted.record.caller_kind = Some(identified.kind.as_str());
        });
    }

    /// Notes what is known of a caller that is not admitted; what it hears.
    pub(super) fn unidentified(&self, unidentified: Unidentified) -> Refusal {
        let Unidentified { refusal, known, why, shown } = unidentified;
        if let Some(known) = &known {
            self.identified(known);
        }
        if let Some(why) = why {
            self.note("refused", why);
        }
        if let Some(shown) = shown {
            self.note("certificate", &shown);
        }
        refusal
    }

    /// Names the account as the caller wrote it.
    pub fn account(&self, name: &str) {
        self.record(|record| record.requested_account(name));
    }

    /// Names the accounts and patterns as the caller wrote them.
    pub fn accounts(&self, names: &[String]) {
        self.record(|record| record.requested_accounts(names.iter().map(String::as_str)));
    }

    /// Adds a detail.
    pub fn note(&self, key: &str, value: &str) {
        self.record(|record| record.with(key, value));
    }

    /// Names the token that is the answer.
    pub fn token(&self, token: &Token) {
        self.change(|drafted| {
            drafted.record.generation = Some(token.generation.0);
            drafted.record.token_fingerprint = Some(token.fingerprint.clone());
            drafted.token_ends = Some(token.expires_at);
        });
    }

    /// Notes why the call is refused, and makes the status that says so.
    #[must_use]
    pub fn refuse(&self, refusal: Refusal) -> Status {
        self.change(|drafted| {
            drafted.record.reason = refusal.reason().map(str::to_owned);
            drafted.token_ends = None;
        });
        if let Refusal::Invalid { field, .. } = &refusal {
            self.note("field", field);
        }
        refusal.into()
    }

    /// The record at this moment, for the events of a stream.
    pub(crate) fn so_far(&self) -> Record {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).record.clone()
    }

    /// Completes the record and gives it away; with it the end of the token that the answer holds, if any.
    pub(super) fn finish(
        &self,
        outcome: &'static str,
        latency: Duration,
    ) -> (Record, Option<Timestamp>) {
        let mut drafted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut record = drafted.take();
        record.outcome = outcome;
        record.latency_us = i64::try_from(latency.as_micros()).ok();
        (record, drafted.token_ends)
    }
}

impl Drafted {
    /// The record, in whose place one of the same call is left that says nothing more.
    fn take(&mut self) -> Record {
        let blank = Record::new(self.record.at, self.record.event);
        mem::replace(&mut self.record, blank)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn timeout(value: &str) -> Result<Option<Duration>, Refusal> {
        let mut headers = HeaderMap::new();
        headers.insert("grpc-timeout", value.parse().unwrap());
        deadline_of(&headers)
    }

    #[test]
    fn timeouts_are_read_in_all_units() {
        assert_eq!(deadline_of(&HeaderMap::new()), Ok(None));
        for (text, expected) in [
            ("2H", Duration::from_hours(2)),
            ("3M", Duration::from_mins(3)),
            ("4S", Duration::from_secs(4)),
            ("99999999m", Duration::from_millis(99_999_999)),
            ("6u", Duration::from_micros(6)),
            ("0n", Duration::ZERO),
        ] {
            assert_eq!(timeout(text), Ok(Some(expected)));
        }
    }

    #[test]
    fn malformed_timeouts_are_refused() {
        for text in ["", "5", "S", "123456789S", "-1S", "1.5S", "5s", "5 S"] {
            assert!(matches!(timeout(text), Err(Refusal::Invalid { .. })), "{text}");
        }
    }

    #[test]
    fn only_a_well_formed_trace_id_is_recorded() {
        let trace = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("traceparent", value.parse().unwrap());
            trace_id_of(&headers)
        };
        let id = "4bf92f3577b34da6a3ce929d0e0e4736";
        assert_eq!(trace(&format!("00-{id}-00f067aa0ba902b7-01")).as_deref(), Some(id));
        for bad in ["", "00", "00-short-1-01", &format!("00-{}-1-01", "0".repeat(32))] {
            assert_eq!(trace(bad), None);
        }
    }

    proptest! {
        #[test]
        fn any_header_is_a_duration_or_a_refusal(text in "[ -~]{0,12}") {
            let _ = timeout(&text);
        }
    }
}
