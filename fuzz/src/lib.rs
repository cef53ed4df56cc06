//! The fuzz targets: functions that take arbitrary bytes and panic if a property does not hold. The
//! fuzzer runs them with the inputs that it generates. `cargo test` in the root crate runs them with
//! random inputs and with `seeds/`, which has valid inputs and those that once revealed a fault.

mod edits;
mod received;
mod stored;

pub use received::{bearer, client_certificate, grant_pattern, upstream_answer};
pub use stored::{journal, sealed_value};
