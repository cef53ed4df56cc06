//! Parses the command line, runs the command, and exits with its code.

use std::process::ExitCode;

use clap::Parser;
use token_broker::cli::{self, Cli};

fn main() -> ExitCode {
    // `dev` starts this program once more as a guard, which ends Postgres when `dev` is killed. The
    // guard needs neither the command line's help nor a runtime.
    #[cfg(feature = "embedded-postgres")]
    if std::env::args_os().nth(1).is_some_and(|it| it == token_broker::dev::postgres::GUARD_COMMAND)
    {
        return token_broker::dev::postgres::guard(std::env::args_os().skip(2));
    }
    run()
}

#[tokio::main]
async fn run() -> ExitCode {
    cli::run(Cli::parse()).await
}
