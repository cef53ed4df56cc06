//! What must hold whatever bytes come in. The fuzzer tries it with inputs of its own making, and the
//! tests with `seeds/`: real inputs, and those that once showed a fault.

mod edits;
mod inside;
mod outside;

pub use inside::{journal, sealed_value};
pub use outside::{bearer, client_certificate, grant_pattern, upstream_answer};
