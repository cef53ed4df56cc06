//! The generated types of `proto/token_broker/v1/token_broker.proto`.
#![expect(unused_qualifications, clippy::pedantic, reason = "generated from a commented .proto")]

use std::fmt;

tonic::include_proto!("token_broker.v1");

/// The encoded descriptor set, for reflection.
pub const DESCRIPTORS: &[u8] =
    include_bytes!(concat!(env!("OUT_DIR"), "/token_broker_descriptor.bin"));

/// The `.proto` as written.
pub const SOURCE: &str = include_str!("../../proto/token_broker/v1/token_broker.proto");

impl fmt::Debug for GetTokenResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GetTokenResponse")
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_in_an_answer_is_not_printed() {
        let answer = GetTokenResponse { access_token: "canary".into(), ..Default::default() };
        let event = WatchTokensResponse {
            account: "acme".into(),
            event: Some(watch_tokens_response::Event::Token(answer.clone())),
        };
        assert!(!format!("{answer:?} {event:#?}").contains("canary"));
    }
}
