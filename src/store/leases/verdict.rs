//! Whether an account may be issued for: pure, by what one moment of the database says.

use std::time::Duration;

use crate::domain::{
    clock::{Timestamp, delta, until_from},
    refresh_state::FailureClass,
    token::Generation,
};

/// How often an hour a changed credential may pass the floor between issues.
const FLOOR_PASSES: i32 = 3;
const FLOOR_PASSES_WITHIN: Duration = Duration::from_hours(1);
/// What decides on a claim; a row of three tables.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub(super) client_id: String,
    pub(super) enabled: bool,
    pub(super) credential_version: i64,
    pub(super) sealed_secret: Option<Vec<u8>>,
    pub(super) previous_secret: Option<Vec<u8>>,
    pub(super) previous_version: Option<i64>,
    pub(super) reissue_requested_at: Option<Timestamp>,
    pub(super) lease_until: Option<Timestamp>,
    pub(super) attempt_started_at: Option<Timestamp>,
    pub(super) attempt_ended_at: Option<Timestamp>,
    pub(super) attempt_version: Option<i64>,
    pub(super) floor_passes: i32,
    pub(super) floor_passes_since: Option<Timestamp>,
    pub(super) error_class: Option<String>,
    pub(super) error_version: Option<i64>,
    pub(super) next_attempt_at: Option<Timestamp>,
    pub(super) generation: Option<i64>,
    pub(super) now: Timestamp,
}

/// The pure verdict on a claim.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Verdict {
    Go { version: i64, passes_floor: bool },
    Wait(Duration),
    NotNeeded,
}

impl Row {
    /// Decides whether the account may be issued for at `now`. `known` is the generation that the
    /// claimant wants to replace; an outage of the upstream that ended `outage_over` ago, and was what
    /// the last attempt failed for, need not be waited out.
    pub(super) fn verdict(
        &self,
        known: Option<Generation>,
        outage_over: Option<Duration>,
        floor: Duration,
    ) -> Verdict {
        if !self.enabled || self.generation.map(Generation) > known {
            return Verdict::NotNeeded;
        }
        if let Some(until) = self.lease_until.filter(|until| *until > self.now) {
            return Verdict::Wait(until_from(self.now, until));
        }
        let failing = self.error_version == Some(self.credential_version);
        let parked = failing
            && self
                .error_class
                .as_deref()
                .is_some_and(|class| class.parse().is_ok_and(FailureClass::parks));
        let asked = self
            .reissue_requested_at
            .is_some_and(|at| self.attempt_started_at.is_none_or(|started| started < at));
        let version = match (&self.sealed_secret, &self.previous_secret, self.previous_version) {
            (Some(_), _, _) if !parked || asked => self.credential_version,
            (_, Some(_), Some(previous)) => previous,
            _ => return Verdict::NotNeeded,
        };
        let untried = self.attempt_version != Some(version);
        let over_since = outage_over.map(|ago| self.now - delta(ago));
        let over = self.attempt_started_at < over_since;
        if let Some(at) = self.next_attempt_at.filter(|at| *at > self.now)
            && failing
            && !asked
            && !untried
            && !over
        {
            return Verdict::Wait(until_from(self.now, at));
        }
        let floor_ends = self.attempt_started_at.map(|started| started + delta(floor));
        match floor_ends.filter(|end| *end > self.now) {
            None => Verdict::Go { version, passes_floor: false },
            Some(_) if untried && self.passes_left() => Verdict::Go { version, passes_floor: true },
            Some(end) => Verdict::Wait(until_from(self.now, end)),
        }
    }

    fn passes_left(&self) -> bool {
        self.passes_so_far() < FLOOR_PASSES
    }

    /// The passes of the floor in the hour that runs.
    pub(super) fn passes_so_far(&self) -> i32 {
        let within =
            self.floor_passes_since.is_some_and(|at| at + delta(FLOOR_PASSES_WITHIN) > self.now);
        if within { self.floor_passes } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, TimeDelta};

    use super::*;

    const FLOOR: Duration = Duration::from_secs(30);

    fn at(second: i64) -> Timestamp {
        DateTime::UNIX_EPOCH + TimeDelta::seconds(second)
    }

    /// An account at second 1000 whose first credential was tried at 0 and issued generation 1.
    fn row() -> Row {
        Row {
            client_id: "acme".into(),
            enabled: true,
            credential_version: 1,
            sealed_secret: Some(vec![1]),
            previous_secret: None,
            previous_version: None,
            reissue_requested_at: None,
            lease_until: None,
            attempt_started_at: Some(at(0)),
            attempt_ended_at: Some(at(1)),
            attempt_version: Some(1),
            floor_passes: 0,
            floor_passes_since: None,
            error_class: None,
            error_version: None,
            next_attempt_at: None,
            generation: Some(1),
            now: at(1_000),
        }
    }

    fn verdict(row: &Row) -> Verdict {
        row.verdict(Some(Generation(1)), None, FLOOR)
    }

    const GO: Verdict = Verdict::Go { version: 1, passes_floor: false };

    #[test]
    fn a_known_token_may_be_replaced() {
        assert_eq!(verdict(&row()), GO);
    }

    #[test]
    fn a_token_that_somebody_else_replaced_needs_no_issue() {
        assert_eq!(verdict(&Row { generation: Some(2), ..row() }), Verdict::NotNeeded);
    }

    #[test]
    fn a_disabled_account_is_not_issued_for() {
        assert_eq!(verdict(&Row { enabled: false, ..row() }), Verdict::NotNeeded);
    }

    #[test]
    fn a_held_lease_is_waited_for_until_it_runs_out() {
        let row = Row { lease_until: Some(at(1_005)), ..row() };
        assert_eq!(verdict(&row), Verdict::Wait(Duration::from_secs(5)));
        assert_eq!(verdict(&Row { now: at(1_005), ..row }), GO);
    }

    #[test]
    fn the_floor_between_issues_holds_to_the_second() {
        let row = Row { attempt_started_at: Some(at(990)), ..row() };
        assert_eq!(verdict(&row), Verdict::Wait(Duration::from_secs(20)));
        assert_eq!(verdict(&Row { now: at(1_020), ..row }), GO);
    }

    #[test]
    fn a_changed_credential_passes_the_floor_three_times_an_hour() {
        let changed = Row {
            attempt_started_at: Some(at(990)),
            credential_version: 2,
            floor_passes_since: Some(at(900)),
            ..row()
        };
        let passes = Verdict::Go { version: 2, passes_floor: true };
        assert_eq!(verdict(&Row { floor_passes: 2, ..changed.clone() }), passes);
        let spent = Row { floor_passes: 3, ..changed };
        assert_eq!(verdict(&spent), Verdict::Wait(Duration::from_secs(20)));
        assert_eq!(verdict(&Row { floor_passes_since: Some(at(1_000 - 3_600)), ..spent }), passes);
    }

    #[test]
    fn a_rejected_credential_is_left_alone_until_it_changes_or_an_admin_asks() {
        let parked = Row { error_class: Some("rejected".into()), error_version: Some(1), ..row() };
        assert_eq!(verdict(&parked), Verdict::NotNeeded);
        assert_eq!(
            verdict(&Row { credential_version: 2, ..parked.clone() }),
            Verdict::Go { version: 2, passes_floor: false }
        );
        assert_eq!(verdict(&Row { reissue_requested_at: Some(at(5)), ..parked.clone() }), GO);
        let tried_since =
            Row { reissue_requested_at: Some(at(5)), attempt_started_at: Some(at(6)), ..parked };
        assert_eq!(verdict(&tried_since), Verdict::NotNeeded);
    }

    #[test]
    fn while_a_new_secret_is_refused_the_one_before_it_goes_on() {
        let row = Row {
            credential_version: 2,
            previous_secret: Some(vec![2]),
            previous_version: Some(1),
            error_class: Some("rejected".into()),
            error_version: Some(2),
            attempt_version: Some(2),
            ..row()
        };
        assert_eq!(verdict(&row), GO);
    }

    #[test]
    fn a_failure_that_may_pass_is_waited_out_unless_the_credential_changed() {
        let failing = Row {
            error_class: Some("unreachable".into()),
            error_version: Some(1),
            next_attempt_at: Some(at(1_060)),
            ..row()
        };
        assert_eq!(verdict(&failing), Verdict::Wait(Duration::from_mins(1)));
        assert_eq!(
            verdict(&Row { credential_version: 2, ..failing }),
            Verdict::Go { version: 2, passes_floor: false }
        );
    }

    #[test]
    fn a_pause_for_an_outage_ends_with_it() {
        let failing = Row {
            error_class: Some("unreachable".into()),
            error_version: Some(1),
            attempt_started_at: Some(at(900)),
            next_attempt_at: Some(at(1_060)),
            ..row()
        };
        let over =
            |ago| failing.verdict(Some(Generation(1)), Some(Duration::from_secs(ago)), FLOOR);
        assert_eq!(over(99), GO);
        assert_eq!(over(100), Verdict::Wait(Duration::from_mins(1)));
    }
}
