//! The statements behind the commands of an admin: `account`, `caller`, `audit retire` and `check`.
//!
//! Each command that writes is one transaction that tells the database who acts and why. Triggers
//! record the change in the table `changes`, and the running brokers take it up from there: nothing
//! here talks to a broker. A value that a trigger refuses is reported in the trigger's words.

mod accounts;
mod callers;
mod chains;
mod connection;
mod overview;

pub use self::{
    accounts::{AccountDetails, AccountSummary, NewAccount, Outcome, Rotation, Selection},
    callers::{
        BearerSummary, CallerDetails, CallerSummary, CredentialDetails, GrantDetails, NewBearer,
        NewCaller, NewGrant,
    },
    chains::OpenChain,
    connection::{Admin, Attribution},
    overview::{InstanceSummary, LastIssue, Load, PublishedKey},
};
