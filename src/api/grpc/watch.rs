//! The streams of `WatchTokens`: the current token of each watched account at once, then each new token and
//! each end of an account.
//!
//! A stream costs what its caller may use. What its patterns and its caller's grants have in common is found by
//! an index, each pushed token counts towards the caller's rate and is delayed until that permits it, and a
//! stream without such accounts does not follow changes of accounts at all.

use std::{collections::HashMap, future::pending, pin::pin, sync::Arc, time::Duration};

use tokio::{
    sync::broadcast::{self, error::RecvError},
    task::yield_now,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{
    audit::CallContext,
    convert::token_response,
    handover::{self, handover},
};
use crate::{
    api::proto::{
        AccountEnded, WatchTokensResponse, account_ended::Reason,
        watch_tokens_response::Event as ProtoEvent,
    },
    audit::{
        journal::Journal,
        record::{Event, Record},
    },
    domain::{
        account::{AccountId, AccountName},
        caller::{AccountPattern, Caller, Right},
        clock::Timestamp,
        pattern_set::PatternSet,
        token::{Generation, Token},
    },
    services::{
        account_cache::{CachedAccount, scan::NameScan},
        caller_rates::Budget,
        token_provider::{CallRefusal, TokenProvider},
    },
};

/// How often the stream checks whether its credential or a grant has ended, also while it waits. Changes of them
/// in the database cause events, but the passing of an end date does not.
const EXPIRY_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// How many accounts are visited before other tasks of the thread may run.
const ACCOUNTS_BEFORE_YIELD: usize = 256;
/// How long the audit record of a pushed token may take to become durable.
const RECORD_TIMEOUT: Duration = Duration::from_secs(5);

/// The receiving end of a stream.
pub(super) type Events = handover::Receiver<Result<WatchTokensResponse, Status>>;
type EventSender = handover::Sender<Result<WatchTokensResponse, Status>>;
type EventSlot = handover::Slot<Result<WatchTokensResponse, Status>>;
type AccountChanges = broadcast::Receiver<Arc<CachedAccount>>;

/// Starts a stream for the caller of `context` and returns its receiving end. A task sends the events; it
/// ends when the receiver is dropped, when the connection drains (the stream then ends without an error, and
/// the client opens it again elsewhere), or with a refusal.
///
/// # Errors
/// When the caller has too many streams or patterns, or may not watch a plain name among `patterns`.
pub(super) async fn start(
    provider: TokenProvider,
    journal: Journal,
    api_base_url: Arc<str>,
    context: &CallContext,
    patterns: Vec<AccountPattern>,
) -> Result<Events, CallRefusal> {
    let permits = provider.acquire_stream(&context.caller, patterns.len())?;
    provider.authorize_watch(&context.caller, &patterns).await?;
    let mut record_template = context.draft.snapshot();
    record_template.event = Event::TokenPushed;
    let (events, receiver) = handover();
    let stream = WatchStream {
        journal,
        api_base_url,
        budget: provider.rates.budget(&context.caller),
        caller: context.caller.clone(),
        synced_caller: context.caller.clone(),
        context: context.clone(),
        patterns: Arc::new(patterns.iter().collect()),
        granted: Arc::default(),
        watched: HashMap::new(),
        grants_checked_at: provider.database_clock.now(),
        record_template,
        events: events.clone(),
        provider,
    };
    let draining = context.draining.clone();
    tokio::spawn(async move {
        let _permits = permits;
        tokio::select! {
            () = draining.cancelled() => {}
            () = events.closed() => {}
            // The stream has sent the client the status with which it ends, or the client is gone.
            _ = stream.run(&draining) => {}
        }
    });
    Ok(receiver)
}

struct WatchStream {
    provider: TokenProvider,
    journal: Journal,
    api_base_url: Arc<str>,
    /// The caller with its grants, as they were last seen.
    caller: Arc<Caller>,
    /// The caller with its grants at the last [`WatchStream::resync`].
    synced_caller: Arc<Caller>,
    /// The call that opened the stream. When its credential ends, so does the stream.
    context: CallContext,
    patterns: Arc<PatternSet>,
    /// What the grants of `synced_caller` covered then. Later they cover no more than that, until they change.
    granted: Arc<PatternSet>,
    /// What the caller has used of its rate.
    budget: Arc<Budget>,
    /// The accounts on the stream, each with the generation of the token that was last sent.
    watched: HashMap<AccountId, (AccountName, Option<Generation>)>,
    /// When it was last checked whether a grant has ended.
    grants_checked_at: Timestamp,
    /// The audit record of a pushed token, without the account and the token.
    record_template: Record,
    events: EventSender,
}

/// The stream has ended: the client is gone, or was sent a status.
struct Ended;

impl WatchStream {
    async fn run(mut self, draining: &CancellationToken) -> Result<(), Ended> {
        let mut caller_changes = self.provider.callers.changes();
        let mut expiry_check = tokio::time::interval(EXPIRY_CHECK_INTERVAL);
        let mut account_changes = self.resync().await?;
        while !draining.is_cancelled() {
            tokio::select! {
                change = next_change(&mut account_changes) => match change {
                    Ok(account) => self.visit(&account).await?,
                    Err(RecvError::Lagged(_)) => account_changes = self.resync().await?,
                    Err(RecvError::Closed) => return Ok(()),
                },
                _ = caller_changes.changed() => {
                    self.reauthenticate().await?;
                    // Nearly all changes concern other callers.
                    if !Arc::ptr_eq(&self.synced_caller, &self.caller) {
                        account_changes = self.resync().await?;
                    }
                }
                _ = expiry_check.tick() => self.end_accounts_without_grant().await?,
            }
        }
        Ok(())
    }

    /// Returns the caller as it is now, if its credential is still accepted.
    fn current_caller(&self) -> Result<Arc<Caller>, CallRefusal> {
        self.context.check_certificate()?;
        self.provider.reauthenticate(&self.context.credential)
    }

    /// Updates the caller and its grants. Ends the stream if its credential is no longer accepted.
    async fn reauthenticate(&mut self) -> Result<(), Ended> {
        match self.current_caller() {
            Ok(caller) => {
                self.caller = caller;
                Ok(())
            }
            Err(refusal) => Err(self.end_with(refusal).await),
        }
    }

    /// Brings the stream up to date: visits the accounts that are on it, of which some may be gone, and then
    /// all that its patterns and its caller's grants select. Returns a receiver of later changes; `None` if
    /// the grants cover no account that a pattern may match, so that no change concerns the stream until
    /// they change.
    async fn resync(&mut self) -> Result<Option<AccountChanges>, Ended> {
        self.reauthenticate().await?;
        self.synced_caller = self.caller.clone();
        let now = self.provider.database_clock.now();
        self.granted = Arc::new(self.synced_caller.covered(Right::Get, now));
        // Subscribe before the accounts are read, so that no change between the two is missed.
        let changes = self.provider.cache.changes();
        let watched: Vec<_> = self.watched.keys().copied().collect();
        for (nth, id) in watched.into_iter().enumerate() {
            if nth % ACCOUNTS_BEFORE_YIELD == ACCOUNTS_BEFORE_YIELD - 1 {
                yield_now().await;
            }
            match self.provider.cache.by_id(id) {
                Some(account) => self.visit(&account).await?,
                None => self.end_account(id, Reason::Removed).await?,
            }
        }
        let may_select = self.patterns.may_intersect(&self.granted);
        let mut scan = NameScan::new([self.patterns.clone(), self.granted.clone()], None);
        while !scan.is_done() {
            for (_, account) in self.scan_chunk(&mut scan).await {
                self.visit(&account).await?;
            }
        }
        Ok(may_select.then_some(changes))
    }

    /// Looks at the next accounts of the scan, which count towards the caller's rate. Other tasks of the
    /// thread may run after it.
    async fn scan_chunk(&self, scan: &mut NameScan) -> Vec<(AccountName, Arc<CachedAccount>)> {
        let _permit = self.budget.scan_permit().await;
        let before = scan.examined();
        let found = scan.next_chunk(&self.provider.cache);
        let rates = &self.provider.rates;
        rates.charge(&self.caller, scan.examined() - before, Instant::now());
        yield_now().await;
        found
    }

    /// Removes from the stream the accounts that no grant covers any more.
    async fn end_accounts_without_grant(&mut self) -> Result<(), Ended> {
        self.reauthenticate().await?;
        let now = self.provider.database_clock.now();
        let since = std::mem::replace(&mut self.grants_checked_at, now);
        // A grant without an end date ends only by a change in the database, after which all accounts are
        // visited.
        if !self.caller.has_grant_ended(since, now) {
            return Ok(());
        }
        let expired: Vec<_> = self
            .watched
            .iter()
            .filter(|(_, (name, _))| !self.caller.permits(Right::Get, name, now))
            .map(|(id, _)| *id)
            .collect();
        for id in expired {
            self.end_account(id, Reason::NotGranted).await?;
        }
        Ok(())
    }

    /// Sends what is new about an account, if the stream watches it. A token waits until the caller's rate
    /// permits it.
    async fn visit(&mut self, account: &CachedAccount) -> Result<(), Ended> {
        // Most changes concern accounts of other streams, or of other callers.
        let snapshot = account.snapshot();
        let name = snapshot.account.name.as_str();
        let matched = self.patterns.matches(name) && self.granted.matches(name);
        if !matched && !self.watched.contains_key(&account.id()) {
            return Ok(());
        }
        if self.update(account).await?.is_some() {
            self.wait_for_rate().await?;
            // The account, its token and its grant may have changed during the wait.
            if let Some((name, token)) = self.update(account).await? {
                self.push(account, &name, &token).await?;
            }
        }
        Ok(())
    }

    /// Puts the account on the stream or takes it off. Returns its token, if it is to be sent.
    async fn update(
        &mut self,
        account: &CachedAccount,
    ) -> Result<Option<(AccountName, Arc<Token>)>, Ended> {
        self.reauthenticate().await?;
        if let Some(reason) = self.end_reason(account) {
            self.end_account(account.id(), reason).await?;
            return Ok(None);
        }
        let snapshot = account.snapshot();
        let name = &snapshot.account.name;
        let now = self.provider.clock.now();
        let sent = self.watched.entry(account.id()).or_insert_with(|| (name.clone(), None)).1;
        account.note_request(now);
        let new = snapshot.live_token(now).filter(|token| sent != Some(token.generation));
        Ok(new.map(|token| (name.clone(), token.clone())))
    }

    /// Returns why the account must not be on the stream; `None` if it may.
    fn end_reason(&self, account: &CachedAccount) -> Option<Reason> {
        let snapshot = account.snapshot();
        let name = &snapshot.account.name;
        if snapshot.removed {
            Some(Reason::Removed)
        } else if !self.patterns.matches(name.as_str())
            || !self.caller.permits(Right::Get, name, self.provider.database_clock.now())
        {
            Some(Reason::NotGranted)
        } else if !snapshot.account.enabled {
            Some(Reason::Disabled)
        } else {
            None
        }
    }

    /// Waits until the caller's rate permits a pushed token, and until the caller's other streams have had their
    /// turn. Ends the stream if its credential is no longer accepted meanwhile.
    async fn wait_for_rate(&mut self) -> Result<(), Ended> {
        let budget = Arc::clone(&self.budget);
        // A new future would queue at the end again.
        let mut turn = pin!(budget.push_turn());
        let _turn = loop {
            match timeout(EXPIRY_CHECK_INTERVAL, &mut turn).await {
                Ok(turn) => break turn,
                Err(_) => self.reauthenticate().await?,
            }
        };
        while let Err(wait) = self.provider.rates.take_push(&self.caller, Instant::now()) {
            sleep(wait.min(EXPIRY_CHECK_INTERVAL)).await;
            self.reauthenticate().await?;
        }
        Ok(())
    }

    /// Records a token, waits until the record is durable and the client has taken the previous event, and then
    /// sends the token if it is still live and the caller may still have it.
    async fn push(
        &mut self,
        account: &CachedAccount,
        name: &AccountName,
        token: &Arc<Token>,
    ) -> Result<(), Ended> {
        let record = Record { at: self.provider.clock.wall(), ..self.record_template.clone() }
            .account(name)
            .token(token.generation, &token.fingerprint);
        if self.journal.append(record).durable(RECORD_TIMEOUT).await.is_err() {
            return Err(self.end_with(CallRefusal::AuditUnavailable).await);
        }
        self.watched.insert(account.id(), (name.clone(), Some(token.generation)));
        let slot = self.slot().await?;
        if let Some(reason) = self.end_reason(account) {
            // The end of the account takes the slot.
            drop(slot);
            return self.end_account(account.id(), reason).await;
        }
        let of_login = account.snapshot().account.has_login_of(token.credential_version);
        if of_login && token.is_live(self.provider.clock.now()) {
            let response = token_response(&self.provider, &self.api_base_url, name, token);
            slot.send(Ok(watch_response(name, ProtoEvent::Token(response))));
        }
        Ok(())
    }

    /// Removes an account from the stream and sends the client the reason, if it was on the stream.
    async fn end_account(&mut self, id: AccountId, reason: Reason) -> Result<(), Ended> {
        let Some((name, _)) = self.watched.remove(&id) else { return Ok(()) };
        let slot = self.slot().await?;
        let ended = AccountEnded { reason: reason.into() };
        slot.send(Ok(watch_response(&name, ProtoEvent::Ended(ended))));
        Ok(())
    }

    /// Waits until the client has taken the previous event: until HTTP/2 may send it and asks for more. Returns the
    /// place for the next one. Ends the stream if its credential is no longer accepted, however long the client
    /// reads nothing.
    async fn slot(&mut self) -> Result<EventSlot, Ended> {
        loop {
            let slot = match timeout(EXPIRY_CHECK_INTERVAL, self.events.slot()).await {
                Ok(Some(slot)) => Some(slot),
                Ok(None) => return Err(Ended),
                Err(_) => None,
            };
            match self.current_caller() {
                Ok(caller) => self.caller = caller,
                Err(refusal) => {
                    // The refusal takes the slot.
                    drop(slot);
                    return Err(self.end_with(refusal).await);
                }
            }
            if let Some(slot) = slot {
                return Ok(slot);
            }
        }
    }

    /// Sends the status with which the stream ends. It follows the last event, even if the client reads that later.
    async fn end_with(&self, refusal: CallRefusal) -> Ended {
        // This fails if the client is gone. It never waits long, since HTTP/2 asked for each event before.
        let _ = timeout(EXPIRY_CHECK_INTERVAL, self.events.send_last(Err(refusal.into()))).await;
        Ended
    }
}

fn watch_response(name: &AccountName, event: ProtoEvent) -> WatchTokensResponse {
    WatchTokensResponse { account: name.to_string(), event: Some(event) }
}

/// Receives the next change; waits for ever without a receiver. Cancel safe.
async fn next_change(
    changes: &mut Option<AccountChanges>,
) -> Result<Arc<CachedAccount>, RecvError> {
    match changes {
        Some(changes) => changes.recv().await,
        None => pending().await,
    }
}
