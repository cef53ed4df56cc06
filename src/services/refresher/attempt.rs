//! One attempt to issue for one account, from the claim to the cache.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use ipnet::IpNet;
use sqlx::PgPool;
use tracing::{error, info, warn};

use super::{
    outage::{Change, Outage},
    unstored::PendingTokens,
};

use crate::{
    audit::{
        journal::Journal,
        record::{Event, Record},
    },
    crypto::Keyring,
    domain::{
        account::AccountId,
        clock::{Clock, Timestamp},
        refresh_policy::RefreshPolicy,
        refresh_state::{
            AccountCredential, FailureClass, IssueAttempt, IssueFailure, RefreshState,
        },
        token::{IssuedToken, Token},
    },
    services::{
        account_cache::{AccountCache, AccountSnapshot, CachedAccount},
        account_loader::AccountLoader,
        connectivity::{Connectivity, DatabaseConnectivity},
    },
    store::{
        leases::{FailedAttempt, LeaseHolder},
        tokens::{self, NewToken},
        within,
    },
    telemetry::Metrics,
    upstream::{Client, IssueError},
};

/// When to look again while the database or the journal is away.
pub(super) const AWAY: Duration = Duration::from_secs(1);
/// How long the record of an issue may take to become durable before the issue counts as lost.
const RECORD_WITHIN: Duration = Duration::from_secs(5);

/// All that an attempt needs.
pub struct Issuing {
    /// The accounts.
    pub cache: Arc<AccountCache>,
    /// Brings the cache to what the database has.
    pub loader: Arc<AccountLoader>,
    /// The database.
    pub pool: PgPool,
    /// Opens secrets, seals tokens.
    pub keyring: Arc<Keyring>,
    /// The upstream.
    pub upstream: Client,
    /// The audit log.
    pub journal: Journal,
    /// Time.
    pub clock: Clock,
    /// When to issue.
    pub policy: RefreshPolicy,
    /// Who we are, and the limits of all replicas.
    pub claimant: LeaseHolder,
    /// Whether the upstream ends older tokens when it issues a new one.
    pub ends_older: bool,
    /// The addresses that tokens should name; empty for any.
    pub expected_egress: Vec<IpNet>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// How far the upstream's clock was ahead of ours at the last issue, in milliseconds.
    pub upstream_skew_ms: Arc<AtomicI64>,
    /// Whether the database answers, and whether issuing goes on without it.
    pub reach: Arc<DatabaseConnectivity>,
    /// What was issued and is not stored yet.
    pub unstored: Arc<PendingTokens>,
    /// Whether the upstream answers at all.
    pub outage: Arc<Outage>,
}

/// What an attempt is made under.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Under {
    /// A lease.
    Lease,
    /// None, without the database.
    NoLease,
}

/// What an attempt leaves behind.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// The account's view tells when to go on.
    Done,
    /// Nothing was tried; not again before so long.
    NotBefore(Duration),
}

impl Issuing {
    /// When the account is to be issued for, as things stand with the database.
    pub(super) fn due(&self, view: &AccountSnapshot) -> Option<Timestamp> {
        let token = view.token.as_deref();
        let due = if self.outage_over(view).is_some() {
            let progress = RefreshState { next_attempt_at: None, ..view.progress.clone() };
            self.policy.next_attempt(&view.account, &progress, token)?
        } else {
            self.policy.next_attempt(&view.account, &view.progress, token)?
        };
        match self.reach.standing() {
            Connectivity::Connected => Some(due),
            // The database may be back before it must be.
            Connectivity::SoleReplica => {
                Some(due.max(RefreshPolicy::urgent_from(&view.progress, token)))
            }
            Connectivity::Partitioned => None,
        }
    }

    /// How long ago the upstream's outage ended that the account waits for, if it waits for one.
    pub(super) fn outage_over(&self, view: &AccountSnapshot) -> Option<Duration> {
        self.outage.is_over_for(&view.progress, self.clock.now())
    }

    /// Tries to replace the account's token. Never fails: what went wrong is in the account's view,
    /// in the audit log and in the metrics.
    pub async fn attempt(&self, slot: &Arc<CachedAccount>) -> Outcome {
        // Nothing is issued that cannot be recorded.
        if !self.journal.is_writable() {
            return Outcome::NotBefore(AWAY);
        }
        let view = slot.view();
        // Since it was planned, another replica's token may have come. The claim would take it for
        // the one that is to be replaced.
        if self.due(&view).is_none_or(|due| due > self.clock.now()) {
            return Outcome::Done;
        }
        match self.reach.standing() {
            Connectivity::Connected if self.unstored.of(slot.id()).is_some() => {
                // What the database does not know of may be all that makes it due.
                let settled = self.settle(slot.id()).await.unwrap_or(false);
                if settled { Outcome::Done } else { Outcome::NotBefore(AWAY) }
            }
            Connectivity::Connected => self.attempt_by_lease(slot, &view).await,
            Connectivity::SoleReplica => self.attempt_alone(slot, &view).await,
            // Planned anew when the database is back.
            Connectivity::Partitioned => Outcome::Done,
        }
    }

    pub(super) async fn reload(&self, slot: &CachedAccount) -> Outcome {
        match self.loader.these(&[slot.id().0]).await {
            Ok(()) => Outcome::Done,
            Err(error) => {
                warn!(account = %slot.view().account.name, %error, "an account cannot be loaded");
                Outcome::NotBefore(AWAY)
            }
        }
    }

    /// Calls the upstream and records the token that it issues; the log must not miss one. `None`
    /// when it cannot be recorded: the record is kept and written later, and the token is not used,
    /// since nobody could say when.
    pub(super) async fn issue(
        &self,
        slot: &CachedAccount,
        attempt: &IssueAttempt,
        under: Under,
    ) -> Result<Option<Arc<Token>>, IssueError> {
        let issued = self.call(attempt).await;
        let failure = issued.as_ref().err().map(|error| error.class);
        match self.outage.ended(slot.id(), failure, self.clock.now()) {
            Change::None => {}
            Change::Began => warn!("the upstream is away: several accounts in a row failed alike"),
            Change::Ended => info!("the upstream answers again"),
        }
        let issued = issued?;
        let token = Arc::new(Token {
            generation: attempt.generation,
            credential_version: attempt.credential.version,
            issued_at: self.clock.now().min(issued.expires_at),
            expires_at: issued.expires_at,
            allowed_ip: issued.allowed_ip.clone(),
            fingerprint: self.keyring.fingerprint(&issued.access_token),
            access_token: issued.access_token,
        });
        if let Some(skew) = issued.skew_ms {
            self.upstream_skew_ms.store(skew, Ordering::Relaxed);
        }
        let record = self.issue_record(slot, &token, issued.skew_ms, under);
        if self.journal.append(record).durable(RECORD_WITHIN).await.is_err() {
            error!(account = %slot.view().account.name, "an issue cannot be recorded: its token is dropped");
            return Ok(None);
        }
        Ok(Some(token))
    }

    async fn call(&self, attempt: &IssueAttempt) -> Result<IssuedToken, IssueError> {
        let AccountCredential { version, secret } = &attempt.credential;
        match self.keyring.open_secret(attempt.account, *version, secret.bytes()) {
            Ok(secret) => self.upstream.issue(&attempt.client_id, &secret).await,
            Err(error) => Err(IssueError {
                class: FailureClass::Intake,
                code: None,
                message: format!("the stored secret does not open: {error}"),
                retry_after: None,
                may_have_issued: false,
            }),
        }
    }

    /// `token` as it is stored.
    pub(super) fn sealed(&self, account: AccountId, token: &Token) -> NewToken {
        NewToken {
            account,
            version: token.credential_version,
            generation: token.generation,
            sealed: self.keyring.seal_token(account, token.generation, &token.access_token),
            expires_at: token.expires_at,
            issued_at: token.issued_at,
            allowed_ip: token.allowed_ip.clone(),
            fingerprint: token.fingerprint.clone(),
        }
    }

    pub(super) async fn tell_the_others(&self) {
        if let Err(error) = within(tokens::notify(&self.pool)).await {
            warn!(%error, "the other replicas are not told; they will find out by polling");
        }
    }

    fn issue_record(
        &self,
        slot: &CachedAccount,
        token: &Token,
        skew_ms: Option<i64>,
        under: Under,
    ) -> Record {
        let view = slot.view();
        let mut record = Record::new(self.clock.now(), Event::TokenIssued)
            .account(&view.account.name)
            .token(token.generation, &token.fingerprint)
            .with("client_id", view.account.client_id.as_str())
            .with("expires_at", token.expires_at.to_rfc3339());
        if let Some(skew) = skew_ms {
            record = record.with("upstream_clock_ahead_ms", skew.to_string());
        }
        if under == Under::NoLease {
            record = record.with("database", "away");
        }
        if let Some(ip) = &token.allowed_ip {
            record = record.with("allowed_ip", ip);
            if !self.egress_is_expected(ip) {
                warn!(account = %view.account.name, allowed_ip = %ip,
                    "the token works only from an address that is not among the expected egress addresses");
                record = record.with("egress", "unexpected");
            }
        }
        record
    }

    fn egress_is_expected(&self, ip: &str) -> bool {
        self.expected_egress.is_empty()
            || ip
                .parse::<IpAddr>()
                .is_ok_and(|ip| self.expected_egress.iter().any(|net| net.contains(&ip)))
    }

    /// Records a failure, and says how it is to be remembered.
    pub(super) fn failed(
        &self,
        slot: &CachedAccount,
        attempt: &IssueAttempt,
        error: IssueError,
    ) -> FailedAttempt {
        let view = slot.view();
        let name = &view.account.name;
        self.metrics.issue(error.class.into());
        warn!(account = %name, class = error.class.as_str(), code = error.code.as_deref(),
            message = %error.message, "no token was issued");
        let mut record = Record::new(self.clock.now(), Event::IssueFailed)
            .account(name)
            .outcome(error.class.outcome(), error.class.as_str())
            .with("message", &error.message);
        if let Some(code) = &error.code {
            record = record.with("upstream_code", code);
        }
        drop(self.journal.append(record));

        let failures = view.progress.failures + 1;
        let retry_after = match error.class {
            FailureClass::Rejected | FailureClass::Intake => None,
            FailureClass::EgressRejected => Some(self.policy.probe_after(name)),
            _ => {
                let backoff = self.outage.pause(self.policy.retry_after(name, failures));
                Some(error.retry_after.map_or(backoff, |asked| asked.max(backoff)))
            }
        };
        FailedAttempt {
            failure: IssueFailure {
                class: error.class,
                code: error.code,
                message: error.message,
                version: attempt.credential.version,
            },
            retry_after,
            suspect: self.ends_older && error.may_have_issued,
        }
    }
}
