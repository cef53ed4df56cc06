//! A stream of tokens: each current one at once, then each replacement and each end.

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

use super::{TokenServer, audit::CallContext, token_response};
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
        token_provider::{Refusal, TokenProvider},
    },
    store::callers::CredentialKey,
};

/// How many events may wait for a slow caller before the stream waits for it.
const BUFFERED: usize = 16;
/// How often the credential and the grants are looked at for their end, which no event tells of.
const ENDS_AGAIN: Duration = Duration::from_secs(1);
/// How many accounts are looked at before others on the same thread have their turn.
const LOOKS: usize = 256;
/// How long the record of a token may take to become durable.
const RECORD_WITHIN: Duration = Duration::from_secs(5);

type Sender = mpsc::Sender<Result<WatchTokensResponse, Status>>;

/// Starts a stream for the call's caller.
///
/// # Errors
/// When a plain name among `patterns` may not be watched.
pub(super) async fn start(
    server: &TokenServer,
    context: &CallContext,
    patterns: Vec<AccountPattern>,
) -> Result<ReceiverStream<Result<WatchTokensResponse, Status>>, Refusal> {
    let broker = server.broker.clone();
    let place = broker.stream(&context.caller)?;
    // Armed before the first look, so that nothing falls between the two.
    let changes = broker.cache.changes();
    let access = broker.directory.changes();
    let slots = broker.watched(&context.caller, &patterns).await?;
    let mut template = context.draft.so_far();
    template.event = Event::TokenPushed;
    let (sender, receiver) = mpsc::channel(BUFFERED);
    let stream = Stream {
        broker,
        journal: server.journal.clone(),
        api_base_url: server.api_base_url.clone(),
        caller: context.caller.clone(),
        proof: context.proof.clone(),
        patterns,
        sent: HashMap::new(),
        template,
        sender: sender.clone(),
    };
    // A clean end: the caller comes again, to another replica or to the next start.
    let stop = context.leaving.clone();
    tokio::spawn(async move {
        let _place = place;
        tokio::select! {
            () = stop.cancelled() => {}
            () = sender.closed() => {}
            () = stream.run(slots, changes, access, &stop) => {}
        }
    });
    Ok(ReceiverStream::new(receiver))
}

struct Stream {
    broker: TokenProvider,
    journal: Journal,
    api_base_url: Arc<str>,
    caller: Arc<Caller>,
    /// What the caller showed: the stream ends with it.
    proof: CredentialKey,
    patterns: Vec<AccountPattern>,
    /// The generation that was last sent of each account on the stream.
    sent: HashMap<AccountId, (AccountName, Option<Generation>)>,
    /// The record of a pushed token, but for the token.
    template: Record,
    sender: Sender,
}

/// The stream is over: the caller is gone, or was told why.
struct Over;

impl Stream {
    async fn run(
        mut self,
        slots: Vec<Arc<CachedAccount>>,
        changes: broadcast::Receiver<Arc<CachedAccount>>,
        access: watch::Receiver<()>,
        stop: &CancellationToken,
    ) {
        // `Over` only ends the loop.
        let _ = self.follow(slots, changes, access, stop).await;
    }

    async fn follow(
        &mut self,
        slots: Vec<Arc<CachedAccount>>,
        mut changes: broadcast::Receiver<Arc<CachedAccount>>,
        mut access: watch::Receiver<()>,
        stop: &CancellationToken,
    ) -> Result<(), Over> {
        for slot in slots {
            self.consider(&slot).await?;
        }
        let mut again = tokio::time::interval(ENDS_AGAIN);
        while !stop.is_cancelled() {
            tokio::select! {
                event = changes.recv() => match event {
                    Ok(slot) => self.consider(&slot).await?,
                    Err(RecvError::Lagged(_)) => self.look_at_all().await?,
                    Err(RecvError::Closed) => return Ok(()),
                },
                _ = access.changed() => {
                    let before = self.caller.clone();
                    self.admitted().await?;
                    // Nearly all changes are about others.
                    if *before != *self.caller {
                        self.look_at_all().await?;
                    }
                }
                _ = again.tick() => self.look_for_ends().await?,
            }
        }
        Ok(())
    }

    /// Takes the caller's grants as they are now; a caller whose credential ended is told so.
    async fn admitted(&mut self) -> Result<(), Over> {
        match self.broker.still_admitted(&self.proof) {
            Ok(caller) => {
                self.caller = caller;
                Ok(())
            }
            Err(refusal) => self.end(refusal).await,
        }
    }

    async fn look_at_all(&mut self) -> Result<(), Over> {
        for (nth, slot) in self.broker.cache.all().into_iter().enumerate() {
            if nth % LOOKS == LOOKS - 1 {
                yield_now().await;
            }
            self.consider(&slot).await?;
        }
        self.look_for_ends().await
    }

    async fn look_for_ends(&mut self) -> Result<(), Over> {
        self.admitted().await?;
        // Only a grant with an end can end without a change that is told of.
        if self.caller.grants.iter().all(|grant| grant.ends_at.is_none()) {
            return Ok(());
        }
        let now = self.broker.clock.now();
        let ended: Vec<_> = self
            .sent
            .iter()
            .filter(|(_, (name, _))| !self.caller.permits(Right::Get, name, now))
            .map(|(id, _)| *id)
            .collect();
        for id in ended {
            self.account_ended(id, Reason::NotGranted).await?;
        }
        Ok(())
    }

    /// Sends what is new about an account, if it is one of the stream's.
    async fn consider(&mut self, slot: &CachedAccount) -> Result<(), Over> {
        self.admitted().await?;
        let view = slot.snapshot();
        let name = &view.account.name;
        let now = self.broker.clock.now();
        if view.removed {
            return self.account_ended(slot.id(), Reason::Removed).await;
        }
        let wanted = self.patterns.iter().any(|pattern| pattern.matches(name.as_str()))
            && self.caller.permits(Right::Get, name, now);
        if !wanted {
            return self.account_ended(slot.id(), Reason::NotGranted).await;
        }
        if !view.account.enabled {
            return self.account_ended(slot.id(), Reason::Disabled).await;
        }
        let sent = self.sent.entry(slot.id()).or_insert_with(|| (name.clone(), None)).1;
        slot.note_request(now);
        match view.live_token(now) {
            Some(token) if sent != Some(token.generation) => {
                self.push(slot.id(), name, token).await
            }
            _ => Ok(()),
        }
    }

    /// Records a token, waits until the record is durable, and sends it if it still lives.
    async fn push(
        &mut self,
        id: AccountId,
        name: &AccountName,
        token: &Arc<Token>,
    ) -> Result<(), Over> {
        let record = Record { at: self.broker.clock.now(), ..self.template.clone() }
            .account(name)
            .token(token.generation, &token.fingerprint);
        if self.journal.append(record).durable(RECORD_WITHIN).await.is_err() {
            return self.end(Refusal::AuditUnavailable).await;
        }
        self.sent.insert(id, (name.clone(), Some(token.generation)));
        if !token.is_live(self.broker.clock.now()) {
            return Ok(());
        }
        let response = token_response(&self.broker, &self.api_base_url, name, token);
        self.send(name, ProtoEvent::Token(response)).await
    }

    /// Tells that an account left the stream, if it was on it.
    async fn account_ended(&mut self, id: AccountId, reason: Reason) -> Result<(), Over> {
        let Some((name, _)) = self.sent.remove(&id) else { return Ok(()) };
        self.send(&name, ProtoEvent::Ended(AccountEnded { reason: reason.into() })).await
    }

    async fn send(&self, name: &AccountName, event: ProtoEvent) -> Result<(), Over> {
        let response = WatchTokensResponse { account: name.to_string(), event: Some(event) };
        self.sender.send(Ok(response)).await.map_err(|_| Over)
    }

    async fn end(&self, refusal: Refusal) -> Result<(), Over> {
        // A caller that is gone need not be told.
        let _ = self.sender.send(Err(refusal.into())).await;
        Err(Over)
    }
}
