#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| token_broker_fuzz::client_certificate(bytes));
