//! Sealing at rest: the keyring, values bound to their row, the intake key pair, and callers' bearers.
//!
//! A value that is sealed for one row opens in no other: table, column, row id and version are
//! authenticated with it. So a row that was copied over another one, or an old value that was put
//! back, is noticed. `docs/keys.md` gives the formats byte by byte.

pub mod bearer;
mod intake;
mod key;
mod keyring;
mod keyring_document;
mod keyring_file;
mod live_keyring;
mod row_binding;
mod sealing;
mod verifying_keys;

pub use self::{
    intake::{IntakeError, IntakePublicKey, SEALED_PREFIX},
    key::{KeyId, KeyKind, KeyStatus},
    keyring::{AlteredKey, Keyring, KeyringChange},
    keyring_document::KeyringFault,
    keyring_file::KeyringError,
    live_keyring::LiveKeyring,
    row_binding::RowBinding,
    sealing::SealError,
    verifying_keys::{SignatureError, VerifyingKeys, VerifyingKeysFault},
};
