//! Why a broker cannot start.

use std::io;

use thiserror::Error;

use super::keyring_check::WrongKeyring;
use crate::{
    audit::journal::{AuditUnavailable, JournalError},
    files::state_dir::StateDirError,
    services::{
        heartbeat::IdentityError,
        history::{DatabaseMismatch, HistoryError},
        trust_monitor::IntakeKeyFault,
    },
    store::StoreError,
    tls::TlsError,
    upstream::UpstreamSetupError,
};

/// Why a broker cannot start. The messages say what to correct, and contain no secret.
#[derive(Debug, Error)]
pub enum StartError {
    /// The state directory cannot be used.
    #[error(transparent)]
    StateDir(#[from] StateDirError),
    /// The audit journal cannot be opened.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The record of the start did not become durable.
    #[error(
        "the start cannot be recorded in the audit journal: is the state directory's disk full?"
    )]
    NotRecorded(#[source] AuditUnavailable),
    /// The file that lists the accounts for which an earlier process issued tokens without the
    /// database cannot be read or written.
    #[error(
        "the file issued-alone in the state directory, which lists the accounts for which tokens \
         were issued without the database, cannot be used"
    )]
    IssuedAlone(#[source] io::Error),
    /// The database refused a statement, or has another schema. If it does not answer, the start waits
    /// for it instead.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Another process acts under the identity of the state directory.
    #[error(transparent)]
    Identity(IdentityError),
    /// The upstream's client cannot be built.
    #[error(transparent)]
    Upstream(#[from] UpstreamSetupError),
    /// The keyring is not the one that sealed the stored secrets.
    #[error(transparent)]
    WrongKeyring(#[from] WrongKeyring),
    /// The published intake key is not one of the keyring.
    #[error(transparent)]
    IntakeKey(#[from] IntakeKeyFault),
    /// The database is not the one that this replica used last, or is in an older state.
    #[error(transparent)]
    DatabaseMismatch(#[from] DatabaseMismatch),
    /// The database was replaced during the start.
    #[error("the database was replaced during the start: the log says how")]
    DatabaseReplaced,
    /// A task that runs since the start, such as the heartbeat, has ended.
    #[error("a task of the broker has ended during the start: the log says why")]
    TaskEnded,
    /// The file that says which database this replica used last cannot be read or written.
    #[error("the file database in the state directory cannot be used")]
    DatabaseFile(#[source] io::Error),
    /// The TLS files cannot be used.
    #[error("TLS cannot be served")]
    Tls(#[from] TlsError),
    /// The system cannot create the threads, or the file descriptors that they need.
    #[error("the threads that serve connections cannot be started")]
    Workers(#[source] io::Error),
    /// The address of a listener cannot be read.
    #[error("the address of a listener cannot be read")]
    Listen(#[source] io::Error),
    /// The protobuf descriptors for gRPC reflection cannot be decoded, which is a bug in the build.
    #[error("the protobuf descriptors for gRPC reflection cannot be decoded")]
    Descriptors(#[from] tonic_reflection::server::Error),
    /// The caller of `App::start` gave up before the start had finished.
    #[error("stopped before the start had finished")]
    Stopped,
}

impl From<IdentityError> for StartError {
    fn from(error: IdentityError) -> Self {
        match error {
            IdentityError::Store(error) => Self::Store(error),
            in_use @ IdentityError::InUse(_) => Self::Identity(in_use),
        }
    }
}

impl From<HistoryError> for StartError {
    fn from(error: HistoryError) -> Self {
        match error {
            HistoryError::Store(error) => Self::Store(error),
            HistoryError::Mismatch(mismatch) => Self::DatabaseMismatch(mismatch),
            HistoryError::File(error) => Self::DatabaseFile(error),
            HistoryError::AcceptedElsewhere => Self::DatabaseReplaced,
        }
    }
}
