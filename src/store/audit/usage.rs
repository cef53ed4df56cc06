//! What the audit log says of how callers used accounts, summed up by the database.

use tracing::instrument;

use super::{filter::EventFilter, snapshot::AuditSnapshot};
use crate::{domain::clock::Timestamp, store::StoreError};

/// The calls of one caller, of one kind and on one account, within a range of time.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct CallerUse {
    /// The caller's name at that time.
    pub caller: String,
    /// The kind of event, such as `get_token`.
    pub event: String,
    /// The account, or what the caller wrote instead; `None` for lists, and for calls that no grant allowed.
    pub account: Option<String>,
    /// Whether a grant allowed one of them. It may have failed for another reason.
    pub granted: bool,
}

/// The calls of one caller on an account.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct AccountUse {
    /// The caller's name at that time; `None` for those who did not prove who they are.
    pub caller: Option<String>,
    /// How often it was given a token.
    pub served: i64,
    /// How many tokens it reported as refused by the upstream.
    pub reported: i64,
    /// How many of its calls were refused or failed.
    pub refused: i64,
    /// The first of all these calls.
    pub first_at: Timestamp,
    /// The last of them.
    pub last_at: Timestamp,
}

impl AuditSnapshot {
    /// Returns the time from which on the log has all calls, or `None` if none was ever removed. Retention removes
    /// whole UTC days, and records each.
    ///
    /// # Errors
    /// When the statement fails.
    #[instrument(level = "debug", skip_all)]
    pub async fn calls_kept_since(&mut self) -> Result<Option<Timestamp>, StoreError> {
        Ok(sqlx::query_scalar!(
            r#"/* store::audit::usage::calls_kept_since */
            select (max(to_date(subject, 'YYYY-MM-DD')) + 1)::timestamp at time zone 'UTC' as kept_since
            from changes
            where table_name = 'audit_events' and operation = 'prune' and subject ~ '^[0-9]{4}-[0-9]{2}-[0-9]{2}$'"#
        )
        .fetch_one(&mut *self.0)
        .await?)
    }

    /// Returns the time of the first record that the log has.
    ///
    /// # Errors
    /// When the statement fails.
    #[instrument(level = "debug", skip_all)]
    pub async fn first_at(&mut self) -> Result<Option<Timestamp>, StoreError> {
        let (since, until) = EventFilter::default().times(None);
        Ok(sqlx::query_scalar!(
            "/* store::audit::usage::first_at */ select min(at) from audit_events where at >= $1 and at < $2",
            since,
            until,
        )
        .fetch_one(&mut *self.0)
        .await?)
    }

    /// Returns which accounts the callers used from `since` on and before `until`.
    ///
    /// # Errors
    /// When the statement fails.
    #[instrument(level = "debug", skip_all, fields(%since, %until))]
    pub async fn uses(
        &mut self,
        callers: &[String],
        since: Timestamp,
        until: Timestamp,
    ) -> Result<Vec<CallerUse>, StoreError> {
        Ok(sqlx::query_as!(
            CallerUse,
            r#"/* store::audit::usage::uses */
            select caller as "caller!", event, case when outcome <> 'permission_denied' then account end as account,
                bool_or(outcome <> 'permission_denied') as "granted!"
            from audit_events
            where at >= $1 and at < $2 and caller = any($3) and event in ('get_token', 'token_pushed',
                'watch_tokens', 'report_rejected_token', 'list_accounts', 'unknown_method')
            group by 1, 2, 3"#,
            since,
            until,
            callers,
        )
        .fetch_all(&mut *self.0)
        .await?)
    }

    /// Returns who used the account `account`, those with the most tokens first. Absent bounds of time do not limit it.
    ///
    /// # Errors
    /// When the statement fails.
    #[instrument(level = "debug", skip_all, fields(%account))]
    pub async fn users_of(
        &mut self,
        account: &str,
        since: Option<Timestamp>,
        until: Option<Timestamp>,
    ) -> Result<Vec<AccountUse>, StoreError> {
        let filter = EventFilter { since, until, ..EventFilter::default() };
        let (since, until) = filter.times(None);
        Ok(sqlx::query_as!(
            AccountUse,
            r#"/* store::audit::usage::users_of */
            with calls as (
                select caller, event, outcome = 'ok' as ok, least(count, 1000000000000) as count, at
                from audit_events
                where account = $1 and at >= $2 and at < $3
                    and event in ('get_token', 'token_pushed', 'watch_tokens', 'report_rejected_token')
            )
            select caller,
                coalesce(sum(count) filter (where ok and event in ('get_token', 'token_pushed')), 0)::bigint
                    as "served!",
                coalesce(sum(count) filter (where ok and event = 'report_rejected_token'), 0)::bigint
                    as "reported!",
                coalesce(sum(count) filter (where not ok), 0)::bigint as "refused!",
                min(at) as "first_at!", max(at) as "last_at!"
            from calls group by caller order by 2 desc, caller"#,
            account,
            since,
            until,
        )
        .fetch_all(&mut *self.0)
        .await?)
    }
}
