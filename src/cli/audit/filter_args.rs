//! The flags that select events.

use clap::{Args, builder::PossibleValuesParser};

use super::super::time::Moment;
use crate::{
    audit::record::Event,
    domain::{account::AccountName, clock::Timestamp},
    store::audit::EventFilter,
    telemetry::GRPC_CODE_NAMES,
};

/// The conditions that select events.
#[derive(Args, Debug)]
pub(super) struct FilterArgs {
    /// Only events of this account
    #[arg(long)]
    account: Option<AccountName>,
    /// Only events of this caller
    #[arg(long)]
    caller: Option<AccountName>,
    /// Only events of this kind, such as `get_token`
    #[arg(long, hide_possible_values = true,
          value_parser = PossibleValuesParser::new(Event::ALL.map(Event::as_str)))]
    event: Option<String>,
    /// Only events with this outcome, such as `ok` or `permission_denied`
    #[arg(long, hide_possible_values = true,
          value_parser = PossibleValuesParser::new(GRPC_CODE_NAMES))]
    outcome: Option<String>,
    /// Only events from this time on: an RFC 3339 time, or a duration before now, such as 24h
    #[arg(long, value_name = "T")]
    since: Option<Moment>,
    /// Only events before this time
    #[arg(long, value_name = "T")]
    until: Option<Moment>,
}

impl FilterArgs {
    /// Returns the conditions with all times absolute.
    pub(super) fn into_filter(self, now: Timestamp) -> EventFilter {
        EventFilter {
            account: self.account.map(|name| name.to_string()),
            caller: self.caller.map(|name| name.to_string()),
            events: self.event.map(|event| vec![event]),
            outcome: self.outcome,
            since: self.since.map(|since| since.before(now)),
            until: self.until.map(|until| until.before(now)),
            fingerprints: None,
        }
    }
}
