//! The initial state of a simulated upstream.

use serde::Deserialize;

use super::faults::Faults;
use crate::domain::clock::Clock;

/// The state in which a simulated upstream starts, and to which a reset returns.
#[derive(Clone, Default)]
pub struct SimulatorOptions {
    /// The accounts that may request tokens.
    pub accounts: Vec<SimulatedAccount>,
    /// The faults that are in effect at first.
    pub faults: Faults,
    /// The clock from which the upstream takes its time.
    pub clock: Clock,
}

/// An account of the simulated upstream.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SimulatedAccount {
    /// The `clientId` of its token requests.
    pub client_id: String,
    /// The `clientSecret` of its token requests.
    pub client_secret: String,
    /// Whether token requests are refused although their secret is right.
    #[serde(default)]
    pub locked: bool,
}
