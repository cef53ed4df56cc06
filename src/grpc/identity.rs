//! Who calls: by a bearer now; client certificates join here.

use std::sync::Arc;

use http::{HeaderMap, header::AUTHORIZATION};

use crate::{
    bearer::Bearer,
    broker::Refusal,
    caller::{Caller, CallerKind},
    clock::Timestamp,
    directory::Directory,
    store::callers::Proof,
};

/// What is known of who called, for the audit log also when the call is refused.
#[derive(Clone, Debug)]
pub struct Identified {
    /// The caller.
    pub caller: Arc<Caller>,
    /// How it was identified.
    pub kind: CallerKind,
    /// What it showed.
    pub proof: Proof,
}

/// A refused identity: what the caller hears, and what the audit log is told.
#[derive(Debug)]
pub struct Unidentified {
    /// What the caller hears.
    pub refusal: Refusal,
    /// The caller whose credential it was, if it is known, and why it was refused.
    pub known: Option<(Identified, &'static str)>,
}

impl From<Refusal> for Unidentified {
    fn from(refusal: Refusal) -> Self {
        Self { refusal, known: None }
    }
}

/// Finds the caller of a request.
///
/// # Errors
/// [`Refusal::CredentialMissing`], [`Refusal::BearerMalformed`], or, alike for unknown, ended and
/// disabled credentials, [`Refusal::CredentialRefused`].
pub fn identify(
    headers: &HeaderMap,
    directory: &Directory,
    now: Timestamp,
) -> Result<Identified, Unidentified> {
    let mut shown = headers.get_all(AUTHORIZATION).iter();
    let value = shown.next().ok_or(Refusal::CredentialMissing)?;
    if shown.next().is_some() {
        return Err(Refusal::BearerMalformed.into());
    }
    let text = value.to_str().map_err(|_| Refusal::BearerMalformed)?;
    let (scheme, bearer) = text.split_once(' ').ok_or(Refusal::BearerMalformed)?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(Refusal::BearerMalformed.into());
    }
    let bearer = Bearer::parse(bearer.trim()).map_err(|_| Refusal::BearerMalformed)?;
    let kind = CallerKind::Bearer;
    let proof = Proof::BearerSha256(bearer.sha256());
    match directory.by_proof(&proof, now) {
        Ok(caller) => Ok(Identified { caller, kind, proof }),
        Err(refused) => Err(Unidentified {
            refusal: Refusal::CredentialRefused,
            known: refused
                .map(|refused| (Identified { caller: refused.caller, kind, proof }, refused.why)),
        }),
    }
}
