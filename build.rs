//! Compiles the `.proto` with protox, so that no `protoc` is needed, and keeps the descriptor set
//! for reflection.

use std::{env, error::Error, fs, path::PathBuf};

use prost_build::Config;

const PROTO: &str = "proto/token_broker/v1/token_broker.proto";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    // `sqlx::migrate!` embeds the migrations, and does not notice a new file by itself.
    println!("cargo::rerun-if-changed=migrations");

    // The source info carries the comments, which become the docs of the generated types. Reflection
    // does not need them.
    let files = protox::Compiler::new(["proto"])?
        .include_source_info(true)
        .include_imports(true)
        .open_file(PROTO)?
        .file_descriptor_set();
    let descriptors = protox::Compiler::new(["proto"])?
        .include_imports(true)
        .open_file(PROTO)?
        .encode_file_descriptor_set();
    fs::write(
        PathBuf::from(env::var("OUT_DIR")?).join("token_broker_descriptor.bin"),
        descriptors,
    )?;

    let mut config = Config::new();
    // A token must not be printed: `src/api/proto.rs` implements `Debug` without it.
    config.skip_debug(["token_broker.v1.GetTokenResponse"]);
    tonic_prost_build::configure().compile_fds_with_config(files, config)?;
    Ok(())
}
