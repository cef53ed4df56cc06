//! The statements of the admin's commands `account`, `caller`, `keys`, `audit retire` and `check`.
//!
//! Each command that writes is one transaction, in which settings of the session contain the acting person
//! and the reason. Triggers record the change in the table `changes`, from which running brokers read it:
//! nothing here connects to a broker. If a trigger refuses a value, the error has the trigger's message.

mod account_import;
mod accounts;
mod caller_import;
mod callers;
mod chains;
mod connection;
mod keys;
mod overview;

pub use self::{
    account_import::{AccountUpdate, AccountsImport, StoredAccount, WholeAccount},
    accounts::{AccountDetails, AccountSummary, NewAccount, Outcome, Rotated, Rotation, Selection},
    caller_import::{CallerSetup, CallerUpdate, CallersImport, CertificateName, GrantSetup},
    callers::{
        BearerSummary, CallerDetails, CallerSummary, CredentialDetails, GrantDetails, GrantSummary,
        Listed, NewBearer, NewCaller, NewGrant,
    },
    chains::{OpenChain, UndeliveredReport},
    connection::{Admin, Attribution},
    keys::{KeyUse, ResealedBatch, SealedTable},
    overview::{InstanceSummary, LastIssue, Load, Login, UnauditedChange, UnrecordedChange},
};
