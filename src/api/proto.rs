//! The generated types of `proto/token_broker/v1/token_broker.proto`.
#![expect(unused_qualifications, clippy::pedantic, reason = "generated from a commented .proto")]

use std::fmt;

tonic::include_proto!("token_broker.v1");

/// The encoded `FileDescriptorSet` of the `.proto`, which reflection serves.
pub const DESCRIPTORS: &[u8] =
    include_bytes!(concat!(env!("OUT_DIR"), "/token_broker_descriptor.bin"));

/// The text of the `.proto`, which the command `proto` prints.
pub const SOURCE: &str = include_str!("../../proto/token_broker/v1/token_broker.proto");

// The build leaves out the derived `Debug` of this type, since it would print the token.
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
    fn the_debug_output_of_a_response_does_not_hold_the_token() {
        let answer = GetTokenResponse { access_token: "canary".into(), ..Default::default() };
        let event = WatchTokensResponse {
            account: "acme".into(),
            event: Some(watch_tokens_response::Event::Token(answer.clone())),
        };
        assert!(!format!("{answer:?} {event:#?}").contains("canary"));
    }
}
