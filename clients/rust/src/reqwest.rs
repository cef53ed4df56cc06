//! A wrapper of `reqwest::Client` that puts tokens on requests.

use std::{error::Error as StdError, sync::Arc, time::Duration};

use http::{Response as HttpResponse, header::AUTHORIZATION};
use reqwest::{
    Body, Client, ClientBuilder, Method, Request, RequestBuilder, Response, ResponseBuilderExt,
    Url, redirect::Policy,
};

use crate::{
    authorizer::{Authorizer, SendError, authorization, wrong_host},
    client::TokenClient,
    error::Error,
    peeked::peek,
};

/// Redirects to the same host are followed so many times.
const MOST_REDIRECTS: usize = 10;

/// An HTTP client that puts the token of one account on each request, and sends a request once more with another
/// token if the API refuses the first one.
///
/// A request or redirect to another host than that of the API is not sent: it fails with
/// [`ErrorKind::WrongHost`](crate::ErrorKind::WrongHost).
#[derive(Clone, Debug)]
pub struct AuthorizedClient {
    http: Client,
    authorizer: Authorizer,
}

impl AuthorizedClient {
    /// Builds the HTTP client from `builder`, with a redirect policy of its own. Takes the account's tokens from
    /// `client`.
    pub fn new(
        builder: ClientBuilder,
        client: TokenClient,
        account: &str,
    ) -> Result<Self, reqwest::Error> {
        let http = builder.redirect(redirects_to_the_same_host(account)).build()?;
        Ok(Self { http, authorizer: Authorizer::new(client, account) })
    }

    /// Sets how long a request waits for its token, and again for another token after a refusal. The default is
    /// the client's timeout.
    #[must_use]
    pub fn timeout(self, timeout: Duration) -> Self {
        Self { authorizer: self.authorizer.with_timeout(timeout), ..self }
    }

    /// Starts a request, which [`send`](Self::send) sends.
    pub fn request(&self, method: Method, url: impl reqwest::IntoUrl) -> RequestBuilder {
        self.http.request(method, url)
    }

    /// Starts a GET request.
    pub fn get(&self, url: impl reqwest::IntoUrl) -> RequestBuilder {
        self.request(Method::GET, url)
    }

    /// Starts a POST request.
    pub fn post(&self, url: impl reqwest::IntoUrl) -> RequestBuilder {
        self.request(Method::POST, url)
    }

    /// Sends a request with the account's token. (`RequestBuilder::send` would send it without one.)
    pub async fn send(
        &self,
        request: RequestBuilder,
    ) -> Result<Response, SendError<reqwest::Error>> {
        self.execute(request.build().map_err(SendError::Request)?).await
    }

    /// Sends a request with the account's token.
    pub async fn execute(
        &self,
        mut request: Request,
    ) -> Result<Response, SendError<reqwest::Error>> {
        let token =
            self.authorizer.token_for(Some(request.url())).await.map_err(SendError::Token)?;
        let again = request.try_clone();
        request
            .headers_mut()
            .insert(AUTHORIZATION, authorization(&token).map_err(SendError::Token)?);
        let answer = self.http.execute(request).await.map_err(send_error)?;
        if !answer.status().is_client_error() && !answer.status().is_server_error() {
            return Ok(answer);
        }
        let url = answer.url().clone();
        let (code, answer) = peek(HttpResponse::<Body>::from(answer)).await;
        let answer = Response::from(with_url(answer.map(Body::wrap), url));
        let Some(code) = code else { return Ok(answer) };
        let Some(newer) = self.authorizer.replacement(&token, code).await else {
            return Ok(answer);
        };
        let (Some(mut request), Ok(authorization)) = (again, authorization(&newer)) else {
            return Ok(answer);
        };
        request.headers_mut().insert(AUTHORIZATION, authorization);
        self.http.execute(request).await.map_err(send_error)
    }
}

/// Follows redirects within the host of the first request, because reqwest would send others without the token or,
/// worse, with it.
fn redirects_to_the_same_host(account: &str) -> Policy {
    let account: Arc<str> = account.into();
    Policy::custom(move |attempt| {
        let Some(first) = attempt.previous().first() else { return attempt.follow() };
        if attempt.url().origin() != first.origin() {
            let base = first.origin().ascii_serialization();
            return attempt.error(wrong_host(&account, &base));
        }
        if attempt.previous().len() > MOST_REDIRECTS {
            return attempt.error("too many redirects");
        }
        attempt.follow()
    })
}

/// Returns the client's own error if that is why reqwest failed.
fn send_error(error: reqwest::Error) -> SendError<reqwest::Error> {
    let mut cause = error.source();
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<Error>() {
            return SendError::Token(error.clone());
        }
        cause = error.source();
    }
    SendError::Request(error)
}

/// Lets the answer that is made from `answer` have `url`, which only reqwest's extension of a builder can set.
fn with_url<B>(answer: HttpResponse<B>, url: Url) -> HttpResponse<B> {
    let (mut parts, body) = answer.into_parts();
    if let Ok(with_url) = HttpResponse::builder().url(url).body(()) {
        parts.extensions.extend(with_url.into_parts().0.extensions);
    }
    HttpResponse::from_parts(parts, body)
}
