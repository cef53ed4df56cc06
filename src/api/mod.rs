//! The network interfaces: gRPC for callers, HTTP for operators and probes.

pub mod grpc;
pub mod ops;
pub mod proto;
