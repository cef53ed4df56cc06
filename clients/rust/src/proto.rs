//! The generated types of the `.proto`.
#![allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::items_after_test_module,
    clippy::pedantic,
    reason = "generated from a commented .proto"
)]

use std::fmt;

tonic::include_proto!("token_broker.v1");

// The build leaves out the derived `Debug` of this type, since it would print the token.
impl fmt::Debug for GetTokenResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GetTokenResponse")
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}
