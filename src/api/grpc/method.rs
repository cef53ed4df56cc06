//! What the path of a request, `/package.Service/Method`, says about the call.

use crate::{audit::record::Event, telemetry::Method};

/// Returns the method of `TokenService` that `path` names.
pub(super) fn method_of(path: &str) -> Method {
    match method_name(path) {
        "GetToken" => Method::GetToken,
        "WatchTokens" => Method::WatchTokens,
        "ReportRejectedToken" => Method::ReportRejectedToken,
        "ListAccounts" => Method::ListAccounts,
        _ => Method::Unknown,
    }
}

/// Returns the audit event of a call of `method`.
pub(super) fn event_of(method: Method) -> Event {
    match method {
        Method::GetToken => Event::GetToken,
        Method::WatchTokens => Event::WatchTokens,
        Method::ReportRejectedToken => Event::ReportRejectedToken,
        Method::ListAccounts => Event::ListAccounts,
        Method::Unknown => Event::UnknownMethod,
    }
}

/// Whether the response is a stream, which lasts as long as its client wants.
pub(super) fn has_response_stream(path: &str) -> bool {
    const STREAMING: [&str; 3] = ["WatchTokens", "Watch", "ServerReflectionInfo"];
    STREAMING.contains(&method_name(path))
}

/// Whether the request is a stream of messages. Only reflection has one.
pub(super) fn has_request_stream(path: &str) -> bool {
    method_name(path) == "ServerReflectionInfo"
}

fn method_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use prost_types::FileDescriptorSet;

    use super::*;
    use crate::api::proto;

    /// Fails when an RPC was added to the `.proto` and not here.
    #[test]
    fn every_rpc_of_the_proto_has_a_method_and_its_kind_of_stream() {
        let descriptors = FileDescriptorSet::decode(proto::DESCRIPTORS).unwrap();
        let services: Vec<_> = descriptors
            .file
            .iter()
            .filter(|file| file.package() == "token_broker.v1")
            .flat_map(|file| &file.service)
            .collect();
        assert_eq!(services.len(), 1);
        for rpc in &services[0].method {
            let path = format!("/token_broker.v1.{}/{}", services[0].name(), rpc.name());
            assert_ne!(method_of(&path), Method::Unknown, "{path}");
            assert_eq!(has_response_stream(&path), rpc.server_streaming(), "{path}");
            assert_eq!(has_request_stream(&path), rpc.client_streaming(), "{path}");
        }
        assert_eq!(method_of("/token_broker.v1.TokenService/Other"), Method::Unknown);
    }
}
