//! What callers, operators and probes touch: gRPC, and HTTP for operations.

pub mod grpc;
pub mod ops;
pub mod proto;
