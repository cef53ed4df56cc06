//! Compiles the `.proto` with protox, so that no `protoc` is needed.

use std::error::Error;

const PROTO: &str = "proto/token_broker/v1/token_broker.proto";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={PROTO}");
    let files = protox::Compiler::new(["proto"])?
        .include_source_info(true)
        .include_imports(true)
        .open_file(PROTO)?
        .file_descriptor_set();
    tonic_prost_build::configure()
        // `Debug` of this type would print the token.
        .skip_debug(["token_broker.v1.GetTokenResponse"])
        // Tests call the client with a broker of their own.
        .server_mod_attribute("token_broker.v1", "#[cfg(test)]")
        .compile_fds(files)?;
    Ok(())
}
