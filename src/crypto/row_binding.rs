//! What a sealed value is bound to.

use std::fmt;

use crate::domain::{
    account::{AccountId, CredentialVersion},
    token::Generation,
};

/// The row and column that a sealed value belongs to. The value opens only with the same binding: it
/// is the associated data (AAD) of its encryption.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RowBinding {
    /// The table's name.
    pub table: &'static str,
    /// The column's name. A value that moves between columns keeps the name of one of them.
    pub column: &'static str,
    /// The row's id. Ids are never reused.
    pub row: i64,
    /// The number of the value among those that this row and column have held.
    pub version: i64,
}

impl RowBinding {
    /// Returns the binding of an account's client secret, be it the current or the previous one: a
    /// rotation moves the sealed value unchanged from one column to the other.
    #[must_use]
    pub fn client_secret(account: AccountId, version: CredentialVersion) -> Self {
        Self { table: "accounts", column: "client_secret", row: account.0, version: version.0 }
    }

    /// Returns the binding of an account's stored token.
    #[must_use]
    pub fn token(account: AccountId, generation: Generation) -> Self {
        Self { table: "tokens", column: "sealed_token", row: account.0, version: generation.0 }
    }

    /// Returns the associated data of a value with this binding, as `docs/keys.md` describes it.
    pub(super) fn associated_data(&self) -> Vec<u8> {
        let mut data = Vec::with_capacity(96);
        push_prefixed(&mut data, "token-broker sealed v1");
        push_prefixed(&mut data, self.table);
        push_prefixed(&mut data, self.column);
        data.extend_from_slice(&self.row.to_be_bytes());
        data.extend_from_slice(&self.version.to_be_bytes());
        data
    }
}

impl fmt::Display for RowBinding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { table, column, row, version } = self;
        write!(f, "{table}.{column} of row {row}, version {version}")
    }
}

/// Appends `part` after its length in bytes, so that no two lists of parts give the same bytes.
pub(super) fn push_prefixed(bytes: &mut Vec<u8>, part: &str) {
    bytes.extend_from_slice(&(part.len() as u64).to_be_bytes());
    bytes.extend_from_slice(part.as_bytes());
}
