//! Single gRPC calls with any headers and any body, and the whole answer.

use std::net::SocketAddr;

use bytes::Bytes;
use http::{HeaderMap, Request};
use prost::Message;
use token_broker::{api::proto::GetTokenRequest, crypto::bearer::Bearer};
use tokio::net::TcpStream;
use tonic::{Code, Status};

use super::{broker::code_and_reason, raw_http2};

pub(crate) const GET_TOKEN: &str = "/token_broker.v1.TokenService/GetToken";

/// A call that is made as it is: the client adds and enforces nothing.
#[derive(Clone, Debug)]
pub(crate) struct RawCall {
    method: http::Method,
    path: String,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl RawCall {
    /// Creates a call of `path` with a body, which is usually a frame.
    pub(crate) fn new(path: &str, body: Vec<u8>) -> Self {
        let headers = [("content-type", "application/grpc"), ("te", "trailers")];
        let headers = headers.map(|(name, value)| (name.into(), value.into())).into();
        Self { method: http::Method::POST, path: path.into(), headers, body }
    }

    /// Creates a `GetToken` call with a bearer.
    pub(crate) fn get_token(bearer: &Bearer, account: &str) -> Self {
        let message = GetTokenRequest { account: account.into(), ..Default::default() };
        let body = raw_http2::message(&message.encode_to_vec());
        Self::new(GET_TOKEN, body).bearer(bearer)
    }

    pub(crate) fn bearer(self, bearer: &Bearer) -> Self {
        self.header("authorization", &format!("Bearer {}", bearer.expose()))
    }

    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    pub(crate) fn without(mut self, name: &str) -> Self {
        self.headers.retain(|(header, _)| header != name);
        self
    }

    pub(crate) fn method(mut self, method: &str) -> Self {
        self.method = method.parse().unwrap();
        self
    }

    pub(crate) fn body(mut self, body: Vec<u8>) -> Self {
        self.body = body;
        self
    }

    /// Makes the call on a connection of its own.
    pub(crate) async fn send(&self, address: SocketAddr) -> RawAnswer {
        let stream = TcpStream::connect(address).await.unwrap();
        let (send, connection) = h2::client::handshake(stream).await.unwrap();
        let connection = tokio::spawn(connection);
        let answer = self.send_on(send).await;
        connection.abort();
        answer
    }

    async fn send_on(&self, send: h2::client::SendRequest<Bytes>) -> RawAnswer {
        let mut request = Request::builder()
            .method(self.method.clone())
            .uri(format!("http://broker{}", self.path));
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        let mut send = send.ready().await.unwrap();
        let (answer, mut body) = send.send_request(request.body(()).unwrap(), false).unwrap();
        // The call may be refused before its body has arrived.
        let _ = body.send_data(self.body.clone().into(), true);
        let answer = answer.await.unwrap();
        let http_status = answer.status().as_u16();
        let mut headers = answer.headers().clone();
        let (mut body, mut data) = (answer.into_body(), vec![]);
        while let Some(Ok(chunk)) = body.data().await {
            body.flow_control().release_capacity(chunk.len()).unwrap();
            data.extend(chunk);
        }
        if let Ok(Some(trailers)) = body.trailers().await {
            headers.extend(trailers);
        }
        RawAnswer { http_status, headers, data }
    }
}

/// The answer to a call: its headers and trailers, and the bytes of its messages.
#[derive(Debug)]
pub(crate) struct RawAnswer {
    pub(crate) http_status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) data: Vec<u8>,
}

impl RawAnswer {
    pub(crate) fn status(&self) -> Status {
        Status::from_header_map(&self.headers).expect("a status")
    }

    /// Returns the code, and the reason if there is one.
    pub(crate) fn code_and_reason(&self) -> String {
        code_and_reason(&self.status())
    }

    pub(crate) fn is_ok(&self) -> bool {
        self.status().code() == Code::Ok
    }

    /// Returns a header or trailer.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    /// Returns `grpc-retry-pushback-ms` as clients read it.
    pub(crate) fn pushback(&self) -> Option<Result<i32, std::num::ParseIntError>> {
        self.header("grpc-retry-pushback-ms").map(str::parse)
    }
}
