//! A replica that claims leases, for tests of the statements that it uses.

use std::time::Duration;

use token_broker::{domain::refresh_policy::RefreshPolicy, store::leases::LeaseHolder};

/// Returns a replica that nothing limits: leases last a minute, and no rate, no number of calls and no minimum
/// issue interval delays a claim. `instance` is also the number of its process's start.
pub(crate) fn unlimited_holder(instance: &str) -> LeaseHolder {
    LeaseHolder {
        instance: instance.into(),
        start: instance.into(),
        replica: 1,
        lease_duration: Duration::from_mins(1),
        policy: RefreshPolicy { refresh_at: 0.75, min_issue_interval: Duration::ZERO },
        rate: f64::from(u32::MAX),
        concurrency: usize::MAX,
    }
}
