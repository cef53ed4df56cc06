//! Token Broker.

fn main() {}
