//! The gRPC API.
//!
//! A call passes these modules in this order:
//!
//! | module | does |
//! |---|---|
//! | [`server`] | accepts and limits connections, terminates TLS, speaks HTTP/2 on the worker threads |
//! | [`audit`] | authenticates and rate limits each call of `TokenService`, bounds it by its deadline, and writes its audit record before the answer leaves |
//! | [`authentication`] | finds the caller of a bearer or a client certificate |
//! | [`token_service`] | the RPCs of `TokenService` |
//! | `watch` | the streams of `WatchTokens` |
//! | `convert` | checks and converts requests; builds responses |
//! | [`status`] | the gRPC status and reason of each refusal |
//! | `message` | which requests and messages are not read: content type, encoding, size, format |
//! | `pushback` | whether a client that retries by itself has the time for it |
//! | `public_service` | limits health and reflection, which need no credential |
//!
//! To add an RPC: declare it in `proto/token_broker/v1/token_broker.proto`; implement it in
//! [`token_service`], with its logic in `services::token_provider`; give it a method in
//! [`telemetry::Method`](crate::telemetry::Method) and an event in
//! [`audit::record::Event`](crate::audit::record::Event), and map its path to both in `method.rs`.

pub mod audit;
pub mod authentication;
mod connection;
mod convert;
mod guarded_body;
mod handover;
mod limits;
mod message;
mod method;
mod public_service;
mod pushback;
pub mod server;
pub mod status;
mod timeout;
pub mod token_service;
mod watch;

use std::sync::Arc;

use http::{Request, Response};
pub use token_service::TokenServiceHandler;
use tonic::{Status, body::Body, codec::CompressionEncoding::Gzip, service::Routes};

use self::{
    audit::{AuditLayer, AuditService},
    limits::{MAX_PUBLIC_REQUEST_BYTES, MAX_REQUEST_BYTES},
    public_service::PublicService,
};
use crate::{
    api::proto::{self, token_service_server::TokenServiceServer},
    services::token_provider::CallRefusal,
};

/// Builds everything that the gRPC port serves: `TokenService`, health, and reflection (v1 and v1alpha).
/// The returned reporter sets the state that health reports.
///
/// # Errors
/// When reflection cannot read a descriptor set, which is a fault of the build.
pub fn routes(
    handler: TokenServiceHandler,
    audit: Arc<AuditLayer>,
) -> Result<(Routes, tonic_health::server::HealthReporter), tonic_reflection::server::Error> {
    let (health_reporter, health) = tonic_health::server::health_reporter();
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let service = TokenServiceServer::new(handler)
        .max_decoding_message_size(MAX_REQUEST_BYTES)
        .accept_compressed(Gzip);
    let health = health.max_decoding_message_size(MAX_PUBLIC_REQUEST_BYTES).accept_compressed(Gzip);
    let v1 = reflection()
        .build_v1()?
        .max_decoding_message_size(MAX_PUBLIC_REQUEST_BYTES)
        .accept_compressed(Gzip);
    let v1alpha = reflection()
        .build_v1alpha()?
        .max_decoding_message_size(MAX_PUBLIC_REQUEST_BYTES)
        .accept_compressed(Gzip);
    let routes = Routes::new(AuditService::new(service, audit))
        .add_service(PublicService(health))
        .add_service(PublicService(v1))
        .add_service(PublicService(v1alpha));
    let routes = Routes::from(routes.into_axum_router().fallback(unknown_service)).prepare();
    Ok((routes, health_reporter))
}

/// Answers calls of services that are not served. It asks for no credential, as other gRPC servers do.
async fn unknown_service(request: Request<axum::body::Body>) -> Response<Body> {
    let refusal = message::check(&request).err().unwrap_or(CallRefusal::UnknownMethod);
    Status::from(refusal).into_http()
}
