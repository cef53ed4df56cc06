//! One attempt to issue for one account, from the claim to the cache.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use ipnet::IpNet;
use sqlx::PgPool;
use tracing::{error, info, warn};

use crate::{
    audit::{
        journal::Journal,
        record::{Event, Record},
    },
    cache::{Cache, Slot, View},
    clock::{Clock, delta},
    issue::{Failure, FailureClass},
    load::Loader,
    schedule::Policy,
    seal::Keyring,
    store::{
        StoreError,
        leases::{self, Claim, Claimant, FailedAttempt, Lease},
        tokens::{self, Commit, NewToken},
        within,
    },
    telemetry::{IssueResult, Metrics},
    token::{IssuedToken, Token},
    upstream::{Client, IssueError},
};

/// When to look again while the database or the journal is away.
const AWAY: Duration = Duration::from_secs(1);
/// How long to try to store a token that was issued: less than what a lease lasts beyond an attempt.
const STORE_WITHIN: Duration = Duration::from_secs(10);
/// The pause between two tries.
const STORE_AGAIN: Duration = Duration::from_millis(500);
/// How long the record of an issue may take to become durable before the issue counts as lost.
const RECORD_WITHIN: Duration = Duration::from_secs(5);

/// All that an attempt needs.
pub struct Issuing {
    /// The accounts.
    pub cache: Arc<Cache>,
    /// Brings the cache to what the database has.
    pub loader: Arc<Loader>,
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
    pub policy: Policy,
    /// Who we are, and the limits of all replicas.
    pub claimant: Claimant,
    /// Whether the upstream ends older tokens when it issues a new one.
    pub ends_older: bool,
    /// The addresses that tokens should name; empty for any.
    pub expected_egress: Vec<IpNet>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// How far the upstream's clock was ahead of ours at the last issue, in milliseconds.
    pub upstream_skew_ms: Arc<AtomicI64>,
    /// Whether the last claim could not be made.
    pub claims_fail: AtomicBool,
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
    /// Tries to replace the account's token. Never fails: what went wrong is in the account's view,
    /// in the audit log and in the metrics.
    pub async fn attempt(&self, slot: &Arc<Slot>) -> Outcome {
        // Nothing is issued that cannot be recorded.
        if !self.journal.is_writable() {
            return Outcome::NotBefore(AWAY);
        }
        let view = slot.view();
        // Since it was planned, another replica's token may have come. The claim would take it for
        // the one that is to be replaced.
        if !self.is_due(&view) {
            return Outcome::Done;
        }
        // Not the token's generation: a load that a commit overtook leaves our newer token beside
        // older progress, which may be all that makes it due.
        let known = view.progress.stored_generation;
        let claimed = within(leases::claim(&self.pool, slot.id(), known, &self.claimant)).await;
        self.tell_whether_claims_fail(claimed.as_ref().err());
        let lease = match claimed {
            Ok(Claim::Granted(lease)) => *lease,
            Ok(Claim::Paced(pause)) => return Outcome::NotBefore(pause),
            Ok(Claim::Wait(pause)) => {
                // Whoever waits for a token hears what the database knows.
                self.reload(slot).await;
                return Outcome::NotBefore(pause);
            }
            Ok(Claim::NotNeeded) => return self.reload(slot).await,
            Err(_) => return Outcome::NotBefore(AWAY),
        };
        self.show_lease(slot, &lease);
        let issued =
            match self.keyring.open_secret(lease.account, lease.version, &lease.sealed_secret) {
                Ok(secret) => self.upstream.issue(&lease.client_id, &secret).await,
                Err(error) => Err(IssueError {
                    class: FailureClass::Intake,
                    code: None,
                    message: format!("the stored secret does not open: {error}"),
                    retry_after: None,
                    may_have_issued: false,
                }),
            };
        match issued {
            Ok(token) => self.keep(slot, &lease, token).await,
            Err(error) => self.fail(slot, &lease, error).await,
        }
    }

    /// Every account that is due fails while the database is away: told once.
    fn tell_whether_claims_fail(&self, error: Option<&StoreError>) {
        match (error, self.claims_fail.swap(error.is_some(), Ordering::Relaxed)) {
            (Some(error), false) => {
                warn!(%error, "no lease can be claimed; nothing is issued until one can");
            }
            (None, true) => info!("leases can be claimed again"),
            _ => {}
        }
    }

    async fn reload(&self, slot: &Slot) -> Outcome {
        match self.loader.these(&[slot.id().0]).await {
            Ok(()) => Outcome::Done,
            Err(error) => {
                warn!(account = %slot.view().account.name, %error, "an account cannot be loaded");
                Outcome::NotBefore(AWAY)
            }
        }
    }

    fn is_due(&self, view: &View) -> bool {
        self.policy
            .next_attempt(&view.account, &view.progress, view.token.as_deref())
            .is_some_and(|due| due <= self.clock.now())
    }

    /// Shows in the view what the claim wrote, so that waiters see the attempt under way.
    fn show_lease(&self, slot: &Arc<Slot>, lease: &Lease) {
        let now = self.clock.now();
        let until = now + delta(self.claimant.lease);
        self.cache.update(slot, |view| {
            let mut view = view.clone();
            view.progress.attempt_started_at = Some(now);
            view.progress.attempt_open = true;
            view.progress.attempt_version = Some(lease.version);
            view.progress.lease_until = Some(until);
            view.progress.suspect |= lease.lost_attempt;
            view
        });
    }

    /// Records, stores and shows a new token, in this order: the log must not miss an issue, and no
    /// caller may see a token that a restart would forget.
    async fn keep(&self, slot: &Arc<Slot>, lease: &Lease, issued: IssuedToken) -> Outcome {
        let fingerprint = self.keyring.fingerprint(&issued.access_token);
        let token = Arc::new(Token {
            generation: lease.generation,
            credential_version: lease.version,
            issued_at: self.clock.now().min(issued.expires_at),
            expires_at: issued.expires_at,
            allowed_ip: issued.allowed_ip.clone(),
            fingerprint,
            access_token: issued.access_token,
        });
        if let Some(skew) = issued.skew_ms {
            self.upstream_skew_ms.store(skew, Ordering::Relaxed);
        }
        let recorded = self.journal.append(self.issue_record(slot, &token, issued.skew_ms));
        if recorded.durable(RECORD_WITHIN).await.is_err() {
            // The record is kept and written later; the token is not used, since nobody could say
            // when. The attempt has no end, so the next claim knows that a token may be out.
            error!(account = %slot.view().account.name, "an issue cannot be recorded: its token is dropped");
            return Outcome::NotBefore(AWAY);
        }
        match self.store(lease, &token).await {
            Some(Commit::Stored) => self.metrics.issue(IssueResult::Issued),
            Some(Commit::KeptLonger) => {
                self.metrics.issue(IssueResult::Issued);
                return self.reload(slot).await;
            }
            Some(Commit::Fenced) => {
                self.metrics.issue(IssueResult::Fenced);
                warn!(account = %slot.view().account.name, generation = %token.generation,
                    "a token came too late: the account has another lease or credential");
                return self.fenced(slot, lease).await;
            }
            // It is the live one, whatever the database knows: serve it. The attempt has no end
            // there, so a restart issues anew.
            None => self.metrics.issue(IssueResult::NotStored),
        }
        self.show_token(slot, &token);
        info!(account = %slot.view().account.name, generation = %token.generation,
            expires_at = %token.expires_at, "token issued");
        if let Err(error) = within(tokens::notify(&self.pool)).await {
            warn!(%error, "the other replicas are not told; they will find out by polling");
        }
        Outcome::Done
    }

    fn issue_record(&self, slot: &Slot, token: &Token, skew_ms: Option<i64>) -> Record {
        let view = slot.view();
        let mut record = Record::new(self.clock.now(), Event::TokenIssued)
            .account(&view.account.name)
            .token(token.generation, &token.fingerprint)
            .with("client_id", view.account.client_id.as_str())
            .with("expires_at", token.expires_at.to_rfc3339());
        if let Some(skew) = skew_ms {
            record = record.with("upstream_clock_ahead_ms", skew.to_string());
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

    /// Stores the token, trying again for [`STORE_WITHIN`]; `None` when the database stayed away.
    /// Storing the same generation twice is the same as once.
    async fn store(&self, lease: &Lease, token: &Token) -> Option<Commit> {
        let new = NewToken {
            sealed: self.keyring.seal_token(lease.account, lease.generation, &token.access_token),
            expires_at: token.expires_at,
            issued_at: token.issued_at,
            allowed_ip: token.allowed_ip.clone(),
            fingerprint: token.fingerprint.clone(),
        };
        let until = self.clock.now() + delta(STORE_WITHIN);
        loop {
            match within(tokens::commit(&self.pool, lease, &new, self.ends_older)).await {
                Ok(commit) => return Some(commit),
                Err(error) if self.clock.now() < until => {
                    warn!(account = %lease.account, %error, "a token cannot be stored; trying again");
                    self.clock.sleep(STORE_AGAIN).await;
                }
                Err(error) => {
                    error!(account = %lease.account, %error, "a token could not be stored");
                    return None;
                }
            }
        }
    }

    /// A token was issued but is not the account's: where new tokens end older ones, the stored one
    /// may be dead.
    async fn fenced(&self, slot: &Slot, lease: &Lease) -> Outcome {
        // A changed credential must not wait for the lease to run out.
        let given_back = within(leases::give_back(&self.pool, lease)).await;
        let marked = if self.ends_older {
            within(leases::suspect(&self.pool, slot.id(), None)).await
        } else {
            Ok(())
        };
        if let Err(error) = given_back.and(marked) {
            warn!(account = %slot.id(), %error, "a token that came too late cannot be noted");
        }
        self.reload(slot).await
    }

    fn show_token(&self, slot: &Arc<Slot>, token: &Arc<Token>) {
        self.cache.update(slot, |view| {
            // Another replica's later token may have been loaded meanwhile.
            let newer = view.token.clone().filter(|held| held.generation > token.generation);
            let mut view = View { token: newer.or(Some(token.clone())), ..view.clone() };
            let progress = &mut view.progress;
            progress.stored_generation = progress.stored_generation.max(Some(token.generation));
            progress.lease_until = None;
            progress.attempt_open = false;
            progress.suspect = false;
            progress.failures = 0;
            progress.next_attempt_at = None;
            if token.credential_version == view.account.credential_version {
                progress.failure = None;
                view.account.has_previous = false;
            }
            view
        });
    }

    /// Records, stores and shows a failure. A token that is there stays.
    async fn fail(&self, slot: &Arc<Slot>, lease: &Lease, error: IssueError) -> Outcome {
        let view = slot.view();
        let name = &view.account.name;
        self.metrics.issue(error.class.into());
        warn!(account = %name, class = error.class.as_str(), code = error.code.as_deref(),
            message = %error.message, "no token was issued");
        let mut record = Record::new(self.clock.now(), Event::IssueFailed)
            .account(name)
            .outcome("failed", error.class.as_str())
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
                let backoff = self.policy.retry_after(name, failures);
                Some(error.retry_after.map_or(backoff, |asked| asked.max(backoff)))
            }
        };
        let attempt = FailedAttempt {
            failure: Failure {
                class: error.class,
                code: error.code,
                message: error.message,
                version: lease.version,
            },
            retry_after,
            suspect: self.ends_older && error.may_have_issued,
        };
        match within(leases::fail(&self.pool, lease, &attempt)).await {
            Ok(true) => {}
            // Another replica has the account by now, and knows better.
            Ok(false) => return self.reload(slot).await,
            Err(error) => {
                warn!(account = %name, %error, "a failure cannot be stored; its lease will run out");
            }
        }
        self.show_failure(slot, lease, &attempt);
        Outcome::Done
    }

    fn show_failure(&self, slot: &Arc<Slot>, lease: &Lease, attempt: &FailedAttempt) {
        let now = self.clock.now();
        self.cache.update(slot, |view| {
            let mut view = view.clone();
            let progress = &mut view.progress;
            progress.lease_until = None;
            progress.attempt_open = false;
            progress.failures += 1;
            progress.suspect |= attempt.suspect;
            progress.next_attempt_at = attempt.retry_after.map(|pause| now + delta(pause));
            if !lease.current && attempt.failure.class.parks() {
                view.account.has_previous = false;
            }
            if lease.current {
                progress.failure = Some(attempt.failure.clone());
            }
            view
        });
    }
}
