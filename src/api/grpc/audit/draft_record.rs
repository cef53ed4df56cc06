//! The audit record of a call in progress.

use std::{mem, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tonic::Status;

use super::token_access::TokenAccess;
use crate::{
    api::grpc::authentication::{AuthenticatedCaller, AuthenticationFailure},
    audit::record::Record,
    domain::{clock::Timestamp, token::Token},
    services::token_provider::CallRefusal,
};

/// The record of a call, which the audit layer and the RPC fill in as the call goes on. Clones share it.
#[derive(Clone)]
pub struct DraftRecord(Arc<Mutex<Draft>>);

struct Draft {
    record: Record,
    /// The token in the response, if there is one.
    token: Option<TokenInResponse>,
}

/// What is checked again once the record is durable, before a response with a token is sent.
pub(super) struct TokenInResponse {
    pub(super) expires_at: Timestamp,
    pub(super) access: TokenAccess,
}

impl DraftRecord {
    pub(super) fn new(record: Record) -> Self {
        Self(Arc::new(Mutex::new(Draft { record, token: None })))
    }

    fn update(&self, update: impl FnOnce(&mut Draft)) {
        update(&mut self.0.lock());
    }

    fn map_record(&self, map: impl FnOnce(Record) -> Record) {
        self.update(|draft| draft.record = map(draft.take_record()));
    }

    /// Sets the caller.
    pub(super) fn set_caller(&self, authenticated: &AuthenticatedCaller) {
        self.update(|draft| {
            draft.record.caller = Some(authenticated.caller.name.to_string());
            draft.record.caller_kind = Some(authenticated.kind.as_str());
        });
    }

    /// Adds what is known about a caller whose authentication failed. Returns the refusal to answer with.
    pub(super) fn set_authentication_failure(&self, failure: AuthenticationFailure) -> CallRefusal {
        let AuthenticationFailure { refusal, known_caller, cause, certificate_names } = failure;
        if let Some(known_caller) = &known_caller {
            self.set_caller(known_caller);
        }
        if let Some(cause) = cause {
            self.add_detail("refused", cause);
        }
        if let Some(names) = certificate_names {
            self.add_detail("certificate", &names);
        }
        refusal
    }

    /// Sets the account's name as the caller wrote it. It is sanitized, since it may be a secret that was
    /// sent by mistake.
    pub fn set_account(&self, name: &str) {
        self.map_record(|record| record.requested_account(name));
    }

    /// Sets the accounts and patterns as the caller wrote them, sanitized.
    pub fn set_accounts(&self, names: &[String]) {
        self.map_record(|record| record.requested_accounts(names.iter().map(String::as_str)));
    }

    /// Adds an entry to the record's `detail`.
    pub fn add_detail(&self, key: &str, value: &str) {
        self.map_record(|record| record.with(key, value));
    }

    /// Sets the generation and the fingerprint of the token in the response. Its expiry and `access` are kept
    /// too, for the audit layer to check them once the record is written.
    pub(super) fn set_token(&self, token: &Token, access: TokenAccess) {
        self.update(|draft| {
            draft.record.generation = Some(token.generation.0);
            draft.record.token_fingerprint = Some(token.fingerprint.clone());
            draft.token = Some(TokenInResponse { expires_at: token.expires_at, access });
        });
    }

    /// Sets the reason of a refusal. Returns the status to answer with.
    #[must_use]
    pub fn refuse(&self, refusal: CallRefusal) -> Status {
        self.update(|draft| {
            draft.record.reason = refusal.reason().map(|reason| reason.name().to_owned());
            draft.token = None;
        });
        if let CallRefusal::Invalid { field, .. } = &refusal {
            self.add_detail("field", field);
        }
        refusal.into()
    }

    /// Returns a copy of the record as it is now, which streams use as the template of their own records.
    pub(crate) fn snapshot(&self) -> Record {
        self.0.lock().record.clone()
    }

    /// Completes and returns the record, with the token in the response, if there is one. Later changes to the
    /// draft are lost.
    pub(super) fn finish(
        &self,
        outcome: &'static str,
        latency: Duration,
    ) -> (Record, Option<TokenInResponse>) {
        let mut draft = self.0.lock();
        let mut record = draft.take_record();
        record.outcome = outcome;
        record.latency_us = i64::try_from(latency.as_micros()).ok();
        (record, draft.token.take())
    }
}

impl Draft {
    /// Takes the record out, to change it by value, and leaves an empty one of the same call.
    fn take_record(&mut self) -> Record {
        let empty = Record::new(self.record.at, self.record.event);
        mem::replace(&mut self.record, empty)
    }
}
