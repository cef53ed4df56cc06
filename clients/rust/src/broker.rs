//! The calls to the broker.

use std::sync::Arc;

use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};
use tonic::{
    Code, Request, Response, Status, Streaming,
    metadata::{Ascii, MetadataValue},
    transport::Channel,
};
use tracing::{debug, warn};

use crate::{
    connections::Connections,
    credentials::{Bearer, FILE_AGE, TlsContents, TlsFiles},
    error::{Error, is_local},
    proto::{
        GetTokenRequest, ReportRejectedTokenRequest, ReportRejectedTokenResponse,
        WatchTokensRequest, WatchTokensResponse, token_service_client::TokenServiceClient,
    },
    settings::Settings,
    token::Token,
};

type Stub = TokenServiceClient<Channel>;

/// A stream of the broker, and the bearer with which it was opened.
pub(crate) struct OpenedStream {
    pub(crate) messages: Streaming<WatchTokensResponse>,
    authorization: Option<MetadataValue<Ascii>>,
}

/// The deployment of the broker, as the caller of the settings.
#[derive(Debug)]
pub(crate) struct Broker {
    settings: Settings,
    bearer: Option<Bearer>,
    /// The connections for new calls. They are replaced when the TLS files change.
    connections: watch::Sender<Arc<Connections>>,
}

impl Broker {
    /// Checks the settings, and reads the files. Blocks on disk, but not on the network.
    pub(crate) fn new(settings: Settings) -> Result<Self, Error> {
        let bearer = settings.bearer()?;
        let connections = read_and_connect(&settings).map_err(Error::settings)?;
        Ok(Self { settings, bearer, connections: watch::Sender::new(Arc::new(connections)) })
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Asks for a token. Does not repeat a call that fails, except with a bearer that has changed.
    pub(crate) async fn get_token(
        &self,
        request: GetTokenRequest,
        deadline: Instant,
    ) -> Result<Token, Error> {
        let sent = Instant::now();
        let call = self.call(&request, Some(deadline), |mut stub: Stub, request| async move {
            stub.get_token(request).await
        });
        let answer = in_time(&request.account, deadline, call).await?;
        Token::from_answer(&request.account, answer, sent)
    }

    /// Reports a token that the API refused.
    pub(crate) async fn report(
        &self,
        request: ReportRejectedTokenRequest,
        deadline: Instant,
    ) -> Result<ReportRejectedTokenResponse, Error> {
        let call = self.call(&request, Some(deadline), |mut stub: Stub, request| async move {
            stub.report_rejected_token(request).await
        });
        in_time(&request.account, deadline, call).await
    }

    /// Opens a stream of names or patterns. Returns when the broker has accepted it.
    pub(crate) async fn watch(&self, accounts: Vec<String>) -> Result<OpenedStream, Status> {
        let request = WatchTokensRequest { accounts };
        let (messages, authorization) = self
            .call_as(&request, None, |mut stub: Stub, request| async move {
                stub.watch_tokens(request).await
            })
            .await?;
        Ok(OpenedStream { messages, authorization })
    }

    /// Reads the bearer's file again. Returns whether `stream` was opened with another bearer.
    pub(crate) async fn has_other_bearer(&self, stream: &OpenedStream) -> bool {
        match (&self.bearer, &stream.authorization) {
            (Some(bearer), Some(used)) => bearer.has_changed_from(used).await,
            _ => false,
        }
    }

    /// Returns a receiver that is told when new calls begin to use other connections.
    pub(crate) fn connection_changes(&self) -> watch::Receiver<Arc<Connections>> {
        self.connections.subscribe()
    }

    /// Makes new connections whenever the content of the TLS files has changed and can be used.
    pub(crate) async fn follow_tls_files(self: Arc<Self>) {
        let files = self.settings.tls_files.clone();
        if files.is_empty() {
            return;
        }
        // The last content that cannot be used, or why it cannot be read, so that this is logged once.
        let mut faulty = None;
        loop {
            tokio::time::sleep(FILE_AGE).await;
            let read = read(&files).await;
            let is_used = read.as_ref().is_ok_and(|it| self.connections.borrow().tls() == Some(it));
            if is_used {
                faulty = None;
                continue;
            }
            if faulty.as_ref() == Some(&read) {
                continue;
            }
            match read.clone().and_then(|contents| connect(&self.settings, Some(contents))) {
                Ok(connections) => {
                    debug!("the TLS files have changed; new calls use new connections");
                    self.connections.send_replace(Arc::new(connections));
                    faulty = None;
                }
                Err(why) => {
                    warn!(
                        why,
                        "the TLS files have changed and cannot be used; the connections stay"
                    );
                    faulty = Some(read);
                }
            }
        }
    }

    /// Drops the connections.
    pub(crate) fn close(&self) {
        self.connections.borrow().close();
    }

    async fn call<Q: Clone, A, F>(
        &self,
        message: &Q,
        deadline: Option<Instant>,
        method: impl Fn(Stub, Request<Q>) -> F,
    ) -> Result<A, Status>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        self.call_as(message, deadline, method).await.map(|(answer, _)| answer)
    }

    /// Calls `method` as the caller. If the bearer is refused and its file has changed, calls once more. Returns
    /// the answer and the bearer that was used.
    async fn call_as<Q: Clone, A, F>(
        &self,
        message: &Q,
        deadline: Option<Instant>,
        method: impl Fn(Stub, Request<Q>) -> F,
    ) -> Result<(A, Option<MetadataValue<Ascii>>), Status>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let mut may_repeat = true;
        loop {
            let authorization = match &self.bearer {
                Some(bearer) => Some(bearer.current().await),
                None => None,
            };
            let connections = Arc::clone(&self.connections.borrow());
            let answered = connections
                .call(|channel| {
                    let mut request = Request::new(message.clone());
                    if let Some(deadline) = deadline {
                        request.set_timeout(deadline.saturating_duration_since(Instant::now()));
                    }
                    if let Some(authorization) = &authorization {
                        request.metadata_mut().insert("authorization", authorization.clone());
                    }
                    method(TokenServiceClient::new(channel), request)
                })
                .await;
            if let (Err(status), Some(bearer), Some(used)) =
                (&answered, &self.bearer, &authorization)
                && status.code() == Code::Unauthenticated
                && !is_local(status)
                && std::mem::take(&mut may_repeat)
                && bearer.has_changed_from(used).await
            {
                debug!("the bearer was refused, and its file has changed");
                continue;
            }
            return answered.map(|answer| (answer.into_inner(), authorization));
        }
    }
}

/// Waits for the answer to a call until `deadline`.
async fn in_time<A>(
    account: &str,
    deadline: Instant,
    call: impl Future<Output = Result<A, Status>>,
) -> Result<A, Error> {
    match timeout_at(deadline, call).await {
        Ok(answered) => answered.map_err(|status| Error::from_status(account, &status)),
        Err(_) => Err(Error::deadline(account)),
    }
}

fn read_and_connect(settings: &Settings) -> Result<Connections, String> {
    let contents = if settings.is_tls() { Some(settings.tls_files.read()?) } else { None };
    connect(settings, contents)
}

fn connect(settings: &Settings, tls: Option<TlsContents>) -> Result<Connections, String> {
    Connections::new(Arc::clone(&settings.endpoints), tls, Arc::clone(&settings.connect))
        .map_err(|why| format!("the TLS files cannot be used: {why}"))
}

/// Reads the TLS files without blocking the thread.
async fn read(files: &TlsFiles) -> Result<TlsContents, String> {
    let files = files.clone();
    let read = tokio::task::spawn_blocking(move || files.read()).await;
    read.unwrap_or_else(|_| Err("the files could not be read".into()))
}
