//! The streams of `WatchTokens`: the current token of each watched account at once, then each new token and
//! each end of an account.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::{
    sync::{
        broadcast::{self, error::RecvError},
        mpsc, watch,
    },
    task::yield_now,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{audit::CallContext, convert::token_response};
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
        token::{Generation, Token},
    },
    services::{
        account_cache::CachedAccount,
        token_provider::{CallRefusal, TokenProvider},
    },
};

/// How many events are buffered for a slow client. Once the buffer is full, the stream waits for the client.
const BUFFERED_EVENTS: usize = 16;
/// How often the stream checks whether its credential or a grant has ended. Changes of them in the database
/// cause events, but the passing of an end date does not.
const EXPIRY_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// How many accounts are visited before other tasks of the thread may run.
const ACCOUNTS_BEFORE_YIELD: usize = 256;
/// How long the audit record of a pushed token may take to become durable.
const RECORD_TIMEOUT: Duration = Duration::from_secs(5);

type EventSender = mpsc::Sender<Result<WatchTokensResponse, Status>>;

/// Starts a stream for the caller of `context` and returns its receiving end. A task sends the events; it
/// ends when the receiver is dropped, when the connection drains (the stream then ends without an error, and
/// the client opens it again elsewhere), or with a refusal.
///
/// # Errors
/// When the caller has too many streams, or may not watch a plain name among `patterns`.
pub(super) async fn start(
    provider: TokenProvider,
    journal: Journal,
    api_base_url: Arc<str>,
    context: &CallContext,
    patterns: Vec<AccountPattern>,
) -> Result<ReceiverStream<Result<WatchTokensResponse, Status>>, CallRefusal> {
    let permit = provider.acquire_stream(&context.caller)?;
    // Subscribe before the accounts are read, so that no change between the two is missed.
    let account_changes = provider.cache.changes();
    let caller_changes = provider.callers.changes();
    let accounts = provider.watched_accounts(&context.caller, &patterns).await?;
    let mut record_template = context.draft.snapshot();
    record_template.event = Event::TokenPushed;
    let (events, receiver) = mpsc::channel(BUFFERED_EVENTS);
    let stream = WatchStream {
        provider,
        journal,
        api_base_url,
        caller: context.caller.clone(),
        context: context.clone(),
        patterns,
        watched: HashMap::new(),
        record_template,
        events: events.clone(),
    };
    let draining = context.draining.clone();
    tokio::spawn(async move {
        let _permit = permit;
        tokio::select! {
            () = draining.cancelled() => {}
            () = events.closed() => {}
            // The stream has sent the client the status with which it ends, or the client is gone.
            _ = stream.run(accounts, account_changes, caller_changes, &draining) => {}
        }
    });
    Ok(ReceiverStream::new(receiver))
}

struct WatchStream {
    provider: TokenProvider,
    journal: Journal,
    api_base_url: Arc<str>,
    /// The caller with its grants, as they were last seen.
    caller: Arc<Caller>,
    /// The call that opened the stream. When its credential ends, so does the stream.
    context: CallContext,
    patterns: Vec<AccountPattern>,
    /// The accounts on the stream, each with the generation of the token that was last sent.
    watched: HashMap<AccountId, (AccountName, Option<Generation>)>,
    /// The audit record of a pushed token, without the account and the token.
    record_template: Record,
    events: EventSender,
}

/// The stream has ended: the client is gone, or was sent a status.
struct Ended;

impl WatchStream {
    async fn run(
        mut self,
        accounts: Vec<Arc<CachedAccount>>,
        mut account_changes: broadcast::Receiver<Arc<CachedAccount>>,
        mut caller_changes: watch::Receiver<()>,
        draining: &CancellationToken,
    ) -> Result<(), Ended> {
        for account in accounts {
            self.visit(&account).await?;
        }
        let mut expiry_check = tokio::time::interval(EXPIRY_CHECK_INTERVAL);
        while !draining.is_cancelled() {
            tokio::select! {
                change = account_changes.recv() => match change {
                    Ok(account) => self.visit(&account).await?,
                    Err(RecvError::Lagged(_)) => self.visit_all().await?,
                    Err(RecvError::Closed) => return Ok(()),
                },
                _ = caller_changes.changed() => {
                    let before = self.caller.clone();
                    self.reauthenticate().await?;
                    // Nearly all changes concern other callers.
                    if *before != *self.caller {
                        self.visit_all().await?;
                    }
                }
                _ = expiry_check.tick() => self.end_accounts_without_grant().await?,
            }
        }
        Ok(())
    }

    /// Updates the caller and its grants. Ends the stream if its credential is no longer accepted.
    async fn reauthenticate(&mut self) -> Result<(), Ended> {
        let caller = self
            .context
            .check_certificate()
            .and_then(|()| self.provider.reauthenticate(&self.context.credential));
        match caller {
            Ok(caller) => {
                self.caller = caller;
                Ok(())
            }
            Err(refusal) => self.end_with(refusal).await,
        }
    }

    /// Visits every account in the cache.
    async fn visit_all(&mut self) -> Result<(), Ended> {
        for (nth, account) in self.provider.cache.all().into_iter().enumerate() {
            if nth % ACCOUNTS_BEFORE_YIELD == ACCOUNTS_BEFORE_YIELD - 1 {
                yield_now().await;
            }
            self.visit(&account).await?;
        }
        self.end_accounts_without_grant().await
    }

    /// Removes from the stream the accounts that no grant covers any more.
    async fn end_accounts_without_grant(&mut self) -> Result<(), Ended> {
        self.reauthenticate().await?;
        // A grant without an end date ends only by a change in the database, after which all accounts are
        // visited.
        if self.caller.grants.iter().all(|grant| grant.ends_at.is_none()) {
            return Ok(());
        }
        let now = self.provider.database_clock.now();
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

    /// Sends what is new about an account, if the stream watches it.
    async fn visit(&mut self, account: &CachedAccount) -> Result<(), Ended> {
        self.reauthenticate().await?;
        let snapshot = account.snapshot();
        let name = &snapshot.account.name;
        let now = self.provider.clock.now();
        if snapshot.removed {
            return self.end_account(account.id(), Reason::Removed).await;
        }
        let watched = self.patterns.iter().any(|pattern| pattern.matches(name.as_str()))
            && self.caller.permits(Right::Get, name, self.provider.database_clock.now());
        if !watched {
            return self.end_account(account.id(), Reason::NotGranted).await;
        }
        if !snapshot.account.enabled {
            return self.end_account(account.id(), Reason::Disabled).await;
        }
        let sent = self.watched.entry(account.id()).or_insert_with(|| (name.clone(), None)).1;
        account.note_request(now);
        match snapshot.live_token(now) {
            Some(token) if sent != Some(token.generation) => {
                self.push(account.id(), name, token).await
            }
            _ => Ok(()),
        }
    }

    /// Records a token, waits until the record is durable, and then sends the token if it is still live.
    async fn push(
        &mut self,
        id: AccountId,
        name: &AccountName,
        token: &Arc<Token>,
    ) -> Result<(), Ended> {
        let record = Record { at: self.provider.clock.wall(), ..self.record_template.clone() }
            .account(name)
            .token(token.generation, &token.fingerprint);
        if self.journal.append(record).durable(RECORD_TIMEOUT).await.is_err() {
            return self.end_with(CallRefusal::AuditUnavailable).await;
        }
        self.watched.insert(id, (name.clone(), Some(token.generation)));
        if !token.is_live(self.provider.clock.now()) {
            return Ok(());
        }
        let response = token_response(&self.provider, &self.api_base_url, name, token);
        self.send(name, ProtoEvent::Token(response)).await
    }

    /// Removes an account from the stream and sends the client the reason, if it was on the stream.
    async fn end_account(&mut self, id: AccountId, reason: Reason) -> Result<(), Ended> {
        let Some((name, _)) = self.watched.remove(&id) else { return Ok(()) };
        self.send(&name, ProtoEvent::Ended(AccountEnded { reason: reason.into() })).await
    }

    async fn send(&self, name: &AccountName, event: ProtoEvent) -> Result<(), Ended> {
        let response = WatchTokensResponse { account: name.to_string(), event: Some(event) };
        self.events.send(Ok(response)).await.map_err(|_| Ended)
    }

    async fn end_with(&self, refusal: CallRefusal) -> Result<(), Ended> {
        // This fails only if the client is gone.
        let _ = self.events.send(Err(refusal.into())).await;
        Err(Ended)
    }
}
