//! A tower layer that puts tokens on HTTP requests.

use std::{
    fmt,
    future::poll_fn,
    mem,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf, Bytes};
use http::{Request, Response, Uri, header::AUTHORIZATION};
use http_body::Body;
use http_body_util::{Empty, Full};
use tower_layer::Layer;
use tower_service::Service;
use url::Url;

use crate::{
    authorizer::{Authorizer, SendError, authorization},
    client::TokenClient,
    peeked::{PeekedBody, peek},
};

/// A layer that puts the token of one account on each request, and sends a request once more with another token
/// if the API refuses the first one.
///
/// A request to another host than that of the API is not sent: it fails with
/// [`ErrorKind::WrongHost`](crate::ErrorKind::WrongHost). Put a layer that follows redirects outside of this one,
/// so that redirects are checked too.
#[derive(Clone, Debug)]
pub struct AuthorizationLayer {
    authorizer: Authorizer,
}

impl AuthorizationLayer {
    /// Returns a layer that takes the account's tokens from `client`.
    #[must_use]
    pub fn new(client: TokenClient, account: &str) -> Self {
        Self { authorizer: Authorizer::new(client, account) }
    }

    /// Sets how long a request waits for its token, and again for another token after a refusal. The default is
    /// the client's timeout.
    #[must_use]
    pub fn timeout(self, timeout: Duration) -> Self {
        Self { authorizer: self.authorizer.with_timeout(timeout) }
    }
}

impl<S> Layer<S> for AuthorizationLayer {
    type Service = Authorization<S>;

    fn layer(&self, inner: S) -> Authorization<S> {
        Authorization { inner, authorizer: self.authorizer.clone() }
    }
}

/// The service of [`AuthorizationLayer`].
#[derive(Clone)]
pub struct Authorization<S> {
    inner: S,
    authorizer: Authorizer,
}

impl<S> fmt::Debug for Authorization<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authorization")
            .field("authorizer", &self.authorizer)
            .finish_non_exhaustive()
    }
}

/// The body of a request that can be sent again, if it can be copied.
pub trait TryCloneBody: Sized {
    /// Returns a copy; `None` if the body can be read only once. Then the program gets the API's refusal.
    fn try_clone(&self) -> Option<Self>;
}

impl<D: Buf + Clone> TryCloneBody for Full<D> {
    fn try_clone(&self) -> Option<Self> {
        Some(self.clone())
    }
}

impl<D: Buf> TryCloneBody for Empty<D> {
    fn try_clone(&self) -> Option<Self> {
        Some(Self::new())
    }
}

impl TryCloneBody for String {
    fn try_clone(&self) -> Option<Self> {
        Some(self.clone())
    }
}

impl<S, B, R> Service<Request<B>> for Authorization<S>
where
    S: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
    B: TryCloneBody + Send + 'static,
    R: Body<Data = Bytes, Error: Send> + Send + Unpin + 'static,
{
    type Response = Response<PeekedBody<R>>;
    type Error = SendError<S::Error>;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(SendError::Request)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        // The service that is ready is the one that must be called.
        let clone = self.inner.clone();
        let mut inner = mem::replace(&mut self.inner, clone);
        let authorizer = self.authorizer.clone();
        Box::pin(async move {
            let url = url_of(request.uri());
            let token = authorizer.token_for(url.as_ref()).await.map_err(SendError::Token)?;
            let (mut parts, body) = request.into_parts();
            let again = body.try_clone().map(|body| (parts.clone(), body));
            parts.headers.insert(AUTHORIZATION, authorization(&token).map_err(SendError::Token)?);
            let request = Request::from_parts(parts, body);
            let answer = inner.call(request).await.map_err(SendError::Request)?;
            let (code, answer) = peek(answer).await;
            let Some(code) = code else { return Ok(answer) };
            let Some(newer) = authorizer.replacement(&token, code).await else { return Ok(answer) };
            let (Some((mut parts, body)), Ok(authorization)) = (again, authorization(&newer))
            else {
                return Ok(answer);
            };
            parts.headers.insert(AUTHORIZATION, authorization);
            poll_fn(|cx| inner.poll_ready(cx)).await.map_err(SendError::Request)?;
            let answer = inner.call(Request::from_parts(parts, body)).await;
            Ok(answer.map_err(SendError::Request)?.map(PeekedBody::new))
        })
    }
}

fn url_of(uri: &Uri) -> Option<Url> {
    Url::parse(&uri.to_string()).ok()
}

#[cfg(test)]
mod tests {
    use std::{
        convert::Infallible,
        sync::{Arc, Mutex},
    };

    use http_body_util::BodyExt;
    use tower::{ServiceExt, service_fn};

    use super::*;
    use crate::{
        ErrorKind,
        proto::report_rejected_token_response::Outcome,
        testing::{FakeBroker, answer},
    };

    const SECOND: Duration = Duration::from_secs(1);
    const URL: &str = "http://api.example/v1/messages";

    /// An API that refuses the tokens of generations below `accepted` with `code`.
    struct Api {
        accepted: u64,
        code: &'static str,
        requests: Arc<Mutex<Vec<String>>>,
    }

    impl Api {
        fn new(accepted: u64, code: &'static str) -> Self {
            Self { accepted, code, requests: Arc::default() }
        }

        /// Sends a request with the tokens of `broker`. Returns the status and the body of the answer.
        async fn send<B>(&self, broker: &FakeBroker, url: &str, body: B) -> (u16, String)
        where
            B: TryCloneBody + Body<Data: Send, Error: fmt::Debug> + Send + 'static,
        {
            self.try_send(AuthorizationLayer::new(broker.client(), "acme"), url, body)
                .await
                .unwrap()
        }

        async fn try_send<B>(
            &self,
            layer: AuthorizationLayer,
            url: &str,
            body: B,
        ) -> Result<(u16, String), SendError<Infallible>>
        where
            B: TryCloneBody + Body<Data: Send, Error: fmt::Debug> + Send + 'static,
        {
            let (accepted, code, requests) = (self.accepted, self.code, self.requests.clone());
            let api = service_fn(move |request: Request<B>| {
                let requests = requests.clone();
                async move {
                    let token = request.headers()[AUTHORIZATION].to_str().unwrap().to_owned();
                    let body = request.into_body().collect().await.unwrap().to_bytes();
                    let body = String::from_utf8(body.to_vec()).unwrap();
                    requests.lock().unwrap().push(format!("{token} {body}"));
                    let generation: u64 = token.rsplit_once('-').unwrap().1.parse().unwrap();
                    let (status, body) = if generation < accepted {
                        (401, format!(r#"{{"error":{{"code":"{code}"}}}}"#))
                    } else {
                        (200, "done".to_owned())
                    };
                    let answer = Response::builder().status(status).body(Full::<Bytes>::from(body));
                    Ok::<_, Infallible>(answer.unwrap())
                }
            });
            let request = Request::post(url).body(body).unwrap();
            let answer = layer.layer(api).oneshot(request).await?;
            let status = answer.status().as_u16();
            let body = answer.into_body().collect().await.unwrap().to_bytes();
            Ok((status, String::from_utf8(body.to_vec()).unwrap()))
        }

        fn requests(&self) -> Vec<String> {
            self.requests.lock().unwrap().clone()
        }
    }

    /// Returns a broker that has the generation 1, and then 2.
    fn broker() -> FakeBroker {
        let token = |generation| Ok(answer(generation, 10 * SECOND, 20 * SECOND));
        let broker = FakeBroker::new([token(1), token(2)]);
        broker.report_outcomes([(Outcome::Reissuing, Duration::ZERO)]);
        broker
    }

    #[tokio::test(start_paused = true)]
    async fn a_refused_token_is_reported_and_the_request_sent_once_more_with_the_next() {
        let (broker, api) = (broker(), Api::new(2, "61003"));
        let answered = api.send(&broker, URL, "hello".to_owned()).await;
        assert_eq!(answered, (200, "done".into()));
        assert_eq!(api.requests(), ["Bearer canary-1 hello", "Bearer canary-2 hello"]);
        assert_eq!(broker.calls(), ["get acme", "report acme 1 61003", "get acme newer than 1"]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_second_refusal_is_given_to_the_program() {
        let (broker, api) = (broker(), Api::new(9, "61004"));
        let answered = api.send(&broker, URL, String::new()).await;
        assert_eq!(answered, (401, r#"{"error":{"code":"61004"}}"#.into()));
        assert_eq!(api.requests().len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_is_not_about_the_token_is_reported_to_nobody() {
        let (broker, api) = (broker(), Api::new(9, "63001"));
        let answered = api.send(&broker, URL, String::new()).await;
        assert_eq!(answered, (401, r#"{"error":{"code":"63001"}}"#.into()));
        assert_eq!((api.requests().len(), broker.calls().len()), (1, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_goes_to_no_other_scheme_host_or_port() {
        for url in [
            "http://evil.example/v1",
            "https://api.example/v1",
            "http://api.example:81/v1",
            "http://api.example.evil/",
            "/v1/messages",
        ] {
            let (broker, api) = (broker(), Api::new(0, ""));
            let layer = AuthorizationLayer::new(broker.client(), "acme");
            match api.try_send(layer, url, String::new()).await {
                Err(SendError::Token(error)) => assert_eq!(error.kind(), ErrorKind::WrongHost),
                other => panic!("{url}: {other:?}"),
            }
            assert!(api.requests().is_empty());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn callers_that_hold_the_same_generation_share_one_report() {
        let (broker, api) = (broker(), Api::new(2, "61003"));
        broker.delay(SECOND);
        let layer = AuthorizationLayer::new(broker.client(), "acme");
        let send = || api.try_send(layer.clone(), URL, String::new());
        let (a, b, c) = tokio::join!(send(), send(), send());
        assert!([a, b, c].into_iter().all(|answered| answered.unwrap().0 == 200));
        assert_eq!(broker.calls(), ["get acme", "report acme 1 61003", "get acme newer than 1"]);
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_recent_issue_the_adapter_waits_and_reports_again_if_it_has_the_time() {
        for (retry_after, status, calls) in [(2, 200, 4), (7, 401, 2)] {
            let (broker, api) = (broker(), Api::new(2, "61003"));
            broker.report_outcomes([
                (Outcome::TooSoon, retry_after * SECOND),
                (Outcome::Reissuing, Duration::ZERO),
            ]);
            let start = tokio::time::Instant::now();
            assert_eq!(api.send(&broker, URL, String::new()).await.0, status);
            assert_eq!(start.elapsed() >= 2 * SECOND, status == 200);
            assert_eq!(broker.calls().len(), calls, "{:?}", broker.calls());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_fault_that_is_not_the_tokens_leads_to_the_apis_answer() {
        let (broker, api) = (broker(), Api::new(2, "61003"));
        broker.report_outcomes([(Outcome::NotATokenFault, Duration::ZERO)]);
        assert_eq!(api.send(&broker, URL, String::new()).await.0, 401);
        assert_eq!(broker.calls().len(), 2);
    }
}
